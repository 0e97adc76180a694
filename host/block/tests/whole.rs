//! What concerns a disk as a whole: its end before it grows, space for all of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Error, ErrorKind, FileIndex, ImageFile, Layer, LayerInfo, LayerPacker,
    LayerWriter, Located, Preallocation, Result, RunKind,
};
use support::growing::{CLUSTER, Growing};
use support::{Script, data, file, pattern, read, writable, write};

/// The part of the last cluster that belongs to the disk, in bytes.
const TAIL: u64 = 1024;
const SIZE: u64 = 3 * CLUSTER + TAIL;

fn disk(top: &Arc<Growing>, base: Option<&[u8]>) -> Disk {
    let mut layers: Vec<Arc<dyn Layer>> = vec![top.clone()];
    if let Some(bytes) = base {
        let base = Script::honest(vec![data(bytes.len() as u64, 0)], 1).file(file(bytes, Access::ReadOnly).0);
        layers.push(Arc::new(base));
    }
    Disk::new(layers, DiskOptions { writable: true, ..DiskOptions::default() }).unwrap()
}

/// Where the last cluster is in the file, if it has space of its own.
fn place_of_last(disk: &Disk) -> Option<u64> {
    let last = disk.runs().map(Result::unwrap).last().unwrap();
    match last.kind {
        RunKind::Data { offset, .. } if last.depth == 0 => Some(offset + last.length - TAIL),
        _ => None,
    }
}

/// Space that is used again is full of rubbish, in the layer of these tests as in the world.
fn leave_rubbish(disk: &Disk) {
    write(disk, 0, &pattern(SIZE as usize, 1)).unwrap();
    disk.discard(0, SIZE).unwrap();
    disk.flush().unwrap();
}

/// A raw image that gets as large as it can, and then fails.
struct Growable {
    image: Script,
    size: AtomicU64,
    most: u64,
    /// The disk that it is the image of.
    disk: OnceLock<Weak<Disk>>,
}

impl Layer for Growable {
    fn info(&self) -> &LayerInfo {
        self.image.info()
    }
    fn locate(&self, _offset: u64, _length: u64, _max_extents: u32) -> Result<Located> {
        Ok(Located { start: 0, extents: vec![writable(self.size(), 0)] })
    }
    fn unpack(&self, token: u64, length: u64) -> Result<Vec<u8>> {
        self.image.unpack(token, length)
    }
    fn grow(&self, size: u64, _below: u64) -> Result<()> {
        // Nobody sees a size that the image may not have after a power cut.
        let disk = self.disk.get().unwrap().upgrade().unwrap();
        assert_eq!(disk.capacity(), self.size(), "a new size is seen before the image has it");
        self.size.store(size.min(self.most), Ordering::SeqCst);
        if size > self.most { Err(Error::new(ErrorKind::Storage, "no space left")) } else { Ok(()) }
    }
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }
    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        Layer::file(&self.image, index)
    }
    fn writer(&self) -> Option<&dyn LayerWriter> {
        None
    }
    fn packer(&self) -> Option<&dyn LayerPacker> {
        None
    }
}

