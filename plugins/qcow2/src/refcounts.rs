//! Reference counts: which clusters of the file are in use, and finding one that is not.
//!
//! ```text
//!   refcount table ──▶ refcount block (1 cluster) ──▶ one count of 1 to 64 bits per cluster of the file
//! ```
//!
//! Counts go up in memory at once, and are written before anything refers to the cluster. They go down
//! only after what referred to it is durably gone: until then the cluster waits in `freeing`.
//!
//! A change of the image as a whole (`transaction.rs`) changes no count in place. A block is copied to a
//! new place before a count in it changes, a new table names the copies, and the header switches to it.
//!
//! QEMU, docs/interop/qcow2.rst, "Host cluster management".

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use blockhouse_plugin::{Error, File, Result};

use crate::areas::Areas;
use crate::cache::{Cache, PIECE};
use crate::cluster_set::ClusterSet;
use crate::header::{self, Header, MAX_REFCOUNT_TABLE_BYTES, Table};
use crate::writer::MAX_CHANGED;

/// A search for free clusters looks at so many counts before it takes space at the end of the file.
const MAX_SEARCH: u64 = 1 << 16;
/// A search for free clusters behind the end of the file reads so many bytes of counts, which a writer left there
/// whose file did not get as long: those of 128 GiB with 64 KiB clusters.
const MAX_BEHIND: u64 = 4 << 20;
/// A search for the last cluster in use looks at so many counts: 1 TiB with 64 KiB clusters.
const MAX_CUT: u64 = 1 << 24;
/// Runs of clusters that were freed, which are remembered one by one: with more of them, all in between count too.
const MAX_FREED_RUNS: usize = 1 << 12;
/// Areas of metadata that are kept in memory, at most: tables and blocks of an image of 128 TiB or more
/// with 64 KiB clusters.
pub(crate) const MAX_AREAS: usize = 1 << 18;

/// A run of clusters that nobody refers to yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// The number of the first cluster in the file.
    pub(crate) cluster: u64,
    /// How many.
    pub(crate) count: u64,
    /// They were past the end of the file, so they read as zero.
    pub(crate) zeroed: bool,
}

#[derive(Debug)]
pub(crate) struct Refcounts {
    cluster_bits: u32,
    /// Bits of a count: 1 << order.
    order: u32,
    /// The table as the header names it.
    table: Table,
    /// Offsets of blocks by their index in the table.
    blocks: BTreeMap<u64, u64>,
    /// Entries of the table that are not in the file yet.
    new_entries: BTreeSet<u64>,
    /// A larger table that takes the place of the present one with the next flush.
    next_table: Option<Table>,
    cache: Cache,
    /// The first cluster that can be free.
    hint: u64,
    /// Clusters in the file, and those behind it that were taken. What is behind them may be counted too: a power
    /// cut can leave the counts and lose the size of the file.
    end: u64,
    /// Of the clusters behind, some that are known to be free. What is taken there moves `end`.
    behind: Range<u64>,
    /// New clusters of metadata whose count has not been set.
    uncounted: Vec<u64>,
    /// How often each count goes down once the mapping is durable.
    freeing: BTreeMap<u64, u64>,
    /// Clusters that were freed since the image was opened, perhaps with others in between.
    freed: ClusterSet,
    /// The first cluster that can be free and not among these.
    table_hint: u64,
    /// Once the counts in the file are left alone: where the blocks were that have a new place now, by
    /// their index in the table.
    moved: Option<BTreeMap<u64, u64>>,
    /// Free clusters that are about to get the count 1.
    taking: Range<u64>,
}

