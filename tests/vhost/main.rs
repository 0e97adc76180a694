//! `blockhouse serve`, with front ends that behave, that die, and that attack.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod control;
mod disks;
mod frontend;
mod frozen;
mod hostile;
mod interrupts;
mod limits;
mod metrics;
mod restarts;
mod service;
