//! `blockhouse control`: commands for a running `run` or `serve`.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use blockhouse_block::{Error, ErrorKind};
use blockhouse_sandbox::json;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use crate::control_line::Command;
use crate::log;
use crate::output::{self, printable, size};

/// How long an answer may take before it is said what it waits for.
const USUAL_TIME: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// What went wrong over there is an error here, of the same kind.
const KINDS: [ErrorKind; 7] = [
    ErrorKind::Corrupt,
    ErrorKind::Unsupported,
    ErrorKind::Denied,
    ErrorKind::Invalid,
    ErrorKind::Storage,
    ErrorKind::Component,
    ErrorKind::Limit,
];

/// Speak with a running `blockhouse run` or `serve`
///
/// It was started with --control SOCKET. Whoever may connect to that socket can make its disks larger and see
/// what they do, and nothing else.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  blockhouse control --socket /run/vm1.control status
  blockhouse control --socket /run/vm1.control resize disk0 40G
      The guest is told, and sees the new size at once where its driver listens
      (Linux does).
  blockhouse control --socket /run/vm1.control metrics

The socket takes commands as lines of JSON and answers each with a line:
  {\"command\":\"resize\",\"disk\":\"disk0\",\"size\":\"40G\"}
One who connects is served at a time; others wait until it has gone.

An error of a disk ends this program with the exit code that it has in other
commands: 5 if the image cannot be resized, for example.")]
pub(crate) struct Args {
    /// The socket that was given with --control
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,

    /// Print the answer as JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show the disks
    Status,
    /// Show what the disks did, as JSON
    Metrics,
    /// Make a disk larger
    Resize {
        /// The disk: disk0 is the first
        disk: String,
        /// Its size in bytes; K, M, G, T multiply
        size: String,
    },
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let command = match &args.action {
        Action::Status => Command::Status {},
        Action::Metrics => Command::Metrics {},
        Action::Resize { disk, size } => Command::Resize { disk: disk.clone(), size: size.clone() },
    };
    let socket = args.socket.display();
    let mut stream = UnixStream::connect(&args.socket)
        .with_context(|| format!("cannot connect to {socket}: was it started with --control {socket}?"))?;
    let mut line = json::line(&command)?;
    line.push(b'\n');
    stream.write_all(&line).with_context(|| format!("cannot send a command to {socket}"))?;
    say_if_it_waits(&stream, &socket);
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).with_context(|| format!("no answer from {socket}"))?;
    if answer.is_empty() {
        bail!("{socket} gave no answer");
    }
    let mut answer: Value = serde_json::from_str(&answer).with_context(|| format!("{socket} answers nonsense"))?;
    if let Some(error) = answer.get("error") {
        return Err(error_of(error));
    }
    let result = answer.get_mut("result").map(Value::take).unwrap_or_default();
    if args.json || matches!(args.action, Action::Metrics) {
        output::json(&result)?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = |row: &Value, key: &str| row.get(key).and_then(Value::as_str).map(printable).unwrap_or_default();
    let bytes = |row: &Value, key: &str| size(row.get(key).and_then(Value::as_u64).unwrap_or(0));
    for row in result.as_array().into_iter().flatten() {
        let (disk, image, format) = (text(row, "disk"), text(row, "image"), text(row, "format"));
        output::line(format_args!("{disk}: {image} ({format}), {}", bytes(row, "virtual_size_bytes")))?;
    }
    if let Action::Resize { disk, .. } = &args.action {
        let (now, before) = (bytes(&result, "virtual_size_bytes"), bytes(&result, "virtual_size_bytes_before"));
        output::line(format_args!("{}: {now}, before {before}", printable(disk)))?;
        if result.get("told") == Some(&Value::Bool(false)) {
            log::line(format_args!(
                "blockhouse: the guest could not be told; it finds the new size when it starts next"
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Says so if there is no answer within the usual time: the wait has no end of its own.
fn say_if_it_waits(stream: &impl AsFd, socket: &impl std::fmt::Display) {
    if let Ok(0) = poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&USUAL_TIME)) {
        log::line(format_args!(
            "blockhouse: no answer from {} yet: somebody else may be connected, who is served first; still waiting",
            printable(&socket.to_string())
        ));
    }
}

/// An error as it was over there.
fn error_of(answer: &Value) -> anyhow::Error {
    let text = |key| answer.get(key).and_then(Value::as_str);
    let Some(message) = text("message") else { return anyhow!("the answer is an error that does not say what it is") };
    match KINDS.into_iter().find(|kind| text("kind") == Some(kind.as_str())) {
        Some(kind) => {
            let error = Error::new(kind, message);
            text("image").into_iter().fold(error, |error, image| error.on_image(image)).into()
        }
        // A later version may know more of them.
        None => anyhow!("{message}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::error_report::ErrorReport;

    #[test]
    fn an_error_is_the_same_on_both_sides() {
        for kind in KINDS {
            let error = Error::new(kind, "why").on_image("/a.qcow2");
            let there = serde_json::to_value(ErrorReport::from(&error)).unwrap();
            let here = error_of(&there).downcast::<Error>().unwrap();
            assert_eq!((here.kind(), here.image(), here.message()), (kind, Some("/a.qcow2"), "why"));
        }
        for (answer, said) in [
            (json!({"kind": "invalid", "image": null, "message": "why"}), "why"),
            (json!({"kind": "unheard-of", "message": "why"}), "why"),
            (json!({"message": "why"}), "why"),
            (json!({"kind": "corrupt"}), "does not say"),
            (json!("nonsense"), "does not say"),
        ] {
            let error = error_of(&answer).to_string();
            assert!(error.contains(said), "{answer}: {error}");
        }
    }
}
