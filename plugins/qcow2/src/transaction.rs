//! A change of an image as a whole: old until one write of the header, new from then on.
//!
//! ```text
//!   header ──▶ L1, refcount table, snapshot table   in use: nothing of it is written
//!      ╎
//!      ╎ one write of one sector, after a sync
//!      ▼
//!   new L1, new refcount table, ...                 in space that was free: nothing refers to it before
//! ```
//!
//! Everything that the change touches is copied: tables, and refcount blocks with their final counts. What
//! is not touched is named by both. So a power cut leaves the old image or the new one, whole: no count is
//! ever too low, none too high, and the flag COPIED is right in both. An error before the write of the
//! header leaves the old image.
//!
//! The size of the disk, the L1 table, the refcount table and the snapshot table are named in bytes 24 to 72
//! of the header. QEMU, docs/interop/qcow2.rst, "Header".

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::RangeInclusive;

use blockhouse_plugin::bytes::be_u64;
use blockhouse_plugin::{Access, Error, File, FileIndex, Level, Result, log};

use crate::Qcow2;
use crate::areas::Areas;
use crate::cache::PIECE;
use crate::header::{EXTERNAL_DATA, Header, SIZE_AT, Table};
use crate::refcounts::{MAX_AREAS, Refcounts};
use crate::snapshots::{self, Entry};
use crate::tables::{COMPRESSED, COPIED, Cluster, Map, OFFSET, Shape};
use crate::writer::{MAX_L1_ENTRIES, Parts, Writing};

/// What `areas` calls the L2 tables of the disk.
const L2_TABLE: &str = "an L2 table";

/// What `areas` calls the tables that can be moved.
const MOVABLE: [&str; 5] = [L2_TABLE, "the L1 table", "the refcount table", "a refcount block", "the snapshot table"];

/// Whether a cluster gets a reference or loses one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Up,
    Down,
}

/// An L2 table in memory.
#[derive(Debug)]
pub(crate) struct L2 {
    bytes: Vec<u8>,
    entry_bytes: usize,
}

impl L2 {
    /// A table of no clusters.
    pub(crate) fn empty(shape: Shape) -> Self {
        Self {
            bytes: vec![0; usize::try_from(shape.cluster_size()).unwrap_or_default()],
            entry_bytes: usize::try_from(shape.entry_bytes()).unwrap_or(8),
        }
    }

    /// How many clusters it describes.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.entry_bytes
    }

    /// An entry and, with extended L2, its bitmap.
    pub(crate) fn get(&self, number: usize) -> (u64, u64) {
        let at = number.saturating_mul(self.entry_bytes);
        let bitmap = if self.entry_bytes == 8 { None } else { be_u64(&self.bytes, at.saturating_add(8)) };
        (be_u64(&self.bytes, at).unwrap_or_default(), bitmap.unwrap_or_default())
    }

    pub(crate) fn set(&mut self, number: usize, (entry, bitmap): (u64, u64)) {
        let at = number.saturating_mul(self.entry_bytes);
        let new = [entry.to_be_bytes(), bitmap.to_be_bytes()].concat();
        let to = self.bytes.get_mut(at..at.saturating_add(self.entry_bytes)).unwrap_or_default();
        for (to, from) in to.iter_mut().zip(new) {
            *to = from;
        }
    }

    /// Sets the flag COPIED of every entry as `owned` says for its cluster. Returns whether one changed.
    pub(crate) fn set_flags(&mut self, mut owned: impl FnMut(u64) -> Result<bool>) -> Result<bool> {
        let mut changed = false;
        for number in 0..self.len() {
            let (entry, bitmap) = self.get(number);
            if entry & COMPRESSED != 0 || entry & OFFSET == 0 {
                continue;
            }
            if owned(entry & OFFSET)? != (entry & COPIED != 0) {
                self.set(number, (entry ^ COPIED, bitmap));
                changed = true;
            }
        }
        Ok(changed)
    }
}

/// The clusters that an L2 entry refers to: none, one or, where it is compressed, perhaps more.
fn references(shape: Shape, entry: u64, bitmap: u64) -> Result<Option<RangeInclusive<u64>>> {
    let cluster = shape
        .decode(entry, bitmap, 0)
        .map_err(|why| Error::corrupt(format!("an L2 entry is {entry:#018x} with bitmap {bitmap:#018x}: {why}")))?;
    Ok(match cluster {
        Cluster::Packed(descriptor) => Some(descriptor.clusters()),
        // With extended L2 there can be space of which nothing is used.
        _ if entry & OFFSET == 0 => None,
        _ => {
            let cluster = (entry & OFFSET) / shape.cluster_size();
            Some(cluster..=cluster)
        }
    })
}

