//! `blockhouse control`: commands for a running `run` or `serve`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_sandbox::json;
use serde_json::Value;

use crate::control_line::Command;
use crate::log;
use crate::output::{self, printable, size};

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
  {\"command\":\"resize\",\"disk\":\"disk0\",\"size\":\"40G\"}")]
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
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).with_context(|| format!("no answer from {socket}"))?;
    if answer.is_empty() {
        bail!("{socket} gave no answer");
    }
    let mut answer: Value = serde_json::from_str(&answer).with_context(|| format!("{socket} answers nonsense"))?;
    if let Some(why) = answer.pointer("/error/message").and_then(Value::as_str) {
        bail!("{why}");
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
