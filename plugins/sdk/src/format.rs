//! What a format implements, and the values it answers with. They mirror `wit/reader.wit`, which is
//! the normative text.

use alloc::string::String;
use alloc::vec::Vec;

use crate::{Context, File, Result};

/// The rights to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Bytes can be read.
    ReadOnly,
    /// Bytes can be read and written.
    ReadWrite,
}

/// One line of what a person may want to know about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// A short name in lower case, words joined by `-`.
    pub name: String,
    /// The value as text.
    pub value: String,
}

impl Fact {
    /// A fact.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

/// The backing file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingReference {
    /// The name exactly as in the image.
    pub name: String,
    /// The declared format, if the image declares one.
    pub format: Option<String>,
}

/// What `open` learned from the image file alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Size of the disk in bytes: a multiple of 512.
    pub virtual_size: u64,
    /// The allocation unit in bytes: a power of two, or 0 if the format has none.
    pub cluster_size: u32,
    /// Every byte is a data extent that may be overwritten in place.
    pub overwritable: bool,
    /// The backing file, if the image names one.
    pub backing: Option<BackingReference>,
    /// Further files that `connect` opens, by their names in the image.
    pub files: Vec<String>,
    /// For people.
    pub facts: Vec<Fact>,
}

/// The index of a shared file, from [`File::share`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileIndex(pub u32);

/// Where a range of bytes lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// As they are, in a shared file.
    Data {
        /// The shared file.
        file: FileIndex,
        /// Byte offset in that file.
        offset: u64,
        /// The host may overwrite them in place.
        overwrite: bool,
    },
    /// They read as zero.
    Zero,
    /// In the backing file, or zero.
    Unallocated,
    /// Packed: `unpack` gives the bytes.
    Packed {
        /// The component's own name for the unit.
        token: u64,
    },
}

/// A range with one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, not 0.
    pub length: u64,
    /// Where the bytes live.
    pub placement: Placement,
}

/// An answer of `locate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Located {
    /// Byte offset of the first extent, at or before the offset that was asked for.
    pub start: u64,
    /// The extents, without gaps.
    pub extents: Vec<Extent>,
}

/// Collects extents in order, joins neighbours that continue each other, and stops at a budget.
#[derive(Debug)]
pub struct ExtentList {
    start: u64,
    end: u64,
    limit: usize,
    extents: Vec<Extent>,
}

impl ExtentList {
    /// An empty list that starts at byte `start` of the disk and takes `max_extents` at most.
    pub fn new(start: u64, max_extents: u32) -> Self {
        Self { start, end: start, limit: usize::try_from(max_extents).unwrap_or(usize::MAX), extents: Vec::new() }
    }

    /// Where the next extent goes: a byte offset in the disk.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Appends `length` bytes. Returns false, and appends nothing, if the budget is used up.
    #[must_use = "stop when the budget is used up"]
    pub fn push(&mut self, length: u64, placement: Placement) -> bool {
        if length == 0 {
            return true;
        }
        let Some(end) = self.end.checked_add(length) else { return false };
        if let Some(last) = self.extents.last_mut() {
            let continues = match (last.placement, placement) {
                (Placement::Zero, Placement::Zero) | (Placement::Unallocated, Placement::Unallocated) => true,
                (
                    Placement::Data { file, offset, overwrite },
                    Placement::Data { file: next_file, offset: next, overwrite: next_overwrite },
                ) => file == next_file && overwrite == next_overwrite && offset.checked_add(last.length) == Some(next),
                _ => false,
            };
            if continues {
                last.length = last.length.saturating_add(length);
                self.end = end;
                return true;
            }
        }
        if self.extents.len() >= self.limit {
            return false;
        }
        self.extents.push(Extent { length, placement });
        self.end = end;
        true
    }

    /// The answer.
    pub fn finish(self) -> Located {
        Located { start: self.start, extents: self.extents }
    }
}

