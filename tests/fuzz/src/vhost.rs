//! A vhost-user back end, with a front end that may be anything: messages by the rules and against them, in any order,
//! files that are not what they should be, and a guest that writes to its memory and kicks.
//!
//! Whatever comes: the disk is asked for what lies inside of it, and a read-only one is not changed; memory that no
//! message named stays as it is; each question is answered by the rules; and the end of the session leaves nothing in
//! flight, no descriptor and no memory behind. The next front end is served as if nothing had been.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use blockhouse_block::{BlockBackend, Lane, LaneRequest, Topology, VolatileSlice};
use blockhouse_vhost::fuzzing::serve;
use blockhouse_virtio::{BlockDevice, BlockDeviceOptions};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::say;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// The last that there is.
const GET_SHMEM_CONFIG: u32 = 44;

/// Flags of a header: the version, and "acknowledge this".
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
/// In the place of a queue's number: no descriptor comes with it.
const NO_FD: u64 = 1 << 8;

/// Feature bits: VERSION_1 and the one that stands for protocol features; protocol features: all that are offered.
const FEATURES: u64 = 1 << 32 | 1 << 30;
const PROTOCOL: u64 = 0xb229;

const PAGE: u64 = 4096;
/// Guest memory: four pages for each queue, for descriptors, the rings and data; and some more.
const PAGES: u64 = 16;
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000_0000;
const QUEUES: u16 = 2;
/// Descriptors of a queue.
const SIZE: u16 = 16;
/// What no back end should write.
const CANARY: u8 = 0xc5;

/// Bytes of the disk.
const CAPACITY: usize = 16 << 10;
/// How long to wait for what comes at once, on a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(20);

/// The name of the memory, by which it is found if it stays.
const MEMORY: &str = "fuzz-guest";

/// A disk that does everything at once.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    writable: bool,
    /// What it was asked for and should not have been.
    wrong: Mutex<Option<String>>,
}

impl Disk {
    /// Notes what is wrong. A thread that panics costs a disk, and the front end would not hear why.
    fn note(&self, right: bool, what: &str) {
        if !right {
            self.wrong.lock().unwrap().get_or_insert_with(|| what.to_owned());
        }
    }

    fn with(&self, offset: u64, length: u64, action: impl FnOnce(&mut [u8])) -> blockhouse_block::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        let range = usize::try_from(offset).ok().zip(offset.checked_add(length).and_then(|end| end.try_into().ok()));
        let part = range.and_then(|(start, end): (usize, usize)| bytes.get_mut(start..end));
        self.note(part.is_some(), "outside of the disk");
        action(part.unwrap_or_default());
        Ok(())
    }
}

