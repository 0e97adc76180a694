//! Lanes: many requests at a time, in the kernel and in the pool, against a byte model.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

#[path = "support/ready.rs"]
mod ready;
#[path = "support/refuse.rs"]
mod refuse;
mod support;

use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Engine, ErrorKind, FileIndex, ImageFile, LANE_REQUESTS, Lane, LaneRequest,
    Layer, Operation, Placement, Pool, PoolLane, Result, Rings, Validity,
};
use ready::wait_for;
use refuse::refuse_calls;
use support::growing::{CLUSTER, Growing};
use support::{Script, data, does_not_wait, file, pattern, read, skip, writable, zero};
use vm_memory::VolatileSlice;

const ENGINES: [Engine; 2] = [Engine::Auto, Engine::Threads];

/// A lane with the memory of its requests, so that the memory outlives them.
struct Client {
    lane: Box<dyn Lane>,
    buffers: HashMap<u64, Vec<u8>>,
    next: u64,
    ended: HashMap<u64, Result<()>>,
}

impl Client {
    fn new(disk: &Arc<Disk>) -> Self {
        Self { lane: disk.clone().lane().unwrap(), buffers: HashMap::new(), next: 0, ended: HashMap::new() }
    }

    /// Starts a request whose buffers are pieces of `bytes`.
    fn start(&mut self, operation: Operation, offset: u64, mut bytes: Vec<u8>, pieces: usize) -> u64 {
        let token = self.next;
        self.next += 1;
        let slices: Vec<_> = bytes.chunks_mut(pieces.max(1)).map(VolatileSlice::from).collect();
        // SAFETY: the memory stays in `buffers`, which is dropped after the lane.
        unsafe { self.lane.start(&LaneRequest { token, operation, offset, buffers: &slices }) };
        self.buffers.insert(token, bytes);
        token
    }

    /// Waits for all that is in flight, as a queue's thread does.
    fn drain(&mut self) {
        self.lane.submit();
        loop {
            let ended = &mut self.ended;
            self.lane.complete(&mut |token, result| assert!(ended.insert(token, result).is_none(), "it ended twice"));
            if self.lane.in_flight() == 0 {
                break;
            }
            self.wait();
        }
    }

    /// Waits until the lane says that there is something to do.
    fn wait(&mut self) {
        wait_for(&mut *self.lane);
    }

    /// One request, from its start to its end.
    fn once(&mut self, operation: Operation, offset: u64, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let token = self.start(operation, offset, bytes, 5000);
        self.drain();
        let bytes = self.buffers.remove(&token).unwrap();
        self.ended.remove(&token).expect("it did not end").map(|()| bytes)
    }
}

fn raw(bytes: &[u8], engine: Engine) -> (Arc<Disk>, std::fs::File) {
    let (image, outside) = file(bytes, Access::ReadWrite);
    let size = bytes.len() as u64;
    let layer = Script::honest(vec![writable(size, 0)], 1).file(image).overwritable();
    let options = DiskOptions { writable: true, engine, ..DiskOptions::default() };
    (Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap()), outside)
}

/// The files that are open in this process as often as a disk and its lanes have `outside` open.
fn opened(outside: &std::fs::File) -> usize {
    use std::os::unix::fs::MetadataExt;
    let of = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let wanted = of(outside.metadata().unwrap());
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.filter(|entry| {
        entry.as_ref().is_ok_and(|entry| std::fs::metadata(entry.path()).is_ok_and(|it| of(it) == wanted))
    })
    .count()
}

fn uses_ring(client: &Client) -> bool {
    format!("{:?}", client.lane).contains("io_uring: true")
}

/// Whether this kernel has rings, for this user. If not, says so.
fn rings_are_here() -> bool {
    let made = io_uring::IoUring::new(1);
    if let Err(error) = &made {
        skip(format_args!("there is no io_uring here: {error}"));
    }
    made.is_ok()
}

