//! Errors of a disk as I/O errors.

use std::error::Error as _;
use std::io;

use blockhouse_block::{Error, ErrorKind};

/// An I/O error that a VMM can match on, with the error of the disk inside.
///
/// Never [`Unsupported`](io::ErrorKind::Unsupported): imago takes that from a storage as "do it in another
/// way" or "never mind", and here it would mean that the image cannot be read.
pub(crate) fn io_error(error: Error) -> io::Error {
    let kind = match error.kind() {
        ErrorKind::Denied => io::ErrorKind::PermissionDenied,
        ErrorKind::Invalid => io::ErrorKind::InvalidInput,
        ErrorKind::Corrupt => io::ErrorKind::InvalidData,
        // What the host said, so that a machine can be stopped when its storage is full.
        ErrorKind::Storage => system_error(&error).unwrap_or(io::ErrorKind::Other),
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

fn system_error(error: &Error) -> Option<io::ErrorKind> {
    let mut causes = std::iter::successors(error.source(), |&cause| cause.source());
    let source = causes.find_map(|cause| cause.downcast_ref::<io::Error>())?;
    Some(source.kind()).filter(|kind| *kind != io::ErrorKind::Unsupported)
}

/// What imago asks for cannot be done, and `why`.
pub(crate) fn unsupported(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}

/// The answer to who wants a disk to grow and space to be set aside for what it gains.
pub(crate) fn no_preallocation() -> io::Error {
    unsupported("a disk in use grows without preallocation: ask for `PreallocateMode::Zero`")
}
