//! The ways back to the front end: an eventfd per queue for interrupts, one for errors, and a socket for
//! news about the device.
//!
//! All of them were sent by the front end, which keeps the other end and may do anything with it. Nothing
//! here waits for it: a signal that does not fit is dropped, as one is there already. That it does not fit can be
//! seen, but not together with the write; so a front end can make the worker of its queue wait, with the requests that
//! it has in flight, and with it the worker of a queue whose requests wait for one of those. Who stops a worker makes
//! room in the lines of all queues ([`release`](Notifier::release)); who needs the disk alone waits for a while and no
//! longer.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockhouse_virtio::Notifier;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{ReadWriteFlags, preadv2};
use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::BackendReq;

use crate::closing::let_go;
use crate::refusal::{Refusal, Result, refuse};

/// An eventfd that is signalled.
struct Line {
    fd: File,
    /// A write can wait for somebody to read. Without this one can as well, once the front end has changed that.
    blocking: bool,
    /// It is not signalled any more.
    closed: AtomicBool,
}

impl Line {
    fn new(fd: File) -> Result<Self> {
        check_eventfd(&fd)?;
        let blocking = !fcntl_getfl(&fd).map_err(Refusal::because)?.contains(OFlags::NONBLOCK);
        Ok(Self { fd, blocking, closed: AtomicBool::new(false) })
    }

    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    /// Ends a signal that waits for room.
    fn release(&self) {
        if self.has_room() {
            return;
        }
        self.closed.store(true, Ordering::Release);
        // A plain read could wait, for the front end may have read it by now.
        let (here, now) = (u64::MAX, ReadWriteFlags::NOWAIT);
        match preadv2(&self.fd, &mut [IoSliceMut::new(&mut [0; 8])], here, now) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::warn!(%error, "the front end holds up the worker of a queue"),
        }
    }

    fn signal(&self) {
        if self.closed.load(Ordering::Acquire) || (self.blocking && !self.has_room()) {
            return;
        }
        match rustix::io::write(&self.fd, &1_u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::warn!(%error, "cannot signal the front end"),
        }
    }
}

/// An error unless `fd` is an eventfd: anything else may block, or be ready for ever.
pub(crate) fn check_eventfd(fd: &File) -> Result<()> {
    // What has no file system behind it has no file type.
    let status = fstat(fd).map_err(Refusal::because)?;
    let anonymous = FileType::from_raw_mode(status.st_mode) == FileType::Unknown;
    // The name is the certain way to tell, where /proc is mounted.
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    if !anonymous || name.is_ok_and(|name| name.as_os_str() != "anon_inode:[eventfd]") {
        return refuse!("what was sent is no eventfd");
    }
    Ok(())
}

/// The lines of one queue. They may change while its worker runs: a front end exchanges them when its guest masks an
/// interrupt.
#[derive(Default)]
pub(crate) struct Lines {
    call: Exchangeable,
    err: Exchangeable,
    broken: AtomicBool,
}

/// A line that may be exchanged for another one, or for none, while somebody signals it.
#[derive(Default)]
struct Exchangeable(Mutex<Exchange>);

#[derive(Default)]
struct Exchange {
    now: Option<Arc<Line>>,
    /// Those before, as long as a signal is on its way.
    before: Vec<Arc<Line>>,
}

impl Exchangeable {
    fn set(&self, line: Option<Line>) {
        let mut exchange = lock(&self.0);
        let before = std::mem::replace(&mut exchange.now, line.map(Arc::new));
        exchange.before.extend(before);
        // Who signals has it from here, under the lock.
        exchange.before.retain(|line| Arc::strong_count(line) > 1);
    }

    /// Without the lock: whoever exchanges it must not wait for a signal.
    fn signal(&self) {
        let now = lock(&self.0).now.clone();
        if let Some(line) = now {
            line.signal();
        }
    }

    fn release(&self) {
        let exchange = lock(&self.0);
        exchange.now.iter().chain(&exchange.before).for_each(|line| line.release());
    }
}

impl Lines {
    /// Interrupts go to `fd` from now on, or nowhere: then the driver polls.
    pub(crate) fn set_call(&self, fd: Option<File>) -> Result<()> {
        self.call.set(fd.map(Line::new).transpose()?);
        Ok(())
    }

    /// Errors go to `fd` from now on, or nowhere.
    pub(crate) fn set_err(&self, fd: Option<File>) -> Result<()> {
        self.err.set(fd.map(Line::new).transpose()?);
        Ok(())
    }

    /// As at the beginning.
    pub(crate) fn reset(&self) {
        self.call.set(None);
        self.err.set(None);
        self.mend();
    }

    /// Whether a worker gave up.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Whatever was broken was set up anew.
    pub(crate) fn mend(&self) {
        self.broken.store(false, Ordering::Release);
    }
}

/// How a worker reaches the front end of its queue, and who waits for it the lines of all.
#[derive(Clone)]
pub(crate) struct OfQueue {
    own: Arc<Lines>,
    all: Arc<[Arc<Lines>]>,
}

