//! The virtio request path, fed by a driver that builds requests by the rules, breaks some, and overwrites guest
//! memory wherever it likes, also while requests are in flight.
//!
//! Whatever it does: the disk is asked for what lies inside of it, with buffers that lie in guest memory; a read-only
//! disk is not changed; and each request is recorded before it is executed and answered once. As long as the driver
//! kept to the rules, every request ends with the status that the specification asks for.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use blockhouse_block::{BlockBackend, Error, ErrorKind, Lane, LaneRequest, Operation, Topology, VolatileSlice};
use blockhouse_virtio::{BlockDevice, BlockDeviceOptions, BlockQueue, CacheMode, Host, InFlightRecord};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::say;

/// Guest memory: two regions that touch, and nothing after them.
const REGION: u64 = 0x8000;
const END: u64 = 2 * REGION;
/// Where the parts of the ring are, unless the driver wants them elsewhere.
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where requests are built.
const DATA: u64 = 0x4000;
/// Bytes of the disk.
const CAPACITY: u64 = 16 << 10;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What the status byte is before the device writes it.
const NO_STATUS: u8 = 0xee;

/// The bits of the features (sections 5.2.3 and 6).
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_EVENT_IDX: u64 = 1 << 29;

/// Bytes that are written somewhere in guest memory.
type Poke = (u64, Vec<u8>);

/// A disk that checks what it is asked.
struct CheckingDisk {
    bytes: Mutex<Vec<u8>>,
    writable: bool,
    memory: Arc<GuestMemoryMmap>,
    /// Where guest memory is in this process.
    regions: Vec<(usize, usize)>,
    /// What another processor of the guest does while the disk is at work.
    meanwhile: Mutex<Vec<Poke>>,
    /// Answers that are errors, the next one last.
    failing: Mutex<Vec<bool>>,
    /// How many requests wait on a lane before one is done.
    depth: usize,
    /// The last that was started is the first that is done.
    reversed: bool,
}

