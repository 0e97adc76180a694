//! New images: QEMU finds nothing wrong with them, says of them what it says of its own, and writes to them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::process::Command;

use blockhouse_plugin::testing::{Change, Storage};
use blockhouse_plugin::{Access, BackingReference, Creator, NewImage};
use blockhouse_qcow2::Qcow2;
use serde_json::Value;

use crate::support::{Chain, Lab, have_qemu};

const IMAGE: &str = "/images/new.qcow2";

fn new(size: u64, options: &[(&str, &str)]) -> NewImage {
    let options = options.iter().map(|(name, value)| ((*name).to_string(), (*value).to_string())).collect();
    NewImage { virtual_size: size, backing: None, options }
}

fn over(size: u64, name: &str, format: &str, options: &[(&str, &str)]) -> NewImage {
    let backing = Some(BackingReference { name: name.into(), format: Some(format.into()) });
    NewImage { backing, ..new(size, options) }
}

/// The bytes of a new image, or the error.
fn create(new: NewImage) -> Result<Vec<u8>, String> {
    let storage = Storage::new();
    storage.insert(IMAGE, Vec::new());
    Qcow2::create(storage.file(IMAGE, Access::ReadWrite), new).map_err(|error| error.to_string())?;
    Ok(storage.bytes(IMAGE))
}

fn json(lab: &Lab, arguments: &str) -> Value {
    let output =
        Command::new("qemu-img").args(arguments.split_whitespace()).current_dir(lab.path("")).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What `qemu-img info` says that does not depend on where the image is.
fn info(lab: &Lab, image: &str) -> Value {
    let mut info = json(lab, &format!("info -U --output=json -f qcow2 {image}"));
    let info = info.as_object_mut().unwrap();
    for changing in ["filename", "actual-size", "children", "full-backing-filename"] {
        info.remove(changing);
    }
    Value::Object(info.clone())
}

/// The option of `qemu-img create` for one of ours.
fn qemu_options(options: &[(&str, &str)]) -> String {
    let mut list = Vec::new();
    for (name, value) in options {
        let value = match *value {
            "v2" => "0.10",
            "v3" => "1.1",
            other => other,
        };
        list.push(format!("{}={value}", name.replace('-', "_")));
    }
    if list.is_empty() { String::new() } else { format!("-o {}", list.join(",")) }
}

/// Makes an image with the options, and compares it with QEMU's.
fn compare(lab: &Lab, size: u64, options: &[(&str, &str)], backing: Option<(&str, &str)>) {
    let what = format!("{size} bytes, {options:?}, over {backing:?}");
    let (image, names) = match backing {
        Some((name, format)) => (over(size, name, format, options), format!("-b {name} -F {format}")),
        None => (new(size, options), String::new()),
    };
    lab.write("ours.qcow2", &create(image).unwrap_or_else(|error| panic!("{what}: {error}")));
    lab.qemu_img(&format!("create -q -f qcow2 {} {names} theirs.qcow2 {size}", qemu_options(options)));
    assert_eq!(info(lab, "ours.qcow2"), info(lab, "theirs.qcow2"), "{what}");

    let check = json(lab, "check --output=json -f qcow2 ours.qcow2");
    for wrong in ["corruptions", "leaks", "check-errors"] {
        assert_eq!(check[wrong].as_u64().unwrap_or(0), 0, "{what}: {check}");
    }
    assert_eq!(
        check["image-end-offset"].as_u64().unwrap(),
        lab.bytes("ours.qcow2").len() as u64,
        "all of the file is counted: {what}"
    );

    let before = lab.oracle("theirs.qcow2", "");
    assert!(lab.oracle("ours.qcow2", "") == before, "{what}: it reads as something else");
    Chain::open(&lab.storage(), &lab.path("ours.qcow2"), "qcow2", None).size();
    if size == 0 {
        return;
    }
    lab.qemu_io("ours.qcow2", &[format!("write -P 7 {} 512", size - 512), "write -P 9 0 512".to_string()]);
    let after = lab.oracle("ours.qcow2", "");
    assert!(after[..512] == [9; 512] || size == 512, "{what}");
    assert!(after[512..].iter().zip(&before[512..]).take(after.len().saturating_sub(1024)).all(|(a, b)| a == b));
    if !options.iter().any(|(name, _)| *name == "data-file") {
        lab.compare("ours.qcow2");
    }
    let check = json(lab, "check --output=json -f qcow2 ours.qcow2");
    assert_eq!(check["corruptions"].as_u64().unwrap_or(0) + check["leaks"].as_u64().unwrap_or(0), 0, "{what}");
}

#[test]
fn qemu_says_of_new_images_what_it_says_of_its_own() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    let plain = 3 << 20;
    compare(&lab, plain, &[], None);
    for size in [0, 512, 1024, 65536, 65537 * 512] {
        compare(&lab, size, &[], None);
    }
    for cluster in ["512", "1K", "4k", "16384", "64K", "256K", "1M", "2M"] {
        for bits in ["1", "4", "16", "64"] {
            compare(&lab, plain, &[("cluster-size", cluster), ("refcount-bits", bits)], None);
        }
    }
    for bits in ["2", "8", "32"] {
        compare(&lab, plain, &[("refcount-bits", bits)], None);
    }
    for (compat, lazy) in [("v2", "off"), ("0.10", "off"), ("1.1", "off"), ("v3", "on")] {
        compare(&lab, plain, &[("compat", compat), ("lazy-refcounts", lazy)], None);
    }
    for compression in ["zlib", "zstd"] {
        for extended in ["on", "off"] {
            for cluster in ["16k", "64k", "2M"] {
                let options = [("compression-type", compression), ("extended-l2", extended), ("cluster-size", cluster)];
                compare(&lab, plain, &options, None);
            }
        }
    }
}

