//! `blockhouse rebase`: another backing file for an overlay.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_block::{Access, BlockBackend, Error, ErrorKind};
use blockhouse_sandbox::{BackingReference, Below, Grants, OpenRequest, Opener};
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::{GrantArgs, HostArgs, beside};
use crate::copy::{Copied, CopyJob};
use crate::new_image::open_backing;
use crate::output::{self, printable, size};
use crate::progress::{Progress, done};
use crate::target::{files_in_use, identity};

/// Give an overlay another backing file, or none
///
/// The disk reads as before: where the new backing file differs from the old one, what the old one holds is
/// written to the overlay first. Who is interrupted still has the old backing file, and can run the command
/// again. Snapshots inside the overlay would read from the new backing file as well: an overlay that has any is
/// left as it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  blockhouse rebase --format qcow2 --allow old.qcow2 --backing new.qcow2 \\
    --backing-format qcow2 overlay.qcow2
  blockhouse rebase --format qcow2 --allow base.qcow2 --no-backing overlay.qcow2
      The overlay holds all of its disk.
  blockhouse rebase --format qcow2 --unsafe --backing moved.qcow2 \\
    --backing-format qcow2 overlay.qcow2
      The same backing file under a new name, or a reference without a format:
      nothing is opened.")]
pub(crate) struct Args {
    /// The overlay
    #[arg(value_name = "OVERLAY")]
    overlay: PathBuf,

    /// The format of the overlay. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format: String,

    /// The new backing file. The name is recorded as it stands here; a relative one starts at the directory
    /// of the overlay. Granted by naming it
    #[arg(long, value_name = "PATH", requires = "backing_format", required_unless_present = "no_backing")]
    backing: Option<String>,

    /// Its format. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,

    /// No backing file
    #[arg(long, conflicts_with = "backing")]
    no_backing: bool,

    /// Change the name and nothing else. If the new backing file reads differently, so does the overlay
    #[arg(long = "unsafe")]
    name_only: bool,

    /// Print progress and result as lines of JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    grants: GrantArgs,

    #[command(flatten)]
    host: HostArgs,
}

#[derive(Serialize)]
struct Report {
    backing: Option<BackingReference>,
    #[serde(flatten)]
    copied: Copied,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        plan.write(&self.overlay);
        if !self.name_only {
            if let Some(name) = &self.backing {
                plan.read(beside(&self.overlay, name.as_ref()));
            }
            self.grants.plan(plan, &self.host)?;
        }
        self.host.plan(plan)
    }

    /// What images may refer to: nothing, if no reference is followed.
    fn granted(&self) -> anyhow::Result<Grants> {
        if self.name_only { Ok(Grants::new()) } else { self.grants.grants(&self.host) }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opener = args.host.opener()?.grants(args.granted()?);
    let backing = args.backing.clone().map(|name| BackingReference { name, format: args.backing_format.clone() });
    let own = fs::metadata(&args.overlay).with_context(|| format!("cannot look at {}", args.overlay.display()))?;
    let refuse_itself = |path: &PathBuf| {
        if fs::metadata(path).is_ok_and(|other| identity(&other) == identity(&own)) {
            bail!("{} would be below itself", args.overlay.display());
        }
        Ok(())
    };
    if let Some(name) = &args.backing {
        refuse_itself(&beside(&args.overlay, name.as_ref()))?;
    }
    let mut copied = Copied::default();
    // Open, and so locked, until the overlay names it.
    let mut new = None;
    if !args.name_only {
        let unsure = refuse_snapshots(args, &opener)?;
        if let (Some(name), Some(format)) = (&args.backing, &args.backing_format) {
            let opened = open_backing(&args.overlay, name, format, &opener, &args.granted()?)?;
            files_in_use(&opened.report).iter().try_for_each(refuse_itself)?;
            new = Some(opened.disk);
        }
        let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(&args.overlay, &args.format) };
        let overlay = opener.open(&request)?.disk;
        if let Some(error) = unsure {
            return Err(error.into());
        }
        let mut progress = Progress::new(overlay.capacity(), args.json);
        let copy =
            CopyJob { source: &overlay, below: new.as_ref(), target: &overlay, only_below_top: true, compress: false };
        copied = copy.run(&mut progress)?;
        overlay.flush()?;
        overlay.close()?;
        progress.finish();
    }
    opener.set_backing(&args.overlay, &args.format, backing.as_ref())?;
    drop(new);
    if args.json {
        done(&Report { backing, copied })?;
    } else {
        let name = backing.map_or_else(|| "none".to_owned(), |backing| format!("{:?}", backing.name));
        output::line(format_args!(
            "{}: backing file {}; {} written, {} made zero",
            printable(&args.overlay.display().to_string()),
            printable(&name),
            size(copied.written),
            size(copied.zeroed)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails if there are snapshots inside the overlay: what they do not hold themselves they read from the backing file,
/// and the disk alone is copied. Returns why nobody can tell, if nobody can.
fn refuse_snapshots(args: &Args, opener: &Opener) -> anyhow::Result<Option<Error>> {
    let request = OpenRequest { below: Below::Leave, ..OpenRequest::new(&args.overlay, &args.format) };
    let (chain, error) = opener.describe(&request);
    match chain.layers.first().map_or(0, |layer| layer.snapshots.len()) {
        0 => Ok(error),
        count => {
            let why = format!(
                "{}: its snapshots ({count}) would read from the new backing file; delete them first, or use --unsafe \
                 if it reads as the old one does",
                args.overlay.display()
            );
            Err(Error::new(ErrorKind::Unsupported, why).into())
        }
    }
}
