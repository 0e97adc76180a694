//! The whole disk as a list of runs, for people and for comparison with other tools.

use std::sync::Arc;

use crate::chain::{Chain, Questions, Walk};
use crate::error::{Error, ErrorKind, Result};
use crate::file::ImageFile;
use crate::flat::{Flat, Target};

/// Extents that are joined before a run is returned as it is. An image that needs more for one run was
/// made to keep the caller waiting.
const MAX_JOINED: u32 = 1 << 20;

/// A range of the disk with one meaning. Neighbours differ in depth or kind.
///
/// Terms of `qemu-img map --output=json`: `start`, `length` and `depth` have the same meaning; `present`,
/// `zero`, `data`, `compressed` and `offset` follow from the kind.
#[derive(Clone, Debug)]
pub struct Run {
    /// Byte offset in the disk.
    pub start: u64,
    /// Length in bytes, not 0.
    pub length: u64,
    /// The layer that answered, 0 at the top. For unallocated bytes the last layer that reaches so far.
    pub depth: u16,
    /// What is there.
    pub kind: RunKind,
}

/// What is in a [`Run`].
#[derive(Clone, Debug)]
pub enum RunKind {
    /// Bytes as they are in a file.
    Data {
        /// The file.
        file: Arc<ImageFile>,
        /// Byte offset in that file.
        offset: u64,
    },
    /// Zeroes, says a layer.
    Zero,
    /// Zeroes, since no layer says anything.
    Unallocated,
    /// Bytes that a component unpacks.
    Packed,
}

impl Run {
    fn continues(&self, next: &Self) -> bool {
        self.start.checked_add(self.length) == Some(next.start)
            && self.depth == next.depth
            && match (&self.kind, &next.kind) {
                (RunKind::Data { file, offset }, RunKind::Data { file: next_file, offset: next_offset }) => {
                    Arc::ptr_eq(file, next_file) && offset.checked_add(self.length) == Some(*next_offset)
                }
                (RunKind::Zero, RunKind::Zero)
                | (RunKind::Unallocated, RunKind::Unallocated)
                | (RunKind::Packed, RunKind::Packed) => true,
                _ => false,
            }
    }
}

/// An iterator over the [`Run`]s of a range of a disk, in order and without gaps. Made by
/// [`Disk::runs`](crate::Disk::runs).
///
/// It asks the layers and not the extent map, so that it is complete however small the map is. Memory is
/// one answer for each layer; time is linear in the number of extents. After an error it ends.
pub struct Runs<'d> {
    chain: &'d Chain,
    walk: Walk<'d>,
    end: u64,
    questions: Questions,
    next: Option<Run>,
    ended: bool,
}

impl<'d> Runs<'d> {
    pub(crate) fn new(chain: &'d Chain, start: u64, end: u64) -> Self {
        Self {
            chain,
            walk: chain.walk(start, end, end),
            end,
            questions: Questions::unlimited(),
            next: None,
            ended: false,
        }
    }

    fn step(&mut self) -> Result<Option<Run>> {
        match self.walk.next(&mut self.questions)? {
            Some(flat) => Ok(Some(run(self.chain, &flat)?)),
            None if self.walk.position() >= self.end => Ok(None),
            None => Err(Error::new(
                ErrorKind::Component,
                format!("no layer says where the bytes at {} are", self.walk.position()),
            )),
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut joined = 0;
        while !self.ended {
            match (self.step(), &mut self.next) {
                (Ok(Some(run)), Some(current)) if joined < MAX_JOINED && current.continues(&run) => {
                    current.length = current.length.saturating_add(run.length);
                    joined += 1;
                }
                (Ok(Some(run)), next) => {
                    if let Some(complete) = next.replace(run) {
                        return Some(Ok(complete));
                    }
                }
                (Ok(None), next) => {
                    self.ended = true;
                    return next.take().map(Ok);
                }
                (Err(error), _) => {
                    self.ended = true;
                    self.next = None;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

fn run(chain: &Chain, flat: &Flat) -> Result<Run> {
    let kind = match flat.target {
        Target::Data { file, offset, .. } => RunKind::Data {
            file: chain
                .files
                .get(file)
                .cloned()
                .ok_or_else(|| Error::new(ErrorKind::Component, "an extent names a file that is not known"))?,
            offset,
        },
        Target::Zero => RunKind::Zero,
        Target::Unallocated => RunKind::Unallocated,
        Target::Packed { .. } => RunKind::Packed,
    };
    Ok(Run { start: flat.start, length: flat.length, depth: flat.depth, kind })
}
