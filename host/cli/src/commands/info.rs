//! `blockhouse info`: an image and its chain, layer by layer.

use std::fmt::Write as _;
use std::process::ExitCode;

use blockhouse_sandbox::{ChainReport, LayerReport, Outcome};
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::args::ImageArgs;
use crate::error_report::ErrorReport;
use crate::output::{self, exit_code, printable, size};
use crate::requested;

/// Show an image and its backing chain: sizes, features, what it refers to, what was refused
///
/// Everything that could be opened is shown, and what could not be with the reason. The exit code
/// says whether the whole chain opens.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    chain: &'a ChainReport,
    /// What kept the chain from opening; null if all of it opens.
    error: Option<ErrorReport>,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        self.image.plan(plan)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (chain, error) = args.image.opener()?.describe(&args.image.request());
    if args.json {
        output::json(&Report { chain: &chain, error: error.as_ref().map(ErrorReport::from) })?;
    } else {
        output::text(&render(&chain))?;
    }
    match error {
        None => Ok(ExitCode::SUCCESS),
        Some(error) if args.json => Ok(ExitCode::from(exit_code(error.kind()))),
        Some(error) => Err(error.into()),
    }
}

fn render(chain: &ChainReport) -> String {
    let mut text = String::new();
    for (depth, layer) in chain.layers.iter().enumerate() {
        render_layer(&mut text, depth, layer);
    }
    if !chain.layers.is_empty() {
        let opens = chain.layers.iter().flat_map(|layer| &layer.opens);
        let _ = writeln!(text, "{}\n{}", requested::requested(opens, 0), requested::granted(&chain.granted));
    }
    text
}

fn render_layer(text: &mut String, depth: usize, layer: &LayerReport) {
    let _ = writeln!(text, "layer {depth}: {}", printable(&layer.image));
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {:<15} {}", printable(name), printable(value));
    };
    let digest: String = layer.component_sha256.chars().take(12).collect();
    line("format", &format!("{} ({}, sha256 {digest}…)", layer.format, layer.component));
    line("virtual size", &size(layer.virtual_size_bytes));
    if layer.cluster_size_bytes != 0 {
        line("cluster size", &size(layer.cluster_size_bytes.into()));
    }
    for fact in &layer.facts {
        line(&fact.name, &fact.value);
    }
    for snapshot in &layer.snapshots {
        line("snapshot", &format!("id {} {:?}, {}", snapshot.id, snapshot.name, size(snapshot.virtual_size_bytes)));
    }
    if let Some(backing) = &layer.backing {
        line(
            "backing file",
            &format!("{:?}, format {}", backing.name, backing.format.as_deref().unwrap_or("not stated")),
        );
    }
    for file in &layer.files {
        line("refers to", &format!("{file:?}"));
    }
    for open in &layer.opens {
        match open.outcome {
            Outcome::Allowed => {
                line("opened", &format!("{} (grant {})", open.path, open.grant.as_deref().unwrap_or("-")));
            }
            Outcome::Denied => {
                line("refused", &format!("{:?}: {}", open.path, open.reason.as_deref().unwrap_or("refused")));
            }
        }
    }
}
