//! Measures Blockhouse beside its peers: the same client, the same files, one run.
//!
//! ```text
//!   round 1:  system A ── system B ── system C     each for a fraction of a second
//!   round 2:  system A ── system B ── system C     …
//!                 └───────────┴── ratios within a round; what is printed is their median
//! ```
//!
//! A machine that is busy with something else slows all systems of a round down, and the ratio stays. Absolute
//! figures say something about the machine; ratios say something about the systems.
//!
//! | file | what it holds |
//! |---|---|
//! | `groups.rs` | what is compared with what |
//! | `neighbours.rs` | a hostile disk beside others |
//! | `vm.rs` | the same in a virtual machine |
//! | `workload.rs` | requests: pattern, size, depth, and where they go |
//! | `client.rs` | a vhost-user client over the crate `virtio-driver`, the same for all servers |
//! | `instructions.rs` | what a request costs, counted |
//! | `device.rs` | the virtio-blk device, without a transport |
//! | `inside.rs` | systems without a transport: bare io_uring, native imago, Blockhouse's disk |
//! | `servers.rs` | `blockhouse serve` and `qemu-storage-daemon` |
//! | `images.rs` | the images |
//! | `report.rs` | rows: table, JSON, SVG |
// A benchmark that cannot go on has nothing better to do than to say so and end.
#![allow(clippy::expect_used, clippy::cast_precision_loss)]

mod client;
mod device;
mod groups;
mod images;
mod inside;
mod instructions;
mod neighbours;
mod report;
mod servers;
mod vm;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

/// Measure Blockhouse beside its peers.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The `blockhouse` program.
    #[arg(long, value_name = "FILE")]
    blockhouse: PathBuf,

    /// Short rounds, and without `instructions` and `vm`: a few minutes.
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

    /// Only groups whose name contains TEXT.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,

    /// Only workloads whose name contains TEXT.
    #[arg(long, value_name = "TEXT", default_value = "")]
    workload: String,

    /// Where the images are made: a file system with room for 6 GiB.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,

    /// Only so many passes of one system, for `instructions.rs`.
    #[arg(long, hide = true, requires_all = ["system", "image"])]
    passes: Option<u64>,

    #[arg(long, hide = true)]
    system: Option<String>,

    #[arg(long, hide = true)]
    image: Option<PathBuf>,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
struct Pace {
    rounds: usize,
    round: Duration,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let (Some(passes), Some(system), Some(image)) = (arguments.passes, &arguments.system, &arguments.image) {
        return instructions::passes(system, image, passes);
    }
    let directory = match &arguments.directory {
        Some(directory) => tempfile::tempdir_in(directory),
        None => tempfile::tempdir(),
    };
    let directory = directory.context("cannot make a directory for the images")?;
    let pace = if arguments.quick {
        Pace { rounds: 5, round: Duration::from_millis(200) }
    } else {
        Pace { rounds: 11, round: Duration::from_secs(1) }
    };
    let mut rows = Vec::new();
    for (name, group) in groups::ALL {
        if !name.contains(&arguments.only) {
            continue;
        }
        eprintln!("── {name}");
        let place = groups::Place {
            directory: directory.path(),
            blockhouse: &arguments.blockhouse,
            pace,
            quick: arguments.quick,
            workload: &arguments.workload,
        };
        match group(&place) {
            Ok(more) => rows.extend(more),
            Err(error) => eprintln!("{name} was left out: {error:#}"),
        }
    }
    report::print(&rows);
    if let Some(path) = &arguments.json {
        report::json(&rows, path)?;
    }
    if let Some(path) = &arguments.markdown {
        report::markdown(&rows, path)?;
    }
    if let Some(path) = &arguments.svg {
        report::svg(&rows, path)?;
    }
    Ok(())
}
