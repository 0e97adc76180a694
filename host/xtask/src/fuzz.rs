//! The fuzz targets of `tests/fuzz`: built with coverage, and each run for a while.
//!
//! ```text
//!   tests/fuzz/targets/*.rs ── cargo, coverage flags, a tree of its own ──▶ <target>/fuzz/…/TARGET
//!   tests/fuzz/seeds/TARGET ─┐
//!   <target>/fuzz/corpus/TARGET ─┴▶ run, as many at a time as there are processors ──▶ one line each
//!                                        └── what was found: <target>/fuzz/artifacts/TARGET
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace, style};

/// What rustc is told: count edges and report comparisons, as libFuzzer reads them. Stable flags; the compiler
/// needs no other toolchain for them.
const COVERAGE: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];
/// The machine that is built for. Named, so that build scripts are built without coverage.
const MACHINE: &str = "x86_64-unknown-linux-gnu";
/// What a target may use. More is a finding, as a crash is.
const MEMORY_MIB: u32 = 1024;
/// How long one input may take, in seconds: far more than any does on a machine that has other work.
const INPUT_SECONDS: u32 = 30;

/// Feed the parsers, the disk and the device with inputs that a fuzzer makes, and look for crashes.
///
/// Each target starts with the seeds that are in the tree and with what earlier runs added below the target
/// directory. The last lines say for each target how many inputs were executed, how much of the code they reach
/// (edges) and what was found; what was found is kept, with the command that runs it again. Example:
///
///   cargo xtask fuzz qcow2_read vmdk --seconds 3600
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The targets; all of them if none is named.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Run each target for N seconds.
    #[arg(long, value_name = "N", default_value = "20")]
    seconds: u64,
    /// Run N targets at a time; as many as there are processors if it is not given.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Write the outcome to FILE as JSON: a list of `target`, `executions`, `executions_per_second`, `edges`,
    /// `seconds`, `processor_seconds` (fewer where the machine had other work) and `found`, the files with inputs.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// List the targets and do nothing.
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let targets = chosen(workspace, &arguments.targets)?;
    if arguments.list {
        targets.iter().for_each(|target| println!("{target}"));
        return Ok(());
    }
    prerequisites::ensure(workspace, Purpose::Fuzz)?;
    let outcomes = build_and_run(workspace, &targets, arguments.seconds, arguments.jobs)?;
    if let Some(file) = &arguments.json {
        let all: Vec<Value> = outcomes.iter().map(Outcome::json).collect();
        let text = format!("{:#}\n", Value::from(all));
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    judge(&outcomes)
}

/// All targets for a short time, as a part of the tests.
pub(crate) fn short(workspace: &Workspace, seconds: u64) -> Result<()> {
    let targets = chosen(workspace, &[])?;
    judge(&build_and_run(workspace, &targets, seconds, None)?)
}

/// The targets of these names, or all, in the order of their names.
fn chosen(workspace: &Workspace, names: &[String]) -> Result<Vec<String>> {
    let place = workspace.root.join("tests/fuzz/targets");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&place).with_context(|| format!("cannot read {}", place.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        all.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    all.sort();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        bail!("there is no target {unknown:?}; there is: {}", all.join(", "));
    }
    all.retain(|target| names.is_empty() || names.contains(target));
    ensure!(!all.is_empty(), "there are no targets in {}", place.display());
    Ok(all)
}

