//! The interrupt of a device, as its workers and its registers share it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use blockhouse_virtio::Notifier;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// A level that the guest reads and acknowledges, and the line that tells it to look.
pub(crate) struct Interrupt {
    /// Why the device interrupts: the register that the guest reads and acknowledges.
    status: AtomicU32,
    /// Set when the driver broke a queue.
    needs_reset: AtomicBool,
    /// Counts changes of config space.
    generation: AtomicU32,
    /// The capacity of the disk when the generation was last read.
    capacity: Mutex<Option<u64>>,
    irq: EventFd,
}

impl Interrupt {
    /// An interrupt that is raised through `irq`, an irqfd.
    pub(crate) fn new(irq: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            capacity: Mutex::new(None),
            irq,
        }
    }

    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// What `ConfigGeneration` reads as: another value after each change, so that a driver that reads a field in
    /// parts knows whether they belong together (section 2.5.3). A disk has its new `capacity` before it is told that
    /// config space changed: that it is not the one of the last time is a change, too.
    pub(crate) fn generation(&self, capacity: u64) -> u32 {
        let mut last = self.capacity.lock().unwrap_or_else(PoisonError::into_inner);
        if last.replace(capacity).is_some_and(|last| last != capacity) {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        self.generation.load(Ordering::Acquire)
    }

    /// Config space changed.
    pub(crate) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Back to the state after power-on.
    pub(crate) fn reset(&self) {
        self.needs_reset.store(false, Ordering::Release);
        self.status.store(0, Ordering::Release);
    }

    /// The device can go no further until it is reset (virtio 1.3, 2.1.2).
    pub(crate) fn ask_for_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, bit: u32) {
        // The reason first, then the edge: the handler finds what it was called for.
        self.status.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.irq.write(1) {
            tracing::warn!(%error, "cannot interrupt the guest");
        }
    }
}

impl Notifier for Interrupt {
    fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn broken(&self) {
        self.ask_for_reset();
    }
}
