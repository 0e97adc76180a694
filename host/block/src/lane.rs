//! A lane: one thread's own way to a disk, on which requests are started and end later, in any order.
//!
//! ```text
//!   queue's thread ── start, start, … ──▶ lane ── submit ──▶ kernel (io_uring) ──▶ files
//!        ▲                                 │ whatever needs an answer, a lock or an allocation
//!        └────────── complete ◀──┬─────────┘
//!                                └◀── pool of threads ──▶ BlockBackend, which waits
//! ```
//!
//! The thread of a lane never waits for a component or a lock, and for a file only in small writes into the page
//! cache (`lane/disk.rs`): what the extent map knows goes to the kernel from here; all else is done by the threads
//! of the disk's [`Pool`], with the same functions of [`BlockBackend`] that everybody else calls. Where there is no
//! io_uring, all of it is.
//!
//! That is more than a matter of speed. A request in the kernel has holds (`inflight.rs`) that end when the thread
//! of its lane sees that it has ended: if this thread waited for a hold of anybody, it could be for one of its own, or
//! for somebody who waits for one of its own. So whoever stands before a disk and has something to wait for gives
//! that to the pool as well: [`Lane::start_by`].
//!
//! | file | what it holds |
//! |---|---|
//! | `lane/disk.rs` | the lane of a [`Disk`](crate::Disk): which requests go to the kernel, and what becomes of them |
//! | `lane/ring.rs` | the io_uring, which can do nothing but read and write files that were registered with it |
//! | `lane/pool.rs` | the threads, and [`PoolLane`], the lane of any backend |

mod disk;
mod pool;
mod ring;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;

pub(crate) use self::disk::DiskLane;
pub use self::pool::{Pool, PoolLane};
pub use self::ring::Rings;
use crate::backend::BlockBackend;
use crate::error::Result;

/// Requests that a lane takes at a time: the largest queue that a device offers.
pub const LANE_REQUESTS: usize = 256;

/// What a request on a lane asks for. Each means what the function of the same name of
/// [`BlockBackend`](crate::BlockBackend) does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read into the buffers.
    Read,
    /// Write the buffers.
    Write,
    /// Make a range read as zero.
    WriteZeroes {
        /// Bytes.
        length: u64,
        /// The space may be given back.
        may_unmap: bool,
    },
    /// The content of a range is not needed any more.
    Discard {
        /// Bytes.
        length: u64,
    },
    /// Make what was completed before durable.
    Flush,
}

/// A request on a lane.
#[derive(Debug)]
pub struct LaneRequest<'b> {
    /// Names the request when it ends. The caller's own; two may be the same.
    pub token: u64,
    /// What is to be done.
    pub operation: Operation,
    /// Where, in bytes. Not used by a flush.
    pub offset: u64,
    /// The bytes, in order; none but for reads and writes.
    pub buffers: &'b [VolatileSlice<'b>],
}

impl LaneRequest<'_> {
    /// Has `backend` do it, and waits until that is done.
    ///
    /// # Errors
    /// Those of the function of [`BlockBackend`] that it is.
    pub fn run(&self, backend: &dyn BlockBackend) -> Result<()> {
        match self.operation {
            Operation::Read => backend.read(self.buffers, self.offset),
            Operation::Write => backend.write(self.buffers, self.offset),
            Operation::WriteZeroes { length, may_unmap } => backend.write_zeroes(self.offset, length, may_unmap),
            Operation::Discard { length } => backend.discard(self.offset, length),
            Operation::Flush => backend.flush(),
        }
    }
}

/// One thread's own way to a disk. See the [module](self).
///
/// No function of it waits for another request. A lane that is dropped waits for what is in flight.
#[allow(unsafe_code)]
pub trait Lane: Send + fmt::Debug {
    /// Starts a request. It may be under way at once, or wait for [`submit`](Self::submit).
    ///
    /// Requests that are in flight at the same time have no order, as in virtio: who needs one waits for the
    /// first to end. Not more than [`LANE_REQUESTS`] may be in flight.
    ///
    /// # Safety
    /// The memory of the buffers stays valid until the request has ended, or the lane has been dropped.
    /// (It may change meanwhile: it is guest memory.) A lane must not be leaked.
    unsafe fn start(&mut self, request: &LaneRequest<'_>);

    /// As [`start`](Self::start), for a request that `backend` does instead of the disk, which it stands before: in
    /// a thread that may wait.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    unsafe fn start_by(&mut self, backend: Arc<dyn BlockBackend>, request: &LaneRequest<'_>);

    /// Sends what was started on its way.
    fn submit(&mut self);

    /// Calls `each` with the token and the outcome of every request that has ended. Does not wait.
    fn complete(&mut self, each: &mut dyn FnMut(u64, Result<()>));

    /// Requests that were started and have not been reported by [`complete`](Self::complete).
    fn in_flight(&self) -> usize;

    /// What becomes readable when requests have ended.
    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2];

    /// Says that one of [`ready`](Self::ready) was found readable, before [`complete`](Self::complete).
    fn acknowledge(&mut self);
}
