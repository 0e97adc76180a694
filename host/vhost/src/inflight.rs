//! Which requests are in flight, in memory that outlives this process.
//!
//! The front end keeps the memory and hands it to whoever takes over after a crash. Its layout is that of
//! the vhost-user specification ("Inflight I/O tracking", split virtqueues), little-endian as the machine:
//!
//! ```text
//!  per queue, 64-byte aligned
//!  ┌──────────┬─────────┬──────────┬─────────────────┬──────────┬── per descriptor, 16 bytes ──────────┐
//!  │ features │ version │ desc_num │ last_batch_head │ used_idx │ inflight │ padding │ next │ counter │ …
//!  │ 8        │ 2       │ 2        │ 2               │ 2        │ 1        │ 5       │ 2    │ 8       │
//!  └──────────┴─────────┴──────────┴─────────────────┴──────────┴──────────┴─────────┴──────┴─────────┘
//! ```
//! A request is marked before it is executed, and unmarked after the used ring has it. A crash between
//! ring and mark is what `last_batch_head`, `next` and `used_idx` are for: if the ring is ahead of
//! `used_idx`, the requests of that list were answered.
//!
//! After the queues comes what the specification knows nothing about, and others leave alone.
//!
//! ```text
//!  64-byte aligned
//!  ┌───────┬───────────┬───────────┬─────────┬───────┐
//!  │ magic │ writeback │ unflushed │ padding │ owner │ …
//!  │ 8     │ 1         │ 1         │ 6       │ 8     │
//!  └───────┴───────────┴───────────┴─────────┴───────┘
//! ```
//! * `writeback`: whether the guest has its writes stay volatile until it flushes. The front end says that once, and
//!   not again to whoever takes over.
//! * `unflushed`: whether `owner`, a number that each device of each process draws for itself, has changes in its
//!   memory that were answered. With a format that allocates, bytes survive a process that is killed, and where they
//!   lie does not. Whoever finds this mark of another owner has lost them, and keeps saying so to all who take over
//!   from it, until the guest resets the device.
//!
//! All of it is hostile, as guest memory is: what makes no sense can make requests of this guest be
//! executed twice or never, and nothing else.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockhouse_virtio::{InFlightRecord, MAX_QUEUES};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use crate::memory;
use crate::refusal::{Refusal, Result, refuse};
use crate::ring::MAX_SIZE;

const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 16;
const ALIGNMENT: usize = 64;

/// Offsets in the header of a queue.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

/// Offsets in the entry of a descriptor.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The first bytes of what comes after the queues.
const MAGIC: u64 = u64::from_le_bytes(*b"blkhouse");

/// Where `writeback` is after them, and what it can be besides what memory begins with: not said yet.
const WRITEBACK: usize = 8;
const THROUGH: u8 = 1;
const BACK: u8 = 2;

/// Where `unflushed` is, and what it can be besides what memory begins with: nothing is.
const UNFLUSHED: usize = 9;
const HELD: u8 = 1;
const LOST: u8 = 2;

/// Where `owner` is.
const OWNER: usize = 16;

/// The version of the layout. Zero stands for memory that nobody used yet.
const CURRENT: u16 = 1;

/// The memory for all queues of a device.
#[derive(Clone)]
pub(crate) struct InFlightMemory {
    map: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

impl InFlightMemory {
    /// New memory, and what the front end is told about it. It cannot be shortened by anybody.
    pub(crate) fn create(asked: &VhostUserInflight) -> Result<(Self, VhostUserInflight, File)> {
        let len = needed(asked)?.saturating_add(ALIGNMENT as u64);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("blockhouse-inflight", flags).map_err(Refusal::because)?);
        file.set_len(len).map_err(Refusal::because)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(Refusal::because)?;
        let told = VhostUserInflight::new(len, 0, asked.num_queues, asked.queue_size);
        let memory = Self::adopt(&told, file.try_clone().map_err(Refusal::because)?)?;
        memory.store(0, MAGIC);
        Ok((memory, told, file))
    }

