//! `blockhouse create`: a new image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use blockhouse_block::{Access, BlockBackend};
use blockhouse_sandbox::Grants;
use blockhouse_walls::Plan;
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory};

use crate::args::{HostArgs, beside};
use crate::new_image::NewArgs;
use crate::output::{self, printable, size};
use crate::size::parse_size;
use crate::target::files_in_use;

/// Make a new image
///
/// The image is written under a temporary name in its directory and gets its own when it is complete:
/// who is interrupted leaves no half image.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  blockhouse create --format qcow2 vm.qcow2 20G
  blockhouse create --format qcow2 --backing base.qcow2 \\
    --backing-format qcow2 overlay.qcow2
      An overlay of the size of its backing file, which lies beside it.
  blockhouse create --format qcow2 --size 20G -o cluster-size=2M \\
    --preallocation metadata vm.qcow2
  blockhouse create --format qcow2 -o help
      The options of the format.")]
pub(crate) struct Args {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: Option<PathBuf>,

    /// The size of the disk in bytes; K, M, G, T multiply. That of the backing file if left out
    #[arg(value_name = "SIZE", value_parser = parse_size, group = "disk_size")]
    disk: Option<u64>,

    /// The format of the image
    #[arg(long, value_name = "FORMAT")]
    format: String,

    /// The same as SIZE
    #[arg(long, value_name = "N", value_parser = parse_size, group = "disk_size")]
    size: Option<u64>,

    #[command(flatten)]
    new: NewArgs,

    /// Let the backing file refer to PATH: a file, or every regular file below a directory. The backing
    /// file itself is granted by naming it
    #[arg(long, value_name = "PATH")]
    allow: Vec<PathBuf>,

    /// Do not look whether the backing file is there (needs a size)
    #[arg(long, requires = "disk_size")]
    no_check: bool,

    /// List the options of the format, as -o help does
    #[arg(long, action = ArgAction::SetTrue)]
    help_options: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    host: HostArgs,
}

impl Args {
    /// The image and its size, as far as they were given, unless help is asked for. Ends the program if that is not
    /// enough.
    fn checked(&self) -> Option<(&Path, Option<u64>)> {
        if self.help_options || self.new.wants_help() {
            return None;
        }
        let Some(image) = &self.image else { usage("which IMAGE? (none was given)") };
        let wanted = self.disk.or(self.size);
        if wanted.is_none() && self.new.backing.is_none() {
            usage("which SIZE? (none was given, and there is no --backing file whose size it could be)");
        }
        Some((image, wanted))
    }

    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        self.host.plan(plan)?;
        let Some((image, wanted)) = self.checked() else { return Ok(()) };
        // Where the size is given, no reference is followed.
        if wanted.is_none() {
            self.host.plan_grants(plan, &self.allow, &[], Access::ReadOnly)?;
        }
        self.new.plan(plan, image)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opener = args.host.opener()?;
    let Some((image, wanted)) = args.checked() else {
        let options = opener.create_options(&args.format)?;
        if args.json {
            output::json(&options)?;
        } else if options.is_empty() {
            output::line(format_args!("images of the format {} have no options", printable(&args.format)))?;
        } else {
            for option in options {
                let line = format!("{:<17} {} (default {})", option.name, option.values, option.default);
                output::line(format_args!("{}\n    {}", printable(&line), printable(&option.about)))?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    };
    let grants = match wanted {
        Some(_) => Grants::new(),
        None => args.host.grants(&args.allow, &[], Access::ReadOnly)?,
    };
    // Open, and so locked, until the image has its name.
    let mut below = None;
    let virtual_size = match (wanted, &args.new.backing) {
        (Some(size), Some(name)) if !args.no_check => {
            let path = beside(image, name.as_ref());
            let found = fs::metadata(&path);
            let found = found.with_context(|| {
                format!("cannot find the backing file {} (--no-check names it all the same)", path.display())
            })?;
            if !found.is_file() {
                bail!("the backing file {} is not a regular file", path.display());
            }
            size
        }
        (Some(size), _) => size,
        (None, _) => {
            let backing = args.new.open_backing(image, &opener, &grants)?;
            below.insert(backing.context("there is no backing file")?).disk.capacity()
        }
    };
    let in_use = below.as_ref().map_or_else(Vec::new, |below| files_in_use(&below.report));
    let made = args.new.make(image, &args.format, virtual_size, &args.host, &grants, &in_use)?;
    made.target.finish()?;
    drop(below);
    if args.json {
        output::json(&args.new.report(image, &args.format, virtual_size))?;
    } else {
        output::line(format_args!(
            "{}: {}, {}",
            printable(&image.display().to_string()),
            printable(&args.format),
            size(virtual_size)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Ends as a wrong command line does.
fn usage(why: &str) -> ! {
    let mut program = crate::Cli::command();
    program.build();
    match program.find_subcommand_mut("create") {
        Some(command) => command.error(ErrorKind::MissingRequiredArgument, why).exit(),
        None => program.error(ErrorKind::MissingRequiredArgument, why).exit(),
    }
}
