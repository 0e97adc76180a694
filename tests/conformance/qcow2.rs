//! The catalogue: single qcow2 images, every feature crossed with sizes and patterns.

use crate::case::{Beyond, Case, Subject};
use crate::lab::{Lab, Pen, letters};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Cluster size, and a disk size that is no multiple of it, so that the last cluster is a part.
const SHAPES: [(u64, u64); 4] =
    [(512, 300 * KIB + 512), (4 * KIB, MIB + 3 * 512), (64 * KIB, 5 * MIB + 1536), (2 * MIB, 11 * MIB + 4096)];
/// The same for extended L2 entries, which need clusters of 16 KiB (subclusters of 512 bytes) at least.
const EXTENDED_SHAPES: [(u64, u64); 3] =
    [(16 * KIB, 2 * MIB + 512), (64 * KIB, 5 * MIB + 1536), (2 * MIB, 11 * MIB + 4096)];

/// A way to use a disk.
type Pattern = (&'static str, fn(Pen<'_>) -> Pen<'_>);

const EVERYTHING: Pattern = ("everything", |pen| pen.everything());
const PACKED: Pattern = ("packed", |pen| pen.everything_packed());
const SCATTERED: Pattern = ("scattered", |pen| pen.scattered(20));
const ZEROED: Pattern = ("full, then zeroed and discarded", |pen| pen.full().zeroes(8).discards(4));
const FULL: Pattern = ("full", |pen| pen.full());
const EMPTY: Pattern = ("empty", |pen| pen);

/// An image of its own, with nothing to grant.
fn single(options: &str, (cluster, size): (u64, u64), pattern: Pattern, beyond: &[Beyond]) -> Case {
    let options = format!("cluster_size={cluster},{options}");
    let beyond = beyond.to_vec();
    Case::new(format!("qcow2 {options} size={size}: {}", pattern.0), move |lab| {
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 {size}"));
        (pattern.1)(Pen::new(lab, "qcow2", "a.qcow2", size, cluster)).done();
        Subject::new("a.qcow2", "qcow2").beyond(&beyond)
    })
}

/// Cluster sizes, versions, sparse patterns.
pub(crate) fn plain() -> Vec<Case> {
    let mut cases = Vec::new();
    for compat in ["compat=0.10", "compat=1.1"] {
        for shape in SHAPES {
            cases.extend([EVERYTHING, ZEROED].map(|pattern| single(compat, shape, pattern, &[])));
        }
        cases.push(single(compat, SHAPES[1], SCATTERED, &[]));
        cases.push(single(compat, SHAPES[2], FULL, &[]));
        cases.push(single(compat, SHAPES[2], EMPTY, &[]));
    }
    cases
}

/// zlib and zstd.
pub(crate) fn compressed() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in SHAPES {
        cases.push(single("compat=0.10", shape, PACKED, &[]));
        cases.push(single("compat=1.1", shape, PACKED, &[]));
        cases.push(single("compression_type=zstd", shape, PACKED, &[Beyond::Zstd]));
    }
    // As images are shipped: written once, every cluster packed.
    for kind in ["zlib", "zstd"] {
        for cluster in [4 * KIB, 64 * KIB, 2 * MIB] {
            cases.push(Case::new(format!("qcow2 convert -c {kind} cluster_size={cluster}"), move |lab| {
                let mut disk = letters(cluster, 3 << 20);
                disk.resize(4 << 20, 0);
                disk.extend(blockhouse_tests::noise(cluster, (1 << 20) + 512));
                lab.write("disk.raw", &disk);
                lab.qemu_img(&format!(
                    "convert -t unsafe -c -f raw -O qcow2 -o compression_type={kind},cluster_size={cluster} disk.raw a.qcow2"
                ));
                let subject = Subject::new("a.qcow2", "qcow2");
                if kind == "zstd" { subject.beyond(&[Beyond::Zstd]) } else { subject }
            }));
        }
    }
    cases
}

