#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockhouse_block::{
    BlockBackend, Error as DiskError, ErrorKind as DiskErrorKind, Lane, Pool, PoolLane, Result as DiskResult, Topology,
};
use blockhouse_virtio::BlockDeviceOptions;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::*;
use crate::memory;

const DESCRIPTORS: u32 = 0x1000;
const AVAIL: u32 = 0x2000;
const USED: u32 = 0x3000;
const HEADER: u32 = 0x4000;
const DATA: u32 = 0x5000;
const STATUS: u32 = 0x6000;

/// A disk of one sector whose reads wait for permission. Whether it can be written is what it says;
/// no test here gets as far as a write.
struct SlowDisk {
    writable: bool,
    capacity: AtomicU64,
    arrived: Mutex<mpsc::Sender<()>>,
    permitted: Mutex<bool>,
    changed: Condvar,
}

impl SlowDisk {
    fn permit(&self) {
        *self.permitted.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl BlockBackend for SlowDisk {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::SeqCst)
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 512, optimal_io_size: 512 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], _: u64) -> DiskResult<()> {
        let _ = self.arrived.lock().unwrap().send(());
        let mut permitted = self.permitted.lock().unwrap();
        while !*permitted {
            permitted = self.changed.wait(permitted).unwrap();
        }
        for buffer in buffers {
            buffer.copy_from(&[0x5a; 512]);
        }
        Ok(())
    }

    fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> DiskResult<()> {
        Err(DiskError::new(DiskErrorKind::Invalid, "read-only"))
    }

    fn flush(&self) -> DiskResult<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> DiskResult<()> {
        Err(DiskError::new(DiskErrorKind::Invalid, "read-only"))
    }

    fn discard(&self, _: u64, _: u64) -> DiskResult<()> {
        Err(DiskError::new(DiskErrorKind::Invalid, "read-only"))
    }

    fn lane(self: Arc<Self>) -> DiskResult<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

struct Rig {
    mmio: MmioDevice,
    disk: Arc<SlowDisk>,
    arrived: mpsc::Receiver<()>,
    memory: Memory,
    irq: EventFd,
}

impl Rig {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(writable: bool) -> Self {
        let (sender, arrived) = mpsc::channel();
        let disk = Arc::new(SlowDisk {
            writable,
            capacity: AtomicU64::new(512),
            arrived: Mutex::new(sender),
            permitted: Mutex::new(false),
            changed: Condvar::new(),
        });
        let options = BlockDeviceOptions { queues: 2, ..BlockDeviceOptions::default() };
        let device = Arc::new(BlockDevice::new(disk.clone(), &options));
        let memory = memory::allocate(8 << 20).unwrap();
        let kicks = (0..2).map(|_| EventFd::new(0).unwrap()).collect();
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mmio = MmioDevice::new("disk".to_owned(), device, memory.clone(), kicks, irq.try_clone().unwrap()).unwrap();
        Self { mmio, disk, arrived, memory, irq }
    }

    fn read(&self, register: u32) -> u32 {
        let mut bytes = [0xff; 4];
        self.mmio.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.mmio.write(register.into(), &value.to_le_bytes());
    }

