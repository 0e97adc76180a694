//! Power cuts: random sequences of operations, and for each some of the states that a power cut could leave.
//!
//! Of what reached the file after the last sync any part may be missing, sector by sector of 512 bytes.
//! Each state is checked by `qemu-img check`, read back, and written again:
//!
//! * no corruption, ever; leaks are allowed;
//! * a sector holds what it held at the last acknowledged flush, or something written later;
//! * after a recovery that is written, flushed and closed, everything is exact; a cut in the middle of it
//!   leaves the old or the new.
//!
//! `cargo xtask simulate` runs it for longer, through `POWERCUT_SEEDS` (how many), `POWERCUT_FIRST` (from
//! which one), `POWERCUT_SEED` (one of them) and `POWERCUT_JSON` (where the outcome goes).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use blockhouse_plugin::testing::{Change, Disk, Storage};
use blockhouse_plugin::{Access, Error, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Lab, have_qemu};

const SECTOR: usize = 512;
const IMAGE: &str = "/images/top.qcow2";
const BASE: &str = "/images/base.raw";
/// Without `POWERCUT_SEEDS`.
const SEEDS: u64 = 600;
/// Cuts of each seed, and as many in the recovery from each.
const STATES: usize = 3;

/// Numbers that depend on the seed alone.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// A kind of image that writing starts from.
struct Template {
    name: &'static str,
    options: &'static str,
    cluster: u64,
    /// The size of the disk in bytes: never a multiple of the largest clusters.
    size: u64,
    backing: bool,
    /// Done to it before: `compress` the content, take a `snapshot`, write some `data`.
    before: &'static str,
}

const TEMPLATES: &[Template] = &[
    Template { name: "plain", options: "cluster_size=4k", cluster: 4096, size: 1 << 20, backing: false, before: "" },
    Template {
        name: "tiny",
        options: "cluster_size=512,refcount_bits=64",
        cluster: 512,
        size: 300 << 10,
        backing: false,
        before: "",
    },
    Template {
        name: "bits1",
        options: "cluster_size=512,refcount_bits=1",
        cluster: 512,
        size: 200 << 10,
        backing: true,
        before: "",
    },
    Template {
        name: "bits4",
        options: "cluster_size=1k,refcount_bits=4",
        cluster: 1024,
        size: 200 << 10,
        backing: true,
        before: "data",
    },
    Template {
        name: "v2",
        options: "compat=0.10,cluster_size=4k",
        cluster: 4096,
        size: 500 << 10,
        backing: false,
        before: "data",
    },
    Template {
        name: "v2-overlay",
        options: "compat=0.10,cluster_size=8k",
        cluster: 8192,
        size: 400 << 10,
        backing: true,
        before: "data",
    },
    Template {
        name: "overlay",
        options: "cluster_size=64k",
        cluster: 65536,
        size: (1 << 20) + 5120,
        backing: true,
        before: "",
    },
    Template {
        name: "lazy",
        options: "cluster_size=8k,lazy_refcounts=on",
        cluster: 8192,
        size: 700 << 10,
        backing: true,
        before: "data",
    },
    Template {
        name: "extended",
        options: "cluster_size=16k,extended_l2=on",
        cluster: 16384,
        size: 900 << 10,
        backing: true,
        before: "data",
    },
    Template {
        name: "snapshot",
        options: "cluster_size=4k",
        cluster: 4096,
        size: 400 << 10,
        backing: false,
        before: "data snapshot",
    },
    Template {
        name: "snapshots",
        options: "cluster_size=1k,refcount_bits=8",
        cluster: 1024,
        size: 200 << 10,
        backing: true,
        before: "data snapshot snapshot",
    },
    Template {
        name: "packed",
        options: "cluster_size=4k",
        cluster: 4096,
        size: 400 << 10,
        backing: false,
        before: "compress",
    },
    Template {
        name: "packed-snapshot",
        options: "cluster_size=16k,compression_type=zstd",
        cluster: 16384,
        size: 400 << 10,
        backing: false,
        before: "compress snapshot",
    },
];

