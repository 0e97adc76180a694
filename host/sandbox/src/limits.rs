//! Every limit on a component, in one place.

use std::io;
use std::time::Duration;

/// Why a file is not opened or registered once the process has as many as it may, and what to do about it.
pub(crate) const OUT_OF_FILES: &str = "this process may have no more files open; raise its limit (RLIMIT_NOFILE: \
                                       ulimit -n, or LimitNOFILE= of a service)";

/// Whether an error says that the process has as many files open as it may.
pub(crate) fn is_out_of_files(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error())
}

/// What one component instance, and the chain it belongs to, may use. Every instance gets the same
/// limits. Where a field says nothing else, an instance that goes over one is thrown away, and its disk answers errors
/// for what it does not know until another one takes its place, if one may ([`Restart`](crate::Restart)).
///
/// The defaults fit every built-in format with a wide margin on any image that QEMU can make.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of linear memory of one instance, all its memories together. Default 64 MiB. More is refused, which ends
    /// most components.
    pub memory_bytes: usize,
    /// Elements of all tables of one instance. Default 20,000. More is refused, as more memory is.
    pub table_elements: usize,
    /// Core module instances inside one component instance. Default 16.
    pub core_instances: usize,
    /// Bytes of stack for WebAssembly frames. Default 512 KiB.
    pub stack_bytes: usize,
    /// Handles (open files and directories) that one instance may hold at a time. Default 2,112: the 2,048 parts of a
    /// split VMDK of 4 TiB, and some for the image, its parent and directories.
    ///
    /// Each is a file descriptor of the process, and each shared file is two more: a process that serves
    /// strangers' images needs an `RLIMIT_NOFILE` to match, or one image could use up the descriptors of
    /// all. The `blockhouse` program raises its own to the hard limit. An image that does not open for want
    /// of descriptors is an error of the kind [`Limit`](blockhouse_block::ErrorKind::Limit).
    pub handles: usize,
    /// Bytes that may cross from the component to the host in one call, whichever of them calls: strings, lists.
    /// Default 32 MiB, twice the largest packed unit.
    pub transfer_bytes: usize,
    /// Calls of host functions within one call of the component. Default 1,000,000.
    pub host_calls: u64,
    /// Attempts to open a file in the life of one instance, allowed or denied. Default 4,224, twice the handles.
    pub opens: u32,
    /// Files that one instance may register for the host's I/O. Default 2,112, one for each handle. More are refused.
    pub shared_files: u32,
    /// Length of a path that may be opened, in bytes. Default 4,096. Longer ones are refused.
    pub path_bytes: usize,
    /// Log messages of one instance; further ones are dropped and counted. Default 1,000.
    pub log_messages: u32,
    /// Length of one log message and of one error text, in bytes; longer ones are cut. Default 4,096. An image that
    /// names a file with more is refused.
    pub text_bytes: usize,
    /// Entries in the lists that describe an image (facts, further files, snapshots). Default 65,536. An image with
    /// more is refused.
    pub description_entries: usize,
    /// Layers of one disk, the top included. Default 200.
    pub chain_depth: usize,
    /// Instances that serve one layer at a time, each within the limits of an instance. Default 4. Those after the
    /// first one unpack while it is busy, in layers that are only read.
    pub instances: u32,
    /// Time for one call of the component, host functions included. Default 10 s.
    ///
    /// Checked every [`TICK`]; a host function that is under way is finished first. All of them are
    /// short: reads of regular files, 64 KiB at a time, or they wait for the storage.
    pub call_time: Duration,
    /// Time that one call may wait for the storage beside that: in reads, writes and syncs of a [`TICK`] or longer.
    /// Default 5 minutes.
    ///
    /// A component cannot help it, and if it were thrown away with something not written yet, its disk would be lost.
    pub storage_time: Duration,
    /// Time for one call that works on a whole image: check, repair, resize, snapshots, the begin of
    /// writing. Default 15 minutes.
    pub maintenance_time: Duration,
    /// Calls of host functions within such a call. Default 100,000,000.
    pub maintenance_host_calls: u64,
    /// Bytes of a compiled-from component file. Default 64 MiB.
    pub component_bytes: u64,
    /// Time for compiling one component. Default 30 s.
    ///
    /// This and the next two bound a compiler in a process of its own
    /// ([`CompilerProcess`](crate::CompilerProcess)). A component that is compiled in this process takes the
    /// time and memory that it takes.
    pub compile_time: Duration,
    /// Address space of a compiler process, in bytes. Default 2 GiB.
    pub compile_memory_bytes: u64,
    /// Bytes of machine code that one component may become. Default 256 MiB.
    pub compiled_bytes: u64,
}

/// How often time limits are checked.
pub const TICK: Duration = Duration::from_millis(10);

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            table_elements: 20_000,
            core_instances: 16,
            stack_bytes: 512 << 10,
            handles: 2112,
            transfer_bytes: 32 << 20,
            host_calls: 1_000_000,
            opens: 4224,
            shared_files: 2112,
            path_bytes: 4096,
            log_messages: 1000,
            text_bytes: 4096,
            description_entries: 65_536,
            chain_depth: 200,
            instances: 4,
            call_time: Duration::from_secs(10),
            storage_time: Duration::from_secs(5 * 60),
            maintenance_time: Duration::from_secs(15 * 60),
            maintenance_host_calls: 100_000_000,
            component_bytes: 64 << 20,
            compile_time: Duration::from_secs(30),
            compile_memory_bytes: 2 << 30,
            compiled_bytes: 256 << 20,
        }
    }
}

