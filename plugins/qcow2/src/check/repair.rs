//! Repairs, in an order that an interruption cannot make worse.
//!
//! ```text
//!   1  entries that cannot be right become what they can be: nothing is freed     ── sync
//!   2  counts go up, or a new refcount structure takes the place of the old one   ── sync
//!   3  all is read again; counts go down                                          ── sync
//!   4  flags COPIED become what the counts say                                    ── sync
//!   5  all is read again; only an image without findings loses its marks          ── sync
//! ```
//!
//! So what leads past the end of the file is gone before the file grows, what is named is counted before
//! anything else, and nothing is given free that a table still names.
//! An interruption leaves leaks and flags that contradict the counts; both are harmless, and the next
//! repair goes on from there.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{File, Repair, Result};

use super::entry;
use super::scan::{self, Found, Other, PAGE, Roots, Scan};
use super::stored::Stored;
use super::{Image, Lines, counts};
use crate::header::{self, MAX_REFCOUNT_TABLE_BYTES, Table};

/// So many tables may hold something else besides; with more, no entry is changed.
const MAX_SHARED: usize = 1 << 16;

/// Repairs what `found` says. Says what it decided in `said`.
pub(super) fn run(file: &File, found: &Found, repair: Repair, said: &mut Lines) -> Result<()> {
    Image::open(file)?.header.clear_unknown(file)?;
    match repair {
        Repair::Leaks => leaks(file, found, said),
        Repair::All => all(file, found, said),
    }
}

fn leaks(file: &File, found: &Found, said: &mut Lines) -> Result<()> {
    if found.faults > 0 {
        said.add(|| "leaks are left alone: what cannot be read may refer to them".into());
        return Ok(());
    }
    let image = Image::open(file)?;
    if found.leaks > 0 {
        lower(&image)?;
    }
    // A flag that is missing says less than could be said. With right counts, all flags can be right.
    if found.low == 0 { flags(&image) } else { Ok(()) }
}

fn all(file: &File, found: &Found, said: &mut Lines) -> Result<()> {
    let mut image = Image::open(file)?;
    if found.incomplete {
        said.add(|| {
            "nothing is given free, and no entry is changed: not all that refers to clusters can be read".into()
        });
        if found.rebuild {
            said.add(|| "no new refcount structure is made for the same reason".into());
        } else if found.low > 0 {
            raise(&image)?;
        }
        return Ok(());
    }
    // Before the file grows: what leads past its end now must not lead to what comes there.
    if found.faults > 0 {
        if found.bitmaps {
            image.header.drop_bitmaps(file)?;
            said.add(|| "the bitmaps are damaged, and were given up: the image says that they are not kept".into());
        }
        if !entries(&image, said)? {
            return Ok(());
        }
    }
    if found.short {
        file.set_size(image.clusters().saturating_mul(image.cluster_size))?;
        file.sync_data()?;
        image = Image::open(file)?;
    }
    if found.rebuild {
        if let Err(why) = rebuild(&image)? {
            said.add(|| format!("no new refcount structure can be made: {why}"));
            return Ok(());
        }
        said.add(|| "a new refcount structure was made at the end of the file".into());
        image = Image::open(file)?;
    } else if found.low > 0 {
        raise(&image)?;
    }
    if found.faults > 0 && scan::check(&image)?.faults > 0 {
        said.add(|| "leaks are left alone: not all entries could be repaired".into());
        return Ok(());
    }
    lower(&image)?;
    flags(&image)
}

/// The tables of an image as it is now.
fn tables<'a>(image: &'a Image<'a>) -> Result<(Scan<'a>, Stored)> {
    let (stored, _) = Stored::read(image)?;
    let roots = Roots::read(image, &mut Found::default())?;
    Ok((Scan { image, roots }, stored))
}

fn raise(image: &Image<'_>) -> Result<()> {
    let (scan, mut stored) = tables(image)?;
    scan::correct(&scan, &mut stored, true)?;
    image.file.sync_data()
}

fn lower(image: &Image<'_>) -> Result<()> {
    let (scan, mut stored) = tables(image)?;
    scan::correct(&scan, &mut stored, false)?;
    image.file.sync_data()
}

