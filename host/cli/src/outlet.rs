//! Where metrics go, a socket that answers whoever connects or a file that is written again and again; and what
//! every such socket has in common.
//!
//! Who connects to the socket is a process of the same user, and may be anything: what it sends is read up to a
//! bound in size and time, what it does not take is dropped, and one is served at a time, so that none can have
//! more of this process than one thread that waits.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context;
use blockhouse_vhost::Listener;
use blockhouse_walls::{Role, Walls};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::attendant;

/// How often a file is written.
const FILE_PERIOD: Duration = Duration::from_secs(5);

/// How long somebody may take to say what is wanted. Who says nothing gets the text.
const ASK_TIME: Duration = Duration::from_secs(1);

/// How long somebody may take to take the answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// The most that is read of a question.
const MAX_QUESTION: usize = 8 << 10;

/// How long the thread may take to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long to wait before another try, if there is no file descriptor left for who connects.
const PAUSE: Duration = Duration::from_millis(200);

/// Where metrics go, as the operator says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MetricsArg {
    /// A Unix socket: a path, or `fd:N`.
    Socket(String),
    /// A file.
    File(PathBuf),
}

impl std::str::FromStr for MetricsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("file:") {
            Some("") => Err("file: is followed by a path, as in file:/run/metrics/vm1.prom".to_owned()),
            Some(path) => Ok(Self::File(path.into())),
            None => Ok(Self::Socket(text.to_owned())),
        }
    }
}

/// Listens at a path, or takes a socket that was passed.
pub(crate) fn listen(socket: &str) -> anyhow::Result<Listener> {
    let Some(number) = socket.strip_prefix("fd:") else {
        return Ok(Listener::bind(Path::new(socket))?.removed_by(attendant::remove));
    };
    let number = number.parse().ok().with_context(|| format!("{socket}: fd: is followed by a number, as in fd:3"))?;
    Ok(Listener::from_fd(number)?)
}

/// Gives the text of the moment.
pub(crate) type Figures = Arc<dyn Fn() -> String + Send + Sync>;

/// Where metrics go, ready for them.
pub(crate) enum Outlet {
    Socket(Listener),
    File(PathBuf),
}

impl Outlet {
    pub(crate) fn open(metrics: &MetricsArg) -> anyhow::Result<Self> {
        match metrics {
            MetricsArg::Socket(socket) => Ok(Self::Socket(listen(socket)?)),
            MetricsArg::File(path) => Ok(Self::File(path.clone())),
        }
    }

    /// Starts the thread that hands out `figures`.
    pub(crate) fn start(self, walls: &Walls, figures: Figures) -> anyhow::Result<Running> {
        match self {
            Self::Socket(listener) => {
                let answer = move |stream: UnixStream, end: &OwnedFd| answer(stream, end, &figures);
                Running::socket("metrics", listener, walls, answer)
            }
            Self::File(path) => {
                let wake = wake_event()?;
                // What is wrong with it is said before a disk is served.
                attendant::write(&path, &figures()).with_context(|| format!("cannot write {}", path.display()))?;
                let stop = Arc::clone(&wake);
                let write = move || {
                    loop {
                        let stopped = is_over_within(&stop, FILE_PERIOD);
                        if let Err(error) = attendant::write(&path, &figures()) {
                            tracing::warn!(file = %path.display(), %error, "cannot write the metrics");
                        }
                        if stopped {
                            break;
                        }
                    }
                };
                let thread = thread::Builder::new().name("metrics".into()).spawn(write);
                let thread = Some(thread.context("cannot start a thread")?);
                Ok(Running { wake, thread, _listener: None })
            }
        }
    }
}

/// A thread that serves the operator. Dropping it ends the thread.
pub(crate) struct Running {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// Dropped last, and not by the thread, which may not remove its name.
    _listener: Option<Arc<Listener>>,
}

