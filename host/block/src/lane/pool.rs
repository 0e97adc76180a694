//! Threads that wait, so that the threads of queues need not.

use std::collections::VecDeque;
use std::fmt;
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

/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// What each thread of a pool calls first.
type Beginning = Arc<dyn Fn() + Send + Sync>;

/// Threads that do what may wait: calls of components, allocation, flushes. They start when there is work,
/// up to eight, and end when there is none for a while.
#[derive(Clone)]
pub struct Pool(Arc<Owner>);

/// Ends the threads when the last handle is gone.
struct Owner(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    beginning: Option<Beginning>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    ended: bool,
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
        Self::with(None)
    }

    /// A pool whose threads call `beginning` before anything else: to lower their own rights.
    pub fn beginning_with(beginning: impl Fn() + Send + Sync + 'static) -> Self {
        Self::with(Some(Arc::new(beginning)))
    }

    fn with(beginning: Option<Beginning>) -> Self {
        Self(Arc::new(Owner(Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), beginning }))))
    }

    fn add(&self, job: Job) {
        let shared = &self.0.0;
        let mut state = shared.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.threads >= MAX_THREADS {
            drop(state);
            shared.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let theirs = Arc::clone(shared);
        let started = thread::Builder::new().name("disk-pool".to_owned()).spawn(move || theirs.serve());
        if let Err(error) = started {
            let alone = {
                let mut state = shared.lock();
                state.threads -= 1;
                state.threads == 0
            };
            tracing::warn!(%error, "cannot start a thread for a disk");
            // Slow, but never without an answer.
            while alone && let Some(job) = { shared.lock().jobs.pop_front() } {
                job.run();
            }
        }
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

    fn serve(&self) {
        if let Some(beginning) = &self.beginning {
            beginning();
        }
        let mut state = self.lock();
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
            let (woken, timeout) = self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
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
            match operation {
                Operation::Read => backend.read(&buffers, offset),
                Operation::Write => backend.write(&buffers, offset),
                Operation::WriteZeroes { length, may_unmap } => backend.write_zeroes(offset, length, may_unmap),
                Operation::Discard { length } => backend.discard(offset, length),
                Operation::Flush => backend.flush(),
            }
        }));
        let result =
            result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Invalid, "a defect: the request was given up")));
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
            // It cannot fail: a counter that is full is readable.
            let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
        }
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
    /// [`Storage`](ErrorKind::Storage) if the host has no event descriptor left.
    pub fn new(backend: Arc<dyn BlockBackend>, pool: Pool) -> Result<Self> {
        let outcomes = Arc::new(Outcomes::new()?);
        Ok(Self { backend, pool, outcomes, in_flight: 0, taken: Vec::new() })
    }

    /// As [`Lane::start`], which says what the buffers must be.
    pub(super) fn start_raw(&mut self, token: u64, operation: Operation, offset: u64, buffers: Vec<RawBuffer>) {
        self.in_flight += 1;
        let (backend, outcome) = (Arc::clone(&self.backend), Arc::clone(&self.outcomes));
        self.pool.add(Job { backend, token, operation, offset, buffers, outcome });
    }

    pub(super) fn eventfd(&self) -> BorrowedFd<'_> {
        self.outcomes.ready.as_fd()
    }
}

#[allow(unsafe_code)]
impl Lane for PoolLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        let buffers = request.buffers.iter().map(RawBuffer::new).collect();
        self.start_raw(request.token, request.operation, request.offset, buffers);
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
    }
}

impl fmt::Debug for PoolLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolLane").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}
