//! Locks on image files that QEMU understands, so that a disk has one writer, whoever it is, and nobody
//! writes to a base that others read.
//!
//! ```text
//!   byte of the file   100 + n: somebody uses the right n      200 + n: somebody does not share it
//!   n                  0 consistent read · 1 write · 3 resize
//! ```
//!
//! They are read locks of open file descriptions on single bytes, which may lie past the end: nobody
//! excludes anybody by setting one. Who has set its own looks whether another one contradicts. Numbers and
//! procedure are those of QEMU's block/file-posix.c (`raw_apply_lock_bytes`, `raw_check_lock_bytes`).
//!
//! A lock lives as long as the open file, with all duplicates of its descriptor: who opens the file again keeps one of
//! these beside it. The kernel knows the locks of one host; whether a network file system tells others is its own
//! affair.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Once;
use std::time::{Duration, Instant};

use blockhouse_block::Access;

/// Where the bytes for rights in use start.
const USED: i64 = 100;
/// Where the bytes for rights that are not shared start.
const UNSHARED: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What nobody may do to an image that is in use here: write it or change its size.
const NOT_FOR_OTHERS: [i64; 2] = [WRITE, RESIZE];

/// Whether image locks are set and respected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// One writer or many readers; somebody else's contradicting use is an error, unless it ends within a moment: a
    /// process that is started from this one has its open files, and their locks, until it has become another program.
    #[default]
    Enforce,
    /// As `Enforce`, and whoever uses the image gets some seconds to stop: for a service that is started again
    /// after a kill. What a killed process had in flight keeps its files open for a while.
    Patient,
    /// Nobody is asked, and nobody is told. What is read of an image that somebody writes may be neither
    /// the old nor the new; nothing is ever written this way.
    Off,
}

/// How long [`LockMode::Patient`] waits, and [`LockMode::Enforce`], and how long between two looks.
const PATIENCE: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(300);
const PAUSE: Duration = Duration::from_millis(10);

/// Sets the locks that using the image with `access` means. `Ok(Some(why))` if somebody else's use
/// contradicts it; then the file is to be closed, which takes the locks away. So `file` has an open file
/// description of its own.
///
/// # Errors
/// If the kernel refuses the question. A file system without such locks is no error: there nobody has any.
pub(crate) fn take(file: &File, access: Access, mode: LockMode) -> io::Result<Option<&'static str>> {
    let patience = if mode == LockMode::Patient { PATIENCE } else { MOMENT };
    wait_for(patience, |is_last| {
        let contradiction = try_take(file, access)?;
        if contradiction.is_some() && !is_last {
            // Who waits for the same must not find these.
            call(file, libc::F_OFD_SETLK, &mut libc::flock { l_len: 0, ..lock(libc::F_UNLCK, 0)? })?;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(contradiction)
    })
}

/// Tries something again as long as it would block because of another use of a file, which a child of a fork may have
/// for a moment only.
pub(crate) fn in_a_moment<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    wait_for(MOMENT, |_| attempt())
}

/// `attempt` is told whether it is the last one.
fn wait_for<T>(patience: Duration, mut attempt: impl FnMut(bool) -> io::Result<T>) -> io::Result<T> {
    let started = Instant::now();
    loop {
        let is_last = started.elapsed() >= patience;
        match attempt(is_last) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_last => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}

fn try_take(file: &File, access: Access) -> io::Result<Option<&'static str>> {
    let used: &[i64] = match access {
        Access::ReadOnly => &[CONSISTENT_READ],
        Access::ReadWrite => &[CONSISTENT_READ, WRITE, RESIZE],
    };
    let own = used.iter().map(|right| USED + right).chain(NOT_FOR_OTHERS.map(|right| UNSHARED + right));
    for byte in own {
        match set(file, byte) {
            Ok(()) => {}
            // As QEMU: a write lock of a stranger on such a byte.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(Some("somebody has locked all of it"));
            }
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
                ) =>
            {
                static WARNED: Once = Once::new();
                WARNED.call_once(|| {
                    tracing::warn!(
                        "a file system has no locks: nobody is kept from writing its images at the same time"
                    );
                });
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    for right in NOT_FOR_OTHERS {
        if is_set(file, USED + right)? {
            return Ok(Some("somebody writes to it, perhaps QEMU or another Blockhouse"));
        }
    }
    for right in used {
        if is_set(file, UNSHARED + right)? {
            return Ok(Some("somebody uses it, perhaps QEMU or another Blockhouse, and must not see it change"));
        }
    }
    Ok(None)
}

fn lock(kind: i32, byte: i64) -> io::Result<libc::flock> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(invalid)?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(invalid)?,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    })
}

