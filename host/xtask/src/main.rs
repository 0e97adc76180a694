//! One command for everything that is more than `cargo build`: components, demo, tests.
//!
//! ```text
//!   cargo xtask demo ─┐
//!                     ├─▶ prerequisites ─▶ build-plugins ─▶ cargo build / cargo test
//!   cargo xtask test ─┘
//! ```

mod bench;
mod build_plugins;
mod demo;
mod fuzz;
mod hostile;
mod packages;
mod prerequisites;
mod release_notes;
mod sbom;
mod simulate;
mod soak;
mod test;
mod tools;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use tools::Workspace;

/// Build, show and test Blockhouse.
///
/// In a fresh clone, `cargo xtask demo` shows what Blockhouse is and `cargo xtask test`
/// checks everything; both prepare by themselves what they need.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Prerequisites(prerequisites::Arguments),
    BuildPlugins(build_plugins::Arguments),
    Demo(demo::Arguments),
    Test(test::Arguments),
    Simulate(simulate::Arguments),
    Hostile(hostile::Arguments),
    Fuzz(fuzz::Arguments),
    Soak(soak::Arguments),
    Bench(bench::Arguments),
    Sbom(sbom::Arguments),
    ReleaseNotes(release_notes::Arguments),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tools::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let workspace = Workspace::load()?;
    match arguments.task {
        Task::Prerequisites(arguments) => prerequisites::run(&workspace, &arguments),
        Task::BuildPlugins(arguments) => build_plugins::run(&workspace, &arguments),
        Task::Demo(arguments) => demo::run(&workspace, &arguments),
        Task::Test(arguments) => test::run(&workspace, &arguments),
        Task::Simulate(arguments) => simulate::run(&workspace, &arguments),
        Task::Hostile(arguments) => hostile::run(&workspace, &arguments),
        Task::Fuzz(arguments) => fuzz::run(&workspace, &arguments),
        Task::Soak(arguments) => soak::run(&workspace, &arguments),
        Task::Bench(arguments) => bench::run(&workspace, &arguments),
        Task::Sbom(arguments) => sbom::run(&workspace, &arguments),
        Task::ReleaseNotes(arguments) => release_notes::run(&workspace, &arguments),
    }
}
