//! An io_uring that can do nothing but read and write files which were registered with it.
//!
//! The restriction is the kernel's (`IORING_REGISTER_RESTRICTIONS`, io_uring_register(2)): of all that an
//! io_uring can do (opening files and sockets among it, past any seccomp filter) four operations are left, on
//! registered files only. Nothing that happens later in this process takes the restriction back.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

/// Parts of requests in the kernel at a time. The completion queue has room for all of them.
pub(super) const MAX_PARTS: usize = 512;

/// Entries of the submission queue: more are submitted in several turns.
const ENTRIES: u32 = 256;

/// Files that can be registered; requests to others go another way.
const MAX_FIXED: u32 = 1024;

/// `IOSQE_FIXED_FILE` of linux/io_uring.h, as a bit.
const FIXED_FILE: u8 = 1;

/// `IORING_REGISTER_FILES_UPDATE` of linux/io_uring.h.
const REGISTER_FILES_UPDATE: u8 = 6;

/// `IORING_ENTER_GETEVENTS` of linux/io_uring.h.
const IORING_ENTER_GETEVENTS: u32 = 1;

/// A file in the table of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FixedFile(u32);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    FromFile,
    ToFile,
}

pub(super) struct Ring {
    ring: IoUring,
    /// Entries that were pushed and not submitted.
    waiting: usize,
    files: u32,
}

impl Ring {
    /// # Errors
    /// Those of the kernel, which may not have io_uring, or not allow it.
    pub(super) fn new() -> io::Result<Self> {
        let mut builder = IoUring::builder();
        let completions = u32::try_from(MAX_PARTS).unwrap_or(ENTRIES);
        let ring: IoUring = builder.setup_r_disabled().setup_cqsize(completions).build(ENTRIES)?;
        let submitter = ring.submitter();
        let operations = [opcode::Read::CODE, opcode::Readv::CODE, opcode::Write::CODE, opcode::Writev::CODE];
        let mut restrictions = Vec::from(operations.map(Restriction::sqe_op));
        restrictions.push(Restriction::sqe_flags_required(FIXED_FILE));
        restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_files_sparse(MAX_FIXED)?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, waiting: 0, files: 0 })
    }

    /// Registers a file, which the ring keeps open until it is dropped. `None` if no more can be.
    pub(super) fn register(&mut self, file: BorrowedFd<'_>) -> Option<FixedFile> {
        let index = self.files;
        if index >= MAX_FIXED {
            return None;
        }
        let descriptors: [RawFd; 1] = [file.as_raw_fd()];
        match self.ring.submitter().register_files_update(index, &descriptors) {
            Ok(1) => {
                self.files += 1;
                Some(FixedFile(index))
            }
            _ => None,
        }
    }

    /// Queues a transfer between a file at `offset` and the `iovecs`, of which there are at most 1024, of less
    /// than 2^31 bytes in all. Its outcome comes with `user_data`.
    ///
    /// # Safety
    /// The iovecs, and the memory that they name, stay valid until the outcome has been taken.
    pub(super) unsafe fn push(
        &mut self,
        direction: Direction,
        FixedFile(file): FixedFile,
        offset: u64,
        iovecs: &[libc::iovec],
        user_data: u64,
    ) -> io::Result<()> {
        let file = types::Fixed(file);
        let entry: squeue::Entry = match *iovecs {
            // One buffer needs no list of buffers, which the kernel would have to copy.
            [buffer] => {
                let base = buffer.iov_base.cast::<u8>();
                let length = u32::try_from(buffer.iov_len).map_err(io::Error::other)?;
                match direction {
                    Direction::FromFile => opcode::Read::new(file, base, length).offset(offset).build(),
                    Direction::ToFile => opcode::Write::new(file, base, length).offset(offset).build(),
                }
            }
            _ => {
                let count = u32::try_from(iovecs.len()).map_err(io::Error::other)?;
                match direction {
                    Direction::FromFile => opcode::Readv::new(file, iovecs.as_ptr(), count).offset(offset).build(),
                    Direction::ToFile => opcode::Writev::new(file, iovecs.as_ptr(), count).offset(offset).build(),
                }
            }
        }
        .user_data(user_data);
        // SAFETY: what the entry points to stays valid, as the caller says.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::Error::other("the ring is full"))?;
        }
        self.waiting += 1;
        Ok(())
    }

    /// Hands the kernel what was pushed. After an error the rest of it is still there.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.waiting > 0 {
            match self.ring.submit()? {
                0 => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                count => self.waiting = self.waiting.saturating_sub(count),
            }
        }
        Ok(())
    }

    /// Entries that the kernel has not got.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Waits until something has ended of what the kernel has got.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        // SAFETY: it hands over no entries, and there is no argument.
        let waited = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, IORING_ENTER_GETEVENTS, None) };
        match waited {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// The next outcome: `user_data`, and the bytes that were moved or a negative errno.
    pub(super) fn next(&mut self) -> Option<(u64, i32)> {
        let entry = self.ring.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }
}

impl Ring {
    /// Gives the files back, while nothing is in the kernel.
    fn release(&mut self) -> io::Result<()> {
        let none: Vec<RawFd> = vec![-1; usize::try_from(self.files).unwrap_or_default()];
        if !none.is_empty() {
            self.ring.submitter().register_files_update(0, &none)?;
            self.files = 0;
        }
        Ok(())
    }
}

impl Drop for Ring {
    /// Gives the files back now. The kernel takes a ring apart some time after its descriptor was closed, and
    /// until then its files would stay open, and locked for everybody else.
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(%error, "the kernel keeps the files of a ring for a while");
        }
    }
}

/// Rings that are made before they are needed, for a program that gives up the right to make any: a lane takes one,
/// and gives it back. A clone is the same ones. None by default.
#[derive(Clone, Default)]
pub struct Rings(Arc<Made>);

#[derive(Default)]
struct Made {
    /// Those that no lane has.
    left: Mutex<Vec<Ring>>,
    count: usize,
}

impl Rings {
    /// Makes `count` rings, one for each lane that there is at a time; fewer where the host has none or no more.
    pub fn make(count: usize) -> Self {
        let rings = (0..count).map_while(|_| {
            Ring::new().inspect_err(|error| tracing::info!(%error, "no io_uring here: threads read and write")).ok()
        });
        let rings: Vec<Ring> = rings.collect();
        Self(Arc::new(Made { count: rings.len(), left: Mutex::new(rings) }))
    }

    /// How many there are that no lane has.
    pub fn left(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn take(&self) -> Option<Ring> {
        self.lock().pop()
    }

    /// Takes a ring back, of which nothing is in the kernel any more, nor waits to be. One that a lane made for itself
    /// ends.
    pub(super) fn give_back(&self, mut ring: Ring) {
        let mut left = self.lock();
        if left.len() < self.0.count {
            match ring.release() {
                Ok(()) => left.push(ring),
                Err(error) => tracing::warn!(%error, "a ring is not used again"),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.0.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rings").field("left", &self.left()).finish()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor, and the borrow keeps the ring.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}
