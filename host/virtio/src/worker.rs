//! The thread that serves one queue, for every transport.
//!
//! ```text
//!  guest ──kick──▶ Worker ── BlockQueue ──▶ disk
//!                    │
//!                    └─▶ Notifier: used (an interrupt), broken (the device waits for a reset)
//! ```
//!
//! The kick is an eventfd that somebody else may hold as well, and perhaps read or fill: a worker only
//! waits for it to change, and hears that it has to stop through an eventfd of its own.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vm_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::queue::{BlockQueue, Host, Position};

/// The event that the worker waits for when it names the lane of its queue.
const LANE: u64 = 1;

/// What each thread of a device calls before it looks at a queue: to lower its own rights.
#[derive(Clone, Default)]
pub struct Beginning(Option<Arc<dyn Fn() + Send + Sync>>);

impl Beginning {
    /// Calls `begin` on each thread.
    pub fn with(begin: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(begin)))
    }

    /// Calls it on this thread.
    pub fn call(&self) {
        if let Some(begin) = &self.0 {
            begin();
        }
    }
}

impl fmt::Debug for Beginning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Beginning(set)" } else { "Beginning(none)" })
    }
}

/// How a worker reaches the driver. Called from the worker's thread; must not block, unless [`release`](Self::release)
/// ends that.
pub trait Notifier: Send + Sync + 'static {
    /// There is something in the used ring that the driver wants to hear of.
    fn used(&self);

    /// The queue can go no further until the device is reset (section 2.1.2): the driver broke it, or
    /// the worker died. Called once at most.
    fn broken(&self);

    /// The worker is to end, and has not for a while: if it is held up in one of the other calls, it is not from now
    /// on. Called from another thread, time and again until it has ended.
    fn release(&self) {}
}

/// A queue being served by a thread of its own. Dropping it stops the thread, as [`stop`](Self::stop) does.
pub struct Worker {
    shared: Arc<Shared>,
    notifier: Arc<dyn Notifier>,
    thread: Option<JoinHandle<Position>>,
    /// Nothing ever comes out of it: it is disconnected when the thread ends.
    ended: Mutex<Receiver<()>>,
}

struct Shared {
    stop: AtomicBool,
    /// With `stop`: what was taken by another process is done first.
    finish: AtomicBool,
    /// The driver is to be told, whatever it wants to hear of.
    tell: AtomicBool,
    wake: EventFd,
}

/// How long a worker may take to end before it is looked at whether its notifier holds it up.
const PATIENCE: Duration = Duration::from_millis(20);

impl Worker {
    /// Serves `queue`, at once and whenever `kick` (an eventfd) is signalled. What is in it is never read.
    ///
    /// `name` is that of the thread.
    ///
    /// # Errors
    /// If the system has no thread or no file descriptor left, or `kick` cannot be waited for.
    pub fn start<M>(
        name: String,
        mut queue: BlockQueue,
        memory: M,
        kick: impl AsRawFd + Send + 'static,
        notifier: Arc<dyn Notifier>,
    ) -> io::Result<Self>
    where
        M: Deref<Target: GuestMemory<Bitmap = ()> + Sized> + Send + 'static,
    {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        // Edge-triggered: who waits for changes need not read, and so cannot be made to block.
        for fd in [kick.as_raw_fd(), wake.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0))?;
        }
        let [stop, finish, tell] = [false; 3].map(AtomicBool::new);
        let shared = Arc::new(Shared { stop, finish, tell, wake });
        let (alive, ended) = mpsc::channel();
        let thread = {
            let (shared, notifier) = (Arc::clone(&shared), Arc::clone(&notifier));
            thread::Builder::new().name(name).spawn(move || {
                // Let go of after all else.
                let _alive: Sender<()> = alive;
                let _watch = Watch(notifier.as_ref());
                queue.device().begin_thread();
                let mut host =
                    Waiting { shared: &shared, epoll, notifier: notifier.as_ref(), hears_lane: false, timer: None };
                // The device has logged what went wrong.
                if queue.serve(&*memory, &mut host).is_err() {
                    notifier.broken();
                }
                // It is waited for as long as the thread is there.
                drop(kick);
                queue.position()
            })?
        };
        Ok(Self { shared, notifier, thread: Some(thread), ended: Mutex::new(ended) })
    }

    /// Has the driver be told of completions, whether or not there are any: for whoever cannot know what it has heard
    /// of. With `VIRTIO_F_EVENT_IDX`, a driver that has missed an interrupt gets no other one (section 2.7.7).
    pub fn tell(&self) {
        self.shared.tell.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// Stops the thread. When this returns, no request is in flight any more: nothing of this queue
    /// touches guest memory or the disk.
    ///
    /// Returns where the queue stopped, or nothing if the worker died.
    pub fn stop(mut self) -> Option<Position> {
        self.join()
    }

    /// As [`stop`](Self::stop), once everything is done that another process had taken ([`BlockQueue::recorded`]): what
    /// comes before the position that is returned is answered then, without a look at the record.
    pub fn finish(mut self) -> Option<Position> {
        self.shared.finish.store(true, Ordering::Release);
        self.join()
    }

    fn join(&mut self) -> Option<Position> {
        let thread = self.thread.take()?;
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        while ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            self.notifier.release();
        }
        let position = thread.join().ok();
        if position.is_none() {
            tracing::error!("the worker of a queue panicked");
        }
        position
    }
}

