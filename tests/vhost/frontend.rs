//! A front end with everything in its own hands: guest memory, rings, and the memory for requests in
//! flight, which survive the back end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Descriptors of the queue; a request has three.
pub(crate) const SIZE: u16 = 64;
/// Requests at a time.
pub(crate) const SLOTS: u16 = 16;
/// Bytes of a request's buffer.
pub(crate) const BUFFER: usize = 64 << 10;

/// Where things are in guest memory.
const TABLE: usize = 0x1000;
const AVAIL: usize = 0x2000;
const USED: usize = 0x3000;
const HEADERS: usize = 0x4000;
const STATUS: usize = 0x5000;
const DATA: usize = 0x10000;
const END: usize = DATA + BUFFER * SLOTS as usize;

/// Where guest memory is in the guest, and in the front end.
pub(crate) const GUEST_BASE: u64 = 0x10_0000;
pub(crate) const USER_BASE: u64 = 0x7000_0000_0000;

pub(crate) const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const FLUSH: u32 = 4;

/// A guest with one queue.
pub(crate) struct Guest {
    pub(crate) file: File,
    memory: MmapRegion,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
    inflight: Option<(VhostUserInflight, File)>,
    avail_idx: u16,
    used_idx: u16,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(END as u64).unwrap();
        let memory = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), END).unwrap();
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            file,
            memory,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            inflight: None,
            avail_idx: 0,
            used_idx: 0,
        }
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: END as u64,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn ring() -> VringConfigData {
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: USER_BASE + TABLE as u64,
            used_ring_addr: USER_BASE + USED as u64,
            avail_ring_addr: USER_BASE + AVAIL as u64,
            log_addr: None,
        }
    }

    /// Connects, and has the queue served: from where its used ring is, which is all that a front end knows
    /// after a crash. What was in flight is handed over.
    pub(crate) fn connect(&mut self, socket: &Path) -> Frontend {
        let mut frontend = self.set_up(socket);
        frontend.set_vring_call(0, &self.call).unwrap();
        self.begin(&mut frontend);
        frontend
    }

    /// As [`connect`](Self::connect), without saying where interrupts go, and without beginning.
    pub(crate) fn set_up(&mut self, socket: &Path) -> Frontend {
        let mut frontend = negotiate(socket);
        let (told, file) = match self.inflight.take() {
            Some(kept) => kept,
            None => frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, SIZE)).unwrap(),
        };
        frontend.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
        self.inflight = Some((told, file));
        frontend.set_mem_table(&[self.region()]).unwrap();
        frontend.set_vring_num(0, SIZE).unwrap();
        frontend.set_vring_addr(0, &Self::ring()).unwrap();
        let used_idx: u16 = self.load(USED + 2);
        frontend.set_vring_base(0, used_idx).unwrap();
        frontend.set_vring_err(0, &self.err).unwrap();
        frontend
    }

    /// Has the queue be served, which was set up.
    pub(crate) fn begin(&self, frontend: &mut Frontend) {
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
    }

    /// The memory for requests in flight.
    pub(crate) fn inflight(&self) -> &File {
        &self.inflight.as_ref().unwrap().1
    }

    /// Writes a request into its slot, whose descriptors are free.
    pub(crate) fn prepare(&self, slot: u16, kind: u32, sector: u64, data: &[u8]) {
        let slot = usize::from(slot);
        let memory = self.memory.as_volatile_slice();
        let (header, buffer) = (HEADERS + 16 * slot, DATA + BUFFER * slot);
        memory.write_slice(&u64::from(kind).to_le_bytes(), header).unwrap();
        memory.write_slice(&sector.to_le_bytes(), header + 8).unwrap();
        memory.write_slice(data, buffer).unwrap();
        memory.write_slice(&[0xee], STATUS + slot).unwrap();
        let device_writes = if kind == READ { 2 } else { 0 };
        for (at, (address, len, flags)) in
            [(header, 16, 1), (buffer, data.len(), 1 | device_writes), (STATUS + slot, 1, 2)].into_iter().enumerate()
        {
            let index = 3 * slot + at;
            let descriptor = TABLE + 16 * index;
            memory.write_slice(&(GUEST_BASE + address as u64).to_le_bytes(), descriptor).unwrap();
            memory.write_slice(&u32::try_from(len).unwrap().to_le_bytes(), descriptor + 8).unwrap();
            memory.write_slice(&[flags, 0], descriptor + 12).unwrap();
            memory.write_slice(&u16::try_from(index + 1).unwrap().to_le_bytes(), descriptor + 14).unwrap();
        }
    }

    /// Makes the request in a slot available.
    pub(crate) fn offer(&mut self, slot: u16) {
        self.store(AVAIL + 4 + 2 * usize::from(self.avail_idx % SIZE), 3 * slot);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    pub(crate) fn set_avail_idx(&self, index: u16) {
        self.store(AVAIL + 2, index);
    }

    pub(crate) fn submit(&mut self, slot: u16, kind: u32, sector: u64, data: &[u8]) {
        self.prepare(slot, kind, sector, data);
        self.offer(slot);
        self.kick.write(1).unwrap();
    }

    /// How many answers wait to be taken.
    pub(crate) fn waiting(&self) -> u16 {
        self.load::<u16>(USED + 2).wrapping_sub(self.used_idx)
    }

    /// The slots that were answered since the last call, with their status bytes.
    pub(crate) fn answered(&mut self) -> Vec<(u16, u8)> {
        let mut answered = Vec::new();
        while self.load::<u16>(USED + 2) != self.used_idx {
            let head: u32 = self.load(USED + 4 + 8 * usize::from(self.used_idx % SIZE));
            self.used_idx = self.used_idx.wrapping_add(1);
            let slot = u16::try_from(head).unwrap() / 3;
            answered.push((slot, self.load(STATUS + usize::from(slot))));
        }
        answered
    }

    /// Waits for that many answers.
    #[track_caller]
    pub(crate) fn wait(&mut self, count: usize) -> Vec<(u16, u8)> {
        let started = Instant::now();
        let mut answered = Vec::new();
        while answered.len() < count {
            answered.extend(self.answered());
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "{} of {count} requests were answered",
                answered.len()
            );
            std::thread::sleep(Duration::from_micros(50));
        }
        answered
    }

    pub(crate) fn data(&self, slot: u16, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.as_volatile_slice().read_slice(&mut data, DATA + BUFFER * usize::from(slot)).unwrap();
        data
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        self.memory.as_volatile_slice().load(at, Ordering::Acquire).unwrap()
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        self.memory.as_volatile_slice().store(value, at, Ordering::Release).unwrap();
    }
}

/// A front end that agreed on everything that the back end offers, and has each message acknowledged.
pub(crate) fn negotiate(socket: &Path) -> Frontend {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut frontend = Frontend::from_stream(stream, 64);
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    let needed = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    assert!(protocol.contains(needed));
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    // Not EVENT_IDX: this driver polls the ring.
    frontend.set_features(features & !(1 << 29)).unwrap();
    frontend
}