fn total(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl BlockBackend for Disk {
    fn capacity(&self) -> u64 {
        CAPACITY as u64
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 512, optimal_io_size: 4096 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> blockhouse_block::Result<()> {
        self.with(offset, total(buffers), |mut bytes| {
            for buffer in buffers {
                let (part, rest) = bytes.split_at_mut(buffer.len().min(bytes.len()));
                buffer.copy_from(part);
                bytes = rest;
            }
        })
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> blockhouse_block::Result<()> {
        self.note(self.writable, "a read-only disk is written");
        self.with(offset, total(buffers), |mut bytes| {
            for buffer in buffers {
                let (part, rest) = bytes.split_at_mut(buffer.len().min(bytes.len()));
                buffer.copy_to(part);
                bytes = rest;
            }
        })
    }

    fn flush(&self) -> blockhouse_block::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> blockhouse_block::Result<()> {
        self.note(self.writable, "a read-only disk is made zero");
        self.with(offset, length, |bytes| bytes.fill(0))
    }

    fn discard(&self, offset: u64, length: u64) -> blockhouse_block::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    fn lane(self: Arc<Self>) -> blockhouse_block::Result<Box<dyn Lane>> {
        Ok(Box::new(ShortLane { disk: self, ended: Vec::new() }))
    }
}

/// A lane on which each request has ended when it was started.
struct ShortLane {
    disk: Arc<Disk>,
    ended: Vec<(u64, blockhouse_block::Result<()>)>,
}

impl std::fmt::Debug for ShortLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a lane with {} requests", self.ended.len())
    }
}

impl Lane for ShortLane {
    unsafe fn start(&mut self, request: &LaneRequest<'_>) {
        self.ended.push((request.token, request.run(&*self.disk)));
    }

    unsafe fn start_by(&mut self, backend: Arc<dyn BlockBackend>, request: &LaneRequest<'_>) {
        self.ended.push((request.token, request.run(&*backend)));
    }

    fn submit(&mut self) {}

    fn complete(&mut self, each: &mut dyn FnMut(u64, blockhouse_block::Result<()>)) {
        self.ended.drain(..).for_each(|(token, result)| each(token, result));
    }

    fn in_flight(&self) -> usize {
        self.ended.len()
    }

    fn ready(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [None, None]
    }

    fn acknowledge(&mut self) {}
}

/// A message: its code, its body, and what comes with it.
struct Message {
    code: u32,
    body: Vec<u8>,
    files: Vec<OwnedFd>,
}

fn message(code: u32, words: &[u64]) -> Message {
    Message { code, body: words.iter().flat_map(|word| word.to_ne_bytes()).collect(), files: Vec::new() }
}

impl Message {
    fn with(mut self, file: &impl AsFd) -> Self {
        self.files.push(duplicate(file));
        self
    }
}

fn duplicate(file: &impl AsFd) -> OwnedFd {
    file.as_fd().try_clone_to_owned().expect("a descriptor")
}

/// The words of a message that has words of 32 bits, in pairs.
fn pair(first: u32, second: u32) -> u64 {
    u64::from_ne_bytes([first.to_ne_bytes(), second.to_ne_bytes()].concat().try_into().unwrap())
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("a descriptor")
}

/// What came back.
struct Answer {
    code: u32,
    body: Vec<u8>,
    file: Option<OwnedFd>,
}

/// A front end.
struct Front {
    stream: UnixStream,
    memory: File,
    kicks: [OwnedFd; QUEUES as usize],
    calls: [OwnedFd; QUEUES as usize],
    avail: [u16; QUEUES as usize],
    /// The memory for requests in flight that the back end made.
    inflight: Option<(Vec<u8>, File)>,
    /// Pages that a message named.
    named: [bool; PAGES as usize],
}

impl Front {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let memory = File::from(memfd_create(MEMORY, MemfdFlags::CLOEXEC).expect("a file in memory"));
        memory.write_all_at(&[CANARY; (PAGES * PAGE) as usize], 0).expect("a file in memory");
        let events = || [event(), event()];
        let (kicks, calls) = (events(), events());
        Self { stream, memory, kicks, calls, avail: [0; 2], inflight: None, named: [false; PAGES as usize] }
    }

    fn send(&self, bytes: &[u8], files: &[OwnedFd]) {
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        }
        // The other side may have ended the session.
        let _sent = retry_on_intr(|| sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL));
    }

    fn say(&self, message: &Message, flags: u32) {
        let Message { code, body, files } = message;
        say!("message {code}, flags {flags:#x}, {} files, {body:x?}", files.len());
        let header = [*code, VERSION | flags, body.len() as u32].map(u32::to_ne_bytes).concat();
        self.send(&[&header, body.as_slice()].concat(), files);
    }

    /// The next answer, or nothing if the session has ended.
    fn hear(&mut self) -> Option<Answer> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        // The fuzzer has an alarm.
        let received =
            retry_on_intr(|| recvmsg(&self.stream, &mut [IoSliceMut::new(&mut header)], &mut control, flags));
        match received {
            Ok(received) if received.bytes == header.len() => {}
            Ok(received) if received.bytes > 0 => panic!("a part of a header"),
            Err(rustix::io::Errno::AGAIN) => panic!("the session hangs"),
            Ok(_) | Err(_) => return None,
        }
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        let [code, flags, size] = [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap()));
        assert_eq!(flags & 7, 5, "version 1, and an answer");
        assert!(size <= 4096, "an answer of {size} bytes");
        let mut body = vec![0; size as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some(Answer { code, body, file })
    }

    /// Says something and waits until it is done. Whether the session goes on.
    fn settle_after(&mut self, message: &Message, flags: u32) -> bool {
        self.say(message, flags);
        self.settle(Some(message))
    }

    /// Waits until all that was said is done. Whether the session goes on.
    fn settle(&mut self, asked: Option<&Message>) -> bool {
        self.say(&message(GET_FEATURES, &[]), 0);
        let mut answered = false;
        while let Some(answer) = self.hear() {
            say!("answer to {}: {:x?}", answer.code, answer.body);
            match asked {
                Some(asked) if asked.code == answer.code && !answered => {
                    answered = true;
                    self.judge(asked, answer);
                }
                _ => {
                    assert_eq!((answer.code, answer.body.len()), (GET_FEATURES, 8), "an answer to nothing");
                    let features = u64::from_ne_bytes(answer.body.try_into().unwrap());
                    assert_eq!(features & FEATURES, FEATURES);
                    // This was the question, and there is one more answer.
                    if asked.is_none_or(|asked| asked.code != GET_FEATURES) || answered {
                        return true;
                    }
                }
            }
        }
        false
    }

    /// Whether this is an answer to that.
    fn judge(&mut self, asked: &Message, answer: Answer) {
        let Answer { code, body, file } = answer;
        let word = |at: usize| body.get(at..at + 4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
        match code {
            GET_QUEUE_NUM => assert_eq!(body, u64::from(QUEUES).to_ne_bytes()),
            GET_VRING_BASE => assert!(body[..4] == asked.body[..4] && word(4) <= Some(0xffff), "{body:?}"),
            GET_CONFIG if body.len() > 12 => {
                assert!(body[..12] == asked.body[..12] && body.len() == asked.body.len(), "{body:?}");
                if word(0) == Some(0) && body.len() >= 20 {
                    assert_eq!(body[12..20], (CAPACITY as u64 / 512).to_le_bytes());
                }
            }
            GET_INFLIGHT_FD => {
                let size = u64::from_ne_bytes(body[..8].try_into().unwrap());
                let file = File::from(file.expect("memory comes with its file"));
                assert_eq!(file.metadata().expect("a file in memory").len(), size);
                assert!(size <= 16 << 20, "{size} bytes for requests in flight");
                self.inflight = Some((body, file));
            }
            _ => {}
        }
    }

    fn region(&mut self, guest: u64, length: u64, user: u64, offset: u64) -> [u64; 4] {
        for (page, named) in (0..).zip(&mut self.named) {
            *named |= offset < (page + 1) * PAGE && offset.saturating_add(length) > page * PAGE;
        }
        [guest, length, user, offset]
    }

    /// Has all of these pages as its memory, where each of them belongs.
    fn share(&mut self, first: u64, count: u64) -> Message {
        let at = first * PAGE;
        let region = self.region(GUEST + at, count * PAGE, USER + at, at);
        message(SET_MEM_TABLE, &[&[pair(1, 0)], &region[..]].concat()).with(&self.memory)
    }

    /// Sets a queue up, with its parts from this page on.
    fn set_up(&self, queue: u16, page: u64) -> Vec<Message> {
        let at = usize::from(queue);
        let index = u32::from(queue);
        let user = USER + page * PAGE;
        vec![
            message(SET_VRING_NUM, &[pair(index, SIZE.into())]),
            message(SET_VRING_ADDR, &[index.into(), user, user + 2 * PAGE, user + PAGE, 0]),
            message(SET_VRING_BASE, &[pair(index, self.avail[at].into())]),
            message(SET_VRING_CALL, &[index.into()]).with(&self.calls[at]),
            message(SET_VRING_KICK, &[index.into()]).with(&self.kicks[at]),
            message(SET_VRING_ENABLE, &[pair(index, 1)]),
        ]
    }

    /// Says what every front end says first. Whether the session goes on.
    fn greet(&mut self) -> bool {
        self.say(&message(SET_OWNER, &[]), 0);
        if !self.settle(None) {
            return false;
        }
        // The rings begin empty.
        for queue in 0..u64::from(QUEUES) {
            self.put(4 * queue * PAGE, &[0; 3 * PAGE as usize]);
        }
        for message in
            [message(SET_PROTOCOL_FEATURES, &[PROTOCOL]), message(SET_FEATURES, &[FEATURES]), self.share(0, 8)]
        {
            self.say(&message, 0);
        }
        true
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.region(0, bytes.len() as u64, 0, at);
        self.memory.write_all_at(bytes, at).expect("a file in memory");
    }

    /// Makes a request of a header, data and a status available, and kicks.
    fn request(&mut self, queue: u16, kind: u32, sector: u64, length: u32, flags: [u16; 3]) {
        let base = 4 * PAGE * u64::from(queue);
        let data = base + 3 * PAGE;
        self.put(data, &[u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat());
        self.put(data + 16, &[0xee]);
        let parts = [(data, 16), (data + 512, length), (data + 16, 1)];
        for (number, ((at, length), flags)) in (0..).zip(parts.into_iter().zip(flags)) {
            let next = number as u16 + 1;
            let descriptor =
                u128::from(GUEST + at) | u128::from(length) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
            self.put(base + 16 * number, &descriptor.to_le_bytes());
        }
        let avail = &mut self.avail[usize::from(queue)];
        let slot = u64::from(*avail % SIZE);
        *avail = avail.wrapping_add(1);
        let index = avail.to_le_bytes();
        self.put(base + PAGE + 4 + 2 * slot, &[0, 0]);
        self.put(base + PAGE + 2, &index);
        self.kick(queue);
    }

    fn kick(&self, queue: u16) {
        // If it is full, it is signalled.
        let _signalled = rustix::io::write(&self.kicks[usize::from(queue)], &1_u64.to_ne_bytes());
    }

    fn check(&self) {
        let mut bytes = vec![0; (PAGES * PAGE) as usize];
        self.memory.read_exact_at(&mut bytes, 0).expect("a file in memory");
        for (page, named) in bytes.chunks(PAGE as usize).zip(self.named) {
            assert!(named || page == [CANARY; PAGE as usize], "memory was written that was not shared");
        }
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=5u8)? {
        0 => u.arbitrary()?,
        1 => u64::MAX - u64::from(u.arbitrary::<u16>()?),
        2 => 1 << u.int_in_range(0..=63)?,
        3 => u.arbitrary::<u16>()?.into(),
        _ => PAGE * u.int_in_range(0..=PAGES + 1)?,
    })
}

