//! Direct I/O: writes that begin and end anywhere, from memory that begins anywhere, beside each other.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

mod support;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Engine, HeaderGuard, ImageFile, LaneRequest, Operation, Validity,
};
use support::{Script, does_not_wait, pattern, read, skip, writable};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

/// Next to the test program, and where the kernel says nothing about alignment: in memory.
const PLACES: [&str; 2] = [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"];

/// A file for direct I/O, or `None` where that cannot be: the calling test is skipped there.
fn direct(place: &str, bytes: &[u8]) -> Option<(ImageFile, TempDir)> {
    let directory = tempfile::tempdir_in(place).unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    match File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path) {
        Ok(file) => Some((ImageFile::new(file, Access::ReadWrite, "direct").unwrap(), directory)),
        Err(error) => {
            skip(format_args!("the file system of {place} has no direct I/O: {error}"));
            None
        }
    }
}

fn block_of(image: &ImageFile) -> usize {
    image.direct_alignment().unwrap() as usize
}

fn disk_over(image: ImageFile, size: u64) -> Arc<Disk> {
    let layer = Script::honest(vec![writable(size, 0)], 1).file(image).overwritable();
    let options = DiskOptions { writable: true, ..DiskOptions::default() };
    Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap())
}

/// Bytes in memory that begins `skip` bytes after a page does.
struct Memory {
    space: Vec<u8>,
    from: usize,
    length: usize,
}

impl Memory {
    fn new(bytes: &[u8], skip: usize) -> Self {
        let mut space = vec![0; bytes.len() + skip + 4096];
        let from = space.as_ptr().align_offset(4096) + skip;
        space[from..from + bytes.len()].copy_from_slice(bytes);
        Self { space, from, length: bytes.len() }
    }

    fn slice(&mut self) -> VolatileSlice<'_> {
        VolatileSlice::from(&mut self.space[self.from..self.from + self.length])
    }
}

#[test]
fn what_is_not_aligned_arrives_and_nothing_else_changes() {
    PLACES.into_iter().for_each(writes_of_all_kinds);
}

fn writes_of_all_kinds(place: &str) {
    let size = 4 << 20;
    let mut model = pattern(size, 1);
    let Some((image, directory)) = direct(place, &model) else { return };
    let block = block_of(&image);
    let cases = [
        (0, block),
        (block, 1),
        (block - 1, 2),
        (3 * block + 100, 100),
        (5 * block, 2 * block),
        (5 * block + 7, 2 * block),
        (9 * block + 7, 3 * block - 7),
        // More than goes through a buffer at a time, and just as much.
        (100, (5 << 20) / 2),
        (block, 2 << 20),
        // The end: the file must not get longer.
        (size - block, block),
        (size - 1, 1),
    ];
    for (step, (offset, length)) in cases.into_iter().enumerate() {
        for skip in [0, 8, 513] {
            let bytes = pattern(length, (step * 10 + skip) as u64);
            model[offset..offset + length].copy_from_slice(&bytes);
            image.write(&[Memory::new(&bytes, skip).slice()], offset as u64).unwrap();
            let mut found = Memory::new(&vec![0; length], skip);
            image.read(&[found.slice()], offset as u64).unwrap();
            assert!(found.space[found.from..][..length] == bytes, "{length} bytes at {offset}, {skip} into a page");
            let all = std::fs::read(directory.path().join("image")).unwrap();
            assert_eq!(all.len(), size, "{length} bytes at {offset}, {skip} into a page");
            assert!(all == model, "{length} bytes at {offset}, {skip} into a page");
        }
    }
    let mut last = Memory::new(&[1; 2], 1);
    let error = image.write(&[last.slice()], i64::MAX as u64 - 2).unwrap_err();
    assert!(error.message().contains("largest file offset"), "{error}");
}

/// Finding out what the kernel asks for must not write: the size of a raw file is that of its disk.
#[test]
fn small_files_are_left_as_they_are() {
    for (place, size) in PLACES.into_iter().flat_map(|place| [0, 512, 1536].map(|size| (place, size))) {
        let Some((image, directory)) = direct(place, &pattern(size, 1)) else { continue };
        assert!(block_of(&image) <= 4096);
        drop(image);
        let content = std::fs::read(directory.path().join("image")).unwrap();
        assert!(content == pattern(size, 1), "a file of {size} bytes has {} now", content.len());
    }
}

