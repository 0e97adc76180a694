//! What writing costs besides the data: the same work through Blockhouse and through QEMU, and the write
//! calls on the image file counted.
//!
//! Both run under strace, each in a process of its own: Blockhouse's is this test program, started again
//! with [`SUBJECT`] set. A call is data if it writes where a cluster of the disk lies in the end, which
//! `qemu-img map` says; all else is metadata.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::Command;

use blockhouse_sandbox::block::BlockBackend;
use blockhouse_tests::{noise, on_path, skip};

use crate::{Place, Random, qemu_img, run, write};

/// The image that a second process writes, in a directory of ours.
const SUBJECT: &str = "WRITES_AMPLIFICATION_SUBJECT";

const MIB: u64 = 1 << 20;

/// One request of a guest.
#[derive(Clone, Copy)]
enum Request {
    Write(u64, u64),
    Flush,
}

/// Work that allocates.
struct Work {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// Calls that Blockhouse may make more than QEMU.
    more: u64,
    requests: fn() -> Vec<Request>,
}

/// Writes of `length` bytes from the start, and a flush after each `every` bytes.
fn sequential(total: u64, length: u64, every: u64) -> Vec<Request> {
    let mut requests = Vec::new();
    for offset in (0..total).step_by(length as usize) {
        requests.push(Request::Write(offset, length));
        if (offset + length).is_multiple_of(every) {
            requests.push(Request::Flush);
        }
    }
    requests
}

/// Writes of 4 KiB, each to a cluster that has no space yet, and a flush after each 64.
fn random(size: u64, cluster: u64, count: u64) -> Vec<Request> {
    let mut random = Random(7);
    let mut taken = std::collections::BTreeSet::new();
    let mut requests = Vec::new();
    while (taken.len() as u64) < count {
        let number = random.below(size / cluster);
        if !taken.insert(number) {
            continue;
        }
        requests.push(Request::Write(number * cluster + random.below(cluster / 4096) * 4096, 4096));
        if taken.len().is_multiple_of(64) {
            requests.push(Request::Flush);
        }
    }
    requests
}

const WORK: &[Work] = &[
    Work {
        name: "128 MiB by 64 KiB, a flush each 8 MiB",
        options: "cluster_size=64k",
        size: 1 << 30,
        more: 0,
        requests: || sequential(128 * MIB, 64 << 10, 8 * MIB),
    },
    Work {
        name: "128 MiB by 1 MiB, a flush each 32 MiB",
        options: "cluster_size=64k",
        size: 1 << 30,
        more: 0,
        requests: || sequential(128 * MIB, MIB, 32 * MIB),
    },
    Work {
        name: "64 MiB by 64 KiB, a flush each 4 MiB",
        options: "cluster_size=4k",
        size: 1 << 30,
        more: 0,
        requests: || sequential(64 * MIB, 64 << 10, 4 * MIB),
    },
    Work {
        name: "128 MiB by 1 MiB, a flush each 32 MiB",
        options: "cluster_size=2M",
        size: 1 << 30,
        // A new table is written in 32 pieces of 64 KiB: once for each 512 GiB of the disk.
        more: 31,
        requests: || sequential(128 * MIB, MIB, 32 * MIB),
    },
    Work {
        name: "2048 times 4 KiB at random, a flush each 64",
        options: "cluster_size=64k",
        size: 8 << 30,
        more: 0,
        requests: || random(8 << 30, 64 << 10, 2048),
    },
    Work {
        name: "2048 times 4 KiB at random, a flush each 64",
        options: "cluster_size=4k",
        size: 1 << 30,
        more: 0,
        requests: || random(1 << 30, 4 << 10, 2048),
    },
    Work {
        name: "2048 times 4 KiB at random, a flush each 64",
        options: "cluster_size=64k,extended_l2=on",
        size: 8 << 30,
        more: 0,
        requests: || random(8 << 30, 64 << 10, 2048),
    },
];

/// Calls that change a file, and the bytes they did it to.
#[derive(Clone, Copy, Default)]
struct Calls {
    count: u64,
    bytes: u64,
}

impl Calls {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }

    /// For each GiB that was allocated.
    fn per_gib(self, allocated: u64) -> Self {
        let scale = |number: u64| number * (1 << 30) / allocated.max(1);
        Self { count: scale(self.count), bytes: scale(self.bytes) }
    }
}

impl fmt::Display for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} calls, {} KiB", self.count, self.bytes >> 10)
    }
}

/// What one program did to its image.
#[derive(Default)]
struct Cost {
    metadata: Calls,
    data: Calls,
    /// Bytes of clusters that the disk has in the end.
    allocated: u64,
}

/// The clusters of the disk in the image file: where each run starts, and where it ends.
fn clusters(image: &Path) -> BTreeMap<u64, u64> {
    let text = qemu_img(["map", "-f", "qcow2", "--output=json", image.to_str().unwrap()]);
    let runs: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut clusters = BTreeMap::new();
    for run in runs.as_array().unwrap() {
        if let Some(offset) = run["offset"].as_u64() {
            clusters.insert(offset, offset + run["length"].as_u64().unwrap());
        }
    }
    clusters
}

/// One line of strace as the call, its arguments and its result, if it has all of them.
fn parse(line: &str) -> Option<(&str, Vec<&str>, u64)> {
    let (call, rest) = line.split_once('(')?;
    // The result is in a column of its own where the call is short.
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let arguments = arguments.trim_end().strip_suffix(')')?;
    let result = result.split_whitespace().next()?.parse().ok()?;
    Some((call.trim(), arguments.split(", ").collect(), result))
}

