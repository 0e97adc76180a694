//! Files in memory, and a small host, so that a format is tested natively.
//!
//! ```
//! use blockhouse_plugin::testing::Storage;
//! let storage = Storage::new();
//! storage.insert("/images/a.raw", vec![7; 1024]);
//! // storage.disk::<MyFormat>("/images/a.raw")?.read(0, 1024)?
//! ```

// Part of tests: what breaks the contract panics here.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::cast_possible_truncation)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::file::NotShared;
use crate::{
    Access, Allocation, BackingReference, Context, Error, File, FileIndex, Format, ImageInfo, Level, Placement, Result,
    Writer,
};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Drops what is logged from here on: for tests that make a format say the same a million times.
pub fn silence_log() {
    QUIET.store(true, Ordering::Relaxed);
}

pub(crate) fn log(level: Level, message: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("{level:?}: {message}");
    }
}

/// Something that reached a file, in the order of time. What a power cut leaves is some of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written at an offset.
    Write(u64, Vec<u8>),
    /// The file got this size.
    SetSize(u64),
    /// Everything before is durable now.
    Sync,
}

/// How a file fails; see [`Storage::fail_at`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// As a full file system: a change is refused, and so is every one after it.
    Full,
    /// As a full file system that has room for a part: a write does its first half and says so, and every
    /// change after it is refused.
    Short,
    /// As a bad spot: one change fails, and those after it do not.
    Once,
}

/// Bytes that are written whole or not at all.
const SECTOR: u64 = 512;

#[derive(Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    /// With the number of the change among those of all files.
    changes: Vec<(u64, Change)>,
    clock: Rc<Cell<u64>>,
    /// The largest size of any file; `None`: there is none.
    limit: Rc<Cell<Option<u64>>>,
    /// How it fails, and how many changes succeed before that; `None`: all succeed.
    failing: Option<(usize, Failure)>,
    /// How many reads succeed before one that fails; `None`: all succeed.
    failing_read: Cell<Option<usize>>,
}

impl Content {
    /// Returns how many bytes were written, for a write.
    fn change(&mut self, mut change: Change) -> Result<usize, String> {
        if let Some(limit) = self.limit.get()
            && change.end() > limit
        {
            return Err(format!("file too large: {limit} bytes are the limit"));
        }
        match &mut self.failing {
            Some((0, Failure::Full)) => return Err("no space left on device".to_string()),
            Some((0, Failure::Once)) => {
                self.failing = None;
                return Err("input/output error".to_string());
            }
            Some((0, Failure::Short)) => {
                self.failing = Some((0, Failure::Full));
                let half = match &change {
                    // Up to the end of a sector, as disks and file systems write: each is old or new.
                    Change::Write(offset, bytes) => {
                        let end = offset.saturating_add(bytes.len() as u64 / 2) / SECTOR * SECTOR;
                        usize::try_from(end.saturating_sub(*offset)).unwrap_or(0)
                    }
                    Change::SetSize(_) | Change::Sync => 0,
                };
                match &mut change {
                    Change::Write(_, bytes) if half > 0 => bytes.truncate(half),
                    _ => return Err("no space left on device".to_string()),
                }
            }
            Some((left, _)) => *left -= 1,
            None => {}
        }
        change.apply(&mut self.bytes);
        let written = if let Change::Write(_, bytes) = &change { bytes.len() } else { 0 };
        self.changes.push((self.clock.get(), change));
        self.clock.set(self.clock.get() + 1);
        Ok(written)
    }

    /// As the host writes: all of it, or an error.
    fn write_all(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            let written = self.change(Change::Write(offset, bytes.to_vec()))?;
            offset += written as u64;
            bytes = &bytes[written..];
        }
        Ok(())
    }
}

impl Change {
    /// The size that a file has at least after it.
    fn end(&self) -> u64 {
        match self {
            Self::Write(offset, bytes) => offset.saturating_add(bytes.len() as u64),
            Self::SetSize(size) => *size,
            Self::Sync => 0,
        }
    }

    /// Does it to a file.
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(offset, new) => {
                let start = usize::try_from(*offset).expect("a file in memory");
                let end = start.checked_add(new.len()).expect("a file in memory");
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[start..end].copy_from_slice(new);
            }
            Self::SetSize(size) => bytes.resize(usize::try_from(*size).expect("a file in memory"), 0),
            Self::Sync => {}
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    files: BTreeMap<String, Rc<RefCell<Content>>>,
    /// Files by the index that `share` returned, for all images of this storage.
    shared: Vec<Rc<RefCell<Content>>>,
    opened: Vec<String>,
    clock: Rc<Cell<u64>>,
    limit: Rc<Cell<Option<u64>>>,
}

/// Files in memory, by absolute path. A clone is the same storage.
#[derive(Clone, Debug, Default)]
pub struct Storage(Rc<RefCell<Shared>>);

