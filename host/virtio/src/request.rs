//! From a descriptor chain to a request: the one place that interprets what a guest put in memory.
//!
//! ```text
//!  device-readable bytes           device-writable bytes
//!  ┌────────────────┬──────────┐  ┌──────────┬────────┐
//!  │ type  – sector │ data     │  │ data     │ status │
//!  │ 4     4   8    │ (OUT, …) │  │ (IN, ID) │ 1      │
//!  └────────────────┴──────────┘  └──────────┴────────┘
//! ```
//! How these bytes are cut into descriptors is the driver's choice (section 2.7.4), so the header may
//! be split, and the status may share a descriptor with data.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::counters::RequestKind;

/// The most descriptors that one request may have, whether in the queue's table or an indirect one: what QEMU takes.
/// There are drivers that look at no `seg_max` (viostor for Windows, 2020 to 2022).
pub const MAX_DESCRIPTORS: u16 = 1024;

/// Bytes of a descriptor in a table (section 2.7.5).
const DESCRIPTOR_LEN: u32 = 16;

/// Bytes of `type`, `reserved` and `sector`.
const HEADER_LEN: usize = 16;

/// Why a descriptor chain is not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The chain does not end: a loop, an index past the table, an indirect table that cannot be
    /// read or lies inside another, or more than 4 GiB in all.
    #[error("the descriptor chain does not end (loop, bad index or bad indirect table)")]
    Unending,
    /// The chain has more than [`MAX_DESCRIPTORS`] descriptors.
    #[error("the request has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A device-readable descriptor comes after a device-writable one (section 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A descriptor names memory that the guest does not have.
    #[error("a descriptor lies outside of guest memory")]
    OutsideMemory,
    /// There are fewer device-readable bytes than a header has.
    #[error("the request has no complete header")]
    NoHeader,
    /// There is no device-writable byte for the status.
    #[error("the request has no status byte")]
    NoStatus,
}

/// What a request asks for (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Read from this sector on into the device-writable data.
    In { sector: u64 },
    /// Write the device-readable data from this sector on.
    Out { sector: u64 },
    /// Make what was written durable.
    Flush,
    /// Write the serial into the device-writable data.
    GetId,
    /// The ranges in the device-readable data are not needed any more.
    Discard,
    /// The ranges in the device-readable data are to read as zero.
    WriteZeroes,
    /// A type that this device does not know.
    Unknown(u32),
}

impl Operation {
    /// How it is counted.
    pub(crate) fn kind(self) -> RequestKind {
        match self {
            Self::In { .. } => RequestKind::Read,
            Self::Out { .. } => RequestKind::Write,
            Self::Flush => RequestKind::Flush,
            Self::GetId => RequestKind::GetId,
            Self::Discard => RequestKind::Discard,
            Self::WriteZeroes => RequestKind::WriteZeroes,
            Self::Unknown(_) => RequestKind::Other,
        }
    }
}

/// A request whose header was copied and whose buffers were checked to lie in guest memory.
pub(crate) struct Request<'m> {
    pub(crate) operation: Operation,
    /// Device-readable data after the header.
    pub(crate) readable: Vec<VolatileSlice<'m>>,
    /// Device-writable data before the status.
    pub(crate) writable: Vec<VolatileSlice<'m>>,
    /// The one byte for the status.
    pub(crate) status: VolatileSlice<'m>,
}

/// A chain that is not a request. If its status byte could be found, the driver can be told.
pub(crate) struct Rejected<'m> {
    pub(crate) reason: Malformed,
    pub(crate) status: Option<VolatileSlice<'m>>,
}

impl<'m> Request<'m> {
    /// Reads `chain`. Each descriptor and each byte of the header is read once, so a guest that
    /// changes them meanwhile changes nothing.
    ///
    /// `room` is an earlier request that has ended or none, for the memory of its lists.
    pub(crate) fn parse<M>(
        chain: impl Iterator<Item = Descriptor>,
        memory: &'m M,
        room: Lists<'m>,
    ) -> Result<Self, Rejected<'m>>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        let mut parts = Parts::in_place_of(room);
        let mut unfinished = true;
        for (i, descriptor) in chain.enumerate() {
            if i >= usize::from(MAX_DESCRIPTORS) {
                // The status is at its end, and a driver that finds none there takes what it left there itself.
                parts.keep_nothing_before(descriptor);
            }
            unfinished = descriptor.has_next();
            parts.add(descriptor, memory);
        }
        if unfinished {
            // What was seen last may not be the end of the request, so there is no status either.
            return Err(Rejected { reason: Malformed::Unending, status: None });
        }
        parts.finish()
    }
}

/// The descriptors of a chain that starts at a known head. virtio-queue gives out chains only for heads
/// that it takes off the available ring itself.
pub(crate) struct ChainAgain<'m, M> {
    memory: &'m M,
    table: GuestAddress,
    /// Descriptors in the table.
    len: u32,
    next: Option<u32>,
    /// How many may follow: a chain visits each at most once.
    left: u32,
    indirect: bool,
}

impl<'m, M> ChainAgain<'m, M>
where
    M: GuestMemory<Bitmap = ()>,
{
    /// The chain from `head` on in a queue of `size` descriptors at `table`.
    pub(crate) fn new(memory: &'m M, table: GuestAddress, size: u16, head: u16) -> Self {
        Self { memory, table, len: size.into(), next: Some(head.into()), left: size.into(), indirect: false }
    }

    fn read(&mut self) -> Option<Descriptor> {
        let index = self.next.take().filter(|index| *index < self.len)?;
        self.left = self.left.checked_sub(1)?;
        let at = self.table.checked_add(u64::from(index).checked_mul(DESCRIPTOR_LEN.into())?)?;
        let descriptor: Descriptor = self.memory.read_obj(at).ok()?;
        self.next = descriptor.has_next().then(|| descriptor.next().into());
        Some(descriptor)
    }
}