/// A sector that names who wrote it. 0 is a sector of zeroes.
fn sector(id: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&id.to_le_bytes());
    }
    bytes
}

fn sectors(ids: impl IntoIterator<Item = u64>) -> Vec<u8> {
    ids.into_iter().flat_map(sector).collect()
}

/// An image ready to be written: its bytes, those of its base, and who wrote each sector.
struct Made {
    image: Vec<u8>,
    base: Vec<u8>,
    ids: Vec<u64>,
}

fn make(template: &Template) -> Made {
    let lab = Lab::new();
    let count = template.size / SECTOR as u64;
    // The base is shorter than the disk, and has holes.
    let base_ids: Vec<u64> = (0..count * 3 / 4).map(|n| if n / 50 % 3 == 1 { 0 } else { 1_000_000 + n }).collect();
    let base = sectors(base_ids.iter().copied());
    lab.write("base.raw", &base);
    let mut ids: Vec<u64> = if template.backing { base_ids } else { Vec::new() };
    ids.resize(count as usize, 0);
    let backing = if template.backing { "-b base.raw -F raw" } else { "" };
    if template.before.contains("compress") {
        ids = (0..count).map(|n| if n / 40 % 4 == 2 { 0 } else { 2_000_000 + n }).collect();
        lab.write("full.raw", &sectors(ids.iter().copied()));
        lab.qemu_img(&format!("convert -c -f raw -O qcow2 -o {} full.raw top.qcow2", template.options));
    } else {
        lab.qemu_img(&format!("create -q -f qcow2 -o {} {backing} top.qcow2 {}", template.options, template.size));
    }
    if template.before.contains("data") {
        // Sectors of one repeated byte are sectors with an id, too.
        let mut commands = Vec::new();
        for (number, at) in [0, template.size / 3, template.size / 2].into_iter().enumerate() {
            let (at, length) = (at - at % 4096, 3 * 4096);
            let byte = 17 + number as u8;
            commands.push(format!("write -P {byte} {at} {length}"));
            for id in &mut ids[at as usize / SECTOR..(at + length) as usize / SECTOR] {
                *id = u64::from_le_bytes([byte; 8]);
            }
        }
        lab.qemu_io("top.qcow2", &commands);
    }
    for number in 0..template.before.matches("snapshot").count() {
        lab.qemu_img(&format!("snapshot -c s{number} top.qcow2"));
    }
    Made { image: lab.bytes("top.qcow2"), base, ids }
}

/// A base under the disk: the bytes of the raw file, and zeroes past its end.
fn below(base: &[u8], used: bool) -> impl FnMut(u64, &mut [u8]) {
    move |offset, to| {
        for (number, byte) in to.iter_mut().enumerate() {
            *byte = if used { base.get(offset as usize + number).copied().unwrap_or(0) } else { 0 };
        }
    }
}

fn storage(image: Vec<u8>, base: &[u8]) -> Storage {
    let storage = Storage::new();
    storage.insert(IMAGE, image);
    storage.insert(BASE, base.to_vec());
    storage
}

fn open(storage: &Storage, access: Access) -> Disk<Qcow2> {
    let mut disk = storage.disk_with::<Qcow2>(IMAGE, access, |_| Ok(())).expect("the image opens");
    if access == Access::ReadWrite {
        disk.format.begin().expect("the image can be written");
    }
    disk
}

/// What an operation left in the sectors from `first` on, and which changes it was.
struct Done {
    /// It failed, and may have done a part.
    failed: bool,
    first: usize,
    ids: Vec<u64>,
    start: usize,
}

struct Run<'a> {
    template: &'a Template,
    made: &'a Made,
    random: Random,
    log: String,
    changes: Vec<Change>,
    operations: Vec<Done>,
    /// Acknowledged flushes: how many changes and how many operations were before.
    flushes: Vec<(usize, usize)>,
    ids: Vec<u64>,
    next_id: u64,
}

