//! The descriptor: a text that says what the disk is made of, alone in a file or inside a sparse file.
//!
//! ```text
//! # Disk DescriptorFile
//! CID=f66ac256                           changes with the content
//! parentCID=ffffffff                     no parent
//! createType="twoGbMaxExtentFlat"
//! parentFileNameHint="base.vmdk"         only if there is a parent
//! RW 4192256 FLAT "disk-f001.vmdk" 0     the parts of the disk, in order:
//! RW 1951744 FLAT "disk-f002.vmdk" 0     access, sectors, type, file, first sector in it
//! ```
//!
//! Source: VMware, Virtual Disk Format 5.0, "The Descriptor File". VMware calls a part an extent;
//! here an extent is an answer of `locate`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use blockhouse_plugin::{Error, File, Result};

use crate::header::bytes_of;

/// QEMU reads no more either.
const MAX_BYTES: u64 = 1 << 20;
/// A 4 TiB disk in parts of 2 GiB has so many.
const MAX_PARTS: usize = 2048;
/// `parentCID` of a disk without a parent.
pub(crate) const NO_PARENT: u32 = u32::MAX;

/// Disk types whose files only ESX reads, or which are devices.
const REFUSED_TYPES: &[&str] = &[
    "vmfsSparse",
    "vmfsThin",
    "seSparse",
    "vsanSparse",
    "vmfsRaw",
    "vmfsRDM",
    "vmfsRawDeviceMap",
    "vmfsRDMP",
    "vmfsPassthroughRawDeviceMap",
    "fullDevice",
    "partitionedDevice",
];

/// Where the bytes of a part are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zeroes.
    Zero,
    /// The descriptor forbids to read them.
    NoAccess,
    /// In a file as they are, from a byte offset on.
    Flat { name: String, offset: u64 },
    /// In a sparse file.
    Sparse { name: String },
}

impl Content {
    /// The file that has to be opened.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Zero | Self::NoAccess => None,
            Self::Flat { name, .. } | Self::Sparse { name } => Some(name),
        }
    }
}

/// One line about a part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// Length in bytes, not 0.
    pub(crate) length: u64,
    pub(crate) content: Content,
}

/// A parsed descriptor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Descriptor {
    pub(crate) create_type: Option<String>,
    pub(crate) content_id: Option<u32>,
    pub(crate) parent_content_id: Option<u32>,
    pub(crate) parent_hint: Option<String>,
    /// How VirtualBox names a parent, and it does so in no other way. All digits of it are 0 if there is none.
    pub(crate) parent_uuid: Option<String>,
    /// The lines about parts, as they stand there. A sparse file that is the whole disk has one for itself, with the
    /// name that it once had, in whatever encoding: nobody has to understand that.
    pub(crate) parts: Vec<Vec<u8>>,
}

impl Descriptor {
    /// Reads the descriptor at `offset`, at most `length` bytes long. `None` if there is only padding.
    pub(crate) fn read(file: &File, offset: u64, length: u64) -> Result<Option<Self>> {
        if length > MAX_BYTES {
            return Err(Error::corrupt(format!("a descriptor of {length} bytes (at most {MAX_BYTES} are expected)")));
        }
        let text = file.read_exact_at("the descriptor", offset, length)?;
        // Padded with NUL; what follows the first one is not text any more.
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.is_empty() { Ok(None) } else { Self::parse(text).map(Some) }
    }

