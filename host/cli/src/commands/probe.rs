//! `blockhouse probe`: a guess, printed and nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_formats::PROBER;
use blockhouse_sandbox::{Limits, PROBE_HEAD, PROBE_TAIL, Sandbox};
use blockhouse_walls::Plan;

use crate::{output, walls};

/// Guess the format of a file, open nothing else, and act on nothing
///
/// Opens FILE, shows what it might be, and acts on nothing: no other command ever
/// guesses. Do not feed the guess back without looking: an image can look like several formats, and a
/// raw disk can be made to look like an image by whoever could write to it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) {
        plan.read(&self.file);
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    walls::narrow()?;
    let name = args.file.display();
    let metadata = std::fs::metadata(&args.file).with_context(|| format!("cannot open {name}"))?;
    if !metadata.is_file() {
        bail!("{name} is not a regular file");
    }
    let file = File::open(&args.file).with_context(|| format!("cannot open {name}"))?;
    let size = file.metadata()?.len();
    let part = |offset: u64, limit: usize| -> anyhow::Result<Vec<u8>> {
        let length = usize::try_from(size - offset).unwrap_or(limit).min(limit);
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).with_context(|| format!("cannot read {name}"))?;
        Ok(bytes)
    };
    let head = part(0, PROBE_HEAD)?;
    let tail = part(size.saturating_sub(PROBE_TAIL as u64), PROBE_TAIL)?;

    let sandbox = Sandbox::new(Limits::default())?;
    let prober = sandbox.load("built-in prober", PROBER)?;
    let guesses = sandbox.probe(&prober, &head, &tail, size)?;
    if args.json {
        output::json(&guesses)?;
    } else if guesses.is_empty() {
        output::line(format_args!("nothing recognised; a raw disk looks like that"))?;
    } else {
        for guess in guesses {
            output::line(format_args!("{:<10} {:>3}%  {}", guess.format, guess.confidence, guess.evidence))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
