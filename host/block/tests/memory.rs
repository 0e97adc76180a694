//! How much memory a request takes depends on neither its size nor how finely an image cuts its range: requests over
//! many extents are made in a process that counts what is allocated.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

#[path = "support/ready.rs"]
mod ready;
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, ErrorKind, Extent, LaneRequest, Located, Operation, Result,
};
use ready::wait_for;
use support::{Script, data, file, pattern, read, unallocated, writable, zero};
use vm_memory::VolatileSlice;

/// The system's allocator, which remembers the largest sum of what is allocated, per thread: each test runs on a
/// thread of its own.
struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all work is done by the system's allocator; counting allocates nothing.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.get().wrapping_add(layout.size());
        NOW.set(now);
        // What was allocated on another thread and freed here makes the sum negative.
        if isize::try_from(now).is_ok() {
            PEAK.set(PEAK.get().max(now));
        }
        // SAFETY: the promise of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.set(NOW.get().wrapping_sub(layout.size()));
        // SAFETY: the promise of the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` allocates at most, beyond what is allocated already.
fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.get();
    PEAK.set(before);
    let result = run();
    (result, PEAK.get().saturating_sub(before))
}

/// What is at a sector of the disk.
type At = fn(u64) -> Extent;

const SECTOR: u64 = 512;
const SECTORS: u64 = 16 << 10;
const SIZE: usize = (SECTORS * SECTOR) as usize;

/// Much less than what a list of all extents takes, and much more than anything else.
const LITTLE: usize = 256 << 10;

/// Where a sector of the disk is in the file: no two that follow each other do there.
fn place(sector: u64) -> u64 {
    (sector ^ 1) * SECTOR
}

/// A disk of which every sector is an extent of its own, all of them known.
fn fragmented(bytes: &[u8], extent: At) -> (Arc<Disk>, std::fs::File) {
    let (image, outside) = file(bytes, Access::ReadWrite);
    let layer = Script::new(SIZE as u64, move |offset, length, max_extents| {
        let sectors = offset / SECTOR..(offset + length).div_ceil(SECTOR);
        let extents = sectors.clone().take(max_extents as usize).map(extent).collect();
        Ok(Located { start: sectors.start * SECTOR, extents })
    });
    let options = DiskOptions { writable: true, ..DiskOptions::default() };
    let disk = Disk::new(vec![Arc::new(layer.file(image).overwritable())], options).unwrap();
    read(&disk, 0, SIZE).unwrap();
    assert_eq!(disk.map_stats().extents, SECTORS);
    (Arc::new(disk), outside)
}

/// What the disk holds if each sector is in its place in the file.
fn content(bytes: &[u8]) -> Vec<u8> {
    (0..SECTORS).flat_map(|sector| bytes[place(sector) as usize..][..SECTOR as usize].iter().copied()).collect()
}

/// The threads of the pool do what the ring has no room for; what the lane keeps of it is little.
#[test]
#[allow(unsafe_code)]
fn a_lane_plans_no_more_than_the_ring_has_room_for() {
    let bytes = pattern(SIZE, 1);
    let (scattered, zeroes) = (content(&bytes), vec![0; SIZE]);
    let of_data = |sector| writable(SECTOR, place(sector));
    let of_nothing = |sector: u64| if sector.is_multiple_of(2) { zero(SECTOR) } else { unallocated(SECTOR) };
    let cases: [(At, Operation, &[u8]); 3] = [
        (of_data, Operation::Read, &scattered),
        (of_data, Operation::Write, &scattered),
        (of_nothing, Operation::Read, &zeroes),
    ];
    for (extent, operation, expected) in cases {
        let (disk, _outside) = fragmented(&bytes, extent);
        let mut memory = if operation == Operation::Write { expected.to_vec() } else { vec![7; SIZE] };
        let mut lane = disk.clone().lane().unwrap();
        let buffers = [VolatileSlice::from(&mut memory[..])];
        let request = LaneRequest { token: 1, operation, offset: 0, buffers: &buffers };
        // SAFETY: the lane ends before the memory does.
        let ((), most) = peak(|| unsafe { lane.start(&request) });
        assert!(most < LITTLE, "{operation:?}: {most} bytes");
        lane.submit();
        let mut ended: Vec<Result<()>> = Vec::new();
        while lane.in_flight() > 0 {
            wait_for(&mut *lane);
            lane.complete(&mut |_, result| ended.push(result));
        }
        assert!(matches!(ended[..], [Ok(())]), "{ended:?}");
        drop(lane);
        assert!(read(&disk, 0, SIZE).unwrap() == expected && memory == expected, "{operation:?}");
    }
}

/// Writes and zeroes in place, of more extents than are listed at a time.
#[test]
fn changes_in_place_list_few_extents() {
    let before = pattern(SIZE, 1);
    let (disk, outside) = fragmented(&before, |sector| writable(SECTOR, place(sector)));
    let mut after = pattern(SIZE, 2);
    let expected = content(&after);
    let (written, most) = peak(|| disk.write(&[VolatileSlice::from(&mut after[..])], 0));
    written.unwrap();
    assert!(most < LITTLE, "a write: {most} bytes");
    let mut bytes = vec![0; SIZE];
    outside.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected, "each sector is in its place");

    let (zeroed, most) = peak(|| disk.write_zeroes(0, SIZE as u64, false));
    zeroed.unwrap();
    assert!(most < LITTLE, "zeroes: {most} bytes");
    outside.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == vec![0; SIZE]);
}

/// Also where what cannot be changed comes after all that was listed.
#[test]
fn what_cannot_be_changed_in_place_changes_nothing() {
    let before = pattern(SIZE, 1);
    let last_is_fixed = |sector| if sector == SECTORS - 1 { data } else { writable }(SECTOR, place(sector));
    let (disk, outside) = fragmented(&before, last_is_fixed);
    let mut bytes = pattern(SIZE, 2);
    let written = disk.write(&[VolatileSlice::from(&mut bytes[..])], 0).unwrap_err();
    let zeroed = disk.write_zeroes(0, SIZE as u64, true).unwrap_err();
    for error in [written, zeroed] {
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(&format!("{}", SIZE as u64 - SECTOR)), "{error}");
    }
    outside.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == before);
}