impl Run<'_> {
    /// Up to `count` operations. Errors are allowed where the storage was made to fail.
    fn operate(&mut self, disk: &mut Disk<Qcow2>, storage: &Storage, count: u64) {
        let size = self.template.size;
        for _ in 0..count {
            let start = self.changes.len();
            let failing = self.random.below(12) == 0;
            if failing {
                storage.fail_after(IMAGE, Some(self.random.below(6) as usize));
            }
            let kind = self.random.below(10);
            let result = match kind {
                0..=4 => {
                    let first = self.random.below(size / SECTOR as u64);
                    let most = (3 * self.template.cluster / SECTOR as u64).min(size / SECTOR as u64 - first);
                    let count = 1 + self.random.below(most);
                    let ids: Vec<u64> = (0..count).map(|number| self.next_id + number).collect();
                    self.next_id += count;
                    self.note(start, first, ids.clone(), &format!("write {first}+{count}"));
                    disk.write_over(
                        first * SECTOR as u64,
                        &sectors(ids),
                        &mut below(&self.made.base, self.template.backing),
                    )
                }
                5..=7 => {
                    let clusters = size.div_ceil(self.template.cluster);
                    let first = self.random.below(clusters);
                    let count = 1 + self.random.below((clusters - first).min(6));
                    let offset = first * self.template.cluster;
                    let length = (count * self.template.cluster).min(size - offset);
                    let (keep, discard) = (kind == 6, kind == 7);
                    let ids = vec![0; length as usize / SECTOR];
                    let what = if discard { "discard" } else { "zero" };
                    self.note(start, offset / SECTOR as u64, ids, &format!("{what} {offset}+{length} keep {keep}"));
                    if discard { disk.format.discard(offset, length) } else { disk.format.zero(offset, length, keep) }
                }
                _ => {
                    let operations = self.operations.len();
                    let _ = writeln!(self.log, "{start}: flush");
                    let result = disk.flush();
                    if result.is_ok() {
                        self.changes.extend(storage.take_changes(IMAGE));
                        self.flushes.push((self.changes.len(), operations));
                    }
                    result
                }
            };
            self.changes.extend(storage.take_changes(IMAGE));
            storage.fail_after(IMAGE, None);
            if let Err(error) = result {
                // Refused as a whole: version 2 has no zero clusters that hide a backing file.
                if matches!(error, Error::Unsupported(_)) && self.template.name == "v2-overlay" {
                    self.operations.pop();
                    continue;
                }
                // A sync that failed ends writing for good.
                if error.text().contains("not written any more") {
                    return;
                }
                assert!(failing, "an operation failed, and the storage did not: {error}\n{}", self.log);
                let _ = writeln!(self.log, "   failed: {error}");
                if let Some(done) = self.operations.last_mut().filter(|_| kind < 8) {
                    done.failed = true;
                }
            }
        }
    }

    fn note(&mut self, start: usize, first: u64, ids: Vec<u64>, what: &str) {
        let _ = writeln!(self.log, "{start}: {what}");
        self.operations.push(Done { failed: false, first: first as usize, ids, start });
    }

    /// What each sector may hold after a cut at change `cut`.
    fn allowed(&self, cut: usize) -> Vec<Vec<u64>> {
        let flushed = self.flushes.iter().rev().find(|(end, _)| *end <= cut).map_or(0, |(_, operations)| *operations);
        let mut allowed: Vec<Vec<u64>> = self.ids.iter().map(|id| vec![*id]).collect();
        for (number, done) in self.operations.iter().enumerate() {
            if done.start > cut {
                break;
            }
            for (id, allowed) in done.ids.iter().zip(&mut allowed[done.first..]) {
                // A failed operation may have done a part: it does not take the place of what was before.
                if number < flushed && !done.failed {
                    allowed.clear();
                }
                if !allowed.contains(id) {
                    allowed.push(*id);
                }
            }
        }
        allowed
    }
}

