//! A raw disk that its guest cannot turn into a disk image.
//!
//! Blockhouse never guesses a format, but other programs on the same host do: a guest that writes the header
//! of an image into its raw disk has them open the files that this header names. The guard refuses every
//! change after which the first or the last sector would be taken for such a header or footer.
//!
//! ```text
//!   write ──▶ touches a guarded sector? ──no──────────────────────────────▶ disk
//!                    │ yes: one at a time
//!                    ▼
//!        private copy of the sector ◀── what the disk holds, the bytes of the request over it
//!                    │
//!               recognised? ──no──▶ the copy is written, not the buffer that the guest can still change
//!                    └─yes──▶ error, nothing is written
//! ```
//!
//! What counts is the sector as it would be, so that order, size and overlap of writes, and the number of
//! queues, make no difference. A sector is written whole or not at all, so that a failed write leaves no mixture
//! that nobody looked at. The rest of the disk is not looked at, and a request for it takes no lock.
//!
//! One at a time means that somebody waits: never the thread of a lane (`lane.rs` says why), but one of the pool that
//! the lane of the disk has.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use crate::backend::{BlockBackend, SECTOR_SIZE, Topology, UnflushedWatch};
use crate::buffers::Buffers;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{Lane, LaneRequest, Operation};

/// Bytes of a guarded sector.
const SECTOR: usize = 512;

/// A recogniser of one format: a name for messages, and whether a sector is its header.
type Format = (&'static str, fn(&[u8; SECTOR]) -> bool);

/// What the first sector must not be. QEMU and libvirt look no further than this sector for an image format.
///
/// A magic alone is enough: programs differ in which versions and fields they accept after it. Not here is
/// what names no file and is the usual content of a disk: partition tables, file systems, ISO 9660.
///
/// Sources: the `*_probe` functions of QEMU's block drivers and the magics of libvirt's storage file probe;
/// the specifications are named in `plugins/probe`.
const HEADS: &[Format] = &[
    ("qcow or qcow2", |sector| sector.starts_with(b"QFI\xfb")),
    ("qed", |sector| sector.starts_with(b"QED\0")),
    ("cow", |sector| sector.starts_with(b"OOOM")),
    ("vmdk", |sector| sector.starts_with(b"KDMV") || sector.starts_with(b"COWD")),
    ("vmdk (seSparse)", |sector| sector.starts_with(b"\xbe\xba\xfe\xca\0\0\0\0")),
    ("vmdk (descriptor)", is_vmdk_descriptor),
    ("vhd", |sector| sector.starts_with(b"conectix")),
    ("vhdx", |sector| sector.starts_with(b"vhdxfile")),
    ("vdi", |sector| sector.get(64..68) == Some(b"\x7f\x10\xda\xbe")),
    ("parallels", |sector| sector.starts_with(b"WithoutFreeSpace") || sector.starts_with(b"WithouFreSpacExt")),
    ("luks", |sector| sector.starts_with(b"LUKS\xba\xbe")),
    ("bochs", |sector| sector.starts_with(b"Bochs Virtual HD Image")),
    ("cloop", |sector| sector.starts_with(b"#!/bin/sh\n#V2.0 Format\n")),
];

/// What the last sector must not be: formats that begin at the end. Old VHD footers have 511 bytes.
const TAILS: &[Format] = &[
    ("vhd (footer)", |sector| sector.starts_with(b"conectix") || sector.get(1..9) == Some(b"conectix")),
    ("dmg (trailer)", |sector| sector.starts_with(b"koly")),
];

/// As QEMU, more liberal: comments and blank lines, and then a version. And the title, as other programs.
fn is_vmdk_descriptor(sector: &[u8; SECTOR]) -> bool {
    const TITLE: &[u8] = b"#diskdescriptorfile";
    for line in sector.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        if line.starts_with(b"#") {
            let letters = line.iter().filter(|byte| !byte.is_ascii_whitespace()).map(u8::to_ascii_lowercase);
            if letters.take(TITLE.len()).eq(TITLE.iter().copied()) {
                return true;
            }
        } else if !line.is_empty() {
            return line.strip_prefix(b"version=").is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit));
        }
    }
    false
}

/// A sector that is looked at before it is changed.
#[derive(Clone, Copy, Debug)]
struct Guarded {
    /// Byte offset in the disk.
    start: u64,
    /// What it must not be. On a disk of one sector that is the first and the last.
    formats: [&'static [Format]; 2],
}

impl Guarded {
    fn end(self) -> u64 {
        self.start.saturating_add(SECTOR_SIZE)
    }

