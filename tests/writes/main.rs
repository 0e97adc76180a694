//! Writes through the real component and the real disk, against a model of plain bytes and against QEMU.
//!
//! Each image is written in turns: by Blockhouse from several threads, then by `qemu-io`, and so on. After
//! each turn `qemu-img check` finds nothing at all, not even a leak, and `qemu-img convert` gives the bytes of
//! the model. `WRITES_ROUNDS=N` makes it longer; `queues.rs` has the requests of several queues overlap.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod amplification;
mod full;
mod growth;
mod queues;

use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use blockhouse_sandbox::block::{Access, BlockBackend, Disk, DiskOptions, Error, ErrorKind, VolatileSlice};
use blockhouse_sandbox::{Formats, Grants, Limits, LockMode, OpenRequest, Opener, Restart, Sandbox};
use blockhouse_tests::{Outcome, component, noise, scratch, skip};

/// Threads that write at the same time, each in its own part of the disk.
const THREADS: u64 = 4;
const SECTOR: u64 = 512;

/// Numbers that depend on the seed alone.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }
}

/// Held while a program runs. When it starts, a child has the open images of all tests, and with them their
/// locks, which would still be there when a test has dropped its disk.
static PROGRAM: Mutex<()> = Mutex::new(());

#[track_caller]
fn run(command: &mut Command) -> Outcome {
    let _alone = PROGRAM.lock().unwrap_or_else(PoisonError::into_inner);
    blockhouse_tests::run(command)
}

#[track_caller]
fn qemu_img<const N: usize>(arguments: [&str; N]) -> String {
    run(Command::new("qemu-img").args(arguments)).succeeded().text()
}

struct Place {
    directory: tempfile::TempDir,
    opener: Opener,
}

impl Place {
    fn new() -> Self {
        let directory = scratch();
        let sandbox = Sandbox::new(Limits::default()).unwrap();
        let mut formats = Formats::new();
        for format in ["raw", "qcow2"] {
            formats.add(format, sandbox.load_file(&component(format)).unwrap());
        }
        // Files of data are written; bases, which are in the same place, must not be all the same.
        let grants = Grants::new().allow_writing(directory.path()).unwrap();
        Self { opener: Opener::new(&sandbox, formats).grants(grants), directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self, name: &str) -> Disk {
        self.open_with(name, &self.opener, DiskOptions::default())
    }

    fn open_with(&self, name: &str, opener: &Opener, disk: DiskOptions) -> Disk {
        let request = OpenRequest { access: Access::ReadWrite, disk, ..OpenRequest::new(self.path(name), "qcow2") };
        opener.open(&request).unwrap().disk
    }

    /// With direct I/O where the file system has it and clusters are large enough for it, and with space that is
    /// reserved ahead.
    fn open_direct(&self, name: &str) -> Disk {
        let file = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(self.path(name));
        if file.is_err() {
            eprintln!("without direct I/O, which the file system does not have");
        }
        let opener = self.opener.clone().direct(file.is_ok());
        let disk = DiskOptions { allocate_ahead_bytes: 1 << 20, ..DiskOptions::default() };
        let request = OpenRequest { access: Access::ReadWrite, disk, ..OpenRequest::new(self.path(name), "qcow2") };
        match opener.open(&request) {
            Ok(opened) => opened.disk,
            Err(error) if error.message().contains("clusters of 512 bytes, and direct I/O needs 4096") => {
                // A program that another test starts right now has the file until it runs.
                self.open_with(name, &self.opener.clone().locks(LockMode::Patient), request.disk)
            }
            Err(error) => panic!("{name} does not open with direct I/O: {error}"),
        }
    }

    fn qemu_img(&self, arguments: &str) {
        let output =
            run(Command::new("qemu-img").args(arguments.split_whitespace()).current_dir(self.directory.path()));
        output.succeeded();
    }

    /// Nothing is wrong, not even a leak, and the content is the model.
    fn check(&self, name: &str, model: &[u8], context: &str) {
        // From here: QEMU finds a data file where it is, not where the image is.
        let mut check = Command::new("qemu-img");
        check.args(["check", "-f", "qcow2", "--output=json", name]).current_dir(self.directory.path());
        let text = run(&mut check).succeeded().text();
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        for key in ["corruptions", "leaks", "check-errors"] {
            assert_eq!(found[key].as_u64().unwrap_or(0), 0, "{context}: {key} in {text}");
        }
        self.qemu_img(&format!("convert -f qcow2 -O raw {name} out.raw"));
        let content = std::fs::read(self.path("out.raw")).unwrap();
        assert_eq!(content.len(), model.len(), "{context}");
        if let Some(at) = content.iter().zip(model).position(|(one, other)| one != other) {
            panic!("{context}: the first wrong byte is at {at:#x}");
        }
    }
}

fn write(disk: &Disk, offset: u64, bytes: &mut [u8]) {
    disk.write(&[VolatileSlice::from(bytes)], offset).unwrap();
}

fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    disk.read(&[VolatileSlice::from(bytes.as_mut_slice())], offset).unwrap();
    bytes
}

