//! Another backing file, or none: with QEMU as the oracle, and power cuts in the middle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod edit;
mod support;

use std::path::Path;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, BackingReference, Creator, Error, NewImage, Rebaser, Result};
use blockhouse_qcow2::Qcow2;

use crate::edit::{IMAGE, cut, edit, flaws, info, view, write};
use crate::support::{Handmade, Lab, have_qemu, material};

const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=1k",
    "cluster_size=4k,compat=0.10",
    "cluster_size=64k",
    "cluster_size=16k,extended_l2=on,compression_type=zstd",
    "cluster_size=2M",
];

fn reference(name: &str, format: &str) -> Option<BackingReference> {
    Some(BackingReference { name: name.to_owned(), format: Some(format.to_owned()) })
}

/// What QEMU says is the backing file of `top.qcow2`.
fn named(lab: &Lab) -> Option<(String, String)> {
    let info = info(lab);
    let text = |name: &str| info[name].as_str().map(str::to_owned);
    Some((text("backing-filename")?, text("backing-filename-format")?))
}

/// The extensions of an image other than that of the backing format, with their padding.
fn extensions(image: &[u8]) -> Vec<Vec<u8>> {
    let word = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
    let mut at = if word(4) == 2 { 72 } else { word(100) as usize };
    let mut found = Vec::new();
    while word(at) != 0 {
        let end = at + 8 + (word(at + 4) as usize).next_multiple_of(8);
        if word(at) != 0xe279_2aca {
            found.push(image[at..end].to_vec());
        }
        at = end;
    }
    found
}

#[test]
fn names_change_and_nothing_else() {
    if !have_qemu() {
        return;
    }
    for options in KINDS {
        let lab = Lab::new();
        for name in ["base.raw", "b", "a/long/way/to/x.raw"] {
            lab.write(name, &material(300 << 10, name.len() as u64));
        }
        lab.qemu_img("create -q -f qcow2 base.qcow2 300k");
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw top.qcow2 300k"));
        write(&lab, &material(300 << 10, 8), 100_000, &material(50_000, 1));
        let before = extensions(&lab.bytes("top.qcow2"));
        let last = ("a/long/way/to/x.raw", "raw");
        for (name, format) in [("b", "raw"), ("base.qcow2", "qcow2"), ("", ""), ("base.raw", "raw"), ("", ""), last] {
            edit(&lab, |qcow2| qcow2.set_backing(reference(name, format).filter(|new| !new.name.is_empty())))
                .unwrap_or_else(|error| panic!("{options}, {name}: {error}"));
            let expected = Some((name.to_owned(), format.to_owned())).filter(|(name, _)| !name.is_empty());
            assert_eq!(named(&lab), expected, "{options}");
            assert_eq!(flaws(Path::new(&lab.path("."))), None, "{options}, {name}");
            assert!(extensions(&lab.bytes("top.qcow2")) == before, "{options}, {name}");
            let content = lab.oracle("top.qcow2", "");
            assert!(content[100_000..150_000] == material(50_000, 1), "{options}, {name}");
            let below = if name.is_empty() || name == "base.qcow2" { vec![0; 300 << 10] } else { lab.bytes(name) };
            // From the next cluster on, where there is one.
            let rest = if options.contains("2M") { 300 << 10 } else { 192 << 10 };
            assert!(content[rest..] == below[rest..], "{options}, {name}");
        }
        // QEMU goes on from there, and we from what QEMU makes of it.
        lab.qemu_img("rebase -u -b b -F raw top.qcow2");
        edit(&lab, |qcow2| qcow2.set_backing(reference("base.qcow2", "qcow2"))).unwrap();
        assert_eq!(named(&lab), Some(("base.qcow2".to_owned(), "qcow2".to_owned())));
        assert!(extensions(&lab.bytes("top.qcow2")) == before, "{options}");
        lab.qemu_img("rebase -u -b base.raw -F raw top.qcow2");
        edit(&lab, |qcow2| qcow2.set_backing(reference("b", "raw"))).unwrap();
        assert_eq!(named(&lab), Some(("b".to_owned(), "raw".to_owned())));
    }
}

