//! Internal snapshots: the table that lists them, each with an L1 table of its own.
//!
//! ```text
//!   snapshots_offset ─▶ ├── 40 bytes ──┼── extra data ──┼── id ──┼── name ──┼ to 8 ┤ next …
//!                       │ L1, sizes,   │ VM state size, │
//!                       │ time         │ disk size      │
//! ```
//!
//! QEMU, docs/interop/qcow2.rst, "Snapshots"; the limits are QEMU's, and one more for memory.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use blockhouse_plugin::bytes::{be_u16, be_u32, be_u64};
use blockhouse_plugin::{Error, File, Result, Snapshot};

use crate::header::{Header, Table};

/// The part of an entry that is always there, in bytes.
const FIXED: u64 = 40;
/// QEMU's limit of extra data in an entry, in bytes.
const MAX_EXTRA: u64 = 1024;
/// QEMU's limit of the whole table, in bytes.
const MAX_TABLE: u64 = 64 << 20;
/// All ids and names together, in bytes: they are kept in memory at once, of which a component has little.
const MAX_TEXT: usize = 16 << 20;
/// An error names so many snapshots.
const NAMED: usize = 16;

/// An entry of the table: what people see, and where the L1 table is (not checked yet).
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) snapshot: Snapshot,
    l1_offset: u64,
    l1_entries: u32,
}

impl Entry {
    /// The L1 table of the snapshot, checked.
    pub(crate) fn l1(&self, header: &Header, image_size: u64) -> Result<Table> {
        let what = format!("the L1 table of snapshot {:?}", self.snapshot.id);
        Table::l1(self.l1_offset, self.l1_entries, u64::from(header.cluster_size()), image_size, &what)
    }
}

/// All entries, in the order of the image.
pub(crate) fn read(image: &File, header: &Header) -> Result<Vec<Entry>> {
    read_all(image, header).map(|(entries, _)| entries)
}

/// All entries, and the length of the table in bytes.
pub(crate) fn read_all(image: &File, header: &Header) -> Result<(Vec<Entry>, u64)> {
    let start = header.snapshots_offset;
    let mut entries = Vec::new();
    let mut text = 0usize;
    let mut at = start;
    for number in 0..header.snapshots {
        let (entry, length) = read_entry(image, header, at, number)?;
        text = text.saturating_add(entry.snapshot.id.len()).saturating_add(entry.snapshot.name.len());
        at = at.saturating_add(length.next_multiple_of(8));
        if at - start > MAX_TABLE || text > MAX_TEXT {
            return Err(Error::corrupt(format!(
                "the snapshot table is too large: {} bytes after {} of {} entries",
                at - start,
                number + 1,
                header.snapshots
            )));
        }
        entries.push(entry);
    }
    Ok((entries, at - start))
}

/// The entry at `at`, and its length without padding.
fn read_entry(image: &File, header: &Header, at: u64, number: u32) -> Result<(Entry, u64)> {
    let what = format!("entry {number} of the snapshot table");
    let fixed = image.read_exact_at(&what, at, FIXED)?;
    let short = |at| u64::from(be_u16(&fixed, at).unwrap_or_default());
    let word = |at| be_u32(&fixed, at).unwrap_or_default();
    let id_length = short(12);
    let name_length = short(14);
    let extra_length = u64::from(word(36));
    if extra_length > MAX_EXTRA {
        return Err(Error::corrupt(format!("{what} has {extra_length} bytes of extra data; {MAX_EXTRA} is the limit")));
    }
    let extra = image.read_exact_at(&what, at.saturating_add(FIXED), extra_length)?;
    let names = at.saturating_add(FIXED).saturating_add(extra_length);
    let id = image.read_exact_at(&what, names, id_length)?;
    let name = image.read_exact_at(&what, names.saturating_add(id_length), name_length)?;

    let disk_size = be_u64(&extra, 8).unwrap_or(header.virtual_size);
    let virtual_size = disk_size - disk_size % 512;
    if i64::try_from(virtual_size).is_err() {
        return Err(Error::corrupt(format!("{what} has a disk of {disk_size} bytes, which no offset reaches")));
    }
    let snapshot = Snapshot {
        id: String::from_utf8_lossy(&id).into_owned(),
        name: String::from_utf8_lossy(&name).into_owned(),
        virtual_size,
        vm_state_size: be_u64(&extra, 0).unwrap_or(u64::from(word(32))),
        created_at: u64::from(word(16)),
    };
    let entry = Entry { snapshot, l1_offset: be_u64(&fixed, 0).unwrap_or_default(), l1_entries: word(8) };
    Ok((entry, FIXED + extra_length + id_length + name_length))
}

/// The entry that `wanted` means: an id or, if no id matches, the name of exactly one snapshot.
pub(crate) fn find(entries: Vec<Entry>, wanted: &str) -> Result<Entry> {
    let list = list(&entries);
    for (kind, key) in [("id", (|s| &s.id) as fn(&Snapshot) -> &String), ("name", |s| &s.name)] {
        let count = entries.iter().filter(|entry| key(&entry.snapshot) == wanted).count();
        if count > 1 {
            return Err(Error::Other(format!("{count} snapshots have the {kind} {wanted:?}; the image has {list}")));
        }
        if count == 1 {
            return entries
                .into_iter()
                .find(|entry| key(&entry.snapshot) == wanted)
                .ok_or_else(|| Error::Other(format!("no snapshot {wanted:?}")));
        }
    }
    Err(Error::Other(format!("there is no snapshot with the id or name {wanted:?}; the image has {list}")))
}

fn list(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "no snapshots".into();
    }
    let mut list = String::from("these (id: name): ");
    for (number, Entry { snapshot, .. }) in entries.iter().take(NAMED).enumerate() {
        let separator = if number == 0 { "" } else { ", " };
        list.push_str(&format!("{separator}{:?}: {:?}", snapshot.id, snapshot.name));
    }
    if let Some(more) = entries.len().checked_sub(NAMED).filter(|more| *more > 0) {
        list.push_str(&format!(", and {more} more"));
    }
    list
}
