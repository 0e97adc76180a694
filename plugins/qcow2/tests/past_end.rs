//! Clusters that are counted and lie past the end of the file: a power cut brought the counts and the tables into the
//! file, and lost its size. They read as zero, and are nobody else's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod edit;
mod support;

use std::path::Path;

use blockhouse_plugin::testing::{Disk, Storage};
use blockhouse_plugin::{Access, Error, Placement, Resizer, SnapshotEditor, Writer};
use blockhouse_qcow2::Qcow2;

use crate::edit::{IMAGE, flaws, view};
use crate::support::{Handmade, Lab, Random, have_qemu};

const KIB: usize = 1 << 10;

/// Options, the size of the disk, what QEMU writes to it, and whether a snapshot is made before the last of it.
const KINDS: &[(&str, usize, usize, bool)] = &[
    ("cluster_size=64k", 4096 * KIB, 1024 * KIB, false),
    ("cluster_size=64k", 4096 * KIB, 1024 * KIB, true),
    ("cluster_size=4k,refcount_bits=1", 1024 * KIB, 300 * KIB, false),
    ("cluster_size=4k,refcount_bits=2", 1024 * KIB, 300 * KIB, true),
    ("cluster_size=1k,refcount_bits=4", 600 * KIB, 200 * KIB, true),
    ("cluster_size=4k,refcount_bits=8", 1024 * KIB, 300 * KIB, true),
    ("cluster_size=16k,extended_l2=on,refcount_bits=32", 1024 * KIB, 300 * KIB, true),
    // The table of the counts is full, and gets longer.
    ("cluster_size=512,refcount_bits=64", 3072 * KIB, 1850 * KIB, false),
    ("cluster_size=512,refcount_bits=64", 3072 * KIB, 1800 * KIB, true),
];

fn open(storage: &Storage) -> blockhouse_plugin::Result<Disk<Qcow2>> {
    let mut disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(()))?;
    disk.format.begin()?;
    Ok(disk)
}

fn close(mut disk: Disk<Qcow2>) {
    disk.flush().unwrap();
    disk.format.finish().unwrap();
}

/// Cuts up to `most` clusters off the end of an image, so that it can still be written: not even one if that is a table.
fn shortened(image: &[u8], cluster: usize, most: usize) -> Vec<u8> {
    let mut most = most.min(image.len() / cluster / 2);
    loop {
        let bytes = &image[..image.len() - most * cluster];
        let storage = Storage::new();
        storage.insert(IMAGE, bytes);
        if open(&storage).is_ok() {
            return bytes.to_vec();
        }
        most /= 2;
    }
}

#[test]
fn what_is_counted_past_the_end_is_not_handed_out() {
    if !have_qemu() {
        return;
    }
    let mut shorter = 0;
    for seed in 0..27 {
        let (options, size, written, snapshot) = KINDS[seed as usize % KINDS.len()];
        let lab = Lab::new();
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {size}"));
        lab.qemu_io("top.qcow2", &[format!("write -P 1 0 {written}")]);
        if snapshot {
            lab.qemu_img("snapshot -c one top.qcow2");
            lab.qemu_io("top.qcow2", &[format!("write -P 2 0 {}", written / 2)]);
        }
        let mut random = Random(seed * 2 + 1);
        let whole = lab.bytes("top.qcow2");
        let cluster = 1usize << whole[23];
        let cut = shortened(&whole, cluster, 1 + random.below(40) as usize);
        shorter += u32::from(cut.len() < whole.len());
        let before = view(&cut, &[]);
        let mut model = before.disk.clone();
        let storage = Storage::new();
        storage.insert(IMAGE, cut);
        let mut disk = open(&storage).unwrap();
        for number in 0..24u64 {
            let kind = random.below(8);
            let start = random.below((model.len() / 512) as u64) as usize * 512;
            // Now and then more than there is in a row.
            let most = if random.below(4) == 0 { 40 } else { 5 };
            let length = (512 * (1 + random.below(most * cluster as u64 / 512) as usize)).min(model.len() - start);
            match kind {
                0..=3 => {
                    let bytes = vec![number as u8 + 3; length];
                    disk.write_over(start as u64, &bytes, &mut |_, to| to.fill(0)).unwrap();
                    model[start..start + length].copy_from_slice(&bytes);
                }
                4 => {
                    let first = start / cluster * cluster;
                    let end = (first + cluster).min(model.len());
                    disk.format.discard(first as u64, (end - first) as u64).unwrap();
                    model[first..end].fill(0);
                }
                5 => disk.flush().unwrap(),
                _ => {
                    close(disk);
                    let mut image = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
                    if kind == 6 && !options.contains("refcount_bits=1") {
                        let id = image.create_snapshot("another", 1, 1).unwrap();
                        let mut image = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
                        image.delete_snapshot(&id).unwrap();
                    } else {
                        model.resize(model.len() + cluster, 0);
                        image.resize(model.len() as u64, false).unwrap();
                    }
                    disk = open(&storage).unwrap();
                }
            }
        }
        close(disk);
        let mut image = storage.bytes(IMAGE);
        // What QEMU would take for damaged.
        image.resize(image.len().max(whole.len()), 0);
        let after = view(&image, &[]);
        assert!(after.disk == model, "seed {seed}, {options}: the disk");
        assert!(after.snapshots == before.snapshots, "seed {seed}, {options}: the snapshot");
        lab.write("top.qcow2", &image);
        assert!(lab.oracle("top.qcow2", "") == model, "seed {seed}, {options}: QEMU reads something else");
        assert_eq!(flaws(Path::new(&lab.path("."))), None, "seed {seed}, {options}");
    }
    assert!(shorter >= 18, "{shorter} images were cut");
}