/// Random operations of one thread on its part of the disk.
fn operate(disk: &Disk, part: &mut [u8], base: u64, seed: u64, count: u64) {
    let mut random = Random(seed);
    let sectors = part.len() as u64 / SECTOR;
    let mut end = 0;
    for number in 0..count {
        // Some go on where the one before ended.
        let first = if random.below(3) == 0 { end % sectors } else { random.below(sectors) };
        let length = (1 + random.below(300)).min(sectors - first) * SECTOR;
        let (from, to) = ((first * SECTOR) as usize, (first * SECTOR + length) as usize);
        let offset = base + first * SECTOR;
        end = first + length / SECTOR;
        match random.below(10) {
            0..=4 => {
                let mut bytes = noise(seed ^ number, length as usize);
                write(disk, offset, &mut bytes);
                part[from..to].copy_from_slice(&bytes);
            }
            5 => {
                disk.write_zeroes(offset, length, random.below(2) == 0).unwrap();
                part[from..to].fill(0);
            }
            6 => {
                disk.discard(offset, length).unwrap();
                // Old or zero, which it is stays so.
                let now = read(disk, offset, to - from);
                for (now, old) in now.iter().zip(&part[from..to]) {
                    assert!(*now == 0 || now == old, "a discard at {offset} made up a byte");
                }
                part[from..to].copy_from_slice(&now);
            }
            7 => disk.flush().unwrap(),
            _ => assert!(read(disk, offset, to - from) == part[from..to], "read back at {offset}"),
        }
    }
}

/// Writes one image in turns.
fn turns(place: &Place, name: &str, mut model: Vec<u8>, seed: u64) {
    let rounds = std::env::var("WRITES_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    for round in 0..rounds {
        let disk = if round % 2 == 0 { place.open(name) } else { place.open_direct(name) };
        let share = (model.len() / THREADS as usize).next_multiple_of(SECTOR as usize);
        let capacity = model.len();
        std::thread::scope(|scope| {
            for (number, part) in model.chunks_mut(share).enumerate() {
                let disk = &disk;
                let seed = seed ^ round << 8 ^ (number as u64) << 16;
                scope.spawn(move || operate(disk, part, (number * share) as u64, seed, 60));
            }
        });
        assert_eq!(read(&disk, 0, capacity), model, "{name}, round {round}");
        disk.close().unwrap();
        drop(disk);
        place.check(name, &model, &format!("{name}, round {round}, written by Blockhouse"));

        let mut random = Random(seed ^ round);
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]).current_dir(place.directory.path());
        for byte in 0..8u8 {
            let at = random.below(model.len() as u64 / SECTOR) * SECTOR;
            let length = (1 + random.below(200)) * SECTOR;
            let length = length.min(model.len() as u64 - at);
            let pattern = 100 + byte;
            command.args(["-c", &format!("write -P {pattern} {at} {length}")]);
            model[at as usize..(at + length) as usize].fill(pattern);
        }
        run(command.arg(name)).succeeded();
        place.check(name, &model, &format!("{name}, round {round}, written by QEMU"));
    }
}

fn image(options: &str, size: u64, backing: bool) {
    let place = Place::new();
    let mut model = vec![0; size as usize];
    let mut over = String::new();
    let base = noise(7, size as usize / 2);
    std::fs::write(place.path("base.raw"), &base).unwrap();
    if backing {
        model[..base.len()].copy_from_slice(&base);
        place.qemu_img("convert -c -f raw -O qcow2 base.raw base.qcow2");
        over = "-b base.qcow2 -F qcow2".to_owned();
    }
    place.qemu_img(&format!("create -q -f qcow2 -o {options} {over} top.qcow2 {size}"));
    let before = backing.then(|| std::fs::read(place.path("base.qcow2")).unwrap());
    turns(&place, "top.qcow2", model, size);
    if let Some(before) = before {
        assert!(std::fs::read(place.path("base.qcow2")).unwrap() == before, "the base was changed");
    }
}

#[test]
fn an_overlay_on_a_compressed_base() {
    image("cluster_size=64k", (8 << 20) + 1536, true);
}

