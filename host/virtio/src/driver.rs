//! For tests: the other side of the queue, able to break every rule, and a disk in memory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use blockhouse_block::{BlockBackend, Error, ErrorKind, Lane, LaneRequest, Result, Topology, UnflushedWatch};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};

/// A disk in memory. Byte `i` starts as `i * 7 / 3`, so that no two sectors look alike.
#[derive(Debug)]
pub(crate) struct MemoryDisk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) writable: bool,
    pub(crate) topology: Topology,
    pub(crate) broken: AtomicBool,
    pub(crate) reads: AtomicUsize,
    pub(crate) flushes: AtomicUsize,
    /// What was asked of the disk besides reading, in order.
    pub(crate) calls: Mutex<Vec<Call>>,
    watch: Mutex<Watch>,
}

/// Who hears whether something is not flushed, and whether something is.
#[derive(Default)]
struct Watch(Option<UnflushedWatch>, bool);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.0.is_some()).finish()
    }
}

/// A change of a [`MemoryDisk`], in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Write { offset: u64 },
    Zero { offset: u64, len: u64, may_unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
}

impl MemoryDisk {
    pub(crate) fn new(len: usize) -> Self {
        Self {
            bytes: Mutex::new((0..len).map(|i| (i * 7 / 3).to_le_bytes()[0]).collect()),
            writable: true,
            topology: Topology { physical_block_size: 512, optimal_io_size: 512 },
            broken: AtomicBool::new(false),
            reads: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            calls: Mutex::new(Vec::new()),
            watch: Mutex::default(),
        }
    }

    pub(crate) fn read_only(len: usize) -> Self {
        Self { writable: false, ..Self::new(len) }
    }

    pub(crate) fn content(&self, from: usize, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[from..from + len].to_vec()
    }

    /// Says whether something is not flushed, to whoever hears it.
    pub(crate) fn note_unflushed(&self, unflushed: bool) {
        let mut watch = self.watch.lock().unwrap();
        watch.1 = unflushed;
        if let Some(watch) = &watch.0 {
            watch(unflushed);
        }
    }

    /// The changes since the last call of this.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn change(&self, call: Call) -> Result<()> {
        self.check()?;
        assert!(self.writable, "the device wrote to a read-only disk");
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Storage, "the test broke the disk"));
        }
        Ok(())
    }
}

impl BlockBackend for MemoryDisk {
    fn capacity(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.check()?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        let bytes = self.bytes.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for buffer in buffers {
            buffer.copy_from(&bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.change(Call::Write { offset })?;
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for buffer in buffers {
            buffer.copy_to(&mut bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.check()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.calls.lock().unwrap().push(Call::Flush);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.change(Call::Zero { offset, len, may_unmap })?;
        let from = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[from..from + usize::try_from(len).unwrap()].fill(0);
        Ok(())
    }

    /// What is discarded keeps its bytes, as it may.
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.change(Call::Discard { offset, len })?;
        assert!(offset + len <= self.capacity(), "the device discarded outside of the disk");
        Ok(())
    }

    fn watch_unflushed(&self, watch: Option<UnflushedWatch>) {
        let mut watched = self.watch.lock().unwrap();
        watched.0 = watch;
        if let Some(watch) = &watched.0 {
            watch(watched.1);
        }
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(InlineLane { disk: self, ended: Vec::new() }))
    }
}

/// Does each request when it is started, so that tests know the order.
#[derive(Debug)]
struct InlineLane {
    disk: Arc<MemoryDisk>,
    ended: Vec<(u64, Result<()>)>,
}

#[allow(unsafe_code)]
impl Lane for InlineLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        self.ended.push((request.token, request.run(&*self.disk)));
    }

    unsafe fn start_by(&mut self, backend: Arc<dyn BlockBackend>, request: &LaneRequest<'_>) {
        self.ended.push((request.token, request.run(&*backend)));
    }

    fn submit(&mut self) {}

    fn complete(&mut self, each: &mut dyn FnMut(u64, Result<()>)) {
        for (token, result) in self.ended.drain(..) {
            each(token, result);
        }
    }

    fn in_flight(&self) -> usize {
        self.ended.len()
    }

    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [None, None]
    }

    fn acknowledge(&mut self) {}
}

/// One descriptor as the driver writes it.
#[derive(Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u32,
    pub(crate) next: u16,
}

pub(crate) const NEXT: u32 = VRING_DESC_F_NEXT;
pub(crate) const WRITE: u32 = VRING_DESC_F_WRITE;
pub(crate) const INDIRECT: u32 = VRING_DESC_F_INDIRECT;

