//! One virtqueue as the front end sets it up, and its worker while it runs.
//!
//! ```text
//!  SET_VRING_NUM, _ADDR, _BASE, _KICK, _ENABLE 1 ──▶ complete ──▶ a worker serves it
//!  GET_VRING_BASE, SET_VRING_ENABLE 0            ──▶ the worker stops, nothing is in flight
//! ```
//! A ring is served as soon as it is complete, without waiting for a first kick: after a crash that kick
//! may have been heard by a process that is gone. Whatever changes under a running worker, the worker is
//! stopped for it and started again.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockhouse_block::UnflushedWatch;
use blockhouse_virtio::{BlockDevice, BlockQueue, Worker};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::inflight::InFlightMemory;
use crate::lines::{OfQueue, check_eventfd};
use crate::memory::MemoryMap;
use crate::refusal::{Refusal, Result, refuse};

/// The largest queue, in descriptors: what QEMU can have.
pub const MAX_SIZE: u16 = 1024;

/// Where the three parts of a ring are, in the front end's addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// What all rings of a device have in common.
pub(crate) struct Common {
    pub(crate) device: Arc<BlockDevice>,
    pub(crate) memory: MemoryMap,
    pub(crate) inflight: Option<InFlightMemory>,
    /// What the driver accepted, once it did.
    pub(crate) features: Option<u64>,
    /// What the front end said last about `writeback` in config space: in this session or, as the memory for
    /// requests in flight says, in one before. It does not repeat it, and hears nothing of a new back end.
    pub(crate) writeback: Option<bool>,
    /// Names threads and is in every line of the log.
    pub(crate) name: String,
    /// What this process calls itself in the memory for requests in flight.
    pub(crate) owner: u64,
}

impl Common {
    /// Has requests in flight recorded in this memory from now on, or nowhere; and what its guest believes to be on
    /// the disk.
    pub(crate) fn record_in(&mut self, inflight: Option<InFlightMemory>) {
        let lost = inflight.as_ref().is_some_and(|inflight| inflight.has_lost(self.owner));
        if lost && !self.device.has_lost() {
            let disk = &self.name;
            tracing::error!(
                disk,
                "the process that served this disk before ended with changes that its guest had not flushed. They are \
                 lost: the guest gets I/O errors until it is reset"
            );
        }
        self.device.set_lost(lost);
        self.inflight = inflight;
        self.watch_unflushed();
    }

    /// Has the device and whoever takes over do what the front end said about `writeback`. Nothing is in flight.
    pub(crate) fn settle_writeback(&self) {
        if let Some(writeback) = self.writeback {
            self.device.set_writeback(writeback);
            if let Some(inflight) = &self.inflight {
                inflight.keep_writeback(writeback);
            }
        }
        // What was written through and could not be flushed waits for a flush of the driver's now, or the other way round.
        self.watch_unflushed();
    }

    /// Keeps for whoever takes over whether something is not flushed, from now on and as of now.
    fn watch_unflushed(&self) {
        self.device.watch_unflushed(self.inflight.clone().map(|inflight| -> UnflushedWatch {
            let owner = self.owner;
            Arc::new(move |unflushed| inflight.keep_unflushed(owner, unflushed))
        }));
    }
}

/// One virtqueue.
pub(crate) struct Ring {
    index: u16,
    size: u16,
    addresses: Option<Addresses>,
    /// The next entry of the available ring to take, while no worker runs.
    next_avail: u16,
    kick: Option<File>,
    enabled: bool,
    lines: OfQueue,
    worker: Option<Worker>,
}

impl Ring {
    /// One of each queue of a device.
    pub(crate) fn all(queues: u16) -> Vec<Self> {
        (0..queues).zip(OfQueue::new(queues)).map(|(index, lines)| Self::new(index, lines)).collect()
    }

    fn new(index: u16, lines: OfQueue) -> Self {
        Self { index, size: 0, addresses: None, next_avail: 0, kick: None, enabled: false, lines, worker: None }
    }

