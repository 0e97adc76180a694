//! The header: what the first cluster of an image says about the rest.
//!
//! ```text
//!   byte 0                72          104            header_length               cluster size
//!   ├── version 2 fields ──┼── v3 ─────┼── further ───┼── extensions ──┼─ backing ──┤
//!   │ magic, sizes, tables │ features  │ compression  │ type length    │ file name  │
//!   │                      │ refcounts │ unknown ones │ data, padding  │            │
//! ```
//!
//! Field by field: QEMU, docs/interop/qcow2.rst, "Header" and "Header extensions". The limits are those
//! of QEMU, which is what images in the world were made with.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::bytes::{be_u32, be_u64};
use blockhouse_plugin::{Access, BackingReference, Error, Fact, File, Result};

/// Where size is, and then the tables: crypt_method, l1_size, l1_table_offset, refcount_table_offset,
/// refcount_table_clusters, nb_snapshots and snapshots_offset.
pub(crate) const SIZE_AT: u64 = 24;
/// Where refcount_table_offset and refcount_table_clusters are.
pub(crate) const REFCOUNT_TABLE_AT: u64 = 48;
/// Where incompatible_features is (version 3).
const INCOMPATIBLE_AT: u64 = 72;
/// Where autoclear_features is (version 3).
pub(crate) const AUTOCLEAR_AT: u64 = 88;

/// `QFI\xfb`.
pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// The header of version 2, and the part that both versions share.
pub(crate) const V2_LENGTH: u64 = 72;
/// The shortest header of version 3.
const V3_LENGTH: u64 = 104;
/// 512 bytes to 2 MiB.
const CLUSTER_BITS: core::ops::RangeInclusive<u32> = 9..=21;
/// QEMU's limit of an L1 table, in bytes.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU's limit of the refcount table, in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// QEMU's limit of snapshots in an image.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// The longest backing file name, in bytes.
pub(crate) const MAX_BACKING_NAME: u32 = 1023;
/// QEMU's limit of a format name, in bytes.
pub(crate) const MAX_FORMAT_NAME: u64 = 15;
/// A file name that no file system takes is longer than this.
pub(crate) const MAX_DATA_FILE_NAME: u64 = 4096;
/// Feature names are for messages; a table larger than this goes unread.
const MAX_FEATURE_TABLE: u64 = 64 << 10;

pub(crate) const EXTENSION_END: u32 = 0;
pub(crate) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
pub(crate) const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Incompatible features: a reader that does not know one must not open the image.
pub(crate) const DIRTY: u64 = 1 << 0;
pub(crate) const CORRUPT: u64 = 1 << 1;
pub(crate) const EXTERNAL_DATA: u64 = 1 << 2;
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
pub(crate) const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
/// A compatible feature.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear features.
pub(crate) const BITMAPS: u64 = 1 << 0;
pub(crate) const RAW_EXTERNAL_DATA: u64 = 1 << 1;

/// The features by set (incompatible, compatible, autoclear), bit, and the name that images give them.
pub(crate) const FEATURES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate, which QEMU calls zlib.
    Deflate,
    /// One zstd frame per cluster.
    Zstd,
}

/// A table of 8-byte entries in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// Where it starts, in bytes.
    pub(crate) offset: u64,
    /// How many entries it has.
    pub(crate) entries: u64,
}

impl Table {
    /// An L1 table, checked against its limits and the size of the file.
    pub(crate) fn l1(offset: u64, entries: u32, cluster_size: u64, image_size: u64, what: &str) -> Result<Self> {
        let entries = u64::from(entries);
        let bytes = entries.saturating_mul(8);
        if bytes > MAX_L1_BYTES {
            return Err(Error::corrupt(format!("{what} has {entries} entries; {} is the limit", MAX_L1_BYTES / 8)));
        }
        check_place(what, offset, bytes, cluster_size)?;
        if offset.checked_add(bytes).is_none_or(|end| end > image_size) {
            return Err(Error::ends_early(what, offset, bytes, image_size));
        }
        Ok(Self { offset, entries })
    }
}

/// Metadata lies on a cluster boundary, after the header, below the largest file offset.
fn check_place(what: &str, offset: u64, bytes: u64, cluster_size: u64) -> Result<()> {
    if !offset.is_multiple_of(cluster_size) {
        return Err(Error::corrupt(format!("{what} is at {offset:#x}, which is not a multiple of the cluster size")));
    }
    if bytes > 0 && offset == 0 {
        return Err(Error::corrupt(format!("{what} is at 0, where the header is")));
    }
    if offset.checked_add(bytes).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(Error::corrupt(format!("{what} is at {offset:#x}, past the largest file offset")));
    }
    Ok(())
}

