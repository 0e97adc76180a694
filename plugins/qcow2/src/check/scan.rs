//! Walks all tables of an image and counts the references to each cluster of the file.
//!
//! ```text
//!   header, L1 tables, snapshot table, bitmaps, refcount table ──▶ clusters      roots
//!      L1 entries ──▶ L2 tables                                                  weighted by how often
//!         L2 entries ──▶ clusters                                                each table is named
//! ```
//!
//! Tables that overlap are cut where one starts or ends ([`layers`]), and each part is walked once with
//! the number of tables that it is a part of. So time is bounded by the size of the file, not by how often
//! it names itself.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::bytes::{be_u16, be_u32, be_u64};
use blockhouse_plugin::{Error, Result};

use super::entry::{self, Target};
use super::stored::{Stored, write_changed};
use super::{Image, Lines, counts};
use crate::snapshots;
use crate::tables::{COMPRESSED, COPIED, OFFSET};

/// References are counted in pages of so many clusters.
pub(super) const PAGE: u64 = 1024;
/// So many pages are in memory: 16 MiB, the clusters of 256 GiB with 64 KiB clusters. Fewer in unit tests, so
/// that small images need many passes.
const MAX_PAGES: usize = if cfg!(test) { 3 } else { 4096 };
/// So many L2 tables are remembered at a time: those of 32 TiB with 64 KiB clusters.
const MAX_TABLES: usize = if cfg!(test) { 5 } else { 1 << 16 };
/// Tables are read in pieces of this size, in bytes.
const PIECE: u64 = 64 << 10;

/// QEMU's limits of bitmaps: how many, the bytes of the directory, the entries of a table, the name.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 1024 * 65535;
const MAX_BITMAP_TABLE: u32 = 0x0800_0000;
const MAX_BITMAP_NAME: u16 = 1023;
/// Bits 1-8 and 56-63 of an entry of a bitmap table.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// What a check found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) lines: Lines,
    /// Entries that cannot be right, in tables of every kind.
    pub(super) faults: u64,
    /// Counts that are too low.
    pub(super) low: u64,
    /// Flags COPIED that contradict the counts.
    pub(super) flags: u64,
    pub(super) leaks: u64,
    /// What refers to clusters could not be read: nothing may be given free.
    pub(super) incomplete: bool,
    /// The bitmaps contradict themselves.
    pub(super) bitmaps: bool,
    /// The refcount structure has to be made anew.
    pub(super) rebuild: bool,
    /// The file ends inside of a table.
    pub(super) short: bool,
    pub(super) allocated: u64,
    pub(super) packed: u64,
    pub(super) end: u64,
}

impl Found {
    pub(super) fn corruptions(&self) -> u64 {
        self.faults.saturating_add(self.low).saturating_add(self.flags)
    }

    pub(super) fn is_clean(&self) -> bool {
        self.corruptions() == 0 && self.leaks == 0
    }

    fn fault(&mut self, line: impl FnOnce() -> String) {
        self.faults = self.faults.saturating_add(1);
        self.lines.add(line);
    }
}

/// How often the clusters of the file are referred to, from one page on and up to another.
#[derive(Debug)]
pub(super) struct Counts {
    pages: BTreeMap<u64, Vec<u32>>,
    first: u64,
    /// The first page that had no room, or the largest number if all had.
    pub(super) end: u64,
}

impl Counts {
    fn new(first: u64) -> Self {
        Self { pages: BTreeMap::new(), first, end: u64::MAX }
    }

    pub(super) fn add(&mut self, cluster: u64, weight: u32) {
        let number = cluster / PAGE;
        if number < self.first || number >= self.end {
            return;
        }
        if !self.pages.contains_key(&number) {
            if self.pages.len() >= MAX_PAGES {
                // The last page makes room, and everything from there on is for the next time.
                let last = self.pages.last_key_value().map_or(0, |(last, _)| *last);
                self.end = last.max(number);
                if last < number {
                    return;
                }
                self.pages.pop_last();
            }
            self.pages.insert(number, vec![0; usize::try_from(PAGE).unwrap_or_default()]);
        }
        let page = self.pages.get_mut(&number);
        if let Some(count) = page.and_then(|page| page.get_mut(usize::try_from(cluster % PAGE).unwrap_or_default())) {
            *count = count.saturating_add(weight);
        }
    }