/// A state that a power cut after `changes` to a file of `bytes` could leave.
fn state(mut bytes: Vec<u8>, changes: &[Change], random: &mut Random) -> Vec<u8> {
    let synced = changes.iter().rposition(|change| *change == Change::Sync).map_or(0, |at| at + 1);
    for change in &changes[..synced] {
        change.apply(&mut bytes);
    }
    // Sometimes nearly nothing is lost, sometimes nearly everything.
    let kept = [5, 50, 95][random.below(3) as usize];
    for change in &changes[synced..] {
        match change {
            Change::Write(offset, new) => {
                let mut at = 0;
                while at < new.len() {
                    let within = (*offset as usize + at) % SECTOR;
                    let end = new.len().min(at + SECTOR - within);
                    if random.below(100) < kept {
                        Change::Write(offset + at as u64, new[at..end].to_vec()).apply(&mut bytes);
                    }
                    at = end;
                }
            }
            other => {
                if random.below(100) < kept {
                    other.apply(&mut bytes);
                }
            }
        }
    }
    bytes
}

/// What `qemu-img check` says: corruptions and leaks.
fn check(directory: &Path, bytes: &[u8]) -> (u64, u64) {
    std::fs::write(directory.join("top.qcow2"), bytes).unwrap();
    let output = Command::new("qemu-img")
        .args(["check", "-U", "-f", "qcow2", "--output=json", "top.qcow2"])
        .current_dir(directory)
        .output()
        .unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("qemu-img check: {}", String::from_utf8_lossy(&output.stderr)));
    let number = |name: &str| found[name].as_u64().unwrap_or(0);
    (number("corruptions") + number("check-errors"), number("leaks"))
}

fn read_all(disk: &mut Disk<Qcow2>, template: &Template, base: &[u8]) -> Vec<u8> {
    let mut content = vec![0; template.size as usize];
    disk.read_over(template.size, 0, &mut content, &mut below(base, template.backing)).expect("the disk can be read");
    content
}

/// Runs one seed and returns states and leaks, or what was violated.
fn run_seed(seed: u64, made: &[Made], directory: &Path) -> Result<(u64, u64), String> {
    let mut random = Random(seed);
    let which = random.below(TEMPLATES.len() as u64) as usize;
    let (template, made) = (&TEMPLATES[which], &made[which]);
    let mut run = Run {
        template,
        made,
        random,
        log: String::new(),
        changes: Vec::new(),
        operations: Vec::new(),
        flushes: Vec::new(),
        ids: made.ids.clone(),
        next_id: 5_000_000,
    };
    let disk_storage = storage(made.image.clone(), &made.base);
    let mut disk = open(&disk_storage, Access::ReadWrite);
    run.changes.extend(disk_storage.take_changes(IMAGE));
    let count = 4 + run.random.below(30);
    run.operate(&mut disk, &disk_storage, count);
    if disk_storage.bytes(BASE) != made.base {
        return Err("the base was changed".to_owned());
    }
    std::fs::write(directory.join("base.raw"), &made.base).unwrap();

    let mut leaks = 0;
    for _ in 0..STATES {
        let cut = run.random.below(run.changes.len() as u64 + 1) as usize;
        let bytes = state(made.image.clone(), &run.changes[..cut], &mut run.random);
        let context = |what: String| {
            format!("{what}\ntemplate {}, cut at {cut} of {}\n{}", template.name, run.changes.len(), run.log)
        };
        let (corruptions, found) = check(directory, &bytes);
        if corruptions > 0 {
            return Err(context(format!("qemu-img check finds {corruptions} corruptions")));
        }
        leaks += found;

        let after = storage(bytes, &made.base);
        let content = read_all(&mut open(&after, Access::ReadOnly), template, &made.base);
        let mut now = Vec::new();
        for (number, (bytes, allowed)) in content.chunks_exact(SECTOR).zip(run.allowed(cut)).enumerate() {
            let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            if !allowed.contains(&id) || bytes != sector(id) {
                return Err(context(format!("sector {number} holds {id}, allowed: {allowed:?}")));
            }
            now.push(id);
        }

        // Recovery: it is written again, and closed.
        let before = after.bytes(IMAGE);
        let old = now.clone();
        let mut disk = open(&after, Access::ReadWrite);
        let first = run.random.below(template.size / SECTOR as u64) as usize;
        let last = (first + run.random.below(3 * template.cluster / SECTOR as u64) as usize + 1).min(now.len());
        for id in &mut now[first..last] {
            *id = 9_000_000 + seed;
        }
        disk.write_over(
            (first * SECTOR) as u64,
            &sectors(now[first..last].iter().copied()),
            &mut below(&made.base, template.backing),
        )
        .map_err(|error| context(format!("recovery: {error}")))?;
        disk.flush().and_then(|()| disk.format.finish()).map_err(|error| context(format!("recovery: {error}")))?;
        let (corruptions, _) = check(directory, &after.bytes(IMAGE));
        if corruptions > 0 {
            return Err(context(format!("qemu-img check finds {corruptions} corruptions after the recovery")));
        }
        if read_all(&mut open(&after, Access::ReadOnly), template, &made.base) != sectors(now.iter().copied()) {
            return Err(context("the content after the recovery is wrong".to_owned()));
        }

        // And the power fails during that recovery.
        let changes = after.take_changes(IMAGE);
        let cut = run.random.below(changes.len() as u64 + 1) as usize;
        let bytes = state(before, &changes[..cut], &mut run.random);
        let (corruptions, found) = check(directory, &bytes);
        if corruptions > 0 {
            return Err(context(format!(
                "qemu-img check finds {corruptions} corruptions, cut in the recovery at {cut}"
            )));
        }
        leaks += found;
        let again = storage(bytes, &made.base);
        let content = read_all(&mut open(&again, Access::ReadOnly), template, &made.base);
        for (number, bytes) in content.chunks_exact(SECTOR).enumerate() {
            if bytes != sector(old[number]) && bytes != sector(now[number]) {
                return Err(context(format!("sector {number} is wrong, cut in the recovery at {cut}")));
            }
        }
        if after.bytes(BASE) != made.base {
            return Err(context("the base was changed by the recovery".to_owned()));
        }
    }
    Ok((2 * STATES as u64, leaks))
}

