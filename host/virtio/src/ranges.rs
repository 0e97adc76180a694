//! The ranges of a discard or of a write of zeroes, as a guest lists them in its data (section 5.2.6).
//!
//! ```text
//!  ┌────────┬─────────────┬───────┐
//!  │ sector │ num_sectors │ flags │   repeated, up to MAX_RANGES times
//!  │ 8      │ 4           │ 4     │
//!  └────────┴─────────────┴───────┘
//! ```

use blockhouse_block::SECTOR_SIZE;
use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
use vm_memory::{Bytes, VolatileSlice};

use crate::execute::Status;

/// Bytes of one range.
const RANGE_LEN: usize = 16;

/// The most ranges that any request may have.
const MAX_RANGES: usize = 16;

/// What a kind of request may ask for. The guest finds the same numbers in config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Ranges in one request.
    pub(crate) ranges: u32,
    /// Sectors in one range.
    pub(crate) sectors: u32,
    /// Whether a range may have the flag that lets the disk give its space back.
    pub(crate) unmap: bool,
}

/// Discards: 16 times 256 MiB in one request. No byte of it is moved, and the disk asks its format for a part at
/// a time.
pub(crate) const DISCARD: Limits = Limits { ranges: 16, sectors: 256 << 11, unmap: false };

/// Zeroes: 32 MiB in one request, because a disk that knows no better writes every byte of them.
pub(crate) const WRITE_ZEROES: Limits = Limits { ranges: 1, sectors: 32 << 11, unmap: true };

const _: () = assert!(DISCARD.ranges as usize <= MAX_RANGES && WRITE_ZEROES.ranges as usize <= MAX_RANGES);

/// A range that lies inside the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) may_unmap: bool,
}

/// Why a list of ranges is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    pub(crate) why: &'static str,
}

const fn error(why: &'static str) -> Refusal {
    Refusal { status: Status::IoError, why }
}

const fn unsupported(why: &'static str) -> Refusal {
    Refusal { status: Status::Unsupported, why }
}

/// Copies the ranges out of `data`, once, and judges the copy: all of them are good, or none is
/// carried out. `capacity` is the size of the disk in bytes.
pub(crate) fn read(data: &[VolatileSlice<'_>], limits: Limits, capacity: u64) -> Result<Vec<ByteRange>, Refusal> {
    // The lengths of a chain add up to less than 4 GiB; should that change, the sum sticks at a value
    // that is too large.
    let len = data.iter().fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
    if len == 0 || !len.is_multiple_of(RANGE_LEN) {
        return Err(error("the data is not a list of ranges"));
    }
    if !u32::try_from(len / RANGE_LEN).is_ok_and(|ranges| ranges <= limits.ranges) {
        return Err(error("there are more ranges than the device allows"));
    }
    let mut copy = [0; MAX_RANGES * RANGE_LEN];
    let mut rest = copy.as_mut_slice();
    for slice in data {
        let (now, later) = rest.split_at_mut_checked(slice.len()).ok_or(error("the data is not a list of ranges"))?;
        slice.read_slice(now, 0).map_err(|_| error("the ranges cannot be read"))?;
        rest = later;
    }
    let (ranges, _) = copy.as_chunks::<RANGE_LEN>();
    ranges.iter().take(len / RANGE_LEN).map(|bytes| judge(*bytes, limits, capacity)).collect()
}

fn judge(bytes: [u8; RANGE_LEN], limits: Limits, capacity: u64) -> Result<ByteRange, Refusal> {
    let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
        return Err(unsupported("a range has flags that the device does not know"));
    }
    let may_unmap = flags != 0;
    if may_unmap && !limits.unmap {
        return Err(unsupported("a discard has the flag that only zeroes may have"));
    }
    if sectors > limits.sectors {
        return Err(error("a range has more sectors than the device allows"));
    }
    let len = u64::from(sectors).saturating_mul(SECTOR_SIZE);
    u64::from_le_bytes(sector)
        .checked_mul(SECTOR_SIZE)
        .filter(|offset| offset.checked_add(len).is_some_and(|end| end <= capacity))
        .map(|offset| ByteRange { offset, len, may_unmap })
        .ok_or(error("a range does not lie inside the disk"))
}
