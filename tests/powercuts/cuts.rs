//! Power cuts, seed by seed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use blockhouse_tests::target_directory;

use crate::images::TEMPLATES;
use crate::journal::{self, torn};
use crate::judge::{Bench, Subject};
use crate::plan::{Kind, Random};
use crate::workload::Case;
use crate::{have_tools, outcome, with_bench};

/// Without `SIM_SEEDS`.
const SEEDS: u64 = 24;
/// Cuts of each seed. What the first [`RECOVERIES`] of them leave is written again.
const CUTS: u64 = 12;
const RECOVERIES: u64 = 3;
/// Cuts in each recovery; and the state after it.
const RECOVERY_CUTS: u64 = 4;
/// Seeds that share a process: it takes longer to start than a seed takes.
const BATCH: usize = 12;

#[derive(Default)]
struct Tally {
    states: u64,
    leaks: u64,
    calls: u64,
    violations: Vec<(u64, String)>,
}

/// A state that is written again.
struct Left {
    seed: u64,
    case: Case,
    bytes: Vec<u8>,
    ids: Vec<u64>,
    /// How it came about.
    story: String,
}

/// Runs seeds in one process, and then the recoveries from what was left in another.
fn run_batch(bench: &Bench<'_>, seeds: &[u64], recording: Option<&Path>, tally: &mut Tally) {
    let mut cases = Vec::new();
    for seed in seeds {
        let template = Random::new(!*seed).below(TEMPLATES.len() as u64) as usize;
        let image = bench.image(&format!("seed-{seed}"), template);
        let made = &bench.made[template];
        cases.push((Case::new(image, template, *seed, Kind::Work), made.image.clone(), made.ids.clone()));
    }
    let name = format!("work-{}", seeds[0]);
    let trace = match recording {
        None => {
            let only: Vec<Case> = cases.iter().map(|(case, ..)| case.clone()).collect();
            journal::record(bench.directory, &name, &only, None)
        }
        Some(recording) => {
            let (case, initial, _) = &mut cases[0];
            case.image = std::fs::read_to_string(recording.join("path")).unwrap().into();
            *initial = std::fs::read(recording.join("initial.qcow2")).unwrap();
            recording.join("trace")
        }
    };
    let subjects = Subject::all(cases, journal::read(&trace));
    if !bench.below_is_unchanged() {
        tally.violations.push((seeds[0], format!("a file below was changed by one of {seeds:?}")));
    }

    let mut left = Vec::new();
    for (subject, seed) in subjects.iter().zip(seeds) {
        if recording.is_none() {
            subject.assert_is_complete();
        }
        tally.calls += subject.events.len() as u64;
        let mut violated = |why: String, cut: Option<usize>| {
            let mut why = format!("image {}: {why}{}", subject.template().name, subject.story(cut));
            if recording.is_none() && subject.case.plan().threads() > 1 {
                let kept = keep(*seed, subject, &trace, seeds);
                let _ = write!(why, "\nthreads; in this order again: --recording {}", kept.display());
            }
            tally.violations.push((*seed, why));
        };
        if let Some(why) = subject.failures().first() {
            violated(format!("an operation failed: {why}"), None);
            continue;
        }
        let mut random = Random::new(*seed);
        // In the end, and at random.
        for number in 0..CUTS {
            let cut = if number == 0 { usize::MAX } else { subject.random_cut(&mut random) };
            let bytes = torn(subject.initial.clone(), &subject.events, cut, &mut random);
            let name = format!("seed-{seed}-{number}");
            match bench.judge(&name, &bytes, &subject.allowed(cut)) {
                Err(why) => {
                    violated(why, Some(cut));
                    break;
                }
                Ok(found) => {
                    tally.states += 1;
                    tally.leaks += found.leaks;
                    if number >= RECOVERIES {
                        let _ = std::fs::remove_file(bench.directory.join(format!("{name}.qcow2")));
                        continue;
                    }
                    let image = bench.directory.join(format!("{name}.qcow2"));
                    let case = Case::new(image, subject.case.template, seed * RECOVERIES + number, Kind::Recovery);
                    let story = subject.story(Some(cut));
                    left.push(Left { seed: *seed, case, bytes, ids: found.ids, story });
                }
            }
        }
    }
    if !left.is_empty() {
        recover(bench, &format!("{name}-recovery"), left, tally);
    }
    for file in std::fs::read_dir(bench.directory).unwrap().flatten() {
        let name = file.file_name().into_string().unwrap();
        let done = seeds
            .iter()
            .any(|seed| name.starts_with(&format!("seed-{seed}.")) || name.starts_with(&format!("seed-{seed}-")));
        if done {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
}

/// Each state is written, flushed and closed; and the power fails again.
fn recover(bench: &Bench<'_>, name: &str, left: Vec<Left>, tally: &mut Tally) {
    let cases: Vec<Case> = left.iter().map(|left| left.case.clone()).collect();
    let trace = journal::record(bench.directory, name, &cases, None);
    let (mut origins, mut subjects) = (Vec::new(), Vec::new());
    for Left { seed, case, bytes, ids, story } in left {
        origins.push((seed, story));
        subjects.push((case, bytes, ids));
    }
    let subjects = Subject::all(subjects, journal::read(&trace));
    for (subject, (seed, before)) in subjects.iter().zip(origins) {
        subject.assert_is_complete();
        tally.calls += subject.events.len() as u64;
        let mut violated = |why: String, cut: Option<usize>| {
            let template = subject.template().name;
            let story = subject.story(cut);
            tally.violations.push((seed, format!("image {template}: {why}{before}\nrecovery{story}")));
        };
        if let Some(why) = subject.failures().first() {
            violated(format!("the recovery failed: {why}"), None);
            continue;
        }
        let now = std::fs::read(&subject.case.image).unwrap();
        let file = format!("seed-{seed}-judged");
        match bench.judge(&file, &now, &subject.allowed(usize::MAX)) {
            Err(why) => {
                violated(format!("after the recovery: {why}"), None);
                continue;
            }
            Ok(_) => tally.states += 1,
        }
        let mut random = Random::new(subject.case.seed);
        for _ in 0..RECOVERY_CUTS {
            let cut = subject.random_cut(&mut random);
            let bytes = torn(subject.initial.clone(), &subject.events, cut, &mut random);
            match bench.judge(&file, &bytes, &subject.allowed(cut)) {
                Err(why) => {
                    violated(format!("cut in the recovery: {why}"), Some(cut));
                    break;
                }
                Ok(found) => {
                    tally.states += 1;
                    tally.leaks += found.leaks;
                }
            }
        }
    }
    if !bench.below_is_unchanged() {
        tally.violations.push((subjects[0].case.seed / RECOVERIES, "a recovery changed a file below".to_owned()));
    }
}

/// What it takes to judge the same recording again.
fn keep(seed: u64, subject: &Subject, trace: &Path, seeds: &[u64]) -> PathBuf {
    let directory = target_directory().join(format!("powercuts/seed-{seed}"));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("initial.qcow2"), &subject.initial).unwrap();
    std::fs::write(directory.join("path"), subject.case.image.to_str().unwrap()).unwrap();
    // Of several seeds that were recorded together this one alone: first what it said, which names it by its
    // place among them, then its image.
    let place = seeds.iter().position(|other| *other == seed).unwrap();
    journal::extract(trace, place, &subject.case.image, &directory.join("trace"));
    directory
}

#[test]
fn no_power_cut_damages_an_image() {
    if !have_tools() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let recording = std::env::var_os("SIM_RECORDING").map(PathBuf::from);
    let seeds: Vec<u64> = match number("SIM_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = number("SIM_FIRST").unwrap_or(0);
            (first..first + number("SIM_SEEDS").unwrap_or(SEEDS)).collect()
        }
    };
    assert!(recording.is_none() || seeds.len() == 1, "SIM_RECORDING is of one SIM_SEED");
    let started = Instant::now();
    let batches: Vec<&[u64]> = seeds.chunks(BATCH).collect();
    let tally = Mutex::new(Tally::default());
    let next = AtomicUsize::new(0);
    with_bench(|bench| {
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).min(batches.len()) {
                scope.spawn(|| {
                    while let Some(seeds) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let mut part = Tally::default();
                        run_batch(bench, seeds, recording.as_deref(), &mut part);
                        let mut tally = tally.lock().unwrap();
                        tally.states += part.states;
                        tally.leaks += part.leaks;
                        tally.calls += part.calls;
                        tally.violations.append(&mut part.violations);
                    }
                });
            }
        });
    });
    let Tally { states, leaks, calls, mut violations } = tally.into_inner().unwrap();
    violations.sort();
    violations.dedup_by_key(|(seed, _)| *seed);
    eprintln!(
        "{} seeds in {:.0} s, {calls} calls recorded\nstates {states}, violations {}, leaks {leaks}",
        seeds.len(),
        started.elapsed().as_secs_f64(),
        violations.len()
    );
    let rows = violations.iter().map(|(seed, why)| serde_json::json!({ "seed": seed, "why": why }));
    outcome(&serde_json::json!({
        "what": "cuts under the whole program",
        "seeds": seeds.len(),
        "states": states,
        "states_in_qemu": states,
        "calls": calls,
        "leaks": leaks,
        "violations": rows.collect::<Vec<_>>(),
    }));
    if let Some((seed, why)) = violations.first() {
        panic!(
            "{} seeds violate; the first: {why}\nreplay: cargo xtask simulate --only program --seed {seed}\nall: {:?}",
            violations.len(),
            violations.iter().map(|(seed, _)| seed).take(50).collect::<Vec<_>>()
        );
    }
    assert!(states > 0 && calls > 0, "nothing was judged");
}
