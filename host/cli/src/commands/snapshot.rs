//! `blockhouse snapshot`: the snapshots inside an image.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use blockhouse_block::Access;
use blockhouse_sandbox::SnapshotReport;
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::{HostArgs, ImageArgs, ShareArgs};
use crate::output::{self, printable, size, time};
use crate::progress::Spinner;

/// The help of each command stands with its arguments.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    List(ListArgs),
    Create(CreateArgs),
    Apply(ApplyArgs),
    Delete(DeleteArgs),
}

/// List the snapshots inside an image
///
/// Snapshots of the image itself, not of its backing files. They are listed even if the backing file is not
/// granted; an image that shows none and cannot be opened further is an error.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  blockhouse snapshot list --format qcow2 vm.qcow2
      What --snapshot of `read` and `map` takes: the id, or the name.")]
pub(crate) struct ListArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// The format of the image. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format: String,

    /// Let the image refer to PATH: a file, or every regular file below a directory. Read-only
    #[arg(long, value_name = "PATH")]
    allow: Vec<PathBuf>,

    /// Print a JSON array
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    share: ShareArgs,

    #[command(flatten)]
    host: HostArgs,
}

/// Keep the present state of a disk as a snapshot inside its image
///
/// What external backing and data files hold is not kept. Prints the id of the snapshot.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  blockhouse snapshot create --format qcow2 vm.qcow2 before-upgrade")]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    image: Edited,

    /// A name for people. It may be in use already
    #[arg(value_name = "NAME")]
    name: String,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a disk what it was at a snapshot
///
/// The snapshot stays. What the disk is now is lost, unless it is in a snapshot too.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  blockhouse snapshot apply --format qcow2 vm.qcow2 before-upgrade")]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    image: Edited,

    /// The snapshot: its id, or its name
    #[arg(value_name = "ID")]
    id: String,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Delete a snapshot, and free what only it used
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  blockhouse snapshot delete --format qcow2 vm.qcow2 1")]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    image: Edited,

    /// The snapshot: its id, or its name
    #[arg(value_name = "ID")]
    id: String,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// An image whose snapshots are changed. No file that it refers to is opened.
#[derive(Debug, clap::Args)]
struct Edited {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// The format of the image. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format: String,

    #[command(flatten)]
    host: HostArgs,
}

impl Command {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        let image = match self {
            Self::List(ListArgs { image, allow, host, .. }) => {
                plan.read(image);
                host.plan_grants(plan, allow, &[], Access::ReadOnly)?;
                return host.plan(plan);
            }
            Self::Create(CreateArgs { image, .. })
            | Self::Apply(ApplyArgs { image, .. })
            | Self::Delete(DeleteArgs { image, .. }) => image,
        };
        plan.write(&image.image);
        image.host.plan(plan)
    }
}

pub(crate) fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(args) => list(args),
        Command::Create(CreateArgs { image, name, json }) => create(&image, &name, json),
        Command::Apply(ApplyArgs { image, id, json }) => {
            {
                let _spinner = Spinner::new("applying the snapshot");
                image.host.opener()?.apply_snapshot(&image.image, &image.format, &id)?;
            }
            done("applied", id, json)
        }
        Command::Delete(DeleteArgs { image, id, json }) => {
            {
                let _spinner = Spinner::new("deleting the snapshot");
                image.host.opener()?.delete_snapshot(&image.image, &image.format, &id)?;
            }
            done("deleted", id, json)
        }
    }
}

/// What was done to a snapshot, as it was named: `{"applied": "1"}`.
fn done(what: &'static str, id: String, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        output::json(&BTreeMap::from([(what, id)]))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn create(image: &Edited, name: &str, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Created<'a> {
        id: &'a str,
        name: &'a str,
    }
    if name.is_empty() {
        bail!("a snapshot needs a name");
    }
    let id = {
        let _spinner = Spinner::new("making the snapshot");
        image.host.opener()?.create_snapshot(&image.image, &image.format, name)?
    };
    if json {
        output::json(&Created { id: &id, name })?;
    } else {
        output::line(format_args!("id {}", printable(&id)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let ListArgs { image, format, allow, json, share, host } = args;
    let image = ImageArgs { image, format, allow, snapshot: None, share, host };
    let (chain, error) = image.opener()?.describe(&image.request());
    let Some(layer) = chain.layers.first() else {
        match error {
            Some(error) => return Err(error.into()),
            None => bail!("the image has no layer"),
        }
    };
    // Snapshots that were found do not depend on the backing file. An empty list beside an error may be
    // a list that could not be read.
    if let Some(error) = error
        && layer.snapshots.is_empty()
        && chain.layers.len() == 1
    {
        return Err(error.into());
    }
    if json {
        output::json(&layer.snapshots)?;
    } else {
        output::text(&render(&layer.snapshots))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One line per snapshot, its name last.
fn render(snapshots: &[SnapshotReport]) -> String {
    let mut text = String::new();
    for snapshot in snapshots {
        let line = format!(
            "id {}, disk {}, machine state {}, made {}, name {:?}",
            snapshot.id,
            size(snapshot.virtual_size_bytes),
            size(snapshot.vm_state_bytes),
            time(snapshot.created_at_seconds),
            snapshot.name
        );
        let _ = writeln!(text, "{}", printable(&line));
    }
    text
}
