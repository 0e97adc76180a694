//! Making new images.
//!
//! ```text
//!   cluster 0   header │ backing format │ data file │ feature names │ end │ name of the backing file
//!           1   refcount table
//!           …   refcount blocks
//!           …   L1 table, all zero: nothing is allocated
//!           …   L2 tables, only with data-file-raw: each cluster is where it is in the data file
//! ```
//!
//! What says that there is a backing file, and of which format, is in the first 512 bytes, so that it can
//! be changed by one write that a power cut does not divide. These 512 bytes are written last, after all
//! else is durable: a file without them is no image.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{Creator, Error, File, NewImage, OptionHelp, Result};

use crate::Qcow2;
use crate::check::counts;
use crate::header::{
    COMPRESSION_TYPE, EXTENDED_L2, EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE, EXTENSION_FEATURE_NAMES,
    EXTERNAL_DATA, FEATURES, LAZY_REFCOUNTS, MAGIC, MAX_BACKING_NAME, MAX_DATA_FILE_NAME, MAX_FORMAT_NAME,
    MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, RAW_EXTERNAL_DATA, V2_LENGTH,
};
use crate::tables::COPIED;

/// Written to the file as one: no power cut leaves a part of it.
const SECTOR: usize = 512;
/// The header of version 3 with the compression type, padded to 8 bytes.
const V3_FULL_LENGTH: u32 = 112;
/// Tables are written in pieces of this size, in bytes.
const PIECE: usize = 1 << 20;

/// What the options ask for.
struct Options {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    zstd: bool,
    extended: bool,
    lazy: bool,
    data_file: Option<String>,
    raw: bool,
}

impl Creator for Qcow2 {
    fn create_options() -> Vec<OptionHelp> {
        [
            ("compat", "v2 (or 0.10), v3 (or 1.1)", "v3", "The version of the format; v2 is for programs before 2013."),
            (
                "cluster-size",
                "512 to 2M, a power of two",
                "64K",
                "The unit of allocation: small saves space, large saves tables.",
            ),
            ("refcount-bits", "1, 2, 4, 8, 16, 32 or 64", "16", "Bits of a reference count: they limit snapshots."),
            ("compression-type", "zlib, zstd", "zlib", "How compressed clusters are packed."),
            ("extended-l2", "on, off", "off", "Allocate 1/32 of a cluster at a time; needs clusters of 16K at least."),
            (
                "lazy-refcounts",
                "on, off",
                "off",
                "Let QEMU write reference counts late; they are rebuilt after a crash.",
            ),
            ("data-file", "a file name", "none", "Keep the content in this file, and only the map in the image."),
            ("data-file-raw", "on, off", "off", "Keep the data file readable as a raw image; needs data-file."),
        ]
        .into_iter()
        .map(|(name, values, default, about)| OptionHelp::new(name, values, default, about))
        .collect()
    }

    fn create(image: File, new: NewImage) -> Result<()> {
        let size = image.size()?;
        if size != 0 {
            return Err(other(format!("the file is not empty: it has {size} bytes")));
        }
        let options = Options::parse(&new.options)?;
        let layout = Layout::new(&options, &new)?;
        let head = header(&options, &new, &layout)?;

        image.set_size(layout.clusters.saturating_mul(layout.cluster_size))?;
        layout.write_refcounts(&image, &options)?;
        layout.write_tables(&image, &options, new.virtual_size)?;
        let (first, rest) = head.split_at_checked(SECTOR).unwrap_or((&head, &[]));
        if !rest.is_empty() {
            image.write_at(SECTOR as u64, rest)?;
        }
        image.sync_data()?;
        image.write_at(0, first)?;
        image.sync_data()
    }
}

fn other(text: impl Into<String>) -> Error {
    Error::Other(text.into())
}

/// A value that cannot be.
fn refuse(name: &str, value: &str, why: &str) -> Error {
    other(format!("{name}={value}: {why}"))
}

fn on_off(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(refuse(name, value, "it is on or off")),
    }
}

/// A number of bytes, in which K and M are units of 1024 and 1024².
fn bytes(value: &str) -> Option<u64> {
    let (digits, shift) = match value.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 10),
        None => value.strip_suffix(['m', 'M']).map_or((value, 0), |digits| (digits, 20)),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

