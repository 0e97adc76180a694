//! Writing with allocation: against a byte model, with lies and failures, and from many threads.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

#[path = "support/refuse.rs"]
mod refuse;
mod support;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use blockhouse_block::{
    Access, Allocation, BlockBackend, Disk, DiskOptions, EXTENT_BYTES, ErrorKind, FileIndex, Layer, MAX_FILE_OFFSET,
    Result,
};
use proptest::prelude::*;
use refuse::refuse_calls;
use support::growing::{CLUSTER, Growing};
use support::{Script, data, file, packed, pattern, read, writable, write};
use vm_memory::VolatileSlice;

fn writable_disk(layers: Vec<Arc<dyn Layer>>) -> Disk {
    Disk::new(layers, DiskOptions { writable: true, ..DiskOptions::default() }).unwrap()
}

/// A layer that grows over a base of `size` patterned bytes, and what the disk shows at first.
fn over_base(top: Growing, size: u64) -> (Arc<Growing>, Disk, Vec<u8>) {
    let bytes = pattern(size as usize, 7);
    let base = Script::honest(vec![data(size, 0)], 1).file(file(&bytes, Access::ReadOnly).0);
    let top = Arc::new(top);
    let disk = writable_disk(vec![top.clone(), Arc::new(base)]);
    (top, disk, bytes)
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        at: u64,
        length: usize,
        seed: u64,
        pieces: usize,
    },
    /// A write that begins where the last one ended.
    WriteOn {
        length: usize,
        seed: u64,
    },
    Zero {
        at: u64,
        length: usize,
        may_unmap: bool,
    },
    Discard {
        at: u64,
        length: usize,
    },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (any::<u64>(), prop_oneof![1usize..600, 1usize..20_000, 100_000usize..200_000]);
    prop_oneof![
        4 => (range.clone(), 0u64..200, 1usize..9000)
            .prop_map(|((at, length), seed, pieces)| Step::Write { at, length, seed, pieces }),
        3 => (1usize..20_000, 0u64..200).prop_map(|(length, seed)| Step::WriteOn { length, seed }),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, length), may_unmap)| Step::Zero { at, length, may_unmap }),
        2 => range.prop_map(|(at, length)| Step::Discard { at, length }),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_that_grows_equals_the_model(
        steps in prop::collection::vec(step(), 1..40),
        sectors in 1u64..400,
        base_sectors in 0u64..400,
        packed_clusters in prop::collection::hash_set(0u64..50, 0..8),
        unmaps in any::<bool>(),
        per_answer in prop::sample::select(vec![1usize, 2, 3, 1000]),
        map_extents in prop::sample::select(vec![0usize, 1, 3, 20, 10_000]),
        ahead in prop::sample::select(vec![0u64, 1, 3, 100]),
    ) {
        let size = sectors * 512;
        // The base: raw bytes and one packed unit at its end.
        let base_bytes = pattern(base_sectors as usize * 512 + 2048, 3);
        let (raw, unit) = base_bytes.split_at(base_sectors as usize * 512);
        let mut extents = vec![packed(2048, 5)];
        if base_sectors > 0 {
            extents.insert(0, data(base_sectors * 512, 0));
        }
        let (base_file, base_outside) = file(raw, Access::ReadWrite);
        let base = Script::honest(extents, 1).file(base_file).unit(5, unit.to_vec());
        let mut model = base_bytes.clone();
        model.resize(size as usize, 0);

        let mut units = HashMap::new();
        for cluster in packed_clusters.into_iter().filter(|cluster| cluster * CLUSTER < size) {
            let length = CLUSTER.min(size - cluster * CLUSTER) as usize;
            let bytes = pattern(length, 50 + cluster);
            model[(cluster * CLUSTER) as usize..][..length].copy_from_slice(&bytes);
            units.insert(cluster, bytes);
        }
        let mut top = Growing::new(size, units);
        top.unmaps = unmaps;
        top.per_answer = per_answer;
        let top = Arc::new(top);
        let options = DiskOptions {
            writable: true,
            extent_map_bytes: map_extents * EXTENT_BYTES,
            unpacked_cache_bytes: 9000,
            allocate_ahead_bytes: ahead * CLUSTER,
            ..DiskOptions::default()
        };
        let disk = Disk::new(vec![top.clone(), Arc::new(base)], options).unwrap();

        let mut last_end = 0;
        for step in steps {
            let step = match step {
                Step::WriteOn { length, seed } => Step::Write { at: last_end, length, seed, pieces: 4096 },
                step => step,
            };
            let range = |at: u64, length: usize| {
                let start = (at % size) as usize;
                start..start + length.min(size as usize - start)
            };
            match step {
                Step::Write { at, length, seed, pieces } => {
                    let range = range(at, length);
                    last_end = range.end as u64;
                    let mut bytes = pattern(range.len(), seed);
                    model[range.clone()].copy_from_slice(&bytes);
                    let buffers: Vec<_> = bytes.chunks_mut(pieces).map(VolatileSlice::from).collect();
                    disk.write(&buffers, range.start as u64).unwrap();
                }
                Step::Zero { at, length, may_unmap } => {
                    let range = range(at, length);
                    disk.write_zeroes(range.start as u64, range.len() as u64, may_unmap).unwrap();
                    model[range].fill(0);
                }
                Step::Discard { at, length } => {
                    let range = range(at, length);
                    disk.discard(range.start as u64, range.len() as u64).unwrap();
                    let cluster = CLUSTER as usize;
                    let first = range.start.next_multiple_of(cluster);
                    let last = if range.end == size as usize { range.end } else { range.end / cluster * cluster };
                    if unmaps && first < last {
                        model[first..last].fill(0);
                    }
                }
                Step::Flush => disk.flush().unwrap(),
                Step::WriteOn { .. } => unreachable!("became a write"),
            }
            prop_assert_eq!(top.reserved(), 0);
            let found = read(&disk, 0, size as usize).unwrap();
            let differs = found.iter().zip(&model).position(|(found, expected)| found != expected);
            prop_assert!(differs.is_none(), "byte {:?} differs", differs);
        }
        disk.close().unwrap();
        top.check_tables();
        prop_assert!(top.is_finished());
        let mut base_now = vec![0; base_outside.metadata().unwrap().len() as usize];
        base_outside.read_exact_at(&mut base_now, 0).unwrap();
        prop_assert!(base_now == raw, "the base was changed");
    }
}

