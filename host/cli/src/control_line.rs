//! The lines of the control interface: which command one is, and what is answered. No socket, and no disk of its own.

use blockhouse_block::{Error, ErrorKind, Result};
use blockhouse_sandbox::json;
use serde::{Deserialize, Serialize};

use super::error_report::ErrorReport;
use super::size::parse_size;

/// The longest command, with the end of its line.
pub(crate) const MAX_LINE: usize = 4 << 10;

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

/// A disk as commands reach it.
pub(crate) trait Controlled {
    /// As the log names it: `disk0`.
    fn name(&self) -> String;

    /// Its size in bytes.
    fn capacity(&self) -> u64;

    /// What it is.
    fn status(&self) -> impl Serialize;

    /// The same, with what it did.
    fn metrics(&self) -> impl Serialize;

    /// Makes it larger, and tells the guest: whether it could be told.
    fn grow(&self, size: u64) -> Result<bool>;
}

/// What comes after what was received.
pub(crate) enum Next {
    /// The line of an answer.
    Answer(Vec<u8>),
    /// The line of an answer, after which nothing is understood any more.
    Last(Vec<u8>),
    /// More has to be received.
    Incomplete,
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

/// Takes the first line of what was received, and does what it says.
///
/// # Errors
/// If an answer cannot be written as JSON.
pub(crate) fn next(received: &mut Vec<u8>, disks: &[impl Controlled]) -> serde_json::Result<Next> {
    let Some(end) = received.iter().take(MAX_LINE).position(|byte| *byte == b'\n') else {
        if received.len() < MAX_LINE {
            return Ok(Next::Incomplete);
        }
        let why = format!("a command has {MAX_LINE} bytes at most");
        return line(&invalid::<()>(why)).map(Next::Last);
    };
    let command: Vec<u8> = received.drain(..=end).collect();
    let answer = match serde_json::from_slice(&command) {
        Err(error) => line(&invalid::<()>(format!("not a command: {error}"))),
        Ok(Command::Status {}) => line(&Answer::Result(disks.iter().map(Controlled::status).collect::<Vec<_>>())),
        Ok(Command::Metrics {}) => line(&Answer::Result(disks.iter().map(Controlled::metrics).collect::<Vec<_>>())),
        Ok(Command::Resize { disk, size }) => line(&resize(disks, &disk, &size)),
    };
    answer.map(Next::Answer)
}

fn resize(disks: &[impl Controlled], name: &str, size: &str) -> Answer<Resized> {
    let Some(disk) = disks.iter().find(|disk| disk.name() == name) else {
        let names: Vec<String> = disks.iter().map(Controlled::name).collect();
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
    Answer::Error(ErrorReport::from(&Error::new(ErrorKind::Invalid, why)))
}

fn line(answer: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = json::line(answer)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
    use std::sync::Mutex;

    use serde_json::{Value, json};

    use super::*;

    /// A disk of 8 KiB, which becomes no larger than 1 MiB.
    struct Fake {
        name: &'static str,
        size: Mutex<u64>,
        told: bool,
    }

    impl Controlled for Fake {
        fn name(&self) -> String {
            self.name.to_owned()
        }

        fn capacity(&self) -> u64 {
            *self.size.lock().unwrap()
        }

        fn status(&self) -> impl Serialize {
            json!({ "status of": self.name })
        }

        fn metrics(&self) -> impl Serialize {
            json!({ "metrics of": self.name })
        }

        fn grow(&self, size: u64) -> Result<bool> {
            if size > 1 << 20 {
                return Err(Error::new(ErrorKind::Storage, "no space left").on_image("/images/disk"));
            }
            *self.size.lock().unwrap() = size;
            Ok(self.told)
        }
    }

    fn disks() -> [Fake; 2] {
        [("disk0", false), ("disk1", true)].map(|(name, told)| Fake { name, size: Mutex::new(8192), told })
    }

    fn sizes(disks: &[Fake]) -> Vec<u64> {
        disks.iter().map(Controlled::capacity).collect()
    }

    /// The answer to a line, which is one line.
    fn answer(disks: &[Fake], line: &str) -> Value {
        let mut received = format!("{line}\nmore").into_bytes();
        let Next::Answer(answer) = next(&mut received, disks).unwrap() else { panic!("no answer to {line}") };
        assert_eq!(received, b"more", "the next line was touched");
        let answer = String::from_utf8(answer).unwrap();
        assert_eq!(answer.find('\n'), Some(answer.len() - 1), "{answer:?}");
        serde_json::from_str(&answer).unwrap()
    }

    fn resize(disks: &[Fake], disk: &str, size: &str) -> Value {
        answer(disks, &json!({ "command": "resize", "disk": disk, "size": size }).to_string())
    }

    #[test]
    fn each_command_is_answered_with_what_it_asks_for() {
        let disks = disks();
        let status = answer(&disks, r#"{"command":"status"}"#);
        assert_eq!(status, json!({ "result": [{ "status of": "disk0" }, { "status of": "disk1" }] }));
        let metrics = answer(&disks, r#"{"command":"metrics"}"#);
        assert_eq!(metrics, json!({ "result": [{ "metrics of": "disk0" }, { "metrics of": "disk1" }] }));
    }

    #[test]
    fn the_disk_that_is_named_gets_larger_and_no_other() {
        let disks = disks();
        for (disk, told, before, size, sizes_after) in
            [("disk1", true, 8192, "16K", [8192, 16384]), ("disk0", false, 8192, "12288", [12288, 16384])]
        {
            let expected = json!({ "result": {
                "disk": disk,
                "virtual_size_bytes": parse_size(size).unwrap(),
                "virtual_size_bytes_before": before,
                "told": told,
            } });
            assert_eq!(resize(&disks, disk, size), expected);
            assert_eq!(sizes(&disks), sizes_after);
        }
    }

    #[test]
    fn an_error_is_of_the_kind_that_it_is_and_changes_nothing() {
        let disks = disks();
        for (answer, kind, why) in [
            (answer(&disks, "{}"), "invalid", "not a command"),
            (resize(&disks, "disk2", "16K"), "invalid", "there is no disk \"disk2\"; there is: disk0, disk1"),
            (resize(&disks, "disk", "16K"), "invalid", "there is no disk \"disk\""),
            (resize(&disks, "disk0", "16Q"), "invalid", "is not a size"),
            (resize(&disks, "disk0", "1G"), "storage", "no space left"),
        ] {
            let error = &answer["error"];
            assert_eq!(error["kind"], kind, "{answer}");
            assert!(error["message"].as_str().unwrap().contains(why), "{answer}");
            assert!(answer.get("result").is_none(), "{answer}");
            assert_eq!(error["image"], if kind == "storage" { json!("/images/disk") } else { Value::Null });
        }
        assert_eq!(sizes(&disks), [8192, 8192]);
    }

    /// However it arrives: in parts, with more behind it, or as one piece.
    #[test]
    fn a_line_is_understood_up_to_its_bound() {
        let disks = disks();
        let line = |length: usize| format!("{:width$}\n", r#"{"command":"status"}"#, width = length - 1).into_bytes();
        let longest = line(MAX_LINE);
        for end in [0, 1, MAX_LINE - 1] {
            let mut received = longest.get(..end).unwrap().to_vec();
            assert!(matches!(next(&mut received, &disks), Ok(Next::Incomplete)), "{end}");
            assert_eq!(received.len(), end);
        }
        for more in [&b""[..], b"{", &[b'\n'; MAX_LINE]] {
            let mut received = [&longest, more].concat();
            let Next::Answer(answer) = next(&mut received, &disks).unwrap() else { panic!("it is not answered") };
            assert!(answer.starts_with(b"{\"result\":"));
            assert!(received == more);
        }
        for mut received in [line(MAX_LINE + 1), vec![b' '; MAX_LINE], vec![b' '; 2 * MAX_LINE]] {
            let Next::Last(answer) = next(&mut received, &disks).unwrap() else { panic!("it goes on") };
            assert!(String::from_utf8(answer).unwrap().contains("4096 bytes at most"));
        }
    }
}
