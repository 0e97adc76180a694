#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod figures;
mod hostile;
mod limited;

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use blockhouse_block::ErrorKind;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::device::{BlockDeviceOptions, CacheMode};
use crate::driver::{
    Call, DATA, Desc, Driver, END, HEADER, INDIRECT, MemoryDisk, NEXT, REGION_2, SIZE, STATUS, TABLE, USED, WRITE,
    readable, writable,
};
use crate::request::{ChainAgain, MAX_DESCRIPTORS, Malformed};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What [`Driver::header`] leaves in the status byte.
const UNTOUCHED: u8 = 0xee;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// A disk of 64 sectors, its device, one queue, and the driver on the other side.
struct Rig {
    disk: Arc<MemoryDisk>,
    device: Arc<BlockDevice>,
    queue: BlockQueue,
    driver: Driver,
    interrupts: usize,
}

/// Has a queue serve until it would have to wait.
struct Until<'a> {
    drained: bool,
    interrupts: &'a mut usize,
    waits: usize,
    longest: Option<Duration>,
}

impl Host for Until<'_> {
    fn stops(&mut self) -> bool {
        self.drained
    }

    fn interrupt(&mut self) {
        *self.interrupts += 1;
    }

    fn wait(&mut self, _ready: [Option<BorrowedFd<'_>>; 2], in_flight: usize, longest: Option<Duration>) -> bool {
        assert_eq!(in_flight, 0, "the disk of these tests does everything at once");
        self.waits += 1;
        self.longest = longest;
        self.drained = true;
        true
    }
}

impl Rig {
    fn new() -> Self {
        Self::with(MemoryDisk::new(64 * 512), FLUSH)
    }

    fn with(disk: MemoryDisk, features: u64) -> Self {
        Self::with_options(disk, features, BlockDeviceOptions::default())
    }

    fn with_options(disk: MemoryDisk, features: u64, options: BlockDeviceOptions) -> Self {
        let disk = Arc::new(disk);
        let options = BlockDeviceOptions { serial: "golden".into(), ..options };
        let device = Arc::new(BlockDevice::new(disk.clone(), &options));
        device.accept_features(features);
        let driver = Driver::new();
        let queue = BlockQueue::new(device.clone(), 0, driver.queue(), features);
        Self { disk, device, queue, driver, interrupts: 0 }
    }

    /// Serves what is there until there is no more.
    fn try_process(&mut self) -> Result<(), QueueError> {
        let mut host = Until { drained: false, interrupts: &mut self.interrupts, waits: 0, longest: None };
        self.queue.serve(self.driver.memory.as_ref(), &mut host)
    }

    fn process(&mut self) {
        self.try_process().unwrap();
    }

    /// Submits one chain and returns the length in the used ring.
    fn run(&mut self, chain: &[Desc]) -> u32 {
        self.driver.submit(chain);
        self.finish()
    }

    /// Serves what is available, which must be one chain with head 0.
    fn finish(&mut self) -> u32 {
        self.process();
        let (head, len) = self.driver.used().expect("the chain must come back");
        assert_eq!(head, 0);
        assert_eq!(self.driver.used(), None, "and come back once");
        len
    }

    fn malformed(&self, reason: Malformed) -> u64 {
        self.device.report().count(Fault::Malformed(reason))
    }
}

#[test]
fn reads_into_several_buffers_in_order() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 3);
    let len = rig.run(&[readable(HEADER, 16), writable(DATA + 4096, 512), writable(DATA, 1024), writable(STATUS, 1)]);
    assert_eq!(len, 1537);
    assert_eq!(rig.driver.status(), OK);
    assert_eq!(rig.driver.get(DATA + 4096, 512), rig.disk.content(3 * 512, 512));
    assert_eq!(rig.driver.get(DATA, 1024), rig.disk.content(4 * 512, 1024));
    assert_eq!(rig.disk.reads.load(Ordering::Relaxed), 1, "one request is one call");
    assert_eq!(rig.interrupts, 1);
}

#[test]
fn buffers_may_be_cut_anywhere() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 1);
    // The header in four parts, one of them empty; data of odd lengths; the status after data in
    // one descriptor.
    let len = rig.run(&[
        readable(HEADER, 3),
        readable(HEADER + 3, 6),
        readable(DATA, 0),
        readable(HEADER + 9, 7),
        writable(DATA, 100),
        writable(DATA + 100, 413),
    ]);
    assert_eq!(len, 513);
    assert_eq!(rig.driver.get(DATA, 512), rig.disk.content(512, 512));
    assert_eq!(rig.driver.get(DATA + 512, 1), [OK]);
}

#[test]
fn a_buffer_may_span_memory_regions() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    rig.run(&[readable(HEADER, 16), writable(REGION_2 - 700, 1024), writable(STATUS, 1)]);
    assert_eq!(rig.driver.status(), OK);
    assert_eq!(rig.driver.get(REGION_2 - 700, 1024), rig.disk.content(0, 1024));
}

