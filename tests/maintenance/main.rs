//! The commands that make and change images, with QEMU's tools as the judge: what Blockhouse made QEMU
//! uses and finds nothing wrong with, and the other way round.
//!
//! | file | what |
//! |---|---|
//! | `place.rs` | a directory with images, and what is asked of them |
//! | `create.rs`, `check.rs`, ... | one file per command |
//! | `kills.rs` | commands that are killed at any time lose nothing and can be run again |
//! | `sharing.rs` | images that are in use, and `--force-share` |

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod kills;
mod place;
mod rebase;
mod resize;
mod sharing;
mod snapshots;