/// Rings that were made beforehand are used one after the other, by any thread, and are empty in between.
#[test]
fn lanes_take_rings_that_are_there_and_give_them_back() {
    if !rings_are_here() {
        return;
    }
    let rings = Rings::make(2);
    assert_eq!(rings.left(), 2);
    let bytes = pattern(1 << 20, 1);
    for round in 0..3 {
        let (disk, outside) = raw(&bytes, Engine::Auto);
        let disk = Arc::new(Arc::into_inner(disk).unwrap().with_rings(rings.clone()));
        let mut clients = [Client::new(&disk), Client::new(&disk)];
        assert_eq!(rings.left(), 0);
        // One more makes its own, if it may; there are no more than there were for that.
        let third = Client::new(&disk);
        assert!(uses_ring(&third) && rings.left() == 0);
        drop(third);
        thread::scope(|scope| {
            for client in &mut clients {
                scope.spawn(|| {
                    assert!(uses_ring(client));
                    for number in 0..64u64 {
                        let read = client.once(Operation::Read, number * 4096, vec![0; 4096]).unwrap();
                        assert!(read == bytes[number as usize * 4096..][..4096], "round {round}");
                    }
                });
            }
        });
        drop(clients);
        assert_eq!(rings.left(), 2);
        // And they have no file any more, which would be open for as long as they are: the disk has the last ones.
        drop(disk);
        assert_eq!(opened(&outside), 1);
        let lock = rustix::fs::fcntl_lock(&outside, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        assert!(lock.is_ok(), "{lock:?}");
    }
    // Where none is wanted, there is none.
    let (disk, _outside) = raw(&bytes, Engine::Threads);
    let disk = Arc::new(Arc::into_inner(disk).unwrap().with_rings(rings.clone()));
    assert!(!uses_ring(&Client::new(&disk)) && rings.left() == 2);
}

#[test]
fn a_full_lane_reads_and_writes_in_place() {
    // Writes that the lane's thread makes, and writes that are too long for it.
    full_lane(4096);
    full_lane(66_048);
}

fn full_lane(piece: usize) {
    for engine in ENGINES {
        let size = LANE_REQUESTS * piece;
        let (disk, _outside) = raw(&pattern(size, 1), engine);
        let mut client = Client::new(&disk);
        // This kernel has it; one that has not is served by the pool, which the other engine shows.
        assert_eq!(uses_ring(&client), engine == Engine::Auto && io_uring::IoUring::new(1).is_ok());
        // Once to learn where everything is, and twice over the map.
        for round in 0..3u64 {
            for number in 0..LANE_REQUESTS {
                client.start(
                    Operation::Write,
                    (number * piece) as u64,
                    pattern(piece, round * 1000 + number as u64),
                    700,
                );
            }
            assert_eq!(client.lane.in_flight(), LANE_REQUESTS);
            client.drain();
            assert!(client.ended.drain().all(|(_, result)| result.is_ok()));
            let tokens: Vec<_> = (0..LANE_REQUESTS)
                .map(|number| client.start(Operation::Read, (number * piece) as u64, vec![0; piece], 1500))
                .collect();
            client.drain();
            for (number, token) in tokens.into_iter().enumerate() {
                client.ended.remove(&token).unwrap().unwrap();
                assert_eq!(client.buffers[&token], pattern(piece, round * 1000 + number as u64), "{engine:?} {number}");
            }
            client.buffers.clear();
        }
        client.once(Operation::Flush, 0, Vec::new()).unwrap();
    }
}

#[test]
fn one_request_over_many_extents_zeroes_and_the_end_of_a_file() {
    for engine in ENGINES {
        let bytes = pattern(40_000, 1);
        // The file ends in the middle of the last extent: past it, zeroes.
        let (image, outside) = file(&bytes, Access::ReadOnly);
        let extents = vec![data(512, 1024), zero(512), data(1024, 8192), zero(4096), data(20_480, 30_208)];
        let layer = Script::honest(extents, 1).file(image);
        let options = DiskOptions { engine, ..DiskOptions::default() };
        let disk = Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap());
        let size = disk.capacity() as usize;
        let expected = read(&disk, 0, size).unwrap();
        assert_eq!(expected[..512], bytes[1024..1536]);
        assert_eq!(expected[size - 512..], [0; 512]);
        let mut client = Client::new(&disk);
        for _ in 0..2 {
            assert!(client.once(Operation::Read, 0, vec![7; size]).unwrap() == expected, "{engine:?}");
            assert!(client.once(Operation::Read, 300, vec![7; 3000]).unwrap() == expected[300..3300], "{engine:?}");
            // Zeroes alone need nobody.
            assert_eq!(client.once(Operation::Read, 2048, vec![7; 512]).unwrap(), [0; 512]);
        }
        // A file that became shorter while it is open is zero from there on.
        outside.set_len(8192).unwrap();
        let now = client.once(Operation::Read, 0, vec![7; size]).unwrap();
        assert!(now == read(&disk, 0, size).unwrap());
        assert_eq!(now[1024..2048], [0; 1024]);
    }
}

