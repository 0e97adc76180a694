//! `blockhouse resize`: another size for a disk.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, bail};
use blockhouse_block::BlockBackend;
use blockhouse_sandbox::OpenRequest;
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::{GrantArgs, HostArgs};
use crate::output::{self, printable, size};
use crate::progress::Spinner;
use crate::size::parse_size;

/// Change the size of a disk
///
/// What a disk gains reads as zero, also where its backing file is longer. What it loses is gone.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  blockhouse resize --format qcow2 vm.qcow2 40G
  blockhouse resize --format qcow2 vm.qcow2 +10G
  blockhouse resize --format qcow2 --shrink vm.qcow2 -10G
      Partitions and file systems must fit into less before.")]
pub(crate) struct Args {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// The size of the disk in bytes, or what to add or take away; K, M, G, T multiply
    #[arg(value_name = "[+|-]SIZE", allow_hyphen_values = true)]
    size: Change,

    /// The format of the image. Stated by you, never guessed
    #[arg(long, value_name = "FORMAT")]
    format: String,

    /// Let the disk become smaller: what is past its new end is lost
    #[arg(long)]
    shrink: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    grants: GrantArgs,

    #[command(flatten)]
    host: HostArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    To(u64),
    More(u64),
    Less(u64),
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => parse_size(more).map(Self::More),
            (_, Some(less)) => parse_size(less).map(Self::Less),
            _ => parse_size(text).map(Self::To),
        }
    }
}

#[derive(Serialize)]
struct Report {
    virtual_size_bytes: u64,
    virtual_size_bytes_before: u64,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        plan.write(&self.image);
        self.grants.plan(plan, &self.host)?;
        self.host.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let opener = args.host.opener()?.grants(args.grants.grants(&args.host)?);
    let request = OpenRequest::new(&args.image, &args.format);
    let before = opener.open(&request)?.disk.capacity();
    let after = match args.size {
        Change::To(size) => size,
        Change::More(more) => before.checked_add(more).context("no disk can be that large")?,
        Change::Less(less) => before
            .checked_sub(less)
            .with_context(|| format!("the disk has {before} bytes and cannot lose {less} of them"))?,
    };
    if after < before && !args.shrink {
        bail!("the disk has {} and would lose what is past {}; --shrink allows it", size(before), size(after));
    }
    if after != before {
        let _spinner = Spinner::new("resizing");
        opener.resize(&request, before, after)?;
    }
    if args.json {
        output::json(&Report { virtual_size_bytes: after, virtual_size_bytes_before: before })?;
    } else {
        output::line(format_args!(
            "{}: {}, before {}",
            printable(&args.image.display().to_string()),
            size(after),
            size(before)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_and_relative_sizes() {
        assert_eq!("40G".parse(), Ok(Change::To(40 << 30)));
        assert_eq!("+512".parse(), Ok(Change::More(512)));
        assert_eq!("-1M".parse(), Ok(Change::Less(1 << 20)));
        for bad in ["", "+", "-", "+-1", "--1", "1Q"] {
            assert!(bad.parse::<Change>().is_err(), "{bad}");
        }
    }
}