#[test]
fn writes_what_the_guest_sent_even_right_after_the_header() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_OUT, 2);
    let data: Vec<u8> = (0..1024_u32).map(|i| (i * 31).to_le_bytes()[0]).collect();
    rig.driver.put(HEADER + 16, &data);
    let len = rig.run(&[readable(HEADER, 16 + 300), readable(HEADER + 316, 724), writable(STATUS, 1)]);
    assert_eq!((rig.driver.status(), len), (OK, 1));
    assert_eq!(rig.disk.content(2 * 512, 1024), data);
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), 0, "the driver flushes when it wants to");
}

#[test]
fn without_flush_every_write_is_durable() {
    let mut rig = Rig::with(MemoryDisk::new(64 * 512), 0);
    rig.driver.header(VIRTIO_BLK_T_OUT, 0);
    rig.run(&[readable(HEADER, 16), readable(DATA, 512), writable(STATUS, 1)]);
    assert_eq!(rig.driver.status(), OK);
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn flush_reaches_the_disk() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(rig.run(&[readable(HEADER, 16), writable(STATUS, 1)]), 1);
    assert_eq!(rig.driver.status(), OK);
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn get_id_returns_the_serial_padded_and_never_more_than_there_is_room_for() {
    let mut rig = Rig::new();
    rig.driver.put(DATA, &[0xff; 64]);
    rig.driver.header(VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(rig.run(&[readable(HEADER, 16), writable(DATA, 20), writable(STATUS, 1)]), 21);
    assert_eq!(rig.driver.get(DATA, 21), *b"golden\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");

    rig.driver.put(DATA, &[0xff; 64]);
    rig.driver.header(VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(rig.run(&[readable(HEADER, 16), writable(DATA, 4), writable(STATUS, 1)]), 5);
    assert_eq!(rig.driver.get(DATA, 5), *b"gold\xff");

    rig.driver.header(VIRTIO_BLK_T_GET_ID, 0);
    let len = rig.run(&[readable(HEADER, 16), writable(DATA + 32, 2), writable(DATA, 30), writable(STATUS, 1)]);
    assert_eq!(len, 20, "the status lies behind a gap, so it is not counted");
    assert_eq!(rig.driver.status(), OK);
    assert_eq!(rig.driver.get(DATA + 32, 2), *b"go");
    assert_eq!(rig.driver.get(DATA, 4), *b"lden");
}

#[test]
fn other_types_are_unsupported() {
    let mut rig = Rig::new();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES, 2, 0x1234_5678, u32::MAX] {
        rig.driver.header(kind, 0);
        rig.run(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
        assert_eq!(rig.driver.status(), UNSUPP, "type {kind}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut rig = Rig::with(MemoryDisk::read_only(64 * 512), FLUSH);
    let before = rig.disk.content(0, 512);
    rig.driver.header(VIRTIO_BLK_T_OUT, 0);
    rig.run(&[readable(HEADER, 16), readable(DATA, 512), writable(STATUS, 1)]);
    assert_eq!(rig.driver.status(), IOERR);
    assert_eq!(rig.disk.content(0, 512), before);
}

#[test]
fn ranges_outside_of_the_disk_are_errors_however_they_wrap() {
    let cases = [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
        (64, 1),
    ];
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        for (sector, len) in cases {
            let mut rig = Rig::new();
            rig.driver.header(kind, sector);
            let data = if kind == VIRTIO_BLK_T_IN { writable(DATA, len) } else { readable(DATA, len) };
            rig.run(&[readable(HEADER, 16), data, writable(STATUS, 1)]);
            assert_eq!(rig.driver.status(), IOERR, "type {kind}, sector {sector}, {len} bytes");
            assert_eq!(rig.disk.reads.load(Ordering::Relaxed), 0);
        }
    }
}

#[test]
fn a_request_without_data_does_nothing() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 64);
    assert_eq!(rig.run(&[readable(HEADER, 16), writable(STATUS, 1)]), 1);
    assert_eq!(rig.driver.status(), OK, "no byte past the end was asked for");
    rig.driver.header(VIRTIO_BLK_T_IN, 65);
    rig.run(&[readable(HEADER, 16), writable(STATUS, 1)]);
    assert_eq!(rig.driver.status(), IOERR);
    assert_eq!(rig.disk.reads.load(Ordering::Relaxed), 0);
}

#[test]
fn a_failing_disk_is_an_io_error_and_the_next_request_works() {
    let mut rig = Rig::new();
    let chain = [readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)];
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH] {
        rig.disk.broken.store(true, Ordering::Relaxed);
        rig.driver.header(kind, 0);
        assert_eq!(rig.run(&chain), 0, "nothing is known to be written");
        assert_eq!(rig.driver.status(), IOERR);
        rig.disk.broken.store(false, Ordering::Relaxed);
        rig.driver.header(kind, 0);
        rig.run(&chain);
        assert_eq!(rig.driver.status(), OK);
    }
    assert_eq!(rig.device.report().count(Fault::Backend(ErrorKind::Storage)), 2);
}

