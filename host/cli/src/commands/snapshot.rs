//! `blockhouse snapshot`: the snapshots inside an image.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use blockhouse_sandbox::SnapshotReport;

use crate::args::{HostArgs, ImageArgs};
use crate::output::{self, printable, size};

/// The help of each command stands with its arguments.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    List(ListArgs),
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
    host: HostArgs,
}

pub(crate) fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(args) => list(args),
    }
}

fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let ListArgs { image, format, allow, json, host } = args;
    let image = ImageArgs { image, format, allow, snapshot: None, host };
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
        std::io::stdout().lock().write_all(render(&layer.snapshots).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One line per snapshot, its name last.
fn render(snapshots: &[SnapshotReport]) -> String {
    let mut text = String::new();
    for snapshot in snapshots {
        let line = format!(
            "id {}, disk {}, machine state {}, {} seconds since 1970, name {:?}",
            snapshot.id,
            size(snapshot.virtual_size_bytes),
            size(snapshot.vm_state_bytes),
            snapshot.created_at_seconds,
            snapshot.name
        );
        let _ = writeln!(text, "{}", printable(&line));
    }
    text
}
