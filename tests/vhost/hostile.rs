//! Front ends that attack: each is refused with a line in the log that names its message, and the next front
//! end does not notice.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, noise, scratch};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost::VhostBackend;

use crate::frontend::{GUEST_BASE, Guest, READ, USER_BASE, WRITE, negotiate};
use blockhouse_tests::client::Client;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const POSTCOPY_ADVISE: u32 = 28;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const SET_DEVICE_STATE_FD: u32 = 42;

/// Flags of a header: the version, and "answer this".
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// A server with a disk that has content.
struct Victim {
    serve: Serve,
    directory: TempDir,
    content: Vec<u8>,
    /// Log that was judged already.
    judged: usize,
}

impl Victim {
    fn new() -> Self {
        let directory = scratch();
        let content = noise(11, 1 << 20);
        let image = directory.path().join("disk.raw");
        std::fs::write(&image, &content).unwrap();
        let serve = Serve::disk(&directory.path().join("socket"), &format!("file={},format=raw", image.display()));
        Self { serve, directory, content, judged: 0 }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }

    /// A connection on which features were agreed and memory was shared.
    fn connect(&self, guest: &Guest) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        send(&stream, SET_OWNER, &[], &[]);
        // GET_FEATURES, of whose answer the crate's side depends on.
        send(&stream, 1, &[], &[]);
        assert_eq!(answer(&stream).unwrap().0, 1);
        send(&stream, SET_PROTOCOL_FEATURES, &u64s(&[0x0000_b229 | 0x8]), &[]);
        send(&stream, SET_FEATURES, &u64s(&[1 << 32 | 1 << 30]), &[]);
        let table = table(&[(GUEST_BASE, 0x11_0000, USER_BASE, 0)]);
        send(&stream, SET_MEM_TABLE, &table, &[guest.file.as_fd()]);
        stream
    }

    /// The session ends, with `why` in the log, and another one is served.
    #[track_caller]
    fn refuses(&mut self, mut stream: UnixStream, why: &str) {
        // Whatever was answered before: the end comes.
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        assert!(
            !ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
            "{why}: the session goes on"
        );
        self.goes_on();
        let log = self.serve.log();
        assert!(log[self.judged..].contains(why), "{why:?} is not in the log: {}", &log[self.judged..]);
        self.judged = log.len();
    }

    /// A front end that behaves finds the disk as it was.
    #[track_caller]
    fn goes_on(&mut self) {
        let mut client = Client::connect(&self.socket(), 1);
        assert!(client.read(4096, 4096).unwrap() == self.content[4096..8192]);
        assert!(self.serve.is_running());
    }
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// The body of SET_MEM_TABLE: guest address, size, address of the front end, offset.
fn table(regions: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let mut body = u32s(&[u32::try_from(regions.len()).unwrap(), 0]);
    for (guest, size, user, offset) in regions {
        body.extend(u64s(&[*guest, *size, *user, *offset]));
    }
    body
}

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    u32s(&[request, flags, size])
}

fn send(stream: &UnixStream, request: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
    let mut message = header(request, VERSION, u32::try_from(body.len()).unwrap());
    message.extend(body);
    send_raw(stream, &message, files);
}

/// Sends bytes as they are. The other side may be gone already.
fn send_raw(stream: &UnixStream, message: &[u8], files: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    }
    let _sent = sendmsg(stream, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL);
}

/// The next message: request and body. `None` at the end.
fn answer(mut stream: &UnixStream) -> Option<(u32, Vec<u8>)> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; usize::try_from(word(8)).unwrap()];
    stream.read_exact(&mut body).ok()?;
    Some((word(0), body))
}

fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