/// Where no other instance of a component may follow, none could open again what the image refers to.
#[test]
fn growth_without_restarts() {
    let place = Place::new();
    std::fs::write(place.path("base.raw"), noise(1, 1 << 20)).unwrap();
    place.qemu_img("create -q -f qcow2 -b base.raw -F raw over.qcow2");
    place.qemu_img("create -q -f qcow2 alone.qcow2 1M");
    let opener = place.opener.clone().restart(Restart::never());
    for (name, grows) in [("over.qcow2", false), ("alone.qcow2", true)] {
        let disk = place.open_with(name, &opener, DiskOptions::default());
        write(&disk, 0, &mut noise(2, 4096));
        let grown = disk.grow(2 << 20);
        assert_eq!(grown.as_ref().err().map(Error::kind), (!grows).then_some(ErrorKind::Unsupported), "{grown:?}");
        assert_eq!(disk.capacity(), if grows { 2 << 20 } else { 1 << 20 });
        write(&disk, disk.capacity() - 512, &mut noise(3, 512));
        let content = read(&disk, 0, disk.capacity() as usize);
        disk.close().unwrap();
        drop(disk);
        place.check(name, &content, name);
    }
}

/// A component writes metadata through the page cache: data that shares a page with it must not go past that.
#[test]
fn direct_io_is_refused_where_clusters_share_pages() {
    let place = Place::new();
    place.qemu_img("create -q -f qcow2 -o cluster_size=2k small.qcow2 1M");
    place.qemu_img("create -q -f qcow2 large.qcow2 1M");
    let opener = place.opener.clone().direct(true);
    let open = |name: &str| {
        opener.open(&OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(place.path(name), "qcow2") })
    };
    let error = open("small.qcow2").map(|_| ()).unwrap_err();
    assert!(error.message().contains("direct I/O"), "{error}");
    if let Err(error) = open("large.qcow2") {
        assert!(error.message().contains("cannot be used with direct I/O"), "{error}");
    }
}

/// A write to the end of such an image would make it longer. In memory, where blocks of direct I/O are pages.
#[test]
fn direct_io_is_refused_where_a_raw_image_ends_inside_of_a_block() {
    let place = Place::new();
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        skip("/dev/shm is missing");
        return;
    };
    let image = directory.path().join("disk.raw");
    let opener = place.opener.clone().direct(true);
    let open = || opener.open(&OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(image.clone(), "raw") });
    std::fs::write(&image, noise(1, 9 << 9)).unwrap();
    let error = open().map(|_| ()).unwrap_err();
    if error.message().contains("cannot be used with direct I/O") {
        return skip("the file system in memory has no direct I/O");
    }
    assert!(error.message().contains("a multiple of 4096"), "{error}");
    assert!(opener.open(&OpenRequest::new(image.clone(), "raw")).is_ok(), "it is only read");
    std::fs::write(&image, noise(1, 8192)).unwrap();
    let disk = open().unwrap().disk;
    let error = disk.grow(8192 + 512).unwrap_err();
    assert!(error.message().contains("a multiple of 4096"), "{error}");
    assert_eq!((disk.capacity(), std::fs::metadata(&image).unwrap().len()), (8192, 8192));
    disk.grow(12288).unwrap();
    write(&disk, 12288 - 512, &mut noise(2, 512));
    disk.close().unwrap();
    let expected = [noise(1, 8192), vec![0; 4096 - 512], noise(2, 512)].concat();
    assert!(std::fs::read(&image).unwrap() == expected);
}

#[test]
fn small_clusters() {
    image("cluster_size=512,refcount_bits=64", 1 << 20, true);
}

#[test]
fn narrow_reference_counts() {
    image("cluster_size=4k,refcount_bits=1", 4 << 20, false);
}

#[test]
fn extended_l2_entries() {
    image("cluster_size=32k,extended_l2=on", 6 << 20, true);
}

#[test]
fn lazy_reference_counts() {
    image("cluster_size=16k,lazy_refcounts=on", 6 << 20, true);
}

#[test]
fn version_2() {
    image("compat=0.10,cluster_size=16k", 6 << 20, true);
}

#[test]
fn large_clusters() {
    image("cluster_size=2M", 20 << 20, true);
}

#[test]
fn a_compressed_image_is_rewritten() {
    let place = Place::new();
    let model = noise(3, 4 << 20);
    std::fs::write(place.path("full.raw"), &model).unwrap();
    place.qemu_img("convert -c -f raw -O qcow2 -o cluster_size=16k,compression_type=zstd full.raw top.qcow2");
    turns(&place, "top.qcow2", model, 3);
}

