//! The reference counts as an image holds them, right or wrong.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::Result;
use blockhouse_plugin::bytes::be_u64;

use super::scan::PAGE;
use super::{Image, Lines, counts};
use crate::header::Table;

/// Blocks are read in pieces of this size, in bytes, or less where they are smaller.
const PIECE: u64 = 64 << 10;
/// So many pieces are kept: 4 MiB at most.
const KEPT: usize = 64;
/// Changed bytes are written in whole sectors, in bytes.
const SECTOR: usize = 512;

/// What is wrong with the blocks themselves: only new ones help.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) count: u64,
    pub(super) lines: Lines,
    /// The last block is cut off by the end of the file: it becomes longer.
    pub(super) short: bool,
}

/// The refcount table and pieces of its blocks.
#[derive(Debug)]
pub(super) struct Stored {
    order: u32,
    cluster_size: u64,
    pub(super) table: Table,
    /// Offsets of usable blocks, 0 where there is none.
    blocks: Vec<u64>,
    pieces: BTreeMap<u64, (u64, Vec<u8>)>,
    /// Counts uses of pieces: the one that was not used for longest goes.
    clock: u64,
    /// The first index from a place on that has a block.
    next: (u64, Option<u64>),
}

impl Stored {
    /// Reads the table. Blocks that cannot be are left out.
    pub(super) fn read(image: &Image<'_>) -> Result<(Self, Faults)> {
        let table = image.header.refcount_table;
        let mut faults = Faults::default();
        let mut found = |line: &dyn Fn() -> alloc::string::String| {
            faults.count = faults.count.saturating_add(1);
            faults.lines.add(line);
        };
        let bytes = table.entries.saturating_mul(8);
        if table.offset.checked_add(bytes).is_none_or(|end| end > image.size) {
            found(&|| {
                format!("the refcount table at {:#x} ({bytes} bytes) goes past the end of the file", table.offset)
            });
        }
        let mut blocks = Vec::new();
        let mut short = false;
        let mut piece = Vec::new();
        for index in 0..table.entries {
            let within = index.saturating_mul(8) % PIECE;
            if within == 0 {
                let at = table.offset.saturating_add(index.saturating_mul(8));
                piece = image.read(at, PIECE.min(bytes.saturating_sub(index.saturating_mul(8))))?;
            }
            let entry = be_u64(&piece, usize::try_from(within).unwrap_or_default()).unwrap_or_default();
            let why = if entry & 511 != 0 {
                Some("reserved bits are set")
            } else if !entry.is_multiple_of(image.cluster_size) {
                Some("the offset is not a multiple of the cluster size")
            } else if entry != 0 && image.is_outside(entry, image.cluster_size) {
                Some("the block is past the end of the file")
            } else {
                None
            };
            if let Some(why) = why {
                found(&|| format!("refcount table, entry {index} is {entry:#018x}: {why}"));
            }
            let usable = if why.is_none() { entry } else { 0 };
            if usable != 0 && usable.saturating_add(image.cluster_size) > image.size {
                found(&|| format!("the refcount block at {entry:#x} goes past the end of the file"));
                short = true;
            }
            blocks.push(usable);
        }
        faults.short = short;
        while blocks.last() == Some(&0) {
            blocks.pop();
        }
        Ok((Self::new(image, table, blocks), faults))
    }

    /// Counts in blocks at these offsets.
    pub(super) fn new(image: &Image<'_>, table: Table, blocks: Vec<u64>) -> Self {
        Self {
            order: image.header.refcount_order,
            cluster_size: image.cluster_size,
            table,
            blocks,
            pieces: BTreeMap::new(),
            clock: 0,
            next: (u64::MAX, None),
        }
    }

    /// Counts in a block.
    pub(super) fn per_block(&self) -> u64 {
        (self.cluster_size * 8) >> self.order
    }

