//! One error for the machine: a small stable kind, a message that says what to do, and the source.

use std::error::Error as StdError;
use std::fmt;

/// What an operator has to do about an error. Small and stable: programs match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// This host offers no KVM to this user. Run elsewhere, or get access to `/dev/kvm`.
    Unavailable,
    /// The machine that was asked for cannot be: change its configuration.
    Config,
    /// The kernel or the initramfs cannot be booted: pass another one.
    Payload,
    /// The host failed: out of memory or threads, or a KVM call that should work did not.
    Host,
    /// The guest did something that KVM cannot go on from.
    Guest,
}

/// An error of the machine. `Display` prints one line; the cause, if any, is the source.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result of an operation on a machine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Appends to the message.
    pub(crate) fn context(mut self, detail: impl fmt::Display) -> Self {
        self.message = format!("{} ({detail})", self.message);
        self
    }

    /// A failure of the host at something that the machine needs: `what` completes "cannot".
    pub(crate) fn host<E>(what: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        move |source| Self::new(ErrorKind::Host, format!("cannot {what}")).with_source(source)
    }

    /// What an operator has to do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
