//! Who gives a new file its name: a process that does nothing else, so that the program needs no right to the
//! directory.
//!
//! ```text
//!   program                                         namer: this program again
//!   ───────                                         ─────────────────────────
//!   ─ /proc/self/exe ARGUMENT HOW MODE GROUP names ▶ opens the directories, makes the partial file
//!                  ◀───────── how that went ─────── walls go up: names, and no content; waits
//!   (walls go up: the partial file, nothing beside)
//!   the file is complete ──── what it replaces ───▶ gives it its name, makes that durable
//!                  ◀───────── how that went ─────── ends
//!   (lets go of the pipe, or ended itself)          removes what is unfinished, ends
//! ```
//!
//! Whatever kills the program, and whenever: nothing unfinished stays, unless its namer is killed as well.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use blockhouse_walls::{Plan, Use, Walls};
use rustix::fs::{
    AtFlags, Mode, OFlags, RenameFlags, fchmod, fstat, linkat, openat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::args::directory_of;
use crate::helper::{self, Helper, answer};
use crate::log;

/// The first argument of a namer. Not for people, and in no help.
const ARGUMENT: &str = "--name-for-parent";
/// The second: what becomes of a file that has the name already.
const REPLACE: &str = "replace";
const KEEP: &str = "keep";
/// What the program says when the file is complete: this, and in 16 bytes which file may have the name, all zero for none
/// and all ones for any.
const COMPLETE: u8 = b'C';
const COMPLETE_BYTES: usize = 17;

/// What a file may take the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replaces {
    Nothing,
    /// This one and no other one.
    File {
        device: u64,
        inode: u64,
    },
    Anything,
}

impl Replaces {
    fn numbers(self) -> (u64, u64) {
        match self {
            Self::Nothing => (0, 0),
            Self::File { device, inode } => (device, inode),
            Self::Anything => (u64::MAX, u64::MAX),
        }
    }

    fn from_numbers(numbers: (u64, u64)) -> Self {
        match numbers {
            (0, 0) => Self::Nothing,
            (u64::MAX, u64::MAX) => Self::Anything,
            (device, inode) => Self::File { device, inode },
        }
    }
}

/// The program's side. Dropping it, before or after it was told anything, removes what is unfinished.
///
/// An answer is two numbers. Files were made: which one was not, and why; two zeroes if all were. A name was given: why
/// not, and why it is not durable, or zero. Reasons are error numbers.
#[derive(Debug)]
pub(crate) struct Namer(Helper);

/// Why there is no file, and no process for its name.
#[derive(Debug)]
pub(crate) enum NotBegun {
    /// The process cannot be started, or ended.
    Process(io::Error),
    /// This file cannot be made.
    File(PathBuf, io::Error),
}

/// What became of a file.
#[derive(Debug)]
pub(crate) enum Named {
    /// It has its name, and that is durable.
    Durable,
    /// It has its name, which a power cut may take away again.
    NotDurable(io::Error),
    /// It has no name, and is gone.
    Failed(io::Error),
}

impl Namer {
    /// Starts a process that makes the file `partial`, empty, and gives it the name `path` beside it, or removes it.
    /// Makes and removes the further files `with` as well. In the mode, what a group may is meant for `group`: if files
    /// here belong to another one, that may what all others may.
    pub(crate) fn start(
        partial: &Path,
        path: &Path,
        replace: bool,
        (mode, group): (u32, Option<u32>),
        with: &[PathBuf],
    ) -> Result<Self, NotBegun> {
        let how = if replace { REPLACE } else { KEEP };
        let mode = mode.to_string();
        let group = group.map_or_else(String::new, |group| group.to_string());
        let words = [ARGUMENT, how, &mode, &group].map(OsStr::new).into_iter();
        let names = [partial, path].into_iter().chain(with.iter().map(PathBuf::as_path)).map(Path::as_os_str);
        let mut helper = Helper::start(words.chain(names)).map_err(NotBegun::Process)?;
        match helper.answer().map_err(NotBegun::Process)? {
            [_, 0] => Ok(Self(helper)),
            [number, error] => {
                let at = usize::try_from(number).unwrap_or(0).checked_sub(1);
                let path = at.and_then(|at| with.get(at)).map_or(path, PathBuf::as_path);
                Err(NotBegun::File(path.to_owned(), io::Error::from_raw_os_error(error)))
            }
        }
    }

    /// Gives the file its name. It is complete and durable.
    pub(crate) fn name(mut self, replaces: Replaces) -> Named {
        let (device, inode) = replaces.numbers();
        let told = [&[COMPLETE][..], &device.to_le_bytes(), &inode.to_le_bytes()].concat();
        match self.0.ask(&told).and_then(|()| self.0.answer()) {
            Ok([0, 0]) => Named::Durable,
            Ok([0, error]) => Named::NotDurable(io::Error::from_raw_os_error(error)),
            Ok([error, _]) => Named::Failed(io::Error::from_raw_os_error(error)),
            Err(error) => Named::Failed(io::Error::other(format!("the process that gives names has ended: {error}"))),
        }
    }
}

