//! What changes a disk: writes, zeroes, discards, flush and the clean end.
//!
//! ```text
//!   request ─▶ shared hold ─▶ all of it may be overwritten? ──yes──▶ write in place, done
//!                                  │ no
//!                                  ▼
//!              exclusive hold of the clusters, a piece at a time
//!                prepare ─▶ fill: [ kept bytes ][ request ][ kept bytes ] ─▶ commit ─▶ forget the old extents
//!                                  └── failed ──▶ abandon
//! ```
//!
//! Two rules keep freed space out of reach of requests that came too late:
//!
//! * Who unmaps has the clusters alone (`inflight.rs`): a request that found the old place has ended, and the
//!   next one looks it up anew.
//! * All calls of the writer, and the sync and the holes around its `flush`, happen under one lock. Otherwise
//!   (a) a commit between the sync of the data and the flush of the metadata would make a mapping durable
//!   whose bytes are not, and (b) space that a flush set free would be reserved again, for data or for a
//!   table, before the hole is punched in it.
//!
//! The order of locks: a hold, then that lock, then whatever the layer locks inside.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::VolatileSlice;

use crate::backend::{BlockBackend, SECTOR_SIZE};
use crate::buffers::Buffers;
use crate::chain::{Questions, Reserved};
use crate::disk::{Disk, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::file::{ImageFile, MAX_FILE_OFFSET};
use crate::flat::{Flat, Target};
use crate::inflight::{Exclusive, Shared};
use crate::layer::LayerWriter;

/// The largest buffer that is allocated, for zeroes and for kept bytes.
const MAX_BUFFER: u64 = 1 << 20;

/// How much an allocating write takes hold of at a time.
const WRITE_PIECE: u64 = 1 << 20;

/// How much zeroes and discards take hold of at a time: one call of the writer each.
const UNMAP_PIECE: u64 = 64 << 20;

/// Below this, zeroes are written: a system call for the range costs more than it saves.
const MIN_RANGE_CALL: u64 = 64 << 10;

/// The most extents that are listed before any of them is changed: what small requests have, and little memory.
const MAX_LISTED: usize = 1 << 10;

/// How long a disk waits for its requests before it does not get larger.
const GROWTH_PATIENCE: Duration = Duration::from_secs(10);

/// Requests of a stream that may be in flight together, and so come out of order.
const STREAM_REQUESTS: u64 = 32;

/// What is to be written.
#[derive(Debug)]
pub(crate) enum Source<'s, 'b> {
    /// Bytes, the first of which belongs at `start` in the disk.
    Bytes {
        buffers: Buffers<'s, 'b>,
        start: u64,
    },
    Zeroes,
    /// Space for what is there: the content stays as it is.
    Space,
}

impl<'s, 'b> Source<'s, 'b> {
    pub(crate) fn new(buffers: &'s [VolatileSlice<'b>], start: u64) -> Self {
        Self::Bytes { buffers: Buffers::new(buffers), start }
    }

    /// Whether what is there may stay as it is.
    fn is_satisfied_by(&self, flat: &Flat) -> bool {
        matches!(self, Self::Zeroes) && flat.reads_as_zero()
    }

    /// Writes the bytes of `position..position + length` at `offset` in a file.
    fn write(&self, file: &ImageFile, offset: u64, position: u64, length: u64) -> Result<()> {
        match *self {
            Self::Bytes { mut buffers, start } => {
                buffers.advance(position.saturating_sub(start));
                file.write(&buffers.take(length), offset)
            }
            Self::Zeroes => write_zeroes(file, offset, length, true),
            Self::Space => Ok(()),
        }
    }
}

impl Disk {
    /// Makes all writes durable, ends the use of the image and marks it as cleanly closed. Waits for
    /// requests in flight. Afterwards every request to a disk that was writable fails, and so does a second
    /// call; a disk that is read-only has nothing to close.
    ///
    /// # Errors
    /// [`Storage`](ErrorKind::Storage) if it cannot be promised that all is durable; then the image is not
    /// marked, which is what its next user needs to know.
    pub fn close(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let _nothing_in_flight = self.inflight.all();
        let space = self.lock_space();
        self.refuse_closed()?;
        self.closed.store(true, Ordering::Release);
        self.sync_files()?;
        if self.allocates {
            self.publish(&space)?;
            self.chain.writer(|writer| writer.finish())?;
        }
        Ok(())
    }

