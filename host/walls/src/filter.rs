//! From the tables of `calls.rs` to filters in the kernel.
//!
//! A filter has one answer for what it names and one for the rest, so a role is up to three of them. The
//! kernel takes the hardest answer of all filters of a thread, and of two errors that of the filter that came
//! last:
//!
//! ```text
//!   1  named in a table of the role: allow     else ENOSYS
//!   2  a name or a socket, not of the role: EPERM   else allow
//!   3  fatal: kill                             else allow      (once, with the first role of a process)
//! ```

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::calls::{
    CONNECTING, F_SETSIG, FATAL, IOCTL_TYPE, KVM_TYPE, NAMES_OF_NOBODY, NAMING, NARROWING, OPENING, PRCTLS, RING_FILES,
    RINGS, Role, SHARING, SOCKETS, STARTING, WAITING,
};

/// Who gets a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread.
    This,
    /// All that there are, at once.
    All,
}

/// The rules of one call: any of them must match. None is always.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Installs the filters of a role.
pub(crate) fn install(role: Role, threads: Threads) -> io::Result<()> {
    for program in programs(role).map_err(|error| io::Error::other(error.to_string()))? {
        let installed = match threads {
            Threads::This => seccompiler::apply_filter(&program),
            Threads::All => seccompiler::apply_filter_all_threads(&program),
        };
        installed.map_err(|error| match error {
            seccompiler::Error::Seccomp(error) | seccompiler::Error::Prctl(error) => error,
            other => io::Error::other(other.to_string()),
        })?;
    }
    Ok(())
}

/// The filters of a role, in the order in which they are installed.
fn programs(role: Role) -> Result<Vec<BpfProgram>, BackendError> {
    let arch = std::env::consts::ARCH.try_into()?;
    let compile = |rules: Rules, named: SeccompAction, rest: SeccompAction| {
        SeccompFilter::new(rules, rest, named, arch).and_then(BpfProgram::try_from)
    };
    let error = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    let mut programs = vec![
        compile(allowed(role)?, SeccompAction::Allow, error(libc::ENOSYS))?,
        compile(unconditional(refused(role)), error(libc::EPERM), SeccompAction::Allow)?,
    ];
    if role.is_first() {
        let fatal = unconditional(FATAL.iter().copied());
        programs.push(compile(fatal, SeccompAction::KillProcess, SeccompAction::Allow)?);
    }
    Ok(programs)
}

fn unconditional(calls: impl IntoIterator<Item = libc::c_long>) -> Rules {
    calls.into_iter().map(|call| (call, Vec::new())).collect()
}

/// The calls that are answered with `EPERM`.
fn refused(role: Role) -> impl Iterator<Item = libc::c_long> {
    let opening = if role.names() { &[] } else { OPENING };
    let naming = if role.naming() { &[] } else { NAMING };
    let sockets = if role.sockets() { &[] } else { SOCKETS };
    let sharing = if role.sharing() { &[] } else { SHARING };
    let connecting = if role.connecting() { &[] } else { CONNECTING };
    NAMES_OF_NOBODY.iter().chain(opening).chain(naming).chain(sockets).chain(sharing).chain(connecting).copied()
}

