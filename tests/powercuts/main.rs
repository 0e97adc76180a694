//! Power cuts and faults under the real parts: the component in its sandbox, the disk, the system's own calls.
//!
//! ```text
//!   seed ─▶ plan ─▶ this program again, under strace ─▶ calls on the image, and what the program
//!              │                                         acknowledged, in one order (journal.rs)
//!              ▼                                                     │
//!      what each sector may hold ◀──────── judged ──────── states that a power cut leaves
//!                (judge.rs)         qemu-img check, read back          │
//!                                                           recovery: written again, recorded too
//! ```
//!
//! Of what reached the file after the last sync that ended before the cut, any part may be missing, sector by
//! sector of 512 bytes. In each state
//!
//! * nothing is corrupt; leaks are allowed;
//! * a sector holds what it held at the last acknowledged flush, or something written later;
//! * after a recovery that is written, flushed and closed, everything is exact; a cut in the middle of it
//!   leaves the old or the new;
//! * what lies below is unchanged.
//!
//! The same for calls that fail, for files that cannot grow, and for components that trap (faults.rs).
//!
//! `cargo xtask simulate` runs it for longer, through `SIM_SEEDS` (how many), `SIM_FIRST` (from which one),
//! `SIM_SEED` (one of them), `SIM_RECORDING` (of that one, instead of a new recording), `SIM_FAULTS` (plans
//! for each kind of fault) and `SIM_JSON` (where each test adds a line with its outcome).
//! `plugins/qcow2/tests/powercut` does the same to the format alone, in memory: a hundred times faster.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod cuts;
mod faults;
mod images;
mod journal;
mod judge;
mod plan;
mod workload;

use std::path::Path;

use blockhouse_tests::{on_path, skip};

use crate::judge::Bench;

/// Whether the tests can run here; if not, it was said.
#[track_caller]
fn have_tools() -> bool {
    for tool in ["qemu-img", "qemu-io", "strace"] {
        if !on_path(tool) {
            skip(format_args!("{tool} is not installed"));
            return false;
        }
    }
    let traced = std::process::Command::new("strace").args(["-f", "--seccomp-bpf", "-o", "/dev/null", "true"]).output();
    if !traced.is_ok_and(|output| output.status.success()) {
        skip("strace may not trace here, or is older than 5.3");
        return false;
    }
    true
}

/// Adds what a test found to the file that `SIM_JSON` names.
fn outcome(found: &serde_json::Value) {
    if let Some(file) = std::env::var_os("SIM_JSON") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        // One write of a line: those of several tests stay whole.
        std::io::Write::write_all(&mut file, format!("{found}\n").as_bytes()).unwrap();
    }
}

/// Calls `action` with new images and all that is needed to judge them.
fn with_bench<T>(action: impl FnOnce(&Bench<'_>) -> T) -> T {
    let scratch = blockhouse_tests::scratch();
    // As strace and the policy name it.
    let directory = std::fs::canonicalize(scratch.path()).unwrap();
    let below = images::make_below(&directory);
    let made = images::make_all(&directory);
    let opener = workload::opener(&directory, None);
    action(&Bench { directory: &directory, opener: &opener, made: &made, below: &below })
}

/// The other process of the tests below. Nothing to do when it runs as a test.
#[test]
fn the_process_that_is_watched() {
    if let Some(work) = std::env::var_os(workload::VARIABLE) {
        workload::run(Path::new(&work));
    }
}
