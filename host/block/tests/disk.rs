//! A disk against layers that tell the truth, lie, fail and are slow.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Error, ErrorKind, Extent, FileIndex, ImageFile, Layer, Located,
    MAX_FILE_OFFSET, MAX_PACKED_UNIT, Placement, RunKind, Validity,
};
use rustix::fs::SeekFrom;
use support::{Script, data, file, packed, pattern, read, read_pieces, skip, unallocated, writable, write, zero};
use vm_memory::VolatileSlice;

const SIZE: u64 = 64 << 10;

fn disk(layers: Vec<Arc<dyn Layer>>) -> Disk {
    Disk::new(layers, DiskOptions::default()).unwrap()
}

fn writable_disk(layers: Vec<Arc<dyn Layer>>) -> Disk {
    Disk::new(layers, DiskOptions { writable: true, ..DiskOptions::default() }).unwrap()
}

#[test]
fn every_lie_is_an_error_that_names_the_image_and_ends_the_layer() {
    let late = u64::MAX - 511;
    let many = vec![zero(8); 1025];
    let lies: Vec<(&str, u64, Vec<Extent>)> = vec![
        ("no extents", 0, vec![]),
        ("1025 extents where 1024 were allowed", 0, many),
        ("it starts at 8192, after the offset 4096", 8192, vec![zero(512)]),
        ("it ends at 4096, before the offset 4096", 0, vec![zero(4096)]),
        ("an extent of no bytes at 4096", 4096, vec![zero(0), zero(512)]),
        ("an extent of 65537 bytes at 0", 0, vec![zero(SIZE + 1)]),
        ("an extent of 18446744073709551104 bytes at 4096", 4096, vec![zero(late)]),
        ("an extent of 512 bytes at 65536", 4096, vec![zero(SIZE - 4096), zero(512)]),
        ("18446744073709551615 bytes at 8192", 0, vec![zero(8192), zero(u64::MAX)]),
        ("at file offset 9223372036854775807 for 4096, past", 4096, vec![data(512, MAX_FILE_OFFSET)]),
        ("at file offset 18446744073709551615 for 4096, past", 4096, vec![data(512, u64::MAX)]),
        ("overwrite at 4096 in file 0, which is read-only", 4096, vec![writable(512, 0)]),
    ];
    for (what, start, extents) in lies {
        let layer = Arc::new(
            Script::says(SIZE, start, extents).file(file(&pattern(512, 1), Access::ReadOnly).0).named("/lies"),
        );
        let disk = disk(vec![layer.clone()]);
        let error = read(&disk, 4096, 512).unwrap_err();
        assert_eq!((error.kind(), error.image()), (ErrorKind::Component, Some("/lies")), "{what}: {error}");
        assert!(error.message().contains(what), "{what}: {error}");
        let again = read(&disk, 0, 512).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Component, "{what}");
        assert_eq!(layer.asked(), 1, "{what}: a liar is not asked again");
    }
}

