//! Writing compressed clusters: one behind the other, whatever the clusters of the file are.
//!
//! ```text
//!   file   │ cluster          │ cluster          │
//!          ├── a ──┬── b ──┬──┴── c ──┬╌╌╌╌╌╌╌╌╌╌┤       c counts in both clusters
//!                                     ▲ the next one
//! ```
//!
//! QEMU, docs/interop/qcow2.rst, "Compressed Clusters Descriptor"; `compressed.rs` reads them.

use alloc::vec::Vec;

use blockhouse_plugin::{Error, Packer, Result};
use miniz_oxide::deflate::compress_to_vec;
use ruzstd::encoding::{CompressionLevel, compress_to_vec as zstd_to_vec};

use crate::Qcow2;
use crate::compressed::Descriptor;
use crate::header::Compression;
use crate::tables::COMPRESSED;
use crate::writer::{Parts, Writing};

/// The level of deflate: QEMU takes zlib's default.
const DEFLATE_LEVEL: u8 = 6;

impl Packer for Qcow2 {
    fn pack(&mut self, offset: u64, bytes: &[u8]) -> Result<bool> {
        let compression = self.header.compression;
        self.write(|writing, parts| writing.pack(parts, compression, offset, bytes))
    }
}

impl Writing {
    fn pack(&mut self, parts: &mut Parts<'_>, compression: Compression, offset: u64, bytes: &[u8]) -> Result<bool> {
        self.check()?;
        let cluster_size = parts.map.shape.cluster_size();
        let length = bytes.len() as u64;
        let (start, end) = parts.clusters(offset, length)?;
        let whole = length == cluster_size || offset.saturating_add(length) == parts.virtual_size;
        if start != offset || end.saturating_sub(start) != cluster_size || !whole {
            return Err(Error::Other(alloc::format!("{length} bytes at {offset:#x} are not a cluster")));
        }
        if parts.map.shape.external_data {
            return Err(Error::unsupported("compressed clusters in an image with an external data file"));
        }
        self.refuse_waiting(start, end)?;
        self.make_room(parts)?;

        let Some(packed) = compress(compression, bytes, cluster_size) else { return Ok(false) };
        let table = self.own_table(parts, offset)?;
        // Looks at what is replaced, too.
        self.need(parts, table, offset)?;
        let place = self.place_packed(parts, packed.len() as u64)?;
        let descriptor = Descriptor::new(place, packed.len() as u64, parts.map.shape.cluster_bits());
        let written = parts.image.write_at(place, &packed).and_then(|()| {
            // In memory from here on: setting it cannot fail any more.
            parts.map.set_entry(parts.image, table, offset, None)?;
            parts.map.entry(parts.image, table, offset)
        });
        let old = match written {
            Ok((_, old)) => old,
            Err(error) => {
                self.release_packed(descriptor);
                return Err(error);
            }
        };
        parts.map.set_entry(parts.image, table, offset, Some((COMPRESSED | descriptor.token(), 0)))?;
        self.unmap(old, None, cluster_size);
        Ok(true)
    }

    /// Finds a place for `length` bytes, below a cluster, and counts them there.
    fn place_packed(&mut self, parts: &mut Parts<'_>, length: u64) -> Result<u64> {
        let cluster_size = parts.map.shape.cluster_size();
        if let Some(next) = self.packing {
            let room = cluster_size - next % cluster_size;
            let cluster = next / cluster_size;
            if length <= room && self.refcounts.share(parts.image, cluster)? {
                self.packing = Some(next.saturating_add(length)).filter(|_| length < room);
                return Ok(next);
            }
        }
        let run = self.allocate(parts, 1)?;
        let start = run.cluster.saturating_mul(cluster_size);
        if let Some(next) = self.packing {
            // Where the new cluster comes right after the last one, the bytes lie in both.
            let before = next / cluster_size;
            if before.saturating_add(1) == run.cluster && self.refcounts.share(parts.image, before)? {
                self.packing = Some(next.saturating_add(length));
                return Ok(next);
            }
        }
        self.packing = Some(start.saturating_add(length));
        Ok(start)
    }

    /// Gives the place of packed bytes back that nothing refers to.
    fn release_packed(&mut self, descriptor: Descriptor) {
        for cluster in descriptor.clusters() {
            self.refcounts.free_later(cluster);
        }
        self.packing = None;
    }
}

/// The bytes of a cluster, filled up with zeroes, if that makes them smaller.
fn compress(compression: Compression, bytes: &[u8], cluster_size: u64) -> Option<Vec<u8>> {
    let mut cluster = bytes.to_vec();
    cluster.resize(usize::try_from(cluster_size).ok()?, 0);
    let packed = match compression {
        Compression::Deflate => compress_to_vec(&cluster, DEFLATE_LEVEL),
        Compression::Zstd => zstd_to_vec(cluster.as_slice(), CompressionLevel::Fastest),
    };
    (packed.len() < cluster.len()).then_some(packed)
}
