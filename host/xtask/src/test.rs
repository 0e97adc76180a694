//! Every check there is, in one command, with one line of totals at its end.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::build_plugins;
use crate::demo;
use crate::fuzz;
use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace, style};

/// A network that drops packets would be waited for for ever.
const DATABASE_LIMIT: Duration = Duration::from_secs(60);
/// How long each fuzz target runs, in seconds.
const FUZZ_SECONDS: u64 = 20;

/// Run every check: formatting, lints, documentation, licences, advisories, components, tests, fuzz targets.
///
/// All checks run even if one fails. The last line says how many tests passed, failed and
/// were skipped; a test that cannot run on this machine counts as skipped and says why.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Leave out the tests that boot Linux, and the fuzz targets.
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let purpose = if arguments.quick { Purpose::QuickTest } else { Purpose::Test };
    let mut steps = Steps::default();
    let mut totals = Totals::default();
    let prepared = steps.run("prerequisites", || prerequisites::ensure(workspace, purpose));
    steps.run("format", || cargo(workspace, &["fmt", "--all", "--check"]));
    let built = steps.run("components, twice", || build_plugins::build_and_check(workspace));
    // The host crates embed the components, so without them nothing below compiles.
    if built {
        steps.run("clippy", || clippy(workspace));
        steps.run_if_possible("clippy, components", || clippy_components(workspace));
        steps.run("documentation", || documentation(workspace));
        steps.run_if_possible("licences, sources", || deny(workspace));
        steps.run_if_possible("advisories", || advisories(workspace));
    }
    if prepared && built {
        steps.run("tests", || tests(workspace, arguments.quick, &mut totals));
    }
    if !arguments.quick {
        steps.run_if_possible("fuzz targets", || fuzz_targets(workspace));
    }
    totals.skipped.extend(steps.left_out());
    steps.print();
    totals.print();
    // A failed step without a failed test must not end in a line that says "0 failed".
    println!(
        "{} passed, {} failed, {} skipped",
        totals.passed,
        totals.failed.max(u64::from(!steps.all_passed())),
        totals.skipped()
    );
    ensure!(steps.all_passed(), "failed: {}", steps.failed().join(", "));
    Ok(())
}

/// What was done, how it ended and how long it took.
#[derive(Default)]
struct Steps(Vec<(&'static str, Ended, Duration)>);

/// How a step ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Passed,
    /// It could not be done here, for this reason.
    LeftOut(String),
    Failed,
}

impl Steps {
    /// Runs one step; an error is printed at once and does not stop the others.
    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) -> bool {
        self.run_if_possible(name, || step().map(|()| Ended::Passed))
    }

    /// As [`run`](Self::run), for a step that may be left out.
    fn run_if_possible(&mut self, name: &'static str, step: impl FnOnce() -> Result<Ended>) -> bool {
        tools::say(format!("── {name}"));
        let started = Instant::now();
        let ended = step().unwrap_or_else(|error| {
            tools::print_error(&error);
            Ended::Failed
        });
        if let Ended::LeftOut(why) = &ended {
            tools::say(format!("left out: {why}"));
        }
        let passed = ended != Ended::Failed;
        self.0.push((name, ended, started.elapsed()));
        passed
    }

    fn failed(&self) -> Vec<&'static str> {
        self.0.iter().filter(|(_, ended, _)| *ended == Ended::Failed).map(|(name, ..)| *name).collect()
    }

    /// A line for each step that was left out. They count as skipped: what was not checked has not passed.
    fn left_out(&self) -> impl Iterator<Item = String> {
        self.0.iter().filter_map(|(name, ended, _)| match ended {
            Ended::LeftOut(why) => Some(format!("skipped: the step {name}: {why}")),
            Ended::Passed | Ended::Failed => None,
        })
    }

    fn all_passed(&self) -> bool {
        self.failed().is_empty()
    }

    fn print(&self) {
        println!();
        for (name, ended, took) in &self.0 {
            let mark = match ended {
                Ended::Passed => style("32", "✓"),
                Ended::LeftOut(_) => style("33", "-"),
                Ended::Failed => style("31", "✗"),
            };
            println!("{mark} {name:<20} {:>7.1} s", took.as_secs_f64());
        }
    }
}