/// The calls that are made, and when.
fn allowed(role: Role) -> Result<Rules, BackendError> {
    let mut rules = unconditional(role.base());
    let tables: [(bool, &[libc::c_long]); 9] = [
        (role.narrowing(), NARROWING),
        (role.names(), OPENING),
        (role.naming(), NAMING),
        (role.rings(), RINGS),
        (role.names(), STARTING),
        (role.waits(), WAITING),
        (role.sockets(), SOCKETS),
        (role.sharing(), SHARING),
        (role.connecting(), CONNECTING),
    ];
    for (has, table) in tables {
        if has {
            rules.extend(unconditional(table.iter().copied()));
        }
    }
    let number = |value: i32| u64::from(value.unsigned_abs());

    // Its own limits, which it does not change: with those of another process it can end that.
    if role.names() {
        let own = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 0)?;
        let unchanged = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
        rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![own, unchanged])?]);
    }
    // A thread, and no process.
    let thread = number(libc::CLONE_THREAD);
    if role.threads() {
        rules.insert(libc::SYS_clone, vec![when(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread)?]);
    }
    if role.threads() && !role.rings() {
        rules.insert(libc::SYS_io_uring_register, any_of(1, [RING_FILES].into_iter())?);
    }
    // The signal that wakes a vCPU, and that of `abort`.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![when(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own)?]);
    rules.insert(libc::SYS_prctl, any_of(0, PRCTLS.iter().map(|operation| number(*operation)))?);
    let mut ioctls = any_of(1, role.ioctls().iter().copied())?;
    if role.machines() {
        ioctls.push(when(1, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(IOCTL_TYPE), KVM_TYPE)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    let mut fcntls = any_of(1, role.fcntls().iter().map(|operation| number(*operation)))?;
    if role.flags() {
        let asynchronous = number(libc::O_ASYNC);
        fcntls.push(SeccompRule::new(vec![
            SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number(libc::F_SETFL))?,
            SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(asynchronous), 0)?,
        ])?);
    }
    if role.leases() {
        fcntls.extend(any_of(1, [number(F_SETSIG)].into_iter())?);
        // An owner of 0 is none.
        fcntls.push(SeccompRule::new(vec![
            SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number(libc::F_SETOWN))?,
            SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 0)?,
        ])?);
    }
    // Without a rule it would be allowed whatever it asks for.
    if !fcntls.is_empty() {
        rules.insert(libc::SYS_fcntl, fcntls);
    }

    // What is open can be looked at, by the empty name. Other names are for who may have names.
    let empty = number(libc::AT_EMPTY_PATH);
    for (call, flags) in [(libc::SYS_statx, 2), (libc::SYS_newfstatat, 3)] {
        let look = when(flags, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(empty), empty)?;
        rules.insert(call, if role.names() { Vec::new() } else { vec![look] });
    }
    let executable = number(libc::PROT_EXEC);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let data = when(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(call, if role.code() { Vec::new() } else { vec![data] });
    }
    Ok(rules)
}

/// One argument is compared with a value.
fn when(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, length, operator, value)?])
}

/// One argument of 32 bits is one of these values.
fn any_of(argument: u8, values: impl Iterator<Item = u64>) -> Result<Vec<SeccompRule>, BackendError> {
    values.map(|value| when(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_role_compiles_for_every_machine() {
        for role in Role::ALL {
            let programs = programs(role).unwrap();
            assert_eq!(programs.len(), if role.is_first() { 3 } else { 2 }, "{role:?}");
            assert!(programs.iter().all(|program| program.len() < 4096), "{role:?}");
        }
    }

    /// Filters add up, so a role that could do what the one before it cannot would be a mistake.
    #[test]
    fn each_role_has_less_than_the_one_it_comes_from() {
        let calls = |role| allowed(role).unwrap().into_keys().collect::<BTreeSet<_>>();
        assert!(calls(Role::Sockets).is_superset(&calls(Role::Program)));
        assert!(calls(Role::Program).is_superset(&calls(Role::Images)));
        for role in [Role::Control, Role::Server] {
            assert!(calls(Role::Images).is_superset(&calls(role)), "{role:?}");
        }
        for role in [Role::FrontEnd, Role::Operator, Role::DataPath] {
            assert!(calls(Role::Server).is_superset(&calls(role)), "{role:?}");
            assert!(role.ioctls().iter().all(|it| Role::Server.ioctls().contains(it)), "{role:?}");
        }
        for role in [Role::Operator, Role::Vcpu, Role::DataPath] {
            assert!(calls(Role::Control).is_superset(&calls(role)), "{role:?}");
            let (all, some) = (Role::Control.ioctls(), role.ioctls());
            assert!(some.iter().all(|request| all.contains(request)), "{role:?}");
        }
        assert!(calls(Role::DataPath).is_superset(&calls(Role::Compiler)));
        // The thread of a queue is started by that of a vCPU, or that of a front end.
        for role in [Role::Vcpu, Role::FrontEnd] {
            assert!(calls(role).is_superset(&calls(Role::DataPath)), "{role:?}");
            assert!(Role::DataPath.ioctls().iter().all(|it| role.ioctls().contains(it)));
        }
        for role in Role::ALL {
            let program = |request: &u64| Role::Program.ioctls().contains(request) || request & IOCTL_TYPE == KVM_TYPE;
            assert!(role.ioctls().iter().all(program), "{role:?}");
            assert!(role.fcntls().iter().all(|it| Role::Program.fcntls().contains(it)), "{role:?}");
        }
    }

    #[test]
    fn no_call_has_two_answers() {
        for role in Role::ALL {
            let allowed: BTreeSet<_> = allowed(role).unwrap().into_keys().collect();
            let refused: BTreeSet<_> = refused(role).collect();
            let fatal: BTreeSet<_> = FATAL.iter().copied().collect();
            assert!(fatal.is_disjoint(&allowed), "{role:?}");
            assert!(fatal.is_disjoint(&refused), "{role:?}");
            let both: Vec<_> = allowed.intersection(&refused).collect();
            assert!(both.is_empty(), "{role:?}: {both:?}");
        }
    }
}
