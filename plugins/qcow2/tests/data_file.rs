//! Writing to images whose data is in a file of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use blockhouse_plugin::testing::{Disk, Storage};
use blockhouse_plugin::{Access, Error, Format, Packer, Placement, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, have_qemu};

const CLUSTER: usize = 4096;
const SIZE: usize = 64 * CLUSTER + 1536;

fn open(storage: &Storage, path: &str) -> Disk<Qcow2> {
    let mut disk = storage.disk_with::<Qcow2>(path, Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    disk
}

fn close(mut disk: Disk<Qcow2>) {
    disk.flush().unwrap();
    disk.format.finish().unwrap();
}

/// Puts what the storage has back into the directory, and lets QEMU look at it.
fn check(lab: &Lab, storage: &Storage, model: &[u8], what: &str) {
    for name in ["top.qcow2", "top.data"] {
        lab.write(name, &storage.bytes(&lab.path(name)));
    }
    lab.qemu_img("check -f qcow2 top.qcow2");
    assert!(lab.oracle("top.qcow2", "") == model, "{what}: QEMU reads something else");
    lab.compare("top.qcow2");
}

#[test]
fn data_goes_to_its_own_file() {
    if !have_qemu() {
        return;
    }
    for (options, raw, backing) in [
        ("", false, false),
        ("", false, true),
        (",data_file_raw=on", true, false),
        (",extended_l2=on", false, true),
        (",extended_l2=on", false, false),
        (",data_file_raw=on,extended_l2=on", true, false),
    ] {
        let lab = Lab::new();
        let cluster = if options.contains("extended") { 16384 } else { CLUSTER };
        let base: Vec<u8> = (0..SIZE - 20 * CLUSTER).map(|at| (at / 512) as u8 | 1).collect();
        lab.write("base.raw", &base);
        let from = if backing { "-b base.raw -F raw" } else { "" };
        lab.qemu_img(&format!(
            "create -q -f qcow2 -o cluster_size={cluster},data_file=top.data{options} {from} top.qcow2 {SIZE}"
        ));
        let mut model = if backing { base.clone() } else { Vec::new() };
        model.resize(SIZE, 0);
        let mut below = |offset: u64, to: &mut [u8]| {
            for (number, byte) in to.iter_mut().enumerate() {
                *byte = if backing { base.get(offset as usize + number).copied().unwrap_or(0) } else { 0 };
            }
        };
        let path = lab.path("top.qcow2");
        let image_before = lab.bytes("top.qcow2").len();
        let mut storage = lab.storage();
        let mut disk = None;
        let mut state = 7u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for number in 0..120u8 {
            // Now and then it is QEMU's turn: with data at the start of the disk, zeroes for a part of a cluster.
            if number % 24 == 0 {
                if let Some(disk) = disk.take() {
                    close(disk);
                    check(&lab, &storage, &model, options);
                }
                let byte = number | 1;
                let mut commands = vec![format!("write -P {byte} 0 {cluster}")];
                model[..cluster].fill(byte);
                for _ in 0..4 {
                    let start = (1 + random(SIZE / cluster - 1)) * cluster + random(cluster / 512 - 1) * 512;
                    let length = 512 * (1 + random(2));
                    commands.push(format!("write -z {start} {length}"));
                    model[start..start + length].fill(0);
                }
                lab.qemu_io("top.qcow2", &commands);
                storage = lab.storage();
            }
            let disk = disk.get_or_insert_with(|| open(&storage, &path));
            let first = random(SIZE / 512);
            let length = (1 + random(5 * cluster / 512)).min(SIZE / 512 - first) * 512;
            let range = first * 512..first * 512 + length;
            match number % 5 {
                0..=2 => {
                    model[range.clone()].fill(number | 1);
                    let bytes = model[range.clone()].to_vec();
                    disk.write_over(range.start as u64, &bytes, &mut below).unwrap();
                }
                3 => {
                    let start = range.start / cluster * cluster;
                    let end = (start + 3 * cluster).min(SIZE);
                    let (offset, length) = (start as u64, (end - start) as u64);
                    let result = match random(3) {
                        0 => disk.format.discard(offset, length),
                        keep => disk.format.zero(offset, length, keep == 1),
                    };
                    match result {
                        Ok(()) => model[start..end].fill(0),
                        // The file must hold the zeroes itself; the host writes them.
                        Err(Error::Unsupported(_)) if raw => {}
                        Err(error) => panic!("{options}: {error}"),
                    }
                }
                _ => disk.flush().unwrap(),
            }
        }
        close(disk.unwrap());
        check(&lab, &storage, &model, options);
        let data = storage.bytes(&lab.path("top.data"));
        if raw {
            assert!(data[..model.len()] == model, "the data file is not the disk");
        }
        let grown = storage.bytes(&path).len() - image_before;
        assert!(grown <= 8 * cluster, "the image itself grew by {grown} bytes: data is in it");

        // And QEMU goes on with it.
        lab.qemu_io("top.qcow2", &["write -P 9 1024 10000".to_owned(), "discard 65536 65536".to_owned()]);
        lab.qemu_img("check -f qcow2 top.qcow2");
    }
}

#[test]
fn what_was_discarded_and_written_again_is_not_reported_free() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img(&format!("create -q -f qcow2 -o cluster_size={CLUSTER},data_file=top.data top.qcow2 {SIZE}"));
    let storage = lab.storage();
    let mut disk = open(&storage, &lab.path("top.qcow2"));
    disk.write_over(0, &[5; 4 * CLUSTER], &mut |_, to| to.fill(0)).unwrap();
    disk.flush().unwrap();
    disk.format.discard(0, 4 * CLUSTER as u64).unwrap();
    disk.write_over(CLUSTER as u64, &[6; CLUSTER], &mut |_, to| to.fill(0)).unwrap();
    let freed = disk.format.flush().unwrap();
    let ranges: Vec<(u64, u64)> = freed.iter().map(|freed| (freed.offset, freed.length)).collect();
    assert_eq!(ranges, [(0, CLUSTER as u64), (2 * CLUSTER as u64, 2 * CLUSTER as u64)]);
    let located = disk.format.locate(CLUSTER as u64, 1, 16).unwrap();
    assert!(
        located.extents.iter().any(|extent| matches!(
            extent.placement,
            Placement::Data { offset, overwrite: true, .. } if offset == CLUSTER as u64
        )),
        "{located:?}"
    );
    assert!(matches!(disk.format.pack(0, &[1; CLUSTER]), Err(Error::Unsupported(_))));
}