/// Whoever looks an extent up, it is counted once.
#[test]
fn look_ups_are_counted() {
    for engine in ENGINES {
        let (disk, _outside) = raw(&pattern(8192, 1), engine);
        let mut client = Client::new(&disk);
        client.once(Operation::Read, 0, vec![0; 512]).unwrap();
        let before = disk.map_stats();
        for _ in 0..3 {
            client.once(Operation::Read, 512, vec![0; 512]).unwrap();
        }
        let now = disk.map_stats();
        assert_eq!((now.hits - before.hits, now.misses), (3, before.misses), "{engine:?}");
    }
}

#[test]
fn refusals_are_those_of_the_disk() {
    for engine in ENGINES {
        let (disk, _outside) = raw(&pattern(8192, 1), engine);
        let mut client = Client::new(&disk);
        for (operation, offset, length) in
            [(Operation::Read, 8192, 512), (Operation::Write, 7680, 1024), (Operation::Read, u64::MAX, 512)]
        {
            let error = client.once(operation, offset, vec![0; length]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{operation:?} {offset}");
        }
        let (image, _outside) = file(&pattern(8192, 1), Access::ReadOnly);
        let layer = Script::honest(vec![data(8192, 0)], 1).file(image);
        let options = DiskOptions { engine, ..DiskOptions::default() };
        let read_only = Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap());
        let mut client = Client::new(&read_only);
        assert_eq!(client.once(Operation::Write, 0, vec![0; 512]).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(client.once(Operation::Read, 0, vec![0; 512]).unwrap(), pattern(8192, 1)[..512]);
        let mut client = Client::new(&disk);
        client.once(Operation::Read, 0, vec![0; 512]).unwrap();
        disk.close().unwrap();
        for operation in [Operation::Read, Operation::Write] {
            let error = client.once(operation, 0, vec![0; 512]).unwrap_err();
            assert!(error.message().contains("was closed"), "{error}");
        }
    }
}

/// A file that is revoked while the kernel reads it: what was read is not used, and the reason is given.
#[test]
fn what_the_kernel_read_of_a_revoked_file_is_refused() {
    if !rings_are_here() {
        return;
    }
    let bytes = pattern(16_384, 1);
    let watched = |validity: &Arc<Validity>| file(&bytes, Access::ReadOnly).0.with_validity(Arc::clone(validity));
    // In one part, and in two, of which the file of the second stays valid.
    for parts in [1, 2] {
        let validities = [Arc::new(Validity::new()), Arc::new(Validity::new())];
        let mut second = data(8192, 8192);
        if let (2, Placement::Data { file, .. }) = (parts, &mut second.placement) {
            *file = FileIndex(1);
        }
        let mut layer = Script::honest(vec![data(8192, 0), second], 2);
        for validity in &validities {
            layer = layer.file(watched(validity));
        }
        let disk = Arc::new(Disk::new(vec![Arc::new(layer)], DiskOptions::default()).unwrap());
        let mut client = Client::new(&disk);
        assert_eq!(client.once(Operation::Read, 0, vec![0; 16_384]).unwrap(), bytes);
        assert!(uses_ring(&client));
        let token = client.start(Operation::Read, 0, vec![0; 16_384], 5000);
        client.lane.submit();
        // The kernel has read, and nobody has looked yet.
        let ring = client.lane.ready()[1].unwrap();
        let mut polled = [rustix::event::PollFd::from_borrowed_fd(ring, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut polled, Some(&rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 })), Ok(1));
        validities[0].revoke("it changed");
        client.drain();
        let error = client.ended.remove(&token).unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Storage);
        assert_eq!(error.message(), "the file cannot be used any more: it changed");
    }
}

#[test]
fn direct_io_takes_what_is_aligned_and_what_is_not() {
    // Not every file system of a test machine has it: a directory next to the test program is tried.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image");
    let mut model = pattern(1 << 20, 1);
    std::fs::write(&path, &model).unwrap();
    let direct = std::fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
    let Ok(direct) = direct else {
        return skip("the file system of the target directory has no direct I/O");
    };
    let image = ImageFile::new(direct, Access::ReadWrite, "direct").unwrap();
    let layer = Script::honest(vec![writable(1 << 20, 0)], 1).file(image).overwritable();
    let options = DiskOptions { writable: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap());
    let mut client = Client::new(&disk);
    for (step, (offset, length)) in
        [(0, 4096), (4096, 8192), (512, 512), (1000, 3000), (65_536, 300_000), (1_048_064, 512)].into_iter().enumerate()
    {
        for _ in 0..2 {
            let bytes = pattern(length, 100 + step as u64);
            model[offset..offset + length].copy_from_slice(&bytes);
            client.once(Operation::Write, offset as u64, bytes).unwrap();
            let found = client.once(Operation::Read, offset as u64, vec![0; length]).unwrap();
            assert!(found == model[offset..offset + length], "{length} bytes at {offset}");
        }
    }
    assert!(client.once(Operation::Read, 0, vec![0; 1 << 20]).unwrap() == model);
}

