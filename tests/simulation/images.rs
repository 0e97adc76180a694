//! The images that sequences start from: one of each kind, made by QEMU, copied for each sequence.

use std::path::{Path, PathBuf};

use blockhouse_tests::noise;

use crate::oracles;

const KIB: u64 = 1 << 10;

/// A kind of image.
pub(crate) struct Template {
    pub(crate) name: &'static str,
    /// Options of `qemu-img create`.
    options: &'static str,
    pub(crate) cluster: u64,
    size: u64,
    /// The backing file and its format.
    pub(crate) below: Option<(&'static str, &'static str)>,
    before: &'static [Before],
    /// Whether native imago reads it: neither zstd nor extended L2.
    pub(crate) imago: bool,
}

impl Template {
    pub(crate) fn is_version_2(&self) -> bool {
        self.options.contains("compat=0.10")
    }

    /// Bits of a reference count.
    pub(crate) fn refcount_bits(&self) -> u32 {
        let stated = self.options.split(',').find_map(|option| option.strip_prefix("refcount_bits="));
        stated.map_or(16, |bits| bits.parse().unwrap())
    }
}

/// What is done to an image before it is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    /// Some data and some zeroes.
    Data,
    /// Compressed clusters all over.
    Packed,
    Snapshot,
}

use Before::{Data, Packed, Snapshot};

const RAW: Option<(&str, &str)> = Some(("base.raw", "raw"));
const PACKED: Option<(&str, &str)> = Some(("packed.qcow2", "qcow2"));
const CHAIN: Option<(&str, &str)> = Some(("middle.qcow2", "qcow2"));

const fn template(
    name: &'static str,
    options: &'static str,
    (cluster, size): (u64, u64),
    below: Option<(&'static str, &'static str)>,
    before: &'static [Before],
) -> Template {
    Template { name, options, cluster: cluster * KIB / 2, size: size * KIB, below, before, imago: true }
}

const fn beyond_imago(mut template: Template) -> Template {
    template.imago = false;
    template
}

/// Cluster sizes are in half KiB, sizes of disks in KiB. Few disks are whole clusters.
const TEMPLATES: &[Template] = &[
    template("512", "cluster_size=512", (1, 300), None, &[]),
    template("512, 1 bit", "cluster_size=512,refcount_bits=1", (1, 400), RAW, &[]),
    template("512, 64 bits", "cluster_size=512,refcount_bits=64", (1, 1100), None, &[Data]),
    template("512, chain", "cluster_size=512,refcount_bits=8", (1, 900), CHAIN, &[Data]),
    template("1k, 4 bits", "cluster_size=1k,refcount_bits=4", (2, 700), PACKED, &[]),
    template("1k, snapshots", "cluster_size=1k", (2, 500), None, &[Data, Snapshot, Data, Snapshot]),
    template("2k, 2 bits, packed", "cluster_size=2k,refcount_bits=2", (4, 800), None, &[Packed]),
    template("2k, 32 bits", "cluster_size=2k,refcount_bits=32", (4, 2050), RAW, &[Data]),
    template("4k", "cluster_size=4k", (8, 2050), None, &[]),
    template("4k, overlay", "cluster_size=4k", (8, 1500), PACKED, &[Data]),
    template("4k, packed", "cluster_size=4k", (8, 1500), None, &[Packed, Data]),
    template("4k, snapshot and base", "cluster_size=4k,refcount_bits=16", (8, 1001), CHAIN, &[Data, Snapshot]),
    template("4k, version 2", "compat=0.10,cluster_size=4k", (8, 1200), None, &[Data]),
    template("4k, version 2, snapshot", "compat=0.10,cluster_size=4k", (8, 900), None, &[Data, Snapshot]),
    template("1k, version 2, overlay", "compat=0.10,cluster_size=1k", (2, 600), CHAIN, &[Data]),
    template("8k, lazy", "cluster_size=8k,lazy_refcounts=on", (16, 3000), RAW, &[Data]),
    beyond_imago(template(
        "8k, zstd",
        "cluster_size=8k,compression_type=zstd",
        (16, 2000),
        None,
        &[Packed, Data, Snapshot],
    )),
    template("16k, packed, snapshot", "cluster_size=16k", (32, 2000), None, &[Packed, Snapshot, Data]),
    beyond_imago(template("16k, extended", "cluster_size=16k,extended_l2=on", (32, 1801), None, &[Data])),
    beyond_imago(template("16k, extended, chain", "cluster_size=16k,extended_l2=on", (32, 2500), CHAIN, &[Data])),
    beyond_imago(template(
        "32k, extended, packed, snapshot",
        "cluster_size=32k,extended_l2=on",
        (64, 2500),
        None,
        &[Packed, Snapshot, Data],
    )),
    template("32k", "cluster_size=32k,refcount_bits=1", (64, 4001), PACKED, &[]),
    template("64k", "cluster_size=64k", (128, 8192), None, &[]),
    template("64k, overlay", "cluster_size=64k", (128, 5000), CHAIN, &[Data]),
    template("64k, version 2, overlay", "compat=0.10,cluster_size=64k", (128, 3001), RAW, &[]),
    template("64k, lazy, packed", "cluster_size=64k,lazy_refcounts=on", (128, 3000), PACKED, &[Packed]),
    beyond_imago(template("128k, extended", "cluster_size=128k,extended_l2=on", (256, 6001), RAW, &[Data])),
    template("256k", "cluster_size=256k,refcount_bits=64", (512, 7001), CHAIN, &[Data, Snapshot]),
    template("1M", "cluster_size=1M", (2048, 8001), RAW, &[]),
    template("2M", "cluster_size=2M", (4096, 8001), PACKED, &[Data]),
    template("512, prealloc", "cluster_size=512,preallocation=metadata", (1, 600), None, &[]),
    template("64k, prealloc", "cluster_size=64k,preallocation=falloc", (128, 2001), None, &[]),
];

