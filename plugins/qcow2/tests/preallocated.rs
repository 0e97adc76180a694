//! Extended L2 entries that have a place and nothing in it: all subclusters are unallocated. QEMU makes them with
//! `preallocation=metadata`, over a backing file as well.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod edit;
mod support;

use std::path::Path;

use blockhouse_plugin::testing::{Disk, Storage};
use blockhouse_plugin::{Access, Checker, Format, Packer, Placement, SnapshotEditor, Writer};
use blockhouse_qcow2::Qcow2;

use crate::edit::{below, edit, flaws};
use crate::support::{Lab, Random, have_qemu, material};

const CLUSTER: usize = 16 << 10;
const CLUSTERS: usize = 40;
/// The last cluster is cut off.
const SIZE: usize = CLUSTERS * CLUSTER - 1536;

/// `top.qcow2`, with the place of every cluster allocated, and what its disk reads as.
fn made(backing: bool, more: &str) -> (Lab, Vec<u8>, Vec<u8>) {
    let lab = Lab::new();
    let base = if backing { material(SIZE - 5 * CLUSTER, 3) } else { Vec::new() };
    lab.write("base.raw", &base);
    let from = if backing { "-b base.raw -F raw" } else { "" };
    lab.qemu_img(&format!(
        "create -q -f qcow2 -o cluster_size={CLUSTER},extended_l2=on,preallocation=metadata{more} {from} top.qcow2 {SIZE}"
    ));
    let mut disk = base.clone();
    disk.resize(SIZE, 0);
    (lab, base, disk)
}

fn open(lab: &Lab) -> (Storage, Disk<Qcow2>) {
    let storage = lab.storage();
    let mut disk = storage.disk_with::<Qcow2>(&lab.path("top.qcow2"), Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    (storage, disk)
}

/// Closes the image, and looks at it with QEMU and with our own check.
fn close(lab: &Lab, storage: &Storage, mut disk: Disk<Qcow2>, model: &[u8], what: &str) {
    disk.flush().unwrap();
    disk.format.finish().unwrap();
    drop(disk);
    let path = lab.path("top.qcow2");
    lab.write("top.qcow2", &storage.bytes(&path));
    if Path::new(&lab.path("top.data")).exists() {
        lab.write("top.data", &storage.bytes(&lab.path("top.data")));
    }
    assert_eq!(flaws(Path::new(&lab.path("."))), None, "{what}");
    let found = Qcow2::check(storage.file(&path, Access::ReadOnly), None).unwrap();
    assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}: {:?}", found.findings);
    assert!(lab.oracle("top.qcow2", "") == model, "{what}: QEMU reads something else");
    lab.compare("top.qcow2");
}

/// The place of a cluster that is data, all of it.
fn place(disk: &mut Disk<Qcow2>, cluster: usize) -> Option<u64> {
    let at = (cluster * CLUSTER) as u64;
    let located = disk.format.locate(at, 1, 64).unwrap();
    let mut start = located.start;
    located.extents.iter().find_map(|extent| {
        let from = start;
        start += extent.length;
        match extent.placement {
            Placement::Data { offset, overwrite: true, .. } if (from..start).contains(&at) => Some(offset + at - from),
            _ => None,
        }
    })
}

#[test]
fn what_is_written_goes_to_the_place_that_is_there() {
    if !have_qemu() {
        return;
    }
    for backing in [false, true] {
        let (lab, base, mut model) = made(backing, "");
        let length = lab.bytes("top.qcow2").len().next_multiple_of(CLUSTER);
        let (storage, mut disk) = open(&lab);
        // Given back, the place stays; taken again, it is the same.
        let first = disk.format.prepare(0, 3 * CLUSTER as u64, 16).unwrap();
        disk.format.abandon(&first.iter().map(|allocation| allocation.ticket).collect::<Vec<_>>()).unwrap();
        let places: Vec<u64> = first.iter().map(|allocation| allocation.offset).collect();
        // Parts of clusters, whole ones, and the last.
        for (at, count) in [(700, 900), (CLUSTER + 2048, 3 * CLUSTER), (9 * CLUSTER, CLUSTER), (SIZE - 9, 9)] {
            let bytes = material(count, at as u64 + 1);
            model[at..at + count].copy_from_slice(&bytes);
            disk.write_over(at as u64, &bytes, &mut below(&base)).unwrap();
        }
        let now: Vec<u64> = (0..3).map(|cluster| place(&mut disk, cluster).unwrap()).collect();
        assert_eq!(now, places, "backing {backing}");
        close(&lab, &storage, disk, &model, "written");
        assert_eq!(lab.bytes("top.qcow2").len(), length, "the places were there: nothing grows");
    }
}

