//! What the tests share: images by qemu-img, images by hand, and a small host that reads chains.

#![allow(dead_code, unreachable_pub, clippy::cast_possible_truncation)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockhouse_plugin::testing::{Change, Disk, Storage};
use blockhouse_plugin::{Access, Format, Placement, Snapshots};
use blockhouse_qcow2::Qcow2;

/// Bytes of a sector, which a power cut leaves whole or not at all.
const SECTOR: usize = 512;

/// True if QEMU's tools are here. Else it says that the calling test is skipped, and why: on standard error,
/// and in the file that `cargo xtask test` counts skips from.
pub fn have_qemu() -> bool {
    let have = ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !have {
        let thread = std::thread::current();
        let line = format!("skipped: {}: no qemu-img and qemu-io\n", thread.name().unwrap_or("qcow2"));
        eprint!("{line}");
        if let Some(file) = std::env::var_os("BLOCKHOUSE_SKIPS") {
            let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
            file.write_all(line.as_bytes()).unwrap();
        }
    }
    have
}

/// A directory of images, made and read by QEMU's tools.
pub struct Lab {
    _directory: tempfile::TempDir,
    root: PathBuf,
}

impl Lab {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        Self { _directory: directory, root }
    }

    pub fn path(&self, name: &str) -> String {
        self.root.join(name).to_str().unwrap().to_string()
    }

    /// Runs a tool in the directory, with the arguments separated by spaces.
    fn run(&self, tool: &str, arguments: &[&str]) {
        let output = Command::new(tool).args(arguments).current_dir(&self.root).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !stdout.contains("failed"), "{tool} {arguments:?}: {text} {stdout}");
    }

    /// `qemu-img`, with the arguments separated by spaces.
    pub fn qemu_img(&self, arguments: &str) {
        self.run("qemu-img", &arguments.split_whitespace().collect::<Vec<_>>());
    }

    /// `qemu-io` on a qcow2 image, one argument per command.
    pub fn qemu_io(&self, image: &str, commands: &[String]) {
        let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
        for command in commands {
            arguments.extend(["-c", command.as_str()]);
        }
        arguments.push(image);
        self.run("qemu-io", &arguments);
    }

    /// As [`qemu_io`](Self::qemu_io), by a process that flushes and dies before it closes the image.
    pub fn qemu_io_killed(&self, image: &str, commands: &[String]) {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "qcow2"]).current_dir(&self.root);
        for command in commands.iter().map(String::as_str).chain(["flush", "abort"]) {
            qemu_io.args(["-c", command]);
        }
        let output = qemu_io.arg(image).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && !text.contains("failed"), "qemu-io was to be killed: {text}");
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.root.join(name)).unwrap()
    }

    /// The whole disk as QEMU reads it; `options` come first (`-l snapshot.name=a`).
    pub fn oracle(&self, image: &str, options: &str) -> Vec<u8> {
        self.qemu_img(&format!("convert -f qcow2 {options} -O raw {image} oracle.out"));
        let bytes = self.bytes("oracle.out");
        std::fs::remove_file(self.root.join("oracle.out")).unwrap();
        bytes
    }

    /// All files of the directory, in memory.
    pub fn storage(&self) -> Storage {
        fn add(storage: &Storage, directory: &Path) {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    add(storage, &path);
                } else {
                    storage.insert(path.to_str().unwrap(), std::fs::read(&path).unwrap());
                }
            }
        }
        let storage = Storage::new();
        add(&storage, &self.root);
        storage
    }

    /// Reads the disk of `image` and compares it with QEMU: whole, and at random places. Says what the
    /// map of the image itself consists of.
    pub fn compare(&self, image: &str) -> Walk {
        let expected = self.oracle(image, "");
        let storage = self.storage();
        let mut chain = Chain::open(&storage, &self.path(image), "qcow2", None);
        assert_eq!(chain.size(), expected.len() as u64, "virtual size of {image}");
        chain.compare(&expected);
        let mut disk = storage.disk::<Qcow2>(&self.path(image)).unwrap();
        let mut random = Random(42);
        // As small as one extent at a time, and as large as whole tables.
        let budget = || if random.below(2) == 0 { 1 } else { 4096 };
        let walk = walk(&mut disk.format, expected.len() as u64, budget, usize::MAX);
        assert_eq!((walk.end, walk.errors), (expected.len() as u64, 0), "{walk:?}");
        walk
    }

    /// Compares the map of an image without a backing file with `qemu-img map`, sector by sector.
    pub fn compare_map(&self, image: &str) {
        let output = Command::new("qemu-img")
            .args(["map", "-f", "qcow2", "--output=json", image])
            .current_dir(&self.root)
            .output()
            .unwrap();
        let ranges: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        let mut expected = Vec::new();
        for range in ranges {
            let flag = |name: &str| range[name].as_bool().unwrap();
            let kind = match (flag("present"), flag("zero"), range["compressed"].as_bool().unwrap_or(false)) {
                (false, ..) => Kind::Unallocated,
                (_, true, _) => Kind::Zero,
                (_, _, true) => Kind::Packed,
                _ => Kind::Data(range["offset"].as_u64().unwrap()),
            };
            push_sectors(&mut expected, kind, range["length"].as_u64().unwrap());
        }

        let mut disk = self.storage().disk::<Qcow2>(&self.path(image)).unwrap();
        let mut actual = Vec::new();
        let mut at = 0;
        while at < disk.info.virtual_size {
            let located = disk.format.locate(at, disk.info.virtual_size - at, 64).unwrap();
            let mut start = located.start;
            for extent in located.extents {
                let skip = at.clamp(start, start + extent.length) - start;
                let kind = match extent.placement {
                    Placement::Data { offset, .. } => Kind::Data(offset + skip),
                    Placement::Zero => Kind::Zero,
                    Placement::Unallocated => Kind::Unallocated,
                    Placement::Packed { .. } => Kind::Packed,
                };
                push_sectors(&mut actual, kind, extent.length - skip);
                start += extent.length;
                at = at.max(start);
            }
        }
        assert_eq!(actual.len(), expected.len(), "{image}");
        for (sector, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
            assert_eq!(actual, expected, "sector {sector} of {image}");
        }
    }
}

