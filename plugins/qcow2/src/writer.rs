//! Writing: space is reserved, the host writes the data, the mapping is published, and a flush brings the
//! metadata into the file in an order that a power cut cannot break.
//!
//! ```text
//!   prepare ─▶ count 1 in memory        commit ─▶ L2 entry in memory, old cluster waits in `freeing`
//!
//!   flush   1  counts that went up, new tables that nothing names yet        ── sync (and the data)
//!           2  names of new refcount blocks, of a new refcount table         ── sync, if there are any
//!           3  L2 entries, L1 entries: now the disk reads the new data       ── sync
//!           4  counts that go down
//! ```
//!
//! So what is named is always owned, and what is free is never named: a power cut between any two
//! sectors leaves at worst clusters that are counted and not used (leaks).
//!
//! The rule of order is that of `wit/writer.wit`.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use blockhouse_plugin::bytes::be_u64;
use blockhouse_plugin::{Allocation, Error, File, FileIndex, Freed, Level, Result, log};

use crate::areas::Areas;
use crate::cache::PIECE;
use crate::cluster_set::ClusterSet;
use crate::header::{EXTERNAL_DATA, Header};
use crate::refcounts::{MAX_AREAS, Refcounts, Run};
use crate::snapshots;
use crate::tables::{COPIED, Cluster, Map, Owners, ZERO};

/// Changed metadata in memory, in bytes, before it is brought into the file without being asked to.
pub(crate) const MAX_CHANGED: usize = 8 << 20;
/// Clusters that wait to be freed, before the same.
const MAX_FREEING: usize = 1 << 16;
/// Runs of clusters that `flush` says are free. More are free as well, and their space stays with the file.
const MAX_FREED: usize = 1 << 16;
/// Clusters of one answer of `prepare`.
const MAX_PREPARED: u64 = 4096;
/// The largest L1 table of an image that is written, in entries: every entry is looked at when writing
/// begins, and remembered. 64 TiB with 64 KiB clusters.
pub(crate) const MAX_L1_ENTRIES: u64 = 1 << 17;

/// A reservation.
#[derive(Debug)]
struct Reserved {
    /// Disk offset of the first cluster.
    guest: u64,
    clusters: u64,
    /// Offset in the file of the first cluster.
    host: u64,
    /// The space was the cluster's before: it is kept if the reservation is given back.
    kept: bool,
}

/// What an image that is written needs in memory.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) areas: Areas,
    pub(crate) refcounts: Refcounts,
    reserved: BTreeMap<u64, Reserved>,
    /// Disk offsets of the clusters in `reserved`.
    waiting: BTreeSet<u64>,
    next_ticket: u64,
    /// L2 tables that the L1 table in the file does not name.
    fresh: BTreeSet<u64>,
    /// Clusters that became free and were not reported.
    freed: ClusterSet,
    /// Clusters of an external data file that nothing refers to once the mapping is durable.
    leaving: BTreeSet<u64>,
    /// Where the next compressed bytes go, in a cluster with room for them.
    pub(crate) packing: Option<u64>,
    /// Why nothing is written any more.
    failed: Option<String>,
    backing: bool,
    /// Data has a file of its own, where each cluster is at its offset in the disk.
    external: bool,
}

/// The image under the writer's hands.
pub(crate) struct Parts<'a> {
    pub(crate) image: &'a File,
    pub(crate) header: &'a mut Header,
    pub(crate) map: &'a mut Map,
    /// The file that takes data.
    pub(crate) data: FileIndex,
    /// That file, if it is not the image.
    pub(crate) data_file: Option<&'a File>,
    pub(crate) virtual_size: u64,
}

impl Parts<'_> {
    /// The clusters that a range touches, as disk offsets.
    pub(crate) fn clusters(&self, offset: u64, length: u64) -> Result<(u64, u64)> {
        let end = offset.checked_add(length).filter(|end| length > 0 && *end <= self.virtual_size);
        let end = end.ok_or_else(|| {
            Error::Other(format!("{length} bytes at {offset} are not inside the disk of {} bytes", self.virtual_size))
        })?;
        let cluster_size = self.map.shape.cluster_size();
        Ok((offset - offset % cluster_size, end.next_multiple_of(cluster_size)))
    }
}