#[test]
fn zeroes_keep_the_place_or_free_it() {
    if !have_qemu() {
        return;
    }
    for backing in [false, true] {
        for (what, keep) in [("zero and keep", Some(true)), ("zero", Some(false)), ("discard", None)] {
            let (lab, base, mut model) = made(backing, "");
            let (storage, mut disk) = open(&lab);
            let before = disk.format.prepare(CLUSTER as u64, CLUSTER as u64, 1).unwrap()[0];
            disk.format.abandon(&[before.ticket]).unwrap();
            let (at, length) = (CLUSTER as u64, 2 * CLUSTER as u64);
            match keep {
                Some(keep) => disk.format.zero(at, length, keep).unwrap(),
                None => disk.format.discard(at, length).unwrap(),
            }
            model[CLUSTER..3 * CLUSTER].fill(0);
            let freed: u64 = disk.format.flush().unwrap().iter().map(|freed| freed.length).sum();
            let kept = keep == Some(true);
            assert_eq!(freed, if kept { 0 } else { length }, "{what}, backing {backing}");
            close(&lab, &storage, disk, &model, what);
            if kept {
                let (storage, mut disk) = open(&lab);
                disk.write_over(at, &[5; 512], &mut below(&base)).unwrap();
                model[CLUSTER..CLUSTER + 512].fill(5);
                assert_eq!(place(&mut disk, 1), Some(before.offset), "backing {backing}");
                close(&lab, &storage, disk, &model, "written again");
            }
        }
    }
}

#[test]
fn whatever_is_done_nothing_leaks() {
    if !have_qemu() {
        return;
    }
    for (backing, more) in [(false, ""), (true, ""), (true, ",refcount_bits=8"), (false, ",data_file=top.data")] {
        let (lab, base, mut model) = made(backing, more);
        let mut random = Random(backing as u64 + 11);
        for round in 0..12 {
            // QEMU leaves clusters of which a part is data, and one of zeroes without data.
            let at = random.below(CLUSTERS as u64 - 1) as usize * CLUSTER + 2048;
            lab.qemu_io("top.qcow2", &[format!("write -P 9 {at} 1024"), format!("write -z {} 512", at + 4096)]);
            model[at..at + 1024].fill(9);
            model[at + 4096..at + 4608].fill(0);
            let (storage, mut disk) = open(&lab);
            for number in 0..8 {
                let cluster = random.below(CLUSTERS as u64) as usize * CLUSTER;
                let end = (cluster + (1 + random.below(3) as usize) * CLUSTER).min(SIZE);
                let (offset, length) = (cluster as u64, (end - cluster) as u64);
                match random.below(7) {
                    kind @ 0..=2 => {
                        let keep = kind == 1;
                        match kind {
                            2 => disk.format.discard(offset, length).unwrap(),
                            _ => disk.format.zero(offset, length, keep).unwrap(),
                        }
                        model[cluster..end].fill(0);
                    }
                    3 if more.is_empty() => {
                        let end = (cluster + CLUSTER).min(SIZE);
                        if disk.format.pack(offset, &vec![round | 1; end - cluster]).unwrap() {
                            model[cluster..end].fill(round | 1);
                        }
                    }
                    4 => disk.flush().unwrap(),
                    _ => {
                        let from = cluster + random.below((end - cluster) as u64) as usize;
                        let bytes = material((end - from).min(1 + random.below(40_000) as usize), number + 50);
                        model[from..from + bytes.len()].copy_from_slice(&bytes);
                        disk.write_over(from as u64, &bytes, &mut below(&base)).unwrap();
                    }
                }
            }
            close(&lab, &storage, disk, &model, &format!("{more}, round {round}"));
            // From here to there the places are shared.
            match round {
                _ if more.contains("data_file") => continue,
                3 => drop(edit(&lab, |qcow2| qcow2.create_snapshot("s", 1, 1)).unwrap()),
                7 => edit(&lab, |qcow2| qcow2.delete_snapshot("1")).unwrap(),
                _ => continue,
            }
            assert_eq!(flaws(Path::new(&lab.path("."))), None, "{more}, round {round}");
        }
    }
}
