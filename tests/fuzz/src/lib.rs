//! Fuzz targets: functions that take any bytes, feed them to a part of Blockhouse, and panic if it breaks a promise.
//!
//! ```text
//!   libFuzzer (targets/*.rs, built with coverage) ─┐
//!                                                  ├─▶ a target: bytes ─▶ image, answers, guest memory, text
//!   cargo test (seeds/*, as they are) ─────────────┘       │
//!                                                          ▼
//!                             the product ──▶ no panic, no limit exceeded, and what the target's module says
//! ```
//!
//! `cargo xtask fuzz` builds and runs them all; `cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none TARGET` runs one
//! with cargo-fuzz. A program of `targets/` that is built without coverage (`cargo run -p blockhouse-fuzz --bin TARGET
//! FILE`) runs the files that it is given and says, step by step, what it does.
//!
//! | place | what it holds |
//! |---|---|
//! | `src/` | the targets, a module for each part of the product |
//! | `targets/` | a program for each target |
//! | `seeds/TARGET/` | small inputs that reach most of what a target can reach; tests run them all |
//! | `dictionaries/TARGET.dict` | words of the format, where guessing them takes long |
//!
//! A crash that was found becomes a test of the crate that was wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod code_file;
mod control;
mod disk_lane;
mod disk_read;
mod disk_string;
mod disk_write;
mod image;
mod included;
mod inflight;
mod lies;
mod policy_file;
mod qcow2;
mod qcow2_write;
mod queue;
mod rates;
mod small_formats;
mod vhost;
mod vmdk;

// For the parts of the product that name that crate, and use of it what is here.
extern crate self as blockhouse_sandbox;
#[doc(hidden)]
pub use crate::included::grant::{Grant, Referrer, Sha256Digest, absolute_name};
#[doc(hidden)]
pub use crate::included::json;
#[doc(hidden)]
pub use crate::included::limits::Limits;

#[cfg(fuzzing)]
#[doc(hidden)]
pub use libfuzzer_sys;

/// Says what a target does next: to who runs an input that was found, not to the fuzzer.
macro_rules! say {
    ($($argument:tt)*) => {
        if cfg!(not(fuzzing)) {
            eprintln!($($argument)*);
        }
    };
}
pub(crate) use say;

/// A target by its name: that of its program, of its seeds and of its dictionary.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("code_file", code_file::run),
    ("control", control::run),
    ("disk_lane", disk_lane::run),
    ("disk_read", disk_read::run),
    ("disk_string", disk_string::run),
    ("disk_write", disk_write::run),
    ("in_flight", inflight::run),
    ("limits", rates::run),
    ("policy_file", policy_file::run),
    ("qcow2_read", qcow2::read),
    ("qcow2_repair", qcow2::repair),
    ("qcow2_write", qcow2_write::run),
    ("vhost_message", vhost::run),
    ("virtio_queue", queue::run),
    ("vmdk", vmdk::run),
    ("small_formats", small_formats::run),
];

/// Runs a target.
///
/// # Panics
/// If it finds something, or if there is no such target.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of this name");
    blockhouse_plugin::testing::silence_log();
    target(data);
}

/// The program of a target.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        #[cfg(fuzzing)]
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::run($name, data));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            for file in std::env::args_os().skip(1) {
                $crate::run($name, &std::fs::read(file)?);
            }
            Ok(())
        }
    };
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_target_has_a_program_and_seeds_and_survives_them() {
        let place = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut total = 0;
        for (name, _) in TARGETS {
            let program = std::fs::read_to_string(place.join(format!("targets/{name}.rs"))).unwrap();
            assert!(program.contains(&format!("program!(\"{name}\")")), "{name}: the program runs another target");
            let mut count = 0;
            for seed in std::fs::read_dir(place.join("seeds").join(name)).unwrap() {
                let bytes = std::fs::read(seed.unwrap().path()).unwrap();
                total += bytes.len();
                count += 1;
                run(name, &bytes);
            }
            assert!(count > 0, "{name} has no seeds");
            // Nothing at all, and a little of everything.
            run(name, &[]);
            for byte in 0..=255 {
                run(name, &[byte; 3]);
            }
        }
        assert_eq!(std::fs::read_dir(place.join("targets")).unwrap().count(), TARGETS.len(), "programs and targets");
        assert!(total < 512 << 10, "{total} bytes of seeds: keep them small");
    }
}
