//! Who changes directories for a program that serves: a process that opens no image, so that the program needs no
//! right to them once it has begun.
//!
//! ```text
//!   program                                    attendant: this program again
//!   ───────                                    ─────────────────────────────
//!   ──── /proc/self/exe ARGUMENT names ──────▶ walls go up: these names; waits
//!   (walls go up; sockets are made; walls are narrower, and no right to their directories is left)
//!   a socket is not needed any more ─────────▶ removes its name
//!   metrics, as a text ──────────────────────▶ writes them to a file, which it then gives its name
//!           ◀───────────────── how that went
//!   (lets go of the pipe, or ended itself)     ends
//! ```
//!
//! Whoever takes the program over can have it remove those sockets and spoil that file, and nothing beside them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use blockhouse_vhost::{SocketIdentity, remove_socket};
use blockhouse_walls::{Plan, Use, Walls};
use rustix::io::Errno;

use crate::args::directory_of;
use crate::helper::{self, Helper, answer};
use crate::log;
use crate::outlet::MetricsArg;

/// The first argument of an attendant. Not for people, and in no help. After it come the file for metrics, or an empty
/// word, and the sockets.
const ARGUMENT: &str = "--attend-parent";

/// To remove a socket: its number follows (4 bytes), and the device and inode that it has (8 each).
const REMOVE: u8 = b'R';
/// To write metrics: the length of the text follows (4 bytes), and the text.
const WRITE: u8 = b'W';
/// The most of a text.
const MAX_TEXT: u32 = 64 << 20;

/// The program's side.
#[derive(Debug)]
struct Attendant {
    helper: Helper,
    sockets: Vec<PathBuf>,
    metrics: Option<PathBuf>,
}

/// The one that this program has, if any.
static ATTENDANT: Mutex<Option<Attendant>> = Mutex::new(None);

/// Plans the making of sockets, for the beginning alone, and starts a process that removes them at the end and writes
/// `metrics`, if that is a file. Sockets that were passed are nobody's to remove.
pub(crate) fn plan<'a>(
    plan: &mut Plan,
    sockets: impl Iterator<Item = &'a String>,
    metrics: Option<&'a MetricsArg>,
) -> anyhow::Result<()> {
    let (metrics_socket, metrics) = match metrics {
        None => (None, None),
        Some(MetricsArg::Socket(socket)) => (Some(socket), None),
        Some(MetricsArg::File(path)) => (None, Some(path.clone())),
    };
    let paths = sockets.chain(metrics_socket).filter(|socket| !socket.starts_with("fd:"));
    let sockets: Vec<PathBuf> = paths.map(PathBuf::from).collect();
    if sockets.is_empty() && metrics.is_none() {
        return Ok(());
    }
    for socket in &sockets {
        plan.add_at_first(directory_of(socket), Use::MakeSockets);
    }
    let attendant = Attendant::start(sockets, metrics);
    let attendant = attendant.context("no process can be started (this program, /proc/self/exe) to remove sockets")?;
    *ATTENDANT.lock().unwrap_or_else(PoisonError::into_inner) = Some(attendant);
    Ok(())
}

/// Removes the name of a socket, if it still is its name.
pub(crate) fn remove(socket: &Path, identity: SocketIdentity) -> io::Result<()> {
    let mut attendant = ATTENDANT.lock().unwrap_or_else(PoisonError::into_inner);
    match attendant.as_mut() {
        Some(attendant) => {
            let number = attendant.sockets.iter().position(|path| path == socket);
            let number = number.and_then(|number| u32::try_from(number).ok()).ok_or(io::ErrorKind::NotFound)?;
            let SocketIdentity { device, inode } = identity;
            attendant.ask(REMOVE, number, [device, inode].map(u64::to_le_bytes).as_flattened())
        }
        // There are no walls.
        None => remove_socket(socket, identity),
    }
}

/// Writes the file for metrics: who reads it finds all of the old text or all of the new one.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut attendant = ATTENDANT.lock().unwrap_or_else(PoisonError::into_inner);
    match attendant.as_mut().filter(|attendant| attendant.metrics.as_deref() == Some(path)) {
        Some(attendant) => {
            let length = u32::try_from(text.len()).map_err(io::Error::other)?;
            attendant.ask(WRITE, length, text.as_bytes())
        }
        None => write_file(path, text.as_bytes()),
    }
}

/// Lets go of it, and waits for its end: the command is over.
pub(crate) fn dismiss() {
    drop(ATTENDANT.lock().unwrap_or_else(PoisonError::into_inner).take());
}

impl Attendant {
    fn start(sockets: Vec<PathBuf>, metrics: Option<PathBuf>) -> io::Result<Self> {
        let file = metrics.as_deref().unwrap_or(Path::new(""));
        let names = [Path::new(ARGUMENT), file].into_iter().chain(sockets.iter().map(PathBuf::as_path));
        Ok(Self { helper: Helper::start(names)?, sockets, metrics })
    }

    fn ask(&mut self, what: u8, number: u32, more: &[u8]) -> io::Result<()> {
        self.helper.ask(&[what])?;
        self.helper.ask(&number.to_le_bytes())?;
        self.helper.ask(more)?;
        let [answer] = self.helper.answer()?;
        match answer {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Does the work of an attendant if this process is one.
pub(crate) fn serve_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    let metrics = arguments.next().filter(|path| !path.is_empty()).map(PathBuf::from);
    let sockets: Vec<OsString> = arguments.collect();
    Some(match helper::begin().and_then(|()| serve(metrics, &sockets)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("blockhouse: the process that removes sockets: {error}"));
            ExitCode::FAILURE
        }
    })
}

