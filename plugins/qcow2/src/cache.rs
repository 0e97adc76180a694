//! Pieces of metadata in memory: the ones that were used last, and the ones that were changed and are
//! not in the file yet.
//!
//! Nothing here is written by itself: `writer.rs` says when, because the order is what keeps an image
//! whole through a power cut.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use blockhouse_plugin::{Error, File, Result};

/// A table is read in pieces of this size, in bytes, or less where it is smaller.
pub(crate) const PIECE: u64 = 64 << 10;
/// So many unchanged pieces are kept, and so many bytes of them at most. The host remembers what it was told, so
/// that few tables are asked for again.
const KEPT_PIECES: usize = 32;
const KEPT_BYTES: usize = 512 << 10;
/// Changed bytes are written in whole sectors, in bytes.
const SECTOR: usize = 512;

#[derive(Debug)]
struct Piece {
    offset: u64,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Changed {
    bytes: Vec<u8>,
    /// The part that differs from the file.
    range: Range<usize>,
}

/// Pieces of one kind of metadata, by their offset in the file. Pieces never overlap.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    /// Unchanged ones; the most recently used one is the last.
    pieces: Vec<Piece>,
    changed: BTreeMap<u64, Changed>,
    changed_bytes: usize,
}

impl Cache {
    /// The `length` bytes at `offset` of the image; `what` they are is for the message.
    pub(crate) fn piece(&mut self, image: &File, offset: u64, length: u64, what: fmt::Arguments<'_>) -> Result<&[u8]> {
        // Looked up twice where it is found: the borrow checker does not see that the first is over.
        if self.changed.get(&offset).is_some_and(|changed| changed.bytes.len() as u64 == length) {
            return Ok(self.changed.get(&offset).map(|changed| changed.bytes.as_slice()).unwrap_or_default());
        }
        let piece = self.load(image, offset, length, what)?;
        self.pieces.push(piece);
        Ok(self.pieces.last().map(|piece| piece.bytes.as_slice()).unwrap_or_default())
    }

    /// Takes an unchanged piece out of the cache, or reads it.
    fn load(&mut self, image: &File, offset: u64, length: u64, what: fmt::Arguments<'_>) -> Result<Piece> {
        let is_it = |piece: &Piece| piece.offset == offset && piece.bytes.len() as u64 == length;
        if let Some(found) = self.pieces.iter().rposition(is_it) {
            return Ok(self.pieces.remove(found));
        }
        self.make_room(usize::try_from(length).unwrap_or(usize::MAX));
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        let read = image.read_at(offset, &mut bytes)?;
        if read < bytes.len() {
            let end = offset.saturating_add(read as u64);
            return Err(Error::ends_early(&format_what(what), offset, length, end));
        }
        Ok(Piece { offset, bytes })
    }

    /// Forgets the pieces that were used longest ago, until another one of `length` bytes may be kept.
    fn make_room(&mut self, length: usize) {
        let bytes = |pieces: &[Piece]| pieces.iter().fold(length, |sum, piece| sum.saturating_add(piece.bytes.len()));
        while !self.pieces.is_empty() && (self.pieces.len() >= KEPT_PIECES || bytes(&self.pieces) > KEPT_BYTES) {
            self.pieces.remove(0);
        }
    }

    /// Puts `new` into the piece of `length` bytes at `offset`, at byte `at` of it.
    pub(crate) fn change(
        &mut self,
        image: &File,
        offset: u64,
        length: u64,
        at: usize,
        new: &[u8],
        what: fmt::Arguments<'_>,
    ) -> Result<()> {
        if !self.changed.contains_key(&offset) {
            let piece = self.load(image, offset, length, what)?;
            self.changed_bytes = self.changed_bytes.saturating_add(piece.bytes.len());
            self.changed.insert(offset, Changed { bytes: piece.bytes, range: at..at });
        }
        let end = at.saturating_add(new.len());
        let outside = || Error::Other(alloc::format!("no byte {end} in the piece of {length} bytes at {offset:#x}"));
        let changed = self.changed.get_mut(&offset).ok_or_else(outside)?;
        changed.bytes.get_mut(at..end).ok_or_else(outside)?.copy_from_slice(new);
        changed.range = changed.range.start.min(at)..changed.range.end.max(end);
        Ok(())
    }

    /// Puts a whole new piece into the cache, which need not be in the file.
    pub(crate) fn create(&mut self, offset: u64, bytes: Vec<u8>) {
        self.forget(offset..offset.saturating_add(bytes.len() as u64));
        self.changed_bytes = self.changed_bytes.saturating_add(bytes.len());
        let range = 0..bytes.len();
        self.changed.insert(offset, Changed { bytes, range });
    }

    /// Forgets what is known of a range of the file, changed or not.
    pub(crate) fn forget(&mut self, range: Range<u64>) {
        self.pieces.retain(|piece| !range.contains(&piece.offset));
        let gone: Vec<u64> = self.changed.range(range).map(|(offset, _)| *offset).collect();
        for offset in gone {
            if let Some(changed) = self.changed.remove(&offset) {
                self.changed_bytes = self.changed_bytes.saturating_sub(changed.bytes.len());
            }
        }
    }

    /// Bytes of pieces that are not in the file yet.
    pub(crate) fn changed_bytes(&self) -> usize {
        self.changed_bytes
    }

    /// Whether all is in the file.
    pub(crate) fn is_clean(&self) -> bool {
        self.changed.is_empty()
    }

    /// Writes the changed pieces for which `which(offset)` holds. They stay changed until
    /// [`settle`](Self::settle): only a sync makes it true.
    pub(crate) fn write(&self, image: &File, which: impl Fn(u64) -> bool) -> Result<()> {
        for (offset, changed) in self.changed.iter().filter(|(offset, _)| which(**offset)) {
            let from = changed.range.start - changed.range.start % SECTOR;
            let to = changed.range.end.next_multiple_of(SECTOR).min(changed.bytes.len());
            if let Some(bytes) = changed.bytes.get(from..to) {
                image.write_at(offset.saturating_add(from as u64), bytes)?;
            }
        }
        Ok(())
    }

    /// The pieces for which `which(offset)` holds are in the file now.
    pub(crate) fn settle(&mut self, which: impl Fn(u64) -> bool) {
        let written: Vec<u64> = self.changed.keys().copied().filter(|offset| which(*offset)).collect();
        for offset in written {
            if let Some(Changed { bytes, .. }) = self.changed.remove(&offset) {
                self.changed_bytes = self.changed_bytes.saturating_sub(bytes.len());
                self.make_room(bytes.len());
                self.pieces.push(Piece { offset, bytes });
            }
        }
    }
}

fn format_what(what: fmt::Arguments<'_>) -> alloc::string::String {
    alloc::format!("{what}")
}