fn index(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? { u.arbitrary() } else { u.int_in_range(0..=u32::from(QUEUES)) }
}

/// Something that comes with a message.
fn some_file(u: &mut Unstructured<'_>, front: &Front) -> Result<OwnedFd> {
    Ok(match u.int_in_range(0..=9u8)? {
        0..=3 => duplicate(&front.memory),
        4 | 5 => duplicate(&front.kicks[0]),
        6 => eventfd(u.arbitrary()?, EventfdFlags::CLOEXEC).expect("a descriptor"),
        7 => std::io::pipe().expect("descriptors").0.into(),
        8 => UnixStream::pair().expect("descriptors").0.into(),
        _ => {
            let file = memfd_create(MEMORY, MemfdFlags::CLOEXEC).expect("a file in memory");
            // Nobody has written to it: it takes no memory.
            rustix::fs::ftruncate(&file, 1 << u.int_in_range(0..=40)?).expect("a file in memory");
            file
        }
    })
}

fn some_region(u: &mut Unstructured<'_>, front: &mut Front) -> Result<[u64; 4]> {
    if u.ratio(1, 4)? {
        let (guest, length, user, offset) = (number(u)?, number(u)?, number(u)?, number(u)?);
        return Ok(front.region(guest, length, user, offset));
    }
    let first = PAGE * u.int_in_range(0..=PAGES - 1)?;
    // A page more than there is, at most.
    let length = PAGE * u.int_in_range(1..=PAGES + 1 - first / PAGE)?;
    let offset = if u.arbitrary()? { first } else { PAGE * u.int_in_range(0..=PAGES - 1)? };
    Ok(front.region(GUEST + first, length, USER + first, offset))
}

