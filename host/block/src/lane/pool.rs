//! Threads that wait, so that the threads of queues need not.
//!
//! A job never runs on the thread that started it: it may wait for a hold that only this thread can end (`lane.rs`).
//! So there is a thread from the first lane on, or there is no lane; it stays until the last lane has gone. Others
//! come and go with the work, and where the host gives no more, the work takes longer.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::VolatileSlice;

use super::{Lane, LaneRequest, Operation};
use crate::backend::BlockBackend;
use crate::error::{Error, ErrorKind, Result};

/// Threads of one pool.
const MAX_THREADS: usize = 8;

/// How long a thread of a pool waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// What each thread of a pool calls first.
type Beginning = Arc<dyn Fn() + Send + Sync>;

/// Threads that do what may wait: calls of components, allocation, flushes. They start when there is work,
/// up to eight, and end when there is none for a while, but for one, which is there as long as a lane is.
#[derive(Clone)]
pub struct Pool(Arc<Owner>);

/// Ends the threads when the last handle is gone.
struct Owner(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    beginning: Option<Beginning>,
    /// How long a thread waits for work before it ends.
    patience: Duration,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Those that were started and have not ended: one at least while there are lanes.
    threads: usize,
    /// Those of them that have nothing to do, or have not begun.
    idle: usize,
    lanes: usize,
    /// How often the host gave no further thread.
    refused: u64,
    ended: bool,
}

impl State {
    /// Whether a thread may end that has nothing to do.
    fn has_one_to_spare(&self) -> bool {
        self.threads > 1 || self.lanes == 0
    }
}

/// A request with all that it needs.
struct Job {
    backend: Arc<dyn BlockBackend>,
    token: u64,
    operation: Operation,
    offset: u64,
    buffers: Vec<RawBuffer>,
    outcome: Arc<Outcomes>,
}

/// A buffer of a request, without its lifetime.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawBuffer {
    pub(super) base: *mut u8,
    pub(super) length: usize,
}

// SAFETY: it is an address and a length; who turns it into a slice says why it is valid there.
#[allow(unsafe_code)]
unsafe impl Send for RawBuffer {}

impl RawBuffer {
    pub(super) fn new(buffer: &VolatileSlice<'_>) -> Self {
        Self { base: buffer.ptr_guard_mut().as_ptr(), length: buffer.len() }
    }

    /// # Safety
    /// The memory is valid for `'b`, as [`Lane::start`] asks of its caller until the request has ended.
    #[allow(unsafe_code)]
    pub(super) unsafe fn slice<'b>(self) -> VolatileSlice<'b> {
        // SAFETY: it was such a slice, and its memory is still valid, as the caller says.
        unsafe { VolatileSlice::new(self.base, self.length) }
    }
}

impl From<RawBuffer> for libc::iovec {
    fn from(RawBuffer { base, length }: RawBuffer) -> Self {
        Self { iov_base: base.cast(), iov_len: length }
    }
}

impl From<&libc::iovec> for RawBuffer {
    fn from(iovec: &libc::iovec) -> Self {
        Self { base: iovec.iov_base.cast(), length: iovec.iov_len }
    }
}

/// Where requests of one lane end.
struct Outcomes {
    ready: OwnedFd,
    /// Whether there is something in `ended`.
    any: AtomicBool,
    ended: Mutex<Vec<(u64, Result<()>)>>,
    changed: Condvar,
}

impl Pool {
    /// A pool without threads yet.
    pub fn new() -> Self {
        Self::with(None, IDLE)
    }

    /// A pool whose threads call `beginning` before anything else: to lower their own rights.
    pub fn beginning_with(beginning: impl Fn() + Send + Sync + 'static) -> Self {
        Self::with(Some(Arc::new(beginning)), IDLE)
    }

    fn with(beginning: Option<Beginning>, patience: Duration) -> Self {
        let shared = Shared { state: Mutex::default(), work: Condvar::new(), beginning, patience };
        Self(Arc::new(Owner(Arc::new(shared))))
    }

    /// There is a lane more, and a thread at least until [`end_lane`](Self::end_lane).
    fn begin_lane(&self) -> Result<()> {
        let shared = &self.0.0;
        let mut state = shared.lock();
        if state.threads == 0 {
            shared.start(&mut state).map_err(|error| {
                let why = format!(
                    "cannot start a thread for the disk: {error}; let the program have more of them (pids.max of its \
                     cgroup, ulimit -u)"
                );
                Error::new(ErrorKind::Storage, why).with_source(error)
            })?;
        }
        state.lanes = state.lanes.saturating_add(1);
        Ok(())
    }