#[test]
fn our_own_images_change_theirs() {
    if !have_qemu() {
        return;
    }
    for (cluster, compat) in [("64K", "v3"), ("1K", "v3"), ("4K", "v2")] {
        let lab = Lab::new();
        lab.write("base.raw", &material(1 << 20, 3));
        let storage = Storage::new();
        storage.insert(IMAGE, Vec::new());
        let options = vec![("cluster-size".to_owned(), cluster.to_owned()), ("compat".to_owned(), compat.to_owned())];
        let backing = reference("one.qcow2", "qcow2");
        Qcow2::create(storage.file(IMAGE, Access::ReadWrite), NewImage { virtual_size: 1 << 20, backing, options })
            .unwrap();
        lab.write("top.qcow2", &storage.bytes(IMAGE));
        let before = extensions(&lab.bytes("top.qcow2"));
        edit(&lab, |qcow2| qcow2.set_backing(reference("base.raw", "raw"))).unwrap();
        assert_eq!(named(&lab), Some(("base.raw".to_owned(), "raw".to_owned())));
        assert!(lab.oracle("top.qcow2", "") == material(1 << 20, 3));
        edit(&lab, |qcow2| qcow2.set_backing(None)).unwrap();
        assert_eq!(named(&lab), None);
        assert!(extensions(&lab.bytes("top.qcow2")) == before);
        assert_eq!(flaws(Path::new(&lab.path("."))), None);
    }
}

/// An image with these extensions behind its header, and a name right behind them.
fn made(cluster_bits: u32, list: &[(u32, &[u8])], name: &[u8]) -> Handmade {
    let mut image = Handmade::new(3, cluster_bits, 8);
    let end = image.extensions(104, list);
    if !name.is_empty() {
        image.be64(8, end as u64).be32(16, name.len() as u32);
        image.bytes[end..end + name.len()].copy_from_slice(name);
    }
    image
}

fn rebase(image: &Handmade, backing: Option<BackingReference>) -> (Result<()>, Vec<u8>) {
    let storage = Storage::new();
    storage.insert(IMAGE, image.bytes.clone());
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
    let result = qcow2.set_backing(backing);
    (result, storage.bytes(IMAGE))
}

fn backing_of(bytes: &[u8]) -> Option<BackingReference> {
    view(bytes, &[("old", b""), ("new", b""), (&"n".repeat(300), b"")]).backing
}

const FORMAT: u32 = 0xe279_2aca;
const UNKNOWN: u32 = 0x1234_5678;