impl Options {
    fn parse(given: &[(String, String)]) -> Result<Self> {
        let mut options = Self {
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            zstd: false,
            extended: false,
            lazy: false,
            data_file: None,
            raw: false,
        };
        for (number, (name, value)) in given.iter().enumerate() {
            if given.iter().take(number).any(|(before, _)| before == name) {
                return Err(other(format!("the option {name} is given twice")));
            }
            match name.as_str() {
                "compat" => {
                    options.version = match value.as_str() {
                        "v2" | "0.10" => 2,
                        "v3" | "1.1" => 3,
                        _ => return Err(refuse(name, value, "it is v2 (or 0.10) or v3 (or 1.1)")),
                    }
                }
                "cluster-size" => {
                    options.cluster_bits = bytes(value)
                        .filter(|size| size.is_power_of_two() && (512..=2 << 20).contains(size))
                        .map(u64::trailing_zeros)
                        .ok_or_else(|| refuse(name, value, "it is a power of two from 512 to 2M"))?;
                }
                "refcount-bits" => {
                    options.refcount_order = bytes(value)
                        .filter(|bits| bits.is_power_of_two() && *bits <= 64)
                        .map(u64::trailing_zeros)
                        .ok_or_else(|| refuse(name, value, "it is 1, 2, 4, 8, 16, 32 or 64"))?;
                }
                "compression-type" => {
                    options.zstd = match value.as_str() {
                        "zlib" => false,
                        "zstd" => true,
                        _ => return Err(refuse(name, value, "it is zlib or zstd")),
                    }
                }
                "extended-l2" => options.extended = on_off(name, value)?,
                "lazy-refcounts" => options.lazy = on_off(name, value)?,
                "data-file" => options.data_file = Some(value.clone()),
                "data-file-raw" => options.raw = on_off(name, value)?,
                _ => {
                    let names: Vec<String> = Self::names();
                    return Err(other(format!(
                        "qcow2 has no option {name:?} for new images; it has {}",
                        names.join(", ")
                    )));
                }
            }
        }
        options.combine()?;
        Ok(options)
    }

    fn names() -> Vec<String> {
        Qcow2::create_options().into_iter().map(|option| option.name).collect()
    }

    /// What cannot be together.
    fn combine(&self) -> Result<()> {
        if self.version < 3 {
            let needs = "needs version 3 of the format: leave compat out, or give compat=v3";
            let bits = (1u32 << self.refcount_order).to_string();
            for (set, name, value) in [
                (self.refcount_order != 4, "refcount-bits", bits.as_str()),
                (self.lazy, "lazy-refcounts", "on"),
                (self.zstd, "compression-type", "zstd"),
                (self.extended, "extended-l2", "on"),
                (self.data_file.is_some(), "data-file", self.data_file.as_deref().unwrap_or_default()),
            ] {
                if set {
                    return Err(refuse(name, value, needs));
                }
            }
        }
        if self.extended && self.cluster_bits < 14 {
            return Err(refuse(
                "extended-l2",
                "on",
                &format!("cluster-size is {}, and must be 16K at least", 1u32 << self.cluster_bits),
            ));
        }
        if self.raw && self.data_file.is_none() {
            return Err(refuse("data-file-raw", "on", "it needs data-file"));
        }
        match &self.data_file {
            Some(name) if name.is_empty() || name.len() as u64 > MAX_DATA_FILE_NAME => Err(refuse(
                "data-file",
                name,
                &format!("a file name has from 1 to {MAX_DATA_FILE_NAME} bytes, this one has {}", name.len()),
            )),
            _ => Ok(()),
        }
    }
}

/// Where the parts of the new image are, in clusters.
struct Layout {
    cluster_size: u64,
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    l1_clusters: u64,
    l2_tables: u64,
    clusters: u64,
}