    fn end_lane(&self) {
        let mut state = self.0.0.lock();
        state.lanes = state.lanes.saturating_sub(1);
        let last = state.lanes == 0;
        drop(state);
        if last {
            // Who waited for as long as it takes need not any more.
            self.0.0.work.notify_all();
        }
    }

    /// Has a thread do it, of which there is one: a lane asks.
    fn add(&self, job: Job) {
        let shared = &self.0.0;
        let mut state = shared.lock();
        state.jobs.push_back(job);
        if state.idle < state.jobs.len()
            && state.threads < MAX_THREADS
            && let Err(error) = shared.start(&mut state)
        {
            state.refused = state.refused.saturating_add(1);
            // A guest can have this happen for each request: a line each time that the number has doubled.
            if state.refused.is_power_of_two() {
                let (threads, refused) = (state.threads, state.refused);
                tracing::warn!(%error, threads, refused, "cannot start a further thread for a disk, which gets slower");
            }
        }
        drop(state);
        shared.work.notify_one();
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.0.lock();
        f.debug_struct("Pool").field("threads", &state.threads).field("waiting", &state.jobs.len()).finish()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.work.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread. Whoever holds `state` sees that there is one more or none.
    fn start(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let theirs = Arc::clone(self);
        thread::Builder::new().name("disk-pool".to_owned()).spawn(move || theirs.serve())?;
        state.threads += 1;
        state.idle += 1;
        Ok(())
    }

    fn serve(&self) {
        if let Some(beginning) = &self.beginning {
            beginning();
        }
        let mut state = self.lock();
        state.idle -= 1;
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job.run();
                state = self.lock();
                continue;
            }
            if state.ended {
                break;
            }
            state.idle += 1;
            let impatient = state.has_one_to_spare();
            let waited = if impatient {
                let waited = self.work.wait_timeout(state, self.patience).unwrap_or_else(PoisonError::into_inner);
                state = waited.0;
                waited.1.timed_out()
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                false
            };
            state.idle -= 1;
            if waited && state.jobs.is_empty() && state.has_one_to_spare() {
                break;
            }
        }
        state.threads -= 1;
    }
}

impl Job {
    fn run(self) {
        let Self { backend, token, operation, offset, buffers, outcome } = self;
        // A defect of ours must not leave a guest without an answer.
        let result = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the lane keeps its caller's promise until it has taken the outcome of this request.
            #[allow(unsafe_code)]
            let buffers: Vec<VolatileSlice<'_>> = buffers.into_iter().map(|buffer| unsafe { buffer.slice() }).collect();
            LaneRequest { token, operation, offset, buffers: &buffers }.run(&*backend)
        }));
        let result =
            result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Invalid, "a defect: the request was given up")));
        // Who sees that all has ended, and lets go of the disk, is the last one.
        drop(backend);
        outcome.add(token, result);
    }
}

impl Outcomes {
    fn new() -> Result<Self> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| {
            Error::new(ErrorKind::Storage, format!("cannot make an event descriptor: {error}"))
                .with_source(std::io::Error::from(error))
        })?;
        Ok(Self { ready, any: AtomicBool::new(false), ended: Mutex::default(), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, Result<()>)>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, token: u64, result: Result<()>) {
        self.lock().push((token, result));
        self.changed.notify_all();
        // One signal is enough until somebody looks.
        if !self.any.swap(true, Ordering::AcqRel) {
            self.signal();
        }
    }

    fn signal(&self) {
        // It cannot fail: a counter that is full is readable.
        let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
    }
}

/// A lane on which every request is done by a pool.
pub struct PoolLane {
    backend: Arc<dyn BlockBackend>,
    pool: Pool,
    outcomes: Arc<Outcomes>,
    in_flight: usize,
    /// The vector that `complete` swaps, kept for its memory.
    taken: Vec<(u64, Result<()>)>,
}

impl PoolLane {
    /// A lane to `backend`, whose requests `pool` does.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if the host has no event descriptor left, or no thread.
    pub fn new(backend: Arc<dyn BlockBackend>, pool: Pool) -> Result<Self> {
        let outcomes = Arc::new(Outcomes::new()?);
        pool.begin_lane()?;
        Ok(Self { backend, pool, outcomes, in_flight: 0, taken: Vec::new() })
    }

    /// As [`Lane::start`], which says what the buffers must be.
    pub(super) fn start_raw(&mut self, token: u64, operation: Operation, offset: u64, buffers: Vec<RawBuffer>) {
        self.add(Arc::clone(&self.backend), token, operation, offset, buffers);
    }