    /// Adds a reference to each cluster of a range of bytes.
    fn add_bytes(&mut self, image: &Image<'_>, offset: u64, length: u64) {
        if length == 0 || image.is_outside(offset, length) {
            return;
        }
        let last = offset.saturating_add(length - 1) / image.cluster_size;
        for cluster in offset / image.cluster_size..=last {
            self.add(cluster, 1);
        }
    }

    /// The references to a cluster, if its page is here.
    pub(super) fn get(&self, cluster: u64) -> Option<u32> {
        let number = cluster / PAGE;
        (number >= self.first && number < self.end).then(|| {
            let page = self.pages.get(&number);
            let count = page.and_then(|page| page.get(usize::try_from(cluster % PAGE).unwrap_or_default()));
            count.copied().unwrap_or_default()
        })
    }

    /// The references to the clusters of a page.
    pub(super) fn page(&self, number: u64) -> Option<&[u32]> {
        self.pages.get(&number).map(Vec::as_slice)
    }

    /// Calls for every page in which a cluster is referred to or may be counted, in order.
    pub(super) fn for_pages(
        &self,
        image: &Image<'_>,
        stored: &mut Stored,
        call: &mut dyn FnMut(&mut Stored, u64) -> Result<()>,
    ) -> Result<()> {
        let mut from = self.first;
        let pages_of_file = image.clusters().div_ceil(PAGE);
        loop {
            let referred = self.pages.range(from..).next().map(|(number, _)| *number);
            let counted = stored.next_page(from).filter(|page| *page < pages_of_file);
            let Some(page) = referred.into_iter().chain(counted).min() else { return Ok(()) };
            if page >= self.end {
                return Ok(());
            }
            call(stored, page)?;
            from = page.saturating_add(1);
        }
    }
}

/// A range, and how many tables of the disk as it is and of other states have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) active: u32,
    pub(super) other: u32,
}

impl Layer {
    pub(super) fn weight(&self) -> u32 {
        self.active.saturating_add(self.other)
    }
}

/// Cuts ranges where others start or end, so that the parts do not overlap.
fn layers(ranges: &[Layer]) -> Vec<Layer> {
    let mut edges: Vec<(u64, i64, i64)> = Vec::new();
    for range in ranges.iter().filter(|range| range.start < range.end) {
        edges.push((range.start, i64::from(range.active), i64::from(range.other)));
        edges.push((range.end, -i64::from(range.active), -i64::from(range.other)));
    }
    edges.sort_unstable();
    let mut parts: Vec<Layer> = Vec::new();
    let (mut start, mut active, mut other) = (0, 0i64, 0i64);
    for (at, more_active, more_other) in edges {
        let weights = (u32::try_from(active).unwrap_or(0), u32::try_from(other).unwrap_or(0));
        if at > start && weights != (0, 0) {
            parts.push(Layer { start, end: at, active: weights.0, other: weights.1 });
        }
        start = at;
        active = active.saturating_add(more_active);
        other = other.saturating_add(more_other);
    }
    parts
}

/// What the header names, directly or through lists.
pub(super) struct Roots {
    /// Ranges of bytes with one owner each.
    plain: Vec<(u64, u64)>,
    /// L1 tables, in bytes.
    l1: Vec<Layer>,
    /// Clusters of L1 tables and of tables of bitmaps.
    clusters: Vec<Layer>,
    /// Tables of bitmaps, in bytes.
    bitmaps: Vec<Layer>,
}