/// Where the bitmaps of an image are, as its extension says, unchecked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bitmaps {
    pub(crate) count: u32,
    pub(crate) directory_size: u64,
    pub(crate) directory_offset: u64,
}

/// The header, checked.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    /// Size of the disk in bytes. A part of a sector at the end is left out, as QEMU does.
    pub(crate) virtual_size: u64,
    pub(crate) l1: Table,
    pub(crate) snapshots_offset: u64,
    pub(crate) snapshots: u32,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<BackingReference>,
    pub(crate) data_file: Option<String>,
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    /// Reference counts have 1 << refcount_order bits.
    pub(crate) refcount_order: u32,
    pub(crate) refcount_table: Table,
    bitmaps: Bitmaps,
    feature_names: FeatureNames,
}

impl Header {
    /// Reads and checks the header of `image`, a file of `image_size` bytes.
    pub(crate) fn read(image: &File, image_size: u64, access: Access) -> Result<Self> {
        let fixed = image.read_exact_at("the qcow2 header", 0, V2_LENGTH)?;
        let word = |at| be_u32(&fixed, at).unwrap_or_default();
        let long = |at| be_u64(&fixed, at).unwrap_or_default();
        if word(0) != MAGIC {
            return Err(Error::corrupt(format!(
                "it is not a qcow2 image: it starts with {:#010x}, not with the magic number {MAGIC:#010x}",
                word(0)
            )));
        }
        let version = word(4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("qcow version {version}; versions 2 and 3 are read")));
        }
        let cluster_bits = word(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "cluster_bits is {cluster_bits}; clusters have 9 to 21 bits (512 bytes to 2 MiB)"
            )));
        }
        let cluster_size = 1u64 << cluster_bits;
        let V3 { incompatible, compatible, autoclear, refcount_order, header_length, compression_type } =
            if version == 2 { V3::default() } else { V3::read(image, cluster_size)? };

        // Where the extensions end: at the backing file's name, or at the end of the first cluster.
        let backing_offset = long(8);
        if backing_offset > cluster_size {
            return Err(Error::corrupt(format!("backing_file_offset is {backing_offset:#x}, past the first cluster")));
        }
        let extensions_end = if backing_offset == 0 { cluster_size } else { backing_offset };
        let extensions = Extensions::read(image, header_length, extensions_end);

        if incompatible & !KNOWN_INCOMPATIBLE != 0 {
            let names = extensions.map(|found| found.feature_names).unwrap_or_default();
            return Err(Error::unsupported(format!(
                "unknown incompatible features: {}",
                names.list(Kind::Incompatible, incompatible & !KNOWN_INCOMPATIBLE)
            )));
        }
        match word(32) {
            0 => {}
            1 => return Err(Error::unsupported("encryption with AES (crypt_method 1)")),
            2 => return Err(Error::unsupported("encryption with LUKS (crypt_method 2)")),
            other => return Err(Error::unsupported(format!("encryption with an unknown crypt_method, {other}"))),
        }
        let extensions = extensions?;
        if access == Access::ReadWrite {
            refuse_unsafe_to_write(incompatible)?;
        }
        let compression = compression(incompatible, compression_type)?;
        if incompatible & EXTENDED_L2 != 0 && cluster_bits < 14 {
            return Err(Error::corrupt(format!(
                "extended L2 entries with cluster_bits {cluster_bits}; they need clusters of 16 KiB at least"
            )));
        }
        if autoclear & RAW_EXTERNAL_DATA != 0 && incompatible & EXTERNAL_DATA == 0 {
            return Err(Error::corrupt("the feature raw-external-data is set without external-data-file"));
        }
        if refcount_order > 6 {
            return Err(Error::corrupt(format!("refcount_order is {refcount_order}; 6 is the largest")));
        }
        check_refcount_table(long(48), word(56), cluster_size)?;

        let snapshots = word(60);
        let snapshots_offset = long(64);
        if snapshots > MAX_SNAPSHOTS {
            return Err(Error::corrupt(format!("nb_snapshots is {snapshots}; {MAX_SNAPSHOTS} is the limit")));
        }
        check_place("the snapshot table", snapshots_offset, u64::from(snapshots).saturating_mul(40), cluster_size)?;

        let size = long(24);
        let l1 = Table::l1(long(40), word(36), cluster_size, image_size, "the L1 table")?;
        let entry_bits = if incompatible & EXTENDED_L2 != 0 { 4 } else { 3 };
        let needed = size.div_ceil(1 << (2 * cluster_bits - entry_bits));
        if l1.entries < needed {
            return Err(Error::corrupt(format!(
                "the L1 table has {} entries; a disk of {size} bytes needs {needed}",
                l1.entries
            )));
        }

        let data_file = match extensions.data_file {
            _ if incompatible & EXTERNAL_DATA == 0 => None,
            Some(name) => Some(name),
            None => return Err(Error::unsupported("an external data file that the image does not name")),
        };
        Ok(Self {
            version,
            cluster_bits,
            virtual_size: size - size % 512,
            l1,
            snapshots_offset,
            snapshots,
            compression,
            backing: backing(image, backing_offset, word(16), cluster_size, extensions.backing_format)?,
            data_file,
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            refcount_table: Table { offset: long(48), entries: u64::from(word(56)).saturating_mul(cluster_size / 8) },
            bitmaps: extensions.bitmaps,
            feature_names: extensions.feature_names,
        })
    }

    pub(crate) fn cluster_size(&self) -> u32 {
        1 << self.cluster_bits
    }

    pub(crate) fn has(&self, incompatible_feature: u64) -> bool {
        self.incompatible & incompatible_feature != 0
    }

    /// Clears the autoclear bits before the first write, except that the data file is raw: what the others
    /// promise is not kept up. Consistent bitmaps are among them, and are ignored by everybody from then on.
    /// Durable when it returns.
    pub(crate) fn clear_autoclear(&mut self, image: &File) -> Result<()> {
        let kept = self.autoclear & RAW_EXTERNAL_DATA;
        if self.version >= 3 && self.autoclear != kept {
            image.write_at(AUTOCLEAR_AT, &kept.to_be_bytes())?;
            image.sync_data()?;
            self.autoclear = kept;
        }
        Ok(())
    }

    /// The features of the image once something was changed, as they follow each other at `INCOMPATIBLE_AT`: what the
    /// autoclear bits promise is not kept up. Version 2 has none.
    pub(crate) fn features_after_change(&self) -> Vec<u8> {
        if self.version < 3 {
            return Vec::new();
        }
        [self.incompatible, self.compatible, self.autoclear & RAW_EXTERNAL_DATA].map(u64::to_be_bytes).concat()
    }

    /// Whether the external data file is to be what the disk reads as, byte for byte.
    pub(crate) fn promises_raw_data(&self) -> bool {
        self.autoclear & RAW_EXTERNAL_DATA != 0
    }

    /// Marks the image corrupt, so that nobody writes to it before it is repaired. Durable when it
    /// returns. Version 2 has no such mark.
    pub(crate) fn mark_corrupt(&mut self, image: &File) -> Result<()> {
        if self.version >= 3 {
            self.incompatible |= CORRUPT;
            image.write_at(INCOMPATIBLE_AT, &self.incompatible.to_be_bytes())?;
            image.sync_data()?;
        }
        Ok(())
    }

    /// The bitmaps, if the image promises that they are kept up.
    pub(crate) fn kept_bitmaps(&self) -> Option<Bitmaps> {
        (self.autoclear & BITMAPS != 0 && self.bitmaps.count > 0).then_some(self.bitmaps)
    }

    /// Makes known to everybody that the bitmaps are not kept up. Durable when it returns.
    pub(crate) fn drop_bitmaps(&mut self, image: &File) -> Result<()> {
        self.set_features(image, self.incompatible, self.autoclear & !BITMAPS)
    }

    /// Takes away the marks dirty and corrupt. Durable when it returns.
    pub(crate) fn mark_clean(&mut self, image: &File) -> Result<()> {
        self.set_features(image, self.incompatible & !(DIRTY | CORRUPT), self.autoclear)
    }

    /// Clears the autoclear bits that nobody here knows, as every program does that changes an image.
    pub(crate) fn clear_unknown(&mut self, image: &File) -> Result<()> {
        self.set_features(image, self.incompatible, self.autoclear & (BITMAPS | RAW_EXTERNAL_DATA))
    }

    fn set_features(&mut self, image: &File, incompatible: u64, autoclear: u64) -> Result<()> {
        if (incompatible, autoclear) == (self.incompatible, self.autoclear) || self.version < 3 {
            return Ok(());
        }
        let fields = [incompatible, self.compatible, autoclear].map(u64::to_be_bytes).concat();
        image.write_at(INCOMPATIBLE_AT, &fields)?;
        image.sync_data()?;
        self.incompatible = incompatible;
        self.autoclear = autoclear;
        Ok(())
    }

    /// What `info` prints.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        let yes_no = |set: bool| if set { "yes" } else { "no" };
        let compression = match self.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        };
        let mut facts = vec![
            Fact::new("version", self.version.to_string()),
            Fact::new("compression", compression),
            Fact::new("extended-l2", yes_no(self.has(EXTENDED_L2))),
            Fact::new("lazy-refcounts", yes_no(self.compatible & LAZY_REFCOUNTS != 0)),
            Fact::new("refcount-bits", (1u32 << self.refcount_order).to_string()),
        ];
        if let Some(name) = &self.data_file {
            facts.push(Fact::new("data-file", name.clone()));
            facts.push(Fact::new("data-file-raw", yes_no(self.autoclear & RAW_EXTERNAL_DATA != 0)));
        }
        facts.push(Fact::new("snapshots", self.snapshots.to_string()));
        if self.bitmaps.count > 0 {
            let consistent = if self.autoclear & BITMAPS != 0 { "" } else { " (inconsistent)" };
            facts.push(Fact::new("bitmaps", format!("{}{consistent}", self.bitmaps.count)));
        }
        facts.push(Fact::new("dirty", yes_no(self.has(DIRTY))));
        facts.push(Fact::new("corrupt", yes_no(self.has(CORRUPT))));
        for (name, kind, bits) in [
            ("incompatible-features", Kind::Incompatible, self.incompatible),
            ("compatible-features", Kind::Compatible, self.compatible),
            ("autoclear-features", Kind::Autoclear, self.autoclear),
        ] {
            if bits != 0 {
                facts.push(Fact::new(name, self.feature_names.list(kind, bits)));
            }
        }
        facts
    }
}

