//! Walls around a whole program: what it will open is said beforehand, and the kernel refuses the rest.
//!
//! A component is held by WebAssembly and by the directories it was handed, and the host's own policy judges
//! what it opens. Should both fail, the attacker has a process; these walls are what it meets then.
//!
//! ```text
//!  Plan ── files and directories, each to read, to write, to make files in
//!    │ raise                                     before the first thread, before the first image
//!    ▼
//!  Walls ─ Landlock        no file outside of the plan, no program, no TCP, no foreign process
//!    │     seccomp         Role::Program: the calls that this program makes at all; Sockets, if it makes any
//!    │     no new privileges, no core dump, no debugger
//!    │ narrow                                    components are compiled, no image is open yet
//!    ▼
//!  Walls ─ Landlock        once more, without what was planned for the beginning alone
//!    │     seccomp         Role::Images: files are opened, and none is made, renamed or removed; no new socket
//!    │ seal                                      after start-up: all is open and compiled
//!    ▼
//!  Role::Control, Server   every thread: no call that takes the name of a file, no new code
//!    │ thread_start                              at the start of each thread that serves a guest
//!    ▼
//!  Role::FrontEnd, Role::Vcpu, Role::DataPath    takes a front end's memory; runs a vCPU; moves bytes
//!  Role::Operator                                answers the operator
//! ```
//!
//! [`Walls::confine_compiler`] is for a process that turns bytes into bytes and does nothing else.
//!
//! Filters add up: a thread has those of the threads that it comes from, and nobody can take one away.
//! Landlock holds whatever a system call is made through, `io_uring` included, which seccomp cannot look into.
//! Hence one demand on who uses `io_uring` in such a thread: see [`Role::DataPath`].
//!
//! Memory is not limited here (`RLIMIT_AS`): a WebAssembly memory reserves far more address space than it
//! uses, and what it may use is a limit of the sandbox.
//!
//! Where a kernel lacks a wall, the program runs without it, and [`Walls::missing`] says so.

#[cfg(not(target_os = "linux"))]
compile_error!("blockhouse-walls needs Linux");

mod calls;
mod files;
mod filter;
mod process;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use calls::Role;
pub use files::{Landlock, Plan, Use};
pub use process::{close_inherited, hangs_up, heed_signals};

/// What is called at the start of a thread.
pub type ThreadStart = Arc<dyn Fn() + Send + Sync>;

/// The walls that stand around this program.
#[derive(Clone, Debug)]
pub struct Walls {
    landlock: Option<Landlock>,
    filters: bool,
    missing: Vec<Missing>,
}

/// A wall that this kernel could not raise.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{wall}: {why}")]
pub struct Missing {
    /// Which: `Landlock`.
    pub wall: &'static str,
    /// Why not.
    pub why: String,
    /// It stands, but an older kernel enforces less of it.
    pub partial: bool,
}

impl Walls {
    /// No walls at all: for debugging.
    pub fn none() -> Self {
        Self { landlock: None, filters: false, missing: Vec::new() }
    }

    /// Raises the walls around this process. To be called while it has one thread and nothing of a stranger was
    /// looked at: threads that exist already get the filter, but not Landlock.
    ///
    /// What cannot be raised is left out and recorded in [`missing`](Self::missing).
    pub fn raise(plan: &Plan) -> Self {
        process::prepare();
        Self::raise_for(plan, if plan.has_sockets() { Role::Sockets } else { Role::Program })
    }

    /// Raises walls around this whole process, which from here on computes, reads and writes what is open, and ends
    /// ([`Role::Compiler`]). As [`raise`](Self::raise) it leaves out what the kernel lacks.
    pub fn confine_compiler() -> Self {
        Self::raise_for(&Plan::new(), Role::Compiler)
    }

    fn raise_for(plan: &Plan, role: Role) -> Self {
        let mut walls = Self::none();
        walls.note("process settings", process::settle());
        match files::restrict(plan) {
            Ok(landlock) => {
                if let Some(why) = landlock.lacks() {
                    walls.missing.push(Missing { wall: "Landlock", why, partial: true });
                }
                walls.landlock = Some(landlock);
            }
            Err(why) => walls.missing.push(Missing { wall: "Landlock", why, partial: false }),
        }
        walls.filters = walls.note("seccomp", filter::install(role, filter::Threads::All));
        walls
    }

    /// Takes away what is for the beginning alone: what `plan`, which they were raised with, has for that
    /// ([`Plan::add_at_first`], [`Plan::sockets`]), and giving files names or taking them away at all. To be called
    /// while the process still has one thread, as [`raise`](Self::raise), and once at most: Landlock takes 16 layers.
    ///
    /// # Errors
    /// [`Missing`], if a wall stands around the program and cannot be made narrower.
    pub fn narrow(&self, plan: &Plan) -> Result<(), Missing> {
        if self.landlock.is_some() && plan.paths_at_first().next().is_some() {
            files::restrict(&plan.narrowed()).map_err(|why| not_narrower("Landlock", &why))?;
        }
        self.take_away(Role::Images)
    }

    /// Has every thread that there is, and those to come, have this role, or less.
    fn take_away(&self, role: Role) -> Result<(), Missing> {
        if !self.filters {
            return Ok(());
        }
        filter::install(role, filter::Threads::All).map_err(|error| not_narrower("seccomp", &error))
    }

    /// Closes the program: from here on every thread has this role, [`Role::Control`] or [`Role::Server`], or less: no
    /// thread opens a file by name, starts a program, or makes new code. To be called when all that will be needed is
    /// open and compiled, and no thread has narrowed itself yet.
    ///
    /// # Errors
    /// [`Missing`], if seccomp stands around the program and cannot be made narrower.
    pub fn seal(&self, role: Role) -> Result<(), Missing> {
        self.take_away(role)
    }

    /// What a thread with this role calls first: it narrows its own filter to what the role needs.
    ///
    /// It also leaves the signals that ask the program to end to threads that may act on them: a handler that tells
    /// another thread through a socket cannot do that here, and the signal would be lost.
    ///
    /// A thread whose filter cannot be installed goes on with the one that it has, and says so in the log.
    pub fn thread_start(&self, role: Role) -> ThreadStart {
        if !self.filters {
            return Arc::new(|| {});
        }
        Arc::new(move || {
            process::leave_signals_to_others();
            if let Err(error) = filter::install(role, filter::Threads::This) {
                tracing::error!(?role, %error, "a thread has no filter of its own");
            }
        })
    }

    /// The walls that should stand and do not.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    fn note(&mut self, wall: &'static str, raised: io::Result<()>) -> bool {
        match raised {
            Ok(()) => true,
            Err(error) => {
                self.missing.push(Missing { wall, why: error.to_string(), partial: false });
                false
            }
        }
    }
}

fn not_narrower(wall: &'static str, why: &dyn fmt::Display) -> Missing {
    Missing { wall, why: format!("it cannot be made narrower: {why}"), partial: true }
}

impl fmt::Display for Walls {
    /// One line: what stands.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.landlock, self.filters) {
            (None, false) => f.write_str("none"),
            (None, true) => f.write_str("seccomp"),
            (Some(landlock), false) => write!(f, "{landlock}"),
            (Some(landlock), true) => write!(f, "{landlock}, seccomp"),
        }
    }
}