/// A template as a file, and what it holds.
pub(crate) struct Made {
    pub(crate) template: &'static Template,
    pub(crate) path: PathBuf,
    pub(crate) content: Vec<u8>,
    /// Snapshots by name.
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
}

/// Bytes that compress to about a half, in some places; elsewhere zeroes.
fn letters(seed: u64, length: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = noise(seed, length as usize).into_iter().map(|byte| b'a' + (byte & 15)).collect();
    for piece in bytes.chunks_mut(48 << 10).skip(2).step_by(3) {
        piece.fill(0);
    }
    bytes
}

/// Writes and zeroes of `qemu-io`, scattered over a disk.
fn scattered(size: u64, cluster: u64, seed: u64) -> Vec<String> {
    let mut commands = Vec::new();
    for number in 0..8u64 {
        let offset = size * (2 * number + seed % 2) / 17 / 512 * 512;
        let length = (cluster * (1 + number % 3)).min(size / 12) / 512 * 512;
        commands.push(match number % 4 {
            3 => format!("write -q -z {offset} {length}"),
            _ => format!("write -q -P {} {offset} {length}", 1 + (seed + number) % 250),
        });
    }
    commands
}

/// Makes all of them in `directory`, with what lies below them.
pub(crate) fn make_all(directory: &Path) -> Vec<Made> {
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let img = |arguments: &[&str]| oracles::qemu_img(arguments).unwrap();
    let mut base = noise(1, 1700 << 10);
    base[300 << 10..500 << 10].fill(0);
    std::fs::write(path("base.raw"), base).unwrap();
    std::fs::write(path("letters.raw"), letters(2, 3 << 20)).unwrap();
    let (packed, middle) = (path("packed.qcow2"), path("middle.qcow2"));
    img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", &path("letters.raw"), &packed]);
    img(&["create", "-q", "-f", "qcow2", "-b", &packed, "-F", "qcow2", "-o", "cluster_size=2k", &middle, "2500k"]);
    oracles::qemu_io(&middle, &scattered(2500 << 10, 6 << 10, 3)).unwrap();

    let mut all = Vec::new();
    for (number, template) in TEMPLATES.iter().enumerate() {
        let image = path(&format!("template-{number}.qcow2"));
        let size = template.size.to_string();
        let below = template.below.map(|(name, format)| (path(name), format));
        let mut backing = Vec::new();
        if let Some((name, format)) = &below {
            backing = vec!["-b", name, "-F", format];
        }
        if template.before.contains(&Packed) {
            let content = path("content.raw");
            std::fs::write(&content, letters(number as u64, template.size)).unwrap();
            let mut arguments = vec!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", template.options];
            // Of `convert` that is another letter.
            if let Some((name, format)) = &below {
                arguments.extend(["-B", name, "-F", format]);
            }
            img(&[&arguments[..], &[&content, &image]].concat());
        } else {
            let arguments = ["create", "-q", "-f", "qcow2", "-o", template.options];
            img(&[&arguments[..], &backing, &[&image, &size]].concat());
        }
        let mut snapshots = Vec::new();
        for (step, before) in template.before.iter().enumerate() {
            match before {
                Data => {
                    let commands = scattered(template.size, template.cluster, (number + step) as u64);
                    oracles::qemu_io(&image, &commands).unwrap();
                }
                Packed => {}
                Snapshot => {
                    let name = format!("before-{step}");
                    img(&["snapshot", "-c", &name, &image]);
                    snapshots.push((name, oracles::content(Path::new(&image), None).unwrap()));
                }
            }
        }
        let path = PathBuf::from(image);
        oracles::check(&path).unwrap();
        let content = oracles::content(&path, None).unwrap();
        assert_eq!(content.len() as u64, template.size, "{}", template.name);
        all.push(Made { template, path, content, snapshots });
    }
    all
}
