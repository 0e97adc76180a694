//! What a process gives up by itself, on every kernel.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

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

/// Closes what a process was started with, but for its standard input, output and errors and the descriptors in `keep`:
/// what another one holds open by mistake stays open when its owner ends, and no wall stands before it. To be called
/// before the process opens anything.
pub fn close_inherited(keep: impl IntoIterator<Item = libc::c_uint>) {
    let keep: BTreeSet<_> = keep.into_iter().filter(|number| *number > 2).collect();
    let mut first = 3;
    for number in keep {
        close_range(first..number);
        first = number.saturating_add(1);
    }
    close_range(first..libc::c_uint::MAX);
}

/// Has signals arrive, and the end of a process that this one starts: what whoever started this one had blocked, and
/// that it ignored `SIGCHLD`, is inherited. A file that may not get larger (`RLIMIT_FSIZE`, `ulimit -f`) is an error of
/// the storage, as a full file system is, and no signal that ends the process with all its disks. To be called before
/// there is a second thread.
pub fn heed_signals() {
    // SAFETY: the set is initialised by `sigemptyset` before it is used, and lives on this stack; no handler of ours is
    // set, and none of the calls fails with a signal that exists.
    unsafe {
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Whether this process is to end when its terminal is closed: not if whoever started it had it ignore `SIGHUP`, as
/// nohup(1) does. To be asked before a handler is set.
pub fn hangs_up() -> bool {
    // SAFETY: with no new action the call changes nothing; it writes the old one to where it is told, on this stack,
    // of which all zeroes are a value.
    unsafe {
        let mut old = std::mem::zeroed::<libc::sigaction>();
        let asked = libc::sigaction(libc::SIGHUP, std::ptr::null(), &raw mut old);
        asked == 0 && old.sa_sigaction != libc::SIG_IGN
    }
}

/// Closes descriptors that nobody in this process owns.
fn close_range(numbers: Range<libc::c_uint>) {
    if numbers.is_empty() {
        return;
    }
    // SAFETY: they are what the process was started with: it has opened nothing.
    if unsafe { libc::close_range(numbers.start, numbers.end.saturating_sub(1), 0) } == -1 {
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