/// Entries with a bitmap of subclusters.
pub(crate) fn extended_l2() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in EXTENDED_SHAPES {
        for pattern in [EVERYTHING, ZEROED, PACKED] {
            cases.push(single("extended_l2=on", shape, pattern, &[Beyond::ExtendedL2]));
        }
        let zstd = "extended_l2=on,compression_type=zstd";
        cases.push(single(zstd, shape, PACKED, &[Beyond::ExtendedL2, Beyond::Zstd]));
    }
    cases.push(single("extended_l2=on,preallocation=metadata", EXTENDED_SHAPES[1], EVERYTHING, &[Beyond::ExtendedL2]));
    cases
}

/// What changes the layout of the file and not the content of the disk.
pub(crate) fn layout() -> Vec<Case> {
    let mut cases = Vec::new();
    for compat in ["0.10", "1.1"] {
        for preallocation in ["metadata", "falloc", "full"] {
            let options = format!("compat={compat},preallocation={preallocation}");
            cases.push(single(&options, SHAPES[1], EVERYTHING, &[]));
        }
    }
    cases.push(single("preallocation=metadata", SHAPES[2], EMPTY, &[]));
    cases.push(single("preallocation=metadata", SHAPES[0], ZEROED, &[]));
    // A refcount of one bit cannot count clusters that share a sector, so nothing is compressed there.
    cases.push(single("refcount_bits=1", SHAPES[1], EVERYTHING, &[]));
    cases.push(single("refcount_bits=64", SHAPES[1], PACKED, &[]));
    cases.push(single("refcount_bits=8,lazy_refcounts=on", SHAPES[1], EVERYTHING, &[]));
    cases.push(single("lazy_refcounts=on", SHAPES[2], PACKED, &[]));
    cases.push(Case::new("qcow2 with bitmaps", |lab| {
        lab.qemu_img("create -q -f qcow2 -o cluster_size=4k a.qcow2 1M");
        lab.qemu_img("bitmap --add a.qcow2 one");
        Pen::new(lab, "qcow2", "a.qcow2", MIB, 4 * KIB).everything_packed().done();
        lab.qemu_img("bitmap --add --disable a.qcow2 two");
        Subject::new("a.qcow2", "qcow2")
    }));
    cases
}

/// Disks of no bytes, one sector, and sizes that are no round number.
pub(crate) fn sizes() -> Vec<Case> {
    let mut cases = Vec::new();
    for compat in ["compat=0.10", "compat=1.1"] {
        cases.push(single(compat, (64 * KIB, 0), EMPTY, &[]));
        cases.push(single(compat, (64 * KIB, 512), EMPTY, &[]));
        cases.push(single(compat, (512, 512), FULL, &[]));
        cases.push(single(compat, (4 * KIB, 3 * 512), FULL, &[]));
        // QEMU rounds up to whole sectors.
        cases.push(single(compat, (4 * KIB, 1_000_001), EMPTY, &[]));
    }
    cases.push(single("extended_l2=on", (64 * KIB, 512), FULL, &[Beyond::ExtendedL2]));
    // Mostly nothing, over several L1 entries.
    cases.push(Case::new("qcow2 above 2 GiB with a few clusters", |lab| {
        let size = (2 << 30) + MIB;
        lab.qemu_img(&format!("create -q -f qcow2 -o cluster_size=4k a.qcow2 {size}"));
        Pen::new(lab, "qcow2", "a.qcow2", size, 4096).fill(0, 512).fill((2 << 30) - 512, 1024).tail().done();
        Subject::new("a.qcow2", "qcow2")
    }));
    cases
}

/// Disks that grew and shrank after they were used.
pub(crate) fn resized() -> Vec<Case> {
    let shapes = [
        ("compat=0.10,cluster_size=4k", 4 * KIB, vec![]),
        ("cluster_size=64k", 64 * KIB, vec![]),
        ("cluster_size=16k,extended_l2=on", 16 * KIB, vec![Beyond::ExtendedL2]),
    ];
    let mut cases = Vec::new();
    for (options, cluster, beyond) in shapes {
        for shrink in [false, true] {
            let beyond = beyond.clone();
            let how = if shrink { "shrunk" } else { "grown, used, grown with preallocation" };
            cases.push(Case::new(format!("qcow2 {options}: {how}"), move |lab| {
                let size = 2 * MIB;
                lab.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 {size}"));
                Pen::new(lab, "qcow2", "a.qcow2", size, cluster).packed(4).everything().done();
                if shrink {
                    lab.qemu_img("resize -q -f qcow2 --shrink a.qcow2 1049088");
                } else {
                    lab.qemu_img("resize -q -f qcow2 a.qcow2 5M");
                    Pen::new(lab, "qcow2", "a.qcow2", 5 * MIB, cluster).everything().done();
                    lab.qemu_img("resize -q -f qcow2 --preallocation=metadata a.qcow2 6M");
                }
                Subject::new("a.qcow2", "qcow2").beyond(&beyond)
            }));
        }
    }
    cases
}

