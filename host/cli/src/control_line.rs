//! The lines of the control interface: which command one is, and what is answered. No socket, and no disk of its own.

use blockhouse_block::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::error_report::ErrorReport;
use super::size::parse_size;

/// The longest command.
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
    let Some(end) = received.iter().position(|byte| *byte == b'\n') else {
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
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    Ok(line)
}
