//! The first sector of a sparse file: how large the disk is and where its tables are.
//!
//! Source: VMware, Virtual Disk Format 5.0, "Hosted Sparse Extents" and "Stream-Optimized
//! Compressed"; all integers are little-endian, all positions in sectors of 512 bytes.

use alloc::format;

use blockhouse_plugin::{Error, File, Result, bytes};

/// The unit of every position in a VMDK.
pub(crate) const SECTOR: u64 = 512;
/// `KDMV`: a hosted sparse file.
pub(crate) const MAGIC: &[u8] = b"KDMV";
/// `COWD`: a sparse file of old ESX servers.
const MAGIC_COWD: &[u8] = b"COWD";
/// The first eight bytes of a space-efficient sparse file of ESXi.
const MAGIC_SESPARSE: &[u8] = &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0];

const FLAG_LINE_ENDS: u32 = 1;
const FLAG_REDUNDANT: u32 = 1 << 1;
const FLAG_ZEROED_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// Who does not know one of these does not know how to read the image.
const INCOMPATIBLE_FLAGS: u32 = 0xffff_0000;

/// `gdOffset` of a stream that was written in one go: the real header is the footer.
const DIRECTORY_AT_END: u64 = u64::MAX;
/// The marker type of the footer.
const MARKER_FOOTER: u32 = 3;

/// Entries per grain table that QEMU takes at most; VMware always writes 512.
const MAX_TABLE_ENTRIES: u32 = 512;
/// 1 GiB, as in QEMU: nobody writes larger grains.
const MAX_GRAIN_SECTORS: u64 = 0x20_0000;
/// 1 MiB for compressed grains, which are unpacked in memory; VMware always writes 64 KiB.
const MAX_PACKED_GRAIN_SECTORS: u64 = 0x800;

/// What kind of file starts with these bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A hosted sparse file.
    Sparse,
    /// Anything else: a descriptor, perhaps.
    Text,
}

/// Tells sparse files from text, and names the sparse files of ESX, which have tables of their own.
pub(crate) fn kind(head: &[u8]) -> Result<Kind> {
    if head.starts_with(MAGIC) {
        Ok(Kind::Sparse)
    } else if head.starts_with(MAGIC_COWD) {
        Err(Error::unsupported("an ESX Server sparse file (COWD, vmfsSparse) is not read; convert the image"))
    } else if head.starts_with(MAGIC_SESPARSE) {
        Err(Error::unsupported("an ESXi space-efficient sparse file (seSparse) is not read; convert the image"))
    } else {
        Ok(Kind::Text)
    }
}

/// A checked header.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    /// Size of the disk, or of this part of it, in bytes. 0 if the embedded descriptor names the parts.
    pub(crate) capacity: u64,
    /// Bytes per grain, a power of two.
    pub(crate) grain: u64,
    /// Where an embedded descriptor is, in bytes: offset and length. The length is 0 if there is none.
    pub(crate) descriptor: (u64, u64),
    /// Entries per grain table.
    pub(crate) table_entries: u64,
    /// Where the grain directory is, in bytes.
    pub(crate) directory: u64,
    /// Where its copy is, in bytes, if there is one.
    pub(crate) redundant_directory: Option<u64>,
    /// A table entry of 1 is a grain of zeroes.
    pub(crate) zeroed_grains: bool,
    /// Grains are zlib streams.
    pub(crate) compressed: bool,
    /// Compressed grains start with a marker of 12 bytes.
    pub(crate) markers: bool,
    /// The program that wrote last did not close the file.
    pub(crate) unclean: bool,
    /// The header at the end of the file was used.
    pub(crate) footer: bool,
}

impl Header {
    /// Reads the header of a sparse file, or its footer, which wins if there is one.
    pub(crate) fn read(file: &File) -> Result<Self> {
        let size = file.size()?;
        let mut header = Self::parse(&file.read_exact_at("the header", 0, SECTOR)?)?;
        if header.directory == DIRECTORY_AT_END && header.capacity > 0 {
            header = Self { footer: true, ..read_footer(file, size)? };
        }
        if header.capacity > 0 {
            header.check(size)?;
        }
        Ok(header)
    }

