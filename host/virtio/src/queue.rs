//! One virtqueue: takes requests, has them executed, returns them, and interrupts the driver when it
//! asked to be.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, VolatileSlice};

use crate::device::BlockDevice;
use crate::execute::Status;
use crate::report::Fault;
use crate::request::{ChainAgain, Request};

/// The driver broke the queue itself: nothing that it holds can be trusted any more.
///
/// The transport sets `DEVICE_NEEDS_RESET` (section 2.1.2) and stops the device until it is reset.
#[derive(Debug, thiserror::Error)]
#[error("the driver broke virtqueue {queue}: {source}; the device waits for a reset")]
pub struct QueueError {
    queue: u16,
    source: virtio_queue::Error,
}

/// Where [`BlockQueue::process`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// The queue is empty and the driver was asked to notify: wait for that.
    Drained,
    /// The budget is used up and there may be more: call again, without waiting.
    More,
}

/// How far a queue has come, in ring indexes as section 2.7 has them: free-running, modulo 2^16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The next entry of the available ring to take.
    pub next_avail: u16,
    /// The next entry of the used ring to fill. The same, unless requests are in flight.
    pub next_used: u16,
}

/// A record of the requests that were taken and are not answered yet, which outlasts this process: who
/// takes over the queue executes them again.
///
/// A request is named by its head, the index of its first descriptor.
pub trait InFlightRecord: Send {
    /// A request was taken off the available ring, where they are taken in order. Called before it is
    /// executed.
    fn taken(&mut self, head: u16);

    /// A request was executed and is about to be put on the used ring, alone.
    fn answering(&mut self, head: u16);

    /// It is there: the ring's index is now `used_idx`.
    fn answered(&mut self, head: u16, used_idx: u16);
}

/// One queue of a device. It belongs to one worker at a time.
pub struct BlockQueue {
    device: Arc<BlockDevice>,
    index: u16,
    queue: Queue,
    features: u64,
    record: Option<Box<dyn InFlightRecord>>,
    /// Heads of requests that another process took and did not answer, the first one last.
    again: Vec<u16>,
}

impl BlockQueue {
    /// Queue number `index` of `device`, as the driver set it up: `queue` has its addresses and size
    /// and is ready; `features` are those that the driver accepted.
    pub fn new(device: Arc<BlockDevice>, index: u16, mut queue: Queue, features: u64) -> Self {
        queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        Self { device, index, queue, features, record: None, again: Vec::new() }
    }

    /// Keeps `record`. It has the requests at the heads `again` already, in the order in which they were
    /// taken; they are executed first.
    #[must_use]
    pub fn recorded(mut self, record: Box<dyn InFlightRecord>, mut again: Vec<u16>) -> Self {
        again.reverse();
        self.record = Some(record);
        self.again = again;
        self
    }

    /// How far the queue has come.
    pub fn position(&self) -> Position {
        Position { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Serves up to `budget` requests and calls `interrupt` whenever the driver has to be told of a
    /// completion (`VIRTIO_F_EVENT_IDX`, section 2.7.10, is honoured).
    ///
    /// The budget lets the caller look up now and then, however fast the driver adds requests: for
    /// a stop, or for another queue.
    ///
    /// # Errors
    /// [`QueueError`] if the ring itself is invalid; it was logged. The queue must not be processed
    /// again.
    pub fn process<M>(&mut self, memory: &M, budget: u16, mut interrupt: impl FnMut()) -> Result<Progress, QueueError>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        self.serve(memory, budget, &mut interrupt).map_err(|source| {
            let error = QueueError { queue: self.index, source };
            self.device.report().fault(Fault::BrokenQueue, None, &error);
            error
        })
    }

    fn serve<M>(
        &mut self,
        memory: &M,
        budget: u16,
        interrupt: &mut dyn FnMut(),
    ) -> Result<Progress, virtio_queue::Error>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        self.queue.disable_notification(memory)?;
        for _ in 0..budget {
            if let Some(head) = self.again.pop() {
                let table = GuestAddress(self.queue.desc_table());
                let chain = ChainAgain::new(memory, table, self.queue.size(), head);
                let written = self.answer(chain, memory);
                self.give_back(memory, head, written, interrupt)?;
                continue;
            }
            let Some(chain) = self.queue.iter(memory)?.next() else {
                // A request may slip in between the last look and the switching on; then this
                // returns true and the loop goes on.
                if !self.queue.enable_notification(memory)? {
                    return Ok(Progress::Drained);
                }
                self.queue.disable_notification(memory)?;
                continue;
            };
            let head = chain.head_index();
            if let Some(record) = &mut self.record {
                record.taken(head);
            }
            let written = self.answer(chain, memory);
            self.give_back(memory, head, written, interrupt)?;
        }
        Ok(Progress::More)
    }

    /// Puts a request on the used ring.
    fn give_back<M>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
        interrupt: &mut dyn FnMut(),
    ) -> Result<(), virtio_queue::Error>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        if let Some(record) = &mut self.record {
            record.answering(head);
        }
        self.queue.add_used(memory, head, written)?;
        if let Some(record) = &mut self.record {
            record.answered(head, self.queue.next_used());
        }
        if self.driver_wants_interrupt(memory)? {
            interrupt();
        }
        Ok(())
    }

    /// Executes one chain and writes its status. Returns the length for the used ring: the bytes
    /// from the start of the writable part that were certainly written (section 2.7.8.2).
    fn answer<M>(&self, chain: impl Iterator<Item = Descriptor>, memory: &M) -> u32
    where
        M: GuestMemory<Bitmap = ()>,
    {
        match Request::parse(chain, memory) {
            Ok(request) => {
                let outcome = self.device.execute(&request, self.features);
                write_status(&request.status, outcome.status);
                // The status follows the data; it counts only if there is no gap before it.
                let room: usize = request.writable.iter().map(VolatileSlice::len).sum();
                if usize::try_from(outcome.written).is_ok_and(|written| written == room) {
                    outcome.written.saturating_add(1)
                } else {
                    outcome.written
                }
            }
            Err(rejected) => {
                self.device.report().fault(Fault::Malformed(rejected.reason), None, &rejected.reason);
                if let Some(status) = rejected.status {
                    write_status(&status, Status::IoError);
                }
                0
            }
        }
    }

    fn driver_wants_interrupt<M>(&mut self, memory: &M) -> Result<bool, virtio_queue::Error>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        if !self.queue.needs_notification(memory)? {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // Without EVENT_IDX virtio-queue always says yes and leaves the flag to its caller.
        let flags = GuestAddress(self.queue.avail_ring());
        let flags: u16 = memory.load(flags, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn write_status(byte: &VolatileSlice<'_>, status: Status) {
    // One byte, checked to be in memory when the request was parsed: this cannot fail.
    let written = byte.write_slice(&[status.code()], 0);
    debug_assert!(written.is_ok(), "the status byte left guest memory");
}

#[cfg(test)]
mod tests;
