//! Checking an image against itself, and repairing it.

pub(crate) mod counts;
