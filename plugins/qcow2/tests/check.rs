//! Checking and repairing, against `qemu-img check`.
//!
//! Damaged images: both say clean, or both do not. The numbers of corruptions differ where QEMU counts an
//! entry once for each way that leads to it, or stops at the first thing that is wrong with it. Stricter than
//! QEMU, because reading such an entry is an error here and there: the zero flag in images of version 2 and in
//! extended entries, and a wrong offset in an external data file.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, CheckReport, Checker, Error, Repair, Writer};
use blockhouse_qcow2::Qcow2;

use crate::support::{Handmade, Lab, Random, have_qemu, material, torn};

const IMAGE: &str = "/images/top.qcow2";
const COPIED: u64 = 1 << 63;

fn storage(bytes: &[u8]) -> Storage {
    let storage = Storage::new();
    storage.insert(IMAGE, bytes.to_vec());
    storage
}

fn check(bytes: &[u8]) -> Result<CheckReport, Error> {
    Qcow2::check(storage(bytes).file(IMAGE, Access::ReadOnly), None)
}

/// The report, and the image afterwards.
fn repair(bytes: &[u8], what: Repair) -> (CheckReport, Vec<u8>) {
    let storage = storage(bytes);
    let report = Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(what)).expect("it can be checked");
    (report, storage.bytes(IMAGE))
}

/// What is left after a repair: corruptions and leaks.
fn left(report: &CheckReport) -> (u64, u64) {
    (report.corruptions - report.corruptions_repaired, report.leaks - report.leaks_repaired)
}

/// What `qemu-img check` says; `None` if it cannot open the image.
#[derive(Debug, PartialEq, Eq)]
struct Theirs {
    corruptions: u64,
    leaks: u64,
    errors: u64,
    total: u64,
    allocated: u64,
    compressed: u64,
    end: u64,
}

fn qemu_check(directory: &Path, bytes: &[u8]) -> Option<Theirs> {
    std::fs::write(directory.join("top.qcow2"), bytes).unwrap();
    let output = Command::new("qemu-img")
        .args(["check", "-U", "-f", "qcow2", "--output=json", "top.qcow2"])
        .current_dir(directory)
        .output()
        .unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let number = |name: &str| found[name].as_u64().unwrap_or(0);
    Some(Theirs {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        errors: number("check-errors"),
        total: number("total-clusters"),
        allocated: number("allocated-clusters"),
        compressed: number("compressed-clusters"),
        end: number("image-end-offset"),
    })
}

impl Theirs {
    fn is_clean(&self) -> bool {
        (self.corruptions, self.leaks, self.errors) == (0, 0, 0)
    }
}

fn ours(report: &CheckReport) -> Theirs {
    Theirs {
        corruptions: report.corruptions,
        leaks: report.leaks,
        errors: 0,
        total: report.total_clusters,
        allocated: report.allocated_clusters,
        compressed: report.compressed_clusters,
        end: report.image_end,
    }
}

/// A kind of image.
struct Template {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// In order: `data`, `compress` (all of it), `snapshot`, `zero`, `bitmap`.
    steps: &'static str,
}

const fn template(name: &'static str, options: &'static str, size: u64, steps: &'static str) -> Template {
    Template { name, options, size, steps }
}

const TEMPLATES: &[Template] = &[
    template("empty", "cluster_size=64k", 1 << 20, ""),
    template("nothing", "cluster_size=64k", 0, ""),
    template("plain", "cluster_size=4k", 1 << 20, "data zero"),
    template("tiny", "cluster_size=512,refcount_bits=64", 300 << 10, "data"),
    template("bits8", "cluster_size=512,refcount_bits=8", 200 << 10, "data snapshot data"),
    template("bits2", "cluster_size=1k,refcount_bits=2", 200 << 10, "data zero"),
    template("v2", "compat=0.10,cluster_size=4k", 500 << 10, "data snapshot data"),
    template("large", "cluster_size=2M", 9 << 20, "data"),
    template("wide", "cluster_size=64k", (3 << 20) + 512, "data zero snapshot data"),
    template("extended", "cluster_size=16k,extended_l2=on", 900 << 10, "data zero snapshot data"),
    template("snapshots", "cluster_size=1k,refcount_bits=16", 200 << 10, "data snapshot zero snapshot data snapshot"),
    template("packed", "cluster_size=4k", 400 << 10, "compress data"),
    template("zstd", "cluster_size=16k,compression_type=zstd", 400 << 10, "compress snapshot data"),
    template("bitmaps", "cluster_size=4k", 4 << 20, "data bitmap"),
    template("metadata", "cluster_size=4k,preallocation=metadata", 300 << 10, "data"),
    template("data-file", "cluster_size=4k,data_file=d.raw", 300 << 10, "data zero"),
    template("data-file-raw", "cluster_size=4k,data_file=r.raw,data_file_raw=on", 300 << 10, "data"),
];

/// An image, and what its disk reads.
struct Made {
    template: &'static Template,
    image: Vec<u8>,
    content: Vec<u8>,
}