#[test]
fn a_loop_of_descriptors_ends() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    for flags in [NEXT, NEXT | WRITE] {
        rig.driver.raw(&[
            Desc { addr: HEADER, len: 16, flags: NEXT, next: 1 },
            Desc { addr: STATUS, len: 1, flags, next: 0 },
        ]);
        rig.driver.offer(0);
        assert_eq!(rig.finish(), 0);
    }
    assert_eq!(rig.driver.status(), UNTOUCHED);
    assert_eq!(rig.malformed(Malformed::Unending), 2);
}

#[test]
fn an_index_past_the_table_ends_the_chain() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    for next in [SIZE, u16::MAX] {
        rig.driver.raw(&[
            Desc { addr: HEADER, len: 16, flags: NEXT, next: 1 },
            Desc { addr: STATUS, len: 1, flags: NEXT | WRITE, next },
        ]);
        rig.driver.offer(0);
        assert_eq!(rig.finish(), 0);
    }
    assert_eq!(rig.malformed(Malformed::Unending), 2);
}

#[test]
fn an_indirect_table_works_up_to_the_limit_and_not_beyond() {
    let table = DATA + 0x10000;
    for (extra, status) in [(0, OK), (1, IOERR), (100, IOERR), (5000, IOERR)] {
        let mut rig = Rig::new();
        rig.driver.header(VIRTIO_BLK_T_IN, 0);
        let segments = MAX_DESCRIPTORS - 2 + extra;
        let mut chain = vec![readable(HEADER, 16)];
        // A byte each and the rest of two sectors in the last.
        chain.extend((0..segments - 1).map(|i| writable(DATA + u64::from(i), 1)));
        chain.push(writable(DATA + u64::from(segments - 1), 1024_u32.saturating_sub(u32::from(segments) - 1).max(1)));
        chain.push(writable(STATUS, 1));
        // An empty one at the end is no place for a status.
        chain.extend((extra == 100).then(|| writable(STATUS, 0)));
        rig.driver.chain_in(table, 0, &chain);
        let len = u32::try_from(chain.len() * 16).unwrap();
        rig.driver.raw(&[Desc { addr: table, len, flags: INDIRECT, next: 0 }]);
        rig.driver.offer(0);
        rig.finish();
        assert_eq!(rig.driver.status(), status);
        if extra == 0 {
            assert_eq!(rig.driver.get(DATA, 1024), rig.disk.content(0, 1024));
        }
        assert_eq!(rig.malformed(Malformed::TooLong), u64::from(extra > 0));
    }
}

#[test]
fn bad_indirect_tables_are_refused() {
    let table = DATA + 0x10000;
    let inner = DATA + 0x20000;
    let cases = [
        ("inside another", table, 32),
        ("of no whole number of descriptors", table, 33),
        ("empty", table, 0),
        ("outside of memory", END, 32),
        ("at the top of the address space", u64::MAX - 8, 32),
        ("of a million descriptors", table, 16 << 20),
    ];
    for (what, addr, len) in cases {
        let mut rig = Rig::new();
        rig.driver.header(VIRTIO_BLK_T_IN, 0);
        rig.driver.chain_in(inner, 0, &[writable(DATA, 512), writable(STATUS, 1)]);
        rig.driver.table(
            table,
            0,
            &[
                Desc { addr: HEADER, len: 16, flags: NEXT, next: 1 },
                Desc { addr: inner, len: 32, flags: INDIRECT, next: 0 },
            ],
        );
        rig.driver.raw(&[Desc { addr, len, flags: INDIRECT, next: 0 }]);
        rig.driver.offer(0);
        assert_eq!(rig.finish(), 0, "{what}");
        assert_eq!(rig.driver.status(), UNTOUCHED, "{what}");
        assert_eq!(rig.malformed(Malformed::Unending), 1, "{what}");
    }
}

#[test]
fn more_than_4_gib_in_one_chain_is_refused() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    let huge = writable(DATA, u32::MAX);
    assert_eq!(rig.run(&[readable(HEADER, 16), huge, huge, writable(STATUS, 1)]), 0);
    assert_eq!(rig.malformed(Malformed::Unending), 1);
}

#[test]
fn addresses_outside_of_memory_are_an_io_error_if_the_status_is_inside() {
    for (addr, len) in [(END, 512), (END - 511, 512), (u64::MAX - 511, 512), (u64::MAX, 512), (DATA, 0xf000_0000)] {
        let mut rig = Rig::new();
        rig.driver.header(VIRTIO_BLK_T_IN, 0);
        rig.run(&[readable(HEADER, 16), writable(addr, len), writable(STATUS, 1)]);
        assert_eq!(rig.driver.status(), IOERR, "{len} bytes at {addr:#x}");
        assert_eq!(rig.malformed(Malformed::OutsideMemory), 1);
        assert_eq!(rig.disk.reads.load(Ordering::Relaxed), 0);

        rig.driver.header(VIRTIO_BLK_T_IN, 0);
        rig.run(&[readable(addr, len), writable(DATA, 512), writable(STATUS, 1)]);
        assert_eq!(rig.driver.status(), IOERR, "header of {len} bytes at {addr:#x}");
    }
}