#[test]
fn writes_that_follow_each_other_ask_for_space_ahead() {
    const CLUSTERS: u64 = 1024;
    let calls = |ahead: u64, base: u64| {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut top = Growing::new(CLUSTERS * CLUSTER, HashMap::new());
        let counter = asked.clone();
        top.twist = Some(Box::new(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        let top = Arc::new(top);
        let below = pattern((base * CLUSTER) as usize, 7);
        let below = Script::honest(vec![data(base * CLUSTER, 0)], 1).file(file(&below, Access::ReadOnly).0);
        let options = DiskOptions { writable: true, allocate_ahead_bytes: ahead * CLUSTER, ..DiskOptions::default() };
        let disk = Disk::new(vec![top.clone(), Arc::new(below)], options).unwrap();
        let bytes = pattern(CLUSTER as usize, 9);
        for cluster in 0..CLUSTERS / 2 {
            write(&disk, cluster * CLUSTER, &bytes).unwrap();
            if cluster == 20 {
                // What is reserved is there: the file of an image reaches to the end of what it refers to.
                disk.flush().unwrap();
                assert!(top.allocated_end() <= top.bytes().len() as u64);
            }
        }
        for cluster in 0..CLUSTERS / 2 {
            assert!(read(&disk, cluster * CLUSTER, CLUSTER as usize).unwrap() == bytes, "cluster {cluster}");
        }
        let rest = read(&disk, CLUSTERS / 2 * CLUSTER, (CLUSTERS / 2 * CLUSTER) as usize).unwrap();
        let mut shown = pattern((base * CLUSTER) as usize, 7);
        shown.resize((CLUSTERS * CLUSTER) as usize, 0);
        assert!(rest == shown[(CLUSTERS / 2 * CLUSTER) as usize..], "what was reserved ahead changed the disk");
        asked.load(Ordering::SeqCst)
    };
    assert_eq!(calls(0, 1), 512);
    // 1, 2, 4, … 64 clusters, then 64 at a time.
    let few = calls(64, 1);
    assert!(few <= 20, "{few} calls");
    // Where the base has bytes, space ahead would have to be filled with them.
    assert_eq!(calls(64, CLUSTERS), 512);
}

#[test]
fn every_lie_about_space_is_refused_and_nothing_is_written() {
    type Lie = (&'static str, fn(&mut Vec<Allocation>));
    let lies: Vec<Lie> = vec![
        ("no space was reserved", Vec::clear),
        ("257 runs of space where 256 were allowed", |answer| answer.resize(257, answer[0])),
        ("space for 4096 bytes at 8704, not whole", |answer| answer[0].start += 512),
        ("space for 512 bytes at 8192, not whole", |answer| answer[0].length = 512),
        ("space for 0 bytes at 8192, not whole", |answer| answer[0].length = 0),
        ("space for 4096 bytes at 4096, outside", |answer| answer[0].start -= CLUSTER),
        ("space for 12288 bytes at 12288, outside", |answer| answer[1].length = 3 * CLUSTER),
        ("space for 18446744073709551615 bytes at 8192, outside", |answer| answer[0].length = u64::MAX),
        ("space from 12288 on, after the offset asked for", |answer| answer.rotate_left(1)),
        ("space for 8192 before the end", |answer| answer[1].start = 2 * CLUSTER),
        ("the space at 5120 in file 0 twice", |answer| answer[1].offset = answer[0].offset + 1024),
        ("twice", |answer| answer[1].ticket = answer[0].ticket),
        ("space in file 7, which is not registered", |answer| answer[1].file = FileIndex(7)),
        ("space in file 1, which is read-only", |answer| answer[1].file = FileIndex(1)),
        ("at file offset 9223372036854771712, past", |answer| answer[1].offset = MAX_FILE_OFFSET - 4095),
        ("at file offset 18446744073709551615, past", |answer| answer[1].offset = u64::MAX),
    ];
    for (what, lie) in lies {
        let mut top = Growing::new(16 * CLUSTER, HashMap::new());
        top.twist = Some(Box::new(lie));
        let (top, disk, bytes) = over_base(top, 16 * CLUSTER);
        let before = top.bytes();
        let error = write(&disk, 9000, &[9; 6000]).unwrap_err();
        assert_eq!((error.kind(), error.image()), (ErrorKind::Component, Some("/images/growing")), "{what}: {error}");
        assert!(error.message().contains(what), "{what}: {error}");
        assert!(top.bytes() == before, "{what}: something was written");
        assert_eq!(write(&disk, 0, &[9; 512]).unwrap_err().kind(), ErrorKind::Component, "{what}");
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Component, "{what}: a flush after a lie");
        assert!(top.bytes() == before, "{what}: something was written later");
        // What was known before still reads.
        assert_eq!(read(&disk, 8192, 4096).unwrap(), bytes[8192..12288], "{what}");
    }
}

#[test]
fn a_write_that_fails_gives_its_space_back_and_the_next_one_works() {
    let failing = Arc::new(AtomicBool::new(true));
    let mut top = Growing::new(16 * CLUSTER, HashMap::new());
    let flag = failing.clone();
    top.twist = Some(Box::new(move |answer| {
        if flag.load(Ordering::SeqCst) {
            // No file system has room there: the write fails as it does on a full one.
            answer.last_mut().unwrap().offset = MAX_FILE_OFFSET - CLUSTER;
        }
    }));
    let (top, disk, mut bytes) = over_base(top, 16 * CLUSTER);
    for (at, length) in [(9000, 9000), (8192, 4096), (9000, 100)] {
        assert_eq!(write(&disk, at, &vec![9; length]).unwrap_err().kind(), ErrorKind::Storage);
        assert_eq!(top.reserved(), 0, "space was not given back");
        assert_eq!(read(&disk, 0, bytes.len()).unwrap(), bytes);
    }
    failing.store(false, Ordering::SeqCst);
    write(&disk, 9000, &[9; 9000]).unwrap();
    bytes[9000..18000].fill(9);
    assert_eq!(read(&disk, 0, bytes.len()).unwrap(), bytes);
    disk.flush().unwrap();
}

#[test]
fn a_commit_that_fails_publishes_nothing_and_can_be_tried_again() {
    let (top, disk, mut bytes) = over_base(Growing::new(16 * CLUSTER, HashMap::new()), 16 * CLUSTER);
    top.fail_commit.store(true, Ordering::SeqCst);
    assert_eq!(write(&disk, 100, &[9; 9000]).unwrap_err().kind(), ErrorKind::Storage);
    assert_eq!(top.reserved(), 0, "space was not given back");
    assert_eq!(read(&disk, 0, bytes.len()).unwrap(), bytes);
    top.fail_commit.store(false, Ordering::SeqCst);
    write(&disk, 100, &[9; 9000]).unwrap();
    bytes[100..9100].fill(9);
    assert_eq!(read(&disk, 0, bytes.len()).unwrap(), bytes);
}

/// What a sync could not make durable is lost: nothing is built on it. What has its place is still written there.
#[test]
fn after_a_flush_that_failed_the_layer_is_asked_for_nothing() {
    let (top, disk, _) = over_base(Growing::new(16 * CLUSTER, HashMap::new()), 16 * CLUSTER);
    write(&disk, 0, &[9; CLUSTER as usize]).unwrap();
    let failed = thread::scope(|scope| {
        let flush = scope.spawn(|| {
            refuse_calls(&[libc::SYS_fdatasync], libc::EIO);
            disk.flush()
        });
        flush.join().unwrap()
    });
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Storage);
    let calls = top.calls();
    write(&disk, 100, &[7; 512]).unwrap();
    assert_eq!(read(&disk, 0, 1024).unwrap(), [&[9; 100][..], &[7; 512], &[9; 412]].concat());
    let refused = [
        write(&disk, CLUSTER, &[9; 512]),
        disk.write_zeroes(0, CLUSTER, true),
        disk.discard(0, CLUSTER),
        disk.flush(),
        disk.close(),
    ];
    for error in refused.map(Result::unwrap_err) {
        assert_eq!(error.kind(), ErrorKind::Storage);
        assert!(error.message().contains("an earlier flush failed"), "{error}");
    }
    assert_eq!(top.calls(), calls);
    assert!(!top.is_finished());
}

#[test]
fn discarded_space_goes_back_to_the_file_system_with_the_flush_and_not_before() {
    let (top, disk, _) = over_base(Growing::new(1 << 20, HashMap::new()), 1 << 20);
    write(&disk, 0, &pattern(1 << 20, 1)).unwrap();
    disk.flush().unwrap();
    let full = top.blocks();
    disk.discard(0, 1 << 20).unwrap();
    assert_eq!(read(&disk, 0, 1 << 20).unwrap(), vec![0; 1 << 20]);
    assert_eq!(top.blocks(), full, "space was given back while the durable image refers to it");
    disk.flush().unwrap();
    assert!(top.blocks() * 4 < full, "{} of {full} blocks are left", top.blocks());
}

#[test]
fn after_the_close_everything_fails_and_the_image_is_marked() {
    let (top, disk, _) = over_base(Growing::new(16 * CLUSTER, HashMap::new()), 16 * CLUSTER);
    write(&disk, 100, &[9; 9000]).unwrap();
    disk.discard(0, 2 * CLUSTER).unwrap();
    disk.close().unwrap();
    assert!(top.is_finished());
    let invalid = |result: Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::Invalid);
    invalid(write(&disk, 100, &[9; 512]));
    invalid(disk.write_zeroes(0, 4096, true));
    invalid(disk.discard(0, 4096));
    invalid(disk.flush());
    invalid(disk.close());
    invalid(read(&disk, 0, 512).map(drop));
}

