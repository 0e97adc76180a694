//! Standard error: the log, and what people are told. Whoever is to read it may be gone, or have no room for it, or be
//! slow: that ends nothing, and once disks are served it keeps nobody waiting.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use tracing::field::Field;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use crate::output::printable;

/// What a pipe that can be written takes without waiting (`PIPE_BUF` of pipe(7)).
const PIECE: usize = 4096;

/// Nobody waits any more.
static HURRIED: AtomicBool = AtomicBool::new(false);
/// What could not be written, in lines.
static LOST: AtomicU64 = AtomicU64::new(0);

/// The terminal that standard error is, if it is one, by a description of its own that does not block: a terminal says
/// that it can be written when it has room for less than a line, and those who have it as well may want to wait.
static TERMINAL: OnceLock<File> = OnceLock::new();

/// To be called before there are walls.
pub(crate) fn begin() {
    if io::stderr().is_terminal()
        && let Some(terminal) = without_waiting("/proc/self/fd/2")
    {
        // It is called once.
        let _ = TERMINAL.set(terminal);
    }
}

/// A terminal that is open already, once more.
fn without_waiting(terminal: &str) -> Option<File> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(terminal, flags, Mode::empty()).ok().map(File::from)
}

/// From here on a line that cannot be written at once is lost, and how many were is said with the next one that can: a
/// disk does not wait for somebody to read the log.
pub(crate) fn never_wait() {
    HURRIED.store(true, Ordering::Relaxed);
}

/// Writes a line for people.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    log(format!("{text}\n").as_bytes());
}

fn log(line: &[u8]) {
    if !HURRIED.load(Ordering::Relaxed) {
        return put(io::stderr().lock(), &LOST, false, line);
    }
    /// Not that of the standard library, which whoever writes a guest's console has while it waits for a reader.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    match TERMINAL.get() {
        Some(terminal) => put(Raw(terminal), &LOST, true, line),
        None => put(Raw(io::stderr()), &LOST, true, line),
    }
}

/// A file that is written without a lock.
struct Raw<F>(F);

impl<F: AsFd> AsFd for Raw<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl<F: AsFd> Write for Raw<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.0, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an event says, with text out of images escaped as everywhere: its line ends there, and says what it seems to.
pub(crate) fn fields() -> impl for<'writer> FormatFields<'writer> {
    let write = |writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| {
        let text = printable(&format!("{value:?}"));
        if field.name() == "message" { write!(writer, "{text}") } else { write!(writer, "{}={text}", field.name()) }
    };
    debug_fn(write).delimited(" ")
}

/// Where the log goes: no write fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        log(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes one line, or as much of it as there is room for.
fn put(mut to: impl Write + AsFd, lost: &AtomicU64, hurried: bool, line: &[u8]) {
    let written = if hurried {
        let before = lost.load(Ordering::Relaxed);
        let note = format!("blockhouse: {before} lines of the log were lost\n");
        if before > 0 && write_at_once(&mut to, note.as_bytes()) {
            lost.fetch_sub(before, Ordering::Relaxed);
        }
        write_at_once(&mut to, line)
    } else {
        to.write_all(line).is_ok()
    };
    if !written {
        lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes without waiting. Whether all of it was written.
fn write_at_once(to: &mut (impl Write + AsFd), line: &[u8]) -> bool {
    line.chunks(PIECE).all(|piece| has_room(to) && to.write_all(piece).is_ok())
}

fn has_room(to: &impl AsFd) -> bool {
    let mut polled = [PollFd::new(to, PollFlags::OUT)];
    let ready = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    let [polled] = polled;
    ready.is_ok_and(|count| count > 0) && polled.revents().contains(PollFlags::OUT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;

    use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_takes_what_it_has_room_for() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lost = AtomicU64::new(0);
        let line = [&[b'x'; 999][..], b"\n"].concat();
        // Far more than a pipe holds.
        for _ in 0..1000 {
            put(&writer, &lost, true, &line);
        }
        let count = lost.load(Ordering::Relaxed);
        assert!(count > 500, "{count}");
        let mut taken = vec![0; (1000 - usize::try_from(count).unwrap()) * line.len()];
        reader.read_exact(&mut taken).unwrap();
        put(&writer, &lost, true, b"again\n");
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("blockhouse: {count} lines of the log were lost\nagain\n"));
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_line_that_is_longer_than_a_pipe_does_not_wait_either() {
        let (reader, writer) = io::pipe().unwrap();
        let lost = AtomicU64::new(0);
        put(&writer, &lost, true, &vec![b'x'; 1 << 20]);
        assert_eq!(lost.load(Ordering::Relaxed), 1);
        drop(reader);
    }

    /// It has room for a part of a line, and says that it can be written.
    #[test]
    fn a_terminal_that_nobody_reads_does_not_wait_either() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let terminal = without_waiting(name.to_str().unwrap()).unwrap();
        let mut reader = File::from(master.try_clone().unwrap());
        let (sender, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let line = [&[b'x'; PIECE - 1][..], b"\n"].concat();
            let lost_of = |lines: u32| {
                let lost = AtomicU64::new(0);
                (0..lines).for_each(|_| put(Raw(&terminal), &lost, true, &line));
                lost.load(Ordering::Relaxed)
            };
            let many = lost_of(100);
            // So little that not all of a line fits.
            reader.read_exact(&mut [0; 448]).unwrap();
            sender.send((many, lost_of(1)))
        });
        let (many, one) = done.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        assert!(many > 80 && one == 1, "{many} and {one} were lost");
    }

    #[test]
    fn where_nothing_can_be_written_nothing_happens() {
        let lost = AtomicU64::new(0);
        // Not a pipe: what another test starts right now would have its other end.
        let (gone, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        gone.shutdown(std::net::Shutdown::Both).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        for hurried in [false, true] {
            put(&full, &lost, hurried, b"line\n");
            put(&gone, &lost, hurried, b"line\n");
        }
        assert_eq!(lost.load(Ordering::Relaxed), 4);
    }
}
