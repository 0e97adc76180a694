//! The file system fills up while a disk is written: the guest gets an error, the image takes no harm, and
//! once there is space again the same open disk goes on.
//!
//! The file system is a small one in memory, which only the thread of the test sees. A filler file takes its
//! space, to the page, and gives it back.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use blockhouse_sandbox::block::{BlockBackend, Disk, Error, ErrorKind, VolatileSlice};
use blockhouse_tests::{COMMAND_LIMIT, blockhouse, noise, skip};
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::{Place, Random, SECTOR, qemu_img, read, run};

/// Files of a memory file system grow by so much, in bytes.
const PAGE: u64 = 4096;

/// A file system of a few MiB at `small` in a place.
struct Small {
    at: PathBuf,
}

impl Small {
    /// Mounts it, or skips the calling test.
    #[track_caller]
    fn mount(place: &Place, size: u64) -> Option<Self> {
        let at = place.path("small");
        std::fs::create_dir(&at).unwrap();
        let target = CString::new(at.as_os_str().as_bytes()).unwrap();
        let options = CString::new(format!("size={size}")).unwrap();
        // SAFETY: the calls get whole strings that outlive them, or null where that is allowed, and touch no
        // other memory. Only this thread moves to the new mount namespace.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                // So that nobody else sees what is mounted from here on.
                && libc::mount(
                    std::ptr::null(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) == 0
                && libc::mount(
                    c"blockhouse".as_ptr(),
                    target.as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    options.as_ptr().cast(),
                ) == 0
        };
        if !mounted {
            skip(format!("cannot mount a file system: {}", std::io::Error::last_os_error()));
            return None;
        }
        Some(Self { at })
    }

    /// Bytes that are free.
    fn free(&self) -> u64 {
        let status = statvfs(&self.at).unwrap();
        status.f_bavail * status.f_frsize
    }

