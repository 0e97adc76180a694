//! Compressed clusters that are written here, read by QEMU and by ourselves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use blockhouse_plugin::testing::{Disk, Failure, Storage};
use blockhouse_plugin::{Access, Checker, Creator, NewImage, Packer, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, have_qemu};

/// Content that packs well, a little, with far repetitions, or not at all.
fn content(kind: u64, length: usize) -> Vec<u8> {
    let mut state = kind.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    match kind % 4 {
        0 => (0..length).map(|at| (at / 64) as u8 ^ kind as u8).collect(),
        1 => (0..length).map(|at| if at % 3 == 0 { next() } else { 7 }).collect(),
        2 => {
            let half: Vec<u8> = (0..length.div_ceil(2)).map(|_| next()).collect();
            half.iter().chain(&half).copied().take(length).collect()
        }
        _ => (0..length).map(|_| next()).collect(),
    }
}

fn open(storage: &Storage, path: &str) -> Disk<Qcow2> {
    let mut disk = storage.disk_with::<Qcow2>(path, Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    disk
}

/// Writes a cluster packed, or as it is where that does not help. Returns whether it was packed.
fn put(disk: &mut Disk<Qcow2>, offset: u64, bytes: &[u8]) -> bool {
    let packed = disk.format.pack(offset, bytes).unwrap();
    if !packed {
        disk.write_over(offset, bytes, &mut |_, to| to.fill(0)).unwrap();
    }
    packed
}

#[test]
fn packed_clusters_are_read_by_qemu() {
    if !have_qemu() {
        return;
    }
    for (options, cluster) in [
        ("cluster_size=64k", 65536usize),
        ("cluster_size=512", 512),
        ("cluster_size=4k,refcount_bits=1", 4096),
        ("cluster_size=4k,refcount_bits=2", 4096),
        ("cluster_size=2M,refcount_bits=64", 2 << 20),
        ("cluster_size=64k,compression_type=zstd", 65536),
        ("cluster_size=512,compression_type=zstd", 512),
        ("cluster_size=2M,compression_type=zstd", 2 << 20),
        ("cluster_size=16k,extended_l2=on", 16384),
        ("compat=0.10,cluster_size=8k", 8192),
    ] {
        let lab = Lab::new();
        let size = 23 * cluster / 512 * 512 + 512;
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {size}"));
        let storage = lab.storage();
        let path = lab.path("top.qcow2");
        let mut disk = open(&storage, &path);
        let mut model = vec![0; size];
        let mut packed = 0;
        let write = |disk: &mut Disk<Qcow2>, model: &mut Vec<u8>, number: usize, kind: u64| {
            let range = number * cluster..((number + 1) * cluster).min(size);
            let bytes = content(kind, range.len());
            model[range.clone()].copy_from_slice(&bytes);
            u32::from(put(disk, range.start as u64, &bytes))
        };
        for (number, kind) in [(0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (4, 4), (10, 8), (11, 9), (12, 13), (23, 0)] {
            packed += write(&mut disk, &mut model, number, kind);
        }
        disk.flush().unwrap();
        // Again over packed ones, over data, and a part of one as data.
        for (number, kind) in [(1, 17), (2, 3), (3, 4), (12, 12), (0, 21)] {
            packed += write(&mut disk, &mut model, number, kind);
        }
        let part = content(3, 512);
        model[5 * cluster..5 * cluster + 512].copy_from_slice(&part);
        disk.write_over(5 * cluster as u64, &part, &mut |_, to| to.fill(0)).unwrap();
        disk.flush().unwrap();
        // What the flushes freed is used again, and nothing lies over anything.
        for (number, kind) in [(6, 0), (7, 1), (8, 5), (9, 8), (1, 16)] {
            packed += write(&mut disk, &mut model, number, kind);
        }
        disk.flush().unwrap();
        disk.format.finish().unwrap();
        assert!(packed >= 10, "{options}: {packed} of 20 clusters were packed");

        lab.write("top.qcow2", &storage.bytes(&path));
        lab.qemu_img("check -f qcow2 top.qcow2");
        assert!(lab.oracle("top.qcow2", "") == model, "{options}: QEMU reads something else");
        lab.compare("top.qcow2");
    }
}

#[test]
fn many_small_ones_share_their_clusters() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 top.qcow2 16M");
    let storage = lab.storage();
    let path = lab.path("top.qcow2");
    let before = storage.bytes(&path).len();
    let mut disk = open(&storage, &path);
    for number in 0..256u64 {
        assert!(disk.format.pack(number * 65536, &content(1, 65536)).unwrap());
    }
    disk.flush().unwrap();
    disk.format.finish().unwrap();
    let each = (storage.bytes(&path).len() - before) / 256;
    lab.write("top.qcow2", &storage.bytes(&path));
    lab.qemu_img("check -f qcow2 top.qcow2");
    let output = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "qcow2", "-c", "top.qcow2", "again.qcow2"])
        .current_dir(lab.path("."))
        .status()
        .unwrap();
    assert!(output.success());
    let theirs = lab.bytes("again.qcow2").len() / 256;
    assert!(each <= theirs + theirs / 10, "{each} bytes for each cluster; QEMU takes {theirs}");
}

