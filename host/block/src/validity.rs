//! Whether a file may still be used: somebody watches it, and says so once it is not what it was granted as.

use std::sync::OnceLock;

/// Shared by the files that stand or fall together, and whoever watches them. Valid until it is revoked, and
/// never again afterwards.
#[derive(Debug, Default)]
pub struct Validity(OnceLock<String>);

impl Validity {
    /// Valid.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on every use fails. `why` completes "the file cannot be used any more: ..."; the first reason
    /// stays. False if it was revoked before.
    pub fn revoke(&self, why: impl Into<String>) -> bool {
        let mut first = false;
        self.0.get_or_init(|| {
            first = true;
            why.into()
        });
        first
    }

    /// Why it was revoked, if it was. One load of memory.
    pub fn revoked(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}
