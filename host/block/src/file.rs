//! A granted file, ready for the host's own I/O: [`imago::file::File`] with the rights that were granted.
//!
//! ```text
//!  VolatileSlice … ──▶ ImageFile ── rights, range, alignment, IOV_MAX ──▶ imago File ──▶ preadv/pwritev
//!                          └────── own descriptor ──▶ fstat, fdatasync, fallocate (and an engine of its own, by `AsFd`)
//! ```
//!
//! The rights are enforced here, whatever a layer claimed about the file (`host/ARCHITECTURE.md`, invariant 5).

use std::fs;
use std::io::{self, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use imago::StorageOpenOptions;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::ext::StorageExt;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::direct::Direct;
use crate::error::{Error, ErrorKind, Result};
use crate::inflight::Kept;
use crate::validity::Validity;

/// The highest byte offset at which a file range may end (`off_t` is signed).
pub const MAX_FILE_OFFSET: u64 = i64::MAX.unsigned_abs();

/// Buffers in one system call (`IOV_MAX` of Linux, uio.h).
const MAX_BUFFERS: usize = 1024;

/// From this many bytes on a write takes longer than it takes to wake who waits for it.
const LONG_WRITE: u64 = 64 << 10;

/// What the host may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Bytes can be read.
    ReadOnly,
    /// Bytes can be read and written.
    ReadWrite,
}

impl Access {
    /// Whether bytes can be written.
    pub const fn is_writable(self) -> bool {
        matches!(self, Self::ReadWrite)
    }
}

/// Which file it is, whatever its name: two files are the same file if their identities are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIdentity {
    /// `st_dev` of stat(2).
    pub device: u64,
    /// `st_ino` of stat(2).
    pub inode: u64,
}

/// An open file that was granted, with the right that it was granted with and a name for messages.
///
/// Every call may be made from any thread, and calls may overlap in time.
#[derive(Debug)]
pub struct ImageFile {
    storage: imago::file::File,
    /// A second descriptor of the same open file: imago lends out none, and keeps readers out
    /// while it syncs.
    descriptor: fs::File,
    access: Access,
    name: String,
    identity: FileIdentity,
    /// What direct I/O asks of transfers. `None` if the file goes through the page cache.
    direct: Option<Direct>,
    /// Set when a write has finished (well or badly) that no sync has covered.
    unsynced: AtomicBool,
    /// Who watches the file, if anybody does.
    validity: Option<Arc<Validity>>,
    /// Held during a sync, so that a second flush waits for the first.
    syncing: Mutex<()>,
    /// True once a sync has failed.
    sync_failed: AtomicBool,
    /// Another description of the same file, open for as long.
    _kept: Option<fs::File>,
    /// Held during long writes into the page cache. File systems let one writer in at a time, and those who wait
    /// for it there do so on a processor that somebody else could use.
    writing: Mutex<()>,
}

impl ImageFile {
    /// Takes an open file. `name` is what messages call it; it is never opened.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if it is neither a regular file nor a block device, if
    /// `access` is more than the descriptor was opened with, or if it is to be written and was opened
    /// for appending (which ignores offsets); [`Storage`](ErrorKind::Storage) if asking the file fails.
    pub fn new(file: fs::File, access: Access, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let failed = |what: &str, error: io::Error| {
            Error::new(ErrorKind::Storage, format!("{what}: {error}")).with_source(error).on_image(name.clone())
        };
        let invalid = |what: &str| Err(Error::new(ErrorKind::Invalid, what).on_image(name.clone()));

        let metadata = file.metadata().map_err(|error| failed("cannot ask for the file's status", error))?;
        if !metadata.file_type().is_file() && !metadata.file_type().is_block_device() {
            return invalid("neither a regular file nor a block device");
        }
        let flags = rustix::fs::fcntl_getfl(&file)
            .map_err(|error| failed("cannot ask how the file was opened", error.into()))?;
        let (readable, writable) = match flags & OFlags::ACCMODE {
            OFlags::RDONLY => (true, false),
            OFlags::RDWR => (true, true),
            _ => (false, true),
        };
        if !readable || flags.contains(OFlags::PATH) {
            return invalid("was not opened for reading");
        }
        if access.is_writable() && !writable {
            return invalid("cannot be used read-write: it was opened read-only");
        }
        if access.is_writable() && flags.contains(OFlags::APPEND) {
            return invalid("cannot be used read-write: it was opened for appending");
        }

        let descriptor = file.try_clone().map_err(|error| failed("cannot duplicate the descriptor", error))?;
        let direct = flags.contains(OFlags::DIRECT).then(|| Direct::ask(&file));
        // Without direct I/O, as far as imago knows: it would try out alignments by writing, also to files that are
        // too small for that, and write more again than a write needs.
        let options = StorageOpenOptions::new().write(access.is_writable());
        let storage = imago::file::File::from_open_file(file, options)
            .map_err(|error| failed("cannot use the file as storage", error))?;
        let identity = FileIdentity { device: metadata.dev(), inode: metadata.ino() };
        Ok(Self {
            storage,
            descriptor,
            access,
            name,
            identity,
            direct,
            unsynced: AtomicBool::new(false),
            validity: None,
            syncing: Mutex::new(()),
            sync_failed: AtomicBool::new(false),
            _kept: None,
            writing: Mutex::new(()),
        })
    }

