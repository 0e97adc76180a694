//! The catalogue: VMDK, in every kind that QEMU creates.

use crate::case::{Beyond, Case, Subject};
use crate::lab::{Lab, Pen};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const KINDS: [&str; 5] =
    ["monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

/// The files that the descriptor names, for `--allow`.
fn extents(kind: &str, count: usize) -> Vec<String> {
    match kind {
        "monolithicFlat" => vec!["a-flat.vmdk".to_owned()],
        "twoGbMaxExtentSparse" => (1..=count).map(|part| format!("a-s{part:03}.vmdk")).collect(),
        "twoGbMaxExtentFlat" => (1..=count).map(|part| format!("a-f{part:03}.vmdk")).collect(),
        _ => Vec::new(),
    }
}

fn subject(kind: &str, count: usize) -> Subject {
    let extents = extents(kind, count);
    let names: Vec<&str> = extents.iter().map(String::as_str).collect();
    let beyond: &[Beyond] = if kind.ends_with("Flat") { &[] } else { &[Beyond::SparseVmdk] };
    Subject::new("a.vmdk", "vmdk").allow(&names).beyond(beyond)
}

fn converted(lab: &Lab, kind: &str, size: u64, places: &[(u64, usize)]) {
    lab.raw("disk.raw", size, places);
    lab.qemu_img(&format!("convert -t unsafe -f raw -O vmdk -o subformat={kind} disk.raw a.vmdk"));
}

/// What the line of a file about itself calls it, in encodings and spellings that other systems have.
const OTHER_NAMES: [(&str, &[u8]); 2] = [("in Latin-1", b"\xe9.vmdk"), ("with a quote", b"\".vmdk")];

/// Has a file that is the whole disk call itself otherwise in its descriptor.
fn rename_inside(lab: &Lab, image: &str, name: &[u8]) {
    let head = std::fs::read(lab.path(image)).unwrap();
    let old = format!("SPARSE \"{image}\"");
    let at = head.windows(old.len()).position(|bytes| bytes == old.as_bytes()).expect("a line about the file");
    let mut line = [b"SPARSE \"", name, b"\""].concat();
    line.resize(old.len(), b' ');
    lab.poke(image, at as u64, &line);
}

/// VMDK images.
pub(crate) fn vmdk() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in KINDS {
        cases.push(Case::new(format!("vmdk {kind}: converted"), move |lab| {
            let size = 3 * MIB + 1536;
            converted(lab, kind, size, &[(0, 300_000), (1_500_160, 200_000), (size - 512, 512)]);
            subject(kind, 1)
        }));
        cases.push(Case::new(format!("vmdk {kind}: one sector"), move |lab| {
            converted(lab, kind, 512, &[(0, 512)]);
            subject(kind, 1)
        }));
        cases.push(Case::new(format!("vmdk {kind}: empty"), move |lab| {
            lab.qemu_img(&format!("create -q -f vmdk -o subformat={kind} a.vmdk 40M"));
            subject(kind, 1)
        }));
        // QEMU writes into streams only what was never written.
        if kind != "streamOptimized" {
            cases.push(Case::new(format!("vmdk {kind}: written in place"), move |lab| {
                let size = 3 * MIB + 1536;
                lab.qemu_img(&format!("create -q -f vmdk -o subformat={kind} a.vmdk {size}"));
                Pen::new(lab, "vmdk", "a.vmdk", size, 64 * KIB).scattered(16).done();
                subject(kind, 1)
            }));
        }
    }
    // More than one part, and data across the boundary between two.
    let size = 2 * GIB + MIB;
    for kind in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        cases.push(Case::new(format!("vmdk {kind}: above 2 GiB"), move |lab| {
            converted(lab, kind, size, &[(0, 512), (2 * GIB - 66_048, 200_192), (size - 512, 512)]);
            subject(kind, 2)
        }));
    }
    for zeroed in ["off", "on"] {
        cases.push(Case::new(format!("vmdk with a parent, zeroed_grain={zeroed}"), move |lab| {
            let size = 3 * MIB;
            lab.directory("parents");
            lab.raw("disk.raw", size, &[(0, 1 << 20), (2 << 20, 500_000)]);
            lab.qemu_img("convert -t unsafe -f raw -O vmdk disk.raw parents/base.vmdk");
            lab.qemu_img(&format!("create -q -f vmdk -o zeroed_grain={zeroed} -b parents/base.vmdk -F vmdk a.vmdk"));
            let mut pen = Pen::new(lab, "vmdk", "a.vmdk", size, 64 * KIB).scattered(6);
            if zeroed == "on" {
                pen = pen.zeroes(6);
            }
            pen.done();
            Subject::new("a.vmdk", "vmdk").allow(&["parents"]).beyond(&[Beyond::SparseVmdk, Beyond::VmdkParent])
        }));
    }
    for (what, name) in OTHER_NAMES {
        for kind in ["monolithicSparse", "streamOptimized"] {
            cases.push(Case::new(format!("vmdk {kind}: a name of its own {what}"), move |lab| {
                converted(lab, kind, MIB, &[(0, 300_000)]);
                rename_inside(lab, "a.vmdk", name);
                subject(kind, 1)
            }));
        }
        cases.push(Case::new(format!("vmdk with a parent with a name of its own {what}"), move |lab| {
            lab.raw("disk.raw", MIB, &[(0, 300_000)]);
            lab.qemu_img("convert -t unsafe -f raw -O vmdk disk.raw b.vmdk");
            rename_inside(lab, "b.vmdk", name);
            lab.qemu_img("create -q -f vmdk -b b.vmdk -F vmdk a.vmdk");
            Pen::new(lab, "vmdk", "a.vmdk", MIB, 64 * KIB).scattered(3).done();
            Subject::new("a.vmdk", "vmdk").allow(&["b.vmdk"]).beyond(&[Beyond::SparseVmdk, Beyond::VmdkParent])
        }));
    }
    cases.push(Case::new("vmdk with a parent that has a parent", |lab| {
        lab.raw("disk.raw", 2 * MIB, &[(0, 1 << 20)]);
        lab.qemu_img("convert -t unsafe -f raw -O vmdk -o subformat=twoGbMaxExtentSparse disk.raw base.vmdk");
        lab.qemu_img("create -q -f vmdk -b base.vmdk -F vmdk middle.vmdk");
        Pen::new(lab, "vmdk", "middle.vmdk", 2 * MIB, 64 * KIB).scattered(4).done();
        lab.qemu_img("create -q -f vmdk -b middle.vmdk -F vmdk a.vmdk");
        Pen::new(lab, "vmdk", "a.vmdk", 2 * MIB, 64 * KIB).scattered(3).done();
        Subject::new("a.vmdk", "vmdk").allow(&["."]).beyond(&[Beyond::SparseVmdk, Beyond::VmdkParent])
    }));
    cases
}
