//! One layer of a disk: an opened image that says where its bytes live.
//!
//! A layer does not move guest data; it answers [`Layer::locate`], and [`Disk`](crate::Disk) moves
//! the bytes between the named file and the guest. Answers are *claims*: the disk checks each one
//! before it acts on it (`answer.rs`), because a layer is usually a component that read a stranger's
//! image.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::file::ImageFile;

/// Names a file that a layer registered, by the order of registration, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIndex(pub u32);

/// Where one range of a layer's bytes lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// As they are, in a registered file. Bytes past the end of that file read as zero.
    Data {
        /// The file.
        file: FileIndex,
        /// Byte offset in that file.
        offset: u64,
        /// Whether the bytes may be overwritten in place without telling the layer.
        overwrite: bool,
    },
    /// They read as zero, whatever the layer below holds.
    Zero,
    /// The layer says nothing: ask the layer below; zero if there is none.
    Unallocated,
    /// Packed (compressed): [`Layer::unpack`] gives the bytes of the whole extent.
    Packed {
        /// The layer's own name for the packed unit; passed back to it, never interpreted.
        token: u64,
    },
}

/// A range with one answer. Where it starts follows from its place in a [`Located`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, not 0.
    pub length: u64,
    /// Where the bytes live.
    pub placement: Placement,
}

/// An answer of [`Layer::locate`]: extents without gaps, from `start` on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Located {
    /// Byte offset in the layer at which the first extent starts; at or before the offset asked for.
    pub start: u64,
    /// The extents, each starting where the one before it ends.
    pub extents: Vec<Extent>,
}

/// What is fixed about a layer once it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// The image as messages name it: the path under which it was opened.
    pub name: String,
    /// The declared format.
    pub format: String,
    /// The size of the layer in bytes: a multiple of 512. A layer above may be shorter or longer.
    pub virtual_size: u64,
    /// The allocation unit in bytes, a power of two, or 0 if the format has none.
    pub cluster_size: u32,
    /// Whether every byte is a data extent that may be overwritten in place, so that the layer can
    /// be the top of a writable disk without any writer ability. True of raw images opened for writing.
    pub overwritable: bool,
}

/// An opened image. Calls may come from any thread; an implementation serializes what it must.
///
/// Promises of the caller: `locate` is asked for ranges inside `virtual_size` only, and `unpack` for
/// tokens that this layer returned. Promises of the implementation: no call blocks for longer than
/// its documented time limit; after an error of kind [`Component`](crate::ErrorKind::Component)
/// every further call fails the same way, unless it [may recover](Self::may_recover).
pub trait Layer: Send + Sync {
    /// What is fixed about it.
    fn info(&self) -> &LayerInfo;

    /// Says where the bytes of `offset..offset + length` live.
    ///
    /// The answer must contain `offset`; it may stop early, or go past what was asked, and it has
    /// at most `max_extents` extents.
    ///
    /// # Errors
    /// What the component said, or [`Component`](crate::ErrorKind::Component) if it broke down.
    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> Result<Located>;

    /// The bytes of one packed extent: exactly `length` of them, or an error.
    ///
    /// # Errors
    /// As [`locate`](Self::locate).
    fn unpack(&self, token: u64, length: u64) -> Result<Vec<u8>>;

    /// Whether further calls may succeed after an error of kind [`Component`](crate::ErrorKind::Component),
    /// because the layer starts its component again. What was answered before stays true then. Not asked after
    /// a wrong answer: who gave one is not called any more.
    fn may_recover(&self) -> bool {
        false
    }

    /// Makes the image larger, durably: it has `size` bytes then, more than before, and what is added reads as
    /// zero, also where the layer below, of `below` bytes, is longer. What [`info`](Self::info) says stays what it
    /// said. Called while nothing else is called, and after a flush; where the image lies may be another
    /// place then.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if the layer cannot: nothing changed. Else as
    /// [`LayerWriter::commit`]; the image has one of the two sizes, or over a longer layer one in between, which
    /// [`size`](Self::size) says as far as it is durable. If it may be larger than that, further calls fail.
    fn grow(&self, size: u64, below: u64) -> Result<()> {
        let _ = (size, below);
        Err(Error::new(ErrorKind::Unsupported, "its size cannot be changed while it is in use"))
    }

    /// The size of the image in bytes, durably: what [`grow`](Self::grow) made of that in [`info`](Self::info).
    fn size(&self) -> u64 {
        self.info().virtual_size
    }

    /// The file registered as `index`, or `None` if there is no such file.
    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>>;

    /// The ability to write with allocation, if the layer has it and was opened for writing.
    fn writer(&self) -> Option<&dyn LayerWriter>;

    /// The ability to write packed data, if the layer has it and was opened for writing.
    fn packer(&self) -> Option<&dyn LayerPacker>;
}

/// One run of space that a layer reserved. Checked before use, as every answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Byte offset in the layer at which it starts: a multiple of the cluster size.
    pub start: u64,
    /// Length in bytes: a multiple of the cluster size, or up to the end of the layer.
    pub length: u64,
    /// The file that takes the bytes.
    pub file: FileIndex,
    /// Byte offset in that file.
    pub offset: u64,
    /// The space reads as zero now, so that zeroes need not be written.
    pub zeroed: bool,
    /// Names the run in `commit` and `abandon`.
    pub ticket: u64,
}

/// A range of a file that nothing refers to any more, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// The file.
    pub file: FileIndex,
    /// Byte offset in that file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Writing with allocation, in two phases; the host's view of `wit/writer.wit`, which is the normative
/// text of each function. `begin` was called when the layer was opened.
pub trait LayerWriter: Send + Sync {
    /// Reserves space for a range, or for a prefix of it. What is `overwrite` already is left out.
    ///
    /// # Errors
    /// As [`Layer::locate`]; [`Corrupt`](crate::ErrorKind::Corrupt) if writing would damage the image.
    fn prepare(&self, offset: u64, length: u64, max_allocations: u32) -> Result<Vec<Allocation>>;

    /// Publishes reservations whose bytes have been written.
    ///
    /// # Errors
    /// As [`Layer::locate`]. Then nothing of it was published, and the disk abandons the reservations.
    fn commit(&self, tickets: &[u64]) -> Result<()>;

    /// Gives reservations back.
    ///
    /// # Errors
    /// As [`Layer::locate`].
    fn abandon(&self, tickets: &[u64]) -> Result<()>;

    /// Makes a range of whole clusters read as zero.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported): nothing changed, write zeroes instead.
    fn zero(&self, offset: u64, length: u64, keep: bool) -> Result<()>;

    /// Drops the content of a range of whole clusters: it reads as zero afterwards.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported): nothing changed, the content stays.
    fn discard(&self, offset: u64, length: u64) -> Result<()>;

    /// Makes all that was committed durable, after the host has made the data durable. Returns what
    /// became free.
    ///
    /// # Errors
    /// [`Storage`](crate::ErrorKind::Storage) if it cannot be promised.
    fn flush(&self) -> Result<Vec<Freed>>;

    /// Flushes and marks the image as cleanly closed. The last call.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    fn finish(&self) -> Result<()>;
}

/// Writing packed data; the host's view of `wit/packer.wit`.
pub trait LayerPacker: Send + Sync {
    /// Packs the cluster at `offset`, with the bytes up to its end or the end of the layer, and makes it
    /// part of the layer. False, and nothing changed, if they do not get smaller.
    ///
    /// # Errors
    /// As [`LayerWriter::commit`].
    fn pack(&self, offset: u64, bytes: &[u8]) -> Result<bool>;
}
