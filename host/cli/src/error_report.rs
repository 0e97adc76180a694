//! An error as programs read it.

use blockhouse_block::Error;
use serde::Serialize;

/// An error for JSON output.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorReport {
    /// One word: `denied`, `corrupt`.
    pub(crate) kind: &'static str,
    /// The image of the chain that it concerns.
    pub(crate) image: Option<String>,
    /// What happened and what to do.
    pub(crate) message: String,
}

impl From<&Error> for ErrorReport {
    fn from(error: &Error) -> Self {
        Self {
            kind: error.kind().as_str(),
            image: error.image().map(str::to_owned),
            message: error.message().to_owned(),
        }
    }
}