/// Sums over all test programs.
#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
    /// Tests that are marked so that nobody runs them.
    ignored: u64,
    /// One line for each test that could not run here: name and reason.
    skipped: Vec<String>,
}

impl Totals {
    /// Adds a closing line of libtest's: `test result: ok. 3 passed; 0 failed; 0 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        for count in counts.split([';', '.']) {
            let mut words = count.split_whitespace();
            let (Some(number), Some(what)) = (words.next(), words.next()) else {
                continue;
            };
            let Ok(number) = number.parse::<u64>() else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    /// Reads what the tests said about being skipped; libtest counted them as passed. One that cannot do several things
    /// says so of each, and counts once.
    fn add_skips(&mut self, file: &Path) -> Result<()> {
        let text = std::fs::read_to_string(file)?;
        let mut names = BTreeSet::new();
        // `skipped: NAME: REASON`, where colons in pairs are a part of the name.
        let name = |line: &str| line.split(": ").nth(1).unwrap_or_default().to_owned();
        self.skipped.extend(text.lines().filter(|line| names.insert(name(line))).map(str::to_owned));
        self.passed = self.passed.saturating_sub(names.len() as u64);
        Ok(())
    }

    fn skipped(&self) -> u64 {
        self.ignored + self.skipped.len() as u64
    }

    fn print(&self) {
        for line in &self.skipped {
            println!("{} {line}", style("33", "-"));
        }
        if self.ignored > 0 {
            println!("{} skipped: {} tests are marked #[ignore]", style("33", "-"), self.ignored);
        }
    }
}

fn cargo(workspace: &Workspace, arguments: &[&str]) -> Result<()> {
    tools::run(tools::cargo().current_dir(&workspace.root).args(arguments))
}

fn clippy(workspace: &Workspace) -> Result<()> {
    let warnings = ["--", "--deny", "warnings"];
    cargo(workspace, &[["clippy", "--locked", "--workspace", "--all-targets"].as_slice(), &warnings].concat())
}

/// Once more for the target of the components: much of their code exists only there.
fn clippy_components(workspace: &Workspace) -> Result<Ended> {
    if !build_plugins::target_is_installed()? {
        return Ok(Ended::LeftOut("the toolchain has no precompiled library for wasm32-wasip2".to_owned()));
    }
    let mut command = tools::cargo();
    command.current_dir(&workspace.root).args(["clippy", "--locked", "--lib", "--target", build_plugins::TARGET]);
    for package in build_plugins::packages(workspace)? {
        command.args(["--package", &package]);
    }
    tools::run(command.args(["--", "--deny", "warnings"]))?;
    Ok(Ended::Passed)
}