#[test]
fn backing_files_are_named_with_their_format() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.write("base.raw", &support::material(2 << 20, 5));
    lab.qemu_img("convert -f raw -O qcow2 base.raw base.qcow2");
    for options in [
        &[][..],
        &[("compat", "v2")],
        &[("cluster-size", "512")],
        &[("cluster-size", "4K"), ("refcount-bits", "8")],
        &[("extended-l2", "on")],
    ] {
        compare(&lab, 3 << 20, options, Some(("base.raw", "raw")));
        compare(&lab, 1 << 20, options, Some(("base.qcow2", "qcow2")));
    }
}

#[test]
fn data_files_are_named_and_raw_ones_are_mapped() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for (cluster, extended) in [("64K", "off"), ("16K", "on"), ("512", "off")] {
        for raw in ["off", "on"] {
            // QEMU makes the data file with its image; both use the same one.
            let options =
                [("data-file", "d.raw"), ("data-file-raw", raw), ("cluster-size", cluster), ("extended-l2", extended)];
            lab.write("d.raw", &[]);
            compare(&lab, 2 << 20, &options, None);
            if raw == "on" {
                // What is in the raw file already is on the disk: it is mapped, not only named.
                let content = support::material(2 << 20, 9);
                lab.write("ours.qcow2", &create(new(2 << 20, &options)).unwrap());
                lab.write("d.raw", &content);
                assert!(lab.oracle("ours.qcow2", "") == content, "{cluster}");
                lab.compare("ours.qcow2");
            }
        }
    }
}

#[test]
fn large_disks_are_created() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    for (size, options) in [
        (1u64 << 46, &[][..]),
        (1 << 46, &[("refcount-bits", "1")]),
        (8 << 30, &[("cluster-size", "512"), ("refcount-bits", "64")]),
        (1 << 55, &[("cluster-size", "2M")]),
    ] {
        lab.write("large.qcow2", &create(new(size, options)).unwrap());
        assert_eq!(info(&lab, "large.qcow2")["virtual-size"].as_u64().unwrap(), size);
        let check = json(&lab, "check --output=json -f qcow2 large.qcow2");
        let wrong = ["corruptions", "leaks", "check-errors"].map(|name| check[name].as_u64().unwrap_or(0));
        assert_eq!(wrong, [0; 3], "{size} {options:?}");
        lab.qemu_io("large.qcow2", &[format!("write -P 7 {} 64k", size - 65536)]);
    }
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    for (size, options, needle) in [
        (512, &[("size", "1")][..], "no option \"size\""),
        (512, &[("size", "1")], "cluster-size"),
        (512, &[("compat", "v2"), ("compat", "v3")], "compat is given twice"),
        (512, &[("compat", "v4")], "compat=v4: it is v2"),
        (512, &[("cluster-size", "256")], "cluster-size=256: it is a power of two from 512 to 2M"),
        (512, &[("cluster-size", "4M")], "cluster-size=4M"),
        (512, &[("cluster-size", "3K")], "cluster-size=3K"),
        (512, &[("cluster-size", "K")], "cluster-size=K"),
        (512, &[("cluster-size", "+4K")], "cluster-size=+4K"),
        (512, &[("cluster-size", "18446744073709551615M")], "cluster-size"),
        (512, &[("refcount-bits", "3")], "refcount-bits=3: it is 1, 2"),
        (512, &[("refcount-bits", "128")], "refcount-bits=128"),
        (512, &[("compression-type", "lzo")], "compression-type=lzo: it is zlib or zstd"),
        (512, &[("extended-l2", "yes")], "extended-l2=yes: it is on or off"),
        (512, &[("extended-l2", "on"), ("cluster-size", "8K")], "16K at least"),
        (512, &[("compat", "v2"), ("refcount-bits", "8")], "refcount-bits=8: needs version 3"),
        (512, &[("compat", "0.10"), ("lazy-refcounts", "on")], "lazy-refcounts=on: needs version 3"),
        (512, &[("compat", "v2"), ("compression-type", "zstd")], "compression-type=zstd: needs version 3"),
        (512, &[("compat", "v2"), ("extended-l2", "on")], "extended-l2=on: needs version 3"),
        (512, &[("compat", "v2"), ("data-file", "x")], "data-file=x: needs version 3"),
        (512, &[("data-file-raw", "on")], "data-file-raw=on: it needs data-file"),
        (512, &[("data-file", "")], "from 1 to"),
        (513, &[], "multiple of 512"),
        (1 << 63, &[], "below 2^63"),
        ((1 << 37) + 512, &[("cluster-size", "512")], "too large for cluster-size=512"),
        ((1 << 51) + 512, &[], "2251799813685248 bytes is the limit"),
        ((1 << 50) + 512, &[("extended-l2", "on")], "with extended-l2=on"),
    ] {
        // The disk just below each limit is made elsewhere.
        let error = create(new(size, options)).map(|bytes| bytes.len()).expect_err("refused");
        assert!(error.contains(needle), "{size} {options:?}: {error}");
    }

    let long = "x".repeat(1024);
    for (name, format, options, needle) in [
        (long.as_str(), "raw", &[][..], "from 1 to 1023 bytes"),
        ("", "raw", &[], "from 1 to 1023 bytes"),
        ("base", "", &[], "it is stated"),
        ("base", "a-format-with-a-long-name", &[], "15 bytes at most"),
        (&long[..500], "raw", &[("cluster-size", "512")], "has one cluster: 512 bytes"),
        ("base", "raw", &[("data-file", "x"), ("data-file-raw", "on")], "no backing file"),
    ] {
        let error = create(over(512, name, format, options)).map(|bytes| bytes.len()).expect_err("refused");
        assert!(error.contains(needle), "{name} {format} {options:?}: {error}");
    }
    create(over(512, &long[..1023], "raw", &[("cluster-size", "2K")])).unwrap();
    create(over(512, &long[..300], "raw", &[("cluster-size", "512")])).unwrap();

    let storage = Storage::new();
    storage.insert(IMAGE, vec![0; 1]);
    let error = Qcow2::create(storage.file(IMAGE, Access::ReadWrite), new(512, &[])).unwrap_err();
    assert!(error.text().contains("not empty"), "{error}");
    assert_eq!(storage.bytes(IMAGE), [0], "and it is left alone");
}

