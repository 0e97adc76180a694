//! What a device may ask of a disk. Devices and transports see this trait and nothing else of the disk.

use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::error::Result;
use crate::lane::Lane;

/// Bytes in a sector, the unit of every virtio-blk request (virtio 1.3, 5.2.6).
pub const SECTOR_SIZE: u64 = 512;

/// Sizes that a guest should know to issue good requests. All are hints; none changes what is correct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The size in bytes below which a write costs the disk a read: a power of two, at least 512.
    pub physical_block_size: u32,
    /// The preferred size of a request in bytes: a multiple of `physical_block_size`.
    pub optimal_io_size: u32,
}

/// Hears whether something that was answered would be lost with this process; see
/// [`watch_unflushed`](BlockBackend::watch_unflushed).
pub type UnflushedWatch = Arc<dyn Fn(bool) + Send + Sync>;

/// A disk as a device sees it: a fixed number of bytes that can be read, and perhaps written.
///
/// Every call may be made from any thread, and calls may overlap in time. A call returns when its
/// bytes have been moved; who has many requests at a time and must not wait uses a [`lane`](Self::lane).
///
/// Buffers are volatile: they may be guest memory, which a guest can change while they are read.
pub trait BlockBackend: Send + Sync {
    /// The size in bytes. A multiple of [`SECTOR_SIZE`].
    fn capacity(&self) -> u64;

    /// Whether [`write`](Self::write) can succeed.
    fn is_writable(&self) -> bool;

    /// Hints for the guest.
    fn topology(&self) -> Topology;

    /// Fills `buffers`, in order, with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the range does not lie inside the disk. After any
    /// other error the contents of the buffers are unspecified, but never bytes of another file.
    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()>;

    /// Writes `buffers`, in order, at `offset`. Durable only after a [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the range does not lie inside the disk or the disk
    /// is read-only. After any other error each sector holds its old or its new bytes.
    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()>;

    /// Makes every write that was completed before this call durable.
    ///
    /// # Errors
    /// [`Storage`](crate::ErrorKind::Storage) if it cannot be promised.
    fn flush(&self) -> Result<()>;

    /// Makes a range read as zero. Durable only after a [`flush`](Self::flush).
    ///
    /// With `may_unmap` the space may be given back; without, it stays allocated where the format can
    /// keep it.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<()>;

    /// Says that the content of a range is not needed any more. Afterwards each byte of it reads as
    /// before or as zero, and always the same until it is written again.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn discard(&self, offset: u64, length: u64) -> Result<()>;

    /// From now on `watch` hears, instead of whoever did before, whether the end of this process would take changes
    /// along that are not flushed. Bytes that were written survive a process that is killed: they are in the page
    /// cache. Where they lie does not, while only the layer on top knows it.
    ///
    /// `watch` is called at once, with `true` before such a change is answered, and with `false` after a flush. It must
    /// not call the disk.
    ///
    /// A backend that keeps nothing in memory never calls it, which is what this does if it is left out.
    fn watch_unflushed(&self, watch: Option<UnflushedWatch>) {
        drop(watch);
    }

    /// A lane to the disk, for one thread. A backend that has nothing better returns a
    /// [`PoolLane`](crate::PoolLane), whose threads call the functions above.
    ///
    /// # Errors
    /// [`Storage`](crate::ErrorKind::Storage) if the host has no descriptor or thread left for it.
    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>>;
}