fn documentation(workspace: &Workspace) -> Result<()> {
    tools::run(
        tools::cargo()
            .current_dir(&workspace.root)
            .args(["doc", "--locked", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "--deny warnings"),
    )
}

/// What is missing without cargo-deny.
const NO_CARGO_DENY: &str = "there is no cargo-deny; `cargo install --locked cargo-deny` adds it";

/// `cargo deny` needs its own installation, so it is left to continuous integration where it is missing.
fn deny(workspace: &Workspace) -> Result<Ended> {
    if tools::find("cargo-deny").is_none() {
        return Ok(Ended::LeftOut(NO_CARGO_DENY.to_owned()));
    }
    let check = ["deny", "--locked", "--config", ".deny.toml", "check", "--hide-inclusion-graph"];
    cargo(workspace, &[check.as_slice(), &["bans", "licenses", "sources"]].concat())?;
    Ok(Ended::Passed)
}

/// Known vulnerabilities. Their database comes over a network, which not every machine has.
fn advisories(workspace: &Workspace) -> Result<Ended> {
    if tools::find("cargo-deny").is_none() {
        return Ok(Ended::LeftOut(NO_CARGO_DENY.to_owned()));
    }
    let deny = |arguments: &[&str]| {
        let mut command = tools::cargo();
        command.current_dir(&workspace.root).args(["deny", "--locked", "--config", ".deny.toml"]).args(arguments);
        command
    };
    match tools::output_within(DATABASE_LIMIT, &mut deny(&["fetch", "db"]))? {
        Some(output) if output.status.success() => {
            tools::run(&mut deny(&["check", "--disable-fetch", "advisories"]))?;
            Ok(Ended::Passed)
        }
        Some(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            let why =
                why.lines().find(|line| line.contains("ERROR") || line.contains("error")).unwrap_or("no reason given");
            Ok(Ended::LeftOut(format!("the database of advisories is not to be had here: {why}")))
        }
        None => {
            let limit = DATABASE_LIMIT.as_secs();
            Ok(Ended::LeftOut(format!("the database of advisories did not come within {limit} s")))
        }
    }
}

/// Each target for a short time: enough to see that it works, and to find what is easy to find.
fn fuzz_targets(workspace: &Workspace) -> Result<Ended> {
    if tools::find("c++").is_none() {
        return Ok(Ended::LeftOut("there is no C++ compiler to build the fuzzer with".to_owned()));
    }
    fuzz::short(workspace, FUZZ_SECONDS)?;
    Ok(Ended::Passed)
}

fn tests(workspace: &Workspace, quick: bool, totals: &mut Totals) -> Result<()> {
    let blockhouse = demo::program(workspace)?;
    let skips = tempfile::NamedTempFile::new()?;
    let mut command = tools::cargo();
    command
        .current_dir(&workspace.root)
        .args(["test", "--locked", "--workspace", "--no-fail-fast"])
        .env("BLOCKHOUSE", blockhouse)
        .env("BLOCKHOUSE_SKIPS", skips.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if quick {
        command.env("BLOCKHOUSE_QUICK", "1");
    }
    let mut child = command.spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        totals.add(&line);
        // A closed terminal is no reason to stop the tests.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    let status = child.wait()?;
    totals.add_skips(skips.path())?;
    if !status.success() {
        // A test program that crashed printed no totals.
        totals.failed = totals.failed.max(1);
        bail!("{} tests failed ({status})", totals.failed);
    }
    ensure!(totals.passed > 0, "no test ran");
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod unit {
    use super::{Ended, Steps, Totals};

    #[test]
    fn totals_add_up() {
        let mut totals = Totals::default();
        totals.add("running 3 tests");
        totals.add("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 0.01s");
        totals
            .add("test result: FAILED. 10 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.50s");
        assert_eq!((totals.passed, totals.failed, totals.skipped()), (13, 2, 1));
    }

    #[test]
    fn what_was_left_out_is_neither_passed_nor_failed() {
        let mut steps = Steps::default();
        assert!(steps.run("one", || Ok(())));
        assert!(steps.run_if_possible("two", || Ok(Ended::LeftOut("no tool".into()))));
        assert!(!steps.run("three", || anyhow::bail!("it is broken")));
        assert_eq!(steps.failed(), ["three"]);
        assert_eq!(steps.left_out().collect::<Vec<_>>(), ["skipped: the step two: no tool"]);
    }

    #[test]
    fn skipped_tests_are_not_passed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = "skipped: a::b: no reason\nskipped: a::b: nor another: none\nskipped: a::c: no reason\n";
        std::fs::write(file.path(), lines).unwrap();
        let mut totals = Totals { passed: 5, ignored: 1, ..Totals::default() };
        totals.add_skips(file.path()).unwrap();
        assert_eq!((totals.passed, totals.skipped()), (3, 3));
    }
}
