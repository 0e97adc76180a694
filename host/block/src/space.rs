//! The check of what a writer answers: where new bytes go, and which space became free.
//!
//! As in `answer.rs` an answer is a claim, and what does not hold is a *lie*: nothing is written, and the
//! layer is not asked again.
//!
//! | claim | must hold |
//! |---|---|
//! | count | 1 to `max` runs |
//! | place | whole clusters (the last may end with the disk) among those asked for, the first at the offset asked for |
//! | order | ascending, without overlap in the disk or in a file; no ticket twice |
//! | file | registered, granted read-write, and the range in it ends at or before [`MAX_FILE_OFFSET`] |
//! | freed | file as above |

use std::fmt;

use crate::answer::Refusal;
use crate::file::{Access, MAX_FILE_OFFSET};
use crate::layer::{Allocation, FileIndex, Freed};

/// What `prepare` was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// The range in bytes.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The most runs in the answer.
    pub(crate) max: usize,
    /// The size of a cluster, not 0.
    pub(crate) cluster: u64,
    /// The size of the layer.
    pub(crate) virtual_size: u64,
}

/// A claim that does not hold. `Display` completes "the component gave a wrong answer: ...".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpaceLie {
    Count { count: usize, max: usize },
    Unaligned { start: u64, length: u64 },
    Outside { start: u64, length: u64 },
    NotCovered { start: u64 },
    Order { start: u64 },
    Shared { file: FileIndex, offset: u64 },
    Ticket { ticket: u64 },
    NoSuchFile { file: FileIndex },
    ReadOnly { file: FileIndex },
    FileRange { offset: u64, length: u64 },
}

impl fmt::Display for SpaceLie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Count { count: 0, .. } => write!(f, "no space was reserved"),
            Self::Count { count, max } => write!(f, "{count} runs of space where {max} were allowed"),
            Self::Unaligned { start, length } => write!(f, "space for {length} bytes at {start}, not whole clusters"),
            Self::Outside { start, length } => {
                write!(f, "space for {length} bytes at {start}, outside of what was asked for")
            }
            Self::NotCovered { start } => write!(f, "space from {start} on, after the offset asked for"),
            Self::Order { start } => write!(f, "space for {start} before the end of the run before it"),
            Self::Shared { file, offset } => write!(f, "the space at {offset} in file {} twice", file.0),
            Self::Ticket { ticket } => write!(f, "the ticket {ticket} twice"),
            Self::NoSuchFile { file } => write!(f, "space in file {}, which is not registered", file.0),
            Self::ReadOnly { file } => write!(f, "space in file {}, which is read-only", file.0),
            Self::FileRange { offset, length } => {
                write!(f, "space of {length} bytes at file offset {offset}, past the largest file offset")
            }
        }
    }
}

/// Checks the answer of `prepare`. `access_of` gives the right to a registered file, or `None` if there is
/// no such file.
pub(crate) fn check_allocations<E>(
    asked: Asked,
    answer: &[Allocation],
    mut access_of: impl FnMut(FileIndex) -> Result<Option<Access>, E>,
) -> Result<(), Refusal<E, SpaceLie>> {
    let lie = |lie| Err(Refusal::Lie(lie));
    if answer.is_empty() || answer.len() > asked.max {
        return lie(SpaceLie::Count { count: answer.len(), max: asked.max });
    }
    let mask = asked.cluster.saturating_sub(1);
    let lowest = asked.start & !mask;
    let highest = (asked.end.saturating_add(mask) & !mask).min(asked.virtual_size);
    let mut previous_end = lowest;
    for (index, &Allocation { start, length, file, offset, .. }) in answer.iter().enumerate() {
        let Some(end) = start.checked_add(length).filter(|end| start >= lowest && *end <= highest) else {
            return lie(SpaceLie::Outside { start, length });
        };
        if length == 0 || start & mask != 0 || (end & mask != 0 && end != asked.virtual_size) {
            return lie(SpaceLie::Unaligned { start, length });
        }
        if index == 0 && start > asked.start {
            return lie(SpaceLie::NotCovered { start });
        }
        if start < previous_end {
            return lie(SpaceLie::Order { start });
        }
        previous_end = end;
        check_file(file, offset, length, &mut access_of)?;
    }

    let mut tickets: Vec<u64> = answer.iter().map(|allocation| allocation.ticket).collect();
    tickets.sort_unstable();
    if let Some(&[ticket, _]) = tickets.array_windows().find(|[one, other]| one == other) {
        return lie(SpaceLie::Ticket { ticket });
    }
    let mut places: Vec<_> =
        answer.iter().map(|allocation| (allocation.file, allocation.offset, allocation.length)).collect();
    places.sort_unstable();
    let shared = |[one, other]: &&[(FileIndex, u64, u64); 2]| one.0 == other.0 && one.1.saturating_add(one.2) > other.1;
    if let Some(&[_, (file, offset, _)]) = places.array_windows().find(shared) {
        return lie(SpaceLie::Shared { file, offset });
    }
    Ok(())
}

/// Checks the ranges that `flush` says are free.
pub(crate) fn check_freed<E>(
    answer: &[Freed],
    mut access_of: impl FnMut(FileIndex) -> Result<Option<Access>, E>,
) -> Result<(), Refusal<E, SpaceLie>> {
    answer.iter().try_for_each(|freed| check_file(freed.file, freed.offset, freed.length, &mut access_of))
}

fn check_file<E>(
    file: FileIndex,
    offset: u64,
    length: u64,
    access_of: &mut impl FnMut(FileIndex) -> Result<Option<Access>, E>,
) -> Result<(), Refusal<E, SpaceLie>> {
    if offset.checked_add(length).is_none_or(|end| end > MAX_FILE_OFFSET) {
        return Err(Refusal::Lie(SpaceLie::FileRange { offset, length }));
    }
    match access_of(file).map_err(Refusal::Files)? {
        None => Err(Refusal::Lie(SpaceLie::NoSuchFile { file })),
        Some(access) if !access.is_writable() => Err(Refusal::Lie(SpaceLie::ReadOnly { file })),
        Some(_) => Ok(()),
    }
}
