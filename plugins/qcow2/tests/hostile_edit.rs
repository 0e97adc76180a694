//! Every change of a whole image, on images that are damaged in every way: an error or success, never a
//! panic, and what succeeded is an image.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{
    Access, BackingReference, Checker, Error, Packer, Rebaser, Repair, Resizer, SnapshotEditor, Writer,
};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, have_qemu};

const IMAGE: &str = "/images/top.qcow2";

/// Does one of the changes to an image, from its file to the end.
type Change = fn(&Storage) -> Result<(), Error>;

fn opened(storage: &Storage) -> Result<Qcow2, Error> {
    storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite)
}

const CHANGES: [(&str, Change); 12] = [
    ("check", |storage| Qcow2::check(storage.file(IMAGE, Access::ReadOnly), None).map(drop)),
    ("repair leaks", |storage| Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(Repair::Leaks)).map(drop)),
    ("repair all", |storage| Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(Repair::All)).map(drop)),
    ("grow", |storage| opened(storage)?.resize(8 << 20, false)),
    ("grow over a base", |storage| opened(storage)?.resize(1 << 20, true)),
    ("shrink", |storage| opened(storage)?.resize(64 << 10, false)),
    ("create-snapshot", |storage| opened(storage)?.create_snapshot("new", 1, 2).map(drop)),
    ("apply-snapshot", |storage| opened(storage)?.apply_snapshot("1")),
    ("delete-snapshot", |storage| opened(storage)?.delete_snapshot("1")),
    ("set-backing", |storage| {
        let backing = BackingReference { name: "another/base.raw".into(), format: Some("raw".into()) };
        opened(storage)?.set_backing(Some(backing))
    }),
    ("set no backing", |storage| opened(storage)?.set_backing(None)),
    ("write and pack", |storage| {
        let mut disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(()))?;
        disk.format.begin()?;
        let cluster = disk.info.cluster_size as usize;
        if disk.info.virtual_size >= 3 * cluster as u64 {
            disk.format.pack(0, &vec![1; cluster])?;
            disk.write_over(cluster as u64, &vec![2; cluster + 512], &mut |_, to| to.fill(0))?;
        }
        disk.flush()?;
        disk.format.finish()
    }),
];

/// A small image with everything: data, compressed clusters, a snapshot, and a backing file.
fn image(options: &str, backing: bool) -> Vec<u8> {
    let lab = Lab::new();
    let content: Vec<u8> = (0..300u32 << 10).map(|at| (at / 700) as u8).collect();
    lab.write("full.raw", &content);
    lab.write("base.raw", &content);
    if backing {
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw top.qcow2 300k"));
        lab.qemu_io("top.qcow2", &["write -P 3 0 20k".into(), "write -z 40k 8k".into()]);
    } else {
        lab.qemu_img(&format!("convert -c -f raw -O qcow2 -o {options} full.raw top.qcow2"));
        lab.qemu_io("top.qcow2", &["write -P 3 0 20k".into(), "write -z 40k 8k".into()]);
    }
    lab.qemu_img("snapshot -c one top.qcow2");
    lab.qemu_io("top.qcow2", &["write -P 5 8k 20k".into()]);
    lab.bytes("top.qcow2")
}

fn be(bytes: &[u8], at: usize, length: usize) -> usize {
    bytes[at..at + length].iter().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

/// The bytes of the image that are metadata: header, tables, counts, snapshots.
fn metadata(bytes: &[u8]) -> Vec<usize> {
    let cluster = 1usize << be(bytes, 20, 4);
    let mut places: Vec<usize> = (0..0x90).collect();
    let l1 = be(bytes, 40, 8);
    places.extend(l1..l1 + 8 * be(bytes, 36, 4));
    for entry in 0..be(bytes, 36, 4) {
        let l2 = be(bytes, l1 + 8 * entry, 8) & 0x00ff_ffff_ffff_fe00;
        places.extend(l2..l2 + cluster.min(256));
    }
    let refcounts = be(bytes, 48, 8);
    places.extend(refcounts..refcounts + 16);
    let block = be(bytes, refcounts, 8);
    places.extend(block..block + 64);
    let snapshots = be(bytes, 64, 8);
    places.extend(snapshots..snapshots + 72);
    places.retain(|place| *place < bytes.len());
    places
}

#[test]
fn no_damage_makes_a_change_panic() {
    if !have_qemu() {
        return;
    }
    let mut succeeded = 0u32;
    let mut failed = 0u32;
    for (options, backing) in [
        ("cluster_size=4k", true),
        ("cluster_size=4k,compression_type=zstd", false),
        ("cluster_size=512,refcount_bits=8", false),
        ("cluster_size=16k,extended_l2=on", true),
    ] {
        let good = image(options, backing);
        for (name, change) in CHANGES {
            let storage = Storage::new();
            storage.insert(IMAGE, good.clone());
            storage.insert("/images/base.raw", vec![0; 4096]);
            change(&storage).unwrap_or_else(|error| panic!("{options}: {name}: {error}"));
        }
        // Each byte: as large as can be, nothing, and one bit.
        for (number, place) in metadata(&good).into_iter().enumerate() {
            for (how, value) in [0xff, 0, good[place] ^ 1, good[place] ^ 0x80].into_iter().enumerate() {
                if value == good[place] {
                    continue;
                }
                // All changes on all damages take too long; each damage meets some, and each change many.
                for step in 0..3 {
                    let (name, change) = CHANGES[(number * 7 + how * 5 + step * 4) % CHANGES.len()];
                    let mut bytes = good.clone();
                    bytes[place] = value;
                    let storage = Storage::new();
                    storage.insert(IMAGE, bytes);
                    storage.insert("/images/base.raw", vec![0; 4096]);
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| change(&storage)));
                    match outcome {
                        Ok(Ok(())) => succeeded += 1,
                        Ok(Err(_)) => failed += 1,
                        Err(_) => panic!("{options}: {name} panics where byte {place:#x} is {value:#04x}"),
                    }
                    let after = storage.bytes(IMAGE);
                    assert!(
                        after.len() < 64 << 20,
                        "{options}: {name}, {place:#x} = {value:#04x}: {} bytes",
                        after.len()
                    );
                }
            }
        }
    }
    // Damage is found by some, and some of it does not matter to others.
    eprintln!("{succeeded} changes succeeded, {failed} were refused");
    assert!(succeeded > 1000 && failed > 1000, "{succeeded} succeeded, {failed} failed");
}
