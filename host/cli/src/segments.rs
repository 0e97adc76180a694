//! What of a disk is worth reading: its runs, and the holes of the files behind them.

use std::collections::VecDeque;

use blockhouse_block::{BlockBackend, Disk, Result, Run, RunKind, Runs};

/// How much of a run is asked for holes at a time, which bounds the memory for the answer.
const PIECE: u64 = 64 << 20;

/// A range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Whether the top layer says what is here.
    pub(crate) top: bool,
    /// Whether it reads as zero, as far as can be told without reading it.
    pub(crate) zero: bool,
}

/// A disk as segments, in order and without gaps. Memory is bounded, time linear in the number of runs and
/// holes.
pub(crate) struct Segments<'d> {
    runs: Runs<'d>,
    current: Option<Run>,
    ready: VecDeque<Segment>,
}

impl<'d> Segments<'d> {
    pub(crate) fn new(disk: &'d Disk) -> Self {
        Self { runs: disk.runs(), current: None, ready: VecDeque::new() }
    }

    /// Looks at the next run, or at the next piece of a long one.
    fn refill(&mut self) -> Result<bool> {
        let run = match self.current.take() {
            Some(run) => run,
            None => match self.runs.next() {
                Some(run) => run?,
                None => return Ok(false),
            },
        };
        let top = run.depth == 0 && !matches!(run.kind, RunKind::Unallocated);
        let end = run.start.saturating_add(run.length);
        let (file, offset) = match &run.kind {
            RunKind::Data { file, offset } => (file, *offset),
            kind => {
                let zero = matches!(kind, RunKind::Zero | RunKind::Unallocated);
                self.ready.push_back(Segment { start: run.start, end, top, zero });
                return Ok(true);
            }
        };
        let length = run.length.min(PIECE);
        let stop = run.start.saturating_add(length);
        let mut position = run.start;
        let ready = &mut self.ready;
        file.for_each_hole(offset, length, |hole, length| {
            let start = run.start.saturating_add(hole.saturating_sub(offset));
            let end = start.saturating_add(length).min(stop);
            if start > position {
                ready.push_back(Segment { start: position, end: start, top, zero: false });
            }
            if end > start {
                ready.push_back(Segment { start, end, top, zero: true });
            }
            position = end;
            Ok(())
        })?;
        if stop > position {
            ready.push_back(Segment { start: position, end: stop, top, zero: false });
        }
        if stop < end {
            let kind = RunKind::Data { file: file.clone(), offset: offset.saturating_add(length) };
            self.current = Some(Run { start: stop, length: end - stop, depth: run.depth, kind });
        }
        Ok(true)
    }
}

impl Iterator for Segments<'_> {
    type Item = Result<Segment>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(segment) = self.ready.pop_front() {
                return Some(Ok(segment));
            }
            match self.refill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Two disks side by side, up to the end of the longer one. Past the end of a disk are zeroes.
pub(crate) struct Pairs<'d> {
    one: Side<'d>,
    other: Side<'d>,
    position: u64,
    end: u64,
}

impl<'d> Pairs<'d> {
    /// `other` may be no disk at all, which is one without bytes.
    pub(crate) fn new(one: &'d Disk, other: Option<&'d Disk>) -> Self {
        let end = one.capacity().max(other.map_or(0, BlockBackend::capacity));
        Self { one: Side::new(Some(one)), other: Side::new(other), position: 0, end }
    }
}

impl Iterator for Pairs<'_> {
    type Item = Result<(Segment, Segment)>;

    /// Both segments have the same start and the same end.
    fn next(&mut self) -> Option<Self::Item> {
        if self.position >= self.end {
            return None;
        }
        let start = self.position;
        let both = self.one.at(start).and_then(|one| Ok((one, self.other.at(start)?)));
        let (one, other) = match both {
            Ok(both) => both,
            Err(error) => {
                self.position = self.end;
                return Some(Err(error));
            }
        };
        let end = one.end.min(other.end).min(self.end);
        self.position = end;
        Some(Ok((Segment { start, end, ..one }, Segment { start, end, ..other })))
    }
}

struct Side<'d> {
    segments: Option<Segments<'d>>,
    current: Segment,
}

impl<'d> Side<'d> {
    fn new(disk: Option<&'d Disk>) -> Self {
        Self { segments: disk.map(Segments::new), current: Segment { start: 0, end: 0, top: false, zero: true } }
    }

    /// The segment that holds `position`, which never goes back.
    fn at(&mut self, position: u64) -> Result<Segment> {
        while self.current.end <= position {
            self.current = match self.segments.as_mut().and_then(Iterator::next) {
                Some(segment) => segment?,
                None => Segment { start: position, end: u64::MAX, top: false, zero: true },
            };
        }
        Ok(self.current)
    }
}
