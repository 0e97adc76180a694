//! The catalogue: chains of images, and raw images by themselves.

use crate::case::{Beyond, Case, Subject};
use crate::lab::{Lab, Pen};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// An overlay, created and drawn on. `reference` is the backing file's name as the image has it.
fn overlay(lab: &Lab, image: &str, options: &str, reference: &str, format: &str, size: u64, cluster: u64) {
    let create =
        format!("create -q -f qcow2 -o cluster_size={cluster}{options} -b {reference} -F {format} {image} {size}");
    lab.qemu_img(&create);
    Pen::new(lab, "qcow2", image, size, cluster).scattered(5).zeroes(3).discards(1).done();
}

/// A qcow2 image without a backing file.
fn base(lab: &Lab, image: &str, options: &str, size: u64, cluster: u64) {
    lab.qemu_img(&format!("create -q -f qcow2 -o cluster_size={cluster}{options} {image} {size}"));
    Pen::new(lab, "qcow2", image, size, cluster).everything().done();
}

/// Backing chains.
pub(crate) fn chains() -> Vec<Case> {
    let mut cases = vec![
        Case::new("chain of 2: relative, raw below", |lab| {
            lab.raw("base.raw", 3 * MIB, &[(0, 1 << 20), (2 << 20, 70_000)]);
            overlay(lab, "a.qcow2", "", "base.raw", "raw", 3 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.raw"])
        }),
        Case::new("chain of 2: raw below, of an odd size, shorter", |lab| {
            lab.write("base.raw", &blockhouse_tests::noise(1, 1_000_001));
            overlay(lab, "a.qcow2", "", "base.raw", "raw", 3 * MIB, 4 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.raw"])
        }),
        Case::new("chain of 2: relative, qcow2 below, directory granted", |lab| {
            base(lab, "base.qcow2", "", 3 * MIB, 64 * KIB);
            overlay(lab, "a.qcow2", "", "base.qcow2", "qcow2", 3 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["."])
        }),
        Case::new("chain of 2: absolute", |lab| {
            base(lab, "base.qcow2", ",compat=0.10", 3 * MIB, 4 * KIB);
            overlay(lab, "a.qcow2", ",compat=0.10", &lab.absolute("base.qcow2"), "qcow2", 3 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2"])
        }),
        Case::new("chain of 2: nested directory", |lab| {
            lab.directory("deep/er");
            base(lab, "deep/er/base.qcow2", "", 2 * MIB, 64 * KIB);
            overlay(lab, "a.qcow2", "", "deep/er/base.qcow2", "qcow2", 2 * MIB, 4 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["deep"])
        }),
        Case::new("chain of 2: dots", |lab| {
            lab.directory("over/lays");
            lab.directory("bases");
            base(lab, "bases/base.qcow2", "", 2 * MIB, 64 * KIB);
            overlay(lab, "over/lays/a.qcow2", "", "./../../bases/./base.qcow2", "qcow2", 2 * MIB, 64 * KIB);
            Subject::new("over/lays/a.qcow2", "qcow2").allow(&["bases"])
        }),
        Case::new("chain of 2: overlay longer than its base", |lab| {
            base(lab, "base.qcow2", "", MIB + 512, 64 * KIB);
            overlay(lab, "a.qcow2", "", "base.qcow2", "qcow2", 4 * MIB + 1536, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2"])
        }),
        Case::new("chain of 2: overlay shorter than its base", |lab| {
            base(lab, "base.qcow2", "", 4 * MIB, 4 * KIB);
            overlay(lab, "a.qcow2", "", "base.qcow2", "qcow2", MIB + 512, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2"])
        }),
        Case::new("chain of 2: nothing in the overlay", |lab| {
            base(lab, "base.qcow2", "", 2 * MIB, 64 * KIB);
            lab.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 a.qcow2");
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2"])
        }),
        Case::new("chain of 2: nothing in the base", |lab| {
            lab.qemu_img("create -q -f qcow2 base.qcow2 2M");
            overlay(lab, "a.qcow2", "", "base.qcow2", "qcow2", 2 * MIB, 4 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2"])
        }),
        Case::new("chain of 2: extended L2 over clusters of 512 bytes", |lab| {
            base(lab, "base.qcow2", "", MIB, 512);
            overlay(lab, "a.qcow2", ",extended_l2=on", "base.qcow2", "qcow2", 2 * MIB, 16 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2"]).beyond(&[Beyond::ExtendedL2])
        }),
        Case::new("chain of 2: the base has a data file", |lab| {
            lab.directory("data");
            base(lab, "base.qcow2", ",data_file=data/d.bin", 2 * MIB, 64 * KIB);
            overlay(lab, "a.qcow2", "", "base.qcow2", "qcow2", 2 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2", "data"])
        }),
        Case::new("chain of 3: the same name in three directories", |lab| {
            for directory in ["a", "a/b", "c"] {
                lab.directory(directory);
            }
            base(lab, "c/disk.qcow2", "", 2 * MIB, 4 * KIB);
            overlay(lab, "a/disk.qcow2", "", "../c/disk.qcow2", "qcow2", 2 * MIB, 64 * KIB);
            overlay(lab, "a/b/disk.qcow2", "", "../disk.qcow2", "qcow2", 2 * MIB, 64 * KIB);
            Subject::new("a/b/disk.qcow2", "qcow2").allow(&["a/disk.qcow2", "c"])
        }),
        Case::new("chain of 3: every layer has another size", |lab| {
            base(lab, "base.qcow2", "", 3 * MIB, 64 * KIB);
            overlay(lab, "middle.qcow2", "", "base.qcow2", "qcow2", MIB + 512, 4 * KIB);
            overlay(lab, "a.qcow2", "", "middle.qcow2", "qcow2", 5 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["."])
        }),
        Case::new("chain of 3: resized in the middle", |lab| {
            base(lab, "base.qcow2", "", 3 * MIB, 64 * KIB);
            overlay(lab, "middle.qcow2", "", "base.qcow2", "qcow2", 3 * MIB, 64 * KIB);
            lab.qemu_img("resize -q -f qcow2 --shrink middle.qcow2 1M");
            lab.qemu_img("resize -q -f qcow2 middle.qcow2 4M");
            overlay(lab, "a.qcow2", "", "middle.qcow2", "qcow2", 4 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["."])
        }),
        Case::new("chain of 4: absolute and relative names in turn", |lab| {
            lab.directory("x/y");
            let size = 2 * MIB;
            base(lab, "base.qcow2", "", size, 4 * KIB);
            overlay(lab, "x/1.qcow2", "", &lab.absolute("base.qcow2"), "qcow2", size, 64 * KIB);
            overlay(lab, "x/y/2.qcow2", "", "../1.qcow2", "qcow2", size, 64 * KIB);
            overlay(lab, "3.qcow2", "", &lab.absolute("x/y/2.qcow2"), "qcow2", size, 512);
            Subject::new("3.qcow2", "qcow2").allow(&["x", "base.qcow2"])
        }),
        Case::new("chain of 2: clusters of the overlay in a data file", |lab| {
            base(lab, "base.qcow2", "", 2 * MIB, 64 * KIB);
            overlay(lab, "a.qcow2", ",data_file=d.bin", "base.qcow2", "qcow2", 3 * MIB, 64 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.qcow2", "d.bin"])
        }),
        Case::new("chain of 2, rebased and committed", |lab| {
            let size = 2 * MIB;
            base(lab, "old.qcow2", "", size, 64 * KIB);
            base(lab, "new.qcow2", "", size - 512, 4 * KIB);
            overlay(lab, "a.qcow2", "", "old.qcow2", "qcow2", size, 64 * KIB);
            overlay(lab, "b.qcow2", "", "a.qcow2", "qcow2", size, 4 * KIB);
            lab.qemu_img("commit -q -t unsafe -f qcow2 b.qcow2");
            lab.qemu_img("rebase -q -t unsafe -f qcow2 -b new.qcow2 -F qcow2 a.qcow2");
            Subject::new("a.qcow2", "qcow2").allow(&["new.qcow2"])
        }),
        Case::new("chain of 5: versions and cluster sizes mixed, raw at the bottom", |lab| {
            lab.raw("l4.raw", 2 * MIB + 512, &[(512, 600_000), (1_500_160, 500_000)]);
            overlay(lab, "l3.qcow2", ",compat=0.10", "l4.raw", "raw", 2 * MIB + 512, 512);
            overlay(lab, "l2.qcow2", "", "l3.qcow2", "qcow2", 3 * MIB, 2 * MIB);
            overlay(lab, "l1.qcow2", ",compat=0.10", &lab.absolute("l2.qcow2"), "qcow2", 3 * MIB, 4 * KIB);
            overlay(lab, "l0.qcow2", "", "l1.qcow2", "qcow2", 3 * MIB + 1536, 64 * KIB);
            Subject::new("l0.qcow2", "qcow2").allow(&["l1.qcow2", "l2.qcow2", "l3.qcow2", "l4.raw"])
        }),
        Case::new("chain of 2: vmdk below", |lab| {
            lab.raw("disk.raw", 3 * MIB, &[(0, 1 << 20), (2 << 20, 70_000)]);
            lab.qemu_img("convert -t unsafe -f raw -O vmdk disk.raw base.vmdk");
            overlay(lab, "a.qcow2", "", "base.vmdk", "vmdk", 3 * MIB, 4 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["base.vmdk"]).beyond(&[Beyond::VmdkBacking])
        }),
        Case::new("chain of 3: split vmdk at the bottom", |lab| {
            lab.directory("vm");
            lab.raw("disk.raw", 3 * MIB, &[(0, 1 << 20), (2 << 20, 70_000)]);
            lab.qemu_img("convert -t unsafe -f raw -O vmdk -o subformat=twoGbMaxExtentFlat disk.raw vm/base.vmdk");
            overlay(lab, "middle.qcow2", "", "vm/base.vmdk", "vmdk", 3 * MIB, 64 * KIB);
            overlay(lab, "a.qcow2", "", "middle.qcow2", "qcow2", 3 * MIB, 4 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["vm", "middle.qcow2"]).beyond(&[Beyond::VmdkBacking])
        }),
    ];
    for (kind, beyond) in [("zlib", vec![]), ("zstd", vec![Beyond::Zstd])] {
        cases.push(Case::new(format!("chain of 3: compressed with {kind} in the middle"), move |lab| {
            let size = 2 * MIB;
            base(lab, "base.qcow2", "", size, 64 * KIB);
            lab.qemu_img(&format!(
                "create -q -f qcow2 -o compression_type={kind} -b base.qcow2 -F qcow2 middle.qcow2 {size}"
            ));
            Pen::new(lab, "qcow2", "middle.qcow2", size, 64 * KIB).everything_packed().done();
            overlay(lab, "a.qcow2", "", "middle.qcow2", "qcow2", size, 4 * KIB);
            Subject::new("a.qcow2", "qcow2").allow(&["."]).beyond(&beyond)
        }));
    }
    cases
}

/// Raw images.
pub(crate) fn raw() -> Vec<Case> {
    let mut cases: Vec<Case> = [0, 1, 512, 1000, 65_537, 1_000_001]
        .map(|size| {
            Case::new(format!("raw of {size} bytes"), move |lab| {
                lab.write("a.raw", &blockhouse_tests::noise(9, size));
                Subject::new("a.raw", "raw")
            })
        })
        .into();
    cases.push(Case::new("raw with holes", |lab| {
        lab.raw("a.raw", 5 * MIB, &[(4096, 100_000), (3 << 20, 4096), ((5 << 20) - 512, 512)]);
        Subject::new("a.raw", "raw")
    }));
    cases.push(Case::new("raw that looks like qcow2", |lab| {
        lab.write("secret", b"of another disk");
        lab.qemu_img(&format!("create -q -u -f qcow2 -b {} -F raw a.raw 1M", lab.absolute("secret")));
        Subject::new("a.raw", "raw")
    }));
    cases
}