impl OfQueue {
    /// For each of so many queues.
    pub(crate) fn new(queues: u16) -> impl Iterator<Item = Self> {
        let all: Arc<[Arc<Lines>]> = (0..queues).map(|_| Arc::default()).collect();
        (0..all.len()).filter_map(move |index| Some(Self { own: Arc::clone(all.get(index)?), all: Arc::clone(&all) }))
    }
}

impl Deref for OfQueue {
    type Target = Lines;

    fn deref(&self) -> &Lines {
        &self.own
    }
}

impl Notifier for OfQueue {
    fn used(&self) {
        self.own.call.signal();
    }

    fn broken(&self) {
        self.own.broken.store(true, Ordering::Release);
        self.own.err.signal();
    }

    /// A line with room is left as it is: nobody is held up by that.
    fn release(&self) {
        for lines in &*self.all {
            lines.call.release();
            lines.err.release();
        }
    }
}

/// The socket on which a front end hears that config space changed, if it wants to.
///
/// The vhost crate sends no such message, and hides the socket that it was given; so the session looks at
/// the message that brings it before the crate does.
#[derive(Default)]
pub(crate) struct NewsChannel(Mutex<Option<OwnedFd>>);

impl NewsChannel {
    /// News goes to `socket` from now on, or nowhere.
    pub(crate) fn set(&self, socket: Option<OwnedFd>) {
        let before = mem::replace(&mut *lock(&self.0), socket);
        let_go(before);
    }

    /// Says that config space changed. Returns whether somebody was told.
    pub(crate) fn config_changed(&self) -> bool {
        // The header of a message without a body: request, version 1, length 0, in the machine's order.
        let mut message = [0; 12];
        let words = [u32::from(BackendReq::CONFIG_CHANGE_MSG), 1, 0];
        for (to, word) in message.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let channel = lock(&self.0);
        let Some(socket) = channel.as_ref() else {
            return false;
        };
        match send(socket.as_fd(), &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == message.len() => true,
            Ok(_) | Err(_) => {
                tracing::warn!("the front end could not be told that the disk has another size");
                false
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd of our own that says "stop" for ever once it was signalled.
pub(crate) fn wake_event() -> io::Result<OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn value(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    fn lines() -> OfQueue {
        OfQueue::new(1).next().unwrap()
    }

    /// A request of one queue can wait for one of another, whose worker is the one that is held up.
    #[test]
    fn who_waits_for_one_queue_makes_room_for_all() {
        let [first, second]: [_; 2] = OfQueue::new(2).collect::<Vec<_>>().try_into().ok().unwrap();
        let theirs = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        second.set_call(Some(theirs.try_clone().unwrap().into())).unwrap();
        second.used();
        first.release();
        second.used();
        assert_eq!(value(&theirs), 2, "a line with room stays open");
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).unwrap();
        let (held_up, went_on) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            second.used();
            held_up.send(())
        });
        let started = std::time::Instant::now();
        while went_on.recv_timeout(std::time::Duration::from_millis(10)).is_err() {
            assert!(started.elapsed() < std::time::Duration::from_secs(60), "it is held up");
            first.release();
        }
    }

    #[test]
    fn signals_arrive_and_a_full_line_stops_nobody() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let theirs = eventfd(0, flags).unwrap();
            let lines = lines();
            lines.used();
            lines.set_call(Some(theirs.try_clone().unwrap().into())).unwrap();
            lines.used();
            lines.used();
            assert_eq!(value(&theirs), 2);
            rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            lines.used();
            assert_eq!(value(&theirs), u64::MAX - 1);
            lines.set_call(None).unwrap();
            lines.used();
            rustix::io::write(&theirs, &1_u64.to_ne_bytes()).unwrap();
            assert_eq!(value(&theirs), 1);
        }
    }

    #[test]
    fn a_broken_queue_is_signalled_and_remembered() {
        let theirs = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let lines = lines();
        lines.set_err(Some(theirs.try_clone().unwrap().into())).unwrap();
        assert!(!lines.is_broken());
        lines.broken();
        assert!(lines.is_broken());
        assert_eq!(value(&theirs), 1);
        lines.mend();
        assert!(!lines.is_broken());
    }

    #[test]
    fn only_eventfds_are_lines() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let (pipe, _write) = std::io::pipe().unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        for fd in [OwnedFd::from(socket), pipe.into(), tempfile::tempfile().unwrap().into(), epoll] {
            assert!(Lines::default().set_call(Some(fd.into())).is_err());
        }
    }

    #[test]
    fn news_is_a_message_without_a_body() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = NewsChannel::default();
        assert!(!channel.config_changed());
        channel.set(Some(ours.into()));
        assert!(channel.config_changed());
        let mut message = [0; 12];
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        // Nobody reads: sooner or later it is full, and says so instead of waiting.
        assert!((0..1_000_000).any(|_| !channel.config_changed()));
        drop(theirs);
        assert!(!channel.config_changed());
    }
}
