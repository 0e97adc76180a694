//! `blockhouse commit`: what an overlay holds, written to its base.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_block::{Access, BlockBackend, FileIdentity};
use blockhouse_sandbox::{Below, LayerReport, OpenRequest};
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::{GrantArgs, HostArgs};
use crate::copy::{Copied, merge};
use crate::output::{self, printable, size};
use crate::progress::{Progress, done};
use crate::target::identity;

/// Write what an overlay holds to its base, the backing file that it names
///
/// The base grows if the overlay is longer. Afterwards both read the same as long as neither is written: the
/// overlay is left as it is, to be deleted. Other overlays of the base are lost, and so are snapshots inside the
/// overlay: what is below them changes.
///
/// Who is interrupted loses nothing: the overlay still reads as before, and running the command again
/// completes it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  blockhouse commit --format qcow2 --base base.qcow2 --base-format qcow2 \\
    overlay.qcow2
      base.qcow2 reads as overlay.qcow2 did. If it has a backing file itself,
      that is granted with --allow.")]
pub(crate) struct Args {
    /// The overlay
    #[arg(value_name = "OVERLAY")]
    overlay: PathBuf,

    /// The format of the overlay. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format: String,

    /// The image to write to: the backing file of the overlay. Granted by naming it
    #[arg(long, value_name = "BASE")]
    base: PathBuf,

    /// Its format, which is the one that the overlay states
    #[arg(long, value_name = "FORMAT")]
    base_format: String,

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
    base: PathBuf,
    virtual_size_bytes: u64,
    #[serde(flatten)]
    copied: Copied,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        plan.read(&self.overlay);
        plan.write(&self.base);
        self.grants.plan(plan, &self.host)?;
        self.host.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opener = args.host.opener()?;
    let grants = args.grants.grants(&args.host)?;
    let overlay = opener
        .clone()
        .grants(grants.clone().allow(&args.base)?)
        .open(&OpenRequest { below: Below::Leave, ..OpenRequest::new(&args.overlay, &args.format) })?;
    let layer = overlay.report.layers.first().context("the overlay has no layer")?;
    is_base(layer, args)?;

    let opener = opener.grants(grants);
    let request = OpenRequest { access: Access::ReadWrite, ..OpenRequest::new(&args.base, &args.base_format) };
    let overlay = overlay.disk;
    let base = {
        let base = opener.open(&request)?.disk;
        if base.capacity() >= overlay.capacity() {
            base
        } else {
            let before = base.capacity();
            base.close()?;
            drop(base);
            opener.resize(&request, before, overlay.capacity())?;
            opener.open(&request)?.disk
        }
    };
    let mut progress = Progress::new(overlay.capacity(), args.json);
    let copied = merge(&overlay, &base, &mut progress)?;
    base.flush()?;
    base.close()?;
    progress.finish();
    if args.json {
        done(&Report { base: args.base.clone(), virtual_size_bytes: base.capacity(), copied })?;
    } else {
        output::line(format_args!(
            "{}: {}; {} written, {} made zero",
            printable(&args.base.display().to_string()),
            size(base.capacity()),
            size(copied.written),
            size(copied.zeroed)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails unless the base that the operator named is the backing file of the overlay, in the same format.
fn is_base(layer: &LayerReport, args: &Args) -> anyhow::Result<()> {
    let (Some(backing), Some((path, opened))) = (&layer.backing, &layer.backing_file) else {
        bail!("{} has no backing file to commit to", args.overlay.display());
    };
    let metadata = fs::metadata(&args.base).with_context(|| format!("cannot look at {}", args.base.display()))?;
    let (device, inode) = identity(&metadata);
    if *opened != (FileIdentity { device, inode }) {
        bail!("{} is not the backing file of {}: that is {path}", args.base.display(), args.overlay.display());
    }
    if backing.format.as_ref() != Some(&args.base_format) {
        let stated = backing.format.as_deref().unwrap_or("none");
        bail!("the overlay states the format {stated:?} for its base, and --base-format is {:?}", args.base_format);
    }
    Ok(())
}
