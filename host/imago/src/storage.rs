//! The bytes of a disk as a storage of imago.

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use blockhouse_block::{BlockBackend, Disk, VolatileSlice};
use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use maybe_async::maybe_async;

use crate::error::{io_error, no_preallocation, unsupported};

/// A whole disk as one storage object: the byte at an offset of the storage is the byte of the disk there.
///
/// Any range and any buffer will do: what the files below want aligned, the disk aligns. Every request is
/// one request of the disk and finished when it returns.
///
/// Whoever drops it as the last owner of the disk closes the disk: what was written becomes durable, and the
/// image is marked as cleanly closed. A program that wants to see errors of that keeps its own
/// [`Arc`] of the disk and calls [`Disk::close`].
#[derive(Debug)]
pub struct DiskStorage {
    /// Taken by `drop` alone.
    disk: ManuallyDrop<Arc<Disk>>,
    /// imago's own bookkeeping of writes.
    helper: CommonStorageHelper,
}

impl DiskStorage {
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        Self { disk: ManuallyDrop::new(disk), helper: CommonStorageHelper::default() }
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }
}

/// The allocation unit of a disk: below that, a discard frees nothing. A power of two, at least 4 KiB.
fn unit(disk: &Disk) -> usize {
    usize::try_from(disk.topology().optimal_io_size).unwrap_or(1).next_power_of_two()
}

#[maybe_async(AFIT)]
impl Storage for DiskStorage {
    fn discard_align(&self) -> usize {
        unit(&self.disk)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.capacity())
    }

    async unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // Past the end of a storage there are zeroes; of a disk, errors.
        let inside = self.disk.capacity().saturating_sub(offset);
        let (bufv, mut behind) = bufv.split_at(inside);
        behind.fill(0);
        if bufv.is_empty() {
            return Ok(());
        }
        let mut buffers = bufv.into_inner();
        let slices: Vec<_> = buffers.iter_mut().map(|buffer| VolatileSlice::from(&mut **buffer)).collect();
        self.disk.read(&slices, offset).map_err(io_error)
    }

    async unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let buffers = bufv.into_inner();
        let slices: Vec<_> = buffers
            .iter()
            .map(|buffer| {
                // SAFETY: the memory is that of a slice, which outlives the request, and a disk only reads
                // from what it is to write.
                unsafe { VolatileSlice::new(buffer.as_ptr().cast_mut(), buffer.len()) }
            })
            .collect();
        self.disk.write(&slices, offset).map_err(io_error)
    }

    async unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.disk.write_zeroes(offset, length, true).map_err(io_error)
    }

    async unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.disk.write_zeroes(offset, length, false).map_err(io_error)
    }

    async unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.disk.discard(offset, length).map_err(io_error)
    }

    async fn flush(&self) -> io::Result<()> {
        self.disk.flush().map_err(io_error)
    }

    async fn sync(&self) -> io::Result<()> {
        self.disk.flush().map_err(io_error)
    }

    async fn settle_writes(&self) -> io::Result<()> {
        // None is left to itself: each has ended before its future was, or never began.
        Ok(())
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(unsupported("a disk cannot forget what its components know: open it again"))
    }

    /// Grows the disk. There is nothing to do for a size that it has, or has passed: no disk in use gets smaller.
    async fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        if new_size <= self.disk.capacity() {
            return Ok(());
        }
        // What a disk gains reads as zero in any case.
        if !matches!(prealloc_mode, PreallocateMode::None | PreallocateMode::Zero) {
            return Err(no_preallocation());
        }
        self.disk.grow(new_size).map_err(io_error)
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

impl fmt::Display for DiskStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = self.disk.layers().next().map_or("", |top| top.name.as_str());
        write!(f, "blockhouse:{image}")
    }
}

impl Drop for DiskStorage {
    fn drop(&mut self) {
        // SAFETY: nobody uses the field after this.
        let disk = unsafe { ManuallyDrop::take(&mut self.disk) };
        // Of owners that go at the same time, exactly one is the last.
        let Some(disk) = Arc::into_inner(disk) else { return };
        if let Err(error) = disk.close() {
            tracing::error!("a disk could not be closed, and what was written last may be lost: {error}");
        }
    }
}
