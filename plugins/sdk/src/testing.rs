//! Files in memory, and a small host, so that a format is tested natively.
//!
//! ```
//! use blockhouse_plugin::testing::Storage;
//! let storage = Storage::new();
//! storage.insert("/images/a.raw", vec![7; 1024]);
//! // storage.disk::<MyFormat>("/images/a.raw")?.read(0, 1024)?
//! ```

// Part of tests: what breaks the contract panics here.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::{Access, BackingReference, Context, Error, File, FileIndex, Format, ImageInfo, Placement, Result};

#[derive(Debug, Default)]
struct Shared {
    files: BTreeMap<String, Rc<RefCell<Vec<u8>>>>,
    /// Files by the index that `share` returned, for all images of this storage.
    shared: Vec<Rc<RefCell<Vec<u8>>>>,
    opened: Vec<String>,
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
        self.0.borrow_mut().files.insert(path.into(), Rc::new(RefCell::new(bytes.into())));
    }

    /// The paths that were opened by reference so far, in order. Shows what an image tried.
    pub fn opened(&self) -> Vec<String> {
        self.0.borrow().opened.clone()
    }

    pub(crate) fn open(&self, path: &str, access: Access) -> Result<File, String> {
        let mut shared = self.0.borrow_mut();
        shared.opened.push(path.to_string());
        let bytes = shared.files.get(path).cloned().ok_or("no such file")?;
        Ok(File(OpenFile { bytes, access, storage: self.clone() }))
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
    bytes: Rc<RefCell<Vec<u8>>>,
    access: Access,
    storage: Storage,
}

impl OpenFile {
    pub(crate) fn size(&self) -> Result<u64, String> {
        Ok(self.bytes.borrow().len() as u64)
    }

    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, String> {
        let bytes = self.bytes.borrow();
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        // As WASI allows: short reads, so that callers have to loop.
        let length = rest.len().min(buffer.len()).min(1 << 20);
        if let (Some(to), Some(from)) = (buffer.get_mut(..length), rest.get(..length)) {
            to.copy_from_slice(from);
        }
        Ok(length)
    }

    pub(crate) fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize, String> {
        self.check_writable()?;
        let mut bytes = self.bytes.borrow_mut();
        let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(from.len()));
        let end = end.ok_or("past the largest file offset")?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        let start = end - from.len();
        bytes[start..end].copy_from_slice(from);
        Ok(from.len())
    }

    pub(crate) fn set_size(&self, size: u64) -> Result<(), String> {
        self.check_writable()?;
        let size = usize::try_from(size).map_err(|_| "too large")?;
        self.bytes.borrow_mut().resize(size, 0);
        Ok(())
    }

    pub(crate) fn sync_data(&self) -> Result<(), String> {
        self.check_writable()
    }

    fn check_writable(&self) -> Result<(), String> {
        if self.access == Access::ReadWrite { Ok(()) } else { Err("it was opened read-only".to_string()) }
    }

    pub(crate) fn share(&self, access: Access) -> Result<FileIndex, String> {
        if access == Access::ReadWrite && self.access == Access::ReadOnly {
            return Err("it was opened read-only".to_string());
        }
        let mut storage = self.storage.0.borrow_mut();
        let index = u32::try_from(storage.shared.len()).map_err(|_| "too many files")?;
        storage.shared.push(self.bytes.clone());
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
        self.backing.as_ref().map(|file| file.0.bytes.borrow().clone())
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
                let bytes = storage.shared.get(file.0 as usize).expect("a file that was shared").borrow();
                let from = usize::try_from(offset + skip).unwrap_or(usize::MAX);
                for (i, byte) in to.iter_mut().enumerate() {
                    *byte = bytes.get(from.saturating_add(i)).copied().unwrap_or(0);
                }
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
