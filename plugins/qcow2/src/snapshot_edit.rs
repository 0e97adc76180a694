//! Making, applying and deleting the snapshots inside an image.
//!
//! ```text
//!   snapshot ─▶ L1 ─┐
//!                   ├─▶ L2 ─▶ clusters      shared: each L2 table and each cluster counts both
//!   disk ─────▶ L1 ─┘
//! ```
//!
//! Each is one transaction. The flag COPIED is kept exact for the tables of the disk: set where the count is
//! one. A table whose flags have to change is written anew, because they change with the counts.
//!
//! QEMU, docs/interop/qcow2.rst, "Snapshots"; what the extra data of a new entry holds is as QEMU writes it.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use blockhouse_plugin::{Error, Result, SnapshotEditor};

use crate::Qcow2;
use crate::header::MAX_SNAPSHOTS;
use crate::snapshots::{self, Entry, MAX_TABLE, MAX_TEXT};
use crate::tables::{COPIED, OFFSET};
use crate::transaction::{Count, Transaction};

/// QEMU's limit of a name, in bytes.
const MAX_NAME: usize = 255;
/// Extra data of a new entry, in bytes: the size of the VM state, of the disk, and an instruction count.
const EXTRA: u32 = 24;

impl SnapshotEditor for Qcow2 {
    fn create_snapshot(&mut self, name: &str, seconds: u64, nanoseconds: u32) -> Result<String> {
        if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
            return Err(Error::Other(format!(
                "{name:?} is no name of a snapshot: it has 1 to {MAX_NAME} bytes, and no NUL among them"
            )));
        }
        let seconds = u32::try_from(seconds)
            .map_err(|_| Error::unsupported(format!("a snapshot made {seconds} seconds after 1970")))?;
        if nanoseconds >= 1_000_000_000 {
            return Err(Error::Other(format!("{nanoseconds} nanoseconds are more than a second")));
        }
        self.change(|transaction| create(transaction, name, seconds, nanoseconds))
    }

    fn apply_snapshot(&mut self, id: &str) -> Result<()> {
        self.change(|transaction| apply(transaction, id))
    }

    fn delete_snapshot(&mut self, id: &str) -> Result<()> {
        self.change(|transaction| delete(transaction, id))
    }
}

fn create(transaction: &mut Transaction<'_>, name: &str, seconds: u32, nanoseconds: u32) -> Result<String> {
    let (entries, length) = transaction.read_snapshots()?;
    let id = new_id(&entries);
    let count = transaction.header.snapshots.saturating_add(1);
    let text = entries.iter().fold(id.len() + name.len(), |text, entry| text.saturating_add(entry.text()));
    drop(entries);
    if count > MAX_SNAPSHOTS || text > MAX_TEXT || length.saturating_add(1024) > MAX_TABLE {
        return Err(Error::unsupported(format!("more snapshots than the {} that the image has", count - 1)));
    }

    let old = transaction.read_l1(transaction.l1)?;
    let mut l1 = old.clone();
    for l1_entry in l1.iter_mut().filter(|entry| **entry != 0) {
        let offset = *l1_entry & OFFSET;
        let mut table = transaction.read_l2(*l1_entry)?;
        transaction.count_entries(&table, Count::Up)?;
        // Everything is shared from now on.
        *l1_entry = if table.set_flags(|_| Ok(false))? {
            transaction.count(offset, Count::Down)?;
            transaction.add_l2(&table, 2)?
        } else {
            transaction.count(offset, Count::Up)?;
            offset
        };
    }
    transaction.replace_l1(&old, &l1)?;
    let shared = transaction.add_l1(&l1)?;

    let mut entry = Vec::new();
    entry.extend(shared.offset.to_be_bytes());
    entry.extend(u32::try_from(shared.entries).unwrap_or(u32::MAX).to_be_bytes());
    for text in [&id, name] {
        entry.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    }
    entry.extend(seconds.to_be_bytes());
    entry.extend(nanoseconds.to_be_bytes());
    // The clock of a machine, and the size of its state: there is none.
    entry.extend(0u64.to_be_bytes());
    entry.extend(0u32.to_be_bytes());
    entry.extend(EXTRA.to_be_bytes());
    entry.extend(0u64.to_be_bytes());
    entry.extend(transaction.header.virtual_size.to_be_bytes());
    entry.extend(u64::MAX.to_be_bytes());
    entry.extend(id.bytes());
    entry.extend(name.bytes());
    entry.resize(entry.len().next_multiple_of(8), 0);
    transaction.replace_snapshots(length, &[(0, length)], &entry, count)?;
    Ok(id)
}

