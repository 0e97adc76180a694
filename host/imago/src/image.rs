//! A disk as a format driver of imago.

use std::fmt;
use std::io;
use std::sync::Arc;

use blockhouse_block::{BlockBackend, Disk};
use imago::format::drivers::FormatDriverInstance;
use imago::format::{Format, PreallocateMode};
use imago::raw::Raw;
use imago::{DynStorage, PreparedDataMapping, ShallowMapping, Storage};
use maybe_async::maybe_async;

use crate::error::{io_error, no_preallocation, unsupported};
use crate::storage::DiskStorage;

/// A disk as imago sees it: the driver that goes into
/// [`FormatAccess::new`](imago::FormatAccess::new) or `SyncFormatAccess::new`.
///
/// `S` is the storage type of the VMM. Those that mix formats use `Box<dyn DynStorage>`, which
/// [`new`](Self::new) is for; with [`DiskStorage`] itself ([`with_storage`](DiskImage::with_storage)) a
/// request costs an allocation less.
///
/// To imago it is a raw image: formats and backing files are inside the disk. What it offers beyond that:
///
/// | imago | the disk |
/// |---|---|
/// | `write_zeroes` | zeroes of any range; the space stays, where the format can keep it |
/// | `discard_to_zero` | zeroes of any range; the space is given back |
/// | `discard_to_any` | a discard: each byte reads as before or as zero |
/// | `discard_to_backing` | unsupported: what lies below is the disk's own affair |
/// | `flush`, `sync` | each a flush: data and metadata are durable |
/// | `invalidate_cache` | unsupported: open the image again |
/// | `resize_grow` | [`Disk::grow`], without preallocation; other owners of the disk may call it as well |
/// | `resize_shrink` | unsupported, unless there is nothing to do: a disk in use only gets larger |
#[derive(Debug)]
pub struct DiskImage<S: Storage + 'static = Box<dyn DynStorage>> {
    /// Dropped first, so that the storage can be the last owner.
    disk: Arc<Disk>,
    /// Holds the storage, and builds the mappings, which only imago can.
    raw: Raw<S>,
}

impl DiskImage {
    /// A driver over a disk, for `FormatAccess<Box<dyn DynStorage>>`. It is writable if the disk is.
    ///
    /// Takes a [`Disk`] or an [`Arc`] of one; for who closes it see [`DiskStorage`].
    ///
    /// # Errors
    /// What imago says about the storage; there is nothing that it could say.
    pub fn new(disk: impl Into<Arc<Disk>>) -> io::Result<Self> {
        Self::with_storage(disk, |storage| Box::new(storage))
    }
}

impl<S: Storage + 'static> DiskImage<S> {
    /// A driver over a disk, for the storage type that `wrap` makes of the disk's.
    ///
    /// # Errors
    /// As [`new`](DiskImage::new).
    pub fn with_storage(disk: impl Into<Arc<Disk>>, wrap: impl FnOnce(DiskStorage) -> S) -> io::Result<Self> {
        let disk = disk.into();
        let writable = disk.is_writable();
        let storage = wrap(DiskStorage::new(Arc::clone(&disk)));
        let raw = at_once(Raw::open_image(storage, writable))?;
        Ok(Self { disk, raw })
    }

    /// Has imago's raw image, which remembers its size, follow a disk that was grown.
    #[maybe_async]
    async fn follow(&self) -> io::Result<()> {
        let capacity = self.disk.capacity();
        if capacity <= self.raw.size() {
            return Ok(());
        }
        self.raw.resize_grow(capacity, PreallocateMode::None).await
    }
}

/// The result of a future that has nothing to wait for.
#[maybe_async::async_impl]
fn at_once<T>(future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    use std::task::{Context, Poll, Waker};
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::Error::other("imago waits for something to take a storage")),
    }
}

/// The result, which is there.
#[maybe_async::sync_impl]
fn at_once<T>(result: io::Result<T>) -> io::Result<T> {
    result
}

#[maybe_async(?Send)]
impl<S: Storage + 'static> FormatDriverInstance for DiskImage<S> {
    type Storage = S;

    fn format(&self) -> Format {
        Format::Raw
    }

    /// Never: a format is stated.
    async unsafe fn probe(_storage: &S) -> io::Result<bool>
    where
        Self: Sized,
    {
        Ok(false)
    }

    fn size(&self) -> u64 {
        self.disk.capacity()
    }

    fn zero_granularity(&self) -> Option<u64> {
        Some(1)
    }

    fn collect_storage_dependencies(&self) -> Vec<&S> {
        self.raw.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        self.disk.is_writable()
    }

    #[allow(clippy::needless_lifetimes)] // Named for the future.
    async fn get_mapping<'a>(&'a self, offset: u64, max_length: u64) -> io::Result<(ShallowMapping<'a, S>, u64)> {
        self.follow().await?;
        let (mut mapping, length) = self.raw.get_mapping(offset, max_length).await?;
        // imago's raw images say that all is writable, even of one that is not.
        if let ShallowMapping::Raw { writable, .. } = &mut mapping {
            *writable = self.disk.is_writable();
        }
        Ok((mapping, length))
    }

    #[allow(clippy::needless_lifetimes)] // Named for the future.
    async fn ensure_data_mapping<'a>(
        &'a self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<(&'a S, u64, u64)> {
        self.follow().await?;
        self.raw.ensure_data_mapping(offset, length, overwrite).await
    }

    #[allow(clippy::needless_lifetimes)] // Named for the future.
    async fn prepare_data_mapping<'a>(
        &'a self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<PreparedDataMapping<'a, S>> {
        self.follow().await?;
        self.raw.prepare_data_mapping(offset, length, overwrite).await
    }

    async fn commit_data_mapping(&self, mapping: PreparedDataMapping<'_, S>) -> io::Result<()> {
        self.raw.commit_data_mapping(mapping).await
    }

    async fn ensure_zero_mapping(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // All of it, edges too: one request of the disk instead of one for each.
        self.disk.write_zeroes(offset, length, false).map_err(io_error)?;
        Ok((offset, length))
    }

    // The unsafe variants are safe here: no mapping of this driver can be broken.

    async unsafe fn discard_to_zero_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.disk.write_zeroes(offset, length, true).map_err(io_error)?;
        Ok((offset, length))
    }

    async unsafe fn discard_to_any_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.disk.discard(offset, length).map_err(io_error)?;
        Ok((offset, length))
    }

    async unsafe fn discard_to_backing_unsafe(&self, _offset: u64, _length: u64) -> io::Result<(u64, u64)> {
        Err(unsupported("a disk has no backing image: its layers are its own"))
    }

    async fn flush(&self) -> io::Result<()> {
        self.disk.flush().map_err(io_error)
    }

    async fn sync(&self) -> io::Result<()> {
        self.disk.flush().map_err(io_error)
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.raw.invalidate_cache() }.await
    }

    async fn resize_grow(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        if new_size <= self.disk.capacity() {
            return Ok(());
        }
        // To imago's raw image, `FormatAllocate` is no more than `Zero`.
        if !matches!(prealloc_mode, PreallocateMode::None | PreallocateMode::Zero) {
            return Err(no_preallocation());
        }
        self.raw.resize_grow(new_size, prealloc_mode).await
    }

    async fn resize_shrink(&mut self, new_size: u64) -> io::Result<()> {
        if new_size >= self.disk.capacity() {
            return Ok(());
        }
        Err(unsupported("an open disk cannot shrink: close it, and resize the image with `blockhouse resize`"))
    }
}

impl<S: Storage + 'static> fmt::Display for DiskImage<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.raw.fmt(f)
    }
}
