//! Opening files by the operator's paths without being made to wait.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path};

use blockhouse_block::FileIdentity;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::grant::absolute_name;

/// Which file it is.
pub(crate) fn identity(file: &File) -> io::Result<FileIdentity> {
    let metadata = file.metadata()?;
    Ok(FileIdentity { device: metadata.dev(), inode: metadata.ino() })
}

/// Sees that `file` is what the absolute name of its path leads to. With `..` in it, it need not be: the name is text,
/// and the kernel follows a link before it climbs.
/// The error says what to write in its place.
pub(crate) fn refuse_detour(path: &Path, file: &File) -> Result<(), String> {
    if !path.components().any(|part| part == Component::ParentDir) {
        return Ok(());
    }
    let name = absolute_name(path).map_err(|error| error.message().to_owned())?;
    let named = std::fs::metadata(&name).map(|named| FileIdentity { device: named.dev(), inode: named.ino() });
    match (named, identity(file)) {
        (Ok(named), Ok(opened)) if named == opened => Ok(()),
        _ => {
            let path = path.display();
            Err(format!("a link before the `..` in {path} leads elsewhere than to {name}; write the path without `..`"))
        }
    }
}

/// Flags for every open: a FIFO must not make the host wait for its other end, and a terminal must not
/// become the controlling one.
pub(crate) fn careful() -> i32 {
    i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or(0)
}

/// Puts a file that was opened with [`careful`] flags, and turned out to be regular, into its usual
/// mode: left as it is, asynchronous reads of it would fail with EAGAIN.
pub(crate) fn usual_mode(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags & !OFlags::NONBLOCK)?)
}

/// The same open file past the page cache (`O_DIRECT` of open(2)), with a description of its own: what a
/// component reads of it stays buffered, and needs no alignment.
pub(crate) fn direct(file: &File, write: bool) -> io::Result<File> {
    again(file, write, OFlags::DIRECT)
}

/// The same open file, for the host to write beside a component. It has a description of its own: Linux says once to
/// each that something could not be written, and a sync of the host must not take that away from one of the component,
/// which makes the next metadata durable because it heard of nothing. It has no locks.
pub(crate) fn beside(file: &File) -> io::Result<File> {
    again(file, true, OFlags::empty()).or_else(|error| {
        // Without /proc, or without the right to open it again.
        tracing::warn!(
            "an image is written with the descriptor of its component, since it cannot be opened again: {error}"
        );
        file.try_clone()
    })
}

fn again(file: &File, write: bool, flags: OFlags) -> io::Result<File> {
    let flags = careful() | i32::try_from(flags.bits()).unwrap_or(0);
    // The link leads to the open file itself, whatever its name leads to by now.
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let again = File::options().read(true).write(write).custom_flags(flags).open(link)?;
    usual_mode(&again)?;
    Ok(again)
}

/// Opens `path`; what it is, if it is not a regular file.
pub(crate) fn open(path: &Path, write: bool) -> io::Result<Result<File, &'static str>> {
    let file = File::options().read(true).write(write).custom_flags(careful()).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() {
        return Ok(Err(if kind.is_dir() {
            "it is not a regular file but a directory"
        } else if kind.is_block_device() {
            "it is not a regular file but a block device, and none is opened; a file system on it may hold images"
        } else {
            "it is not a regular file"
        }));
    }
    usual_mode(&file)?;
    Ok(Ok(file))
}
