//! The images that writing starts from: one of each kind, made by QEMU, copied for each use.

use std::path::{Path, PathBuf};

use blockhouse_tests::qemu_img;

pub(crate) const SECTOR: u64 = 512;

const KIB: u64 = 1 << 10;

/// A sector that names who wrote it. 0 is a sector of zeroes.
pub(crate) fn sector(id: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&id.to_le_bytes());
    }
    bytes
}

pub(crate) fn sectors(ids: impl IntoIterator<Item = u64>) -> Vec<u8> {
    ids.into_iter().flat_map(sector).collect()
}

/// What lies below an image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    Raw,
    /// Compressed qcow2: what is kept of it passes through the component.
    Packed,
}

impl Below {
    fn file(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Nothing => None,
            Self::Raw => Some(("base.raw", "raw")),
            Self::Packed => Some(("base.qcow2", "qcow2")),
        }
    }
}

/// A kind of image.
pub(crate) struct Template {
    pub(crate) name: &'static str,
    /// Options of `qemu-img create`.
    options: &'static str,
    pub(crate) cluster: u64,
    /// Of the disk, in bytes.
    pub(crate) size: u64,
    pub(crate) below: Below,
    /// Done to it before: `compress` the content, write some `data`, take a `snapshot`.
    before: &'static str,
}

impl Template {
    /// Whether a discard of whole clusters makes zeroes: version 2 has none that hide a backing file.
    pub(crate) fn discards_to_zero(&self) -> bool {
        self.below == Below::Nothing || !self.options.contains("compat=0.10")
    }
}

const fn template(
    name: &'static str,
    options: &'static str,
    (cluster, size): (u64, u64),
    below: Below,
    before: &'static str,
) -> Template {
    Template { name, options, cluster, size, below, before }
}

/// Few disks are whole clusters.
pub(crate) const TEMPLATES: &[Template] = &[
    template("plain", "cluster_size=4k", (4 * KIB, 1024 * KIB), Below::Nothing, ""),
    template("tiny", "cluster_size=512,refcount_bits=64", (512, 300 * KIB), Below::Nothing, ""),
    template("1 bit", "cluster_size=512,refcount_bits=1", (512, 200 * KIB), Below::Raw, ""),
    template("version 2", "compat=0.10,cluster_size=4k", (4 * KIB, 500 * KIB), Below::Nothing, "data"),
    template("version 2, overlay", "compat=0.10,cluster_size=8k", (8 * KIB, 400 * KIB), Below::Raw, "data"),
    template("overlay", "cluster_size=64k", (64 * KIB, 1029 * KIB), Below::Packed, ""),
    template("lazy", "cluster_size=8k,lazy_refcounts=on", (8 * KIB, 700 * KIB), Below::Raw, "data"),
    template("extended", "cluster_size=16k,extended_l2=on", (16 * KIB, 900 * KIB), Below::Packed, "data"),
    template("snapshot", "cluster_size=4k", (4 * KIB, 400 * KIB), Below::Nothing, "data snapshot"),
    template(
        "packed, snapshot",
        "cluster_size=16k,compression_type=zstd",
        (16 * KIB, 400 * KIB),
        Below::Nothing,
        "compress snapshot",
    ),
    template("large", "cluster_size=256k", (256 * KIB, 2049 * KIB), Below::Raw, "data"),
];

/// A template as bytes, and who wrote each sector. In the order of [`TEMPLATES`].
pub(crate) struct Made {
    pub(crate) image: Vec<u8>,
    pub(crate) ids: Vec<u64>,
}

/// The files below the images, and what is in them.
pub(crate) fn make_below(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    // Shorter than most disks, with holes.
    let raw = directory.join("base.raw");
    std::fs::write(&raw, sectors(base_ids())).unwrap();
    let packed = directory.join("base.qcow2");
    let options = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k"];
    qemu_img(options.iter().map(AsRef::as_ref).chain([raw.as_os_str(), packed.as_os_str()]));
    [raw, packed].map(|path| (path.clone(), std::fs::read(path).unwrap())).into()
}

fn base_ids() -> impl Iterator<Item = u64> {
    (0..600).map(|number| if number / 50 % 3 == 1 { 0 } else { 1_000_000 + number })
}

/// Makes one of each in `directory`, where [`make_below`] was.
pub(crate) fn make_all(directory: &Path) -> Vec<Made> {
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let mut all = Vec::new();
    for template in TEMPLATES {
        let top = path("template.qcow2");
        let count = template.size / SECTOR;
        let mut ids = Vec::new();
        if template.below != Below::Nothing {
            ids.extend(base_ids().take(count as usize));
        }
        ids.resize(count as usize, 0);
        if template.before.contains("compress") {
            ids = (0..count).map(|number| if number / 40 % 4 == 2 { 0 } else { 2_000_000 + number }).collect();
            let full = path("full.raw");
            std::fs::write(&full, sectors(ids.iter().copied())).unwrap();
            qemu_img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", template.options, &full, &top]);
        } else {
            let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", template.options];
            if let Some((name, format)) = template.below.file() {
                arguments.extend(["-b", name, "-F", format]);
            }
            let size = template.size.to_string();
            qemu_img(arguments.into_iter().chain([top.as_str(), &size]));
        }
        if template.before.contains("data") {
            let mut qemu_io = std::process::Command::new("qemu-io");
            qemu_io.args(["-f", "qcow2", &top]);
            for (number, at) in [0, template.size / 3, template.size / 2].into_iter().enumerate() {
                let (at, length) = (at - at % 4096, 3 * 4096);
                // Sectors of one repeated byte are sectors with an id, too.
                let byte = 17 + number as u8;
                qemu_io.args(["-c", &format!("write -P {byte} {at} {length}")]);
                ids[(at / SECTOR) as usize..((at + length) / SECTOR) as usize].fill(u64::from_le_bytes([byte; 8]));
            }
            blockhouse_tests::run(&mut qemu_io).succeeded();
        }
        for number in 0..template.before.matches("snapshot").count() {
            qemu_img(["snapshot", "-c", &format!("s{number}"), &top]);
        }
        all.push(Made { image: std::fs::read(&top).unwrap(), ids });
        std::fs::remove_file(&top).unwrap();
    }
    all
}