#[test]
fn every_option_is_listed_and_understood() {
    let options = Qcow2::create_options();
    assert_eq!(options.len(), 8);
    for option in options {
        assert!(!option.values.is_empty() && !option.default.is_empty() && option.about.ends_with('.'));
        if option.default != "none" {
            create(new(1 << 20, &[(&option.name, &option.default)])).unwrap();
            assert_eq!(create(new(1 << 20, &[(&option.name, &option.default)])), create(new(1 << 20, &[])));
        }
    }
}

/// The format of the backing file is where one write of a sector changes it together with the header.
#[test]
fn the_backing_format_is_in_the_first_sector() {
    let long = "x".repeat(1000);
    let bytes = create(over(1 << 20, &long, "raw", &[("data-file", &long)])).unwrap();
    let header_length = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    assert_eq!(bytes[header_length..][..11], *b"\xe2\x79\x2a\xca\0\0\0\x03raw");
    let bytes = create(over(1 << 20, &long, "raw", &[("compat", "v2")])).unwrap();
    assert_eq!(bytes[72..][..11], *b"\xe2\x79\x2a\xca\0\0\0\x03raw");
}

/// Until all of it is durable, the file does not start as an image does.
#[test]
fn an_interrupted_create_is_no_image() {
    let storage = Storage::new();
    storage.insert(IMAGE, Vec::new());
    let name = "x".repeat(900);
    let options = [("data-file", "d.raw"), ("cluster-size", "4K")];
    Qcow2::create(storage.file(IMAGE, Access::ReadWrite), over(1 << 20, &name, "raw", &options)).unwrap();
    let changes = storage.take_changes(IMAGE);
    assert_eq!(changes.last(), Some(&Change::Sync), "durable when it returns");
    let is_start = |change: &Change| matches!(change, Change::Write(at, _) if *at < 512);
    let starts: Vec<usize> = (0..changes.len()).filter(|number| is_start(&changes[*number])).collect();
    assert_eq!(starts, [changes.len() - 2], "one write to the first sector, the last");
    assert!(matches!(&changes[changes.len() - 2], Change::Write(0, bytes) if bytes.len() <= 512), "a sector is whole");
    assert_eq!(changes[changes.len() - 3], Change::Sync, "after all else is durable");
}

#[test]
fn storage_that_fails_makes_create_fail() {
    let mut wholes = Vec::new();
    let made = (0..20).find(|healthy| {
        let storage = Storage::new();
        storage.insert(IMAGE, Vec::new());
        storage.fail_after(IMAGE, Some(*healthy));
        let result = Qcow2::create(storage.file(IMAGE, Access::ReadWrite), over(1 << 20, "base", "raw", &[]));
        wholes.push(storage.bytes(IMAGE).starts_with(b"QFI\xfb"));
        result.is_ok()
    });
    // Only where nothing but the last sync failed can the file be an image.
    let made = made.unwrap();
    assert!(made >= 5, "{made}");
    assert_eq!(wholes.iter().position(|whole| *whole), Some(made - 1));
}