    pub(crate) fn parse(text: &[u8]) -> Result<Self> {
        let mut descriptor = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            let line = line.trim_ascii();
            let first = line.split(|byte| b" \t=".contains(byte)).next().unwrap_or_default();
            match first {
                b"RW" | b"RDONLY" | b"NOACCESS" => {
                    if descriptor.parts.len() >= MAX_PARTS {
                        return Err(Error::unsupported(format!("a disk of more than {MAX_PARTS} parts")));
                    }
                    descriptor.parts.push(line.to_vec());
                }
                // As in QEMU, the first of several wins.
                b"createType" => keep_first(&mut descriptor.create_type, value(line)?.to_string()),
                b"CID" => keep_first(&mut descriptor.content_id, content_id(line)?),
                b"parentCID" => keep_first(&mut descriptor.parent_content_id, content_id(line)?),
                b"parentFileNameHint" => keep_first(&mut descriptor.parent_hint, value(line)?.to_string()),
                b"ddb.uuid.parent" => keep_first(&mut descriptor.parent_uuid, value(line)?.to_string()),
                _ if first.starts_with(b"encryption") => {
                    return Err(Error::unsupported("an encrypted VMDK is not read; decrypt the image"));
                }
                _ => {}
            }
        }
        if let Some(refused) = descriptor.create_type.as_ref().filter(|kind| REFUSED_TYPES.contains(&kind.as_str())) {
            return Err(Error::unsupported(format!("a disk of the type {refused:?} is not read; convert the image")));
        }
        Ok(descriptor)
    }

    /// What the lines about parts say.
    pub(crate) fn lines(&self) -> Result<Vec<Line>> {
        self.parts.iter().map(|line| parse_part(utf8(line)?)).collect()
    }

    /// How long the first part is, in bytes, if it is sparse: what a file that is the whole disk says of itself beside
    /// its name.
    pub(crate) fn own_length(&self) -> Option<u64> {
        let mut words = self.parts.first()?.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let (sectors, kind) = (words.nth(1)?, words.next()?);
        let sectors = core::str::from_utf8(sectors).ok()?.parse().ok().filter(|sectors| *sectors > 0)?;
        if kind == b"SPARSE" { bytes_of(sectors, "the disk").ok() } else { None }
    }
}

/// The size of all parts together, in bytes.
pub(crate) fn size(lines: &[Line]) -> Result<u64> {
    let sum = lines.iter().try_fold(0u64, |sum, line| sum.checked_add(line.length));
    sum.filter(|sum| i64::try_from(*sum).is_ok())
        .ok_or_else(|| Error::corrupt("the parts of the disk add up to more than a disk can have"))
}

fn keep_first<T>(slot: &mut Option<T>, value: T) {
    if slot.is_none() {
        *slot = Some(value);
    }
}

fn utf8(line: &[u8]) -> Result<&str> {
    core::str::from_utf8(line).map_err(|_| {
        Error::unsupported(format!("a line of the descriptor is not UTF-8: {:?}", String::from_utf8_lossy(line)))
    })
}

/// What follows the `=`, without quotes.
fn value(line: &[u8]) -> Result<&str> {
    let line = utf8(line)?;
    let damaged = || Error::corrupt(format!("a line of the descriptor is damaged: {line:?}"));
    let value = line.split_once('=').ok_or_else(damaged)?.1.trim();
    match value.strip_prefix('"') {
        Some(quoted) => Ok(quoted.split_once('"').ok_or_else(damaged)?.0),
        None => Ok(value),
    }
}

fn content_id(line: &[u8]) -> Result<u32> {
    let text = value(line)?;
    u32::from_str_radix(text, 16)
        .map_err(|_| Error::corrupt(format!("a content id that is no hexadecimal number: {text:?}")))
}