/// Sets a read lock on one byte.
fn set(file: &File, byte: i64) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, &mut lock(libc::F_RDLCK, byte)?)
}

/// Whether another open file has a lock on a byte.
fn is_set(file: &File, byte: i64) -> io::Result<bool> {
    let mut found = lock(libc::F_WRLCK, byte)?;
    call(file, libc::F_OFD_GETLK, &mut found)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

#[allow(unsafe_code)]
fn call(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open, since `file` is; both commands read and write a `flock`, which `lock` is,
    // and keep no reference to it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn open(path: &std::path::Path, access: Access) -> (File, Option<&'static str>) {
        let file = File::options().read(true).write(access == Access::ReadWrite).open(path).unwrap();
        let contradiction = take(&file, access, LockMode::Enforce).unwrap();
        (file, contradiction)
    }

    #[test]
    fn one_writer_or_many_readers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (first, none) = open(image.path(), Access::ReadOnly);
        assert_eq!(none, None);
        let (second, none) = open(image.path(), Access::ReadOnly);
        assert_eq!(none, None);
        assert!(open(image.path(), Access::ReadWrite).1.is_some(), "written while it is read");
        drop(first);
        assert!(open(image.path(), Access::ReadWrite).1.is_some(), "written while it is read by another");
        drop(second);

        let (writer, none) = open(image.path(), Access::ReadWrite);
        assert_eq!(none, None);
        assert!(open(image.path(), Access::ReadWrite).1.is_some(), "two writers");
        assert!(open(image.path(), Access::ReadOnly).1.is_some(), "read while it is written");
        let duplicate = writer.try_clone().unwrap();
        drop(writer);
        assert!(open(image.path(), Access::ReadOnly).1.is_some(), "a duplicate keeps the lock");
        assert_eq!(
            take(&duplicate, Access::ReadWrite, LockMode::Enforce).unwrap(),
            None,
            "one's own lock is in nobody's way"
        );
        drop(duplicate);
        assert_eq!(open(image.path(), Access::ReadWrite).1, None);
    }

    /// Between `fork` and `exec` a child has all files of its parent open, and whoever closes one opens it again at once.
    #[test]
    fn a_lock_that_a_child_has_for_a_moment_refuses_nothing() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let is_granted = || {
            let (writer, none) = open(image.path(), Access::ReadWrite);
            assert_eq!(none, None);
            let of_the_child = writer.try_clone().unwrap();
            drop(writer);
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(2 * PAUSE);
                    drop(of_the_child);
                });
                open(image.path(), Access::ReadWrite).1.is_none()
            })
        };
        // A machine may stand still for as long as the moment is.
        assert!((0..3).any(|_| is_granted()));
    }

    #[test]
    fn who_is_patient_waits_for_the_end_of_a_use() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (writer, none) = open(image.path(), Access::ReadWrite);
        assert_eq!(none, None);
        let both = std::thread::scope(|scope| {
            let patient = || {
                let file = File::options().read(true).write(true).open(image.path()).unwrap();
                take(&file, Access::ReadWrite, LockMode::Patient).unwrap()
            };
            // Two that wait do not keep each other from it.
            let both = [scope.spawn(patient), scope.spawn(patient)];
            std::thread::sleep(5 * PAUSE);
            drop(writer);
            both.map(|thread| thread.join().unwrap())
        });
        assert_eq!(both, [None, None]);
    }
}