fn make(lab: &Lab, template: &'static Template) -> Made {
    let mut random = Random(0x1234_5678_9abc_def1);
    lab.qemu_img(&format!("create -q -f qcow2 -o {} top.qcow2 {}", template.options, template.size));
    for (number, step) in template.steps.split_whitespace().enumerate() {
        let range = |random: &mut Random| {
            let start = random.below(template.size / 512) * 512;
            format!("{start} {}", (512 * (1 + random.below(40))).min(template.size - start))
        };
        match step {
            "data" => {
                let writes: Vec<String> =
                    (0..12).map(|number| format!("write -P {} {}", number + 1, range(&mut random))).collect();
                lab.qemu_io("top.qcow2", &writes);
            }
            "zero" => {
                let zeroes: Vec<String> = (0..5).map(|_| format!("write -z {}", range(&mut random))).collect();
                lab.qemu_io("top.qcow2", &zeroes);
            }
            "compress" => {
                let bytes = material(template.size as usize, 7);
                lab.write("c.raw", &bytes);
                lab.qemu_img(&format!("convert -c -f raw -O qcow2 -o {} c.raw top.qcow2", template.options));
            }
            "snapshot" => lab.qemu_img(&format!("snapshot -c s{number} top.qcow2")),
            "bitmap" => {
                lab.qemu_img("bitmap --add -g 512 top.qcow2 one");
                lab.qemu_io("top.qcow2", &["write 0 300k".to_owned()]);
                lab.qemu_img("bitmap --add top.qcow2 two");
            }
            other => panic!("{other}"),
        }
    }
    Made { template, image: lab.bytes("top.qcow2"), content: lab.oracle("top.qcow2", "") }
}

#[test]
fn healthy_images_are_what_qemu_says() {
    if !have_qemu() {
        return;
    }
    for template in TEMPLATES {
        let lab = Lab::new();
        let made = make(&lab, template);
        let report = check(&made.image).unwrap();
        assert_eq!(report.findings, [""; 0], "{}", template.name);
        let theirs = qemu_check(Path::new(&lab.path("")), &made.image).unwrap();
        assert_eq!(ours(&report), theirs, "{}", template.name);
        assert!(theirs.is_clean());
        // A repair of a healthy image changes nothing.
        for what in [Repair::Leaks, Repair::All] {
            let storage = storage(&made.image);
            Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(what)).unwrap();
            assert!(storage.take_changes(IMAGE).is_empty(), "{}", template.name);
        }
    }
}