impl Roots {
    /// Reads the lists of snapshots and bitmaps.
    pub(super) fn read(image: &Image<'_>, found: &mut Found) -> Result<Self> {
        let l1 = image.header.l1;
        let mut tables = vec![Layer {
            start: l1.offset,
            end: l1.offset.saturating_add(l1.entries.saturating_mul(8)),
            active: 1,
            other: 0,
        }];
        let mut plain = vec![(0, image.cluster_size)];
        match snapshots::read_all(image.file, &image.header) {
            Ok((entries, length)) => {
                plain.push((image.header.snapshots_offset, length));
                for entry in entries {
                    match entry.l1(&image.header, image.size) {
                        Ok(table) => tables.push(Layer {
                            start: table.offset,
                            end: table.offset.saturating_add(table.entries.saturating_mul(8)),
                            active: 0,
                            other: 1,
                        }),
                        Err(why) => {
                            found.incomplete = true;
                            found.fault(|| format!("{why}; nothing is given free that it may refer to"));
                        }
                    }
                }
            }
            Err(Error::Storage(why)) => return Err(Error::Storage(why)),
            Err(why) => {
                found.incomplete = true;
                found.fault(|| format!("the snapshots cannot be read, and nothing of them is given free: {why}"));
            }
        }
        let bitmaps = bitmaps(image, &mut plain, found)?;
        let cluster_size = image.cluster_size;
        let in_clusters = |layer: &Layer| Layer {
            start: layer.start / cluster_size,
            end: layer.end.div_ceil(cluster_size),
            ..*layer
        };
        let clusters: Vec<Layer> = tables.iter().chain(&bitmaps).filter(|l| l.start < l.end).map(in_clusters).collect();
        Ok(Self { plain, l1: layers(&tables), clusters: layers(&clusters), bitmaps: layers(&bitmaps) })
    }
}

/// The tables of bitmaps, if the image promises that they are kept up.
fn bitmaps(image: &Image<'_>, plain: &mut Vec<(u64, u64)>, found: &mut Found) -> Result<Vec<Layer>> {
    let mut tables = Vec::new();
    let Some(bitmaps) = image.header.kept_bitmaps() else { return Ok(tables) };
    let (start, size) = (bitmaps.directory_offset, bitmaps.directory_size);
    let mut broken = |line: &dyn Fn() -> String| {
        found.bitmaps = true;
        found.fault(line);
    };
    if bitmaps.count > MAX_BITMAPS
        || size > MAX_DIRECTORY
        || !start.is_multiple_of(image.cluster_size)
        || start == 0
        || image.is_outside(start, size)
    {
        broken(&|| format!("the directory of {} bitmaps at {start:#x} ({size} bytes) cannot be", bitmaps.count));
        return Ok(tables);
    }
    plain.push((start, size));
    let mut at = start;
    for number in 0..bitmaps.count {
        let head = image.read(at, 24)?;
        let word = |at| be_u32(&head, at).unwrap_or_default();
        let offset = be_u64(&head, 0).unwrap_or_default();
        let entries = word(8);
        let name = be_u16(&head, 18).unwrap_or_default();
        let [kind, granularity] = [16, 17].map(|at| head.get(at).copied().unwrap_or_default());
        let length = u64::from(name).saturating_add(u64::from(word(20))).saturating_add(24).next_multiple_of(8);
        at = at.saturating_add(length);
        if at > start.saturating_add(size) {
            broken(&|| format!("the directory of bitmaps ends in bitmap {number}"));
            return Ok(tables);
        }
        let bytes = u64::from(entries).saturating_mul(8);
        if entries == 0
            || entries > MAX_BITMAP_TABLE
            || offset == 0
            || !offset.is_multiple_of(image.cluster_size)
            || image.is_outside(offset, bytes)
            || name > MAX_BITMAP_NAME
            || kind != 1
            || !(9..=31).contains(&granularity)
            || word(12) & !3 != 0
        {
            broken(&|| format!("bitmap {number}, with a table of {entries} entries at {offset:#x}, cannot be"));
            continue;
        }
        tables.push(Layer { start: offset, end: offset.saturating_add(bytes), active: 0, other: 1 });
    }
    if at != start.saturating_add(size) {
        broken(&|| format!("the directory of {} bitmaps has {size} bytes, not {}", bitmaps.count, at - start));
    }
    Ok(tables)
}

/// How often L1 entries name an L2 table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Uses {
    pub(super) active: u32,
    pub(super) other: u32,
    /// The disk offset of the first byte that it describes, as the last active entry says.
    guest: u64,
}

impl Uses {
    pub(super) fn weight(&self) -> u32 {
        self.active.saturating_add(self.other)
    }
}

/// What a pass leaves out or adds: for a refcount structure that is being made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Other {
    /// First and last of the clusters of the new structure. The old one is not counted.
    pub(super) clusters: Option<(u64, u64)>,
}

/// A replacement for the entry of an L1 table, or `None`.
pub(super) type L1Call<'a> = dyn FnMut(u64, &Layer, u64) -> Result<Option<u64>> + 'a;
/// A replacement for the entry of an L2 table and its bitmap, or `None`.
pub(super) type L2Call<'a> = dyn FnMut(u64, u64, u64) -> Result<Option<(u64, u64)>> + 'a;