#[test]
fn messages_that_are_none_end_the_session() {
    let mut victim = Victim::new();
    let guest = Guest::new();
    let big = header(SET_OWNER, VERSION, u32::MAX);
    for (bytes, why) in [
        (noise(12, 12), "ends its session"),
        (noise(13, 4096), "ends its session"),
        (big, "SET_OWNER"),
        (header(999, VERSION, 0), "ends its session"),
        (header(0, VERSION, 0), "ends its session"),
        (header(SET_OWNER, VERSION | REPLY, 0), "SET_OWNER"),
        (header(SET_OWNER, 2, 0), "SET_OWNER"),
        (header(SET_OWNER, VERSION | 0x100, 0), "SET_OWNER"),
        ([header(SET_OWNER, VERSION, 8), u64s(&[0])].concat(), "SET_OWNER"),
        ([header(SET_VRING_NUM, VERSION, 4), u32s(&[0])].concat(), "SET_VRING_NUM"),
        (header(SET_VRING_NUM, VERSION, 0), "SET_VRING_NUM"),
        (header(POSTCOPY_ADVISE, VERSION, 0), "POSTCOPY_ADVISE"),
    ] {
        let stream = victim.connect(&guest);
        send_raw(&stream, &bytes, &[]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        victim.refuses(stream, why);
    }
    // More descriptors than a message can have, whatever it says: nothing of it is skipped, and what follows is not
    // waited for.
    let event = file(0);
    for count in [33, 34, 64] {
        let stream = victim.connect(&guest);
        send(&stream, GET_FEATURES, &[], &vec![event.as_fd(); count]);
        victim.refuses(stream, "GET_FEATURES");
    }
    // Half a header, and half a body.
    for bytes in [vec![1, 0, 0], header(SET_VRING_NUM, VERSION, 8)] {
        let mut stream = victim.connect(&guest);
        stream.write_all(&bytes).unwrap();
        drop(stream);
        victim.goes_on();
    }
    victim.serve.terminate();
}

#[test]
fn memory_that_cannot_be_ends_the_session() {
    let mut victim = Victim::new();
    let guest = Guest::new();
    let memory = file(0x10000);
    let (read_only, _) = (File::open("/proc/self/exe").unwrap(), ());
    let (pipe, _end) = std::io::pipe().unwrap();
    let pipe = OwnedFd::from(pipe);
    let fd = memory.as_fd();
    let page = 0x1000;
    for (regions, files, why) in [
        (vec![], vec![], "SET_MEM_TABLE"),
        (vec![(0, page, 0, 0); 33], vec![fd; 32], "SET_MEM_TABLE"),
        (vec![(0, page, 0, 0)], vec![], "SET_MEM_TABLE"),
        (vec![(0, page, 0, 0)], vec![fd, fd], "SET_MEM_TABLE"),
        (vec![(0, page, 0, 0), (page, page, page, 0)], vec![fd], "SET_MEM_TABLE"),
        (vec![(0, 0, 0, 0)], vec![fd], "SET_MEM_TABLE"),
        (vec![(u64::MAX, page, 0, 0)], vec![fd], "SET_MEM_TABLE"),
        (vec![(0, page, u64::MAX, 0)], vec![fd], "SET_MEM_TABLE"),
        (vec![(0, page, 0, u64::MAX)], vec![fd], "SET_MEM_TABLE"),
        (vec![(0, 1 << 60, 0, 0)], vec![fd], "past the end of its file"),
        (vec![(0, 0x10001, 0, 0)], vec![fd], "past the end of its file"),
        (vec![(0, page, 0, 0x10000)], vec![fd], "past the end of its file"),
        (vec![(0, page, 0, 1)], vec![fd], "not the start of a page"),
        (vec![(0, 2 * page, 0, 0), (page, page, 2 * page, 0)], vec![fd, fd], "overlaps"),
        (vec![(0, 2 * page, 0, 0), (2 * page, page, page, 0)], vec![fd, fd], "overlaps"),
        (vec![(0, page, 0, 0)], vec![pipe.as_fd()], "can be shared memory"),
        (vec![(0, page, 0, 0)], vec![read_only.as_fd()], "ermission denied"),
    ] {
        let stream = victim.connect(&guest);
        send(&stream, SET_MEM_TABLE, &table(&regions), &files);
        victim.refuses(stream, why);
    }
    let single = |guest: u64, size: u64, user: u64| u64s(&[0, guest, size, user, 0]);
    for (request, body, files, why) in [
        (ADD_MEM_REG, single(GUEST_BASE, page, 0), vec![fd], "overlaps"),
        (ADD_MEM_REG, single(0, page, 0), vec![], "ADD_MEM_REG"),
        (ADD_MEM_REG, single(0, page, 0), vec![fd, fd], "ADD_MEM_REG"),
        (ADD_MEM_REG, single(u64::MAX - 1, page, 0), vec![fd], "wraps"),
        (ADD_MEM_REG, u64s(&[0; 4]), vec![fd], "ADD_MEM_REG"),
        (REM_MEM_REG, single(0, page, 0), vec![], "never added"),
    ] {
        let stream = victim.connect(&guest);
        send(&stream, request, &body, &files);
        victim.refuses(stream, why);
    }
    let stream = victim.connect(&guest);
    for index in 0..200 {
        send(&stream, ADD_MEM_REG, &single(0x1_0000_0000 + index * page, page, index * page), &[fd]);
    }
    victim.refuses(stream, "one too many");
    victim.serve.terminate();
}

#[test]
fn rings_that_cannot_be_end_the_session() {
    let mut victim = Victim::new();
    let guest = Guest::new();
    let regular = file(16);
    let (socket, _other) = UnixStream::pair().unwrap();
    let no_fd = 0x100;
    let addresses = |index: u32, flags: u32, parts: [u64; 3]| {
        let [descriptors, used, available] = parts;
        [u32s(&[index, flags]), u64s(&[descriptors, used, available, 0])].concat()
    };
    let inside = USER_BASE + 0x1000;
    for (request, body, files, why) in [
        (SET_VRING_NUM, u32s(&[0, 0]), vec![], "power of two"),
        (SET_VRING_NUM, u32s(&[0, 3]), vec![], "power of two"),
        (SET_VRING_NUM, u32s(&[0, 2048]), vec![], "power of two"),
        (SET_VRING_NUM, u32s(&[0, u32::MAX]), vec![], "power of two"),
        (SET_VRING_NUM, u32s(&[1, 64]), vec![], "there is no queue 1"),
        (SET_VRING_NUM, u32s(&[u32::MAX, 64]), vec![], "there is no queue"),
        (GET_VRING_BASE, u32s(&[7, 0]), vec![], "there is no queue 7"),
        (SET_VRING_BASE, u32s(&[0, 0x10000]), vec![], "SET_VRING_BASE"),
        (SET_VRING_ENABLE, u32s(&[0, 2]), vec![], "SET_VRING_ENABLE"),
        (SET_VRING_ENABLE, u32s(&[64, 1]), vec![], "there is no queue 64"),
        (SET_VRING_ADDR, addresses(0, 1, [inside; 3]), vec![], "was not offered"),
        (SET_VRING_ADDR, addresses(0, 0xff, [inside; 3]), vec![], "SET_VRING_ADDR"),
        (SET_VRING_ADDR, addresses(0, 0, [inside + 1, inside, inside]), vec![], "SET_VRING_ADDR"),
        (SET_VRING_KICK, u64s(&[0]), vec![], "SET_VRING_KICK"),
        (SET_VRING_KICK, u64s(&[no_fd]), vec![], "polled"),
        (SET_VRING_KICK, u64s(&[0]), vec![regular.as_fd()], "no eventfd"),
        (SET_VRING_KICK, u64s(&[200]), vec![regular.as_fd()], "there is no queue 200"),
        (SET_VRING_CALL, u64s(&[0]), vec![socket.as_fd()], "no eventfd"),
        (SET_VRING_CALL, u64s(&[0]), vec![], "SET_VRING_CALL"),
        (SET_VRING_ERR, u64s(&[0]), vec![regular.as_fd(), regular.as_fd()], "SET_VRING_ERR"),
        (SET_FEATURES, u64s(&[u64::MAX]), vec![], "were not offered"),
        (SET_PROTOCOL_FEATURES, u64s(&[u64::MAX]), vec![], "were not offered"),
        (SET_LOG_BASE, u64s(&[4096, 0]), vec![regular.as_fd()], "SET_LOG_BASE"),
        (SET_DEVICE_STATE_FD, u32s(&[0, 7]), vec![regular.as_fd()], "SET_DEVICE_STATE_FD"),
        (SET_BACKEND_REQ_FD, vec![], vec![], "SET_BACKEND_REQ_FD"),
        (SET_BACKEND_REQ_FD, vec![], vec![regular.as_fd()], "SET_BACKEND_REQ_FD"),
        (SET_OWNER, vec![], vec![regular.as_fd()], "SET_OWNER"),
    ] {
        let stream = victim.connect(&guest);
        send(&stream, request, &body, &files);
        victim.refuses(stream, why);
    }
    victim.serve.terminate();
}

/// Rings that lie outside of memory, partly or wholly, are found out when they are to be served.
#[test]
fn rings_outside_of_memory_end_the_session() {
    let mut victim = Victim::new();
    let guest = Guest::new();
    let end = USER_BASE + 0x11_0000;
    let inside = USER_BASE + 0x1000;
    for (descriptors, used, available, why) in [
        (0, inside, inside, "the descriptor table of queue 0"),
        (inside, 0, inside, "the used ring of queue 0"),
        (inside, inside, end, "the available ring of queue 0"),
        (!0xf, inside, inside, "the descriptor table of queue 0"),
        (end - 16, inside, inside, "does not lie in guest memory"),
        (inside, end - 16, inside, "does not lie in guest memory"),
        (inside, inside, end - 16, "does not lie in guest memory"),
    ] {
        let stream = victim.connect(&guest);
        send(&stream, SET_VRING_NUM, &u32s(&[0, 64]), &[]);
        send(&stream, SET_VRING_BASE, &u32s(&[0, 0]), &[]);
        let addresses = [u32s(&[0, 0]), u64s(&[descriptors, used, available, 0])].concat();
        send(&stream, SET_VRING_ADDR, &addresses, &[]);
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        send(&stream, SET_VRING_KICK, &u64s(&[0]), &[kick.as_fd()]);
        send(&stream, SET_VRING_ENABLE, &u32s(&[0, 1]), &[]);
        victim.refuses(stream, why);
    }
    victim.serve.terminate();
}

#[test]
fn memory_for_requests_in_flight_that_cannot_be_ends_the_session() {
    let mut victim = Victim::new();
    let guest = Guest::new();
    let small = file(64);
    let (pipe, _end) = std::io::pipe().unwrap();
    let pipe = OwnedFd::from(pipe);
    let inflight = |size: u64, offset: u64, queues: u16, queue_size: u16| -> Vec<u8> {
        let mut body = u64s(&[size, offset]);
        body.extend(queues.to_ne_bytes());
        body.extend(queue_size.to_ne_bytes());
        body.extend([0; 4]);
        body
    };
    for (request, body, files, why) in [
        (GET_INFLIGHT_FD, inflight(0, 0, 0, 0), vec![], "GET_INFLIGHT_FD"),
        (GET_INFLIGHT_FD, inflight(0, 0, u16::MAX, u16::MAX), vec![], "there can be 64 of 1024"),
        (GET_INFLIGHT_FD, inflight(0, 0, 1, 1025), vec![], "there can be 64 of 1024"),
        (SET_INFLIGHT_FD, inflight(4096, 0, 1, 64), vec![], "SET_INFLIGHT_FD"),
        (SET_INFLIGHT_FD, inflight(64, 0, 1, 64), vec![small.as_fd()], "needs 1088 bytes"),
        (SET_INFLIGHT_FD, inflight(1 << 40, 0, 1, 64), vec![small.as_fd()], "past the end of its file"),
        (SET_INFLIGHT_FD, inflight(1 << 40, u64::MAX, 1, 64), vec![small.as_fd()], "past the end of its file"),
        (SET_INFLIGHT_FD, inflight(1 << 40, 0, 1, 64), vec![pipe.as_fd()], "can be shared memory"),
    ] {
        let stream = victim.connect(&guest);
        send(&stream, request, &body, &files);
        victim.refuses(stream, why);
    }
    victim.serve.terminate();
}

/// Config space has 60 bytes with a meaning; whoever asks for more gets zeroes, an empty answer, or is gone.
#[test]
fn config_space_ends_where_it_ends() {
    let mut victim = Victim::new();
    let guest = Guest::new();
    let config = |offset: u32, size: u32, len: usize| [u32s(&[offset, size, 0]), vec![0; len]].concat();
    let stream = victim.connect(&guest);
    send(&stream, GET_CONFIG, &config(0, 256, 256), &[]);
    let (request, body) = answer(&stream).unwrap();
    assert_eq!((request, body.len()), (GET_CONFIG, 12 + 256));
    assert_eq!(body[12..20], (2048_u64).to_le_bytes(), "1 MiB in sectors");
    assert!(body[12 + 60..].iter().all(|byte| *byte == 0));
    send(&stream, GET_CONFIG, &config(4000, 90, 90), &[]);
    assert_eq!(answer(&stream).unwrap().1[12..], [0; 90]);
    // Nothing there can be written, and nothing happens.
    send(&stream, SET_CONFIG, &[u32s(&[0, 8, 0]), vec![0xff; 8]].concat(), &[]);
    send(&stream, GET_CONFIG, &config(0, 8, 8), &[]);
    assert_eq!(answer(&stream).unwrap().1[12..], (2048_u64).to_le_bytes());
    drop(stream);

    for (request, body, why) in [
        (GET_CONFIG, config(0, 4096, 4080), "GET_CONFIG"),
        (GET_CONFIG, config(0, u32::MAX, 8), "GET_CONFIG"),
        (GET_CONFIG, config(u32::MAX, 8, 8), "GET_CONFIG"),
        (GET_CONFIG, config(0, 0, 0), "GET_CONFIG"),
        (GET_CONFIG, config(0, 8, 4), "GET_CONFIG"),
        (GET_CONFIG, vec![0; 4], "GET_CONFIG"),
        (SET_CONFIG, config(0, u32::MAX, 8), "SET_CONFIG"),
        (SET_CONFIG, config(32, 1, 0), "SET_CONFIG"),
    ] {
        let stream = victim.connect(&guest);
        send(&stream, request, &body, &[]);
        victim.refuses(stream, why);
    }
    victim.serve.terminate();
}

/// A driver that breaks its ring: the front end hears of it on its error line, and can start again.
#[test]
fn a_broken_ring_stops_until_it_is_set_up_again() {
    let victim = Victim::new();
    let mut guest = Guest::new();
    let frontend = guest.connect(&victim.socket());
    guest.submit(0, READ, 8, &[0; 512]);
    assert_eq!(guest.wait(1), [(0, 0)]);
    guest.set_avail_idx(5000);
    guest.kick.write(1).unwrap();
    victim.serve.expect("broke its virtqueue");
    let mut tries = 0;
    while guest.err.read().is_err() {
        tries += 1;
        assert!(tries < 60_000, "the front end did not hear of it");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Where it stopped can be asked for, and from there it goes on.
    let base = frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 1);
    guest.set_avail_idx(1);
    frontend.set_vring_num(0, crate::frontend::SIZE).unwrap();
    frontend.set_vring_base(0, 1).unwrap();
    frontend.set_vring_kick(0, &guest.kick).unwrap();
    guest.submit(1, READ, 8, &[0; 512]);
    assert_eq!(guest.wait(1), [(1, 0)]);
    assert_eq!(guest.data(1, 512), victim.content[4096..4608]);
    drop(frontend);
    victim.serve.terminate();
}

/// Whatever a front end sends again and again: nothing piles up.
#[test]
fn repetition_costs_nothing() {
    let mut victim = Victim::new();
    let mut guest = Guest::new();
    // Nobody has come yet.
    let before = victim.serve.open_files();
    victim.goes_on();
    victim.serve.lets_go(before);
    let mut frontend = guest.connect(&victim.socket());
    for round in 0..200_u16 {
        frontend.set_mem_table(&[guest.region()]).unwrap();
        frontend.set_vring_kick(0, &guest.kick).unwrap();
        frontend.set_vring_call(0, &guest.call).unwrap();
        frontend.set_vring_err(0, &guest.err).unwrap();
        let told = vhost::vhost_user::message::VhostUserInflight::new(0, 0, 1, 64);
        let (_told, _file) = vhost::vhost_user::VhostUserFrontend::get_inflight_fd(&mut frontend, &told).unwrap();
        // And it is served all the time.
        guest.submit(round % 16, WRITE, 8, &victim.content[4096..4608]);
        assert_eq!(guest.wait(1).len(), 1);
    }
    let during = victim.serve.open_files();
    assert!(during < before + 20, "{before} open files became {during}");
    drop(frontend);
    for _ in 0..100 {
        drop(negotiate(&victim.socket()));
    }
    victim.goes_on();
    victim.serve.lets_go(before);
    let needs_reply = NEED_REPLY;
    // A front end that never reads its answers waits by itself.
    let stream = victim.connect(&guest);
    stream.set_nonblocking(true).unwrap();
    let message = header(1, VERSION | needs_reply, 0);
    while (&stream).write(&message).is_ok() {}
    drop(stream);
    victim.goes_on();
    victim.serve.terminate();
}

/// What is read of a socket's path is the disk, whatever came before: nothing of the attacks was written.
#[test]
fn attacks_do_not_write() {
    let victim = Victim::new();
    let guest = Guest::new();
    for seed in 0..50 {
        let stream = victim.connect(&guest);
        let bytes = noise(seed, 64);
        let mut message = header(u32::from(bytes[0] % 45), VERSION, 40);
        message.extend(&bytes[..40]);
        send_raw(&stream, &message, &[guest.file.as_fd()]);
    }
    let image: &Path = &victim.directory.path().join("disk.raw");
    victim.serve.terminate();
    assert!(std::fs::read(image).unwrap() == victim.content);
}

/// A connection whose last close takes half an hour, and the other side of it, which reads nothing.
fn lingering() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    while (&ours).write(&[0; 65536]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&ours, Some(Duration::from_secs(1800))).unwrap();
    (ours, theirs)
}