impl Writing {
    /// Looks at all metadata that the active state has. Changes nothing.
    pub(crate) fn begin(parts: &mut Parts<'_>, image_size: u64) -> Result<Self> {
        let Parts { image, header, map, .. } = parts;
        let l1 = map.l1();
        if l1.entries > MAX_L1_ENTRIES {
            return Err(Error::unsupported(format!(
                "writing an image with an L1 table of {} entries; {MAX_L1_ENTRIES} is the limit",
                l1.entries
            )));
        }
        let cluster_size = u64::from(header.cluster_size());
        let mut areas = Areas::default();
        areas.add(0, cluster_size, "the header").map_err(Error::Corrupt)?;
        areas.add(l1.offset, l1.entries.saturating_mul(8), "the L1 table").map_err(Error::Corrupt)?;
        let (entries, length) = snapshots::read_all(image, header)?;
        areas.add(header.snapshots_offset, length, "the snapshot table").map_err(Error::Corrupt)?;
        for entry in entries {
            let table = entry.l1(header, image_size)?;
            areas
                .add(table.offset, table.entries.saturating_mul(8), "the L1 table of a snapshot")
                .map_err(Error::Corrupt)?;
        }
        let refcounts = Refcounts::read(image, header, image_size, &mut areas)?;
        let mut at = 0;
        while at < l1.entries.saturating_mul(8) {
            let length = (l1.entries.saturating_mul(8) - at).min(PIECE);
            let piece = image.read_exact_at("the L1 table", l1.offset.saturating_add(at), length)?;
            for number in 0..length / 8 {
                let index = at / 8 + number;
                let entry = be_u64(&piece, usize::try_from(number * 8).unwrap_or(usize::MAX)).unwrap_or_default();
                if entry == 0 {
                    continue;
                }
                // As a read would: the entry is checked there.
                if let Some((table, _)) = map.table_of(image, index.saturating_mul(map.shape.table_span()))?.1 {
                    areas.add(table, cluster_size, "an L2 table").map_err(Error::Corrupt)?;
                }
            }
            if areas.len() > MAX_AREAS {
                return Err(Error::unsupported("writing an image with so many tables"));
            }
            at = at.saturating_add(length);
        }
        Ok(Self {
            areas,
            refcounts,
            reserved: BTreeMap::new(),
            waiting: BTreeSet::new(),
            next_ticket: 1,
            fresh: BTreeSet::new(),
            freed: ClusterSet::default(),
            leaving: BTreeSet::new(),
            packing: None,
            failed: None,
            backing: header.backing.is_some(),
            external: header.has(EXTERNAL_DATA),
        })
    }

