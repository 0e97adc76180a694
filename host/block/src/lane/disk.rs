//! The lane of a disk: what the extent map knows goes to the kernel, all else to the pool.
//!
//! ```text
//!   start ─▶ inside the disk? ─▶ hold without waiting? ─▶ every extent known, and bytes of a file or zero?
//!                                      │ no                     │ no                │ yes
//!                                      └────────▶ pool ◀────────┘                   ▼
//!                                                  ▲              [ part ][ part ]  one for each extent
//!                                                  └── short, failed ◀──── ring ◀──┘
//! ```
//!
//! A request of which a part failed or was cut short is done again as a whole by the pool: reading or writing
//! the same bytes twice changes nothing, and there is one place only that knows what to make of the ends of
//! files, of errors and of alignments: [`ImageFile`](crate::ImageFile). So is a read of a file that was revoked
//! before all of it was there ([`Validity`](crate::Validity)): the pool refuses it, and says why.
//!
//! The same becomes of what the kernel does not take from the ring: at once if it says that it never will, or after
//! it has been asked for a second. That ring is used no more, and the pool has all that comes.
//!
//! A small write into the page cache is a copy, made in less time than it takes to hand it to somebody else.
//! The kernel hands it on nevertheless, on file systems that do not promise never to wait (ext4): its workers
//! then write to one file one after the other. So such a write is made at once by the thread of the lane, until
//! one takes long, which means that the host holds writers up; then the ring has them for a while.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::pool::{PoolLane, RawBuffer};
use super::ring::{Direction, FixedFile, MAX_PARTS, Ring};
use super::{LANE_REQUESTS, Lane, LaneRequest, Operation};
use crate::backend::BlockBackend;
use crate::buffers::Buffers;
use crate::disk::{Disk, Engine};
use crate::error::Result;
use crate::file::{ImageFile, MAX_FILE_OFFSET};
use crate::files::{FileId, MAX_FILES};
use crate::flat::Target;
use crate::inflight::Kept;

/// The most bytes of a part, below the kernel's limit for one transfer (`MAX_RW_COUNT` of linux/fs.h).
const MAX_PART: u64 = 1 << 30;

/// The most buffers of a part (`IOV_MAX`, uio.h).
const MAX_IOVECS: usize = 1024;

/// The most bytes of a write that the thread of the lane makes itself, which keeps other requests waiting for
/// as long as it takes to copy them.
const MAX_COPY: u64 = 64 << 10;

/// How long such a write may take before it counts as held up. A copy takes some microseconds.
const LONG_COPY: Duration = Duration::from_millis(1);

/// For how long the ring then has the writes.
const NO_COPIES: Duration = Duration::from_millis(200);

/// Between two attempts to have the kernel take what it did not take.
const AGAIN: Duration = Duration::from_millis(1);

/// How often in a row it may not take that before the ring is given up.
const MAX_REFUSALS: u32 = 1000;

pub(crate) struct DiskLane {
    disk: Arc<Disk>,
    slow: PoolLane,
    ring: Option<Ring>,
    /// In place of it, one of which the kernel takes nothing more. It stays until the lane ends, for what it took.
    given_up: Option<Ring>,
    /// Which place in the ring's table a file has. `None`: not asked yet; then `None`: none.
    fixed: Vec<Option<Option<FixedFile>>>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Parts in the kernel, or in the ring.
    parts: usize,
    /// Look-ups that found an extent and were not counted yet.
    hits: u64,
    /// Requests that ended without anybody's help.
    ended: Vec<(u64, Result<()>)>,
    /// Until then no write is made by this thread: one took long.
    no_copies_until: Option<Instant>,
    /// How often in a row the kernel did not take what it was given.
    refused: u32,
}

/// A request in the kernel. Its vectors are kept for their memory, so their length is bounded: [`Planner::plan`].
#[derive(Default)]
struct Slot {
    token: u64,
    write: bool,
    offset: u64,
    /// All of its memory, in order, cut where extents end.
    iovecs: Vec<libc::iovec>,
    parts: Vec<Part>,
    /// Parts that have not ended.
    left: usize,
    again: bool,
    kept: Option<Kept>,
}

