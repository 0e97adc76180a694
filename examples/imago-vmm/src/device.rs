//! A block device in the shape of those that are built on imago: requests as a guest makes them, a disk
//! behind a lock, guest memory for the bytes. It knows imago, and nothing of sandboxes.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use imago::io_buffers::{IoVector, IoVectorMut};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::open::DiskAccess;

/// Bytes in a sector (virtio 1.3, 5.2.6).
const SECTOR: u64 = 512;

/// The guest has so much memory, which bounds a request.
pub(crate) const MEMORY_BYTES: usize = 4 << 20;

/// Where the buffers of a request end: drivers hand over pages, and now and then a part of one.
const BUFFERS: [usize; 4] = [4096, 512, 12288, 1536];

/// What a guest asks for (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// `VIRTIO_BLK_T_IN`.
    In,
    /// `VIRTIO_BLK_T_OUT`, of bytes that follow from a number.
    Out { seed: u64 },
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`.
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    WriteZeroes { unmap: bool },
}

/// A request and the sectors that it is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) request: Request,
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
}

impl Order {
    /// `in SECTOR COUNT`, `out SECTOR COUNT SEED`, `flush`, `discard SECTOR COUNT`, `zero SECTOR COUNT`,
    /// `unmap SECTOR COUNT`.
    pub(crate) fn parse(line: &str) -> anyhow::Result<Self> {
        let mut words = line.split_whitespace();
        let name = words.next().context("an empty line")?;
        let numbers = words.map(str::parse).collect::<Result<Vec<u64>, _>>().with_context(|| line.to_owned())?;
        let (request, sector, sectors) = match (name, numbers.as_slice()) {
            ("in", &[sector, sectors]) => (Request::In, sector, sectors),
            ("out", &[sector, sectors, seed]) => (Request::Out { seed }, sector, sectors),
            ("flush", []) => (Request::Flush, 0, 0),
            ("discard", &[sector, sectors]) => (Request::Discard, sector, sectors),
            ("zero", &[sector, sectors]) => (Request::WriteZeroes { unmap: false }, sector, sectors),
            ("unmap", &[sector, sectors]) => (Request::WriteZeroes { unmap: true }, sector, sectors),
            _ => bail!("not a request: {line}"),
        };
        Ok(Self { request, sector, sectors })
    }
}

/// The device, with its guest's memory.
pub(crate) struct Block {
    disk: Arc<Mutex<DiskAccess>>,
    memory: GuestMemoryMmap,
}

impl Block {
    pub(crate) fn new(disk: DiskAccess) -> anyhow::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?;
        Ok(Self { disk: Arc::new(Mutex::new(disk)), memory })
    }

    /// Does what the guest asks for. A number comes back from a read: it follows from the bytes.
    pub(crate) fn process(&self, order: Order) -> io::Result<Option<u64>> {
        let offset = order.sector.saturating_mul(SECTOR);
        let length = order.sectors.saturating_mul(SECTOR);
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        match order.request {
            Request::In => {
                let buffers = self.buffers(length)?;
                let (vector, _guard) = IoVectorMut::from_volatile_slice(&buffers);
                disk.readv(vector, offset)?;
                return Ok(Some(checksum(&self.bytes(length)?)));
            }
            Request::Out { seed } => {
                self.memory.write_slice(&pattern(seed, length), GuestAddress(0)).map_err(io::Error::other)?;
                let buffers = self.buffers(length)?;
                let (vector, _guard) = IoVector::from_volatile_slice(&buffers);
                disk.writev(vector, offset)?;
            }
            Request::Flush => {
                disk.flush()?;
                disk.sync()?;
            }
            Request::Discard => disk.discard_to_any(offset, length)?,
            Request::WriteZeroes { unmap: true } => disk.discard_to_zero(offset, length)?,
            Request::WriteZeroes { unmap: false } => disk.write_zeroes(offset, length)?,
        }
        Ok(None)
    }

    /// The size of the disk in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner).size() / SECTOR
    }

    /// The first `length` bytes of guest memory, as a driver's descriptors would name them.
    fn buffers(&self, length: u64) -> io::Result<Vec<VolatileSlice<'_>>> {
        let length = self.in_memory(length)?;
        let mut buffers = Vec::new();
        let mut position = 0;
        for size in BUFFERS.iter().cycle() {
            if position == length {
                break;
            }
            let size = (*size).min(length - position);
            let slice = self.memory.get_slice(GuestAddress(position as u64), size).map_err(io::Error::other)?;
            buffers.push(slice);
            position += size;
        }
        Ok(buffers)
    }

    fn bytes(&self, length: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.in_memory(length)?];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).map_err(io::Error::other)?;
        Ok(bytes)
    }

    fn in_memory(&self, length: u64) -> io::Result<usize> {
        let length = usize::try_from(length).ok().filter(|length| *length <= MEMORY_BYTES);
        length.ok_or_else(|| io::Error::other("the request is larger than the memory of the guest"))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = disk.flush().and_then(|()| disk.sync()) {
            eprintln!("what was written last may be lost: {error}");
        }
    }
}

/// Bytes that differ from place to place and from seed to seed.
fn pattern(seed: u64, length: u64) -> Vec<u8> {
    let byte = |at: u64| (at / 8).wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    (0..length.div_ceil(8)).flat_map(|word| byte(word * 8)).take(usize::try_from(length).unwrap_or(0)).collect()
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}