impl Storage {
    /// No files.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a file.
    pub fn insert(&self, path: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        let (clock, limit) = (self.0.borrow().clock.clone(), self.0.borrow().limit.clone());
        let content = Content { bytes: bytes.into(), clock, limit, ..Content::default() };
        self.0.borrow_mut().files.insert(path.into(), Rc::new(RefCell::new(content)));
    }

    fn content(&self, path: &str) -> Rc<RefCell<Content>> {
        self.0.borrow().files.get(path).cloned().expect("a file that was inserted")
    }

    /// All bytes of a file.
    ///
    /// # Panics
    /// If there is no such file; so do the other functions that take a path of a file.
    pub fn bytes(&self, path: &str) -> Vec<u8> {
        self.content(path).borrow().bytes.clone()
    }

    /// What reached a file since it was inserted or since the last call, in order, and forgets it.
    pub fn take_changes(&self, path: &str) -> Vec<Change> {
        std::mem::take(&mut self.content(path).borrow_mut().changes).into_iter().map(|(_, change)| change).collect()
    }

    /// As [`take_changes`](Self::take_changes), for several files: with the index of each change's file in
    /// `paths`, in the order of time.
    pub fn take_changes_of(&self, paths: &[&str]) -> Vec<(usize, Change)> {
        let mut all = Vec::new();
        for (number, path) in paths.iter().enumerate() {
            let changes = std::mem::take(&mut self.content(path).borrow_mut().changes);
            all.extend(changes.into_iter().map(|(time, change)| (time, number, change)));
        }
        all.sort_by_key(|(time, ..)| *time);
        all.into_iter().map(|(_, number, change)| (number, change)).collect()
    }

    /// Fails every change after which a file would have more bytes than this, as a file system does: for images
    /// that can make a format write anywhere.
    pub fn limit_sizes(&self, bytes: u64) {
        self.0.borrow().limit.set(Some(bytes));
    }

    /// Lets `changes` more changes of a file succeed, and fails all after that, as a full file system does.
    /// `None` ends it.
    pub fn fail_after(&self, path: &str, changes: Option<usize>) {
        self.fail_at(path, changes.map(|changes| (changes, Failure::Full)));
    }

    /// Lets so many changes of a file succeed, and fails the next one in some way. `None` ends it.
    pub fn fail_at(&self, path: &str, failing: Option<(usize, Failure)>) {
        self.content(path).borrow_mut().failing = failing;
    }

    /// Lets so many reads of a file succeed, and fails the next one. `None` ends it.
    pub fn fail_read(&self, path: &str, healthy: Option<usize>) {
        self.content(path).borrow().failing_read.set(healthy);
    }

    /// The paths that were opened by reference so far, in order. Shows what an image tried.
    pub fn opened(&self) -> Vec<String> {
        self.0.borrow().opened.clone()
    }

    pub(crate) fn open(&self, path: &str, access: Access) -> Result<File, String> {
        let mut shared = self.0.borrow_mut();
        shared.opened.push(path.to_string());
        let content = shared.files.get(path).cloned().ok_or("no such file")?;
        Ok(File(OpenFile { content, access, storage: self.clone() }))
    }

    /// An open file, as a host hands it to `create` and `check`.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn file(&self, path: &str, access: Access) -> File {
        File(OpenFile { content: self.content(path), access, storage: self.clone() })
    }

    /// The image at `path`, opened and not connected, as before a call that changes it as a whole.
    ///
    /// # Errors
    /// What the format answers.
    pub fn opened_image<F: Format>(&self, path: &str, access: Access) -> Result<F> {
        let context = Context::new(path.to_string(), self.clone());
        F::open(self.file(path, access), context, access).map(|(format, _)| format)
    }

    /// Opens the image at `path` as a host would, up to and including `connect`.
    ///
    /// # Errors
    /// What the format answers.
    pub fn disk<F: Format>(&self, path: &str) -> Result<Disk<F>> {
        self.disk_with(path, Access::ReadOnly, |_| Ok(()))
    }

    /// As [`disk`](Self::disk), with a chance to call the format between `open` and `connect`.
    ///
    /// # Errors
    /// What the format or `between` answers.
    pub fn disk_with<F: Format>(
        &self,
        path: &str,
        access: Access,
        between: impl FnOnce(&mut F) -> Result<()>,
    ) -> Result<Disk<F>> {
        let image = self.open(path, access).map_err(Error::Storage)?;
        let (mut format, info) = F::open(image, Context::new(path.to_string(), self.clone()), access)?;
        between(&mut format)?;
        let backing = format.connect()?;
        assert_eq!(
            backing.is_some(),
            info.backing.is_some(),
            "connect must return the backing file that open reported"
        );
        Ok(Disk { format, info, backing, storage: self.clone() })
    }
}