impl Running {
    /// Calls `serve` for each who connects, one after the other. The stream does not block; the descriptor can be read
    /// once this is the end, and nobody is served any more.
    pub(crate) fn socket(
        name: &str,
        listener: Listener,
        walls: &Walls,
        mut serve: impl FnMut(UnixStream, &OwnedFd) -> io::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (listener, wake) = (Arc::new(listener), wake_event()?);
        let (listens, stop) = (Arc::clone(&listener), Arc::clone(&wake));
        let begin = walls.thread_start(Role::Operator);
        let run = move || {
            begin();
            while !waits_for(&listens, &stop) {
                match listens.accept() {
                    Ok(Some(stream)) => {
                        if let Err(error) = stream.set_nonblocking(true).and_then(|()| serve(stream, &stop)) {
                            tracing::debug!(%error, "somebody went away without an answer");
                        }
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "nobody can be answered now");
                        thread::sleep(PAUSE);
                    }
                }
            }
        };
        let thread = thread::Builder::new().name(name.into()).spawn(run).context("cannot start a thread")?;
        Ok(Self { wake, thread: Some(thread), _listener: Some(listener) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake a thread");
        }
        let Some(thread) = self.thread.take() else { return };
        // Who is answered can hold it up, by a descriptor on the way to it that takes its time to be closed.
        let began = Instant::now();
        while !thread.is_finished() {
            if began.elapsed() > PATIENCE {
                tracing::error!("the thread that answers the operator is held up, and was left behind");
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        if thread.join().is_err() {
            tracing::error!("the thread that answers the operator panicked");
        }
    }
}

/// Something that stays readable once it was written.
pub(crate) fn wake_event() -> anyhow::Result<Arc<OwnedFd>> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot create an eventfd")?;
    Ok(Arc::new(event))
}

/// Waits for somebody to connect, or for the end: whether it is the end.
fn waits_for(listener: &Listener, stop: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
    let polled = poll(&mut fds, None);
    let [_, stop] = fds;
    polled.is_ok() && stop.revents().contains(PollFlags::IN)
}

/// Waits until something can be done with `fd`, the time is over, or this is the end. Whether it can, and it is not.
fn ready(fd: &impl AsFd, flags: PollFlags, end: &OwnedFd, time: Duration) -> bool {
    let mut fds = [PollFd::new(fd, flags), PollFd::new(end, PollFlags::IN)];
    // An interruption is the end of the time: who asks asks again.
    let polled = poll(&mut fds, Some(&timespec(time)));
    let [fd, end] = fds;
    polled.is_ok() && end.revents().is_empty() && !fd.revents().is_empty()
}

/// Whether this is the end.
pub(crate) fn is_over(end: &OwnedFd) -> bool {
    is_over_within(end, Duration::ZERO)
}

/// Waits for the end, or until the time is over. Whether it is the end.
fn is_over_within(end: &OwnedFd, time: Duration) -> bool {
    poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&timespec(time))).is_ok_and(|count| count > 0)
}

fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 })
}

/// Answers one who connected with metrics: as HTTP if that is what was asked, else the text alone.
fn answer(mut stream: UnixStream, end: &OwnedFd, figures: &Figures) -> io::Result<()> {
    let mut question = Vec::new();
    read_until(&mut stream, end, &mut question, ASK_TIME, MAX_QUESTION, |question| {
        let line = question.iter().position(|byte| *byte == b'\n').and_then(|end| question.get(..end));
        // HTTP ends with an empty line. What is no HTTP is of no interest.
        line.is_some_and(|line| !is_http(line)) || question.ends_with(b"\r\n\r\n") || question.ends_with(b"\n\n")
    })?;
    let text = figures();
    let line = question.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let answer = if is_http(line) {
        let (status, text) = match line.split(|byte| *byte == b' ').collect::<Vec<_>>().as_slice() {
            [b"GET", b"/" | b"/metrics", _] => ("200 OK", text.as_str()),
            [b"GET", ..] => ("404 Not Found", "There is /metrics.\n"),
            _ => ("405 Method Not Allowed", "There is GET /metrics.\n"),
        };
        let length = text.len();
        format!(
            "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{text}"
        )
    } else {
        text
    };
    write_all(&mut stream, end, answer.as_bytes(), ANSWER_TIME)
}