pub(super) struct Scan<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) roots: Roots,
}

impl Scan<'_> {
    /// Calls for every L1 entry that is not 0, with the byte where it is, and writes what it becomes.
    pub(super) fn for_l1(&self, call: &mut L1Call<'_>) -> Result<()> {
        for layer in &self.roots.l1 {
            let mut at = layer.start;
            while at < layer.end {
                let length = (layer.end - at).min(PIECE);
                let old = self.image.read(at, length)?;
                let mut new = None;
                for (number, word) in old.as_chunks::<8>().0.iter().enumerate() {
                    let entry = u64::from_be_bytes(*word);
                    if entry == 0 {
                        continue;
                    }
                    if let Some(value) = call(at.saturating_add(number as u64 * 8), layer, entry)? {
                        put(new.get_or_insert_with(|| old.clone()), number * 8, value);
                    }
                }
                if let Some(new) = new {
                    // An L1 table starts at a cluster, and so at a sector; a part of one need not.
                    self.write_aligned(at, &old, &new)?;
                }
                at = at.saturating_add(length);
            }
        }
        Ok(())
    }

    fn write_aligned(&self, at: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let before = usize::try_from(at % 512).unwrap_or_default();
        let (head_old, rest_old) = old.split_at_checked((512 - before) % 512).unwrap_or((old, &[]));
        let (head_new, rest_new) = new.split_at_checked(head_old.len()).unwrap_or((new, &[]));
        write_changed(self.image, at, head_old, head_new)?;
        write_changed(self.image, at.saturating_add(head_old.len() as u64), rest_old, rest_new)
    }

    /// Calls for every entry of an L2 table that is not 0, and writes what it becomes.
    pub(super) fn for_l2(&self, table: u64, call: &mut L2Call<'_>) -> Result<()> {
        let piece = self.image.cluster_size.min(PIECE);
        let size = self.image.entry_bytes();
        let mut within = 0;
        while within < self.image.cluster_size {
            let at = table.saturating_add(within);
            let old = self.image.read(at, piece)?;
            let mut new = None;
            let first = within / size as u64;
            for (number, bytes) in old.chunks_exact(size).enumerate() {
                let entry = be_u64(bytes, 0).unwrap_or_default();
                let bitmap = be_u64(bytes, 8).unwrap_or_default();
                if entry == 0 && bitmap == 0 {
                    continue;
                }
                if let Some((entry, bitmap)) = call(first.saturating_add(number as u64), entry, bitmap)? {
                    let new = new.get_or_insert_with(|| old.clone());
                    put(new, number * size, entry);
                    if size == 16 {
                        put(new, number * size + 8, bitmap);
                    }
                }
            }
            if let Some(new) = new {
                write_changed(self.image, at, &old, &new)?;
            }
            within = within.saturating_add(piece);
        }
        Ok(())
    }

    /// The clusters of L1 tables (and of tables of bitmaps), and how many tables are in each.
    pub(super) fn l1_clusters(&self) -> impl Iterator<Item = (u64, u32)> {
        self.roots.clusters.iter().flat_map(|layer| (layer.start..layer.end).map(|cluster| (cluster, layer.weight())))
    }

    /// The index of an active L1 entry at a byte of the file.
    pub(super) fn index(&self, at: u64) -> u64 {
        at.saturating_sub(self.image.header.l1.offset) / 8
    }

    /// Bytes of the disk that one L2 table describes.
    fn span(&self) -> u64 {
        (self.image.cluster_size / self.image.entry_bytes() as u64).saturating_mul(self.image.cluster_size)
    }

    /// The L2 tables at `from` and after, as many as are remembered, and where the next ones start.
    pub(super) fn tables(
        &self,
        from: u64,
        mut found: Option<&mut Found>,
    ) -> Result<(BTreeMap<u64, Uses>, Option<u64>)> {
        let mut tables: BTreeMap<u64, Uses> = BTreeMap::new();
        let mut next = u64::MAX;
        let span = self.span();
        self.for_l1(&mut |at, layer, entry| {
            let (table, fault) = entry::l1(self.image, entry);
            if let (Some(fault), Some(found)) = (fault, found.as_deref_mut()) {
                found.fault(|| format!("L1 table, entry at {at:#x} of the file is {entry:#018x}: {}", fault.why));
            }
            let Some(table) = table.filter(|table| *table >= from && *table < next) else { return Ok(None) };
            if !tables.contains_key(&table) && tables.len() >= MAX_TABLES {
                let last = tables.last_key_value().map_or(0, |(last, _)| *last);
                next = last.max(table);
                if last < table {
                    return Ok(None);
                }
                tables.pop_last();
            }
            let uses = tables.entry(table).or_default();
            uses.active = uses.active.saturating_add(layer.active);
            uses.other = uses.other.saturating_add(layer.other);
            if layer.active > 0 {
                uses.guest = self.index(at).saturating_mul(span);
            }
            Ok(None)
        })?;
        Ok((tables, (next != u64::MAX).then_some(next)))
    }

    /// What an L2 entry says. The disk offset is known where one entry names the table.
    pub(super) fn judge(&self, uses: &Uses, number: u64, entry: u64, bitmap: u64) -> (Target, Option<entry::Fault>) {
        let guest = (uses.active == 1 && uses.other == 0)
            .then(|| uses.guest.saturating_add(number.saturating_mul(self.image.cluster_size)));
        entry::l2(self.image, entry, bitmap, guest)
    }

    /// Counts the references to clusters of the page `first` and after. With `found`, says what is wrong with
    /// the tables.
    pub(super) fn pass(
        &self,
        first: u64,
        stored: &Stored,
        other: Other,
        mut found: Option<&mut Found>,
    ) -> Result<Counts> {
        let image = self.image;
        let mut counts = Counts::new(first);
        for (offset, length) in &self.roots.plain {
            counts.add_bytes(image, *offset, *length);
        }
        for layer in &self.roots.clusters {
            for cluster in layer.start..layer.end {
                counts.add(cluster, layer.weight());
            }
        }
        match other.clusters {
            Some((first, last)) => (first..=last).for_each(|cluster| counts.add(cluster, 1)),
            None => {
                counts.add_bytes(image, stored.table.offset, stored.table.entries.saturating_mul(8));
                for (_, block) in stored.blocks() {
                    counts.add(block / image.cluster_size, 1);
                }
            }
        }
        self.bitmap_data(&mut counts, found.as_deref_mut())?;
        let mut from = 0;
        loop {
            let (tables, next) = self.tables(from, found.as_deref_mut().filter(|_| from == 0))?;
            for (table, uses) in &tables {
                counts.add(table / image.cluster_size, uses.weight());
                self.count_l2(*table, uses, &mut counts, found.as_deref_mut())?;
            }
            match next {
                Some(next) => from = next,
                None => return Ok(counts),
            }
        }
    }

    fn bitmap_data(&self, counts: &mut Counts, mut found: Option<&mut Found>) -> Result<()> {
        let image = self.image;
        for layer in &self.roots.bitmaps {
            let mut at = layer.start;
            while at < layer.end {
                let length = (layer.end - at).min(PIECE);
                for (number, word) in image.read(at, length)?.as_chunks::<8>().0.iter().enumerate() {
                    let entry = u64::from_be_bytes(*word);
                    let offset = entry & OFFSET;
                    let wrong = entry & BITMAP_RESERVED != 0
                        || (offset != 0 && (entry & 1 != 0 || !offset.is_multiple_of(image.cluster_size)))
                        || (offset != 0 && image.is_outside(offset, image.cluster_size));
                    if !wrong && offset != 0 {
                        counts.add(offset / image.cluster_size, layer.weight());
                    }
                    if let (true, Some(found)) = (wrong, found.as_deref_mut()) {
                        found.bitmaps = true;
                        let at = at.saturating_add(number as u64 * 8);
                        found.fault(|| format!("the table of a bitmap, at {at:#x}: {entry:#018x} cannot be"));
                    }
                }
                at = at.saturating_add(length);
            }
        }
        Ok(())
    }

    fn count_l2(&self, table: u64, uses: &Uses, counts: &mut Counts, mut found: Option<&mut Found>) -> Result<()> {
        let image = self.image;
        if let Some(found) = found.as_deref_mut()
            && table.saturating_add(image.cluster_size) > image.size
        {
            found.short = true;
            found.fault(|| format!("the L2 table at {table:#x} goes past the end of the file"));
        }
        self.for_l2(table, &mut |number, entry, bitmap| {
            let (target, fault) = self.judge(uses, number, entry, bitmap);
            match target {
                Target::Nothing => {}
                Target::Cluster(_) if image.external => {}
                Target::Cluster(offset) => counts.add(offset / image.cluster_size, uses.weight()),
                Target::Packed(first, last) => {
                    (first..=last).for_each(|cluster| counts.add(cluster, uses.weight()));
                }
            }
            if let Some(found) = found.as_deref_mut() {
                let active = u64::from(uses.active);
                if target != Target::Nothing {
                    found.allocated = found.allocated.saturating_add(active);
                }
                if matches!(target, Target::Packed(..)) {
                    found.packed = found.packed.saturating_add(active);
                }
                if let Some(fault) = fault {
                    let bitmap = if image.extended { format!(" with bitmap {bitmap:#018x}") } else { String::new() };
                    found.fault(|| {
                        format!("L2 table at {table:#x}, entry {number} is {entry:#018x}{bitmap}: {}", fault.why)
                    });
                }
            }
            Ok(None)
        })
    }

    /// Finds flags COPIED of the disk as it is that contradict the counts, and mends them with `mend`.
    pub(super) fn flags(&self, stored: &mut Stored, mend: bool, found: &mut Found) -> Result<()> {
        let image = self.image;
        let mut tables: BTreeMap<u64, Uses> = BTreeMap::new();
        let mut from = 0;
        self.for_l1(&mut |at, layer, entry| {
            let Some(table) = entry::l1(image, entry).0.filter(|_| layer.active > 0) else { return Ok(None) };
            let count = stored.get(image, table / image.cluster_size)?;
            if (count == 1) == (entry & COPIED != 0) {
                return Ok(None);
            }
            found.flags = found.flags.saturating_add(1);
            let index = self.index(at);
            found.lines.add(|| flag(&format!("L1 table, entry {index}"), entry, table, count));
            Ok(mend.then_some(entry ^ COPIED))
        })?;
        loop {
            let (more, next) = self.tables(from, None)?;
            tables.extend(more.into_iter().filter(|(_, uses)| uses.active > 0));
            for table in tables.keys() {
                self.for_l2(*table, &mut |number, entry, bitmap| {
                    if entry & COMPRESSED != 0 {
                        return Ok(None);
                    }
                    let (Target::Cluster(offset), _) = entry::l2(image, entry, bitmap, None) else { return Ok(None) };
                    let count = if image.external { 1 } else { stored.get(image, offset / image.cluster_size)? };
                    if (count == 1) == (entry & COPIED != 0) {
                        return Ok(None);
                    }
                    found.flags = found.flags.saturating_add(1);
                    let what = || flag(&format!("L2 table at {table:#x}, entry {number}"), entry, offset, count);
                    found.lines.add(what);
                    Ok(mend.then_some((entry ^ COPIED, bitmap)))
                })?;
            }
            tables.clear();
            match next {
                Some(next) => from = next,
                None => return Ok(()),
            }
        }
    }
}

