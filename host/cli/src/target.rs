//! A new file that has its name once it is complete.
//!
//! ```text
//!   namer.rs: .NAME.PID.partial, empty ── walls go up ──▶ written, synced ── namer.rs ──▶ called NAME, durable
//! ```
//!
//! Who is interrupted leaves nothing under NAME. The program itself may write to the partial file and to nothing
//! beside it.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use blockhouse_block::Error;
use blockhouse_sandbox::{ChainReport, OpenedDisk, Outcome, absolute_name};
use blockhouse_walls::Plan;
use rustix::fs::OFlags;

use crate::args::{HostArgs, directory_of};
use crate::namer::{Named, Namer, NotBegun, Replaces};

/// Names may have 255 bytes on Linux; this leaves room for what is put around one.
const NAME_BYTES: usize = 200;

/// How a new file is begun.
#[derive(Debug)]
pub(crate) struct NewFile<'a> {
    /// What it will be called.
    pub(crate) path: &'a Path,
    /// It takes the place of a file that is called so.
    pub(crate) replace: bool,
    /// Who may read and write it, before the umask; nobody else than its owner who could not with the file that it
    /// takes the place of.
    pub(crate) mode: u32,
    /// Further files, of data, that are of no use without it: made as well, under their own names, empty.
    pub(crate) with: Vec<PathBuf>,
}

impl<'a> NewFile<'a> {
    pub(crate) fn new(path: &'a Path, replace: bool) -> Self {
        Self { path, replace, mode: 0o666, with: Vec::new() }
    }

    /// Makes the file, under another name, before the walls go up. Whoever writes it [`take`](Target::take)s it then.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        let target = self.begin()?;
        plan.write(&target.partial);
        self.with.iter().for_each(|path| plan.write(path));
        if self.replace {
            // Opened for its lock.
            plan.write(self.path);
        }
        BEGUN.lock().unwrap_or_else(PoisonError::into_inner).push(target);
        Ok(())
    }

    fn begin(&self) -> anyhow::Result<Target> {
        let path = self.path;
        let (mut mode, mut group) = (self.mode, None);
        let name = path.file_name().with_context(|| format!("{} does not end in a file name", path.display()))?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
            Ok(_) if !self.replace => return Err(exists(path)),
            Ok(metadata) if !metadata.is_file() => {
                bail!("{} is not a regular file, and was not replaced", path.display());
            }
            Ok(metadata) => {
                mode &= metadata.mode() | 0o600;
                group = Some(metadata.gid());
            }
        }
        let mut shown = String::new();
        for character in name.to_string_lossy().chars() {
            if shown.len() + character.len_utf8() > NAME_BYTES {
                break;
            }
            shown.push(character);
        }
        // Left behind by a process that was killed, a name may be taken.
        let partial = (0..1000u32)
            .map(|attempt| match attempt {
                0 => format!(".{shown}.{}.partial", std::process::id()),
                _ => format!(".{shown}.{}.{attempt}.partial", std::process::id()),
            })
            .map(|name| directory_of(path).join(name))
            .find(|partial| fs::symlink_metadata(partial).is_err());
        let partial = partial.with_context(|| format!("too many partial files beside {}", path.display()))?;
        let namer = match Namer::start(&partial, path, self.replace, (mode, group), &self.with) {
            Ok(namer) => namer,
            Err(NotBegun::File(path, error)) => {
                return Err(error).with_context(|| format!("cannot create {}", path.display()));
            }
            Err(NotBegun::Process(error)) => {
                return Err(error).context("no process can be started (this program, /proc/self/exe) to give names");
            }
        };
        let replaces = if self.replace { Replaces::Anything } else { Replaces::Nothing };
        Ok(Target { partial, path: path.to_owned(), force: self.replace, namer, replaces, locked: None })
    }
}

/// Those that were begun and not taken yet.
static BEGUN: Mutex<Vec<Target>> = Mutex::new(Vec::new());