#[test]
fn a_file_that_was_not_registered_and_a_packed_unit_too_large_are_lies() {
    let layer = Arc::new(Script::says(SIZE, 0, vec![data(512, 0)]));
    let error = read(&disk(vec![layer]), 0, 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Component);
    assert!(error.message().contains("file 0 for 0, which is not registered"), "{error}");

    let layer = Arc::new(Script::says(64 << 20, 0, vec![packed(MAX_PACKED_UNIT + 1, 7)]).unit(7, vec![1; 512]));
    let disk = disk(vec![layer.clone()]);
    let error = read(&disk, 0, 512).unwrap_err();
    assert!(error.message().contains("a packed unit of 16777217 bytes"), "{error}");
    assert_eq!(layer.unpacks.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[test]
fn a_packed_unit_of_the_wrong_length_is_a_lie() {
    for length in [0, 4095, 4097] {
        let layer = Arc::new(Script::honest(vec![packed(4096, 7)], 9).unit(7, pattern(length, 3)));
        let error = read(&disk(vec![layer]), 512, 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Component);
        assert!(error.message().contains(&format!("gave {length} bytes")), "{error}");
    }
}

#[test]
fn what_was_learned_before_a_lie_still_reads() {
    let layer = Script::new(SIZE, |offset, _, _| {
        let extents = if offset < 4096 { vec![data(4096, 0)] } else { vec![zero(0)] };
        Ok(Located { start: offset & !4095, extents })
    });
    let bytes = pattern(4096, 1);
    let disk = disk(vec![Arc::new(layer.file(file(&bytes, Access::ReadOnly).0))]);
    assert_eq!(read(&disk, 0, 4096).unwrap(), bytes);
    assert_eq!(read(&disk, 4096, 512).unwrap_err().kind(), ErrorKind::Component);
    assert_eq!(read(&disk, 100, 1000).unwrap(), bytes[100..1100]);
}

#[test]
fn errors_keep_their_kind_and_others_than_broken_components_are_not_final() {
    let layer = Arc::new(Script::new(SIZE, |offset, length, _| {
        if offset < 4096 {
            return Err(Error::new(ErrorKind::Corrupt, "the L2 table is past the end of the file"));
        }
        Ok(Located { start: offset, extents: vec![zero(length)] })
    }));
    let disk = disk(vec![layer]);
    assert_eq!(read(&disk, 0, 512).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(read(&disk, 8192, 512).unwrap(), vec![0; 512]);
}

#[test]
fn a_layer_that_answers_byte_by_byte_hits_the_limit() {
    let layer = Arc::new(Script::new(SIZE, |offset, _, _| Ok(Located { start: offset, extents: vec![zero(1)] })));
    let error = read(&disk(vec![layer.clone()]), 0, 8192).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(layer.asked() <= 64, "asked {} times", layer.asked());
}

#[test]
fn requests_outside_of_the_disk_are_invalid() {
    let disk = disk(vec![Arc::new(Script::honest(vec![zero(SIZE)], 1))]);
    for (offset, length) in [(SIZE, 1), (SIZE - 511, 512), (u64::MAX, 1), (u64::MAX - 100, 512)] {
        assert_eq!(read(&disk, offset, length).unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert!(read(&disk, SIZE, 0).unwrap().is_empty());
}

#[test]
fn impossible_disks_are_refused() {
    let refused = |layer: Script, writable| {
        Disk::new(vec![Arc::new(layer)], DiskOptions { writable, ..DiskOptions::default() }).unwrap_err().kind()
    };
    assert_eq!(Disk::new(vec![], DiskOptions::default()).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(refused(Script::honest(vec![zero(1000)], 1), false), ErrorKind::Component);
    assert_eq!(refused(Script::says(u64::MAX - 511, 0, vec![]), false), ErrorKind::Component);
    assert_eq!(refused(Script::honest(vec![zero(512)], 1), true), ErrorKind::Invalid);
    let empty = Disk::new(vec![Arc::new(Script::says(0, 0, vec![]))], DiskOptions::default()).unwrap();
    assert_eq!(empty.capacity(), 0);
    assert!(read(&empty, 0, 0).unwrap().is_empty());
    assert_eq!(empty.runs().count(), 0);
}

#[test]
fn an_enormous_sparse_disk_costs_little() {
    let size = MAX_FILE_OFFSET & !511;
    let layer = Arc::new(Script::new(size, move |_, _, _| Ok(Located { start: 0, extents: vec![zero(size)] })));
    let disk = disk(vec![layer.clone()]);
    assert_eq!(read(&disk, size - 512, 512).unwrap(), vec![0; 512]);
    assert_eq!(read(&disk, 1 << 60, 512).unwrap(), vec![0; 512]);
    assert!(disk.map_stats().extents <= 4096);
}

#[test]
fn raw_is_overwritten_in_place_and_flushed() {
    let (image, outside) = file(&pattern(8192, 1), Access::ReadWrite);
    let disk = writable_disk(vec![Arc::new(Script::honest(vec![writable(8192, 0)], 1).file(image).overwritable())]);
    write(&disk, 1000, &[9; 3000]).unwrap();
    disk.flush().unwrap();
    let mut expected = pattern(8192, 1);
    expected[1000..4000].fill(9);
    let mut found = vec![0; 8192];
    outside.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, expected);
    assert_eq!(read(&disk, 0, 8192).unwrap(), expected);
}

#[test]
fn nothing_is_written_without_the_right_at_every_level() {
    let bytes = pattern(8192, 1);
    let whole = |outside: &std::fs::File| {
        let mut found = vec![0; 8192];
        outside.read_exact_at(&mut found, 0).unwrap();
        found
    };

    // The disk was opened read-only.
    let (image, outside) = file(&bytes, Access::ReadWrite);
    let raw = Script::honest(vec![writable(8192, 0)], 1).file(image).overwritable();
    let disk_ = disk(vec![Arc::new(raw)]);
    assert_eq!(write(&disk_, 0, &[9; 512]).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(whole(&outside), bytes);

    // The file was granted read-only, though its descriptor could write.
    let (image, outside) = file(&bytes, Access::ReadOnly);
    let mut nines = [9; 512];
    let error = image.write(&[VolatileSlice::from(&mut nines[..])], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(whole(&outside), bytes);

    // One extent of the range is not to be overwritten: the other stays as it was, too.
    let (image, outside) = file(&bytes, Access::ReadWrite);
    let half = Script::honest(vec![writable(4096, 0), data(4096, 4096)], 2).file(image).overwritable();
    let disk_ = writable_disk(vec![Arc::new(half)]);
    assert_eq!(write(&disk_, 0, &[9; 8192]).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(whole(&outside), bytes);

    // The layer below claims that it may be overwritten.
    let (image, outside) = file(&bytes, Access::ReadWrite);
    let base = Script::honest(vec![writable(8192, 0)], 1).file(image).overwritable();
    let top = Script::honest(vec![unallocated(8192)], 1).overwritable();
    let disk_ = writable_disk(vec![Arc::new(top), Arc::new(base)]);
    assert_eq!(read(&disk_, 0, 8192).unwrap(), bytes);
    assert_eq!(write(&disk_, 0, &[9; 512]).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(whole(&outside), bytes);
}

#[test]
fn neighbours_in_different_files_stay_apart() {
    let (first, second) = (file(&pattern(8192, 1), Access::ReadOnly).0, file(&pattern(8192, 2), Access::ReadOnly).0);
    let second_half = Placement::Data { file: FileIndex(1), offset: 4096, overwrite: false };
    let extents = vec![data(4096, 0), Extent { length: 4096, placement: second_half }];
    let disk = disk(vec![Arc::new(Script::honest(extents, 2).file(first).file(second))]);
    let expected = [&pattern(8192, 1)[..4096], &pattern(8192, 2)[4096..]].concat();
    assert_eq!(read(&disk, 0, 8192).unwrap(), expected);
    assert_eq!(read(&disk, 0, 8192).unwrap(), expected);
    assert_eq!(disk.runs().count(), 2);
}

#[test]
fn a_file_that_shrinks_reads_as_zero_and_one_that_grows_as_its_bytes() {
    let (image, outside) = file(&pattern(8192, 1), Access::ReadOnly);
    let disk = disk(vec![Arc::new(Script::honest(vec![data(16384, 0)], 1).file(image))]);
    assert_eq!(read(&disk, 0, 8192).unwrap(), pattern(8192, 1));
    outside.set_len(5000).unwrap();
    let mut expected = pattern(8192, 1);
    expected.resize(16384, 0);
    expected[5000..].fill(0);
    assert_eq!(read_pieces(&disk, 0, 16384, 700).unwrap(), expected);
    outside.write_all_at(&[7; 100], 12000).unwrap();
    expected[12000..12100].fill(7);
    assert_eq!(read_pieces(&disk, 0, 16384, 700).unwrap(), expected);
}

#[test]
fn more_buffers_than_one_system_call_takes() {
    let bytes = pattern(1 << 16, 5);
    let (image, _) = file(&bytes, Access::ReadWrite);
    let disk = writable_disk(vec![Arc::new(Script::honest(vec![writable(1 << 16, 0)], 1).file(image).overwritable())]);
    assert_eq!(read_pieces(&disk, 3, 50_000, 7).unwrap(), bytes[3..50_003]);
    let mut other = pattern(40_000, 6);
    let pieces: Vec<_> = other.chunks_mut(9).map(VolatileSlice::from).collect();
    disk.write(&pieces, 17).unwrap();
    assert_eq!(read(&disk, 17, 40_000).unwrap(), pattern(40_000, 6));
}

#[test]
fn files_that_are_no_storage_are_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(ImageFile::new(null, Access::ReadOnly, "null").unwrap_err().kind(), ErrorKind::Invalid);
    let directory = tempfile::tempdir().unwrap();
    let opened = std::fs::File::open(directory.path()).unwrap();
    assert_eq!(ImageFile::new(opened, Access::ReadOnly, "dir").unwrap_err().kind(), ErrorKind::Invalid);
    let path = directory.path().join("a");
    std::fs::write(&path, b"x").unwrap();
    let read_only = std::fs::File::open(&path).unwrap();
    assert_eq!(ImageFile::new(read_only, Access::ReadWrite, "a").unwrap_err().kind(), ErrorKind::Invalid);
    let appending = std::fs::File::options().read(true).append(true).open(&path).unwrap();
    assert_eq!(ImageFile::new(appending, Access::ReadWrite, "a").unwrap_err().kind(), ErrorKind::Invalid);
    let write_only = std::fs::File::options().write(true).open(&path).unwrap();
    assert_eq!(ImageFile::new(write_only, Access::ReadOnly, "a").unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn threads_that_miss_together_ask_once() {
    let bytes = pattern(SIZE as usize, 1);
    let layer = Script::new(SIZE, |_, _, _| {
        thread::sleep(Duration::from_millis(50));
        Ok(Located { start: 0, extents: vec![data(SIZE, 0)] })
    });
    let layer = Arc::new(layer.file(file(&bytes, Access::ReadOnly).0));
    let disk = disk(vec![layer.clone()]);
    thread::scope(|scope| {
        for index in 0..8 {
            let (disk, bytes) = (&disk, &bytes);
            scope.spawn(move || {
                let offset = index * 1000;
                assert_eq!(read(disk, offset, 4000).unwrap(), bytes[offset as usize..][..4000]);
            });
        }
    });
    assert_eq!(layer.asked(), 1);
}

#[test]
fn a_deep_chain_costs_nothing_once_it_is_known() {
    let bytes = pattern(SIZE as usize, 1);
    let tops: Vec<_> = (0..300).map(|_| Arc::new(Script::honest(vec![unallocated(SIZE)], 1))).collect();
    let base = Arc::new(Script::honest(vec![data(SIZE, 0)], 1).file(file(&bytes, Access::ReadOnly).0));
    let mut layers: Vec<Arc<dyn Layer>> = tops.iter().map(|layer| layer.clone() as _).collect();
    layers.push(base);
    let disk = disk(layers);
    assert_eq!(read(&disk, 100, 100).unwrap(), bytes[100..200]);
    assert_eq!(read(&disk, 0, SIZE as usize).unwrap(), bytes);
    assert!(tops.iter().all(|layer| layer.asked() == 1));
}

#[test]
fn all_of_an_answer_is_remembered_before_and_after_what_was_asked() {
    let extents: Vec<_> = (0..8).map(|at| data(512, (7 - at) * 512)).collect();
    let base = Script::says(4096, 0, extents).file(file(&pattern(4096, 1), Access::ReadOnly).0);
    let top = Script::says(4096, 0, vec![unallocated(1024), zero(512), unallocated(2560)]);
    let (base, top) = (Arc::new(base), Arc::new(top));
    let disk = disk(vec![top.clone(), base.clone()]);
    let one = read(&disk, 2048, 512).unwrap();
    assert_eq!(one, pattern(4096, 1)[1536..2048]);
    let whole = read(&disk, 0, 4096).unwrap();
    assert_eq!(whole[..512], pattern(4096, 1)[3584..]);
    assert_eq!(whole[1024..1536], [0; 512]);
    assert_eq!((top.asked(), base.asked()), (1, 1));
}

#[test]
fn runs_have_the_depth_and_the_meaning_of_qemu_img_map() {
    let top = vec![zero(512), data(512, 0), data(512, 512), unallocated(4096)];
    let base = vec![unallocated(1536), packed(512, 1), packed(512, 2), data(512, 9 << 20), unallocated(512)];
    let top = Script::honest(top, 2).file(file(b"", Access::ReadOnly).0);
    let base = Script::honest(base, 1).file(file(b"", Access::ReadOnly).0);
    let disk = disk(vec![Arc::new(top), Arc::new(base)]);
    let runs: Vec<_> = disk
        .runs()
        .map(|run| {
            let run = run.unwrap();
            let kind = match run.kind {
                RunKind::Data { offset, .. } => format!("data {offset}"),
                RunKind::Zero => "zero".into(),
                RunKind::Unallocated => "unallocated".into(),
                RunKind::Packed => "packed".into(),
            };
            (run.start, run.length, run.depth, kind)
        })
        .collect();
    let expected = [
        (0, 512, 0, "zero"),
        (512, 1024, 0, "data 0"),
        (1536, 1024, 1, "packed"),
        (2560, 512, 1, "data 9437184"),
        (3072, 512, 1, "unallocated"),
        (3584, 2048, 0, "unallocated"),
    ];
    assert_eq!(runs, expected.map(|(start, length, depth, kind)| (start, length, depth, kind.to_owned())));
}

#[test]
fn runs_end_with_the_error_of_a_layer() {
    let layer = Script::new(SIZE, |offset, _, _| {
        let extents = if offset < 4096 { vec![zero(4096)] } else { vec![] };
        Ok(Located { start: 0, extents })
    });
    let disk = disk(vec![Arc::new(layer)]);
    let runs: Vec<_> = disk.runs().collect();
    assert_eq!(runs.last().unwrap().as_ref().unwrap_err().kind(), ErrorKind::Component);
    assert!(runs.len() <= 2);
}

/// Holes that are seen once a file was revoked may have been made by what it was revoked for.
#[test]
fn no_hole_is_seen_in_a_file_that_was_revoked() {
    let (image, outside) = file(&[], Access::ReadOnly);
    outside.set_len(3 << 20).unwrap();
    outside.write_all_at(&[1; 4096], 1 << 20).unwrap();
    let both = [(0, 1 << 20), ((1 << 20) + 4096, (2 << 20) - 4096)];
    // Where the first hole ends, and the second begins, as the file system sees it.
    let ends = [SeekFrom::Data(0), SeekFrom::Hole(1 << 20)].map(|from| rustix::fs::seek(&outside, from));
    if ends != [Ok(both[0].1), Ok(both[1].0)] {
        return skip(format_args!("the file system knows of other holes: {ends:?}"));
    }
    let holes = |image: &ImageFile, revoke: &dyn Fn()| {
        let mut seen = Vec::new();
        let result = image.for_each_hole(0, 3 << 20, |start, length| {
            seen.push((start, length));
            revoke();
            Ok(())
        });
        (seen, result.map_err(|error| error.message().to_owned()))
    };
    assert_eq!(holes(&image, &|| ()), (both.to_vec(), Ok(())));
    let validity = Arc::new(Validity::new());
    let image = image.with_validity(Arc::clone(&validity));
    let refused = Err("the file cannot be used any more: it changed".to_owned());
    let first_only = holes(&image, &|| assert!(validity.revoke("it changed")));
    assert_eq!(first_only, (both[..1].to_vec(), refused.clone()));
    assert_eq!(holes(&image, &|| ()), (Vec::new(), refused));
}
