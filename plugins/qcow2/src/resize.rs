//! Changing the size of a disk.
//!
//! One transaction: the size, a longer or shorter L1 table, and the counts of the clusters that a disk
//! which shrinks gives up. Snapshots keep what they have. Bitmaps are ignored by everybody after that, as
//! after any write. After a disk has shrunk a second transaction moves tables down, and the file gets shorter.

use alloc::format;

use blockhouse_plugin::{Error, Level, Resizer, Result, log};

use crate::Qcow2;
use crate::tables::{OFFSET, ZERO};
use crate::transaction::{Count, L2, Transaction};

/// The largest disk, in bytes.
const MAX_SIZE: u64 = (1 << 63) - 512;

impl Resizer for Qcow2 {
    fn resize(&mut self, virtual_size: u64, hide_backing: bool) -> Result<()> {
        if !virtual_size.is_multiple_of(512) || virtual_size > MAX_SIZE {
            return Err(Error::Other(format!(
                "{virtual_size} bytes are no size of a disk: it is a multiple of 512, and {MAX_SIZE} at most"
            )));
        }
        let hide = hide_backing && self.header.backing.is_some() && virtual_size > self.header.virtual_size;
        if hide && self.header.version < 3 {
            return Err(Error::unsupported(
                "hiding a longer backing file in a version 2 image, which has no zero clusters",
            ));
        }
        let shrinks = virtual_size < self.header.virtual_size;
        self.change(|transaction| resize(transaction, virtual_size, hide))?;
        if shrinks && let Err(why) = self.shorten() {
            // The size has changed.
            log(Level::Warn, &format!("unused space stays at the end of the image: {why}"));
        }
        Ok(())
    }
}

fn resize(transaction: &mut Transaction<'_>, virtual_size: u64, hide: bool) -> Result<()> {
    check_snapshots(transaction)?;
    let needed = transaction.l1_entries(virtual_size)?;
    let shape = transaction.shape;
    let cluster_size = shape.cluster_size();
    // What is mapped from `kept` on goes, be it past the new end or past the old one.
    let kept = transaction.header.virtual_size.min(virtual_size).next_multiple_of(cluster_size);
    let hidden = if hide { virtual_size.next_multiple_of(cluster_size) } else { kept };
    let zero = if shape.extended { (0, u64::from(u32::MAX) << 32) } else { (ZERO, 0) };

    let old = transaction.read_l1(transaction.l1)?;
    let mut l1 = old.clone();
    l1.resize(needed.max(old.len()), 0);
    for (index, l1_entry) in l1.iter_mut().enumerate() {
        let start = (index as u64).saturating_mul(shape.table_span());
        if start.saturating_add(shape.table_span()) <= kept || (*l1_entry == 0 && start >= hidden) {
            continue;
        }
        let mut table = match *l1_entry {
            0 => L2::empty(shape),
            entry => transaction.read_l2(entry)?,
        };
        let mut changed = false;
        for number in 0..table.len() {
            let guest = start.saturating_add((number as u64).saturating_mul(cluster_size));
            let new = if guest < hidden { zero } else { (0, 0) };
            let old = table.get(number);
            if guest >= kept && old != new {
                transaction.count_entry(old, Count::Down)?;
                table.set(number, new);
                changed = true;
            }
        }
        let empty = start >= hidden;
        if changed || empty {
            if *l1_entry != 0 {
                transaction.count(*l1_entry & OFFSET, Count::Down)?;
            }
            *l1_entry = if empty { 0 } else { transaction.add_l2(&table, 1)? };
        }
    }
    l1.truncate(needed);
    transaction.replace_l1(&old, &l1)?;
    transaction.virtual_size = virtual_size;
    Ok(())
}

/// A snapshot must say how large its disk was, because it would have the new size otherwise.
fn check_snapshots(transaction: &Transaction<'_>) -> Result<()> {
    if transaction.header.snapshots == 0 {
        return Ok(());
    }
    if transaction.header.version < 3 {
        return Err(Error::unsupported(
            "changing the size of a version 2 image with snapshots, which need not know their sizes",
        ));
    }
    match transaction.read_snapshots()?.0.iter().find(|entry| !entry.has_size) {
        None => Ok(()),
        Some(entry) => Err(Error::unsupported(format!(
            "changing the size of an image with snapshots that do not know their sizes, as {:?} does not",
            entry.snapshot.id
        ))),
    }
}
