//! What the front ends do.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockhouse_tests::client::{Client, Request};
use blockhouse_tests::noise;

/// Requests at a time, each in a part of the disk of its own.
const BATCH: usize = 8;
/// Between two batches: the machine has other things to do.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes of a disk whose component traps.
pub(crate) const TRAP_SIZE: u64 = 256 << 20;
/// How much of it one answer of the component covers (`tests/hostile/component`).
const ANSWER: u64 = 64 << 10;
/// A component that worked for ten minutes starts over with all of its restarts.
const FORGIVEN: Duration = Duration::from_secs(605);

/// What was done.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) requests: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) attached: AtomicU64,
    pub(crate) traps: AtomicU64,
    pub(crate) restarts: AtomicU64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        write!(
            f,
            "{} requests verified ({} MiB), {} front ends, {} traps, {} restarts of a server",
            now(&self.requests),
            now(&self.bytes) >> 20,
            now(&self.attached),
            now(&self.traps),
            now(&self.restarts)
        )
    }
}

/// A disk and what it must hold.
pub(crate) struct Disk {
    /// As for `--disk`.
    pub(crate) fields: String,
    socket: PathBuf,
    writable: bool,
    state: Mutex<(Vec<u8>, u64)>,
}

impl Disk {
    pub(crate) fn with(fields: String, socket: PathBuf, content: Vec<u8>, writable: bool) -> Self {
        Self { fields, socket, writable, state: Mutex::new((content, 1)) }
    }
}

/// What one request of a batch does, at which place.
enum Step {
    Read { at: usize, len: usize },
    Write { at: usize, data: Vec<u8> },
    Zero { at: usize, len: usize },
}

/// Reads and writes at random, and compares: front end after front end, each for as long as `stay`. Flushes before
/// it ends.
pub(crate) fn keep_writing(disk: &Disk, stay: Duration, counts: &Counts, over: &AtomicBool) {
    let mut state = disk.state.lock().unwrap();
    let (expected, random) = &mut *state;
    let share = expected.len() / BATCH;
    let mut next = |below: usize| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(*random >> 33).unwrap() % below
    };
    while !over.load(Ordering::Relaxed) {
        let mut client = Client::connect(&disk.socket, 1);
        counts.attached.fetch_add(1, Ordering::Relaxed);
        assert_eq!(client.capacity(), expected.len() as u64, "{}", disk.fields);
        let began = Instant::now();
        while began.elapsed() < stay && !over.load(Ordering::Relaxed) {
            let steps: Vec<Step> = (0..BATCH)
                .map(|part| {
                    let len = 512 << next(8);
                    let at = part * share + next((share - len) / 512) * 512;
                    match next(10) {
                        0..5 if disk.writable => Step::Write { at, data: noise(next(usize::MAX >> 33) as u64, len) },
                        5 if disk.writable => Step::Zero { at, len },
                        _ => Step::Read { at, len },
                    }
                })
                .collect();
            let requests: Vec<Request<'_>> = steps
                .iter()
                .map(|step| match step {
                    Step::Read { at, len } => Request::Read { offset: *at as u64, len: *len },
                    Step::Write { at, data } => Request::Write { offset: *at as u64, data },
                    Step::Zero { at, len } => Request::Zero { offset: *at as u64, len: *len as u64, unmap: true },
                })
                .collect();
            for (step, result) in steps.iter().zip(client.run(0, &requests)) {
                let bytes = result.unwrap_or_else(|error| panic!("{}: error {error}", disk.fields));
                let len = match step {
                    Step::Read { at, len } => {
                        assert!(bytes == expected[*at..*at + *len], "{}: wrong bytes at {at}", disk.fields);
                        *len
                    }
                    Step::Write { at, data } => {
                        expected[*at..*at + data.len()].copy_from_slice(data);
                        data.len()
                    }
                    Step::Zero { at, len } => {
                        expected[*at..*at + *len].fill(0);
                        *len
                    }
                };
                counts.requests.fetch_add(1, Ordering::Relaxed);
                counts.bytes.fetch_add(len as u64, Ordering::Relaxed);
            }
            if disk.writable && next(50) == 0 {
                client.flush().unwrap();
            }
            std::thread::sleep(PAUSE);
        }
        if disk.writable {
            client.flush().unwrap();
        }
    }
}

/// Makes the component of a disk trap, sees that it is started again, and waits until that is forgiven.
pub(crate) fn keep_trapping(number: usize, socket: &Path, counts: &Counts, over: &AtomicBool) {
    let mut next = 0;
    let mut due = Duration::from_secs(3 + 10 * number as u64);
    let began = Instant::now();
    loop {
        while began.elapsed() < due {
            if over.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        due = began.elapsed() + FORGIVEN;
        let mut client = Client::connect(socket, 1);
        counts.attached.fetch_add(1, Ordering::Relaxed);
        // A place that the component was not asked for before.
        let mut read = || {
            next += ANSWER;
            client.read(next % TRAP_SIZE, 4096)
        };
        let mut asked = 1;
        while read().is_ok() {
            asked += 1;
            assert!(asked <= 2, "the component answered {asked} times");
        }
        counts.traps.fetch_add(1, Ordering::Relaxed);
        // It is down for a second.
        let broken = Instant::now();
        while read().is_err() {
            assert!(broken.elapsed() < Duration::from_secs(30), "the component of {} stays down", socket.display());
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
