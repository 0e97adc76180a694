//! Many queues on one disk: overlapping writes, writes against discards, flushes against everything.
//!
//! The named tests are failures that qcow2 in cloud-hypervisor had (their numbers there). The layer below the
//! disk (`support/growing.rs`) hands freed space out again at once, part of it as tables that it checks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use blockhouse_block::{Access, BlockBackend, Disk, DiskOptions, EXTENT_BYTES, Layer};
use support::growing::{CLUSTER, Growing};
use support::{Script, data, file, pattern, read, write};

const SECTOR: u64 = 512;
const QUEUES: u64 = 4;

/// Numbers that differ from seed to seed and are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn disk_over(top: Arc<Growing>, base: Option<&[u8]>, map_extents: usize) -> Disk {
    disk_ahead(top, base, map_extents, 0)
}

/// As `disk_over`, with space that is reserved ahead of writes.
fn disk_ahead(top: Arc<Growing>, base: Option<&[u8]>, map_extents: usize, clusters: u64) -> Disk {
    let mut layers: Vec<Arc<dyn Layer>> = vec![top];
    if let Some(bytes) = base {
        let size = bytes.len() as u64;
        layers.push(Arc::new(Script::honest(vec![data(size, 0)], 1).file(file(bytes, Access::ReadOnly).0)));
    }
    let options = DiskOptions {
        writable: true,
        extent_map_bytes: map_extents * EXTENT_BYTES,
        allocate_ahead_bytes: clusters * CLUSTER,
        ..DiskOptions::default()
    };
    Disk::new(layers, options).unwrap()
}

/// A sector that says where it belongs, who wrote it and when, in each of its words.
fn stamp(sector: u64, queue: u64, time: u64) -> Vec<u8> {
    let word = (sector << 40 | queue << 32 | (time + 1)).to_le_bytes();
    word.repeat((SECTOR / 8) as usize)
}

/// Each queue writes, zeroes and reads back sectors that are its own, in clusters that are everybody's.
fn run_queues(top: &Growing, disk: &Disk, initial: &[u8], steps: u64, flushes: bool) {
    let sectors = initial.len() as u64 / SECTOR;
    let expected = Mutex::new(initial.to_vec());
    let running = AtomicBool::new(true);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..QUEUES)
            .map(|queue| {
                let expected = &expected;
                scope.spawn(move || {
                    let mut random = Random(queue * 7919 + 1);
                    let mut mine = initial.to_vec();
                    for time in 0..steps {
                        let sector = random.below(sectors / QUEUES) * QUEUES + queue;
                        let range = (sector * SECTOR) as usize..((sector + 1) * SECTOR) as usize;
                        match random.below(8) {
                            0 => {
                                disk.write_zeroes(sector * SECTOR, SECTOR, time % 2 == 0).unwrap();
                                mine[range.clone()].fill(0);
                            }
                            1..5 => {
                                let bytes = stamp(sector, queue, time);
                                write(disk, sector * SECTOR, &bytes).unwrap();
                                mine[range.clone()].copy_from_slice(&bytes);
                            }
                            _ => {}
                        }
                        let found = read(disk, sector * SECTOR, SECTOR as usize).unwrap();
                        assert!(found == mine[range], "queue {queue} step {time}: sector {sector} lost its bytes");
                    }
                    let mut expected = expected.lock().unwrap();
                    for sector in (queue..sectors).step_by(QUEUES as usize) {
                        let range = (sector * SECTOR) as usize..((sector + 1) * SECTOR) as usize;
                        expected[range.clone()].copy_from_slice(&mine[range]);
                    }
                })
            })
            .collect();
        if flushes {
            let running = &running;
            scope.spawn(move || {
                while running.load(Ordering::SeqCst) {
                    disk.flush().unwrap();
                }
            });
        }
        let ended: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        running.store(false, Ordering::SeqCst);
        ended.into_iter().for_each(Result::unwrap);
    });
    let found = read(disk, 0, initial.len()).unwrap();
    assert!(found == *expected.lock().unwrap(), "the disk differs at the end");
    disk.close().unwrap();
    top.check_tables();
}

