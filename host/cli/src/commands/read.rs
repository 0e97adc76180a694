//! `blockhouse read`: the bytes that a guest would see.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_block::{BlockBackend, VolatileSlice};
use blockhouse_sandbox::OpenedDisk;
use blockhouse_walls::Plan;
use rustix::io::Errno;

use crate::args::{HostArgs, ImageArgs, RangeArgs};
use crate::output;
use crate::progress::Progress;
use crate::target::{NewFile, Target, files_in_use, refuse_read_from};

/// Bytes that are read at a time.
const CHUNK: usize = 2 << 20;

/// Write the bytes that a guest would see
///
/// Long stretches of zeroes become holes in the output file. An existing file is not touched without
/// --force, and one that the disk is read from, or that somebody uses as an image, never is.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    image: ImageArgs,

    #[command(flatten)]
    range: RangeArgs,

    /// Write to FILE instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Overwrite the output file if it exists: where it is, a pipe or a device too
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
        let metadata = match fs::metadata(output) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if fs::symlink_metadata(output).is_ok() {
                    let output = output.display();
                    bail!(
                        "{output} is a symbolic link to a file that is not there; name that file, or remove the link"
                    );
                }
                return Ok(false);
            }
            found => found.with_context(|| format!("cannot look at {}", output.display()))?,
        };
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
            // An existing one is overwritten where it is.
            let (output, target) = if overwrites {
                (Output::existing(path, &files_in_use(&opened.report), &args.image.host)?, None)
            } else {
                let target = Target::take(&NewFile::new(path, false))?;
                (Output { file: target.open()?, regular: true, _locked: None }, Some(target))
            };
            let mut progress = Progress::new(length, false);
            let mut at = 0;
            copy(&opened.disk, args.range.offset, length, |bytes| {
                output.write(bytes, at).with_context(|| format!("cannot write {}", path.display()))?;
                at += bytes.len() as u64;
                progress.at(at);
                Ok(())
            })?;
            output.complete(length).with_context(|| format!("cannot write {}", path.display()))?;
            progress.finish();
            // Half a disk must not be taken for a whole one, so it is called so once it is whole.
            if let Some(target) = target {
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

/// Where the bytes go.
struct Output {
    file: File,
    /// It has a size, and what is not written of it reads as zero. What is no regular file is written as it comes.
    regular: bool,
    /// Until all is written nobody uses what is overwritten.
    _locked: Option<OpenedDisk>,
}

impl Output {
    /// A file that exists, as it is. One that the disk is read from, or that somebody uses as an image, is refused.
    fn existing(path: &Path, in_use: &[PathBuf], host: &HostArgs) -> anyhow::Result<Self> {
        let file = File::options().write(true).open(path);
        let file = file.with_context(|| format!("cannot open {} for writing", path.display()))?;
        let metadata = file.metadata().with_context(|| format!("cannot look at {}", path.display()))?;
        refuse_read_from(path, &metadata, in_use)?;
        let regular = metadata.is_file();
        let locked = regular.then(|| host.lock(path)).transpose();
        let locked = locked.with_context(|| format!("cannot overwrite {}", path.display()))?;
        if regular {
            file.set_len(0).with_context(|| format!("cannot empty {}", path.display()))?;
        }
        Ok(Self { file, regular, _locked: locked })
    }

    /// Writes what is at `at`, after all that is before it.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if !self.regular {
            return (&self.file).write_all(bytes);
        }
        if bytes.iter().any(|byte| *byte != 0) { self.file.write_all_at(bytes, at) } else { Ok(()) }
    }

    /// All is written: makes it `length` bytes, and durable.
    fn complete(&self, length: u64) -> io::Result<()> {
        if self.regular {
            self.file.set_len(length)?;
        }
        match self.file.sync_all() {
            // A pipe, a terminal: nothing of it stays.
            Err(error) if !self.regular && error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
            synced => synced,
        }
    }
}
