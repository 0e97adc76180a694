//! The qcow2 format: a disk that takes only as much space as was written to it.
//!
//! ```text
//!   the image file                                          read by
//!   ┌──────────────┐
//!   │ header       │ sizes, features, names of other files  header.rs
//!   ├──────────────┤
//!   │ L1 table     │─┐ where the L2 tables are              tables.rs
//!   ├──────────────┤ │
//!   │ L2 tables    │◀┘─┐ where each cluster is, and how     tables.rs
//!   ├──────────────┤   │
//!   │ clusters     │◀──┘ data: the host reads it
//!   │              │     compressed: unpacked here          compressed.rs
//!   ├──────────────┤
//!   │ snapshots    │ earlier L1 tables                      snapshots.rs
//!   ├──────────────┤
//!   │ refcounts    │ which clusters are in use      refcounts.rs: only to write
//!   └──────────────┘
//! ```
//!
//! `writer.rs` holds the order in which changes reach the file; `cache.rs` holds them until then, and
//! `areas.rs` keeps data off metadata, `cluster_set.rs` what was freed; `pack.rs` writes compressed clusters. What changes an image as a
//! whole (`resize.rs`, `snapshot_edit.rs`) does so in one step (`transaction.rs`). `create.rs` makes images,
//! `check.rs` holds them against their reference counts, `rebase.rs` names another backing file.
//!
//! Everything that QEMU 10 can create is read, versions 2 and 3, except encrypted images. The format is
//! described in QEMU's docs/interop/qcow2.rst; where that leaves a choice, the answer is QEMU's.
//!
//! The image is not trusted. Lengths and offsets are checked before use, memory is bounded by constants
//! that do not depend on the image (at the top of each module), and so is the time of a call.

#![cfg_attr(target_family = "wasm", no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod areas;
mod cache;
mod check;
mod cluster_set;
mod compressed;
mod create;
mod header;
mod pack;
mod rebase;
mod refcounts;
mod resize;
mod snapshot_edit;
mod snapshots;
mod tables;
mod transaction;
mod writer;

use alloc::vec::Vec;

use blockhouse_plugin::{
    Access, Allocation, Context, Error, File, FileIndex, Format, Freed, ImageInfo, Level, Located, Result, Snapshot,
    Snapshots, Writer, log,
};

use crate::compressed::Descriptor;
use crate::header::Header;
use crate::tables::Map;
use crate::writer::{Parts, Writing};

/// An opened qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    image: File,
    image_size: u64,
    context: Context,
    header: Header,
    map: Map,
    /// The file in which the clusters are, once `connect` has shared it.
    data: Option<FileIndex>,
    /// Kept open as long as the image is.
    data_file: Option<File>,
    access: Access,
    virtual_size: u64,
    /// Once writing has begun.
    writing: Option<Writing>,
}

impl Qcow2 {
    /// Calls `call` with what writing needs.
    fn write<T>(&mut self, call: impl FnOnce(&mut Writing, &mut Parts<'_>) -> Result<T>) -> Result<T> {
        let none = || Error::Other("writing was not begun".into());
        let data = self.data.ok_or_else(none)?;
        let virtual_size = self.virtual_size;
        let Self { image, header, map, writing, data_file, .. } = self;
        let data_file = data_file.as_ref();
        call(writing.as_mut().ok_or_else(none)?, &mut Parts { image, header, map, data, data_file, virtual_size })
    }
}

impl Qcow2 {
    /// Repairs an image that its last writer did not close, before it is changed.
    pub(crate) fn repair_if_dirty(&mut self) -> Result<()> {
        if self.header.has(header::DIRTY) {
            log(Level::Info, "the image was not closed cleanly: its reference counts are made anew");
            self.header = check::repair_dirty(&self.image)?;
            self.image_size = self.image.size()?;
            self.map = Map::new(&self.header, self.image_size);
        }
        Ok(())
    }
}

impl Format for Qcow2 {
    fn open(image: File, context: Context, access: Access) -> Result<(Self, ImageInfo)> {
        let image_size = image.size()?;
        let header = Header::read(&image, image_size, access)?;
        if header.has(header::CORRUPT) {
            log(Level::Warn, "the image is marked corrupt: what is read may be wrong");
        }
        let info = ImageInfo {
            virtual_size: header.virtual_size,
            cluster_size: header.cluster_size(),
            // Allocated clusters could be, but the answer has to hold for the whole disk.
            overwritable: false,
            backing: header.backing.clone(),
            files: header.data_file.iter().cloned().collect(),
            facts: header.facts(),
        };
        let map = Map::new(&header, image_size);
        let virtual_size = header.virtual_size;
        let opened = Self {
            image,
            image_size,
            context,
            header,
            map,
            data: None,
            data_file: None,
            access,
            virtual_size,
            writing: None,
        };
        Ok((opened, info))
    }