#[test]
fn a_status_outside_of_memory_is_not_written_anywhere_else() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    rig.driver.put(DATA, &[0xff; 512]);
    assert_eq!(rig.run(&[readable(HEADER, 16), writable(DATA, 512), writable(END, 1)]), 0);
    assert_eq!(rig.driver.get(DATA, 512), [0xff; 512], "the last byte of data is no status");
}

#[test]
fn header_and_status_must_be_there() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    rig.run(&[readable(HEADER, 15), writable(DATA, 512), writable(STATUS, 1)]);
    assert_eq!(rig.driver.status(), IOERR);
    rig.run(&[writable(STATUS, 1)]);
    assert_eq!(rig.malformed(Malformed::NoHeader), 2);

    assert_eq!(rig.run(&[readable(HEADER, 16)]), 0);
    assert_eq!(rig.run(&[readable(HEADER, 16), writable(STATUS, 0)]), 0);
    assert_eq!(rig.malformed(Malformed::NoStatus), 2);
}

#[test]
fn readable_after_writable_is_refused() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_OUT, 0);
    let before = rig.disk.content(0, 512);
    rig.run(&[writable(STATUS, 1), readable(HEADER, 16), readable(DATA, 512)]);
    assert_eq!(rig.driver.status(), IOERR);
    assert_eq!(rig.disk.content(0, 512), before);
    assert_eq!(rig.malformed(Malformed::Order), 1);
}

#[test]
fn a_head_outside_of_the_table_breaks_the_queue() {
    let mut rig = Rig::new();
    rig.driver.offer(SIZE);
    let error = rig.try_process().unwrap_err();
    assert!(error.to_string().contains("virtqueue 0"), "{error}");
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue() {
    let mut rig = Rig::new();
    rig.driver.set_avail_idx(SIZE + 1);
    rig.try_process().unwrap_err();
}

#[test]
fn a_host_that_stops_has_nothing_taken() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
    rig.driver.submit(&[readable(HEADER, 16), writable(STATUS, 1)]);
    let mut host = Until { drained: true, interrupts: &mut rig.interrupts, waits: 0, longest: None };
    rig.queue.serve(rig.driver.memory.as_ref(), &mut host).unwrap();
    assert_eq!(host.waits, 0);
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), 0);
    assert_eq!(rig.queue.position(), Position { next_avail: 0, next_used: 0 });
    rig.process();
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn many_requests_are_one_interrupt() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
    rig.driver.submit(&[readable(HEADER, 16), writable(STATUS, 1)]);
    for _ in 1..SIZE {
        rig.driver.offer(0);
    }
    rig.process();
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), usize::from(SIZE));
    assert_eq!(rig.interrupts, 1);
}

#[test]
fn without_event_idx_flags_rule_in_both_directions() {
    let mut rig = Rig::new();
    rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
    let chain = [readable(HEADER, 16), writable(STATUS, 1)];
    rig.driver.set_avail_flags(1);
    rig.run(&chain);
    assert_eq!(rig.interrupts, 0, "the driver polls");
    rig.driver.set_avail_flags(0);
    rig.run(&chain);
    assert_eq!(rig.interrupts, 1);
    assert_eq!(rig.driver.used_flags(), 0, "drained: the device wants notifications");
}

#[test]
fn with_event_idx_the_driver_chooses_when_it_is_interrupted() {
    let mut rig = Rig::with(MemoryDisk::new(512), FLUSH | EVENT_IDX);
    rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
    let chain = [readable(HEADER, 16), writable(STATUS, 1)];
    // The flag means nothing with EVENT_IDX (section 2.7.7.1).
    rig.driver.set_avail_flags(1);

    rig.driver.set_used_event(2);
    rig.run(&chain);
    rig.run(&chain);
    assert_eq!(rig.interrupts, 0, "entries 0 and 1 are not the one asked for");
    rig.run(&chain);
    assert_eq!(rig.interrupts, 1, "entry 2 is");
    rig.run(&chain);
    assert_eq!(rig.interrupts, 1, "and only that one");
    assert_eq!(rig.driver.avail_event(), 4, "the next request is to be notified");
}

#[test]
fn event_idx_survives_the_wrap_of_its_indices() {
    let mut rig = Rig::with(MemoryDisk::new(512), FLUSH | EVENT_IDX);
    rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
    let chain = [readable(HEADER, 16), writable(STATUS, 1)];
    rig.driver.set_used_event(2);
    for _ in 0..=u16::MAX {
        rig.run(&chain);
    }
    assert_eq!(rig.interrupts, 1);
    assert_eq!(rig.driver.avail_event(), 0);
    for _ in 0..3 {
        rig.run(&chain);
    }
    assert_eq!(rig.interrupts, 2);
}

const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;
const WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// Ranges (sector, sectors, flags) as a guest lists them.
fn ranges(list: &[(u64, u32, u32)]) -> Vec<u8> {
    let one = |&(sector, sectors, flags): &(u64, u32, u32)| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    list.iter().flat_map(one).collect()
}

impl Rig {
    fn changing() -> Self {
        Self::with(MemoryDisk::new(64 * 512), FLUSH | DISCARD | ZEROES)
    }