    /// Up to the choice of features, of which the lower half is `low`.
    fn negotiate(&mut self, low: u32, high: u32) {
        for status in [0, 1, 3] {
            self.write(VIRTIO_MMIO_STATUS, status);
        }
        for (half, features) in [(0, low), (1, high)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write(VIRTIO_MMIO_STATUS, 11);
    }

    fn set_up_queue(&mut self, size: u32, used: u32) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, used);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.negotiate(0, 1);
        self.set_up_queue(16, USED);
        self.write(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 15);
    }

    fn put<const N: usize>(&self, address: u32, bytes: [u8; N]) {
        self.memory.write_slice(&bytes, GuestAddress(address.into())).unwrap();
    }

    fn get(&self, address: u32) -> u8 {
        self.memory.read_obj(GuestAddress(address.into())).unwrap()
    }

    /// Makes one read of the sector available and notifies.
    fn submit(&mut self) {
        self.put(HEADER, [0; 16]);
        self.put(STATUS, [0xff]);
        for (i, (address, len, flags)) in (0..).zip([(HEADER, 16_u32, 1_u16), (DATA, 512, 3), (STATUS, 1, 2)]) {
            let at = DESCRIPTORS + u32::from(i) * 16;
            self.put(at, u64::from(address).to_le_bytes());
            self.put(at + 8, len.to_le_bytes());
            self.put(at + 12, flags.to_le_bytes());
            self.put(at + 14, (i + 1_u16).to_le_bytes());
        }
        self.put(AVAIL + 4, [0; 2]);
        self.put(AVAIL + 2, 1_u16.to_le_bytes());
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    fn wait_for_interrupt(&self, bit: u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.read(VIRTIO_MMIO_INTERRUPT_STATUS) & bit == 0 {
            assert!(Instant::now() < deadline, "no interrupt");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_request_goes_through_and_its_interrupt_is_acknowledged() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!((rig.read(VIRTIO_MMIO_VERSION), rig.read(VIRTIO_MMIO_DEVICE_ID)), (2, 2));
    rig.disk.permit();
    rig.start();
    rig.submit();
    rig.wait_for_interrupt(1);
    assert_eq!((rig.get(STATUS), rig.get(DATA), rig.get(USED + 2)), (0, 0x5a, 1));
    rig.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(rig.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.irq.read().is_err() {
        assert!(Instant::now() < deadline, "the irqfd was not signalled");
    }
}

#[test]
fn a_reset_waits_for_the_request_in_flight_and_then_nothing_touches_memory() {
    let mut rig = Rig::new();
    rig.start();
    // Three times the same chain: all that the worker has seen by then are in flight.
    rig.put(AVAIL + 6, [0; 4]);
    rig.submit();
    rig.put(AVAIL + 2, 3_u16.to_le_bytes());
    rig.arrived.recv_timeout(Duration::from_secs(10)).unwrap();
    let disk = rig.disk.clone();
    let permitter = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        disk.permit();
    });
    rig.write(VIRTIO_MMIO_STATUS, 0);
    assert!(*rig.disk.permitted.lock().unwrap(), "the reset came back while a request was in flight");
    permitter.join().unwrap();
    let in_flight = 1 + rig.arrived.try_iter().count();
    let used = usize::from(rig.get(USED + 2));
    assert_eq!((rig.get(STATUS), used), (0, in_flight), "what was in flight was completed, and nothing else");
    for register in [VIRTIO_MMIO_STATUS, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_READY] {
        assert_eq!(rig.read(register), 0);
    }

    // Notifications of a device that was reset reach nobody …
    rig.put(STATUS, [0xff]);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.get(STATUS), 0xff);
    // … and the device starts again from nothing.
    rig.put(AVAIL + 2, [0; 2]);
    rig.put(USED + 2, [0; 2]);
    rig.start();
    rig.submit();
    rig.wait_for_interrupt(1);
    assert_eq!(rig.get(STATUS), 0);
}

#[test]
fn a_queue_can_be_stopped_alone() {
    let mut rig = Rig::new();
    rig.disk.permit();
    rig.start();
    rig.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0);
    rig.submit();
    assert!(rig.arrived.recv_timeout(Duration::from_millis(50)).is_err());
    rig.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0, "a running device takes no new queue");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for (low, high) in [(0, 0), (1 << 3, 1), (0, 3), (u32::MAX, u32::MAX)] {
        let mut rig = Rig::new();
        rig.negotiate(low, high);
        assert_eq!(rig.read(VIRTIO_MMIO_STATUS), 3, "{low:#x} {high:#x}");
        rig.set_up_queue(16, USED);
        rig.write(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(rig.read(VIRTIO_MMIO_STATUS) & 4, 0, "no DRIVER_OK without FEATURES_OK");
        rig.submit();
        assert!(rig.arrived.recv_timeout(Duration::from_millis(20)).is_err());
    }
}

#[test]
fn features_are_fixed_once_accepted() {
    let mut rig = Rig::new();
    rig.negotiate(0, 1);
    assert_eq!(rig.read(VIRTIO_MMIO_STATUS), 11);
    rig.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    rig.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(rig.mmio.driver_features, 1 << 32);
}

#[test]
fn a_queue_that_cannot_be_is_not_ready() {
    let end = 8 << 20;
    for (size, used) in
        [(0, USED), (3, USED), (512, USED), (1 << 16, USED), (16, end - 8), (16, end), (16, u32::MAX - 3)]
    {
        let mut rig = Rig::new();
        rig.negotiate(0, 1);
        rig.set_up_queue(size, used);
        assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0, "size {size}, used ring at {used:#x}");
    }
}

/// A driver that gets another address than it asked for has its queue where it does not look.
#[test]
fn a_queue_that_is_not_aligned_is_not_ready() {
    for (register, good, aligned, not_aligned) in [
        (VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS, 16, [1, 2, 4, 8]),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL, 2, [1, 3, 5, 9]),
        (VIRTIO_MMIO_QUEUE_USED_LOW, USED, 4, [1, 2, 3, 6]),
    ] {
        let mut rig = Rig::new();
        rig.negotiate(0, 1);
        rig.set_up_queue(16, USED);
        let mut ready_at = |offset| {
            rig.write(VIRTIO_MMIO_QUEUE_READY, 0);
            rig.write(register, good + offset);
            rig.write(VIRTIO_MMIO_QUEUE_READY, 1);
            rig.read(VIRTIO_MMIO_QUEUE_READY)
        };
        for offset in not_aligned {
            assert_eq!(ready_at(offset), 0, "{register:#x}: {offset}");
            assert_eq!(ready_at(aligned), 1, "{register:#x}: {aligned} after {offset}");
        }
        assert_eq!(ready_at(not_aligned[0]), 0);
        rig.write(VIRTIO_MMIO_STATUS, 0);
        assert!(rig.mmio.queues[0].impossible == Impossible::default(), "{register:#x}: after a reset");
    }
}

