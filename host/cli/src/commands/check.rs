//! `blockhouse check`: whether an image is consistent.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use blockhouse_sandbox::{CheckReport, Repair};
use blockhouse_walls::Plan;
use clap::ValueEnum;

use crate::args::{HostArgs, ShareArgs};
use crate::output::{self, LEAKS, exit_code, printable, size};
use crate::progress::Spinner;

/// Check whether an image is consistent, and repair it if asked to
///
/// Also finds what keeps an image from being opened. Backing files are not looked at.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0 consistent, or all of it was repaired    4 corruptions are left
  7 space is lost, nothing else is wrong     others as in `blockhouse --help`

Examples:
  blockhouse check --format qcow2 vm.qcow2
  blockhouse check --format qcow2 --repair leaks vm.qcow2
      Gives back space that nothing uses. Cannot lose anything.")]
pub(crate) struct Args {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// The format of the image. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format: String,

    /// Repair what was found
    #[arg(long, value_name = "WHAT", conflicts_with = "force_share")]
    repair: Option<What>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    share: ShareArgs,

    #[command(flatten)]
    host: HostArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Space that is counted as used and is not
    Leaks,
    /// Everything that can be
    All,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        match self.repair {
            None => plan.read(&self.image),
            Some(_) => plan.write(&self.image),
        }
        self.host.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let repair = args.repair.map(|what| match what {
        What::Leaks => Repair::Leaks,
        What::All => Repair::All,
    });
    let opener = args.host.opener()?.locks(args.share.locks());
    let report = {
        let _spinner = Spinner::new("checking");
        opener.check(&args.image, &args.format, repair)?
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::text(&render(&report))?;
    }
    Ok(if left(report.corruptions, report.corruptions_repaired) > 0 {
        ExitCode::from(exit_code(blockhouse_block::ErrorKind::Corrupt))
    } else if left(report.leaks, report.leaks_repaired) > 0 {
        ExitCode::from(LEAKS)
    } else {
        ExitCode::SUCCESS
    })
}

fn left(found: u64, repaired: u64) -> u64 {
    found.saturating_sub(repaired)
}

fn render(report: &CheckReport) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let _ = writeln!(text, "{}", printable(finding));
    }
    let shown = u64::try_from(report.findings.len()).unwrap_or(u64::MAX);
    let all = report.corruptions.saturating_add(report.leaks);
    if shown > 0 && all > shown {
        let _ = writeln!(text, "...");
    }
    if all == 0 {
        text.push_str("consistent: no corruption, no lost space\n");
    } else {
        let _ = writeln!(
            text,
            "{} corruptions, {} repaired; {} lost clusters, {} given back",
            report.corruptions, report.corruptions_repaired, report.leaks, report.leaks_repaired
        );
    }
    if left(report.corruptions, report.corruptions_repaired) > 0 {
        text.push_str("Data may be lost. Copy the image before --repair all.\n");
    } else if left(report.leaks, report.leaks_repaired) > 0 {
        text.push_str("The data is safe; --repair leaks gives the space back.\n");
    }
    if report.total_clusters > 0 {
        // Hundredths of a percent.
        let share = u128::from(report.allocated_clusters) * 10_000 / u128::from(report.total_clusters);
        let _ = writeln!(
            text,
            "{} of {} clusters allocated ({}.{:02}%), {} of them compressed; the image ends at {}",
            report.allocated_clusters,
            report.total_clusters,
            share / 100,
            share % 100,
            report.compressed_clusters,
            size(report.image_end_bytes)
        );
    }
    text
}
