//! The images that writing starts from: one of each kind, made by QEMU.

use crate::SECTOR;
use crate::support::Lab;

const KIB: u64 = 1 << 10;

/// A kind of image that writing starts from.
pub(crate) struct Template {
    pub(crate) name: &'static str,
    options: &'static str,
    pub(crate) cluster: u64,
    /// The size of the disk in bytes: never a multiple of the largest clusters.
    pub(crate) size: u64,
    pub(crate) backing: bool,
    /// Done to it before: `compress` the content, write some `data`, take a `snapshot`, add a `bitmap`, let its
    /// writer `die`.
    before: &'static str,
}

impl Template {
    /// Version 2 has no zero clusters that hide a backing file.
    pub(crate) fn refuses_zeroes(&self) -> bool {
        self.backing && self.options.contains("compat=0.10")
    }

    pub(crate) fn has_data_file(&self) -> bool {
        self.options.contains("data_file")
    }

    /// Whether snapshots of it can be made: counts of one bit cannot say two.
    pub(crate) fn can_share(&self) -> bool {
        !self.options.contains("refcount_bits=1") && !self.has_data_file()
    }
}

const fn template(
    name: &'static str,
    options: &'static str,
    (cluster, size): (u64, u64),
    backing: bool,
    before: &'static str,
) -> Template {
    Template { name, options, cluster, size, backing, before }
}

pub(crate) const TEMPLATES: &[Template] = &[
    template("plain", "cluster_size=4k", (4 * KIB, 1024 * KIB), false, ""),
    template("tiny", "cluster_size=512,refcount_bits=64", (512, 300 * KIB), false, ""),
    template("bits1", "cluster_size=512,refcount_bits=1", (512, 200 * KIB), true, ""),
    template("bits4", "cluster_size=1k,refcount_bits=4", (KIB, 200 * KIB), true, "data"),
    template("v2", "compat=0.10,cluster_size=4k", (4 * KIB, 500 * KIB), false, "data"),
    template("v2-overlay", "compat=0.10,cluster_size=8k", (8 * KIB, 400 * KIB), true, "data"),
    template("overlay", "cluster_size=64k", (64 * KIB, 1029 * KIB), true, ""),
    template("lazy", "cluster_size=8k,lazy_refcounts=on", (8 * KIB, 700 * KIB), true, "data"),
    template("dirty", "cluster_size=4k,lazy_refcounts=on", (4 * KIB, 300 * KIB), true, "data die"),
    template("extended", "cluster_size=16k,extended_l2=on", (16 * KIB, 900 * KIB), true, "data"),
    template(
        "preallocated",
        "cluster_size=16k,extended_l2=on,preallocation=metadata",
        (16 * KIB, 900 * KIB),
        true,
        "data",
    ),
    template("snapshot", "cluster_size=4k", (4 * KIB, 400 * KIB), false, "data snapshot"),
    template("snapshots", "cluster_size=1k,refcount_bits=8", (KIB, 200 * KIB), true, "data snapshot snapshot"),
    template("packed", "cluster_size=4k", (4 * KIB, 400 * KIB), false, "compress"),
    template(
        "packed-snapshot",
        "cluster_size=16k,compression_type=zstd",
        (16 * KIB, 400 * KIB),
        false,
        "compress snapshot",
    ),
    template("bitmap", "cluster_size=4k", (4 * KIB, 300 * KIB), true, "data bitmap"),
    template("data-file", "cluster_size=4k,data_file=d.bin", (4 * KIB, 300 * KIB), false, "data"),
];

/// A sector that names who wrote it. 0 is a sector of zeroes.
fn sector(id: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&id.to_le_bytes());
    }
    bytes
}

pub(crate) fn sectors(ids: impl IntoIterator<Item = u64>) -> Vec<u8> {
    ids.into_iter().flat_map(sector).collect()
}

/// Who wrote a sector, if one write did it all.
pub(crate) fn writer_of(sector: &[u8]) -> Option<u64> {
    let repeats = sector.len() == SECTOR && sector[8..] == sector[..SECTOR - 8];
    repeats.then(|| u64::from_le_bytes(sector[..8].try_into().unwrap()))
}

/// An image ready to be written: its bytes, those of its other files, and who wrote each sector.
pub(crate) struct Made {
    pub(crate) image: Vec<u8>,
    /// Of a file of its own, where there is one.
    pub(crate) data: Vec<u8>,
    pub(crate) base: Vec<u8>,
    pub(crate) ids: Vec<u64>,
    /// The ids of the snapshots in it, which hold what the disk does.
    pub(crate) snapshots: Vec<String>,
}

/// Whether the header, which version 2 ends early, has the mark of images that were not closed.
pub(crate) fn is_dirty(image: &[u8]) -> bool {
    image[7] > 2 && image[79] & 1 != 0
}

pub(crate) fn make(template: &Template) -> Made {
    let lab = Lab::new();
    let count = template.size / SECTOR as u64;
    // The base is shorter than the disk, and has holes.
    let base_ids: Vec<u64> = (0..count * 3 / 4).map(|n| if n / 50 % 3 == 1 { 0 } else { 1_000_000 + n }).collect();
    let base = sectors(base_ids.iter().copied());
    lab.write("base.raw", &base);
    let mut ids: Vec<u64> = if template.backing { base_ids } else { Vec::new() };
    ids.resize(count as usize, 0);
    let backing = if template.backing { "-b base.raw -F raw" } else { "" };
    if template.before.contains("compress") {
        ids = (0..count).map(|n| if n / 40 % 4 == 2 { 0 } else { 2_000_000 + n }).collect();
        lab.write("full.raw", &sectors(ids.iter().copied()));
        lab.qemu_img(&format!("convert -c -f raw -O qcow2 -o {} full.raw top.qcow2", template.options));
    } else {
        lab.qemu_img(&format!("create -q -f qcow2 -o {} {backing} top.qcow2 {}", template.options, template.size));
    }
    if template.before.contains("data") {
        // Sectors of one repeated byte are sectors with an id, too.
        let mut commands = Vec::new();
        for (number, at) in [0, template.size / 3, template.size / 2].into_iter().enumerate() {
            let (at, length) = (at - at % 4096, 3 * 4096);
            let byte = 17 + number as u8;
            commands.push(format!("write -P {byte} {at} {length}"));
            for id in &mut ids[at as usize / SECTOR..(at + length) as usize / SECTOR] {
                *id = u64::from_le_bytes([byte; 8]);
            }
        }
        if template.before.contains("die") {
            lab.qemu_io_killed("top.qcow2", &commands);
        } else {
            lab.qemu_io("top.qcow2", &commands);
        }
    }
    if template.before.contains("bitmap") {
        lab.qemu_img("bitmap --add -g 64k top.qcow2 b0");
    }
    let mut snapshots = Vec::new();
    for number in 0..template.before.matches("snapshot").count() {
        lab.qemu_img(&format!("snapshot -c s{number} top.qcow2"));
        snapshots.push((number + 1).to_string());
    }
    let image = lab.bytes("top.qcow2");
    // QEMU's own marks: what the templates are for.
    assert_eq!(is_dirty(&image), template.before.contains("die"), "{}: dirty", template.name);
    assert_eq!(image[7] > 2 && image[95] & 1 != 0, template.before.contains("bitmap"), "{}: bitmaps", template.name);
    let data = if template.has_data_file() { lab.bytes("d.bin") } else { Vec::new() };
    Made { image, data, base, ids, snapshots }
}