    /// The state of the beginning.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.lines.reset();
        *self = Self::new(self.index, self.lines.clone());
    }

    pub(crate) fn set_size(&mut self, size: u32) -> Result<()> {
        self.stop();
        let size = u16::try_from(size).ok().filter(|size| (1..=MAX_SIZE).contains(size) && size.is_power_of_two());
        let Some(size) = size else {
            return refuse!("a queue has a power of two of descriptors, {MAX_SIZE} at most");
        };
        self.size = size;
        self.lines.mend();
        Ok(())
    }

    pub(crate) fn set_addresses(&mut self, addresses: Addresses) {
        self.stop();
        self.addresses = Some(addresses);
        self.lines.mend();
    }

    pub(crate) fn set_next_avail(&mut self, index: u32) -> Result<()> {
        self.stop();
        // Packed rings, which are not offered, have more here.
        self.next_avail = u16::try_from(index).map_err(Refusal::because)?;
        self.lines.mend();
        Ok(())
    }

    pub(crate) fn set_kick(&mut self, kick: Option<File>) -> Result<()> {
        self.stop();
        let Some(kick) = kick else {
            return refuse!("a queue without an eventfd would have to be polled, which is not offered");
        };
        check_eventfd(&kick)?;
        self.kick = Some(kick);
        Ok(())
    }

    pub(crate) fn enable(&mut self, enabled: bool) {
        if !enabled {
            // QEMU says this before it asks where the ring stopped.
            self.finish();
        }
        self.enabled = enabled;
    }

    /// Interrupts go to `call` from now on, or nowhere: then the driver polls. One goes there at once, if the ring is
    /// served: QEMU starts its queues before it says where interrupts go, and exchanges that whenever its guest masks
    /// them. What was answered in between went nowhere.
    pub(crate) fn set_call(&self, call: Option<File>) -> Result<()> {
        self.lines.set_call(call)?;
        if let Some(worker) = &self.worker {
            worker.tell();
        }
        Ok(())
    }

    /// Errors go to `err` from now on, or nowhere.
    pub(crate) fn set_err(&self, err: Option<File>) -> Result<()> {
        self.lines.set_err(err)
    }

    /// Stops the worker. When this returns, no request is in flight.
    pub(crate) fn stop(&mut self) {
        // A worker that died has left requests unanswered, and the record of them is kept.
        if let Some(position) = self.worker.take().and_then(Worker::stop) {
            self.next_avail = position.next_avail;
        }
    }

    /// Stops the ring until it gets another kick, and says where it stopped: all before that is answered, also what
    /// another process had taken. Whoever goes on from there may have another memory for requests in flight.
    pub(crate) fn end(&mut self) -> u16 {
        self.finish();
        self.kick = None;
        self.next_avail
    }

    /// As [`stop`](Self::stop), once everything is answered that another process had taken.
    fn finish(&mut self) {
        if let Some(position) = self.worker.take().and_then(Worker::finish) {
            self.next_avail = position.next_avail;
        }
    }

    /// Whether it lies where guest memory is, as far as the front end said where it lies.
    pub(crate) fn is_in(&self, memory: &MemoryMap) -> bool {
        let (Some(addresses), Some(all)) = (self.addresses, memory.memory()) else { return true };
        self.size == 0 || self.queue(memory, addresses).is_ok_and(|queue| queue.is_valid(all.as_ref()))
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Starts a worker if the ring is complete and none runs.
    pub(crate) fn settle(&mut self, common: &Common) -> Result<()> {
        let (Some(addresses), Some(kick)) = (self.addresses, &self.kick) else {
            return Ok(());
        };
        let (Some(memory), Some(features)) = (common.memory.memory(), common.features) else {
            return Ok(());
        };
        if !self.enabled || self.size == 0 || self.worker.is_some() || self.lines.is_broken() {
            return Ok(());
        }
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return refuse!("the driver speaks the legacy interface; only VIRTIO_F_VERSION_1 is served");
        }
        let mut queue = self.queue(&common.memory, addresses)?;
        if !queue.is_valid(memory.as_ref()) {
            return refuse!("queue {} does not lie in guest memory", self.index);
        }
        let used_idx = queue.used_idx(memory.as_ref(), Ordering::Acquire).map_err(Refusal::because)?.0;
        let mut record = None;
        if let Some(inflight) = &common.inflight {
            let (kept, again) = inflight.record(self.index, self.size, used_idx)?;
            // What was taken was answered or is in flight, whatever the front end believes.
            self.next_avail = used_idx.wrapping_add(u16::try_from(again.len()).map_err(Refusal::because)?);
            if !again.is_empty() {
                let (disk, queue, requests) = (&common.name, self.index, again.len());
                tracing::info!(disk, queue, requests, "requests that were in flight are executed again");
            }
            record = Some((kept, again));
        }
        queue.set_next_used(used_idx);
        queue.set_next_avail(self.next_avail);
        let mut queue = BlockQueue::new(Arc::clone(&common.device), self.index, queue, features);
        if let Some((record, again)) = record {
            queue = queue.recorded(Box::new(record), again);
        }
        let name = format!("{}-queue{}", common.name, self.index);
        let kick = kick.try_clone().map_err(Refusal::because)?;
        let worker = Worker::start(name, queue, Arc::clone(memory), kick, Arc::new(self.lines.clone()))
            .map_err(|error| Refusal::because(error).about(&"cannot start a thread for a queue"))?;
        // Whoever served the ring before may have ended between an answer and the interrupt for it.
        worker.tell();
        self.worker = Some(worker);
        Ok(())
    }

    /// The queue, if its parts are where guest memory is.
    fn queue(&self, memory: &MemoryMap, addresses: Addresses) -> Result<Queue> {
        let translate = |what, user| -> Result<GuestAddress> {
            let Some(guest) = memory.guest_address(user) else {
                return refuse!("the {what} of queue {} is at {user:#x}, outside of guest memory", self.index);
            };
            Ok(guest)
        };
        let mut queue = Queue::new(MAX_SIZE).map_err(Refusal::because)?;
        queue.try_set_size(self.size).map_err(Refusal::because)?;
        let descriptors = translate("descriptor table", addresses.descriptors)?;
        queue.try_set_desc_table_address(descriptors).map_err(Refusal::because)?;
        let available = translate("available ring", addresses.available)?;
        queue.try_set_avail_ring_address(available).map_err(Refusal::because)?;
        let used = translate("used ring", addresses.used)?;
        queue.try_set_used_ring_address(used).map_err(Refusal::because)?;
        queue.set_ready(true);
        Ok(queue)
    }
}
