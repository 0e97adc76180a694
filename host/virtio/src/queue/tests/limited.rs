//! Queues of a device that has limits. The clock is the test's.

use std::sync::atomic::AtomicU64;

use crate::limit::{Rate, RateLimits};

use super::*;

/// A device with limits, its queue, and the time in milliseconds.
struct Limited {
    device: Arc<BlockDevice>,
    queue: BlockQueue,
    driver: Driver,
    clock: Arc<AtomicU64>,
}

impl Limited {
    fn new(limits: RateLimits) -> Self {
        let clock = Arc::new(AtomicU64::new(0));
        let now = Arc::clone(&clock);
        let limiter = Limiter::with_clock(&limits, move || Duration::from_millis(now.load(Ordering::Relaxed)));
        let disk = Arc::new(MemoryDisk::new(64 * 512));
        let device = Arc::new(BlockDevice::new(disk, &BlockDeviceOptions::default()).with_limiter(limiter));
        let features = FLUSH | DISCARD | ZEROES;
        device.accept_features(features);
        let driver = Driver::new();
        let queue = BlockQueue::new(device.clone(), 0, driver.queue(), features);
        Self { device, queue, driver, clock }
    }

    /// Another queue of the device, with a driver of its own.
    fn beside(&self) -> Self {
        let driver = Driver::new();
        let queue = BlockQueue::new(self.device.clone(), 1, driver.queue(), FLUSH | DISCARD | ZEROES);
        Self { device: self.device.clone(), queue, driver, clock: Arc::clone(&self.clock) }
    }

    /// Has the queue serve: how many were answered, whether it has to wait for its limit, and how many were taken
    /// so far.
    fn serve(&mut self) -> (usize, bool, u16) {
        let mut interrupts = 0;
        let mut host = Until { drained: false, interrupts: &mut interrupts, waits: 0, longest: None };
        self.queue.serve(self.driver.memory.as_ref(), &mut host).unwrap();
        let answered = std::iter::from_fn(|| self.driver.used()).count();
        (answered, host.longest.is_some(), self.queue.position().next_avail)
    }
}

/// Over a limit, requests stay in the queue, and the queue waits for no longer than it has to.
#[test]
fn a_limited_queue_leaves_requests_where_they_are() {
    let requests = Some(Rate { per_second: 1000, burst: 2 });
    let mut limited = Limited::new(RateLimits { requests, bytes: None });
    limited.driver.header(VIRTIO_BLK_T_IN, 0);
    limited.driver.chain_in(TABLE, 0, &[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    for _ in 0..5 {
        limited.driver.offer(0);
    }
    assert_eq!(limited.serve(), (2, true, 2), "the burst");
    assert_eq!(limited.serve(), (0, true, 2));
    limited.clock.store(1, Ordering::Relaxed);
    assert_eq!(limited.serve(), (1, true, 3));
    limited.clock.store(10, Ordering::Relaxed);
    assert_eq!(limited.serve(), (2, false, 5), "nothing is left to wait for");
    assert_eq!(limited.device.stats().limit_waits, 3);
}

/// What one has had, the other has not.
#[test]
fn queues_share_the_limits_of_their_device() {
    let requests = Some(Rate { per_second: 1000, burst: 3 });
    let mut one = Limited::new(RateLimits { requests, bytes: None });
    let mut other = one.beside();
    for limited in [&mut one, &mut other] {
        limited.driver.header(VIRTIO_BLK_T_IN, 0);
        limited.driver.chain_in(TABLE, 0, &[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    }
    one.driver.offer(0);
    (0..5).for_each(|_| other.driver.offer(0));
    assert_eq!(one.serve(), (1, false, 1));
    assert_eq!(other.serve(), (2, true, 2));
    one.driver.offer(0);
    assert_eq!(one.serve(), (0, true, 1));
    one.clock.store(1, Ordering::Relaxed);
    assert_eq!(other.serve(), (1, true, 3));
    assert_eq!(one.serve(), (0, true, 1));
}

/// As many as it has, in bytes, whichever way they go.
#[test]
fn reads_and_writes_cost_their_bytes() {
    for (kind, data) in [(VIRTIO_BLK_T_IN, writable(DATA, 1024)), (VIRTIO_BLK_T_OUT, readable(DATA, 1024))] {
        let bytes = Some(Rate { per_second: 1024 * 1000, burst: 2048 });
        let mut limited = Limited::new(RateLimits { requests: None, bytes });
        limited.driver.header(kind, 0);
        limited.driver.chain_in(TABLE, 0, &[readable(HEADER, 16), data, writable(STATUS, 1)]);
        for _ in 0..6 {
            limited.driver.offer(0);
        }
        // One more when a byte is left of the burst, which a request leaves none of.
        assert_eq!(limited.serve(), (2, true, 2), "type {kind}");
        limited.clock.store(1, Ordering::Relaxed);
        assert_eq!(limited.serve(), (1, true, 3), "type {kind}");
    }
}

/// Else a guest that sends nonsense could have more of the host than one that works.
#[test]
fn what_makes_no_sense_is_paid_for_as_well() {
    let requests = Some(Rate { per_second: 1, burst: 2 });
    let mut limited = Limited::new(RateLimits { requests, bytes: None });
    limited.driver.header(VIRTIO_BLK_T_IN, 0);
    // No place for the status.
    limited.driver.chain_in(TABLE, 0, &[readable(HEADER, 16)]);
    for _ in 0..5 {
        limited.driver.offer(0);
    }
    assert_eq!(limited.serve(), (2, true, 2));
}

/// Bytes are paid for where they are moved, or made zero.
#[test]
fn a_discard_costs_no_bytes_and_zeroes_do() {
    for (kind, served) in [(VIRTIO_BLK_T_DISCARD, (3, false, 3)), (VIRTIO_BLK_T_WRITE_ZEROES, (1, true, 1))] {
        let bytes = Some(Rate { per_second: 512, burst: 512 });
        let mut limited = Limited::new(RateLimits { requests: None, bytes });
        limited.driver.header(kind, 0);
        limited.driver.put(DATA, &ranges(&[(0, 8, 0)]));
        limited.driver.chain_in(TABLE, 0, &[readable(HEADER, 16), readable(DATA, 16), writable(STATUS, 1)]);
        for _ in 0..3 {
            limited.driver.offer(0);
        }
        assert_eq!(limited.serve(), served, "type {kind}");
        assert_eq!(limited.driver.status(), OK);
    }
}
