//! Memory and time do not depend on what an image claims: the largest tables, bombs, and the largest list of
//! snapshots are read in a process that counts what is allocated.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Format, Placement, Snapshots};
use blockhouse_qcow2::Qcow2;
use support::{Handmade, walk};

/// The system's allocator, which remembers the largest sum of what is allocated, per thread: each test
/// runs on a thread of its own.
struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all work is done by the system's allocator; counting allocates nothing.
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
    (result, PEAK.get() - before)
}

/// An L1 table of 32 MiB, which is the limit, with `entry` everywhere; 512 bytes short of 2 EiB.
fn largest_l1(entry: u64) -> Handmade {
    let mut image = Handmade::new(3, 21, 1);
    let entries = 4 << 20;
    image.be64(24, (1 << 61) - 512).be32(36, entries);
    image.bytes.resize(image.at(8) + (32 << 20), 0);
    let table = image.at(8);
    image.be64(40, table as u64);
    if entry != 0 {
        for chunk in image.bytes[table..].chunks_exact_mut(8) {
            chunk.copy_from_slice(&entry.to_be_bytes());
        }
    }
    image
}

#[test]
fn the_largest_l1_table_costs_a_few_pieces() {
    let image = largest_l1(0);
    let storage = Storage::new();
    storage.insert("/a.qcow2", image.bytes);
    let ((), most) = peak(|| {
        let mut disk = storage.disk::<Qcow2>("/a.qcow2").unwrap();
        let last = disk.info.virtual_size - 512;
        assert_eq!(disk.read(last, 512).unwrap(), [0; 512]);
    });
    assert!(most < 1 << 20, "{most} bytes");
    let (found, most) = peak(|| {
        let mut disk = storage.disk::<Qcow2>("/a.qcow2").unwrap();
        walk(&mut disk.format, (1 << 61) - 512, || 4096, usize::MAX)
    });
    assert!(most < 4 << 20, "{most} bytes");
    assert_eq!((found.end, found.errors), ((1 << 61) - 512, 0));
    assert!(found.calls <= 64, "{found:?}");
}

#[test]
fn a_full_l1_table_costs_bounded_work_per_call() {
    // Every entry means the same L2 table, which is empty: the walk is long, and each call is short.
    let image = largest_l1(4 << 21);
    let storage = Storage::new();
    storage.insert("/a.qcow2", image.bytes);
    let mut disk = storage.disk::<Qcow2>("/a.qcow2").unwrap();
    disk.format.locate(0, 512, 4096).unwrap();
    let (located, most) = peak(|| disk.format.locate(1 << 50, 1 << 60, 4096).unwrap());
    assert!(most < 4 << 20, "{most} bytes");
    let answered: u64 = located.extents.iter().map(|extent| extent.length).sum();
    // 8192 entries in a piece of 64 KiB, 16 pieces; two of the clusters in each table are data.
    assert!(answered <= 17 * 8192 * (2 << 20), "{answered}");
}

#[test]
fn of_tables_that_were_read_a_few_pieces_are_kept() {
    // One table of 2 MiB, in 32 pieces, each of which is about 16 GiB.
    let image = largest_l1(4 << 21);
    let storage = Storage::new();
    storage.insert("/a.qcow2", image.bytes);
    let mut disk = storage.disk::<Qcow2>("/a.qcow2").unwrap();
    let ((), most) = peak(|| {
        for piece in 0..32 {
            disk.format.locate(piece * (16 << 30), 1, 1).unwrap();
        }
    });
    assert!(most < 1 << 20, "{most} bytes");
}

/// Where no two clusters continue each other, the host asks once for each group of clusters, wherever it begins.
#[test]
fn answers_about_a_divided_table_meet() {
    const CLUSTER: u64 = 1 << 16;
    let mut image = Handmade::new(3, 16, 64);
    for number in 0..64 {
        let entry = if number % 2 == 0 { image.cluster(5) | 1 << 63 } else { 1 };
        image.l2(number, entry);
    }
    let mut disk = image.open().unwrap();
    for number in 0..64 {
        let located = disk.format.locate(number * CLUSTER + 512, 64 * CLUSTER, 8).unwrap();
        assert_eq!(located.start, number / 8 * 8 * CLUSTER, "cluster {number}");
        assert!(located.extents.len() == 8 && located.extents.iter().all(|extent| extent.length == CLUSTER));
    }
}

#[test]
fn the_longest_list_of_snapshots_is_bounded() {
    let list = |count: u32, id: u16, name: u16| {
        let mut image = Handmade::v3();
        let table = image.at(8);
        image.be32(60, count).be64(64, table as u64);
        let length = (40 + usize::from(id) + usize::from(name)).next_multiple_of(8);
        let mut entry = vec![b'n'; length];
        entry[..40].fill(0);
        entry[12..14].copy_from_slice(&id.to_be_bytes());
        entry[14..16].copy_from_slice(&name.to_be_bytes());
        for _ in 0..count {
            image.bytes.extend_from_slice(&entry);
        }
        let storage = Storage::new();
        storage.insert("/a.qcow2", image.bytes);
        peak(move || {
            let mut disk = storage.disk::<Qcow2>("/a.qcow2").unwrap();
            (disk.format.list_snapshots().map(|list| list.len()), disk.format.select_snapshot("x").unwrap_err())
        })
    };
    let ((listed, error), most) = list(65536, 5, 100);
    assert_eq!(listed.unwrap(), 65536);
    assert!(error.text().contains("and 65520 more") && error.text().len() < 4096, "{error}");
    assert!(most < 32 << 20, "{most} bytes");
    // 128 KiB of name each.
    let ((listed, _), most) = list(1000, u16::MAX, u16::MAX);
    assert!(listed.unwrap_err().text().contains("too large"));
    assert!(most < 40 << 20, "{most} bytes");
}

#[test]
fn a_zstd_bomb_is_stopped() {
    let mut image = Handmade::v3();
    image.be32(100, 112).be64(72, 1 << 3).be32(104, 1 << 24);
    // A window of 8 MiB, the largest that is allowed, and 1 GiB of zeroes in blocks of 128 KiB.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 13 << 3];
    for number in 0..8192u32 {
        let last = u32::from(number == 8191);
        frame.extend_from_slice(&(last | 1 << 1 | (128 << 10) << 3).to_le_bytes()[..3]);
        frame.push(0);
    }
    let at = image.at(8);
    image.bytes.extend_from_slice(&frame);
    image.l2(0, 1 << 62 | 70 << 54 | at as u64);
    let mut disk = image.open().unwrap();
    let located = disk.format.locate(0, 1, 1).unwrap();
    let Placement::Packed { token } = located.extents[0].placement else { panic!("{located:?}") };
    let (unpacked, most) = peak(|| disk.format.unpack(token, 65536));
    assert!(unpacked.unwrap_err().text().contains("more than a cluster"));
    assert!(most < 32 << 20, "{most} bytes");
}