/// A file of a [`Storage`].
#[derive(Debug)]
pub struct OpenFile {
    content: Rc<RefCell<Content>>,
    access: Access,
    storage: Storage,
}

impl OpenFile {
    pub(crate) fn size(&self) -> Result<u64, String> {
        Ok(self.content.borrow().bytes.len() as u64)
    }

    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, String> {
        let content = self.content.borrow();
        match content.failing_read.get() {
            Some(0) => {
                content.failing_read.set(None);
                return Err("input/output error".to_string());
            }
            healthy => content.failing_read.set(healthy.map(|healthy| healthy - 1)),
        }
        let rest = usize::try_from(offset).ok().and_then(|offset| content.bytes.get(offset..)).unwrap_or_default();
        // As WASI allows: short reads, so that callers have to loop.
        let length = rest.len().min(buffer.len()).min(1 << 20);
        if let (Some(to), Some(from)) = (buffer.get_mut(..length), rest.get(..length)) {
            to.copy_from_slice(from);
        }
        Ok(length)
    }

    pub(crate) fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize, String> {
        self.check_writable()?;
        self.content.borrow_mut().change(Change::Write(offset, from.to_vec()))
    }

    pub(crate) fn set_size(&self, size: u64) -> Result<(), String> {
        self.check_writable()?;
        self.content.borrow_mut().change(Change::SetSize(size)).map(|_| ())
    }

    pub(crate) fn sync_data(&self) -> Result<(), String> {
        self.check_writable()?;
        self.content.borrow_mut().change(Change::Sync).map(|_| ())
    }

    fn check_writable(&self) -> Result<(), String> {
        if self.access == Access::ReadWrite { Ok(()) } else { Err("it was opened read-only".to_string()) }
    }

    pub(crate) fn share(&self, access: Access) -> Result<FileIndex, NotShared> {
        if access == Access::ReadWrite && self.access == Access::ReadOnly {
            return Err(NotShared::Rights);
        }
        let mut storage = self.storage.0.borrow_mut();
        let index = u32::try_from(storage.shared.len()).map_err(|_| NotShared::Host)?;
        storage.shared.push(self.content.clone());
        Ok(FileIndex(index))
    }
}

/// An opened image of one layer.
#[derive(Debug)]
pub struct Disk<F> {
    /// The format's own state.
    pub format: F,
    /// What `open` reported.
    pub info: ImageInfo,
    backing: Option<File>,
    storage: Storage,
}

impl<F: Format> Disk<F> {
    /// The declared backing file.
    pub fn backing(&self) -> Option<&BackingReference> {
        self.info.backing.as_ref()
    }

    /// All bytes of the opened backing file.
    pub fn backing_bytes(&self) -> Option<Vec<u8>> {
        self.backing.as_ref().map(|file| file.0.content.borrow().bytes.clone())
    }

    /// Reads as the host does, with `below` for what the image leaves to its backing file:
    /// `below(offset, buffer)` fills the buffer. Checks that every answer keeps the contract.
    ///
    /// # Errors
    /// What the format answers.
    ///
    /// # Panics
    /// If an answer breaks the contract.
    pub fn read_over(
        &mut self,
        virtual_size: u64,
        offset: u64,
        buffer: &mut [u8],
        below: &mut dyn FnMut(u64, &mut [u8]),
    ) -> Result<()> {
        let mut done = 0usize;
        while done < buffer.len() {
            let at = offset + done as u64;
            let budget = 64;
            let located = self.format.locate(at, (buffer.len() - done) as u64, budget)?;
            assert!(located.extents.len() <= budget as usize, "more extents than asked for");
            assert!(located.start <= at, "starts after the offset asked for");
            let mut start = located.start;
            let before = done;
            for extent in &located.extents {
                assert!(extent.length > 0, "empty extent");
                let end = start.checked_add(extent.length).expect("extents overflow");
                assert!(end <= virtual_size, "extent past the virtual size");
                let at = offset + done as u64;
                if at >= start && at < end && done < buffer.len() {
                    let take = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len() - done);
                    let skip = at - start;
                    let to = &mut buffer[done..done + take];
                    self.fill(extent.placement, extent.length, skip, at, to, below)?;
                    done += take;
                }
                start = end;
            }
            assert!(done > before, "the answer does not contain the offset asked for");
        }
        Ok(())
    }

    fn fill(
        &mut self,
        placement: Placement,
        length: u64,
        skip: u64,
        at: u64,
        to: &mut [u8],
        below: &mut dyn FnMut(u64, &mut [u8]),
    ) -> Result<()> {
        match placement {
            Placement::Zero => to.fill(0),
            Placement::Unallocated => below(at, to),
            Placement::Data { file, offset, .. } => {
                let storage = self.storage.0.borrow();
                let content = storage.shared.get(file.0 as usize).expect("a file that was shared").borrow();
                let from = usize::try_from(offset + skip).unwrap_or(usize::MAX);
                let there = content.bytes.get(from..).unwrap_or_default();
                let (known, past) = to.split_at_mut(there.len().min(to.len()));
                known.copy_from_slice(&there[..known.len()]);
                past.fill(0);
            }
            Placement::Packed { token } => {
                let unit = self.format.unpack(token, length)?;
                assert_eq!(unit.len() as u64, length, "unpack must give the whole extent");
                let skip = usize::try_from(skip).expect("a packed unit fits in memory");
                to.copy_from_slice(&unit[skip..skip + to.len()]);
            }
        }
        Ok(())
    }

    /// Reads with zeroes below.
    ///
    /// # Errors
    /// What the format answers.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0xa5; length];
        self.read_over(self.info.virtual_size, offset, &mut buffer, &mut |_, to| to.fill(0))?;
        Ok(buffer)
    }
}

