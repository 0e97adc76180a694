//! Changing the backing file that an image names.
//!
//! ```text
//!   byte 8: where the name is, and its length
//!   │            header_length                              512                           cluster size
//!   ├─ header ───┼─ backing format ─┼─ other extensions ─┼ end ┼ ... │ ... old name ... new name ... ┤
//!   └────────────────── written at once, last ───────────────────────┘     written before, if here
//! ```
//!
//! All that says there is a backing file, and of which format, is in the first sector, which one write
//! changes. A name that does not fit there as well is written before, where the old image uses nothing,
//! and is durable by then. So a power cut leaves the old reference or the new one. Where the extensions do
//! not fit into the first sector, the format is changed in place if it is the only one and takes the same space;
//! else the names of features are left out, which no program needs.
//!
//! The list of extensions was written by anybody: it can state several formats, of which the last counts, and can
//! end at the name of the backing file instead of an end mark. The new list states one and has an end mark, for the
//! name is elsewhere; where that needs more room than there is, nothing changes.
//!
//! QEMU, docs/interop/qcow2.rst, "Header" and "Header extensions".

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use blockhouse_plugin::bytes::{be_u32, be_u64};
use blockhouse_plugin::{Access, BackingReference, Error, Rebaser, Result};

use crate::Qcow2;
use crate::header::{
    AUTOCLEAR_AT, BITMAPS, EXTENSION_BACKING_FORMAT, EXTENSION_END, EXTENSION_FEATURE_NAMES, MAX_BACKING_NAME,
    MAX_FORMAT_NAME, RAW_EXTERNAL_DATA, V2_LENGTH,
};

/// Written to the file as one: no power cut leaves a part of it.
const SECTOR: usize = 512;
/// Where backing_file_offset and backing_file_size are.
const BACKING_AT: usize = 8;
/// Where header_length is (version 3).
const HEADER_LENGTH_AT: usize = 100;

impl Rebaser for Qcow2 {
    fn set_backing(&mut self, backing: Option<BackingReference>) -> Result<()> {
        if self.access != Access::ReadWrite || self.writing.is_some() {
            return Err(Error::Other("the image was not opened for a change, or was changed already".into()));
        }
        let new = backing.as_ref().map(check).transpose()?;
        let cluster_size = u64::from(self.header.cluster_size());
        let first = self.image.read_exact_at("the first cluster", 0, SECTOR as u64)?;
        let old = Layout::read(self, &first)?;
        let mut sector = first;
        if self.header.version >= 3 {
            let at = usize::try_from(AUTOCLEAR_AT).unwrap_or(usize::MAX);
            let autoclear = be_u64(&sector, at).unwrap_or_default();
            if new.is_some() && autoclear & RAW_EXTERNAL_DATA != 0 {
                return Err(Error::unsupported("a backing file below a raw data file, which holds the whole disk"));
            }
            // No data changes. What unknown features promise about the header is not known.
            put(&mut sector, at, &(autoclear & (BITMAPS | RAW_EXTERNAL_DATA)).to_be_bytes());
        }

        let (name, format) = new.unwrap_or_default();
        let end = old.change_format(&mut sector, format)?;
        let place = if name.is_empty() { 0 } else { old.place_for(name, end, cluster_size)? };
        put(&mut sector, BACKING_AT, &(place as u64).to_be_bytes());
        put(&mut sector, BACKING_AT + 8, &u32::try_from(name.len()).unwrap_or_default().to_be_bytes());

        let inside = SECTOR.saturating_sub(place).min(name.len());
        let (here, there) = name.split_at_checked(inside).unwrap_or_default();
        self.access = Access::ReadOnly;
        if !there.is_empty() {
            self.image.write_at((place + inside) as u64, there)?;
            self.image.sync_data()?;
        }
        if !here.is_empty() {
            put(&mut sector, place, here);
        }
        self.image.write_at(0, &sector)?;
        self.image.sync_data()
    }
}

/// The name and the format of a reference, as bytes.
fn check(backing: &BackingReference) -> Result<(&[u8], &[u8])> {
    let name = backing.name.as_bytes();
    let most = usize::try_from(MAX_BACKING_NAME).unwrap_or(usize::MAX);
    if name.is_empty() || name.len() > most || name.contains(&0) {
        return Err(Error::Other(format!(
            "the name of a backing file has from 1 to {MAX_BACKING_NAME} bytes and no NUL, this one has {}",
            name.len()
        )));
    }
    let format = backing.format.as_deref().unwrap_or_default().as_bytes();
    if format.is_empty() || format.len() as u64 > MAX_FORMAT_NAME || format.contains(&0) {
        return Err(Error::Other(format!(
            "the format of the backing file is {:?}; it is stated, in {MAX_FORMAT_NAME} bytes at most",
            backing.format
        )));
    }
    Ok((name, format))
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at.saturating_add(new.len())) {
        to.copy_from_slice(new);
    }
}