impl Layout {
    fn new(options: &Options, new: &NewImage) -> Result<Self> {
        let size = new.virtual_size;
        if !size.is_multiple_of(512) || i64::try_from(size).is_err() {
            return Err(other(format!("a disk of {size} bytes: the size is a multiple of 512 below 2^63")));
        }
        let cluster_size = 1u64 << options.cluster_bits;
        let per_table = cluster_size / if options.extended { 16 } else { 8 };
        let span = per_table.saturating_mul(cluster_size);
        let l1_entries = size.div_ceil(span);
        if l1_entries.saturating_mul(8) > MAX_L1_BYTES {
            return Err(other(format!(
                "a disk of {size} bytes is too large for cluster-size={cluster_size}{}: {} bytes is the limit",
                if options.extended { " with extended-l2=on" } else { "" },
                (MAX_L1_BYTES / 8).saturating_mul(span)
            )));
        }
        let l1_clusters = l1_entries.saturating_mul(8).div_ceil(cluster_size);
        let l2_tables = if options.raw { l1_entries } else { 0 };
        let per_block = (cluster_size * 8) >> options.refcount_order;
        // The table and the blocks count themselves too: more of them until it is enough.
        let (mut table_clusters, mut blocks) = (1u64, 1u64);
        loop {
            let clusters = [1, table_clusters, blocks, l1_clusters, l2_tables].iter().sum::<u64>();
            let needed = clusters.div_ceil(per_block);
            let needed_table = needed.saturating_mul(8).div_ceil(cluster_size);
            if needed <= blocks && needed_table <= table_clusters {
                return if table_clusters.saturating_mul(cluster_size) > MAX_REFCOUNT_TABLE_BYTES {
                    Err(other(format!("an image with {clusters} clusters of metadata: larger clusters need fewer")))
                } else {
                    Ok(Self { cluster_size, table_clusters, blocks, l1_entries, l1_clusters, l2_tables, clusters })
                };
            }
            blocks = blocks.max(needed);
            table_clusters = table_clusters.max(needed_table);
        }
    }

    fn at(&self, cluster: u64) -> u64 {
        cluster.saturating_mul(self.cluster_size)
    }

    fn first_block(&self) -> u64 {
        1 + self.table_clusters
    }

    fn l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    fn first_l2(&self) -> u64 {
        self.l1() + self.l1_clusters
    }

    fn write_refcounts(&self, image: &File, options: &Options) -> Result<()> {
        let mut table = Out::new(image, self.at(1));
        for block in 0..self.blocks {
            table.put(self.at(self.first_block() + block))?;
        }
        table.finish()?;
        // Every cluster is used once.
        let order = options.refcount_order;
        let mut cluster = 0;
        let mut at = self.at(self.first_block());
        while cluster < self.clusters {
            let piece = usize::try_from(self.cluster_size).unwrap_or_default();
            let mut block = vec![0u8; piece];
            let count = (self.clusters - cluster).min((self.cluster_size * 8) >> order);
            for number in 0..count {
                counts::set(&mut block, order, usize::try_from(number).unwrap_or_default(), 1);
            }
            image.write_at(at, &block)?;
            cluster += count;
            at = at.saturating_add(self.cluster_size);
        }
        Ok(())
    }

    /// The L1 table reads as zero already. In a raw data file each cluster has its place, used or not: what
    /// is in the file is what the disk reads.
    fn write_tables(&self, image: &File, options: &Options, virtual_size: u64) -> Result<()> {
        if self.l2_tables == 0 {
            return Ok(());
        }
        let mut l1 = Out::new(image, self.at(self.l1()));
        for number in 0..self.l1_entries {
            l1.put(self.at(self.first_l2() + number) | COPIED)?;
        }
        l1.finish()?;
        let mut l2 = Out::new(image, self.at(self.first_l2()));
        let mut guest = 0;
        while guest < virtual_size {
            l2.put(guest | COPIED)?;
            if options.extended {
                l2.put(u64::from(u32::MAX))?;
            }
            guest = guest.saturating_add(self.cluster_size);
        }
        l2.finish()
    }
}

