//! The thread that serves one queue, and the interrupt that it raises.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use blockhouse_virtio::{BlockQueue, Progress};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::memory::Memory;

/// Requests between two looks at the stop flag: one, because whoever stops a queue waits for what is
/// done in between, and a request can be large.
const BUDGET: u16 = 1;

/// The interrupt of a device, as its workers and its registers share it.
pub(crate) struct Interrupt {
    /// Why the device interrupts: the register that the guest reads and acknowledges.
    status: AtomicU32,
    /// Set when the driver broke a queue.
    needs_reset: AtomicBool,
    irq: EventFd,
}

impl Interrupt {
    /// An interrupt that is raised through `irq`, an irqfd.
    pub(crate) fn new(irq: EventFd) -> Self {
        Self { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), irq }
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

    /// Back to the state after power-on.
    pub(crate) fn reset(&self) {
        self.needs_reset.store(false, Ordering::Release);
        self.status.store(0, Ordering::Release);
    }

    /// There is something in a used ring.
    fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
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

/// A queue being served. Dropping it stops the thread, after the request that it is at.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    kick: EventFd,
}

impl Worker {
    /// Serves `queue` whenever `kick` (an ioeventfd) is signalled.
    pub(crate) fn start(
        name: String,
        mut queue: BlockQueue,
        memory: Memory,
        kick: EventFd,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), kick });
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name(name)
                .spawn(move || {
                    let watch = Watch(&interrupt);
                    shared.serve(&mut queue, &memory, watch.0);
                })
                .map_err(Error::host("start a thread for a disk"))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }
}

/// Tells the guest if a worker dies, so that it does not wait for an answer for ever.
struct Watch<'a>(&'a Interrupt);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.ask_for_reset();
        }
    }
}

impl Shared {
    fn serve(&self, queue: &mut BlockQueue, memory: &Memory, interrupt: &Interrupt) {
        while let Ok(_notifications) = self.kick.read() {
            loop {
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                match queue.process(memory.as_ref(), BUDGET, || interrupt.used()) {
                    Ok(Progress::Drained) => break,
                    Ok(Progress::More) => {}
                    // The device has logged it.
                    Err(_) => {
                        interrupt.ask_for_reset();
                        return;
                    }
                }
            }
        }
    }
}

impl Drop for Worker {
    /// Returns when no request is in flight any more: after that, nothing of this queue touches guest
    /// memory or the disk.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Err(error) = self.shared.kick.write(1) {
            tracing::error!(%error, "cannot wake the worker of a queue");
        }
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the worker of a queue panicked");
        }
    }
}
