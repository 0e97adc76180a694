//! Compressed clusters: where one lies, and how to unpack it.
//!
//! ```text
//!   L2 entry   63 62 61        x x-1                     0     x = 62 - (cluster_bits - 8)
//!             ├──┼──┼──────────┼─────────────────────────┤
//!             │0 │1 │ sectors  │ offset in the file      │     sectors: how many more than the first
//!
//!   file       ──┬────────┬────────┬────────┬──────
//!                │   ████████████████████░░ │                  ends somewhere in its last sector
//!              ──┴───▲────┴────────┴────────┴──────
//!                    offset
//! ```
//!
//! The whole descriptor is the token of the packed extent: unpacking needs no table.
//!
//! QEMU, docs/interop/qcow2.rst, "Compressed Clusters Descriptor".

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use blockhouse_plugin::{Error, File, Result};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read;

use crate::header::Compression;

/// A zstd frame may ask for a window of 8 MiB, which the zstd format asks every decoder to support. It is
/// filled with what was unpacked, so it takes no more memory than that.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// A zstd frame may have so many blocks, and one more per 256 bytes of the cluster. Encoders make blocks of
/// kilobytes; a frame of empty ones would cost time and give nothing.
const MIN_ZSTD_BLOCKS: usize = 16;

/// Where compressed data lies. It fits its cluster size; the file may still be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    bits: u64,
    cluster_bits: u32,
}

impl Descriptor {
    /// The descriptor in an L2 entry, or why it cannot be right.
    pub(crate) fn from_entry(entry: u64, cluster_bits: u32) -> Result<Self, &'static str> {
        let descriptor = Self { bits: entry & ((1 << 62) - 1), cluster_bits };
        if descriptor.offset() >> 56 != 0 {
            return Err("the offset of the compressed data has reserved bits");
        }
        Ok(descriptor)
    }

    /// The descriptor of `length` bytes at `offset`: at least one, and below a cluster.
    pub(crate) fn new(offset: u64, length: u64, cluster_bits: u32) -> Self {
        let last = (offset % 512).saturating_add(length.saturating_sub(1));
        let offset_bits = 70 - cluster_bits;
        Self { bits: (last / 512) << offset_bits | (offset & ((1 << offset_bits) - 1)), cluster_bits }
    }

    /// The descriptor behind a token.
    pub(crate) fn from_token(token: u64, cluster_bits: u32) -> Result<Self> {
        match Self::from_entry(token, cluster_bits) {
            Ok(descriptor) if descriptor.bits == token => Ok(descriptor),
            _ => Err(Error::Other(format!("there is no packed extent with token {token:#x}"))),
        }
    }

    /// The host keeps it and gives it back to unpack the cluster.
    pub(crate) fn token(self) -> u64 {
        self.bits
    }

    fn offset_bits(self) -> u32 {
        70 - self.cluster_bits
    }

    /// Where the data starts, in bytes; not aligned to anything.
    pub(crate) fn offset(self) -> u64 {
        self.bits & ((1 << self.offset_bits()) - 1)
    }

    /// The clusters of the file in which the data is: each counts one reference to it.
    pub(crate) fn clusters(self) -> core::ops::RangeInclusive<u64> {
        let last = self.offset().saturating_add(self.length().saturating_sub(1));
        (self.offset() >> self.cluster_bits)..=(last >> self.cluster_bits)
    }

    /// How many bytes the data has at most: up to the end of its last sector. Below two clusters and a sector.
    fn length(self) -> u64 {
        let sectors = (self.bits >> self.offset_bits()) + 1;
        sectors * 512 - self.offset() % 512
    }
}

/// The first `length` bytes of the cluster that `descriptor` means.
pub(crate) fn unpack(image: &File, compression: Compression, descriptor: Descriptor, length: u64) -> Result<Vec<u8>> {
    let cluster_size = 1usize << descriptor.cluster_bits;
    let length = usize::try_from(length)
        .ok()
        .filter(|length| (1..=cluster_size).contains(length))
        .ok_or_else(|| Error::Other(format!("a packed extent has at most {cluster_size} bytes, not {length}")))?;

    let mut packed = vec![0; usize::try_from(descriptor.length()).unwrap_or_default()];
    // The last sector may be cut off by the end of the file.
    let read = image.read_at(descriptor.offset(), &mut packed)?;
    packed.truncate(read);

    let unpacked = match compression {
        Compression::Deflate => inflate(&packed, cluster_size),
        Compression::Zstd => unzstd(&packed, cluster_size),
    };
    let mut cluster = unpacked.map_err(|why| {
        Error::corrupt(format!("the compressed cluster at {:#x} ({read} bytes): {why}", descriptor.offset()))
    })?;
    cluster.truncate(length);
    Ok(cluster)
}

/// Raw deflate, with any window that deflate has (QEMU writes 4 KiB). What follows the end of the stream is
/// not looked at; a stream that goes on past the cluster is refused, as the contract asks and as QEMU does
/// for zstd.
fn inflate(packed: &[u8], cluster_size: usize) -> Result<Vec<u8>, &'static str> {
    let mut cluster = vec![0; cluster_size];
    let mut state = DecompressorOxide::new();
    let (status, _, unpacked) =
        decompress(&mut state, packed, &mut cluster, 0, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF);
    match status {
        TINFLStatus::HasMoreOutput => Err("it unpacks to more than a cluster"),
        // A writer may leave out the end mark; the cluster is complete without.
        TINFLStatus::Done | TINFLStatus::FailedCannotMakeProgress if unpacked == cluster_size => Ok(cluster),
        TINFLStatus::Done | TINFLStatus::FailedCannotMakeProgress => Err("it unpacks to less than a cluster"),
        _ => Err("it is not deflate data"),
    }
}

/// One zstd frame. What follows it is not looked at.
fn unzstd(mut packed: &[u8], cluster_size: usize) -> Result<Vec<u8>, &'static str> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_ZSTD_WINDOW);
    decoder.init(&mut packed).map_err(|_| "it is not a zstd frame, or asks for a dictionary or a large window")?;
    let mut cluster = vec![0; cluster_size];
    let mut filled = 0;
    // A block has 128 KiB at most: by so much, and by its window, the decoder can run ahead of the check.
    for _ in 0..MIN_ZSTD_BLOCKS + cluster_size / 256 {
        decoder.decode_blocks(&mut packed, BlockDecodingStrategy::UptoBlocks(1)).map_err(|_| "it is damaged")?;
        loop {
            let free = cluster.get_mut(filled..).unwrap_or_default();
            let read = decoder.read(free).map_err(|_| "it is damaged")?;
            if read == 0 {
                break;
            }
            filled += read;
        }
        if decoder.can_collect() > 0 {
            return Err("it unpacks to more than a cluster");
        }
        if decoder.is_finished() {
            return if filled < cluster_size { Err("it unpacks to less than a cluster") } else { Ok(cluster) };
        }
    }
    Err("it has too many blocks")
}
