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
    #[arg(long, value_name = "FILE", required_unless_present = "system")]
    blockhouse: Option<PathBuf>,

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

    /// Only what a request of this system costs, in instructions, as a number.
    #[arg(long, value_name = "NAME", requires = "image")]
    system: Option<String>,

    /// The image of `--system`, of at least 8 MiB.
    #[arg(long, value_name = "FILE", requires = "system")]
    image: Option<PathBuf>,

    /// Only so many passes: what is counted to know the costs.
    #[arg(long, hide = true, requires = "system")]
    passes: Option<u64>,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
struct Pace {
    rounds: usize,
    round: Duration,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let (Some(system), Some(image)) = (&arguments.system, &arguments.image) {
        if let Some(passes) = arguments.passes {
            return instructions::passes(system, image, passes);
        }
        println!("{:.0}", instructions::cost(system, image)?);
        return Ok(());
    }
    let blockhouse = arguments.blockhouse.as_deref().context("which program?")?;
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
            blockhouse,
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