#[test]
fn snapshots_keep_what_they_hold() {
    let place = Place::new();
    let model = noise(4, 4 << 20);
    std::fs::write(place.path("full.raw"), &model).unwrap();
    place.qemu_img("convert -f raw -O qcow2 -o cluster_size=16k full.raw top.qcow2");
    place.qemu_img("snapshot -c before top.qcow2");
    turns(&place, "top.qcow2", model.clone(), 4);
    place.qemu_img("convert -f qcow2 -l before -O raw top.qcow2 before.raw");
    assert!(std::fs::read(place.path("before.raw")).unwrap() == model, "the snapshot was changed");
}

fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

#[test]
fn a_discard_gives_space_back_to_the_file_system() {
    let place = Place::new();
    place.qemu_img("create -q -f qcow2 top.qcow2 64M");
    let path = place.path("top.qcow2");
    let disk = place.open("top.qcow2");
    for number in 0..16 {
        write(&disk, number << 20, &mut noise(number, 1 << 20));
    }
    disk.flush().unwrap();
    let full = blocks(&path);
    assert!(full >= 16 << 11, "{full} blocks");
    disk.discard(0, 12 << 20).unwrap();
    disk.flush().unwrap();
    let less = blocks(&path);
    assert!(less <= full - (12 << 11) + 512, "{full} blocks before, {less} after");
    // And takes it again: the file does not grow.
    let size = std::fs::metadata(&path).unwrap().len();
    for number in 0..12 {
        write(&disk, (20 + number) << 20, &mut noise(number, 1 << 20));
    }
    disk.close().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), size, "freed space was not used again");
}

/// What is written after it was closed does not reach the image, and what was flushed is there.
#[test]
fn a_disk_that_is_dropped_keeps_what_was_flushed() {
    let place = Place::new();
    place.qemu_img("create -q -f qcow2 top.qcow2 16M");
    let mut model = vec![0; 16 << 20];
    let disk = Mutex::new(place.open("top.qcow2"));
    let mut bytes = noise(1, 3 << 20);
    write(&disk.lock().unwrap(), 1 << 20, &mut bytes);
    model[1 << 20..4 << 20].copy_from_slice(&bytes);
    disk.lock().unwrap().flush().unwrap();
    // Without `close`, as when the process is killed.
    drop(disk);
    place.check("top.qcow2", &model, "flushed and dropped");
}

/// QEMU and Blockhouse keep each other from writing to an image that is in use.
#[test]
fn an_image_in_use_is_locked_for_qemu_and_for_us() {
    let place = Place::new();
    place.qemu_img("create -q -f qcow2 base.qcow2 1M");
    place.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 1M");
    place.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 other.qcow2 1M");
    let qemu =
        |arguments: &[&str]| run(Command::new(arguments[0]).args(&arguments[1..]).current_dir(place.directory.path()));
    let write = |name: &str| qemu(&["qemu-io", "-f", "qcow2", "-c", "write 0 512", name]);
    let refusal = |name: &str, access| {
        let request = OpenRequest { access, ..OpenRequest::new(place.path(name), "qcow2") };
        place.opener.open(&request).unwrap_err().to_string()
    };

    let disk = place.open("top.qcow2");
    write("top.qcow2").refused();
    write("base.qcow2").refused();
    qemu(&["qemu-img", "info", "top.qcow2"]).refused();
    qemu(&["qemu-img", "info", "-U", "top.qcow2"]).succeeded();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        assert!(refusal("top.qcow2", access).contains("in use"), "{}", refusal("top.qcow2", access));
    }
    assert!(refusal("base.qcow2", Access::ReadWrite).contains("in use"));
    // The base is shared by readers, QEMU among them.
    let other = place.open("other.qcow2");
    qemu(&["qemu-img", "info", "base.qcow2"]).succeeded();
    drop((disk, other));
    write("top.qcow2").succeeded();

    // The other way round: QEMU has it open until its standard input ends.
    let mut holder = Command::new("qemu-io");
    holder.args(["-f", "qcow2", "top.qcow2"]).current_dir(place.directory.path());
    let alone = PROGRAM.lock().unwrap_or_else(PoisonError::into_inner);
    let mut holder = holder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Its prompt comes when the image is open.
    let mut prompt = [0; 8];
    holder.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    drop(alone);
    assert!(refusal("top.qcow2", Access::ReadWrite).contains("in use"));
    assert!(refusal("top.qcow2", Access::ReadOnly).contains("in use"));
    drop(holder.stdin.take());
    holder.wait().unwrap();
    place.open("top.qcow2").close().unwrap();
}