/// Runs a command under strace, and adds up what it did to the image.
fn measure(place: &Place, image: &str, command: &[&str], environment: &[(&str, &str)]) -> Cost {
    let trace = place.path("trace");
    let path = std::fs::canonicalize(place.path(image)).unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-s", "0", "-o"]).arg(&trace).args([
        "-e",
        "trace=write,writev,pwrite64,pwritev,pwritev2,fallocate",
        "-e",
        "signal=none",
    ]);
    strace.args(command).envs(environment.iter().copied()).current_dir(place.directory.path());
    run(&mut strace).succeeded();

    let mut cost = Cost::default();
    let clusters = clusters(&path);
    cost.allocated = clusters.iter().map(|(start, end)| end - start).sum();
    let of_image = format!("<{}>", path.display());
    // Calls that were going on when strace had to tell of another thread.
    let mut unfinished: BTreeMap<&str, &str> = BTreeMap::new();
    let text = std::fs::read_to_string(&trace).unwrap();
    for line in text.lines() {
        let Some((thread, line)) = line.split_once(' ') else { continue };
        let line = line.trim_start();
        let whole;
        let line = if let Some(start) = line.strip_suffix(" <unfinished ...>") {
            unfinished.insert(thread, start);
            continue;
        } else if let Some(resumed) = line.strip_prefix("<... ") {
            let Some(start) = unfinished.remove(thread) else { continue };
            whole = format!("{start}{}", resumed.split_once("resumed>").unwrap().1);
            &whole
        } else {
            line
        };
        if !line.contains(&of_image) {
            continue;
        }
        let Some((call, arguments, result)) = parse(line) else {
            // Refused by the file system, and then done in another way.
            assert!(line.contains(" = -1"), "not understood: {line}");
            continue;
        };
        let number = |at: usize| arguments[at].trim().parse::<u64>().unwrap_or_else(|_| panic!("{line}"));
        let (offset, bytes) = match call {
            "pwrite64" | "pwritev" => (number(arguments.len() - 1), result),
            "pwritev2" => (number(arguments.len() - 2), result),
            "fallocate" => (number(2), number(3)),
            _ => panic!("a write without an offset: {line}"),
        };
        let in_cluster = clusters.range(..=offset).next_back().is_some_and(|(_, end)| offset < *end);
        if in_cluster { cost.data.add(bytes) } else { cost.metadata.add(bytes) }
    }
    cost
}

/// The part of the second process: `requests` on the image at `path`.
fn subject(path: &Path, requests: &[Request]) {
    let place = Place::new();
    // The component is the same; the image is in the directory of the first process.
    let disk = place.open(path.to_str().unwrap());
    let mut bytes = noise(1, MIB as usize);
    for request in requests {
        match *request {
            Request::Write(offset, length) => write(&disk, offset, &mut bytes[..length as usize]),
            Request::Flush => disk.flush().unwrap(),
        }
    }
    disk.close().unwrap();
}

#[test]
fn metadata_costs_no_more_than_with_qemu() {
    if let Some(path) = std::env::var_os(SUBJECT) {
        let work = std::env::var("WRITES_AMPLIFICATION_WORK").unwrap().parse::<usize>().unwrap();
        return subject(Path::new(&path), &(WORK[work].requests)());
    }
    if !on_path("strace") {
        return skip("strace is not installed");
    }
    let place = Place::new();
    let test = std::env::current_exe().unwrap();
    for (number, Work { name, options, size, more, requests }) in WORK.iter().enumerate() {
        for image in ["ours.qcow2", "theirs.qcow2"] {
            place.qemu_img(&format!("create -q -f qcow2 -o {options} {image} {size}"));
        }
        let path = place.path("ours.qcow2");
        let ours = measure(
            &place,
            "ours.qcow2",
            &[test.to_str().unwrap(), "--exact", "amplification::metadata_costs_no_more_than_with_qemu"],
            &[(SUBJECT, path.to_str().unwrap()), ("WRITES_AMPLIFICATION_WORK", &number.to_string())],
        );

        let mut command: Vec<String> =
            ["qemu-io", "-f", "qcow2", "-t", "writeback", "-i", "threads", "theirs.qcow2"].map(str::to_owned).into();
        let mut written = 0;
        for request in requests() {
            command.push("-c".to_owned());
            command.push(match request {
                Request::Write(offset, length) => {
                    written += length;
                    format!("write -q -P 7 {offset} {length}")
                }
                Request::Flush => "flush".to_owned(),
            });
        }
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let theirs = measure(&place, "theirs.qcow2", &command, &[]);

        eprintln!("amplification: {options}, {name}");
        for (who, cost) in [("Blockhouse", &ours), ("QEMU", &theirs)] {
            eprintln!(
                "  {who:<10} metadata {} (for each GiB: {}); data {}; {} MiB allocated",
                cost.metadata,
                cost.metadata.per_gib(cost.allocated),
                cost.data,
                cost.allocated >> 20
            );
        }
        assert!(ours.data.bytes >= written && theirs.data.bytes >= written, "strace does not see all writes");
        assert_eq!(ours.allocated, theirs.allocated, "the same work allocates as much");
        let (ours, theirs) = (ours.metadata, theirs.metadata);
        assert!(ours.count <= theirs.count + more, "{options}, {name}: {ours}, QEMU {theirs}");
        assert!(ours.bytes <= theirs.bytes, "{options}, {name}: {ours}, QEMU {theirs}");
    }
}
