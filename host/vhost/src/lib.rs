//! A vhost-user-blk back end: it serves a disk to any virtual machine monitor, over a Unix socket.
//!
//! ```text
//!  front end (QEMU, cloud-hypervisor, …)           this process
//!  ┌────────────────────────┐  Unix socket  ┌─ server ───────────┐  one disk, one socket,
//!  │ messages, files        │──────────────▶│ session ▸ handler  │  one front end at a time
//!  └────────────────────────┘               └─────────┬──────────┘
//!  ┌─ guest memory ─────────┐  mapped       ┌─ ring, one per queue ──────────┐
//!  │ virtqueues, buffers    │◀─────────────▶│ Worker ▸ BlockQueue ▸ disk     │
//!  └────────────────────────┘               └─────────┬──────────────────────┘
//!  ┌─ in-flight memory ─────┐  mapped                 │ taken, answered
//!  │ kept by the front end  │◀────────────────────────┘
//!  └────────────────────────┘
//! ```
//!
//! A back end that was killed loses no request: the front end keeps the memory in which each request in
//! flight is marked ([the specification](https://qemu-project.gitlab.io/qemu/interop/vhost-user.html),
//! "Inflight I/O tracking"), hands it to the next back end, and that one executes them again, first and in
//! their order. What was answered before is in the page cache. Only where it lies can be gone: of a format that
//! allocates, a component knows that alone until a flush. Then the guest gets I/O errors until it is reset, rather
//! than a flush that promises what is lost; one whose front end keeps no such memory cannot be told. Writes that go
//! through (`cache=writethrough`, or the guest's choice) lose nothing at all.
//!
//! # What the front end may do
//! It is another process, perhaps taken over by its guest: every message, number, address and file of it
//! is hostile. Regions that overlap, wrap or go past their file are refused; rings have to lie in guest
//! memory; file descriptors have to be what they are said to be; whatever could be waited for is not, or
//! not by anybody who matters. A message that makes no sense ends its session, with the reason in the log,
//! and the next front end is served. Two things remain that a front end can do. It can do to its own disk
//! what its guest can. And it can shorten a file that is mapped here: touching what is gone ends this
//! process. That is why the disks of different machines belong into different processes.
//!
//! # Why not vhost-user-backend
//! The messages are read and checked by rust-vmm's `vhost`. Its sister `vhost-user-backend`, which would
//! bring event loops and queues as well, answers the messages for requests in flight with an error, and
//! owns the queues: there would be no place for the marks, nor for [`blockhouse_virtio::Worker`].

#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("blockhouse-vhost needs Linux");

mod closing;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod handler;
mod inflight;
mod lines;
mod listener;
mod memory;
mod refusal;
mod ring;
mod server;
mod session;

pub use blockhouse_virtio::{
    BlockDeviceOptions, CacheMode, DEFAULT_POLL, DeviceStats, LATENCY_BUCKETS, MAX_POLL, MAX_QUEUES, Rate, RateLimits,
    RequestKind, RequestStats, latency_bound,
};
pub use error::{Error, Result};
pub use listener::{Listener, SocketIdentity, remove_socket};
pub use ring::MAX_SIZE as MAX_QUEUE_SIZE;
pub use server::{DEFAULT_QUEUE_SIZE, Handle, Server};
