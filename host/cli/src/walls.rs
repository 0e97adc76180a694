//! The walls around the program: each command says which files it will open, and the kernel refuses the rest.
//!
//! ```text
//!   arguments ── plan ──▶ Walls::raise ──▶ components are loaded ──▶ narrow ──▶ images are opened ─┐
//!                                                the guest runs ◀── seal ◀── (run: all is open) ◀───┘
//! ```
//!
//! A plan is made of the operator's own paths. What an image says is not known yet when the walls go up.

use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use blockhouse_vmm::Beginning;
use blockhouse_walls::{Missing, Plan, Role, Walls};

use crate::Command;

/// Walls around the program.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct WallArgs {
    /// Refuse to work if the kernel lacks a wall: Landlock (no file but those that you named), seccomp (no system
    /// call but those of the task). Without it, that is a warning
    #[arg(long, global = true, help_heading = "Walls")]
    require_walls: bool,

    /// Raise no walls around the program, for debugging it
    #[arg(long, global = true, conflicts_with = "require_walls", help_heading = "Walls")]
    no_walls: bool,
}

/// Walls were required and are not there.
#[derive(Debug)]
pub(crate) struct MissingWalls(Vec<Missing>);

impl std::fmt::Display for MissingWalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("--require-walls: the walls around the program cannot be raised: ")?;
        for (number, missing) in self.0.iter().enumerate() {
            write!(f, "{}{missing}", if number == 0 { "" } else { "; " })?;
        }
        f.write_str(". No image was opened")
    }
}

impl std::error::Error for MissingWalls {}

impl WallArgs {
    /// Raises the walls for a command, before it does anything.
    pub(crate) fn raise(self, command: &Command) -> anyhow::Result<Walls> {
        if self.no_walls {
            return Ok(Walls::none());
        }
        let plan = command.plan()?;
        let walls = Walls::raise(&plan);
        if self.require_walls && !walls.missing().is_empty() {
            return Err(MissingWalls(walls.missing().to_vec()).into());
        }
        for missing in walls.missing() {
            if missing.partial {
                tracing::info!("a wall around the program is not whole. {missing}");
            } else {
                tracing::warn!("a wall around the program is missing. {missing}");
            }
        }
        for (path, uses) in plan.paths() {
            tracing::debug!(path = %path.display(), ?uses, "planned");
        }
        for (path, uses) in plan.paths_at_first() {
            tracing::debug!(path = %path.display(), ?uses, "planned until components are loaded");
        }
        tracing::info!("walls around the program: {walls}");
        *BEGINNING.lock().unwrap_or_else(PoisonError::into_inner) = Some((walls.clone(), plan));
        Ok(walls)
    }
}

/// The walls as they were raised, until they are narrowed.
static BEGINNING: Mutex<Option<(Walls, Plan)>> = Mutex::new(None);

/// Takes away what the plan has for the beginning alone, once: components are loaded, no image is open, and there is
/// one thread.
pub(crate) fn narrow() -> anyhow::Result<()> {
    match BEGINNING.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some((walls, plan)) => walls.narrow(&plan).context("no image was opened"),
        None => Ok(()),
    }
}

impl Command {
    /// The files that a command opens.
    fn plan(&self) -> anyhow::Result<Plan> {
        let mut plan = Plan::new();
        match self {
            Self::Info(args) => args.plan(&mut plan)?,
            Self::Map(args) => args.plan(&mut plan)?,
            Self::Read(args) => args.plan(&mut plan)?,
            Self::Run(args) => args.plan(&mut plan)?,
            Self::Serve(args) => args.plan(&mut plan)?,
            Self::Create(args) => args.plan(&mut plan)?,
            Self::Check(args) => args.plan(&mut plan)?,
            Self::Resize(args) => args.plan(&mut plan)?,
            Self::Convert(args) => args.plan(&mut plan)?,
            Self::Compare(args) => args.plan(&mut plan)?,
            Self::Commit(args) => args.plan(&mut plan)?,
            Self::Rebase(args) => args.plan(&mut plan)?,
            Self::Snapshot(command) => command.plan(&mut plan)?,
            Self::Plugin(command) => command.plan(&mut plan)?,
            Self::Probe(args) => args.plan(&mut plan),
            // It opens no file, and connects.
            Self::Control(_) => plan.sockets(),
        }
        Ok(plan)
    }
}

/// What a thread with this role calls first.
pub(crate) fn beginning(walls: &Walls, role: Role) -> Beginning {
    let begin = walls.thread_start(role);
    Beginning::with(move || begin())
}