/// Two queues that allocate in one cluster must not lose each other's sectors.
#[test]
fn cloud_hypervisor_7660_queues_share_one_image() {
    for round in 0..10 {
        let top = Arc::new(Growing::new(64 * CLUSTER, HashMap::new()));
        let disk = disk_ahead(top.clone(), None, 1 + round * 3, round as u64 % 6);
        run_queues(&top, &disk, &vec![0; 64 * CLUSTER as usize], 300, true);
    }
}

/// The same over a base, whose bytes are copied by whoever allocates first; packed clusters as well.
#[test]
fn cloud_hypervisor_8621_queues_copy_from_a_base() {
    for round in 0..10 {
        let mut shown = pattern(64 * CLUSTER as usize, round);
        let base = shown.clone();
        let mut units = HashMap::new();
        for cluster in (0..64).step_by(5) {
            let bytes = pattern(CLUSTER as usize, 90 + cluster);
            shown[(cluster * CLUSTER) as usize..][..CLUSTER as usize].copy_from_slice(&bytes);
            units.insert(cluster, bytes);
        }
        let top = Arc::new(Growing::new(64 * CLUSTER, units));
        let disk = disk_ahead(top.clone(), Some(&base), 1 + round as usize * 5, round % 6);
        run_queues(&top, &disk, &shown, 300, round % 2 == 0);
    }
}

/// Writes, discards, zeroes and flushes of the same clusters, by everybody: whatever the order, a sector holds
/// what it held at first, zeroes, or one whole write *of that sector*.
fn storm(seed: u64, map_extents: usize) -> Arc<Growing> {
    const CLUSTERS: u64 = 40;
    let base = pattern((CLUSTERS * CLUSTER) as usize, seed);
    let top = Arc::new(Growing::new(CLUSTERS * CLUSTER, HashMap::new()));
    let disk = disk_ahead(top.clone(), Some(&base), map_extents, seed % 6);
    let per_cluster = CLUSTER / SECTOR;
    let check = |found: &[u8], first: u64| {
        for (at, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let sector = first + at as u64;
            let at_first = &base[(sector * SECTOR) as usize..][..SECTOR as usize];
            // A read may meet a write of its own sector halfway.
            let plausible = bytes.chunks(8).enumerate().all(|(word, found)| {
                let value = u64::from_le_bytes(found.try_into().unwrap());
                value == 0 || value >> 40 == sector || found == &at_first[word * 8..][..8]
            });
            assert!(plausible, "sector {sector} holds bytes that were never written to it: {:x?}", &bytes[..16]);
        }
    };
    thread::scope(|scope| {
        for queue in 0..QUEUES {
            let (disk, check) = (&disk, &check);
            scope.spawn(move || {
                let mut random = Random(seed * 31 + queue);
                for time in 0..400 {
                    let cluster = random.below(CLUSTERS);
                    let count = 1 + random.below((CLUSTERS - cluster).min(3));
                    let (offset, length) = (cluster * CLUSTER, count * CLUSTER);
                    match random.below(10) {
                        0 | 1 => disk.discard(offset, length).unwrap(),
                        2 => disk.write_zeroes(offset, length, true).unwrap(),
                        3 => disk.flush().unwrap(),
                        4..8 => {
                            let first = cluster * per_cluster + random.below(per_cluster);
                            let sectors = 1 + random.below(per_cluster.min(CLUSTERS * per_cluster - first));
                            let bytes: Vec<u8> =
                                (first..first + sectors).flat_map(|sector| stamp(sector, queue, time)).collect();
                            write(disk, first * SECTOR, &bytes).unwrap();
                        }
                        _ => check(&read(disk, offset, length as usize).unwrap(), cluster * per_cluster),
                    }
                }
            });
        }
    });
    check(&read(&disk, 0, base.len()).unwrap(), 0);
    disk.close().unwrap();
    top
}

/// The start of the image, and every other table, belongs to the format: no queue ever writes there.
#[test]
fn cloud_hypervisor_8358_the_header_is_not_overwritten() {
    for seed in 0..8 {
        storm(seed, 1000).check_tables();
    }
}

/// Freed clusters that become tables are not reached by writes that came from before, nor from stale extents:
/// with a map that remembers all of them and with one that remembers next to nothing.
#[test]
fn cloud_hypervisor_8606_freed_clusters_become_tables_and_stay_whole() {
    for seed in 100..108 {
        storm(seed, if seed % 2 == 0 { 100_000 } else { 1 }).check_tables();
    }
}