    /// Makes the disk larger while it is in use: it has `size` bytes then, and what it gains reads as zero. Waits
    /// ten seconds for requests in flight, and lets others wait until it is done. Nobody sees the new size before
    /// the image has it durably. Nothing is done if it has that size.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the disk is read-only, would become smaller, or cannot have that size;
    /// [`Unsupported`](ErrorKind::Unsupported) if the layer on top cannot do it, or the disk ends inside of a
    /// cluster; [`Storage`](ErrorKind::Storage) if requests in flight do not end; what the layer answers. After the
    /// last of these the disk has its old size, or over a longer layer one in between, as its image; whether it can
    /// still be used depends on the layer. If nobody knows which size the image has durably, the layer is not asked
    /// any more.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.refuse_read_only()?;
        if !size.is_multiple_of(SECTOR_SIZE) || size > MAX_FILE_OFFSET {
            let why = format!("a disk cannot have {size} bytes: sizes are multiples of 512, below 2^63");
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        let Some(_nothing_in_flight) = self.inflight.all_within(GROWTH_PATIENCE) else {
            let why = "the disk was not made larger, since a request that its guest has made does not end; try again";
            return Err(Error::new(ErrorKind::Storage, why));
        };
        let space = self.lock_space();
        self.refuse_closed()?;
        let before = self.capacity();
        if size < before {
            let why = format!("the disk has {before} bytes: it can only get larger while it is in use");
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        if size == before {
            return Ok(());
        }
        let cluster = self.cluster();
        if self.allocates && !before.is_multiple_of(cluster) {
            // What is past the end in the last cluster may be anything, and would have to be zeroed before.
            let why = format!(
                "the disk ends inside of a cluster of {cluster} bytes: close it, then change its size with `resize`"
            );
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        self.sync_files()?;
        if self.allocates {
            self.publish(&space)?;
        }
        let (grown, now) = self.chain.grow(size)?;
        // Whatever was said: packed extents have other names now, and after an error nobody knows.
        self.map.invalidate(0, u64::MAX);
        self.units.clear();
        self.map.grow(now);
        self.set_capacity(now);
        grown
    }

    pub(crate) fn refuse_read_only(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Invalid, "the disk is read-only: open it writable to write"))
    }