/// The header of a test image.
fn be(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn be32(bytes: &[u8], at: usize) -> usize {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

struct Shape {
    cluster: usize,
    entry: usize,
    l1: Range<usize>,
    l2: Vec<usize>,
    table: Range<usize>,
    blocks: Vec<usize>,
    /// L1 tables of snapshots, their L2 tables, directory and tables of bitmaps: where they start.
    others: Vec<usize>,
}

fn shape(bytes: &[u8]) -> Shape {
    let cluster = 1usize << be32(bytes, 20);
    let extended = be32(bytes, 4) == 3 && be(bytes, 72) & 16 != 0;
    let l1 = be(bytes, 40) as usize..be(bytes, 40) as usize + 8 * be32(bytes, 36);
    let table = be(bytes, 48) as usize..be(bytes, 48) as usize + cluster * be32(bytes, 56);
    let offsets = |range: Range<usize>| -> Vec<usize> {
        range.step_by(8).map(|at| (be(bytes, at) & 0x00ff_ffff_ffff_fe00) as usize).filter(|at| *at != 0).collect()
    };
    let mut others = Vec::new();
    let mut at = be(bytes, 64) as usize;
    for _ in 0..be32(bytes, 60) {
        let start = be(bytes, at) as usize;
        others.push(start);
        others.extend(offsets(start..start + 8 * be32(bytes, at + 8)));
        let names = be32(bytes, at + 12);
        at = (at + 40 + (names >> 16) + (names & 0xffff) + be32(bytes, at + 36)).next_multiple_of(8);
    }
    if let Some(extension) = bytes[..cluster].windows(8).position(|word| word == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24])
    {
        let directory = be(bytes, extension + 24) as usize;
        others.extend([directory, be(bytes, directory) as usize]);
    }
    Shape {
        others,
        cluster,
        entry: if extended { 16 } else { 8 },
        l2: offsets(l1.clone()),
        blocks: offsets(table.clone()),
        l1,
        table,
    }
}

/// Flips up to three bits, or overwrites up to three entries, of metadata. Returns the bytes of the file that
/// may have changed.
fn damage(bytes: &mut [u8], shape: &Shape, random: &mut Random) -> Vec<Range<usize>> {
    let mut places = Vec::new();
    for _ in 0..1 + random.below(3) {
        // Near the start of a table, where entries are in use.
        let inside = |start: usize, length: usize, random: &mut Random| {
            let length = if random.below(3) == 0 { length } else { length.min(256) };
            start + random.below(length as u64) as usize
        };
        let pick = |from: &[usize], random: &mut Random| from[random.below(from.len() as u64) as usize];
        let at = match random.below(8) {
            0 if !shape.l1.is_empty() => inside(shape.l1.start, shape.l1.len(), random),
            1..=3 if !shape.l2.is_empty() => inside(pick(&shape.l2, random), shape.cluster, random),
            4 if !shape.others.is_empty() => inside(pick(&shape.others, random), 64, random),
            5 => inside(shape.table.start, 16, random),
            _ => inside(pick(&shape.blocks, random), shape.cluster, random),
        };
        let entry = at - at % 8..at - at % 8 + 8;
        match random.below(6) {
            0 => bytes[entry.clone()].fill(0),
            1 => {
                let value = random.next();
                bytes[entry.clone()].copy_from_slice(&value.to_be_bytes());
            }
            2 => {
                // Another cluster of the file.
                let other = random.below((bytes.len() / shape.cluster) as u64) * shape.cluster as u64;
                bytes[entry.clone()].copy_from_slice(&(other | COPIED).to_be_bytes());
            }
            _ => bytes[at] ^= 1 << random.below(8),
        }
        places.push(entry);
    }
    places
}

/// The clusters of the disk of which no entry was damaged.
fn undamaged(before: &[u8], shape: &Shape, places: &[Range<usize>], size: usize) -> Vec<usize> {
    let per_table = shape.cluster / shape.entry;
    (0..size.div_ceil(shape.cluster))
        .filter(|number| {
            let l1 = shape.l1.start + number / per_table * 8;
            let table = (be(before, l1) & 0x00ff_ffff_ffff_fe00) as usize;
            let l2 = table + number % per_table * shape.entry;
            // An empty L1 entry has no L2 entries.
            let touched = |range: Range<usize>| places.iter().any(|p| p.start < range.end && range.start < p.end);
            !touched(l1..l1 + 8) && (table == 0 || !touched(l2..l2 + shape.entry))
        })
        .collect()
}

/// Reads these clusters of the disk; a cluster that cannot be read is a failure.
fn same(bytes: &[u8], made: &Made, shape: &Shape, clusters: &[usize]) -> Result<(), String> {
    let mut disk = storage(bytes).disk::<Qcow2>(IMAGE).map_err(|error| error.to_string())?;
    for number in clusters {
        let start = number * shape.cluster;
        let end = (start + shape.cluster).min(made.content.len());
        let mut buffer = vec![0xa5; end - start];
        disk.read_over(made.template.size, start as u64, &mut buffer, &mut |_, to| to.fill(0))
            .map_err(|error| format!("cluster {number} of the disk cannot be read: {error}"))?;
        if buffer != made.content[start..end] {
            return Err(format!("cluster {number} of the disk reads as something else"));
        }
    }
    Ok(())
}

/// Where QEMU finds nothing and we do, in words that our findings have.
const STRICTER: &[&str] = &["reserved bits are set", "the offset in the disk"];

fn run_seed(seed: u64, made: &[Made], directory: &Path, log: &Mutex<[usize; 4]>) -> Result<(), String> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    let made = &made[random.below(made.len() as u64) as usize];
    let shape = shape(&made.image);
    let mut bytes = made.image.clone();
    let places = damage(&mut bytes, &shape, &mut random);
    let name = made.template.name;
    let context = |what: String| format!("{name}: {what}\ndamage at {places:x?}");

    let theirs = qemu_check(directory, &bytes);
    let report = match check(&bytes) {
        Ok(report) => report,
        // Only what the header itself says can be an error.
        Err(error) => return Err(context(format!("an error: {error}"))),
    };
    let clean = (report.corruptions, report.leaks) == (0, 0);
    if clean != report.findings.is_empty() || report.findings.len() > 100 {
        return Err(context(format!("{} lines for {report:?}", report.findings.len())));
    }
    let theirs_clean = theirs.as_ref().is_some_and(Theirs::is_clean);
    let stricter = report.findings.iter().any(|line| STRICTER.iter().any(|word| line.contains(word)));
    if clean != theirs_clean && !(stricter && theirs_clean) {
        return Err(context(format!("QEMU finds {theirs:?}, and we {report:?}")));
    }
    log.lock().unwrap()[usize::from(clean)] += 1;
    let good = undamaged(&made.image, &shape, &places, made.content.len());

    // Only leaks: nothing is lost, whatever is damaged.
    let (leaks, after) = repair(&bytes, Repair::Leaks);
    let had = same(&bytes, made, &shape, &good);
    if had.is_ok() {
        same(&after, made, &shape, &good).map_err(|why| context(format!("after leaks: {why}")))?;
    }
    if leaks.corruptions == 0 && left(&leaks) != (0, 0) {
        return Err(context(format!("leaks are left: {leaks:?}")));
    }

    // Everything.
    let disk = storage(&bytes);
    let all = Qcow2::check(disk.file(IMAGE, Access::ReadWrite), Some(Repair::All)).unwrap();
    let after = disk.bytes(IMAGE);
    let again = check(&after).unwrap();
    if left(&all) != (again.corruptions, again.leaks) {
        return Err(context(format!("it reports {all:?}, and leaves {again:?}")));
    }
    let theirs = qemu_check(directory, &after);
    if left(&all) != (0, 0) || !theirs.as_ref().is_some_and(Theirs::is_clean) {
        return Err(context(format!("after the repair QEMU finds {theirs:?}, and we {all:#?} and then {again:#?}")));
    }
    let theirs = theirs.unwrap();
    let mine = ours(&again);
    if (mine.allocated, mine.compressed, mine.end) != (theirs.allocated, theirs.compressed, theirs.end) {
        return Err(context(format!("after the repair QEMU counts {theirs:?}, and we {mine:?}")));
    }
    same(&after, made, &shape, &good).map_err(|why| context(format!("after the repair: {why}\n{all:#?}")))?;

    // The power fails in the middle of it.
    let changes = disk.take_changes(IMAGE);
    for _ in 0..2 {
        let cut = random.below(changes.len() as u64 + 1) as usize;
        let cut_off = torn(&bytes, &changes[..cut], &mut random);
        let context = |why: String| context(format!("cut at {cut} of {}: {why}", changes.len()));
        if had.is_ok() {
            same(&cut_off, made, &shape, &good).map_err(context)?;
        }
        let (second, after) = repair(&cut_off, Repair::All);
        let theirs = qemu_check(directory, &after);
        if left(&second) != (0, 0) || !theirs.as_ref().is_some_and(Theirs::is_clean) {
            return Err(context(format!("repaired again: {theirs:?} {second:#?}")));
        }
        same(&after, made, &shape, &good).map_err(|why| context(format!("repaired again: {why}")))?;
        log.lock().unwrap()[2] += 1;
    }
    Ok(())
}

