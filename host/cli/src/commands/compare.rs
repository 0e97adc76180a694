//! `blockhouse compare`: whether two disks have the same content.

use std::path::PathBuf;
use std::process::ExitCode;

use blockhouse_block::{Access, BlockBackend, Disk};
use blockhouse_sandbox::OpenRequest;
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::{HostArgs, ShareArgs};
use crate::copy::{Buffer, for_each_part};
use crate::output::{self, DIFFERENT, size};
use crate::progress::Progress;
use crate::segments::Pairs;

/// Bytes that are compared at a time.
const CHUNK: u64 = 2 << 20;

/// Compare the content of two disks, whatever their formats
///
/// A longer disk equals a shorter one if the rest of it reads as zero, unless --strict is given.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0 equal    8 different    others as in `blockhouse --help`

Example:
  blockhouse compare --format-a qcow2 --format-b raw vm.qcow2 vm.raw")]
pub(crate) struct Args {
    /// One image
    #[arg(value_name = "A")]
    a: PathBuf,

    /// The other one
    #[arg(value_name = "B")]
    b: PathBuf,

    /// The format of A. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format_a: String,

    /// The format of B
    #[arg(long, value_name = "FORMAT")]
    format_b: String,

    /// Let both images, and their backing files, refer to PATH: a file, or every regular file below a
    /// directory. Read-only
    #[arg(long, value_name = "PATH")]
    allow: Vec<PathBuf>,

    /// Disks of different sizes are different
    #[arg(long)]
    strict: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    share: ShareArgs,

    #[command(flatten)]
    host: HostArgs,
}

#[derive(Serialize)]
struct Report {
    equal: bool,
    /// The first byte that differs; past the end of a disk are zeroes.
    first_difference: Option<u64>,
    size_a_bytes: u64,
    size_b_bytes: u64,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        plan.read(&self.a);
        plan.read(&self.b);
        self.host.plan_grants(plan, &self.allow, &[], Access::ReadOnly)?;
        self.host.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opener =
        args.host.opener()?.grants(args.host.grants(&args.allow, &[], Access::ReadOnly)?).locks(args.share.locks());
    let a = opener.open(&OpenRequest::new(&args.a, &args.format_a))?.disk;
    let b = opener.open(&OpenRequest::new(&args.b, &args.format_b))?.disk;
    let (size_a, size_b) = (a.capacity(), b.capacity());
    let sizes_count = args.strict && size_a != size_b;
    let first_difference = if sizes_count { None } else { first_difference(&a, &b)? };
    let equal = !sizes_count && first_difference.is_none();
    if args.json {
        output::json(&Report { equal, first_difference, size_a_bytes: size_a, size_b_bytes: size_b })?;
    } else {
        match first_difference {
            Some(at) => output::line(format_args!("different: the first difference is at byte {at}"))?,
            None if sizes_count => {
                output::line(format_args!("different: the sizes are {} and {}", size(size_a), size(size_b)))?
            }
            None if size_a != size_b => output::line(format_args!(
                "equal, but the sizes are {} and {}: the rest of the longer one reads as zero",
                size(size_a),
                size(size_b)
            ))?,
            None => output::line(format_args!("equal"))?,
        }
    }
    Ok(if equal { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}

fn first_difference(a: &Disk, b: &Disk) -> anyhow::Result<Option<u64>> {
    let mut progress = Progress::new(a.capacity().max(b.capacity()), false);
    let (mut of_a, mut of_b) = (Buffer::new(CHUNK), Buffer::new(CHUNK));
    for pair in Pairs::new(a, Some(b)) {
        let (one, other) = pair?;
        if !(one.zero && other.zero) {
            let mut found = None;
            for_each_part(one.start, one.end, CHUNK, |start, end| {
                if found.is_some() {
                    return Ok(());
                }
                let (a, b) = (of_a.read(Some(a), start, end)?, of_b.read(Some(b), start, end)?);
                if a != b {
                    let alike = a.iter().zip(b.iter()).take_while(|(a, b)| a == b).count();
                    found = Some(start.saturating_add(u64::try_from(alike)?));
                }
                progress.at(end);
                Ok(())
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        progress.at(one.end);
    }
    progress.finish();
    Ok(None)
}
