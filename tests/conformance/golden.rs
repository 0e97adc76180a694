//! The images under `tests/images`: read the same on every machine, with or without QEMU.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use blockhouse_tests::{run, sha256};

use crate::case::Subject;
use crate::lab::Lab;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("images")
}

/// A row of the table in the README.
struct Golden {
    file: String,
    format: &'static str,
    grants: Option<String>,
    file_digest: String,
    content_digest: String,
}

fn table() -> Vec<Golden> {
    let readme = std::fs::read_to_string(directory().join("README.md")).unwrap();
    let rows = readme.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<String> = row.split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect();
        let [_, file, format, grants, file_digest, content_digest, _] = cells.try_into().expect("five columns");
        let format = ["raw", "qcow2", "vmdk"].into_iter().find(|known| *known == format).expect("a format");
        let grants = (!grants.is_empty()).then_some(grants);
        Golden { file, format, grants, file_digest, content_digest }
    })
    .collect()
}

/// The bytes that `hexdump -C` shows. A line `*` stands for repetitions of the line before it.
fn from_hexdump(text: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for line in text.lines().filter(|line| *line != "*") {
        let (offset, rest) = line.split_once(' ').unwrap_or((line, ""));
        let offset = usize::from_str_radix(offset, 16).expect("an offset");
        if let Some(last) = bytes.len().checked_sub(16).map(|start| bytes[start..].to_vec()) {
            while bytes.len() < offset {
                bytes.extend(&last);
            }
        }
        assert_eq!(bytes.len(), offset, "the dump has a gap");
        let hex = rest.split('|').next().unwrap_or_default();
        bytes.extend(hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("a byte")));
    }
    bytes
}

#[test]
fn golden() {
    let lab = Lab::new();
    let table = table();
    let mut dumps = BTreeSet::new();
    for entry in std::fs::read_dir(directory()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(image) = name.strip_suffix(".hex") {
            lab.write(image, &from_hexdump(&std::fs::read_to_string(directory().join(&name)).unwrap()));
            dumps.insert(image.to_owned());
        }
    }
    let listed: BTreeSet<String> = table.iter().map(|golden| golden.file.clone()).collect();
    assert_eq!(dumps, listed, "the table and the files are not the same");
    assert!(table.len() >= 8);

    for golden in &table {
        let bytes = std::fs::read(lab.path(&golden.file)).unwrap();
        assert_eq!(sha256(&bytes), golden.file_digest, "the bytes of {} changed", golden.file);
        let grants: Vec<&str> = golden.grants.iter().map(String::as_str).collect();
        let subject = Subject::new(&golden.file, golden.format).allow(&grants);
        let content = run(&mut subject.command(&lab, "read")).succeeded().stdout;
        assert_eq!(sha256(&content), golden.content_digest, "{} is read as something else", golden.file);
    }
}

#[test]
fn a_hexdump_is_turned_back() {
    let dump = "00000000  61 62 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |ab..............|\n\
                00000010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n\
                *\n\
                00000040  7c 0a                                             ||.|\n\
                00000042\n";
    let mut expected = vec![0; 0x42];
    expected[..2].copy_from_slice(b"ab");
    expected[0x40..].copy_from_slice(b"|\n");
    assert_eq!(from_hexdump(dump), expected);
}
