//! The buffers of a request as one run of bytes, from which pieces are taken front to back.

use std::borrow::Cow;

use vm_memory::VolatileSlice;

/// A source of zeroes to copy from; buffers are volatile and cannot be filled as a slice.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// The bytes of `buffers` that have not been taken yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers<'s, 'b> {
    rest: &'s [VolatileSlice<'b>],
    /// Bytes of the first buffer that are taken.
    skip: usize,
}

impl<'s, 'b> Buffers<'s, 'b> {
    pub(crate) fn new(buffers: &'s [VolatileSlice<'b>]) -> Self {
        Self { rest: buffers, skip: 0 }
    }

    /// The next part, in one buffer and of at most `length` bytes. `None` at the end.
    pub(crate) fn next_part(&mut self, length: usize) -> Option<VolatileSlice<'b>> {
        loop {
            let (first, others) = self.rest.split_first()?;
            let left = first.len().saturating_sub(self.skip);
            if left == 0 {
                self.rest = others;
                self.skip = 0;
                continue;
            }
            let count = left.min(length);
            let part = first.subslice(self.skip, count).ok()?;
            self.skip += count;
            return Some(part);
        }
    }

    /// Leaves out the next `length` bytes.
    pub(crate) fn advance(&mut self, length: u64) {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        while left > 0
            && let Some(part) = self.next_part(left)
        {
            left -= part.len();
        }
    }

    /// Takes the next `length` bytes, as buffers.
    pub(crate) fn take(&mut self, length: u64) -> Cow<'s, [VolatileSlice<'b>]> {
        let all: u64 = self.rest.iter().map(|buffer| buffer.len() as u64).sum();
        if self.skip == 0 && all == length {
            // The usual request is one extent: nothing to cut.
            return Cow::Borrowed(std::mem::take(&mut self.rest));
        }
        let mut parts = Vec::new();
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        while left > 0
            && let Some(part) = self.next_part(left)
        {
            left -= part.len();
            parts.push(part);
        }
        Cow::Owned(parts)
    }

    /// Copies `bytes` into the next part of the buffers.
    pub(crate) fn copy_from(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty()
            && let Some(part) = self.next_part(bytes.len())
        {
            let (now, later) = bytes.split_at(part.len());
            part.copy_from(now);
            bytes = later;
        }
    }

    /// Copies the next bytes of the buffers to `bytes`.
    pub(crate) fn copy_to(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty()
            && let Some(part) = self.next_part(bytes.len())
        {
            let (now, later) = bytes.split_at_mut(part.len());
            part.copy_to(now);
            bytes = later;
        }
    }

    /// Fills the next `length` bytes with zeroes.
    pub(crate) fn zero(&mut self, length: u64) {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        while left > 0
            && let Some(part) = self.next_part(left.min(ZEROES.len()))
        {
            left -= part.len();
            part.copy_from(&ZEROES);
        }
    }
}
