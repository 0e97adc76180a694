//! One virtqueue: takes requests, has the disk do them, many at a time, returns them in the order in which they
//! end, and interrupts the driver when it asked to be.
//!
//! ```text
//!   available ring ─ take, parse ─▶ begin ─ start ─▶ ┌────────┐
//!                                     ▲              │  lane  │  a request of several operations (ranges, a
//!                                     └── proceed ◀──│        │  write that has to be durable) goes around
//!   used ring ◀─ status ◀─ end ◀──────────┘          └────────┘
//! ```
//!
//! All that is available is taken before anything is submitted, and the driver is told once of all that has
//! ended: a busy queue costs one system call and one interrupt for many requests.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockhouse_block::{LANE_REQUESTS, Lane, LaneRequest, Operation};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, VolatileSlice};

use crate::counters::RequestKind;
use crate::device::BlockDevice;
use crate::execute::{Job, Next, Outcome, Status};
use crate::limit::Limiter;
use crate::report::Fault;
use crate::request::{ChainAgain, Lists, Request};

/// A queue cannot be served any more: the driver broke the ring itself, so that nothing it holds can be trusted,
/// or the host has nothing left to serve it with.
///
/// The transport sets `DEVICE_NEEDS_RESET` (section 2.1.2) and stops the device until it is reset.
#[derive(Debug, thiserror::Error)]
#[error("{source} (virtqueue {queue}); the device waits for a reset")]
pub struct QueueError {
    queue: u16,
    source: Broken,
}

#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the driver broke its virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("the disk cannot be used: {0}")]
    Disk(blockhouse_block::Error),
}

/// What [`BlockQueue::serve`] asks of whoever has it serve.
pub trait Host {
    /// Whether to stop: no more requests are taken, and those in flight are waited for. Asked before requests
    /// are taken, at most [`QUEUE_SIZE`](crate::QUEUE_SIZE) at a time.
    fn stops(&mut self) -> bool;

    /// Whether all that another process had taken ([`BlockQueue::recorded`]) is done before it stops, over whatever
    /// limit. Else it stays in the record.
    fn finishes(&mut self) -> bool {
        false
    }

    /// The driver is to be told of completions.
    fn interrupt(&mut self);