    /// Memory that the front end kept.
    pub(crate) fn adopt(told: &VhostUserInflight, file: File) -> Result<Self> {
        let len = needed(told)?;
        if told.mmap_size < len {
            let size = told.mmap_size;
            return refuse!("the memory for requests in flight needs {len} bytes, and has {size}");
        }
        // No more than is needed, whatever size was named. Of another back end it may have the queues only.
        let end = file.metadata().map_err(Refusal::because)?.len().saturating_sub(told.mmap_offset);
        let all = len.saturating_add(ALIGNMENT as u64);
        let len = if all <= told.mmap_size.min(end) { all } else { len };
        let map = memory::map(file, told.mmap_offset, len)
            .map_err(|refusal| refusal.about(&"the memory for requests in flight"))?;
        Ok(Self { map: Arc::new(map), queues: told.num_queues, queue_size: told.queue_size })
    }

    /// Whether writes may stay volatile until the guest flushes, if a front end has said so. Who brings memory
    /// of another back end may have said anything: then they may not.
    pub(crate) fn writeback(&self) -> Option<bool> {
        let known = self.load::<u64>(0) == Some(MAGIC);
        match self.load::<u8>(WRITEBACK).filter(|_| known) {
            Some(0) => None,
            said => Some(said == Some(BACK)),
        }
    }

    /// Keeps that for whoever takes over.
    pub(crate) fn keep_writeback(&self, writeback: bool) {
        // Not in the memory of another back end, which may have something else there.
        if self.load::<u64>(0) == Some(MAGIC) {
            self.store(WRITEBACK, if writeback { BACK } else { THROUGH });
        }
    }

    /// Whether the guest believes changes to be there that ended with another process: no flush may promise them.
    pub(crate) fn has_lost(&self, owner: u64) -> bool {
        // Memory of another back end has no such mark.
        if self.load::<u64>(0) != Some(MAGIC) {
            return false;
        }
        let lost = match self.load::<u8>(UNFLUSHED) {
            None | Some(0) => false,
            Some(HELD) => self.load::<u64>(OWNER) != Some(owner),
            Some(_) => true,
        };
        if lost {
            self.store(UNFLUSHED, LOST);
        }
        lost
    }

    /// Marks that `owner` has changes in its memory, or has none any more.
    pub(crate) fn keep_unflushed(&self, owner: u64, unflushed: bool) {
        let mark = if unflushed { HELD } else { 0 };
        let now = self.load::<u8>(UNFLUSHED);
        if self.load::<u64>(0) == Some(MAGIC) && now != Some(mark) && now != Some(LOST) {
            self.store(OWNER, owner);
            self.store(UNFLUSHED, mark);
        }
    }

    /// The guest has reset the device, and believes nothing any more.
    pub(crate) fn forget_lost(&self) {
        if self.load::<u64>(0) == Some(MAGIC) {
            self.store(UNFLUSHED, 0_u8);
        }
    }

    /// Reads what comes after the queues, if the memory has that.
    fn load<T: AtomicAccess>(&self, offset: usize) -> Option<T> {
        self.map.as_volatile_slice().load(self.end().saturating_add(offset), Ordering::Acquire).ok()
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        let stored = self.map.as_volatile_slice().store(value, self.end().saturating_add(offset), Ordering::Release);
        debug_assert!(stored.is_ok(), "there is nothing after the queues");
    }

    /// Where the queues end.
    fn end(&self) -> usize {
        stride(self.queue_size).saturating_mul(self.queues.into())
    }

