//! The socket that front ends connect to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use crate::error::{Error, Result};

/// Front ends that may wait while another one is served.
const BACKLOG: i32 = 16;

/// How often, and how long apart, the directory of a socket is tried to lock.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// A listening Unix socket. Dropping it removes the name that it was bound to.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    name: Option<(PathBuf, SocketIdentity)>,
    remove: fn(&Path, SocketIdentity) -> io::Result<()>,
}

/// What a name has to lead to, to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketIdentity {
    /// The device number of its file system.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
}

/// Removes the name of a socket, if it still is that of this one. Anything else that somebody put there stays.
///
/// # Errors
/// If it cannot be looked at, or removed.
pub fn remove_socket(path: &Path, identity: SocketIdentity) -> io::Result<()> {
    let now = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let same = SocketIdentity { device: now.dev(), inode: now.ino() } == identity;
    if same && now.file_type().is_socket() { fs::remove_file(path) } else { Ok(()) }
}

impl Listener {
    /// Listens at `path`, where only the user of this process can connect (mode 0600).
    ///
    /// A socket that nobody listens at, which a killed process leaves behind, is replaced.
    ///
    /// # Errors
    /// [`Error::InUse`] if somebody listens there, [`Error::NotASocket`] if there is anything else;
    /// [`Error::Socket`] if the system refuses.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed = |what| move |source: io::Error| Error::Socket { what, path: path.to_owned(), source };
        // Two processes that find the same dead socket must not each replace that of the other.
        let _lock = lock_directory(path).map_err(failed("lock the directory of"))?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at")(error)),
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(Error::NotASocket { path: path.to_owned() });
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(failed("remove the dead socket"))?;
                }
                // Also if it has another type, or too many wait already: somebody has it.
                _ => return Err(Error::InUse { path: path.to_owned() }),
            },
        }
        let open = || -> io::Result<(UnixListener, fs::Metadata)> {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // The name gets the mode of the socket: there is no moment in which others could connect.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            let metadata = fs::symlink_metadata(path)?;
            listen(&socket, BACKLOG)?;
            Ok((UnixListener::from(socket), metadata))
        };
        let (listener, metadata) = open().map_err(failed("listen at"))?;
        let identity = SocketIdentity { device: metadata.dev(), inode: metadata.ino() };
        Self { listener, name: Some((path.to_owned(), identity)), remove: remove_socket }.prepared()
    }

    /// Has the name be removed by `remove` instead of [`remove_socket`]: for a program that gives up the right to, or to
    /// look at names at all.
    #[must_use]
    pub fn removed_by(mut self, remove: fn(&Path, SocketIdentity) -> io::Result<()>) -> Self {
        self.remove = remove;
        self
    }

    /// Takes the listening socket that this process was started with as file descriptor `number`, as
    /// systemd does for a socket unit (the first is 3). Its name, if it has one, stays.
    ///
    /// To be called once per number, and before this process opens files of its own.
    ///
    /// # Errors
    /// [`Error::Fd`] if it is none.
    pub fn from_fd(number: RawFd) -> Result<Self> {
        let refused = |why: &str| Error::Fd { number, why: why.to_owned() };
        if number < 3 {
            return Err(refused("is standard input or output, not a socket; the first that can be passed is fd:3"));
        }
        let socket = inherited(number).map_err(|error| refused(&format!("is not open: {error}")))?;
        let is_unix = sockopt::socket_domain(&socket).is_ok_and(|domain| domain == AddressFamily::UNIX);
        let is_stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
        if !is_unix || !is_stream || !sockopt::socket_acceptconn(&socket).unwrap_or(false) {
            return Err(refused("is not a listening Unix stream socket (for systemd: ListenStream=, Accept=no)"));
        }
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(|error| refused(&error.to_string()))?;
        Self { listener: UnixListener::from(socket), name: None, remove: remove_socket }.prepared()
    }

    /// Accepting never waits: whoever connected may be gone again.
    fn prepared(self) -> Result<Self> {
        self.listener.set_nonblocking(true).map_err(|source| Error::Host { what: "prepare a socket", source })?;
        Ok(self)
    }

    /// The next who connected, if one waits. Never waits.
    ///
    /// # Errors
    /// If the system has no file descriptor left.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, identity)) = &self.name else {
            return;
        };
        if let Err(error) = (self.remove)(path, *identity) {
            tracing::warn!(path = %path.display(), %error, "a socket could not be removed");
        }
    }
}

/// Locks the directory that `path` is in, until the result is dropped.
fn lock_directory(path: &Path) -> io::Result<OwnedFd> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    let mut attempt = 0;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(rustix::io::Errno::WOULDBLOCK) if attempt < LOCK_ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes over a file descriptor that this process was started with.
#[allow(unsafe_code, reason = "a file descriptor that was inherited is known by its number only")]
fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: The borrow ends before anything could close the descriptor, and it is only asked whether it
    // is open at all.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_getfd(borrowed)?;
    // SAFETY: It is open, and by the contract of `from_fd` nothing else in this process owns it: it was
    // passed by whoever started the process, for this.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

    use std::os::fd::IntoRawFd;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_user_may_connect_and_the_name_goes_with_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_not_taken_and_a_dead_one_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let live = UnixListener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(Error::InUse { .. })));
        // Nobody removes its name, as after a kill.
        drop(live);
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(Error::InUse { .. })));
        UnixStream::connect(&path).unwrap();
        drop(listener);
    }

    #[test]
    fn what_is_no_socket_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "precious").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for name in [&path, &link, &directory.path().to_owned()] {
            assert!(matches!(Listener::bind(name), Err(Error::NotASocket { .. })), "{name:?}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let missing = directory.path().join("no/socket");
        assert!(matches!(Listener::bind(&missing), Err(Error::Socket { .. })));
        let long = directory.path().join("x".repeat(200));
        assert!(matches!(Listener::bind(&long), Err(Error::Socket { .. })));
    }

    #[test]
    fn a_name_that_was_replaced_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"another");
    }

    #[test]
    fn sockets_that_were_passed_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let number = UnixListener::bind(&path).unwrap().into_raw_fd();
        let listener = Listener::from_fd(number).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(path.exists(), "the name is that of whoever passed the socket");

        let (stream, _other) = UnixStream::pair().unwrap();
        let file = fs::File::open(directory.path()).unwrap();
        for number in [stream.into_raw_fd(), file.into_raw_fd(), 1_000_000, 0, 2, -1] {
            assert!(matches!(Listener::from_fd(number), Err(Error::Fd { .. })), "{number}");
        }
    }
}
