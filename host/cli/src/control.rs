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
//! makes a disk smaller. One connection is served at a time, and a command at a time; when the process is to end, the
//! command that is being done is the last one.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blockhouse_vhost::Listener;
use blockhouse_walls::Walls;

use crate::control_line::{MAX_LINE, Next, next};
use crate::open_disk::ControlledDisk;
use crate::outlet::{self, Running};

/// What somebody is waited for.
#[derive(Clone, Copy)]
struct Patience {
    /// How long a connection may be silent before it is ended, for others to be served.
    silence: Duration,
    /// How long somebody may take to take an answer.
    answer: Duration,
}

const PATIENCE: Patience = Patience { silence: Duration::from_secs(10), answer: Duration::from_secs(5) };

/// Serves the interface.
pub(crate) fn start(listener: Listener, walls: &Walls, disks: Arc<[ControlledDisk]>) -> anyhow::Result<Running> {
    Running::socket("control", listener, walls, move |stream, end| serve(stream, end, &disks, PATIENCE))
}

/// Answers the commands of one connection, until `end` can be read: whoever talks on does not keep the process.
fn serve(mut stream: UnixStream, end: &OwnedFd, disks: &[ControlledDisk], patience: Patience) -> io::Result<()> {
    let mut received = Vec::new();
    loop {
        let is_line = |bytes: &[u8]| bytes.contains(&b'\n');
        outlet::read_until(&mut stream, end, &mut received, patience.silence, MAX_LINE, is_line)?;
        if outlet::is_over(end) {
            return Ok(());
        }
        match next(&mut received, disks)? {
            Next::Answer(line) => outlet::write_all(&mut stream, end, &line, patience.answer)?,
            Next::Last(line) => return outlet::write_all(&mut stream, end, &line, patience.answer),
            // It ended, or was silent.
            Next::Incomplete => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use std::io::{Read, Write};
    use std::sync::mpsc;

    use super::*;
    use crate::outlet::wake_event;

    /// The answers to what somebody sends who then sends no more.
    fn answers(sent: &[u8]) -> Vec<serde_json::Value> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(sent).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        serve(ours, &wake_event().unwrap(), &[], PATIENCE).unwrap();
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

    /// What becomes of a connection whose other side stays, waited for as long as this.
    fn ended(sent: &[u8], patience: Patience) -> (io::Result<()>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(sent).unwrap();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(serve(ours, &wake_event().unwrap(), &[], patience)));
        // Far longer than it takes.
        (receiver.recv_timeout(Duration::from_secs(60)).unwrap(), theirs)
    }

    #[test]
    fn who_says_no_more_is_left() {
        let patience = Patience { silence: Duration::from_millis(1), ..PATIENCE };
        let (ended, mut theirs) = ended(b"{\"command\":\"status\"}\n{\"command\":", patience);
        ended.unwrap();
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "{\"result\":[]}\n");
    }

    #[test]
    fn at_the_end_who_talks_on_is_left() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(&b"{\"command\":\"status\"}\n".repeat(1000)).unwrap();
        let end = wake_event().unwrap();
        rustix::io::write(&end, &1_u64.to_ne_bytes()).unwrap();
        serve(ours, &end, &[], PATIENCE).unwrap();
        let mut answers = String::new();
        // What was not read of it is an error at the end.
        let _ = theirs.read_to_string(&mut answers);
        assert_eq!(answers, "");
    }

    #[test]
    fn who_takes_no_answer_is_left() {
        let patience = Patience { answer: Duration::from_millis(1), ..PATIENCE };
        // More answers than a socket holds.
        let (ended, _theirs) = ended(&b"{}\n".repeat(20_000), patience);
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
