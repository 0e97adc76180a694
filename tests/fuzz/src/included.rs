//! Parts of the product that stand for themselves, taken out of crates that need WebAssembly, which would take
//! minutes to build with coverage for each target, or that keep them to themselves.
//!
//! They name the crate `blockhouse_sandbox`, which is this one here: see `lib.rs`.
#![allow(dead_code, unreachable_pub, missing_docs)]

#[path = "../../../host/cli/src/control_line.rs"]
pub(crate) mod control_line;
#[path = "../../../host/cli/src/disk_arg.rs"]
pub(crate) mod disk_arg;
#[path = "../../../host/cli/src/error_report.rs"]
mod error_report;
#[path = "../../../host/sandbox/src/grant.rs"]
pub(crate) mod grant;
#[path = "../../../host/cli/src/grant_arg.rs"]
pub(crate) mod grant_arg;
#[path = "../../../host/sandbox/src/json.rs"]
pub mod json;
#[path = "../../../host/virtio/src/limit.rs"]
pub(crate) mod limit;
#[path = "../../../host/sandbox/src/limits.rs"]
pub(crate) mod limits;
#[path = "../../../host/cli/src/policy.rs"]
pub(crate) mod policy;
#[path = "../../../host/cli/src/size.rs"]
mod size;
#[path = "../../../host/sandbox/src/text.rs"]
mod text;
#[path = "../../../host/sandbox/src/whole.rs"]
pub(crate) mod whole;