    /// Who tells `locate` what may be overwritten; nobody once writing has failed.
    pub(crate) fn owners(&mut self, cluster_size: u64) -> Option<Owners<'_>> {
        if self.failed.is_some() {
            return None;
        }
        let Self { refcounts, areas, external, .. } = self;
        Some(Owners { refcounts, areas, cluster_size, external: *external })
    }

    pub(crate) fn check(&self) -> Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(Error::Storage(format!("the image is not written any more: {why}"))),
        }
    }

    /// Marks the image corrupt and ends writing.
    fn corrupt(&mut self, parts: &mut Parts<'_>, why: String) -> Error {
        if let Err(error) = parts.header.mark_corrupt(parts.image) {
            log(Level::Error, &format!("cannot mark the image corrupt: {error}"));
        }
        self.failed = Some(why.clone());
        Error::Corrupt(format!("{why}; the image was marked corrupt, and is not written any more"))
    }

    /// Brings metadata into the file if much of it waits.
    pub(crate) fn make_room(&mut self, parts: &mut Parts<'_>) -> Result<()> {
        let changed = parts.map.cache().changed_bytes().saturating_add(self.refcounts.changed_bytes());
        if changed > MAX_CHANGED || self.refcounts.freeing().max(self.leaving.len()) > MAX_FREEING {
            self.drain(parts)?;
        }
        Ok(())
    }

    /// Makes sure that the L2 table of a disk offset exists and is named by nothing but the L1 table.
    pub(crate) fn own_table(&mut self, parts: &mut Parts<'_>, guest: u64) -> Result<u64> {
        let (index, table) = parts.map.table_of(parts.image, guest)?;
        let cluster_size = parts.map.shape.cluster_size();
        if let Some((table, copied)) = table {
            let count = self.refcounts.get(parts.image, table / cluster_size)?;
            if count == 0 {
                return Err(self.corrupt(parts, format!("the L2 table at {table:#x} has the reference count 0")));
            }
            if copied && count == 1 {
                return Ok(table);
            }
        }
        let new = self.allocate_table(parts)?.saturating_mul(cluster_size);
        let made = parts
            .map
            .create_table(parts.image, new, table.map(|(old, _)| old))
            .and_then(|()| parts.map.set_table(parts.image, index, new));
        if let Err(error) = made {
            parts.map.cache().forget(new..new.saturating_add(cluster_size));
            self.refcounts.free_later(new / cluster_size);
            return Err(error);
        }
        if let Some((old, _)) = table {
            self.areas.remove(old);
            // A table that was made since the last flush is not in the file, and nobody needs it there.
            self.refcounts.free_later(old / cluster_size);
        }
        self.areas.add(new, cluster_size, "an L2 table").map_err(Error::Corrupt)?;
        self.fresh.insert(new);
        Ok(new)
    }

    /// Takes free clusters; free space that holds metadata is the image's contradiction.
    pub(crate) fn allocate(&mut self, parts: &mut Parts<'_>, wanted: u64) -> Result<Run> {
        let run = match self.refcounts.allocate(parts.image, wanted, &mut self.areas) {
            Err(Error::Corrupt(why)) => return Err(self.corrupt(parts, why)),
            other => other?,
        };
        self.taken(parts, run.cluster..run.cluster.saturating_add(run.count));
        Ok(run)
    }

    /// As [`allocate`](Self::allocate), for a table.
    fn allocate_table(&mut self, parts: &mut Parts<'_>) -> Result<u64> {
        let cluster = match self.refcounts.allocate_table(parts.image, &mut self.areas) {
            Err(Error::Corrupt(why)) => return Err(self.corrupt(parts, why)),
            other => other?,
        };
        self.taken(parts, cluster..cluster.saturating_add(1));
        Ok(cluster)
    }

    /// Clusters are in use now.
    fn taken(&mut self, parts: &mut Parts<'_>, clusters: Range<u64>) {
        // In use again before the host heard that it was free.
        if !self.external {
            self.freed.remove(clusters, MAX_FREED);
        }
        parts.map.grow_image(self.refcounts.file_size());
    }

    /// See `prepare` in `wit/writer.wit`.
    pub(crate) fn prepare(
        &mut self,
        parts: &mut Parts<'_>,
        offset: u64,
        length: u64,
        max_allocations: u32,
    ) -> Result<Vec<Allocation>> {
        self.check()?;
        let (start, end) = parts.clusters(offset, length)?;
        self.make_room(parts)?;
        let mut answer: Vec<Allocation> = Vec::new();
        let outcome = self.reserve(parts, start, end, max_allocations, &mut answer);
        if outcome.is_err() {
            let tickets: Vec<u64> = answer.iter().map(|allocation| allocation.ticket).collect();
            self.abandon(&tickets)?;
        }
        outcome.map(|()| answer)
    }

    fn reserve(
        &mut self,
        parts: &mut Parts<'_>,
        start: u64,
        end: u64,
        max_allocations: u32,
        answer: &mut Vec<Allocation>,
    ) -> Result<()> {
        let cluster_size = parts.map.shape.cluster_size();
        let limit = usize::try_from(max_allocations).unwrap_or(usize::MAX);
        let mut guest = start;
        let most = MAX_PREPARED.saturating_mul(cluster_size);
        while guest < end && answer.len() < limit && (answer.is_empty() || guest - start < most) {
            let table = self.own_table(parts, guest)?;
            let table_end = (guest - guest % parts.map.shape.table_span()).saturating_add(parts.map.shape.table_span());
            match self.need(parts, table, guest)? {
                Need::Nothing => {
                    // Whoever asks for this one first has heard otherwise: its count could not be read, or it had another
                    // name that is gone since, or another instance said so. It is written where it is.
                    if guest == start
                        && let Some(host) = parts.map.entry(parts.image, table, guest)?.1.place()
                    {
                        self.take(parts, guest, 1, host, (true, false), answer);
                    }
                    guest = guest.saturating_add(cluster_size);
                }
                Need::Kept(host) => {
                    self.take(parts, guest, 1, host, (true, false), answer);
                    guest = guest.saturating_add(cluster_size);
                }
                Need::Space => {
                    // As many clusters in a row as need space and have the same table.
                    let mut wanted = 1;
                    let stop = end.min(table_end);
                    while wanted < MAX_PREPARED {
                        let next = guest.saturating_add(wanted.saturating_mul(cluster_size));
                        if next >= stop || self.need(parts, table, next)? != Need::Space {
                            break;
                        }
                        wanted += 1;
                    }
                    if self.external {
                        self.take(parts, guest, wanted, guest, (true, false), answer);
                        guest = guest.saturating_add(wanted.saturating_mul(cluster_size));
                        continue;
                    }
                    let run = self.allocate(parts, wanted)?;
                    let host = run.cluster.saturating_mul(cluster_size);
                    self.take(parts, guest, run.count, host, (false, run.zeroed), answer);
                    guest = guest.saturating_add(run.count.saturating_mul(cluster_size));
                }
            }
        }
        Ok(())
    }

    /// What a cluster needs before it can be written.
    pub(crate) fn need(&mut self, parts: &mut Parts<'_>, table: u64, guest: u64) -> Result<Need> {
        if self.waiting.contains(&guest) {
            return Err(Error::Other(format!("the cluster at disk offset {guest:#x} is reserved already")));
        }
        let cluster_size = parts.map.shape.cluster_size();
        let (entry, cluster) = parts.map.entry(parts.image, table, guest)?;
        if self.external {
            // Nothing counts these clusters, and each has one place only.
            return Ok(match cluster {
                Cluster::Data(_) if entry & COPIED != 0 => Need::Nothing,
                _ => Need::Space,
            });
        }
        let places = match (cluster, cluster.place()) {
            (Cluster::Packed(descriptor), _) => descriptor.clusters(),
            (_, Some(offset)) => offset / cluster_size..=offset / cluster_size,
            (_, None) => return Ok(Need::Space),
        };
        let mut count = 0;
        for place in places {
            let offset = place.saturating_mul(cluster_size);
            count = self.refcounts.get(parts.image, place)?;
            // A repair leaves such a cluster to both, and counts both: then it is copied, and metadata again.
            if count < 2
                && let Some(what) = self.areas.find(offset, cluster_size)
            {
                return Err(self.corrupt(
                    parts,
                    format!("the L2 entry of disk offset {guest:#x} is {entry:#018x}, and there is {what}"),
                ));
            }
            if count == 0 {
                return Err(self.corrupt(
                    parts,
                    format!("the cluster at {offset:#x}, of disk offset {guest:#x}, has the reference count 0"),
                ));
            }
        }
        Ok(match cluster {
            _ if entry & COPIED == 0 || count != 1 => Need::Space,
            Cluster::Data(_) => Need::Nothing,
            Cluster::Unallocated(Some(offset))
            | Cluster::Zero(Some(offset))
            | Cluster::Subclusters { place: Some(offset), data: 0, .. } => Need::Kept(offset),
            _ => Need::Space,
        })
    }

    fn take(
        &mut self,
        parts: &Parts<'_>,
        guest: u64,
        count: u64,
        host: u64,
        (kept, zeroed): (bool, bool),
        answer: &mut Vec<Allocation>,
    ) {
        let cluster_size = parts.map.shape.cluster_size();
        let ticket = self.next_ticket;
        self.next_ticket = ticket.wrapping_add(1);
        for number in 0..count {
            self.waiting.insert(guest.saturating_add(number * cluster_size));
            if self.external {
                self.leaving.remove(&(guest / cluster_size + number));
            }
        }
        if self.external {
            let first = guest / cluster_size;
            self.freed.remove(first..first.saturating_add(count), MAX_FREED);
        }
        self.reserved.insert(ticket, Reserved { guest, clusters: count, host, kept });
        let length = count.saturating_mul(cluster_size).min(parts.virtual_size.saturating_sub(guest));
        answer.push(Allocation { start: guest, length, file: parts.data, offset: host, zeroed, ticket });
    }

    fn take_back(&mut self, ticket: u64, cluster_size: u64) -> Option<Reserved> {
        let reserved = self.reserved.remove(&ticket)?;
        for number in 0..reserved.clusters {
            self.waiting.remove(&reserved.guest.saturating_add(number * cluster_size));
        }
        Some(reserved)
    }

    /// See `commit` in `wit/writer.wit`.
    pub(crate) fn commit(&mut self, parts: &mut Parts<'_>, tickets: &[u64]) -> Result<()> {
        self.check()?;
        self.make_room(parts)?;
        let cluster_size = parts.map.shape.cluster_size();
        // First everything that can fail: all entries in memory, so that none or all are changed.
        let mut changes = Vec::new();
        let mut seen = BTreeSet::new();
        for ticket in tickets {
            let reserved = self.reserved.get(ticket).filter(|_| seen.insert(*ticket));
            let Some(&Reserved { guest, clusters, host, .. }) = reserved else {
                return Err(Error::Other(format!("there is no reservation with ticket {ticket}")));
            };
            let table = self.own_table(parts, guest)?;
            for number in 0..clusters {
                let guest = guest.saturating_add(number * cluster_size);
                let (entry, cluster) = parts.map.entry(parts.image, table, guest)?;
                parts.map.set_entry(parts.image, table, guest, None)?;
                changes.push((table, guest, host.saturating_add(number * cluster_size), entry, cluster));
            }
        }
        for (table, guest, host, _, cluster) in changes {
            let bitmap = u64::from(u32::MAX);
            parts.map.set_entry(parts.image, table, guest, Some((host | COPIED, bitmap)))?;
            self.unmap(cluster, Some(host), cluster_size);
        }
        for ticket in tickets {
            self.take_back(*ticket, cluster_size);
        }
        Ok(())
    }

    /// Drops the reference that `cluster` was, except to `stays`.
    pub(crate) fn unmap(&mut self, cluster: Cluster, stays: Option<u64>, cluster_size: u64) {
        if let Cluster::Packed(descriptor) = cluster {
            for number in descriptor.clusters() {
                self.refcounts.free_later(number);
            }
        }
        // What has no place in a data file is not at 0: cluster 0 may be the data of the start of the disk.
        if let Some(offset) = cluster.place().filter(|offset| stays != Some(*offset)) {
            let number = offset / cluster_size;
            if self.external {
                self.leaving.insert(number);
            } else {
                self.refcounts.free_later(number);
            }
        }
    }

    /// See `abandon` in `wit/writer.wit`.
    pub(crate) fn abandon(&mut self, tickets: &[u64]) -> Result<()> {
        let cluster_size = self.refcounts.cluster_size();
        for ticket in tickets {
            let reserved = self
                .take_back(*ticket, cluster_size)
                .ok_or_else(|| Error::Other(format!("there is no reservation with ticket {ticket}")))?;
            if !reserved.kept {
                for number in 0..reserved.clusters {
                    self.refcounts.free_later(reserved.host / cluster_size + number);
                }
            }
        }
        Ok(())
    }

    /// Refuses a range with clusters that are reserved.
    pub(crate) fn refuse_waiting(&self, start: u64, end: u64) -> Result<()> {
        match self.waiting.range(start..end).next() {
            Some(guest) => Err(Error::Other(format!("the cluster at disk offset {guest:#x} is being written"))),
            None => Ok(()),
        }
    }

    /// Makes whole clusters read as zero. Keeps their space if `keep` is set.
    pub(crate) fn zero(&mut self, parts: &mut Parts<'_>, offset: u64, length: u64, keep: bool) -> Result<()> {
        self.check()?;
        let (start, end) = parts.clusters(offset, length)?;
        let shape = parts.map.shape;
        let cluster_size = shape.cluster_size();
        let stop = offset.saturating_add(length);
        if !offset.is_multiple_of(cluster_size) || (stop != end && stop != parts.virtual_size) {
            return Err(Error::Other(format!("{length} bytes at {offset:#x} are not whole clusters")));
        }
        if shape.version < 3 && self.backing {
            return Err(Error::unsupported("zero clusters in a version 2 image with a backing file"));
        }
        self.refuse_waiting(start, end)?;
        if parts.header.promises_raw_data() {
            return Err(Error::unsupported("clusters without data in an image whose data file is raw"));
        }
        let mut guest = start;
        while guest < end {
            let (_, table) = parts.map.table_of(parts.image, guest)?;
            if table.is_none() && !self.backing {
                // Zero already, all of the table.
                guest = (guest - guest % shape.table_span()).saturating_add(shape.table_span());
                continue;
            }
            self.make_room(parts)?;
            let change = match table {
                None => true,
                Some((table, _)) => match parts.map.entry(parts.image, table, guest)?.1 {
                    Cluster::Unallocated(place) => self.backing || (place.is_some() && !keep),
                    Cluster::Zero(place) => place.is_some() && !keep,
                    Cluster::Data(_) | Cluster::Packed(_) | Cluster::Subclusters { .. } => true,
                },
            };
            if change {
                let table = self.own_table(parts, guest)?;
                let (_, cluster) = parts.map.entry(parts.image, table, guest)?;
                // Whatever is given up must be the cluster's own.
                let need = self.need(parts, table, guest)?;
                let kept = match need {
                    Need::Nothing | Need::Kept(_) if keep && !self.external && shape.version >= 3 => cluster.place(),
                    _ => None,
                };
                let place = kept.map_or(0, |offset| offset | COPIED);
                let new = match (shape.version < 3, shape.extended) {
                    (true, _) => (0, 0),
                    (false, false) => (place | ZERO, 0),
                    (false, true) => (place, u64::from(u32::MAX) << 32),
                };
                parts.map.set_entry(parts.image, table, guest, Some(new))?;
                self.unmap(cluster, kept, cluster_size);
            }
            guest = guest.saturating_add(cluster_size);
        }
        Ok(())
    }

    /// See `flush` in `wit/writer.wit`.
    pub(crate) fn flush(&mut self, parts: &mut Parts<'_>) -> Result<Vec<Freed>> {
        self.drain(parts)?;
        let cluster_size = parts.map.shape.cluster_size();
        let freed = self.freed.take().map(|run| Freed {
            file: parts.data,
            offset: run.start.saturating_mul(cluster_size),
            length: (run.end - run.start).saturating_mul(cluster_size),
        });
        Ok(freed.collect())
    }

    /// Brings all metadata into the file, in order.
    fn drain(&mut self, parts: &mut Parts<'_>) -> Result<()> {
        self.check()?;
        let Self { refcounts, areas, fresh, failed, .. } = self;
        let Parts { image, map, data_file, .. } = parts;
        let mut sync = || {
            // The data first, where it is in a file of its own.
            data_file.map_or(Ok(()), File::sync_data).and_then(|()| image.sync_data()).inspect_err(|error| {
                // What the kernel has dropped is not told twice: nothing can be promised any more.
                *failed = Some(error.to_string());
            })
        };
        let cluster_size = map.shape.cluster_size();
        if !refcounts.is_clean() || !map.cache().is_clean() {
            refcounts.write_blocks(image, areas)?;
            let is_fresh = |offset: u64| fresh.contains(&(offset - offset % cluster_size));
            map.cache().write(image, is_fresh)?;
            if image.size()? < refcounts.file_size() {
                image.set_size(refcounts.file_size())?;
            }
            sync()?;
            refcounts.write_table(image, areas, &mut sync)?;
            map.cache().settle(is_fresh);
            // The next write may name them, even if it fails: whatever changes in them is the disk's from here on.
            fresh.clear();
            if !map.cache().is_clean() {
                map.cache().write(image, |_| true)?;
                sync()?;
                map.cache().settle(|_| true);
            }
        }
        // What is free is free, also if it could not be written that it is.
        let mut free = Vec::new();
        let released = self.refcounts.release(parts.image, &self.areas, &mut free);
        if self.packing.is_some_and(|next| free.contains(&(next / cluster_size))) {
            self.packing = None;
        }
        if self.external {
            // Metadata in the image itself: the data file has nothing there to give back.
            free = core::mem::take(&mut self.leaving).into_iter().collect();
        }
        for cluster in free {
            self.freed.insert(cluster, MAX_FREED);
        }
        released
    }

    /// See `finish` in `wit/writer.wit`.
    pub(crate) fn finish(&mut self, parts: &mut Parts<'_>) -> Result<()> {
        let open: Vec<u64> = self.reserved.keys().copied().collect();
        self.abandon(&open)?;
        self.drain(parts)?;
        // A table that moved was freed in the first round, after its own clusters were.
        self.drain(parts)?;
        self.failed = Some("it was closed".into());
        parts.image.sync_data()
    }
}

/// What a cluster needs before it can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// It can be overwritten in place.
    Nothing,
    /// The cluster at this offset is kept for it.
    Kept(u64),
    Space,
}
