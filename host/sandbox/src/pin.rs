//! A file that is pinned: its content has the SHA-256 that the operator stated, and keeps it while it is used.
//!
//! ```text
//!   granted ──▶ held open, locked ──▶ leased or stamped ──▶ hashed ──▶ equal? ──▶ pinned
//!                                            │                                      │ before and after each call of a
//!                                            └──────────── unchanged? ◀─────────────┘ component; every second (CHECK_EVERY)
//!                                                              └─ no ──▶ revoked, and then the lease given back
//!
//!   read ──▶ revoked? ── no ──▶ used: bytes, holes, sizes         call ──▶ unchanged? ── yes ──▶ used, and remembered
//!                └─ yes ──▶ error                                               └─ no ──▶ error
//! ```
//!
//! What keeps the content from changing under the disk, the strongest first that the file system offers:
//!
//! | | what holds | what does not |
//! |---|---|---|
//! | fs-verity | the kernel refuses every write, for ever, and checks what it reads | |
//! | a read lease | nobody has the file open for writing (nor mapped), and whoever wants to is held up by the kernel until the pin is revoked, for 45 s at most (`/proc/sys/fs/lease-break-time`). What was read counts only if it is not revoked after that, so it was read before any writer ran: no changed byte is served, or remembered | changes behind the file system (the device below it, another client of a network file system); a process that is itself held up for those 45 s, so that it does not notice: it is stopped, or waits for a file system that does not say what became of another pinned file |
//! | stamps | a change of size, inode, modification or change time is noticed within [`CHECK_EVERY`], and at the latest after the call of a component that it falls into: what components say and unpack, which is remembered, is made of bytes from before it, where the file system stamps a change before it makes it | bytes and holes that the host itself finds in the file until it is noticed: they are served, and copied where a write to a layer above copies. Changes that the file system stamps late (a client of a network file system remembers stamps for a while) or not at all (a mapping, on tmpfs) |
//!
//! A request that fails may leave anything in the buffers that it was to fill. What was learned before the pin was
//! revoked (where bytes live, what was unpacked) is that of the pinned content, and is still used; bytes of the file
//! itself are not.
//!
//! A lease needs the owner of the file or `CAP_LEASE`. In each case the file stays locked as QEMU locks it, so
//! that QEMU, and Blockhouse, do not write to it. A digest is computed each time: what was computed before is
//! remembered nowhere, since nothing would say that the file is still the same.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use blockhouse_block::{Access, Error, ErrorKind, Result, Validity};
use rustix::fs::{AtFlags, StatxFlags, statx};
use sha2::{Digest as _, Sha256};

use crate::grants::Sha256Digest;
use crate::locks::{self, LockMode};

/// How often pinned files are looked at while no component is called.
pub const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Bytes that are hashed at a time.
const CHUNK: usize = 1 << 20;

/// How old a change time must be to be trusted: with coarse clocks, a later change may get the same one.
const SETTLED: Duration = Duration::from_millis(50);

/// What the file system does to keep a pinned file as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeper {
    /// The kernel refuses writes.
    Verity,
    /// The kernel announces writers, and holds them up.
    Lease,
    /// Changes are noticed afterwards.
    Stamps,
}

/// What tells one state of a file from another.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        let status = file.metadata()?;
        Ok(Self {
            device: status.dev(),
            inode: status.ino(),
            size: status.size(),
            modified: (status.mtime(), status.mtime_nsec()),
            changed: (status.ctime(), status.ctime_nsec()),
        })
    }

    /// Whether the change time is so far in the past that the next change cannot have the same one.
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seconds = u64::try_from(self.changed.0).unwrap_or(0);
        let changed = Duration::new(seconds, u32::try_from(self.changed.1).unwrap_or(0));
        now.checked_sub(changed).is_some_and(|age| age > SETTLED)
    }

    /// In words, what is different.
    fn difference(&self, now: &Self) -> String {
        if self.size != now.size {
            return format!("its size changed from {} to {} bytes", self.size, now.size);
        }
        if self.modified != now.modified {
            return "it was written to".to_owned();
        }
        "its change time changed: it was written to, renamed, linked or given other rights".to_owned()
    }
}

/// A pinned file. While it lives the file is held open, locked and watched.
#[derive(Debug)]
pub(crate) struct Pin {
    /// The open file that has the locks and the lease.
    file: Arc<File>,
    name: String,
    digest: Sha256Digest,
    stamp: Stamp,
    keeper: Keeper,
    validity: Arc<Validity>,
}

