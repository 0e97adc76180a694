//! Reference counts: which clusters of the file are in use, and finding one that is not.
//!
//! ```text
//!   refcount table ──▶ refcount block (1 cluster) ──▶ one count of 1 to 64 bits per cluster of the file
//! ```
//!
//! Counts go up in memory at once, and are written before anything refers to the cluster. They go down
//! only after what referred to it is durably gone: until then the cluster waits in `freeing`.
//!
//! QEMU, docs/interop/qcow2.rst, "Host cluster management".

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{Error, File, Result};

use crate::areas::Areas;
use crate::cache::{Cache, PIECE};
use crate::header::{self, Header, MAX_REFCOUNT_TABLE_BYTES, Table};

/// A search for free clusters looks at so many counts before it takes space at the end of the file.
const MAX_SEARCH: u64 = 1 << 16;
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
    /// Clusters in the file; from here on all are free.
    end: u64,
    /// New clusters of metadata whose count has not been set.
    uncounted: Vec<u64>,
    /// How often each count goes down once the mapping is durable.
    freeing: BTreeMap<u64, u64>,
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
            uncounted: Vec::new(),
            freeing: BTreeMap::new(),
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
        let Some(block) = self.blocks.get(&(cluster / self.per_block())).copied() else { return Ok(0) };
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
        let cluster = self.end;
        let end = cluster.saturating_add(wanted);
        if end > (1 << 62) >> self.cluster_bits {
            return Err(Error::Storage("the image file would be larger than a file can be".into()));
        }
        self.end = end;
        self.own(image, cluster, wanted, areas)?;
        Ok(Run { cluster, count: wanted, zeroed: true })
    }

    fn is_free(&mut self, image: &File, cluster: u64) -> Result<bool> {
        Ok(self.get(image, cluster)? == 0)
    }

    /// Gives clusters that are free the count 1.
    fn own(&mut self, image: &File, cluster: u64, count: u64, areas: &mut Areas) -> Result<()> {
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
        Ok(())
    }

    /// Makes sure that the count of a cluster has a place.
    fn ensure_block(&mut self, image: &File, cluster: u64, areas: &mut Areas) -> Result<()> {
        let index = cluster / self.per_block();
        if !self.blocks.contains_key(&index) {
            self.add_block(index, areas)?;
        }
        self.count_new(image, areas)
    }

    /// Makes a refcount block at the end of the file. Its own cluster waits in `uncounted`.
    fn add_block(&mut self, index: u64, areas: &mut Areas) -> Result<()> {
        if areas.len() > MAX_AREAS {
            return Err(Error::unsupported("an image with so many refcount blocks"));
        }
        let at = self.end;
        let offset = at.saturating_mul(self.cluster_size());
        areas.add(offset, self.cluster_size(), "a refcount block").map_err(Error::Corrupt)?;
        self.end = at.saturating_add(1);
        let length = self.cluster_size().min(PIECE);
        for piece in 0..self.cluster_size() / length {
            let bytes = vec![0; usize::try_from(length).unwrap_or_default()];
            self.cache.create(offset.saturating_add(piece * length), bytes);
        }
        self.blocks.insert(index, offset);
        self.new_entries.insert(index);
        self.uncounted.push(at);
        Ok(())
    }

    /// Gives the clusters of new blocks and of a new table their counts, which may take further blocks.
    /// What an error leaves undone is done by the next call; nothing is written before that.
    fn count_new(&mut self, image: &File, areas: &mut Areas) -> Result<()> {
        loop {
            let needed = self.blocks.last_key_value().map_or(0, |(index, _)| index + 1);
            if needed > self.next_table.unwrap_or(self.table).entries {
                self.grow_table(needed, areas)?;
                continue;
            }
            let Some(cluster) = self.uncounted.last().copied() else { return Ok(()) };
            let index = cluster / self.per_block();
            if self.blocks.contains_key(&index) {
                self.set(image, cluster, 1)?;
                self.uncounted.pop();
            } else {
                // One block counts 64 clusters at least, its own among them or soon: this ends.
                self.add_block(index, areas)?;
            }
        }
    }

    /// Plans a larger table at the end of the file; the next flush moves there.
    fn grow_table(&mut self, needed: u64, areas: &mut Areas) -> Result<()> {
        let entries = needed.saturating_add(needed / 2);
        let bytes = entries.saturating_mul(8).next_multiple_of(self.cluster_size());
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::unsupported("a refcount table of more than 8 MiB"));
        }
        if let Some(unused) = self.next_table.take() {
            areas.remove(unused.offset);
            self.free_table(unused);
        }
        let clusters = bytes >> self.cluster_bits;
        let offset = self.file_size();
        areas.add(offset, bytes, "the refcount table").map_err(Error::Corrupt)?;
        self.uncounted.extend(self.end..self.end.saturating_add(clusters));
        self.end = self.end.saturating_add(clusters);
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
            let mut bytes = vec![0; usize::try_from(next.entries.saturating_mul(8)).unwrap_or_default()];
            for (index, offset) in &self.blocks {
                let at = usize::try_from(index.saturating_mul(8)).unwrap_or(usize::MAX);
                if let Some(entry) = bytes.get_mut(at..at.saturating_add(8)) {
                    entry.copy_from_slice(&offset.to_be_bytes());
                }
            }
            image.write_at(next.offset, &bytes)?;
            sync()?;
            let clusters = u32::try_from(next.entries.saturating_mul(8) >> self.cluster_bits).unwrap_or(u32::MAX);
            let fields = [next.offset.to_be_bytes().as_slice(), &clusters.to_be_bytes()].concat();
            image.write_at(header::REFCOUNT_TABLE_AT, &fields)?;
            sync()?;
            areas.remove(self.table.offset);
            self.free_table(self.table);
            self.table = next;
            self.next_table = None;
            self.new_entries.clear();
        } else if !self.new_entries.is_empty() {
            for index in &self.new_entries {
                let offset = self.blocks.get(index).copied().unwrap_or_default();
                image.write_at(self.table.offset.saturating_add(index.saturating_mul(8)), &offset.to_be_bytes())?;
            }
            sync()?;
            self.new_entries.clear();
        }
        Ok(())
    }

    /// Lowers the counts that wait for it, after the mapping is durable, and writes them. Returns the
    /// clusters that nothing refers to any more. No sync: counts that stay too high waste space, no more.
    pub(crate) fn release(&mut self, image: &File) -> Result<Vec<u64>> {
        let mut free = Vec::new();
        while let Some((cluster, times)) = self.freeing.first_key_value().map(|(cluster, times)| (*cluster, *times)) {
            let count = self.get(image, cluster)?;
            // A count that is too low already was wrong before; it is not made wrap around.
            let left = count.saturating_sub(times);
            if count > 0 {
                self.set(image, cluster, left)?;
            }
            if count > 0 && left == 0 {
                self.hint = self.hint.min(cluster);
                free.push(cluster);
            }
            self.freeing.remove(&cluster);
        }
        self.cache.write(image, |_| true)?;
        self.cache.settle(|_| true);
        Ok(free)
    }
}
