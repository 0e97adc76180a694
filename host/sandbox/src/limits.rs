//! Every limit on a component, in one place.

use std::time::Duration;

/// What one component instance, and the chain it belongs to, may use. Every instance gets the same
/// limits; an instance that goes over one is thrown away and its disk answers errors.
///
/// The defaults fit every built-in format with a wide margin on any image that QEMU can make.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of linear memory of one instance, all its memories together. Default 64 MiB.
    pub memory_bytes: usize,
    /// Elements of all tables of one instance. Default 20,000.
    pub table_elements: usize,
    /// Core module instances inside one component instance. Default 16.
    pub core_instances: usize,
    /// Bytes of stack for WebAssembly frames. Default 512 KiB.
    pub stack_bytes: usize,
    /// Handles (open files and directories) that one instance may hold at a time. Default 1,024.
    ///
    /// Each is a file descriptor of the process, and each shared file is two more: a process that serves
    /// strangers' images needs an `RLIMIT_NOFILE` to match, or one image could use up the descriptors of
    /// all. The `blockhouse` program raises its own to the hard limit.
    pub handles: usize,
    /// Bytes that may cross from the component to the host in one call in either direction of
    /// calling: strings, lists. Default 32 MiB, twice the largest packed unit.
    pub transfer_bytes: usize,
    /// Calls of host functions within one call of the component. Default 1,000,000.
    pub host_calls: u64,
    /// Attempts to open a file in the life of one instance, allowed or denied. Default 2,048.
    pub opens: u32,
    /// Files that one instance may register for the host's I/O. Default 1,024.
    pub shared_files: u32,
    /// Length of a path that may be opened, in bytes. Default 4,096.
    pub path_bytes: usize,
    /// Log messages of one instance; further ones are dropped and counted. Default 1,000.
    pub log_messages: u32,
    /// Length of one log message and of one error text, in bytes; longer ones are cut. Default 4,096.
    pub text_bytes: usize,
    /// Entries in the lists that describe an image (facts, further files, snapshots). Default 65,536.
    pub description_entries: usize,
    /// Layers of one disk, the top included. Default 200.
    pub chain_depth: usize,
    /// Time for one call of the component, host functions included. Default 10 s.
    ///
    /// Checked every [`TICK`]; a host function that is under way is finished first. All of them are
    /// short: reads of regular files, 64 KiB at a time.
    pub call_time: Duration,
    /// Time for one call that works on a whole image: check, repair, resize, snapshots, the begin of
    /// writing. Default 15 minutes.
    pub maintenance_time: Duration,
    /// Calls of host functions within such a call. Default 100,000,000.
    pub maintenance_host_calls: u64,
    /// Bytes of a compiled-from component file. Default 64 MiB.
    pub component_bytes: u64,
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
            handles: 1024,
            transfer_bytes: 32 << 20,
            host_calls: 1_000_000,
            opens: 2048,
            shared_files: 1024,
            path_bytes: 4096,
            log_messages: 1000,
            text_bytes: 4096,
            description_entries: 65_536,
            chain_depth: 200,
            call_time: Duration::from_secs(10),
            maintenance_time: Duration::from_secs(15 * 60),
            maintenance_host_calls: 100_000_000,
            component_bytes: 64 << 20,
        }
    }
}
