//! Format components in wasmtime: a stranger's image is parsed here, and can reach nothing else.
//!
//! ```text
//!   Opener ── open(image, format) ──▶ one Instance per layer ──▶ blockhouse_block::Disk
//!      │                                   │ calls: open, connect, locate, unpack   (limits.rs)
//!      │                                   ▼
//!   Grants ──────────── policy ◀── open-at ── component        (host.rs: all it can call)
//!                         │
//!                       Audit: one event per open, allowed or denied
//! ```
//!
//! | file | what it knows |
//! |---|---|
//! | `authority.rs` | which function each world is offered: the table a reviewer reads |
//! | `limits.rs` | every limit, with its default |
//! | `grant.rs`, `grants.rs` | a grant as it is written; what was granted, open |
//! | `policy.rs` | what may be opened: the host's own wall in front of wasmtime-wasi |
//! | `pin.rs` | files that are pinned by their SHA-256, and how they are kept from changing |
//! | `locks.rs` | one writer or many readers, as QEMU sees it |
//! | `host.rs` | the functions behind the table |
//! | `instance.rs`, `clock.rs` | calling a component within its time, and throwing it away |
//! | `sandbox.rs` | the engine, and loading components |
//! | `compiler.rs`, `helper.rs` | who compiles a component, and a process that does nothing else |
//! | `cache.rs`, `compiled.rs`, `code.rs`, `whole.rs` | compiled components, kept between starts or made by hand; when they may be run; files that are whole |
//! | `layer.rs`, `crew.rs`, `restart.rs` | an instance as a layer of a disk; further ones that unpack beside it; when one that broke down is started again |
//! | `chain.rs`, `direct.rs` | from an image to a disk; what direct I/O asks of images that are written |
//! | `maintenance.rs` | calls that change an image as a whole: create, check, resize, snapshots |
//! | `text.rs`, `json.rs` | what is shown of images and components, fit for a terminal |
//! | `surface.rs`, `inspect.rs`, `probe.rs` | reading what a component imports and exports; judging it; guessing a format |
//!
//! This crate knows neither virtio nor KVM, and no type of wasmtime is in its public interface.
//!
//! ```no_run
//! use blockhouse_sandbox::{Formats, Grants, Limits, OpenRequest, Opener, Sandbox};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let sandbox = Sandbox::new(Limits::default())?;
//! let mut formats = Formats::new();
//! formats.add("qcow2", sandbox.load_file("qcow2.wasm".as_ref())?);
//! let opener = Opener::new(&sandbox, formats).grants(Grants::new().allow("/images/base")?);
//! let opened = opener.open(&OpenRequest::new("/images/untrusted.qcow2", "qcow2"))?;
//! println!("{} layers", opened.report.layers.len());
//! # Ok(()) }
//! ```
//!
//! # What an embedder adds
//!
//! The above holds components. What stands around the `blockhouse` program beside that is for the embedder to set up,
//! the walls in this order; `examples/embed` has all but the last three rows.
//!
//! | what it keeps a stranger from | how |
//! |---|---|
//! | time and memory of this process, while a component is compiled | [`CompilerProcess`] and [`serve_compiler`], prepared before the walls; [`Sandbox::compiler`]. Without it, [`Sandbox::load_file`] compiles here, unbounded |
//! | files that nobody planned, most system calls | `Walls::raise` of `blockhouse-walls`, before the first thread, with a plan of the images, the grants, the component files and `/dev/null` |
//! | what only start-up needs: component files, making and renaming files | `Walls::narrow`, once components are loaded and before an image is opened |
//! | files by name, new code | `Walls::seal`, once all is open |
//! | more than that in threads that move bytes | `Walls::thread_start`, as the first thing that they do: [`block::Pool::beginning_with`]. Rings are made before the walls narrow ([`block::Rings`]), and both are handed to the disk |
//! | a terminal, and a log, that show another text than there is | [`clean`] for every name and error that is shown, [`json`] for what is written as JSON, and a subscriber of `tracing` that does the same with its fields (`host/cli/src/log.rs` is one): they are as images and components have them |
//! | a shell, where people paste what an error suggests | errors suggest nothing themselves: [`block::Error::remedy`] says what would help, in no words of any program |
//!
//! A policy file, the code cache ([`Sandbox::code_cache`]) and the metrics are the program's as well.

#![deny(unsafe_code)]

mod audit;
pub mod authority;
mod bindings;
mod cache;
mod chain;
mod clock;
mod code;
mod compiled;
mod compiler;
mod crew;
mod direct;
mod grant;
mod grants;
mod helper;
mod host;
mod inspect;
mod instance;
pub mod json;
mod layer;
mod limits;
mod locks;
mod maintenance;
mod pin;
mod policy;
mod probe;
mod regular;
mod restart;
mod sandbox;
mod surface;
mod tally;
#[cfg(test)]
mod testing;
mod text;
mod whole;

pub use audit::{Audit, AuditFile, AuditList, AuditSink, DENIED_KEPT, GRANTED_KEPT, OpenEvent, Outcome, RepeatedOpen};
pub use authority::{Authority, CONTRACT_VERSION};
/// The block core, whose types appear in this crate's interface.
pub use blockhouse_block as block;
pub use chain::{
    BackingReference, Below, ChainReport, Fact, Formats, LayerReport, OpenRequest, OpenedDisk, Opener, SnapshotReport,
};
pub use compiler::{Compiler, compile_here};
pub use grants::{Grant, GrantReport, Grants, Referrer, Sha256Digest, absolute_name};
pub use helper::{CompilerProcess, serve_compiler};
pub use inspect::{ImportedFunction, Inspection};
pub use limits::{Limits, TICK};
pub use locks::LockMode;
pub use maintenance::{CheckReport, NewImage, OptionHelp, Repair};
pub use pin::CHECK_EVERY;
pub use probe::{Guess, PROBE_HEAD, PROBE_TAIL};
pub use restart::{Now, Restart};
pub use sandbox::{Plugin, Sandbox};
pub use tally::{FUNCTIONS, Tally};
pub use text::clean;
