//! Direct I/O: what the kernel asks of transfers past the page cache, and those that it would not take as they are.
//!
//! ```text
//!   block            block            block
//!   [ kept | written ][    written    ][ written | kept ]     read, changed and written again: alone
//!                     [    written    ]                       whole blocks: beside each other
//! ```
//!
//! A buffer that is aligned takes the place of one that is not. A write that begins or ends inside of a block
//! writes again what is around it. Whatever somebody else writes to that block in between would be lost, also
//! where not a byte of the two requests is the same: so such a write has its blocks alone.

use std::fs;
use std::ops::Range;
use std::sync::OnceLock;

use rustix::fs::{AtFlags, StatxFlags};
use vm_memory::VolatileSlice;

use crate::buffers::Buffers;
use crate::error::{Error, ErrorKind, Result};
use crate::file::{ImageFile, MAX_FILE_OFFSET};
use crate::inflight::{InFlight, Kept};

/// The most bytes that go through a buffer at a time: a multiple of every block.
const MAX_BOUNCE: u64 = 1 << 20;

/// What the kernel asks of transfers, and who writes to which blocks.
#[derive(Debug)]
pub(crate) struct Direct {
    /// Addresses are multiples of this: a power of two.
    memory: usize,
    /// Offsets in the file and lengths are multiples of this: a power of two, at most [`MAX_BOUNCE`].
    block: u64,
    /// By offset in the file. Most files are never written and need none.
    writes: OnceLock<InFlight>,
}

/// Where the kernel says nothing: what all storage takes.
const USUAL: u64 = 4096;

impl Direct {
    /// What the kernel says about a file (since Linux 6.1, for most file systems). It is not tried out: whether a
    /// small file can be written like this cannot be found out without writing to it.
    pub(crate) fn ask(file: &fs::File) -> Self {
        let possible = |bytes: &u64| bytes.is_power_of_two() && *bytes <= MAX_BOUNCE;
        let status = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let known = status.filter(|status| status.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let memory = known.map(|status| u64::from(status.stx_dio_mem_align)).filter(possible).unwrap_or(USUAL);
        let block = known.map(|status| u64::from(status.stx_dio_offset_align)).filter(possible).unwrap_or(USUAL);
        Self { memory: usize::try_from(memory).unwrap_or(usize::MAX), block, writes: OnceLock::new() }
    }

    /// Bytes of a block.
    pub(crate) fn block(&self) -> u64 {
        self.block
    }

    /// Whether the kernel takes a transfer between `offset` and buffers of these addresses and lengths.
    pub(crate) fn takes(&self, offset: u64, buffers: impl IntoIterator<Item = (usize, usize)>) -> bool {
        offset.is_multiple_of(self.block)
            && buffers.into_iter().all(|(address, length)| {
                address.is_multiple_of(self.memory) && (length as u64).is_multiple_of(self.block)
            })
    }

    pub(crate) fn writes(&self) -> &InFlight {
        self.writes.get_or_init(|| InFlight::new(0))
    }

    /// Holds whole blocks to write them, or `None` while a part of them is written again.
    pub(crate) fn try_write(&self, start: u64, end: u64) -> Option<Kept> {
        Some(self.writes().try_shared(start, end)?.keep())
    }

    /// The blocks that a range touches.
    fn blocks(&self, start: u64, end: u64) -> Result<Range<u64>> {
        let last = end.checked_next_multiple_of(self.block).filter(|last| *last <= MAX_FILE_OFFSET);
        let last = last.ok_or_else(|| Error::new(ErrorKind::Invalid, "a block ends past the largest file offset"))?;
        Ok(start - start % self.block..last)
    }

    /// Calls `action` with one part after the other of the blocks that `start..end` touches: where it begins in
    /// the file, a buffer for it that the kernel takes, and which bytes of that are inside of the range.
    fn for_each_piece(
        &self,
        start: u64,
        end: u64,
        mut action: impl FnMut(u64, &mut [u8], Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let blocks = self.blocks(start, end)?;
        let bytes = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        let size = bytes((blocks.end - blocks.start).min(MAX_BOUNCE));
        let mut space = vec![0; size.saturating_add(self.memory)];
        let aligned = space.as_ptr().align_offset(self.memory);
        let mut position = blocks.start;
        while position < blocks.end {
            let length = (blocks.end - position).min(MAX_BOUNCE);
            let inside = bytes(start.saturating_sub(position))..bytes(length.min(end - position));
            let Some(piece) = space.get_mut(aligned..aligned.saturating_add(bytes(length))) else { break };
            action(position, piece, inside)?;
            position += length;
        }
        Ok(())
    }
}

impl ImageFile {
    /// Reads by way of a buffer that the kernel takes.
    pub(crate) fn read_bounced(&self, direct: &Direct, buffers: &[VolatileSlice<'_>], range: Range<u64>) -> Result<()> {
        let mut rest = Buffers::new(buffers);
        direct.for_each_piece(range.start, range.end, |position, piece, inside| {
            self.read_as_it_is(&[VolatileSlice::from(&mut *piece)], position)?;
            rest.copy_from(piece.get(inside).unwrap_or_default());
            Ok(())
        })
    }

    /// Writes by way of a buffer that the kernel takes, and writes again what else is in the blocks.
    pub(crate) fn write_bounced(
        &self,
        direct: &Direct,
        buffers: &[VolatileSlice<'_>],
        range: Range<u64>,
    ) -> Result<()> {
        let blocks = direct.blocks(range.start, range.end)?;
        let whole = blocks == range;
        let _beside = whole.then(|| direct.writes().shared(blocks.start, blocks.end));
        let _alone = (!whole).then(|| direct.writes().exclusive(blocks.start, blocks.end));
        let block = usize::try_from(direct.block()).unwrap_or(usize::MAX);
        let mut rest = Buffers::new(buffers);
        direct.for_each_piece(range.start, range.end, |position, piece, inside| {
            let last = piece.len().saturating_sub(block);
            if inside.start > 0 {
                self.read_block(piece, 0..block, position)?;
            }
            if inside.end < piece.len() && (inside.start == 0 || last > 0) {
                self.read_block(piece, last..piece.len(), position)?;
            }
            rest.copy_to(piece.get_mut(inside).unwrap_or_default());
            self.write_as_it_is(&[VolatileSlice::from(piece)], position)
        })
    }

    /// Reads a block of a piece that begins at `position`.
    fn read_block(&self, piece: &mut [u8], block: Range<usize>, position: u64) -> Result<()> {
        let offset = position.saturating_add(block.start as u64);
        let bytes = piece.get_mut(block).unwrap_or_default();
        self.read_as_it_is(&[VolatileSlice::from(bytes)], offset)
    }
}
