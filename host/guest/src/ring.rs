//! One split virtqueue (virtio 1.3, section 2.7) with a fixed set of requests, polled.
//!
//! ```text
//!  slot 0               slot 1            …      each slot owns six descriptors, always linked the
//!  header▸data×4▸status                          same way; a request sets lengths and the header
//! ```
//! Memory that the device writes meanwhile consists of atomics; only the data of a completed request
//! is looked at as plain bytes.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Requests in flight at once.
pub(crate) const SLOTS: u16 = 4;

/// Data descriptors in a request.
const PARTS: u16 = 4;

/// Bytes in one data descriptor.
const PART_LEN: u32 = 32 << 10;

/// The most bytes that one request reads.
pub(crate) const SLOT_LEN: u32 = PART_LEN * PARTS as u32;

/// Descriptors of a slot: header, data, status.
const DESCRIPTORS: u16 = PARTS + 2;

/// Descriptors in the queue: a power of two that holds all slots.
pub(crate) const QUEUE_SIZE: u16 = (SLOTS * DESCRIPTORS).next_power_of_two();

/// Request types (section 5.2.6).
pub(crate) const TYPE_IN: u32 = 0;
pub(crate) const TYPE_GET_ID: u32 = 8;

/// Status of a request that went well.
const STATUS_OK: u8 = 0;

/// A status that no device writes.
const STATUS_NONE: u8 = 0xff;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

#[repr(C, align(16))]
struct Descriptor {
    addr: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct Avail {
    flags: AtomicU16,
    idx: AtomicU16,
    ring: [AtomicU16; QUEUE_SIZE as usize],
    used_event: AtomicU16,
}

#[repr(C)]
struct UsedElement {
    id: AtomicU32,
    len: AtomicU32,
}

#[repr(C, align(4))]
struct Used {
    flags: AtomicU16,
    idx: AtomicU16,
    ring: [UsedElement; QUEUE_SIZE as usize],
    avail_event: AtomicU16,
}

#[repr(C, align(4096))]
struct Slot {
    data: UnsafeCell<[u8; SLOT_LEN as usize]>,
    kind: AtomicU32,
    reserved: AtomicU32,
    sector: AtomicU64,
    status: AtomicU8,
}

/// Everything that guest and device share.
struct Shared {
    descriptors: [Descriptor; QUEUE_SIZE as usize],
    avail: Avail,
    used: Used,
    slots: [Slot; SLOTS as usize],
}

// SAFETY: all fields but `data` are atomics. `data` is written by the device alone, between `submit`
// and the completion of its slot, and read as bytes by the one thread of the guest outside of that
// time: `Ring::data` takes the completion as its proof.
unsafe impl Sync for Shared {}

static SHARED: Shared = Shared {
    descriptors: [const {
        Descriptor {
            addr: AtomicU64::new(0),
            len: AtomicU32::new(0),
            flags: AtomicU16::new(0),
            next: AtomicU16::new(0),
        }
    }; QUEUE_SIZE as usize],
    avail: Avail {
        flags: AtomicU16::new(0),
        idx: AtomicU16::new(0),
        ring: [const { AtomicU16::new(0) }; QUEUE_SIZE as usize],
        used_event: AtomicU16::new(0),
    },
    used: Used {
        flags: AtomicU16::new(0),
        idx: AtomicU16::new(0),
        ring: [const { UsedElement { id: AtomicU32::new(0), len: AtomicU32::new(0) } }; QUEUE_SIZE as usize],
        avail_event: AtomicU16::new(0),
    },
    slots: [const {
        Slot {
            data: UnsafeCell::new([0; SLOT_LEN as usize]),
            kind: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            sector: AtomicU64::new(0),
            status: AtomicU8::new(0),
        }
    }; SLOTS as usize],
};

/// Where the parts of the queue are, for the device's registers.
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

/// The driver's side of the queue.
///
/// There is one piece of shared memory, hence one ring at a time: `disk::examine` resets the device
/// before it lets go of a ring.
pub(crate) struct Ring {
    avail_idx: u16,
    used_idx: u16,
}

/// A completed request, whose data belongs to the guest again.
pub(crate) struct Completion {
    /// The slot that was submitted.
    pub(crate) slot: u16,
    /// Whether the device says that it did what was asked.
    pub(crate) ok: bool,
}

/// The device returned something that it was not given.
pub(crate) struct Nonsense;

impl Ring {
    /// A fresh ring. The device must have been reset.
    pub(crate) fn new() -> Self {
        let shared = &SHARED;
        shared.avail.idx.store(0, Ordering::Relaxed);
        shared.used.idx.store(0, Ordering::Relaxed);
        shared.used.avail_event.store(0, Ordering::Relaxed);
        // With EVENT_IDX this asks for one interrupt in 65536 completions, and nobody takes it: the
        // guest polls.
        shared.avail.used_event.store(u16::MAX, Ordering::Relaxed);
        for (number, slot) in (0..).zip(&shared.slots) {
            let first = number * DESCRIPTORS;
            set(first, address(&slot.kind), 16, DESC_NEXT);
            for part in 0..PARTS {
                let data = slot.data.get().expose_provenance() as u64 + u64::from(PART_LEN) * u64::from(part);
                set(first + 1 + part, data, PART_LEN, DESC_NEXT | DESC_WRITE);
            }
            set(first + 1 + PARTS, address(&slot.status), 1, DESC_WRITE);
        }
        Self { avail_idx: 0, used_idx: 0 }
    }

