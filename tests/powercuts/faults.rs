//! Calls that fail: made to by strace, or for want of space, the latter with writes that do a part first; and
//! components that trap in the middle.
//!
//! Whatever fails, the process goes on and ends, the requests it concerns fail, nothing else does, and the
//! image stays whole: as it is, and if the power fails as well.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::images::TEMPLATES;
use crate::journal::{self, Failing, torn};
use crate::judge::{Bench, Subject};
use crate::plan::{Kind, Random};
use crate::workload::Case;
use crate::{have_tools, with_bench};

/// Without `SIM_FAULTS`: plans for each kind of fault.
const PLANS: u64 = 22;

/// A kind of fault.
struct Fault {
    call: &'static str,
    error: &'static str,
    /// In turn the first call of a plan fails, the second, and so on up to this one.
    last: u64,
    /// Whether a request has to fail. A hole that cannot be made wastes space and nothing else.
    told: bool,
}

const FAULTS: &[Fault] = &[
    // The component's.
    Fault { call: "pwrite64", error: "EIO", last: 22, told: true },
    Fault { call: "pwrite64", error: "ENOSPC", last: 22, told: true },
    Fault { call: "ftruncate", error: "ENOSPC", last: 2, told: true },
    // The host's.
    Fault { call: "pwritev", error: "ENOSPC", last: 22, told: true },
    Fault { call: "pwritev", error: "EIO", last: 22, told: true },
    Fault { call: "fallocate", error: "ENOSPC", last: 4, told: false },
    // Of both.
    Fault { call: "fdatasync", error: "EIO", last: 12, told: true },
];

/// Judges what a fault left behind.
fn judge(bench: &Bench<'_>, name: &str, subject: &Subject) -> Result<(), String> {
    subject.assert_is_complete();
    let now = std::fs::read(&subject.case.image).unwrap();
    let file = format!("{name}-judged");
    bench.judge(&file, &now, &subject.allowed(usize::MAX)).map_err(|why| format!("{why}{}", subject.story(None)))?;
    let mut random = Random::new(subject.case.seed);
    let cut = subject.random_cut(&mut random);
    let bytes = torn(subject.initial.clone(), &subject.events, cut, &mut random);
    bench
        .judge(&file, &bytes, &subject.allowed(cut))
        .map_err(|why| format!("after a power cut: {why}{}", subject.story(Some(cut))))?;
    Ok(())
}

/// Runs `cases`, each on a new image of its template, and calls `check` for each.
fn run(
    bench: &Bench<'_>,
    name: &str,
    cases: Vec<Case>,
    failing: Option<&Failing>,
    mut check: impl FnMut(&Subject) -> Result<(), String>,
) -> Vec<String> {
    let trace = journal::record(bench.directory, name, &cases, failing);
    let with_content = cases.into_iter().map(|case| {
        let made = &bench.made[case.template];
        (case, made.image.clone(), made.ids.clone())
    });
    let mut failures = Vec::new();
    for subject in Subject::all(with_content, journal::read(&trace)) {
        if let Err(why) = judge(bench, name, &subject).and_then(|()| check(&subject)) {
            failures.push(format!("{name}, {}, image {}: {why}", subject.case.seed, subject.template().name));
        }
    }
    if !bench.below_is_unchanged() {
        failures.push(format!("{name}: a file below was changed"));
    }
    failures
}

fn alone(bench: &Bench<'_>, name: &str, seed: u64) -> Case {
    let template = (seed % TEMPLATES.len() as u64) as usize;
    Case::new(bench.image(&format!("{name}-{seed}"), template), template, seed, Kind::Alone)
}