/// A buffer that the device reads.
pub(crate) fn readable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: 0, next: 0 }
}

/// A buffer that the device writes.
pub(crate) fn writable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: WRITE, next: 0 }
}

pub(crate) const SIZE: u16 = 16;
pub(crate) const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
/// Where tests put headers, status bytes and data; memory from here to [`REGION_2`] is free.
pub(crate) const HEADER: u64 = 0x8000;
pub(crate) const STATUS: u64 = 0x9000;
pub(crate) const DATA: u64 = 0x10000;
/// The first address of the second memory region, which starts where the first one ends.
pub(crate) const REGION_2: u64 = 0x40000;
/// The end of memory.
pub(crate) const END: u64 = 0x80000;

/// Guest memory in two adjacent regions, and the driver's side of a queue of [`SIZE`] descriptors.
pub(crate) struct Driver {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    avail_idx: u16,
    used_idx: u16,
}

impl Driver {
    pub(crate) fn new() -> Self {
        let half = usize::try_from(REGION_2).unwrap();
        let regions = [(GuestAddress(0), half), (GuestAddress(REGION_2), half)];
        Self { memory: Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap()), avail_idx: 0, used_idx: 0 }
    }

    /// The device's side of the queue.
    pub(crate) fn queue(&self) -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(TABLE.try_into().unwrap()), None);
        queue.set_avail_ring_address(Some(AVAIL.try_into().unwrap()), None);
        queue.set_used_ring_address(Some(USED.try_into().unwrap()), None);
        queue.set_ready(true);
        assert!(queue.is_valid(self.memory.as_ref()));
        queue
    }

    pub(crate) fn put(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn put_u16(&self, addr: u64, value: u16) {
        self.put(addr, &value.to_le_bytes());
    }

    fn get_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.get(addr, 2).try_into().unwrap())
    }

    /// Writes a header at [`HEADER`] and makes the status byte something that no device writes.
    pub(crate) fn header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 4, &[0xa5; 4]);
        self.put(HEADER + 8, &sector.to_le_bytes());
        self.put(STATUS, &[0xee]);
    }

    pub(crate) fn status(&self) -> u8 {
        self.get(STATUS, 1)[0]
    }

    /// Writes descriptors into a table, exactly as they are.
    pub(crate) fn table(&self, at: u64, first: u16, descriptors: &[Desc]) {
        for (i, d) in (u64::from(first)..).zip(descriptors) {
            let at = at + i * 16;
            self.put(at, &d.addr.to_le_bytes());
            self.put(at + 8, &d.len.to_le_bytes());
            self.put_u16(at + 12, u16::try_from(d.flags).unwrap());
            self.put_u16(at + 14, d.next);
        }
    }

    /// Links descriptors into a chain at the start of `table`.
    pub(crate) fn chain_in(&self, at: u64, first: u16, descriptors: &[Desc]) {
        let mut linked = descriptors.to_vec();
        let last = linked.len() - 1;
        for (next, d) in (first + 1..).zip(&mut linked[..last]) {
            d.flags |= NEXT;
            d.next = next;
        }
        self.table(at, first, &linked);
    }

    /// Makes the chain of `descriptors` in the queue's table, from descriptor 0 on, available.
    pub(crate) fn submit(&mut self, descriptors: &[Desc]) {
        self.chain_in(TABLE, 0, descriptors);
        self.offer(0);
    }

    /// Puts the queue's own table in place without linking anything.
    pub(crate) fn raw(&self, descriptors: &[Desc]) {
        self.table(TABLE, 0, descriptors);
    }

    /// Makes the chain that starts at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.avail_idx % SIZE), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.put_u16(AVAIL + 2, idx);
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.put_u16(AVAIL, flags);
    }

    /// "Interrupt me when the used index passes this" (section 2.7.7).
    pub(crate) fn set_used_event(&self, idx: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(SIZE), idx);
    }

    /// "Notify me when the available index passes this", as the device wrote it.
    pub(crate) fn avail_event(&self) -> u16 {
        self.get_u16(USED + 4 + 8 * u64::from(SIZE))
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.get_u16(USED)
    }

    /// The next entry of the used ring, as (head, length).
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        if self.get_u16(USED + 2) == self.used_idx {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.used_idx % SIZE);
        self.used_idx = self.used_idx.wrapping_add(1);
        let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().unwrap());
        Some((word(at), word(at + 4)))
    }
}