    /// Sends `data` with a request of type `kind` and returns the status.
    fn send(&mut self, kind: u32, data: &[u8]) -> u8 {
        // The sector of the header means nothing in these requests.
        self.driver.header(kind, u64::MAX);
        self.driver.put(DATA, data);
        let len = u32::try_from(data.len()).unwrap();
        assert_eq!(self.run(&[readable(HEADER, 16), readable(DATA, len), writable(STATUS, 1)]), 1);
        self.driver.status()
    }
}

#[test]
fn discards_reach_the_disk_range_by_range() {
    let mut rig = Rig::changing();
    let data = ranges(&[(3, 2, 0), (63, 1, 0), (64, 0, 0), (0, 1, 0)]);
    assert_eq!(rig.send(VIRTIO_BLK_T_DISCARD, &data), OK);
    let at = |offset, len| Call::Discard { offset, len };
    assert_eq!(rig.disk.take_calls(), [at(1536, 1024), at(32256, 512), at(0, 512)], "an empty range is nothing");
}

#[test]
fn zeroes_reach_the_disk_with_their_permission() {
    let mut rig = Rig::changing();
    for (flags, may_unmap) in [(0, false), (1, true)] {
        assert_eq!(rig.send(VIRTIO_BLK_T_WRITE_ZEROES, &ranges(&[(2, 3, flags)])), OK);
        assert_eq!(rig.disk.take_calls(), [Call::Zero { offset: 1024, len: 1536, may_unmap }]);
    }
    assert_eq!(rig.disk.content(1024, 1536), [0; 1536]);
    assert_ne!(rig.disk.content(512, 512), [0; 512]);
    assert_ne!(rig.disk.content(2560, 512), [0; 512]);
}

#[test]
fn without_discard_zeroes_keep_their_space() {
    let options = BlockDeviceOptions { discard: false, ..BlockDeviceOptions::default() };
    let mut rig = Rig::with_options(MemoryDisk::new(64 * 512), FLUSH | ZEROES, options);
    assert_eq!(rig.send(VIRTIO_BLK_T_WRITE_ZEROES, &ranges(&[(2, 3, 1)])), OK);
    assert_eq!(rig.disk.take_calls(), [Call::Zero { offset: 1024, len: 1536, may_unmap: false }]);
}

#[test]
fn ranges_may_be_cut_anywhere() {
    let mut rig = Rig::changing();
    rig.driver.header(VIRTIO_BLK_T_DISCARD, 0);
    rig.driver.put(HEADER + 16, &ranges(&[(1, 1, 0), (5, 2, 0)]));
    let header = HEADER + 21;
    rig.run(&[
        readable(HEADER, 21),
        readable(header, 0),
        readable(header, 20),
        readable(header + 20, 7),
        writable(STATUS, 1),
    ]);
    assert_eq!(rig.driver.status(), OK);
    let at = |offset, len| Call::Discard { offset, len };
    assert_eq!(rig.disk.take_calls(), [at(512, 512), at(2560, 1024)]);
}

#[test]
fn a_list_with_one_bad_range_changes_nothing() {
    let good = (0, 1, 0);
    let cases = [
        ("unknown flag", (0, 1, 2), UNSUPP),
        ("unknown flag besides a known one", (0, 1, 3), UNSUPP),
        ("highest flag", (0, 1, 1 << 31), UNSUPP),
        ("all flags, and a bad range", (u64::MAX, u32::MAX, u32::MAX), UNSUPP),
        ("past the end", (64, 1, 0), IOERR),
        ("across the end", (63, 2, 0), IOERR),
        ("empty past the end", (65, 0, 0), IOERR),
        ("bytes that wrap", (1 << 55, 1, 0), IOERR),
        ("bytes that wrap to the start", (u64::MAX / 512 + 1, 1, 0), IOERR),
        ("the last sector there is", (u64::MAX, 1, 0), IOERR),
        ("an end that wraps", (u64::MAX / 512, 1, 0), IOERR),
        ("more than everything", (0, u32::MAX, 0), IOERR),
    ];
    for (what, bad, status) in cases {
        let mut rig = Rig::changing();
        assert_eq!(rig.send(VIRTIO_BLK_T_DISCARD, &ranges(&[good, bad])), status, "discard: {what}");
        assert_eq!(rig.send(VIRTIO_BLK_T_WRITE_ZEROES, &ranges(&[bad])), status, "zeroes: {what}");
        assert_eq!(rig.disk.take_calls(), [], "{what}");
    }
    let mut rig = Rig::changing();
    assert_eq!(rig.send(VIRTIO_BLK_T_DISCARD, &ranges(&[good, (0, 1, 1)])), UNSUPP, "discards have no flag");
    assert_eq!(rig.disk.take_calls(), []);
}

#[test]
fn lists_that_are_none_are_refused() {
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let mut rig = Rig::changing();
        for len in [0, 1, 15, 17, 31] {
            assert_eq!(rig.send(kind, &vec![0; len]), IOERR, "{len} bytes");
        }
        // The list is read, not written.
        rig.driver.header(kind, 0);
        rig.run(&[readable(HEADER, 16), writable(DATA, 16), writable(STATUS, 1)]);
        assert_eq!(rig.driver.status(), IOERR);
        assert_eq!(rig.disk.take_calls(), []);
    }
}