    fn connect(&mut self) -> Result<Option<File>> {
        let data_file = match &self.header.data_file {
            Some(name) => Some(self.context.open(name, self.access)?),
            None => None,
        };
        self.data = Some(match &data_file {
            Some(file) => file.share(self.access)?,
            None => self.image.share(self.access)?,
        });
        self.data_file = data_file;
        match &self.header.backing {
            Some(backing) => Ok(Some(self.context.open(&backing.name, Access::ReadOnly)?)),
            None => Ok(None),
        }
    }

    fn locate(&mut self, offset: u64, length: u64, max_extents: u32) -> Result<Located> {
        let data = self.data.ok_or_else(|| Error::Other("locate was called before connect".into()))?;
        let cluster_size = u64::from(self.header.cluster_size());
        let mut owners = self.writing.as_mut().and_then(|writing| writing.owners(cluster_size));
        self.map.locate(&self.image, data, (offset, length), max_extents, owners.as_mut())
    }

    fn unpack(&mut self, token: u64, length: u64) -> Result<Vec<u8>> {
        let descriptor = Descriptor::from_token(token, self.header.cluster_bits)?;
        compressed::unpack(&self.image, self.header.compression, descriptor, length)
    }
}

impl Snapshots for Qcow2 {
    fn list_snapshots(&mut self) -> Result<Vec<Snapshot>> {
        let entries = snapshots::read(&self.image, &self.header)?;
        Ok(entries.into_iter().map(|entry| entry.snapshot).collect())
    }

    fn select_snapshot(&mut self, id: &str) -> Result<u64> {
        let entry = snapshots::find(snapshots::read(&self.image, &self.header)?, id)?;
        let virtual_size = entry.snapshot.virtual_size;
        self.virtual_size = virtual_size;
        self.map.select(entry.l1(&self.header, self.image_size)?, virtual_size);
        Ok(virtual_size)
    }
}

impl Writer for Qcow2 {
    fn begin(&mut self) -> Result<()> {
        let none = || Error::Other("begin was called before connect".into());
        let data = self.data.ok_or_else(none)?;
        if self.access != Access::ReadWrite || self.writing.is_some() {
            return Err(Error::Other("the image was not opened for writing, or writing has begun".into()));
        }
        self.repair_if_dirty()?;
        let Self { image, header, map, virtual_size, data_file, .. } = self;
        let data_file = data_file.as_ref();
        let mut parts = Parts { image, header, map, data, data_file, virtual_size: *virtual_size };
        let writing = Writing::begin(&mut parts, self.image_size)?;
        parts.header.clear_autoclear(parts.image)?;
        self.writing = Some(writing);
        Ok(())
    }

    fn prepare(&mut self, offset: u64, length: u64, max_allocations: u32) -> Result<Vec<Allocation>> {
        self.write(|writing, parts| writing.prepare(parts, offset, length, max_allocations))
    }

    fn commit(&mut self, tickets: &[u64]) -> Result<()> {
        self.write(|writing, parts| writing.commit(parts, tickets))
    }

    fn abandon(&mut self, tickets: &[u64]) -> Result<()> {
        self.write(|writing, _| writing.abandon(tickets))
    }

    fn zero(&mut self, offset: u64, length: u64, keep: bool) -> Result<()> {
        self.write(|writing, parts| writing.zero(parts, offset, length, keep))
    }

    fn discard(&mut self, offset: u64, length: u64) -> Result<()> {
        self.write(|writing, parts| writing.zero(parts, offset, length, false))
    }

    fn flush(&mut self) -> Result<Vec<Freed>> {
        self.write(Writing::flush)
    }

    fn finish(&mut self) -> Result<()> {
        self.write(Writing::finish)
    }
}

blockhouse_plugin::export!(Qcow2: snapshots, writer, packer, creator, checker, resizer, rebaser, snapshot_editor);
