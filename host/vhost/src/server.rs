//! One disk at one socket: front ends come one after the other.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blockhouse_block::BlockBackend;
use blockhouse_virtio::{BlockDevice, BlockDeviceOptions, CacheMode, DeviceStats};
use rustix::event::{PollFd, PollFlags, poll};

use crate::closing::let_go;
use crate::error::{Error, Result};
use crate::handler::Handler;
use crate::lines::{NewsChannel, wake_event};
use crate::listener::Listener;
use crate::session;

/// How long to wait before another try, if there is no file descriptor or thread left for a front end.
const PAUSE: Duration = Duration::from_millis(200);

/// How long a front end may hold up the end of its session once the server is to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// The descriptors of a queue, if nobody says how many: what QEMU and cloud-hypervisor give a disk then. A front end
/// shows its guest what the device said before it says how many there are.
pub const DEFAULT_QUEUE_SIZE: u16 = 128;

/// Serves one disk at one socket.
pub struct Server {
    listener: Listener,
    backend: Arc<dyn BlockBackend>,
    device: Arc<BlockDevice>,
    flushes: bool,
    name: String,
    /// What this server calls itself in memory that front ends keep.
    owner: u64,
    shared: Arc<Shared>,
}

struct Shared {
    stop: AtomicBool,
    wake: OwnedFd,
    /// The front end that is being served.
    session: Mutex<Option<UnixStream>>,
    news: NewsChannel,
}

/// Reaches a [`Server`] from other threads.
#[derive(Clone)]
pub struct Handle(Arc<Shared>, Arc<BlockDevice>);

impl Handle {
    /// Makes [`Server::run`] return: requests in flight are answered, others are left to the next back end.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake a server");
        }
        self.0.end_session();
    }

    /// Tells the front end that the disk has another size. Returns whether one could be told: none may be
    /// there, and not every one wants to know. The next one reads the new size anyway.
    pub fn config_changed(&self) -> bool {
        self.0.news.config_changed()
    }

    /// What the device did for all front ends so far.
    pub fn stats(&self) -> DeviceStats {
        self.1.stats()
    }
}

impl Shared {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn set_session(&self, stream: Option<UnixStream>) {
        let before = mem::replace(&mut *self.session.lock().unwrap_or_else(PoisonError::into_inner), stream);
        // Not under the lock, for which whoever stops the server waits.
        let_go(before);
        // Whoever asked for the end before found no session.
        if self.is_stopped() {
            self.end_session();
        }
    }

    fn end_session(&self) {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = session.as_ref() {
            // If it is down already, so much the better.
            let _down = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Server {
    /// A server for `backend`. Without a [`queue_size`](BlockDeviceOptions::queue_size) in the options it is
    /// [`DEFAULT_QUEUE_SIZE`]. `name` stands for the disk in the log and in the names of threads.
    ///
    /// # Errors
    /// [`Error::Host`] if the system has no file descriptor left.
    pub fn new(
        listener: Listener,
        backend: Arc<dyn BlockBackend>,
        options: &BlockDeviceOptions,
        name: String,
    ) -> Result<Self> {
        let wake = wake_event().map_err(|source| Error::Host { what: "create an eventfd", source })?;
        let shared =
            Shared { stop: AtomicBool::new(false), wake, session: Mutex::default(), news: NewsChannel::default() };
        let queue_size = options.queue_size.or(Some(DEFAULT_QUEUE_SIZE));
        let device = BlockDevice::new(Arc::clone(&backend), &BlockDeviceOptions { queue_size, ..options.clone() });
        let device = Arc::new(device);
        let flushes = !options.read_only && backend.is_writable() && options.cache != CacheMode::Unsafe;
        let owner = RandomState::new().hash_one(std::process::id());
        Ok(Self { listener, backend, device, flushes, name, owner, shared: Arc::new(shared) })
    }

    /// To stop the server with, to tell front ends of another size, and to see what it did.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared), Arc::clone(&self.device))
    }

    /// Serves front ends, one after the other, until [`Handle::stop`]. When this returns, no request is in
    /// flight; the disk is not closed.
    ///
    /// # Errors
    /// [`Error::Host`] if the socket itself fails; [`Error::HeldUp`] if a front end holds up the end for a minute.
    pub fn run(&self) -> Result<()> {
        loop {
            self.wait().map_err(|source| Error::Host { what: "wait for a front end", source })?;
            if self.shared.is_stopped() {
                return Ok(());
            }
            match self.listener.accept() {
                Ok(Some(stream)) => self.session(stream)?,
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(disk = self.name, %error, "a front end cannot be served now");
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Waits for a front end, or to be stopped.
    fn wait(&self) -> io::Result<()> {
        let (listener, wake) = (self.listener.as_fd(), self.shared.wake.as_fd());
        let mut fds =
            [PollFd::from_borrowed_fd(listener, PollFlags::IN), PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Serves one front end. Fails if its session does not end with the server.
    fn session(&self, stream: UnixStream) -> Result<()> {
        match stream.try_clone() {
            Ok(clone) => self.shared.set_session(Some(clone)),
            Err(error) => {
                tracing::error!(disk = self.name, %error, "a front end cannot be served now");
                thread::sleep(PAUSE);
                return Ok(());
            }
        }
        let handler = Handler::new(Arc::clone(&self.device), self.name.clone(), self.owner);
        // A thread of its own, so that a bug in it ends this session alone.
        let (shared, name) = (Arc::clone(&self.shared), self.name.clone());
        let waits_for_storage = Arc::new(AtomicBool::new(false));
        let waits = Arc::clone(&waits_for_storage);
        let (alive, ended) = mpsc::channel();
        let session = move || {
            // Let go of after all else.
            let _alive: Sender<()> = alive;
            let ends = Ends(shared);
            session::serve(stream, handler, &ends.0.news, &name, &waits);
        };
        match thread::Builder::new().name(format!("{}-session", self.name)).spawn(session) {
            Ok(thread) => {
                self.wait_for_session(&ended, &waits_for_storage)?;
                if thread.join().is_err() {
                    tracing::error!(disk = self.name, "a session panicked");
                }
            }
            Err(error) => {
                self.shared.set_session(None);
                tracing::error!(disk = self.name, %error, "a front end cannot be served now");
                thread::sleep(PAUSE);
            }
        }
        // The guest may be gone for good, and never flush.
        if self.flushes
            && let Err(error) = self.backend.flush()
        {
            tracing::error!(disk = self.name, %error, "what a front end left behind may not be durable");
        }
        Ok(())
    }

    /// Waits until `ended` says that a session has ended, for a while only once the server is to stop: a front end can
    /// hold up the thread of its session, by descriptors that take their time to be closed.
    fn wait_for_session(&self, ended: &Receiver<()>, waits_for_storage: &AtomicBool) -> Result<()> {
        let mut held_up = None;
        while ended.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
            if !self.shared.is_stopped() || waits_for_storage.load(Ordering::Acquire) {
                held_up = None;
                continue;
            }
            if held_up.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                return Err(Error::HeldUp);
            }
        }
        Ok(())
    }
}

/// The end of a session, on its own thread: with the connection goes what is on the way in it.
struct Ends(Arc<Shared>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.set_session(None);
    }
}
