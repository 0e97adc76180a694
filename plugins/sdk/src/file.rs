//! An open file: the image, or something it refers to.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use crate::{Access, Error, FileIndex, Result};

#[cfg(not(target_family = "wasm"))]
use crate::testing::OpenFile;
#[cfg(target_family = "wasm")]
use crate::wasm::OpenFile;

/// Why a file was not registered.
pub(crate) enum NotShared {
    /// It has fewer rights than asked for.
    Rights,
    /// The host takes no more, or cannot use this one.
    Host,
}

/// An open regular file that can be read at any offset.
#[derive(Debug)]
pub struct File(pub(crate) OpenFile);

impl File {
    /// The size now, in bytes.
    ///
    /// # Errors
    /// [`Storage`](Error::Storage) if it cannot be asked.
    pub fn size(&self) -> Result<u64> {
        self.0.size().map_err(|why| Error::Storage(format!("cannot ask for the size of the file: {why}")))
    }

    /// Fills `buffer` from byte `offset` on and returns how much was read, which is less than its
    /// length only at the end of the file.
    ///
    /// # Errors
    /// [`Storage`](Error::Storage) if reading fails.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset
                .checked_add(done as u64)
                .ok_or_else(|| Error::Corrupt(format!("a read at byte {offset} is past the largest file offset")))?;
            let read = self
                .0
                .read_at(at, rest)
                .map_err(|why| Error::Storage(format!("cannot read {} bytes at {at}: {why}", rest.len())))?;
            if read == 0 {
                break;
            }
            done = done.saturating_add(read);
        }
        Ok(done)
    }

    /// The `length` bytes at `offset`, which hold `what` (for the message).
    ///
    /// Allocates `length` bytes only if the file is that long: a header field cannot make a component
    /// allocate more than the image is big.
    ///
    /// # Errors
    /// [`Corrupt`](Error::Corrupt) if the file ends before; [`Storage`](Error::Storage) if reading fails.
    pub fn read_exact_at(&self, what: &str, offset: u64, length: u64) -> Result<Vec<u8>> {
        let size = self.size()?;
        let early = || Error::ends_early(what, offset, length, size);
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(early());
        }
        let mut buffer = vec![0; usize::try_from(length).map_err(|_| early())?];
        if self.read_at(offset, &mut buffer)? == buffer.len() { Ok(buffer) } else { Err(early()) }
    }

    /// Writes all of `bytes` at byte `offset`. The file grows as necessary.
    ///
    /// # Errors
    /// [`Storage`](Error::Storage) if writing fails, perhaps after a part of it; always for a file that
    /// was opened read-only.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let failed = |why: String| Error::Storage(format!("cannot write {} bytes at {offset}: {why}", bytes.len()));
            let at = offset.checked_add(done as u64).ok_or_else(|| failed("past the largest file offset".into()))?;
            let written = self.0.write_at(at, rest).map_err(|why| failed(why.to_string()))?;
            if written == 0 || written > rest.len() {
                return Err(failed("nothing was written".into()));
            }
            done = done.saturating_add(written);
        }
        Ok(())
    }

    /// Makes the file `size` bytes long; what is added reads as zero.
    ///
    /// # Errors
    /// [`Storage`](Error::Storage) if it cannot be done.
    pub fn set_size(&self, size: u64) -> Result<()> {
        self.0.set_size(size).map_err(|why| Error::Storage(format!("cannot make the file {size} bytes long: {why}")))
    }

    /// Makes all that was written to the file, by anybody, and its size durable.
    ///
    /// # Errors
    /// [`Storage`](Error::Storage) if it cannot be promised; nor can it after that.
    pub fn sync_data(&self) -> Result<()> {
        self.0.sync_data().map_err(|why| Error::Storage(format!("cannot make what was written durable: {why}")))
    }

    /// The descriptor itself, for test components that call the host in ways that this type does not.
    #[cfg(target_family = "wasm")]
    #[doc(hidden)]
    pub fn descriptor(&self) -> &crate::wasm::bindings::wasi::filesystem::types::Descriptor {
        self.0.descriptor()
    }

    /// Registers the file for the host's own I/O: data extents name it by the returned index.
    ///
    /// # Errors
    /// [`Denied`](Error::Denied) if the file was opened with fewer rights; [`Other`](Error::Other) if the host takes
    /// no more files or cannot use this one, which it says itself if that ends `connect`.
    pub fn share(&self, access: Access) -> Result<FileIndex> {
        let text = |why: &str| format!("cannot share the file with the host: {why}");
        self.0.share(access).map_err(|why| match why {
            NotShared::Rights => Error::Denied(text("it is not a regular file, or was opened with fewer rights")),
            NotShared::Host => Error::Other(text("it takes no more files, or not this one")),
        })
    }
}