    /// There is nothing to do before the driver notifies, or one of `ready` becomes readable, or the host wants
    /// to stop, or the time `longest` has passed: returns after one of these, or earlier, and whether one of
    /// `ready` may be readable. `in_flight` requests are being waited for. `ready` is the same each time.
    fn wait(&mut self, ready: [Option<BorrowedFd<'_>>; 2], in_flight: usize, longest: Option<Duration>) -> bool;
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
    pub(crate) fn device(&self) -> &BlockDevice {
        &self.device
    }

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

    /// Serves the queue until `host` says stop. When this returns, nothing is in flight any more.
    ///
    /// # Errors
    /// [`QueueError`] if the ring itself is invalid, or the disk has no lane to give; it was logged. The queue
    /// must not be served again.
    pub fn serve<M>(&mut self, memory: &M, host: &mut dyn Host) -> Result<(), QueueError>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        let index = self.index;
        let device = Arc::clone(&self.device);
        let served = match Arc::clone(device.backend()).lane() {
            Ok(lane) => Service::new(self, memory, lane).run(host),
            Err(error) => Err(Broken::Disk(error)),
        };
        served.map_err(|source| {
            let error = QueueError { queue: index, source };
            device.report().fault(Fault::BrokenQueue, None, &error);
            error
        })
    }

    /// Puts a request on the used ring.
    fn give_back<M>(&mut self, memory: &M, head: u16, written: u32) -> Result<(), virtio_queue::Error>
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
        Ok(())
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

/// A request in flight.
struct Pending<'m> {
    head: u16,
    job: Job,
    status: VolatileSlice<'m>,
    /// Bytes of writable data before the status.
    room: usize,
    kind: RequestKind,
    /// Bytes that it moves, discards or makes zero.
    bytes: u64,
    /// When it was taken, or found in the queue with others.
    taken: Instant,
}

/// A queue while it is served. It never leaves [`BlockQueue::serve`], so that the lane is dropped, and with it
/// everything that is in flight, before the memory can go.
struct Service<'q, 'm, M> {
    queue: &'q mut BlockQueue,
    memory: &'m M,
    lane: Box<dyn Lane>,
    /// Requests in flight, by the token that the lane has for them.
    pending: Vec<Option<Pending<'m>>>,
    free: Vec<usize>,
    /// What the lane has just reported, kept for its memory.
    ended: Vec<(u64, blockhouse_block::Result<()>)>,
    /// The lists of a request that has been started, kept for their memory.
    lists: Lists<'m>,
    /// Whether a request was put on the used ring since the driver was last told, or asked about.
    answered: bool,
    /// How long the next request, which is there, has to stay in the queue.
    limited: Option<Duration>,
}

impl<'q, 'm, M> Service<'q, 'm, M>
where
    M: GuestMemory<Bitmap = ()>,
{
    fn new(queue: &'q mut BlockQueue, memory: &'m M, lane: Box<dyn Lane>) -> Self {
        Self {
            queue,
            memory,
            lane,
            pending: (0..LANE_REQUESTS).map(|_| None).collect(),
            free: (0..LANE_REQUESTS).rev().collect(),
            ended: Vec::new(),
            lists: Lists::default(),
            answered: false,
            limited: None,
        }
    }

    fn in_flight(&self) -> usize {
        self.pending.len().saturating_sub(self.free.len())
    }

    fn run(mut self, host: &mut dyn Host) -> Result<(), Broken> {
        let mut hears = true;
        let poll = self.queue.device.poll();
        let mut idle_since: Option<Instant> = None;
        loop {
            let stops = host.stops();
            if hears && !stops {
                self.queue.queue.disable_notification(self.memory)?;
                hears = false;
            }
            let finishes = stops && !self.queue.again.is_empty() && host.finishes();
            let taken = if !stops || finishes { self.take(stops)? } else { 0 };
            self.lane.submit();
            let ended = self.finish()?;
            if taken > 0 || ended > 0 {
                self.count_in_flight();
            }
            if self.answered {
                self.answered = false;
                if self.queue.driver_wants_interrupt(self.memory)? {
                    host.interrupt();
                }
            }
            if stops && self.in_flight() == 0 && (!finishes || self.queue.again.is_empty()) {
                return Ok(());
            }
            if taken > 0 || ended > 0 {
                idle_since = None;
                continue;
            }
            // The driver was asked not to notify: while the queue is looked at there is no need to.
            if !poll.is_zero()
                && !stops
                && self.limited.is_none()
                && idle_since.get_or_insert_with(Instant::now).elapsed() < poll
            {
                std::hint::spin_loop();
                continue;
            }
            idle_since = None;
            // A request may slip in between the last look and the switching on; then this returns true and
            // the loop goes on. With a full lane, or over a limit, there is no use in hearing of more.
            let deaf = stops || self.free.is_empty() || self.limited.is_some();
            hears |= !deaf;
            if self.limited.is_some()
                && let Some(counters) = self.queue.device.counters(self.queue.index)
            {
                counters.limited();
            }
            if (deaf || !self.queue.queue.enable_notification(self.memory)?)
                && host.wait(self.lane.ready(), self.in_flight(), self.limited)
            {
                self.lane.acknowledge();
            }
        }
    }

    /// Takes what is available, or what another process had taken alone, as far as there is room, and starts it.
    /// Returns how many requests that were.
    fn take(&mut self, only_again: bool) -> Result<usize, Broken> {
        let mut count = 0;
        // One look at the clock for all that are taken now, if there are any.
        let mut now = None;
        self.limited = None;
        // Bounded: what makes no sense is answered at once and takes no token.
        while count < LANE_REQUESTS
            && let Some(token) = self.free.last().copied()
        {
            if !only_again && let Some(wait) = self.queue.device.limiter().and_then(Limiter::wait) {
                self.stay(wait)?;
                break;
            }
            if let Some(head) = self.queue.again.pop() {
                let table = GuestAddress(self.queue.queue.desc_table());
                let chain = ChainAgain::new(self.memory, table, self.queue.queue.size(), head);
                self.begin(token, head, *now.get_or_insert_with(Instant::now), chain)?;
            } else if only_again {
                break;
            } else {
                let Some(chain) = self.queue.queue.iter(self.memory)?.next() else { break };
                let head = chain.head_index();
                if let Some(record) = &mut self.queue.record {
                    record.taken(head);
                }
                self.begin(token, head, *now.get_or_insert_with(Instant::now), chain)?;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Leaves what is in the queue there for a while, if there is anything.
    fn stay(&mut self, wait: Duration) -> Result<(), Broken> {
        let BlockQueue { queue, again, .. } = &*self.queue;
        if again.is_empty() && queue.avail_idx(self.memory, Ordering::Acquire)?.0 == queue.next_avail() {
            return Ok(());
        }
        self.limited = Some(wait);
        Ok(())
    }

    /// Pays for a request, if the device is limited.
    fn charge(&self, kind: RequestKind, bytes: u64) {
        if let Some(limiter) = self.queue.device.limiter() {
            let moves = matches!(kind, RequestKind::Read | RequestKind::Write | RequestKind::WriteZeroes);
            limiter.charge(if moves { bytes } else { 0 });
        }
    }

    /// Begins one chain, which was taken at `taken`, under the free `token`.
    fn begin(
        &mut self,
        token: usize,
        head: u16,
        taken: Instant,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<(), Broken> {
        let request = match Request::parse(chain, self.memory, std::mem::take(&mut self.lists)) {
            Ok(request) => request,
            Err(rejected) => {
                self.queue.device.report().fault(Fault::Malformed(rejected.reason), None, &rejected.reason);
                if let Some(status) = rejected.status {
                    write_status(&status, Status::IoError);
                }
                self.charge(RequestKind::Other, 0);
                self.count(RequestKind::Other, Err(()), Duration::ZERO);
                return self.answer(head, 0);
            }
        };
        let room = request.writable.iter().map(VolatileSlice::len).sum();
        let (job, next) = self.queue.device.begin(&request, self.queue.features);
        let (kind, bytes) = (request.operation.kind(), job.bytes());
        self.charge(kind, bytes);
        let pending = Pending { head, job, status: request.status, room, kind, bytes, taken };
        let result = match next {
            Next::End(outcome) => self.end(&pending, outcome, taken),
            Next::Operation(operation, offset) => {
                let buffers = match operation {
                    Operation::Read => request.writable.as_slice(),
                    Operation::Write => request.readable.as_slice(),
                    Operation::WriteZeroes { .. } | Operation::Discard { .. } | Operation::Flush => &[],
                };
                self.free.pop();
                if let Some(place) = self.pending.get_mut(token) {
                    *place = Some(pending);
                }
                start(self.lane.as_mut(), token, operation, offset, buffers);
                Ok(())
            }
        };
        self.lists = (request.readable, request.writable);
        result
    }

    /// Takes what has ended, and goes on with it or answers it. Returns how many operations that were.
    fn finish(&mut self) -> Result<usize, Broken> {
        let mut ended = std::mem::take(&mut self.ended);
        self.lane.complete(&mut |token, result| ended.push((token, result)));
        let count = ended.len();
        // One look at the clock for all of them.
        let mut seen = None;
        for (token, result) in ended.drain(..) {
            let token = usize::try_from(token).unwrap_or(usize::MAX);
            let Some(place) = self.pending.get_mut(token) else { continue };
            let Some(mut pending) = place.take() else { continue };
            match self.queue.device.proceed(&mut pending.job, result, self.queue.features) {
                Next::Operation(operation, offset) => {
                    *place = Some(pending);
                    start(self.lane.as_mut(), token, operation, offset, &[]);
                }
                Next::End(outcome) => {
                    self.free.push(token);
                    self.end(&pending, outcome, *seen.get_or_insert_with(Instant::now))?;
                }
            }
        }
        self.ended = ended;
        Ok(count)
    }

    /// Writes the status of a request and answers it, with the bytes from the start of the writable part that
    /// were certainly written (section 2.7.8.2).
    fn end(&mut self, pending: &Pending<'_>, outcome: Outcome, now: Instant) -> Result<(), Broken> {
        write_status(&pending.status, outcome.status);
        let result = if outcome.status == Status::Ok { Ok(pending.bytes) } else { Err(()) };
        self.count(pending.kind, result, now.saturating_duration_since(pending.taken));
        // The status follows the data; it counts only if there is no gap before it.
        let whole = usize::try_from(outcome.written).is_ok_and(|written| written == pending.room);
        self.answer(pending.head, if whole { outcome.written.saturating_add(1) } else { outcome.written })
    }

    fn count(&self, kind: RequestKind, result: Result<u64, ()>, latency: Duration) {
        if let Some(counters) = self.queue.device.counters(self.queue.index) {
            counters.answered(kind, result, latency);
        }
    }

    fn count_in_flight(&self) {
        if let Some(counters) = self.queue.device.counters(self.queue.index) {
            counters.set_in_flight(self.in_flight());
        }
    }

    fn answer(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.answered = true;
        Ok(self.queue.give_back(self.memory, head, written)?)
    }
}

impl<M> Drop for Service<'_, '_, M> {
    /// What is left of it ends with the lane.
    fn drop(&mut self) {
        if let Some(counters) = self.queue.device.counters(self.queue.index) {
            counters.set_in_flight(0);
        }
    }
}

/// Starts an operation on a lane, whose buffers are slices of guest memory.
#[allow(unsafe_code)]
fn start(lane: &mut dyn Lane, token: usize, operation: Operation, offset: u64, buffers: &[VolatileSlice<'_>]) {
    let token = u64::try_from(token).unwrap_or(u64::MAX);
    // SAFETY: the buffers are in the memory that `Service` borrows for longer than it has the lane, and a
    // service is a local variable of `BlockQueue::serve`, which nobody can leak.
    unsafe { lane.start(&LaneRequest { token, operation, offset, buffers }) };
}

#[cfg(test)]
mod tests;