fn build_and_run(workspace: &Workspace, targets: &[String], seconds: u64, jobs: Option<usize>) -> Result<Vec<Outcome>> {
    let directory = workspace.target.join("fuzz");
    let mut command = tools::cargo();
    command
        .current_dir(&workspace.root)
        .args(["build", "--locked", "--profile", "fuzz", "--package", "blockhouse-fuzz"])
        .args(["--target", MACHINE, "--target-dir"])
        .arg(&directory)
        // Flags with spaces are possible only in this form, which also wins over all others.
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"));
    for target in targets {
        command.args(["--bin", target]);
    }
    tools::run(&mut command)?;

    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = jobs.unwrap_or(processors).max(1);
    let mut waiting: VecDeque<&String> = targets.iter().collect();
    let mut running: Vec<Running> = Vec::new();
    let mut outcomes = Vec::new();
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < jobs
            && let Some(target) = waiting.pop_front()
        {
            running.push(Running::start(workspace, &directory, target, seconds)?);
        }
        std::thread::sleep(Duration::from_millis(100));
        let mut left = Vec::new();
        for mut one in running {
            match one.child.try_wait()? {
                None => {
                    one.processor = processor_time(one.child.id()).unwrap_or(one.processor);
                    left.push(one);
                }
                Some(status) => {
                    let outcome = one.outcome(status.success())?;
                    eprintln!("{}", outcome.line());
                    outcomes.push(outcome);
                }
            }
        }
        running = left;
    }
    outcomes.sort_by(|one, other| one.target.cmp(&other.target));
    Ok(outcomes)
}

fn judge(outcomes: &[Outcome]) -> Result<()> {
    println!();
    for outcome in outcomes {
        println!("{}", outcome.line());
    }
    let mut wrong = Vec::new();
    for Outcome { target, found, failed, log, .. } in outcomes {
        for file in found {
            println!(
                "{target}: run it again with: cargo run --locked --package blockhouse-fuzz --bin {target} {}",
                file.display()
            );
        }
        if !found.is_empty() || *failed {
            println!("{target}: what it said is in {}", log.display());
            wrong.push(target.as_str());
        }
    }
    ensure!(wrong.is_empty(), "something was found by {}", wrong.join(", "));
    Ok(())
}

/// A target at work.
struct Running {
    target: String,
    child: Child,
    log: PathBuf,
    artifacts: PathBuf,
    /// What an earlier run found.
    before: Vec<PathBuf>,
    /// Processor time so far.
    processor: Duration,
}

impl Running {
    fn start(workspace: &Workspace, directory: &Path, target: &str, seconds: u64) -> Result<Self> {
        let sources = workspace.root.join("tests/fuzz");
        let place = |what: &str| -> Result<PathBuf> {
            let place = directory.join(what).join(target);
            std::fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
            Ok(place)
        };
        let (corpus, artifacts, scratch) = (place("corpus")?, place("artifacts")?, place("scratch")?);
        let log = scratch.join("log");
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(directory.join(MACHINE).join("fuzz").join(target));
        command
            .current_dir(&scratch)
            // What is new goes to the first; nothing to the second.
            .args([&corpus, &sources.join("seeds").join(target)])
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .arg(format!("-timeout={INPUT_SECONDS}"))
            .args(["-print_final_stats=1", "-max_len=16384"])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let dictionary = sources.join("dictionaries").join(format!("{target}.dict"));
        if dictionary.is_file() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        let before = files(&artifacts)?;
        let child = command.spawn().with_context(|| format!("cannot start {}", tools::line(&command)))?;
        Ok(Self { target: target.to_owned(), child, log, artifacts, before, processor: Duration::ZERO })
    }

    fn outcome(self, succeeded: bool) -> Result<Outcome> {
        let text = String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned();
        let mut found = files(&self.artifacts)?;
        found.retain(|file| !self.before.contains(file) && !is_slow(file));
        let Statistics { executions, per_second, edges, seconds } = Statistics::read(&text);
        Ok(Outcome {
            target: self.target,
            executions,
            per_second,
            edges,
            seconds,
            processor_seconds: self.processor.as_secs(),
            failed: !succeeded || executions == 0,
            found,
            log: self.log,
        })
    }
}

/// The processor time of a process that runs, in user and kernel mode (`proc_pid_stat(5)`, fields 14 and 15).
fn processor_time(process: u32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    parse_processor_time(&text)
}

