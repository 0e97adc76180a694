//! What concerns a disk as a whole: space for all of it, its end before it grows, packed clusters.

use crate::backend::BlockBackend;
use crate::chain::Questions;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::flat::Target;
use crate::write::{Source, write_zeroes};

/// How far [`Disk::preallocate`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Every cluster has its place in the file; the file may have holes there.
    Metadata,
    /// The file system has set the space aside.
    Falloc,
    /// Zeroes have been written to it.
    Full,
}

/// How much of a disk is looked at between two reports of progress.
const PROGRESS_PIECE: u64 = 64 << 20;

impl Disk {
    /// Gives every cluster of the disk space of its own; content stays. `progress` hears how many bytes of
    /// the disk are done. Durable after a [`flush`](BlockBackend::flush).
    ///
    /// # Errors
    /// As [`write`](BlockBackend::write).
    pub fn preallocate(&self, how: Preallocation, mut progress: impl FnMut(u64)) -> Result<()> {
        self.refuse_read_only()?;
        let mut position = 0;
        while position < self.capacity() {
            let end = position.saturating_add(PROGRESS_PIECE).min(self.capacity());
            self.write_range(&Source::Space, position, end)?;
            if how != Preallocation::Metadata {
                self.set_aside(how, position, end)?;
            }
            progress(end);
            position = end;
        }
        Ok(())
    }

    /// Has the file system set aside what a range of the disk has in the file.
    fn set_aside(&self, how: Preallocation, start: u64, end: u64) -> Result<()> {
        let _in_flight = self.share(start, end)?;
        let mut questions = Questions::unlimited();
        self.for_each_extent(start, end, &mut questions, |flat| {
            let Target::Data { file, offset, overwrite: true } = flat.target else { return Ok(()) };
            let file = self.file(file)?;
            if how == Preallocation::Falloc {
                return file.set_aside(offset, flat.length);
            }
            // Holes only: what is written already stays.
            file.for_each_hole(offset, flat.length, |hole, length| write_zeroes(file, hole, length, false))
        })
    }

    /// Makes what lies between the end of the disk and the end of its last cluster read as zero, if the disk
    /// should grow. Durable after a [`flush`](BlockBackend::flush).
    ///
    /// # Errors
    /// As [`write`](BlockBackend::write).
    pub fn settle_end(&self) -> Result<()> {
        self.refuse_read_only()?;
        let capacity = self.capacity();
        let tail = capacity & self.cluster().saturating_sub(1);
        if !self.allocates || tail == 0 {
            return Ok(());
        }
        let start = capacity - tail;
        // What is past the end cannot be asked for, and may be anything, also where the part before the end is
        // zero: clusters can have parts of their own. So the cluster gets space, and the rest of it zeroes.
        self.write_range(&Source::Space, start, capacity)?;
        let _alone = self.take(start, capacity)?;
        let mut place = None;
        let mut questions = self.questions(start, capacity);
        self.for_each_extent(start, capacity, &mut questions, |flat| {
            place = match flat.target {
                Target::Data { file, offset, overwrite: true } if flat.start == start && flat.length == tail => {
                    Some((file, offset.saturating_add(tail)))
                }
                _ => None,
            };
            Ok(())
        })?;
        let (file, offset) = place.ok_or_else(|| {
            Error::new(ErrorKind::Component, "the last cluster has no place of its own, although it was written")
        })?;
        write_zeroes(self.file(file)?, offset, self.cluster() - tail, true)
    }

    /// Whether [`write_packed`](Self::write_packed) can work.
    pub fn packs(&self) -> bool {
        self.allocates && self.chain.has_packer()
    }

    /// Writes one cluster packed. False, and nothing changed, if it does not get smaller. Durable after a
    /// [`flush`](BlockBackend::flush).
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the format cannot; [`Invalid`](ErrorKind::Invalid) if the
    /// bytes are not a cluster, or its part before the end of the disk; else as
    /// [`write`](BlockBackend::write).
    pub fn write_packed(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let end = self.change_end(offset, length)?;
        let whole = length == self.cluster() || (end == self.capacity() && length < self.cluster());
        if !whole || length == 0 || offset & self.cluster().saturating_sub(1) != 0 {
            let why = format!("{length} bytes at {offset} are not a cluster of {} bytes", self.cluster());
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        let _alone = self.take(offset, end)?;
        let result = {
            let _space = self.lock_space();
            self.note_unflushed(true);
            self.chain.pack(offset, bytes)
        };
        // Whatever was said: after an error nobody knows. A new unit may have the token of an old one.
        self.map.invalidate(offset, length);
        self.units.clear();
        result
    }
}
