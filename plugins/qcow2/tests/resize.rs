//! New sizes of a disk, with QEMU as the oracle, and power cuts in the middle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod edit;
mod support;

use blockhouse_plugin::testing::{Change, Storage};
use blockhouse_plugin::{Access, Error, Resizer};
use blockhouse_qcow2::Qcow2;

use crate::edit::{IMAGE, cut, edit, flaws, view, view_of_qemu, write};
use crate::support::{Handmade, Lab, Random, have_qemu, material};

/// Creation options, and the cluster size in bytes.
const KINDS: &[(&str, u64)] = &[
    ("cluster_size=512", 512),
    ("cluster_size=512,refcount_bits=1", 512),
    ("cluster_size=1k,refcount_bits=64,compat=1.1", 1024),
    ("compat=0.10,cluster_size=4k", 4096),
    ("cluster_size=4k,refcount_bits=2", 4096),
    ("cluster_size=16k,extended_l2=on", 16384),
    ("cluster_size=64k,lazy_refcounts=on", 65536),
    ("cluster_size=2M", 2 << 20),
];

fn check(lab: &Lab, what: &str) {
    assert_eq!(flaws(std::path::Path::new(&lab.path("."))), None, "{what}");
}

/// Sizes up and down, with writes in between.
#[test]
fn disks_grow_and_shrink() {
    if !have_qemu() {
        return;
    }
    for (options, cluster) in KINDS {
        let lab = Lab::new();
        let unit = (*cluster).clamp(16 << 10, 128 << 10);
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {}", 20 * unit));
        let mut model = vec![0; 20 * unit as usize];
        let mut random = Random(*cluster + 1);
        // From one L1 entry to many and back: with the smallest clusters one describes 32 KiB.
        for (number, size) in [33, 20, 90, 7, 0, 5, 300, 300, 61, 64].into_iter().enumerate() {
            let size = size * unit + if number % 3 == 1 { 512 } else { 0 };
            for _ in 0..4 {
                if model.is_empty() {
                    break;
                }
                let at = random.below(model.len() as u64) as usize;
                let data = material(random.below(3 * unit).min((model.len() - at) as u64) as usize, random.next());
                if data.is_empty() {
                    continue;
                }
                write(&lab, &[], at as u64, &data);
                model[at..at + data.len()].copy_from_slice(&data);
            }
            let old = model.len() as u64;
            // As a host does that settles the end: what is left of the last cluster reads as zero. Here after
            // the change, from which it cannot be told.
            edit(&lab, |qcow2| qcow2.resize(size, false)).unwrap();
            let rest = (size.min(old.next_multiple_of(*cluster))).saturating_sub(old);
            if rest > 0 {
                write(&lab, &[], old, &vec![0; rest as usize]);
            }
            model.resize(size as usize, 0);
            let what = format!("{options}, {old} to {size}");
            check(&lab, &what);
            let image = lab.bytes("top.qcow2");
            assert!(view(&image, &[]).disk == model, "{what}");
            assert!(view_of_qemu(&lab).disk == model, "QEMU: {what}");
        }
    }
}

#[test]
fn what_a_disk_loses_takes_no_space() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k top.qcow2 40M");
    let small = lab.bytes("top.qcow2").len();
    write(&lab, &[], 0, &material(20 << 20, 3));
    assert!(lab.bytes("top.qcow2").len() > 20 << 20);
    edit(&lab, |qcow2| qcow2.resize(4096, false)).unwrap();
    check(&lab, "shrunk");
    let left = lab.bytes("top.qcow2").len();
    assert!(left < small + (40 << 12), "{left} bytes are left");
    assert!(view_of_qemu(&lab).disk == material(20 << 20, 3)[..4096]);
}

#[test]
fn a_longer_backing_file_does_not_show() {
    if !have_qemu() {
        return;
    }
    for (options, cluster) in KINDS {
        let lab = Lab::new();
        let base = material(80 * *cluster as usize, 5);
        lab.write("base.raw", &base);
        let size = 9 * *cluster;
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw top.qcow2 {size}"));
        write(&lab, &base, 3 * cluster, &material(*cluster as usize, 9));
        let old = lab.bytes("top.qcow2");
        let mut model = base[..size as usize].to_vec();
        model[3 * *cluster as usize..4 * *cluster as usize].copy_from_slice(&material(*cluster as usize, 9));

        let result = edit(&lab, |qcow2| qcow2.resize(70 * cluster + 512, true));
        if options.contains("compat=0.10") {
            assert!(matches!(result, Err(Error::Unsupported(_))), "{result:?}");
            assert!(lab.bytes("top.qcow2") == old);
            continue;
        }
        result.unwrap();
        check(&lab, options);
        model.resize(70 * *cluster as usize + 512, 0);
        assert!(view(&lab.bytes("top.qcow2"), &[("base.raw", &base)]).disk == model, "{options}");
        assert!(view_of_qemu(&lab).disk == model, "{options}");
        // The same bytes are not hidden if nobody asks for it.
        lab.write("top.qcow2", &old);
        edit(&lab, |qcow2| qcow2.resize(70 * cluster, false)).unwrap();
        let range = 60 * *cluster as usize..70 * *cluster as usize;
        assert!(view_of_qemu(&lab).disk[range.clone()] == base[range], "{options}");
    }
}