    /// The part of `start..end` that lies in the sector; it may be empty.
    fn part(self, start: u64, end: u64) -> (u64, u64) {
        let from = start.max(self.start);
        (from, end.min(self.end()).max(from))
    }
}

/// A disk of which the first and the last sector never become the header of an image. See the module.
///
/// All changes must go through the guard: whoever keeps the disk as well can change it unguarded.
pub struct HeaderGuard {
    disk: Arc<dyn BlockBackend>,
    /// How messages name the disk.
    name: String,
    guarded: Vec<Guarded>,
    /// Held while a guarded sector is looked at and changed.
    changing: Mutex<()>,
    refused: AtomicU64,
}

impl HeaderGuard {
    /// Guards `disk`, which messages call `name`.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if it is recognised as an image already: then something has happened
    /// that the operator should know about. What reading answers.
    pub fn new(disk: Arc<dyn BlockBackend>, name: impl Into<String>) -> Result<Self> {
        let capacity = disk.capacity();
        let mut guarded = Vec::new();
        match capacity.checked_sub(SECTOR_SIZE) {
            None => {}
            Some(0) => guarded.push(Guarded { start: 0, formats: [HEADS, TAILS] }),
            Some(last) => {
                guarded.push(Guarded { start: 0, formats: [HEADS, &[]] });
                guarded.push(Guarded { start: last, formats: [&[], TAILS] });
            }
        }
        let guard = Self { disk, name: name.into(), guarded, changing: Mutex::default(), refused: AtomicU64::new(0) };
        for sector in &guard.guarded {
            if let Some(format) = recognise(*sector, &guard.sector(*sector)?) {
                let why = format!(
                    "the raw disk already looks like an image: {format} at {}. Find out who wrote that; without \
                     guard-header=on it is served as it is",
                    sector.start
                );
                return Err(Error::new(ErrorKind::Invalid, why).on_image(guard.name));
            }
        }
        Ok(guard)
    }

    /// Requests that were refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The end of a range, if it touches a guarded sector. What cannot be a range is left to the disk to refuse.
    fn guarded_end(&self, offset: u64, length: u64) -> Option<u64> {
        let end = offset.checked_add(length).filter(|end| *end <= self.disk.capacity())?;
        let touches = |sector: &Guarded| offset < sector.end() && sector.start < end;
        (length > 0 && self.guarded.iter().any(touches)).then_some(end)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the disk holds.
    fn sector(&self, sector: Guarded) -> Result<[u8; SECTOR]> {
        let mut bytes = [0; SECTOR];
        self.disk.read(&[VolatileSlice::from(&mut bytes[..])], sector.start)?;
        Ok(bytes)
    }

    /// The guarded sectors that `start..end` touches, each as it would be once `change` has been applied to
    /// that part of it which starts `skip` bytes after `start`. Refuses if one would be recognised.
    fn judge(
        &self,
        start: u64,
        end: u64,
        mut change: impl FnMut(&mut [u8], u64),
    ) -> Result<Vec<(Guarded, [u8; SECTOR])>> {
        let mut sectors = Vec::new();
        for sector in &self.guarded {
            let (from, to) = sector.part(start, end);
            if from == to {
                continue;
            }
            let mut bytes = self.sector(*sector)?;
            if let Some(part) = bytes.get_mut(within(from, sector.start)..within(to, sector.start)) {
                change(part, from.saturating_sub(start));
            }
            if let Some(format) = recognise(*sector, &bytes) {
                return Err(self.refuse(format, sector.start));
            }
            sectors.push((*sector, bytes));
        }
        Ok(sectors)
    }

    fn refuse(&self, format: &str, at: u64) -> Error {
        let count = self.refused.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        // A guest can try for ever: a line each time that the number has doubled.
        if count.is_power_of_two() {
            tracing::warn!(
                disk = %self.name, format, offset = at, refused = count,
                "the guard refused a write that would make the raw disk look like an image"
            );
        }
        let why = format!(
            "refused: the sector at {at} of the raw disk would look like an image ({format}); guard-header=on forbids it"
        );
        Error::new(ErrorKind::Invalid, why).on_image(self.name.clone())
    }

    /// Calls `rest` for the parts of `start..end` outside of guarded sectors.
    fn outside(&self, start: u64, end: u64, mut rest: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let mut position = start;
        // In the order of the disk.
        for sector in &self.guarded {
            let (from, to) = sector.part(start, end);
            if from < to {
                if position < from {
                    rest(position, from)?;
                }
                position = position.max(to);
            }
        }
        if position < end { rest(position, end) } else { Ok(()) }
    }
}

/// Where a byte of the disk lies in a sector that starts at `start`.
fn within(position: u64, start: u64) -> usize {
    usize::try_from(position.saturating_sub(start)).unwrap_or(usize::MAX)
}

fn recognise(sector: Guarded, bytes: &[u8; SECTOR]) -> Option<&'static str> {
    sector.formats.iter().copied().flatten().find(|(_, is)| is(bytes)).map(|(name, _)| *name)
}

impl BlockBackend for HeaderGuard {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn is_writable(&self) -> bool {
        self.disk.is_writable()
    }