impl Pin {
    /// Hashes `file`, and holds it as it is from then on. `progress` is told how many bytes of how many are
    /// hashed.
    pub(crate) fn new(
        file: Arc<File>,
        name: &str,
        wanted: Sha256Digest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Arc<Self>> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Storage, format!("cannot grant {name}: {error}")).with_source(error)
        };
        let denied =
            |why: &str| Error::new(ErrorKind::Denied, format!("cannot grant {name}, which is pinned by sha256: {why}"));
        if let Some(pin) = shared(&file, &wanted) {
            return Ok(pin);
        }
        if let Some(why) = locks::take(&file, Access::ReadOnly, LockMode::Enforce).map_err(failed)? {
            return Err(denied(why));
        }
        let keeper = if has_verity(&file) {
            Keeper::Verity
        } else {
            match locks::in_a_moment(|| lease::take(&file)) {
                Ok(true) => Keeper::Lease,
                Ok(false) => Keeper::Stamps,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(denied("somebody has it open for writing"));
                }
                Err(error) => {
                    tracing::debug!(file = name, %error, "no lease on a pinned file");
                    Keeper::Stamps
                }
            }
        };
        if keeper == Keeper::Stamps {
            // Pages of a mapping that are dirty are written without a new stamp; once they are clean, not.
            if let Err(error) = file.sync_all() {
                tracing::debug!(file = name, %error, "a pinned file cannot be synced");
            }
        }
        let mut stamp = Stamp::of(&file).map_err(failed)?;
        // A file that is changed all the time never settles, and is found out below.
        for _ in 0..10 {
            if stamp.is_settled() {
                break;
            }
            std::thread::sleep(SETTLED);
            stamp = Stamp::of(&file).map_err(failed)?;
        }
        let digest = hash(&file, stamp.size, progress).map_err(failed)?;
        if digest != wanted {
            return Err(denied(&format!("its content has the sha256 {digest}, and {wanted} is wanted")));
        }
        let pin =
            Arc::new(Self { file, name: name.to_owned(), digest, stamp, keeper, validity: Arc::new(Validity::new()) });
        pin.check().map_err(|why| denied(&format!("while it was looked at, {why}")))?;
        tracing::info!(file = name, sha256 = %digest, ?keeper, "pinned");
        watch(&pin);
        Ok(pin)
    }

    pub(crate) fn digest(&self) -> &Sha256Digest {
        &self.digest
    }

    /// What files that are read by the host depend on.
    pub(crate) fn validity(&self) -> Arc<Validity> {
        Arc::clone(&self.validity)
    }

    /// Whether it was found not to be what it was. Nobody is asked: who hears no after a read has read what is
    /// pinned, as far as its keeper goes.
    pub(crate) fn is_revoked(&self) -> bool {
        self.validity.revoked().is_some()
    }

    /// Looks whether the file is what it was, and revokes it if not. Two system calls at most.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some(why) = self.validity.revoked() {
            return Err(why.to_owned());
        }
        let changed = match self.keeper {
            Keeper::Verity => None,
            Keeper::Lease => (!lease::is_held(&self.file)).then(|| "somebody opened it for writing".to_owned()),
            Keeper::Stamps => match Stamp::of(&self.file) {
                Ok(now) if now == self.stamp => None,
                Ok(now) => Some(self.stamp.difference(&now)),
                Err(error) => Some(format!("it cannot be looked at: {error}")),
            },
        };
        let Some(changed) = changed else { return Ok(()) };
        let why = format!("it is pinned by sha256, and {changed}");
        if self.validity.revoke(why.clone()) {
            tracing::error!(file = %self.name, "a pinned file is not used any more: {why}");
            if self.keeper == Keeper::Lease {
                // Whoever waits may go on, and not before it is revoked: a read that ends later asks, and fails.
                lease::give_back(&self.file);
            }
        }
        Err(why)
    }
}

/// Hashes the first `size` bytes.
fn hash(file: &File, size: u64, progress: &mut dyn FnMut(u64, u64)) -> std::io::Result<Sha256Digest> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    progress(0, size);
    while done < size {
        let read = file.read_at(&mut buffer, done)?;
        let bytes = buffer.get(..read).filter(|bytes| !bytes.is_empty());
        // It has become shorter: the stamp says so.
        let Some(bytes) = bytes else { break };
        hasher.update(bytes);
        done = done.saturating_add(u64::try_from(read).unwrap_or(0));
        progress(done.min(size), size);
    }
    Ok(Sha256Digest::new(hasher.finalize().into()))
}

fn has_verity(file: &File) -> bool {
    statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .is_ok_and(|status| status.stx_attributes.contains(rustix::fs::StatxAttributes::VERITY))
}

/// The pins of this process that are watched.
static WATCHED: Mutex<Vec<Weak<Pin>>> = Mutex::new(Vec::new());

/// A pin of the same file by the same digest that is in use, so that several disks on one base hash it once.
fn shared(file: &File, wanted: &Sha256Digest) -> Option<Arc<Pin>> {
    let status = file.metadata().ok()?;
    let watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut pins = watched.iter().filter_map(Weak::upgrade);
    let same =
        |pin: &Arc<Pin>| (pin.stamp.device, pin.stamp.inode) == (status.dev(), status.ino()) && pin.digest == *wanted;
    pins.find(|pin| same(pin) && pin.check().is_ok())
}

