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
use crate::support::{Handmade, Lab, Random, have_qemu, material, torn};

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

/// The extensions of an image other than the backing format, with their padding.
fn extensions(image: &[u8]) -> Vec<Vec<u8>> {
    all_extensions(image).into_iter().filter(|extension| extension[..4] != FORMAT.to_be_bytes()).collect()
}

/// How often an image states the backing format.
fn formats(image: &[u8]) -> usize {
    all_extensions(image).len() - extensions(image).len()
}

fn all_extensions(image: &[u8]) -> Vec<Vec<u8>> {
    let word = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
    let mut at = if word(4) == 2 { 72 } else { word(100) as usize };
    // Without an end mark the name of the backing file ends them.
    let limit = if word(12) == 0 { 1 << word(20) } else { word(12) as usize };
    let mut found = Vec::new();
    while at < limit && word(at) != 0 {
        let end = at + 8 + (word(at + 4) as usize).next_multiple_of(8);
        found.push(image[at..end].to_vec());
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

/// Extensions: the type and the data of each.
type List<'a> = &'a [(u32, &'a [u8])];

/// An image with these extensions behind its header, and a name right behind them.
fn made(cluster_bits: u32, list: List<'_>, name: &[u8]) -> Handmade {
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
const FEATURE_NAMES: u32 = 0x6803_f857;

/// As [`made`], and the name takes the place of the end mark.
fn made_without_end(cluster_bits: u32, list: List<'_>, name: &[u8]) -> Handmade {
    let mut image = made(cluster_bits, list, b"");
    let end = image.extensions(104, list) - 8;
    image.be64(8, end as u64).be32(16, name.len() as u32);
    image.bytes[end..end + name.len()].copy_from_slice(name);
    image
}

#[test]
fn extensions_stay_byte_for_byte() {
    let other: &[u8] = b"unknown to everybody";
    // First, last, between, and not there; what is behind the end of the list is not an extension.
    let lists: [List<'_>; 4] = [
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

#[test]
fn a_list_without_an_end_mark_gets_one() {
    let names = vec![1; 7 * 48];
    let list: List<'_> = &[(FORMAT, b"raw"), (UNKNOWN, &[7; 200]), (FEATURE_NAMES, &names)];
    let image = made_without_end(12, list, b"base.raw");
    // The names of features make room for it.
    for backing in [None, reference("new", "raw"), reference("new", "qcow2")] {
        let (result, bytes) = rebase(&image, backing.clone());
        result.unwrap();
        assert_eq!(backing_of(&bytes), backing);
        assert_eq!(extensions(&bytes), extensions(&made(12, &list[1..2], b"").bytes));
    }
    // Nothing does.
    for list in [&[list[0], list[2], list[1]], &[(FORMAT, b"raw".as_slice()), (UNKNOWN, &[7; 600])]] as [&[_]; 2] {
        let image = made_without_end(12, list, b"base.raw");
        for backing in [None, reference("new", "raw")] {
            let (result, bytes) = rebase(&image, backing);
            assert!(matches!(&result, Err(Error::Unsupported(text)) if text.contains("end mark")), "{result:?}");
            assert!(bytes == image.bytes);
        }
    }
}

#[test]
fn one_format_of_several_stays() {
    let names = vec![1; 7 * 48];
    let other = vec![7; 300];
    // All rewritten, with the last one out of reach, and in the place of the names of features; then what has no
    // room for that.
    let lists: [(List<'_>, bool); 5] = [
        (&[(FORMAT, b"qcow2"), (UNKNOWN, &other), (FORMAT, b"qcow2")], true),
        (&[(FORMAT, b"qcow2"), (UNKNOWN, &[7; 376]), (FORMAT, b"qcow2")], true),
        (&[(FORMAT, b"qcow2"), (FORMAT, b"qcow2"), (UNKNOWN, &[7; 40]), (FEATURE_NAMES, &names)], true),
        (&[(FORMAT, b"qcow2"), (FORMAT, b"qcow2"), (UNKNOWN, &[7; 600])], false),
        (&[(FORMAT, b"qcow2"), (UNKNOWN, &[7; 500]), (FORMAT, b"qcow2")], false),
    ];
    for (number, (list, fits)) in lists.into_iter().enumerate() {
        let image = made(12, list, b"old");
        let (result, bytes) = rebase(&image, reference("new", "raw"));
        assert_eq!(result.is_ok(), fits, "{number}: {result:?}");
        if fits {
            assert_eq!(backing_of(&bytes), reference("new", "raw"), "{number}");
            assert_eq!(formats(&bytes), 1, "{number}");
            let kept = |extension: &Vec<u8>| extension[..4] == UNKNOWN.to_be_bytes();
            let (old, new) = (extensions(&image.bytes), extensions(&bytes));
            assert!(old.iter().filter(|extension| kept(extension)).eq(new.iter().filter(|new| kept(new))), "{number}");
        } else {
            assert!(bytes == image.bytes, "{number}");
        }
    }
}

/// What is in force is what QEMU takes: the last.
#[test]
fn the_last_of_several_formats_counts() {
    let image = made(12, &[(FORMAT, b"qcow2"), (UNKNOWN, b"12345678"), (FORMAT, b"raw")], b"old");
    assert_eq!(backing_of(&image.bytes), reference("old", "raw"));
    if have_qemu() {
        let lab = Lab::new();
        lab.write("top.qcow2", &image.bytes);
        assert_eq!(named(&lab), Some(("old".to_owned(), "raw".to_owned())));
    }
}

/// A list of extensions that a stranger made: several formats, names of features, others, with and without an end
/// mark, with a name behind it or none. `None` if it does not fit into the first cluster.
fn strange(random: &mut Random) -> Option<Handmade> {
    let mut list: Vec<(u32, Vec<u8>)> = Vec::new();
    for number in 0..random.below(6) as u32 {
        list.push(match random.below(6) {
            0..=2 => {
                let formats: [&[u8]; 5] = [b"raw", b"qcow2", b"vmdk", b"a format of 15", b""];
                (FORMAT, formats[random.below(5) as usize].to_vec())
            }
            3 => (FEATURE_NAMES, vec![1; 48 * random.below(9) as usize]),
            4 => (UNKNOWN + number, vec![number as u8; random.below(30) as usize]),
            _ => (UNKNOWN + number, vec![number as u8; random.below(700) as usize]),
        });
    }
    let cluster_bits = 9 + random.below(4) as u32;
    let length: usize = list.iter().map(|(_, data)| 8 + data.len().next_multiple_of(8)).sum();
    let name = vec![b"on"[random.below(2) as usize]; random.below(40) as usize];
    if 104 + length + 8 + name.len() > 1 << cluster_bits {
        return None;
    }
    let list: Vec<(u32, &[u8])> = list.iter().map(|(kind, data)| (*kind, data.as_slice())).collect();
    Some(match random.below(2) {
        0 if !name.is_empty() => made_without_end(cluster_bits, &list, &name),
        _ => made(cluster_bits, &list, &name),
    })
}

#[test]
fn whatever_the_extensions_are_the_reference_is_what_was_meant_or_nothing_changes() {
    let qemu = have_qemu();
    let lab = Lab::new();
    let long = "n".repeat(300);
    let bases: Vec<(String, &[u8])> = (1..40)
        .flat_map(|length| ["o", "n"].map(|letter| letter.repeat(length)))
        .chain(["new".to_owned(), long.clone()])
        .map(|name| (name, b"".as_slice()))
        .collect();
    let bases: Vec<(&str, &[u8])> = bases.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    let others = |bytes: &[u8]| {
        let mut list = extensions(bytes);
        list.retain(|extension| extension[..4] != FEATURE_NAMES.to_be_bytes());
        list
    };
    let mut random = Random(5);
    let (mut changed, mut refused) = (0, 0);
    for number in 0..1500 {
        let Some(image) = strange(&mut random) else { continue };
        let new = match random.below(5) {
            0 => None,
            1 => reference("new", "raw"),
            2 => reference("new", "qcow2"),
            3 => reference("new", "a format of 15"),
            _ => reference(&long, "raw"),
        };
        let old = view(&image.bytes, &bases).backing;
        let storage = Storage::new();
        storage.insert(IMAGE, image.bytes.clone());
        let mut qcow2 = storage.opened_image::<Qcow2>(IMAGE, Access::ReadWrite).unwrap();
        let result = qcow2.set_backing(new.clone());
        let (bytes, changes) = (storage.bytes(IMAGE), storage.take_changes(IMAGE));
        if let Err(error) = result {
            assert!(matches!(error, Error::Unsupported(_)) && bytes == image.bytes, "{number}: {error:?}");
            refused += 1;
            continue;
        }
        changed += 1;
        assert_eq!(view(&bytes, &bases).backing, new, "{number}");
        assert_eq!(others(&bytes), others(&image.bytes), "{number}");
        assert!(new.is_none() || formats(&bytes) == 1, "{number}");
        for cut in 0..=changes.len() {
            let torn = view(&torn(&image.bytes, &changes[..cut], &mut random), &bases).backing;
            assert!(torn == old || torn == new, "{number}: {torn:?}");
        }
        if qemu && number % 20 == 0 {
            lab.write("top.qcow2", &bytes);
            let info = info(&lab);
            assert_eq!(info["backing-filename"].as_str(), new.as_ref().map(|new| new.name.as_str()), "{number}");
            let format = new.as_ref().and_then(|new| new.format.as_deref());
            assert!(new.is_none() || info["backing-filename-format"].as_str() == format, "{number}: {info}");
        }
    }
    assert!(changed > 500 && refused > 100, "{changed} changed, {refused} refused");
}