fn parse_processor_time(stat: &str) -> Option<Duration> {
    /// What the kernel counts in for programs (`USER_HZ`), per second.
    const TICKS: u64 = 100;
    // The name of the program is in brackets, and may have brackets and spaces in it.
    let fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
    let ticks = fields.map(str::parse::<u64>).sum::<Result<u64, _>>().ok()?;
    Some(Duration::from_millis(ticks.saturating_mul(1000 / TICKS)))
}

/// libFuzzer keeps the slowest input as well, which is no finding.
fn is_slow(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("slow-unit-"))
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        files.push(entry?.path());
    }
    files.sort();
    Ok(files)
}

/// What libFuzzer said last.
#[derive(Debug, Default, PartialEq, Eq)]
struct Statistics {
    executions: u64,
    per_second: u64,
    /// Edges of the program that were taken by some input.
    edges: u64,
    seconds: u64,
}

impl Statistics {
    fn read(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let after = |name: &str| {
                let at = words.iter().position(|word| *word == name)?;
                words.get(at + 1)?.parse().ok()
            };
            if let Some(edges) = after("cov:") {
                all.edges = edges;
            }
            if let Some(count) = line.strip_prefix('#').and_then(|rest| rest.split('\t').next()?.parse().ok()) {
                // Of a run that crashed there are no other numbers.
                all.executions = count;
            }
            if let Some(count) = after("stat::number_of_executed_units:") {
                all.executions = count;
            }
            if let Some(rate) = after("stat::average_exec_per_sec:") {
                all.per_second = rate;
            }
            if let ["Done", _, "runs", "in", seconds, ..] = words.as_slice() {
                all.seconds = seconds.parse().unwrap_or(0);
            }
        }
        all
    }
}

/// How a target ended.
struct Outcome {
    target: String,
    executions: u64,
    per_second: u64,
    edges: u64,
    seconds: u64,
    processor_seconds: u64,
    /// It did not end as it should.
    failed: bool,
    /// Inputs that crash it.
    found: Vec<PathBuf>,
    log: PathBuf,
}

impl Outcome {
    fn line(&self) -> String {
        let bad = self.failed || !self.found.is_empty();
        let mark = if bad { style("31", "✗") } else { style("32", "✓") };
        format!(
            "{mark} {:<16} {:>10} executions {:>7}/s {:>6} edges {:>2} found",
            self.target,
            self.executions,
            self.per_second,
            self.edges,
            self.found.len().max(usize::from(self.failed))
        )
    }

    fn json(&self) -> Value {
        json!({
            "target": self.target,
            "executions": self.executions,
            "executions_per_second": self.per_second,
            "edges": self.edges,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "found": self.found,
            "failed": self.failed,
        })
    }
}

#[cfg(test)]
mod unit {
    use std::time::Duration;

    use super::{Statistics, parse_processor_time};

    #[test]
    fn processor_time_is_that_of_both_modes() {
        let stat = "7 (a) b (c) R 1 7 7 0 -1 4194304 100 0 0 0 250 50 9 9 20 0 1 0 5 6 7";
        assert_eq!(parse_processor_time(stat), Some(Duration::from_secs(3)));
        assert_eq!(parse_processor_time("7 (a"), None);
        assert_eq!(parse_processor_time("7 (a) R 1 7 7 0 -1 4194304 100 0 0 0 x 50"), None);
    }

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let text = "INFO: seed corpus: files: 4\n\
            #5\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 28Mb\n\
            #1048576\tpulse  cov: 2294 ft: 5395 corp: 181/590Kb lim: 6285 exec/s: 111 rss: 34Mb\n";
        let running = Statistics { executions: 1_048_576, edges: 2294, ..Statistics::default() };
        assert_eq!(Statistics::read(text), running);
        let text = format!(
            "{text}Done 1048600 runs in 16 second(s)\nstat::number_of_executed_units: 1048600\n\
             stat::average_exec_per_sec:     65537\n"
        );
        let done = Statistics { executions: 1_048_600, per_second: 65_537, edges: 2294, seconds: 16 };
        assert_eq!(Statistics::read(&text), done);
    }
}
