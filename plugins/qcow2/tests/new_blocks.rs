//! New refcount blocks of which one holds the count of another: whatever stops a flush, what the table names is owned.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use blockhouse_plugin::testing::{Disk, Failure, Storage};
use blockhouse_plugin::{Access, Checker, Creator, NewImage, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Random, torn};

const IMAGE: &str = "/image";
const CLUSTER: usize = 512;
/// Clusters that a block of 32-bit counts counts.
const PER_BLOCK: usize = CLUSTER / 4;
/// States of each cut.
const STATES: usize = 8;

/// An image whose file is longer than what its one block counts: a file system that was full left it so.
fn image(clusters: usize) -> Vec<u8> {
    let storage = Storage::new();
    storage.insert(IMAGE, Vec::new());
    let options = [("cluster-size", "512"), ("refcount-bits", "32")];
    let options = options.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let new = NewImage { virtual_size: 256 << 10, backing: None, options };
    Qcow2::create(storage.file(IMAGE, Access::ReadWrite), new).unwrap();
    let mut bytes = storage.bytes(IMAGE);
    assert!(bytes.len() < PER_BLOCK * CLUSTER);
    bytes.resize(clusters * CLUSTER, 0);
    bytes
}

/// Fills what the first block counts, and goes on in the second.
fn fill(disk: &mut Disk<Qcow2>) -> blockhouse_plugin::Result<()> {
    disk.write_over(0, &vec![7; PER_BLOCK * CLUSTER], &mut |_, to| to.fill(0))
}

fn open(storage: &Storage) -> Disk<Qcow2> {
    let mut disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    disk
}

/// Nothing is wrong but space that is lost. Returns how many clusters that is.
#[track_caller]
fn check(bytes: Vec<u8>, what: &str) -> u64 {
    let storage = Storage::new();
    storage.insert(IMAGE, bytes);
    let report = Qcow2::check(storage.file(IMAGE, Access::ReadOnly), None).unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {report:?}");
    report.leaks
}

/// Ends of the file so that the new block of the second range is in the third, or in the fourth, and so on: each of
/// them new as well.
const ENDS: [usize; 4] = [PER_BLOCK * 2 + 60, PER_BLOCK * 3 - 1, PER_BLOCK * 3, PER_BLOCK * 4 + 1];

#[test]
fn a_failure_at_any_change_leaves_what_is_named_owned() {
    for end in ENDS {
        let before = image(end);
        let mut failed = 0;
        for failure in [Failure::Full, Failure::Short, Failure::Once] {
            for healthy in 0.. {
                let storage = Storage::new();
                storage.insert(IMAGE, before.clone());
                let mut disk = open(&storage);
                fill(&mut disk).unwrap();
                storage.fail_at(IMAGE, Some((healthy, failure)));
                if disk.flush().is_ok() {
                    break;
                }
                failed += 1;
                check(storage.bytes(IMAGE), &format!("{failure:?} after {healthy} changes, {end} clusters"));
                storage.fail_at(IMAGE, None);
                // With room again it goes on, unless a sync failed.
                if disk.flush().and_then(|()| disk.format.finish()).is_ok() {
                    check(storage.bytes(IMAGE), &format!("after {failure:?} and {healthy} changes, {end} clusters"));
                }
            }
        }
        assert!(failed > 10, "{failed} flushes failed");
    }
}

#[test]
fn a_power_cut_at_any_change_leaves_what_is_named_owned() {
    let mut random = Random(1);
    for end in ENDS {
        let before = image(end);
        let storage = Storage::new();
        storage.insert(IMAGE, before.clone());
        let mut disk = open(&storage);
        fill(&mut disk).unwrap();
        disk.flush().unwrap();
        disk.format.finish().unwrap();
        let changes = storage.take_changes(IMAGE);
        let mut leaks = 0;
        for cut in 0..=changes.len() {
            for _ in 0..STATES {
                let bytes = torn(&before, &changes[..cut], &mut random);
                leaks += check(bytes, &format!("{end} clusters, cut at {cut} of {}", changes.len()));
            }
        }
        assert!(leaks > 0, "no cut was in the middle of anything");
    }
}
