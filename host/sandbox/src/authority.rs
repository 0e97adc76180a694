//! What each level of authority is offered, function by function: a function that is not here does not
//! exist for a component. `blockhouse plugin inspect` judges by this table, the one in `wit/README.md`
//! is printed from it, and a test in `host.rs` holds the linker equal to it.

use std::fmt;

use serde::Serialize;

/// A level of authority: a world of `wit/world.wit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Authority {
    /// World `prober-only`: no imports.
    Prober,
    /// World `read-only-format`.
    ReadOnly,
    /// World `read-write-format`. Unstable.
    ReadWrite,
}

impl Authority {
    /// The name of the world.
    pub const fn world(self) -> &'static str {
        match self {
            Self::Prober => "prober-only",
            Self::ReadOnly => "read-only-format",
            Self::ReadWrite => "read-write-format",
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.world())
    }
}

/// One function that a component may be given.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// The interface without its version: `wasi:filesystem/types`.
    pub interface: &'static str,
    /// The name as the component model spells it: `[method]descriptor.read`.
    pub name: &'static str,
    /// The lowest level that is given it.
    pub level: Authority,
    /// What it lets a component do, for a reviewer.
    pub grants: &'static str,
}

/// The version of `wasi:filesystem` that the host offers; any 0.2 release links.
pub const WASI_VERSION: &str = "0.2.6";
/// The version of the contract.
pub const CONTRACT_VERSION: &str = "0.1.0";

/// The interface of file descriptors.
pub const TYPES: &str = "wasi:filesystem/types";
/// The interface that lists preopened directories.
pub const PREOPENS: &str = "wasi:filesystem/preopens";
/// Blockhouse's own interface for files held.
pub const FILES: &str = "blockhouse:format/files";
/// Blockhouse's own log.
pub const LOG: &str = "blockhouse:format/log";

const fn function(interface: &'static str, name: &'static str, level: Authority, grants: &'static str) -> Function {
    Function { interface, name, level, grants }
}

/// All functions, by interface.
pub const FUNCTIONS: &[Function] = &[
    function(PREOPENS, "get-directories", Authority::ReadOnly, "see the names of the grants"),
    function(
        TYPES,
        "[method]descriptor.open-at",
        Authority::ReadOnly,
        "open a granted regular file, with at most the rights of its grant; each attempt is judged and recorded",
    ),
    function(TYPES, "[method]descriptor.read", Authority::ReadOnly, "read bytes of an open file"),
    function(
        TYPES,
        "[method]descriptor.stat",
        Authority::ReadOnly,
        "see type and size of an open file (no times, no link count)",
    ),
    function(TYPES, "[method]descriptor.get-type", Authority::ReadOnly, "see the type of an open file"),
    function(TYPES, "[method]descriptor.get-flags", Authority::ReadOnly, "see the rights of an open file"),
    function(TYPES, "[resource-drop]descriptor", Authority::ReadOnly, "close a file"),
    function(
        FILES,
        "share",
        Authority::ReadOnly,
        "name an open file to the host, so that the host reads it for the guest",
    ),
    function(FILES, "size", Authority::ReadOnly, "see the size of an open file"),
    function(LOG, "write", Authority::ReadOnly, "write a line to the operator's log (cut, escaped, counted)"),
    function(
        TYPES,
        "[method]descriptor.write",
        Authority::ReadWrite,
        "write bytes of a file that was handed over or granted for writing",
    ),
    function(TYPES, "[method]descriptor.set-size", Authority::ReadWrite, "grow or shrink such a file"),
    function(TYPES, "[method]descriptor.sync-data", Authority::ReadWrite, "make its bytes durable"),
    function(TYPES, "[method]descriptor.sync", Authority::ReadWrite, "make its bytes and metadata durable"),
];

/// The level that `function` of `interface` (without version) needs; `None` if no level has it.
pub fn level_of(interface: &str, function: &str) -> Option<Authority> {
    FUNCTIONS.iter().find(|f| f.interface == interface && f.name == function).map(|f| f.level)
}

/// The authority table in Markdown, as it stands in `wit/README.md`.
pub fn table() -> String {
    let mut text = String::from(
        "| function | prober-only | read-only-format | read-write-format | what it lets a component do |\n|---|---|---|---|---|\n",
    );
    for f in FUNCTIONS {
        let mark = |level: Authority| if level >= f.level { "yes" } else { "–" };
        text.push_str(&format!(
            "| `{}` `{}` | {} | {} | {} | {} |\n",
            f.interface,
            f.name,
            mark(Authority::Prober),
            mark(Authority::ReadOnly),
            mark(Authority::ReadWrite),
            f.grants,
        ));
    }
    text
}