impl<F: Writer> Disk<F> {
    fn shared(&self, file: FileIndex) -> Rc<RefCell<Content>> {
        let storage = self.storage.0.borrow();
        storage.shared.get(file.0 as usize).cloned().expect("a file that was shared")
    }

    fn put(&self, file: FileIndex, offset: u64, bytes: &[u8]) -> Result<()> {
        self.shared(file).borrow_mut().write_all(offset, bytes).map_err(Error::Storage)
    }

    /// Writes as the host does, with `below` as in [`read_over`](Self::read_over): in place where an extent
    /// may be overwritten, else through `prepare` and `commit`, or `abandon` if the storage fails. Checks
    /// that every answer keeps the contract. Call the format's `begin` before.
    ///
    /// # Errors
    /// What the format answers, and failures of the storage.
    ///
    /// # Panics
    /// If an answer breaks the contract.
    pub fn write_over(&mut self, offset: u64, bytes: &[u8], below: &mut dyn FnMut(u64, &mut [u8])) -> Result<()> {
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let part = |from: u64, to: u64| &bytes[(from - offset) as usize..(to - offset) as usize];
            let located = self.format.locate(at, end - at, 64)?;
            let mut start = located.start;
            let found = located.extents.iter().find_map(|extent| {
                let from = start;
                start += extent.length;
                (from..start).contains(&at).then_some((from, start, extent.placement))
            });
            let (from, to, placement) = found.expect("the answer does not contain the offset asked for");
            if let Placement::Data { file, offset: place, overwrite: true } = placement {
                let stop = to.min(end);
                self.put(file, place + (at - from), part(at, stop))?;
                at = stop;
                continue;
            }
            let allocations = self.format.prepare(at, to.min(end) - at, 16)?;
            assert!(allocations.first().is_some_and(|first| first.start <= at), "no space for the offset asked for");
            let tickets: Vec<u64> = allocations.iter().map(|allocation| allocation.ticket).collect();
            let mut filled = at;
            for allocation in &allocations {
                assert!(filled.max(allocation.start) == filled, "a gap in the space");
                let stop = allocation.start + allocation.length;
                let write = self.copy_on_write(allocation, (at, end), part, below);
                if let Err(error) = write {
                    self.format.abandon(&tickets)?;
                    return Err(error);
                }
                filled = stop.min(end);
            }
            if let Err(error) = self.format.commit(&tickets) {
                self.format.abandon(&tickets)?;
                return Err(error);
            }
            at = filled;
        }
        Ok(())
    }

    fn copy_on_write<'b>(
        &mut self,
        allocation: &Allocation,
        (at, end): (u64, u64),
        part: impl Fn(u64, u64) -> &'b [u8],
        below: &mut dyn FnMut(u64, &mut [u8]),
    ) -> Result<()> {
        let &Allocation { start, length, file, offset, .. } = allocation;
        let mut content = vec![0; usize::try_from(length).expect("it fits into memory")];
        self.read_over(self.info.virtual_size, start, &mut content, below)?;
        let (from, to) = (start.max(at), (start + length).min(end));
        content[(from - start) as usize..(to - start) as usize].copy_from_slice(part(from, to));
        self.put(file, offset, &content)
    }

    /// Flushes as the host does: the data, then what the format holds back.
    ///
    /// # Errors
    /// What the format answers, and failures of the storage.
    pub fn flush(&mut self) -> Result<()> {
        let shared = self.storage.0.borrow().shared.clone();
        for file in shared {
            file.borrow_mut().change(Change::Sync).map_err(Error::Storage)?;
        }
        // As a host that gives the space back to the file system: it reads as zero.
        for freed in self.format.flush()? {
            let zeroes = vec![0; usize::try_from(freed.length).expect("it fits into memory")];
            self.put(freed.file, freed.offset, &zeroes)?;
        }
        Ok(())
    }
}
