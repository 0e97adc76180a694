//! What a read of 4 KiB may cost, in instructions of this process: a request that became dearer fails here, and no other
//! process can disturb it.
//!
//! The figures are of the build that the tests have, which is about half as fast as a release. Between runs they differ by
//! a hundredth, between builds of other compilers by more: then measure before and after with the same one, and write
//! here what is right.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::process::Command;
use std::time::Duration;

use blockhouse_tests::{on_path, run_within, skip};

/// Valgrind makes a program some fifty times slower.
const LIMIT: Duration = Duration::from_secs(300);

/// A request may not cost more than the budget of its system, and the budget not more than this much of the request.
const SLACK: f64 = 1.25;

fn costs_at_most(system: &str, budget: f64) {
    if !cfg!(all(target_arch = "x86_64", debug_assertions)) {
        return skip("the budgets are those of a debug build for x86-64");
    }
    if !on_path("valgrind") {
        return skip("there is no valgrind to count instructions with: install the package of that name");
    }
    if let Err(error) = io_uring::IoUring::new(1) {
        return skip(format!("without io_uring requests take another way here: {error}"));
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), vec![0xa5; 8 << 20]).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockhouse-bench"));
    let cost = run_within(LIMIT, command.args(["--system", system, "--image"]).arg(image.path())).succeeded().text();
    let cost: f64 = cost.trim().parse().unwrap();
    assert!(cost <= budget, "{system}: {cost} instructions for a request, and the budget is {budget}");
    assert!(
        cost * SLACK >= budget,
        "{system}: {cost} instructions for a request: the budget of {budget} is too high now"
    );
}

#[test]
fn a_read_of_a_disk_costs_no_more_than_it_did() {
    costs_at_most("blockhouse disk raw", 1280.0);
}

#[test]
fn a_read_through_the_device_costs_no_more_than_it_did() {
    costs_at_most("blockhouse device raw", 8000.0);
}
