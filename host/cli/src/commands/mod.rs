//! One file per command.

pub(crate) mod info;
pub(crate) mod map;
pub(crate) mod plugin;
pub(crate) mod probe;
pub(crate) mod read;
pub(crate) mod run;
pub(crate) mod snapshot;