/// Each limit by its name: how it is read, and how it is set.
type Named = (&'static str, fn(&Limits) -> u64, fn(&mut Limits, u64));

/// Only values that are not above the present one are set.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A `usize` limit is one of memory of this process.
fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// All limits, in the order of the structure.
const NAMED: [Named; 23] = [
    ("memory-bytes", |limits| wide(limits.memory_bytes), |limits, value| limits.memory_bytes = size(value)),
    ("table-elements", |limits| wide(limits.table_elements), |limits, value| limits.table_elements = size(value)),
    ("core-instances", |limits| wide(limits.core_instances), |limits, value| limits.core_instances = size(value)),
    ("stack-bytes", |limits| wide(limits.stack_bytes), |limits, value| limits.stack_bytes = size(value)),
    ("handles", |limits| wide(limits.handles), |limits, value| limits.handles = size(value)),
    ("transfer-bytes", |limits| wide(limits.transfer_bytes), |limits, value| limits.transfer_bytes = size(value)),
    ("host-calls", |limits| limits.host_calls, |limits, value| limits.host_calls = value),
    ("opens", |limits| limits.opens.into(), |limits, value| limits.opens = narrow(value)),
    ("shared-files", |limits| limits.shared_files.into(), |limits, value| limits.shared_files = narrow(value)),
    ("path-bytes", |limits| wide(limits.path_bytes), |limits, value| limits.path_bytes = size(value)),
    ("log-messages", |limits| limits.log_messages.into(), |limits, value| limits.log_messages = narrow(value)),
    ("text-bytes", |limits| wide(limits.text_bytes), |limits, value| limits.text_bytes = size(value)),
    (
        "description-entries",
        |limits| wide(limits.description_entries),
        |limits, value| limits.description_entries = size(value),
    ),
    ("chain-depth", |limits| wide(limits.chain_depth), |limits, value| limits.chain_depth = size(value)),
    ("instances", |limits| limits.instances.into(), |limits, value| limits.instances = narrow(value)),
    (
        "call-time-ms",
        |limits| millis(limits.call_time),
        |limits, value| limits.call_time = Duration::from_millis(value),
    ),
    (
        "storage-time-ms",
        |limits| millis(limits.storage_time),
        |limits, value| limits.storage_time = Duration::from_millis(value),
    ),
    (
        "maintenance-time-ms",
        |limits| millis(limits.maintenance_time),
        |limits, value| limits.maintenance_time = Duration::from_millis(value),
    ),
    (
        "maintenance-host-calls",
        |limits| limits.maintenance_host_calls,
        |limits, value| limits.maintenance_host_calls = value,
    ),
    ("component-bytes", |limits| limits.component_bytes, |limits, value| limits.component_bytes = value),
    (
        "compile-time-ms",
        |limits| millis(limits.compile_time),
        |limits, value| limits.compile_time = Duration::from_millis(value),
    ),
    ("compile-memory-bytes", |limits| limits.compile_memory_bytes, |limits, value| limits.compile_memory_bytes = value),
    ("compiled-bytes", |limits| limits.compiled_bytes, |limits, value| limits.compiled_bytes = value),
];

impl Limits {
    /// The names of all limits as configuration files write them: those of the fields with `-` for `_`, and
    /// times in milliseconds, with `-ms`.
    pub fn names() -> impl Iterator<Item = &'static str> + Clone {
        NAMED.iter().map(|(name, ..)| *name)
    }

    /// The limit of this name, or `None` if there is none.
    pub fn get(&self, name: &str) -> Option<u64> {
        NAMED.iter().find(|(known, ..)| *known == name).map(|(_, get, _)| get(self))
    }

    /// Lowers the limit of this name. A value of 0 or above the present one is refused, with the reason.
    ///
    /// # Errors
    /// Why it cannot be set to that.
    pub fn lower(&mut self, name: &str, value: u64) -> Result<(), String> {
        let (_, get, set) =
            NAMED.iter().find(|(known, ..)| *known == name).ok_or_else(|| format!("there is no limit {name:?}"))?;
        let now = get(self);
        if value == 0 {
            return Err("0 is no limit: nothing would work".to_owned());
        }
        if value > now {
            return Err(format!(
                "{value} is more than the {now} that there are without a policy; it can be lowered only"
            ));
        }
        set(self, value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_limit_has_a_name_and_can_be_lowered() {
        // A field without a name here does not show in the text of the structure below.
        let fields = format!("{:?}", Limits::default());
        for name in Limits::names() {
            let field = name.strip_suffix("-ms").unwrap_or(name).replace('-', "_");
            assert!(fields.contains(&format!("{field}: ")), "{field}");
            let mut limits = Limits::default();
            let default = limits.get(name).unwrap();
            limits.lower(name, default).unwrap();
            assert_eq!(limits, Limits::default());
            assert!(limits.lower(name, default + 1).is_err());
            assert!(limits.lower(name, 0).is_err());
            limits.lower(name, 1).unwrap();
            assert_eq!(limits.get(name), Some(1));
            let others = Limits::names().filter(|other| *other != name);
            assert!(others.clone().all(|other| limits.get(other) == Limits::default().get(other)), "{name}");
        }
        assert_eq!(fields.matches(": ").count(), Limits::names().count(), "{fields}");
    }
}