    fn add(
        &mut self,
        backend: Arc<dyn BlockBackend>,
        token: u64,
        operation: Operation,
        offset: u64,
        buffers: Vec<RawBuffer>,
    ) {
        self.in_flight += 1;
        self.pool.add(Job { backend, token, operation, offset, buffers, outcome: Arc::clone(&self.outcomes) });
    }

    /// Has the thread of the lane look at what has ended, whether anything has or not.
    pub(super) fn signal(&self) {
        self.outcomes.signal();
    }

    pub(super) fn eventfd(&self) -> BorrowedFd<'_> {
        self.outcomes.ready.as_fd()
    }
}

#[allow(unsafe_code)]
impl Lane for PoolLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        let backend = Arc::clone(&self.backend);
        // SAFETY: it asks for the same.
        unsafe { self.start_by(backend, request) };
    }

    unsafe fn start_by(&mut self, backend: Arc<dyn BlockBackend>, request: &LaneRequest<'_>) {
        let buffers = request.buffers.iter().map(RawBuffer::new).collect();
        self.add(backend, request.token, request.operation, request.offset, buffers);
    }

    fn submit(&mut self) {}

    fn complete(&mut self, each: &mut dyn FnMut(u64, Result<()>)) {
        if !self.outcomes.any.load(Ordering::Acquire) {
            return;
        }
        let mut taken = std::mem::take(&mut self.taken);
        {
            let mut ended = self.outcomes.lock();
            std::mem::swap(&mut *ended, &mut taken);
            // Under the lock: whoever adds later signals again.
            self.outcomes.any.store(false, Ordering::Release);
        }
        self.in_flight = self.in_flight.saturating_sub(taken.len());
        for (token, result) in taken.drain(..) {
            each(token, result);
        }
        self.taken = taken;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [Some(self.eventfd()), None]
    }

    fn acknowledge(&mut self) {
        let mut count = [0; 8];
        // Nothing to read is as good: only that it is not readable any more matters.
        let _ = rustix::io::read(&self.outcomes.ready, &mut count);
    }
}

impl Drop for PoolLane {
    fn drop(&mut self) {
        let mut ended = self.outcomes.lock();
        while ended.len() < self.in_flight {
            ended = self.outcomes.changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
        drop(ended);
        self.pool.end_lane();
    }
}

impl fmt::Debug for PoolLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolLane").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Instant;

    use super::*;
    use crate::backend::Topology;

    /// A disk that remembers nothing.
    struct Nothing;

    impl BlockBackend for Nothing {
        fn capacity(&self) -> u64 {
            0
        }
        fn is_writable(&self) -> bool {
            true
        }
        fn topology(&self) -> Topology {
            Topology { physical_block_size: 512, optimal_io_size: 512 }
        }
        fn read(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            Ok(())
        }
        fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            Ok(())
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<()> {
            Ok(())
        }
        fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
            Ok(Box::new(PoolLane::new(self, Pool::new())?))
        }
    }

    /// Waits for something that others do.
    fn until(pool: &Pool, what: &str, is: impl Fn(&State) -> bool) {
        let started = Instant::now();
        while !is(&pool.0.0.lock()) {
            assert!(started.elapsed() < Duration::from_secs(20), "never {what}: {pool:?}");
            thread::yield_now();
        }
    }

    /// Threads that end as soon as they have nothing to do: one stays as long as there is a lane.
    #[test]
    fn a_thread_is_there_from_the_first_lane_to_the_last() {
        let pool = Pool::with(None, Duration::ZERO);
        assert_eq!(pool.0.0.lock().threads, 0);
        for _ in 0..3 {
            let mut lanes = [(); 2].map(|()| PoolLane::new(Arc::new(Nothing), pool.clone()).unwrap());
            for round in 0..200 {
                for lane in &mut lanes {
                    (0..16).for_each(|token| lane.start_raw(token, Operation::Flush, 0, Vec::new()));
                }
                until(&pool, "all of them done", |state| state.jobs.is_empty());
                until(&pool, "at rest", |state| state.threads == state.idle && state.threads <= 1);
                assert_eq!(pool.0.0.lock().threads, 1, "round {round}");
                lanes.iter_mut().for_each(|lane| lane.complete(&mut |_, result| result.unwrap()));
            }
            let [first, second] = lanes;
            drop(first);
            assert_eq!(pool.0.0.lock().threads, 1);
            drop(second);
            until(&pool, "without a thread", |state| state.threads == 0);
        }
    }
}