/// Does the work of a namer if this process is one.
pub(crate) fn serve_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    Some(match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("blockhouse: the process that gives names: {error}"));
            ExitCode::FAILURE
        }
    })
}

fn serve(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    let misused = || io::Error::other("this is started by the program itself, and by nobody else");
    let mut next = || arguments.next().ok_or_else(misused);
    let (how, mode, group, partial, path) = (next()?, next()?, next()?, next()?, next()?);
    let mode = mode.to_str().and_then(|mode| mode.parse().ok()).ok_or_else(misused)?;
    let group = group.to_str().and_then(|group| group.parse().ok());
    helper::begin()?;
    let number = |error: &io::Error| error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
    let mut plan = Plan::new();
    let mut made = Unfinished(Vec::new());
    for (at, path) in (0..).zip([partial].into_iter().chain(arguments)) {
        let name = Name::new(path.as_ref()).and_then(|name| name.make(mode, group).map(|()| name));
        match name {
            Ok(name) => {
                plan.add(&name.parent, Use::NameFiles);
                made.0.push(name);
            }
            Err(error) => return answer([at, number(&error)]),
        }
    }
    let (Some(partial), path) = (made.0.first(), Name::new(path.as_ref())?) else { return Err(misused()) };
    // What a kernel lacks is said by the program.
    Walls::raise(&plan);
    answer([0, 0])?;

    let mut told = [0; COMPLETE_BYTES];
    // Goes on after a signal, unlike `read`.
    let heard = io::stdin().read_exact(&mut told);
    let [COMPLETE, a, b, c, d, e, f, g, h, inode @ ..] = told else { return Ok(()) };
    if heard.is_err() {
        return Ok(());
    }
    let told = (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::from_le_bytes(inode));
    let replaces = if how == REPLACE { Replaces::from_numbers(told) } else { Replaces::Nothing };
    if let Err(error) = give(partial, &path, replaces) {
        // When the program hears of it, they are gone.
        drop(made);
        return answer([error.raw_os_error(), 0]);
    }
    let names = std::mem::take(&mut made.0);
    let mut durable = names.iter().map(|name| name.directory.sync_all());
    answer([0, durable.find_map(Result::err).as_ref().map_or(0, number)])
}

/// Gives a file another name, which nobody may have but what it replaces.
fn give(partial: &Name, path: &Name, replaces: Replaces) -> Result<(), Errno> {
    let ((old, from), (new, to)) = ((&partial.directory, &partial.name), (&path.directory, &path.name));
    let has_the_name = || statat(new, to, AtFlags::SYMLINK_NOFOLLOW).map(|status| (status.st_dev, status.st_ino));
    match replaces {
        Replaces::Anything => return renameat(old, from, new, to),
        Replaces::File { device, inode } if has_the_name() == Ok((device, inode)) => {
            return renameat(old, from, new, to);
        }
        Replaces::File { .. } | Replaces::Nothing => {}
    }
    match renameat_with(old, from, new, to, RenameFlags::NOREPLACE) {
        // A file system without it. A second name can be given only where there is none, too.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            linkat(old, from, new, to, AtFlags::empty())?;
            unlinkat(old, from, AtFlags::empty())
        }
        given => given,
    }
}

/// Files that were made, and are removed unless they are taken out of here.
struct Unfinished(Vec<Name>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.iter().for_each(Name::remove);
    }
}

/// A name in a directory that is open, whatever that is called by now.
#[derive(Debug)]
struct Name {
    parent: PathBuf,
    directory: File,
    name: OsString,
}

impl Name {
    fn new(path: &Path) -> io::Result<Self> {
        let parent = directory_of(path).to_owned();
        let directory = File::open(&parent)?;
        let name = path.file_name().map(OsStr::to_owned).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { parent, directory, name })
    }

    fn make(&self, mode: u32, group: Option<u32>) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, &self.name, flags, Mode::from_raw_mode(mode))?;
        let narrow = || {
            let status = fstat(&file)?;
            let others = (status.st_mode & 0o7) << 3;
            let narrower = status.st_mode & (0o707 | others);
            if group.is_some_and(|group| group != status.st_gid) && narrower != status.st_mode & 0o777 {
                fchmod(&file, Mode::from_raw_mode(narrower))?;
            }
            Ok(())
        };
        narrow().inspect_err(|_: &Errno| self.remove())?;
        Ok(())
    }

    fn remove(&self) {
        match unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => {
                let path = self.parent.join(&self.name);
                log::line(format_args!("blockhouse: the unfinished file {path:?} could not be removed: {error}"));
            }
        }
    }
}
