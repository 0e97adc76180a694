//! What can go wrong before a front end is served.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// An error of the back end itself; what front ends do wrong ends their sessions and is in the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody listens at the socket.
    #[error("{} is served by another process: stop that one, or choose another socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Where the socket is to be, there is something else.
    #[error("{} is no socket, and was not touched: remove it, or choose another path", path.display())]
    NotASocket {
        /// What is there.
        path: PathBuf,
    },
    /// The system refuses something at the socket.
    #[error("cannot {what} {}", path.display())]
    Socket {
        /// Completes "cannot".
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file descriptor that was to be passed to this process is not what was expected.
    #[error("fd:{number} {why}")]
    Fd {
        /// The descriptor.
        number: RawFd,
        /// What is wrong with it.
        why: String,
    },
    /// A front end holds up the end of its session, by something that it sent and that takes its time to be closed.
    /// Requests of it may be in flight: its disk is not to be closed.
    #[error("a front end holds up the end of its session: what it asked for may be in flight")]
    HeldUp,
    /// The host failed.
    #[error("cannot {what}")]
    Host {
        /// Completes "cannot".
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The result of an operation of the back end.
pub type Result<T, E = Error> = std::result::Result<T, E>;
