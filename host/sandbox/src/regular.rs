//! Opening files by the operator's paths without being made to wait.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

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
    let flags = careful() | i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
    // The link leads to the open file itself, whatever its name leads to by now.
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct = File::options().read(true).write(write).custom_flags(flags).open(link)?;
    usual_mode(&direct)?;
    Ok(direct)
}

/// Opens `path`; `None` if it is not a regular file.
pub(crate) fn open(path: &Path, write: bool) -> io::Result<Option<File>> {
    let file = File::options().read(true).write(write).custom_flags(careful()).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    usual_mode(&file)?;
    Ok(Some(file))
}
