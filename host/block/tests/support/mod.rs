//! A layer that answers from a script, and buffers to read into.
#![allow(dead_code, unreachable_pub, missing_docs)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

pub mod growing;

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockhouse_block::{
    Access, BlockBackend, Disk, Extent, FileIndex, ImageFile, Layer, LayerInfo, LayerPacker, LayerWriter, Located,
    Placement, Result,
};
use vm_memory::VolatileSlice;

/// What a scripted layer does when it is asked.
type Locate = dyn Fn(u64, u64, u32) -> Result<Located> + Send + Sync;

pub struct Script {
    pub info: LayerInfo,
    pub locate: Box<Locate>,
    pub units: HashMap<u64, Vec<u8>>,
    pub files: Vec<Arc<ImageFile>>,
    pub locates: AtomicU64,
    pub unpacks: AtomicU64,
}

impl Script {
    pub fn new(virtual_size: u64, locate: impl Fn(u64, u64, u32) -> Result<Located> + Send + Sync + 'static) -> Self {
        let info = LayerInfo {
            name: "/images/scripted".into(),
            format: "scripted".into(),
            virtual_size,
            cluster_size: 0,
            overwritable: false,
        };
        Self {
            info,
            locate: Box::new(locate),
            units: HashMap::new(),
            files: Vec::new(),
            locates: AtomicU64::new(0),
            unpacks: AtomicU64::new(0),
        }
    }

    /// A layer that answers with the same thing whatever is asked.
    pub fn says(virtual_size: u64, start: u64, extents: Vec<Extent>) -> Self {
        Self::new(virtual_size, move |_, _, _| Ok(Located { start, extents: extents.clone() }))
    }

    /// An honest layer of the extents, `per_answer` in each answer at most.
    pub fn honest(extents: Vec<Extent>, per_answer: usize) -> Self {
        let size = extents.iter().map(|extent| extent.length).sum();
        Self::new(size, move |offset, length, max_extents| {
            let mut located = Located::default();
            let mut at = 0;
            for extent in &extents {
                let end = at + extent.length;
                let full = located.extents.len() >= per_answer.min(max_extents as usize);
                if end > offset && !full && (at < offset + length) {
                    if located.extents.is_empty() {
                        located.start = at;
                    }
                    located.extents.push(*extent);
                }
                at = end;
            }
            Ok(located)
        })
    }

    pub fn file(mut self, file: ImageFile) -> Self {
        self.files.push(Arc::new(file));
        self
    }

    pub fn unit(mut self, token: u64, bytes: Vec<u8>) -> Self {
        self.units.insert(token, bytes);
        self
    }

    pub fn overwritable(mut self) -> Self {
        self.info.overwritable = true;
        self
    }

    pub fn named(mut self, name: &str) -> Self {
        self.info.name = name.into();
        self
    }

    pub fn asked(&self) -> u64 {
        self.locates.load(Ordering::SeqCst)
    }
}

impl Layer for Script {
    fn info(&self) -> &LayerInfo {
        &self.info
    }
    fn locate(&self, offset: u64, length: u64, max_extents: u32) -> Result<Located> {
        assert!(length > 0 && offset + length <= self.info.virtual_size, "asked outside of the layer");
        self.locates.fetch_add(1, Ordering::SeqCst);
        (self.locate)(offset, length, max_extents)
    }
    fn unpack(&self, token: u64, _length: u64) -> Result<Vec<u8>> {
        self.unpacks.fetch_add(1, Ordering::SeqCst);
        Ok(self.units[&token].clone())
    }
    fn file(&self, index: FileIndex) -> Option<Arc<ImageFile>> {
        self.files.get(index.0 as usize).cloned()
    }
    fn writer(&self) -> Option<&dyn LayerWriter> {
        None
    }

    fn packer(&self) -> Option<&dyn LayerPacker> {
        None
    }
}

pub fn data(length: u64, offset: u64) -> Extent {
    Extent { length, placement: Placement::Data { file: FileIndex(0), offset, overwrite: false } }
}

pub fn writable(length: u64, offset: u64) -> Extent {
    Extent { length, placement: Placement::Data { file: FileIndex(0), offset, overwrite: true } }
}

pub fn zero(length: u64) -> Extent {
    Extent { length, placement: Placement::Zero }
}

pub fn unallocated(length: u64) -> Extent {
    Extent { length, placement: Placement::Unallocated }
}

pub fn packed(length: u64, token: u64) -> Extent {
    Extent { length, placement: Placement::Packed { token } }
}

/// A file with these bytes, and a handle to look at it from outside.
pub fn file(bytes: &[u8], access: Access) -> (ImageFile, File) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let other = file.try_clone().unwrap();
    (ImageFile::new(file, access, "/images/file").unwrap(), other)
}

/// `length` bytes that differ from place to place and from seed to seed, never 0.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|at| ((at ^ (at >> 8)).wrapping_mul(31).wrapping_add(seed * 77) % 255) as u8 + 1).collect()
}

/// Reads through buffers of `pieces` bytes.
pub fn read_pieces(disk: &dyn BlockBackend, offset: u64, length: usize, pieces: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; length];
    let buffers: Vec<_> = bytes.chunks_mut(pieces.max(1)).map(VolatileSlice::from).collect();
    disk.read(&buffers, offset)?;
    drop(buffers);
    Ok(bytes)
}

pub fn read(disk: &Disk, offset: u64, length: usize) -> Result<Vec<u8>> {
    read_pieces(disk, offset, length, length)
}

pub fn write(disk: &Disk, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut bytes = bytes.to_vec();
    disk.write(&[VolatileSlice::from(&mut bytes[..])], offset)
}

/// Says that the calling test, or a part of it, cannot run here: to people, and to `cargo xtask test`, which counts the
/// lines of the file that it names.
pub fn skip(reason: impl Display) {
    let line = format!("skipped: {}: {reason}\n", thread::current().name().unwrap_or("a disk"));
    eprint!("{line}");
    if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
        let mut file = File::options().append(true).create(true).open(file).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// What the thread of a lane does must end, whatever others hold or wait for: it is given up after a while, and goes
/// on by itself until the program ends.
pub fn does_not_wait<T: Send + 'static>(what: &str, action: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || sender.send(action()));
    match ended.recv_timeout(Duration::from_secs(20)) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the thread of a lane waits: {what}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("it said why: {what}"),
    }
}