/// Writes 8-byte entries one after another.
struct Out<'a> {
    image: &'a File,
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Out<'a> {
    fn new(image: &'a File, at: u64) -> Self {
        Self { image, at, bytes: Vec::new() }
    }

    fn put(&mut self, entry: u64) -> Result<()> {
        self.bytes.extend(entry.to_be_bytes());
        if self.bytes.len() >= PIECE { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<()> {
        self.image.write_at(self.at, &self.bytes)?;
        self.at = self.at.saturating_add(self.bytes.len() as u64);
        self.bytes.clear();
        Ok(())
    }
}

/// The header with its extensions and the name of the backing file.
fn header(options: &Options, new: &NewImage, layout: &Layout) -> Result<Vec<u8>> {
    let mut extensions: Vec<(u32, &[u8])> = Vec::new();
    if let Some(backing) = &new.backing {
        let name = &backing.name;
        let format = backing.format.as_deref().unwrap_or_default();
        if name.is_empty() || name.len() as u64 > u64::from(MAX_BACKING_NAME) {
            return Err(other(format!(
                "the name of a backing file has from 1 to {MAX_BACKING_NAME} bytes, this one has {}",
                name.len()
            )));
        }
        if format.is_empty() || format.len() as u64 > MAX_FORMAT_NAME {
            return Err(other(format!(
                "the format of the backing file is {format:?}; it is stated, in {MAX_FORMAT_NAME} bytes at most"
            )));
        }
        if options.raw {
            return Err(refuse("data-file-raw", "on", "a raw data file holds the whole disk: no backing file"));
        }
        extensions.push((EXTENSION_BACKING_FORMAT, format.as_bytes()));
    }
    if let Some(name) = &options.data_file {
        extensions.push((EXTENSION_DATA_FILE, name.as_bytes()));
    }
    let length = if options.version < 3 { u32::try_from(V2_LENGTH).unwrap_or_default() } else { V3_FULL_LENGTH };
    let name = new.backing.as_ref().map(|backing| backing.name.as_bytes()).unwrap_or_default();
    // Names of features are for messages of other programs. They are left out where there is no room.
    let table = feature_names();
    let mut used = u64::from(length).saturating_add(8).saturating_add(name.len() as u64);
    for (_, data) in &extensions {
        used = used.saturating_add(8).saturating_add(data.len().next_multiple_of(8) as u64);
    }
    if used > layout.cluster_size {
        return Err(other(format!(
            "the header with the names of other files needs {used} bytes, and has one cluster: {} bytes",
            layout.cluster_size
        )));
    }
    if options.version >= 3 && used.saturating_add(8).saturating_add(table.len() as u64) <= layout.cluster_size {
        extensions.push((EXTENSION_FEATURE_NAMES, &table));
    }

    let mut tail = Vec::new();
    for (kind, data) in extensions {
        tail.extend(kind.to_be_bytes());
        tail.extend(u32::try_from(data.len()).unwrap_or_default().to_be_bytes());
        tail.extend(data);
        tail.resize(tail.len().next_multiple_of(8), 0);
    }
    tail.extend([0; 8]);
    let backing_offset = if name.is_empty() { 0 } else { u64::from(length).saturating_add(tail.len() as u64) };
    tail.extend(name);

    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut head = Vec::new();
    head.extend(MAGIC.to_be_bytes());
    head.extend(options.version.to_be_bytes());
    head.extend(backing_offset.to_be_bytes());
    head.extend(word(name.len() as u64).to_be_bytes());
    head.extend(options.cluster_bits.to_be_bytes());
    head.extend(new.virtual_size.to_be_bytes());
    head.extend([0; 4]); // not encrypted
    head.extend(word(layout.l1_entries).to_be_bytes());
    head.extend(if layout.l1_entries == 0 { 0 } else { layout.at(layout.l1()) }.to_be_bytes());
    head.extend(layout.at(1).to_be_bytes());
    head.extend(word(layout.table_clusters).to_be_bytes());
    head.extend([0; 12]); // no snapshots
    if options.version >= 3 {
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let incompatible = bit(options.data_file.is_some(), EXTERNAL_DATA)
            | bit(options.zstd, COMPRESSION_TYPE)
            | bit(options.extended, EXTENDED_L2);
        head.extend(incompatible.to_be_bytes());
        head.extend(bit(options.lazy, LAZY_REFCOUNTS).to_be_bytes());
        head.extend(bit(options.raw, RAW_EXTERNAL_DATA).to_be_bytes());
        head.extend(options.refcount_order.to_be_bytes());
        head.extend(length.to_be_bytes());
        head.extend([u8::from(options.zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    head.extend(tail);
    Ok(head)
}

/// The table of feature names: kind, bit and name in 48 bytes each.
fn feature_names() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in FEATURES {
        table.extend([*kind, *bit]);
        table.extend(name.bytes());
        table.resize(table.len().next_multiple_of(48), 0);
    }
    table
}