fn some_message(u: &mut Unstructured<'_>, front: &mut Front) -> Result<Message> {
    let mut message = match u.int_in_range(0..=15u8)? {
        0 => {
            let count = u.int_in_range(0..=4u32)?;
            let mut words = vec![pair(if u.ratio(1, 8)? { u.arbitrary()? } else { count }, 0)];
            for _ in 0..count {
                words.extend(some_region(u, front)?);
            }
            let mut table = message(SET_MEM_TABLE, &words);
            for _ in 0..count {
                table.files.push(some_file(u, front)?);
            }
            table
        }
        1 => {
            let region = some_region(u, front)?;
            let code = if u.arbitrary()? { ADD_MEM_REG } else { REM_MEM_REG };
            let mut change = message(code, &[&[0], &region[..]].concat());
            if code == ADD_MEM_REG || u.ratio(1, 4)? {
                change.files.push(some_file(u, front)?);
            }
            change
        }
        2 => message(SET_VRING_NUM, &[pair(index(u)?, *u.choose(&[0, 1, 3, 16, 1024, 2048, u32::MAX])?)]),
        3 => {
            let mut address = || Ok(if u.ratio(1, 4)? { number(u)? } else { USER + number(u)? % ((PAGES + 1) * PAGE) });
            let (table, used, avail) = (address()?, address()?, address()?);
            message(SET_VRING_ADDR, &[pair(index(u)?, u.int_in_range(0..=1)?), table, used, avail, 0])
        }
        4 => message(SET_VRING_BASE, &[pair(index(u)?, u.arbitrary()?)]),
        5 => message(GET_VRING_BASE, &[pair(index(u)?, 0)]),
        6 => {
            let code = *u.choose(&[SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR])?;
            let without = if u.ratio(1, 4)? { NO_FD } else { 0 };
            let mut line = message(code, &[u64::from(index(u)?) | without]);
            if without == 0 {
                line.files.push(some_file(u, front)?);
            }
            line
        }
        7 => message(SET_VRING_ENABLE, &[pair(index(u)?, u.int_in_range(0..=2)?)]),
        8 => {
            let (offset, size) = (*u.choose(&[0, 0, 8, 59, 60, 255, 256, 4095, u32::MAX])?, u.int_in_range(0..=70)?);
            let code = if u.arbitrary()? { GET_CONFIG } else { SET_CONFIG };
            let mut config = message(code, &[pair(offset, size)]);
            config.body.extend(u.int_in_range(0..=2u32)?.to_ne_bytes());
            config.body.resize(12 + size as usize, u.arbitrary()?);
            config
        }
        9 => {
            let queues: u16 = if u.ratio(1, 4)? { u.arbitrary()? } else { QUEUES };
            let size: u16 = if u.ratio(1, 4)? { u.arbitrary()? } else { SIZE };
            let mut asked = message(GET_INFLIGHT_FD, &[number(u)?, number(u)?]);
            asked.body.extend([queues.to_ne_bytes(), size.to_ne_bytes()].concat());
            asked
        }
        10 => {
            let (mut body, file) = match &front.inflight {
                Some((body, file)) => (body.clone(), duplicate(file)),
                None => (vec![0; 20], some_file(u, front)?),
            };
            if u.ratio(1, 4)? {
                let at = u.choose_index(body.len())?;
                body[at] = u.arbitrary()?;
            }
            Message { code: SET_INFLIGHT_FD, body, files: vec![file] }
        }
        11 => message(SET_FEATURES, &[if u.arbitrary()? { FEATURES } else { FEATURES ^ 1 << u.int_in_range(0..=63)? }]),
        12 => message(SET_PROTOCOL_FEATURES, &[if u.arbitrary()? { PROTOCOL } else { u.arbitrary()? }]),
        13 => message(RESET_DEVICE, &[]),
        14 => {
            let socket = UnixStream::pair().expect("descriptors").0;
            message(SET_BACKEND_REQ_FD, &[]).with(&socket)
        }
        _ => {
            let mut any = message(u.int_in_range(0..=GET_SHMEM_CONFIG + 1)?, &[]);
            let length = u.int_in_range(0..=48usize)?.min(u.len());
            any.body = u.bytes(length)?.to_vec();
            any
        }
    };
    if u.ratio(1, 16)? {
        for _ in 0..u.int_in_range(1..=34)? {
            message.files.push(some_file(u, front)?);
        }
    }
    Ok(message)
}