#[test]
fn a_call_that_fails_damages_nothing() {
    if !have_tools() {
        return;
    }
    let plans = std::env::var("SIM_FAULTS").ok().map_or(PLANS, |text| text.parse().expect("SIM_FAULTS"));
    let next = AtomicUsize::new(0);
    let (failures, tally) = (Mutex::new(Vec::new()), Mutex::new(BTreeMap::<_, (u64, usize)>::new()));
    with_bench(|bench| {
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
                scope.spawn(|| {
                    while let Some(fault) = FAULTS.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let Fault { call, error, last, told } = *fault;
                        let name = format!("{call}-{error}");
                        // One process for all: what comes before the call that fails is made up by calls on
                        // another file.
                        let cases = (0..plans).map(|number| {
                            let seed = number + if error == "EIO" { 1000 } else { 0 };
                            Case { ballast: last - 1 - number % last, ..alone(bench, &name, seed) }
                        });
                        let failing = Failing { call, error, number: last };
                        let found = run(bench, &name, cases.collect(), Some(&failing), |subject| {
                            let injected = subject.events.iter().filter(|event| event.injected).count();
                            let failed = subject.failures().len();
                            let mut tally = tally.lock().unwrap();
                            let (faults, errors) = tally.entry(name.clone()).or_default();
                            *faults += injected as u64;
                            *errors += failed;
                            if injected > 0 && failed == 0 && told {
                                return Err(format!("no request failed{}", subject.story(None)));
                            }
                            subject
                                .failed_without_reason()
                                .map_or(Ok(()), |why| Err(format!("{why}{}", subject.story(None))))
                        });
                        failures.lock().unwrap().extend(found);
                    }
                });
            }
        });
    });
    let (failures, tally) = (failures.into_inner().unwrap(), tally.into_inner().unwrap());
    eprintln!("faults, and the requests that failed: {tally:?}");
    assert!(failures.is_empty(), "{} fail; the first: {}", failures.len(), failures[0]);
    // Some plans are done before the call that was to fail.
    let idle: Vec<_> = tally.iter().filter(|(_, (faults, _))| *faults == 0).collect();
    assert!(idle.is_empty(), "nothing was made to fail: {idle:?}");
}

/// The last call that makes a file grow does a part, as on a full file system, and what follows does nothing.
#[test]
fn a_file_that_cannot_grow_stays_whole() {
    if !have_tools() {
        return;
    }
    let mut parts = 0;
    let mut refusals = 0;
    let failures = with_bench(|bench| {
        let cases = (0..33).map(|seed| {
            let case = alone(bench, "full", seed);
            // Neither whole clusters nor whole sectors.
            let room = 1 + Random::new(seed).below(40 * TEMPLATES[case.template].cluster);
            Case { file_size: Some(bench.made[case.template].image.len() as u64 + room), ..case }
        });
        run(bench, "full", cases.collect(), None, |subject| {
            parts += subject.events.iter().filter(|event| event.partial).count();
            refusals += subject.events.iter().filter(|event| event.change.is_none()).count();
            subject.failed_without_reason().map_or(Ok(()), |why| Err(format!("{why}{}", subject.story(None))))
        })
    });
    eprintln!("{parts} writes did a part, {refusals} calls were refused");
    assert!(failures.is_empty(), "{} fail; the first: {}", failures.len(), failures[0]);
    assert!(parts > 0 && refusals > 0, "no file was too small");
}

/// The component is thrown away in the middle of a call that changes the image.
#[test]
fn a_component_that_traps_leaves_the_image_whole() {
    if !have_tools() {
        return;
    }
    let mut trapped = BTreeMap::<u64, usize>::new();
    let failures = with_bench(|bench| {
        let cases = [2, 3, 4, 5, 6, 8, 10, 13, 17]
            .into_iter()
            .enumerate()
            .map(|(seed, calls)| Case { host_calls: Some(calls), ..alone(bench, "trap", seed as u64) });
        run(bench, "trap", cases.collect(), None, |subject| {
            let thrown = subject.failures().iter().filter(|why| why.contains("thrown away")).count();
            if !subject.events.is_empty() {
                *trapped.entry(subject.case.host_calls.unwrap()).or_default() += thrown;
            }
            Ok(())
        })
    });
    eprintln!("requests that failed, of images that were being written, by host calls: {trapped:?}");
    assert!(failures.is_empty(), "{} fail; the first: {}", failures.len(), failures[0]);
    assert!(trapped.values().any(|thrown| *thrown > 0), "no component trapped after it had begun to write");
}
