//! The virtio-blk device: it reads requests off a virtqueue and asks a disk to answer them.
//!
//! ```text
//!  transport (virtio-mmio in blockhouse-vmm, vhost-user in blockhouse-vhost)
//!      │ features, config space          │ a notified queue
//!      ▼                                 ▼
//!  ┌─ device ───────────┐        ┌─ queue ──────────────┐   one per virtqueue,
//!  │ BlockDevice        │◀───────│ BlockQueue           │   owned by one worker
//!  │ offers, serial,    │        │ pop ▸ parse ▸ execute│
//!  │ config space, log  │        │ ▸ used ring ▸ signal │
//!  └─────────┬──────────┘        └──────────┬───────────┘
//!            │                              │ request: header copied,
//!            ▼                              ▼ data as slices of guest memory
//!      BlockBackend::{read, write, write_zeroes, discard, flush}  (blockhouse-block; the disk)
//! ```
//!
//! The crate knows neither a transport nor KVM nor WebAssembly. A transport shows the guest what
//! [`BlockDevice::features`] and [`BlockDevice::read_config`] say, tells it what the driver accepted
//! ([`BlockDevice::accept_features`]) and writes ([`BlockDevice::write_config`]), sets up a
//! [`Queue`](virtio_queue::Queue) from what the guest writes, wraps it in a [`BlockQueue`], and
//! hands it to a [`Worker`] with the eventfd that the guest's notifications arrive on and a
//! [`Notifier`] for interrupts. Everything else is here.
//!
//! # What the guest may do
//! Everything in guest memory is hostile and may change while it is read. So the header of a request
//! is copied once and then judged; descriptors are read once each; a chain has a maximum length; data
//! is never copied but handed to the disk as volatile slices that were checked to lie in guest
//! memory. A request that makes no sense costs its sender an error status and nobody anything else;
//! a ring that makes no sense stops that device until the guest resets it ([`QueueError`]).
//!
//! Section numbers in this crate are those of the virtio specification, version 1.3.

#![deny(unsafe_code)]

mod counters;
mod device;
mod execute;
mod limit;
mod queue;
mod ranges;
mod report;
mod request;
mod worker;

#[cfg(test)]
mod driver;

pub use counters::{DeviceStats, LATENCY_BUCKETS, RequestKind, RequestStats, latency_bound};
pub use device::{
    BlockDevice, BlockDeviceOptions, CacheMode, DEFAULT_POLL, DEVICE_ID, MAX_POLL, MAX_QUEUES, QUEUE_SIZE, SERIAL_LEN,
};
pub use limit::{Rate, RateLimits};
pub use queue::{BlockQueue, Host, InFlightRecord, Position, QueueError};
pub use request::{MAX_DESCRIPTORS, Malformed};
pub use worker::{Beginning, Notifier, Worker};