/// Clusters in a file of their own.
pub(crate) fn data_files() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [("cluster_size=4k", 4 * KIB), ("cluster_size=64k", 64 * KIB), ("extended_l2=on", 64 * KIB)];
    for (options, cluster) in shapes {
        for raw in ["on", "off"] {
            let beyond = if options.starts_with("ext") { vec![Beyond::ExtendedL2] } else { vec![] };
            cases.push(Case::new(format!("qcow2 {options},data_file=data/d.bin,data_file_raw={raw}"), move |lab| {
                let size = 3 * MIB + 512;
                lab.directory("data");
                lab.qemu_img(&format!(
                    "create -q -f qcow2 -o {options},data_file=data/d.bin,data_file_raw={raw} a.qcow2 {size}"
                ));
                Pen::new(lab, "qcow2", "a.qcow2", size, cluster).everything().done();
                Subject::new("a.qcow2", "qcow2").allow(&["data/d.bin"]).beyond(&beyond)
            }));
        }
    }
    cases.push(Case::new("qcow2 data_file by its absolute name", |lab| {
        lab.directory("images");
        let file = lab.absolute("d.bin");
        lab.qemu_img(&format!("create -q -f qcow2 -o data_file={file} images/a.qcow2 2M"));
        Pen::new(lab, "qcow2", "images/a.qcow2", 2 * MIB, 64 * KIB).everything().done();
        Subject::new("images/a.qcow2", "qcow2").allow(&["d.bin"])
    }));
    cases
}

/// Earlier states inside an image, by id and by name.
pub(crate) fn snapshots() -> Vec<Case> {
    fn make(lab: &Lab, options: &str, cluster: u64) {
        let size = 2 * MIB;
        lab.raw("base.raw", 3 * MIB / 2, &[(0, 1 << 20)]);
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw a.qcow2 {size}"));
        lab.qemu_img("snapshot -q -c empty a.qcow2");
        Pen::new(lab, "qcow2", "a.qcow2", size, cluster).packed(6).everything().done();
        lab.qemu_img("snapshot -q -c 1st a.qcow2");
        Pen::new(lab, "qcow2", "a.qcow2", size, cluster).discards(2).fill(cluster, 4 * cluster).done();
        lab.qemu_img("snapshot -q -c second a.qcow2");
        Pen::new(lab, "qcow2", "a.qcow2", size, cluster).zeroes(6).fill(0, cluster).done();
    }
    let shapes = [
        ("compat=0.10,cluster_size=4k", 4 * KIB, vec![]),
        ("cluster_size=64k", 64 * KIB, vec![]),
        ("cluster_size=16k,extended_l2=on", 16 * KIB, vec![Beyond::ExtendedL2]),
    ];
    let mut cases = Vec::new();
    for (options, cluster, beyond) in shapes {
        // The current state of an image with snapshots shares clusters with them.
        cases.push(Case::new(format!("qcow2 {options} with snapshots: now"), move |lab| {
            make(lab, options, cluster);
            Subject::new("a.qcow2", "qcow2").allow(&["base.raw"]).beyond(&beyond)
        }));
        for (key, name) in [("1", "empty"), ("1st", "1st"), ("3", "second"), ("second", "second")] {
            cases.push(Case::new(format!("qcow2 {options}: --snapshot {key}"), move |lab| {
                make(lab, options, cluster);
                Subject::new("a.qcow2", "qcow2").allow(&["base.raw"]).snapshot(key, &format!("snapshot.name={name}"))
            }));
        }
    }
    cases
}
