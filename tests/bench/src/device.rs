//! The virtio-blk device in this process, as a transport would have it, without one.
//!
//! ```text
//!   BlockQueue::serve ── before each look at the queue: stop? ──▶ Driver: takes what was answered, offers more
//! ```
//!
//! Driver and device take turns on one thread, so that the instructions of both can be counted. The driver's are
//! few, and the same whatever the device does.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blockhouse_virtio::{BlockDevice, BlockDeviceOptions, BlockQueue, Host, QUEUE_SIZE, RateLimits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::inside::open;
use crate::workload::{Kind, Places, System, Workload};

/// Each request has a header, its data and a status: three descriptors.
const DESCRIPTORS: u16 = 3;
const MAX_DEPTH: usize = 64;
const MAX_REQUEST: u64 = 64 << 10;

// Guest memory: the parts of the queue, then what each request has.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const HEADERS: u64 = 0x8000;
const HEADER: u64 = 16;
const STATUSES: u64 = 0xa000;
const DATA: u64 = 1 << 20;
const MEMORY: usize = 8 << 20;

/// `VIRTIO_F_VERSION_1`: nothing else was negotiated.
const FEATURES: u64 = 1 << 32;

// Of a descriptor (section 2.7.5 of the virtio specification).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// `VRING_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// A device with one disk, which is read-only, and its guest's memory.
pub(crate) struct Device {
    device: Arc<BlockDevice>,
    memory: GuestMemoryMmap,
}

impl Device {
    pub(crate) fn new(image: &Path, format: &str, limits: RateLimits) -> Result<Self> {
        let options = BlockDeviceOptions { limits, ..BlockDeviceOptions::default() };
        let device = Arc::new(BlockDevice::new(Arc::new(open(image, format)?), &options));
        Ok(Self { device, memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])? })
    }

    /// Writes the descriptors of all requests, and rings that are empty.
    fn set_up(&self, size: usize) -> Result<Queue> {
        for slot in 0..MAX_DEPTH as u64 {
            let first = slot * u64::from(DESCRIPTORS);
            let descriptors = [
                (HEADERS + slot * HEADER, u32::try_from(HEADER)?, NEXT),
                (DATA + slot * MAX_REQUEST, u32::try_from(size)?, NEXT | WRITE),
                (STATUSES + slot, 1, WRITE),
            ];
            for (number, (address, length, flags)) in (first..).zip(descriptors) {
                let at = TABLE + number * 16;
                self.memory.write_obj(address, GuestAddress(at))?;
                self.memory.write_obj(length, GuestAddress(at + 8))?;
                self.memory.write_obj(flags, GuestAddress(at + 12))?;
                self.memory.write_obj(u16::try_from(number + 1)?, GuestAddress(at + 14))?;
            }
        }
        self.memory.write_obj([NO_INTERRUPT, 0], GuestAddress(AVAILABLE))?;
        self.memory.write_obj([0_u16, 0], GuestAddress(USED))?;
        let mut queue = Queue::new(QUEUE_SIZE)?;
        queue.set_size(QUEUE_SIZE);
        queue.set_desc_table_address(Some(u32::try_from(TABLE)?), None);
        queue.set_avail_ring_address(Some(u32::try_from(AVAILABLE)?), None);
        queue.set_used_ring_address(Some(u32::try_from(USED)?), None);
        queue.set_ready(true);
        ensure!(queue.is_valid(&self.memory), "the queue is not valid");
        Ok(queue)
    }
}

impl System for Device {
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)> {
        ensure!(workload.kind == Kind::Read && workload.queues == 1, "it only reads");
        ensure!(workload.depth <= MAX_DEPTH && workload.size as u64 <= MAX_REQUEST, "too much for the memory");
        let queue = self.set_up(workload.size)?;
        let mut driver = Driver {
            memory: &self.memory,
            places: workload.places(0, round),
            depth: workload.depth,
            free: (0..workload.depth).collect(),
            offered: 0,
            answered: 0,
            begun: Instant::now(),
            limit,
            running: true,
            done: 0,
            failed: None,
        };
        BlockQueue::new(Arc::clone(&self.device), 0, queue, FEATURES).serve(&self.memory, &mut driver)?;
        match driver.failed {
            Some(error) => Err(error),
            None => Ok((driver.done, driver.begun.elapsed())),
        }
    }
}

/// Keeps so many requests in the queue.
struct Driver<'m> {
    memory: &'m GuestMemoryMmap,
    places: Places,
    depth: usize,
    free: Vec<usize>,
    /// Ring indexes.
    offered: u16,
    answered: u16,
    begun: Instant,
    limit: Duration,
    running: bool,
    done: u64,
    failed: Option<anyhow::Error>,
}

impl Driver<'_> {
    fn turn(&mut self) -> Result<()> {
        let used: u16 = self.memory.load(GuestAddress(USED + 2), Ordering::Acquire)?;
        while self.answered != used {
            let at = USED + 4 + 8 * u64::from(self.answered % QUEUE_SIZE);
            let head: u32 = self.memory.read_obj(GuestAddress(at))?;
            let slot = head / u32::from(DESCRIPTORS);
            let status: u8 = self.memory.read_obj(GuestAddress(STATUSES + u64::from(slot)))?;
            ensure!(status == 0, "a request failed");
            self.free.push(usize::try_from(slot)?);
            self.answered = self.answered.wrapping_add(1);
            self.done += 1;
        }
        self.running &= self.begun.elapsed() < self.limit;
        while self.running
            && let Some(slot) = self.free.pop()
        {
            let Some(place) = self.places.next() else {
                self.free.push(slot);
                self.running = false;
                break;
            };
            // A read (type 0) from a sector.
            self.memory.write_obj([0, place / 512], GuestAddress(HEADERS + slot as u64 * HEADER))?;
            let head = u16::try_from(slot)? * DESCRIPTORS;
            self.memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(self.offered % QUEUE_SIZE)))?;
            self.offered = self.offered.wrapping_add(1);
        }
        Ok(self.memory.store(self.offered, GuestAddress(AVAILABLE + 2), Ordering::Release)?)
    }
}

impl Host for Driver<'_> {
    fn stops(&mut self) -> bool {
        if self.failed.is_none() {
            self.failed = self.turn().err();
        }
        self.failed.is_some() || !self.running && self.free.len() == self.depth
    }

    fn interrupt(&mut self) {}

    fn wait(&mut self, ready: [Option<BorrowedFd<'_>>; 2], _: usize, longest: Option<Duration>) -> bool {
        let mut polled: Vec<_> =
            ready.iter().flatten().map(|ready| PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN)).collect();
        let longest = longest.and_then(|longest| Timespec::try_from(longest).ok());
        let woken = poll(&mut polled, longest.as_ref()).context("cannot wait");
        self.failed = self.failed.take().or(woken.err());
        true
    }
}