/// The part of a request that is in one extent.
#[derive(Debug)]
struct Part {
    file: FileId,
    fixed: FixedFile,
    offset: u64,
    length: u32,
    /// Where its iovecs begin and end.
    first: usize,
    end: usize,
    /// What a write holds of the file.
    held: Option<Kept>,
    /// Whether the file may be revoked meanwhile.
    watched: bool,
}

impl Slot {
    /// Ends what the request holds.
    #[inline]
    fn let_go(&mut self, disk: &Disk) {
        for part in &mut self.parts {
            // The file is in the table, since it was looked up there.
            if let (Some(held), Ok(file)) = (part.held.take(), disk.file(part.file)) {
                file.end_write(held);
            }
        }
        if let Some(kept) = self.kept.take() {
            disk.inflight.end(kept);
        }
    }

    /// Takes the next `length` bytes of the buffers.
    fn take(&mut self, buffers: &mut Buffers<'_, '_>, length: u64) -> Option<()> {
        let mut left = usize::try_from(length).ok()?;
        while left > 0 {
            let piece = buffers.next_part(left)?;
            left = left.checked_sub(piece.len())?;
            self.iovecs.push(RawBuffer::new(&piece).into());
        }
        Some(())
    }
}

// SAFETY: the addresses in it are those of buffers that stay valid wherever the lane is (see `Lane::start`).
unsafe impl Send for Slot {}

impl DiskLane {
    /// A lane; on a host that has no io_uring, or refuses it, all requests go to the pool.
    pub(crate) fn new(disk: Arc<Disk>) -> Result<Self> {
        let slow = PoolLane::new(Arc::clone(&disk) as Arc<dyn BlockBackend>, disk.pool().clone())?;
        let ring = match disk.engine() {
            Engine::Threads => None,
            Engine::Auto => disk.rings().take().or_else(|| {
                Ring::new()
                    .inspect_err(|error| tracing::info!(%error, "no io_uring here: threads read and write instead"))
                    .ok()
            }),
        };
        let slots = (0..LANE_REQUESTS).map(|_| Slot::default()).collect();
        Ok(Self {
            disk,
            slow,
            ring,
            given_up: None,
            fixed: Vec::new(),
            slots,
            free: (0..LANE_REQUESTS).rev().collect(),
            parts: 0,
            hits: 0,
            ended: Vec::new(),
            no_copies_until: None,
            refused: 0,
        })
    }

    /// Starts a read or write in the kernel, or returns false and leaves nothing.
    ///
    /// # Safety
    /// As [`Lane::start`].
    unsafe fn start_fast(&mut self, request: &LaneRequest<'_>, write: bool) -> bool {
        let Self { disk, ring: Some(ring), fixed, slots, free, parts, hits, ended, no_copies_until, .. } = self else {
            return false;
        };
        let Some(index) = free.last().copied() else { return false };
        let Some(slot) = slots.get_mut(index) else { return false };
        slot.iovecs.clear();
        slot.parts.clear();
        let room = MAX_PARTS.saturating_sub(*parts);
        let planned = Planner { disk, ring, fixed, hits, write, room }.plan(slot, request).is_some();
        let way = if !planned {
            Way::Pool
        } else if slot.parts.is_empty() {
            Way::Ended
        } else if write {
            // SAFETY: the iovecs name memory that stays valid until the request has ended, as the caller says.
            unsafe { copy(disk, slot, no_copies_until) }
        } else {
            Way::Kernel
        };
        if way == Way::Kernel {
            slot.token = request.token;
            slot.write = write;
            slot.offset = request.offset;
            // SAFETY: as above, and nobody touches the slot until `part_ended` has seen all of its parts.
            unsafe { push(ring, slot, index) };
            if slot.left > 0 {
                *parts += slot.left;
                free.pop();
                return true;
            }
        }
        slot.let_go(disk);
        if way == Way::Ended {
            ended.push((request.token, Ok(())));
        }
        way == Way::Ended
    }