#[test]
fn extensions_stay_byte_for_byte() {
    let other: &[u8] = b"unknown to everybody";
    // First, last, between, and not there; what is behind the end of the list is not an extension.
    let lists: [&[(u32, &[u8])]; 4] = [
        &[(FORMAT, b"raw"), (UNKNOWN, other)],
        &[(UNKNOWN, other), (FORMAT, b"raw")],
        &[(UNKNOWN, other), (FORMAT, b"raw"), (UNKNOWN + 1, b"12345678")],
        &[(UNKNOWN, other)],
    ];
    for list in lists {
        for name in [b"".as_slice(), b"old"] {
            let image = made(12, list, name);
            let (result, bytes) = rebase(&image, reference("new", "a format of 15"));
            result.unwrap();
            assert_eq!(backing_of(&bytes), reference("new", "a format of 15"));
            assert_eq!(extensions(&bytes), extensions(&image.bytes));
            assert!(bytes[4096..] == image.bytes[4096..]);
            let (result, bytes) = rebase(&Handmade { bytes, ..made(12, list, name) }, None);
            result.unwrap();
            assert_eq!(backing_of(&bytes), None);
            assert_eq!(extensions(&bytes), extensions(&image.bytes));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let long = vec![7; 600];
    // The list goes on past the first sector: the format is changed in place, or not at all.
    let image = made(12, &[(FORMAT, b"raw"), (UNKNOWN, &long)], b"old");
    let (result, bytes) = rebase(&image, reference("new", "qcow2"));
    result.unwrap();
    assert_eq!(backing_of(&bytes), reference("new", "qcow2"));
    assert_eq!(extensions(&bytes), extensions(&image.bytes));
    let (result, bytes) = rebase(&image, None);
    result.unwrap();
    assert_eq!(backing_of(&bytes), None);
    for (image, format) in [
        (image, "longer than 8"),
        (made(12, &[(UNKNOWN, &long)], b""), "raw"),
        (made(12, &[(UNKNOWN, &long), (FORMAT, b"raw")], b"old"), "raw"),
    ] {
        let (result, bytes) = rebase(&image, reference("new", format));
        assert!(matches!(&result, Err(Error::Unsupported(text)) if text.contains("extensions")), "{result:?}");
        assert!(bytes == image.bytes);
    }
    // 512 bytes of header and name, and a cluster of 1 KiB that is full of the old name.
    let short = "n".repeat(300);
    for (image, fits) in
        [(made(9, &[], b"old"), 384), (made(10, &[], &[b'o'; 800]), 384), (made(10, &[], &[b'o'; 300]), 896)]
    {
        for (length, ok) in [(300, true), (fits, true), (fits + 1, false), (1023, false)] {
            let name = "n".repeat(length);
            let (result, bytes) = rebase(&image, reference(&name, "raw"));
            assert_eq!(result.is_ok(), ok, "{length} of {fits}: {result:?}");
            if ok && name == short {
                assert_eq!(backing_of(&bytes), reference(&name, "raw"));
            }
            assert!(ok || bytes == image.bytes);
        }
    }
}

#[test]
fn references_are_checked() {
    let image = made(12, &[], b"");
    let (long_name, long_format) = ("n".repeat(1024), "f".repeat(16));
    for (name, format) in
        [("", "raw"), ("a\0b", "raw"), (&long_name, "raw"), ("a", ""), ("a", &long_format), ("a", "\0")]
    {
        let (result, bytes) = rebase(&image, reference(name, format));
        assert!(matches!(result, Err(Error::Other(_))), "{name:?} {format:?}");
        assert!(bytes == image.bytes);
    }
    let (result, bytes) = rebase(&image, Some(BackingReference { name: "a".to_owned(), format: None }));
    assert!(matches!(result, Err(Error::Other(_))));
    assert!(bytes == image.bytes);
    let storage = Storage::new();
    storage.insert(IMAGE, image.bytes.clone());
    let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadOnly).unwrap();
    assert!(qcow2.set_backing(None).is_err(), "opened read-only");
}

/// Unknown autoclear bits go, those of bitmaps stay: the data is what it was.
#[test]
fn promises_about_the_data_stay() {
    let mut image = made(12, &[], b"old");
    image.be64(88, 1 << 40 | 1);
    let (result, bytes) = rebase(&image, reference("new", "raw"));
    result.unwrap();
    assert_eq!(bytes[88..96], 1u64.to_be_bytes());
}

#[test]
fn a_power_cut_leaves_the_old_name_or_the_new_one() {
    if !have_qemu() {
        return;
    }
    let long = "long/".repeat(60) + "name";
    for (seed, options) in KINDS.iter().enumerate() {
        let lab = Lab::new();
        lab.write("base.raw", &material(90_000, 1));
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw top.qcow2 100k"));
        let long = if seed == 0 { "longer" } else { &long };
        let bases: &[(&str, &[u8])] = &[("base.raw", &material(90_000, 1)), (long, &material(80_000, 2))];
        let mut image = lab.bytes("top.qcow2");
        for (step, name) in [long, "base.raw", long, "", long, "base.raw", ""].into_iter().enumerate() {
            let backing = reference(name, "raw").filter(|new| !new.name.is_empty());
            image = cut(&image, bases, (seed * 10 + step) as u64, 12, |qcow2| qcow2.set_backing(backing.clone()));
            assert_eq!(view(&image, bases).backing, backing);
        }
    }
}