#[test]
fn no_power_cut_damages_an_image() {
    if !have_qemu() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("POWERCUT_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = number("POWERCUT_FIRST").unwrap_or(0);
            (first..first + number("POWERCUT_SEEDS").unwrap_or(SEEDS)).collect()
        }
    };
    let made: Vec<Made> = TEMPLATES.iter().map(make).collect();
    let (next, states, leaks) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let violations = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let directory = tempfile::tempdir().unwrap();
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = std::panic::catch_unwind(|| run_seed(*seed, &made, directory.path()));
                    match outcome.unwrap_or_else(|_| Err("a panic, see above".to_owned())) {
                        Ok((more, found)) => {
                            states.fetch_add(more, Ordering::Relaxed);
                            leaks.fetch_add(found, Ordering::Relaxed);
                        }
                        Err(why) => violations.lock().unwrap().push((*seed, why)),
                    }
                }
            });
        }
    });
    let mut violations = violations.into_inner().unwrap();
    violations.sort();
    eprintln!(
        "states {}, violations {}, leaks {}",
        states.load(Ordering::Relaxed),
        violations.len(),
        leaks.load(Ordering::Relaxed)
    );
    if let Some(file) = std::env::var_os("POWERCUT_JSON") {
        let rows: Vec<_> =
            violations.iter().map(|(seed, why)| serde_json::json!({ "seed": seed, "why": why })).collect();
        let outcome = serde_json::json!({
            "seeds": seeds.len(),
            "states": states.load(Ordering::Relaxed),
            "leaks": leaks.load(Ordering::Relaxed),
            "violations": rows,
        });
        std::fs::write(file, outcome.to_string()).unwrap();
    }
    if let Some((seed, why)) = violations.first() {
        panic!(
            "{} seeds violate; the first: {why}\nreplay: cargo xtask simulate --seed {seed}\nall: {:?}",
            violations.len(),
            violations.iter().map(|(seed, _)| seed).take(50).collect::<Vec<_>>()
        );
    }
}
