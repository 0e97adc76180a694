//! One file per command.

pub(crate) mod check;
pub(crate) mod commit;
pub(crate) mod compare;
pub(crate) mod control;
pub(crate) mod convert;
pub(crate) mod create;
pub(crate) mod info;
pub(crate) mod map;
pub(crate) mod plugin;
pub(crate) mod probe;
pub(crate) mod read;
pub(crate) mod rebase;
pub(crate) mod resize;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod snapshot;