#[test]
fn raw_images_are_zeroed_and_punched_and_keep_their_size() {
    let bytes = pattern(1 << 20, 1);
    let (image, outside) = file(&bytes, Access::ReadWrite);
    let raw = Script::honest(vec![writable(1 << 20, 0)], 1).file(image).overwritable();
    let disk = writable_disk(vec![Arc::new(raw)]);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&outside.metadata().unwrap());
    let full = blocks();
    let mut expected = bytes;
    disk.write_zeroes(1000, 300_000, false).unwrap();
    expected[1000..301_000].fill(0);
    assert_eq!(blocks(), full, "zeroes were to keep their space");
    assert_eq!(read(&disk, 0, 1 << 20).unwrap(), expected);
    disk.write_zeroes(400_000, 300_000, true).unwrap();
    expected[400_000..700_000].fill(0);
    disk.discard(900_000, (1 << 20) - 900_000).unwrap();
    expected[900_000..].fill(0);
    assert_eq!(read(&disk, 0, 1 << 20).unwrap(), expected);
    assert!(blocks() < full, "no space was given back");
    assert_eq!(outside.metadata().unwrap().len(), 1 << 20);
    for (offset, length) in [(1 << 20, 1), (u64::MAX, 2), (0, (1 << 20) + 1)] {
        assert_eq!(disk.discard(offset, length).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(disk.write_zeroes(offset, length, true).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[test]
fn holes_need_the_right_to_write_and_stay_inside_the_file() {
    let (image, outside) = file(&pattern(8192, 1), Access::ReadOnly);
    assert_eq!(image.punch_hole(0, 4096).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(image.zero_range(0, 4096).unwrap_err().kind(), ErrorKind::Invalid);
    let mut found = vec![0; 8192];
    outside.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, pattern(8192, 1));

    let (image, outside) = file(&pattern(8192, 1), Access::ReadWrite);
    assert!(image.punch_hole(4096, 1 << 40).unwrap());
    assert!(image.zero_range(1 << 30, 4096).unwrap());
    assert_eq!(image.punch_hole(u64::MAX, 2).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(outside.metadata().unwrap().len(), 8192);
    outside.read_exact_at(&mut found, 0).unwrap();
    assert_eq!((&found[..4096], &found[4096..]), (&pattern(8192, 1)[..4096], &[0; 4096][..]));
}

#[test]
fn a_disk_opened_read_only_is_not_changed_by_any_request() {
    let top = Arc::new(Growing::new(16 * CLUSTER, HashMap::new()));
    let disk = Disk::new(vec![top.clone()], DiskOptions::default()).unwrap();
    let before = top.bytes();
    assert_eq!(write(&disk, 0, &[9; 512]).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(disk.write_zeroes(0, 4096, true).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(disk.discard(0, 4096).unwrap_err().kind(), ErrorKind::Invalid);
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(!top.is_finished());
    assert_eq!(top.bytes(), before);
}
