//! The benchmark: Blockhouse beside its peers, built with all optimisations.

use std::path::PathBuf;

use anyhow::Result;

use crate::build_plugins;
use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace};

/// Measure Blockhouse beside its peers: io_uring, imago, qemu-storage-daemon.
///
/// All systems get the same requests for the same files in turn, and what counts is the median of the ratios.
/// Examples:
///
///   cargo xtask bench --quick
///   cargo xtask bench --only served --json rows.json --svg chart.svg
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Short rounds, and without `instructions` and `vm`: a few minutes once all is built.
    #[arg(long)]
    quick: bool,

    /// Write the rows to FILE as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the ratios to FILE.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write tables to FILE, as `host/docs/performance.md` has them.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// Only groups whose name contains TEXT: inside, instructions, served, queues, chains, fragmented, compressed,
    /// allocate, sizes, cold, memory, neighbours, vm.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Only workloads whose name contains TEXT, such as random-read-4k.
    #[arg(long, value_name = "TEXT")]
    workload: Option<String>,

    /// Where the images are made: a file system with room for 6 GiB.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    // A Linux guest takes part, unless it has to be quick.
    prerequisites::ensure(workspace, if arguments.quick { Purpose::QuickTest } else { Purpose::Test })?;
    build_plugins::build_all(workspace)?;
    let build = ["build", "--release", "--locked", "--workspace", "--bin", "blockhouse", "--bin", "blockhouse-bench"];
    tools::run(tools::cargo().current_dir(&workspace.root).args(build))?;
    let programs = workspace.target.join("release");
    let mut command = std::process::Command::new(programs.join("blockhouse-bench"));
    command.env("BLOCKHOUSE_HOSTILE", workspace.target.join("components/hostile.wasm"));
    command.arg("--blockhouse").arg(programs.join("blockhouse"));
    if arguments.quick {
        command.arg("--quick");
    }
    for (name, value) in [
        ("--json", &arguments.json),
        ("--svg", &arguments.svg),
        ("--markdown", &arguments.markdown),
        ("--directory", &arguments.directory),
    ] {
        if let Some(value) = value {
            command.arg(name).arg(value);
        }
    }
    if let Some(workload) = &arguments.workload {
        command.arg("--workload").arg(workload);
    }
    if let Some(only) = &arguments.only {
        command.arg("--only").arg(only);
    }
    tools::run(&mut command)
}