/// The fields that version 3 added. The default is what version 2 means.
struct V3 {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u64,
    compression_type: u8,
}

impl Default for V3 {
    fn default() -> Self {
        Self {
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: V2_LENGTH,
            compression_type: 0,
        }
    }
}

impl V3 {
    fn read(image: &File, cluster_size: u64) -> Result<Self> {
        let fixed = image.read_exact_at("the qcow2 header", 0, V3_LENGTH)?;
        let word = |at| be_u32(&fixed, at).unwrap_or_default();
        let long = |at| be_u64(&fixed, at).unwrap_or_default();
        let header_length = u64::from(word(100));
        if header_length < V3_LENGTH || header_length > cluster_size {
            return Err(Error::corrupt(format!(
                "header_length is {header_length}; it must be from {V3_LENGTH} to the cluster size, {cluster_size}"
            )));
        }
        let compression_type = if header_length > V3_LENGTH {
            image.read_exact_at("the compression type", V3_LENGTH, 1)?.first().copied().unwrap_or_default()
        } else {
            0
        };
        Ok(Self {
            incompatible: long(72),
            compatible: long(80),
            autoclear: long(88),
            refcount_order: word(96),
            header_length,
            compression_type,
        })
    }
}

fn compression(incompatible: u64, compression_type: u8) -> Result<Compression> {
    match (compression_type, incompatible & COMPRESSION_TYPE != 0) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => Err(Error::corrupt("the feature compression-type is set, and the compression type is 0 (zlib)")),
        (1, false) => Err(Error::corrupt("the compression type is 1 (zstd) without the feature compression-type")),
        (other, _) => Err(Error::unsupported(format!("compression type {other}"))),
    }
}

