//! A flush that failed half-way, and the next one: what the first may have brought into the file is in the
//! file, whatever order the second one has in mind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::process::Command;

use blockhouse_plugin::testing::Disk;
use blockhouse_plugin::{Access, Result, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, Random, have_qemu, torn};

/// States of each cut.
const STATES: usize = 4;

fn write(disk: &mut Disk<Qcow2>, offset: u64, length: usize) -> Result<()> {
    disk.write_over(offset, &vec![7; length], &mut |_, to| to.fill(0))
}

#[test]
fn tables_that_a_failed_flush_named_are_named() {
    if !have_qemu() {
        return;
    }
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=1k,refcount_bits=4 top.qcow2 400k");
    // A table that is there already, behind the L1 table in the file.
    lab.qemu_io("top.qcow2", &["write -P 5 0 3k".to_owned()]);
    let path = lab.path("top.qcow2");
    let before = lab.bytes("top.qcow2");
    let mut random = Random(3);
    let mut failed = 0;
    for healthy in 0..12 {
        let storage = lab.storage();
        let mut disk = storage.disk_with::<Qcow2>(&path, Access::ReadWrite, |_| Ok(())).unwrap();
        disk.format.begin().unwrap();
        // The flush writes what names a new table, and then the old table.
        write(&mut disk, 5 << 10, 2048).unwrap();
        write(&mut disk, 200 << 10, 2048).unwrap();
        storage.fail_after(&path, Some(healthy));
        failed += u32::from(disk.flush().is_err());
        storage.fail_after(&path, None);
        let first = storage.take_changes(&path);
        // More in the same tables. A sync that failed ends writing.
        let more = write(&mut disk, 40 << 10, 20 << 10).and_then(|()| write(&mut disk, 240 << 10, 20 << 10));
        if more.and_then(|()| disk.flush()).is_err() {
            continue;
        }
        let changes = [first.clone(), storage.take_changes(&path)].concat();
        for cut in first.len()..=changes.len() {
            for _ in 0..STATES {
                let bytes = torn(&before, &changes[..cut], &mut random);
                lab.write("cut.qcow2", &bytes);
                let output = Command::new("qemu-img")
                    .args(["check", "-U", "-f", "qcow2", "--output=json", "cut.qcow2"])
                    .current_dir(lab.path("."))
                    .output()
                    .unwrap();
                let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                let wrong = ["corruptions", "check-errors"].map(|name| found[name].as_u64().unwrap_or(0));
                assert_eq!(wrong, [0, 0], "{healthy} changes before the failure, cut at {cut}: {found}");
            }
        }
    }
    assert!(failed >= 4, "{failed} flushes failed");
}