/// Has the thread look at a pin for as long as it lives. The thread ends when there is none.
fn watch(pin: &Arc<Pin>) {
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    watched.push(Arc::downgrade(pin));
    if watched.len() > 1 {
        return;
    }
    let spawned = std::thread::Builder::new().name("blockhouse-pins".to_owned()).spawn(|| {
        loop {
            std::thread::sleep(CHECK_EVERY);
            let pins: Vec<Arc<Pin>> = {
                let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
                watched.retain(|pin| pin.strong_count() > 0);
                if watched.is_empty() {
                    return;
                }
                watched.iter().filter_map(Weak::upgrade).collect()
            };
            for pin in pins {
                // Whoever reads the file is told.
                let _ = pin.check();
            }
        }
    });
    if let Err(error) = spawned {
        // Nobody would notice a change: what is not watched cannot be used.
        watched.clear();
        pin.validity.revoke(format!("it is pinned by sha256, and cannot be watched: {error}"));
    }
}

/// Read leases: fcntl(2), "Leases".
mod lease {
    use super::{AsRawFd, File};

    /// Which signal that is (Linux, asm-generic/fcntl.h).
    const F_SETSIG: i32 = 10;

    /// The signal that the kernel sends when somebody wants to write. By default it is ignored, and it is not
    /// sent at all once the owner is taken off.
    const SIGNAL: i32 = libc::SIGURG;