#[test]
fn damaged_images_are_found_and_repaired() {
    if !have_qemu() {
        return;
    }
    // With external data files the content is elsewhere, and with so few bits counts cannot grow.
    let made: Vec<Made> = TEMPLATES
        .iter()
        .filter(|template| !["data-file", "data-file-raw", "bits2", "nothing"].contains(&template.name))
        .map(|template| make(&Lab::new(), template))
        .collect();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("CHECK_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("CHECK_SEEDS").unwrap_or(300)).collect(),
    };
    let next = AtomicUsize::new(0);
    let (log, violations) = (Mutex::new([0; 4]), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let directory = tempfile::tempdir().unwrap();
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = std::panic::catch_unwind(|| run_seed(*seed, &made, directory.path(), &log));
                    if let Err(why) = outcome.unwrap_or_else(|_| Err("a panic, see above".to_owned())) {
                        violations.lock().unwrap().push((*seed, why));
                    }
                }
            });
        }
    });
    let mut violations = violations.into_inner().unwrap();
    violations.sort();
    let [damaged, clean, cuts, _] = log.into_inner().unwrap();
    eprintln!("damaged {damaged}, still clean {clean}, cuts {cuts}, violations {}", violations.len());
    if let Some((seed, why)) = violations.first() {
        let all: Vec<u64> = violations.iter().map(|(seed, _)| *seed).take(50).collect();
        panic!("{} seeds violate; the first, CHECK_SEED={seed}: {why}\nall: {all:?}", violations.len());
    }
    assert!(number("CHECK_SEED").is_some() || damaged > clean, "most damage is noticed");
}

/// An image by hand with right counts. Clusters as `Handmade` says; 7 is free.
fn handmade() -> Handmade {
    let mut image = Handmade::v3();
    for cluster in 0..7 {
        set_count(&mut image, cluster, 1);
    }
    image
}

fn set_count(image: &mut Handmade, cluster: usize, count: u16) {
    let at = image.at(2) + 2 * cluster;
    image.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
}

fn changed(change: impl FnOnce(&mut Handmade)) -> Vec<u8> {
    let mut image = handmade();
    change(&mut image);
    image.bytes
}