#[test]
fn a_lane_that_is_dropped_waits_for_its_requests() {
    let (begun, wait_for_begin) = mpsc::channel();
    let finished = Arc::new(AtomicUsize::new(0));
    let counter = finished.clone();
    let mut top = Growing::new(16 * CLUSTER, HashMap::new());
    let begun = Mutex::new(begun);
    top.before_locate = Some(Box::new(move || {
        begun.lock().unwrap().send(()).unwrap();
        thread::sleep(Duration::from_millis(100));
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    let disk = Disk::new(vec![Arc::new(top)], DiskOptions { writable: true, ..DiskOptions::default() }).unwrap();
    let disk = Arc::new(disk);
    let mut client = Client::new(&disk);
    client.start(Operation::Write, 0, pattern(4096, 1), 4096);
    client.lane.submit();
    wait_for_begin.recv_timeout(Duration::from_secs(20)).unwrap();
    drop(client);
    assert!(finished.load(Ordering::SeqCst) >= 1);
    assert_eq!(read(&disk, 0, 4096).unwrap(), pattern(4096, 1));
}

/// Writes that are large enough to be the kernel's.
#[test]
fn a_lane_that_is_dropped_waits_for_the_kernel() {
    let (disk, _outside) = raw(&pattern(4 << 20, 1), Engine::Auto);
    read(&disk, 0, 4 << 20).unwrap();
    let mut client = Client::new(&disk);
    for number in 0..32 {
        let written = pattern(128 << 10, number + 2);
        client.start(Operation::Write, number * (128 << 10), written, 4096);
    }
    does_not_wait("the kernel has requests", move || drop(client));
    for number in 0..32 {
        let written = read(&disk, number * (128 << 10), 128 << 10).unwrap();
        assert!(written == pattern(128 << 10, number + 2), "the lane ended before its requests");
    }
    does_not_wait("nothing is in flight", move || disk.write_zeroes(0, 4 << 20, false)).unwrap();
}

/// Lanes and threads that write, zero, discard and read the same clusters: a sector is always a whole one.
#[test]
fn lanes_share_a_disk_that_grows() {
    const CLUSTERS: u64 = 32;
    for (seed, engine) in [(1u64, Engine::Auto), (2, Engine::Threads), (3, Engine::Auto)] {
        let base = pattern((CLUSTERS * CLUSTER) as usize, seed);
        let below = Script::honest(vec![data(CLUSTERS * CLUSTER, 0)], 1).file(file(&base, Access::ReadOnly).0);
        let top = Arc::new(Growing::new(CLUSTERS * CLUSTER, HashMap::new()));
        let options = DiskOptions {
            writable: true,
            engine,
            allocate_ahead_bytes: (seed % 2) * 4 * CLUSTER,
            ..DiskOptions::default()
        };
        let layers: Vec<Arc<dyn Layer>> = vec![top.clone(), Arc::new(below)];
        let disk = Arc::new(Disk::new(layers, options).unwrap());
        thread::scope(|scope| {
            for queue in 0..3u64 {
                let disk = &disk;
                scope.spawn(move || {
                    // Each queue has every third cluster to itself, so that it knows what is there.
                    let mut model: HashMap<u64, Vec<u8>> = HashMap::new();
                    let mut client = Client::new(disk);
                    let mut random = seed * 7919 + queue;
                    for step in 0..200u64 {
                        let mut tokens = Vec::new();
                        let mut touched = Vec::new();
                        for _ in 0..8 {
                            random =
                                random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                            let cluster = ((random >> 33) % (CLUSTERS / 3)) * 3 + queue;
                            if touched.contains(&cluster) {
                                continue;
                            }
                            touched.push(cluster);
                            let offset = cluster * CLUSTER;
                            let initial = || base_cluster(seed, cluster, CLUSTERS);
                            match random >> 60 {
                                0..=6 => {
                                    let bytes = pattern(CLUSTER as usize / 2, random % 10_000);
                                    let at = (random >> 40) % 4 * 512;
                                    let shown = model.entry(cluster).or_insert_with(initial);
                                    shown[at as usize..][..bytes.len()].copy_from_slice(&bytes);
                                    tokens.push((client.start(Operation::Write, offset + at, bytes, 900), None));
                                }
                                7..=8 => {
                                    model.insert(cluster, vec![0; CLUSTER as usize]);
                                    let may_unmap = random & 1 == 0;
                                    let zeroes = Operation::WriteZeroes { length: CLUSTER, may_unmap };
                                    tokens.push((client.start(zeroes, offset, Vec::new(), 1), None));
                                }
                                9 => {
                                    model.insert(cluster, vec![0; CLUSTER as usize]);
                                    let discard = Operation::Discard { length: CLUSTER };
                                    tokens.push((client.start(discard, offset, Vec::new(), 1), None));
                                }
                                10 => tokens.push((client.start(Operation::Flush, 0, Vec::new(), 1), None)),
                                _ => {
                                    let expected = model.get(&cluster).cloned().unwrap_or_else(initial);
                                    let read = client.start(Operation::Read, offset, vec![1; CLUSTER as usize], 1000);
                                    tokens.push((read, Some(expected)));
                                }
                            }
                        }
                        client.drain();
                        for (token, expected) in tokens {
                            client.ended.remove(&token).unwrap().unwrap();
                            let found = client.buffers.remove(&token).unwrap();
                            assert!(expected.is_none_or(|expected| expected == found), "{engine:?}, step {step}");
                        }
                    }
                    for (cluster, expected) in model {
                        assert!(read(disk, cluster * CLUSTER, CLUSTER as usize).unwrap() == expected);
                    }
                });
            }
        });
        disk.close().unwrap();
        top.check_tables();
        assert_eq!(top.reserved(), 0);
    }
}

fn base_cluster(seed: u64, cluster: u64, clusters: u64) -> Vec<u8> {
    pattern((clusters * CLUSTER) as usize, seed)[(cluster * CLUSTER) as usize..][..CLUSTER as usize].to_vec()
}

/// From here on this thread can start no other.
fn refuse_threads() {
    refuse_calls(&[libc::SYS_clone3, libc::SYS_clone], libc::EAGAIN);
    assert!(std::thread::Builder::new().spawn(|| {}).is_err(), "a thread was started");
}

/// Where no thread can be had, there is no lane that would need one; what has one keeps it, and it does what waits.
#[test]
fn a_lane_without_further_threads_is_slow_and_waits_for_nothing() {
    for engine in ENGINES {
        let bytes = pattern(1 << 20, 1);
        let (disk, _outside) = raw(&bytes, engine);
        let without = disk.clone();
        let error = does_not_wait("making it", move || {
            refuse_threads();
            without.lane().map(drop).unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::Storage);
        assert!(error.message().starts_with("cannot start a thread for the disk: "), "{error}");

        // From here on the lane needs nobody to find out where bytes are.
        read(&disk, 0, 1 << 20).unwrap();
        let mut client = Client::new(&disk);
        let mut client = does_not_wait("starting", move || {
            refuse_threads();
            // In the kernel, and until this thread sees that it has ended, nobody can have the range alone.
            client.start(Operation::Read, 8192, vec![0; 4096], 4096);
            client.lane.submit();
            for number in 0..LANE_REQUESTS as u64 - 1 {
                client.start(Operation::WriteZeroes { length: 512, may_unmap: false }, number * 512, Vec::new(), 1);
            }
            client.drain();
            client
        });
        assert_eq!(client.ended.drain().filter(|(_, result)| result.is_ok()).count(), LANE_REQUESTS);
        assert!(read(&disk, 0, 1 << 20).unwrap()[255 * 512..] == bytes[255 * 512..]);
    }
}

/// The kernel takes nothing for a while, and nothing else happens: the lane asks again, by itself.
#[test]
fn what_the_kernel_did_not_take_is_given_to_it_again() {
    if !rings_are_here() {
        return;
    }
    let bytes = pattern(1 << 20, 1);
    let (disk, _outside) = raw(&bytes, Engine::Auto);
    read(&disk, 0, 1 << 20).unwrap();
    let mut client = Client::new(&disk);
    assert!(uses_ring(&client));
    let mut tokens = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            refuse_calls(&[libc::SYS_io_uring_enter], libc::EAGAIN);
            tokens.extend((0..3).map(|number| client.start(Operation::Read, number * 8192, vec![0; 4096], 4096)));
            for _ in 0..3 {
                client.lane.submit();
                client.lane.complete(&mut |_, _| panic!("nothing can have ended"));
                client.wait();
            }
            client.lane.complete(&mut |_, _| panic!("nothing can have ended"));
        });
    });
    assert_eq!(client.lane.in_flight(), 3);
    client.wait();
    while client.lane.in_flight() > 0 {
        let ended = &mut client.ended;
        client.lane.complete(&mut |token, result| drop(ended.insert(token, result)));
        thread::yield_now();
    }
    for (number, token) in tokens.into_iter().enumerate() {
        client.ended.remove(&token).unwrap().unwrap();
        assert!(client.buffers[&token] == bytes[number * 8192..][..4096]);
    }
}

