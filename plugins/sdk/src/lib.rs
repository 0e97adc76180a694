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
//! The same source builds twice: for `wasm32-wasip2`, where it becomes a component of 20 to 100 KB that
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
    eprintln!("{level:?}: {message}");
}

/// Turns a crate into a component that serves one [`Format`].
///
/// `export!(MyFormat)` exports the `reader` interface; `export!(MyFormat: snapshots)` also exports
/// `snapshots`, for a type that implements [`Snapshots`]; `export!(MyFormat: writer)` and
/// `export!(MyFormat: snapshots, writer)` also export `writer`, for a type that implements [`Writer`].
/// Natively it does nothing.
#[macro_export]
macro_rules! export {
    ($format:ident) => {
        #[cfg(target_family = "wasm")]
        $crate::__export_reader!($format);
    };
    ($format:ident : snapshots) => {
        #[cfg(target_family = "wasm")]
        $crate::__export_reader!($format);
        #[cfg(target_family = "wasm")]
        $crate::__export_snapshots!($format);
    };
    ($format:ident : writer) => {
        #[cfg(target_family = "wasm")]
        $crate::__export_reader!($format);
        #[cfg(target_family = "wasm")]
        $crate::__export_writer!($format);
    };
    ($format:ident : snapshots, writer) => {
        #[cfg(target_family = "wasm")]
        $crate::__export_reader!($format);
        #[cfg(target_family = "wasm")]
        $crate::__export_snapshots!($format);
        #[cfg(target_family = "wasm")]
        $crate::__export_writer!($format);
    };
}
