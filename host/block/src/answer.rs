//! The check of what a layer answers: every number of a [`Located`] before the disk acts on it.
//!
//! A layer is usually a component that read a stranger's image, so an answer is a claim. What does
//! not hold is a *lie*; nothing of that answer is used, and the layer is not asked again.
//!
//! | claim | must hold |
//! |---|---|
//! | count | 1 to `max_extents` extents |
//! | place | starts at or before the offset asked for, and contains it |
//! | length | no extent is empty, and none ends past the layer's virtual size |
//! | data | the file is registered, the range in it ends at or before [`MAX_FILE_OFFSET`] |
//! | overwrite | the file was granted read-write |
//! | packed | the unit is at most [`MAX_PACKED_UNIT`] bytes |

use std::fmt;

use crate::file::{Access, MAX_FILE_OFFSET};
use crate::layer::{FileIndex, Located, Placement};

/// The most bytes that one packed extent may unpack to: 16 MiB (`wit/reader.wit`, `extent`).
pub const MAX_PACKED_UNIT: u64 = 16 << 20;

/// What was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    /// Byte offset in the layer.
    pub(crate) offset: u64,
    /// The budget of the answer.
    pub(crate) max_extents: u32,
    /// The size of the layer.
    pub(crate) virtual_size: u64,
}

/// A claim that does not hold. `Display` completes "the component gave a wrong answer: ...".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    Count { count: usize, max_extents: u32 },
    StartsLate { start: u64, offset: u64 },
    StopsEarly { end: u64, offset: u64 },
    Empty { at: u64 },
    PastEnd { at: u64, length: u64, virtual_size: u64 },
    NoSuchFile { at: u64, file: FileIndex },
    FileRange { at: u64, offset: u64, length: u64 },
    Overwrite { at: u64, file: FileIndex },
    PackedUnit { at: u64, length: u64 },
}

impl fmt::Display for Lie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Count { count: 0, .. } => write!(f, "no extents"),
            Self::Count { count, max_extents } => write!(f, "{count} extents where {max_extents} were allowed"),
            Self::StartsLate { start, offset } => write!(f, "it starts at {start}, after the offset {offset}"),
            Self::StopsEarly { end, offset } => write!(f, "it ends at {end}, before the offset {offset}"),
            Self::Empty { at } => write!(f, "an extent of no bytes at {at}"),
            Self::PastEnd { at, length, virtual_size } => {
                write!(f, "an extent of {length} bytes at {at} in an image of {virtual_size}")
            }
            Self::NoSuchFile { at, file } => write!(f, "file {} for {at}, which is not registered", file.0),
            Self::FileRange { at, offset, length } => {
                write!(f, "{length} bytes at file offset {offset} for {at}, past the largest file offset")
            }
            Self::Overwrite { at, file } => write!(f, "overwrite at {at} in file {}, which is read-only", file.0),
            Self::PackedUnit { at, length } => {
                write!(f, "a packed unit of {length} bytes at {at}, where {MAX_PACKED_UNIT} are allowed")
            }
        }
    }
}

/// Why an answer is not used.
#[derive(Debug)]
pub(crate) enum Refusal<E, L = Lie> {
    /// The layer lied.
    Lie(L),
    /// `access_of` failed.
    Files(E),
}

/// Checks an answer against what was asked. `access_of` gives the right to a registered file, or
/// `None` if there is no such file.
pub(crate) fn check<E>(
    question: Question,
    answer: &Located,
    mut access_of: impl FnMut(FileIndex) -> Result<Option<Access>, E>,
) -> Result<(), Refusal<E>> {
    let Question { offset, max_extents, virtual_size } = question;
    let lie = |lie| Err(Refusal::Lie(lie));

    let count = answer.extents.len();
    if count == 0 || u32::try_from(count).is_ok_and(|count| count > max_extents) || u32::try_from(count).is_err() {
        return lie(Lie::Count { count, max_extents });
    }
    if answer.start > offset {
        return lie(Lie::StartsLate { start: answer.start, offset });
    }
    let mut at = answer.start;
    for extent in &answer.extents {
        let length = extent.length;
        if length == 0 {
            return lie(Lie::Empty { at });
        }
        let Some(end) = at.checked_add(length).filter(|end| *end <= virtual_size) else {
            return lie(Lie::PastEnd { at, length, virtual_size });
        };
        match extent.placement {
            Placement::Data { file, offset, overwrite } => {
                if offset.checked_add(length).is_none_or(|end| end > MAX_FILE_OFFSET) {
                    return lie(Lie::FileRange { at, offset, length });
                }
                match access_of(file).map_err(Refusal::Files)? {
                    None => return lie(Lie::NoSuchFile { at, file }),
                    Some(access) if overwrite && !access.is_writable() => return lie(Lie::Overwrite { at, file }),
                    Some(_) => {}
                }
            }
            Placement::Packed { .. } if length > MAX_PACKED_UNIT => return lie(Lie::PackedUnit { at, length }),
            Placement::Packed { .. } | Placement::Zero | Placement::Unallocated => {}
        }
        at = end;
    }
    if at <= offset {
        return lie(Lie::StopsEarly { end: at, offset });
    }
    Ok(())
}
