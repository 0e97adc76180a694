//! Images that their last writer did not close: QEMU with lazy reference counts, killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::process::Command;

use blockhouse_plugin::{Access, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, have_qemu};

#[test]
fn counts_are_made_anew_when_writing_begins() {
    if !have_qemu() {
        return;
    }
    for options in ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,refcount_bits=1"] {
        let lab = Lab::new();
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 4M"));
        // It ends without closing the image.
        let killed = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "write -P 8 3M 9k", "-c", "flush", "-c", "abort"])
            .arg("top.qcow2")
            .current_dir(lab.path("."))
            .output()
            .unwrap();
        assert!(!killed.status.success(), "{options}: qemu-io was to be killed");
        let mut model = vec![0; 4 << 20];
        model[..1 << 20].fill(7);
        model[3 << 20..(3 << 20) + (9 << 10)].fill(8);
        let path = lab.path("top.qcow2");

        // Read-only, nothing is repaired.
        let storage = lab.storage();
        let mut disk = storage.disk::<Qcow2>(&path).unwrap();
        assert!(disk.info.facts.iter().any(|fact| fact.name == "dirty" && fact.value == "yes"), "{options}");
        assert!(disk.read(0, model.len()).unwrap() == model);
        assert!(storage.take_changes(&path).is_empty());

        let mut disk = storage.disk_with::<Qcow2>(&path, Access::ReadWrite, |_| Ok(())).unwrap();
        disk.format.begin().unwrap();
        disk.write_over(1 << 20, &[9; 70_000], &mut |_, to| to.fill(0)).unwrap();
        model[1 << 20..(1 << 20) + 70_000].fill(9);
        disk.flush().unwrap();
        disk.format.finish().unwrap();
        lab.write("top.qcow2", &storage.bytes(&path));
        lab.qemu_img("check -f qcow2 top.qcow2");
        assert!(lab.oracle("top.qcow2", "") == model, "{options}");
        let disk = storage.disk::<Qcow2>(&path).unwrap();
        assert!(disk.info.facts.iter().any(|fact| fact.name == "dirty" && fact.value == "no"), "{options}");
    }
}