    pub(crate) fn refuse_closed(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Invalid, "the disk was closed: open it again"));
        }
        Ok(())
    }

    /// The end of a range that is to be changed.
    pub(crate) fn change_end(&self, offset: u64, length: u64) -> Result<u64> {
        self.refuse_read_only()?;
        offset.checked_add(length).filter(|end| *end <= self.capacity()).ok_or_else(|| {
            let capacity = self.capacity();
            Error::new(ErrorKind::Invalid, format!("a range at {offset} ends past the disk of {capacity} bytes"))
        })
    }

    /// A hold for reading and for overwriting in place. None is given once the disk is closed.
    pub(crate) fn share(&self, start: u64, end: u64) -> Result<Shared<'_>> {
        let hold = self.inflight.shared(start, end);
        self.refuse_closed()?;
        Ok(hold)
    }

    /// A hold for everything else.
    pub(crate) fn take(&self, start: u64, end: u64) -> Result<Exclusive<'_>> {
        let hold = self.inflight.exclusive(start, end);
        self.refuse_closed()?;
        Ok(hold)
    }

    pub(crate) fn lock_space(&self) -> MutexGuard<'_, ()> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sync_files(&self) -> Result<()> {
        self.chain.files.iter().try_for_each(|file| file.sync_data())
    }

    /// Makes durable what was committed, and gives freed space back to the file system. The caller has
    /// `space` locked until all of it is done.
    pub(crate) fn publish(&self, _space: &MutexGuard<'_, ()>) -> Result<()> {
        self.sync_files()?;
        let freed = self.chain.flush()?;
        self.note_unflushed(false);
        for (file, offset, length) in freed {
            // A hole that cannot be made wastes space and nothing else.
            match self.file(file)?.punch_hole(offset, length) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!("freed space could not be given back to the file system: {error}");
                    break;
                }
            }
        }
        Ok(())
    }

    /// Notes that the layer on top is about to change something in its memory, or has nothing there any more. The
    /// caller has `space` locked.
    pub(crate) fn note_unflushed(&self, unflushed: bool) {
        self.unflushed.store(unflushed, Ordering::Relaxed);
        if let Some(watch) = &*self.unflushed_watch.read().unwrap_or_else(PoisonError::into_inner) {
            watch(unflushed);
        }
    }

    /// The end of the piece of `start..end` that begins at `start`. Pieces end between clusters.
    fn piece_end(&self, start: u64, end: u64, piece: u64) -> u64 {
        let piece = piece.max(self.cluster());
        (start / piece).saturating_add(1).saturating_mul(piece).min(end)
    }

    /// The size of a cluster of the top layer, a power of two.
    pub(crate) fn cluster(&self) -> u64 {
        self.layers().next().map_or(1, |top| u64::from(top.cluster_size).max(1))
    }

    pub(crate) fn write_range(&self, source: &Source<'_, '_>, start: u64, end: u64) -> Result<()> {
        if self.overwrite(source, start, end)? {
            return Ok(());
        }
        let mut position = start;
        while position < end {
            let stop = self.piece_end(position, end, WRITE_PIECE);
            let reserve = self.reserve_up_to(source, position, stop);
            let _alone = self.take(position, reserve)?;
            self.write_alone(source, position, stop, reserve)?;
            position = stop;
        }
        Ok(())
    }

    /// How far space is reserved for a write of `start..end`: further than its end if it goes on about where
    /// the last allocation ended, twice as far each time.
    fn reserve_up_to(&self, source: &Source<'_, '_>, start: u64, end: u64) -> u64 {
        if self.allocate_ahead == 0 || !matches!(source, Source::Bytes { .. }) {
            return end;
        }
        // A guess, so nobody minds if another thread changes it meanwhile.
        let Stream { end: last, ahead } = &self.stream;
        let length = end.saturating_sub(start);
        // Requests that were in flight together come in any order.
        let near = length.saturating_mul(STREAM_REQUESTS).min(self.allocate_ahead);
        if last.load(Ordering::Relaxed).abs_diff(start) > near {
            ahead.store(0, Ordering::Relaxed);
            return end;
        }
        let more = ahead.load(Ordering::Relaxed).max(length).saturating_mul(2).min(self.allocate_ahead);
        ahead.store(more, Ordering::Relaxed);
        self.piece_end(end, end.saturating_add(more), more).min(self.capacity()).max(end)
    }

    /// Writes in place if all of the range allows it. All of it is looked up before any of it is written: a
    /// refusal changes nothing.
    fn overwrite(&self, source: &Source<'_, '_>, start: u64, end: u64) -> Result<bool> {
        let _in_flight = self.share(start, end)?;
        let refused = self.in_place(
            start,
            end,
            |flat| source.is_satisfied_by(flat),
            |file, offset, flat| source.write(file, offset, flat.start, flat.length),
        )?;
        match refused {
            None => Ok(true),
            Some(_) if self.allocates => Ok(false),
            Some(position) => Err(Error::new(
                ErrorKind::Invalid,
                format!("the bytes at {position} cannot be overwritten in place: put an image that can grow on top"),
            )),
        }
    }

    /// Does something to each extent of `start..end` that may be overwritten in place, and to none if there is one
    /// that may not and is not `satisfied` as it is: returns where. The caller has a hold of the range.
    ///
    /// A list of all extents would take as much memory as the guest wants, so what is past the first `MAX_LISTED` of
    /// them is looked up again when its turn comes. Nobody can have changed it, but a layer may answer differently:
    /// then what came before has been done.
    fn in_place(
        &self,
        start: u64,
        end: u64,
        satisfied: impl Fn(&Flat) -> bool,
        mut change: impl FnMut(&ImageFile, u64, &Flat) -> Result<()>,
    ) -> Result<Option<u64>> {
        let mut listed = Vec::new();
        let mut rest = end;
        let mut refused = None;
        self.for_each_extent(start, end, &mut self.questions(start, end), |flat| {
            match flat.target {
                _ if refused.is_some() || satisfied(flat) => {}
                Target::Data { file, offset, overwrite: true } if listed.len() < MAX_LISTED => {
                    listed.push((file, offset, *flat));
                }
                Target::Data { overwrite: true, .. } => rest = rest.min(flat.start),
                _ => refused = Some(flat.start),
            }
            Ok(())
        })?;
        if refused.is_some() {
            return Ok(refused);
        }
        for (file, offset, flat) in listed {
            change(self.file(file)?, offset, &flat)?;
        }
        self.for_each_extent(rest, end, &mut self.questions(rest, end), |flat| {
            match flat.target {
                _ if refused.is_some() || satisfied(flat) => {}
                Target::Data { file, offset, overwrite: true } => change(self.file(file)?, offset, flat)?,
                _ => refused = Some(flat.start),
            }
            Ok(())
        })?;
        Ok(refused)
    }

    /// Writes a range whose clusters the caller has alone, as well as those up to `reserve`, for which space
    /// may be reserved.
    fn write_alone(&self, source: &Source<'_, '_>, start: u64, end: u64, reserve: u64) -> Result<()> {
        // What is written has to be looked up again, and kept bytes around it as well.
        let around = end.saturating_sub(start).saturating_add(self.cluster().saturating_mul(2));
        let mut questions = self.questions(0, around.saturating_mul(2));
        let mut position = start;
        while position < end {
            let mut flats: Vec<Flat> = Vec::new();
            self.for_each_extent(position, end, &mut questions, |flat| {
                flats.push(*flat);
                Ok(())
            })?;
            position = self.write_up_to_next_allocation(source, &flats, (end, reserve), &mut questions)?;
        }
        Ok(())
    }

    /// Follows `flats`, the extents up to `end`, and ends after the first allocation, which may change what
    /// comes after it. Returns up to where all is written.
    fn write_up_to_next_allocation(
        &self,
        source: &Source<'_, '_>,
        flats: &[Flat],
        (end, reserve): (u64, u64),
        questions: &mut Questions,
    ) -> Result<u64> {
        let in_place =
            |flat: &Flat| matches!(flat.target, Target::Data { overwrite: true, .. }) || source.is_satisfied_by(flat);
        let mut flats = flats.iter();
        while let Some(flat) = flats.next() {
            if source.is_satisfied_by(flat) {
                continue;
            }
            if let Target::Data { file, offset, overwrite: true } = flat.target {
                source.write(self.file(file)?, offset, flat.start, flat.length)?;
                continue;
            }
            let run_end = flats.take_while(|next| !in_place(next)).last().unwrap_or(flat).end();
            let reserve = if run_end == end { self.empty_up_to(end, reserve) } else { run_end };
            return self.allocate(source, flat.start, run_end, reserve, questions);
        }
        Ok(end)
    }

    /// The end of what has no space of its own and reads as zero from `start` on: space can be reserved for
    /// that before anything is written to it, and nothing has to be copied there.
    fn empty_up_to(&self, start: u64, end: u64) -> u64 {
        let mut position = start;
        // An error is for the request that needs an answer.
        let _ = self.for_each_extent(start, end, &mut self.questions(start, end), |flat| {
            if flat.reads_as_zero() && flat.start == position {
                position = flat.end();
            }
            Ok(())
        });
        position.min(end)
    }

    /// Writes `start..end`, none of which may be overwritten, to space that is reserved for it, and reserves
    /// space up to `reserve`, which reads as zero from `end` on. Returns up to where that reached.
    fn allocate(
        &self,
        source: &Source<'_, '_>,
        start: u64,
        end: u64,
        reserve: u64,
        questions: &mut Questions,
    ) -> Result<u64> {
        let mut reserved = {
            let _space = self.lock_space();
            let mut reserved = self.chain.prepare(start, reserve)?;
            // Space that was used before would have to be overwritten with zeroes.
            let spare: Vec<u64> =
                reserved.extract_if(.., |run| run.start >= end && !run.zeroed).map(|run| run.ticket).collect();
            if !spare.is_empty() {
                self.chain.abandon(&spare);
            }
            reserved
        };
        reserved.sort_unstable_by_key(|run| run.start);
        let tickets: Vec<u64> = reserved.iter().map(|run| run.ticket).collect();
        let filled = reserved.iter().try_for_each(|run| self.fill(source, start, end, run, questions));

        let space = self.lock_space();
        if let Err(error) = filled {
            self.chain.abandon(&tickets);
            return Err(error);
        }
        self.note_unflushed(true);
        // If it fails, nothing was published, and the reservations still stand.
        let committed =
            self.chain.writer(|writer| writer.commit(&tickets)).inspect_err(|_| self.chain.abandon(&tickets));
        drop(space);
        let mut reached = start;
        for run in &reserved {
            let length = run.end.saturating_sub(run.start);
            if committed.is_ok() {
                let target = Target::Data { file: run.file, offset: run.offset, overwrite: true };
                self.map.publish(&Flat { start: run.start, length, depth: 0, target });
            } else {
                // Whatever was said: after an error nobody knows.
                self.map.invalidate(run.start, length);
            }
            // What was left out in between may be overwritten by now.
            if run.start <= reached {
                reached = run.end;
            }
        }
        self.stream.end.store(reserved.last().map_or(end, |run| run.end), Ordering::Relaxed);
        committed.map(|()| reached.min(end))
    }

    /// Fills reserved space: with the source where it reaches, with what the disk holds elsewhere.
    fn fill(
        &self,
        source: &Source<'_, '_>,
        start: u64,
        end: u64,
        run: &Reserved,
        questions: &mut Questions,
    ) -> Result<()> {
        let (from, to) = match source {
            Source::Space => (run.start, run.start),
            Source::Bytes { .. } | Source::Zeroes => (start.max(run.start), end.min(run.end)),
        };
        // Nothing of it is written yet if space was reserved ahead.
        let (from, to) = (from.min(run.end), to.max(run.start));
        if matches!(source, Source::Bytes { .. }) && run.zeroed && run.end.saturating_sub(to) >= self.cluster() {
            self.reach(run)?;
        }
        self.keep(run, run.start, from.min(to), questions)?;
        if !(run.zeroed && matches!(source, Source::Zeroes)) {
            let offset = run.offset.saturating_add(from.saturating_sub(run.start));
            source.write(self.file(run.file)?, offset, from, to.saturating_sub(from))?;
        }
        self.keep(run, to, run.end, questions)
    }

    /// Lets the file reach to the end of reserved space: an image that says where something is which its file
    /// does not have would be taken for damaged.
    fn reach(&self, run: &Reserved) -> Result<()> {
        let file = self.file(run.file)?;
        let end = run.offset.saturating_add(run.end.saturating_sub(run.start));
        if file.size()? >= end {
            return Ok(());
        }
        // Not by setting the size, which would cut off what another thread has written past it by now.
        write_zeroes(file, end.saturating_sub(1), 1, false)
    }

    /// Copies what the disk holds in `from..to` to reserved space.
    fn keep(&self, run: &Reserved, from: u64, to: u64, questions: &mut Questions) -> Result<()> {
        let file = self.file(run.file)?;
        self.for_each_extent(from, to, questions, |flat| {
            let offset = run.offset.saturating_add(flat.start.saturating_sub(run.start));
            if flat.reads_as_zero() {
                return if run.zeroed { Ok(()) } else { write_zeroes(file, offset, flat.length, true) };
            }
            for_each_part(flat.length, |bytes, done| {
                let part = flat.tail(flat.start.saturating_add(done));
                let part = part.head(part.start.saturating_add(bytes.len() as u64));
                self.read_extent(&part, &mut Buffers::new(&[*bytes]))?;
                file.write(&[*bytes], offset.saturating_add(done))
            })
        })
    }

    /// The whole clusters inside of `start..end`, as a range; the end of the disk ends a cluster.
    fn whole_clusters(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let mask = self.cluster().saturating_sub(1);
        let from = start.checked_add(mask)? & !mask;
        let to = if end == self.capacity() { end } else { end & !mask };
        (from < to).then_some((from, to))
    }

    pub(crate) fn zero_range(&self, start: u64, end: u64, may_unmap: bool) -> Result<()> {
        if !self.allocates {
            return self.change_in_place(start, end, |file, offset, length| {
                if (may_unmap && file.punch_hole(offset, length)?) || file.zero_range(offset, length)? {
                    return Ok(());
                }
                write_zeroes(file, offset, length, true)
            });
        }
        let mut position = start;
        while position < end {
            let stop = self.piece_end(position, end, UNMAP_PIECE);
            let _alone = self.take(position, stop)?;
            match self.whole_clusters(position, stop) {
                None => self.zero_alone(position, stop)?,
                Some((from, to)) => {
                    self.zero_alone(position, from)?;
                    if !self.unmap(from, to, |writer| writer.zero(from, to - from, !may_unmap))? {
                        self.zero_alone(from, to)?;
                    }
                    self.zero_alone(to, stop)?;
                }
            }
            position = stop;
        }
        Ok(())
    }

    pub(crate) fn discard_range(&self, start: u64, end: u64) -> Result<()> {
        if !self.allocates {
            return self.change_in_place(start, end, |file, offset, length| {
                file.punch_hole(offset, length).map(|_whether| ())
            });
        }
        let mut position = start;
        while position < end {
            let stop = self.piece_end(position, end, UNMAP_PIECE);
            if let Some((from, to)) = self.whole_clusters(position, stop) {
                let _alone = self.take(from, to)?;
                if !self.unmap(from, to, |writer| writer.discard(from, to - from))? {
                    break;
                }
            }
            position = stop;
        }
        Ok(())
    }

    /// Calls the writer for clusters that the caller has alone, and forgets where they were. `false` if the
    /// format cannot do it.
    fn unmap(&self, from: u64, to: u64, call: impl FnOnce(&dyn LayerWriter) -> Result<()>) -> Result<bool> {
        let result = {
            let _space = self.lock_space();
            let before = self.unflushed.load(Ordering::Relaxed);
            self.note_unflushed(true);
            // What is not supported has changed nothing.
            self.chain.writer(call).inspect_err(|error| {
                self.note_unflushed(before || error.kind() != ErrorKind::Unsupported);
            })
        };
        // Whatever was said: after an error nobody knows.
        self.map.invalidate(from, to.saturating_sub(from));
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes zeroes where the range does not read as zero, a piece at a time.
    fn zero_alone(&self, start: u64, end: u64) -> Result<()> {
        let mut position = start;
        while position < end {
            let stop = self.piece_end(position, end, WRITE_PIECE);
            self.write_alone(&Source::Zeroes, position, stop, stop)?;
            position = stop;
        }
        Ok(())
    }

    /// Does something to each part of a range that may be overwritten in place, and leaves the rest alone if
    /// it reads as zero. Refuses, and changes nothing, if there is anything else.
    fn change_in_place(
        &self,
        start: u64,
        end: u64,
        mut change: impl FnMut(&ImageFile, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let _alone = self.take(start, end)?;
        let refused =
            self.in_place(start, end, Flat::reads_as_zero, |file, offset, flat| change(file, offset, flat.length))?;
        match refused {
            None => Ok(()),
            Some(position) => Err(Error::new(
                ErrorKind::Invalid,
                format!("the bytes at {position} cannot be changed in place: put an image that can grow on top"),
            )),
        }
    }
}

/// Writes zeroes to a range of a file, or lets the file system do it if it `may_mark` the range instead. The
/// file grows as necessary.
pub(crate) fn write_zeroes(file: &ImageFile, offset: u64, length: u64, may_mark: bool) -> Result<()> {
    if may_mark
        && length >= MIN_RANGE_CALL
        && offset.saturating_add(length) <= file.size()?
        && file.zero_range(offset, length)?
    {
        return Ok(());
    }
    for_each_part(length, |zeroes, done| file.write(&[*zeroes], offset.saturating_add(done)))
}

/// Calls `action` with a buffer, of zeroes at first, for each part of `length` bytes, and how many bytes came
/// before it.
fn for_each_part(length: u64, mut action: impl FnMut(&VolatileSlice<'_>, u64) -> Result<()>) -> Result<()> {
    let size = usize::try_from(length.min(MAX_BUFFER)).unwrap_or(0);
    let mut bytes = vec![0; size];
    let mut done = 0;
    while done < length {
        let part = usize::try_from(length - done).unwrap_or(size).min(size);
        let Some(part) = bytes.get_mut(..part).filter(|part| !part.is_empty()) else { break };
        let count = part.len() as u64;
        action(&VolatileSlice::from(part), done)?;
        done += count;
    }
    Ok(())
}
