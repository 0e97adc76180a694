//! Abilities that change an image as a whole. The normative text of each is the `.wit` file of its name.

use alloc::string::String;
use alloc::vec::Vec;

use crate::{BackingReference, File, Format, Result, Snapshots, Writer};

/// An option of [`Creator::create`], described for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionHelp {
    /// The name: `cluster-size`.
    pub name: String,
    /// What it may be.
    pub values: String,
    /// What it is if it is not given.
    pub default: String,
    /// What it is for, in a sentence.
    pub about: String,
}

impl OptionHelp {
    /// A description.
    pub fn new(name: &str, values: &str, default: &str, about: &str) -> Self {
        Self { name: name.into(), values: values.into(), default: default.into(), about: about.into() }
    }
}

/// An image to be made; see `new-image` in `wit/creator.wit`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes: a multiple of 512.
    pub virtual_size: u64,
    /// The backing file to name, which is not opened.
    pub backing: Option<BackingReference>,
    /// Options by name and value, each name at most once.
    pub options: Vec<(String, String)>,
}

/// The ability to make new images; exported with `export!(MyFormat: creator)`.
pub trait Creator: Format {
    /// Lists what `create` understands.
    fn create_options() -> Vec<OptionHelp>;

    /// Writes an empty image into an empty file, and makes it durable.
    ///
    /// # Errors
    /// [`Other`](crate::Error::Other) for options that cannot be; failures of the storage.
    fn create(image: File, new: NewImage) -> Result<()>;
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Space that is counted as used and is not.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check found; see `check-report` in `wit/checker.wit`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that can lose data, before any repair.
    pub corruptions: u64,
    /// Clusters that are counted as used and are not, before any repair.
    pub leaks: u64,
    /// How many of the corruptions were repaired.
    pub corruptions_repaired: u64,
    /// How many of the leaks were repaired.
    pub leaks_repaired: u64,
    /// The first of the findings, a line each.
    pub findings: Vec<String>,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of these, those with space of their own in the image.
    pub allocated_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
    /// The end of the last cluster in use, in bytes of the file.
    pub image_end: u64,
}

/// The ability to check and repair images; exported with `export!(MyFormat: checker)`.
pub trait Checker: Format {
    /// Checks an image, also one that is marked dirty or corrupt, and repairs what it is asked to.
    ///
    /// # Errors
    /// A header that cannot be used; failures of the storage. All else that is wrong is a finding.
    fn check(image: File, repair: Option<Repair>) -> Result<CheckReport>;
}

/// The ability to change the size of a disk; exported with `export!(MyFormat: resizer)`.
pub trait Resizer: Format {
    /// Changes the size, durably, as the last call. See `wit/resizer.wit`.
    ///
    /// # Errors
    /// What the format cannot do, corrupt metadata, failures of the storage. The size is then what it was.
    fn resize(&mut self, virtual_size: u64, hide_backing: bool) -> Result<()>;
}

/// The ability to change the backing file that an image names; exported with
/// `export!(MyFormat: rebaser)`.
pub trait Rebaser: Format {
    /// Makes the image name another backing file, durably, as the last call. See `wit/rebaser.wit`.
    ///
    /// # Errors
    /// Names that do not fit, failures of the storage. The image then names what it named.
    fn set_backing(&mut self, backing: Option<BackingReference>) -> Result<()>;
}

/// The ability to change the snapshots inside an image; exported with
/// `export!(MyFormat: snapshots, snapshot_editor)`. Each call is the last. See `wit/snapshot-editor.wit`.
pub trait SnapshotEditor: Snapshots {
    /// Keeps the present state as a snapshot and returns its id. The time is since 1970-01-01 UTC.
    ///
    /// # Errors
    /// Corrupt metadata, limits of the format, failures of the storage.
    fn create_snapshot(&mut self, name: &str, seconds: u64, nanoseconds: u32) -> Result<String>;

    /// Makes the disk what it was at a snapshot.
    ///
    /// # Errors
    /// As [`create_snapshot`](Self::create_snapshot); no such snapshot.
    fn apply_snapshot(&mut self, id: &str) -> Result<()>;

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// As [`apply_snapshot`](Self::apply_snapshot).
    fn delete_snapshot(&mut self, id: &str) -> Result<()>;
}

/// The ability to write packed data; exported with `export!(MyFormat: writer, packer)`.
pub trait Packer: Writer {
    /// Packs one cluster and makes it part of the disk. False, and nothing changed, if it does not get
    /// smaller.
    ///
    /// # Errors
    /// As [`Writer::commit`].
    fn pack(&mut self, offset: u64, bytes: &[u8]) -> Result<bool>;
}