/// The contract: an image that is unsafe to write is refused for writing, even if it can be read. A dirty one
/// is repaired when writing begins.
fn refuse_unsafe_to_write(incompatible: u64) -> Result<()> {
    if incompatible & CORRUPT != 0 {
        return Err(Error::corrupt(
            "the image is marked corrupt (incompatible feature 1): it can be read, not written, before a repair",
        ));
    }
    Ok(())
}

/// Reading needs no reference counts, but an image whose table cannot be right is refused, as by QEMU.
fn check_refcount_table(offset: u64, clusters: u32, cluster_size: u64) -> Result<()> {
    let bytes = u64::from(clusters).saturating_mul(cluster_size);
    if clusters == 0 {
        return Err(Error::corrupt("the image has no refcount table (refcount_table_clusters is 0)"));
    }
    if bytes > MAX_REFCOUNT_TABLE_BYTES {
        return Err(Error::corrupt(format!(
            "refcount_table_clusters is {clusters}, that is {bytes} bytes; {MAX_REFCOUNT_TABLE_BYTES} is the limit"
        )));
    }
    check_place("the refcount table", offset, bytes, cluster_size)
}

fn backing(
    image: &File,
    offset: u64,
    length: u32,
    cluster_size: u64,
    format: Option<String>,
) -> Result<Option<BackingReference>> {
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > MAX_BACKING_NAME || u64::from(length) > cluster_size.saturating_sub(offset) {
        return Err(Error::corrupt(format!(
            "backing_file_size is {length} at {offset:#x}; a name has {MAX_BACKING_NAME} bytes at most, in the first cluster"
        )));
    }
    let name = image.read_exact_at("the name of the backing file", offset, u64::from(length))?;
    Ok(Some(BackingReference { name: text("the name of the backing file", name)?, format }))
}

