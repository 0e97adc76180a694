//! What is in flight, as it is counted while a disk takes its time.

use std::sync::mpsc::{self, Receiver, Sender};

use blockhouse_block::{BlockBackend, Lane, Pool, PoolLane, Result, Topology};

use super::*;

/// A disk whose reads wait until they are let go on.
struct Waiting {
    disk: MemoryDisk,
    go: Mutex<Receiver<()>>,
}

impl BlockBackend for Waiting {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }
    fn is_writable(&self) -> bool {
        true
    }
    fn topology(&self) -> Topology {
        self.disk.topology()
    }
    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.go.lock().unwrap().recv().unwrap();
        self.disk.read(buffers, offset)
    }
    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.write(buffers, offset)
    }
    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<()> {
        self.disk.write_zeroes(offset, length, may_unmap)
    }
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.disk.discard(offset, length)
    }
    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

/// Looks at the figures when the queue has to wait, and then lets the disk go on.
struct Looking<'a> {
    device: &'a BlockDevice,
    go: Sender<()>,
    found: Vec<u64>,
    ended: bool,
    /// How the driver breaks its queue then, if it does.
    breaks: Option<&'a dyn Fn()>,
}

impl Host for Looking<'_> {
    fn stops(&mut self) -> bool {
        self.ended
    }

    fn interrupt(&mut self) {}

    fn wait(&mut self, _ready: [Option<BorrowedFd<'_>>; 2], in_flight: usize, _longest: Option<Duration>) -> bool {
        let counted = self.device.stats().in_flight;
        if self.found.last() != Some(&counted) {
            self.found.push(counted);
        }
        if self.found.len() == 1 {
            assert_eq!(in_flight, 2);
            if let Some(breaks) = self.breaks.take() {
                breaks();
            }
            (0..2).for_each(|_| self.go.send(()).unwrap());
        }
        self.ended = in_flight == 0;
        std::thread::yield_now();
        true
    }
}

fn look(breaks: bool) -> (Vec<u64>, u64, bool) {
    let (go, wait) = mpsc::channel();
    let disk = Waiting { disk: MemoryDisk::new(64 * 512), go: Mutex::new(wait) };
    let device = Arc::new(BlockDevice::new(Arc::new(disk), &BlockDeviceOptions::default()));
    device.accept_features(FLUSH);
    let mut driver = Driver::new();
    let mut queue = BlockQueue::new(device.clone(), 0, driver.queue(), FLUSH);
    driver.header(VIRTIO_BLK_T_IN, 0);
    driver.chain_in(TABLE, 0, &[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    driver.offer(0);
    driver.offer(0);
    let jump = || driver.set_avail_idx(SIZE + 7);
    let mut host =
        Looking { device: &device, go, found: Vec::new(), ended: false, breaks: breaks.then_some(&jump as &dyn Fn()) };
    let broken = queue.serve(driver.memory.as_ref(), &mut host).is_err();
    (host.found, device.stats().in_flight, broken)
}

#[test]
fn what_is_in_flight_is_counted_while_it_is() {
    let (found, left, broken) = look(false);
    assert!(found == [2, 0] || found == [2, 1, 0], "{found:?}");
    assert_eq!((left, broken), (0, false));
}

#[test]
fn nothing_of_a_queue_that_broke_is_in_flight() {
    let (found, left, broken) = look(true);
    assert_eq!((found.first(), left, broken), (Some(&2), 0, true));
}