    /// The record of queue `index`, which has `size` descriptors and whose used ring is at `used_idx`; and
    /// the requests that were in flight, in the order in which they were taken.
    pub(crate) fn record(&self, index: u16, size: u16, used_idx: u16) -> Result<(Record, Vec<u16>)> {
        if index >= self.queues || size > self.queue_size {
            let Self { queues, queue_size, .. } = self;
            return refuse!(
                "queue {index} has {size} descriptors, but the memory for requests in flight was made for {queues} \
                 queues of {queue_size}"
            );
        }
        let base = usize::from(index).saturating_mul(stride(self.queue_size));
        let mut record = Record { map: Arc::clone(&self.map), base, size, counter: 0 };
        match record.load::<u16>(VERSION) {
            0 => {
                record.store(DESC_NUM, self.queue_size);
                record.store(USED_IDX, used_idx);
                record.store(VERSION, CURRENT);
            }
            CURRENT => {}
            other => return refuse!("the memory for requests in flight has version {other}; {CURRENT} is known"),
        }
        let again = record.recover(used_idx);
        Ok((record, again))
    }
}

/// Bytes from one queue to the next.
fn stride(queue_size: u16) -> usize {
    // At most a MiB: no overflow.
    (HEADER_LEN + ENTRY_LEN * usize::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Bytes for all queues.
fn needed(inflight: &VhostUserInflight) -> Result<u64> {
    let (queues, queue_size) = (inflight.num_queues, inflight.queue_size);
    if !(1..=MAX_QUEUES).contains(&queues) || !(1..=MAX_SIZE).contains(&queue_size) {
        return refuse!(
            "memory for requests in flight of {queues} queues of {queue_size}: there can be {MAX_QUEUES} of {MAX_SIZE}"
        );
    }
    u64::try_from(stride(queue_size).saturating_mul(queues.into())).map_err(Refusal::because)
}

/// The part of one queue, while it is served.
pub(crate) struct Record {
    map: Arc<MmapRegion>,
    base: usize,
    size: u16,
    /// The counter of the next request.
    counter: u64,
}

impl Record {
    /// Ends what a crash interrupted, and finds what was in flight.
    fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        let batch = used_idx.wrapping_sub(self.load(USED_IDX));
        // A longer batch than there are descriptors is nonsense; then only the marks are left to go by.
        if batch <= self.size {
            let mut head: u16 = self.load(LAST_BATCH_HEAD);
            for _ in 0..batch {
                let Some(entry) = self.entry(head) else {
                    break;
                };
                self.store(entry + INFLIGHT, 0_u8);
                head = self.load(entry + NEXT);
            }
        }
        self.store(USED_IDX, used_idx);

        let mut taken: Vec<(u64, u16)> = Vec::new();
        for head in 0..self.size {
            if let Some(entry) = self.entry(head)
                && self.load::<u8>(entry + INFLIGHT) != 0
            {
                taken.push((self.load(entry + COUNTER), head));
            }
        }
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        taken.into_iter().map(|(_, head)| head).collect()
    }

    /// The offset of an entry in this queue's part.
    fn entry(&self, head: u16) -> Option<usize> {
        (head < self.size).then(|| HEADER_LEN + ENTRY_LEN * usize::from(head))
    }

    fn load<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        // Aligned, and inside of what was mapped for this queue: this cannot fail.
        self.map.as_volatile_slice().load(self.base + offset, Ordering::Acquire).unwrap_or_default()
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        let stored = self.map.as_volatile_slice().store(value, self.base + offset, Ordering::Release);
        debug_assert!(stored.is_ok(), "the record left its memory");
    }
}