fn text(what: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        Error::unsupported(format!("{what} is not UTF-8: {:?}", String::from_utf8_lossy(error.as_bytes())))
    })
}

/// What the header extensions say. Unknown ones may be skipped, says the format.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    bitmaps: Bitmaps,
    feature_names: FeatureNames,
}

impl Extensions {
    fn read(image: &File, start: u64, end: u64) -> Result<Self> {
        let mut found = Self::default();
        let mut at = start;
        while at < end {
            let head = image.read_exact_at("a header extension", at, 8)?;
            let kind = be_u32(&head, 0).unwrap_or_default();
            let length = u64::from(be_u32(&head, 4).unwrap_or_default());
            let data = at.saturating_add(8);
            if data.checked_add(length).is_none_or(|last| last > end) {
                return Err(Error::corrupt(format!(
                    "the header extension {kind:#010x} at {at:#x} has {length} bytes, and extensions end at {end:#x}"
                )));
            }
            let limited = |what: &str, limit: u64| {
                if length > limit {
                    return Err(Error::corrupt(format!("{what} has {length} bytes; {limit} is the limit")));
                }
                image.read_exact_at(what, data, length)
            };
            match kind {
                EXTENSION_END => break,
                EXTENSION_BACKING_FORMAT => {
                    let what = "the format of the backing file";
                    let name = text(what, limited(what, MAX_FORMAT_NAME)?)?;
                    found.backing_format = Some(name).filter(|name| !name.is_empty());
                }
                EXTENSION_DATA_FILE => {
                    let what = "the name of the data file";
                    let name = text(what, limited(what, MAX_DATA_FILE_NAME)?)?;
                    found.data_file = Some(name).filter(|name| !name.is_empty());
                }
                EXTENSION_BITMAPS => {
                    let data = limited("the bitmaps extension", 24)?;
                    found.bitmaps = Bitmaps {
                        count: be_u32(&data, 0).unwrap_or_default(),
                        directory_size: be_u64(&data, 8).unwrap_or_default(),
                        directory_offset: be_u64(&data, 16).unwrap_or_default(),
                    };
                }
                EXTENSION_FEATURE_NAMES if length <= MAX_FEATURE_TABLE => {
                    found.feature_names = FeatureNames(image.read_exact_at("the feature names", data, length)?);
                }
                _ => {}
            }
            at = data.saturating_add(length.next_multiple_of(8));
        }
        Ok(found)
    }
}

/// The three sets of features.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Incompatible = 0,
    Compatible = 1,
    Autoclear = 2,
}

/// The feature name table of the image: entries of 48 bytes (kind, bit, name).
#[derive(Debug, Default)]
struct FeatureNames(Vec<u8>);

impl FeatureNames {
    /// The features of `bits`, by name where there is one: `dirty, 7 ("frobnication")`.
    fn list(&self, kind: Kind, bits: u64) -> String {
        let mut list = String::new();
        for bit in (0..64u8).filter(|bit| bits >> bit & 1 != 0) {
            if !list.is_empty() {
                list.push_str(", ");
            }
            match (known_feature(kind, bit), self.find(kind, bit)) {
                (Some(name), _) => list.push_str(name),
                (None, Some(name)) => list.push_str(&format!("bit {bit} ({name:?})")),
                (None, None) => list.push_str(&format!("bit {bit}")),
            }
        }
        list
    }

    fn find(&self, kind: Kind, bit: u8) -> Option<String> {
        let (entries, _) = self.0.as_chunks::<48>();
        let [_, _, name @ ..] = entries.iter().find(|entry| entry.starts_with(&[kind as u8, bit]))?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(String::from_utf8_lossy(name).into_owned()).filter(|name| !name.is_empty())
    }
}

fn known_feature(kind: Kind, bit: u8) -> Option<&'static str> {
    Some(match (kind, bit) {
        (Kind::Incompatible, 0) => "dirty",
        (Kind::Incompatible, 1) => "corrupt",
        (Kind::Incompatible, 2) => "external-data-file",
        (Kind::Incompatible, 3) => "compression-type",
        (Kind::Incompatible, 4) => "extended-l2",
        (Kind::Compatible, 0) => "lazy-refcounts",
        (Kind::Autoclear, 0) => "bitmaps",
        (Kind::Autoclear, 1) => "raw-external-data",
        _ => return None,
    })
}