/// A disk format: one value is one opened image.
///
/// Calls come in the order `open`, `connect`, then any number of `locate` and `unpack`; never two at
/// a time. A hostile image must end in an [`Error`](crate::Error), never in a panic: a panic traps
/// the component. It is started again a few times, later and later, and not at all if it had written
/// something that was not flushed; until then the disk answers I/O errors for what is not known of it.
pub trait Format: Sized + 'static {
    /// Reads and checks what the image file itself says. Opens nothing else.
    ///
    /// `context` is kept to open references later, in `connect`.
    ///
    /// # Errors
    /// Corrupt or unsupported images; images that are unsafe to write, if `access` is read-write.
    fn open(image: File, context: Context, access: Access) -> Result<(Self, ImageInfo)>;

    /// Opens what the image refers to, shares the files that extents name, and returns the backing
    /// file: `Some` exactly if [`ImageInfo::backing`] was.
    ///
    /// # Errors
    /// [`Denied`](crate::Error::Denied), from [`Context::open`], if a reference cannot be opened.
    fn connect(&mut self) -> Result<Option<File>>;

    /// Says where the bytes from `offset` on live; see `locate` in `wit/reader.wit` for what an answer may be.
    ///
    /// # Errors
    /// Corrupt metadata.
    fn locate(&mut self, offset: u64, length: u64, max_extents: u32) -> Result<Located>;

    /// Unpacks one packed extent: exactly `length` bytes, or an error. Formats without packed extents
    /// keep this default, which the host has no token to call with.
    ///
    /// # Errors
    /// Damaged packed data.
    fn unpack(&mut self, token: u64, length: u64) -> Result<Vec<u8>> {
        let _ = length;
        Err(crate::Error::Other(alloc::format!("there is no packed extent with token {token}")))
    }
}

/// One snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The id in the image, unique there.
    pub id: String,
    /// The name that a person gave.
    pub name: String,
    /// Size of the disk then, in bytes.
    pub virtual_size: u64,
    /// Size of the saved machine state in bytes, or 0.
    pub vm_state_size: u64,
    /// When it was taken, in seconds since 1970-01-01 UTC.
    pub created_at: u64,
}

/// The ability to read snapshots inside an image; exported with `export!(MyFormat: snapshots)`.
pub trait Snapshots: Format {
    /// Lists the snapshots in the order of the image.
    ///
    /// # Errors
    /// A corrupt snapshot table.
    fn list_snapshots(&mut self) -> Result<Vec<Snapshot>>;

    /// Makes `locate` answer for a snapshot and returns the virtual size from now on, in bytes.
    /// Called after `open`, before `connect`.
    ///
    /// # Errors
    /// No such snapshot, or several of that name.
    fn select_snapshot(&mut self, id: &str) -> Result<u64>;
}

/// One run of reserved space; see `allocation` in `wit/writer.wit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Byte offset in the disk: a multiple of the cluster size.
    pub start: u64,
    /// Length in bytes: a multiple of the cluster size, or up to the end of the disk.
    pub length: u64,
    /// The shared file that takes the bytes.
    pub file: FileIndex,
    /// Byte offset in that file.
    pub offset: u64,
    /// The space reads as zero now.
    pub zeroed: bool,
    /// Names the run in `commit` and `abandon`.
    pub ticket: u64,
}

/// A range of a shared file that nothing refers to any more, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// The shared file.
    pub file: FileIndex,
    /// Byte offset in that file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// The ability to write with allocation; exported with `export!(MyFormat: writer)`. The normative text
/// of each function, and the rule of order that all of them keep, is `wit/writer.wit`.
///
/// After an error of any function the image is as safe as before it, and the call may be made again.
pub trait Writer: Format {
    /// Prepares the image for writing. Called once, after `connect`, for images opened read-write.
    ///
    /// # Errors
    /// Images that cannot be written safely.
    fn begin(&mut self) -> Result<()>;

    /// Reserves space so that the range, or a prefix of it, can be written. What is `overwrite` already
    /// is left out. Nothing that a reader can see changes.
    ///
    /// # Errors
    /// Corrupt metadata, and failures of the storage.
    fn prepare(&mut self, offset: u64, length: u64, max_allocations: u32) -> Result<Vec<Allocation>>;

    /// Publishes reservations whose bytes the host has written: all of them, or none and an error.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), and unknown tickets.
    fn commit(&mut self, tickets: &[u64]) -> Result<()>;

    /// Gives reservations back.
    ///
    /// # Errors
    /// Unknown tickets.
    fn abandon(&mut self, tickets: &[u64]) -> Result<()>;

    /// Makes whole clusters read as zero; keeps their space if `keep` is set and the format can.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported): nothing changed, the host writes zeroes instead.
    fn zero(&mut self, offset: u64, length: u64, keep: bool) -> Result<()>;

    /// Drops the content of whole clusters, which read as zero afterwards, and frees their space.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported): nothing changed.
    fn discard(&mut self, offset: u64, length: u64) -> Result<()>;

    /// Makes all that was committed durable, and returns what became free.
    ///
    /// # Errors
    /// [`Storage`](crate::Error::Storage) if it cannot be promised.
    fn flush(&mut self) -> Result<Vec<Freed>>;

    /// Flushes and marks the image as cleanly closed. The last call.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    fn finish(&mut self) -> Result<()>;
}
