//! The two levels of tables of a sparse file, read as needed.
//!
//! ```text
//! header ──▶ grain directory      one entry per grain table, 0: none of its grains is here
//!              └─▶ grain table    one entry per grain: 0 not here, 1 zeroes (if the header says so),
//!                    └─▶ grain    anything else the sector where the grain, or its marker, starts
//! ```
//!
//! Nothing is read whole: the directory comes in pieces of 4 KiB, and a few pieces and tables are
//! kept, so that memory does not grow with the image.

use alloc::format;
use alloc::vec::Vec;

use blockhouse_plugin::{Error, ExtentList, File, FileIndex, Located, Placement, Result, bytes};

use crate::header::{Header, SECTOR};

/// Bytes of directory that are read at a time.
const PIECE: u64 = 4096;
/// Pieces and tables that are kept, 4 KiB at most each, for all parts of the disk together.
const KEPT: usize = 64;

/// The pieces and tables read last.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    /// The last used is the last.
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    part: u32,
    offset: u64,
    bytes: Vec<u8>,
}

impl Cache {
    fn get(&mut self, sparse: &Sparse, what: &str, offset: u64, length: u64) -> Result<&[u8]> {
        let found = self.blocks.iter().position(|block| {
            block.part == sparse.part && block.offset == offset && block.bytes.len() as u64 == length
        });
        let block = match found {
            Some(index) => self.blocks.remove(index),
            None => {
                let bytes = sparse.file.read_exact_at(what, offset, length)?;
                if self.blocks.len() >= KEPT {
                    self.blocks.remove(0);
                }
                Block { part: sparse.part, offset, bytes }
            }
        };
        self.blocks.push(block);
        Ok(self.blocks.last().map(|block| block.bytes.as_slice()).unwrap_or_default())
    }
}

/// A sparse file that is a part of the disk.
#[derive(Debug)]
pub(crate) struct Sparse {
    pub(crate) file: File,
    pub(crate) index: FileIndex,
    pub(crate) header: Header,
    /// Size of the file in bytes when it was opened.
    pub(crate) size: u64,
    /// Which part of the disk this is; names it in tokens and in the cache.
    pub(crate) part: u32,
}

impl Sparse {
    /// Answers for byte `offset` of this part, which starts at byte `start` of the disk and is
    /// `length` bytes long: as much of the whole grain table as can be said.
    pub(crate) fn locate(
        &self,
        cache: &mut Cache,
        start: u64,
        length: u64,
        offset: u64,
        max_extents: u32,
    ) -> Result<Located> {
        let span = self.header.table_span();
        let table = offset / span;
        let first = table.saturating_mul(span);
        let entry = self.directory_entry(cache, table)?;
        if entry == 0 {
            // Go on to the end of the piece of directory that is at hand.
            let mut end = first.saturating_add(span);
            let mut next = table.saturating_add(1);
            while end < length && !next.is_multiple_of(PIECE / 4) && self.directory_entry(cache, next)? == 0 {
                end = end.saturating_add(span);
                next = next.saturating_add(1);
            }
            let mut list = ExtentList::new(start.saturating_add(first), max_extents);
            let _one_is_always_taken = list.push(end.min(length).saturating_sub(first), Placement::Unallocated);
            return Ok(list.finish());
        }
        let bytes = self.header.table_entries.saturating_mul(4);
        let entries = cache.get(self, "a grain table", u64::from(entry) * SECTOR, bytes)?;
        let end = first.saturating_add(span).min(length);
        let asked = offset - offset % self.header.grain;

        // From the start of the table, if the budget reaches the grain that was asked for.
        let whole = self.grains(entries, (start, first, end), asked, first, max_extents);
        match whole {
            Ok(list) if list.end() > start.saturating_add(asked) => Ok(list.finish()),
            _ => Ok(self.grains(entries, (start, first, end), asked, asked, max_extents)?.finish()),
        }
    }

    /// The grains of one table from `from` on, until the budget is used up or an entry is damaged.
    ///
    /// # Errors
    /// The entry of the grain at `asked` is damaged.
    fn grains(
        &self,
        entries: &[u8],
        (start, first, end): (u64, u64, u64),
        asked: u64,
        from: u64,
        max_extents: u32,
    ) -> Result<ExtentList> {
        let mut list = ExtentList::new(start.saturating_add(from), max_extents);
        let mut at = from;
        while at < end {
            let index = usize::try_from((at - first) / self.header.grain).unwrap_or(usize::MAX);
            let entry = bytes::le_u32(entries, index.saturating_mul(4))
                .ok_or_else(|| Error::Other(format!("grain {index} is past the end of its table")))?;
            let length = self.header.grain.min(end - at);
            match self.grain(entry, length) {
                Ok(placement) => {
                    if !list.push(length, placement) {
                        break;
                    }
                }
                // A damaged entry costs its own grain only.
                Err(error) if at == asked => return Err(error),
                Err(_) if at < asked => {
                    list = ExtentList::new(start.saturating_add(at).saturating_add(length), max_extents);
                }
                Err(_) => break,
            }
            at = at.saturating_add(length);
        }
        Ok(list)
    }

    fn grain(&self, entry: u32, length: u64) -> Result<Placement> {
        let offset = u64::from(entry) * SECTOR;
        let needed = if self.header.compressed { 1 } else { length };
        match entry {
            0 => Ok(Placement::Unallocated),
            1 if self.header.zeroed_grains => Ok(Placement::Zero),
            _ if offset.saturating_add(needed) > self.size => {
                Err(Error::ends_early("a grain", offset, needed, self.size))
            }
            _ if self.header.compressed => {
                Ok(Placement::Packed { token: (u64::from(self.part) << 32) | u64::from(entry) })
            }
            _ => Ok(Placement::Data { file: self.index, offset, overwrite: false }),
        }
    }

    fn directory_entry(&self, cache: &mut Cache, table: u64) -> Result<u32> {
        let at = table.saturating_mul(4);
        let piece = at - at % PIECE;
        let length = self.header.directory_length().saturating_sub(piece).min(PIECE);
        let offset = self.header.directory.saturating_add(piece);
        let bytes = cache.get(self, "the grain directory", offset, length)?;
        bytes::le_u32(bytes, usize::try_from(at % PIECE).unwrap_or(usize::MAX))
            .ok_or_else(|| Error::Other(format!("grain table {table} is past the end of the directory")))
    }
}
