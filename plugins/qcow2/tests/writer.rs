//! The writer against images that contradict themselves, and against a host that makes mistakes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use blockhouse_plugin::testing::{Disk, Storage};
use blockhouse_plugin::{Access, Checker, Error, Format, Placement, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::Handmade;

const CLUSTER: u64 = 64 << 10;
const COPIED: u64 = 1 << 63;

/// An image whose reference counts are right, opened for writing.
fn image() -> Handmade {
    let mut image = Handmade::v3();
    for cluster in 0..7 {
        set_count(&mut image, cluster, 1);
    }
    image
}

fn set_count(image: &mut Handmade, cluster: usize, count: u16) {
    let at = image.at(2) + 2 * cluster;
    image.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
}

/// As [`begin`], of the file `/image` in storage that can be looked at.
fn begin_in_storage(image: &Handmade) -> (Storage, Disk<Qcow2>) {
    let storage = Storage::new();
    storage.insert("/image", image.bytes.clone());
    let mut disk = storage.disk_with::<Qcow2>("/image", Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    (storage, disk)
}

fn begin(image: &Handmade) -> Disk<Qcow2> {
    let mut disk = image.open_for(Access::ReadWrite).unwrap();
    disk.format.begin().unwrap();
    disk
}

fn overwritable(disk: &mut Disk<Qcow2>, cluster: u64) -> bool {
    let located = disk.format.locate(cluster * CLUSTER, 1, 64).unwrap();
    let mut at = located.start;
    for extent in located.extents {
        if (at..at + extent.length).contains(&(cluster * CLUSTER)) {
            return matches!(extent.placement, Placement::Data { overwrite: true, .. });
        }
        at += extent.length;
    }
    panic!("no answer for cluster {cluster}");
}

#[test]
fn own_clusters_are_overwritten_and_others_get_space() {
    let mut disk = begin(&image());
    assert!(overwritable(&mut disk, 0));
    assert!(!overwritable(&mut disk, 2), "not allocated");
    let allocations = disk.format.prepare(0, 8 * CLUSTER, 64).unwrap();
    let (first, others) = allocations.split_first().unwrap();
    assert_eq!((first.start, first.length, first.offset), (0, CLUSTER, 5 * CLUSTER), "what is asked for has its place");
    assert_eq!(others.iter().map(|a| a.length).sum::<u64>(), 6 * CLUSTER);
    assert!(others.iter().all(|a| a.start >= 2 * CLUSTER && a.offset >= 7 * CLUSTER));
    assert!(!overwritable(&mut disk, 2), "nothing is published yet");
    let tickets: Vec<u64> = allocations.iter().map(|a| a.ticket).collect();
    disk.format.commit(&tickets).unwrap();
    assert!((0..8).all(|cluster| overwritable(&mut disk, cluster)));
    disk.format.flush().unwrap();
    disk.format.finish().unwrap();
}

#[test]
fn a_data_cluster_on_metadata_is_refused_and_ends_writing() {
    for (place, what) in [(0, "header"), (1, "refcount table"), (2, "refcount block"), (3, "L1 table"), (4, "L2 table")]
    {
        for operation in ["write", "zero", "discard"] {
            // An offset of 0 with the flag COPIED is no cluster at all: the header is reached by compression.
            let entry = if place == 0 { 1 << 62 } else { image().cluster(place) | COPIED };
            let mut image = image();
            image.l2(2, entry);
            let mut disk = begin(&image);
            assert!(!overwritable(&mut disk, 2), "{what}");
            let result = match operation {
                "write" => disk.format.prepare(2 * CLUSTER, 1, 1).map(|_| ()),
                "zero" => disk.format.zero(2 * CLUSTER, CLUSTER, true),
                _ => disk.format.discard(2 * CLUSTER, CLUSTER),
            };
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Corrupt(_)), "{what}, {operation}: {error:?}");
            assert!(error.text().contains(what) && error.text().contains("marked corrupt"), "{error}");
            assert!(!overwritable(&mut disk, 0), "after that nothing may be written, not even in place");
            assert!(disk.format.prepare(5 * CLUSTER, 1, 1).is_err());
            assert!(disk.format.flush().is_err());
        }
    }
}

