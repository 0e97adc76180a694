//! The control interface of `run` and `serve`: commands on a Unix socket, a line of JSON each, a line for an answer.
//!
//! ```text
//!   {"command":"status"}                                 what disks there are
//!   {"command":"metrics"}                                the same, with what they did
//!   {"command":"resize","disk":"disk0","size":"20G"}     a disk gets larger; the guest is told
//!
//!   {"result":...}     or     {"error":{"kind":"invalid","message":"..."}}
//! ```
//!
//! Who may connect is the user of the process (mode 0600). What comes is read up to a bound in size and time; a
//! command can do no more to a disk than the table above says: none opens a file, none takes a name of one, none
//! makes a disk smaller. One connection is served at a time, and a command at a time.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blockhouse_block::Error;
use blockhouse_vhost::Listener;
use blockhouse_walls::Walls;
use serde::{Deserialize, Serialize};

use crate::open_disk::{ControlledDisk, DiskRow};
use crate::outlet::{self, Running};
use crate::output::ErrorReport;
use crate::size::parse_size;

/// The longest command.
const MAX_LINE: usize = 4 << 10;

/// How long a connection may be silent before it is ended, for others to be served.
const SILENCE: Duration = Duration::from_secs(10);

/// How long somebody may take to take an answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    /// What disks there are.
    Status {},
    /// What they did.
    Metrics {},
    /// A disk gets larger.
    Resize {
        /// `disk0` for the first.
        disk: String,
        /// Bytes; K, M, G, T multiply.
        size: String,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Answer<T> {
    Result(T),
    Error(ErrorReport),
}

/// A disk that was given another size.
#[derive(Serialize)]
struct Resized {
    disk: String,
    virtual_size_bytes: u64,
    virtual_size_bytes_before: u64,
    /// Whether the guest, or its machine monitor, could be told.
    told: bool,
}

/// Serves the interface.
pub(crate) fn start(listener: Listener, walls: &Walls, disks: Arc<[ControlledDisk]>) -> anyhow::Result<Running> {
    Running::socket("control", listener, walls, move |stream| serve(stream, &disks))
}

/// Answers the commands of one connection.
fn serve(mut stream: UnixStream, disks: &[ControlledDisk]) -> io::Result<()> {
    let mut received = Vec::new();
    loop {
        outlet::read_until(&mut stream, &mut received, SILENCE, MAX_LINE, |bytes| bytes.contains(&b'\n'))?;
        let Some(end) = received.iter().position(|byte| *byte == b'\n') else {
            if received.len() < MAX_LINE {
                // It ended, or was silent.
                return Ok(());
            }
            let why = format!("a command has {MAX_LINE} bytes at most");
            return answer(&mut stream, &invalid::<()>(why));
        };
        let line: Vec<u8> = received.drain(..=end).collect();
        match serde_json::from_slice(&line) {
            Err(error) => answer(&mut stream, &invalid::<()>(format!("not a command: {error}")))?,
            Ok(Command::Status {}) => {
                let rows: Vec<_> = disks.iter().map(ControlledDisk::status).collect();
                answer(&mut stream, &Answer::Result(rows))?;
            }
            Ok(Command::Metrics {}) => {
                let rows: Vec<DiskRow> = disks.iter().map(ControlledDisk::row).collect();
                answer(&mut stream, &Answer::Result(rows))?;
            }
            Ok(Command::Resize { disk, size }) => answer(&mut stream, &resize(disks, &disk, &size))?,
        }
    }
}

fn resize(disks: &[ControlledDisk], name: &str, size: &str) -> Answer<Resized> {
    let Some(disk) = disks.iter().find(|disk| disk.name() == name) else {
        let names: Vec<String> = disks.iter().map(ControlledDisk::name).collect();
        return invalid(format!("there is no disk {name:?}; there is: {}", names.join(", ")));
    };
    let size = match parse_size(size) {
        Ok(size) => size,
        Err(why) => return invalid(why),
    };
    let before = disk.capacity();
    match disk.grow(size) {
        Ok(told) => {
            tracing::info!(disk = name, before, size, "the disk was made larger");
            let disk = name.to_owned();
            Answer::Result(Resized { disk, virtual_size_bytes: size, virtual_size_bytes_before: before, told })
        }
        Err(error) => {
            tracing::warn!(disk = name, size, "the disk could not be made larger: {error}");
            Answer::Error(ErrorReport::from(&error))
        }
    }
}

fn invalid<T>(why: String) -> Answer<T> {
    Answer::Error(ErrorReport::from(&Error::new(blockhouse_block::ErrorKind::Invalid, why)))
}

fn answer(stream: &mut UnixStream, answer: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    outlet::write_all(stream, &line, ANSWER_TIME)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use std::io::{Read, Write};

    use super::*;

    /// The answers to what somebody sends who then sends no more.
    fn answers(sent: &[u8]) -> Vec<serde_json::Value> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(sent).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        serve(ours, &[]).unwrap();
        let mut text = String::new();
        // What was not read of it is an error at the end.
        let _ = theirs.read_to_string(&mut text);
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn commands_are_answered_in_order() {
        let sent = b"{\"command\":\"status\"}\n{\"command\":\"resize\",\"disk\":\"disk0\",\"size\":\"1G\"}\n";
        let [status, resize] = answers(sent).try_into().unwrap();
        assert_eq!(status["result"], serde_json::json!([]));
        assert!(resize["error"]["message"].as_str().unwrap().contains("no disk \"disk0\""), "{resize}");
    }

    #[test]
    fn what_is_no_command_is_said_and_the_next_one_is_answered() {
        for bad in [
            &b""[..],
            b"status",
            b"{}",
            b"{\"command\":\"reboot\"}",
            b"{\"command\":\"status\",\"more\":1}",
            b"{\"command\":\"resize\",\"disk\":\"disk0\"}",
            b"{\"command\":\"resize\",\"disk\":\"disk0\",\"size\":\"1G\",\"shrink\":true}",
            b"{\"command\":\"resize\",\"disk\":7,\"size\":\"1G\"}",
            b"\xff\xfe\0",
            &b"[".repeat(2000),
        ] {
            let sent = [bad, b"\n{\"command\":\"metrics\"}\n"].concat();
            let [error, metrics] = answers(&sent).try_into().unwrap();
            assert!(error["error"]["message"].as_str().unwrap().starts_with("not a command"), "{error}");
            assert_eq!(metrics["result"], serde_json::json!([]));
        }
    }

    #[test]
    fn a_line_without_an_end_is_cut_off() {
        let [error] = answers(&[b'x'; 3 * MAX_LINE]).try_into().unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains("4096 bytes at most"));
        // What ends early is no command.
        assert!(answers(b"{\"command\":\"status\"}").is_empty());
    }
}
