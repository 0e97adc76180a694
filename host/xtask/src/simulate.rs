//! The power-cut simulation, for longer than the tests run it.
//!
//! ```text
//!   format    plugins/qcow2/tests/powercut   the component's code over files in memory: each seed, many states
//!   program   tests/powercuts                component, sandbox, disk and the system's own calls, under strace:
//!                                            cuts (some of the seeds), calls that fail, files that cannot
//!                                            grow, components that trap
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::build_plugins;
use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace};

/// One of so many seeds is also run under the whole program, where it takes a hundred times as long.
const PROGRAM_SHARE: u64 = 20;
/// One of so many seeds makes a plan for each kind of fault.
const FAULT_SHARE: u64 = 100;

/// Cut the power in the middle of writes to qcow2 images, and check every state that can be left.
///
/// Each seed is a sequence of operations and many cuts; the same seed is always the same. All seeds run
/// on the format alone, with files in memory; a part of them also under the whole program, whose system
/// calls are recorded, and made to fail. The last line says how many states were checked, how many seeds
/// violate what was promised, and how many clusters leaked (space that is counted and not used;
/// harmless). Example:
///
///   cargo xtask simulate --seeds 10000
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Try N seeds.
    #[arg(long, value_name = "N", default_value = "2000")]
    seeds: u64,
    /// Start with the seed S, so that a long run can be done in parts.
    #[arg(long, value_name = "S", default_value = "0", conflicts_with = "seed")]
    from: u64,
    /// Try one seed: replays what another run found.
    #[arg(long, value_name = "S", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Try all seeds on one part only.
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// Judge what an earlier run recorded of the seed, for seeds with several threads, whose order is never
    /// the same again.
    #[arg(long, value_name = "DIR", requires = "seed")]
    recording: Option<PathBuf>,
    /// Write the outcome to FILE as JSON: `seeds`, `states`, `states_in_qemu`, `leaks`, `violations`, each
    /// with `what`, `seed` and `why`, and `parts` with the same numbers of each part.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The format alone, with files in memory.
    Format,
    /// The whole program, under strace.
    Program,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    prerequisites::ensure(workspace, Purpose::QuickTest)?;
    let parts = match (arguments.only, &arguments.recording) {
        (Some(part), _) => vec![part],
        (None, Some(_)) => vec![Part::Program],
        (None, None) => vec![Part::Format, Part::Program],
    };
    let scratch = tempfile::tempdir()?;
    let mut found: Vec<Value> = Vec::new();
    let mut failed = None;
    for part in parts {
        let file = scratch.path().join("outcome");
        let ended = match part {
            Part::Format => format(workspace, arguments, &file),
            Part::Program => program(workspace, arguments, &file),
        };
        // Without an outcome the simulation itself did not work, and `ended` says why.
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) => {
                return ended.and(Err(error).context("the simulation left no outcome: were its tools missing?"));
            }
        };
        for line in text.lines() {
            found.push(serde_json::from_str(line).context("an outcome that is no JSON")?);
        }
        std::fs::remove_file(&file)?;
        failed = failed.or(ended.err());
    }

    let sum = |name: &str| -> u64 { found.iter().filter_map(|part| part.get(name)?.as_u64()).sum() };
    let mut violations = Vec::new();
    for part in &found {
        let what = part.get("what").and_then(Value::as_str).unwrap_or_default();
        let number = |name: &str| part.get(name).and_then(Value::as_u64).unwrap_or(0);
        let rows = part.get("violations").and_then(Value::as_array).context("no violations in an outcome")?;
        tools::say(format!(
            "{what}: {} seeds, {} states, {} of them through QEMU, {} violations, {} leaks",
            number("seeds"),
            number("states"),
            number("states_in_qemu"),
            rows.len(),
            number("leaks")
        ));
        for row in rows {
            violations.push(json!({ "what": what, "seed": row.get("seed"), "why": row.get("why") }));
        }
    }
    let (states, leaks, count) = (sum("states"), sum("leaks"), violations.len());
    if let Some(file) = &arguments.json {
        let outcome = json!({
            "seeds": found.first().and_then(|part| part.get("seeds")),
            "states": states,
            "states_in_qemu": sum("states_in_qemu"),
            "leaks": leaks,
            "violations": violations,
            "parts": found,
        });
        std::fs::write(file, format!("{outcome:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    println!("states {states}, violations {count}, leaks {leaks}");
    ensure!(count == 0, "what was promised does not hold; replay the seeds above");
    failed.map_or(Ok(()), Err)
}

fn format(workspace: &Workspace, arguments: &Arguments, outcome: &Path) -> Result<()> {
    let mut command = tools::cargo();
    command
        .current_dir(&workspace.root)
        .args(["test", "--locked", "--quiet", "--workspace", "--test", "powercut", "--", "--nocapture"])
        .env("POWERCUT_SEEDS", arguments.seeds.to_string())
        .env("POWERCUT_FIRST", arguments.from.to_string())
        .env("POWERCUT_JSON", outcome);
    if let Some(seed) = arguments.seed {
        command.env("POWERCUT_SEED", seed.to_string());
    }
    tools::run(&mut command)
}

fn program(workspace: &Workspace, arguments: &Arguments, outcome: &Path) -> Result<()> {
    build_plugins::build_all(workspace)?;
    let share = if arguments.only.is_some() { 1 } else { PROGRAM_SHARE };
    let mut command = tools::cargo();
    command
        .current_dir(&workspace.root)
        .args(["test", "--locked", "--quiet", "--workspace", "--test", "powercuts", "--", "--nocapture"])
        .env("SIM_SEEDS", arguments.seeds.div_ceil(share).to_string())
        .env("SIM_FIRST", (arguments.from / share).to_string())
        .env("SIM_JSON", outcome);
    match arguments.seed {
        // Faults have no seeds: all of them run, or none.
        Some(seed) => command.env("SIM_SEED", seed.to_string()).arg("no_power_cut_damages_an_image"),
        None => command.env("SIM_FAULTS", arguments.seeds.div_ceil(FAULT_SHARE).max(22).to_string()),
    };
    if let Some(directory) = &arguments.recording {
        command.env("SIM_RECORDING", std::path::absolute(directory)?);
    }
    tools::run(&mut command)
}
