//! Why a message of the front end is refused: one line for the log.
//!
//! The protocol has no room for reasons: the front end hears at most that something failed.

use std::fmt::{self, Display};

/// What was wrong with a message.
#[derive(Debug)]
pub(crate) struct Refusal(String);

pub(crate) type Result<T> = std::result::Result<T, Refusal>;

/// Returns with a [`Refusal`], written as for `format!`.
macro_rules! refuse {
    ($($text:tt)*) => {
        Err($crate::refusal::Refusal::new(format!($($text)*)))
    };
}
pub(crate) use refuse;

impl Refusal {
    pub(crate) fn new(text: String) -> Self {
        Self(text)
    }

    /// A failure of something that was needed.
    pub(crate) fn because(error: impl Display) -> Self {
        Self(error.to_string())
    }

    /// Says what it is about.
    pub(crate) fn about(self, what: &dyn Display) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Refusal> for vhost::vhost_user::Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(std::io::Error::other(refusal.0))
    }
}
