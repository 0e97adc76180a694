//! Who makes machine code of a component, and who believes it.
//!
//! ```text
//!   bytes ── surface read (inspect.rs): refused, or ──▶ Compiler ──▶ machine code ──▶ this process
//!                                                          │
//!                                                          ├ none: in this process, no limits
//!                                                          └ CompilerProcess (helper.rs): its own process, limits
//! ```
//!
//! Machine code has all rights of the process that runs it, so whoever makes it is believed. What a compiler in a
//! process of its own buys, and what not:
//!
//! | a component that | in this process | in a process of its own |
//! |---|---|---|
//! | takes for ever to compile | hangs the program | is refused after [`Limits::compile_time`] |
//! | takes all memory, makes the compiler crash | ends the program | is refused |
//! | takes over the compiler by a bug in it, which then reads files, calls home | has this process | has a process without files, network or further programs |
//! | takes over the compiler, which then answers with code of its choice | has this process | **has this process**, inside of the walls around it |
//!
//! The last line holds for a mistake of the compiler too, that makes code which leaves its sandbox: WebAssembly
//! stands and falls with its compiler. Who cannot bear that takes components by their digest alone (`--policy`).

use std::fmt;

use blockhouse_block::{Error, ErrorKind, Result};

use crate::limits::Limits;
use crate::sandbox::{NO_COMPONENT, engine};

/// Makes machine code of components.
///
/// # Safety
/// What [`compile`](Self::compile) returns is run with all rights of this process. It must be what [`compile_here`]
/// returned, for the same bytes and limits, in this process or in another one of the same version on the same
/// machine that nobody else could have answered for.
#[allow(unsafe_code)]
pub unsafe trait Compiler: fmt::Debug + Send + Sync {
    /// Makes machine code of a component, whose `name` is for messages.
    ///
    /// # Errors
    /// [`Component`](ErrorKind::Component) if it cannot be compiled; [`Limit`](ErrorKind::Limit) if that takes more
    /// than [`Limits`] has for it.
    fn compile(&self, name: &str, component: &[u8], limits: &Limits) -> Result<Vec<u8>>;
}

/// Makes machine code of a component, in this process. Opens nothing, runs nothing of it, and makes no memory
/// executable. Takes the time and memory that it takes.
///
/// # Errors
/// [`Component`](ErrorKind::Component) if it is no component that this host can run.
pub fn compile_here(component: &[u8], limits: &Limits) -> Result<Vec<u8>> {
    engine(limits)?
        .precompile_component(component)
        .map_err(|error| Error::new(ErrorKind::Component, format!("{NO_COMPONENT}: {error:#}")).with_source(error))
}
