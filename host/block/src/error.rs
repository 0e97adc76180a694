//! One error for the whole data path: a small stable kind, the context a person needs, and the source.

use std::fmt;

use crate::Access;

/// What an operator has to do about an error. Small and stable: programs match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The image contradicts its own format. Repair or replace the image.
    Corrupt,
    /// The image uses a feature that its component does not read. Convert the image.
    Unsupported,
    /// The image refers to something that was not granted, or is not there. Grant it, if it is meant.
    Denied,
    /// The request is outside of the disk, or a write to a disk that is read-only.
    Invalid,
    /// The storage below failed (an I/O error of the host).
    Storage,
    /// The component broke its contract, trapped, or went over a limit; it was thrown away.
    Component,
    /// A limit of the host was reached (chain depth, number of opens, memory).
    Limit,
}

impl ErrorKind {
    /// The kind as one lower-case word, for JSON and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Corrupt => "corrupt",
            Self::Unsupported => "unsupported",
            Self::Denied => "denied",
            Self::Invalid => "invalid",
            Self::Storage => "storage",
            Self::Component => "component",
            Self::Limit => "limit",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What lets a request pass that was refused. It is no part of the message: a program says it in the words of its own
/// options. Names are as hostile as the image that they stand in.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// A grant for this file, if the reference is meant.
    Grant {
        /// The absolute name of the file.
        path: String,
        /// Read-write for an external data file that is to be written.
        access: Access,
    },
    /// The format of the backing file, stated in the image, if the image is trusted.
    StateBackingFormat {
        /// The backing file as the image names it.
        backing: String,
    },
    /// To open the image read-only.
    OpenReadOnly,
    /// To wait for the other user of the image, or to read it while it changes.
    Share,
}

/// An error of a disk or of one of its layers.
///
/// `Display` prints one line: what was being done, to which image, and why it failed. Names in it are as the image has
/// them, control characters included: whoever shows it to people escapes them.
///
/// As small as a pointer: a result goes with every request, and hardly ever is an error.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    image: Option<String>,
    remedy: Option<Remedy>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of an operation on a disk or a layer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; `message` says what happened and what to do next.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), image: None, remedy: None, source: None }))
    }

    /// Names the image that the error is about. The innermost name stays.
    #[must_use]
    pub fn on_image(mut self, name: impl Into<String>) -> Self {
        self.0.image.get_or_insert_with(|| name.into());
        self
    }

    /// Names the image that the error is about, whatever it was called before: what the operator knows it by.
    #[must_use]
    pub fn renamed(mut self, name: impl Into<String>) -> Self {
        self.0.image = Some(name.into());
        self
    }

    /// Says what would let the request pass.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<Option<Remedy>>) -> Self {
        self.0.remedy = remedy.into();
        self
    }

    /// Keeps the error below.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What an operator has to do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The image that it is about, as named when it was opened.
    pub fn image(&self) -> Option<&str> {
        self.0.image.as_deref()
    }

    /// What would let the request pass, if anything would.
    pub fn remedy(&self) -> Option<&Remedy> {
        self.0.remedy.as_ref()
    }

    /// The message alone, without the image.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(image) = &self.0.image {
            write!(f, "{image}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_as_small_as_a_pointer() {
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