    /// A part has ended.
    #[inline]
    fn part_ended(&mut self, user_data: u64, result: i32, each: &mut dyn FnMut(u64, Result<()>)) {
        self.parts = self.parts.saturating_sub(1);
        let (index, number) = slot_and_part(user_data);
        let Some(slot) = self.slots.get_mut(index) else { return };
        let whole = slot.parts.get(number).is_some_and(|part| u32::try_from(result) == Ok(part.length));
        slot.again |= !whole;
        slot.left = slot.left.saturating_sub(1);
        if slot.left > 0 {
            return;
        }
        if slot.write {
            was_written(&self.disk, &slot.parts);
        } else {
            // Asked once all of it was read.
            slot.again |= !are_valid(&self.disk, &slot.parts);
        }
        slot.let_go(&self.disk);
        self.free.push(index);
        if slot.again {
            let operation = if slot.write { Operation::Write } else { Operation::Read };
            let buffers = slot.iovecs.iter().map(RawBuffer::from).collect();
            self.slow.start_raw(slot.token, operation, slot.offset, buffers);
        } else {
            each(slot.token, Ok(()));
        }
    }

    /// Gives the kernel what it has not got yet. If it does not take that now (it has no memory), it is asked again:
    /// nothing else may ever wake the thread of this lane, so it is woken.
    fn give(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let Err(error) = ring.submit() else {
            self.refused = 0;
            return;
        };
        self.refused = self.refused.saturating_add(1);
        if is_passing(&error) && self.refused < MAX_REFUSALS {
            if self.refused.is_power_of_two() {
                tracing::warn!(%error, times = self.refused, "the kernel does not take requests now");
            }
            self.slow.signal();
            return;
        }
        tracing::error!(%error, times = self.refused, "the kernel takes no requests: threads read and write instead");
        self.refused = 0;
        self.given_up = self.ring.take();
        self.take_back();
    }

    /// The pool does what is left in a ring that was given up, as soon as the kernel has nothing of that any more.
    #[cold]
    fn take_back(&mut self) {
        let Some(ring) = &self.given_up else { return };
        if self.parts == 0 || self.parts > ring.waiting() {
            return;
        }
        for index in 0..self.slots.len() {
            // As if the kernel had failed: the whole request is done again.
            while self.slots.get(index).is_some_and(|slot| slot.left > 0) {
                self.part_ended(user_data(index, 0), -libc::EAGAIN, &mut |_, _| {});
            }
        }
    }

    fn reap(&mut self, each: &mut dyn FnMut(u64, Result<()>)) {
        while let Some((user_data, result)) = self.any_ring().and_then(Ring::next) {
            self.part_ended(user_data, result, each);
        }
        if self.given_up.is_some() {
            self.take_back();
        }
    }

    fn any_ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut().or(self.given_up.as_mut())
    }
}

/// Whether the kernel may take the same a little later (io_uring_enter(2)).
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR))
}

/// Who does a request that was planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Nobody: it has ended.
    Ended,
    Kernel,
    Pool,
}

/// Queues the parts of a request that is in the slot `index`. As many as there are `left` in it are under way.
///
/// # Safety
/// The memory that the iovecs name stays valid, and the slot as it is, until all of these parts have ended.
unsafe fn push(ring: &mut Ring, slot: &mut Slot, index: usize) {
    slot.again = false;
    slot.left = 0;
    let direction = if slot.write { Direction::ToFile } else { Direction::FromFile };
    for (number, part) in slot.parts.iter().enumerate() {
        let iovecs = slot.iovecs.get(part.first..part.end).unwrap_or_default();
        // SAFETY: the caller's promise; the iovecs are on the heap.
        match unsafe { ring.push(direction, part.fixed, part.offset, iovecs, user_data(index, number)) } {
            Ok(()) => slot.left += 1,
            Err(error) => {
                tracing::warn!(%error, "the kernel takes no more requests");
                slot.again = true;
            }
        }
    }
}

