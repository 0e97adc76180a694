//! Checking an image against itself, and repairing it.
