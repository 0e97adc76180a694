//! A vhost-user client, the same for all servers.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::workload::{Kind, System, Workload, keep_busy};

const QUEUE_SIZE: u16 = 256;

/// The largest request.
const MAX_REQUEST: usize = 1 << 20;

/// The most requests in flight on a queue: each takes three descriptors, since the crate knows no indirect
/// ones, and QEMU's queues have 256.
const MAX_DEPTH: usize = 64;

/// Memory that the server sees, too.
struct Shared {
    base: *mut u8,
    length: usize,
    _file: File,
}

// SAFETY: it is memory of the process, and each queue uses a part of its own.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: it was mapped like this, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base.cast(), self.length) };
    }
}

/// A connection with its queues.
pub(crate) struct Client {
    queues: Vec<Queue>,
    memory: Shared,
    transport: Box<VirtioBlkTransport>,
}

struct Queue {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    /// Requests that the server was not told of.
    quiet: bool,
}

impl Client {
    /// Connects to a server, which may still be starting.
    pub(crate) fn connect(socket: &Path, queues: usize) -> Result<Self> {
        let path = socket.to_str().context("the path of the socket is not UTF-8")?;
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        // A driver that cannot flush has each write made durable before it hears of its end.
        let features = features.bits() | (VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::MQ).bits();
        let begun = Instant::now();
        let transport = loop {
            match VhostUser::new(path, features) {
                Ok(transport) => break transport,
                Err(_) if begun.elapsed() < Duration::from_secs(20) => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error).context("cannot connect to the server"),
            }
        };
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let length = queues * MAX_DEPTH * MAX_REQUEST;
        let file: File = memfd_create("requests", MemfdFlags::CLOEXEC)?.into();
        file.set_len(length as u64)?;
        // SAFETY: a new mapping of a file of that length.
        let base = unsafe {
            mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        transport.map_mem_region(base as usize, length, file.as_raw_fd(), 0).map_err(anyhow::Error::from)?;
        let memory = Shared { base: base.cast(), length, _file: file };
        let set_up = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, QUEUE_SIZE)?;
        let queues = set_up
            .into_iter()
            .enumerate()
            .map(|(index, mut queue)| {
                // The client looks by itself: an interrupt would measure the scheduler.
                queue.set_used_notif_enabled(false);
                Queue { queue, notifier: transport.get_submission_notifier(index), quiet: true }
            })
            .collect();
        Ok(Self { queues, memory, transport })
    }
}

impl Client {
    /// Reads 4 KiB on the first queue, asleep until it is answered: whether it worked. Gives up, with an error, when
    /// `over` says so.
    pub(crate) fn wait_for(&mut self, offset: u64, over: &AtomicBool) -> Result<bool> {
        let queue = self.queues.first_mut().context("there is no queue")?;
        queue.queue.set_used_notif_enabled(true);
        // SAFETY: the memory outlives the connection, and one request at a time has its first 4 KiB.
        unsafe { queue.queue.read_raw(offset, self.memory.base, 4096, 0) }?;
        queue.notifier.notify()?;
        let completion = self.transport.get_completion_fd(0);
        loop {
            if let Some(done) = queue.queue.completions().next() {
                return Ok(done.ret == 0);
            }
            let mut polled = [PollFd::from_borrowed_fd(completion.as_fd(), PollFlags::IN)];
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut polled, Some(&second))? > 0 {
                completion.read()?;
            }
            ensure!(!over.load(Ordering::Relaxed), "nobody waits any more");
        }
    }
}

impl System for Client {
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)> {
        ensure!(workload.queues <= self.queues.len(), "there are not enough queues");
        ensure!(workload.depth <= MAX_DEPTH && workload.size <= MAX_REQUEST, "too much for the memory");
        let memory = &self.memory;
        let results: Vec<Result<(u64, Duration)>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .queues
                .iter_mut()
                .take(workload.queues)
                .enumerate()
                .map(|(index, queue)| {
                    let places = workload.places(index, round);
                    scope.spawn(move || {
                        let buffer = |slot: usize| {
                            let offset = (index * MAX_DEPTH + slot) * MAX_REQUEST;
                            // SAFETY: inside of the mapping, since depth and size are checked above.
                            unsafe { memory.base.add(offset) }
                        };
                        keep_busy(
                            queue,
                            workload.depth,
                            places,
                            limit,
                            |queue, slot, place| {
                                // SAFETY: the memory outlives the connection, and the slot is free.
                                let started = unsafe {
                                    match workload.kind {
                                        Kind::Read => queue.queue.read_raw(place, buffer(slot), workload.size, slot),
                                        Kind::Write => queue.queue.write_raw(place, buffer(slot), workload.size, slot),
                                    }
                                };
                                queue.quiet = false;
                                Ok(started?)
                            },
                            |queue, free| {
                                if !queue.quiet {
                                    queue.quiet = true;
                                    if queue.queue.avail_notif_needed() {
                                        queue.notifier.notify()?;
                                    }
                                }
                                for completion in queue.queue.completions() {
                                    if completion.ret != 0 {
                                        bail!("a request failed with {}", completion.ret);
                                    }
                                    free.push(completion.context);
                                }
                                std::hint::spin_loop();
                                Ok(())
                            },
                        )
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a queue's thread panicked")).collect()
        });
        let mut sum = (0, Duration::ZERO);
        for result in results {
            let (count, took) = result?;
            sum = (sum.0 + count, sum.1.max(took));
        }
        Ok(sum)
    }
}
