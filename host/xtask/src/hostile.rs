//! The catalogue of attacks: all hostile tests, and one table of what became of each attack.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::demo;
use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace};

/// How long each race takes with `--long`, in seconds.
const LONG_RACE: &str = "60";

/// Attack Blockhouse: images, components, guests and files that try to get out, or to take it down.
///
/// Each case is made by the test that tries it. The last lines are a table of how many were tried by
/// whom, how many were refused (or stopped; some are served, as what they were declared to be), how
/// many escaped, crashed something or made it hang. The last three have to be zero.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Let each race of two sides take a minute.
    #[arg(long)]
    long: bool,
    /// Write all rows to FILE as JSON: `attacker`, `name` and `outcome` of each case.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Test programs with hostile cases, and which of their tests.
const PROGRAMS: [&[&str]; 3] = [
    &["--workspace", "--test", "hostile"],
    &["--workspace", "-p", "blockhouse-virtio", "--lib", "--", "hostile"],
    &["--workspace", "--test", "hostile_guest"],
];

#[derive(Default)]
struct Line {
    tried: u64,
    refused: u64,
    served: u64,
}

/// Tests that failed, by what that means.
#[derive(Default)]
struct Failed {
    escaped: Vec<String>,
    crashed: Vec<String>,
    hung: Vec<String>,
    /// The attack did not succeed, but what was said or left behind is not what was promised.
    other: Vec<String>,
}

impl Failed {
    /// Sorts a failure by what its assertion says (`tests/hostile/place.rs`, `tests/src/lib.rs`).
    fn add(&mut self, test: &str, why: &str) {
        let says = |words: &[&str]| words.iter().any(|word| why.contains(word));
        let list = if says(&["canary", "was made by the attack", "guest memory changed", "the disk was changed"]) {
            &mut self.escaped
        } else if says(&["it took", "did not end", "does not end", "did not come back"]) {
            &mut self.hung
        } else if says(&["a panic", "killed", "SIG"]) {
            &mut self.crashed
        } else {
            &mut self.other
        };
        list.push(format!("{test}: {why}"));
    }
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    prerequisites::ensure(workspace, Purpose::QuickTest)?;
    let program = demo::program(workspace)?;
    let scratch = tempfile::tempdir()?;
    let catalogue = scratch.path().join("catalogue");
    let mut failed = Failed::default();
    for arguments_of_cargo in PROGRAMS {
        run_tests(workspace, arguments, arguments_of_cargo, &program, &catalogue, &mut failed)?;
    }
    let text = std::fs::read_to_string(&catalogue).context("the hostile tests left no catalogue")?;
    let rows: Vec<Value> =
        text.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("a row that is no JSON")?;
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for row in &rows {
        let field = |name: &str| row.get(name).and_then(Value::as_str).unwrap_or_default();
        let line = lines.entry(of(field("attacker"), field("name"))).or_default();
        line.tried += 1;
        *(if field("outcome") == "refused" { &mut line.refused } else { &mut line.served }) += 1;
    }
    if let Some(file) = &arguments.json {
        let failures = json!({
            "escaped": failed.escaped, "crashed": failed.crashed, "hung": failed.hung, "other": failed.other,
        });
        let all = json!({ "rows": rows, "failed": failures });
        std::fs::write(file, format!("{all:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    print(&lines, &failed)?;
    let broken = failed.count();
    ensure!(broken == 0, "{broken} attacks did not end as they must; see above");
    Ok(())
}

/// Whose line a row belongs to.
fn of(attacker: &str, name: &str) -> String {
    let module = name.split("::").next().unwrap_or_default();
    let what = match (attacker, module) {
        ("guest", _) if name.starts_with("kvm: ") => "guests, through KVM",
        ("guest", _) => "guests, descriptor by descriptor",
        ("image", "references" | "vmdk") => "images: names of other files",
        ("image", "files") => "images: links, devices, races",
        ("image", "chains") => "images: chains",
        ("image", "aliases") => "images: written",
        ("image", "parsers") => "images: parsers",
        ("component", "wasi") => "components: file functions",
        ("component", "loading" | "compiling") => "components: loading",
        ("component", "writing") => "components: writers",
        ("component", _) => "components: limits and lies",
        _ => "other walls",
    };
    what.to_owned()
}

fn print(lines: &BTreeMap<String, Line>, failed: &Failed) -> Result<()> {
    for why in [&failed.escaped, &failed.crashed, &failed.hung, &failed.other].into_iter().flatten() {
        tools::say(why);
    }
    let mut sum = Line::default();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<34} {:>6} {:>8} {:>7} {:>8} {:>8} {:>5}",
        "", "tried", "refused", "served", "escaped", "crashed", "hung"
    )?;
    for (what, line) in lines {
        writeln!(out, "{what:<34} {:>6} {:>8} {:>7}", line.tried, line.refused, line.served)?;
        sum.tried += line.tried;
        sum.refused += line.refused;
        sum.served += line.served;
    }
    let (escaped, crashed, hung) = (failed.escaped.len(), failed.crashed.len(), failed.hung.len());
    writeln!(
        out,
        "{:<34} {:>6} {:>8} {:>7} {escaped:>8} {crashed:>8} {hung:>5}",
        "all", sum.tried, sum.refused, sum.served
    )?;
    Ok(())
}

/// Runs one test program; its output goes on to the terminal.
fn run_tests(
    workspace: &Workspace,
    arguments: &Arguments,
    of_cargo: &[&str],
    program: &Path,
    catalogue: &Path,
    failed: &mut Failed,
) -> Result<()> {
    let mut command = tools::cargo();
    command.current_dir(&workspace.root).args(["test", "--locked", "--quiet", "--no-fail-fast"]).args(of_cargo);
    if !of_cargo.contains(&"--") {
        command.arg("--");
    }
    command
        .env("BLOCKHOUSE", program)
        .env("BLOCKHOUSE_CATALOGUE", catalogue)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if arguments.long {
        command.env("HOSTILE_RACE_SECONDS", LONG_RACE);
    }
    let mut child = command.spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    // libtest repeats what a failed test said: `thread 'name' (id) panicked at place:`, and then why.
    let mut panicked: Option<String> = None;
    let before = failed.count();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(test) = panicked.take() {
            failed.add(&test, &line);
        } else if line.starts_with("thread '") && line.contains(" panicked at ") {
            panicked = line.split('\'').nth(1).map(str::to_owned);
        }
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    let status = child.wait()?;
    if !status.success() && failed.count() == before {
        // No test failed: the program itself did, or it does not build.
        failed.crashed.push(format!("cargo test {}: {status}", of_cargo.join(" ")));
    }
    Ok(())
}

impl Failed {
    fn count(&self) -> usize {
        self.escaped.len() + self.crashed.len() + self.hung.len() + self.other.len()
    }
}

#[cfg(test)]
mod unit {
    use super::Failed;

    #[test]
    fn failures_are_sorted_by_what_they_say() {
        let mut failed = Failed::default();
        failed.add("a", "the canary was read");
        failed.add("b", "it took 11s");
        failed.add("c", "a panic: thread 'main'");
        failed.add("d", "no \"x\" in \"y\"");
        let lengths = [&failed.escaped, &failed.hung, &failed.crashed, &failed.other].map(Vec::len);
        assert_eq!(lengths, [1, 1, 1, 1]);
        assert_eq!(failed.count(), 4);
    }
}
