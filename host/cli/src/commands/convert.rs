//! `blockhouse convert`: the content of a disk in a new image.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use blockhouse_block::{Access, BlockBackend, Disk, Error, ErrorKind};
use blockhouse_sandbox::LockMode;
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::ImageArgs;
use crate::copy::{Copied, CopyJob};
use crate::new_image::{Made, MadeReport, NewArgs};
use crate::output::{self, printable, size};
use crate::progress::{Progress, done};
use crate::target::files_in_use;

/// Copy the content of a disk to a new image, of any format that can be written
///
/// Zeroes take no space. The new image gets its name when it is complete and durable: who is interrupted
/// has the old one, untouched.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  blockhouse convert --format vmdk --to-format qcow2 appliance.vmdk vm.qcow2
  blockhouse convert --format qcow2 --allow base.qcow2 --to-format qcow2 \\
    --compress overlay.qcow2 all.qcow2
      One compressed image without a backing file.
  blockhouse convert --format raw --to-format qcow2 --backing base.raw \\
    --backing-format raw vm.raw overlay.qcow2
      Only what differs from the backing file, whichever that is.")]
pub(crate) struct Args {
    #[command(flatten)]
    source: ImageArgs,

    /// The new image
    #[arg(value_name = "TARGET")]
    target: PathBuf,

    /// The format of the new image
    #[arg(long, value_name = "FORMAT")]
    to_format: String,

    #[command(flatten)]
    new: NewArgs,

    /// Compress what gets smaller by it
    #[arg(long, conflicts_with_all = ["preallocation", "data_file"])]
    compress: bool,

    /// Print progress and result as lines of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    made: MadeReport,
    #[serde(flatten)]
    copied: Copied,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        self.source.plan(plan)?;
        if self.new.wants_help() { Ok(()) } else { self.new.plan(plan, &self.target) }
    }

    /// Fills the new image, over `below`, and makes it durable.
    fn copy(&self, source: &Disk, below: Option<&Disk>, made: &Made) -> anyhow::Result<Copied> {
        let target = &made.open()?.disk;
        if self.compress && !target.packs() {
            let why = format!("the component for {} cannot compress", printable(&self.to_format));
            return Err(Error::new(ErrorKind::Unsupported, why).into());
        }
        if target.capacity() != source.capacity() {
            // What does not fit would be left out, or be something else than zero.
            let (made, wanted) = (target.capacity(), source.capacity());
            let why =
                format!("the component for {} made a disk of {made} bytes of {wanted}", printable(&self.to_format));
            return Err(Error::new(ErrorKind::Component, why).into());
        }
        let mut progress = Progress::new(source.capacity(), self.json);
        let copy = CopyJob { source, below, target, only_below_top: false, compress: self.compress };
        let copied = copy.run(&mut progress)?;
        target.flush()?;
        target.close()?;
        progress.finish();
        Ok(copied)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.new.wants_help() {
        bail!("`blockhouse create --format {} -o help` lists the options", printable(&args.to_format));
    }
    let source = args.source.opener()?.open(&args.source.request())?;
    let opener = args.source.opener()?.locks(LockMode::Enforce);
    let grants = args.source.host.grants(&args.source.allow, &[], Access::ReadOnly)?;
    let virtual_size = source.disk.capacity();
    let backing = args.new.open_backing(&args.target, &opener, &grants)?;

    let in_use: Vec<_> =
        [Some(&source), backing.as_ref()].into_iter().flatten().flat_map(|disk| files_in_use(&disk.report)).collect();
    let made = args.new.make(&args.target, &args.to_format, virtual_size, &args.source.host, &grants, &in_use)?;
    let copied = args.copy(&source.disk, backing.as_ref().map(|backing| &backing.disk), &made);
    let copied = copied.map_err(|error| made.target.about(error))?;
    made.target.finish()?;
    if args.json {
        let made = args.new.report(&args.target, &args.to_format, virtual_size);
        done(&Report { made, copied })?;
    } else {
        output::line(format_args!(
            "{}: {}, {}; {} written, {} compressed",
            printable(&args.target.display().to_string()),
            printable(&args.to_format),
            size(virtual_size),
            size(copied.written),
            size(copied.packed)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
