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
use crate::output;
use crate::progress::Progress;
use crate::target::{NewFile, Target, files_in_use, identity};

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
        self.image.plan(plan)?;
        if let Some(output) = &self.output {
            if self.overwrites(output)? {
                plan.write(output);
            } else {
                NewFile::new(output, false).plan(plan)?;
            }
        }
        Ok(())
    }

    /// Whether the output file is there, and is to be overwritten. What will not be is refused, before any image is
    /// looked at.
    fn overwrites(&self, output: &Path) -> anyhow::Result<bool> {
        let Ok(metadata) = std::fs::metadata(output) else { return Ok(false) };
        if metadata.is_dir() {
            bail!("{} is a directory; name a file in it", output.display());
        }
        if !self.force {
            bail!("{} exists; --force overwrites it", output.display());
        }
        Ok(true)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Without walls, nothing was planned.
    let overwrites = args.output.as_deref().map_or(Ok(false), |output| args.overwrites(output))?;
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
            // An existing one, which may be no regular file, is overwritten where it is.
            let (file, target) = if overwrites {
                (overwrite(path, &files_in_use(&opened.report))?, None)
            } else {
                let target = Target::take(&NewFile::new(path, false))?;
                (target.open()?, Some(target))
            };
            let mut progress = Progress::new(length, false);
            let mut at = 0;
            let written = copy(&opened.disk, args.range.offset, length, |bytes| {
                // The file is new, so what is not written reads as zero.
                if bytes.iter().any(|byte| *byte != 0) {
                    file.write_all_at(bytes, at).with_context(|| format!("cannot write {}", path.display()))?;
                }
                at += bytes.len() as u64;
                progress.at(at);
                Ok(())
            });
            written?;
            file.set_len(length).with_context(|| format!("cannot set the size of {}", path.display()))?;
            progress.finish();
            // Half a disk must not be taken for a whole one, so it is called so once it is whole.
            if let Some(target) = target {
                file.sync_all().with_context(|| format!("cannot write {}", path.display()))?;
                target.finish()?;
            }
        }
        None => {
            let mut out = output::stdout();
            if io::stdout().is_terminal() {
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

/// Opens an output file that exists and is none of the files in use, and empties it.
fn overwrite(path: &Path, in_use: &[PathBuf]) -> anyhow::Result<File> {
    let file = File::options().write(true).open(path);
    let file = file.with_context(|| format!("cannot open {} for writing", path.display()))?;
    let target = identity(&file.metadata()?);
    for file in in_use {
        if std::fs::metadata(file).is_ok_and(|metadata| identity(&metadata) == target) {
            bail!("{} is {}, which the disk is read from; it was not touched", path.display(), file.display());
        }
    }
    file.set_len(0).with_context(|| format!("cannot empty {}", path.display()))?;
    Ok(file)
}
