//! The guard of raw disks: whatever is written, in which order and in which pieces, the disk never looks like
//! an image, and what does not make it look like one is written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/ready.rs"]
mod ready;
mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Error, ErrorKind, HeaderGuard, Lane, LaneRequest, Operation, Pool,
    PoolLane, Result, Topology,
};
use proptest::prelude::*;
use ready::wait_for;
use support::growing::{CLUSTER, Growing};
use support::{Script, does_not_wait, file, pattern, read, writable};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

const SIZE: usize = 8 << 10;
const LAST: u64 = SIZE as u64 - 512;

/// Bytes in memory.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    requests: AtomicUsize,
    /// Called once, at the end of the next read.
    after_read: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), requests: AtomicUsize::new(0), after_read: Mutex::default() })
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn range(&self, offset: u64, length: usize) -> Result<std::ops::Range<usize>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let start = usize::try_from(offset).unwrap();
        let end = start.checked_add(length).filter(|end| *end <= self.bytes.lock().unwrap().len());
        end.map(|end| start..end).ok_or_else(|| Error::new(ErrorKind::Invalid, "past the end"))
    }
}

impl BlockBackend for Memory {
    fn capacity(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn topology(&self) -> Topology {
        Topology { physical_block_size: 512, optimal_io_size: 4096 }
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let mut range = self.range(offset, buffers.iter().map(VolatileSlice::len).sum())?;
        for buffer in buffers {
            let end = range.start + buffer.len();
            buffer.copy_from(&self.bytes.lock().unwrap()[range.start..end]);
            range.start = end;
        }
        let then = self.after_read.lock().unwrap().take();
        if let Some(then) = then {
            then();
        }
        Ok(())
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let mut range = self.range(offset, buffers.iter().map(VolatileSlice::len).sum())?;
        for buffer in buffers {
            let end = range.start + buffer.len();
            buffer.copy_to(&mut self.bytes.lock().unwrap()[range.start..end]);
            range.start = end;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> Result<()> {
        let range = self.range(offset, usize::try_from(length).unwrap())?;
        self.bytes.lock().unwrap()[range].fill(0);
        Ok(())
    }

    /// Every other byte becomes zero: a discard promises no more.
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let range = self.range(offset, usize::try_from(length).unwrap())?;
        self.bytes.lock().unwrap()[range].iter_mut().step_by(2).for_each(|byte| *byte = 0);
        Ok(())
    }

    fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
        Ok(Box::new(PoolLane::new(self, Pool::new())?))
    }
}

/// Starts and ends of disks that a prober takes for images: place, bytes.
fn headers() -> Vec<(u64, Vec<u8>)> {
    let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
    vdi.resize(64, 0);
    vdi.extend_from_slice(&0xbeda_107f_u32.to_le_bytes());
    let mut luks = b"LUKS\xba\xbe".to_vec();
    luks.extend_from_slice(&[0, 2]);
    vec![
        (0, b"QFI\xfb\0\0\0\x03".to_vec()),
        (0, b"QFI\xfb\0\0\0\x01".to_vec()),
        (0, b"QED\0".to_vec()),
        (0, b"OOOM\0\0\0\x02".to_vec()),
        (0, b"KDMV\x01\0\0\0".to_vec()),
        (0, b"COWD\x01\0\0\0".to_vec()),
        (0, 0xcafe_babe_u64.to_le_bytes().to_vec()),
        (0, b"# Disk DescriptorFile\nversion=1\n".to_vec()),
        (0, b"#disk descriptorFILE\n".to_vec()),
        (0, b"# anything\n  \n\r\n# at all\r\nversion=3\r\n".to_vec()),
        (0, b"version=1\n".to_vec()),
        (0, b"conectix\0\0\0\x02".to_vec()),
        (0, b"vhdxfile".to_vec()),
        (0, vdi),
        (0, b"WithoutFreeSpace\x02\0\0\0".to_vec()),
        (0, b"WithouFreSpacExt\x02\0\0\0".to_vec()),
        (0, luks),
        (0, b"Bochs Virtual HD Image\0".to_vec()),
        (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop".to_vec()),
        (LAST, b"conectix\0\0\0\x02".to_vec()),
        (LAST + 1, b"conectix\0\0\0\x02".to_vec()),
        (LAST, b"koly\0\0\0\x04".to_vec()),
    ]
}

fn holds(disk: &[u8], header: &(u64, Vec<u8>)) -> bool {
    disk[usize::try_from(header.0).unwrap()..].starts_with(&header.1)
}

fn is_image(disk: &[u8]) -> bool {
    // A header of the list, by what makes it one.
    headers().iter().any(|header| {
        let magic = match &header.1 {
            bytes if bytes.len() > 64 => return disk[64..68] == bytes[64..68],
            bytes if bytes.starts_with(b"#") || bytes.starts_with(b"version") => bytes.clone(),
            bytes if bytes.starts_with(b"LUKS") => bytes[..6].to_vec(),
            bytes if bytes[0] == 0xbe || bytes.starts_with(b"conectix") || bytes.starts_with(b"vhdx") => {
                bytes[..8].to_vec()
            }
            bytes if bytes.starts_with(b"With") => bytes[..16].to_vec(),
            bytes if bytes.starts_with(b"Bochs") => bytes[..22].to_vec(),
            bytes => bytes[..4].to_vec(),
        };
        holds(disk, &(header.0, magic))
    })
}

fn guarded(bytes: Vec<u8>) -> (Arc<Memory>, HeaderGuard) {
    let memory = Memory::new(bytes);
    let guard = HeaderGuard::new(memory.clone(), "/images/vm.raw").unwrap();
    (memory, guard)
}

fn write(disk: &dyn BlockBackend, bytes: &[u8], offset: u64) -> Result<()> {
    let mut bytes = bytes.to_vec();
    disk.write(&[VolatileSlice::from(&mut bytes[..])], offset)
}

#[test]
fn headers_are_refused_in_one_write_and_nothing_is_written() {
    for header in headers() {
        let (memory, guard) = guarded(vec![0x55; SIZE]);
        // By itself, in the middle of a whole sector, and in a request over the whole disk.
        let mut sector = vec![0x55; 512];
        let start = header.0 / 512 * 512;
        let at = usize::try_from(header.0 - start).unwrap();
        sector[at..at + header.1.len()].copy_from_slice(&header.1);
        let mut disk = vec![0x55; SIZE];
        disk[usize::try_from(start).unwrap()..][..512].copy_from_slice(&sector);
        for (bytes, offset) in [(&header.1, header.0), (&sector, start), (&disk, 0)] {
            let error = write(&guard, bytes, offset).expect_err(&String::from_utf8_lossy(&header.1));
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().starts_with("/images/vm.raw: refused: the sector at "), "{error}");
            assert!(memory.bytes() == vec![0x55; SIZE], "something was written");
        }
        assert_eq!(guard.refused(), 3);
    }
}

#[test]
fn headers_are_refused_byte_by_byte_from_the_front_and_from_the_back() {
    for header in headers() {
        for backwards in [false, true] {
            let (memory, guard) = guarded(vec![0x55; SIZE]);
            let mut order: Vec<usize> = (0..header.1.len()).collect();
            if backwards {
                order.reverse();
            }
            let refused =
                order.iter().filter(|at| write(&guard, &header.1[**at..**at + 1], header.0 + **at as u64).is_err());
            assert!(refused.count() > 0, "all of {:?} was written", String::from_utf8_lossy(&header.1));
            assert!(!holds(&memory.bytes(), &header));
        }
    }
}

#[test]
fn zeroes_and_discards_complete_no_header() {
    let mut bytes = vec![0x55; SIZE];
    bytes[..3].copy_from_slice(b"QED");
    let (memory, guard) = guarded(bytes);
    guard.write_zeroes(3, 1, true).unwrap_err();
    guard.write_zeroes(3, 1, false).unwrap_err();
    guard.discard(3, 4096).unwrap();
    assert!(!memory.bytes().starts_with(b"QED\0"));
    assert_eq!(memory.bytes()[512], 0, "the rest was not discarded");
    guard.write_zeroes(0, SIZE as u64, true).unwrap();
    assert!(memory.bytes().iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_no_header_is_written_as_it_is() {
    let (memory, guard) = guarded(vec![0; SIZE]);
    let mut model = vec![0; SIZE];
    let mut boot = vec![0x90; 512];
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    for (bytes, offset) in [
        (boot, 0),
        (b"# a comment\nand no version\n".to_vec(), 0),
        (b"QFJ\xfb".to_vec(), 0),
        (b"QFI\xfb".to_vec(), 512),
        (b"QFI\xfb".to_vec(), 1),
        (b"conectix".to_vec(), LAST - 512),
        (b"EFI PART".to_vec(), LAST),
        (vec![7; SIZE], 0),
        (vec![8; 1024], 256),
    ] {
        write(&guard, &bytes, offset).unwrap();
        let at = usize::try_from(offset).unwrap();
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        assert!(memory.bytes() == model);
    }
    let mut read = vec![0; SIZE];
    guard.read(&[VolatileSlice::from(&mut read[..])], 0).unwrap();
    assert!(read == model);
    assert_eq!(guard.refused(), 0);
}

/// Outside of the guarded sectors a request costs one request.
#[test]
fn the_rest_of_the_disk_costs_nothing() {
    let (memory, guard) = guarded(vec![0; SIZE]);
    let before = memory.requests.load(Ordering::Relaxed);
    write(&guard, &[1; 1024], 512).unwrap();
    write(&guard, &[1; 1024], LAST - 1024).unwrap();
    guard.write_zeroes(512, 512, false).unwrap();
    guard.discard(512, 512).unwrap();
    assert_eq!(memory.requests.load(Ordering::Relaxed) - before, 4);
}

#[test]
fn a_disk_that_is_an_image_already_is_refused() {
    for header in headers() {
        let mut bytes = vec![0x55; SIZE];
        bytes[usize::try_from(header.0).unwrap()..][..header.1.len()].copy_from_slice(&header.1);
        let error = HeaderGuard::new(Memory::new(bytes), "/images/vm.raw").unwrap_err();
        assert!(error.to_string().contains("already looks like an image"), "{error}");
    }
}

#[test]
fn small_disks_and_bad_ranges() {
    let (_, guard) = guarded(Vec::new());
    write(&guard, b"QFI\xfb", 0).unwrap_err();
    for header in headers().iter().map(|(_, bytes)| bytes) {
        let (memory, guard) = guarded(vec![0x55; 512]);
        write(&guard, header, 0).unwrap_err();
        assert!(memory.bytes() == vec![0x55; 512]);
    }
    let (memory, guard) = guarded(vec![0; SIZE]);
    for (offset, length) in [(SIZE as u64, 1), (LAST, 513), (u64::MAX, 2), (0, u64::MAX)] {
        guard.write_zeroes(offset, length, true).unwrap_err();
        guard.discard(offset, length).unwrap_err();
    }
    write(&guard, &[1; 513], LAST).unwrap_err();
    assert!(memory.bytes() == vec![0; SIZE]);
}

/// Two queues that each write one half of a header, the second one while the first half is being judged.
#[test]
fn queues_cannot_write_a_header_together() {
    let (memory, guard) = guarded(vec![0x55; SIZE]);
    let guard = Arc::new(guard);
    let (sender, second) = mpsc::channel();
    let (finished, waits) = mpsc::channel();
    let other = Arc::clone(&guard);
    *memory.after_read.lock().unwrap() = Some(Box::new(move || {
        std::thread::spawn(move || {
            sender.send(write(&*other, b"I\xfb", 2)).unwrap();
            finished.send(()).unwrap();
        });
        // It is held up until the first write has ended.
        assert!(waits.recv_timeout(Duration::from_millis(100)).is_err(), "two writes were judged at once");
    }));
    write(&*guard, b"QF", 0).unwrap();
    second.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
    assert!(memory.bytes().starts_with(b"QF\x55"));
}

/// A guest that changes its buffer once it was looked at: what was looked at is what is written.
#[test]
fn a_buffer_that_changes_is_no_way_around() {
    let (memory, guard) = guarded(vec![0x55; SIZE]);
    // The first place to change it is before the copy, where the change is seen.
    let buffer = Arc::new(MmapRegion::<()>::new(SIZE).unwrap());
    let guest = Arc::clone(&buffer);
    *memory.after_read.lock().unwrap() = Some(Box::new(move || guest.as_volatile_slice().copy_from(&b"QFI\xfb"[..])));
    guard.write(&[buffer.as_volatile_slice()], 0).unwrap_err();
    // Then between the copies of the first and the last sector: the first was copied.
    buffer.as_volatile_slice().copy_from(&b"good"[..]);
    let (guest, second) = (Arc::clone(&buffer), Arc::clone(&memory));
    *memory.after_read.lock().unwrap() = Some(Box::new(move || {
        *second.after_read.lock().unwrap() =
            Some(Box::new(move || guest.as_volatile_slice().copy_from(&b"QFI\xfb"[..])));
    }));
    guard.write(&[buffer.as_volatile_slice()], 0).unwrap();
    assert!(memory.bytes().starts_with(b"good"));
}

/// A lane is guarded as the disk is, whatever goes past it to the disk.
#[test]
#[allow(unsafe_code)]
fn lanes_are_guarded() {
    let (memory, guard) = guarded(vec![0x55; SIZE]);
    let mut lane = Arc::new(guard).lane().unwrap();
    let mut buffers: Vec<Vec<u8>> =
        vec![b"QFI\xfb".to_vec(), b"QF".to_vec(), vec![1; 512], b"QED".to_vec(), vec![7; 4]];
    let slices: Vec<[VolatileSlice<'_>; 1]> =
        buffers.iter_mut().map(|bytes| [VolatileSlice::from(&mut bytes[..])]).collect();
    let zeroes = Operation::WriteZeroes { length: 1, may_unmap: true };
    let requests = [
        (Operation::Write, 0, &slices[0][..]),
        (Operation::Write, 0, &slices[1]),
        (Operation::Write, 512, &slices[2]),
        (Operation::Write, 0, &slices[3]),
        (zeroes, 3, &[]),
        (Operation::Discard { length: 1024 }, 0, &[]),
        (Operation::Flush, 0, &[]),
        (Operation::Read, 0, &slices[4]),
    ];
    let mut outcomes = Vec::new();
    for (token, (operation, offset, buffers)) in (0..).zip(requests) {
        // SAFETY: the buffers live until the test has taken the outcome of each request.
        unsafe { lane.start(&LaneRequest { token, operation, offset, buffers }) };
        lane.submit();
        assert_eq!(lane.in_flight(), 1);
        // One at a time, so that there is one outcome.
        while lane.in_flight() > 0 {
            lane.acknowledge();
            lane.complete(&mut |token, result| outcomes.push((token, result.is_ok())));
        }
    }
    let expected = [false, true, true, true, false, true, true, true];
    assert_eq!(outcomes, (0..).zip(expected).collect::<Vec<_>>());
    drop(lane);
    let now = memory.bytes();
    assert!(now.starts_with(b"QED\x55\x55"));
    // Half of the second sector was discarded.
    assert_eq!(now[512..516], [0, 1, 0, 1]);
    assert_eq!(buffers[4], b"QED\x55");
}

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

/// Starts a request whose memory is given up, so that it is there for as long as anybody may need it.
#[allow(unsafe_code)]
fn start(lane: &mut dyn Lane, operation: Operation, offset: u64, bytes: &[u8]) {
    let bytes = bytes.to_vec().leak();
    // SAFETY: as said.
    unsafe { lane.start(&LaneRequest { token: 0, operation, offset, buffers: &[VolatileSlice::from(bytes)] }) };
}

/// Takes the outcomes of all that is in flight.
fn drain(lane: &mut dyn Lane) {
    lane.submit();
    loop {
        lane.complete(&mut |_, result| result.unwrap());
        if lane.in_flight() == 0 {
            break;
        }
        wait_for(lane);
    }
}

/// A change of a guarded sector while a request of the same lane is in the kernel, so that only its thread can end
/// what that holds: the change is for another thread to wait with.
#[test]
fn a_guarded_sector_is_not_waited_for_by_who_is_waited_for() {
    let zeroes = Operation::WriteZeroes { length: 512, may_unmap: false };
    for change in [zeroes, Operation::Discard { length: 4096 }] {
        for ends in [true, false] {
            let (image, _outside) = file(&vec![0x55; 1 << 16], Access::ReadWrite);
            let layer = Script::honest(vec![writable(1 << 16, 0)], 1).file(image).overwritable();
            let options = DiskOptions { writable: true, ..DiskOptions::default() };
            let disk = Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap());
            // From here on the lane needs nobody to find out where bytes are.
            read(&disk, 0, 1 << 16).unwrap();
            let mut lane = Arc::new(HeaderGuard::new(disk.clone(), "/images/vm.raw").unwrap()).lane().unwrap();
            does_not_wait("a sector that it reads beside is changed", move || {
                start(&mut *lane, Operation::Read, 8192, &[0; 4096]);
                lane.submit();
                start(&mut *lane, change, 0, &[]);
                assert_eq!(lane.in_flight(), 2);
                // Or it ends with both in flight.
                if ends {
                    drain(&mut *lane);
                }
            });
            assert!(change != zeroes || read(&disk, 0, 512).unwrap() == [0; 512]);
            assert_eq!(read(&disk, 4096, 1).unwrap(), [0x55]);
        }
    }
}

/// Somebody has the guarded sector, and what is around it, for as long as he likes.
#[test]
fn a_lane_waits_for_nobody_who_has_the_guarded_sector() {
    let (begin, begun) = mpsc::channel();
    let (go_on, wait) = mpsc::channel::<()>();
    let (begin, wait) = (Mutex::new(begin), Mutex::new(wait));
    let mut top = Growing::new(16 * CLUSTER, HashMap::new());
    top.twist = Some(Box::new(move |_| {
        // Once: nobody listens afterwards.
        if begin.lock().unwrap().send(()).is_ok() {
            wait.lock().unwrap().recv().unwrap();
        }
    }));
    let options = DiskOptions { writable: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::new(vec![Arc::new(top)], options).unwrap());
    let guard = Arc::new(HeaderGuard::new(disk.clone(), "/images/vm.raw").unwrap());
    let writer = disk.clone();
    let writer = std::thread::spawn(move || write(&*writer, &pattern(512, 1), 8 * CLUSTER).unwrap());
    begun.recv_timeout(LIMIT).unwrap();
    drop(begun);
    let mut lane = does_not_wait("somebody allocates", move || {
        let mut lane = guard.lane().unwrap();
        start(&mut *lane, Operation::Write, 0, &pattern(512, 2));
        start(&mut *lane, Operation::Write, 16 * CLUSTER - 1024, &pattern(1024, 3));
        start(&mut *lane, Operation::WriteZeroes { length: 8, may_unmap: true }, 0, &[]);
        start(&mut *lane, Operation::Discard { length: CLUSTER }, 0, &[]);
        start(&mut *lane, Operation::Read, 0, &[0; 512]);
        start(&mut *lane, Operation::Flush, 0, &[]);
        lane.submit();
        // Only of the flush nobody knows.
        lane.complete(&mut |_, result| result.unwrap());
        assert!(lane.in_flight() >= 5);
        lane
    });
    go_on.send(()).unwrap();
    writer.join().unwrap();
    does_not_wait("nobody allocates", move || drain(&mut *lane));
    assert_eq!(read(&disk, 8 * CLUSTER, 512).unwrap(), pattern(512, 1));
    assert_eq!(read(&disk, 16 * CLUSTER - 1024, 1024).unwrap(), pattern(1024, 3));
}

#[derive(Clone, Debug)]
enum Step {
    /// A part of a header, split into buffers, at its place.
    Part {
        header: usize,
        from: usize,
        length: usize,
        split: usize,
        around: usize,
    },
    Zero {
        at: usize,
        length: usize,
    },
    Discard {
        at: usize,
        length: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0usize..SIZE, 0usize..1500);
    prop_oneof![
        8 => (0usize..22, 0usize..40, 1usize..80, 0usize..9, 0usize..600)
            .prop_map(|(header, from, length, split, around)| Step::Part { header, from, length, split, around }),
        1 => range.clone().prop_map(|(at, length)| Step::Zero { at, length }),
        1 => range.prop_map(|(at, length)| Step::Discard { at, length }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Pieces of all headers in any order: a refused step changes nothing, another one does what it says, and
    /// the disk is never an image.
    #[test]
    fn no_sequence_makes_an_image(steps in proptest::collection::vec(step(), 1..60)) {
        let headers = headers();
        prop_assert_eq!(headers.len(), 22);
        let (memory, guard) = guarded(vec![0x20; SIZE]);
        for step in steps {
            let before = memory.bytes();
            let mut after = before.clone();
            let result = match step {
                Step::Part { header, from, length, split, around } => {
                    let (at, bytes) = &headers[header];
                    let from = from.min(bytes.len() - 1);
                    let to = (from + length).min(bytes.len());
                    let at = usize::try_from(*at).unwrap();
                    // The request reaches further, and writes there what is there.
                    let start = (at + from).saturating_sub(around);
                    let end = (at + to + around).min(SIZE);
                    after[at + from..at + to].copy_from_slice(&bytes[from..to]);
                    let mut request = after[start..end].to_vec();
                    let (low, high) = request.split_at_mut(split.min(end - start));
                    guard.write(&[VolatileSlice::from(low), VolatileSlice::from(high)], start as u64)
                }
                Step::Zero { at, length } => {
                    let length = length.min(SIZE - at);
                    after[at..at + length].fill(0);
                    guard.write_zeroes(at as u64, length as u64, true)
                }
                Step::Discard { at, length } => {
                    let length = length.min(SIZE - at);
                    let result = guard.discard(at as u64, length as u64);
                    after = memory.bytes();
                    let kept = |at: usize| after[at] == before[at] || after[at] == 0;
                    prop_assert!((0..SIZE).all(kept));
                    result
                }
            };
            let now = memory.bytes();
            prop_assert!(!is_image(&now), "an image after {:?}", result);
            let expected = if result.is_ok() { after } else { before };
            prop_assert!(now == expected, "not what {:?} means", result);
        }
    }
}
