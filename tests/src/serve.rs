//! `blockhouse serve` as a process of a test.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{COMMAND_LIMIT, blockhouse};

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Serve {
    child: Child,
    log: PathBuf,
}

impl Serve {
    /// Serves a disk, described as for `--disk`, at a socket. Returns once it can be connected to.
    #[track_caller]
    pub fn disk(socket: &Path, fields: &str) -> Self {
        let mut command = blockhouse();
        command.args(["-v", "serve", "--disk", fields, "--socket"]).arg(socket);
        Self::start(&mut command, &socket.with_extension("log"))
    }

    /// Starts a command line that serves, whose standard error is appended to `log`. Returns once everything
    /// can be connected to.
    #[track_caller]
    pub fn start(command: &mut Command, log: &Path) -> Self {
        Self::start_printing(command.stdout(Stdio::null()), log)
    }

    /// As [`start`](Self::start), with standard output where the command line has it.
    #[track_caller]
    pub fn start_printing(command: &mut Command, log: &Path) -> Self {
        let file = File::options().append(true).create(true).open(log).unwrap();
        let before = file.metadata().unwrap().len();
        let child = command.stdin(Stdio::null()).stderr(file).spawn().unwrap();
        let mut serve = Self { child, log: log.to_owned() };
        let started = Instant::now();
        while !serve.log_since(before).contains("is served at") {
            if let Some(status) = serve.child.try_wait().unwrap() {
                panic!("serve ended with {status}: {}", serve.log_since(before));
            }
            assert!(started.elapsed() < COMMAND_LIMIT, "serve does not start: {}", serve.log_since(before));
            std::thread::sleep(Duration::from_millis(2));
        }
        serve
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything that was logged, by earlier servers with the same log too.
    pub fn log(&self) -> String {
        self.log_since(0)
    }

    fn log_since(&self, offset: u64) -> String {
        let log = std::fs::read(&self.log).unwrap();
        String::from_utf8_lossy(&log[usize::try_from(offset).unwrap()..]).into_owned()
    }

    /// Waits for a line of the log that holds `text`.
    #[track_caller]
    pub fn expect(&self, text: &str) {
        let started = Instant::now();
        while !self.log().contains(text) {
            assert!(started.elapsed() < COMMAND_LIMIT, "{text:?} is not in the log: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Open file descriptors of the process.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).unwrap().count()
    }

    /// Waits until not more than `files` are open: whoever hung up is let go of a moment later.
    #[track_caller]
    pub fn lets_go(&self, files: usize) {
        let started = Instant::now();
        while self.open_files() > files {
            assert!(started.elapsed() < COMMAND_LIMIT, "{files} open files have become {}", self.open_files());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Kills the process, as nothing can prevent.
    #[track_caller]
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.wait().signal(), Some(9), "{}", self.log());
    }

    /// Ends the process as a service manager does, which it must do well.
    #[track_caller]
    pub fn terminate(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.log());
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < COMMAND_LIMIT, "serve does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
