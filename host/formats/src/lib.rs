//! The built-in format components, embedded as bytes. Which crate made each: `plugins/`.
//!
//! They are built before this crate, by `cargo xtask build-plugins`. From another workspace the environment variable
//! `BLOCKHOUSE_COMPONENTS` says where they are: `README.md`, "From your own workspace".
//!
//! They have no rights that a component from a file would not have, and are replaced by one of the
//! same format name.

mod components {
    include!(concat!(env!("OUT_DIR"), "/components.rs"));
}

/// One built-in component.
#[derive(Clone, Copy, Debug)]
pub struct Builtin {
    /// The format that it serves.
    pub format: &'static str,
    /// The component.
    pub bytes: &'static [u8],
}

/// The built-in formats, by name.
pub const FORMATS: [Builtin; 3] = [
    Builtin { format: "qcow2", bytes: components::QCOW2 },
    Builtin { format: "raw", bytes: components::RAW },
    Builtin { format: "vmdk", bytes: components::VMDK },
];

/// The component that guesses formats, for `blockhouse probe`.
pub const PROBER: &[u8] = components::PROBE;
