//! Attacks: images, components and files that try to get out, or to take the host down with them.
//!
//! | file | who attacks |
//! |---|---|
//! | `references.rs` | qcow2 images that name files of the host |
//! | `vmdk.rs` | VMDK descriptors that do |
//! | `files.rs` | links, devices and pipes where a file should be; files that flip while they are opened |
//! | `chains.rs` | loops, endless chains, bases that change |
//! | `parsers.rs` | header fields, bombs, truncations, polyglots |
//! | `aliases.rs` | entries that name metadata as data, and a guest's header, when the image is written |
//! | `wasi.rs` | components that use the file functions against their meaning |
//! | `components.rs` | components that loop, grow, trap and lie |
//! | `maintenance.rs` | components that do so where an image is made, checked, changed as a whole |
//! | `restart.rs` | components that break down, and are started again or not |
//! | `loading.rs` | components that want more than there is, and files that are no components |
//! | `surfaces.rs` | components that attack whoever looks at what they import and export |
//! | `compiling.rs` | components that attack the compiler |
//! | `writing.rs` | components that misuse the right to write |
//! | `grants.rs` | images that use a grant for what it is not meant for; files that change under a disk |
//! | `guard.rs` | guests that make a raw disk look like an image |
//! | `terminal.rs` | names that do something to a terminal that shows them |
//! | `machine.rs` | a component that breaks under a running guest |
//! | `neighbours.rs` | one disk of four that a server has |
//! | `new_files.rs` | images that are read while a file is made |
//! | `walls.rs` | components whose host hands out everything |
//! | `traces.rs` | nobody: what the program asks of the kernel while it is attacked |
//!
//! `place.rs`, `qcow2.rs` and `library.rs` are the tools; `tally.rs` counts what was tried,
//! `snapshot.rs` compares the text of every refusal with `refusals.txt`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod aliases;
mod chains;
mod compiling;
mod components;
mod crew;
mod files;
mod grants;
mod guard;
mod library;
mod loading;
mod machine;
mod maintenance;
mod neighbours;
mod new_files;
mod parsers;
mod place;
mod qcow2;
mod references;
mod restart;
mod snapshot;
mod surfaces;
mod tally;
mod terminal;
mod traces;
mod vmdk;
mod walls;
mod wasi;
mod writing;