impl Shared {
    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "cannot wake the worker of a queue");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join();
    }
}

/// Tells the driver if a worker dies, so that it does not wait for an answer for ever.
struct Watch<'a>(&'a dyn Notifier);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.broken();
        }
    }
}

/// The worker's thread, as its queue sees it.
struct Waiting<'a> {
    shared: &'a Shared,
    epoll: Epoll,
    notifier: &'a dyn Notifier,
    /// Whether the descriptors of the lane are waited for.
    hears_lane: bool,
    /// Made when the queue first waits for a time.
    timer: Option<TimerFd>,
}

impl Waiting<'_> {
    /// Has the next wait end after this time. Returns how long it may take if no timer can be had: a number of
    /// milliseconds, or -1.
    fn set_timer(&mut self, time: Duration) -> i32 {
        let mut set = || -> io::Result<()> {
            let timer = match &mut self.timer {
                Some(timer) => timer,
                none => {
                    let timer = TimerFd::new()?;
                    // Edge-triggered: it need not be read.
                    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
                    self.epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
                    none.insert(timer)
                }
            };
            // A time of zero would be none.
            Ok(timer.reset(time.max(Duration::from_nanos(1)), None)?)
        };
        match set() {
            Ok(()) => -1,
            Err(error) => {
                tracing::warn!(%error, "no timer for a limit");
                i32::try_from(time.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
            }
        }
    }
}