/// What is known of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data(u64),
    Zero,
    Unallocated,
    Packed,
}

fn push_sectors(sectors: &mut Vec<Kind>, kind: Kind, length: u64) {
    for sector in 0..length / 512 {
        sectors.push(match kind {
            Kind::Data(offset) => Kind::Data(offset + sector * 512),
            other => other,
        });
    }
}

/// A disk with all its layers.
pub enum Chain {
    Raw(Vec<u8>),
    Qcow2 { disk: Box<Disk<Qcow2>>, size: u64, below: Option<Box<Chain>> },
}

impl Chain {
    /// Opens an image and, by the declared formats, what is below it.
    pub fn open(storage: &Storage, path: &str, format: &str, snapshot: Option<&str>) -> Self {
        if format == "raw" {
            return Self::Raw(std::fs::read(path).unwrap());
        }
        assert_eq!(format, "qcow2");
        let mut size = None;
        let disk = storage
            .disk_with::<Qcow2>(path, Access::ReadOnly, |qcow2| {
                size = snapshot.map(|id| qcow2.select_snapshot(id)).transpose()?;
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        let below = disk.backing().map(|backing| {
            let path = storage.opened().last().unwrap().clone();
            let format = backing.format.as_deref().expect("a declared format");
            Box::new(Self::open(storage, &path, format, None))
        });
        let size = size.unwrap_or(disk.info.virtual_size);
        Self::Qcow2 { disk: Box::new(disk), size, below }
    }

    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(bytes) => bytes.len() as u64,
            Self::Qcow2 { size, .. } => *size,
        }
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) {
        match self {
            Self::Raw(bytes) => {
                let from = bytes.get(usize::try_from(offset).unwrap()..).unwrap_or_default();
                let length = from.len().min(buffer.len());
                buffer[..length].copy_from_slice(&from[..length]);
                buffer[length..].fill(0);
            }
            Self::Qcow2 { disk, size, below } => disk
                .read_over(*size, offset, buffer, &mut |at, to| match below {
                    None => to.fill(0),
                    Some(below) => {
                        let inside = usize::try_from(below.size().saturating_sub(at)).unwrap().min(to.len());
                        let (from, past) = to.split_at_mut(inside);
                        if !from.is_empty() {
                            below.read(at, from);
                        }
                        past.fill(0);
                    }
                })
                .unwrap_or_else(|error| panic!("read at {offset}: {error}")),
        }
    }

