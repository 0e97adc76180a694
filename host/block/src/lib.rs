//! A virtual disk made of image layers: layers say where bytes live, this crate checks that, remembers
//! it, and moves the bytes.
//!
//! ```text
//!   device ──▶ BlockBackend        backend.rs   what a device may ask
//!                  │
//!                 Disk             disk.rs      splits a request into extents, moves their bytes
//!                  │               write.rs     in place where it may; else reserve, fill, publish ──▶ LayerWriter
//!             in-flight table      inflight.rs  a look-up and its I/O are one step     answers checked: space.rs
//!        ┌─────────┼──────────────────┐
//!    hit │         │ miss             │ packed
//!        ▼         ▼                  ▼
//!   extent map   Chain ─── Walk    unit cache   map.rs · chain.rs · units.rs
//!    (flat)      top first, flattens  │
//!        │         │   every answer checked     answer.rs
//!        │     Layer::locate   Layer::unpack    layer.rs    implemented by components in a sandbox
//!        ▼
//!   ImageFile ─ imago ─ preadv, pwritev         file.rs     descriptors that were granted
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | `backend.rs` | [`BlockBackend`]: a disk as devices see it |
//! | `disk.rs` | [`Disk`] and [`DiskOptions`]: requests over any mix of extents |
//! | `guard.rs` | [`HeaderGuard`]: a raw disk that its guest cannot turn into an image |
//! | `write.rs` | what changes a disk: writes, zeroes, discards, flush, close |
//! | `inflight.rs` | the in-flight table: who uses which clusters now |
//! | `lane.rs` | [`Lane`]: many requests of one thread at a time, over io_uring |
//! | `chain.rs` | the layers, the limit on questions, and the walk that flattens their answers |
//! | `answer.rs`, `space.rs` | the check of each answer, of a reader and of a writer; what a lie is |
//! | `flat.rs`, `map.rs` | a flattened extent, and the bounded map of them |
//! | `units.rs` | the cache of unpacked units |
//! | `files.rs`, `file.rs` | the files of a disk by number; [`ImageFile`], a granted file with its rights |
//! | `direct.rs` | direct I/O: alignment, and blocks of which a part is written |
//! | `validity.rs` | [`Validity`]: files that may not be used any more |
//! | `runs.rs` | [`Runs`]: the whole disk as a list, for `blockhouse map` |
//! | `buffers.rs` | the buffers of a request as one run of bytes |
//! | `layer.rs`, `error.rs` | [`Layer`] and [`LayerWriter`], the traits below a disk; [`Error`], one for the whole data path |
//!
//! The crate knows neither WebAssembly nor KVM, and opens no file: what it reads and writes was opened
//! by somebody who checked the grant.
#![deny(unsafe_code)]

mod answer;
mod backend;
mod buffers;
mod chain;
mod direct;
mod disk;
mod error;
mod file;
mod files;
mod flat;
mod guard;
mod inflight;
mod lane;
mod layer;
mod map;
mod runs;
mod space;
mod units;
mod validity;
mod whole;
mod write;

pub use answer::MAX_PACKED_UNIT;
pub use backend::{BlockBackend, SECTOR_SIZE, Topology, UnflushedWatch};
pub use chain::MAX_CHAIN_DEPTH;
pub use disk::{Disk, DiskOptions, Engine};
pub use error::{Error, ErrorKind, Remedy, Result};
pub use file::{Access, FileIdentity, ImageFile, MAX_FILE_OFFSET};
pub use files::MAX_FILES;
pub use guard::HeaderGuard;
pub use lane::{LANE_REQUESTS, Lane, LaneRequest, Operation, Pool, PoolLane, Rings};
pub use layer::{Allocation, Extent, FileIndex, Freed, Layer, LayerInfo, LayerPacker, LayerWriter, Located, Placement};
pub use map::{EXTENT_BYTES, MapStats};
pub use runs::{Run, RunKind, Runs};
pub use validity::Validity;
/// A buffer that somebody else may change while it is used, such as guest memory.
/// `VolatileSlice::from(&mut [u8])` makes one of ordinary memory.
pub use vm_memory::VolatileSlice;
pub use whole::Preallocation;