/// Neither the next front end waits for what was sent and takes its time to be closed, nor the end of the process.
#[test]
fn nobody_waits_for_a_descriptor_to_be_closed() {
    let victim = Victim::new();
    let guest = Guest::new();
    let mut others = Vec::new();
    // One that a message brings and nobody wants, too many, and one that is on the way when a session ends.
    for (message, count) in [
        (SET_VRING_KICK, 1),
        (SET_VRING_CALL, 1),
        (SET_MEM_TABLE, 1),
        (SET_OWNER, 1),
        (SET_BACKEND_REQ_FD, 1),
        (SET_BACKEND_REQ_FD, 2),
        (GET_CONFIG, 40),
        (999, 0),
    ] {
        let (ours, theirs) = lingering();
        let stream = victim.connect(&guest);
        let server = Pid::from_raw(i32::try_from(victim.serve.id()).unwrap()).unwrap();
        // Who closes them last is the server.
        kill_process(server, Signal::STOP).unwrap();
        send(&stream, message, &0_u64.to_ne_bytes(), &vec![ours.as_fd(); count]);
        send(&stream, SET_OWNER, &[], &[ours.as_fd()]);
        drop((ours, stream));
        kill_process(server, Signal::CONT).unwrap();
        others.push(theirs);
        let (sender, served) = std::sync::mpsc::channel();
        let socket = victim.socket();
        std::thread::spawn(move || sender.send(Client::connect(&socket, 1).read(0, 4096)));
        let read = served.recv_timeout(COMMAND_LIMIT).expect("the next front end is served").unwrap();
        assert!(read == victim.content[..4096], "{message}");
    }
    victim.serve.terminate();
    drop(others);
}
