//! Moving the content of disks: what convert, commit and rebase have in common.

use anyhow::Context;
use blockhouse_block::{BlockBackend, Disk, VolatileSlice};
use serde::Serialize;

use crate::progress::Progress;
use crate::segments::{Pairs, Segment, Segments};

/// Bytes that are read at a time, at least: the largest cluster of qcow2.
const CHUNK: u64 = 2 << 20;
/// The largest cluster that is handled as a whole.
const LARGEST_UNIT: u64 = 16 << 20;
/// The range that is told from its neighbours where the target has no clusters: the block of file systems.
const BLOCK: u64 = 4096;
/// How many ranges are remembered that were made zero without writing: 16 bytes each.
const REMEMBERED: usize = 1 << 16;

/// A buffer for a part of a disk.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<u8>);

impl Buffer {
    pub(crate) fn new(size: u64) -> Self {
        Self(vec![0; usize::try_from(size).unwrap_or(0)])
    }

    /// The bytes of `start..end` of a disk; past its end, or if there is no disk, zeroes.
    pub(crate) fn read(&mut self, disk: Option<&Disk>, start: u64, end: u64) -> anyhow::Result<&mut [u8]> {
        let length = usize::try_from(end.saturating_sub(start)).ok();
        let bytes = length.and_then(|length| self.0.get_mut(..length)).context("more than a buffer is asked for")?;
        let inside = disk.map_or(0, |disk| disk.capacity().clamp(start, end) - start);
        let (inside, past) = bytes.split_at_mut(usize::try_from(inside).unwrap_or(0).min(bytes.len()));
        past.fill(0);
        if let Some(disk) = disk.filter(|_| !inside.is_empty()) {
            disk.read(&[VolatileSlice::from(inside)], start)?;
        }
        Ok(bytes)
    }
}

/// Calls `action` for the parts of `start..end`, which end at multiples of `size`.
pub(crate) fn for_each_part(
    start: u64,
    end: u64,
    size: u64,
    mut action: impl FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut position = start;
    while position < end {
        let stop = (position / size.max(1)).saturating_add(1).saturating_mul(size.max(1)).min(end);
        action(position, stop)?;
        position = stop;
    }
    Ok(())
}

/// The size of the pieces in which a disk is best written: its clusters, where they are of a usual size.
fn unit(disk: &Disk) -> u64 {
    match disk.layers().next().map_or(0, |top| u64::from(top.cluster_size)) {
        0 => BLOCK,
        // A fraction or a multiple of the cluster: both are powers of two.
        cluster => cluster.clamp(512, LARGEST_UNIT),
    }
}

/// What to do with a unit of the target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Leave,
    Zero,
    Write,
}

/// Makes a disk read as another one does, where it reads as its backing chain so far.
pub(crate) struct CopyJob<'d> {
    /// What the disk shall read as.
    pub(crate) source: &'d Disk,
    /// What it reads as where nothing is written to it; zeroes if none.
    pub(crate) below: Option<&'d Disk>,
    pub(crate) target: &'d Disk,
    /// Only what the top layer of the source says nothing about.
    pub(crate) only_below_top: bool,
    /// Clusters are packed where that makes them smaller.
    pub(crate) compress: bool,
}

/// How many bytes of a disk were written how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Copied {
    #[serde(rename = "written_bytes")]
    pub(crate) written: u64,
    #[serde(rename = "compressed_bytes")]
    pub(crate) packed: u64,
    #[serde(rename = "zeroed_bytes")]
    pub(crate) zeroed: u64,
}