/// As a repair leaves it: each of both is counted.
#[test]
fn a_data_cluster_on_metadata_that_is_counted_twice_is_copied() {
    for (place, what) in [(1, "refcount table"), (3, "L1 table"), (4, "L2 table")] {
        let mut image = image();
        set_count(&mut image, place, 2);
        let entry = image.cluster(place) | COPIED;
        image.l2(2, entry);
        let (storage, mut disk) = begin_in_storage(&image);
        assert!(!overwritable(&mut disk, 2), "{what}");
        let taken = disk.format.prepare(2 * CLUSTER, CLUSTER, 1).unwrap();
        assert!(taken[0].offset >= 7 * CLUSTER, "{what}");
        disk.format.commit(&[taken[0].ticket]).unwrap();
        // An L2 table that is counted twice is copied as well, and then nobody has that cluster.
        assert_eq!(disk.format.flush().unwrap().is_empty(), place != 4, "{what}");
        disk.format.finish().unwrap();
        let report = Qcow2::check(storage.file("/image", Access::ReadOnly), None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {report:?}");
    }
}

/// More entries name metadata than are counted. What they give up is not what the image consists of.
#[test]
fn metadata_is_not_freed_by_entries_that_nobody_counted() {
    for (place, what) in [(1, "refcount table"), (2, "refcount block"), (3, "L1 table")] {
        let mut image = image();
        set_count(&mut image, place, 2);
        let entry = image.cluster(place) | COPIED;
        image.l2(2, entry).l2(3, entry).l2(4, entry);
        let (storage, mut disk) = begin_in_storage(&image);
        for number in [2, 3] {
            let taken = disk.format.prepare(number * CLUSTER, CLUSTER, 1).unwrap();
            disk.format.commit(&[taken[0].ticket]).unwrap();
        }
        // One more than there are counts.
        let freed = disk.format.flush().unwrap();
        assert!(freed.is_empty(), "{what}: {freed:?}");
        // One is counted, and that is the metadata itself.
        let (bytes, at) = (storage.bytes("/image"), image.at(2) + 2 * place);
        assert_eq!(bytes[at..at + 2], [0, 1], "{what}");
        let error = disk.format.prepare(4 * CLUSTER, CLUSTER, 1).unwrap_err();
        assert!(error.to_string().contains("there is") && error.to_string().contains("marked corrupt"), "{error}");
    }
}

/// With extended L2, an entry can have a place and nothing in it.
#[test]
fn a_place_without_data_is_taken_if_nobody_else_has_it() {
    for (place, count) in [(5, 1), (5, 2), (2, 1), (4, 1), (5, 0)] {
        let mut image = image();
        set_count(&mut image, 5, count);
        let entry = image.cluster(place) | COPIED;
        image.be64(72, 1 << 4).extended(0, entry, 0).extended(1, 0, 0);
        let mut disk = begin(&image);
        let taken = disk.format.prepare(0, CLUSTER, 1).map(|allocations| allocations[0].offset);
        match (place, count) {
            (5, 1) => assert_eq!(taken.unwrap(), 5 * CLUSTER),
            (5, 2) => assert!(taken.unwrap() >= 7 * CLUSTER),
            _ => assert!(matches!(taken, Err(Error::Corrupt(_))), "{place}, {count}: {taken:?}"),
        }
    }
}

#[test]
fn a_cluster_in_use_without_a_reference_count_ends_writing() {
    let mut image = image();
    set_count(&mut image, 5, 0);
    let mut disk = begin(&image);
    assert!(!overwritable(&mut disk, 0));
    let error = disk.format.prepare(0, 1, 1).unwrap_err();
    assert!(matches!(&error, Error::Corrupt(text) if text.contains("reference count 0")), "{error:?}");
}

#[test]
fn metadata_that_is_counted_as_free_is_never_handed_out() {
    for cluster in 0..5 {
        let mut image = image();
        set_count(&mut image, cluster, 0);
        let mut disk = begin(&image);
        let error = disk.format.prepare(2 * CLUSTER, CLUSTER, 1).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "cluster {cluster}: {error:?}");
    }
}

#[test]
fn a_shared_cluster_is_copied() {
    let mut image = image();
    set_count(&mut image, 5, 2);
    let mut disk = begin(&image);
    assert!(!overwritable(&mut disk, 0), "the flag says it is the disk's own, the count says it is not");
    let allocations = disk.format.prepare(0, 1, 1).unwrap();
    assert!(allocations[0].offset >= 7 * CLUSTER);
}