#[test]
fn a_list_is_as_long_as_config_space_says() {
    for (kind, field) in [(VIRTIO_BLK_T_DISCARD, 40), (VIRTIO_BLK_T_WRITE_ZEROES, 52)] {
        let mut rig = Rig::changing();
        let mut most = [0; 4];
        rig.device.read_config(field, &mut most);
        let most = usize::try_from(u32::from_le_bytes(most)).unwrap();
        assert_eq!(rig.send(kind, &ranges(&vec![(0, 1, 0); most])), OK);
        assert_eq!(rig.disk.take_calls().len(), most);
        for more in [most + 1, 1000] {
            assert_eq!(rig.send(kind, &ranges(&vec![(0, 1, 0); more])), IOERR, "{more} ranges");
        }
        assert_eq!(rig.disk.take_calls(), []);
    }
}

#[test]
fn a_range_is_as_long_as_config_space_says() {
    for (kind, field) in [(VIRTIO_BLK_T_DISCARD, 36), (VIRTIO_BLK_T_WRITE_ZEROES, 48)] {
        // Large enough that only the limit can be in the way; memory that nobody touches costs nothing.
        let mut disk = MemoryDisk::new(0);
        disk.bytes = Mutex::new(vec![0; (256 << 20) + 4096]);
        let mut rig = Rig::with(disk, FLUSH | DISCARD | ZEROES);
        let mut most = [0; 4];
        rig.device.read_config(field, &mut most);
        let most = u32::from_le_bytes(most);
        assert_eq!(rig.send(kind, &ranges(&[(1, most, 0)])), OK);
        assert_eq!(rig.disk.take_calls().len(), 1);
        assert_eq!(rig.send(kind, &ranges(&[(1, most + 1, 0)])), IOERR);
        assert_eq!(rig.disk.take_calls(), []);
    }
}

#[test]
fn what_was_not_accepted_is_unsupported() {
    let good = ranges(&[(0, 1, 0)]);
    for (features, discard, zeroes) in [(FLUSH, UNSUPP, UNSUPP), (DISCARD, OK, UNSUPP), (ZEROES, UNSUPP, OK)] {
        let mut rig = Rig::with(MemoryDisk::new(64 * 512), features);
        assert_eq!(rig.send(VIRTIO_BLK_T_DISCARD, &good), discard, "{features:#x}");
        assert_eq!(rig.send(VIRTIO_BLK_T_WRITE_ZEROES, &good), zeroes, "{features:#x}");
    }
}

#[test]
fn a_read_only_device_changes_nothing_even_if_the_disk_could() {
    let options = BlockDeviceOptions { read_only: true, ..BlockDeviceOptions::default() };
    for disk in [MemoryDisk::new(64 * 512), MemoryDisk::read_only(64 * 512)] {
        // A driver that claims what it was not offered.
        let mut rig = Rig::with_options(disk, FLUSH | DISCARD | ZEROES, options.clone());
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(rig.send(kind, &ranges(&[(0, 1, 0)])), IOERR);
        }
        rig.driver.header(VIRTIO_BLK_T_OUT, 0);
        rig.run(&[readable(HEADER, 16), readable(DATA, 512), writable(STATUS, 1)]);
        assert_eq!(rig.driver.status(), IOERR);
        assert_eq!(rig.disk.take_calls(), []);
        assert_eq!(rig.device.report().count(Fault::Refused("read-only")), 3);
    }
}

#[test]
fn a_disk_that_fails_ends_the_list() {
    let mut rig = Rig::changing();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        rig.disk.broken.store(true, Ordering::Relaxed);
        assert_eq!(rig.send(kind, &ranges(&[(0, 1, 0)])), IOERR);
        rig.disk.broken.store(false, Ordering::Relaxed);
        assert_eq!(rig.send(kind, &ranges(&[(0, 1, 0)])), OK);
    }
    assert_eq!(rig.device.report().count(Fault::Backend(ErrorKind::Storage)), 2);
}

/// Does one change of each kind and returns how often the disk was flushed after each.
fn flushes(rig: &mut Rig) -> [usize; 3] {
    [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES].map(|kind| {
        let status = if kind == VIRTIO_BLK_T_OUT {
            rig.driver.header(kind, 0);
            rig.run(&[readable(HEADER, 16), readable(DATA, 512), writable(STATUS, 1)]);
            rig.driver.status()
        } else {
            rig.send(kind, &ranges(&[(0, 1, 0)]))
        };
        assert_eq!(status, OK);
        let calls = rig.disk.take_calls();
        assert_ne!(calls[0], Call::Flush, "a flush comes after what it makes durable");
        calls.len() - 1
    })
}