/// What a person is told, and what comes of it.
#[test]
fn each_contradiction_is_named_and_repaired() {
    type Case = (&'static str, fn(&mut Handmade), (u64, u64), &'static [&'static str]);
    let cases: &[Case] = &[
        ("nothing", |_| {}, (0, 0), &[]),
        ("leak", |i| set_count(i, 7, 3), (0, 1), &["0x70000: leak: the count is 3, references are 0"]),
        (
            "count too high",
            |i| set_count(i, 5, 2),
            (1, 1),
            &["0x50000: leak: the count is 2, references are 1", "flag COPIED is set", "the count of 0x50000 is 2"],
        ),
        (
            "count too low",
            |i| set_count(i, 5, 0),
            (2, 0),
            &["0x50000: corrupt: the count is 0, references are 1", "flag COPIED is set"],
        ),
        (
            "two owners",
            |i| {
                i.l2(2, i.cluster(5) | COPIED);
            },
            (1, 0),
            &["0x50000: corrupt: the count is 1, references are 2"],
        ),
        (
            "flag missing in L2",
            |i| {
                i.l2(0, i.cluster(5));
            },
            (1, 0),
            &["L2 table at 0x40000, entry 0 is 0x0000000000050000: the flag COPIED is not set"],
        ),
        (
            "flag missing in L1",
            |i| {
                i.be64(i.at(3), i.cluster(4));
            },
            (1, 0),
            &["L1 table, entry 0 is 0x0000000000040000: the flag COPIED is not set"],
        ),
        (
            "reserved bits in L2",
            |i| {
                i.l2(0, i.cluster(5) | COPIED | 2);
            },
            (1, 0),
            &["entry 0 is 0x8000000000050002: reserved bits are set", "they are cleared"],
        ),
        (
            "data outside",
            |i| {
                i.l2(0, 0x100_0000 | COPIED);
            },
            (1, 1),
            &["the cluster is past the end of the file", "the data is lost, and reads as zero"],
        ),
        (
            "data not aligned",
            |i| {
                i.l2(0, 0x5_0200 | COPIED);
            },
            (1, 1),
            &["not a multiple of the cluster size", "the data is lost, and reads as zero"],
        ),
        (
            "zero cluster not aligned",
            |i| {
                i.l2(0, 0x5_0200 | COPIED | 1);
            },
            (1, 1),
            &["not a multiple of the cluster size", "it has no data"],
        ),
        (
            "table outside",
            |i| {
                i.be64(i.at(3), 0x100_0000 | COPIED);
            },
            (1, 3),
            &["the table is past the end of the file", "what it described is lost"],
        ),
        (
            "compressed outside",
            |i| {
                i.l2(0, 1 << 62 | 0x100_0000);
            },
            (1, 1),
            &["the compressed data is past the end of the file"],
        ),
        (
            "no refcount block",
            |i| {
                i.be64(i.at(1), 0);
            },
            (6 + 3, 0),
            &["the count is 0, references are 1", "a new refcount structure was made"],
        ),
        (
            "refcount block outside",
            |i| {
                i.be64(i.at(1), 0x100_0000);
            },
            (1 + 6 + 3, 0),
            &["refcount table, entry 0 is 0x0000000001000000: the block is past the end", "a new refcount structure"],
        ),
        (
            "refcount block not aligned",
            |i| {
                i.be64(i.at(1), 0x2_0200);
            },
            (1 + 6 + 3, 0),
            &["entry 0 is 0x0000000000020200: the offset is not a multiple", "a new refcount structure"],
        ),
        (
            "refcount block that is data",
            |i| {
                i.l2(2, i.cluster(2));
            },
            (3, 0),
            &["2 references lead to the block at 0x20000", "a new refcount structure"],
        ),
        (
            "refcount table outside",
            |i| {
                i.be64(48, 0x100_0000);
            },
            // The old table and block are leaks nowhere: nothing counts them.
            (1 + 5 + 3, 0),
            &["the refcount table at 0x1000000 (65536 bytes) goes past the end", "a new refcount structure"],
        ),
    ];
    for (name, change, expected, words) in cases {
        let bytes = changed(change);
        let report = check(&bytes).unwrap();
        assert_eq!((report.corruptions, report.leaks), *expected, "{name}: {report:#?}");
        let (repaired, after) = repair(&bytes, Repair::All);
        assert_eq!((repaired.corruptions, repaired.leaks), *expected, "{name}");
        assert_eq!(left(&repaired), (0, 0), "{name}: {repaired:#?}");
        for word in *words {
            assert!(repaired.findings.iter().any(|line| line.contains(word)), "{name}: {word:?} in {repaired:#?}");
        }
        assert_eq!(repaired.findings.is_empty(), words.is_empty(), "{name}");
        let again = check(&after).unwrap();
        assert_eq!((again.corruptions, again.leaks), (0, 0), "{name}: {again:#?}");
        // What was not damaged is there.
        let mut disk = storage(&after).disk::<Qcow2>(IMAGE).unwrap();
        if *name != "table outside" {
            assert!(disk.read(65536, 65536).unwrap() == material(65536, 2), "{name}");
        }
        if have_qemu() {
            let theirs = qemu_check(tempfile::tempdir().unwrap().path(), &after).unwrap();
            assert!(theirs.is_clean(), "{name}: {theirs:?}");
        }
    }
}

/// A cluster has one place in an external data file, which is known: no data is given up for an entry that says another
/// one, or none.
#[test]
fn data_in_an_external_data_file_is_where_it_is_in_the_disk() {
    const PLACE: u64 = 1 << 16 | 1 << 63;
    for (extended, number, entry, bitmap) in [
        (false, 1, PLACE + 0x1000, 0),
        (false, 1, PLACE + (3 << 16), 0),
        (true, 1, PLACE + 0x1000, 3),
        (true, 1, PLACE + (3 << 16), 3),
        (true, 1, 0, 3),
        (true, 0, 0, 3),
        (true, 0, PLACE, 3),
    ] {
        let image = changed(|image| {
            image.extensions(104, &[(0x4441_5441, b"d.raw")]);
            image.be64(72, if extended { 1 << 4 | 1 << 2 } else { 1 << 2 });
            for number in 0..2 {
                set_count(image, 5 + number, 0);
                image.l2(number, 0);
            }
            if extended {
                image.extended(number, entry, bitmap)
            } else {
                image.l2(number, entry)
            };
        });
        let (report, repaired) = repair(&image, Repair::All);
        let seen = format!("{number}: {entry:#x}: {report:?}");
        assert_eq!((report.corruptions, report.corruptions_repaired, left(&report)), (1, 1, (0, 0)), "{seen}");
        let at = Handmade::v3().at(4) + number * if extended { 16 } else { 8 };
        assert_eq!(be(&repaired, at), (number as u64) << 16 | 1 << 63, "{seen}");
        assert!(!extended || be(&repaired, at + 8) == bitmap, "{seen}");
        assert_eq!(check(&repaired).unwrap().corruptions, 0, "{seen}");
    }
}

/// Stricter than QEMU, where readers of both refuse.
#[test]
fn flags_that_the_version_does_not_have() {
    let mut image = Handmade::new(2, 16, 8);
    for cluster in 0..7 {
        set_count(&mut image, cluster, 1);
    }
    image.l2(0, image.cluster(5) | COPIED | 1);
    let (report, after) = repair(&image.bytes, Repair::All);
    assert_eq!((report.corruptions, left(&report)), (1, (0, 0)), "{report:#?}");
    let mut disk = storage(&after).disk::<Qcow2>(IMAGE).unwrap();
    assert!(disk.read(0, 65536).unwrap() == material(65536, 1));

    let extended = |entry: u64, bitmap: u64| {
        let mut image = handmade();
        let [first, second] = [5, 6].map(|cluster| image.cluster(cluster) | COPIED);
        image.be64(72, 16).extended(0, first | entry, bitmap).extended(1, second, u64::from(u32::MAX));
        image.bytes
    };
    for (entry, bitmap, word) in
        [(1, u64::from(u32::MAX), "reserved bits"), (0, 1 << 32 | u64::from(u32::MAX), "both data and zero")]
    {
        let bytes = extended(entry, bitmap);
        let (report, after) = repair(&bytes, Repair::All);
        assert_eq!((report.corruptions, left(&report)), (1, (0, 0)), "{report:#?}");
        assert!(report.findings[0].contains(word), "{report:#?}");
        let mut disk = storage(&after).disk::<Qcow2>(IMAGE).unwrap();
        assert!(disk.read(0, 65536).unwrap() == material(65536, 1), "{word}");
    }
    // What was lost reads as zero, and what is in the backing file stays there.
    let bytes = extended(0x200, 0x0f00_0000_0000_000f);
    let (_, after) = repair(&bytes, Repair::All);
    assert_eq!(be(&after, 4 * 65536 + 8), 0x0f00_000f_0000_0000);
    assert_eq!(be(&after, 4 * 65536), 0);
}

/// Giving space free cannot lose anything: not where somebody may own it whose entry cannot be read.
#[test]
fn leaks_are_left_alone_while_entries_are_broken() {
    let bytes = changed(|i| {
        i.l2(0, 0x100_0000 | COPIED);
        set_count(i, 7, 1);
    });
    let storage = storage(&bytes);
    let report = Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(Repair::Leaks)).unwrap();
    assert_eq!((report.corruptions, report.leaks, left(&report)), (1, 2, (1, 2)));
    assert!(storage.take_changes(IMAGE).is_empty());
    assert!(report.findings.iter().any(|line| line.contains("leaks are left alone")), "{report:#?}");

    // A count that is too low hides nothing.
    let bytes = changed(|i| {
        set_count(i, 5, 0);
        set_count(i, 7, 1);
    });
    let (report, after) = repair(&bytes, Repair::Leaks);
    assert_eq!((report.corruptions, report.leaks, left(&report)), (2, 1, (2, 0)));
    assert_eq!(after[2 * 65536 + 10..][..2], [0, 0], "that is for a repair of everything");
    // With right counts the flags become right too.
    let (report, _) = repair(&changed(|i| set_count(i, 5, 2)), Repair::Leaks);
    assert_eq!((report.corruptions, report.leaks, left(&report)), (1, 1, (0, 0)));
}

#[test]
fn marks_go_only_when_all_is_right() {
    let marks = |bytes: &[u8]| be(bytes, 72);
    for mark in [1, 2, 3] {
        for what in [Repair::Leaks, Repair::All] {
            let bytes = changed(|i| {
                i.be64(72, mark);
                set_count(i, 7, 1);
            });
            assert_eq!(check(&bytes).unwrap().leaks, 1, "marked images are checked");
            let (report, after) = repair(&bytes, what);
            assert_eq!((left(&report), marks(&after)), ((0, 0), 0));
            // Nothing but the mark.
            let (_, after) = repair(&changed(|i| _ = i.be64(72, mark)), what);
            assert!(after == handmade().bytes);
        }
        let bytes = changed(|i| {
            i.be64(72, mark).l2(0, 0x100_0000 | COPIED);
        });
        let (report, after) = repair(&bytes, Repair::Leaks);
        assert_eq!((left(&report), marks(&after)), ((1, 1), mark));
        assert!(report.findings.last().unwrap().contains("stays marked"), "{report:#?}");
        let (report, after) = repair(&bytes, Repair::All);
        assert_eq!((left(&report), marks(&after)), ((0, 0), 0));
    }
    // Whoever changes an image clears the autoclear bits that it does not know; nobody else does.
    for (count, expected) in [(0, 1 << 40), (1, 0)] {
        let bytes = changed(|i| {
            i.be64(88, 1 << 40);
            set_count(i, 7, count);
        });
        assert_eq!(be(&repair(&bytes, Repair::All).1, 88), expected);
    }
    // Snapshots that cannot be read: what they need is not known, and nothing is given free.
    let bytes = changed(|i| {
        i.be64(72, 3).be32(60, 1).be64(64, 0x100_0000);
        set_count(i, 5, 0);
        set_count(i, 7, 1);
    });
    let (report, after) = repair(&bytes, Repair::All);
    assert_eq!(marks(&after), 3);
    // The flag of the cluster is right again, with its count.
    assert_eq!((report.corruptions, report.leaks, left(&report)), (3, 1, (1, 1)), "{report:#?}");
    assert_eq!(after[2 * 65536 + 10..][..6], [0, 1, 0, 1, 0, 1], "counts that are too low are raised all the same");
}

/// A dirty image is repaired when writing begins: its counts may be wrong.
#[test]
fn dirty_images_are_repaired_before_they_are_written() {
    let bytes = changed(|i| {
        i.be64(72, 1);
        for cluster in 0..7 {
            set_count(i, cluster, 0);
        }
    });
    let storage = storage(&bytes);
    let mut disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(())).unwrap();
    disk.format.begin().unwrap();
    assert_eq!(be(&storage.bytes(IMAGE), 72), 0);
    disk.write_over(65536, &[9; 512], &mut |_, to| to.fill(0)).unwrap();
    disk.write_over(2 * 65536, &[9; 65536], &mut |_, to| to.fill(0)).unwrap();
    disk.flush().unwrap();
    disk.format.finish().unwrap();
    let report = check(&storage.bytes(IMAGE)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    assert!(disk.read(0, 65536).unwrap() == material(65536, 1));

    let bytes = changed(|i| {
        i.be64(72, 1).be32(60, 1).be64(64, 0x100_0000);
    });
    let mut disk = self::storage(&bytes).disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(())).unwrap();
    let error = disk.format.begin().unwrap_err();
    assert!(error.text().contains("marked dirty") && error.text().contains("snapshots"), "{error}");
}