/// Makes a write at once, if it is small, goes to the page cache, and nothing says that this would take long.
/// If it fails, the pool has to do it, and see what is the matter.
///
/// # Safety
/// The iovecs of the slot name valid memory.
unsafe fn copy(disk: &Disk, slot: &Slot, no_copies_until: &mut Option<Instant>) -> Way {
    let length: u64 = slot.parts.iter().map(|part| u64::from(part.length)).sum();
    if length > MAX_COPY {
        return Way::Kernel;
    }
    let begun = Instant::now();
    if no_copies_until.is_some_and(|until| begun < until) {
        return Way::Kernel;
    }
    let files = || slot.parts.iter().map(|part| (part, disk.file(part.file)));
    if !files().all(|(_, file)| file.is_ok_and(|file| file.is_buffered())) {
        return Way::Kernel;
    }
    let all = files().all(|(part, file)| {
        let (Ok(file), Some(iovecs)) = (file, slot.iovecs.get(part.first..part.end)) else { return false };
        let (Ok(count), Ok(offset)) = (libc::c_int::try_from(iovecs.len()), libc::off_t::try_from(part.offset)) else {
            return false;
        };
        // SAFETY: the caller says that the memory is valid; `add_part` made sure that the file may be written.
        let written = unsafe { libc::pwritev(file.as_fd().as_raw_fd(), iovecs.as_ptr(), count, offset) };
        u32::try_from(written) == Ok(part.length)
    });
    was_written(disk, &slot.parts);
    let ended = Instant::now();
    *no_copies_until = (ended.duration_since(begun) > LONG_COPY).then(|| ended.checked_add(NO_COPIES)).flatten();
    if all { Way::Ended } else { Way::Pool }
}

/// Whether the files of all parts may still be used.
fn are_valid(disk: &Disk, parts: &[Part]) -> bool {
    let mut watched = parts.iter().filter(|part| part.watched);
    watched.all(|part| disk.file(part.file).is_ok_and(|file| file.is_valid()))
}

fn was_written(disk: &Disk, parts: &[Part]) {
    for part in parts {
        // The file is in the table, since it was looked up there.
        if let Ok(file) = disk.file(part.file) {
            file.was_written();
        }
    }
}

/// What planning needs of a lane, while a slot is borrowed from it.
struct Planner<'l> {
    disk: &'l Disk,
    ring: &'l mut Ring,
    fixed: &'l mut Vec<Option<Option<FixedFile>>>,
    hits: &'l mut u64,
    write: bool,
    /// Parts that the ring has room for.
    room: usize,
}

impl Planner<'_> {
    /// Puts a read or write into a slot, with its bytes looked up; `None` if only the pool can do it. With no
    /// parts in the slot it has ended.
    fn plan(&mut self, slot: &mut Slot, request: &LaneRequest<'_>) -> Option<()> {
        let disk = self.disk;
        let end = disk.request_end(request.buffers, request.offset).ok()?;
        // Guest memory may be in as many pieces as its owner likes, and a slot keeps what it had room for.
        if (self.write && !disk.writable) || request.buffers.len() > MAX_IOVECS {
            return None;
        }
        slot.kept = if disk.writable { Some(disk.inflight.try_shared(request.offset, end)?.keep()) } else { None };
        // A disk is closed while nobody holds anything.
        disk.refuse_closed().ok()?;
        // A piece of memory begins with a buffer or with an extent. What one request may fill of a slot, all slots of
        // the lane have in the end: they keep their vectors.
        let most = MAX_PARTS.saturating_add(request.buffers.len());
        let mut buffers = Buffers::new(request.buffers);
        let mut position = request.offset;
        while position < end {
            if slot.iovecs.len() >= most {
                return None;
            }
            let flat = disk.map.find(position)?.head(end);
            *self.hits += 1;
            let first = slot.iovecs.len();
            match flat.target {
                Target::Data { file, offset, overwrite } if overwrite || !self.write => {
                    slot.take(&mut buffers, flat.length)?;
                    self.add_part(slot, file, (offset, flat.length), first)?;
                }
                Target::Zero | Target::Unallocated if !self.write => {
                    let mut zeroed = buffers;
                    zeroed.zero(flat.length);
                    slot.take(&mut buffers, flat.length)?;
                }
                _ => return None,
            }
            position = flat.end();
        }
        Some(())
    }

    /// Adds the part of an extent. Its memory is named by the iovecs of the slot from `first` on.
    fn add_part(&mut self, slot: &mut Slot, id: FileId, (offset, length): (u64, u64), first: usize) -> Option<()> {
        let file = self.disk.chain.files.get(id)?;
        // Of a file that is not valid any more the pool says why.
        if !file.is_valid() || self.write && !file.access().is_writable() || length > MAX_PART {
            return None;
        }
        if slot.parts.len() >= self.room {
            return None;
        }
        let file_end = offset.checked_add(length).filter(|end| *end <= MAX_FILE_OFFSET)?;
        let fixed = self.fixed(id, file)?;
        let end = slot.iovecs.len();
        let iovecs = slot.iovecs.get(first..end)?;
        if iovecs.len() > MAX_IOVECS || !file.is_aligned(offset, iovecs) {
            return None;
        }
        let length = u32::try_from(length).ok()?;
        let held = if self.write { Some(file.try_write(offset, file_end)?) } else { None };
        slot.parts.push(Part { file: id, fixed, offset, length, first, end, held, watched: file.is_watched() });
        Some(())
    }

    /// The place of a file in the ring's table.
    fn fixed(&mut self, id: FileId, file: &ImageFile) -> Option<FixedFile> {
        let index = usize::from(id.bits());
        if index >= self.fixed.len() {
            self.fixed.resize(index.saturating_add(1).min(MAX_FILES), None);
        }
        let place = self.fixed.get_mut(index)?;
        if place.is_none() {
            *place = Some(self.ring.register(file.as_fd()));
        }
        (*place)?
    }
}

