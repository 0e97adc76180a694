//! A front end that nobody here wrote: the crate `virtio-driver`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Far longer than anything here takes.
pub const LIMIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Bytes of each request's buffer.
pub const BUFFER: usize = 1 << 20;
/// The most requests at a time.
pub const BUFFERS: usize = 16;
const QUEUE_SIZE: u16 = 128;

/// What a virtio-blk driver of today knows.
const FEATURES: u64 = VirtioFeatureFlags::VERSION_1.bits()
    | VirtioFeatureFlags::RING_EVENT_IDX.bits()
    | VirtioFeatureFlags::RING_INDIRECT_DESC.bits()
    | 0x7fff;

/// A driver of a virtio-blk device, and memory for its requests.
pub struct Client {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: Arc<MmapRegion>,
    log: PathBuf,
}

/// A request on one queue.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Bytes of the disk.
    Read {
        /// In bytes.
        offset: u64,
        /// At most [`BUFFER`].
        len: usize,
    },
    /// Bytes to the disk.
    Write {
        /// In bytes.
        offset: u64,
        /// At most [`BUFFER`] of them.
        data: &'a [u8],
    },
    /// Makes what was written durable.
    Flush,
    /// Says that a part is not needed any more.
    Discard {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
    },
    /// Fills a part with zeroes.
    Zero {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
}

impl Client {
    /// Connects to a server that listens at `socket`, whose log lies beside it.
    pub fn connect(socket: &Path, queues: usize) -> Self {
        let transport = VhostUser::new(socket.to_str().unwrap(), FEATURES).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut queues = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, QUEUE_SIZE).unwrap();
        queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len((BUFFER * BUFFERS) as u64).unwrap();
        let memory = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), BUFFER * BUFFERS).unwrap();
        transport.map_mem_region(memory.as_ptr() as usize, memory.size(), file.as_raw_fd(), 0).unwrap();
        Self { queues, transport, memory: Arc::new(memory), log: socket.with_extension("log") }
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> u64 {
        u64::from(self.transport.get_config().unwrap().capacity) * 512
    }

    /// Features that both sides have.
    pub fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// Has requests executed together on one queue. The results are in their order: what was read, or the
    /// error number.
    pub fn run(&mut self, queue: usize, requests: &[Request<'_>]) -> Vec<Result<Vec<u8>, i32>> {
        assert!(requests.len() <= BUFFERS);
        for (index, request) in requests.iter().enumerate() {
            self.submit(queue, index, *request);
        }
        self.transport.get_submission_notifier(queue).notify().unwrap();
        let mut results: Vec<Option<Result<Vec<u8>, i32>>> = vec![None; requests.len()];
        while results.iter().any(Option::is_none) {
            let fd = self.transport.get_completion_fd(queue);
            let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
            if poll(&mut fds, Some(&LIMIT)).unwrap() == 0 {
                panic!("no answer: {}", std::fs::read_to_string(&self.log).unwrap());
            }
            fd.read().unwrap();
            for completion in self.queues[queue].completions() {
                let data = match requests[completion.context] {
                    Request::Read { len, .. } => {
                        let mut data = vec![0; len];
                        let buffer = self.memory.as_volatile_slice();
                        buffer.read_slice(&mut data, BUFFER * completion.context).unwrap();
                        data
                    }
                    _ => Vec::new(),
                };
                let result = if completion.ret == 0 { Ok(data) } else { Err(-completion.ret) };
                assert!(results[completion.context].replace(result).is_none(), "answered twice");
            }
        }
        results.into_iter().map(Option::unwrap).collect()
    }

    fn submit(&mut self, queue: usize, index: usize, request: Request<'_>) {
        let at = BUFFER * index;
        let buffer = self.memory.as_ptr().wrapping_add(at);
        let queue = &mut self.queues[queue];
        match request {
            Request::Read { offset, len } => {
                assert!(len <= BUFFER);
                // SAFETY: The buffer is inside of memory that is mapped as long as `self` lives, which outlives
                // the request: `run` waits for it.
                unsafe { queue.read_raw(offset, buffer, len, index) }.unwrap();
            }
            Request::Write { offset, data } => {
                assert!(data.len() <= BUFFER);
                self.memory.as_volatile_slice().write_slice(data, at).unwrap();
                // SAFETY: As above.
                unsafe { queue.write_raw(offset, buffer, data.len(), index) }.unwrap();
            }
            Request::Flush => queue.flush(index).unwrap(),
            Request::Discard { offset, len } => queue.discard(offset, len, index).unwrap(),
            Request::Zero { offset, len, unmap } => queue.write_zeroes(offset, len, unmap, index).unwrap(),
        }
    }

    fn one(&mut self, request: Request<'_>) -> Result<Vec<u8>, i32> {
        self.run(0, &[request]).pop().unwrap()
    }

    /// Reads on the first queue, and waits.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        self.one(Request::Read { offset, len })
    }

    /// Writes on the first queue, and waits.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), i32> {
        self.one(Request::Write { offset, data }).map(drop)
    }

    /// Flushes on the first queue, and waits.
    pub fn flush(&mut self) -> Result<(), i32> {
        self.one(Request::Flush).map(drop)
    }

    /// The whole disk.
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut content = Vec::new();
        let capacity = usize::try_from(self.capacity()).unwrap();
        while content.len() < capacity {
            let len = BUFFER.min(capacity - content.len());
            content.extend(self.read(content.len() as u64, len).unwrap());
        }
        content
    }
}