#[test]
fn a_header_that_cannot_be_used_is_an_error() {
    for (at, value) in [(0, 0), (4, 9), (20, 40), (32, 1)] {
        let bytes = changed(|i| {
            i.be32(at, value);
        });
        assert!(check(&bytes).is_err());
    }
}

#[test]
fn findings_are_a_page_or_two() {
    let bytes = changed(|i| {
        for index in 0..8192 {
            i.l2(index, 2);
        }
    });
    let report = check(&bytes).unwrap();
    assert_eq!((report.corruptions, report.findings.len()), (8192, 100));
    let (report, _) = repair(&bytes, Repair::All);
    assert_eq!((left(&report), report.findings.len()), ((0, 0), 100));
    assert!(report.findings.last().unwrap().contains("(8192): they are cleared"), "{report:#?}");
}

/// Tables that are named again and again: each is read once. Else this does not end.
#[test]
fn time_does_not_depend_on_how_often_tables_are_named() {
    // 4 Mi L1 entries with one L2 table of 64 KiB, and 60000 snapshots with the same L1 table.
    let mut image = handmade();
    let (l1, snapshots) = (8 << 16, (8 << 16) + (32 << 20));
    image.bytes.resize(snapshots + (4 << 20), 0);
    image.be64(40, l1 as u64).be32(36, 4 << 20).be32(60, 60000).be64(64, snapshots as u64);
    for entry in 0..4usize << 20 {
        let table = image.cluster(4);
        image.be64(l1 + 8 * entry, table | COPIED);
    }
    for number in 0..60000 {
        let at = snapshots + 56 * number;
        image.be64(at, l1 as u64).be32(at + 8, 4 << 20).be32(at + 36, 16);
    }
    let report = check(&image.bytes).unwrap();
    let clusters_of_l1 = (32 << 20) / 65536;
    // The L1 table, the snapshot table, the L2 table and its data; flags of the L1 table say nothing wrong.
    assert_eq!(report.corruptions, clusters_of_l1 + 52 + 3, "{:#?}", &report.findings[..3]);
    assert_eq!(report.allocated_clusters, 2 * (4 << 20));

    // Snapshots of which each starts a cluster after the one before.
    let mut image = handmade();
    let (first, count) = (8 << 16, 250usize);
    let snapshots = first + (count << 17);
    image.bytes.resize(snapshots + (1 << 20), 0);
    image.be32(60, count as u32).be64(64, snapshots as u64);
    for number in 0..count {
        let at = snapshots + 56 * number;
        image.be64(at, (first + (number << 16)) as u64).be32(at + 8, (count << 13) as u32).be32(at + 36, 16);
    }
    let report = check(&image.bytes).unwrap();
    // A cluster in the middle belongs to all of them.
    assert!(report.findings.iter().any(|line| line.contains("references are 9")), "{:#?}", &report.findings[..20]);
    assert_eq!(report.leaks, 0);
}