#[test]
fn a_full_file_system_leaves_what_was() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k top.qcow2 1M");
    let path = lab.path("top.qcow2");
    for healthy in 0..12 {
        let storage = lab.storage();
        let mut disk = open(&storage, &path);
        assert!(disk.format.pack(0, &content(0, 4096)).unwrap());
        disk.flush().unwrap();
        storage.fail_after(&path, Some(healthy));
        let mut failed = disk.format.pack(0, &content(4, 4096)).is_err();
        failed |= disk.format.pack(8192, &content(1, 4096)).is_err();
        failed |= disk.flush().is_err();
        storage.fail_after(&path, None);
        if !failed {
            assert!(healthy > 2, "nothing failed");
            return;
        }
        lab.write("cut.qcow2", &storage.bytes(&path));
        let output = std::process::Command::new("qemu-img")
            .args(["check", "-f", "qcow2", "--output=json", "cut.qcow2"])
            .current_dir(lab.path("."))
            .output()
            .unwrap();
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["corruptions"].as_u64().unwrap_or(0), 0, "after {healthy} changes: {found}");
        let now = lab.oracle("cut.qcow2", "")[..4096].to_vec();
        assert!(now == content(0, 4096) || now == content(4, 4096), "after {healthy} changes");
    }
    panic!("it never got through");
}

/// A cluster that compressed bytes were to go on in is somebody else's once it was freed, also by a flush that failed.
#[test]
fn nothing_is_packed_into_a_cluster_that_was_freed() {
    const CLUSTER: usize = 4096;
    let empty = Storage::new();
    empty.insert("/image", Vec::new());
    let options = vec![("cluster-size".to_owned(), "4K".to_owned())];
    let new = NewImage { virtual_size: 1 << 20, backing: None, options };
    Qcow2::create(empty.file("/image", Access::ReadWrite), new).unwrap();
    let mut went_on = 0;
    for healthy in 0.. {
        let storage = Storage::new();
        storage.insert("/image", empty.bytes("/image"));
        let mut disk = open(&storage, "/image");
        assert!(disk.format.pack(0, &content(0, CLUSTER)).unwrap());
        disk.flush().unwrap();
        disk.format.discard(0, CLUSTER as u64).unwrap();
        storage.fail_at("/image", Some((healthy, Failure::Once)));
        let flushed = disk.flush();
        storage.fail_at("/image", None);
        let random = content(3, CLUSTER);
        let write = |disk: &mut Disk<Qcow2>| disk.write_over(CLUSTER as u64, &random, &mut |_, to| to.fill(0));
        // A sync that failed ends writing.
        if write(&mut disk).is_ok() {
            went_on += 1;
            assert!(disk.format.pack(2 * CLUSTER as u64, &content(0, CLUSTER)).unwrap());
            disk.flush().unwrap();
            assert!(disk.read(CLUSTER as u64, CLUSTER).unwrap() == random, "{healthy} changes before the failure");
            disk.format.finish().unwrap();
            let report = Qcow2::check(storage.file("/image", Access::ReadOnly), None).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{healthy}: {report:?}");
        }
        if flushed.is_ok() {
            break;
        }
    }
    assert!(went_on >= 3, "{went_on} times");
}

#[test]
fn what_is_no_cluster_is_refused() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k top.qcow2 10k");
    let storage = lab.storage();
    let mut disk = open(&storage, &lab.path("top.qcow2"));
    for (offset, length) in [(0, 0), (0, 512), (512, 4096), (0, 8192), (8192, 4096), (u64::MAX - 4095, 4096)] {
        assert!(disk.format.pack(offset, &vec![1; length]).is_err(), "{length} bytes at {offset}");
    }
    // The last one is as short as the disk.
    assert!(disk.format.pack(8192, &vec![1; 2048]).unwrap());
    let reserved = disk.format.prepare(0, 4096, 1).unwrap();
    assert!(disk.format.pack(0, &vec![1; 4096]).is_err(), "it is reserved");
    disk.format.abandon(&[reserved[0].ticket]).unwrap();
    assert!(disk.format.pack(0, &vec![1; 4096]).unwrap());
}
