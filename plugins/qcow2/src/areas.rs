//! Where the metadata of an image is, so that nothing else is ever written there.
//!
//! The check is that of QEMU's overlap checks: a data cluster or a new table that would lie on the
//! header, a table or a refcount block means that the image contradicts itself, and the write is refused.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;

/// Ranges of the image file that hold metadata. They do not overlap.
#[derive(Debug, Default)]
pub(crate) struct Areas(BTreeMap<u64, (u64, &'static str)>);

impl Areas {
    /// Adds `length` bytes at `offset`, which hold `what`, or says what is there already.
    pub(crate) fn add(&mut self, offset: u64, length: u64, what: &'static str) -> Result<(), String> {
        if length == 0 {
            return Ok(());
        }
        if let Some(found) = self.find(offset, length) {
            return Err(format!("{what} at {offset:#x} overlaps with {found}"));
        }
        self.0.insert(offset, (offset.saturating_add(length), what));
        Ok(())
    }

    /// Takes out what starts at `offset`.
    pub(crate) fn remove(&mut self, offset: u64) {
        self.0.remove(&offset);
    }

    /// What metadata there is in a range, if any.
    pub(crate) fn find(&self, offset: u64, length: u64) -> Option<&'static str> {
        let end = offset.saturating_add(length);
        let (_, (found_end, what)) = self.0.range(..end).next_back()?;
        (*found_end > offset).then_some(*what)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
