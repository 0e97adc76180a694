//! Whether a file may still be used: somebody watches it, and says so once it is not what it was granted as.
//!
//! ```text
//!   who reads:     ask ── read ── ask again ── still valid? ──▶ use what was read
//!   who watches:                     revoke ── and then only let the file change
//! ```
//!
//! Who asks again, and hears nothing, has read before the file was let change. So what was read counts only once
//! it was asked again.

use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

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
    /// stays. False if it was revoked before. What the caller does next, in this process or by the kernel,
    /// comes after it for everybody.
    pub fn revoke(&self, why: impl Into<String>) -> bool {
        let mut first = false;
        self.0.get_or_init(|| {
            first = true;
            why.into()
        });
        first
    }

    /// Why it was revoked, if it was. One load of memory, which comes after all that this thread has read before.
    pub fn revoked(&self) -> Option<&str> {
        // The load alone would keep what follows behind it; what was read before could still be late.
        fence(Ordering::Acquire);
        self.0.get().map(String::as_str)
    }
}
