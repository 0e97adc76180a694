//! A flattened extent: where bytes of the *disk* live, with the chain already followed.

use crate::files::FileId;

/// What a flattened extent says about its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// In a file, as they are.
    Data {
        file: FileId,
        offset: u64,
        /// May be overwritten in place: claimed by the top layer, in a read-write file.
        overwrite: bool,
    },
    /// A layer says that they are zero.
    Zero,
    /// No layer says anything: zero.
    Unallocated,
    /// In a packed unit of the layer.
    Packed {
        token: u64,
        /// Bytes of the unit before this extent.
        skip: u32,
        /// Length of the whole unit.
        unit: u32,
    },
}

/// A range of the disk with one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flat {
    pub(crate) start: u64,
    pub(crate) length: u64,
    /// The layer that answered, 0 at the top.
    pub(crate) depth: u16,
    pub(crate) target: Target,
}

impl Flat {
    /// Where it ends. Answers are checked against the size of the disk, so that this never saturates.
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// Whether all of it is zero without a look at any file.
    pub(crate) fn reads_as_zero(&self) -> bool {
        matches!(self.target, Target::Zero | Target::Unallocated)
    }

    /// The part from `position` on, which lies inside.
    pub(crate) fn tail(mut self, position: u64) -> Self {
        let cut = position.saturating_sub(self.start);
        self.start = position;
        self.length = self.length.saturating_sub(cut);
        match &mut self.target {
            Target::Data { offset, .. } => *offset = offset.saturating_add(cut),
            // A unit is at most 16 MiB, and the cut lies inside of it.
            Target::Packed { skip, .. } => *skip = skip.saturating_add(u32::try_from(cut).unwrap_or(u32::MAX)),
            Target::Zero | Target::Unallocated => {}
        }
        self
    }

    /// The part before `position`, which lies inside.
    pub(crate) fn head(mut self, position: u64) -> Self {
        self.length = self.length.min(position.saturating_sub(self.start));
        self
    }

    /// Makes `next` part of this one if it continues it in every respect.
    pub(crate) fn merge(&mut self, next: &Self) -> bool {
        let continues = self.end() == next.start
            && self.depth == next.depth
            && match (self.target, next.target) {
                (
                    Target::Data { file, offset, overwrite },
                    Target::Data { file: next_file, offset: next_offset, overwrite: next_overwrite },
                ) => {
                    file == next_file
                        && overwrite == next_overwrite
                        && offset.checked_add(self.length) == Some(next_offset)
                }
                (
                    Target::Packed { token, skip, unit },
                    Target::Packed { token: next_token, skip: next_skip, unit: next_unit },
                ) => token == next_token && unit == next_unit && u64::from(skip) + self.length == u64::from(next_skip),
                (Target::Zero, Target::Zero) | (Target::Unallocated, Target::Unallocated) => true,
                _ => false,
            };
        if continues {
            self.length = self.length.saturating_add(next.length);
        }
        continues
    }
}
