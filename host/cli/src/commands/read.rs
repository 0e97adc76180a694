//! `blockhouse read`: the bytes that a guest would see.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_block::{BlockBackend, VolatileSlice};
use blockhouse_walls::Plan;

use crate::args::{ImageArgs, RangeArgs};
use crate::progress::Progress;
use crate::target::{files_in_use, identity};
use crate::walls::new_file;

/// Bytes that are read at a time.
const CHUNK: usize = 2 << 20;

/// Write the bytes that a guest would see
///
/// Long stretches of zeroes become holes in the output file. An existing file is not touched without
/// --force, and a file that the disk is read from never is.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    image: ImageArgs,

    #[command(flatten)]
    range: RangeArgs,

    /// Write to FILE instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Overwrite the output file if it exists
    #[arg(long, requires = "output")]
    force: bool,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        if let Some(output) = &self.output {
            if output.exists() {
                plan.write(output);
            } else {
                new_file(plan, output);
            }
        }
        self.image.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opened = args.image.opener()?.open(&args.image.request())?;
    let capacity = opened.disk.capacity();
    let left = capacity.checked_sub(args.range.offset).with_context(|| {
        format!("--offset {} lies past the end of the disk, which has {capacity} bytes", args.range.offset)
    })?;
    let length = args.range.length.unwrap_or(left);
    if length > left {
        bail!(
            "--offset {} with --length {length} goes past the end of the disk, which has {capacity} bytes",
            args.range.offset
        );
    }
    match &args.output {
        Some(path) => {
            let file = create(path, args.force, &files_in_use(&opened.report))?;
            let mut progress = Progress::new(length, false);
            let mut at = 0;
            let written = copy(&opened.disk, args.range.offset, length, |bytes| {
                // The file is new, so what is not written reads as zero.
                if bytes.iter().any(|byte| *byte != 0) {
                    file.write_all_at(bytes, at).with_context(|| format!("cannot write {}", path.display()))?;
                }
                at += bytes.len() as u64;
                progress.at(at)
            });
            let written = written.and_then(|()| {
                file.set_len(length).with_context(|| format!("cannot set the size of {}", path.display()))
            });
            if written.is_err() && !args.force {
                // Half a disk must not be taken for a whole one. What --force emptied is not ours to remove.
                let _ = std::fs::remove_file(path);
            }
            written?;
            progress.finish();
        }
        None => {
            let mut out = io::stdout().lock();
            if out.is_terminal() {
                bail!("standard output is a terminal; use --output FILE, or a pipe");
            }
            copy(&opened.disk, args.range.offset, length, |bytes| Ok(out.write_all(bytes)?))?;
            out.flush()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn copy(
    disk: &dyn BlockBackend,
    offset: u64,
    length: u64,
    mut write: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut buffer = vec![0u8; CHUNK];
    let mut done = 0;
    while done < length {
        let take = usize::try_from(length - done).unwrap_or(CHUNK).min(CHUNK);
        let chunk = buffer.get_mut(..take).context("a chunk is never larger than its buffer")?;
        disk.read(&[VolatileSlice::from(&mut *chunk)], offset + done)?;
        write(chunk)?;
        done += take as u64;
    }
    Ok(())
}

/// Opens the output file: a new one, or an existing one that is none of the files in use, emptied.
fn create(path: &Path, force: bool, in_use: &[PathBuf]) -> anyhow::Result<File> {
    let mut options = File::options();
    options.write(true);
    if !force {
        return options.create_new(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => anyhow::anyhow!("{} exists; --force overwrites it", path.display()),
            _ => anyhow::Error::new(error).context(format!("cannot create {}", path.display())),
        });
    }
    let file = options
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot open {} for writing", path.display()))?;
    let target = identity(&file.metadata()?);
    for file in in_use {
        if std::fs::metadata(file).is_ok_and(|metadata| identity(&metadata) == target) {
            bail!("{} is {}, which the disk is read from; it was not touched", path.display(), file.display());
        }
    }
    file.set_len(0).with_context(|| format!("cannot empty {}", path.display()))?;
    Ok(file)
}