    /// What messages call it: the path under which it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The right that was granted.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Which file it is.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// The size in bytes now; it may change at any time.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if the file cannot be asked.
    pub fn size(&self) -> Result<u64> {
        let size = || -> io::Result<u64> {
            let metadata = self.descriptor.metadata()?;
            if metadata.file_type().is_block_device() {
                // The position is nobody's: all I/O names its offset.
                (&self.descriptor).seek(io::SeekFrom::End(0))
            } else {
                Ok(metadata.len())
            }
        };
        size().map_err(|error| self.failed("cannot ask for the size", error))
    }

    /// Makes every use of the file depend on `validity`.
    #[must_use]
    pub fn with_validity(mut self, validity: Arc<Validity>) -> Self {
        self.validity = Some(validity);
        self
    }

    /// Keeps another description of the same file open until nobody uses this one any more: for locks, which end with
    /// the description that has them.
    #[must_use]
    pub fn keeping(self, file: fs::File) -> Self {
        Self { _kept: Some(file), ..self }
    }

    /// Whether the file may still be used. Reads, and the search for holes, ask here before and after; an engine
    /// of its own, by [`AsFd`], asks before each read, and again before it uses what was read.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) once it was revoked.
    pub fn check_valid(&self) -> Result<()> {
        match self.validity.as_ref().and_then(|validity| validity.revoked()) {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Storage, format!("the file cannot be used any more: {why}"))
                .on_image(self.name.clone())),
        }
    }

    /// Whether anybody watches the file, so that it may stop being valid.
    pub(crate) fn is_watched(&self) -> bool {
        self.validity.is_some()
    }

    /// Whether the file may still be used.
    pub(crate) fn is_valid(&self) -> bool {
        self.validity.as_ref().is_none_or(|validity| validity.revoked().is_none())
    }

    /// Fills `buffers`, in order, with the bytes from `offset` on. Bytes past the end of the file, as
    /// it is at this moment, read as zero. After an error there may be anything in them.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the range ends past [`MAX_FILE_OFFSET`];
    /// [`Storage`](ErrorKind::Storage) if the host could not read, or the file was revoked meanwhile.
    pub fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.check_valid()?;
        let end = self.end_of(buffers, offset)?;
        match &self.direct {
            Some(direct) if !direct.takes(offset, places(buffers)) => {
                self.read_bounced(direct, buffers, offset..end)?
            }
            _ => self.read_as_it_is(buffers, offset)?,
        }
        // What was read after that counts for nothing.
        self.check_valid()
    }

    pub(crate) fn read_as_it_is(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.for_each_batch(buffers, offset, |batch, position| {
            let (vector, _guard) = IoVectorMut::from_volatile_slice(batch);
            block_on(self.storage.readv(vector, position))
                .map_err(|error| self.failed(&format!("reading at {position} failed"), error))
        })
    }

    /// Writes `buffers`, in order, at `offset`. The file grows as necessary.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the file was granted read-only or the range ends past
    /// [`MAX_FILE_OFFSET`]; [`Storage`](ErrorKind::Storage) if the host could not write all of it.
    pub fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.refuse_read_only("a write")?;
        let end = self.end_of(buffers, offset)?;
        let result = match &self.direct {
            None => {
                let _writing = (end.saturating_sub(offset) >= LONG_WRITE)
                    .then(|| self.writing.lock().unwrap_or_else(PoisonError::into_inner));
                self.write_as_it_is(buffers, offset)
            }
            Some(direct) if direct.takes(offset, places(buffers)) => {
                let _beside = direct.writes().shared(offset, end);
                self.write_as_it_is(buffers, offset)
            }
            Some(direct) => self.write_bounced(direct, buffers, offset..end),
        };
        // After the write: a sync that starts in between owes nothing to it and clears the mark.
        self.unsynced.store(true, Ordering::Release);
        result
    }

    pub(crate) fn write_as_it_is(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.for_each_batch(buffers, offset, |batch, position| {
            let (vector, _guard) = IoVector::from_volatile_slice(batch);
            block_on(self.storage.writev(vector, position))
                .map_err(|error| self.failed(&format!("writing at {position} failed"), error))
        })
    }

    /// An engine of its own has written to the file.
    pub(crate) fn was_written(&self) {
        // A load first: most writes come after others, and a store takes the cache line from other queues.
        if !self.unsynced.load(Ordering::Acquire) {
            self.unsynced.store(true, Ordering::Release);
        }
    }

    /// Whether what is written goes to the page cache of the host, not past it.
    pub(crate) fn is_buffered(&self) -> bool {
        self.direct.is_none()
    }

    /// What offsets and lengths of direct I/O are multiples of, in bytes; `None` if the page cache is used. A write
    /// that is not aligned like that reads what is around it and writes it again.
    pub fn direct_alignment(&self) -> Option<u64> {
        self.direct.as_ref().map(Direct::block)
    }

    /// Whether the kernel takes a transfer between `offset` and these buffers as it is.
    pub(crate) fn is_aligned(&self, offset: u64, iovecs: &[libc::iovec]) -> bool {
        let places = iovecs.iter().map(|iovec| (iovec.iov_base.addr(), iovec.iov_len));
        self.direct.as_ref().is_none_or(|direct| direct.takes(offset, places))
    }

    /// Says that an engine of its own is about to write `start..end`, which is aligned. `None` while somebody has
    /// a part of its blocks alone; otherwise [`end_write`](Self::end_write) follows.
    pub(crate) fn try_write(&self, start: u64, end: u64) -> Option<Kept> {
        match &self.direct {
            None => Some(Kept::nothing()),
            Some(direct) => direct.try_write(start, end),
        }
    }

    /// Ends what [`try_write`](Self::try_write) began.
    pub(crate) fn end_write(&self, kept: Kept) {
        if let Some(direct) = &self.direct {
            direct.writes().end(kept);
        }
    }

    /// Makes a range read as zero and gives its space back. The size stays as it is: what lies past the
    /// end of the file is left alone, where it reads as zero anyway. `false` if the file or the range
    /// cannot be treated like this; then nothing has changed.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn punch_hole(&self, offset: u64, length: u64) -> Result<bool> {
        self.fallocate("punching a hole", FallocateFlags::PUNCH_HOLE, offset, length)
    }

    /// Makes a range read as zero and keeps its space allocated. Otherwise as
    /// [`punch_hole`](Self::punch_hole).
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero_range(&self, offset: u64, length: u64) -> Result<bool> {
        self.fallocate("zeroing a range", FallocateFlags::ZERO_RANGE, offset, length)
    }

    fn fallocate(&self, what: &str, mode: FallocateFlags, offset: u64, length: u64) -> Result<bool> {
        self.refuse_read_only(what)?;
        let end = offset.checked_add(length).filter(|end| *end <= MAX_FILE_OFFSET).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("a range at {offset} ends past the largest file offset"))
                .on_image(self.name.clone())
        })?;
        let length = end.min(self.size()?).saturating_sub(offset);
        if length == 0 {
            return Ok(true);
        }
        // What is in the way of a block that is written again would come back.
        let _beside = self.direct.as_ref().map(|direct| direct.writes().shared(offset, end));
        let result = rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(&self.descriptor, mode | FallocateFlags::KEEP_SIZE, offset, length)
        });
        self.unsynced.store(true, Ordering::Release);
        match result {
            Ok(()) => Ok(true),
            // Not by this file system, or (of a block device) not in this alignment.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => Ok(false),
            Err(error) => Err(self.failed(&format!("{what} at {offset} failed"), error.into())),
        }
    }

    /// Has the file system set space aside for a range, so that writing to it cannot run out of space. What
    /// is there stays, and the file grows as necessary.
    ///
    /// # Errors
    /// As [`write`](Self::write); among them that the file system cannot do it.
    pub fn set_aside(&self, offset: u64, length: u64) -> Result<()> {
        self.refuse_read_only("setting space aside")?;
        let result = rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(&self.descriptor, FallocateFlags::empty(), offset, length)
        });
        self.unsynced.store(true, Ordering::Release);
        result.map_err(|error| self.failed(&format!("setting space aside at {offset} failed"), error.into()))
    }

    /// Calls `action` with offset and length of each hole in a range; what is past the end of the file is
    /// one. Where the file system knows of no holes there are none.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if the file cannot be asked or was revoked, and those of `action`.
    pub fn for_each_hole(
        &self,
        offset: u64,
        length: u64,
        mut action: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let end = offset.saturating_add(length);
        let mut position = offset;
        while position < end {
            let hole = self.seek(SeekFrom::Hole(position))?.unwrap_or(position).min(end);
            if hole >= end {
                break;
            }
            let data = self.seek(SeekFrom::Data(hole))?.unwrap_or(end).min(end);
            action(hole, data.saturating_sub(hole))?;
            position = data;
        }
        Ok(())
    }

    /// `None` past the end of the file or of its data.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>> {
        let found = rustix::fs::seek(&self.descriptor, to);
        // Where a hole is says what is there, as bytes do.
        self.check_valid()?;
        match found {
            Ok(position) => Ok(Some(position)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(self.failed("looking for holes failed", error.into())),
        }
    }

    fn refuse_read_only(&self, what: &str) -> Result<()> {
        if self.access.is_writable() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Invalid, format!("{what} was refused: the file was granted read-only"))
            .on_image(self.name.clone()))
    }

    /// Makes every write that was completed before this call durable. Costs nothing if there was none.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be promised. Then every later call fails too: the
    /// kernel reports lost pages once and forgets them, so that a second attempt proves nothing.
    pub fn sync_data(&self) -> Result<()> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.refuse_lost()?;
        if self.unsynced.swap(false, Ordering::AcqRel) {
            self.descriptor.sync_data().map_err(|error| {
                self.sync_failed.store(true, Ordering::Release);
                self.failed("flush failed", error)
            })?;
        }
        Ok(())
    }

    /// An error once a sync has failed. Waits for none.
    pub(crate) fn refuse_lost(&self) -> Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            let why = "an earlier flush failed: writes may have been lost; see to the storage, and check the image";
            return Err(Error::new(ErrorKind::Storage, why).on_image(self.name.clone()));
        }
        Ok(())
    }

    /// Where a transfer ends.
    fn end_of(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<u64> {
        let end = buffers.iter().try_fold(offset, |end, buffer| end.checked_add(buffer.len() as u64));
        end.filter(|end| *end <= MAX_FILE_OFFSET).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("a range at {offset} ends past the largest file offset"))
                .on_image(self.name.clone())
        })
    }

    /// Calls `io` with at most [`MAX_BUFFERS`] buffers at a time, none of them empty.
    fn for_each_batch<'b>(
        &self,
        buffers: &[VolatileSlice<'b>],
        offset: u64,
        mut io: impl FnMut(&[VolatileSlice<'b>], u64) -> Result<()>,
    ) -> Result<()> {
        let mut position = offset;
        for chunk in buffers.chunks(MAX_BUFFERS) {
            let length: u64 = chunk.iter().map(|buffer| buffer.len() as u64).sum();
            if chunk.iter().any(VolatileSlice::is_empty) {
                let batch: Vec<_> = chunk.iter().filter(|buffer| !buffer.is_empty()).copied().collect();
                io(&batch, position)?;
            } else {
                io(chunk, position)?;
            }
            position = position.saturating_add(length);
        }
        Ok(())
    }

    fn failed(&self, what: &str, error: io::Error) -> Error {
        Error::new(ErrorKind::Storage, format!("{what}: {error}")).with_source(error).on_image(self.name.clone())
    }
}

impl AsFd for ImageFile {
    /// The open file, for an I/O engine of its own. Using it for writing is on the caller: the
    /// descriptor may have more rights than [`access`](Self::access) says.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The addresses and lengths of buffers.
fn places(buffers: &[VolatileSlice<'_>]) -> impl Iterator<Item = (usize, usize)> {
    buffers.iter().map(|buffer| (buffer.ptr_guard().as_ptr().addr(), buffer.len()))
}

/// Runs a future of imago to its end. Its file driver makes blocking system calls inside `poll`, so the
/// first poll is the last.
#[maybe_async::async_impl]
fn block_on<T>(future: impl Future<Output = T>) -> T {
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Wake, Waker};
    use std::thread::{self, Thread};

    let mut future = pin!(future);
    if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        return value;
    }
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        thread::park();
    }
}

/// In a build whose imago is synchronous there is nothing to run.
#[maybe_async::sync_impl]
fn block_on<T>(result: T) -> T {
    result
}
