//! Compiled code in files: what must be true of one before it is run.
//!
//! ```text
//!   whole.rs: magic (8) │ SHA-256 of all that follows (32) │ cache.rs: code
//!                                                          │ compiled.rs: what it is, as JSON │ code
//! ```
//!
//! Compiled code is run as it is, with the rights of this process: whoever can write it owns the process. So
//! a file of it is a regular file of this user that nobody else can write, and it is whole, once it is in
//! memory that nobody else has.

use std::hash::{DefaultHasher, Hash, Hasher};

use wasmtime::Engine;
use wasmtime::component::Component;

pub(crate) use crate::whole::{Whole, read, write};

/// What code depends on: the version of the engine, its settings, the processor that it compiles for.
pub(crate) fn engine_id(engine: &Engine) -> String {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Code that came out of a [`Whole`] file becomes a component.
///
/// # Safety
/// The bytes must be what [`Component::serialize`] made.
#[allow(unsafe_code)]
pub(crate) unsafe fn deserialize(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: what the caller promises. The engine checks version and settings itself.
    unsafe { Component::deserialize(engine, code) }
}
