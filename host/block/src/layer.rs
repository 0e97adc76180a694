//! One layer of a disk: an opened image that says where its bytes live.
//!
//! A layer does not move guest data; it answers [`Layer::locate`], and [`Disk`](crate::Disk) moves
//! the bytes between the named file and the guest. Answers are *claims*: the disk checks each one
//! before it acts on it (`answer.rs`), because a layer is usually a component that read a stranger's
//! image.

use std::sync::Arc;

use crate::error::Result;
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
/// every further call fails the same way.
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

    /// The file registered as `index`, or `None` if there is no such file.
    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>>;
}