    /// Waits until so many bytes are free: the kernel takes a ring of I/O apart, and lets go of its files, a moment
    /// after its process has ended.
    #[track_caller]
    fn wait_for(&self, space: u64) {
        let started = Instant::now();
        while self.free() < space {
            assert!(started.elapsed() < COMMAND_LIMIT, "the space of removed files does not come back");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Takes all space but `left` bytes.
    fn fill(&self, left: u64) {
        let file = File::create(self.at.join("filler")).unwrap();
        let length = self.free().saturating_sub(left);
        if length > 0 {
            fallocate(&file, FallocateFlags::empty(), 0, length).unwrap();
        }
    }

    /// Gives it back.
    fn empty(&self) {
        // Cut short, not removed: the file may still be open in a child of another test that is starting.
        File::create(self.at.join("filler")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let target = CString::new(self.at.as_os_str().as_bytes()).unwrap();
        // SAFETY: a whole string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// A disk on the small file system, and what it has to hold.
struct Subject<'p> {
    place: &'p Place,
    small: &'p Small,
    disk: Disk,
    now: Vec<u8>,
    flushed: Vec<u8>,
    /// Sectors that were changed since the last flush.
    touched: BTreeSet<usize>,
    /// What was done, for messages.
    log: String,
}

const IMAGE: &str = "small/top.qcow2";

impl<'p> Subject<'p> {
    /// Opens what is at [`IMAGE`], which holds `model`.
    fn new(place: &'p Place, small: &'p Small, model: Vec<u8>) -> Self {
        Self {
            place,
            small,
            disk: place.open(IMAGE),
            flushed: model.clone(),
            now: model,
            touched: BTreeSet::new(),
            log: String::new(),
        }
    }

    /// Notes what became of a change of a range that was to hold `new` afterwards, where that is not
    /// `kept`. Returns whether it was done.
    fn changed(&mut self, what: &str, offset: u64, new: &[u8], result: Result<(), Error>) -> bool {
        let range = offset as usize..offset as usize + new.len();
        self.log += &format!("{what} {offset:#x}+{:#x}: {result:?}\n", new.len());
        self.touched.extend(range.start / SECTOR as usize..range.end.div_ceil(SECTOR as usize));
        let content = read(&self.disk, offset, new.len());
        if let Err(error) = &result {
            assert!(is_full(error), "{}", self.log);
            // Each sector is old or new, and stays what it is.
            for (sector, (old, new)) in content
                .chunks(SECTOR as usize)
                .zip(self.now[range.clone()].chunks(SECTOR as usize).zip(new.chunks(SECTOR as usize)))
            {
                assert!(sector == old || sector == new, "a failed {what} made up bytes\n{}", self.log);
            }
        } else {
            assert!(content == new, "{what} is not read back\n{}", self.log);
        }
        self.now[range].copy_from_slice(&content);
        result.is_ok()
    }

    fn write(&mut self, offset: u64, bytes: &mut [u8]) -> bool {
        let result = self.disk.write(&[VolatileSlice::from(&mut *bytes)], offset);
        self.changed("write", offset, bytes, result)
    }

    fn zero(&mut self, offset: u64, length: u64, unmap: bool) -> bool {
        let result = self.disk.write_zeroes(offset, length, unmap);
        self.changed("zero", offset, &vec![0; length as usize], result)
    }

    /// Discards whole clusters of an image that can do it.
    fn discard(&mut self, offset: u64, length: u64) -> bool {
        let result = self.disk.discard(offset, length);
        self.changed("discard", offset, &vec![0; length as usize], result)
    }

    fn flush(&mut self) -> bool {
        let result = self.disk.flush();
        self.log += &format!("flush: {result:?}\n");
        match result {
            Ok(()) => {
                self.flushed.clone_from(&self.now);
                self.touched.clear();
                true
            }
            Err(error) => {
                assert!(is_full(&error), "{}", self.log);
                false
            }
        }
    }

    fn fill(&mut self, left: u64) {
        self.small.fill(left);
        self.log += &format!("full but for {left} bytes\n");
    }

    fn empty(&mut self) {
        self.small.empty();
        self.log += "space again\n";
    }

    /// The file as it is now holds all that a flush acknowledged and nothing changed since, and its metadata
    /// is at worst leaky.
    fn survives(&self) {
        let copy = self.place.path("copy.qcow2");
        std::fs::copy(self.place.path(IMAGE), &copy).unwrap();
        assert_eq!(damage(self.place, "copy.qcow2").0, 0, "corruption\n{}", self.log);
        let content = self.content("copy.qcow2");
        let sectors = content.chunks(SECTOR as usize).zip(self.flushed.chunks(SECTOR as usize));
        for (number, (found, flushed)) in sectors.enumerate() {
            let lost = found != flushed && !self.touched.contains(&number);
            assert!(!lost, "sector {number} was flushed and is not there\n{}", self.log);
        }
    }

    fn content(&self, name: &str) -> Vec<u8> {
        self.place.qemu_img(&format!("convert -f qcow2 -O raw {name} out.raw"));
        std::fs::read(self.place.path("out.raw")).unwrap()
    }

    /// All of it is read as it was left.
    fn compare(&self) {
        assert!(read(&self.disk, 0, self.now.len()) == self.now, "the disk reads something else\n{}", self.log);
    }

    /// With space, everything works, and nothing is left behind.
    fn recovers(mut self, seed: u64) {
        self.empty();
        assert!(self.flush(), "there is space, and a flush fails\n{}", self.log);
        let size = self.now.len() as u64;
        let mut random = Random(seed);
        for number in 0..4 {
            let offset = random.below(size / SECTOR) * SECTOR;
            let length = (16 * SECTOR).min(size - offset);
            let mut bytes = noise(seed ^ number, length as usize);
            assert!(self.write(offset, &mut bytes), "there is space, and a write fails\n{}", self.log);
        }
        self.compare();
        self.disk.close().unwrap_or_else(|error| panic!("{error}\n{}", self.log));
        let Self { place, disk, now, log, .. } = self;
        // The lock is the disk's, open or closed.
        drop(disk);
        place.check(IMAGE, &now, &log);
    }
}

/// Whether an error says that there is no space, in a way that a program understands, whoever found out.
fn is_full(error: &Error) -> bool {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|cause| cause.kind() == io::ErrorKind::StorageFull)
    };
    error.kind() == ErrorKind::Storage && std::iter::successors(error.source(), |&cause| cause.source()).any(is_full)
}

/// Corruptions and leaks, as `qemu-img check` counts them.
pub(crate) fn damage(place: &Place, name: &str) -> (u64, u64) {
    // It ends badly for leaks too.
    let mut check = Command::new("qemu-img");
    let outcome = run(check.args(["check", "-f", "qcow2", "--output=json"]).arg(place.path(name)));
    let found: serde_json::Value = serde_json::from_slice(&outcome.stdout)
        .unwrap_or_else(|error| panic!("qemu-img check: {error}: {}", outcome.stderr));
    let number = |name: &str| found[name].as_u64().unwrap_or(0);
    (number("corruptions") + number("check-errors"), number("leaks"))
}

/// Writes noise from `range.start` on, `piece` bytes at a time, until a write fails. Returns where that was.
fn write_until_full(subject: &mut Subject<'_>, range: Range<u64>, piece: u64) -> u64 {
    let mut offset = range.start;
    while offset < range.end {
        if !subject.write(offset, &mut noise(offset, piece as usize)) {
            return offset;
        }
        offset += piece;
    }
    panic!("the file system did not fill up\n{}", subject.log);
}

#[test]
fn data_finds_no_space() {
    let place = Place::new();
    let Some(small) = Small::mount(&place, 24 << 20) else { return };
    for (cluster, piece) in [("512", 24 << 10), ("4k", 4 << 10), ("64k", 64 << 10), ("64k", 1 << 20), ("2M", 64 << 10)]
    {
        place.qemu_img(&format!("create -q -f qcow2 -o cluster_size={cluster} {IMAGE} 32M"));
        let mut subject = Subject::new(&place, &small, vec![0; 32 << 20]);
        subject.log += &format!("clusters of {cluster}, writes of {piece} bytes\n");
        let mut bytes = noise(1, 64 << 10);
        assert!(subject.write(0, &mut bytes));
        assert!(subject.flush(), "{}", subject.log);
        subject.fill(3 << 20);
        let stopped = write_until_full(&mut subject, 1 << 20..20 << 20, piece);
        subject.survives();
        // What has space is still written; what has none still fails, and takes nothing with it.
        assert!(subject.write(0, &mut noise(2, 64 << 10)));
        for number in 0..3 {
            subject.write(stopped + number * piece, &mut noise(number, piece as usize));
        }
        subject.compare();
        subject.flush();
        subject.survives();
        // Twice: space comes, and goes again.
        subject.empty();
        assert!(subject.write(stopped, &mut noise(3, piece as usize)), "{}", subject.log);
        assert!(subject.flush(), "{}", subject.log);
        subject.fill(PAGE);
        write_until_full(&mut subject, 20 << 20..32 << 20, piece);
        subject.survives();
        subject.recovers(4);
        std::fs::remove_file(place.path(IMAGE)).unwrap();
    }
}

/// Clusters so small that a refcount block counts 64 of them and an L2 table has 64 entries, and larger
/// ones; whether there is a flush before the one that fails, which makes the first L2 table.
const LAYOUTS: [(&str, bool); 4] = [
    ("cluster_size=512,refcount_bits=64", true),
    ("cluster_size=4k,refcount_bits=64", true),
    ("cluster_size=64k", false),
    ("cluster_size=16k,extended_l2=on", false),
];
const BASE_SIZE: u64 = 8 << 20;

/// A disk that was changed so that its next flush has tables and refcount blocks to bring into the file,
/// with exactly `left` bytes for them.
fn before_a_flush<'p>(place: &'p Place, small: &'p Small, base: &[u8], layout: (&str, bool), left: u64) -> Subject<'p> {
    let (options, flushed) = layout;
    let below = place.path("base.raw");
    place.qemu_img(&format!("create -q -f qcow2 -b {} -F raw -o {options} {IMAGE}", below.display()));
    let mut subject = Subject::new(place, small, base.to_vec());
    subject.log += &format!("{options}\n");
    if flushed {
        assert!(subject.write(0, &mut noise(1, 96 << 10)));
        assert!(subject.flush());
    }
    assert!(subject.write(256 << 10, &mut noise(2, 512 << 10)));
    // Zeroes over the base take tables and no data: nothing of what the flush writes has a page already.
    assert!(subject.zero(1 << 20, 3 << 20, true));
    for number in 0..12 {
        assert!(subject.zero((5 << 20) + number * (240 << 10), 64 << 10, true));
    }
    subject.fill(left);
    subject
}

/// Each write of a flush finds no space once: page by page less is left to it.
#[test]
fn metadata_finds_no_space_in_a_flush() {
    let place = Place::new();
    let Some(small) = Small::mount(&place, 8 << 20) else { return };
    let base = noise(0, BASE_SIZE as usize);
    std::fs::write(place.path("base.raw"), &base).unwrap();
    for layout in LAYOUTS {
        let mut failed = 0;
        loop {
            let mut subject = before_a_flush(&place, &small, &base, layout, failed * PAGE);
            let flushed = subject.flush();
            if !flushed {
                subject.survives();
                subject.compare();
                assert!(!subject.flush(), "there is as little space as before, and a flush succeeds");
                // Goes on, as far as it goes: the next flush has more to do.
                subject.write(300 << 10, &mut noise(7, 8 << 10));
                subject.write(3 << 20, &mut noise(8, 8 << 10));
                subject.zero(320 << 10, 64 << 10, true);
                subject.flush();
            }
            subject.survives();
            subject.recovers(failed);
            std::fs::remove_file(place.path(IMAGE)).unwrap();
            if flushed {
                break;
            }
            failed += 1;
        }
        assert!(failed > 0, "{layout:?}: no flush failed");
        eprintln!("{layout:?}: {failed} flushes failed");
    }
}

/// The same with the last flush of all. Then the image is left as it is: usable, perhaps with leaks.
#[test]
fn metadata_finds_no_space_in_a_close() {
    let place = Place::new();
    let Some(small) = Small::mount(&place, 8 << 20) else { return };
    let base = noise(0, BASE_SIZE as usize);
    std::fs::write(place.path("base.raw"), &base).unwrap();
    for layout in LAYOUTS {
        let mut failed = 0;
        loop {
            let subject = before_a_flush(&place, &small, &base, layout, failed * PAGE);
            let closed = subject.disk.close();
            if let Err(error) = &closed {
                assert!(is_full(error), "{error:?}");
            }
            subject.survives();
            let Subject { disk, now, .. } = subject;
            drop(disk);
            if closed.is_ok() {
                place.check(IMAGE, &now, &format!("{layout:?}"));
            }
            small.empty();
            // Whoever comes next can go on.
            let content = qemu_content(&place, IMAGE);
            let mut next = Subject::new(&place, &small, content);
            assert!(next.write(1 << 20, &mut noise(9, 64 << 10)), "{}", next.log);
            next.compare();
            next.disk.close().unwrap();
            let Subject { disk, now, .. } = next;
            drop(disk);
            assert_eq!(damage(&place, IMAGE).0, 0, "{layout:?}");
            assert!(qemu_content(&place, IMAGE) == now, "{layout:?}");
            std::fs::remove_file(place.path(IMAGE)).unwrap();
            if closed.is_ok() {
                break;
            }
            failed += 1;
        }
        assert!(failed > 0, "{layout:?}: no close failed");
        eprintln!("{layout:?}: {failed} closes failed");
    }
}

/// A disk that gets larger finds no space, in each of the steps that it takes over a longer base: it has the size
/// that its image has, nothing is lost, and with space it gets larger.
#[test]
fn growth_finds_no_space() {
    const BEFORE: usize = 2 << 20;
    const AFTER: usize = 16 << 20;
    let place = Place::new();
    let Some(small) = Small::mount(&place, 8 << 20) else { return };
    let base = noise(0, BASE_SIZE as usize);
    std::fs::write(place.path("base.raw"), &base).unwrap();
    let below = place.path("base.raw");
    for (options, _) in LAYOUTS {
        let (mut failed, mut between) = (0, 0);
        loop {
            place.qemu_img(&format!("create -q -f qcow2 -b {} -F raw -o {options} {IMAGE} 2M", below.display()));
            let mut subject = Subject::new(&place, &small, base[..BEFORE].to_vec());
            subject.log += &format!("{options}\n");
            assert!(subject.write(0, &mut noise(1, 96 << 10)));
            assert!(subject.flush());
            assert!(subject.write(256 << 10, &mut noise(2, 64 << 10)));
            subject.fill(failed * PAGE);
            let grown = subject.disk.grow(AFTER as u64);
            subject.log += &format!("grow: {grown:?}\n");
            let size = subject.disk.capacity() as usize;
            between += u64::from(size != BEFORE && size != AFTER);
            subject.now.resize(size, 0);
            subject.flushed.resize(size, 0);
            subject.compare();
            if let Err(error) = &grown {
                assert_eq!(error.kind(), ErrorKind::Storage, "{}", subject.log);
                // Still a disk: what has space is written, and the end is where it is said to be.
                assert!(subject.write(4096, &mut noise(3, 8 << 10)), "{}", subject.log);
                assert!(subject.disk.read(&[VolatileSlice::from(&mut [0; 512][..])], size as u64).is_err());
                subject.flush();
                subject.survives();
                assert_eq!(virtual_size(&place, IMAGE), size, "{}", subject.log);
                subject.empty();
                subject.disk.grow(AFTER as u64).unwrap_or_else(|error| panic!("{error}\n{}", subject.log));
            }
            assert_eq!(subject.disk.capacity() as usize, AFTER, "{}", subject.log);
            subject.now.resize(AFTER, 0);
            subject.flushed.resize(AFTER, 0);
            assert_eq!(virtual_size(&place, IMAGE), AFTER, "the size is not in the image\n{}", subject.log);
            subject.survives();
            subject.recovers(failed);
            std::fs::remove_file(place.path(IMAGE)).unwrap();
            if grown.is_ok() {
                break;
            }
            failed += 1;
        }
        assert!(failed > 0, "{options}: there was always space");
        eprintln!("{options}: {failed} times no space, {between} times in the middle");
    }
}

/// Commands that make images or change them say what happened and to which file, by the name that the operator gave
/// it; they leave nothing beside it, and an image that is as good as before.
#[test]
fn commands_say_that_there_is_no_space() {
    let place = Place::new();
    let Some(small) = Small::mount(&place, 4 << 20) else { return };
    let space = small.free();
    std::fs::write(place.path("source.raw"), noise(1, 512 << 10)).unwrap();
    for (command, changed, steps) in [
        ("create --format qcow2 small/new.qcow2 64M", "new.qcow2", 2),
        ("create --format qcow2 --preallocation full small/new.qcow2 1M", "new.qcow2", 3),
        ("convert --format raw --to-format qcow2 source.raw small/new.qcow2", "new.qcow2", 3),
        ("convert --format raw --to-format qcow2 --compress source.raw small/new.qcow2", "new.qcow2", 3),
        ("convert --format raw --to-format raw source.raw small/new.raw", "new.raw", 1),
        ("read --format raw --output small/new.raw source.raw", "new.raw", 1),
        ("snapshot create --format qcow2 small/top.qcow2 now", "top.qcow2", 2),
        ("resize --format qcow2 small/top.qcow2 2T", "top.qcow2", 1),
        ("commit --format qcow2 --base small/base.qcow2 --base-format qcow2 small/over.qcow2", "base.qcow2", 2),
    ] {
        place.qemu_img("create -q -f qcow2 small/top.qcow2 8M");
        place.qemu_img("create -q -f qcow2 small/base.qcow2 1M");
        place.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 small/over.qcow2 1M");
        let mut fill = Command::new("qemu-io");
        fill.args(["-f", "qcow2", "-c", "write -P 7 0 512k"]).arg(place.path("small/over.qcow2"));
        run(&mut fill).succeeded();
        let names = || {
            let mut names: Vec<_> =
                std::fs::read_dir(&small.at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        small.empty();
        let (before, free) = (names(), small.free());
        let mut failed = 0;
        // Page by page at first: that is where tables are written.
        for left in (0..).map(|step: u64| if step < 8 { step } else { 1 << (step - 5) }) {
            small.fill(left * PAGE);
            let mut program = blockhouse();
            program.args(command.split_whitespace()).current_dir(place.directory.path());
            let outcome = run(&mut program);
            if outcome.status.success() {
                break;
            }
            failed += 1;
            let stderr = &outcome.stderr;
            assert_eq!(outcome.status.code(), Some(1), "{command}, {left} pages left: {stderr}");
            assert!(stderr.to_lowercase().contains("no space left on"), "{command}, {left} pages left: {stderr}");
            assert!(stderr.contains(&format!("small/{changed}")), "{command}, {left} pages left: {stderr}");
            assert!(!stderr.contains(".partial"), "{command}, {left} pages left: {stderr}");
            assert_eq!(names(), before, "{command}, {left} pages left");
            small.empty();
            if changed.starts_with("new") {
                small.wait_for(free);
            }
            for image in ["top.qcow2", "base.qcow2", "over.qcow2"] {
                let (corruptions, leaks) = damage(&place, &format!("small/{image}"));
                assert_eq!(corruptions, 0, "{command}, {left} pages left: {image}");
                assert!(leaks == 0 || image == changed, "{command}, {left} pages left: {image}");
            }
        }
        eprintln!("{command}: {failed} times no space");
        assert!(failed >= steps, "{command}: only {failed} times no space");
        for name in names().iter().filter(|name| *name != "filler") {
            std::fs::remove_file(small.at.join(name)).unwrap();
        }
        small.empty();
        small.wait_for(space);
    }
}

/// The size of the disk as the file says it now.
pub(crate) fn virtual_size(place: &Place, name: &str) -> usize {
    let copy = place.path("size.qcow2");
    std::fs::copy(place.path(name), &copy).unwrap();
    let text = qemu_img(["info", "-f", "qcow2", "--output=json", copy.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    info["virtual-size"].as_u64().unwrap() as usize
}

fn qemu_content(place: &Place, name: &str) -> Vec<u8> {
    place.qemu_img(&format!("convert -f qcow2 -O raw {name} out.raw"));
    std::fs::read(place.path("out.raw")).unwrap()
}

/// The guest can help itself: what it discards makes room for what it writes.
#[test]
fn a_discard_makes_room_on_a_full_file_system() {
    let place = Place::new();
    let Some(small) = Small::mount(&place, 8 << 20) else { return };
    place.qemu_img(&format!("create -q -f qcow2 {IMAGE} 32M"));
    let mut subject = Subject::new(&place, &small, vec![0; 32 << 20]);
    let mut offset = 0;
    while subject.write(offset, &mut noise(offset, 256 << 10)) {
        assert!(subject.flush());
        offset += 256 << 10;
    }
    assert!(offset >= 4 << 20, "{}", subject.log);
    assert!(!subject.write(20 << 20, &mut noise(1, 1 << 20)), "{}", subject.log);
    assert!(subject.discard(0, 2 << 20));
    assert!(subject.flush(), "{}", subject.log);
    assert!(subject.write(20 << 20, &mut noise(1, 1 << 20)), "{}", subject.log);
    assert!(subject.flush(), "{}", subject.log);
    subject.survives();
    subject.recovers(1);
}

/// Space comes and goes at random between random operations.
#[test]
fn space_comes_and_goes() {
    let place = Place::new();
    let Some(small) = Small::mount(&place, 12 << 20) else { return };
    let size = 3 << 20;
    let content = noise(5, size);
    std::fs::write(place.path("full.raw"), &content).unwrap();
    place.qemu_img("convert -f raw -O qcow2 -c full.raw base.qcow2");
    let base = place.path("base.qcow2");
    let overlay = |options: &str| format!("create -q -f qcow2 -b {} -F qcow2 -o {options} {IMAGE}", base.display());
    let images = [
        (format!("create -q -f qcow2 -o cluster_size=512,refcount_bits=64 {IMAGE} 3M"), false),
        (overlay("cluster_size=1k,refcount_bits=64"), false),
        (overlay("cluster_size=16k,extended_l2=on"), false),
        (overlay("cluster_size=64k,lazy_refcounts=on"), false),
        (format!("convert -c -f raw -O qcow2 -o cluster_size=4k full.raw {IMAGE}"), false),
        (format!("convert -f raw -O qcow2 -o cluster_size=2k full.raw {IMAGE}"), true),
        (format!("convert -f raw -O qcow2 -o compat=0.10,cluster_size=4k full.raw {IMAGE}"), true),
    ];
    let seeds = std::env::var("WRITES_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let (mut refused, mut failed) = (0, 0);
    for seed in 0..seeds {
        for (how, snapshot) in &images {
            place.qemu_img(how);
            if *snapshot {
                place.qemu_img(&format!("snapshot -c before {IMAGE}"));
            }
            let model = qemu_content(&place, IMAGE);
            let mut subject = Subject::new(&place, &small, model);
            subject.log += &format!("{how}\nseed {seed}\n");
            let mut random = Random(seed);
            let mut full = false;
            for number in 0..80 {
                let first = random.below(size as u64 / SECTOR);
                let length = (1 + random.below(200)).min(size as u64 / SECTOR - first) * SECTOR;
                let offset = first * SECTOR;
                let kind = random.below(12);
                let done = match kind {
                    0..=4 => subject.write(offset, &mut noise(seed ^ number, length as usize)),
                    5 | 6 => subject.zero(offset, length, kind == 5),
                    7 | 8 => {
                        let done = subject.flush();
                        failed += u64::from(!done);
                        done
                    }
                    9 | 10 => {
                        subject.fill(random.below(12) * PAGE);
                        full = true;
                        continue;
                    }
                    _ => {
                        subject.empty();
                        full = false;
                        continue;
                    }
                };
                assert!(done || full, "there is space, and it failed\n{}", subject.log);
                refused += u64::from(!done);
                if !done && random.below(4) == 0 {
                    subject.survives();
                }
            }
            subject.compare();
            subject.recovers(seed);
            if *snapshot {
                place.qemu_img(&format!("convert -f qcow2 -l before -O raw {IMAGE} before.raw"));
                assert!(std::fs::read(place.path("before.raw")).unwrap() == content, "the snapshot was changed");
            }
            std::fs::remove_file(place.path(IMAGE)).unwrap();
        }
    }
    assert!(refused > 0 && failed > 0, "{refused} operations failed, {failed} of them flushes");
    assert!(qemu_img(["check", base.to_str().unwrap()]).contains("No errors"));
}