#[test]
fn a_queue_does_not_move_while_it_is_ready() {
    let mut rig = Rig::new();
    rig.disk.permit();
    rig.start();
    rig.write(VIRTIO_MMIO_QUEUE_NUM, 8);
    rig.write(VIRTIO_MMIO_QUEUE_USED_LOW, 0x7000);
    let config = &rig.mmio.queues[0].config;
    assert_eq!((config.size(), config.used_ring()), (16, USED.into()));
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_repairs_it() {
    let mut rig = Rig::new();
    rig.disk.permit();
    rig.start();
    rig.put(AVAIL + 2, 0x8000_u16.to_le_bytes());
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.wait_for_interrupt(2);
    assert_eq!(rig.read(VIRTIO_MMIO_STATUS), 15 | 64);
    rig.put(AVAIL + 2, [0; 2]);
    rig.start();
    rig.submit();
    rig.wait_for_interrupt(1);
}

/// A driver that reads config space in parts looks at the generation before and after.
#[test]
fn another_size_is_an_interrupt_and_another_generation() {
    let mut rig = Rig::new();
    rig.disk.permit();
    rig.start();
    assert_eq!(rig.read(VIRTIO_MMIO_CONFIG_GENERATION), 0);
    rig.mmio.parts().1.config_changed();
    rig.wait_for_interrupt(2);
    assert_eq!(rig.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
    assert_eq!(rig.read(VIRTIO_MMIO_STATUS), 15, "nothing is broken");
    rig.submit();
    rig.wait_for_interrupt(1);
}

/// The disk is larger at once, and what it tells whom comes later.
#[test]
fn a_size_that_nobody_has_told_of_is_another_generation_too() {
    let rig = Rig::new();
    let half = |offset| {
        let mut bytes = [0; 4];
        rig.mmio.read(u64::from(VIRTIO_MMIO_CONFIG) + offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    rig.disk.capacity.store(u64::from(u32::MAX) * 512, Ordering::SeqCst);
    let before = rig.read(VIRTIO_MMIO_CONFIG_GENERATION);
    assert_eq!(rig.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
    let low = half(0);
    rig.disk.capacity.store((u64::from(u32::MAX) + 1) * 512, Ordering::SeqCst);
    assert_eq!((low, half(4)), (u32::MAX, 1), "these do not belong together");
    let after = rig.read(VIRTIO_MMIO_CONFIG_GENERATION);
    assert_ne!(after, before);
    assert_eq!(rig.read(VIRTIO_MMIO_CONFIG_GENERATION), after);
    assert_eq!((half(0), half(4)), (0, 1));
    rig.mmio.parts().1.config_changed();
    assert_ne!(rig.read(VIRTIO_MMIO_CONFIG_GENERATION), after);
}

#[test]
fn strange_accesses_do_nothing() {
    let mut rig = Rig::new();
    rig.disk.permit();
    rig.start();
    for offset in (0..0x1000).chain([0x1_0000_0000, u64::MAX]) {
        for len in [0, 1, 2, 3, 8] {
            rig.mmio.write(offset, &[0; 8][..len]);
            rig.mmio.read(offset, &mut [0; 8][..len]);
        }
    }
    for register in [VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DRIVER_FEATURES_SEL] {
        rig.write(register, u32::MAX);
    }
    assert_eq!(rig.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is no such queue");
    rig.write(VIRTIO_MMIO_QUEUE_READY, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NUM, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    assert_eq!(rig.read(VIRTIO_MMIO_STATUS), 15);
    // A storm of notifications is one wake-up.
    for _ in 0..100_000 {
        rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }
    rig.submit();
    rig.wait_for_interrupt(1);
    assert_eq!(rig.get(STATUS), 0);
}

#[test]
fn writeback_is_written_once_it_was_accepted_and_comes_back_with_a_reset() {
    let mut rig = Rig::with(true);
    let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    let writeback = |rig: &Rig| {
        let mut byte = [0xff];
        rig.mmio.read(u64::from(VIRTIO_MMIO_CONFIG) + 32, &mut byte);
        byte[0]
    };
    let switch_off = |rig: &mut Rig| rig.mmio.write(u64::from(VIRTIO_MMIO_CONFIG) + 32, &[0]);
    switch_off(&mut rig);
    assert_eq!(writeback(&rig), 1, "no driver has accepted it");
    rig.negotiate(flush, 1);
    switch_off(&mut rig);
    assert_eq!(writeback(&rig), 1, "this driver has not");
    rig.negotiate(flush | wce, 1);
    assert_eq!((rig.read(VIRTIO_MMIO_STATUS), writeback(&rig)), (11, 1));
    switch_off(&mut rig);
    assert_eq!(writeback(&rig), 0);
    rig.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(writeback(&rig), 1);
    rig.negotiate(wce, 1);
    assert_eq!(writeback(&rig), 0, "this driver cannot flush");
}