    /// Index and offset of every block.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, u64)> {
        (0u64..).zip(self.blocks.iter().copied()).filter(|(_, offset)| *offset != 0)
    }

    /// The table, as far as it has entries that are not 0.
    pub(super) fn table_entries(&self) -> &[u64] {
        &self.blocks
    }

    fn block(&self, index: u64) -> Option<u64> {
        let offset = usize::try_from(index).ok().and_then(|index| self.blocks.get(index)).copied()?;
        (offset != 0).then_some(offset)
    }

    /// Whether the count of a cluster has a place.
    pub(super) fn has(&self, cluster: u64) -> bool {
        self.block(cluster / self.per_block()).is_some()
    }

    /// The first page of counts, from `page` on, of which a part has a block.
    pub(super) fn next_page(&mut self, page: u64) -> Option<u64> {
        let per_block = self.per_block();
        let index = page.saturating_mul(PAGE) / per_block;
        // Asked for in order: what was found last is good until it is passed.
        let known = self.next.0 <= index && self.next.1.is_none_or(|found| found >= index);
        if !known {
            let start = usize::try_from(index).unwrap_or(usize::MAX);
            let rest = self.blocks.get(start..).unwrap_or_default();
            let found = rest.iter().position(|offset| *offset != 0);
            self.next = (index, found.map(|found| index.saturating_add(found as u64)));
        }
        self.next.1.map(|found| (found.saturating_mul(per_block) / PAGE).max(page))
    }

    fn piece(&mut self, image: &Image<'_>, offset: u64) -> Result<Option<&mut Vec<u8>>> {
        self.clock = self.clock.saturating_add(1);
        if !self.pieces.contains_key(&offset) {
            if self.pieces.len() >= KEPT {
                let oldest = self.pieces.iter().min_by_key(|(_, (used, _))| *used).map(|(offset, _)| *offset);
                self.pieces.remove(&oldest.unwrap_or_default());
            }
            let bytes = image.read(offset, self.cluster_size.min(PIECE))?;
            self.pieces.insert(offset, (self.clock, bytes));
        }
        let clock = self.clock;
        Ok(self.pieces.get_mut(&offset).map(|(used, bytes)| {
            *used = clock;
            bytes
        }))
    }

    /// The piece with the count of a cluster, and the index of the count in it.
    fn place(&self, cluster: u64) -> Option<(u64, usize)> {
        let per_block = self.per_block();
        let block = self.block(cluster / per_block)?;
        let per_piece = (self.cluster_size.min(PIECE) * 8) >> self.order;
        let within = cluster % per_block;
        let piece = block.saturating_add((within / per_piece).saturating_mul(PIECE));
        Some((piece, usize::try_from(within % per_piece).unwrap_or_default()))
    }

    /// The count of a cluster; 0 where there is no block.
    pub(super) fn get(&mut self, image: &Image<'_>, cluster: u64) -> Result<u64> {
        let Some((offset, index)) = self.place(cluster) else { return Ok(0) };
        let order = self.order;
        Ok(self.piece(image, offset)?.map_or(0, |bytes| counts::get(bytes, order, index)))
    }

    /// The counts of a page of clusters.
    pub(super) fn page(&mut self, image: &Image<'_>, page: u64) -> Result<Vec<u64>> {
        let mut all = vec![0; usize::try_from(PAGE).unwrap_or_default()];
        let first = page.saturating_mul(PAGE);
        let per_piece = (self.cluster_size.min(PIECE) * 8) >> self.order;
        let order = self.order;
        let mut number = 0u64;
        while number < PAGE {
            let Some((offset, index)) = self.place(first.saturating_add(number)) else {
                number = number.saturating_add(PAGE.min(self.per_block()));
                continue;
            };
            let here = per_piece.saturating_sub(index as u64).min(PAGE - number);
            if let Some(bytes) = self.piece(image, offset)? {
                let to = all.iter_mut().skip(usize::try_from(number).unwrap_or_default());
                for (step, to) in to.take(usize::try_from(here).unwrap_or_default()).enumerate() {
                    *to = counts::get(bytes, order, index.saturating_add(step));
                }
            }
            number = number.saturating_add(here.max(1));
        }
        Ok(all)
    }

    /// Sets the counts of clusters that have a place, and writes the sectors that change.
    pub(super) fn set(&mut self, image: &Image<'_>, changes: &[(u64, u64)]) -> Result<()> {
        let mut rest = changes;
        while let Some((cluster, _)) = rest.first() {
            let Some((offset, _)) = self.place(*cluster) else {
                rest = rest.get(1..).unwrap_or_default();
                continue;
            };
            let same = rest.iter().take_while(|(cluster, _)| self.place(*cluster).is_some_and(|at| at.0 == offset));
            let indexes: Vec<(usize, u64)> =
                same.filter_map(|(cluster, value)| Some((self.place(*cluster)?.1, *value))).collect();
            rest = rest.get(indexes.len()..).unwrap_or_default();
            let order = self.order;
            if let Some(bytes) = self.piece(image, offset)? {
                let old = bytes.clone();
                for (index, value) in indexes {
                    counts::set(bytes, order, index, value);
                }
                write_changed(image, offset, &old, bytes)?;
            }
        }
        Ok(())
    }
}

/// Writes the sectors in which `new` differs from `old`, which is at `offset` in the file.
pub(super) fn write_changed(image: &Image<'_>, offset: u64, old: &[u8], new: &[u8]) -> Result<()> {
    for (number, (old, new)) in old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate() {
        if old != new {
            image.file.write_at(offset.saturating_add((number * SECTOR) as u64), new)?;
        }
    }
    Ok(())
}
