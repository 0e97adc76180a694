//! A long run of servers under work and attack: do they stay as large as they were?

use std::path::PathBuf;

use anyhow::Result;

use crate::demo;
use crate::prerequisites::{self, Purpose};
use crate::tools::{self, Workspace};

/// Run servers for an hour, and see that they stay as large as they were.
///
/// One server lives for the whole time: its disks are read and written, and what is read is compared; its front
/// ends come and go; components trap and are started again. Beside it, servers are ended and killed, one after the
/// other, over the same images. Memory, descriptors and threads are sampled. The last line says what was done, and
/// whether it stayed flat.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How long.
    #[arg(long, value_name = "N", default_value = "60")]
    minutes: f64,
    /// Draw memory, descriptors and threads over time to FILE.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write all samples to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    prerequisites::ensure(workspace, Purpose::QuickTest)?;
    let program = demo::program(workspace)?;
    let build = ["build", "--locked", "--workspace", "--bin", "blockhouse-soak"];
    tools::run(tools::cargo().current_dir(&workspace.root).args(build))?;
    let mut command = std::process::Command::new(workspace.target.join("debug/blockhouse-soak"));
    command.env("BLOCKHOUSE", program).arg("--minutes").arg(arguments.minutes.to_string());
    for (name, value) in [("--json", &arguments.json), ("--svg", &arguments.svg)] {
        if let Some(value) = value {
            command.arg(name).arg(value);
        }
    }
    tools::run(&mut command)
}