/// Removes what was begun and nobody took: the command ends.
pub(crate) fn forget_begun() {
    BEGUN.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// A file under a temporary name, removed if it is not finished.
#[derive(Debug)]
pub(crate) struct Target {
    partial: PathBuf,
    path: PathBuf,
    /// A file that has the name is to be replaced.
    force: bool,
    namer: Namer,
    replaces: Replaces,
    /// What it takes the place of: nobody begins to use that, only to lose what they write.
    locked: Option<OpenedDisk>,
}

impl Target {
    /// The file that was begun when the command was planned. Without walls there was no plan, and it is made now.
    pub(crate) fn take(new: &NewFile<'_>) -> anyhow::Result<Self> {
        let mut begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
        match begun.iter().position(|target| target.path == new.path) {
            Some(at) => Ok(begun.swap_remove(at)),
            None => new.begin(),
        }
    }

    /// Sees that what is to be replaced is a file that nobody uses, and none of `in_use`; nobody else can use it from here
    /// on, and nothing else is replaced.
    pub(crate) fn refuse_used(&mut self, host: &HostArgs, in_use: &[PathBuf]) -> anyhow::Result<()> {
        if self.replaces == Replaces::Nothing {
            return Ok(());
        }
        let path = &self.path;
        self.replaces = Replaces::Nothing;
        if let Ok(metadata) = fs::symlink_metadata(path) {
            refuse_read_from(path, &metadata, in_use)?;
            let locked = host.lock(path).with_context(|| format!("cannot replace {}", path.display()))?;
            let now = fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
            if identity(&now) != identity(&metadata) {
                return Err(taken(path));
            }
            self.locked = Some(locked);
            let (device, inode) = identity(&metadata);
            self.replaces = Replaces::File { device, inode };
        }
        Ok(())
    }

    /// Where the file is to be written. It is there, and empty.
    pub(crate) fn partial(&self) -> &Path {
        &self.partial
    }

    /// The file, to be read and written.
    pub(crate) fn open(&self) -> anyhow::Result<File> {
        let no_link = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
        let file = File::options().read(true).write(true).custom_flags(no_link).open(&self.partial);
        file.with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// An error about the partial file, as one about the file that it was to become: that is the name that the operator
    /// knows, and the other one is gone by the time it is read.
    pub(crate) fn about(&self, error: anyhow::Error) -> anyhow::Error {
        let names = absolute_name(&self.partial).and_then(|partial| Ok((partial, absolute_name(&self.path)?)));
        match (error.downcast::<Error>(), names) {
            (Ok(error), Ok((partial, name))) if error.image() == Some(&partial) => error.renamed(name).into(),
            (Ok(error), _) => error.into(),
            (Err(error), _) => error,
        }
    }

    /// Gives the file its name. It is complete and durable; afterwards its name is as well. What had the name is locked
    /// until it has it no more.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let path = self.path.display();
        match self.namer.name(self.replaces) {
            Named::Durable => Ok(()),
            Named::NotDurable(error) => Err(error).with_context(|| format!("cannot make the name {path} durable")),
            Named::Failed(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(if self.force { taken(&self.path) } else { exists(&self.path) })
            }
            Named::Failed(error) => Err(error).with_context(|| format!("cannot give {path} its name")),
        }
    }
}

fn exists(path: &Path) -> anyhow::Error {
    anyhow::anyhow!("{} exists; --force replaces it", path.display())
}

/// Since the command began.
fn taken(path: &Path) -> anyhow::Error {
    anyhow::anyhow!("{} was made by somebody else meanwhile, and was not replaced", path.display())
}

/// Fails if a file is one of `in_use`.
pub(crate) fn refuse_read_from(path: &Path, metadata: &Metadata, in_use: &[PathBuf]) -> anyhow::Result<()> {
    for file in in_use {
        if fs::metadata(file).is_ok_and(|other| identity(&other) == identity(metadata)) {
            bail!("{} is {}, which is read from; it was not touched", path.display(), file.display());
        }
    }
    Ok(())
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