/// Clusters 0 to 6 are counted, as often as `counts` says; the file ends before the last of them.
fn short(counts: u16) -> Handmade {
    let mut image = Handmade::v3();
    for cluster in 0..7 {
        let at = image.at(2) + 2 * cluster;
        let count = if cluster == 6 { counts } else { 1 };
        image.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
    }
    let end = image.at(6);
    image.bytes.truncate(end);
    image
}

fn begin(image: &Handmade) -> Disk<Qcow2> {
    let mut disk = image.open_for(Access::ReadWrite).unwrap();
    disk.format.begin().unwrap();
    disk
}

const CLUSTER: u64 = 64 << 10;

#[test]
fn space_starts_behind_what_is_counted() {
    for counts in [1, 2, u16::MAX] {
        let mut disk = begin(&short(counts));
        let space = disk.format.prepare(2 * CLUSTER, 3 * CLUSTER, 8).unwrap();
        assert!(space.iter().all(|run| run.offset >= 7 * CLUSTER && run.zeroed), "{counts}: {space:?}");
    }
}

#[test]
fn what_was_written_past_the_end_is_not_called_zero() {
    let mut disk = begin(&short(1));
    disk.write_over(CLUSTER, &[7; CLUSTER as usize], &mut |_, _| panic!("it is overwritten in place")).unwrap();
    disk.format.discard(CLUSTER, CLUSTER).unwrap();
    disk.format.flush().unwrap();
    let space = disk.format.prepare(2 * CLUSTER, 2 * CLUSTER, 8).unwrap();
    for run in &space {
        let last = (run.offset..run.offset + run.length).contains(&(6 * CLUSTER));
        assert!(!(last && run.zeroed), "{space:?}");
    }
    assert!(space.iter().any(|run| run.offset == 6 * CLUSTER), "it is free, and used again: {space:?}");
}

/// Every cluster that there could be is counted: 65 blocks of 64 KiB, which are 2 GiB of disk each.
#[test]
fn a_search_past_the_end_is_bounded() {
    const BLOCKS: usize = 65;
    let mut image = Handmade::v3();
    for block in 0..BLOCKS {
        let (entry, at) = (image.at(1) + 8 * block, image.bytes.len());
        image.be64(entry, at as u64);
        image.bytes.resize(at + CLUSTER as usize, 0);
        for count in image.bytes[at..].chunks_exact_mut(2) {
            count.copy_from_slice(&1u16.to_be_bytes());
        }
    }
    let mut disk = begin(&image);
    let error = disk.format.prepare(2 * CLUSTER, CLUSTER, 1).unwrap_err();
    assert!(matches!(&error, Error::Storage(text) if text.contains("no free space was found")), "{error:?}");
    // The image is not damaged, and is written where it has space.
    disk.write_over(0, &[7; 512], &mut |_, to| to.fill(0)).unwrap();
    // The next search goes on from there.
    let space = disk.format.prepare(2 * CLUSTER, CLUSTER, 1).unwrap();
    assert_eq!(space[0].offset, BLOCKS as u64 * 32768 * CLUSTER);
    let located = blockhouse_plugin::Format::locate(&mut disk.format, 2 * CLUSTER, 1, 1).unwrap();
    assert!(located.extents.iter().all(|extent| !matches!(extent.placement, Placement::Data { .. })), "{located:?}");
}