/// Plays a front end until the input ends.
fn play(u: &mut Unstructured<'_>, front: &mut Front) -> Result<()> {
    if u.ratio(7, 8)? {
        if !front.greet() {
            return Ok(());
        }
        if u.ratio(7, 8)? {
            front.set_up(0, 0).iter().for_each(|message| front.say(message, 0));
        }
    }
    for _ in 0..24 {
        if u.is_empty() {
            break;
        }
        match u.int_in_range(0..=11u8)? {
            0 => {
                let queue = u.int_in_range(0..=QUEUES - 1)?;
                let page = if u.arbitrary()? { 4 * u64::from(queue) } else { u.int_in_range(0..=PAGES - 1)? };
                let mut messages = front.set_up(queue, page);
                if u.arbitrary()? {
                    let at = u.choose_index(messages.len())?;
                    messages.remove(at);
                }
                messages.iter().for_each(|message| front.say(message, 0));
            }
            1..=3 => {
                let queue = u.int_in_range(0..=QUEUES - 1)?;
                let kind = *u.choose(&[0, 0, 1, 1, 4, 8, 11, 13, 77])?;
                let sector = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=CAPACITY as u64 / 512)? };
                let length = if u.ratio(1, 8)? { u.arbitrary()? } else { 512 * u.int_in_range(0..=4)? };
                let data = if matches!(kind, 0 | 8) { NEXT | WRITE } else { NEXT };
                let mut flags = [NEXT, data, WRITE];
                if u.ratio(1, 8)? {
                    flags[u.choose_index(3)?] = u.arbitrary()?;
                }
                say!("request {kind} at {sector} of {length} bytes");
                front.request(queue, kind, sector, length, flags);
            }
            4 => {
                let at = u.int_in_range(0..=PAGES * PAGE - 17)?;
                // A canary stays.
                if front.named[(at / PAGE) as usize] && front.named[((at + 16) / PAGE) as usize] {
                    let length = u.int_in_range(1..=16usize)?.min(u.len());
                    front.put(at, u.bytes(length)?);
                }
                front.kick(u.int_in_range(0..=QUEUES - 1)?);
            }
            5 => {
                if let Some((_, file)) = &front.inflight {
                    let length = file.metadata().expect("a file in memory").len();
                    let at = u.int_in_range(0..=length.saturating_sub(16))?;
                    let count = u.int_in_range(1..=16usize)?.min(u.len());
                    file.write_all_at(u.bytes(count)?, at).expect("it has that size");
                }
            }
            6 if u.ratio(1, 8)? => {
                // What is no message, or not all of one: nothing that comes later can be understood.
                let length = u.int_in_range(0..=64usize)?.min(u.len());
                front.send(u.bytes(length)?, &[]);
                return Ok(());
            }
            7 => {
                let first = u.int_in_range(0..=PAGES - 1)?;
                let count = if u.arbitrary()? { PAGES - first } else { u.int_in_range(1..=PAGES + 1 - first)? };
                let table = front.share(first, count);
                if !front.settle_after(&table, 0) {
                    return Ok(());
                }
            }
            _ => {
                let message = some_message(u, front)?;
                let acknowledge = if u.ratio(1, 4)? { NEED_REPLY } else { 0 };
                if !front.settle_after(&message, acknowledge) {
                    return Ok(());
                }
            }
        }
    }
    front.settle(None);
    Ok(())
}