    fn topology(&self) -> Topology {
        self.disk.topology()
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.read(buffers, offset)
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let length = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let Some(end) = self.guarded_end(offset, length) else { return self.disk.write(buffers, offset) };
        let _alone = self.lock();
        let sectors = self.judge(offset, end, |part, skip| {
            let mut bytes = Buffers::new(buffers);
            bytes.advance(skip);
            bytes.copy_to(part);
        })?;
        for (sector, mut bytes) in sectors {
            let (from, to) = sector.part(offset, end);
            if let Some(part) = bytes.get_mut(within(from, sector.start)..within(to, sector.start)) {
                self.disk.write(&[VolatileSlice::from(part)], from)?;
            }
        }
        self.outside(offset, end, |from, to| {
            let mut bytes = Buffers::new(buffers);
            bytes.advance(from.saturating_sub(offset));
            self.disk.write(&bytes.take(to.saturating_sub(from)), from)
        })
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn watch_unflushed(&self, watch: Option<UnflushedWatch>) {
        self.disk.watch_unflushed(watch);
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<()> {
        let Some(end) = self.guarded_end(offset, length) else {
            return self.disk.write_zeroes(offset, length, may_unmap);
        };
        let _alone = self.lock();
        self.judge(offset, end, |part, _| part.fill(0))?;
        self.disk.write_zeroes(offset, length, may_unmap)
    }

    /// Guarded sectors stay as they are, which a discard allows: otherwise each byte of them could become zero
    /// or not, and all that could come of it would have to be looked at.
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let Some(end) = self.guarded_end(offset, length) else { return self.disk.discard(offset, length) };
        self.outside(offset, end, |from, to| self.disk.discard(from, to.saturating_sub(from)))
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        let lane = Arc::clone(&self.disk).lane()?;
        Ok(Box::new(GuardLane { guard: self, lane }))
    }
}

/// The lane of a guarded disk: that of the disk, except for what touches a guarded sector. That waits for others, so
/// it is done by the threads that may; a guest hardly ever writes there.
struct GuardLane {
    guard: Arc<HeaderGuard>,
    lane: Box<dyn Lane>,
}

#[allow(unsafe_code)]
impl Lane for GuardLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        let length = match request.operation {
            Operation::Write => request.buffers.iter().map(|buffer| buffer.len() as u64).sum(),
            Operation::WriteZeroes { length, .. } | Operation::Discard { length } => length,
            Operation::Read | Operation::Flush => 0,
        };
        if self.guard.guarded_end(request.offset, length).is_some() {
            let guard = Arc::clone(&self.guard);
            // SAFETY: what the caller promises is what the lane of the disk asks for.
            unsafe { self.lane.start_by(guard, request) };
        } else {
            // SAFETY: as above.
            unsafe { self.lane.start(request) };
        }
    }

    unsafe fn start_by(&mut self, backend: Arc<dyn BlockBackend>, request: &LaneRequest<'_>) {
        // SAFETY: as above. What stands before the guard asks it.
        unsafe { self.lane.start_by(backend, request) };
    }

    fn submit(&mut self) {
        self.lane.submit();
    }

    fn complete(&mut self, each: &mut dyn FnMut(u64, Result<()>)) {
        self.lane.complete(each);
    }

    fn in_flight(&self) -> usize {
        self.lane.in_flight()
    }

    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2] {
        self.lane.ready()
    }

    fn acknowledge(&mut self) {
        self.lane.acknowledge();
    }
}

impl fmt::Debug for GuardLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardLane").field("guard", &self.guard).field("lane", &self.lane).finish_non_exhaustive()
    }
}

impl fmt::Debug for HeaderGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderGuard")
            .field("name", &self.name)
            .field("capacity", &self.disk.capacity())
            .field("refused", &self.refused())
            .finish_non_exhaustive()
    }
}