/// With extended L2 a cluster without a place can have subclusters of zeroes. Its offset in the table is 0, where the
/// data file has the start of the disk.
#[test]
fn zeroes_without_a_place_free_nothing() {
    if !have_qemu() {
        return;
    }
    type Operation = fn(&mut Disk<Qcow2>) -> blockhouse_plugin::Result<()>;
    let operations: [(&str, Operation); 4] = [
        ("write", |disk| disk.write_over(1 << 20, &[5; 512], &mut |_, to| to.fill(0))),
        ("discard", |disk| disk.format.discard(1 << 20, 64 << 10)),
        ("zero", |disk| disk.format.zero(1 << 20, 64 << 10, false)),
        ("zero and keep", |disk| disk.format.zero(1 << 20, 64 << 10, true)),
    ];
    for (what, operation) in operations {
        let lab = Lab::new();
        lab.qemu_img("create -q -f qcow2 -o extended_l2=on,cluster_size=64k,data_file=top.data top.qcow2 4M");
        lab.qemu_io("top.qcow2", &["write -P 0x11 0 64k".to_owned(), "write -z 1M 2k".to_owned()]);
        let storage = lab.storage();
        let mut disk = open(&storage, &lab.path("top.qcow2"));
        operation(&mut disk).unwrap();
        let freed = disk.format.flush().unwrap();
        assert!(freed.is_empty(), "{what}: {freed:?}");
        // The place of the start of the disk is freed with it.
        disk.format.discard(0, 64 << 10).unwrap();
        let freed: Vec<_> = disk.format.flush().unwrap().iter().map(|freed| (freed.offset, freed.length)).collect();
        assert_eq!(freed, [(0, 64 << 10)], "{what}");
    }
}