    /// `sector` is 512 bytes long.
    fn parse(sector: &[u8]) -> Result<Self> {
        let short = || Error::corrupt("the header is too short");
        let u32_at = |at| bytes::le_u32(sector, at).ok_or_else(short);
        let u64_at = |at| bytes::le_u64(sector, at).ok_or_else(short);
        if !sector.starts_with(MAGIC) {
            return Err(Error::corrupt("there is no magic KDMV at the start of the header"));
        }
        let version = u32_at(4)?;
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(format!("VMDK version {version} (1 to 3 are known)")));
        }
        let flags = u32_at(8)?;
        let unknown = flags & INCOMPATIBLE_FLAGS & !(FLAG_COMPRESSED | FLAG_MARKERS);
        if unknown != 0 {
            return Err(Error::unsupported(format!("the flags {unknown:#x} in the header, which are not known")));
        }
        if flags & FLAG_LINE_ENDS != 0 && sector.get(73..77) != Some(b"\n \r\n") {
            return Err(Error::corrupt("the line-end test in the header failed: the file was transferred as text"));
        }
        let compressed = match bytes::le_u16(sector, 77).ok_or_else(short)? {
            0 if flags & FLAG_COMPRESSED != 0 => {
                return Err(Error::corrupt("the header says that grains are compressed, and not how"));
            }
            0 => false,
            1 => true,
            other => {
                return Err(Error::unsupported(format!("compression algorithm {other} (only 1, deflate, is known)")));
            }
        };
        let position = |sectors: u64| sectors.checked_mul(SECTOR).unwrap_or(DIRECTORY_AT_END);
        let capacity = u64_at(12)?;
        let grain_sectors = u64_at(20)?;
        let table_entries = u32_at(44)?;
        if capacity > 0 {
            let largest = if compressed { MAX_PACKED_GRAIN_SECTORS } else { MAX_GRAIN_SECTORS };
            if !grain_sectors.is_power_of_two() || grain_sectors > largest {
                return Err(Error::corrupt(format!(
                    "a grain of {grain_sectors} sectors (a power of two up to {largest} is expected)"
                )));
            }
            if table_entries == 0 || table_entries > MAX_TABLE_ENTRIES {
                return Err(Error::corrupt(format!("{table_entries} entries per grain table (1 to 512 are expected)")));
            }
        }
        let descriptor = (position(u64_at(28)?), position(u64_at(36)?));
        Ok(Self {
            version,
            capacity: bytes_of(capacity, "the capacity")?,
            grain: grain_sectors.saturating_mul(SECTOR),
            descriptor: if descriptor.0 == 0 { (0, 0) } else { descriptor },
            table_entries: table_entries.into(),
            directory: position(u64_at(56)?),
            redundant_directory: if flags & FLAG_REDUNDANT != 0 { Some(position(u64_at(48)?)) } else { None },
            zeroed_grains: flags & FLAG_ZEROED_GRAINS != 0,
            compressed,
            markers: flags & FLAG_MARKERS != 0,
            unclean: sector.get(72) == Some(&1),
            footer: false,
        })
    }

    /// That the directories are inside a file of `size` bytes: so they are never longer than that.
    fn check(&self, size: u64) -> Result<()> {
        let length = self.directory_length();
        let inside = |start: u64| start > 0 && start.checked_add(length).is_some_and(|end| end <= size);
        if !inside(self.directory) {
            return Err(Error::corrupt(format!(
                "the grain directory ({length} bytes at {}) is not inside the file ({size} bytes)",
                self.directory
            )));
        }
        if let Some(copy) = self.redundant_directory.filter(|copy| *copy > 0 && !inside(*copy)) {
            return Err(Error::corrupt(format!(
                "the redundant grain directory ({length} bytes at {copy}) is not inside the file ({size} bytes)"
            )));
        }
        Ok(())
    }

    /// Bytes of disk that one grain table covers.
    pub(crate) fn table_span(&self) -> u64 {
        self.grain.saturating_mul(self.table_entries).max(1)
    }

    /// Length of the grain directory in bytes.
    pub(crate) fn directory_length(&self) -> u64 {
        self.capacity.div_ceil(self.table_span()).saturating_mul(4)
    }
}

/// `sectors` in bytes, if a disk may be that large.
pub(crate) fn bytes_of(sectors: u64, what: &str) -> Result<u64> {
    sectors
        .checked_mul(SECTOR)
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(|| Error::corrupt(format!("{what} is {sectors} sectors, more than a disk can have")))
}

/// The last three sectors of a stream: footer marker, the header again, end-of-stream marker.
fn read_footer(file: &File, size: u64) -> Result<Header> {
    let start = size.next_multiple_of(SECTOR).checked_sub(3 * SECTOR);
    let start = start.ok_or_else(|| Error::ends_early("the footer", 0, 3 * SECTOR, size))?;
    let mut tail = [0; 3 * 512];
    file.read_at(start, &mut tail)?;
    let marker = |at: usize| {
        let size = bytes::le_u32(&tail, at.saturating_add(8))?;
        let kind = bytes::le_u32(&tail, at.saturating_add(12))?;
        Some((size, kind))
    };
    let end_of_stream = bytes::le_u64(&tail, 1024) == Some(0) && marker(1024) == Some((0, 0));
    if marker(0) != Some((0, MARKER_FOOTER)) || !end_of_stream {
        return Err(Error::corrupt("the header points to a footer, and the file does not end in one"));
    }
    let header = Header::parse(tail.get(512..1024).unwrap_or_default())?;
    if header.directory == DIRECTORY_AT_END {
        return Err(Error::corrupt("the footer points to a footer"));
    }
    Ok(header)
}
