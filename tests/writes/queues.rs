//! Several queues on one real image: overlapping writes, writes against zeroes and discards of the same
//! clusters, flushes and reads against everything.
//!
//! ```text
//!   round:  queue 0 ── 8 requests at a time ──▶ lane ─┐
//!           queue 1 ─────────────────────────▶ lane ─┼─▶ disk ─▶ component, files
//!           ...                                       │
//!           all have ended ◀──────────────────────────┘
//!           every sector holds what one of the requests of this round left in it; if there was none, what it did
//! ```
//!
//! Requests that are in flight together have no order, so that is all that can be promised, and less would be
//! somebody else's data. A read among them may see a sector half written, as from any file. `WRITES_ROUNDS=N`
//! makes it longer.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use blockhouse_sandbox::block::{BlockBackend, Disk, DiskOptions, Lane, LaneRequest, Operation, Result, VolatileSlice};

use crate::{Place, Random, SECTOR, read};

const QUEUES: u64 = 4;
/// Requests of a queue at a time.
const DEPTH: u64 = 8;
/// Clusters of the part of the disk that they all want.
const CLUSTERS: u64 = 24;
/// Between two looks of QEMU at the image.
const ROUNDS: u64 = 40;

/// Bytes of a word: what memory is read and written by at the least.
const WORD: usize = 8;

/// Each word of a sector says where it belongs and which request wrote it.
fn stamp(sector: u64, request: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    bytes.chunks_exact_mut(WORD).for_each(|word| word.copy_from_slice(&(sector << 40 | request).to_le_bytes()));
    bytes
}

/// What a request left in its sectors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    /// The stamps of this request.
    Stamps(u64),
    Zeroes,
    /// Zeroes, or what was there.
    Discarded,
}

/// A lane, with the memory of its requests, which outlives them.
struct Queue {
    lane: Box<dyn Lane>,
    buffers: HashMap<u64, Vec<u8>>,
}

impl Queue {
    fn start(&mut self, token: u64, operation: Operation, offset: u64, mut bytes: Vec<u8>) {
        // As guests do: more than one buffer.
        let slices: Vec<_> = bytes.chunks_mut(7000).map(VolatileSlice::from).collect();
        // SAFETY: the memory stays in `buffers`, which is dropped after the lane.
        unsafe { self.lane.start(&LaneRequest { token, operation, offset, buffers: &slices }) };
        self.buffers.insert(token, bytes);
    }

    /// Waits for everything. Returns the bytes of each request.
    fn drain(&mut self) -> HashMap<u64, Vec<u8>> {
        self.lane.submit();
        loop {
            self.lane.complete(&mut |token, result: Result<()>| {
                result.unwrap_or_else(|error| panic!("request {token} failed: {error}"));
            });
            if self.lane.in_flight() == 0 {
                return std::mem::take(&mut self.buffers);
            }
            let ready = self.lane.ready();
            let mut polled: Vec<_> = ready
                .iter()
                .flatten()
                .map(|ready| rustix::event::PollFd::from_borrowed_fd(ready.as_fd(), rustix::event::PollFlags::IN))
                .collect();
            let limit = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
            assert!(rustix::event::poll(&mut polled, Some(&limit)).unwrap() > 0, "no request ends");
            drop(polled);
            self.lane.acknowledge();
        }
    }
}

/// One round of one queue: what its requests left in which sectors, and what its reads saw.
type Round = (Vec<(u64, u64, Left)>, Vec<(u64, Vec<u8>)>);

fn round(queue: &mut Queue, (number, time): (u64, u64), sectors: u64, cluster: u64, random: &mut Random) -> Round {
    let (mut left, mut reads) = (Vec::new(), Vec::new());
    for step in 0..DEPTH {
        let request = number << 32 | (time * DEPTH + step + 1);
        let first = random.below(sectors);
        let count = 1 + random.below((2 * cluster / SECTOR).min(sectors - first));
        let of_cluster = cluster / SECTOR;
        let whole = (first / of_cluster * of_cluster, of_cluster.min(sectors - first / of_cluster * of_cluster));
        match random.below(10) {
            0..=4 => {
                let bytes = (first..first + count).flat_map(|sector| stamp(sector, request)).collect();
                queue.start(request, Operation::Write, first * SECTOR, bytes);
                left.push((first, count, Left::Stamps(request)));
            }
            5 => {
                let operation = Operation::WriteZeroes { length: count * SECTOR, may_unmap: random.below(2) == 0 };
                queue.start(request, operation, first * SECTOR, Vec::new());
                left.push((first, count, Left::Zeroes));
            }
            6 | 7 => {
                let (first, count) = whole;
                queue.start(request, Operation::Discard { length: count * SECTOR }, first * SECTOR, Vec::new());
                left.push((first, count, Left::Discarded));
            }
            8 => queue.start(request, Operation::Flush, 0, Vec::new()),
            _ => {
                queue.start(request, Operation::Read, first * SECTOR, vec![0xee; (count * SECTOR) as usize]);
                reads.push((first, request));
            }
        }
    }
    let mut buffers = queue.drain();
    let reads = reads.into_iter().map(|(first, request)| (first, buffers.remove(&request).unwrap())).collect();
    (left, reads)
}

/// Whether a word of a sector may hold these bytes: `old` was there before the round.
fn allowed((sector, word): (u64, usize), now: &[u8], old: &[u8], rounds: &[Round], while_it_ran: bool) -> bool {
    let covering = || {
        let all = rounds.iter().flat_map(|(left, _)| left);
        all.filter(|(first, count, _)| (*first..first + count).contains(&sector)).map(|(_, _, left)| *left)
    };
    let keeps = while_it_ran || covering().all(|left| left == Left::Discarded);
    (keeps && now == old)
        || covering().any(|left| match left {
            Left::Stamps(request) => now == &stamp(sector, request)[word * WORD..][..now.len()],
            Left::Zeroes | Left::Discarded => now.iter().all(|byte| *byte == 0),
        })
}

