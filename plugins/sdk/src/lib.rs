//! Write a disk-format component for Blockhouse.
//!
//! A format is a type that implements [`Format`]; [`export!`] turns the crate into a component.
//!
//! ```text
//!   your crate          impl Format for MyFormat      parses, answers `locate`; no unsafe, no std
//!        │ export!(MyFormat)
//!   this crate          File, Context, Error          the same API in a component and natively
//!        ├── in a component:  wasi:filesystem, blockhouse:format/{files,log}   (wasm.rs)
//!        └── natively:        testing::Storage, files in memory                (testing.rs)
//! ```
//!
//! The same source builds twice: for `wasm32-wasip2`, where it becomes a component of 50 KB and more that
//! imports nothing but what its world lists, and natively, where unit tests, Miri and fuzzers run it
//! against [`testing::Storage`]. The author's manual is `plugins/README.md`; the contract that this
//! crate wraps is `wit/`.

#![cfg_attr(target_family = "wasm", no_std)]

extern crate alloc;

pub mod bytes;
mod context;
mod error;
mod file;
mod format;
mod maintenance;

#[cfg(target_family = "wasm")]
mod runtime;
#[cfg(not(target_family = "wasm"))]
pub mod testing;
#[cfg(target_family = "wasm")]
#[doc(hidden)]
pub mod wasm;

pub use context::Context;
pub use error::{Error, Result};
pub use file::File;
pub use format::{
    Access, Allocation, BackingReference, Extent, ExtentList, Fact, FileIndex, Format, Freed, ImageInfo, Located,
    Placement, Snapshot, Snapshots, Writer,
};
pub use maintenance::{
    CheckReport, Checker, Creator, NewImage, OptionHelp, Packer, Rebaser, Repair, Resizer, SnapshotEditor,
};

/// How much a log message matters. See `wit/log.wit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something is wrong and was not returned as an error.
    Error,
    /// Something is odd, and the answer is still right.
    Warn,
    /// Worth knowing once per image.
    Info,
    /// For the author of the component.
    Debug,
}

/// Writes one line to the log of the host (in a component) or to standard error (natively).
pub fn log(level: Level, message: &str) {
    #[cfg(target_family = "wasm")]
    wasm::log(level, message);
    #[cfg(not(target_family = "wasm"))]
    testing::log(level, message);
}

/// Turns a crate into a component that serves one [`Format`].
///
/// `export!(MyFormat)` exports the interface `reader`. Abilities follow after a colon, each with the trait
/// that the type implements: `snapshots` ([`Snapshots`]), `writer` ([`Writer`]), `packer` ([`Packer`]),
/// `creator` ([`Creator`]), `checker` ([`Checker`]), `resizer` ([`Resizer`]), `rebaser` ([`Rebaser`]),
/// `snapshot_editor` ([`SnapshotEditor`]): `export!(MyFormat: snapshots, writer)`. Natively it does nothing.
#[macro_export]
macro_rules! export {
    ($format:ident $(: $($ability:ident),+)?) => {
        #[cfg(target_family = "wasm")]
        $crate::__export_reader!($format);
        $($(
            #[cfg(target_family = "wasm")]
            $crate::__export_ability!($ability $format);
        )+)?
    };
}

/// From the name of an ability to its macro.
#[doc(hidden)]
#[macro_export]
macro_rules! __export_ability {
    (snapshots $format:ident) => {
        $crate::__export_snapshots!($format);
    };
    (writer $format:ident) => {
        $crate::__export_writer!($format);
    };
    (packer $format:ident) => {
        $crate::__export_packer!($format);
    };
    (creator $format:ident) => {
        $crate::__export_creator!($format);
    };
    (checker $format:ident) => {
        $crate::__export_checker!($format);
    };
    (resizer $format:ident) => {
        $crate::__export_resizer!($format);
    };
    (rebaser $format:ident) => {
        $crate::__export_rebaser!($format);
    };
    (snapshot_editor $format:ident) => {
        $crate::__export_snapshot_editor!($format);
    };
}