/// Storage that fails: an error, and the next repair goes on.
#[test]
fn a_repair_that_fails_can_be_done_again() {
    let bytes = changed(|i| {
        i.be64(i.at(1), 0x100_0000).l2(3, 0x100_0000).be64(72, 1);
    });
    let mut failures = 0;
    for healthy in 0.. {
        let storage = storage(&bytes);
        storage.fail_after(IMAGE, Some(healthy));
        let result = Qcow2::check(storage.file(IMAGE, Access::ReadWrite), Some(Repair::All));
        storage.fail_after(IMAGE, None);
        if result.is_ok() {
            break;
        }
        failures += 1;
        let state = check(&storage.bytes(IMAGE)).unwrap();
        let clean = (state.corruptions, state.leaks) == (0, 0);
        assert!(be(&storage.bytes(IMAGE), 72) == 1 || clean, "it stays marked: {state:#?}");
        let (report, after) = repair(&storage.bytes(IMAGE), Repair::All);
        assert_eq!((left(&report), be(&after, 72)), ((0, 0), 0));
        let mut disk = self::storage(&after).disk::<Qcow2>(IMAGE).unwrap();
        assert!(disk.read(0, 65536).unwrap() == material(65536, 1), "{healthy}");
    }
    assert!(failures > 8, "{failures}");
}