/// An extension with its padding.
fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_be_bytes(), u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// What the first cluster holds behind the header.
struct Layout {
    /// Where the extensions start.
    start: usize,
    /// Where they end, the end mark included.
    end: usize,
    /// The extensions other than the backing format, as they are, if all are in the first sector.
    others: Option<Vec<u8>>,
    /// The same without the names of features, which are for messages only and may be left out.
    needed: Option<Vec<u8>>,
    /// The list has an end mark; else it ends at the name of the backing file.
    ended: bool,
    /// The backing formats: where each is with its padding.
    formats: Vec<Range<usize>>,
    /// The name of the backing file.
    name: Range<usize>,
}

impl Layout {
    /// `sector` is the first one of the file.
    fn read(qcow2: &Qcow2, sector: &[u8]) -> Result<Self> {
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let start = match qcow2.header.version {
            2 => V2_LENGTH,
            _ => u64::from(be_u32(sector, HEADER_LENGTH_AT).unwrap_or_default()),
        };
        // As the header was read.
        let name = be_u64(sector, BACKING_AT).unwrap_or_default();
        let name_length = u64::from(be_u32(sector, BACKING_AT + 8).unwrap_or_default());
        let limit = if name == 0 { u64::from(qcow2.header.cluster_size()) } else { name };
        let mut at = start;
        let mut others = Some(Vec::new());
        let mut needed = Some(Vec::new());
        let mut ended = false;
        let mut formats = Vec::new();
        while at < limit {
            let head = qcow2.image.read_exact_at("a header extension", at, 8)?;
            let kind = be_u32(&head, 0).unwrap_or_default();
            let length = u64::from(be_u32(&head, 4).unwrap_or_default());
            let next = at.saturating_add(8).saturating_add(length.next_multiple_of(8));
            if kind == EXTENSION_END {
                at = at.saturating_add(8);
                ended = true;
                break;
            }
            let place = number(at)..number(next);
            if kind == EXTENSION_BACKING_FORMAT {
                formats.push(place);
            } else {
                let bytes = sector.get(place);
                let add = |list: Option<Vec<u8>>| Some([list?.as_slice(), bytes?].concat());
                others = add(others);
                if kind != EXTENSION_FEATURE_NAMES {
                    needed = add(needed);
                }
            }
            at = next;
        }
        let end = number(at);
        Ok(Self {
            start: number(start),
            end,
            others,
            needed,
            ended,
            formats,
            name: number(name)..number(name.saturating_add(name_length)),
        })
    }

    /// Makes the extensions in `sector` say `format`; empty is no format. Returns where they end.
    fn change_format(&self, sector: &mut [u8], format: &[u8]) -> Result<usize> {
        let new = if format.is_empty() { Vec::new() } else { extension(EXTENSION_BACKING_FORMAT, format) };
        let rewrite = |sector: &mut [u8], others: &Option<Vec<u8>>| {
            let list = [new.as_slice(), others.as_deref()?, &[0; 8]].concat();
            let end = self.start.saturating_add(list.len());
            if end > SECTOR {
                return None;
            }
            let rest = vec![0; SECTOR.saturating_sub(self.start)];
            put(sector, self.start, &rest);
            put(sector, self.start, &list);
            Some(end)
        };
        if let Some(end) = rewrite(sector, &self.others) {
            return Ok(end);
        }
        match self.formats.as_slice() {
            _ if !self.ended => {}
            // Without a backing file nobody asks for its format.
            _ if new.is_empty() => return Ok(self.end),
            [only] if only.end <= SECTOR && only.len() == new.len() => {
                put(sector, only.start, &new);
                return Ok(self.end);
            }
            _ => {}
        }
        rewrite(sector, &self.needed).ok_or_else(|| {
            Error::unsupported(format!(
                "another backing file, or none: the header extensions of the image do not leave room for its format \
                 and for an end mark in the first {SECTOR} bytes, which are what can be changed at once"
            ))
        })
    }

    /// Where a name can be: after `end`, and past the first sector only where nothing is used now.
    fn place_for(&self, name: &[u8], end: usize, cluster_size: u64) -> Result<usize> {
        let fits = |place: &usize| {
            let stop = place.saturating_add(name.len());
            let past = (*place).max(SECTOR)..stop;
            let in_use = |range: &Range<usize>| past.start.max(range.start) < past.end.min(range.end);
            *place >= end && stop as u64 <= cluster_size && !in_use(&self.name) && !in_use(&(self.start..self.end))
        };
        let places = [end, SECTOR.max(end), self.end.max(end), self.name.end.max(end)];
        places.into_iter().find(fits).ok_or_else(|| {
            Error::unsupported(format!(
                "a backing file with a name of {} bytes: the first cluster has no room for it beside what is there",
                name.len()
            ))
        })
    }
}
