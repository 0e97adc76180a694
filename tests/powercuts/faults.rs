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
use crate::{have_tools, outcome, with_bench};

/// Without `SIM_FAULTS`: plans for each kind of fault.
const PLANS: u64 = 22;
/// Power cuts after, and around, what failed.
const CUTS: u64 = 3;

/// Components trap at their host calls from the second to this one after it.
const LAST_HOST_CALL: u64 = 17;

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

/// Judges what a fault left behind: as it is, and if the power fails as well. Returns states and leaks.
fn judge(bench: &Bench<'_>, name: &str, subject: &Subject) -> Result<(u64, u64), String> {
    subject.assert_is_complete();
    let now = std::fs::read(&subject.case.image).unwrap();
    let file = format!("{name}-judged");
    let found = bench
        .judge(&file, &now, &subject.allowed(usize::MAX))
        .map_err(|why| format!("{why}{}", subject.story(None)))?;
    let mut leaks = found.leaks;
    let mut random = Random::new(subject.case.seed);
    for _ in 0..CUTS {
        let cut = subject.random_cut(&mut random);
        let bytes = torn(subject.initial.clone(), &subject.events, cut, &mut random);
        let found = bench
            .judge(&file, &bytes, &subject.allowed(cut))
            .map_err(|why| format!("after a power cut: {why}{}", subject.story(Some(cut))))?;
        leaks += found.leaks;
    }
    Ok((1 + CUTS, leaks))
}

/// What a test tells `cargo xtask simulate`.
fn tell(what: &str, plans: u64, (states, leaks): (u64, u64), failures: &[String]) {
    let rows = failures.iter().map(|why| serde_json::json!({ "seed": null, "why": why }));
    outcome(&serde_json::json!({
        "what": what,
        "seeds": plans,
        "states": states,
        "states_in_qemu": states,
        "leaks": leaks,
        "violations": rows.collect::<Vec<_>>(),
    }));
}

fn succeeded(failures: &[String]) {
    assert!(
        failures.is_empty(),
        "{} fail; the first: {}\nreplay: SIM_FAULTS={} cargo test --locked --workspace --test powercuts faults::",
        failures.len(),
        failures[0],
        plans()
    );
}

fn plans() -> u64 {
    std::env::var("SIM_FAULTS").ok().map_or(PLANS, |text| text.parse().expect("SIM_FAULTS"))
}

/// Runs `cases`, each on a new image of its template, and calls `check` for each.
fn run(
    bench: &Bench<'_>,
    name: &str,
    cases: Vec<Case>,
    failing: Option<&Failing>,
    mut check: impl FnMut(&Subject) -> Result<(), String>,
) -> ((u64, u64), Vec<String>) {
    let trace = journal::record(bench.directory, name, &cases, failing);
    let with_content = cases.into_iter().map(|case| {
        let made = &bench.made[case.template];
        (case, made.image.clone(), made.ids.clone())
    });
    let (mut failures, mut judged) = (Vec::new(), (0, 0));
    for subject in Subject::all(with_content, journal::read(&trace)) {
        match judge(bench, name, &subject).and_then(|found| check(&subject).map(|()| found)) {
            Ok((states, leaks)) => judged = (judged.0 + states, judged.1 + leaks),
            Err(why) => {
                failures.push(format!("{name}, {}, image {}: {why}", subject.case.seed, subject.template().name));
            }
        }
    }
    if !bench.below_is_unchanged() {
        failures.push(format!("{name}: a file below was changed"));
    }
    (judged, failures)
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
    let plans = plans();
    let next = AtomicUsize::new(0);
    let (failures, tally) = (Mutex::new(Vec::new()), Mutex::new(BTreeMap::<_, (u64, usize)>::new()));
    let judged = Mutex::new((0, 0));
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
                        let ((states, leaks), found) = run(bench, &name, cases.collect(), Some(&failing), |subject| {
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
                        let mut judged = judged.lock().unwrap();
                        *judged = (judged.0 + states, judged.1 + leaks);
                    }
                });
            }
        });
    });
    let (failures, tally) = (failures.into_inner().unwrap(), tally.into_inner().unwrap());
    tell("calls that fail", plans * FAULTS.len() as u64, judged.into_inner().unwrap(), &failures);
    eprintln!("faults, and the requests that failed: {tally:?}");
    succeeded(&failures);
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
    let plans = plans() * 3 / 2;
    let (judged, failures) = with_bench(|bench| {
        let cases = (0..plans).map(|seed| {
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
    tell("files that cannot grow", plans, judged, &failures);
    eprintln!("{parts} writes did a part, {refusals} calls were refused");
    succeeded(&failures);
    assert!(parts > 0 && refusals > 0, "no file was too small");
}

/// The component is thrown away in the middle of a call that changes the image.
#[test]
fn a_component_that_traps_leaves_the_image_whole() {
    if !have_tools() {
        return;
    }
    let mut trapped = BTreeMap::<u64, usize>::new();
    // At the second host call of a component's call, at the third, and so on.
    let plans = plans();
    let (judged, failures) = with_bench(|bench| {
        let cases =
            (0..plans).map(|seed| Case { host_calls: Some(2 + seed % LAST_HOST_CALL), ..alone(bench, "trap", seed) });
        run(bench, "trap", cases.collect(), None, |subject| {
            let thrown = subject.failures().iter().filter(|why| why.contains("thrown away")).count();
            if !subject.events.is_empty() {
                *trapped.entry(subject.case.host_calls.unwrap()).or_default() += thrown;
            }
            Ok(())
        })
    });
    tell("components that trap", plans, judged, &failures);
    eprintln!("requests that failed, of images that were being written, by host calls: {trapped:?}");
    succeeded(&failures);
    assert!(trapped.values().any(|thrown| *thrown > 0), "no component trapped after it had begun to write");
}
