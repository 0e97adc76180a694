//! The error that a format answers with.

use alloc::format;
use alloc::string::String;
use core::fmt;

/// Why a call failed; the cases are those of `blockhouse:format/types.error`.
///
/// The text says what was found, where in the image, and what was expected. The host adds the name of
/// the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The image contradicts its own format.
    Corrupt(String),
    /// The image uses a feature that is not read; the text names it.
    Unsupported(String),
    /// A file that the image refers to could not be opened; the text names the reference.
    Denied(String),
    /// Reading a file failed.
    Storage(String),
    /// Anything else.
    Other(String),
}

/// The result of a call of a format.
pub type Result<T, E = Error> = core::result::Result<T, E>;

impl Error {
    /// The image contradicts its own format.
    pub fn corrupt(text: impl Into<String>) -> Self {
        Self::Corrupt(text.into())
    }

    /// The image uses a feature that is not read.
    pub fn unsupported(text: impl Into<String>) -> Self {
        Self::Unsupported(text.into())
    }

    /// A short read: `what` should be at `offset` and the file ends before that.
    pub fn ends_early(what: &str, offset: u64, length: u64, size: u64) -> Self {
        Self::Corrupt(format!("the file ends at byte {size}, before the end of {what} ({length} bytes at {offset})"))
    }

    /// The text without the case.
    pub fn text(&self) -> &str {
        match self {
            Self::Corrupt(text)
            | Self::Unsupported(text)
            | Self::Denied(text)
            | Self::Storage(text)
            | Self::Other(text) => text,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl core::error::Error for Error {}