impl CopyJob<'_> {
    /// Copies. Durable after a flush of the target.
    pub(crate) fn run(&self, progress: &mut Progress) -> anyhow::Result<Copied> {
        let unit = unit(self.target);
        let capacity = self.target.capacity().min(self.source.capacity());
        let chunk = unit.max(CHUNK);
        let mut buffers = (Buffer::new(chunk), Buffer::new(if self.below.is_some() { chunk } else { 0 }));
        let mut copied = Copied::default();
        let mut zeroed = Vec::new();
        let mut done = 0;
        for pair in Pairs::new(self.source, self.below) {
            let (source, below) = pair?;
            if source.start >= capacity {
                break;
            }
            let nothing_to_do = (source.zero && below.zero) || (self.only_below_top && source.top);
            if !nothing_to_do {
                // Whole units, so that the target has nothing to keep around what is written.
                let start = (source.start - source.start % unit).max(done);
                let end = source.end.checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(capacity);
                for_each_part(start, end, chunk, |start, end| {
                    self.part(start, end, unit, &mut buffers, &mut copied, &mut zeroed)?;
                    done = end;
                    progress.at(end);
                    Ok(())
                })?;
            }
            progress.at(source.end.min(capacity));
        }
        self.insist(&zeroed)?;
        Ok(copied)
    }

    /// Writes zeroes where a disk that is its own source was made zero, and still does not say so itself: what
    /// read as zero before need not have been changed for that.
    fn insist(&self, zeroed: &[(u64, u64)]) -> anyhow::Result<()> {
        let mut zeroed = zeroed.iter().copied().peekable();
        if zeroed.peek().is_none() {
            return Ok(());
        }
        let mut buffer = Buffer::new(CHUNK);
        for segment in Segments::new(self.target) {
            let segment = segment?;
            while let Some((start, end)) = zeroed.peek().copied().filter(|(start, _)| *start < segment.end) {
                let (from, to) = (start.max(segment.start), end.min(segment.end));
                if !segment.top {
                    for_each_part(from, to, CHUNK, |from, to| {
                        let zeroes = buffer.read(None, from, to)?;
                        Ok(self.target.write(&[VolatileSlice::from(zeroes)], from)?)
                    })?;
                }
                if end > segment.end {
                    break;
                }
                zeroed.next();
            }
        }
        Ok(())
    }

    fn part(
        &self,
        start: u64,
        end: u64,
        unit: u64,
        (new, old): &mut (Buffer, Buffer),
        copied: &mut Copied,
        zeroed: &mut Vec<(u64, u64)>,
    ) -> anyhow::Result<()> {
        let new = new.read(Some(self.source), start, end)?;
        let old = match self.below {
            Some(below) => Some(&*old.read(Some(below), start, end)?),
            None => None,
        };
        let size = usize::try_from(unit).context("a unit fits into memory")?;
        let mut rest = new;
        let mut olds = old.map(|old| old.chunks(size));
        let mut position = start;
        // Neighbours of one fate go together, except packed ones.
        let mut fates = Vec::new();
        for bytes in rest.chunks(size) {
            let old = olds.as_mut().and_then(Iterator::next);
            let zero = is_zero(bytes);
            fates.push(match old {
                Some(old) if old == bytes => Fate::Leave,
                None if zero => Fate::Leave,
                Some(_) if zero => Fate::Zero,
                _ => Fate::Write,
            });
        }
        for alike in fates.chunk_by(|one, next| one == next && !(self.compress && *one == Fate::Write)) {
            let length = alike.len().saturating_mul(size).min(rest.len());
            let (bytes, behind) = rest.split_at_mut(length);
            let count = bytes.len() as u64;
            match alike.first() {
                Some(Fate::Write) if self.compress && self.target.write_packed(position, bytes)? => {
                    copied.packed = copied.packed.saturating_add(count);
                }
                Some(Fate::Write) => {
                    self.target.write(&[VolatileSlice::from(bytes)], position)?;
                    copied.written = copied.written.saturating_add(count);
                }
                Some(Fate::Zero) if self.only_below_top && zeroed.len() >= REMEMBERED => {
                    self.target.write(&[VolatileSlice::from(bytes)], position)?;
                    copied.written = copied.written.saturating_add(count);
                }
                Some(Fate::Zero) => {
                    if self.only_below_top {
                        zeroed.push((position, position.saturating_add(count)));
                    }
                    self.target.write_zeroes(position, count, true)?;
                    copied.zeroed = copied.zeroed.saturating_add(count);
                }
                Some(Fate::Leave) | None => {}
            }
            position = position.saturating_add(count);
            rest = behind;
        }
        Ok(())
    }
}

/// Writes what the only layer of `overlay` says to `base`, which is at least as long.
pub(crate) fn merge(overlay: &Disk, base: &Disk, progress: &mut Progress) -> anyhow::Result<Copied> {
    let unit = unit(base);
    let chunk = unit.max(CHUNK);
    let mut buffer = Buffer::new(chunk);
    let mut copied = Copied::default();
    for segment in Segments::new(overlay) {
        let Segment { start, end, top, zero } = segment?;
        if top && zero {
            base.write_zeroes(start, end - start, true)?;
            copied.zeroed = copied.zeroed.saturating_add(end - start);
        } else if top {
            for_each_part(start, end, chunk, |start, end| {
                let bytes = buffer.read(Some(overlay), start, end)?;
                base.write(&[VolatileSlice::from(&mut *bytes)], start)?;
                copied.written = copied.written.saturating_add(end - start);
                progress.at(end);
                Ok(())
            })?;
        }
        progress.at(end);
    }
    Ok(copied)
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Words of 16 bytes: the compiler compares them as vectors.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