#[test]
fn snapshots_keep_their_sizes() {
    if !have_qemu() {
        return;
    }
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=512,refcount_bits=8"] {
        let lab = Lab::new();
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 300k"));
        write(&lab, &[], 0, &material(300 << 10, 1));
        lab.qemu_img("snapshot -c first top.qcow2");
        write(&lab, &[], 50_000, &material(9_000, 2));
        lab.qemu_img("snapshot -c second top.qcow2");
        let before = view(&lab.bytes("top.qcow2"), &[]);
        for size in [100 << 10, 40 << 20, 512, 200 << 10] {
            edit(&lab, |qcow2| qcow2.resize(size, false)).unwrap();
            check(&lab, options);
            let now = view_of_qemu(&lab);
            assert!(now.snapshots == before.snapshots, "{options}, {size}");
            assert_eq!(now, view(&lab.bytes("top.qcow2"), &[]), "{options}, {size}");
            assert_eq!(now.disk.len() as u64, size);
            assert!(now.disk[..512] == before.disk[..512], "{options}, {size}");
        }
    }
}

#[test]
fn snapshots_without_a_size_are_refused() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o compat=0.10 top.qcow2 1M");
    lab.qemu_img("snapshot -c first top.qcow2");
    let image = lab.bytes("top.qcow2");
    let error = edit(&lab, |qcow2| qcow2.resize(2 << 20, false)).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("version 2")), "{error:?}");
    assert!(lab.bytes("top.qcow2") == image);

    // Version 3, and an entry of 8 bytes of extra data: as written long ago.
    lab.qemu_img("create -q -f qcow2 top.qcow2 1M");
    lab.qemu_img("snapshot -c first top.qcow2");
    let mut image = lab.bytes("top.qcow2");
    let table = u64::from_be_bytes(image[64..72].try_into().unwrap()) as usize;
    image[table + 36..table + 40].copy_from_slice(&8u32.to_be_bytes());
    lab.write("top.qcow2", &image);
    let error = edit(&lab, |qcow2| qcow2.resize(2 << 20, false)).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("sizes")), "{error:?}");
    assert!(lab.bytes("top.qcow2") == image);
}

/// The counts of an image by hand are right, and its bytes are there.
fn counted(mut image: Handmade) -> Handmade {
    let at = image.at(2);
    for cluster in 0..7 {
        image.bytes[at + 2 * cluster..at + 2 * cluster + 2].copy_from_slice(&1u16.to_be_bytes());
    }
    image
}

fn resize_handmade(image: &Handmade, size: u64) -> (blockhouse_plugin::Result<()>, Vec<u8>) {
    let storage = Storage::new();
    storage.insert(IMAGE, image.bytes.clone());
    let result =
        storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).and_then(|mut qcow2| qcow2.resize(size, false));
    (result, storage.bytes(IMAGE))
}

#[test]
fn what_was_mapped_past_the_end_does_not_come_back() {
    let mut image = counted(Handmade::v3());
    image.be64(24, 1 << 16);
    let (result, bytes) = resize_handmade(&image, 8 << 16);
    result.unwrap();
    let disk = view(&bytes, &[]).disk;
    assert!(disk[..1 << 16] == image.bytes[image.at(5)..image.at(6)]);
    assert!(disk[1 << 16..].iter().all(|byte| *byte == 0));
}

