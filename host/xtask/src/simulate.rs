//! The power-cut simulation, for longer than the tests run it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace};

/// Cut the power in the middle of writes to qcow2 images, and check every state that can be left.
///
/// Each seed is a sequence of operations and several cuts; the same seed is always the same. The
/// last line says how many states were checked, how many seeds violate what was promised, and how many
/// clusters leaked (space that is counted and not used; harmless). Example:
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
    /// Write the outcome to FILE as JSON: `seeds`, `states`, `leaks`, and `violations`, each with
    /// `seed` and `why`.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    prerequisites::ensure(workspace, Purpose::QuickTest)?;
    let outcome = match &arguments.json {
        Some(file) => std::path::absolute(file)?,
        None => workspace.target.join("powercut.json"),
    };
    let mut command = tools::cargo();
    command
        .current_dir(&workspace.root)
        .args(["test", "--locked", "--quiet", "-p", "blockhouse-qcow2", "--test", "powercut", "--", "--nocapture"])
        .env("POWERCUT_SEEDS", arguments.seeds.to_string())
        .env("POWERCUT_FIRST", arguments.from.to_string())
        .env("POWERCUT_JSON", &outcome);
    if let Some(seed) = arguments.seed {
        command.env("POWERCUT_SEED", seed.to_string());
    }
    let _ = std::fs::remove_file(&outcome);
    let ended = tools::run(&mut command);
    // Without an outcome the simulation itself did not work, and `ended` says why.
    let text = match std::fs::read_to_string(&outcome) {
        Ok(text) => text,
        Err(error) => return ended.and(Err(error).context("the simulation left no outcome: were its tools missing?")),
    };
    let found: Value = serde_json::from_str(&text)?;
    let number = |name: &str| found.get(name).and_then(Value::as_u64).with_context(|| format!("no {name} in {text}"));
    let (states, leaks) = (number("states")?, number("leaks")?);
    let violations = found.get("violations").and_then(Value::as_array).context("no violations in the outcome")?.len();
    println!("states {states}, violations {violations}, leaks {leaks}");
    ensure!(violations == 0, "what was promised does not hold; replay the seeds above");
    ended
}