/// A change that is being prepared.
pub(crate) struct Transaction<'a> {
    pub(crate) image: &'a File,
    pub(crate) header: &'a Header,
    pub(crate) shape: Shape,
    image_size: u64,
    pub(crate) areas: Areas,
    pub(crate) refcounts: Refcounts,
    /// What the header will say.
    pub(crate) virtual_size: u64,
    pub(crate) l1: Table,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
}

impl Qcow2 {
    /// Lets `prepare` prepare a change, and makes it. It is durable when this returns, or was not made.
    /// The last call of an instance: what it knows of the image is old after that.
    pub(crate) fn change<T>(&mut self, prepare: impl FnOnce(&mut Transaction<'_>) -> Result<T>) -> Result<T> {
        if self.access != Access::ReadWrite || self.writing.is_some() {
            return Err(Error::Other("the image was not opened for a change, or was changed already".into()));
        }
        if self.header.has(EXTERNAL_DATA) {
            return Err(Error::unsupported("this change of an image with an external data file"));
        }
        self.repair_if_dirty()?;
        self.access = Access::ReadOnly;
        let Self { image, header, map, virtual_size, .. } = self;
        let shape = map.shape;
        let mut parts = Parts { image, header, map, data: FileIndex(0), data_file: None, virtual_size: *virtual_size };
        let Writing { areas, mut refcounts, .. } = Writing::begin(&mut parts, self.image_size)?;
        refcounts.anew();
        let image_size = image.size()?;
        let mut transaction = Transaction {
            image,
            header,
            shape,
            image_size,
            areas,
            refcounts,
            virtual_size: header.virtual_size,
            l1: header.l1,
            snapshots: header.snapshots,
            snapshots_offset: header.snapshots_offset,
        };
        let prepared = prepare(&mut transaction).and_then(|value| Ok((value, transaction.finish()?)));
        match prepared {
            Ok((value, table)) => {
                transaction.switch(table)?;
                Ok(value)
            }
            Err(error) => {
                // Nothing refers to what was added.
                if image.size().is_ok_and(|size| size > image_size)
                    && let Err(why) = image.set_size(image_size)
                {
                    log(Level::Warn, &format!("unused space stays at the end of the image: {why}"));
                }
                Err(error)
            }
        }
    }
}

impl Qcow2 {
    /// After a change that freed space: moves the tables at the end of the file down to where space is free,
    /// so that the file gets shorter. The new tables could not go there before, it was the old image's.
    pub(crate) fn shorten(&mut self) -> Result<()> {
        self.image_size = self.image.size()?;
        self.header = Header::read(&self.image, self.image_size, Access::ReadWrite)?;
        self.map = Map::new(&self.header, self.image_size);
        self.virtual_size = self.header.virtual_size;
        self.access = Access::ReadWrite;
        self.change(|transaction| transaction.move_down())
    }
}

impl Transaction<'_> {
    fn move_down(&mut self) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let mut tables = 0u64;
        let areas = &self.areas;
        let last = self.refcounts.used_end(self.image, |cluster| {
            let what = areas.find(cluster.saturating_mul(cluster_size), cluster_size);
            let table = what.is_some_and(|what| MOVABLE.contains(&what));
            tables = tables.saturating_add(u64::from(table));
            table
        })?;
        // Old and new are there at once, and each move can move a block or two.
        let end = self.refcounts.file_size() / cluster_size;
        if end.saturating_sub(last) <= tables.saturating_add(8).saturating_mul(2) {
            return Ok(());
        }
        let from = last.saturating_mul(cluster_size);
        self.refcounts.move_down(self.image, last, &mut self.areas)?;
        let old = self.read_l1(self.l1)?;
        let mut l1 = old.clone();
        for l1_entry in &mut l1 {
            let offset = *l1_entry & OFFSET;
            if offset >= from && *l1_entry & COPIED != 0 && self.references(offset)? == 1 {
                let table = self.read_l2(*l1_entry)?;
                self.count(offset, Count::Down)?;
                *l1_entry = self.add_l2(&table, 1)?;
            }
        }
        if self.l1.offset >= from && l1 == old {
            self.give_up(self.l1.offset, self.l1.entries.saturating_mul(8))?;
            self.l1 = self.add_l1(&l1)?;
        }
        self.replace_l1(&old, &l1)?;
        if self.snapshots > 0 && self.snapshots_offset >= from {
            let length = self.read_snapshots()?.1;
            self.replace_snapshots(length, &[(0, length)], &[], self.snapshots)?;
        }
        Ok(())
    }

    /// All that is new is durable when it returns, except for the header. Returns the refcount table.
    fn finish(&mut self) -> Result<Table> {
        let table = self.refcounts.finish_anew(self.image, &mut self.areas)?;
        if self.image.size()? < self.refcounts.file_size() {
            self.image.set_size(self.refcounts.file_size())?;
        }
        self.image.sync_data()?;
        Ok(table)
    }

    /// Makes the new image the image, and cuts off what is not used at its end.
    fn switch(&mut self, table: Table) -> Result<()> {
        let l1_entries = u32::try_from(self.l1.entries).unwrap_or(u32::MAX);
        let mut fields = Vec::with_capacity(72);
        fields.extend(self.virtual_size.to_be_bytes());
        // No encryption.
        fields.extend(0u32.to_be_bytes());
        fields.extend(l1_entries.to_be_bytes());
        fields.extend(self.l1.offset.to_be_bytes());
        fields.extend(table.offset.to_be_bytes());
        fields.extend(self.refcounts.table_clusters(table).to_be_bytes());
        fields.extend(self.snapshots.to_be_bytes());
        fields.extend(self.snapshots_offset.to_be_bytes());
        fields.extend(self.header.features_after_change());
        self.image.write_at(SIZE_AT, &fields)?;
        self.image.sync_data()?;
        // From here on the change is made; a file that stays long only takes space.
        let cut = self.refcounts.used_end(self.image, |_| false).and_then(|end| {
            let size = end.saturating_mul(self.shape.cluster_size());
            if self.image.size()? > size { self.image.set_size(size) } else { Ok(()) }
        });
        if let Err(why) = cut {
            log(Level::Warn, &format!("unused space stays at the end of the image: {why}"));
        }
        Ok(())
    }

    /// The size of the file before.
    pub(crate) fn image_size(&self) -> u64 {
        self.image_size
    }

    /// The L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries(&self, size: u64) -> Result<usize> {
        let entries = size.div_ceil(self.shape.table_span()).max(1);
        usize::try_from(entries).ok().filter(|_| entries <= MAX_L1_ENTRIES).ok_or_else(|| {
            Error::unsupported(format!(
                "a disk of {size} bytes: with clusters of {} bytes its L1 table would have {entries} entries, \
                 and {MAX_L1_ENTRIES} is the limit",
                self.shape.cluster_size()
            ))
        })
    }

    /// The entries of an L1 table, checked; 0 where there is no L2 table.
    pub(crate) fn read_l1(&self, l1: Table) -> Result<Vec<u64>> {
        if l1.entries > MAX_L1_ENTRIES {
            return Err(Error::unsupported(format!(
                "changing an image with an L1 table of {} entries; {MAX_L1_ENTRIES} is the limit",
                l1.entries
            )));
        }
        let bytes = self.image.read_exact_at("an L1 table", l1.offset, l1.entries.saturating_mul(8))?;
        let cluster_size = self.shape.cluster_size();
        let mut seen = BTreeSet::new();
        let mut entries = Vec::with_capacity(bytes.len() / 8);
        for word in bytes.as_chunks::<8>().0 {
            let entry = u64::from_be_bytes(*word);
            let offset = entry & OFFSET;
            let why = if entry & !(OFFSET | COPIED) != 0 {
                "reserved bits are set"
            } else if !offset.is_multiple_of(cluster_size) {
                "the offset is not a multiple of the cluster size"
            } else if offset.saturating_add(cluster_size) > self.image_size {
                "the L2 table is past the end of the file"
            } else if offset != 0 && !seen.insert(offset) {
                "another entry has the same L2 table"
            } else if self.areas.find(offset, cluster_size).is_some_and(|what| offset != 0 && what != L2_TABLE) {
                "other metadata is there"
            } else {
                entries.push(if offset == 0 { 0 } else { entry });
                continue;
            };
            return Err(Error::corrupt(format!(
                "the L1 table at {:#x}, entry {} is {entry:#018x}: {why}",
                l1.offset,
                entries.len()
            )));
        }
        Ok(entries)
    }

    /// The L2 table that an L1 entry names.
    pub(crate) fn read_l2(&self, entry: u64) -> Result<L2> {
        let mut table = L2::empty(self.shape);
        let offset = entry & OFFSET;
        let read = self.image.read_at(offset, &mut table.bytes)?;
        if read < table.bytes.len() {
            let end = offset.saturating_add(read as u64);
            return Err(Error::ends_early(L2_TABLE, offset, self.shape.cluster_size(), end));
        }
        Ok(table)
    }

    /// Counts one reference more or less to the cluster at `offset`.
    pub(crate) fn count(&mut self, offset: u64, count: Count) -> Result<()> {
        self.count_number(offset / self.shape.cluster_size(), count)
    }

    fn count_number(&mut self, cluster: u64, count: Count) -> Result<()> {
        match count {
            Count::Up => self.refcounts.raise(self.image, cluster, 1, &mut self.areas),
            Count::Down => self.refcounts.lower(self.image, cluster, &mut self.areas),
        }
    }

    /// Counts the references of one entry of an L2 table.
    pub(crate) fn count_entry(&mut self, (entry, bitmap): (u64, u64), count: Count) -> Result<()> {
        if entry == 0 && bitmap == 0 {
            return Ok(());
        }
        let cluster_size = self.shape.cluster_size();
        for cluster in references(self.shape, entry, bitmap)?.into_iter().flatten() {
            if let Some(what) = self.areas.find(cluster.saturating_mul(cluster_size), cluster_size) {
                return Err(Error::corrupt(format!("an L2 entry is {entry:#018x}, and there is {what}")));
            }
            self.count_number(cluster, count)?;
        }
        Ok(())
    }

    /// Counts the references of all entries of an L2 table.
    pub(crate) fn count_entries(&mut self, table: &L2, count: Count) -> Result<()> {
        (0..table.len()).try_for_each(|number| self.count_entry(table.get(number), count))
    }

    /// The reference count of the cluster at `offset`, as it will be.
    pub(crate) fn references(&mut self, offset: u64) -> Result<u64> {
        self.refcounts.get(self.image, offset / self.shape.cluster_size())
    }

    /// Counts one reference less to the clusters of `length` bytes at `offset`.
    pub(crate) fn give_up(&mut self, offset: u64, length: u64) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let end = offset.saturating_add(length).div_ceil(cluster_size);
        (offset / cluster_size..end).try_for_each(|cluster| self.count_number(cluster, Count::Down))
    }

    /// Takes free space for `length` bytes of `what`.
    pub(crate) fn allocate(&mut self, length: u64, what: &'static str) -> Result<u64> {
        if self.areas.len() > MAX_AREAS {
            return Err(Error::unsupported("an image with so many tables"));
        }
        let clusters = length.div_ceil(self.shape.cluster_size());
        let first = self.refcounts.allocate_row(self.image, clusters, &mut self.areas)?;
        let offset = first.saturating_mul(self.shape.cluster_size());
        self.areas.add(offset, length, what).map_err(Error::Corrupt)?;
        Ok(offset)
    }

    /// Writes an L2 table that has `count` references. Returns the L1 entry for it.
    pub(crate) fn add_l2(&mut self, table: &L2, count: u64) -> Result<u64> {
        let offset = self.allocate(self.shape.cluster_size(), L2_TABLE)?;
        self.image.write_at(offset, &table.bytes)?;
        if count > 1 {
            self.refcounts.raise(self.image, offset / self.shape.cluster_size(), count - 1, &mut self.areas)?;
            return Ok(offset);
        }
        Ok(offset | COPIED)
    }

    /// Writes an L1 table.
    pub(crate) fn add_l1(&mut self, entries: &[u64]) -> Result<Table> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let offset = self.allocate(bytes.len() as u64, "an L1 table")?;
        self.image.write_at(offset, &bytes)?;
        Ok(Table { offset, entries: entries.len() as u64 })
    }

    /// Makes `entries` the L1 table of the disk, in place of `old`, what is in the file.
    pub(crate) fn replace_l1(&mut self, old: &[u64], entries: &[u64]) -> Result<()> {
        if old != entries {
            self.give_up(self.l1.offset, self.l1.entries.saturating_mul(8))?;
            self.l1 = self.add_l1(entries)?;
        }
        Ok(())
    }

    /// The snapshot table as it is in the file, and its length in bytes.
    pub(crate) fn read_snapshots(&self) -> Result<(Vec<Entry>, u64)> {
        snapshots::read_all(self.image, self.header)
    }

    /// Makes the ranges `kept` of the snapshot table, offset and length, and then `new` the table of
    /// `count` snapshots, in place of the present one of `length` bytes.
    pub(crate) fn replace_snapshots(&mut self, length: u64, kept: &[(u64, u64)], new: &[u8], count: u32) -> Result<()> {
        self.give_up(self.snapshots_offset, length)?;
        let old = self.snapshots_offset;
        let sum = kept.iter().fold(new.len() as u64, |sum, (_, length)| sum.saturating_add(*length));
        self.snapshots = count;
        self.snapshots_offset = if sum == 0 { 0 } else { self.allocate(sum, "the snapshot table")? };
        let mut at = self.snapshots_offset;
        for (start, length) in kept {
            let mut done = 0;
            while done < *length {
                let part = (length - done).min(PIECE);
                let from = old.saturating_add(*start).saturating_add(done);
                let mut piece = vec![0; usize::try_from(part).unwrap_or_default()];
                // The file may end before the padding of the last entry, which is zero.
                self.image.read_at(from, &mut piece)?;
                self.image.write_at(at, &piece)?;
                at = at.saturating_add(part);
                done = done.saturating_add(part);
            }
        }
        self.image.write_at(at, new)
    }
}