fn serve(metrics: Option<PathBuf>, sockets: &[OsString]) -> io::Result<()> {
    let mut plan = Plan::new();
    for socket in sockets {
        plan.add(directory_of(socket.as_ref()), Use::NameFiles);
    }
    if let Some(path) = &metrics {
        plan.add(directory_of(path), Use::MakeFiles);
    }
    // What a kernel lacks is said by the program.
    Walls::raise(&plan);
    attend(metrics.as_deref(), sockets, io::stdin().lock(), answer)
}

/// Does what it is asked, until nobody asks any more. Whatever it cannot have been asked is an error.
fn attend(
    metrics: Option<&Path>,
    sockets: &[OsString],
    mut input: impl Read,
    mut answer: impl FnMut([i32; 1]) -> io::Result<()>,
) -> io::Result<()> {
    let mut question = [0; 5];
    // Whoever has ended asks nothing more.
    while input.read_exact(&mut question).is_ok() {
        let [what, number @ ..] = question;
        let number = u32::from_le_bytes(number);
        let done = match (what, metrics) {
            (REMOVE, _) => {
                let mut identity = [[0; 8]; 2];
                input.read_exact(identity.as_flattened_mut())?;
                let [device, inode] = identity.map(u64::from_le_bytes);
                match usize::try_from(number).ok().and_then(|number| sockets.get(number)) {
                    Some(socket) => remove_socket(socket.as_ref(), SocketIdentity { device, inode }),
                    None => Err(Errno::NOENT.into()),
                }
            }
            (WRITE, Some(path)) if number <= MAX_TEXT => {
                let mut text = Vec::new();
                let length = input.by_ref().take(number.into()).read_to_end(&mut text)?;
                if u32::try_from(length) != Ok(number) {
                    // The program ended in the middle of it.
                    return Ok(());
                }
                write_file(path, &text)
            }
            _ => return Err(io::Error::other("asked for what it does not do")),
        };
        let error = done.err().map_or(0, |error| error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()));
        answer([error])?;
    }
    Ok(())
}

/// Writes a file beside `path` and gives it that name.
fn write_file(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".new");
    let new = directory_of(path).join(name);
    // What a killed process left there.
    let _ = fs::remove_file(&new);
    let write = || File::create_new(&new)?.write_all(text);
    write().and_then(|()| fs::rename(&new, path)).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics");
        for text in ["a long text", "short"] {
            write_file(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(write_file(&directory.path().join("no/file"), b"x").is_err());
    }

    /// A question.
    fn question(what: u8, number: u32, more: &[u8]) -> Vec<u8> {
        [&[what][..], &number.to_le_bytes(), more].concat()
    }

    /// Has it answer `questions`; it knows of one socket, and of a file if `metrics`.
    fn asked(directory: &Path, metrics: bool, questions: &[Vec<u8>]) -> (io::Result<()>, Vec<i32>) {
        let (file, socket) = (directory.join("metrics"), directory.join("socket"));
        let mut answers = Vec::new();
        let ended = attend(metrics.then_some(&file), &[socket.into()], questions.concat().as_slice(), |[answer]| {
            answers.push(answer);
            Ok(())
        });
        (ended, answers)
    }

    #[test]
    fn who_was_taken_over_gets_nothing_else_done() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        UnixListener::bind(directory.join("socket")).unwrap();
        fs::write(directory.join("metrics"), "old").unwrap();
        let identity = fs::metadata(directory.join("socket")).unwrap();
        let identity = [identity.dev(), identity.ino()].map(u64::to_le_bytes);
        let identity = identity.as_flattened();
        let all = || {
            let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };

        let missing = Errno::NOENT.raw_os_error();
        // A socket that it has not, of the others or of a file: it is said, and the next question is answered.
        let (ended, answers) = asked(directory, true, &[1, u32::MAX].map(|number| question(REMOVE, number, identity)));
        assert!(ended.is_ok() && answers == [missing, missing], "{ended:?} {answers:?}");
        // Its own, which has become another one.
        let (ended, answers) = asked(directory, true, &[question(REMOVE, 0, &[0; 16])]);
        assert!(ended.is_ok() && answers.len() == 1, "{ended:?} {answers:?}");
        // Texts that are too long, that end early, or for which there is no file; words that it does not know.
        for (metrics, question, ends_well) in [
            (true, question(WRITE, MAX_TEXT + 1, b"new"), false),
            (true, question(WRITE, u32::MAX, b"new"), false),
            (true, question(WRITE, 4, b"new"), true),
            (true, question(REMOVE, 0, b"half of it"), false),
            (false, question(WRITE, 3, b"new"), false),
            (true, question(b'X', 0, b""), false),
            (true, b"W\x03".to_vec(), true),
        ] {
            let (ended, answers) = asked(directory, metrics, &[question]);
            assert!(ended.is_ok() == ends_well && answers.is_empty(), "{ended:?} {answers:?}");
        }
        assert_eq!(all(), ["metrics", "socket"]);
        assert_eq!(fs::read(directory.join("metrics")).unwrap(), b"old");

        // The twin.
        let questions = [question(WRITE, 3, b"new"), question(REMOVE, 0, identity)];
        let (ended, answers) = asked(directory, true, &questions);
        assert!(ended.is_ok() && answers == [0, 0], "{ended:?} {answers:?}");
        assert_eq!(all(), ["metrics"]);
        assert_eq!(fs::read(directory.join("metrics")).unwrap(), b"new");
    }
}