/// Whether this is the first line of an HTTP request.
fn is_http(line: &[u8]) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.len() >= 8 && line.get(line.len() - 8..).is_some_and(|end| end.starts_with(b"HTTP/1."))
}

/// Reads until `complete` says so, the other side has no more, or has used up its time or its room (`most` bytes,
/// or a little more), or `end` can be read.
pub(crate) fn read_until(
    stream: &mut UnixStream,
    end: &OwnedFd,
    question: &mut Vec<u8>,
    time: Duration,
    most: usize,
    complete: impl Fn(&[u8]) -> bool,
) -> io::Result<()> {
    let started = Instant::now();
    let mut part = [0; 1024];
    while question.len() < most && !complete(question) {
        let left = time.saturating_sub(started.elapsed());
        if left.is_zero() || !ready(stream, PollFlags::IN, end, left) {
            return Ok(());
        }
        match stream.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(count) => question.extend_from_slice(part.get(..count).unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of it, or what the other side takes in its time, and at once when `end` can be read.
pub(crate) fn write_all(stream: &mut UnixStream, end: &OwnedFd, mut bytes: &[u8], time: Duration) -> io::Result<()> {
    let started = Instant::now();
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let left = time.saturating_sub(started.elapsed());
                if left.is_zero() || !ready(stream, PollFlags::OUT, end, left) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What somebody gets who sends `question` and then no more.
    fn asked(question: &[u8], text: &str) -> String {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(question).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        ours.set_nonblocking(true).unwrap();
        let text = text.to_owned();
        answer(ours, &wake_event().unwrap(), &(Arc::new(move || text.clone()) as Figures)).unwrap();
        let mut answer = Vec::new();
        // The rest of a question that was not read to its end is an error after the answer.
        let _ = theirs.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn http_is_answered_with_http_and_the_rest_with_text() {
        let http = asked(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "a 1\n");
        assert!(http.starts_with("HTTP/1.0 200 OK\r\n"), "{http}");
        assert!(http.contains("\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: 4\r\n"), "{http}");
        assert!(http.ends_with("\r\n\r\na 1\n"), "{http}");
        assert!(asked(b"GET / HTTP/1.0\n\n", "a 1\n").ends_with("\r\n\r\na 1\n"));
        assert!(asked(b"GET /secret HTTP/1.1\r\n\r\n", "a 1\n").starts_with("HTTP/1.0 404 "));
        assert!(asked(b"POST /metrics HTTP/1.1\r\n\r\n", "a 1\n").starts_with("HTTP/1.0 405 "));
        for question in [&b""[..], b"\n", b"metrics\n", &[0xff; 100], b"GET / HTTP/9", &[b'x'; 100_000]] {
            assert_eq!(asked(question, "a 1\n"), "a 1\n");
        }
        // A request without an end.
        let endless = [&b"GET / HTTP/1.1\r\n"[..], &[b'x'; MAX_QUESTION]].concat();
        assert!(asked(&endless, "a 1\n").ends_with("a 1\n"));
    }

    #[test]
    fn who_does_not_read_is_left() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let end = wake_event().unwrap();
        let error = write_all(&mut ours, &end, &[0; 16 << 20], Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn at_the_end_nobody_is_waited_for() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let end = wake_event().unwrap();
        rustix::io::write(&end, &1_u64.to_ne_bytes()).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        thread::spawn(move || {
            // Whoever waits does so for an hour each.
            let time = Duration::from_secs(3600);
            read_until(&mut ours, &end, &mut Vec::new(), time, MAX_QUESTION, |_| false).unwrap();
            sender.send(write_all(&mut ours, &end, &[0; 16 << 20], time))
        });
        receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap_err();
    }

    #[test]
    fn where_metrics_go() {
        assert_eq!("/run/m".parse(), Ok(MetricsArg::Socket("/run/m".to_owned())));
        assert_eq!("file:/run/m".parse(), Ok(MetricsArg::File("/run/m".into())));
        assert!("file:".parse::<MetricsArg>().is_err());
    }
}