    /// Reads the whole disk, and random pieces of it, and compares.
    pub fn compare(&mut self, expected: &[u8]) {
        let mut actual = vec![0xa5; expected.len()];
        self.read(0, &mut actual);
        same(0, &actual, expected);
        let mut random = Random(0x9e37_79b9);
        for _ in 0..if expected.is_empty() { 0 } else { 60 } {
            let offset = random.below(expected.len() as u64);
            let length = random.below(20_000).min(expected.len() as u64 - offset);
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
            let mut actual = vec![0xa5; range.len()];
            self.read(offset, &mut actual);
            same(offset, &actual, &expected[range]);
        }
    }
}

fn same(offset: u64, actual: &[u8], expected: &[u8]) {
    assert_eq!(actual.len(), expected.len());
    if let Some(at) = actual.iter().zip(expected).position(|(actual, expected)| actual != expected) {
        panic!("byte {} is {:#04x}, and QEMU reads {:#04x}", offset + at as u64, actual[at], expected[at]);
    }
}

/// Numbers that look random and are the same in every run (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Bytes that compress to about half: random ones and long runs.
pub fn material(length: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        if bytes.len() % 512 < 256 {
            bytes.extend(random.next().to_le_bytes());
        } else {
            bytes.extend([0x42; 64]);
        }
    }
    bytes.truncate(length);
    bytes
}

/// A small image by hand, which tests change before they open it.
///
/// Clusters of the file: 0 header, 1 refcount table, 2 refcount block, 3 L1 table, 4 L2 table, 5 and 6 data,
/// 7 free.
pub struct Handmade {
    pub bytes: Vec<u8>,
    pub cluster_size: usize,
}

impl Handmade {
    /// A disk of eight clusters of 64 KiB, the first two of which are allocated.
    pub fn v3() -> Self {
        Self::new(3, 16, 8)
    }

    pub fn new(version: u32, cluster_bits: u32, clusters: u64) -> Self {
        let cluster_size = 1usize << cluster_bits;
        let mut image = Self { bytes: vec![0; 8 * cluster_size], cluster_size };
        image.be32(0, 0x5146_49fb);
        image.be32(4, version);
        image.be32(20, cluster_bits);
        image.be64(24, clusters << cluster_bits);
        image.be32(36, 1);
        image.be64(40, image.cluster(3));
        image.be64(48, image.cluster(1));
        image.be32(56, 1);
        if version >= 3 {
            image.be32(96, 4);
            image.be32(100, 104);
        }
        image.be64(image.at(1), image.cluster(2));
        image.be64(image.at(3), image.cluster(4) | 1 << 63);
        for number in 0..2 {
            image.l2(number, image.cluster(5 + number) | 1 << 63);
            let at = image.at(5 + number);
            let data = material(cluster_size, number as u64 + 1);
            image.bytes[at..at + cluster_size].copy_from_slice(&data);
        }
        image
    }

    pub fn at(&self, cluster: usize) -> usize {
        cluster * self.cluster_size
    }

    pub fn cluster(&self, number: usize) -> u64 {
        (number * self.cluster_size) as u64
    }

    pub fn be32(&mut self, at: usize, value: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    pub fn be64(&mut self, at: usize, value: u64) -> &mut Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }

    /// Sets an entry of the L2 table.
    pub fn l2(&mut self, index: usize, entry: u64) -> &mut Self {
        let at = self.at(4) + 8 * index;
        self.be64(at, entry)
    }

    /// Sets an entry of the L2 table of an image with extended L2.
    pub fn extended(&mut self, index: usize, entry: u64, bitmap: u64) -> &mut Self {
        self.l2(2 * index, entry).l2(2 * index + 1, bitmap)
    }