fn flag(what: &str, entry: u64, offset: u64, count: u64) -> String {
    let set = if entry & COPIED != 0 { "is set" } else { "is not set" };
    format!("{what} is {entry:#018x}: the flag COPIED {set}, and the count of {offset:#x} is {count}")
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(to) = bytes.get_mut(at..at.saturating_add(8)) {
        to.copy_from_slice(&value.to_be_bytes());
    }
}

/// Compares what the image counts with what it refers to.
pub(super) fn check(image: &Image<'_>) -> Result<Found> {
    let mut found = Found::default();
    let (mut stored, faults) = Stored::read(image)?;
    found.faults = faults.count;
    found.rebuild = faults.count > u64::from(faults.short);
    found.short = faults.short;
    found.lines = faults.lines;
    let scan = Scan { image, roots: Roots::read(image, &mut found)? };
    let mut first = 0;
    loop {
        let counts = scan.pass(first, &stored, Other::default(), Some(&mut found).filter(|_| first == 0))?;
        own_structure(image, &counts, &stored, &mut found);
        compare(image, &counts, &mut stored, &mut found)?;
        if counts.end == u64::MAX {
            break;
        }
        first = counts.end;
    }
    scan.flags(&mut stored, false, &mut found)?;
    Ok(found)
}

/// The refcount structure must be nobody else's: otherwise it is made anew.
fn own_structure(image: &Image<'_>, counts: &Counts, stored: &Stored, found: &mut Found) {
    for (index, block) in stored.blocks() {
        if let Some(references) = counts.get(block / image.cluster_size).filter(|count| *count != 1) {
            found.rebuild = true;
            found.fault(|| {
                format!("refcount table, entry {index}: {references} references lead to the block at {block:#x}")
            });
        }
    }
    let first = stored.table.offset / image.cluster_size;
    let clusters = stored.table.entries.saturating_mul(8).div_ceil(image.cluster_size);
    if (first..first.saturating_add(clusters)).any(|cluster| counts.get(cluster).is_some_and(|count| count > 1)) {
        found.rebuild = true;
    }
}

