//! The driver under imago's own `FormatAccess`, over layers that are written for tests. In both modes of imago:
//! also run with `--no-default-features --features sync`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

#[path = "../../block/tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Error, ErrorKind, FileIndex, ImageFile, Layer, LayerInfo, LayerPacker,
    LayerWriter, Located, Result,
};
use blockhouse_imago::{DiskImage, DiskStorage};
use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{DynStorage, FormatAccess, Mapping, Storage, StorageExt};
use support::growing::{CLUSTER, Growing};
use support::{Script, file, pattern, read, writable, write};
use vm_memory::VolatileSlice;

/// Runs a request of imago. All of them are done when first polled.
#[maybe_async::async_impl]
fn done<T>(future: impl Future<Output = T>) -> T {
    use std::task::{Context, Poll, Waker};
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a request waits"),
    }
}

#[maybe_async::sync_impl]
fn done<T>(value: T) -> T {
    value
}

const SIZE: u64 = 20 * CLUSTER + 512;

fn disk(layer: Arc<dyn Layer>, writable: bool) -> Disk {
    Disk::new(vec![layer], DiskOptions { writable, ..DiskOptions::default() }).unwrap()
}

fn growing() -> (Arc<Growing>, FormatAccess<Box<dyn DynStorage>>) {
    let layer = Arc::new(Growing::new(SIZE, HashMap::new()));
    let image = DiskImage::new(disk(layer.clone(), true)).unwrap();
    (layer, FormatAccess::new(image))
}

fn content<S: Storage>(access: &FormatAccess<S>) -> Vec<u8> {
    let mut bytes = vec![0xee; access.size() as usize];
    done(access.read(&mut bytes, 0)).unwrap();
    bytes
}

#[test]
fn every_request_ends_on_the_disk() {
    let (layer, mut access) = growing();
    let mut model = vec![0; SIZE as usize];
    assert_eq!(access.size(), SIZE);
    assert_eq!((access.req_align(), access.mem_align()), (1, 1));
    assert_eq!(content(&access), model);

    // Buffers and offsets of any alignment, from volatile memory.
    for (seed, (at, length)) in
        [(0, 512), (CLUSTER - 7, 3 * CLUSTER), (SIZE - 512, 512), (1, 1)].into_iter().enumerate()
    {
        let mut bytes = pattern(length as usize, seed as u64);
        model[at as usize..][..length as usize].copy_from_slice(&bytes);
        let slices: Vec<_> = bytes.chunks_mut(1000).map(VolatileSlice::from).collect();
        let (vector, _guard) = IoVector::from_volatile_slice(&slices);
        done(access.writev(vector, at)).unwrap();
    }
    assert_eq!(content(&access), model);
    let mut bytes = vec![0; 5000];
    let slices: Vec<_> = bytes.chunks_mut(777).map(VolatileSlice::from).collect();
    let (vector, guard) = IoVectorMut::from_volatile_slice(&slices);
    done(access.readv(vector, CLUSTER - 100)).unwrap();
    drop(guard);
    assert_eq!(bytes, model[CLUSTER as usize - 100..][..5000]);

    done(access.write_zeroes(CLUSTER + 3, 10)).unwrap();
    model[CLUSTER as usize + 3..][..10].fill(0);
    done(access.discard_to_zero(CLUSTER + 100, CLUSTER)).unwrap();
    model[CLUSTER as usize + 100..][..CLUSTER as usize].fill(0);
    done(access.discard_to_any(0, CLUSTER)).unwrap();
    model[..CLUSTER as usize].fill(0);
    assert_eq!(content(&access), model);
    assert_eq!(layer.reserved(), 0);
    layer.check_tables();
}

