//! A Blockhouse disk for VMMs that are built on imago: what takes a `Qcow2` or a `Raw` of imago takes a
//! [`DiskImage`] instead, and the image is parsed in a sandbox.
//!
//! ```text
//!   VMM ─▶ FormatAccess ── where is it? ──▶ DiskImage      image.rs     every byte of the disk lies at its own
//!              │                               │                        offset of one storage
//!              └── move it there, or from ──▶ DiskStorage  storage.rs   that storage: the disk itself
//!                                              │
//!                                          Disk (host/block)           in-flight table, extent map, two-phase writes
//! ```
//!
//! The line that changes, in the shape of libkrun's block device (`examples/imago-vmm` has both sides):
//!
//! ```text
//! let disk = SyncFormatAccess::new(Qcow2::<Box<dyn DynStorage>>::builder_path(path).open_sync(gate)?)?;
//! let disk = SyncFormatAccess::new(DiskImage::new(opener.open(&request)?.disk)?)?;
//! ```
//!
//! # Why mappings name the disk and not its files
//!
//! imago asks a driver where bytes live and then moves them itself. That is how a disk works inside, too, but
//! a place that leaves the disk is one that nobody holds: it stays in the hands of a request while a discard
//! frees the cluster and another write gets it. imago keeps drivers safe from that by `&mut self`; a device
//! with several queues goes through the `unsafe` variants without it. A disk needs the look-up and the I/O
//! to be one step (`host/block/src/inflight.rs`). So the only place that is handed out is *the disk at
//! this offset*, which stays true for as long as the disk lives; the look-up comes with the I/O:
//!
//! | promise of the disk | kept because |
//! |---|---|
//! | a request and a change of the mapping wait for each other | each storage request is one request of the disk |
//! | allocation in two phases: new bytes first, then the mapping | [`prepare_data_mapping`](imago::format::drivers::FormatDriverInstance::prepare_data_mapping) has nothing to prepare; the disk does it inside the write |
//! | freed clusters are not used again under a request | no request holds a place in a file |
//! | what was opened read-only is never written | the disk refuses, whatever the caller made of the mapping |
//! | an acknowledged flush is durable | `flush` and `sync` both are the disk's flush; without news the second is free |
//!
//! Handing out places in read-only files would be safe, and would save nothing: each needs the same look-up
//! and ends in the same system call. Nor could it be complete. The variants of
//! [`ShallowMapping`](imago::ShallowMapping) can be built inside imago only (they are `non_exhaustive`); a
//! driver of ours gets its `Raw` from imago's own [`Raw`](imago::raw::Raw), and there is no way to a `Zero` or
//! a `Special`. Programs that want to know where zeroes are ask the disk
//! ([`Disk::runs`](blockhouse_block::Disk::runs)).
//!
//! # Blocking
//!
//! Futures are ready when they are first polled: the disk has moved the bytes by then, with system calls and
//! calls of the component in the polling thread. imago's own file driver does the same. So a future that is
//! dropped was never started or is done, nothing is left behind to settle, and no lock of the disk is held
//! while imago waits for something else. One thing can make a future wait, before it does anything: that another
//! one just takes note of a disk that was grown.
//!
//! # Both modes of imago
//!
//! The same source is asynchronous or synchronous, as imago's own is; the features `async` (default) and
//! `sync` are imago's. With `sync`, everything below has to follow:
//! `blockhouse-sandbox = { default-features = false, features = ["sync"] }`.

mod error;
mod image;
mod storage;

pub use image::DiskImage;
pub use storage::DiskStorage;