    /// Puts header extensions behind the header; returns where they end.
    pub fn extensions(&mut self, start: usize, extensions: &[(u32, &[u8])]) -> usize {
        let mut at = start;
        for (kind, data) in extensions {
            self.be32(at, *kind).be32(at + 4, u32::try_from(data.len()).unwrap());
            self.bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
            at += 8 + data.len().next_multiple_of(8);
        }
        self.be64(at, 0);
        at + 8
    }

    pub fn open(&self) -> blockhouse_plugin::Result<Disk<Qcow2>> {
        self.open_for(Access::ReadOnly)
    }

    pub fn open_for(&self, access: Access) -> blockhouse_plugin::Result<Disk<Qcow2>> {
        let storage = Storage::new();
        storage.insert("/images/disk.qcow2", self.bytes.clone());
        storage.disk_with::<Qcow2>("/images/disk.qcow2", access, |_| Ok(()))
    }
}

/// Walks the map of a disk as a host does, checks that every answer keeps the contract, unpacks what is
/// packed, and steps over what cannot be read. At most `calls` calls of `locate`.
pub fn walk(qcow2: &mut Qcow2, virtual_size: u64, mut max_extents: impl FnMut() -> u32, calls: usize) -> Walk {
    let mut walk = Walk::default();
    let mut at = 0;
    while at < virtual_size && walk.calls < calls {
        walk.calls += 1;
        let max = max_extents();
        let Ok(located) = qcow2.locate(at, virtual_size - at, max) else {
            walk.errors += 1;
            at = (at + 512).next_multiple_of(4096);
            continue;
        };
        assert!(located.start <= at);
        assert!(located.extents.len() <= max as usize);
        let mut end = located.start;
        for extent in &located.extents {
            assert!(extent.length > 0);
            let start = end;
            end = end.checked_add(extent.length).unwrap();
            let counted = usize::from(start >= at);
            match extent.placement {
                Placement::Data { offset, overwrite, .. } => {
                    walk.data += counted;
                    assert!(!overwrite);
                    assert!(i64::try_from(offset.checked_add(extent.length).unwrap()).is_ok());
                }
                Placement::Packed { token } => {
                    walk.packed += counted;
                    assert!(extent.length <= 2 << 20);
                    match qcow2.unpack(token, extent.length) {
                        Ok(bytes) => assert_eq!(bytes.len() as u64, extent.length),
                        Err(_) => walk.errors += 1,
                    }
                }
                Placement::Zero => walk.zero += counted,
                Placement::Unallocated => walk.unallocated += counted,
            }
        }
        assert!(end <= virtual_size);
        assert!(end > at, "the answer does not contain the offset asked for");
        at = end;
    }
    walk.end = at;
    walk
}

#[derive(Debug, Default)]
pub struct Walk {
    pub calls: usize,
    pub errors: usize,
    pub data: usize,
    pub zero: usize,
    pub unallocated: usize,
    pub packed: usize,
    pub end: u64,
}

/// A state that a power cut after `changes` to a file of these bytes could leave: of what came after the last sync
/// any sector may be missing.
pub fn torn(before: &[u8], changes: &[Change], random: &mut Random) -> Vec<u8> {
    let mut bytes = before.to_vec();
    let synced = changes.iter().rposition(|change| *change == Change::Sync).map_or(0, |at| at + 1);
    for change in &changes[..synced] {
        change.apply(&mut bytes);
    }
    let kept = [5, 50, 95][random.below(3) as usize];
    for change in &changes[synced..] {
        match change {
            Change::Write(offset, new) => {
                let mut at = 0;
                while at < new.len() {
                    let end = new.len().min(at + SECTOR - (*offset as usize + at) % SECTOR);
                    if random.below(100) < kept {
                        Change::Write(offset + at as u64, new[at..end].to_vec()).apply(&mut bytes);
                    }
                    at = end;
                }
            }
            other if random.below(100) < kept => other.apply(&mut bytes),
            _ => {}
        }
    }
    bytes
}
