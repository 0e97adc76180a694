//! What a process gives up by itself, on every kernel.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::set_no_new_privs;

/// Gives up what no program of ours needs.
///
/// * New privileges: a set-user-id program would run without its privileges. Landlock and seccomp ask for it.
/// * Core dumps: they would hold guests' memory and the contents of disks.
/// * Being looked at by other processes of the same user, by a debugger or through `/proc`, for that same reason.
pub(crate) fn settle() -> io::Result<()> {
    set_no_new_privs(true)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Closes what a process was started with past its standard input, output and errors: what another one holds open by
/// mistake stays open when its owner ends. To be called before the process opens anything.
pub fn close_inherited() {
    // SAFETY: it closes descriptors that nobody in this process owns, since it has opened none.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } == -1 {
        tracing::debug!(error = %io::Error::last_os_error(), "what was inherited stays open");
    }
}

/// Prepares a process that will have files and threads.
pub(crate) fn prepare() {
    raise_file_limit();
    settle_allocator();
}

/// Raises the limit of open files to what the system allows: the sandbox bounds what one image may hold, and
/// that many must not use up what all have.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// From this many bytes on, memory comes from the system and goes back to it as soon as it is freed: the answers
/// of a component and what is made of them, which many threads have for a moment each.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;

/// Settles how the GNU allocator grows. With an arena for each thread, as it has them, the memory that one thread
/// freed is not there for the others, and a disk takes a multiple of the bound of its extent map. Requests to what
/// the map knows allocate nothing, so that nobody waits for the one arena. Left to itself, the allocator would also
/// count the processors in `/sys`, at some time, in whichever thread allocates then.
#[cfg(target_env = "gnu")]
fn settle_allocator() {
    for (what, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE)] {
        // SAFETY: it takes two numbers, and changes a setting under the allocator's own lock.
        let settled = unsafe { libc::mallopt(what, value) };
        if settled != 1 {
            tracing::debug!(what, "the allocator does not take a setting");
        }
    }
}

#[cfg(not(target_env = "gnu"))]
fn settle_allocator() {}

/// Blocks the signals that ask a program to end, for the calling thread and those that it starts: another
/// thread of the process gets them.
pub(crate) fn leave_signals_to_others() {
    // SAFETY: the set is initialised by `sigemptyset` before it is used, and lives on this stack; the calls have
    // no other requirements, and their only error is a number that is no signal.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}
