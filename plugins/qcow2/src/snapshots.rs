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
pub(crate) const MAX_TABLE: u64 = 64 << 20;
/// All ids and names together, in bytes: they are kept in memory at once, of which a component has little.
pub(crate) const MAX_TEXT: usize = 16 << 20;
/// An error names so many snapshots.
const NAMED: usize = 16;

/// An entry of the table: what people see, and where the L1 table is (not checked yet).
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) snapshot: Snapshot,
    /// Where the entry starts in the table, and its length with the padding, in bytes.
    pub(crate) at: u64,
    pub(crate) length: u64,
    /// Whether it says how large the disk was. Else the disk has the size that it has now.
    pub(crate) has_size: bool,
    l1_offset: u64,
    l1_entries: u32,
}

impl Entry {
    /// Bytes of the id and the name.
    pub(crate) fn text(&self) -> usize {
        self.snapshot.id.len().saturating_add(self.snapshot.name.len())
    }

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
        let mut entry = read_entry(image, header, at, number)?;
        text = text.saturating_add(entry.text());
        entry.at = at - start;
        at = at.saturating_add(entry.length);
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

/// The entry at `at`.
fn read_entry(image: &File, header: &Header, at: u64, number: u32) -> Result<Entry> {
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
    Ok(Entry {
        snapshot,
        at,
        length: (FIXED + extra_length + id_length + name_length).next_multiple_of(8),
        has_size: extra_length >= 16,
        l1_offset: be_u64(&fixed, 0).unwrap_or_default(),
        l1_entries: word(8),
    })
}

/// The entry that `wanted` means: an id or, if no id matches, the name of exactly one snapshot.
pub(crate) fn find(mut entries: Vec<Entry>, wanted: &str) -> Result<Entry> {
    let number = position(&entries, wanted)?;
    Ok(entries.swap_remove(number))
}

/// The number of the entry that `wanted` means.
pub(crate) fn position(entries: &[Entry], wanted: &str) -> Result<usize> {
    for (kind, key) in [("id", (|s| &s.id) as fn(&Snapshot) -> &String), ("name", |s| &s.name)] {
        let mut matching = entries.iter().enumerate().filter(|(_, entry)| key(&entry.snapshot) == wanted);
        if let Some((number, _)) = matching.next() {
            let count = 1 + matching.count();
            if count > 1 {
                return Err(Error::Other(format!(
                    "{count} snapshots have the {kind} {wanted:?}; the image has {}",
                    list(entries)
                )));
            }
            return Ok(number);
        }
    }
    Err(Error::Other(format!("there is no snapshot with the id or name {wanted:?}; the image has {}", list(entries))))
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
