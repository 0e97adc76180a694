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

/// Makes the GNU allocator's limit of arenas, eight for each processor as ever, known beforehand. It would count
/// the processors in `/sys` otherwise, at some time, in whichever thread allocates then.
#[cfg(target_env = "gnu")]
fn settle_allocator() {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let arenas = i32::try_from(processors.saturating_mul(8)).unwrap_or(i32::MAX);
    // SAFETY: it takes two numbers, and changes a setting under the allocator's own lock.
    let settled = unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    if settled != 1 {
        tracing::debug!("the allocator takes no limit of arenas");
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
