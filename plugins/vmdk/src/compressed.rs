//! Compressed grains: a marker of 12 bytes, then a zlib stream (RFC 1950).
//!
//! ```text
//! 0  first sector of the grain in the disk (u64)
//! 8  length of the stream in bytes (u32)
//! 12 the stream
//! ```
//!
//! Source: VMware, Virtual Disk Format 5.0, "Stream-Optimized Compressed".

use alloc::format;
use alloc::vec::Vec;

use blockhouse_plugin::{Error, Result, bytes};
use miniz_oxide::inflate::{TINFLStatus, decompress_to_vec_zlib_with_limit};

use crate::header::SECTOR;
use crate::tables::Sparse;

const MARKER: u64 = 12;

/// The first `length` bytes of the grain whose marker is at `sector`. A grain unpacks to a whole grain,
/// or, at the end of the disk, at least to what is left of it; less would leave bytes of the answer to
/// chance (CVE-2026-2243), and more is never produced.
pub(crate) fn unpack(sparse: &Sparse, sector: u64, length: u64) -> Result<Vec<u8>> {
    let offset = sector.saturating_mul(SECTOR);
    let grain = sparse.header.grain;
    let rest = sparse.size.saturating_sub(offset);
    let (start, packed_length) = if sparse.header.markers {
        let marker = sparse.file.read_exact_at("a grain marker", offset, MARKER)?;
        let packed = bytes::le_u32(&marker, 8).map_or(0, u64::from);
        // An incompressible grain grows by a few bytes only.
        if packed == 0 || packed > grain.saturating_mul(2) {
            return Err(Error::corrupt(format!(
                "the marker at {offset} says {packed} bytes for a grain of {grain} bytes"
            )));
        }
        (offset.saturating_add(MARKER), packed)
    } else {
        // Without markers nothing says how long the stream is; it ends by itself.
        (offset, rest.min(grain.saturating_mul(2)))
    };
    let packed = sparse.file.read_exact_at("a compressed grain", start, packed_length)?;
    let limit = usize::try_from(grain).unwrap_or(usize::MAX);
    let mut unpacked = decompress_to_vec_zlib_with_limit(&packed, limit).map_err(|error| {
        let why = match error.status {
            TINFLStatus::HasMoreOutput => "it unpacks to more than a grain",
            TINFLStatus::Adler32Mismatch => "its checksum is wrong",
            _ => "it is no valid zlib stream, or is cut off",
        };
        Error::corrupt(format!("the compressed grain at {offset} is damaged: {why}"))
    })?;
    let wanted = usize::try_from(length).unwrap_or(usize::MAX);
    if unpacked.len() < wanted {
        return Err(Error::corrupt(format!(
            "the compressed grain at {offset} holds {} bytes, and {length} are needed",
            unpacked.len()
        )));
    }
    unpacked.truncate(wanted);
    Ok(unpacked)
}