#[test]
fn refusals_change_nothing() {
    let good = counted(Handmade::v3());
    for size in [1, 511, (1 << 20) + 1, u64::MAX, u64::MAX - 511, 1 << 63, (1 << 63) - 512, 1 << 48] {
        let (result, bytes) = resize_handmade(&good, size);
        assert!(result.is_err(), "{size}");
        assert!(bytes == good.bytes, "{size}");
    }
    // 64 TiB are as many L1 entries as there may be.
    assert!(resize_handmade(&good, 1 << 46).0.is_ok());
    let (result, _) = resize_handmade(&good, (1 << 46) + 512);
    assert!(matches!(result, Err(Error::Unsupported(_))));

    type Break = fn(&mut Handmade);
    let broken: [(&str, Break); 6] = [
        ("an entry with reserved bits", |image| {
            image.l2(3, 2);
        }),
        ("a cluster that is counted as free", |image| {
            let at = image.at(2) + 2 * 6;
            image.bytes[at..at + 2].fill(0);
        }),
        ("a cluster on the refcount table", |image| {
            let cluster = image.cluster(1) | 1 << 63;
            image.l2(1, cluster);
        }),
        ("one on the header, compressed", |image| {
            image.l2(1, 1 << 62);
        }),
        ("a cluster past the end of the file", |image| {
            let cluster = image.cluster(9000) | 1 << 63;
            image.l2(1, cluster);
        }),
        ("an L1 table that is counted as free", |image| {
            let at = image.at(2) + 2 * 3;
            image.bytes[at..at + 2].fill(0);
        }),
    ];
    for (what, damage) in broken {
        let mut image = counted(Handmade::v3());
        damage(&mut image);
        // The L1 table changes with its L2 table, which changes with the second cluster.
        let (result, bytes) = resize_handmade(&image, 1 << 16);
        assert!(matches!(result, Err(Error::Corrupt(_))), "{what}: {result:?}");
        assert!(bytes == image.bytes, "{what}");
    }
}

#[test]
fn an_instance_changes_an_image_once() {
    let storage = Storage::new();
    storage.insert(IMAGE, counted(Handmade::v3()).bytes);
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
    qcow2.resize(1 << 16, false).unwrap();
    assert!(qcow2.resize(1 << 20, false).is_err());
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadOnly).unwrap();
    assert!(qcow2.resize(1 << 20, false).is_err());
}

/// A storage that fails at any point leaves the old size or, once the header is written, the new one.
#[test]
fn a_full_file_system_leaves_the_old_size() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k top.qcow2 4M");
    write(&lab, &[], 0, &material(4 << 20, 1));
    lab.qemu_img("snapshot -c first top.qcow2");
    let image = lab.bytes("top.qcow2");
    let old = view(&image, &[]);
    for size in [5000 * 512, 40 << 20] {
        for changes in 0.. {
            let storage = Storage::new();
            storage.insert(IMAGE, image.clone());
            let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
            storage.fail_after(IMAGE, Some(changes));
            let result = qcow2.resize(size, false);
            let written = storage.take_changes(IMAGE);
            let bytes = storage.bytes(IMAGE);
            lab.write("top.qcow2", &bytes);
            check(&lab, &format!("{size}, {changes}"));
            let now = view(&bytes, &[]);
            if result.is_ok() {
                assert_eq!(now.disk.len() as u64, size);
                if written.len() < changes {
                    break;
                }
            } else {
                let switched = now.disk.len() as u64 == size && matches!(written.last(), Some(Change::Write(24, _)));
                assert!(now == old || switched, "{size}, {changes}");
            }
            assert!(now.snapshots == old.snapshots, "{size}, {changes}");
        }
    }
}

#[test]
fn a_power_cut_leaves_the_old_size_or_the_new_one() {
    if !have_qemu() {
        return;
    }
    for (seed, (options, cluster)) in KINDS.iter().enumerate() {
        let lab = Lab::new();
        let size = 40 * cluster.min(&65536);
        let base = material(2 * size as usize, 8);
        lab.write("base.raw", &base);
        let compat = options.contains("compat=0.10");
        let backing = if compat { "" } else { "-b base.raw -F raw" };
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} {backing} top.qcow2 {size}"));
        write(&lab, &base, size / 4, &material(size as usize / 3, 1));
        if !compat && !options.contains("refcount_bits=1") {
            lab.qemu_img("snapshot -c first top.qcow2");
            write(&lab, &base, size / 3, &material(size as usize / 3, 2));
        }
        let image = lab.bytes("top.qcow2");
        let bases: &[(&str, &[u8])] = &[("base.raw", &base)];
        let states = if *cluster > 65536 { 6 } else { 24 };
        for (number, size) in [size / 2 + 512, 0, 3 * size, 2 * size].into_iter().enumerate() {
            let seed = (seed * 10 + number) as u64;
            let new = cut(&image, bases, seed, states, |qcow2| qcow2.resize(size, !compat));
            assert_eq!(view(&new, bases).disk.len() as u64, size);
        }
    }
}