    pub(crate) fn addresses(&self) -> Addresses {
        Addresses {
            descriptors: address(&SHARED.descriptors),
            avail: address(&SHARED.avail),
            used: address(&SHARED.used),
        }
    }

    /// Makes a request of `slot` available, which must not be in flight: `len` bytes, up to
    /// [`SLOT_LEN`]. Returns whether the device wants to be notified.
    pub(crate) fn submit(&mut self, slot: u16, kind: u32, sector: u64, len: u32) -> bool {
        let shared = &SHARED;
        let first = slot * DESCRIPTORS;
        if let Some(slot) = shared.slots.get(usize::from(slot)) {
            slot.kind.store(kind, Ordering::Relaxed);
            slot.sector.store(sector, Ordering::Relaxed);
            slot.status.store(STATUS_NONE, Ordering::Relaxed);
        }
        // As many parts as the length needs, then straight to the status.
        let mut rest = len;
        let mut previous = first;
        for part in first + 1..=first + PARTS {
            if rest == 0 {
                break;
            }
            let now = rest.min(PART_LEN);
            link(previous, part);
            resize(part, now);
            rest -= now;
            previous = part;
        }
        link(previous, first + 1 + PARTS);

        if let Some(entry) = shared.avail.ring.get(usize::from(self.avail_idx % QUEUE_SIZE)) {
            entry.store(first, Ordering::Relaxed);
        }
        let old = self.avail_idx;
        self.avail_idx = old.wrapping_add(1);
        shared.avail.idx.store(self.avail_idx, Ordering::Release);
        // The device may go to sleep at this moment: publish first, then look (section 2.7.10).
        fence(Ordering::SeqCst);
        shared.used.avail_event.load(Ordering::Relaxed) == old
    }

    /// Takes the next completion, if there is one.
    pub(crate) fn poll(&mut self) -> Result<Option<Completion>, Nonsense> {
        let shared = &SHARED;
        if shared.used.idx.load(Ordering::Acquire) == self.used_idx {
            return Ok(None);
        }
        let element = shared.used.ring.get(usize::from(self.used_idx % QUEUE_SIZE)).ok_or(Nonsense)?;
        let head = u16::try_from(element.id.load(Ordering::Relaxed)).map_err(|_| Nonsense)?;
        self.used_idx = self.used_idx.wrapping_add(1);
        let number = head / DESCRIPTORS;
        let slot = shared.slots.get(usize::from(number)).ok_or(Nonsense)?;
        let status = slot.status.load(Ordering::Relaxed);
        if head % DESCRIPTORS != 0 || status == STATUS_NONE {
            return Err(Nonsense);
        }
        Ok(Some(Completion { slot: number, ok: status == STATUS_OK }))
    }

    /// The first `len` bytes that a completed request read.
    pub(crate) fn data<'a>(&'a self, completion: &'a Completion, len: u32) -> &'a [u8] {
        let Some(slot) = SHARED.slots.get(usize::from(completion.slot)) else {
            return &[];
        };
        // SAFETY: the request is complete, so the device writes here no more; it cannot be submitted
        // again while this borrow of the ring lives, because `submit` borrows it mutably.
        let data = unsafe { &*slot.data.get() };
        data.get(..usize::try_from(len).unwrap_or(usize::MAX)).unwrap_or_default()
    }
}

/// The address of something shared, as the device knows it: memory is mapped to itself.
fn address<T>(shared: &'static T) -> u64 {
    core::ptr::from_ref(shared).expose_provenance() as u64
}

fn set(index: u16, addr: u64, len: u32, flags: u16) {
    if let Some(descriptor) = SHARED.descriptors.get(usize::from(index)) {
        descriptor.addr.store(addr, Ordering::Relaxed);
        descriptor.len.store(len, Ordering::Relaxed);
        descriptor.flags.store(flags, Ordering::Relaxed);
    }
}

fn link(index: u16, next: u16) {
    if let Some(descriptor) = SHARED.descriptors.get(usize::from(index)) {
        descriptor.next.store(next, Ordering::Relaxed);
    }
}

fn resize(index: u16, len: u32) {
    if let Some(descriptor) = SHARED.descriptors.get(usize::from(index)) {
        descriptor.len.store(len, Ordering::Relaxed);
    }
}