fn user_data(slot: usize, part: usize) -> u64 {
    // Both are small: there are LANE_REQUESTS slots and MAX_PARTS parts.
    (slot as u64) << 32 | part as u64
}

fn slot_and_part(user_data: u64) -> (usize, usize) {
    let part = usize::try_from(user_data & u64::from(u32::MAX)).unwrap_or(usize::MAX);
    (usize::try_from(user_data >> 32).unwrap_or(usize::MAX), part)
}

impl Lane for DiskLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        let write = match request.operation {
            Operation::Read => Some(false),
            Operation::Write => Some(true),
            Operation::WriteZeroes { .. } | Operation::Discard { .. } | Operation::Flush => None,
        };
        // SAFETY: the caller's promise.
        let started = write.is_some_and(|write| unsafe { self.start_fast(request, write) });
        if !started {
            // SAFETY: as above.
            unsafe { self.slow.start(request) };
        }
    }

    unsafe fn start_by(&mut self, backend: Arc<dyn BlockBackend>, request: &LaneRequest<'_>) {
        // SAFETY: the caller's promise.
        unsafe { self.slow.start_by(backend, request) };
    }

    fn submit(&mut self) {
        self.disk.map.count_hits(std::mem::take(&mut self.hits));
        // Otherwise `complete` does, after a while.
        if self.refused == 0 {
            self.give();
        }
    }

    fn complete(&mut self, each: &mut dyn FnMut(u64, Result<()>)) {
        if self.refused > 0 {
            thread::sleep(AGAIN);
            self.give();
        }
        self.reap(each);
        self.slow.complete(each);
        for (token, result) in self.ended.drain(..) {
            each(token, result);
        }
    }

    fn in_flight(&self) -> usize {
        let fast = LANE_REQUESTS.saturating_sub(self.free.len());
        fast.saturating_add(self.slow.in_flight()).saturating_add(self.ended.len())
    }

    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [Some(self.slow.eventfd()), self.ring.as_ref().or(self.given_up.as_ref()).map(Ring::as_fd)]
    }

    fn acknowledge(&mut self) {
        self.slow.acknowledge();
    }
}

impl Drop for DiskLane {
    fn drop(&mut self) {
        self.give();
        while self.refused > 0 {
            thread::sleep(AGAIN);
            self.give();
        }
        loop {
            self.reap(&mut |_, _| {});
            if self.parts == 0 {
                break;
            }
            let Some(ring) = self.any_ring() else { break };
            if let Err(error) = ring.wait() {
                tracing::error!(%error, "cannot wait for requests in the kernel");
                // Their memory must not go while the kernel may use it.
                thread::sleep(Duration::from_millis(10));
            }
        }
        if let Some(ring) = self.ring.take() {
            self.disk.rings().give_back(ring);
        }
    }
}

impl std::fmt::Debug for DiskLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskLane")
            .field("io_uring", &self.ring.is_some())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// What the kernel moves must be what the caller counted.
const _: () = assert!(MAX_PART <= u32::MAX as u64 && LANE_REQUESTS <= MAX_PARTS);