fn compare(image: &Image<'_>, counts: &Counts, stored: &mut Stored, found: &mut Found) -> Result<()> {
    counts.for_pages(image, stored, &mut |stored, page| {
        let held = stored.page(image, page)?;
        for (number, held) in held.into_iter().enumerate() {
            let cluster = page.saturating_mul(PAGE).saturating_add(number as u64);
            let referred = u64::from(counts.page(page).and_then(|page| page.get(number)).copied().unwrap_or_default());
            if cluster >= image.clusters() && referred == 0 {
                continue;
            }
            if held != 0 || referred != 0 {
                found.end = cluster.saturating_add(1).saturating_mul(image.cluster_size);
            }
            let offset = cluster.saturating_mul(image.cluster_size);
            let line = |what| format!("cluster at {offset:#x}: {what}: the count is {held}, references are {referred}");
            if held < referred {
                found.low = found.low.saturating_add(1);
                found.lines.add(|| line("corrupt"));
                found.rebuild |= !stored.has(cluster);
            } else if held > referred {
                found.leaks = found.leaks.saturating_add(1);
                found.lines.add(|| line("leak"));
            }
        }
        Ok(())
    })
}

/// Raises or lowers counts to what the references are.
pub(super) fn correct(scan: &Scan<'_>, stored: &mut Stored, raise: bool) -> Result<()> {
    let image = scan.image;
    let most = counts::max(image.header.refcount_order);
    let mut first = 0;
    loop {
        let counts = scan.pass(first, stored, Other::default(), None)?;
        counts.for_pages(image, stored, &mut |stored, page| {
            let held = stored.page(image, page)?;
            let mut changes = Vec::new();
            for (number, held) in held.into_iter().enumerate() {
                let cluster = page.saturating_mul(PAGE).saturating_add(number as u64);
                let referred = counts.page(page).and_then(|page| page.get(number)).copied().unwrap_or_default();
                let wanted = u64::from(referred).min(most);
                // What is counted past the end of the file is nobody's business, as for QEMU.
                let here = cluster < image.clusters() || referred > 0;
                if here && if raise { wanted > held } else { wanted < held } {
                    changes.push((cluster, wanted));
                }
            }
            stored.set(image, &changes)
        })?;
        if counts.end == u64::MAX {
            return Ok(());
        }
        first = counts.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_weigh_the_same() {
        let layer = |start, end, active, other| Layer { start, end, active, other };
        let ranges =
            [layer(0, 10, 1, 0), layer(5, 20, 0, 1), layer(5, 10, 0, 1), layer(30, 30, 0, 1), layer(20, 21, 0, 1)];
        assert_eq!(layers(&ranges), [layer(0, 5, 1, 0), layer(5, 10, 1, 2), layer(10, 20, 0, 1), layer(20, 21, 0, 1)]);
    }

    #[test]
    fn counts_that_have_no_room_are_for_the_next_pass() {
        let clusters: Vec<u64> = (0..3 * MAX_PAGES as u64).rev().map(|page| page * PAGE * 7 + 3).collect();
        let mut first = 0;
        let mut seen: Vec<u64> = Vec::new();
        let mut passes = 0;
        loop {
            let mut counts = Counts::new(first);
            for cluster in &clusters {
                counts.add(*cluster, 2);
            }
            seen.extend(clusters.iter().filter(|cluster| counts.get(**cluster) == Some(2)).copied());
            passes += 1;
            if counts.end == u64::MAX {
                break;
            }
            first = counts.end;
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!((passes, seen.len()), (3, clusters.len()));
    }
}