fn flags(image: &Image<'_>) -> Result<()> {
    let (scan, mut stored) = tables(image)?;
    scan.flags(&mut stored, true, &mut Found::default())?;
    image.file.sync_data()
}

/// Replaces entries that cannot be right. False if that is not safe, and nothing is changed.
fn entries(image: &Image<'_>, said: &mut Lines) -> Result<bool> {
    let (scan, stored) = tables(image)?;
    let Some(shared) = shared(&scan, &stored)? else {
        said.add(|| "nothing is repaired: too many tables are used for something else besides".into());
        return Ok(false);
    };
    let mut remedies: BTreeMap<&'static str, u64> = BTreeMap::new();
    // Where a table and something else claim a cluster, and most entries cannot be right, it is no table.
    let mut no_tables = BTreeSet::new();
    for cluster in &shared {
        let table = cluster.saturating_mul(image.cluster_size);
        let (mut wrong, mut right) = (0u64, 0u64);
        scan.for_l2(table, &mut |_, entry, bitmap| {
            let which = if entry::l2(image, entry, bitmap, None).1.is_some() { &mut wrong } else { &mut right };
            *which = which.saturating_add(1);
            Ok(None)
        })?;
        if wrong > right {
            no_tables.insert(table);
        }
    }
    let mut done = |remedy: &'static str| {
        let times = remedies.entry(remedy).or_default();
        *times = times.saturating_add(1);
    };
    let mut left = false;
    scan.for_l1(&mut |at, _, entry| {
        let (table, fault) = entry::l1(image, entry);
        if shared.contains(&(at / image.cluster_size)) {
            if fault.is_some() {
                left = true;
            }
            return Ok(None);
        }
        if table.is_some_and(|table| no_tables.contains(&table)) {
            done("it is cleared: it led to a cluster of something else, which cannot be a table");
            return Ok(Some(0));
        }
        Ok(fault.map(|fault| {
            done(fault.remedy);
            fault.new.0
        }))
    })?;
    let mut from = 0;
    loop {
        let (more, next) = scan.tables(from, None)?;
        for (table, uses) in more.iter().filter(|(table, _)| !no_tables.contains(table)) {
            scan.for_l2(*table, &mut |number, entry, bitmap| {
                Ok(scan.judge(uses, number, entry, bitmap).1.map(|fault| {
                    done(fault.remedy);
                    fault.new
                }))
            })?;
        }
        match next {
            Some(next) => from = next,
            None => break,
        }
    }
    for (remedy, times) in remedies {
        said.add(|| format!("entries that could not be right ({times}): {remedy}"));
    }
    image.file.sync_data()?;
    if left {
        said.add(|| "nothing else is repaired: an L1 table is used for something else besides".into());
    }
    Ok(!left)
}