impl CheckingDisk {
    fn check(&self, buffers: &[VolatileSlice<'_>], offset: u64, length: u64) -> blockhouse_block::Result<()> {
        let end = offset.checked_add(length).expect("a range that does not wrap");
        assert!(end <= CAPACITY, "asked for {offset}..{end} of {CAPACITY}");
        for buffer in buffers {
            let start = buffer.ptr_guard().as_ptr().addr();
            let inside = |&(from, to): &(usize, usize)| start >= from && start + buffer.len() <= to;
            assert!(self.regions.iter().any(inside), "a buffer outside of guest memory");
        }
        if let Some((address, bytes)) = self.meanwhile.lock().unwrap().pop() {
            poke(&self.memory, address, &bytes);
        }
        match self.failing.lock().unwrap().pop() {
            Some(true) => Err(Error::new(ErrorKind::Storage, "the disk fails")),
            _ => Ok(()),
        }
    }

    fn check_change(&self, length: u64) {
        assert!(self.writable, "a read-only disk is changed");
        assert!(length > 0, "a change of nothing");
    }
}

fn total(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

fn poke(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) {
    // As much as fits: the guest can write nowhere else.
    let _whether = memory.write(bytes, GuestAddress(address));
}

impl BlockBackend for CheckingDisk {
    fn capacity(&self) -> u64 {
        CAPACITY
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 512, optimal_io_size: 4096 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> blockhouse_block::Result<()> {
        self.check(buffers, offset, total(buffers))?;
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_from(&bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> blockhouse_block::Result<()> {
        self.check_change(total(buffers));
        self.check(buffers, offset, total(buffers))?;
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_to(&mut bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn flush(&self) -> blockhouse_block::Result<()> {
        self.check(&[], 0, 0)
    }

    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> blockhouse_block::Result<()> {
        self.check_change(length);
        self.check(&[], offset, length)?;
        self.bytes.lock().unwrap()[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> blockhouse_block::Result<()> {
        self.check_change(length);
        self.check(&[], offset, length)
    }

    fn lane(self: Arc<Self>) -> blockhouse_block::Result<Box<dyn Lane>> {
        Ok(Box::new(LateLane { disk: self, waiting: Vec::new() }))
    }
}

/// A request that was started, with the buffers, whose memory lives until it has ended.
struct Waiting {
    by: Arc<dyn BlockBackend>,
    token: u64,
    operation: Operation,
    offset: u64,
    buffers: Vec<VolatileSlice<'static>>,
}

// SAFETY: guest memory belongs to no thread.
unsafe impl Send for Waiting {}

/// Does requests long after they were started, so that guest memory changes in between.
struct LateLane {
    disk: Arc<CheckingDisk>,
    waiting: Vec<Waiting>,
}

impl std::fmt::Debug for LateLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a lane with {} requests", self.waiting.len())
    }
}

impl Lane for LateLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        let disk = Arc::clone(&self.disk);
        // SAFETY: it asks for the same.
        unsafe { self.start_by(disk, request) };
    }

    unsafe fn start_by(&mut self, by: Arc<dyn BlockBackend>, request: &LaneRequest<'_>) {
        let buffers = request.buffers.iter().map(|buffer| {
            // SAFETY: by the contract of this function the memory of the buffers stays valid until the request has
            // ended or the lane is dropped, and the copy of the slice lives no longer.
            unsafe { std::mem::transmute::<VolatileSlice<'_>, VolatileSlice<'static>>(*buffer) }
        });
        let LaneRequest { token, operation, offset, .. } = *request;
        self.waiting.push(Waiting { by, token, operation, offset, buffers: buffers.collect() });
        assert!(self.waiting.len() <= blockhouse_block::LANE_REQUESTS, "more requests than a lane takes");
    }

    fn submit(&mut self) {}

    fn complete(&mut self, each: &mut dyn FnMut(u64, blockhouse_block::Result<()>)) {
        let keep = self.disk.depth;
        // One at least, so that whoever waits gets on.
        let count = self.waiting.len().saturating_sub(keep).max(1).min(self.waiting.len());
        for _ in 0..count {
            let next = if self.disk.reversed { self.waiting.len() - 1 } else { 0 };
            let Waiting { by, token, operation, offset, buffers } = self.waiting.remove(next);
            each(token, LaneRequest { token, operation, offset, buffers: &buffers }.run(&*by));
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [None, None]
    }

    fn acknowledge(&mut self) {}
}

/// Stops the queue when it has nothing to do, or after some time.
struct ShortHost {
    left: u32,
}

impl Host for ShortHost {
    fn stops(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    fn interrupt(&mut self) {}

    fn wait(&mut self, _ready: [Option<BorrowedFd<'_>>; 2], in_flight: usize, _longest: Option<Duration>) -> bool {
        if in_flight == 0 {
            self.left = 1;
        }
        true
    }
}

/// Sees that each request is recorded before it is executed, and answered once.
#[derive(Default)]
struct Recorder {
    open: Arc<Mutex<BTreeMap<u16, u32>>>,
    answering: Option<u16>,
}

impl InFlightRecord for Recorder {
    fn taken(&mut self, head: u16) {
        *self.open.lock().unwrap().entry(head).or_default() += 1;
    }

    fn answering(&mut self, head: u16) {
        assert_eq!(self.answering, None, "two answers at a time");
        let mut open = self.open.lock().unwrap();
        let count = open.get_mut(&head).filter(|count| **count > 0).expect("an answer to what was taken");
        *count -= 1;
        self.answering = Some(head);
    }

    fn answered(&mut self, head: u16, _used_idx: u16) {
        assert_eq!(self.answering.take(), Some(head), "another answer than was announced");
    }
}

/// A descriptor as the driver writes it.
#[derive(Clone, Copy, Debug)]
struct Desc {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A request that keeps to the rules, and what becomes of it.
struct Good {
    head: u16,
    status_at: u64,
    status: u8,
    /// What the used ring says then.
    written: u32,
}

struct Driver {
    memory: Arc<GuestMemoryMmap>,
    disk: Arc<CheckingDisk>,
    device: Arc<BlockDevice>,
    features: u64,
    size: u16,
    avail_idx: u16,
    used_idx: u16,
    /// The next free descriptor, and byte.
    descriptor: u16,
    place: u64,
    /// Every rule was kept so far.
    good: bool,
    requests: Vec<Good>,
}

thread_local! {
    /// Used again by each input, because making it takes longer than most inputs.
    static MEMORY: Arc<GuestMemoryMmap> = {
        let ranges = [(GuestAddress(0), REGION as usize), (GuestAddress(REGION), REGION as usize)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"))
    };
}

pub(crate) fn run(data: &[u8]) {
    let _input_ends = drive(&mut Unstructured::new(data));
}

fn drive(u: &mut Unstructured<'_>) -> Result<()> {
    let memory = MEMORY.with(Arc::clone);
    memory.write_slice(&[0; END as usize], GuestAddress(0)).expect("it is guest memory");
    let regions = memory.iter().map(|region| {
        let slice = region.as_volatile_slice().expect("memory");
        let start = slice.ptr_guard().as_ptr().addr();
        (start, start + slice.len())
    });
    let read_only = u.ratio(1, 4)?;
    let disk = Arc::new(CheckingDisk {
        bytes: Mutex::new((0..CAPACITY).map(|at| (at / 7) as u8).collect()),
        writable: !(read_only && u.arbitrary()?),
        regions: regions.collect(),
        memory: Arc::clone(&memory),
        meanwhile: Mutex::default(),
        failing: Mutex::default(),
        depth: u.int_in_range(0..=8)?,
        reversed: u.arbitrary()?,
    });
    let options = BlockDeviceOptions {
        serial: "fuzz".into(),
        queues: u.int_in_range(0..=3)?,
        read_only,
        cache: *u.choose(&[CacheMode::WriteBack, CacheMode::WriteThrough, CacheMode::Unsafe])?,
        discard: u.arbitrary()?,
        poll: Duration::ZERO,
        ..BlockDeviceOptions::default()
    };
    let device = Arc::new(BlockDevice::new(Arc::clone(&disk) as Arc<dyn BlockBackend>, &options));
    let features = device.features() & if u.arbitrary()? { u64::MAX } else { u.arbitrary()? };
    device.accept_features(features);
    let size = 1 << u.int_in_range(0..=6)?;
    let mut driver = Driver {
        memory,
        disk,
        device,
        features,
        size,
        avail_idx: 0,
        used_idx: 0,
        descriptor: 0,
        place: DATA,
        good: true,
        requests: Vec::new(),
    };
    driver.serve(u)
}

impl Driver {
    fn serve(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut queue = Queue::new(256).expect("a queue");
        queue.set_size(self.size);
        for (number, part) in [TABLE, AVAIL, USED].into_iter().enumerate() {
            let mut at = part;
            if u.ratio(1, 30)? {
                self.good = false;
                at = u.int_in_range(0..=END + 64)?;
            }
            let low = Some(at as u32);
            match number {
                0 => queue.set_desc_table_address(low, None),
                1 => queue.set_avail_ring_address(low, None),
                _ => queue.set_used_ring_address(low, None),
            }
        }
        queue.set_ready(true);
        // A transport serves no other.
        if !queue.is_valid(self.memory.as_ref()) {
            return Ok(());
        }
        let mut block = BlockQueue::new(Arc::clone(&self.device), 0, queue, self.features);
        let open = Arc::new(Mutex::new(BTreeMap::new()));
        let recorded = u.ratio(1, 3)?;
        if recorded {
            let mut again = Vec::new();
            for head in 0..self.size.min(4) {
                if u.ratio(1, 4)? {
                    self.good = false;
                    again.push(head);
                    open.lock().unwrap().insert(head, 1);
                }
            }
            let recorder = Recorder { open: Arc::clone(&open), answering: None };
            block = block.recorded(Box::new(recorder), again);
        }
        for _ in 0..4 {
            (self.descriptor, self.place) = (0, DATA);
            for _ in 0..u.int_in_range(1..=12u8)? {
                self.act(u)?;
            }
            let left = if self.good { 10_000 } else { u.int_in_range(1..=200)? };
            let served = block.serve(self.memory.as_ref(), &mut ShortHost { left });
            say!("served: {served:?}");
            if let Err(error) = served {
                assert!(!self.good, "a good ring was refused: {error}");
                break;
            }
            if recorded {
                let open = open.lock().unwrap();
                assert!(self.again_left(&open) || open.values().all(|count| *count == 0), "unanswered: {open:?}");
            }
            if self.good {
                self.judge();
            }
            self.requests.clear();
            if u.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Requests of another process that the queue had no time for.
    fn again_left(&self, open: &BTreeMap<u16, u32>) -> bool {
        !self.good && open.values().all(|count| *count <= 1) && open.keys().all(|head| *head < 4)
    }

    fn act(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=15u8)? {
            0..=9 => self.request(u)?,
            10 => {
                self.good = false;
                let (address, bytes) = self.some_poke(u)?;
                say!("poke {address:#x} {bytes:?}");
                poke(&self.memory, address, &bytes);
            }
            11 => {
                self.good = false;
                let poke = self.some_poke(u)?;
                say!("meanwhile {poke:?}");
                self.disk.meanwhile.lock().unwrap().push(poke);
            }
            12 => {
                self.good = false;
                self.avail_idx = self.avail_idx.wrapping_add(u.int_in_range(0..=self.size + 1)?);
                self.put(AVAIL + 2, &self.avail_idx.to_le_bytes());
            }
            13 => {
                self.good = false;
                self.disk.failing.lock().unwrap().extend([u.arbitrary::<bool>()?, u.arbitrary()?]);
            }
            14 => {
                let mut data = [0; 16];
                let (offset, length) = (u.arbitrary::<u8>()?, usize::from(u.arbitrary::<u8>()? % 16));
                u.fill_buffer(&mut data[..length])?;
                self.device.write_config(offset.into(), &data[..length]);
                self.device.read_config(offset.into(), &mut data);
            }
            _ => {
                // What the driver says about interrupts.
                self.put(AVAIL, &u.int_in_range(0..=1u16)?.to_le_bytes());
                self.put(AVAIL + 4 + 2 * u64::from(self.size), &u.arbitrary::<u16>()?.to_le_bytes());
            }
        }
        Ok(())
    }

    fn some_poke(&self, u: &mut Unstructured<'_>) -> Result<Poke> {
        let base = *u.choose(&[TABLE, TABLE, AVAIL, USED, DATA, 0])?;
        let address = base + u64::from(u.arbitrary::<u16>()? % 0x1000);
        let length = u.int_in_range(1..=16)?;
        Ok((address, u.bytes(length)?.to_vec()))
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("it is guest memory");
    }

    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("it is guest memory");
        bytes
    }

    /// Space for a part of a request.
    fn room(&mut self, bytes: u64) -> Option<u64> {
        let at = self.place;
        self.place = at.checked_add(bytes).filter(|end| *end <= END)?;
        Some(at)
    }

    /// Builds a request and makes it available; perhaps not quite by the rules.
    fn request(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let kind = *u.choose(&[IN, IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77])?;
        let sector = match u.int_in_range(0..=9u8)? {
            0 => u.arbitrary()?,
            _ => u.int_in_range(0..=CAPACITY / 512)?,
        };
        // Ranges of a discard or of zeroes are data.
        let ranges = matches!(kind, DISCARD | WRITE_ZEROES);
        let length = match kind {
            DISCARD | WRITE_ZEROES => 16 * u.int_in_range(0..=3u32)?,
            FLUSH => 0,
            GET_ID => u.int_in_range(0..=40)?,
            _ => 512 * u.int_in_range(0..=4)?,
        };
        let odd = u32::from(u.ratio(1, 12)?);
        let length = length + odd;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let device_writes = matches!(kind, IN | GET_ID);
        let (Some(header_at), Some(data_at), Some(status_at)) = (self.room(16), self.room(length.into()), self.room(1))
        else {
            return Ok(());
        };
        self.put(header_at, &header);
        self.put(status_at, &[NO_STATUS]);
        let mut data = vec![u.arbitrary::<u8>()?; length as usize];
        if ranges {
            for range in data.chunks_exact_mut(16) {
                let sector: u64 = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=CAPACITY / 512)? };
                let sectors: u32 = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=8)? };
                let flags: u32 = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=1)? };
                range[..8].copy_from_slice(&sector.to_le_bytes());
                range[8..12].copy_from_slice(&sectors.to_le_bytes());
                range[12..].copy_from_slice(&flags.to_le_bytes());
            }
        }
        self.put(data_at, &data);

        // Cut as the driver likes: the header, the data, and the status, which follows data without a gap.
        let cut = u.int_in_range(0..=16u32)?;
        let mut parts = vec![(header_at, cut, 0), (header_at + u64::from(cut), 16 - cut, 0)];
        let flag = if device_writes { WRITE } else { 0 };
        let cut = u.int_in_range(0..=length)?;
        parts.push((data_at, cut, flag));
        if device_writes && u.arbitrary()? {
            parts.push((data_at + u64::from(cut), length - cut + 1, WRITE));
        } else {
            parts.push((data_at + u64::from(cut), length - cut, flag));
            parts.push((status_at, 1, WRITE));
        }
        if u.arbitrary()? {
            parts.retain(|(_, length, _)| *length > 0);
        }
        let mut chain: Vec<Desc> =
            parts.into_iter().map(|(address, length, flags)| Desc { address, length, flags, next: 0 }).collect();

        let indirect = u.ratio(1, 3)?;
        let table = if indirect {
            let Some(table) = self.room(16 * chain.len() as u64) else { return Ok(()) };
            table
        } else {
            TABLE
        };
        let needed = if indirect { 1 } else { chain.len() as u16 };
        if self.descriptor + needed > self.size {
            return Ok(());
        }
        let head = self.descriptor;
        self.descriptor += needed;
        let first = if indirect { 0 } else { head };
        let last = chain.len() - 1;
        for (number, desc) in chain.iter_mut().enumerate() {
            if number < last {
                desc.flags |= NEXT;
                desc.next = first + number as u16 + 1;
            }
        }
        if u.ratio(1, 8)? {
            self.good = false;
            let at = u.choose_index(chain.len())?;
            match u.int_in_range(0..=4u8)? {
                0 => chain[at].address = u.arbitrary()?,
                1 => chain[at].length = u.arbitrary()?,
                2 => chain[at].flags ^= 1 << u.int_in_range(0..=3)?,
                3 => chain[at].next = u.int_in_range(0..=self.size)?,
                _ => chain[at].address = u.int_in_range(END - 64..=END + 64)?,
            }
        }
        for (number, desc) in (u64::from(first)..).zip(&chain) {
            self.descriptor_at(table + 16 * number, *desc);
        }
        if indirect {
            let mut desc = Desc { address: table, length: 16 * chain.len() as u32, flags: INDIRECT, next: 0 };
            if u.ratio(1, 12)? {
                self.good = false;
                match u.int_in_range(0..=3u8)? {
                    0 => desc.length = u.arbitrary()?,
                    1 => desc.flags |= 1 << u.int_in_range(0..=1)?,
                    2 => desc.address = u.int_in_range(0..=END)?,
                    _ => self.descriptor_at(table, desc),
                }
            }
            self.descriptor_at(TABLE + 16 * u64::from(head), desc);
        }
        self.put(AVAIL + 4 + 2 * u64::from(self.avail_idx % self.size), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put(AVAIL + 2, &self.avail_idx.to_le_bytes());

        let status = self.expected(kind, sector, &data);
        let written = match (kind, status) {
            (IN, OK) => length + 1,
            (GET_ID, OK) if length <= 20 => length + 1,
            (GET_ID, OK) => 20,
            _ if device_writes && length > 0 => 0,
            _ => 1,
        };
        say!("request {kind} at {sector} of {length} bytes, head {head}: expected {status}, {chain:x?}");
        // The status is where the last descriptor that the device writes ends.
        let status_at =
            chain.last().map_or(status_at, |desc| desc.address.wrapping_add(desc.length.into()).wrapping_sub(1));
        self.requests.push(Good { head, status_at, status, written });
        Ok(())
    }

    fn descriptor_at(&self, at: u64, desc: Desc) {
        self.put(at, &desc.address.to_le_bytes());
        self.put(at + 8, &desc.length.to_le_bytes());
        self.put(at + 12, &desc.flags.to_le_bytes());
        self.put(at + 14, &desc.next.to_le_bytes());
    }

    /// What the specification (section 5.2.6) has a device answer.
    fn expected(&self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let read_only = self.device.features() & 1 << 5 != 0;
        let length = data.len() as u64;
        let inside = sector.checked_mul(512).and_then(|at| at.checked_add(length)).is_some_and(|end| end <= CAPACITY);
        match kind {
            IN if length.is_multiple_of(512) && inside => OK,
            OUT if length.is_multiple_of(512) && inside && !read_only => OK,
            FLUSH | GET_ID => OK,
            DISCARD | WRITE_ZEROES => {
                let feature = if kind == DISCARD { F_DISCARD } else { F_WRITE_ZEROES };
                if read_only {
                    return IO_ERROR;
                }
                if self.features & feature == 0 {
                    return UNSUPPORTED;
                }
                let most = if kind == DISCARD { 16 } else { 1 };
                if data.is_empty() || !data.len().is_multiple_of(16) || data.len() / 16 > most {
                    return IO_ERROR;
                }
                for range in data.chunks_exact(16) {
                    let sector = u64::from_le_bytes(range[..8].try_into().unwrap());
                    let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap());
                    let flags = u32::from_le_bytes(range[12..].try_into().unwrap());
                    if flags > 1 || (flags == 1 && kind == DISCARD) {
                        return UNSUPPORTED;
                    }
                    let end = sector.checked_add(sectors.into());
                    if end.and_then(|end| end.checked_mul(512)).is_none_or(|end| end > CAPACITY) {
                        return IO_ERROR;
                    }
                }
                OK
            }
            IN | OUT => IO_ERROR,
            _ => UNSUPPORTED,
        }
    }

    /// Everything that was asked was answered, once, and as it should be.
    fn judge(&mut self) {
        let used: u16 = u16::from_le_bytes(self.get(USED + 2));
        let count = used.wrapping_sub(self.used_idx);
        assert_eq!(usize::from(count), self.requests.len(), "answers and requests");
        let mut answers = BTreeMap::new();
        for number in 0..count {
            let at = USED + 4 + 8 * u64::from(self.used_idx.wrapping_add(number) % self.size);
            let head = u32::from_le_bytes(self.get(at));
            let written = u32::from_le_bytes(self.get(at + 4));
            assert!(answers.insert(head, written).is_none(), "the request {head} was answered twice");
        }
        self.used_idx = used;
        for Good { head, status_at, status, written } in &self.requests {
            let [found] = self.get(*status_at);
            assert_eq!(found, *status, "the status of the request {head}");
            assert_eq!(answers.get(&u32::from(*head)), Some(written), "bytes written for the request {head}");
        }
        // Without EVENT_IDX the ring says nothing else to the driver.
        if self.features & F_EVENT_IDX == 0 {
            let flags = u16::from_le_bytes(self.get(USED));
            assert!(flags <= 1, "flags of the used ring: {flags:#x}");
        }
    }
}
