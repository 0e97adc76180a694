//! Random sequences of operations on real disks, against a model of plain bytes, QEMU and imago.
//!
//! ```text
//!   seed ─▶ image (images.rs) + operations (operations.rs) ─▶ the disk: component, sandbox, files
//!                                    │                          │ each read, each reopening
//!                                    └─▶ model: a vector  ◀─── equal ───▶ qemu-img convert, imago
//!                                                                         qemu-img check: not even a leak
//! ```
//!
//! `SEQUENCES=N` says how many seeds are tried, `SEQUENCES=A..B` which ones; `SEQUENCE=S` replays one and
//! prints what it does. A sequence that fails is made shorter as long as it fails.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod images;
mod operations;
mod oracles;
mod sequence;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use blockhouse_sandbox::{Formats, Grants, Limits, Opener, Sandbox};
use blockhouse_tests::{component, on_path, scratch, skip};

use crate::images::Made;
use crate::operations::{Abilities, Operation, Random};

/// Without `SEQUENCES`.
const SEQUENCES: u64 = 400;
/// A sequence that fails is run so often, at most, to make it shorter.
const SHORTER_RUNS: usize = 200;

fn opener(directory: &Path) -> (Opener, Abilities) {
    let mut abilities = Abilities { resize: false, snapshots: false };
    let sandbox = Sandbox::new(Limits::default()).unwrap();
    let mut formats = Formats::new();
    for format in ["raw", "qcow2"] {
        let plugin = sandbox.load_file(&component(format)).unwrap();
        if format == "qcow2" {
            let exports = |ability: &str| plugin.inspection().exports.iter().any(|name| name.contains(ability));
            abilities = Abilities { resize: exports("/resizer"), snapshots: exports("/snapshot-editor") };
        }
        formats.add(format, plugin);
    }
    (Opener::new(&sandbox, formats).grants(Grants::new().allow(directory).unwrap()), abilities)
}

/// What was done, by name.
type Tally = BTreeMap<&'static str, u64>;

/// Runs one sequence; a panic is a failure like any other.
fn attempt(
    opener: &Opener,
    made: &Made,
    image: &Path,
    operations: &[Operation],
    verbose: bool,
) -> Result<Tally, String> {
    catch_unwind(AssertUnwindSafe(|| sequence::run(opener, made, image, operations, verbose)))
        .unwrap_or_else(|_| Err("a panic, see above".to_owned()))
}

/// Leaves out operations as long as the rest still fails.
fn shorten(
    opener: &Opener,
    made: &Made,
    image: &Path,
    mut operations: Vec<Operation>,
    mut why: String,
) -> (Vec<Operation>, String) {
    let mut runs = 0;
    let mut chunk = operations.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < operations.len() && runs < SHORTER_RUNS {
            let mut fewer = operations.clone();
            fewer.drain(at..(at + chunk).min(fewer.len()));
            runs += 1;
            match attempt(opener, made, image, &fewer, false) {
                Err(still) => (operations, why) = (fewer, still),
                Ok(_) => at += chunk,
            }
        }
        chunk /= 2;
    }
    (operations, why)
}

#[test]
fn random_sequences_agree_with_a_model_with_qemu_and_with_imago() {
    if !on_path("qemu-img") || !on_path("qemu-io") {
        return skip("qemu-img or qemu-io is not installed");
    }
    let number = |text: &str| text.parse::<u64>().expect("SEQUENCES and SEQUENCE are numbers");
    let replayed = std::env::var("SEQUENCE").ok().map(|text| number(&text));
    let seeds: Vec<u64> = match (replayed, std::env::var("SEQUENCES")) {
        (Some(seed), _) => vec![seed],
        (None, Ok(text)) => {
            let (from, to) = text.split_once("..").unwrap_or(("0", &text));
            (number(from)..number(to)).collect()
        }
        (None, Err(_)) => (0..SEQUENCES).collect(),
    };
    let directory = scratch();
    let (opener, abilities) = opener(directory.path());
    let made = images::make_all(directory.path());

    let started = Instant::now();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (tally, failures) = (Mutex::new(Tally::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for thread in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            let image = directory.path().join(format!("top-{thread}.qcow2"));
            let (opener, made, seeds) = (&opener, &made, &seeds);
            let (next, stop, tally, failures) = (&next, &stop, &tally, &failures);
            scope.spawn(move || {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let mut random = Random::new(*seed);
                    let made = &made[random.below(made.len() as u64) as usize];
                    let operations = operations::generate(&mut random, made, abilities);
                    match attempt(opener, made, &image, &operations, replayed.is_some()) {
                        Ok(done) => {
                            let mut tally = tally.lock().unwrap();
                            for (what, count) in done {
                                *tally.entry(what).or_default() += count;
                            }
                        }
                        Err(why) => {
                            let (operations, why) = shorten(opener, made, &image, operations, why);
                            let mut lines = String::new();
                            for operation in operations {
                                lines += &format!("\n    {operation:?}");
                            }
                            let mut failures = failures.lock().unwrap();
                            failures.push(format!("SEQUENCE={seed}, image {}: {why}{lines}", made.template.name));
                            stop.store(failures.len() >= 5, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let (tally, failures) = (tally.into_inner().unwrap(), failures.into_inner().unwrap());
    let took = started.elapsed().as_secs_f64();
    eprintln!(
        "simulation: {} sequences in {took:.0} s, {:.1} each second; {tally:?}; {abilities:?}",
        seeds.len(),
        seeds.len() as f64 / took
    );
    assert!(failures.is_empty(), "{} sequences failed\n{}", failures.len(), failures.join("\n\n"));
}
