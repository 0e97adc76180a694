//! Interrupts: none is lost while front ends and back ends come and go, and a line that takes none holds up nobody.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockhouse_tests::client::Client;
use blockhouse_tests::serve::Serve;
use blockhouse_tests::{COMMAND_LIMIT, noise, scratch};
use rustix::fs::{OFlags, fcntl_setfl};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::frontend::{Guest, READ};

const SIZE: usize = 1 << 20;

fn serve(directory: &Path) -> (Serve, PathBuf) {
    let (image, socket) = (directory.join("disk.raw"), directory.join("socket"));
    std::fs::write(&image, noise(1, SIZE)).unwrap();
    let serve = Serve::disk(&socket, &format!("file={},format=raw", image.display()));
    (serve, socket)
}

fn line() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Waits for an interrupt.
#[track_caller]
fn interrupted(line: &EventFd) {
    let started = Instant::now();
    while line.read().is_err() {
        assert!(started.elapsed() < COMMAND_LIMIT, "there was no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// As QEMU does it when its guest goes on: the queue is served before it is said where interrupts go, and what is
/// answered until then would be heard of by nobody. A driver with `VIRTIO_F_EVENT_IDX` would get no other interrupt.
#[test]
fn what_was_answered_before_a_line_was_set_is_told() {
    let directory = scratch();
    let (serve, socket) = serve(directory.path());
    let mut guest = Guest::new();
    let mut frontend = guest.set_up(&socket);
    let nobody = line();
    frontend.set_vring_call(0, &nobody).unwrap();
    guest.prepare(0, READ, 0, &[0; 512]);
    guest.offer(0);
    guest.begin(&mut frontend);
    assert_eq!(guest.wait(1), [(0, 0)]);
    interrupted(&nobody);
    let exchanged = line();
    frontend.set_vring_call(0, &exchanged).unwrap();
    interrupted(&exchanged);
    serve.terminate();
}

/// The back end before may have been killed between an answer and the interrupt.
#[test]
fn who_takes_a_queue_over_interrupts_once() {
    let directory = scratch();
    let (serve, socket) = serve(directory.path());
    let mut guest = Guest::new();
    let frontend = guest.connect(&socket);
    guest.submit(0, READ, 0, &[0; 512]);
    assert_eq!(guest.wait(1), [(0, 0)]);
    drop(frontend);
    serve.kill();
    // Whatever it has heard of, there is nothing in flight.
    guest.call = line();
    let serve = Serve::disk(&socket, &format!("file={},format=raw", directory.path().join("disk.raw").display()));
    let _frontend = guest.connect(&socket);
    interrupted(&guest.call);
    serve.terminate();
}

/// Has the worker of a queue wait for room in a line of interrupts, which nobody makes.
fn held_up(guest: &mut Guest, serve: &Serve) {
    // The first one comes at once.
    interrupted(&guest.call);
    guest.call.write(u64::MAX - 1).unwrap();
    fcntl_setfl(borrowed(&guest.call), OFlags::empty()).unwrap();
    guest.submit(0, READ, 0, &[0; 512]);
    assert_eq!(guest.wait(1), [(0, 0)]);
    // Whoever may not see that it waits, goes on at once.
    let writes = |thread: &Path| {
        let queue = std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.contains("queue"));
        let writes = |call: String| call.starts_with(&format!("{} ", libc::SYS_write));
        queue && std::fs::read_to_string(thread.join("syscall")).map_or(true, writes)
    };
    let started = Instant::now();
    loop {
        let threads = std::fs::read_dir(format!("/proc/{}/task", serve.id())).unwrap();
        if threads.map(|thread| thread.unwrap().path()).any(|thread| writes(&thread)) {
            break;
        }
        assert!(started.elapsed() < COMMAND_LIMIT, "it is not held up");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn borrowed(line: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(line.as_raw_fd()) }
}

#[track_caller]
fn next_is_served(socket: &Path) {
    let (sender, served) = mpsc::channel();
    let socket = socket.to_owned();
    std::thread::spawn(move || sender.send(Client::connect(&socket, 1).read_all()));
    assert_eq!(served.recv_timeout(COMMAND_LIMIT).expect("the next front end is served"), noise(1, SIZE));
}

/// A front end says that its line does not block, and has it block then.
#[test]
fn a_line_that_takes_no_interrupt_holds_up_nobody() {
    let directory = scratch();
    let (serve, socket) = serve(directory.path());
    for exchanged in [false, true] {
        let mut guest = Guest::new();
        let frontend = guest.connect(&socket);
        held_up(&mut guest, &serve);
        if exchanged {
            // Which stops no queue, and must not wait for it.
            frontend.set_vring_call(0, &line()).unwrap();
        }
        // From here on, nobody but the server has the line.
        drop((frontend, guest));
        next_is_served(&socket);
    }
    let mut guest = Guest::new();
    let _frontend = guest.connect(&socket);
    held_up(&mut guest, &serve);
    serve.terminate();
}