/// What `locate` could not find out once is no contradiction later: the host gets space for what it heard it may not
/// overwrite.
#[test]
fn a_count_that_could_not_be_read_once_ends_nothing() {
    let mut unsure = 0;
    for healthy in 0..4 {
        let (storage, mut disk) = begin_in_storage(&image());
        storage.fail_read("/image", Some(healthy));
        let located = disk.format.locate(0, 8 * CLUSTER, 64);
        storage.fail_read("/image", None);
        let Ok(located) = located else { continue };
        if matches!(located.extents[0].placement, Placement::Data { overwrite: true, .. }) {
            continue;
        }
        unsure += 1;
        let taken = disk.format.prepare(0, 3 * CLUSTER, 8).unwrap();
        assert_eq!(taken.iter().map(|a| a.start / CLUSTER).collect::<Vec<_>>(), [0, 2], "the second was not asked for");
        assert_eq!(taken[0].offset, 5 * CLUSTER, "it has its place");
        assert!(!taken[0].zeroed);
        // Given back, it is the disk's as before.
        disk.format.abandon(&taken.iter().map(|a| a.ticket).collect::<Vec<_>>()).unwrap();
        assert!(overwritable(&mut disk, 0) && overwritable(&mut disk, 1));
        let taken = disk.format.prepare(0, CLUSTER, 8).unwrap();
        disk.format.commit(&[taken[0].ticket]).unwrap();
        assert!(disk.format.flush().unwrap().iter().all(|freed| freed.offset != 5 * CLUSTER));
        disk.format.finish().unwrap();
        let report = Qcow2::check(storage.file("/image", Access::ReadOnly), None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    }
    assert_eq!(unsure, 1, "the count was read, or never asked for");
}

/// Of two names of a cluster that counts both, one is gone: the other has it alone, which nobody has said to the host.
#[test]
fn a_cluster_that_lost_its_other_name_has_its_place() {
    let mut image = image();
    set_count(&mut image, 5, 2);
    let entry = image.cluster(5) | COPIED;
    image.l2(1, entry);
    let mut disk = begin(&image);
    assert!(!overwritable(&mut disk, 0) && !overwritable(&mut disk, 1));
    let taken = disk.format.prepare(0, CLUSTER, 1).unwrap();
    assert!(taken[0].offset >= 7 * CLUSTER);
    disk.format.commit(&[taken[0].ticket]).unwrap();
    disk.format.flush().unwrap();
    let taken = disk.format.prepare(CLUSTER, CLUSTER, 1).unwrap();
    assert_eq!(taken[0].offset, 5 * CLUSTER);
    disk.format.commit(&[taken[0].ticket]).unwrap();
    disk.format.flush().unwrap();
}

#[test]
fn tables_on_top_of_each_other_are_not_written_at_all() {
    for place in [2, 3] {
        let mut image = image();
        let (at, entry) = (image.at(3), image.cluster(place) | COPIED);
        image.be64(at, entry);
        let mut disk = image.open_for(Access::ReadWrite).unwrap();
        let error = disk.format.begin().unwrap_err();
        assert!(matches!(&error, Error::Corrupt(text) if text.contains("overlaps")), "{error:?}");
    }
}

#[test]
fn tickets_are_used_once() {
    let mut disk = begin(&image());
    let ticket = disk.format.prepare(2 * CLUSTER, CLUSTER, 1).unwrap()[0].ticket;
    assert!(disk.format.prepare(2 * CLUSTER, CLUSTER, 1).is_err(), "reserved twice");
    assert!(disk.format.zero(2 * CLUSTER, CLUSTER, true).is_err(), "zeroed while it is written");
    assert!(disk.format.commit(&[ticket, ticket]).is_err());
    assert!(disk.format.commit(&[ticket + 1]).is_err());
    assert!(!overwritable(&mut disk, 2), "a commit that fails publishes nothing");
    disk.format.commit(&[ticket]).unwrap();
    assert!(disk.format.commit(&[ticket]).is_err());
    assert!(disk.format.abandon(&[ticket]).is_err());
    assert!(overwritable(&mut disk, 2));
}

#[test]
fn space_that_is_given_up_is_free_only_after_a_flush() {
    let mut disk = begin(&image());
    disk.format.discard(0, CLUSTER).unwrap();
    let taken = disk.format.prepare(2 * CLUSTER, 3 * CLUSTER, 8).unwrap();
    assert!(taken.iter().all(|a| a.offset != 5 * CLUSTER), "its name is still in the file");
    let freed = disk.format.flush().unwrap();
    assert_eq!(freed.iter().map(|f| (f.offset, f.length)).collect::<Vec<_>>(), [(5 * CLUSTER, CLUSTER)]);
    let taken = disk.format.prepare(5 * CLUSTER, CLUSTER, 1).unwrap();
    assert_eq!(taken[0].offset, 5 * CLUSTER);
    assert!(!taken[0].zeroed);
    // Given back, it is free once more.
    disk.format.abandon(&[taken[0].ticket]).unwrap();
    assert_eq!(disk.format.flush().unwrap().len(), 1);
}

#[test]
fn ranges_are_checked() {
    let mut disk = begin(&image());
    let size = 8 * CLUSTER;
    for (offset, length) in [(0, 0), (size, 1), (0, size + 1), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        assert!(disk.format.prepare(offset, length, 1).is_err(), "{offset} {length}");
        assert!(disk.format.zero(offset, length, false).is_err(), "{offset} {length}");
    }
    for (offset, length) in [(1, CLUSTER - 1), (0, 512), (CLUSTER, CLUSTER + 512)] {
        assert!(disk.format.zero(offset, length, false).is_err(), "{offset} {length}");
    }
}

#[test]
fn nothing_is_written_before_begin() {
    let mut disk = image().open_for(Access::ReadWrite).unwrap();
    assert!(!overwritable(&mut disk, 0));
    assert!(disk.format.prepare(0, 1, 1).is_err());
    let mut disk = image().open().unwrap();
    assert!(disk.format.begin().is_err(), "opened read-only");
}