#[test]
fn nothing_lies_past_the_end() {
    let (_, mut access) = growing();
    done(access.write(&vec![1; SIZE as usize], 0)).unwrap();
    // imago reads zeroes there, and writes nothing.
    let mut bytes = [0xee; 1024];
    done(access.read(&mut bytes[..], SIZE - 512)).unwrap();
    assert!(bytes[..512].iter().all(|byte| *byte == 1) && bytes[512..].iter().all(|byte| *byte == 0));
    let refused = |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    refused(done(access.write(&[2; 1024][..], SIZE - 512)));
    refused(done(access.write_zeroes(SIZE - 512, 1024)));
    refused(done(access.discard_to_zero(SIZE, 512)));
    refused(done(access.discard_to_any(SIZE - 512, 1024)));
    // The storage on its own reads so, too, and never grows.
    let storage = access.inner().collect_storage_dependencies()[0];
    assert_eq!(storage.size().unwrap(), SIZE);
    let mut bytes = [0xee; 1024];
    done(storage.read(&mut bytes[..], SIZE - 512)).unwrap();
    assert!(bytes[..512].iter().all(|byte| *byte == 1) && bytes[512..].iter().all(|byte| *byte == 0));
    done(storage.read(&mut bytes[..], SIZE + 4096)).unwrap();
    assert_eq!(bytes, [0; 1024]);
    assert_eq!(done(storage.write(&[2; 1024][..], SIZE - 512)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    done(storage.resize(SIZE * 2, imago::storage::PreallocateMode::None)).unwrap_err();
    assert_eq!(content(&access), vec![1; SIZE as usize]);
}

#[test]
fn a_mapping_is_the_disk_and_stays_true() {
    let (_, access) = growing();
    done(access.write(&pattern(CLUSTER as usize, 1), CLUSTER)).unwrap();
    let (mapping, length) = done(access.get_mapping(CLUSTER, 2 * CLUSTER)).unwrap();
    let Mapping::Raw { storage, offset, writable, .. } = mapping else { panic!("{mapping}") };
    assert_eq!((offset, length, writable), (CLUSTER, 2 * CLUSTER, true));
    // The cluster is given back and its space used for another one, under the mapping.
    // SAFETY: mappings of this driver cannot be broken, which is what is tested.
    done(unsafe { access.discard_to_zero_unsafe(CLUSTER, CLUSTER) }).unwrap();
    done(access.flush()).unwrap();
    done(access.write(&pattern(CLUSTER as usize, 2), 5 * CLUSTER)).unwrap();
    let mut bytes = vec![0xee; CLUSTER as usize];
    done(storage.read(&mut bytes, offset)).unwrap();
    assert_eq!(bytes, vec![0; CLUSTER as usize]);
    done(storage.write(&pattern(CLUSTER as usize, 3), offset)).unwrap();
    let content = content(&access);
    assert_eq!(content[CLUSTER as usize..][..CLUSTER as usize], pattern(CLUSTER as usize, 3));
    assert_eq!(content[5 * CLUSTER as usize..][..CLUSTER as usize], pattern(CLUSTER as usize, 2));
    // A mapping that was made for writing: without a second step, but nothing is lost by taking it.
    let prepared = done(access.prepare_data_mapping(9, 100, true)).unwrap();
    assert!(prepared.is_nonblocking());
    assert_eq!((prepared.offset(), prepared.length()), (9, 100));
    done(prepared.storage().write(&[7; 100][..], prepared.offset())).unwrap();
    done(access.commit_data_mapping(prepared)).unwrap();
    let mut bytes = [0; 100];
    done(access.read(&mut bytes[..], 9)).unwrap();
    assert_eq!(bytes, [7; 100]);
}

#[test]
fn what_is_read_only_is_not_written() {
    let bytes = pattern(2 * CLUSTER as usize, 5);
    let (image, outside) = file(&bytes, Access::ReadWrite);
    let layer = Script::honest(vec![writable(2 * CLUSTER, 0)], 1).file(image).overwritable();
    let image = DiskImage::with_storage(disk(Arc::new(layer), false), |storage| storage).unwrap();
    assert!(!image.writable());
    let mut access: FormatAccess<DiskStorage> = FormatAccess::new(image);
    done(access.write(&[1; 512][..], 0)).unwrap_err();
    done(access.write_zeroes(0, 512)).unwrap_err();
    done(access.discard_to_zero(0, CLUSTER)).unwrap_err();
    done(access.discard_to_any(0, CLUSTER)).unwrap_err();
    // Past imago's own check.
    let (mapping, _) = done(access.get_mapping(0, 512)).unwrap();
    let Mapping::Raw { storage, writable, .. } = mapping else { panic!("{mapping}") };
    assert!(!writable);
    for result in [
        done(storage.write(&[1; 512][..], 0)),
        done(storage.write_zeroes(0, 512)),
        done(storage.write_allocated_zeroes(0, 512)),
        done(storage.discard(0, 2 * CLUSTER)),
    ] {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    done(access.flush()).unwrap();
    assert_eq!(content(&access), bytes);
    drop(access);
    let mut now = vec![0; bytes.len()];
    outside.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(now, bytes);
}

#[test]
fn errors_are_of_use_to_a_machine() {
    let full = || Error::new(ErrorKind::Storage, "no space").with_source(io::Error::from_raw_os_error(28));
    let later = || Error::new(ErrorKind::Storage, "no space; nor is it started again").with_source(full());
    let cannot = || Error::new(ErrorKind::Storage, "cannot").with_source(io::Error::from(io::ErrorKind::Unsupported));
    for (error, kind) in [
        (Error::new(ErrorKind::Component, "it trapped"), io::ErrorKind::Other),
        (Error::new(ErrorKind::Corrupt, "broken"), io::ErrorKind::InvalidData),
        (Error::new(ErrorKind::Denied, "no"), io::ErrorKind::PermissionDenied),
        (Error::new(ErrorKind::Unsupported, "unknown"), io::ErrorKind::Other),
        (full(), io::ErrorKind::StorageFull),
        (later(), io::ErrorKind::StorageFull),
        (cannot(), io::ErrorKind::Other),
    ] {
        let (of_disk, text) = (error.kind(), error.message().to_owned());
        let error = std::sync::Mutex::new(Some(error));
        let layer = Script::new(CLUSTER, move |_, _, _| Err(error.lock().unwrap().take().expect("asked once")));
        let access = FormatAccess::new(DiskImage::new(disk(Arc::new(layer), false)).unwrap());
        let failed = done(access.read(&mut [0; 512][..], 0)).unwrap_err();
        assert_eq!(failed.kind(), kind, "{text}");
        assert!(failed.to_string().contains(&text), "{failed}");
        let inside = failed.get_ref().and_then(|inside| inside.downcast_ref::<Error>()).unwrap();
        assert_eq!(inside.kind(), of_disk);
    }
}

#[test]
fn an_error_is_not_taken_for_never_mind() {
    // imago ignores it when a storage does not know how to discard, and writes zeroes when it cannot zero.
    let broken = Arc::new(AtomicBool::new(false));
    let mut layer = Growing::new(SIZE, HashMap::new());
    let switch = Arc::clone(&broken);
    layer.before_locate = Some(Box::new(move || assert!(!switch.load(Ordering::SeqCst), "asked again")));
    let layer = Arc::new(layer);
    let shared = Arc::new(disk(layer, true));
    let access = FormatAccess::new(DiskImage::new(Arc::clone(&shared)).unwrap());
    done(access.write(&[1; 512][..], 0)).unwrap();
    shared.close().unwrap();
    broken.store(true, Ordering::SeqCst);
    let storage = access.inner().collect_storage_dependencies()[0];
    for result in [
        done(storage.discard(0, SIZE - 512)),
        done(storage.write_zeroes(0, CLUSTER)),
        done(access.write_zeroes(0, CLUSTER)),
        done(access.write(&[1; 512][..], 0)),
        done(access.read(&mut [0; 512][..], 0)),
        done(access.flush()),
        done(access.sync()),
    ] {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn flush_and_sync_are_both_durable() {
    for sync in [false, true] {
        let layer = Arc::new({
            let mut layer = Growing::new(SIZE, HashMap::new());
            let flushes = Arc::new(AtomicBool::new(false));
            layer.after_flush = Some(Box::new(move || flushes.store(true, Ordering::SeqCst)));
            layer
        });
        let mut access = FormatAccess::new(DiskImage::new(disk(layer.clone(), true)).unwrap());
        done(access.write(&[1; CLUSTER as usize][..], 0)).unwrap();
        done(access.discard_to_zero(0, CLUSTER)).unwrap();
        // Only a flush lets the cluster be used again.
        let before = layer.bytes().len();
        if sync { done(access.sync()) } else { done(access.flush()) }.unwrap();
        done(access.write(&[2; CLUSTER as usize][..], CLUSTER)).unwrap();
        assert_eq!(layer.bytes().len(), before, "nothing was flushed");
    }
}

#[test]
fn the_last_owner_closes_the_disk() {
    let (layer, access) = growing();
    done(access.write(&[1; 512][..], 0)).unwrap();
    assert!(!layer.is_finished());
    drop(access);
    assert!(layer.is_finished());

    let layer = Arc::new(Growing::new(SIZE, HashMap::new()));
    let mine = Arc::new(disk(layer.clone(), true));
    let access = FormatAccess::new(DiskImage::new(Arc::clone(&mine)).unwrap());
    done(access.write(&[1; 512][..], 0)).unwrap();
    drop(access);
    assert!(!layer.is_finished(), "somebody else still has it");
    mine.close().unwrap();
    assert!(layer.is_finished());
}

/// Which of them goes last cannot be arranged, so it is tried often.
#[test]
fn of_two_last_owners_at_once_one_closes_the_disk() {
    for _ in 0..4 {
        let layers: Vec<_> = (0..100).map(|_| Arc::new(Growing::new(CLUSTER, HashMap::new()))).collect();
        let disks: Vec<_> = layers.iter().map(|layer| Arc::new(disk(layer.clone(), true))).collect();
        let owners = [(); 2].map(|()| {
            let image = |disk| DiskImage::with_storage(Arc::clone(disk), |storage| storage).unwrap();
            disks.iter().map(image).collect::<Vec<_>>()
        });
        drop(disks);
        let arrived = AtomicUsize::new(0);
        thread::scope(|scope| {
            for images in owners {
                scope.spawn(|| {
                    for (round, image) in images.into_iter().enumerate() {
                        // Both are awake when they go on.
                        arrived.fetch_add(1, Ordering::SeqCst);
                        while arrived.load(Ordering::SeqCst) < 2 * (round + 1) {
                            std::hint::spin_loop();
                        }
                        drop(image);
                    }
                });
            }
        });
        assert_eq!(layers.iter().filter(|layer| !layer.is_finished()).count(), 0, "nobody closed them");
    }
}

/// A raw image that gets larger.
struct Growable {
    image: Script,
    size: AtomicU64,
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
        self.size.store(size, Ordering::SeqCst);
        Ok(())
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

#[test]
fn a_disk_that_grows_in_use_is_larger_here_too() {
    let (bytes, _outside) = file(&pattern(4096, 1), Access::ReadWrite);
    let image = Script::honest(vec![writable(4096, 0)], 1).file(bytes).overwritable();
    let mine = Arc::new(disk(Arc::new(Growable { image, size: AtomicU64::new(4096) }), true));
    let mut access = FormatAccess::new(DiskImage::new(Arc::clone(&mine)).unwrap());
    assert_eq!(access.size(), 4096);

    // By another owner: the first request past the old end is a read, a write, a mapping for either.
    for (step, end) in [8192, 12288, 16384, 20480].into_iter().enumerate() {
        mine.grow(end).unwrap();
        assert_eq!(access.size(), end);
        let at = end - 512;
        match step {
            0 => {
                write(&mine, at, &pattern(512, end)).unwrap();
                let mut bytes = [0; 512];
                done(access.read(&mut bytes[..], at)).unwrap();
                assert_eq!(bytes[..], pattern(512, end));
            }
            1 => done(access.write(&pattern(512, end), at)).unwrap(),
            2 => {
                let (storage, offset, length) = done(access.inner().ensure_data_mapping(at, 512, true)).unwrap();
                assert_eq!(length, 512);
                done(storage.write(&pattern(512, end), offset)).unwrap();
            }
            _ => {
                let (mapping, length) = done(access.get_mapping(at, 1024)).unwrap();
                let Mapping::Raw { storage, offset, .. } = mapping else { panic!("{mapping}") };
                assert_eq!(length, 512);
                done(storage.write(&pattern(512, end), offset)).unwrap();
            }
        }
        assert!(read(&mine, at, 512).unwrap() == pattern(512, end), "{end}");
        assert_eq!(done(access.write(&[1; 1024][..], at)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    // By imago.
    done(access.resize_grow(24576, PreallocateMode::Zero)).unwrap();
    done(access.resize(28672, PreallocateMode::None)).unwrap();
    assert_eq!((access.size(), mine.capacity()), (28672, 28672));
    done(access.write(&pattern(512, 9), 28160)).unwrap();
    assert!(read(&mine, 28160, 512).unwrap() == pattern(512, 9));
    // What it has passed leaves it as it is.
    let storage = access.inner().collect_storage_dependencies()[0];
    done(storage.resize(4096, imago::storage::PreallocateMode::None)).unwrap();
    done(access.resize_grow(8192, PreallocateMode::WriteData)).unwrap();
    assert_eq!(mine.capacity(), 28672);
    let refused = done(storage.resize(32768, imago::storage::PreallocateMode::Allocate));
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::Unsupported);
    done(access.resize_shrink(4096)).unwrap_err();
    assert_eq!((access.size(), mine.capacity()), (28672, 28672));
}

#[test]
fn what_it_cannot_do_it_says() {
    let (_, mut access) = growing();
    let unsupported = |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), io::ErrorKind::Unsupported);
    // Its layer cannot, which must not read as "never mind".
    let grown = done(access.resize_grow(SIZE + 512, PreallocateMode::None));
    assert_eq!(grown.unwrap_err().kind(), io::ErrorKind::Other);
    for mode in [PreallocateMode::FormatAllocate, PreallocateMode::FullAllocate, PreallocateMode::WriteData] {
        unsupported(done(access.resize_grow(SIZE + 512, mode)));
    }
    unsupported(done(access.resize(SIZE - 512, PreallocateMode::None)));
    unsupported(done(access.discard_to_backing(0, CLUSTER)));
    // SAFETY: it is refused.
    unsupported(done(unsafe { access.invalidate_cache() }));
    done(access.resize(SIZE, PreallocateMode::None)).unwrap();
    done(access.resize_grow(512, PreallocateMode::None)).unwrap();
    done(access.resize_shrink(SIZE + 512)).unwrap();
    assert_eq!(access.size(), SIZE);
    assert_eq!(access.inner().to_string(), "raw[blockhouse:/images/growing]");
    assert_eq!(access.inner().collect_storage_dependencies()[0].discard_align(), CLUSTER as usize);
    // It guesses no format.
    let storage = access.inner().collect_storage_dependencies()[0];
    // SAFETY: it reads nothing.
    assert!(!done(unsafe { <DiskImage as FormatDriverInstance>::probe(storage) }).unwrap());
}
