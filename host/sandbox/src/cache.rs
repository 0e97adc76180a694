//! Compiled components on disk, so that a start does not compile them again.
//!
//! A cache is used only if nobody but its user can have written it, and what is in it only if it is whole
//! (`code.rs` says why):
//!
//! | what | must be |
//! |---|---|
//! | directory | this user's, mode 0700, no symbolic link; held open from then on |
//! | file | regular, this user's, writable by nobody else, one name, no symbolic link |
//! | name | SHA-256 of the component, and a hash of engine version and settings |
//! | content | the SHA-256 at its start is that of the rest, once it is in memory |
//!
//! Whatever is not so is not used, with a line in the log, and compiled anew.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use blockhouse_block::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, Mode, OFlags};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::code::{self, Whole};

/// What each file starts with: the version of this layout.
const MAGIC: &[u8; 8] = b"BHCODE1\n";
/// Files that are kept; the oldest go first.
const MAX_FILES: usize = 64;
/// How the names of files end.
const SUFFIX: &str = ".code";

/// A directory of compiled components.
#[derive(Debug)]
pub(crate) struct CodeCache {
    directory: File,
    path: PathBuf,
    /// Nothing is added any more.
    closed: AtomicBool,
}

impl CodeCache {
    /// Makes the directory, if it is not there.
    pub(crate) fn make(path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| failed(path, "cannot be made", error))?;
        }
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(error) => Err(failed(path, "cannot be made", error.into())),
        }
    }

    /// Opens the directory, or makes it, and sees that nobody else can write to it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::make(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory: File = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| failed(path, "cannot be opened", error.into()))?
            .into();
        let metadata = directory.metadata().map_err(|error| failed(path, "cannot be looked at", error))?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            let why = format!(
                "the code cache {} belongs to user {} with mode {:o}; it must be yours alone (mode 700)",
                path.display(),
                metadata.uid(),
                metadata.mode() & 0o7777
            );
            return Err(Error::new(ErrorKind::Denied, why));
        }
        Ok(Self { directory, path: path.to_owned(), closed: AtomicBool::new(false) })
    }

    /// Adds nothing from here on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether there is a file for the component with this SHA-256, which begins as such a file does: one that was
    /// cut off by a power cut does not. All else about it is seen when it is loaded.
    pub(crate) fn has(&self, engine: &Engine, digest: &str) -> bool {
        let mut magic = [0; MAGIC.len()];
        let file = self.open_file(&name(engine, digest)).ok().flatten();
        file.is_some_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == *MAGIC
    }

    /// The compiled code of the component with this SHA-256, if it is there and can be trusted.
    pub(crate) fn load(&self, engine: &Engine, digest: &str) -> Option<Component> {
        let name = name(engine, digest);
        let loaded = self.read(&name).map_err(wasmtime::Error::from);
        let loaded = loaded.and_then(|code| code.map(|code| deserialize(engine, &code)).transpose());
        loaded.unwrap_or_else(|error| {
            // Another file takes its place only as long as the cache is open.
            let advice =
                if self.closed.load(Ordering::Acquire) { "; remove it, or each start compiles anew" } else { "" };
            tracing::warn!(cache = %self.path.display(), file = %name, %error, "compiled code is not used{advice}");
            None
        })
    }

    /// Keeps the compiled code of a component. What goes wrong costs time at the next start, and no more.
    pub(crate) fn store(&self, engine: &Engine, digest: &str, component: &Component) {
        let name = name(engine, digest);
        if self.closed.load(Ordering::Acquire) {
            tracing::debug!(cache = %self.path.display(), file = %name, "compiled code is not kept any more");
            return;
        }
        let stored = component
            .serialize()
            .map_err(|error| io::Error::other(error.to_string()))
            .and_then(|code| self.write(&name, &code))
            .and_then(|()| self.evict(&name));
        if let Err(error) = stored {
            tracing::warn!(cache = %self.path.display(), file = %name, %error, "compiled code cannot be kept");
        }
    }

    fn read(&self, name: &str) -> io::Result<Option<Whole>> {
        self.open_file(name)?.map(|file| code::read(&file, MAGIC, 1)).transpose()
    }

    fn open_file(&self, name: &str) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => Ok(Some(file.into())),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes under another name first: nobody sees a part of it.
    fn write(&self, name: &str, code: &[u8]) -> io::Result<()> {
        let draft = format!("{name}.{}", std::process::id());
        // What a process of that number left when it was killed is nobody's, and would be in the way for good.
        match rustix::fs::unlinkat(&self.directory, &draft, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file: File = rustix::fs::openat(&self.directory, &draft, flags, Mode::RUSR | Mode::WUSR)?.into();
        let written = code::write(&mut file, MAGIC, &[code])
            .and_then(|()| Ok(rustix::fs::renameat(&self.directory, &draft, &self.directory, name)?));
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.directory, &draft, AtFlags::empty());
        }
        written
    }

    /// Removes the oldest files past the limit, but not the one that was just written.
    fn evict(&self, newest: &str) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(SUFFIX) && name != newest {
                let status = rustix::fs::statat(&self.directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                files.push((status.st_mtime, name));
            }
        }
        files.sort();
        let past = files.len().saturating_sub(MAX_FILES - 1);
        for (_, name) in files.iter().take(past) {
            match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn failed(path: &Path, what: &str, error: io::Error) -> Error {
    Error::new(ErrorKind::Storage, format!("the code cache {}: {what}: {error}", path.display())).with_source(error)
}

/// The component and the engine decide.
fn name(engine: &Engine, digest: &str) -> String {
    format!("{digest}-{}{SUFFIX}", code::engine_id(engine))
}

#[allow(unsafe_code)]
fn deserialize(engine: &Engine, code: &Whole) -> wasmtime::Result<Component> {
    // SAFETY: they come out of a file that only this user could write, in a directory that only this user can
    // enter, and are what was written there. Who could make another file of that kind can replace this program
    // as well.
    unsafe { code::deserialize(engine, code.content()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn what_is_closed_gives_and_takes_nothing() {
        let (_parent, cache, engine, file) = filled();
        assert!(cache.has(&engine, KEY) && !cache.has(&engine, "4567"));
        cache.close();
        assert!(cache.load(&engine, KEY).is_some());
        cache.store(&engine, "4567", &Component::from_binary(&engine, EMPTY).unwrap());
        assert!(!cache.has(&engine, "4567"));
        assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
        // What a power cut leaves.
        std::fs::write(&file, [0; 4096]).unwrap();
        assert!(!cache.has(&engine, KEY));
        std::fs::write(&file, "").unwrap();
        assert!(!cache.has(&engine, KEY));
    }

    /// The smallest component there is: the eight bytes that every one starts with.
    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";
    const KEY: &str = "0123";

    fn filled() -> (tempfile::TempDir, CodeCache, Engine, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("code");
        let cache = CodeCache::open(&path).unwrap();
        let engine = Engine::default();
        cache.store(&engine, KEY, &Component::from_binary(&engine, EMPTY).unwrap());
        let file = path.join(name(&engine, KEY));
        (parent, cache, engine, file)
    }

    #[test]
    fn what_was_stored_is_loaded() {
        let (_parent, cache, engine, file) = filled();
        assert!(cache.load(&engine, KEY).is_some());
        assert!(cache.load(&engine, "4567").is_none(), "another component");
        let mut config = wasmtime::Config::new();
        config.epoch_interruption(true);
        assert!(cache.load(&Engine::new(&config).unwrap(), KEY).is_none(), "another engine");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let names: Vec<_> = std::fs::read_dir(file.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 1, "a draft stayed: {names:?}");
    }

    #[test]
    fn what_a_killed_process_left_is_in_nobodys_way() {
        let (_parent, cache, engine, file) = filled();
        std::fs::remove_file(&file).unwrap();
        let draft = format!("{}.{}", file.display(), std::process::id());
        std::fs::write(&draft, "half of it").unwrap();
        cache.store(&engine, KEY, &Component::from_binary(&engine, EMPTY).unwrap());
        assert!(cache.load(&engine, KEY).is_some());
        assert!(!Path::new(&draft).exists());
    }

    #[test]
    fn what_others_can_have_written_is_not_loaded() {
        let (parent, cache, engine, file) = filled();
        for mode in [0o620, 0o602, 0o666] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(cache.load(&engine, KEY).is_none(), "mode {mode:o}");
        }
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(cache.load(&engine, KEY).is_some());

        let elsewhere = parent.path().join("elsewhere");
        std::fs::hard_link(&file, &elsewhere).unwrap();
        assert!(cache.load(&engine, KEY).is_none(), "it has two names");
        std::fs::remove_file(&file).unwrap();
        symlink(&elsewhere, &file).unwrap();
        assert!(cache.load(&engine, KEY).is_none(), "it is a symbolic link");
        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(cache.load(&engine, KEY).is_none(), "it is a pipe");

        let directory = file.parent().unwrap();
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(CodeCache::open(directory).unwrap_err().kind(), ErrorKind::Denied);
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)).unwrap();
        let link = parent.path().join("link");
        symlink(directory, &link).unwrap();
        assert!(CodeCache::open(&link).is_err(), "the directory is a symbolic link");
    }

    /// Whose mode is as it must be.
    #[test]
    fn what_belongs_to_somebody_else_is_not_used() {
        const SOMEBODY: Option<u32> = Some(65534);
        let (_parent, cache, engine, file) = filled();
        let owner = Some(rustix::process::geteuid().as_raw());
        let directory = file.parent().unwrap();
        if let Err(error) = chown(&file, SOMEBODY, None) {
            return crate::testing::skip(format_args!("a file cannot be given to somebody else: {error}"));
        }
        assert!(cache.load(&engine, KEY).is_none(), "the file is somebody else's");
        chown(&file, owner, None).unwrap();
        assert!(cache.load(&engine, KEY).is_some());
        chown(directory, SOMEBODY, None).unwrap();
        let error = CodeCache::open(directory).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("belongs to user 65534 with mode 700"), "{error}");
        chown(directory, owner, None).unwrap();
        CodeCache::open(directory).unwrap();
    }

    #[test]
    fn what_is_damaged_is_not_loaded() {
        let (_parent, cache, engine, file) = filled();
        let good = std::fs::read(&file).unwrap();
        for at in (0..good.len()).step_by(good.len() / 97 + 1) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(&file, &bad).unwrap();
            assert!(cache.load(&engine, KEY).is_none(), "byte {at} was changed");
            std::fs::write(&file, &good[..at]).unwrap();
            assert!(cache.load(&engine, KEY).is_none(), "cut off at {at}");
        }
        std::fs::write(&file, &good).unwrap();
        assert!(cache.load(&engine, KEY).is_some());
    }

    #[test]
    fn the_oldest_go_first() {
        let (_parent, cache, engine, file) = filled();
        let component = Component::from_binary(&engine, EMPTY).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH;
        File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        for number in 0..MAX_FILES {
            cache.store(&engine, &format!("key{number}"), &component);
        }
        let count = std::fs::read_dir(file.parent().unwrap()).unwrap().count();
        assert_eq!(count, MAX_FILES);
        assert!(cache.load(&engine, KEY).is_none());
        assert!(cache.load(&engine, &format!("key{}", MAX_FILES - 1)).is_some());
    }
}