/// The kernel takes nothing more, or says for too long that it will later: threads do what it did not take, and
/// what it did take ends as ever.
#[test]
fn what_the_kernel_never_takes_is_done_by_threads() {
    if !rings_are_here() {
        return;
    }
    for error in [libc::EPERM, libc::EAGAIN] {
        for ends in [true, false] {
            let bytes = pattern(1 << 20, 1);
            let (image, _outside) = file(&bytes, Access::ReadWrite);
            let layer = Script::honest(vec![writable(1 << 20, 0)], 1).file(image).overwritable();
            let options = DiskOptions { writable: true, ..DiskOptions::default() };
            let rings = Rings::make(1);
            let disk = Arc::new(Disk::new(vec![Arc::new(layer)], options).unwrap().with_rings(rings.clone()));
            read(&disk, 0, 1 << 20).unwrap();
            let mut client = Client::new(&disk);
            assert!(uses_ring(&client));
            let written = pattern(128 << 10, 2);
            let late = written.clone();
            let client = does_not_wait("the kernel takes nothing", move || {
                client.start(Operation::Read, 0, vec![0; 4096], 4096);
                client.lane.submit();
                refuse_calls(&[libc::SYS_io_uring_enter], error);
                client.start(Operation::Write, 512 << 10, late, 4096);
                client.start(Operation::Read, 8192, vec![0; 4096], 4096);
                client.lane.submit();
                // Or the lane ends with all of them in flight.
                if !ends {
                    drop(client.lane);
                    return None;
                }
                client.drain();
                assert!(!uses_ring(&client));
                client.start(Operation::Read, 16384, vec![0; 4096], 4096);
                client.drain();
                Some(client)
            });
            assert!(read(&disk, 512 << 10, 128 << 10).unwrap() == written, "what was started was not written");
            if let Some(client) = client {
                assert!((0..4).all(|token| client.ended[&token].is_ok()));
                for (token, offset) in [(0, 0), (2, 8192), (3, 16384)] {
                    assert!(client.buffers[&token] == bytes[offset..][..4096], "what was read is something else");
                }
            }
            // The next lane would give the kernel what is left in the ring.
            assert_eq!(rings.left(), 0);
            // Nobody has anything any more.
            does_not_wait("nothing is in flight", move || disk.write_zeroes(0, 1 << 20, false)).unwrap();
        }
    }
}

/// A backend whose requests panic: the guest gets an answer all the same.
#[test]
fn a_request_that_panics_is_an_error() {
    struct Broken;
    impl BlockBackend for Broken {
        fn capacity(&self) -> u64 {
            512
        }
        fn is_writable(&self) -> bool {
            true
        }
        fn topology(&self) -> blockhouse_block::Topology {
            blockhouse_block::Topology { physical_block_size: 512, optimal_io_size: 512 }
        }
        fn read(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            panic!("a defect")
        }
        fn write(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            Ok(())
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<()> {
            Ok(())
        }
        fn lane(self: Arc<Self>) -> Result<Box<dyn Lane>> {
            Ok(Box::new(PoolLane::new(self, Pool::new())?))
        }
    }
    let mut client =
        Client { lane: Arc::new(Broken).lane().unwrap(), buffers: HashMap::new(), next: 0, ended: HashMap::new() };
    for _ in 0..3 {
        let error = client.once(Operation::Read, 0, vec![0; 512]).unwrap_err();
        assert!(error.message().contains("a defect"), "{error}");
        client.once(Operation::Write, 0, vec![0; 512]).unwrap();
    }
}
