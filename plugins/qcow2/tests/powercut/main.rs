//! Power cuts: random sequences of operations, and for each many of the states that a power cut could leave.
//!
//! ```text
//!   seed ─▶ operations (run.rs) ─▶ changes of the files ─▶ states after cuts (states.rs) ─▶ judged (judge.rs)
//!                                                             │
//!                                   written again and closed ◀┘ ─▶ changes ─▶ states after cuts in the recovery
//! ```
//!
//! Of what reached a file after its last sync any part may be missing, sector by sector of 512 bytes. Each
//! state is checked and read back, and some are written again:
//!
//! * no corruption, ever; leaks are allowed;
//! * a sector holds what it held at the last acknowledged flush, or something written later;
//! * a snapshot holds what the disk held when it was made;
//! * after a recovery that is written, flushed and closed, everything is exact; a cut in the middle of it
//!   leaves the old or the new.
//!
//! The check is the component's own, which takes a part of a millisecond; one state in [`QEMU_EVERY`] goes
//! through `qemu-img check` too, and both have to find the same.
//!
//! `cargo xtask simulate` runs it for longer, through `POWERCUT_SEEDS` (how many), `POWERCUT_FIRST` (from
//! which one), `POWERCUT_SEED` (one of them), `POWERCUT_CUTS` (cuts of each) and `POWERCUT_JSON` (where the
//! outcome goes).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod images;
mod judge;
mod random;
mod run;
mod states;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::images::{Made, TEMPLATES};
use crate::judge::Tally;
use crate::support::have_qemu;

const SECTOR: usize = 512;
const IMAGE: &str = "/images/top.qcow2";
const DATA: &str = "/images/d.bin";
const BASE: &str = "/images/base.raw";
/// Without `POWERCUT_SEEDS`.
const SEEDS: u64 = 400;
/// Without `POWERCUT_CUTS`.
const CUTS: u64 = 48;
/// Of the states, one in so many is put to QEMU.
const QEMU_EVERY: u64 = 32;

#[test]
fn no_power_cut_damages_an_image() {
    if !have_qemu() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seeds: Vec<u64> = match number("POWERCUT_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = number("POWERCUT_FIRST").unwrap_or(0);
            (first..first + number("POWERCUT_SEEDS").unwrap_or(SEEDS)).collect()
        }
    };
    // Of dirty images that are repaired.
    blockhouse_plugin::testing::silence_log();
    let cuts = number("POWERCUT_CUTS").unwrap_or(CUTS) as usize;
    let started = Instant::now();
    let made: Vec<Made> = TEMPLATES.iter().map(images::make).collect();
    let next = AtomicUsize::new(0);
    let (tally, violations) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let directory = tempfile::tempdir().unwrap();
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = std::panic::catch_unwind(|| judge::run_seed(*seed, cuts, &made, directory.path()));
                    match outcome.unwrap_or_else(|_| Err("a panic, see above".to_owned())) {
                        Ok(found) => tally.lock().unwrap().add(&found),
                        Err(why) => violations.lock().unwrap().push((*seed, why)),
                    }
                }
            });
        }
    });
    let Tally { states, leaks, in_qemu, changes } = tally.into_inner().unwrap();
    let mut violations = violations.into_inner().unwrap();
    violations.sort();
    eprintln!(
        "{} seeds in {:.0} s, {changes} changes of files; {in_qemu} states went through qemu-img check, the others \
         through the component's own\nstates {states}, violations {}, leaks {leaks}",
        seeds.len(),
        started.elapsed().as_secs_f64(),
        violations.len(),
    );
    if let Some(file) = std::env::var_os("POWERCUT_JSON") {
        let rows: Vec<_> =
            violations.iter().map(|(seed, why)| serde_json::json!({ "seed": seed, "why": why })).collect();
        let outcome = serde_json::json!({
            "what": "cuts, the format in memory",
            "seeds": seeds.len(),
            "states": states,
            "states_in_qemu": in_qemu,
            "changes": changes,
            "leaks": leaks,
            "violations": rows,
        });
        std::fs::write(file, outcome.to_string()).unwrap();
    }
    if let Some((seed, why)) = violations.first() {
        panic!(
            "{} seeds violate; the first: {why}\nreplay: cargo xtask simulate --only format --seed {seed}\nall: {:?}",
            violations.len(),
            violations.iter().map(|(seed, _)| seed).take(50).collect::<Vec<_>>()
        );
    }
}