#[test]
fn cache_modes_decide_who_flushes() {
    let all = FLUSH | DISCARD | ZEROES;
    let cases = [
        (CacheMode::WriteBack, all, [0; 3]),
        (CacheMode::WriteBack, all & !FLUSH, [1; 3]),
        (CacheMode::WriteBack, all | WCE, [0; 3]),
        (CacheMode::WriteBack, (all | WCE) & !FLUSH, [1; 3]),
        (CacheMode::WriteThrough, all, [1; 3]),
        (CacheMode::Unsafe, all, [0; 3]),
        (CacheMode::Unsafe, all & !FLUSH, [0; 3]),
    ];
    for (cache, features, expected) in cases {
        let options = BlockDeviceOptions { cache, ..BlockDeviceOptions::default() };
        let mut rig = Rig::with_options(MemoryDisk::new(64 * 512), features, options);
        assert_eq!(flushes(&mut rig), expected, "{cache:?} {features:#x}");
        rig.driver.header(VIRTIO_BLK_T_FLUSH, 0);
        rig.run(&[readable(HEADER, 16), writable(STATUS, 1)]);
        assert_eq!(rig.driver.status(), OK);
        assert_eq!(rig.disk.take_calls().len(), usize::from(cache != CacheMode::Unsafe), "{cache:?}: a flush");
    }
}

#[test]
fn the_guest_switches_its_cache_off_and_on() {
    let mut rig = Rig::with(MemoryDisk::new(64 * 512), FLUSH | DISCARD | ZEROES | WCE);
    assert_eq!(flushes(&mut rig), [0; 3]);
    rig.device.write_config(32, &[0]);
    assert_eq!(flushes(&mut rig), [1; 3]);
    rig.device.write_config(32, &[1]);
    assert_eq!(flushes(&mut rig), [0; 3]);
}

#[test]
fn without_a_way_to_flush_the_cache_stays_off() {
    let mut rig = Rig::with(MemoryDisk::new(64 * 512), DISCARD | ZEROES | WCE);
    rig.device.write_config(32, &[1]);
    assert_eq!(flushes(&mut rig), [1; 3]);
}

/// What a record was told, with the index of the used ring at that time.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<(&'static str, u16)>>>);

struct Recorder(Told, Arc<GuestMemoryMmap>);

impl Recorder {
    fn tell(&self, what: &'static str) {
        let used_idx: u16 = self.1.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        self.0.0.lock().unwrap().push((what, used_idx));
    }
}

impl InFlightRecord for Recorder {
    fn taken(&mut self, head: u16) {
        self.tell(if head == 0 { "taken 0" } else { "taken other" });
    }

    fn answering(&mut self, head: u16) {
        self.tell(if head == 0 { "answering 0" } else { "answering other" });
    }

    fn answered(&mut self, head: u16, used_idx: u16) {
        self.tell(if head == 0 { "answered 0" } else { "answered other" });
        assert_eq!(self.0.0.lock().unwrap().last().unwrap().1, used_idx);
    }
}

impl Rig {
    fn recorded(mut self, again: Vec<u16>) -> (Self, Told) {
        let told = Told::default();
        let recorder = Recorder(told.clone(), self.driver.memory.clone());
        self.queue = self.queue.recorded(Box::new(recorder), again);
        (self, told)
    }
}