/// Clusters of L1 and L2 tables that something else refers to as well. `None` if there are too many.
fn shared(scan: &Scan<'_>, stored: &Stored) -> Result<Option<BTreeSet<u64>>> {
    let cluster_size = scan.image.cluster_size;
    let mut shared = BTreeSet::new();
    let mut first = 0;
    loop {
        let counts = scan.pass(first, stored, Other::default(), None)?;
        let mut look = |cluster: u64, weight: u32| {
            if counts.get(cluster).is_some_and(|count| count != weight) {
                shared.insert(cluster);
            }
            shared.len() <= MAX_SHARED
        };
        for (cluster, weight) in scan.l1_clusters() {
            if !look(cluster, weight) {
                return Ok(None);
            }
        }
        let mut from = 0;
        loop {
            let (more, next) = scan.tables(from, None)?;
            if !more.iter().all(|(table, uses)| look(table / cluster_size, uses.weight())) {
                return Ok(None);
            }
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        if counts.end == u64::MAX {
            return Ok(Some(shared));
        }
        first = counts.end;
    }
}

/// Makes a new refcount structure at the end of the file, and then makes the header name it. The old one is
/// not referred to any more, and so is free in the new one.
fn rebuild(image: &Image<'_>) -> Result<Result<(), &'static str>> {
    let (scan, mut stored) = tables(image)?;
    let per_block = stored.per_block();
    let most = MAX_REFCOUNT_TABLE_BYTES / 8;
    // Nothing lies behind the new structure, and nothing of the old image is in its place.
    let nothing = Other { clusters: Some((1, 0)) };
    let mut needed = BTreeSet::new();
    let mut start = image.clusters();
    each_page(&scan, &mut stored, nothing, &mut |page, references| {
        for (number, _) in references.iter().enumerate().filter(|(_, count)| **count > 0) {
            let cluster = page.saturating_mul(PAGE).saturating_add(number as u64);
            start = start.max(cluster.saturating_add(1));
            if cluster / per_block < most {
                needed.insert(cluster / per_block);
            }
        }
        Ok(())
    })?;
    // The structure counts itself too: more blocks until it is enough.
    let (entries, table_clusters) = loop {
        let entries = needed.last().map_or(1, |last| last.saturating_add(1));
        let table_clusters = entries.saturating_mul(8).div_ceil(image.cluster_size);
        let clusters = table_clusters.saturating_add(needed.len() as u64);
        let last = start.saturating_add(clusters).saturating_sub(1) / per_block;
        if last >= most {
            return Ok(Err("the refcount table would have more than 8 MiB"));
        }
        let before = needed.len();
        needed.extend(start / per_block..=last);
        if needed.len() == before {
            break (entries, table_clusters);
        }
    };
    let offset_of = |cluster: u64| cluster.saturating_mul(image.cluster_size);
    let first_block = start.saturating_add(table_clusters);
    let end = first_block.saturating_add(needed.len() as u64);
    let mut blocks = vec![0; usize::try_from(entries).unwrap_or_default()];
    for (rank, index) in (0u64..).zip(&needed) {
        if let Some(block) = usize::try_from(*index).ok().and_then(|index| blocks.get_mut(index)) {
            *block = offset_of(first_block.saturating_add(rank));
        }
    }
    drop(needed);

    // What is added to a file reads as zero.
    image.file.set_size(offset_of(end))?;
    let table = Table { offset: offset_of(start), entries: offset_of(table_clusters) / 8 };
    let mut fresh = Stored::new(image, table, blocks);
    let limit = counts::max(image.header.refcount_order);
    let own = Other { clusters: Some((start, end.saturating_sub(1))) };
    each_page(&scan, &mut stored, own, &mut |page, references| {
        let changes: Vec<(u64, u64)> = (page.saturating_mul(PAGE)..)
            .zip(references)
            .filter(|(_, count)| **count > 0)
            .map(|(cluster, count)| (cluster, u64::from(*count).min(limit)))
            .collect();
        fresh.set(image, &changes)
    })?;
    let mut bytes = Vec::new();
    let mut at = table.offset;
    for block in fresh.table_entries() {
        bytes.extend(block.to_be_bytes());
        if bytes.len() >= 1 << 16 {
            image.file.write_at(at, &bytes)?;
            at = at.saturating_add(bytes.len() as u64);
            bytes.clear();
        }
    }
    image.file.write_at(at, &bytes)?;
    image.file.sync_data()?;
    // One write inside of a sector: the old structure until then, the new one from then on.
    let clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
    let fields = [table.offset.to_be_bytes().as_slice(), &clusters.to_be_bytes()].concat();
    image.file.write_at(header::REFCOUNT_TABLE_AT, &fields)?;
    image.file.sync_data()?;
    Ok(Ok(()))
}

/// Calls with the references to each page of clusters that has some.
fn each_page(
    scan: &Scan<'_>,
    stored: &mut Stored,
    other: Other,
    call: &mut dyn FnMut(u64, &[u32]) -> Result<()>,
) -> Result<()> {
    let mut first = 0;
    loop {
        let counts = scan.pass(first, stored, other, None)?;
        counts.for_pages(scan.image, stored, &mut |_, page| match counts.page(page) {
            Some(references) => call(page, references),
            None => Ok(()),
        })?;
        if counts.end == u64::MAX {
            return Ok(());
        }
        first = counts.end;
    }
}