/// A front end that keeps to the rules reads the first sectors.
fn play_well(front: &mut Front, disk: &Disk) {
    assert!(front.greet(), "the next front end is sent away");
    front.set_up(0, 0).iter().for_each(|message| front.say(message, 0));
    assert!(front.settle(None), "the next front end is sent away");
    front.request(0, 0, 0, 1024, [NEXT, NEXT | WRITE, WRITE]);
    let patience = Timespec::try_from(PATIENCE).expect("seconds");
    // An interrupt may come for nothing: whether something ended is in the ring.
    let mut used = [0; 2];
    while u16::from_le_bytes(used) == 0 {
        let mut answered = [PollFd::new(&front.calls[0], PollFlags::IN)];
        let count = retry_on_intr(|| poll(&mut answered, Some(&patience)));
        assert!(count == Ok(1), "the next front end is not served");
        let _taken = rustix::io::read(&front.calls[0], &mut [0; 8]);
        front.memory.read_exact_at(&mut used, 2 * PAGE + 2).expect("a file in memory");
    }
    let mut bytes = vec![0; 512 + 1024];
    front.memory.read_exact_at(&mut bytes, 3 * PAGE).expect("a file in memory");
    assert_eq!(bytes[16], 0, "the status of a read");
    assert!(bytes[512..] == disk.bytes.lock().unwrap()[..1024], "the next front end reads something else");
}