/// `ACCESS SECTORS TYPE ["FILE" [OFFSET ...]]`.
fn parse_part(line: &str) -> Result<Line> {
    let damaged = |why: &str| Error::corrupt(format!("the line {line:?} of the descriptor is damaged: {why}"));
    let (before, quoted) = match line.split_once('"') {
        Some((before, quoted)) => (before, Some(quoted)),
        None => (line, None),
    };
    let mut words = before.split_ascii_whitespace();
    let access = words.next();
    let sectors = words.next().ok_or_else(|| damaged("no size"))?;
    let sectors: u64 = sectors.parse().map_err(|_| damaged("the size is no number"))?;
    let length = bytes_of(sectors, "a part")?;
    if length == 0 {
        return Err(damaged("the size is 0"));
    }
    let kind = words.next().ok_or_else(|| damaged("no type"))?;
    // A device may be named after NOACCESS; nobody opens it.
    if access == Some("NOACCESS") {
        return Ok(Line { length, content: Content::NoAccess });
    }
    if kind == "ZERO" {
        return Ok(Line { length, content: Content::Zero });
    }
    if !matches!(kind, "FLAT" | "VMFS" | "SPARSE") {
        return Err(Error::unsupported(format!(
            "a part of the type {kind} is not read (FLAT, VMFS, SPARSE and ZERO are)"
        )));
    }
    let (name, after) = quoted
        .ok_or_else(|| damaged("no file name in quotes"))?
        .split_once('"')
        .ok_or_else(|| damaged("the file name has no closing quote"))?;
    let offset = match after.split_ascii_whitespace().next() {
        Some(text) => Some(text.parse().map_err(|_| damaged("the offset is no number"))?),
        None => None,
    };
    let name = name.to_string();
    let content = match (kind, offset) {
        ("SPARSE", _) => Content::Sparse { name },
        ("FLAT", None) => return Err(damaged("a FLAT part needs an offset")),
        (_, offset) => Content::Flat { name, offset: bytes_of(offset.unwrap_or(0), "the offset of a part")? },
    };
    Ok(Line { length, content })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn part(line: &str) -> Result<Line> {
        parse_part(line)
    }

    #[test]
    fn lines_about_parts() {
        assert_eq!(part("RW 8 ZERO").unwrap(), Line { length: 4096, content: Content::Zero });
        assert_eq!(part("NOACCESS 8 FLAT \"/dev/sda\" 0").unwrap().content, Content::NoAccess);
        let flat = part("RDONLY 1 FLAT \"a b/../c'.vmdk\" 3").unwrap();
        assert_eq!(flat.content, Content::Flat { name: "a b/../c'.vmdk".into(), offset: 1536 });
        let device = part("RW 1 FLAT \"\\\\.\\PhysicalDrive0\" 63 partitionUUID xyz").unwrap();
        assert_eq!(device.content.name(), Some("\\\\.\\PhysicalDrive0"));
        assert_eq!(part("RW 1 VMFS \"x\"").unwrap().content, Content::Flat { name: "x".into(), offset: 0 });
        for bad in [
            "RW",
            "RW 8",
            "RW 0 ZERO",
            "RW -1 ZERO",
            "RW 99999999999999999999 ZERO",
            "RW 36028797018963968 ZERO",
            "RW 8 FLAT",
            "RW 8 FLAT \"x",
            "RW 8 FLAT \"x\"",
            "RW 8 FLAT \"x\" y",
            "RW 8 FLAT x 0",
            "RW 8 FLAT \"x\" 36028797018963968",
        ] {
            assert!(matches!(part(bad), Err(Error::Corrupt(_))), "{bad}");
        }
        for (refused, named) in [("RW 8 VMFSSPARSE \"x\"", "VMFSSPARSE"), ("RW 8 SESPARSE \"x\"", "SESPARSE")] {
            assert!(matches!(part(refused), Err(Error::Unsupported(text)) if text.contains(named)));
        }
    }

    #[test]
    fn values() {
        let descriptor = Descriptor::parse(
            b"# Disk DescriptorFile\r\nversion=1\r\nCID=0000abcd\r\nparentCID = 12345678\r\n\
              createType=custom\r\nCID=5\r\ncreateType=other\r\nparentFileNameHint=\"../a b\"\r\nddb.x = \"\xff\"\r\n",
        )
        .unwrap();
        assert_eq!(descriptor.create_type.as_deref(), Some("custom"));
        assert_eq!(descriptor.content_id, Some(0xabcd));
        assert_eq!(descriptor.parent_content_id, Some(0x1234_5678));
        assert_eq!(descriptor.parent_hint.as_deref(), Some("../a b"));
        assert!(matches!(Descriptor::parse(b"createType=\"seSparse\""), Err(Error::Unsupported(_))));
        assert!(matches!(Descriptor::parse(b"createType=\"x\nCID=1"), Err(Error::Corrupt(_))));
        for id in ["xyz", "0x12", ""] {
            let text = format!("createType=x\nCID={id}");
            assert!(matches!(Descriptor::parse(text.as_bytes()), Err(Error::Corrupt(_))), "{id}");
        }
        assert_eq!(Descriptor::parse(b"hello").unwrap().create_type, None);
        let parts = Descriptor::parse(b"RW 8 FLAT \"\xff\" 0\nRW x\n").unwrap();
        assert_eq!(parts.parts.len(), 2);
        assert!(matches!(parts.lines(), Err(Error::Unsupported(_))));
    }
}
