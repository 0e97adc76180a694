//! A new file that has its name once it is complete.
//!
//! ```text
//!   .NAME.PID.partial ── written, synced ──▶ renamed to NAME ──▶ directory synced
//! ```
//!
//! Who is interrupted leaves nothing under NAME, and perhaps the partial file, which nobody needs.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blockhouse_block::Access;
use blockhouse_sandbox::{Below, ChainReport, LockMode, OpenRequest, Opener, Outcome};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::args::directory_of;

/// Names may have 255 bytes on Linux; this leaves room for what is put around one.
const NAME_BYTES: usize = 200;

/// A file under a temporary name, removed if it is not finished.
#[derive(Debug)]
pub(crate) struct Target {
    partial: PathBuf,
    path: PathBuf,
    replace: bool,
    /// Further files that are of no use without this one.
    with: Vec<PathBuf>,
    finished: bool,
}

impl Target {
    /// A target that will be at `path`, where nothing may be unless it is to be replaced. Makes no file.
    ///
    /// Replaced is only a regular file that nobody uses and that is none of `in_use`.
    pub(crate) fn new(path: &Path, replace: bool, opener: &Opener, in_use: &[PathBuf]) -> anyhow::Result<Self> {
        let target = Self::beside(path, replace)?;
        if replace && let Ok(metadata) = fs::symlink_metadata(path) {
            refuse_used(path, &metadata, opener, in_use)?;
        }
        Ok(target)
    }

    /// As [`new`](Self::new), for a file that is no image.
    pub(crate) fn beside(path: &Path, replace: bool) -> anyhow::Result<Self> {
        let name = path.file_name().with_context(|| format!("{} does not end in a file name", path.display()))?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
            Ok(_) if !replace => return Err(exists(path)),
            Ok(metadata) if !metadata.is_file() => {
                bail!("{} is not a regular file, and was not replaced", path.display());
            }
            Ok(_) => {}
        }
        let mut shown = String::new();
        for character in name.to_string_lossy().chars() {
            if shown.len() + character.len_utf8() > NAME_BYTES {
                break;
            }
            shown.push(character);
        }
        // Left behind by a process that was killed, a name may be taken.
        let free = (0..1000u32)
            .map(|attempt| match attempt {
                0 => format!(".{shown}.{}.partial", std::process::id()),
                _ => format!(".{shown}.{}.{attempt}.partial", std::process::id()),
            })
            .map(|name| directory_of(path).join(name))
            .find(|partial| fs::symlink_metadata(partial).is_err());
        let partial = free.with_context(|| format!("too many partial files beside {}", path.display()))?;
        Ok(Self { partial, path: path.to_owned(), replace, with: Vec::new(), finished: false })
    }

    /// Where the file is to be written.
    pub(crate) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Takes a file along: it is removed if the target is not finished.
    pub(crate) fn with(&mut self, path: PathBuf) {
        self.with.push(path);
    }

    /// Gives the file its name. It is complete and durable; afterwards its name is as well.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        let failed = || format!("cannot give {} its name", self.path.display());
        if self.replace {
            fs::rename(&self.partial, &self.path).with_context(failed)?;
        } else {
            match renameat_with(CWD, &self.partial, CWD, &self.path, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(Errno::EXIST) => return Err(exists(&self.path)),
                // A file system without it. A second name can be given only where there is none, too.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    fs::hard_link(&self.partial, &self.path).with_context(failed)?;
                    fs::remove_file(&self.partial).with_context(failed)?;
                }
                Err(error) => return Err(error).with_context(failed),
            }
        }
        self.finished = true;
        sync_directory(&self.path)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for path in self.with.iter().chain([&self.partial]) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "an unfinished file could not be removed");
                }
                _ => {}
            }
        }
    }
}

/// Makes a name durable: without, a file may be gone after a power cut.
pub(crate) fn sync_directory(file: &Path) -> anyhow::Result<()> {
    File::open(directory_of(file))
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("cannot make the name {} durable", file.display()))
}

fn exists(path: &Path) -> anyhow::Error {
    anyhow::anyhow!("{} exists; --force replaces it", path.display())
}

fn refuse_used(path: &Path, metadata: &Metadata, opener: &Opener, in_use: &[PathBuf]) -> anyhow::Result<()> {
    for file in in_use {
        if fs::metadata(file).is_ok_and(|other| identity(&other) == identity(metadata)) {
            bail!("{} is {}, which is read from; it was not touched", path.display(), file.display());
        }
    }
    // Opened as what every file is, for its lock alone.
    let request = OpenRequest { access: Access::ReadWrite, below: Below::Leave, ..OpenRequest::new(path, "raw") };
    let opened = opener.clone().locks(LockMode::Enforce).open(&request);
    opened.map(drop).with_context(|| format!("cannot replace {}", path.display()))
}

/// Device and inode.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The images, and what they refer to: data files and extents hold the bytes that are being read.
pub(crate) fn files_in_use(report: &ChainReport) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for layer in &report.layers {
        files.push(PathBuf::from(&layer.image));
        let opened = layer.opens.iter().filter(|open| open.outcome == Outcome::Allowed);
        files.extend(opened.map(|open| PathBuf::from(&open.path)));
    }
    files
}