/// Serves a front end to its end.
fn session(device: &Arc<BlockDevice>, play: impl FnOnce(&mut Front)) {
    let (ours, theirs) = UnixStream::pair().expect("descriptors");
    let mut front = Front::new(ours);
    thread::scope(|scope| {
        let served = scope.spawn(|| serve(theirs, device, "fuzz"));
        let played = catch_unwind(AssertUnwindSafe(|| play(&mut front)));
        let _ended = front.stream.shutdown(Shutdown::Write);
        // What was found is said once the session has ended: it would wait for more, and this scope for it.
        played.unwrap_or_else(|found| resume_unwind(found));
        while front.hear().is_some() {}
        served.join().expect("a session does not panic");
    });
    assert_eq!(device.stats().in_flight, 0, "something is in flight after the end");
    front.check();
}

/// How long it may take until all is closed.
const CLOSING: Duration = Duration::from_secs(10);

/// Descriptors without a name in the file system: sockets, eventfds and memory.
fn descriptors() -> usize {
    let all = std::fs::read_dir("/proc/self/fd").expect("/proc is mounted");
    let names = all.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    names.filter(|name| !name.is_absolute() || name.starts_with("/memfd:")).count()
}

pub(crate) fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let writable = u.arbitrary().unwrap_or_default();
    let content = (0..CAPACITY).map(|at| (at / 512) as u8 ^ 0x5a).collect();
    let disk = Arc::new(Disk { bytes: Mutex::new(content), writable, wrong: Mutex::default() });
    let backend: Arc<dyn BlockBackend> = Arc::clone(&disk) as _;
    let options = BlockDeviceOptions { queues: QUEUES, poll: Duration::ZERO, ..BlockDeviceOptions::default() };
    let device = Arc::new(BlockDevice::new(backend, &options));
    let before = descriptors();
    // One front end after the other, as long as there is something for it to do.
    for _ in 0..4 {
        session(&device, |front| {
            let _input_ends = play(&mut u, front);
        });
        if u.is_empty() {
            break;
        }
    }
    session(&device, |front| play_well(front, &disk));
    // Sockets are closed on threads of their own. Others of this process may have let some go.
    let ended = Instant::now();
    while descriptors() > before && ended.elapsed() < CLOSING {
        thread::sleep(Duration::from_millis(1));
    }
    let after = descriptors();
    assert!(after <= before, "{after} descriptors, and {before} before");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc is mounted");
    assert!(!maps.contains(MEMORY) && !maps.contains("blockhouse-inflight"), "memory stays");
    let wrong = disk.wrong.lock().unwrap().take();
    assert_eq!(wrong, None);
}
