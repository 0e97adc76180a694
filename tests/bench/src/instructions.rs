//! What a request costs in instructions of this process, which no other process can disturb.
//!
//! ```text
//!   valgrind blockhouse-bench --passes 1 --system S --image I     start + learn + 1 pass
//!   valgrind blockhouse-bench --passes 9 --system S --image I     start + learn + 9 passes
//!                                                          the difference, for each request of 8 passes
//! ```
//!
//! What the kernel does is not in it: it is the same for all, but for how often it is entered.
//!
//! The tests hold two of the figures to a budget: `tests/budget.rs`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blockhouse_virtio::{Rate, RateLimits};

use crate::device::Device;
use crate::groups::Place;
use crate::images::{self, SIZE};
use crate::inside::{Bare, Native, Sandboxed};
use crate::report::Row;
use crate::workload::{Kind, System, Workload};

/// Requests of a pass, each at a place of its own: an image has to have 8 MiB.
const REQUESTS: u64 = 2_000;
const PASSES: [u64; 2] = [1, 9];

/// Each system, and what it is compared with.
const SYSTEMS: [(&str, &[&str]); 6] = [
    ("io_uring raw", &[]),
    ("imago qcow2", &["io_uring raw"]),
    ("blockhouse disk raw", &["io_uring raw", "imago qcow2"]),
    ("blockhouse disk qcow2", &["io_uring raw", "imago qcow2", "blockhouse disk raw"]),
    ("blockhouse device raw", &["blockhouse disk raw"]),
    ("blockhouse device raw, limited", &["blockhouse device raw"]),
];

/// More than the client asks for.
const LIMITS: RateLimits = RateLimits {
    requests: Some(Rate { per_second: 1 << 30, burst: 1 << 30 }),
    bytes: Some(Rate { per_second: 1 << 40, burst: 1 << 40 }),
};

const PASS: Workload = Workload { once: true, length: REQUESTS * 4096, ..Workload::new(Kind::Read, true, 4096, 32) };

/// In the process that is counted.
pub(crate) fn passes(system: &str, image: &Path, passes: u64) -> Result<()> {
    let mut system: Box<dyn System> = match system {
        "io_uring raw" => Box::new(Bare::new(image)?),
        "imago qcow2" => Box::new(Native::new(image)?),
        "blockhouse disk raw" => Box::new(Sandboxed::new(image, "raw")?),
        "blockhouse device raw" => Box::new(Device::new(image, "raw", RateLimits::default())?),
        "blockhouse device raw, limited" => Box::new(Device::new(image, "raw", LIMITS)?),
        "blockhouse disk qcow2" => Box::new(Sandboxed::new(image, "qcow2")?),
        _ => bail!("there is no system {system:?}"),
    };
    for round in 0..=passes {
        let round = usize::try_from(round).context("too many passes")?;
        let (count, _) = system.run(&PASS, round, Duration::from_secs(3600))?;
        ensure!(count == REQUESTS, "{count} requests instead of {REQUESTS}");
    }
    Ok(())
}

/// Instructions for a request, and those of others beside it.
pub(crate) fn instructions(place: &Place<'_>) -> Result<Vec<Row>> {
    if place.quick {
        eprintln!("   it takes two minutes, and is left out by --quick");
        return Ok(Vec::new());
    }
    let raw = images::raw(place.directory, "full.raw", SIZE)?;
    let qcow2 = images::qcow2(place.directory, "full.qcow2", &raw, &[])?;
    let mut costs = Vec::new();
    for (system, others) in SYSTEMS {
        let image = if system.contains(" raw") { &raw } else { &qcow2 };
        let cost = cost(system, image)?;
        eprintln!("   {system} {cost:.0}");
        costs.push((system, others, cost));
    }
    let row = |(system, others, cost): &(&str, &[&str], f64)| {
        let mut row = Row::single("instructions", &PASS.name(), system, "instructions", *cost);
        for (base, _, other) in costs.iter().filter(|(base, ..)| others.contains(base)) {
            row.compare(base, cost / other);
        }
        row
    };
    Ok(costs.iter().map(row).collect())
}

/// Instructions for a request of this system.
pub(crate) fn cost(system: &str, image: &Path) -> Result<f64> {
    let [few, many] = PASSES;
    let difference = count(system, image, many)?.saturating_sub(count(system, image, few)?);
    Ok(difference as f64 / (REQUESTS * (many - few)) as f64)
}

/// All instructions of a process.
fn count(system: &str, image: &Path, passes: u64) -> Result<u64> {
    let report = tempfile::NamedTempFile::new().context("cannot make a file for the report of valgrind")?;
    let output = Command::new("valgrind")
        .arg("--tool=callgrind")
        .arg(format!("--callgrind-out-file={}", report.path().display()))
        .arg(std::env::current_exe()?)
        .args(["--passes", &passes.to_string(), "--system", system, "--image"])
        .arg(image)
        .output()
        .context("cannot start valgrind: install it, from the package of that name")?;
    ensure!(output.status.success(), "{system} failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(report.path()).context("valgrind wrote no report")?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")));
    Ok(total.context("the report of valgrind has no total")?.trim().parse()?)
}