/// One more than the highest number that is an id; if there is no such number, the first that is none.
fn new_id(entries: &[Entry]) -> String {
    let used: BTreeSet<u64> = entries.iter().filter_map(|entry| entry.snapshot.id.parse().ok()).collect();
    let next = used.last().copied().unwrap_or(0).checked_add(1);
    next.or_else(|| (1..).find(|id| !used.contains(id))).unwrap_or(1).to_string()
}

fn apply(transaction: &mut Transaction<'_>, id: &str) -> Result<()> {
    let (entries, _) = transaction.read_snapshots()?;
    let snapshot = snapshots::find(entries, id)?;
    let size = snapshot.snapshot.virtual_size;
    let needed = transaction.l1_entries(size)?;
    let mut l1 = transaction.read_l1(snapshot.l1(transaction.header, transaction.image_size())?)?;
    // A longer one holds the state of a virtual machine, which is the snapshot's alone.
    l1.resize(needed, 0);

    let old = transaction.read_l1(transaction.l1)?;
    // Down first: a count that is as high as it can be gets room.
    for l1_entry in old.iter().filter(|entry| **entry != 0) {
        let table = transaction.read_l2(*l1_entry)?;
        transaction.count_entries(&table, Count::Down)?;
        transaction.count(*l1_entry & OFFSET, Count::Down)?;
    }
    for l1_entry in l1.iter_mut().filter(|entry| **entry != 0) {
        let offset = *l1_entry & OFFSET;
        let mut table = transaction.read_l2(*l1_entry)?;
        transaction.count_entries(&table, Count::Up)?;
        *l1_entry = if table.set_flags(|_| Ok(false))? {
            transaction.add_l2(&table, 1)?
        } else {
            transaction.count(offset, Count::Up)?;
            offset
        };
    }
    transaction.replace_l1(&old, &l1)?;
    transaction.virtual_size = size;
    Ok(())
}

fn delete(transaction: &mut Transaction<'_>, id: &str) -> Result<()> {
    let (mut entries, length) = transaction.read_snapshots()?;
    let (at, entry_length, table) = {
        let number = snapshots::position(&entries, id)?;
        let entry = entries.swap_remove(number);
        (entry.at, entry.length, entry.l1(transaction.header, transaction.image_size())?)
    };
    drop(entries);

    let gone = transaction.read_l1(table)?;
    for l1_entry in gone.iter().filter(|entry| **entry != 0) {
        let table = transaction.read_l2(*l1_entry)?;
        transaction.count_entries(&table, Count::Down)?;
        transaction.count(*l1_entry & OFFSET, Count::Down)?;
    }
    transaction.give_up(table.offset, table.entries.saturating_mul(8))?;

    // What the snapshot shared with nobody but the disk is the disk's own now.
    let old = transaction.read_l1(transaction.l1)?;
    let mut l1 = old.clone();
    for l1_entry in l1.iter_mut().filter(|entry| **entry != 0) {
        let offset = *l1_entry & OFFSET;
        if transaction.references(offset)? != 1 {
            // So is all that it names.
            *l1_entry = offset;
            continue;
        }
        *l1_entry = offset | COPIED;
        let mut table = transaction.read_l2(*l1_entry)?;
        if table.set_flags(|cluster| Ok(transaction.references(cluster)? == 1))? {
            transaction.count(offset, Count::Down)?;
            *l1_entry = transaction.add_l2(&table, 1)?;
        }
    }
    transaction.replace_l1(&old, &l1)?;

    let after = at.saturating_add(entry_length);
    let kept = [(0, at), (after, length.saturating_sub(after))];
    transaction.replace_snapshots(length, &kept, &[], transaction.header.snapshots.saturating_sub(1))
}