/// Otherwise the layer would be asked about less than it has, and what it says beyond that be a lie.
#[test]
fn a_disk_has_the_size_that_its_image_reached() {
    let (bytes, _outside) = file(&pattern(4096, 1), Access::ReadWrite);
    let image = Script::honest(vec![writable(4096, 0)], 1).file(bytes).overwritable();
    let layer = Arc::new(Growable { image, size: AtomicU64::new(4096), most: 10240, disk: OnceLock::new() });
    let options = DiskOptions { writable: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::new(vec![layer.clone()], options).unwrap());
    layer.disk.set(Arc::downgrade(&disk)).unwrap();
    read(&disk, 0, 4096).unwrap();
    for (asked, succeeds, size) in
        [(8192, true, 8192), (65536, false, 10240), (65536, false, 10240), (10240, true, 10240)]
    {
        assert_eq!(disk.grow(asked).is_ok(), succeeds, "{asked}");
        assert_eq!(disk.capacity(), size, "{asked}");
        assert!(read(&disk, 0, 4096).unwrap() == pattern(4096, 1), "{asked}");
        write(&disk, size - 512, &pattern(512, asked)).unwrap();
        assert!(read(&disk, size - 512, 512).unwrap() == pattern(512, asked), "{asked}");
        assert_eq!(write(&disk, size, &[1; 512]).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

/// Wherever it is in what was gained, and however much one answer says.
#[test]
fn what_a_disk_gained_is_remembered() {
    const SIZE: u64 = 256 << 30;
    let (bytes, _outside) = file(&pattern(4096, 1), Access::ReadWrite);
    let image = Script::honest(vec![writable(4096, 0)], 1).file(bytes).overwritable();
    let layer = Arc::new(Growable { image, size: AtomicU64::new(4096), most: SIZE, disk: OnceLock::new() });
    let options = DiskOptions { writable: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::new(vec![layer.clone()], options).unwrap());
    layer.disk.set(Arc::downgrade(&disk)).unwrap();
    disk.grow(SIZE).unwrap();
    for offset in [0, SIZE / 2, SIZE - 4096] {
        read(&disk, offset, 512).unwrap();
        let before = disk.map_stats();
        read(&disk, offset, 512).unwrap();
        let after = disk.map_stats();
        assert_eq!((after.hits, after.misses), (before.hits + 1, before.misses), "{offset}");
    }
}

#[test]
fn the_end_of_the_last_cluster_is_zero_before_a_disk_grows() {
    let base = pattern(SIZE as usize + 4096, 9);
    for (what, packed, base, write_last) in [
        ("written", false, None, true),
        ("packed", true, None, false),
        ("over a longer base", false, Some(base.as_slice()), false),
        ("over a base as long", false, Some(&base[..SIZE as usize]), false),
        ("over nothing", false, None, false),
    ] {
        let units = if packed { HashMap::from([(3, pattern(TAIL as usize, 4))]) } else { HashMap::new() };
        let top = Arc::new(Growing::new(SIZE, units));
        let disk = disk(&top, base);
        if packed {
            // Space to use again, from another cluster.
            write(&disk, 0, &[1; CLUSTER as usize]).unwrap();
            disk.discard(0, CLUSTER).unwrap();
            disk.flush().unwrap();
        } else if base.is_none() {
            leave_rubbish(&disk);
        }
        if write_last {
            write(&disk, SIZE - TAIL, &pattern(TAIL as usize, 2)).unwrap();
        }
        let before = read(&disk, 0, SIZE as usize).unwrap();
        disk.settle_end().unwrap();
        disk.flush().unwrap();
        assert!(read(&disk, 0, SIZE as usize).unwrap() == before, "{what}: the content changed");
        let place = place_of_last(&disk).unwrap_or_else(|| panic!("{what}: the last cluster has no space"));
        let mut bytes = top.bytes();
        bytes.resize((place + CLUSTER) as usize, 0);
        let rest = &bytes[(place + TAIL) as usize..(place + CLUSTER) as usize];
        assert!(rest.iter().all(|byte| *byte == 0), "{what}: the end of the cluster is {:x?}...", &rest[..8]);
        top.check_tables();
        disk.close().unwrap();
    }
}

#[test]
fn every_cluster_gets_space_and_keeps_its_content() {
    let size = 64 * CLUSTER + TAIL;
    for (how, with_base) in [
        (Preallocation::Metadata, false),
        (Preallocation::Metadata, true),
        (Preallocation::Falloc, false),
        (Preallocation::Full, false),
        (Preallocation::Full, true),
    ] {
        let base = pattern(20 * CLUSTER as usize, 5);
        let units = HashMap::from([(7, pattern(CLUSTER as usize, 6))]);
        let top = Arc::new(Growing::new(size, units));
        let disk = disk(&top, with_base.then_some(base.as_slice()));
        write(&disk, 30 * CLUSTER, &pattern(5000, 8)).unwrap();
        let before = read(&disk, 0, size as usize).unwrap();
        let mut heard = Vec::new();
        disk.preallocate(how, |done| heard.push(done)).unwrap();
        disk.flush().unwrap();
        assert_eq!(heard.last(), Some(&size));
        assert!(read(&disk, 0, size as usize).unwrap() == before, "{how:?}: the content changed");
        for run in disk.runs() {
            let run = run.unwrap();
            assert!(run.depth == 0 && matches!(run.kind, RunKind::Data { .. }), "{how:?}: {run:?}");
        }
        let taken = top.blocks() * 512;
        if how == Preallocation::Metadata {
            assert!(taken < size, "{how:?}: {taken} bytes");
        } else {
            assert!(taken >= size, "{how:?}: {taken} bytes");
        }
        top.check_tables();
        disk.close().unwrap();
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let top = Arc::new(Growing::new(SIZE, HashMap::new()));
    let disk = disk(&top, None);
    assert!(!disk.packs());
    let cluster = [1; CLUSTER as usize];
    assert_eq!(disk.write_packed(0, &cluster).unwrap_err().kind(), ErrorKind::Unsupported);
    for (offset, length) in [(0, 0), (0, 512), (512, CLUSTER), (3 * CLUSTER, CLUSTER), (u64::MAX, 512)] {
        let error = disk.write_packed(offset, &cluster[..length as usize]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{length} bytes at {offset}");
    }
}