    /// True if the lease was taken: nobody has the file open for writing. False if there are none for this file
    /// or this user.
    ///
    /// # Errors
    /// `WouldBlock` if somebody has the file open for writing.
    pub(super) fn take(file: &File) -> std::io::Result<bool> {
        fcntl(file, F_SETSIG, SIGNAL)?;
        match fcntl(file, libc::F_SETLEASE, libc::F_RDLCK) {
            Ok(_) => {
                fcntl(file, libc::F_SETOWN, 0)?;
                Ok(true)
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Whether the lease is there, and nobody waits for its end.
    pub(super) fn is_held(file: &File) -> bool {
        fcntl(file, libc::F_GETLEASE, 0).is_ok_and(|kind| kind == libc::F_RDLCK)
    }

    pub(super) fn give_back(file: &File) {
        if let Err(error) = fcntl(file, libc::F_SETLEASE, libc::F_UNLCK) {
            tracing::debug!(%error, "a lease cannot be given back");
        }
    }

    #[allow(unsafe_code)]
    fn fcntl(file: &File, command: i32, argument: i32) -> std::io::Result<i32> {
        // SAFETY: the descriptor is open, since `file` is; these commands take a number, or nothing, and touch
        // no memory of this process.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
        if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;
    use crate::testing::{LIMIT, skip};

    /// Whether files of this file system have leases, for this user. If not, says so.
    #[allow(unsafe_code)]
    fn leases_are_here(path: &std::path::Path) -> bool {
        let file = File::open(path).unwrap();
        // SAFETY: the descriptor is open, and the command takes a number.
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
        // Refused for a while (somebody writes) is not the same as for ever.
        let error = std::io::Error::last_os_error();
        let here = taken == 0 || error.kind() == std::io::ErrorKind::WouldBlock;
        if taken == 0 {
            // Also in a child that another test starts right now.
            lease::give_back(&file);
        }
        if !here {
            skip(format_args!("there are no leases on {}: {error}", path.display()));
        }
        here
    }

    fn digest(bytes: &[u8]) -> Sha256Digest {
        Sha256Digest::new(Sha256::digest(bytes).into())
    }

    fn pin(path: &std::path::Path, bytes: &[u8]) -> Result<Arc<Pin>> {
        Pin::new(Arc::new(File::open(path).unwrap()), &path.display().to_string(), digest(bytes), &mut |_, _| {})
    }

    /// As on a file system without leases.
    pub(crate) fn stamped(path: &std::path::Path, bytes: &[u8]) -> Pin {
        let made = pin(path, bytes).unwrap();
        if made.keeper == Keeper::Lease {
            lease::give_back(&made.file);
        }
        Pin {
            file: Arc::new(File::open(path).unwrap()),
            name: made.name.clone(),
            digest: made.digest,
            stamp: made.stamp.clone(),
            keeper: Keeper::Stamps,
            validity: Arc::default(),
        }
    }

    pub(crate) fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        // Closed for writing: a lease is on a file that nobody writes.
        let (_, path) = file.into_parts();
        tempfile::NamedTempFile::from_parts(File::open(&path).unwrap(), path)
    }

    #[test]
    fn the_digest_is_that_of_the_content() {
        let bytes = vec![7; (CHUNK * 2) + 13];
        let file = file(&bytes);
        let mut told = Vec::new();
        let held = Arc::new(File::open(file.path()).unwrap());
        Pin::new(held, "a", digest(&bytes), &mut |done, total| told.push((done, total))).unwrap();
        let size = bytes.len() as u64;
        assert_eq!(told, [(0, size), (1 << 20, size), (2 << 20, size), (size, size)]);

        // It is let go of, and hashed again: nothing is remembered. While it is held, it is shared.
        let first = pin(file.path(), &bytes).unwrap();
        assert!(Arc::ptr_eq(&first, &pin(file.path(), &bytes).unwrap()));

        let error = pin(file.path(), b"something else").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        let text =
            format!("its content has the sha256 {}, and {} is wanted", digest(&bytes), digest(b"something else"));
        assert!(error.to_string().ends_with(&text), "{error}");
    }

    #[test]
    fn stamps_notice_every_kind_of_change() {
        type Change = fn(&std::path::Path);
        let change: [(&str, Change); 4] = [
            ("written to", |path| File::options().write(true).open(path).unwrap().write_all(b"x").unwrap()),
            ("size changed from 5 to 6", |path| {
                File::options().append(true).open(path).unwrap().write_all(b"x").unwrap();
            }),
            ("size changed from 5 to 0", |path| File::create(path).map(drop).unwrap()),
            // Written, and the modification time put back.
            ("its change time changed", |path| {
                let file = File::options().write(true).open(path).unwrap();
                let before = file.metadata().unwrap().modified().unwrap();
                (&file).write_all(b"x").unwrap();
                file.set_modified(before).unwrap();
            }),
        ];
        for (what, change) in change {
            let file = file(b"hello");
            let pin = stamped(file.path(), b"hello");
            pin.check().unwrap();
            assert_eq!(pin.validity().revoked(), None);
            change(file.path());
            let why = pin.check().unwrap_err();
            assert!(why.contains(what), "{why}");
            assert_eq!(pin.validity().revoked(), Some(why.as_str()));
            assert_eq!(pin.check().unwrap_err(), why, "and stays revoked");
        }
    }

    #[test]
    fn a_lease_holds_a_writer_up_until_the_change_was_noticed() {
        let file = file(b"hello");
        if !leases_are_here(file.path()) {
            return;
        }
        let pin = pin(file.path(), b"hello").unwrap();
        assert_eq!(pin.keeper, Keeper::Lease);
        pin.check().unwrap();
        // Readers are welcome.
        drop(File::open(file.path()).unwrap());
        pin.check().unwrap();
        let flags = rustix::fs::OFlags::NONBLOCK.bits();
        let writer = File::options().write(true).custom_flags(i32::try_from(flags).unwrap()).open(file.path());
        assert_eq!(writer.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        let why = pin.check().unwrap_err();
        assert_eq!(why, "it is pinned by sha256, and somebody opened it for writing");
        assert_eq!(pin.validity().revoked(), Some(why.as_str()));
        // Nobody waits for a pin that is over.
        File::options().write(true).open(file.path()).unwrap();
    }

    #[test]
    fn a_file_that_is_open_for_writing_is_not_pinned() {
        let file = file(b"hello");
        let writer = File::options().write(true).open(file.path()).unwrap();
        if leases_are_here(file.path()) {
            let error = pin(file.path(), b"hello").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.to_string().ends_with("somebody has it open for writing"), "{error}");
        } else {
            assert_eq!(pin(file.path(), b"hello").unwrap().keeper, Keeper::Stamps);
        }
        drop(writer);
        pin(file.path(), b"hello").unwrap();
    }

    /// A child that is started has all that is open for a moment.
    #[test]
    fn a_file_that_is_open_for_writing_for_a_moment_is_pinned() {
        let file = file(b"hello");
        let is_pinned = || {
            let writer = File::options().write(true).open(file.path()).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(20));
                    drop(writer);
                });
                pin(file.path(), b"hello").is_ok()
            })
        };
        // A machine may stand still for as long as the moment is.
        assert!((0..3).any(|_| is_pinned()));
    }

    /// The thread looks by itself, and ends.
    #[test]
    fn a_change_is_noticed_without_anybody_asking() {
        let file = file(b"hello");
        let pin = pin(file.path(), b"hello").unwrap();
        let writer = std::thread::spawn({
            let path = file.path().to_owned();
            // Held up by a lease until the thread has noticed.
            move || File::options().append(true).open(path).unwrap().write_all(b"x").unwrap()
        });
        let began = std::time::Instant::now();
        while pin.validity().revoked().is_none() {
            assert!(began.elapsed() < LIMIT, "nobody looks");
            std::thread::yield_now();
        }
        writer.join().unwrap();
    }
}