/// The first sector that may not hold what it holds. `from` is the first sector of `now`, and `model` the whole
/// disk as it was before the round.
///
/// A read in flight together with a write may see half of one sector, since neither the page cache nor a buffer
/// that ends within a sector keeps it whole: there each word is looked at by itself.
fn wrong(from: u64, now: &[u8], model: &[u8], rounds: &[Round], while_it_ran: bool) -> Option<u64> {
    let unit = if while_it_ran { WORD } else { SECTOR as usize };
    let old = &model[(from * SECTOR) as usize..][..now.len()];
    now.chunks(unit).zip(old.chunks(unit)).enumerate().find_map(|(number, (now, old))| {
        let (sector, word) = (from + (number * unit) as u64 / SECTOR, number * unit % SECTOR as usize / WORD);
        (!allowed((sector, word), now, old, rounds, while_it_ran)).then_some(sector)
    })
}

fn storm(place: &Place, name: &str, cluster: u64, mut model: Vec<u8>, seed: u64) {
    let rounds = std::env::var("WRITES_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let hot = (CLUSTERS * cluster).min(model.len() as u64) / SECTOR;
    for part in 0..rounds {
        // In turns with and without space that is reserved ahead of writes.
        let allocate_ahead_bytes = (part % 2) * 16 * cluster;
        let options = DiskOptions { allocate_ahead_bytes, ..DiskOptions::default() };
        let disk = Arc::new(place.open_with(name, &place.opener, options));
        let queue = |_| Queue { lane: Arc::<Disk>::clone(&disk).lane().expect("a lane"), buffers: HashMap::new() };
        let mut queues: Vec<Queue> = (0..QUEUES).map(queue).collect();
        for time in 0..ROUNDS {
            let done: Vec<Round> = std::thread::scope(|scope| {
                let started = (0..).zip(&mut queues).map(|(number, queue)| {
                    let time = part * ROUNDS + time;
                    let mut random = Random(seed ^ number << 20 ^ time << 8);
                    scope.spawn(move || round(queue, (number, time), hot, cluster, &mut random))
                });
                let started: Vec<_> = started.collect();
                started.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let context = || format!("{name}, seed {seed}, part {part}, round {time}");
            for (first, bytes) in done.iter().flat_map(|(_, reads)| reads) {
                let wrong = wrong(*first, bytes, &model, &done, true);
                assert!(wrong.is_none(), "{}: sector {wrong:?} was read with bytes of nobody", context());
            }
            let now = read(&disk, 0, model.len());
            let wrong = wrong(0, &now, &model, &done, false);
            assert!(wrong.is_none(), "{}: sector {wrong:?} holds what nobody wrote last", context());
            model = now;
        }
        drop(queues);
        disk.close().unwrap();
        drop(disk);
        place.check(name, &model, &format!("{name}, seed {seed}, part {part}"));
    }
}

fn image(options: &str, cluster: u64, below: bool, seed: u64) {
    let place = Place::new();
    let size = CLUSTERS * cluster + 3 * SECTOR;
    let base: Vec<u8> = (0..size / SECTOR * 3 / 4).flat_map(|sector| stamp(sector, 0)).collect();
    std::fs::write(place.path("base.raw"), &base).unwrap();
    place.qemu_img("convert -c -f raw -O qcow2 base.raw base.qcow2");
    let before = std::fs::read(place.path("base.qcow2")).unwrap();
    let mut model = vec![0; size as usize];
    let mut over = "";
    if below {
        over = "-b base.qcow2 -F qcow2";
        model[..base.len()].copy_from_slice(&base);
    }
    place.qemu_img(&format!("create -q -f qcow2 -o {options} {over} top.qcow2 {size}"));
    storm(&place, "top.qcow2", cluster, model, seed);
    assert!(std::fs::read(place.path("base.qcow2")).unwrap() == before, "the base was changed");
}

#[test]
fn queues_overlap_on_an_overlay() {
    image("cluster_size=64k", 64 << 10, true, 1);
}

#[test]
fn queues_overlap_on_small_clusters() {
    image("cluster_size=512,refcount_bits=1", 512, true, 2);
}

#[test]
fn queues_overlap_on_extended_l2_entries() {
    image("cluster_size=16k,extended_l2=on", 16 << 10, true, 3);
}

#[test]
fn queues_overlap_on_an_external_data_file() {
    image("cluster_size=16k,data_file=d.bin", 16 << 10, false, 4);
}

#[test]
fn queues_overlap_on_a_compressed_image_with_a_snapshot() {
    let place = Place::new();
    let cluster: u64 = 8 << 10;
    let model: Vec<u8> = (0..CLUSTERS * cluster / SECTOR).flat_map(|sector| stamp(sector, 0)).collect();
    std::fs::write(place.path("full.raw"), &model).unwrap();
    place.qemu_img("convert -c -f raw -O qcow2 -o cluster_size=8k full.raw top.qcow2");
    place.qemu_img("snapshot -c before top.qcow2");
    storm(&place, "top.qcow2", cluster, model.clone(), 5);
    place.qemu_img("convert -f qcow2 -l before -O raw top.qcow2 before.raw");
    assert!(std::fs::read(place.path("before.raw")).unwrap() == model, "the snapshot was changed");
}