impl Refcounts {
    /// Reads the table, and adds it and the blocks to `areas`.
    pub(crate) fn read(image: &File, header: &Header, image_size: u64, areas: &mut Areas) -> Result<Self> {
        let table = header.refcount_table;
        let bytes = table.entries.saturating_mul(8);
        areas.add(table.offset, bytes, "the refcount table").map_err(Error::Corrupt)?;
        let mut blocks = BTreeMap::new();
        let cluster_size = u64::from(header.cluster_size());
        let mut at = 0;
        while at < bytes {
            let length = (bytes - at).min(PIECE);
            let piece = image.read_exact_at("the refcount table", table.offset.saturating_add(at), length)?;
            for (number, word) in piece.as_chunks::<8>().0.iter().enumerate() {
                let offset = u64::from_be_bytes(*word);
                if offset == 0 {
                    continue;
                }
                let index = at / 8 + number as u64;
                let wrong =
                    |why: &str| Error::corrupt(format!("refcount table, entry {index} is {offset:#018x}: {why}"));
                if !offset.is_multiple_of(cluster_size) {
                    return Err(wrong("not a multiple of the cluster size"));
                }
                if offset.checked_add(cluster_size).is_none_or(|end| end > image_size.next_multiple_of(cluster_size)) {
                    return Err(wrong("past the end of the file"));
                }
                areas.add(offset, cluster_size, "a refcount block").map_err(Error::Corrupt)?;
                if areas.len() > MAX_AREAS {
                    return Err(Error::unsupported("writing an image with so many refcount blocks"));
                }
                blocks.insert(index, offset);
            }
            at = at.saturating_add(length);
        }
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table,
            blocks,
            new_entries: BTreeSet::new(),
            next_table: None,
            cache: Cache::default(),
            hint: 0,
            end: image_size.div_ceil(cluster_size),
            behind: 0..0,
            uncounted: Vec::new(),
            freeing: BTreeMap::new(),
            freed: ClusterSet::default(),
            table_hint: 0,
            moved: None,
            taking: 0..0,
        })
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Counts in a block.
    fn per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.order
    }

    /// The size that the file has once everything allocated is in it, in bytes.
    pub(crate) fn file_size(&self) -> u64 {
        self.end.saturating_mul(self.cluster_size())
    }

    /// Where the count of a cluster is: the piece (offset and length), the bit in it.
    fn place(&self, block: u64, cluster: u64) -> (u64, u64, usize) {
        let bit = (cluster % self.per_block()) << self.order;
        let length = self.cluster_size().min(PIECE);
        let byte = bit / 8;
        let piece = block.saturating_add(byte - byte % length);
        (piece, length, usize::try_from(bit - (byte - byte % length) * 8).unwrap_or(usize::MAX))
    }

    /// The count of a cluster.
    pub(crate) fn get(&mut self, image: &File, cluster: u64) -> Result<u64> {
        match self.blocks.get(&(cluster / self.per_block())).copied() {
            Some(block) => self.get_in(image, block, cluster),
            None => Ok(0),
        }
    }

    /// The count of a cluster in the block at `block`.
    fn get_in(&mut self, image: &File, block: u64, cluster: u64) -> Result<u64> {
        let (offset, length, bit) = self.place(block, cluster);
        let order = self.order;
        let piece = self.cache.piece(image, offset, length, format_args!("a refcount block"))?;
        let byte = bit / 8;
        Ok(if order < 3 {
            let mask = (1u64 << (1u32 << order)) - 1;
            (u64::from(piece.get(byte).copied().unwrap_or_default()) >> (bit % 8)) & mask
        } else {
            let bytes = piece.get(byte..byte.saturating_add(1 << (order - 3))).unwrap_or_default();
            bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
        })
    }

    /// Sets the count of a cluster whose block exists.
    fn set(&mut self, image: &File, cluster: u64, value: u64) -> Result<()> {
        let block = self.blocks.get(&(cluster / self.per_block())).copied();
        let block = block.ok_or_else(|| Error::Other(format!("no refcount block for cluster {cluster}")))?;
        let (offset, length, bit) = self.place(block, cluster);
        let byte = bit / 8;
        let what = format_args!("a refcount block");
        if self.order < 3 {
            let mask = ((1u16 << (1u32 << self.order)) - 1) << (bit % 8);
            let old = self.cache.piece(image, offset, length, what)?.get(byte).copied().unwrap_or_default();
            let new = (u16::from(old) & !mask) | ((u16::try_from(value).unwrap_or(u16::MAX) << (bit % 8)) & mask);
            self.cache.change(image, offset, length, byte, &[new.to_le_bytes()[0]], what)
        } else {
            let bytes = value.to_be_bytes();
            let used = bytes.get(8usize.saturating_sub(1 << (self.order - 3))..).unwrap_or_default();
            self.cache.change(image, offset, length, byte, used, what)
        }
    }

    /// Takes up to `wanted` free clusters in a row, at least one, and gives each the count 1.
    pub(crate) fn allocate(&mut self, image: &File, wanted: u64, areas: &mut Areas) -> Result<Run> {
        let mut searched = 0;
        let mut cluster = self.hint;
        while cluster < self.end && searched < MAX_SEARCH {
            if self.is_free(image, cluster)? {
                break;
            }
            cluster += 1;
            searched += 1;
        }
        // Not past a free one: the next search goes on from here.
        self.hint = cluster;
        if cluster >= self.end || searched >= MAX_SEARCH {
            return self.append(image, wanted, areas);
        }
        let mut count = 1;
        while count < wanted && cluster + count < self.end && self.is_free(image, cluster + count)? {
            count += 1;
        }
        self.own(image, cluster, count, areas)?;
        self.hint = cluster + count;
        Ok(Run { cluster, count, zeroed: false })
    }

    /// Takes a free cluster for a table: none that was freed since the image was opened. If an image names a cluster
    /// twice and counts it once, it can be freed by one name, while the host writes to it by the other: what is
    /// there by then may be data, and nothing that the image consists of.
    pub(crate) fn allocate_table(&mut self, image: &File, areas: &mut Areas) -> Result<u64> {
        let mut cluster = self.table_hint;
        let stop = self.end.min(cluster.saturating_add(MAX_SEARCH));
        while cluster < stop {
            if let Some(end) = self.freed.end_of(cluster) {
                cluster = end;
            } else if self.is_free(image, cluster)? {
                self.table_hint = cluster;
                self.own(image, cluster, 1, areas)?;
                return Ok(cluster);
            } else {
                cluster += 1;
            }
        }
        // Clusters only ever stop to be of use for this: the next search goes on from here.
        self.table_hint = cluster;
        self.append(image, 1, areas).map(|run| run.cluster)
    }

    /// Notes that a cluster was freed.
    fn note_freed(&mut self, cluster: u64) {
        if !self.freed.insert(cluster, MAX_FREED_RUNS) {
            self.freed.fill();
            self.freed.insert(cluster, MAX_FREED_RUNS);
            self.freed.fill();
        }
    }

    /// Adds one to the count of a cluster that is in use. False if it is not, or has no higher count.
    pub(crate) fn share(&mut self, image: &File, cluster: u64) -> Result<bool> {
        let count = self.get(image, cluster)?;
        let most = u64::MAX >> (64 - (1u32 << self.order));
        if count == 0 || count >= most {
            return Ok(false);
        }
        self.set(image, cluster, count + 1)?;
        Ok(true)
    }

    /// Takes `wanted` clusters at the end of the file.
    fn append(&mut self, image: &File, wanted: u64, areas: &mut Areas) -> Result<Run> {
        let cluster = self.extend(image, wanted)?;
        self.own(image, cluster, wanted, areas)?;
        // They were never in the file: `end` was at its end or behind it.
        Ok(Run { cluster, count: wanted, zeroed: true })
    }

    /// Moves `end` behind `wanted` free clusters in a row, and returns the first of them.
    fn extend(&mut self, image: &File, wanted: u64) -> Result<u64> {
        let limit = (1 << 62) >> self.cluster_bits;
        let mut read = 0;
        self.behind = self.behind.start.max(self.end)..self.behind.end.max(self.end);
        while self.behind.end.saturating_sub(self.behind.start) < wanted {
            if self.behind.end >= limit {
                return Err(Error::Storage("the image file would be larger than a file can be".into()));
            }
            if read >= MAX_BEHIND {
                return Err(Error::Storage(format!(
                    "no free space was found for the image: the file ends at {:#x}, and its reference counts say that \
                     clusters up to {:#x} are in use; a repair of leaks frees them once the file is as long",
                    self.file_size(),
                    self.behind.end.saturating_mul(self.cluster_size())
                )));
            }
            let (stop, used, bytes) = self.look(image, self.behind.end, limit)?;
            self.behind = used.unwrap_or(self.behind.start)..stop;
            read = read.saturating_add(bytes);
        }
        let first = self.behind.start;
        self.end = first.saturating_add(wanted);
        Ok(first)
    }

    /// Looks at the counts from that of a cluster on, up to the end of its piece or, where there is no block, up to
    /// the next one. Returns where it stopped, the end of the last cluster that is in use, and the bytes of counts.
    fn look(&mut self, image: &File, cluster: u64, limit: u64) -> Result<(u64, Option<u64>, u64)> {
        let index = cluster / self.per_block();
        let Some(block) = self.blocks.get(&index).copied() else {
            let next = self.blocks.range(index..).next().map(|(index, _)| index.saturating_mul(self.per_block()));
            return Ok((next.unwrap_or(limit).min(limit), None, 0));
        };
        let old = self.moved.as_ref().and_then(|moved| moved.get(&index)).copied();
        let (_, length, bit) = self.place(block, cluster);
        let in_piece = (length * 8) >> self.order;
        let start = cluster - cluster % in_piece;
        let mut used = cluster;
        for block in [Some(block), old].into_iter().flatten() {
            let (offset, ..) = self.place(block, cluster);
            let piece = self.cache.piece(image, offset, length, format_args!("a refcount block"))?;
            let counts = piece.get(bit / 8..).unwrap_or_default();
            if let Some(last) = counts.iter().rposition(|byte| *byte != 0) {
                let bits = (bit / 8 + last + 1).saturating_mul(8) as u64;
                used = used.max(start.saturating_add(bits.div_ceil(1 << self.order)));
            }
        }
        // A byte can hold several counts, also of clusters before.
        while used > cluster && self.is_free(image, used - 1)? {
            used -= 1;
        }
        Ok((start.saturating_add(in_piece), Some(used).filter(|used| *used > cluster), length))
    }

    /// Whether nothing refers to a cluster, and nothing does in the file as it still is.
    fn is_free(&mut self, image: &File, cluster: u64) -> Result<bool> {
        if self.get(image, cluster)? != 0 {
            return Ok(false);
        }
        let index = cluster / self.per_block();
        match self.moved.as_ref().and_then(|moved| moved.get(&index)).copied() {
            Some(block) => Ok(self.get_in(image, block, cluster)? == 0),
            None => Ok(true),
        }
    }

    /// Gives clusters that are free the count 1.
    fn own(&mut self, image: &File, cluster: u64, count: u64, areas: &mut Areas) -> Result<()> {
        self.taking = cluster..cluster.saturating_add(count);
        for cluster in cluster..cluster.saturating_add(count) {
            self.ensure_block(image, cluster, areas)?;
            let offset = cluster.saturating_mul(self.cluster_size());
            if let Some(what) = areas.find(offset, self.cluster_size()) {
                return Err(Error::corrupt(format!(
                    "{what} is in cluster {offset:#x}, whose reference count says that it is free"
                )));
            }
            self.set(image, cluster, 1)?;
        }
        self.taking = 0..0;
        Ok(())
    }

    /// A cluster for a new block or table: at the end of the file or, where counts are written anew, the
    /// first free one.
    fn vacant(&mut self, image: &File) -> Result<u64> {
        let mut cluster = self.hint;
        let stop = self.end.min(self.hint.saturating_add(MAX_SEARCH));
        while self.moved.is_some() && cluster < stop {
            let taken = self.taking.contains(&cluster) || self.uncounted.contains(&cluster);
            if !taken && self.is_free(image, cluster)? {
                self.hint = cluster;
                return Ok(cluster);
            }
            cluster += 1;
        }
        // What is taken will be in use: the next search goes on from here.
        self.hint = cluster;
        self.extend(image, 1)
    }

    /// Makes sure that the count of a cluster has a place that may be changed.
    fn ensure_block(&mut self, image: &File, cluster: u64, areas: &mut Areas) -> Result<()> {
        let index = cluster / self.per_block();
        if !self.may_change(index) {
            self.add_block(image, index, areas)?;
        }
        self.count_new(image, areas)
    }

    /// Whether a block exists and may be changed where it is.
    fn may_change(&self, index: u64) -> bool {
        let in_place = |moved: &BTreeMap<u64, u64>| moved.contains_key(&index) || self.new_entries.contains(&index);
        self.blocks.contains_key(&index) && self.moved.as_ref().is_none_or(in_place)
    }

    /// Makes a refcount block: empty, or a copy of the one with this index, which waits to be freed. Its own
    /// cluster waits in `uncounted`.
    fn add_block(&mut self, image: &File, index: u64, areas: &mut Areas) -> Result<()> {
        if areas.len() > MAX_AREAS {
            return Err(Error::unsupported("an image with so many refcount blocks"));
        }
        let at = self.vacant(image)?;
        let offset = at.saturating_mul(self.cluster_size());
        areas.add(offset, self.cluster_size(), "a refcount block").map_err(Error::Corrupt)?;
        let length = self.cluster_size().min(PIECE);
        let old = self.blocks.get(&index).copied();
        for piece in 0..self.cluster_size() / length {
            let bytes = match old {
                Some(old) => {
                    let at = old.saturating_add(piece * length);
                    self.cache.piece(image, at, length, format_args!("a refcount block"))?.to_vec()
                }
                None => vec![0; usize::try_from(length).unwrap_or_default()],
            };
            self.cache.create(offset.saturating_add(piece * length), bytes);
        }
        self.blocks.insert(index, offset);
        match (old, &mut self.moved) {
            (Some(old), Some(moved)) => {
                moved.insert(index, old);
                self.free_later(old >> self.cluster_bits);
            }
            _ => {
                self.new_entries.insert(index);
            }
        }
        self.uncounted.push(at);
        Ok(())
    }

    /// Gives the clusters of new blocks and of a new table their counts, which may take further blocks.
    /// What an error leaves undone is done by the next call; nothing is written before that.
    fn count_new(&mut self, image: &File, areas: &mut Areas) -> Result<()> {
        loop {
            let needed = self.blocks.last_key_value().map_or(0, |(index, _)| index + 1);
            if needed > self.next_table.unwrap_or(self.table).entries {
                self.plan_table(image, needed.saturating_add(needed / 2), areas)?;
                continue;
            }
            let Some(cluster) = self.uncounted.last().copied() else { return Ok(()) };
            let index = cluster / self.per_block();
            if self.may_change(index) {
                self.set(image, cluster, 1)?;
                self.uncounted.pop();
            } else {
                // One block counts 64 clusters at least, its own among them or soon: this ends.
                self.add_block(image, index, areas)?;
            }
        }
    }

    /// Plans another table; the next flush moves there.
    fn plan_table(&mut self, image: &File, entries: u64, areas: &mut Areas) -> Result<()> {
        let bytes = entries.saturating_mul(8).next_multiple_of(self.cluster_size());
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::unsupported("a refcount table of more than 8 MiB"));
        }
        if let Some(unused) = self.next_table.take() {
            areas.remove(unused.offset);
            self.free_table(unused);
        }
        let clusters = bytes >> self.cluster_bits;
        let first = if clusters == 1 { self.vacant(image)? } else { self.extend(image, clusters)? };
        let offset = first.saturating_mul(self.cluster_size());
        areas.add(offset, bytes, "the refcount table").map_err(Error::Corrupt)?;
        self.uncounted.extend(first..first.saturating_add(clusters));
        self.next_table = Some(Table { offset, entries: bytes / 8 });
        Ok(())
    }

    fn free_table(&mut self, table: Table) {
        let first = table.offset >> self.cluster_bits;
        let clusters = table.entries.saturating_mul(8) >> self.cluster_bits;
        for cluster in first..first.saturating_add(clusters) {
            self.free_later(cluster);
        }
    }

    /// Takes one from the count of a cluster, once the next flush has made durable that one reference
    /// less leads there.
    pub(crate) fn free_later(&mut self, cluster: u64) {
        let times = self.freeing.entry(cluster).or_insert(0);
        *times = times.saturating_add(1);
    }

    /// Clusters whose count will go down.
    pub(crate) fn freeing(&self) -> usize {
        self.freeing.len()
    }

    /// Bytes of counts that are not in the file yet.
    pub(crate) fn changed_bytes(&self) -> usize {
        self.cache.changed_bytes()
    }

    /// Whether there is nothing to write.
    pub(crate) fn is_clean(&self) -> bool {
        self.cache.is_clean() && self.new_entries.is_empty() && self.next_table.is_none() && self.uncounted.is_empty()
    }

    /// Writes the counts. To be followed by a sync of the file, then [`write_table`](Self::write_table).
    pub(crate) fn write_blocks(&mut self, image: &File, areas: &mut Areas) -> Result<()> {
        self.count_new(image, areas)?;
        self.cache.write(image, |_| true)
    }

    /// Makes the table name the blocks, which are durable now. Durable when it returns.
    pub(crate) fn write_table(
        &mut self,
        image: &File,
        areas: &mut Areas,
        sync: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.cache.settle(|_| true);
        if let Some(next) = self.next_table {
            self.write_next_table(image, next)?;
            sync()?;
            let fields = [next.offset.to_be_bytes().as_slice(), &self.table_clusters(next).to_be_bytes()].concat();
            image.write_at(header::REFCOUNT_TABLE_AT, &fields)?;
            sync()?;
            areas.remove(self.table.offset);
            self.free_table(self.table);
            self.table = next;
            self.next_table = None;
            self.new_entries.clear();
        } else {
            self.write_entries(image, sync)?;
        }
        Ok(())
    }

    /// Has the present table name the new blocks. One whose own cluster is counted in another new block is named once
    /// that is named durably: wherever this ends, by an error or a power cut, what is named is owned. Blocks are added
    /// at the end of the file, so the other one has a higher index.
    fn write_entries(&mut self, image: &File, sync: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut written = BTreeSet::new();
        for index in self.new_entries.iter().rev() {
            let offset = self.blocks.get(index).copied().unwrap_or_default();
            if written.contains(&((offset >> self.cluster_bits) / self.per_block())) {
                sync()?;
                written.clear();
            }
            image.write_at(self.table.offset.saturating_add(index.saturating_mul(8)), &offset.to_be_bytes())?;
            written.insert(*index);
        }
        if !written.is_empty() {
            sync()?;
        }
        self.new_entries.clear();
        Ok(())
    }

    fn write_next_table(&self, image: &File, next: Table) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(next.entries.saturating_mul(8)).unwrap_or_default()];
        for (index, offset) in &self.blocks {
            let at = usize::try_from(index.saturating_mul(8)).unwrap_or(usize::MAX);
            if let Some(entry) = bytes.get_mut(at..at.saturating_add(8)) {
                entry.copy_from_slice(&offset.to_be_bytes());
            }
        }
        image.write_at(next.offset, &bytes)
    }

    /// How many clusters a table has, as the header says it.
    pub(crate) fn table_clusters(&self, table: Table) -> u32 {
        u32::try_from(table.entries.saturating_mul(8) >> self.cluster_bits).unwrap_or(u32::MAX)
    }

    /// Lowers the counts that wait for it, after the mapping is durable, and writes them. Adds the clusters
    /// that nothing refers to any more to `free`, also if it fails. No sync: counts that stay too high waste
    /// space, no more.
    ///
    /// What the image consists of keeps a count: entries for data that name it as well can be more than were counted.
    pub(crate) fn release(&mut self, image: &File, areas: &Areas, free: &mut Vec<u64>) -> Result<()> {
        while let Some((cluster, times)) = self.freeing.first_key_value().map(|(cluster, times)| (*cluster, *times)) {
            let count = self.get(image, cluster)?;
            // A count that is too low already was wrong before; it is not made wrap around.
            let mut left = count.saturating_sub(times);
            let offset = cluster.saturating_mul(self.cluster_size());
            if left == 0 && areas.find(offset, self.cluster_size()).is_some() {
                left = count.min(1);
            }
            if count > 0 {
                self.set(image, cluster, left)?;
            }
            if count > 0 && left == 0 {
                self.hint = self.hint.min(cluster);
                // If it was behind the end, it may have been written there: it is not zero any more.
                self.end = self.end.max(cluster.saturating_add(1));
                self.note_freed(cluster);
                free.push(cluster);
            }
            self.freeing.remove(&cluster);
        }
        self.cache.write(image, |_| true)?;
        self.cache.settle(|_| true);
        Ok(())
    }

    /// Leaves the counts in the file alone from now on: what changes is written elsewhere, at any time and
    /// in any order, until [`finish_anew`](Self::finish_anew) says where the table is that names it all.
    pub(crate) fn anew(&mut self) {
        self.moved.get_or_insert_default();
    }

    /// Adds `times` to the count of a cluster, now. For counts that are written anew.
    pub(crate) fn raise(&mut self, image: &File, cluster: u64, times: u64, areas: &mut Areas) -> Result<()> {
        let count = self.in_use(image, cluster)?;
        let bits = 1u32 << self.order;
        let most = u64::MAX >> (64 - bits);
        let more = count.checked_add(times).filter(|count| *count <= most).ok_or_else(|| {
            Error::unsupported(format!(
                "so many references to the cluster at {:#x}: the image has {bits} bits for a count",
                cluster.saturating_mul(self.cluster_size())
            ))
        })?;
        self.ensure_block(image, cluster, areas)?;
        self.set(image, cluster, more)?;
        self.relieve(image)
    }

    /// Takes one from the count of a cluster, now. For counts that are written anew.
    pub(crate) fn lower(&mut self, image: &File, cluster: u64, areas: &mut Areas) -> Result<()> {
        let count = self.in_use(image, cluster)?;
        self.ensure_block(image, cluster, areas)?;
        self.set(image, cluster, count.saturating_sub(1))?;
        self.relieve(image)
    }

    /// The count of a cluster that something refers to.
    fn in_use(&mut self, image: &File, cluster: u64) -> Result<u64> {
        match self.get(image, cluster)? {
            0 => Err(Error::corrupt(format!(
                "the cluster at {:#x} is referred to, and its reference count is 0, or less than the references",
                cluster.saturating_mul(self.cluster_size())
            ))),
            count => Ok(count),
        }
    }

    /// Writes blocks that have a new place, if many wait: nothing refers to them yet.
    fn relieve(&mut self, image: &File) -> Result<()> {
        if self.cache.changed_bytes() > MAX_CHANGED {
            self.cache.write(image, |_| true)?;
            self.cache.settle(|_| true);
        }
        Ok(())
    }

    /// Takes exactly `wanted` clusters in a row and gives each the count 1. For counts that are written anew.
    pub(crate) fn allocate_row(&mut self, image: &File, wanted: u64, areas: &mut Areas) -> Result<u64> {
        self.relieve(image)?;
        let run = self.allocate(image, wanted, areas)?;
        if run.count == wanted {
            return Ok(run.cluster);
        }
        for cluster in run.cluster..run.cluster.saturating_add(run.count) {
            self.set(image, cluster, 0)?;
        }
        self.hint = self.hint.min(run.cluster);
        self.append(image, wanted, areas).map(|run| run.cluster)
    }

    /// Writes what is left of the counts that are written anew, and the table that names them: the header
    /// may name it after a sync. It is the present one if no count changed.
    pub(crate) fn finish_anew(&mut self, image: &File, areas: &mut Areas) -> Result<Table> {
        if self.is_clean() && self.moved.as_ref().is_none_or(BTreeMap::is_empty) && self.freeing.is_empty() {
            return Ok(self.table);
        }
        if self.next_table.is_none() {
            self.plan_table(image, self.table.entries, areas)?;
        }
        self.free_table(self.table);
        // A count that goes down can move a block, which is freed by that in turn. Each moves once.
        loop {
            self.count_new(image, areas)?;
            let Some((cluster, times)) = self.freeing.first_key_value().map(|(cluster, times)| (*cluster, *times))
            else {
                break;
            };
            self.ensure_block(image, cluster, areas)?;
            let left = self.get(image, cluster)?.saturating_sub(times);
            self.set(image, cluster, left)?;
            self.freeing.remove(&cluster);
        }
        self.cache.write(image, |_| true)?;
        self.cache.settle(|_| true);
        let next = self.next_table.unwrap_or(self.table);
        self.write_next_table(image, next)?;
        Ok(next)
    }

    /// The end of the last cluster that is in use and that `skip` does not want to skip, in clusters, or a
    /// later one if the search takes too long.
    pub(crate) fn used_end(&mut self, image: &File, mut skip: impl FnMut(u64) -> bool) -> Result<u64> {
        let mut end = self.end;
        for _ in 0..MAX_CUT {
            let Some(last) = end.checked_sub(1) else { break };
            let index = last / self.per_block();
            if !self.blocks.contains_key(&index) {
                let before = self.blocks.range(..index).next_back();
                end = before.map_or(0, |(index, _)| index.saturating_add(1)).saturating_mul(self.per_block());
            } else if self.get(image, last)? == 0 || skip(last) {
                end = last;
            } else {
                break;
            }
        }
        Ok(end)
    }

    /// Gives the blocks that are in cluster `first` or later new places, the first free ones from there on,
    /// and looks for free space from there on. For counts that are written anew.
    pub(crate) fn move_down(&mut self, image: &File, first: u64, areas: &mut Areas) -> Result<()> {
        self.hint = first;
        let last = self.blocks.iter().filter(|(_, offset)| **offset >> self.cluster_bits >= first);
        let indexes: Vec<u64> = last.map(|(index, _)| *index).collect();
        for index in indexes {
            if !self.may_change(index) {
                self.add_block(image, index, areas)?;
                self.count_new(image, areas)?;
            }
        }
        Ok(())
    }
}
