//! Every format that this qemu-img creates, headers by hand for the others, and files that are several
//! things at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;
use std::process::Command;

use blockhouse_probe::{Guess, probe};

fn probe_bytes(bytes: &[u8]) -> Vec<Guess> {
    let head = &bytes[..bytes.len().min(64 << 10)];
    let tail = &bytes[bytes.len().saturating_sub(4 << 10)..];
    probe(head, tail, bytes.len() as u64)
}

/// Formats with their confidence, in the order of the answer.
fn formats(bytes: &[u8]) -> Vec<(&'static str, u8)> {
    probe_bytes(bytes).into_iter().map(|guess| (guess.format, guess.confidence)).collect()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn create(directory: &Path, format: &str, options: &[&str]) -> Option<Vec<u8>> {
    let image = directory.join("image");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]).args(options).arg(&image).arg("8M");
    let output = command.output().ok()?;
    assert!(output.status.success(), "{format}: {}", String::from_utf8_lossy(&output.stderr));
    Some(std::fs::read(image).unwrap())
}

#[test]
fn what_qemu_img_creates() {
    let cases: &[(&str, &[&str])] = &[
        ("qcow2", &["-o", "compat=0.10"]),
        ("qcow2", &["-o", "compat=1.1,cluster_size=512"]),
        ("qcow2", &["-o", "cluster_size=2M,extended_l2=on"]),
        ("qcow", &[]),
        ("vmdk", &[]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vmdk", &["-o", "subformat=monolithicFlat"]),
        ("vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]),
        ("vhdx", &[]),
        ("vpc", &[]),
        ("vpc", &["-o", "subformat=fixed"]),
        ("vdi", &[]),
        ("vdi", &["-o", "static=on"]),
        ("qed", &[]),
        ("parallels", &[]),
        ("luks", &["--object", "secret,id=key,data=x", "-o", "key-secret=key,iter-time=10"]),
    ];
    for (format, options) in cases {
        let directory = tempfile::tempdir().unwrap();
        let Some(bytes) = create(directory.path(), format, options) else {
            println!("SKIPPED: there is no qemu-img");
            return;
        };
        let guesses = probe_bytes(&bytes);
        assert_eq!(guesses.len(), 1, "{format} {options:?}: {guesses:?}");
        assert_eq!((guesses[0].format, guesses[0].confidence), (*format, 100), "{format} {options:?}: {guesses:?}");
    }
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(formats(&create(directory.path(), "raw", &[]).unwrap()), []);
}

#[test]
fn evidence_says_what_was_seen() {
    let mut bytes = vec![0; 1024];
    put(&mut bytes, 0, b"QFI\xfb\0\0\0\x03");
    put(&mut bytes, 20, &16u32.to_be_bytes());
    assert_eq!(probe_bytes(&bytes)[0].evidence, "magic QFI\\xfb at 0, version 3, cluster bits 16");
}

#[test]
fn formats_that_qemu_img_does_not_create() {
    let mut bytes = vec![0; 8192];
    put(&mut bytes, 0, b"COWD\x01\0\0\0");
    assert_eq!(formats(&bytes), [("vmdk", 100)]);

    put(&mut bytes, 0, &0xcafe_babeu64.to_le_bytes());
    put(&mut bytes, 8, &0x2_0000_0001u64.to_le_bytes());
    assert_eq!(formats(&bytes), [("vmdk", 100)]);

    let mut bytes = vec![0; 8192];
    put(&mut bytes, 0, b"WithoutFreeSpace\x02\0\0\0");
    assert_eq!(formats(&bytes), [("parallels", 100)]);

    let mut bytes = vec![0; 8192];
    put(&mut bytes, 8192 - 512, b"koly\0\0\0\x04\0\0\x02\0");
    assert_eq!(formats(&bytes), [("dmg", 100)]);

    let mut bytes = vec![0; 8192];
    put(&mut bytes, 0, b"Bochs Virtual HD Image");
    put(&mut bytes, 32, b"Redolog");
    assert_eq!(formats(&bytes), [("bochs", 100)]);

    let mut bytes = vec![0; 8192];
    put(&mut bytes, 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop");
    assert_eq!(formats(&bytes), [("cloop", 60)]);

    let mut bytes = vec![0; 8192];
    put(&mut bytes, 0, b"LUKS\xba\xbe\0\x02");
    assert_eq!(formats(&bytes), [("luks", 100)]);

    let text = b"version=1\r\ncreateType=\"monolithicFlat\"\r\n";
    assert_eq!(formats(text), [("vmdk", 60)]);
}

#[test]
fn raw_disks_by_what_is_on_them() {
    let mut disk = vec![0; 128 << 10];
    put(&mut disk, 510, b"\x55\xaa");
    assert_eq!(formats(&disk), [("raw", 20)]);
    put(&mut disk, 446, &[0x80, 1, 1, 0, 0x83]);
    assert_eq!(formats(&disk), [("raw", 50)]);
    put(&mut disk, 512, b"EFI PART");
    assert_eq!(formats(&disk), [("raw", 80), ("raw", 50)]);

    let mut iso = vec![0; 128 << 10];
    put(&mut iso, 32_768, b"\x01CD001");
    assert_eq!(formats(&iso), [("raw", 80)]);
}

#[test]
fn a_file_can_be_several_things() {
    // A qcow2 header in the first sector of a partitioned disk, which is also a fixed VHD.
    let mut bytes = vec![0; 128 << 10];
    put(&mut bytes, 0, b"QFI\xfb\0\0\0\x03");
    put(&mut bytes, 20, &16u32.to_be_bytes());
    put(&mut bytes, 446, &[0x80, 1, 1, 0, 0x83]);
    put(&mut bytes, 510, b"\x55\xaa");
    let last = bytes.len() - 512;
    put(&mut bytes, last, b"conectix");
    assert_eq!(formats(&bytes), [("qcow2", 100), ("vpc", 60), ("raw", 50)]);
}

#[test]
fn damaged_headers_are_less_sure() {
    let mut bytes = vec![0; 4096];
    put(&mut bytes, 0, b"QFI\xfb\0\0\0\x07");
    assert_eq!(formats(&bytes), [("qcow2", 60)]);
    put(&mut bytes, 0, b"KDMV\x09");
    assert_eq!(formats(&bytes), [("vmdk", 60)]);
    put(&mut bytes, 0, b"vhdxfile");
    assert_eq!(formats(&bytes), [("vhdx", 60)], "too short for a VHDX");
}

#[test]
fn any_bytes_of_any_length_are_fine() {
    let mut bytes = b"QFI\xfbconectixkolyLUKS\xba\xbe# Disk DescriptorFile\ncreateType=".to_vec();
    bytes.resize(1024, 0x55);
    for length in 0..bytes.len() {
        for start in 0..20 {
            let part = &bytes[start.min(length)..length];
            for guess in probe_bytes(part) {
                assert!(guess.confidence <= 100 && !guess.evidence.is_empty());
            }
        }
    }
    // Head and tail need not fit together.
    assert!(probe(&[], b"koly", u64::MAX).is_empty());
}