/// A page of memory that is not there until it is filled: who touches it waits (userfaultfd(2)).
struct HeldPage {
    page: *mut libc::c_void,
    faults: File,
}

// SAFETY: it is an address that is used as guest memory is, and a file.
#[allow(unsafe_code)]
unsafe impl Sync for HeldPage {}

#[allow(unsafe_code)]
impl HeldPage {
    const SIZE: usize = 4096;

    /// `None` where there is no such thing: the calling test is skipped.
    fn here() -> Option<Self> {
        let said = |error: &io::Error| skip(format_args!("memory that others wait for cannot be had here: {error}"));
        Self::new().inspect_err(said).ok()
    }

    fn new() -> io::Result<Self> {
        // Flags: UFFD_USER_MODE_ONLY of linux/userfaultfd.h, for which no privilege is needed.
        // SAFETY: it makes a descriptor and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, and is nobody else's.
        let faults = unsafe { File::from_raw_fd(i32::try_from(fd).unwrap()) };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory, at an address that the kernel chooses.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), Self::SIZE, protection, flags, -1, 0) };
        assert!(page != libc::MAP_FAILED);
        let held = Self { page, faults };
        // UFFDIO_API, then UFFDIO_REGISTER for missing pages.
        held.control(0xc018_aa3f, &mut [0xaa, 0, 0])?;
        held.control(0xc020_aa00, &mut [page.addr() as u64, Self::SIZE as u64, 1, 0])?;
        Ok(held)
    }

    fn control(&self, request: libc::c_ulong, words: &mut [u64]) -> io::Result<()> {
        // SAFETY: each caller passes as many words as the structure of its request has.
        let result = unsafe { libc::ioctl(self.faults.as_raw_fd(), request, words.as_mut_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Its first bytes, which nobody has seen yet.
    fn slice(&self, length: usize) -> VolatileSlice<'_> {
        assert!(length <= Self::SIZE);
        // SAFETY: the memory is there as long as `self`; what it holds may change, as that of a guest.
        unsafe { VolatileSlice::new(self.page.cast(), length) }
    }

    /// Waits until somebody waits for it.
    fn wait(&self) {
        // A `struct uffd_msg`, of which there is one kind only.
        (&self.faults).read_exact(&mut [0; 32]).unwrap();
    }

    /// Lets who waits go on, with these bytes.
    fn fill(&self, bytes: &[u8]) {
        let mut source = Memory::new(&[0; Self::SIZE], 0);
        source.space[source.from..][..bytes.len()].copy_from_slice(bytes);
        let address = source.space[source.from..].as_ptr().addr() as u64;
        // UFFDIO_COPY.
        self.control(0xc028_aa03, &mut [self.page.addr() as u64, address, Self::SIZE as u64, 0, 0]).unwrap();
    }
}

#[allow(unsafe_code)]
impl Drop for HeldPage {
    fn drop(&mut self) {
        // SAFETY: it was mapped in `new`, and no slice of it is left.
        unsafe { libc::munmap(self.page, Self::SIZE) };
    }
}

/// A write on a lane of its own, from memory that the kernel takes as it is.
#[allow(unsafe_code)]
fn lane_write(disk: &Arc<Disk>, offset: u64, bytes: &[u8]) {
    let mut memory = Memory::new(bytes, 0);
    let mut lane = disk.clone().lane().unwrap();
    let request = LaneRequest { token: 1, operation: Operation::Write, offset, buffers: &[memory.slice()] };
    // SAFETY: the memory is there until the request has ended.
    unsafe { lane.start(&request) };
    lane.submit();
    let mut ended = None;
    while ended.is_none() {
        lane.complete(&mut |_, result| ended = Some(result));
        thread::yield_now();
    }
    ended.unwrap().unwrap();
}

/// Has `other` happen while a write of a part of the fourth block waits between reading the block and writing
/// it. Whatever comes first, the bytes that the write does not name are those that `other` left there.
fn beside_a_part_of_a_block(other: impl Fn(&Arc<Disk>, u64, &[u8]) + Sync, expected: impl Fn(&[u8]) -> Vec<u8>) {
    PLACES.into_iter().for_each(|place| beside_a_part_in(place, &other, &expected));
}

fn beside_a_part_in(
    place: &str,
    other: &(impl Fn(&Arc<Disk>, u64, &[u8]) + Sync),
    expected: &impl Fn(&[u8]) -> Vec<u8>,
) {
    let size = 1 << 20;
    let Some((image, _directory)) = direct(place, &pattern(size, 1)) else { return };
    let Some(page) = HeldPage::here() else { return };
    let block = block_of(&image);
    let disk = disk_over(image, size as u64);
    // Everything is known from here on, so that lanes need nobody.
    read(&disk, 0, size).unwrap();
    let (offset, part) = (3 * block, 100..200);
    let bytes = pattern(block, 2);
    let (sender, ended) = mpsc::channel();
    thread::scope(|scope| {
        let (disk, page, part, bytes) = (&disk, &page, &part, &bytes);
        scope.spawn(move || disk.write(&[page.slice(part.len())], (offset + part.start) as u64).unwrap());
        page.wait();
        scope.spawn(move || {
            other(disk, offset as u64, bytes);
            // The first write may have been let go on by now.
            sender.send(()).ok();
        });
        // For as long as the first write keeps it from ending.
        let _whether: Result<(), _> = ended.recv_timeout(Duration::from_millis(200));
        page.fill(&pattern(part.len(), 3));
    });
    let found = read(&disk, offset as u64, block).unwrap();
    let expected = expected(&bytes);
    for (at, byte) in found.iter().enumerate().filter(|(at, _)| !part.contains(at)) {
        assert_eq!(*byte, expected[at], "byte {at} of the block was lost");
    }
    let written = &found[part.clone()];
    assert!(written == pattern(part.len(), 3) || *written == expected[part], "the part is neither");
    assert!(read(&disk, 0, offset).unwrap() == pattern(size, 1)[..offset]);
}

#[test]
fn a_whole_block_of_a_lane_is_not_lost_beside_a_part_of_it() {
    beside_a_part_of_a_block(lane_write, <[u8]>::to_vec);
}

#[test]
fn a_whole_block_is_not_lost_beside_a_part_of_it() {
    let write = |disk: &Arc<Disk>, offset, bytes: &[u8]| {
        disk.write(&[Memory::new(bytes, 0).slice()], offset).unwrap();
    };
    beside_a_part_of_a_block(write, <[u8]>::to_vec);
}

#[test]
fn a_part_of_a_block_is_not_lost_beside_another() {
    let at = 300;
    let write = |disk: &Arc<Disk>, offset, bytes: &[u8]| {
        disk.write(&[Memory::new(&bytes[at..at + 50], 1).slice()], offset + at as u64).unwrap();
    };
    beside_a_part_of_a_block(write, |bytes| {
        let mut block = pattern(1 << 20, 1)[3 * bytes.len()..4 * bytes.len()].to_vec();
        block[at..at + 50].copy_from_slice(&bytes[at..at + 50]);
        block
    });
}

#[test]
fn zeroes_are_not_lost_beside_a_part_of_a_block() {
    for may_unmap in [true, false] {
        let zero = |disk: &Arc<Disk>, offset, bytes: &[u8]| {
            disk.write_zeroes(offset, bytes.len() as u64, may_unmap).unwrap();
        };
        beside_a_part_of_a_block(zero, |bytes| vec![0; bytes.len()]);
    }
}

/// The same for a hole in the file, which a disk makes where it knows of nobody who writes.
#[test]
fn a_hole_is_not_lost_beside_a_part_of_a_block() {
    let Some((image, _directory)) = direct(PLACES[0], &pattern(1 << 20, 1)) else { return };
    let Some(page) = HeldPage::here() else { return };
    let block = block_of(&image);
    let (sender, ended) = mpsc::channel();
    let holes = thread::scope(|scope| {
        let (image, page) = (&image, &page);
        scope.spawn(move || image.write(&[page.slice(10)], 1).unwrap());
        page.wait();
        let hole = scope.spawn(move || {
            let made = image.punch_hole(0, block as u64).unwrap();
            sender.send(()).ok();
            made
        });
        let _whether: Result<(), _> = ended.recv_timeout(Duration::from_millis(200));
        page.fill(&[9; 10]);
        hole.join().unwrap()
    });
    let mut found = vec![1; block];
    image.read(&[VolatileSlice::from(&mut found[..])], 0).unwrap();
    let rest = [&found[..1], &found[11..]].concat();
    assert!(!holes || rest.iter().all(|byte| *byte == 0), "what was in the hole came back");
}

/// A read that waits, having read, while the file is revoked.
#[test]
fn what_was_read_before_a_file_was_revoked_is_refused_afterwards() {
    PLACES.into_iter().for_each(revoked_in_a_read);
}

fn revoked_in_a_read(place: &str) {
    let Some((image, _directory)) = direct(place, &pattern(8192, 1)) else { return };
    let Some(page) = HeldPage::here() else { return };
    let validity = Arc::new(Validity::new());
    let image = image.with_validity(Arc::clone(&validity));
    let result = thread::scope(|scope| {
        let (image, page) = (&image, &page);
        let reader = scope.spawn(move || image.read(&[page.slice(100)], 1));
        page.wait();
        validity.revoke("it changed");
        page.fill(&[]);
        reader.join().unwrap()
    });
    assert_eq!(result.unwrap_err().message(), "the file cannot be used any more: it changed");
}

/// A guarded sector that is a part of a block, beside which the same lane writes: whoever writes the block again waits
/// until that has ended, so it is not the thread that says so.
#[test]
fn a_guarded_part_of_a_block_is_not_waited_for_by_who_is_waited_for() {
    PLACES.into_iter().for_each(a_guarded_part_in);
}

#[allow(unsafe_code)]
fn a_guarded_part_in(place: &str) {
    let size = 64 << 10;
    let Some((image, _directory)) = direct(place, &pattern(size, 1)) else { return };
    let block = block_of(&image);
    let disk = disk_over(image, size as u64);
    read(&disk, 0, size).unwrap();
    let mut lane = Arc::new(HeaderGuard::new(disk.clone(), "direct").unwrap()).lane().unwrap();
    does_not_wait("a part of a block that it writes beside is written", move || {
        let (whole, part) = (pattern(block, 2), pattern(256, 3));
        let mut memory = [Memory::new(&whole, 0), Memory::new(&part, 0)];
        for (token, (offset, memory)) in (0..).zip([block as u64, 0].into_iter().zip(&mut memory)) {
            let request = LaneRequest { token, operation: Operation::Write, offset, buffers: &[memory.slice()] };
            // SAFETY: the memory is there until both requests have ended.
            unsafe { lane.start(&request) };
            lane.submit();
        }
        while lane.in_flight() > 0 {
            lane.complete(&mut |_, result| result.unwrap());
            thread::yield_now();
        }
    });
    let mut model = pattern(size, 1);
    model[..256].copy_from_slice(&pattern(256, 3));
    model[block..2 * block].copy_from_slice(&pattern(block, 2));
    assert!(read(&disk, 0, size).unwrap() == model);
}

/// Everybody writes quarters of blocks that are their own, on lanes and without.
#[test]
fn quarters_of_blocks_belong_to_their_writers() {
    PLACES.into_iter().for_each(writers_of_quarters);
}

fn writers_of_quarters(place: &str) {
    const WRITERS: usize = 4;
    let size = 256 << 10;
    let Some((image, _directory)) = direct(place, &pattern(size, 1)) else { return };
    let quarter = block_of(&image) / WRITERS;
    let disk = disk_over(image, size as u64);
    read(&disk, 0, size).unwrap();
    let blocks = size / quarter / WRITERS;
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let disk = &disk;
            scope.spawn(move || {
                for step in 0..400 {
                    let offset = ((step * 7 + step / 13) % blocks * WRITERS + writer) * quarter;
                    let bytes = pattern(quarter, (writer * 1000 + step) as u64);
                    if step % 2 == 0 {
                        lane_write(disk, offset as u64, &bytes);
                    } else {
                        disk.write(&[Memory::new(&bytes, step % 5).slice()], offset as u64).unwrap();
                    }
                    assert!(read(disk, offset as u64, quarter).unwrap() == bytes, "writer {writer} step {step}");
                }
            });
        }
    });
}

/// Without io_uring all of it is done by threads.
#[test]
fn threads_write_what_is_not_aligned_as_well() {
    let Some((image, _directory)) = direct(PLACES[0], &pattern(1 << 20, 1)) else { return };
    let layer = Script::honest(vec![writable(1 << 20, 0)], 1).file(image).overwritable();
    let options = DiskOptions { writable: true, engine: Engine::Threads, ..DiskOptions::default() };
    let disk = Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap());
    lane_write(&disk, 513, &pattern(5000, 2));
    let mut model = pattern(1 << 20, 1);
    model[513..5513].copy_from_slice(&pattern(5000, 2));
    assert!(read(&disk, 0, 1 << 20).unwrap() == model);
}