/// Space that a flush sets free is not reserved again before the hole in it has been made.
#[test]
fn cloud_hypervisor_8624_a_late_hole_does_not_reach_reused_space() {
    let mut top = Growing::new(16 * CLUSTER, HashMap::new());
    let (freed, wait) = mpsc::channel();
    let freed = Mutex::new(freed);
    let armed = Arc::new(AtomicBool::new(false));
    let flag = armed.clone();
    top.after_flush = Some(Box::new(move || {
        if flag.swap(false, Ordering::SeqCst) {
            freed.lock().unwrap().send(()).unwrap();
            // Time for the other queue to take the space, if nothing keeps it from that.
            thread::sleep(Duration::from_millis(200));
        }
    }));
    let top = Arc::new(top);
    let disk = disk_over(top.clone(), None, 1000);
    write(&disk, 0, &pattern(4 * CLUSTER as usize, 1)).unwrap();
    disk.flush().unwrap();
    disk.discard(0, 4 * CLUSTER).unwrap();
    armed.store(true, Ordering::SeqCst);
    let bytes = pattern(4 * CLUSTER as usize, 2);
    thread::scope(|scope| {
        scope.spawn(|| disk.flush().unwrap());
        let (disk, bytes) = (&disk, &bytes);
        scope.spawn(move || {
            wait.recv_timeout(Duration::from_secs(10)).unwrap();
            write(disk, 8 * CLUSTER, bytes).unwrap();
        });
    });
    let blocks = top.blocks();
    assert!(blocks >= 4 * CLUSTER / 512, "the test did not reuse the space: {blocks} blocks");
    assert!(read(&disk, 8 * CLUSTER, bytes.len()).unwrap() == bytes, "a hole was made in space that is used again");
    top.check_tables();
}

/// A request that knows where its first cluster is, and has to ask for its second, while another queue frees
/// the first and has it used again: its bytes neither go to the new owner nor come from it.
fn late_request(request: impl Fn(&Disk) + Sync) {
    let mut top = Growing::new(16 * CLUSTER, HashMap::new());
    let armed = Arc::new(AtomicBool::new(false));
    let (asked, was_asked) = mpsc::channel();
    let (reused, was_reused) = mpsc::channel();
    let (flag, ends) = (armed.clone(), Mutex::new((asked, was_reused)));
    top.before_locate = Some(Box::new(move || {
        if flag.swap(false, Ordering::SeqCst) {
            let ends = ends.lock().unwrap();
            ends.0.send(()).unwrap();
            // Until the space has a new owner; for as long as this request keeps that from happening.
            let _whether: Result<(), _> = ends.1.recv_timeout(Duration::from_millis(200));
        }
    }));
    let top = Arc::new(top);
    let disk = disk_over(top.clone(), None, 1000);
    write(&disk, 0, &pattern(2 * CLUSTER as usize, 1)).unwrap();
    read(&disk, 0, 16 * CLUSTER as usize).unwrap();
    disk.invalidate(CLUSTER, CLUSTER);
    armed.store(true, Ordering::SeqCst);
    let bytes = pattern(CLUSTER as usize, 2);
    thread::scope(|scope| {
        let (disk, bytes) = (&disk, &bytes);
        scope.spawn(|| request(disk));
        scope.spawn(move || {
            was_asked.recv_timeout(Duration::from_secs(10)).unwrap();
            disk.discard(0, CLUSTER).unwrap();
            disk.flush().unwrap();
            write(disk, 8 * CLUSTER, bytes).unwrap();
            // The request may have ended long ago.
            reused.send(()).ok();
        });
    });
    assert!(read(&disk, 8 * CLUSTER, bytes.len()).unwrap() == bytes, "a late write reached space that is used again");
    assert_eq!(top.bytes().len() as u64, 3 * CLUSTER, "the test did not reuse the space");
    top.check_tables();
}

#[test]
fn cloud_hypervisor_8606_a_late_write_does_not_reach_freed_space() {
    late_request(|disk| write(disk, 0, &[9; 2 * CLUSTER as usize]).unwrap());
}

#[test]
fn cloud_hypervisor_8606_a_late_read_shows_nobody_elses_bytes() {
    late_request(|disk| {
        let found = read(disk, 0, 2 * CLUSTER as usize).unwrap();
        assert!(found == pattern(2 * CLUSTER as usize, 1), "a late read shows bytes of another cluster");
    });
}
