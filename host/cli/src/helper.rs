//! A process of this program beside it, started before the walls go up: asked through one pipe, it answers through
//! another one, and ends when the first is let go of.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// The program's side. Dropping it waits for the end of the process.
#[derive(Debug)]
pub(crate) struct Helper {
    child: Child,
    /// `None` once it was let go of.
    ask: Option<ChildStdin>,
    answer: ChildStdout,
}

impl Helper {
    /// Starts this program with these arguments.
    pub(crate) fn start<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> io::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .args(arguments)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (ask, answer) = (child.stdin.take(), child.stdout.take());
        let answer = answer.ok_or_else(|| io::Error::other("it has no standard output"))?;
        Ok(Self { child, ask, answer })
    }

    /// Sends bytes.
    pub(crate) fn ask(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.ask.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(bytes)
    }

    /// Waits for numbers, as [`answer`] sends them.
    pub(crate) fn answer<const COUNT: usize>(&mut self) -> io::Result<[i32; COUNT]> {
        let mut bytes = [[0; size_of::<i32>()]; COUNT];
        self.answer.read_exact(bytes.as_flattened_mut())?;
        Ok(bytes.map(i32::from_le_bytes))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.ask = None;
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "a process beside this one does not end");
        }
    }
}

/// What such a process does first. What the program was started with, a socket that was passed for example, is the
/// program's and closed when it ends. Signals do nothing: what ends the program is heard of through the pipe, and a
/// terminal sends them to all.
pub(crate) fn begin() -> io::Result<()> {
    blockhouse_walls::close_inherited([]);
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

/// Answers the program.
pub(crate) fn answer<const COUNT: usize>(numbers: [i32; COUNT]) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(numbers.map(i32::to_le_bytes).as_flattened()).and_then(|()| out.flush())
}
