//! `blockhouse map`: where the bytes of a disk live.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use anyhow::bail;
use blockhouse_block::{BlockBackend, Run, RunKind};
use blockhouse_sandbox::json;
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::{ImageArgs, RangeArgs};
use crate::output::{self, printable};

/// Show where the bytes of a disk live, range by range
///
/// The JSON is a list as `qemu-img map --output=json` prints it, with the file of each data range.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    image: ImageArgs,

    #[command(flatten)]
    range: RangeArgs,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row<'a> {
    start: u64,
    length: u64,
    depth: u16,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
}

impl<'a> Row<'a> {
    fn new(run: &'a Run) -> Self {
        let (offset, file) = match &run.kind {
            RunKind::Data { file, offset } => (Some(*offset), Some(file.name())),
            RunKind::Zero | RunKind::Unallocated | RunKind::Packed => (None, None),
        };
        let data = matches!(run.kind, RunKind::Data { .. } | RunKind::Packed);
        Self {
            start: run.start,
            length: run.length,
            depth: run.depth,
            present: !matches!(run.kind, RunKind::Unallocated),
            zero: !data,
            data,
            compressed: matches!(run.kind, RunKind::Packed),
            offset,
            file,
        }
    }
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        self.image.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opened = args.image.opener()?.open(&args.image.request())?;
    let capacity = opened.disk.capacity();
    if args.range.offset > capacity {
        bail!("--offset {} lies past the end of the disk, which has {capacity} bytes", args.range.offset);
    }
    let end = match args.range.length {
        Some(length) => args.range.offset.saturating_add(length).min(capacity),
        None => capacity,
    };
    let mut out = BufWriter::new(output::stdout());
    if !args.json {
        writeln!(out, "{:>18} {:>18} {:>5}  what", "start", "length", "layer")?;
    }
    let mut first = true;
    for run in opened.disk.runs() {
        let run = run?;
        // The part of the run that was asked for.
        let start = run.start.max(args.range.offset);
        let stop = run.start.saturating_add(run.length).min(end);
        if run.start >= end {
            break;
        }
        if start >= stop {
            continue;
        }
        let kind = match run.kind {
            RunKind::Data { file, offset } => RunKind::Data { file, offset: offset.saturating_add(start - run.start) },
            other => other,
        };
        let run = Run { start, length: stop - start, kind, ..run };
        if args.json {
            // A list, written as it comes: a map can be longer than memory.
            output::answered();
            out.write_all(if first { b"[" } else { b",\n " })?;
            json::write(&mut out, &Row::new(&run)).map_err(io::Error::from)?;
            first = false;
        } else {
            let what = match &run.kind {
                RunKind::Data { file, offset } => format!("data at {offset:#x} of {}", printable(file.name())),
                RunKind::Zero => "zero".to_owned(),
                RunKind::Unallocated => "zero (in no layer)".to_owned(),
                RunKind::Packed => "compressed".to_owned(),
            };
            writeln!(out, "{:>#18x} {:>#18x} {:>5}  {what}", run.start, run.length, run.depth)?;
        }
    }
    if args.json {
        out.write_all(if first { b"[]\n" } else { b"]\n" })?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