impl InFlightRecord for Record {
    fn taken(&mut self, head: u16) {
        let Some(entry) = self.entry(head) else {
            return;
        };
        self.store(entry + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(entry + INFLIGHT, 1_u8);
    }

    fn answering(&mut self, head: u16) {
        let Some(entry) = self.entry(head) else {
            return;
        };
        self.store(entry + NEXT, self.load::<u16>(LAST_BATCH_HEAD));
        self.store(LAST_BATCH_HEAD, head);
    }

    fn answered(&mut self, head: u16, used_idx: u16) {
        if let Some(entry) = self.entry(head) {
            self.store(entry + INFLIGHT, 0_u8);
        }
        self.store(USED_IDX, used_idx);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

    use super::*;

    fn inflight(queues: u16, queue_size: u16) -> VhostUserInflight {
        VhostUserInflight::new(0, 0, queues, queue_size)
    }

    /// The layout, byte by byte: another back end may take over.
    #[test]
    fn memory_is_laid_out_as_specified() {
        let (memory, told, file) = InFlightMemory::create(&inflight(2, 8)).unwrap();
        assert_eq!((told.mmap_size, told.mmap_offset, told.num_queues, told.queue_size), (2 * 192 + 64, 0, 2, 8));
        let (mut record, again) = memory.record(1, 8, 0xabc).unwrap();
        assert!(again.is_empty());
        for head in [3, 5] {
            record.taken(head);
        }
        record.answering(5);
        record.answered(5, 0xabd);
        memory.keep_writeback(true);
        memory.keep_unflushed(0x7766_5544_3322_1100, true);
        let mut bytes = vec![0; 2 * 192 + 64];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        let mut expected = vec![0; 2 * 192 + 64];
        expected[384..394].copy_from_slice(b"blkhouse\x02\x01");
        expected[400..408].copy_from_slice(&[0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]);
        let queue = &mut expected[192..];
        queue[8..16].copy_from_slice(&[1, 0, 8, 0, 5, 0, 0xbd, 0x0a]);
        queue[16 + 3 * 16] = 1;
        queue[16 + 5 * 16 + 8] = 1;
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_one_process_held_is_lost_to_every_other_until_a_reset() {
        let (memory, told, file) = InFlightMemory::create(&inflight(2, 8)).unwrap();
        let adopt = || InFlightMemory::adopt(&told, file.try_clone().unwrap()).unwrap();
        let (one, two, three) = (1, 2, 3);
        assert!(!memory.has_lost(one));
        memory.keep_unflushed(one, true);
        assert!(!adopt().has_lost(one), "the front end came back to the same process");
        memory.keep_unflushed(one, false);
        assert!(!adopt().has_lost(two), "it was flushed");
        memory.keep_unflushed(one, true);
        assert!(adopt().has_lost(two));
        // Neither a flush of what the second one has, nor its end, brings it back.
        memory.keep_unflushed(two, true);
        memory.keep_unflushed(two, false);
        assert!(adopt().has_lost(two));
        assert!(adopt().has_lost(three));
        memory.forget_lost();
        assert!(!adopt().has_lost(three));
    }

    #[test]
    fn nobody_can_shorten_what_was_created() {
        let (_memory, _told, file) = InFlightMemory::create(&inflight(1, 8)).unwrap();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 20).is_err());
    }

    /// A crash at every point of a request's life; the ring has what `used` says.
    #[test]
    fn what_was_in_flight_is_found_in_its_order() {
        for (steps, used, expected) in [(0, 0, &[][..]), (1, 0, &[6]), (2, 0, &[6, 2]), (3, 0, &[6, 2]), (3, 1, &[6])] {
            let (memory, told, file) = InFlightMemory::create(&inflight(1, 8)).unwrap();
            let (mut record, _) = memory.record(0, 8, 0).unwrap();
            // Counters go on, whatever came before.
            for head in 0..8 {
                record.taken(head);
                record.answering(head);
                record.answered(head, 0);
            }
            let work: [fn(&mut Record); 3] = [|r| r.taken(6), |r| r.taken(2), |r| r.answering(2)];
            for step in &work[..steps] {
                step(&mut record);
            }
            let memory = InFlightMemory::adopt(&told, file.try_clone().unwrap()).unwrap();
            let (mut record, again) = memory.record(0, 8, used).unwrap();
            assert_eq!(again, expected, "{steps} steps, used {used}");
            // And a second crash, while others were taken as well.
            record.taken(0);
            let (_, again) = memory.record(0, 8, used).unwrap();
            assert_eq!(again, [expected, &[0]].concat());
        }
    }

    /// Whoever answers several requests at once links them: their list ends where the ring ended before.
    #[test]
    fn a_batch_that_was_answered_is_not_executed_again() {
        let (memory, ..) = InFlightMemory::create(&inflight(1, 8)).unwrap();
        let (mut record, _) = memory.record(0, 8, 0xfffe).unwrap();
        for head in [1, 2, 3, 4] {
            record.taken(head);
        }
        for head in [3, 1, 4] {
            record.answering(head);
        }
        let (record, again) = memory.record(0, 8, 1).unwrap();
        assert_eq!(again, [2]);
        assert_eq!(record.load::<u16>(USED_IDX), 1);
    }

    #[test]
    fn nonsense_in_the_memory_does_no_harm() {
        let (memory, told, file) = InFlightMemory::create(&inflight(1, 8)).unwrap();
        memory.record(0, 8, 0).unwrap();
        let ones = vec![0xff; usize::try_from(told.mmap_size).unwrap()];
        std::os::unix::fs::FileExt::write_all_at(&file, &ones, 0).unwrap();
        assert!(memory.record(0, 8, 0).err().unwrap().to_string().contains("version 65535"));
        std::os::unix::fs::FileExt::write_all_at(&file, &[1, 0], VERSION as u64).unwrap();
        for used in [0, 4, 0xffff] {
            let (mut record, again) = memory.record(0, 8, used).unwrap();
            assert!(again.len() <= 8 && again.iter().all(|head| *head < 8));
            record.taken(0xffff);
            record.answering(0xffff);
            record.answered(0xffff, 0);
        }
        // A list that goes round and round.
        for head in 0..8 {
            let record = memory.record(0, 8, 0).unwrap().0;
            record.store(HEADER_LEN + ENTRY_LEN * head + NEXT, 0_u16);
            record.store(LAST_BATCH_HEAD, 0_u16);
        }
        assert_eq!(memory.record(0, 8, 8).unwrap().1, [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn what_was_said_about_writes_is_kept_and_unknown_is_not_volatile() {
        let (memory, told, file) = InFlightMemory::create(&inflight(2, 8)).unwrap();
        let again = |size| {
            let told = VhostUserInflight::new(size, 0, 2, 8);
            InFlightMemory::adopt(&told, file.try_clone().unwrap()).unwrap()
        };
        let write = |bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&file, bytes, 2 * 192).unwrap();
        assert_eq!(again(told.mmap_size).writeback(), None);
        for writeback in [false, true] {
            memory.keep_writeback(writeback);
            assert_eq!(again(told.mmap_size).writeback(), Some(writeback));
        }
        // Memory of another back end: as large as it has to be, or larger and with something else in it.
        assert_eq!(again(2 * 192).writeback(), Some(false));
        again(2 * 192).keep_writeback(true);
        for other in [b"\0\0\0\0\0\0\0\0\x02", b"BLKHOUSE\x02", b"blkhouse\xff"] {
            write(other);
            assert_eq!(again(told.mmap_size).writeback(), Some(false), "{other:?}");
        }
        write(&[0; 9]);
        again(told.mmap_size).keep_writeback(true);
        let mut bytes = [1; 9];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 2 * 192).unwrap();
        assert_eq!(bytes, [0; 9], "the other back end finds its own bytes");
    }

    #[test]
    fn memory_that_cannot_be_is_refused() {
        for (queues, size) in [(0, 8), (1, 0), (MAX_QUEUES + 1, 8), (1, MAX_SIZE + 1), (u16::MAX, u16::MAX)] {
            assert!(InFlightMemory::create(&inflight(queues, size)).is_err());
        }
        let (memory, mut told, file) = InFlightMemory::create(&inflight(2, 8)).unwrap();
        assert!(memory.record(2, 8, 0).is_err());
        assert!(memory.record(0, 16, 0).is_err());
        told.mmap_size = 2 * 192 - 1;
        assert!(InFlightMemory::adopt(&told, file.try_clone().unwrap()).is_err());
        told.mmap_size = u64::MAX;
        InFlightMemory::adopt(&told, file.try_clone().unwrap()).unwrap();
        told.mmap_offset = 4096;
        assert!(InFlightMemory::adopt(&told, file).is_err());
    }
}
