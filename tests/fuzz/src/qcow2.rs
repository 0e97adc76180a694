//! The qcow2 format, fed with images that are nothing but input.
//!
//! * `read`: whatever an image says, it is read without a panic and without a lie, and a check without repair
//!   changes nothing.
//! * `repair`: a check that repairs says what it did: what it repaired entirely has no flaw afterwards, and what had
//!   no flaw shows what it showed.

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, CheckReport, Checker, Repair, Snapshots};
use blockhouse_qcow2::Qcow2;

use crate::image::{IMAGE, spread, storage, walk};

/// The names of a backing file and of a data file that an image may use.
const OTHERS: [&str; 2] = ["/images/b", "/images/d"];

fn storage_of(data: &[u8]) -> Storage {
    let storage = storage(spread(data));
    for (number, name) in OTHERS.into_iter().enumerate() {
        storage.insert(name, vec![number as u8 + 1; 1536]);
    }
    storage
}

pub(crate) fn read(data: &[u8]) {
    let storage = storage_of(data);
    let before = storage.bytes(IMAGE);
    let mut snapshots = Vec::new();
    if let Ok(mut qcow2) = storage.opened_image::<Qcow2>(IMAGE, Access::ReadOnly) {
        snapshots = qcow2.list_snapshots().unwrap_or_default();
    }
    let ids = snapshots.into_iter().map(|snapshot| Some(snapshot.id)).take(3);
    for snapshot in std::iter::once(None).chain(ids) {
        let mut selected = None;
        let disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadOnly, |qcow2| {
            selected = snapshot.as_deref().map(|id| qcow2.select_snapshot(id)).transpose()?;
            Ok(())
        });
        if let Ok(mut disk) = disk {
            let size = selected.unwrap_or(disk.info.virtual_size);
            walk(&mut disk.format, size, Access::ReadOnly);
        }
    }
    let _whatever = Qcow2::check(storage.file(IMAGE, Access::ReadOnly), None);
    assert!(storage.bytes(IMAGE) == before, "a read-only image was changed");
    for (number, name) in OTHERS.into_iter().enumerate() {
        assert!(storage.bytes(name) == vec![number as u8 + 1; 1536], "{name} was changed");
    }
}

/// The start of what the disk shows, or `None` if it cannot be read.
fn content(storage: &Storage) -> Option<(u64, Vec<u8>)> {
    let mut disk = storage.disk::<Qcow2>(IMAGE).ok()?;
    let size = disk.info.virtual_size;
    let below = disk.backing_bytes().unwrap_or_default();
    let mut bytes = vec![0; size.min(64 << 10) as usize];
    disk.read_over(size, 0, &mut bytes, &mut |at, to| {
        let there = below.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or_default();
        let (known, past) = to.split_at_mut(there.len().min(to.len()));
        known.copy_from_slice(&there[..known.len()]);
        past.fill(0);
    })
    .ok()?;
    Some((size, bytes))
}

fn is_clean(report: &CheckReport) -> bool {
    report.corruptions == 0 && report.leaks == 0
}

pub(crate) fn repair(data: &[u8]) {
    let storage = storage_of(data);
    let Ok(found) = Qcow2::check(storage.file(IMAGE, Access::ReadOnly), None) else { return };
    let before = content(&storage);
    let how = if data.len().is_multiple_of(2) { Repair::All } else { Repair::Leaks };
    let Ok(report) = Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(how)) else { return };
    let counted = |report: &CheckReport| (report.corruptions, report.leaks);
    assert_eq!(counted(&report), counted(&found), "a repair finds what a check finds");
    assert!(report.corruptions_repaired <= report.corruptions && report.leaks_repaired <= report.leaks, "{report:?}");
    let after = Qcow2::check(storage.file(IMAGE, Access::ReadOnly), None).expect("a repaired image can be checked");
    let left = (
        report.corruptions - report.corruptions_repaired,
        if how == Repair::All || report.corruptions == 0 { report.leaks - report.leaks_repaired } else { u64::MAX },
    );
    if left == (0, 0) {
        assert!(is_clean(&after), "all was repaired of {found:?}, and then there is {after:?}");
    }
    if found.corruptions == 0 {
        assert!(content(&storage) == before, "a repair of nothing but leaks changed the disk");
    }
}