impl Host for Waiting<'_> {
    fn stops(&mut self) -> bool {
        if self.shared.tell.load(Ordering::Relaxed) && self.shared.tell.swap(false, Ordering::Acquire) {
            self.interrupt();
        }
        self.shared.stop.load(Ordering::Acquire)
    }

    fn finishes(&mut self) -> bool {
        self.shared.finish.load(Ordering::Acquire)
    }

    fn interrupt(&mut self) {
        self.notifier.used();
    }

    fn wait(&mut self, ready: [Option<BorrowedFd<'_>>; 2], _in_flight: usize, longest: Option<Duration>) -> bool {
        if !self.hears_lane {
            for fd in ready.iter().flatten() {
                // Until it is read, not once: what has ended stays to be taken.
                let event = EpollEvent::new(EventSet::IN, LANE);
                if let Err(error) = self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event) {
                    tracing::error!(%error, "cannot wait for a disk");
                }
            }
            self.hears_lane = true;
        }
        let mut events = [EpollEvent::default(); 4];
        let timeout = longest.map_or(-1, |time| self.set_timer(time));
        match self.epoll.wait(timeout, &mut events) {
            Ok(count) => events.iter().take(count).any(|event| event.data() == LANE),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) => {
                tracing::error!(%error, "cannot wait for a queue");
                // Slow, but without a thread that spins.
                thread::sleep(Duration::from_millis(10));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

    use std::sync::mpsc;

    use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

    use super::*;
    use crate::device::{BlockDevice, BlockDeviceOptions};
    use crate::driver::{DATA, Driver, HEADER, MemoryDisk, STATUS, readable, writable};

    #[derive(Debug, PartialEq, Eq)]
    enum Said {
        Used,
        Broken,
    }

    struct Channel(mpsc::SyncSender<Said>);

    impl Notifier for Channel {
        fn used(&self) {
            self.0.send(Said::Used).unwrap();
        }

        fn broken(&self) {
            self.0.send(Said::Broken).unwrap();
        }
    }

    /// A worker, its kick, and what it says.
    fn worker(driver: &Driver) -> (Worker, EventFd, mpsc::Receiver<Said>) {
        let device = BlockDevice::new(Arc::new(MemoryDisk::new(4096)), &BlockDeviceOptions::default());
        let queue = BlockQueue::new(Arc::new(device), 0, driver.queue(), 0);
        // Whoever reads it when there is nothing in it waits until there is.
        let kick = EventFd::new(0).unwrap();
        let (sender, receiver) = mpsc::sync_channel(64);
        let worker = Worker::start(
            "queue".into(),
            queue,
            Arc::clone(&driver.memory),
            kick.try_clone().unwrap(),
            Arc::new(Channel(sender)),
        );
        (worker.unwrap(), kick, receiver)
    }

    fn submit(driver: &mut Driver) {
        driver.header(VIRTIO_BLK_T_IN, 0);
        driver.submit(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    }

    /// Far longer than anything here takes.
    const LIMIT: Duration = Duration::from_secs(60);

    /// Where it stopped. Fails, rather than wait for ever, if it is held.
    fn stop(worker: Worker) -> Option<Position> {
        let (sender, stopped) = mpsc::channel();
        thread::spawn(move || sender.send(worker.stop()));
        stopped.recv_timeout(LIMIT).expect("the worker does not stop")
    }

    #[test]
    fn requests_are_served_at_the_start_and_at_each_kick() {
        let mut driver = Driver::new();
        submit(&mut driver);
        let (worker, kick, said) = worker(&driver);
        assert_eq!(said.recv_timeout(LIMIT), Ok(Said::Used), "what was there at the start");
        for _ in 0..20 {
            submit(&mut driver);
            kick.write(1).unwrap();
            assert_eq!(said.recv_timeout(LIMIT), Ok(Said::Used));
        }
        assert_eq!(worker.stop(), Some(Position { next_avail: 21, next_used: 21 }));
        assert_eq!(said.try_iter().count(), 0);
    }

    /// Others hold the kick: they may read it as soon as it is signalled, or leave it signalled for ever. A
    /// kick that is read away may be lost; the worker is not.
    #[test]
    fn a_kick_that_others_read_or_fill_cannot_hold_a_worker() {
        const SERVED: u16 = 20;
        const KICKS: u64 = 1000;
        let mut driver = Driver::new();
        let (first, kick, said) = worker(&driver);
        for _ in 0..SERVED {
            submit(&mut driver);
            kick.write(1).unwrap();
            assert_eq!(said.recv_timeout(LIMIT), Ok(Said::Used));
        }
        // All of them are still there for who reads.
        let all = u64::from(SERVED) + KICKS;
        let (sender, all_read) = mpsc::channel();
        let other = kick.try_clone().unwrap();
        thread::spawn(move || {
            let mut read = 0;
            while read < all {
                read += other.read().unwrap();
            }
            sender.send(read)
        });
        for _ in 0..KICKS {
            kick.write(1).unwrap();
        }
        assert_eq!(stop(first), Some(Position { next_avail: SERVED, next_used: SERVED }));
        // What the worker had read would be missing, and waited for.
        assert_eq!(all_read.recv_timeout(LIMIT), Ok(all));
        assert_eq!(said.try_iter().count(), 0);

        let mut driver = Driver::new();
        let (second, kick, said) = worker(&driver);
        submit(&mut driver);
        kick.write(u64::MAX - 1).unwrap();
        assert_eq!(said.recv_timeout(LIMIT), Ok(Said::Used));
        assert_eq!(stop(second), Some(Position { next_avail: 1, next_used: 1 }));
    }

    #[test]
    fn a_broken_queue_is_said_once_and_served_no_more() {
        let mut driver = Driver::new();
        let (worker, kick, said) = worker(&driver);
        driver.set_avail_idx(1000);
        kick.write(1).unwrap();
        assert_eq!(said.recv_timeout(LIMIT), Ok(Said::Broken));
        submit(&mut driver);
        kick.write(1).unwrap();
        assert_eq!(worker.stop(), Some(Position { next_avail: 0, next_used: 0 }));
        assert_eq!(said.try_iter().count(), 0);
    }
}