impl<M> Iterator for ChainAgain<'_, M>
where
    M: GuestMemory<Bitmap = ()>,
{
    type Item = Descriptor;

    /// Ends early, after a descriptor that is not the last, where a chain makes no sense.
    fn next(&mut self) -> Option<Descriptor> {
        let descriptor = self.read()?;
        if !descriptor.refers_to_indirect_table() {
            return Some(descriptor);
        }
        // An indirect table is the rest of the chain, and holds no other (section 2.7.5.3). More than an index can name
        // is none: a loop would be followed for as long.
        let count = descriptor.len() / DESCRIPTOR_LEN;
        if self.indirect || descriptor.len() % DESCRIPTOR_LEN != 0 || count > u32::from(u16::MAX) {
            self.next = None;
            return None;
        }
        self.indirect = true;
        self.table = descriptor.addr();
        self.len = count;
        self.left = self.len;
        self.next = Some(0);
        self.read().filter(|descriptor| !descriptor.refers_to_indirect_table())
    }
}

/// The buffers of a request: readable and writable ones.
pub(crate) type Lists<'m> = (Vec<VolatileSlice<'m>>, Vec<VolatileSlice<'m>>);

/// The buffers of a chain as they are collected.
#[derive(Default)]
struct Parts<'m> {
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    /// The first thing that was wrong. Collecting goes on, to find the status byte.
    fault: Option<Malformed>,
    /// Whether the writable bytes collected so far end where the chain's end so far.
    status_reachable: bool,
}

impl<'m> Parts<'m> {
    fn in_place_of((mut readable, mut writable): Lists<'m>) -> Self {
        readable.clear();
        writable.clear();
        Self { readable, writable, ..Self::default() }
    }

    fn add<M>(&mut self, descriptor: Descriptor, memory: &'m M)
    where
        M: GuestMemory<Bitmap = ()>,
    {
        let (list, access) = if descriptor.is_write_only() {
            (&mut self.writable, Permissions::Write)
        } else {
            if !self.writable.is_empty() {
                self.fault.get_or_insert(Malformed::Order);
            }
            (&mut self.readable, Permissions::Read)
        };
        let Ok(len) = usize::try_from(descriptor.len()) else {
            self.fault.get_or_insert(Malformed::OutsideMemory);
            return;
        };
        // An empty buffer means nothing, wherever it points.
        if len == 0 {
            return;
        }
        // A buffer may span memory regions; then it becomes several slices.
        let before = list.len();
        let slices = memory.get_slices(descriptor.addr(), len, access);
        let inside =
            slices.is_ok_and(|slices| slices.into_iter().all(|slice| slice.map(|slice| list.push(slice)).is_ok()));
        if !inside {
            list.truncate(before);
            self.fault.get_or_insert(Malformed::OutsideMemory);
        }
        if descriptor.is_write_only() {
            self.status_reachable = inside;
        }
    }

    /// The request is too long: all that is kept of it is what the status may be in.
    fn keep_nothing_before(&mut self, next: Descriptor) {
        self.fault.get_or_insert(Malformed::TooLong);
        self.readable.clear();
        if next.is_write_only() && next.len() > 0 {
            self.writable.clear();
        }
    }

    fn finish(mut self) -> Result<Request<'m>, Rejected<'m>> {
        let status = if self.status_reachable { split_last_byte(&mut self.writable) } else { None };
        let reject = |reason| Rejected { reason, status };
        if let Some(reason) = self.fault {
            return Err(reject(reason));
        }
        let Some(header) = split_header(&mut self.readable) else {
            return Err(reject(Malformed::NoHeader));
        };
        let Some(status) = status else {
            return Err(reject(Malformed::NoStatus));
        };
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let operation = match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Operation::In { sector },
            VIRTIO_BLK_T_OUT => Operation::Out { sector },
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_GET_ID => Operation::GetId,
            VIRTIO_BLK_T_DISCARD => Operation::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
            other => Operation::Unknown(other),
        };
        Ok(Request { operation, readable: self.readable, writable: self.writable, status })
    }
}

/// Copies the header out of the front of `slices` and leaves what follows it.
fn split_header(slices: &mut Vec<VolatileSlice<'_>>) -> Option<[u8; HEADER_LEN]> {
    let mut header = [0; HEADER_LEN];
    let mut missing = header.as_mut_slice();
    let mut used_up = 0;
    for slice in slices.iter_mut() {
        let count = slice.len().min(missing.len());
        let (now, later) = missing.split_at_mut(count);
        slice.read_slice(now, 0).ok()?;
        missing = later;
        *slice = slice.offset(count).ok()?;
        if !slice.is_empty() {
            break;
        }
        used_up += 1;
        if missing.is_empty() {
            break;
        }
    }
    if !missing.is_empty() {
        return None;
    }
    slices.drain(..used_up);
    Some(header)
}

/// Takes the last byte off the end of `slices`, none of which is empty.
fn split_last_byte<'m>(slices: &mut Vec<VolatileSlice<'m>>) -> Option<VolatileSlice<'m>> {
    let last = slices.pop()?;
    let data = last.len().checked_sub(1)?;
    let status = last.offset(data).ok()?;
    if data > 0 {
        slices.push(last.subslice(0, data).ok()?);
    }
    Some(status)
}