/// Damaged bitmaps are given up, not kept half.
#[test]
fn damaged_bitmaps_are_given_up() {
    if !have_qemu() {
        return;
    }
    let template = TEMPLATES.iter().find(|template| template.name == "bitmaps").unwrap();
    let made = make(&Lab::new(), template);
    let directory = tempfile::tempdir().unwrap();
    let table = shape(&made.image).others[1];
    let mut bytes = made.image.clone();
    bytes[table..table + 8].copy_from_slice(&2u64.to_be_bytes());
    assert!(!qemu_check(directory.path(), &bytes).is_some_and(|theirs| theirs.is_clean()));
    let (report, after) = repair(&bytes, Repair::All);
    assert_eq!(left(&report), (0, 0), "{report:#?}");
    assert!(report.findings.iter().any(|line| line.contains("bitmaps are damaged")), "{report:#?}");
    assert_eq!(be(&after, 88), 0, "they are not promised any more");
    assert!(qemu_check(directory.path(), &after).unwrap().is_clean());
    // Bitmaps that are not promised are leaks, as for QEMU.
    let mut bytes = made.image.clone();
    bytes[88..96].fill(0);
    let report = check(&bytes).unwrap();
    assert_eq!(ours(&report), qemu_check(directory.path(), &bytes).unwrap());
    assert!(report.leaks > 2);
}

/// The end of the file is missing.
#[test]
fn truncated_images_are_repaired() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut repaired = 0;
    for template in TEMPLATES.iter().filter(|template| template.size > 0 && !template.name.starts_with("data-file")) {
        let made = make(&Lab::new(), template);
        let mut random = Random(77);
        for _ in 0..8 {
            let length = random.below(made.image.len() as u64) as usize;
            let length = if random.below(2) == 0 { length } else { length.next_multiple_of(512) };
            let bytes = &made.image[..length.min(made.image.len())];
            let Ok(report) = check(bytes) else { continue };
            let theirs = qemu_check(directory.path(), bytes);
            let clean = (report.corruptions, report.leaks) == (0, 0);
            let short = report.findings.iter().any(|line| line.contains("goes past the end"));
            assert!(
                clean == theirs.as_ref().is_some_and(Theirs::is_clean) || short,
                "{} of {length}: {theirs:?} {report:#?}",
                template.name
            );
            let (report, after) = repair(bytes, Repair::All);
            if report.findings.iter().any(|line| line.contains("snapshot")) {
                continue;
            }
            assert_eq!(left(&report), (0, 0), "{} of {length}: {report:#?}", template.name);
            let theirs = qemu_check(directory.path(), &after).unwrap();
            assert!(theirs.is_clean(), "{} of {length}: {theirs:?} {report:#?}", template.name);
            repaired += 1;
        }
    }
    assert!(repaired > 20, "{repaired}");
}