#[test]
fn a_record_hears_of_each_request_before_and_after() {
    let (mut rig, told) = Rig::new().recorded(Vec::new());
    rig.driver.header(VIRTIO_BLK_T_IN, 0);
    rig.run(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    // What makes no sense is answered as well.
    rig.run(&[writable(STATUS, 1)]);
    let once = |at| [("taken 0", at), ("answering 0", at), ("answered 0", at + 1)];
    assert_eq!(*told.0.lock().unwrap(), [once(0), once(1)].concat());
}

/// Requests that nobody answered are executed again, first, and in their order.
#[test]
fn requests_in_flight_are_executed_again() {
    let (mut rig, told) = Rig::new().recorded(vec![8, 4]);
    for (head, byte) in [(4, b'b'), (8, b'a'), (0, b'c')] {
        let at = u64::from(head);
        rig.driver.header(VIRTIO_BLK_T_OUT, 0);
        let header = rig.driver.get(HEADER, 16);
        rig.driver.put(HEADER + 16 * at, &header);
        rig.driver.put(DATA + 512 * at, &[byte; 512]);
        let chain = [readable(HEADER + 16 * at, 16), readable(DATA + 512 * at, 512), writable(STATUS + at, 1)];
        rig.driver.chain_in(TABLE, head, &chain);
    }
    rig.driver.offer(0);
    rig.process();
    assert_eq!([(); 3].map(|()| rig.driver.used().unwrap().0), [8, 4, 0]);
    assert_eq!(rig.disk.content(0, 512), [b'c'; 512]);
    let told = told.0.lock().unwrap();
    let told: Vec<&str> = told.iter().map(|(what, _)| *what).collect();
    let other = ["answering other", "answered other"];
    // All are started before any is answered.
    assert_eq!(told, [&["taken 0"][..], &other, &other, &["answering 0", "answered 0"]].concat());
    assert_eq!(rig.queue.position(), Position { next_avail: 1, next_used: 3 });
}

#[test]
fn a_request_that_is_executed_again_may_be_in_an_indirect_table() {
    let (mut rig, _) = Rig::new().recorded(vec![2]);
    rig.driver.header(VIRTIO_BLK_T_IN, 1);
    rig.driver.chain_in(DATA, 0, &[readable(HEADER, 16), writable(DATA + 512, 512), writable(STATUS, 1)]);
    rig.driver.table(TABLE, 2, &[Desc { addr: DATA, len: 48, flags: INDIRECT, next: 0 }]);
    rig.process();
    assert_eq!(rig.driver.used(), Some((2, 513)));
    assert_eq!(rig.driver.get(DATA + 512, 512), rig.disk.content(512, 512));
}

#[test]
fn chains_that_make_no_sense_are_refused_the_second_time_too() {
    let table = |addr, len| Desc { addr, len, flags: INDIRECT, next: 0 };
    let loops = Desc { addr: HEADER, len: 16, flags: NEXT, next: 0 };
    for (descriptors, inner, reason) in [
        (vec![loops], vec![], Malformed::Unending),
        (vec![Desc { next: SIZE, ..loops }], vec![], Malformed::Unending),
        (vec![table(DATA, 20)], vec![], Malformed::Unending),
        (vec![table(DATA, 0)], vec![], Malformed::Unending),
        (vec![table(END, 16)], vec![], Malformed::Unending),
        (vec![table(u64::MAX - 15, 32)], vec![], Malformed::Unending),
        (vec![table(DATA, 16)], vec![table(DATA, 16)], Malformed::Unending),
        (vec![table(DATA, 16)], vec![loops], Malformed::Unending),
        (vec![readable(HEADER, 16)], vec![], Malformed::NoStatus),
    ] {
        let (mut rig, _) = Rig::new().recorded(vec![0]);
        rig.driver.raw(&descriptors);
        rig.driver.table(DATA, 0, &inner);
        rig.process();
        assert_eq!(rig.driver.used(), Some((0, 0)));
        assert_eq!(rig.malformed(reason), 1, "{:?}", descriptors.first().map(|d| (d.addr, d.len, d.flags)));
    }
    // A table of more than an index can name, which goes round in two of them.
    let rig = Rig::new();
    let round = [Desc { next: 1, ..loops }, loops];
    rig.driver.table(DATA, 0, &round);
    for (len, visits) in [(0xf_fff0, 65_535), (0x10_0000, 0), (0xffff_fff0, 0)] {
        rig.driver.raw(&[table(DATA, len)]);
        let chain = ChainAgain::new(rig.driver.memory.as_ref(), GuestAddress(TABLE), SIZE, 0);
        assert_eq!(chain.take(1 << 20).count(), visits, "{len:#x}");
    }
    // The head itself is outside of the table.
    let (mut rig, _) = Rig::new().recorded(vec![SIZE]);
    assert!(rig.try_process().is_err());
    assert_eq!(rig.malformed(Malformed::Unending), 1);
}

/// Each request is counted once, as what it asked for, with the bytes that it moved or an error.
#[test]
fn what_was_answered_is_counted() {
    let mut rig = Rig::with(MemoryDisk::new(64 * 512), FLUSH | 1 << VIRTIO_BLK_F_WRITE_ZEROES);
    for (kind, sector, chain) in [
        (VIRTIO_BLK_T_IN, 0, vec![readable(HEADER, 16), writable(DATA, 1024), writable(STATUS, 1)]),
        (VIRTIO_BLK_T_IN, 64, vec![readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]),
        (VIRTIO_BLK_T_OUT, 1, vec![readable(HEADER, 16), readable(DATA, 512), writable(STATUS, 1)]),
        (VIRTIO_BLK_T_FLUSH, 0, vec![readable(HEADER, 16), writable(STATUS, 1)]),
        (VIRTIO_BLK_T_GET_ID, 0, vec![readable(HEADER, 16), writable(DATA, 20), writable(STATUS, 1)]),
        (77, 0, vec![readable(HEADER, 16), writable(STATUS, 1)]),
    ] {
        rig.driver.header(kind, sector);
        rig.run(&chain);
    }
    // Sectors 8 to 11, and no complete header.
    rig.driver.put(DATA, &[8_u64.to_le_bytes(), 4_u64.to_le_bytes()].concat());
    rig.driver.header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
    rig.run(&[readable(HEADER, 16), readable(DATA, 16), writable(STATUS, 1)]);
    rig.run(&[readable(HEADER, 8), writable(STATUS, 1)]);

    let stats = rig.device.stats();
    let counted = RequestKind::ALL.map(|kind| {
        let of = stats.of(kind);
        assert_eq!(of.latency.iter().sum::<u64>(), of.requests);
        (of.requests, of.errors, of.bytes)
    });
    let (read, write, one, none) = ((2, 1, 1024), (1, 0, 512), (1, 0, 0), (0, 0, 0));
    assert_eq!(counted, [read, write, one, none, (1, 0, 2048), one, (2, 2, 0)]);
    assert_eq!(stats.in_flight, 0);
}
