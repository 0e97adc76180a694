//! `blockhouse plugin`: look at format components without running them, and compile them ahead.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use blockhouse_formats::{FORMATS, PROBER};
use blockhouse_sandbox::{Authority, Inspection, Limits, Sandbox};
use blockhouse_walls::Plan;
use serde::Serialize;

use crate::compiler;
use crate::output::{self, printable};
use crate::target::{NewFile, Target, refuse_read_from};
use crate::walls;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Show what a component imports and exports, function by function, and which world it fits
    ///
    /// Runs nothing of it. The exit code is 6 if it would not be loaded.
    Inspect {
        /// The component
        #[arg(value_name = "FILE.wasm")]
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Compile a component ahead, for this machine and this version
    ///
    /// What comes out is for --plugin FORMAT=compiled:OUT, which then starts without compiling and needs no
    /// cache. It is a program, not a component any more: nothing confines it, so take none that you did not
    /// make. It is taken only if it is yours and nobody else can write it.
    Compile {
        /// The component
        #[arg(value_name = "FILE.wasm")]
        file: PathBuf,
        /// The file to make
        #[arg(short, long, value_name = "OUT")]
        output: PathBuf,
        /// Replace the file if it exists
        #[arg(long)]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the built-in components
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        match self {
            Self::Inspect { file, .. } => plan.read(file),
            Self::Compile { file, output, force, .. } => {
                plan.read(file);
                compiled(output, *force).plan(plan)?;
            }
            Self::List { .. } => return Ok(()),
        }
        compiler::prepare(1, &Limits::default())
    }
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let sandbox = compiler::sandbox(Limits::default())?;
    // What is looked at may be a stranger's.
    walls::narrow()?;
    match command {
        Command::Inspect { file, json } => {
            let inspection = sandbox.inspect_file(file)?;
            if *json {
                output::json(&inspection)?;
            } else {
                for line in render(&inspection).lines() {
                    output::line(format_args!("{line}"))?;
                }
            }
            let loadable = inspection.world.is_some();
            Ok(if loadable { ExitCode::SUCCESS } else { ExitCode::from(6) })
        }
        Command::Compile { file, output, force, json } => compile(&sandbox, file, output, *force, *json),
        Command::List { json } => list(*json),
    }
}

/// What is loaded only if nobody else can have written it.
fn compiled(output: &Path, force: bool) -> NewFile<'_> {
    NewFile { mode: 0o600, ..NewFile::new(output, force) }
}

/// What was made.
#[derive(Serialize)]
struct Compiled {
    compiled: String,
    size_bytes: usize,
}

fn compile(sandbox: &Sandbox, file: &Path, output: &Path, force: bool, json: bool) -> anyhow::Result<ExitCode> {
    let code = sandbox.precompile(file)?;
    if let Ok(metadata) = fs::symlink_metadata(output) {
        // There is no way back from code to its component.
        refuse_read_from(output, &metadata, &[file.to_owned()])?;
    }
    let target = Target::take(&compiled(output, force))?;
    let mut partial = target.open()?;
    partial
        .write_all(&code)
        .and_then(|()| partial.sync_all())
        .with_context(|| format!("cannot write {}", output.display()))?;
    target.finish()?;
    if json {
        output::json(&Compiled { compiled: output.display().to_string(), size_bytes: code.len() })?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    #[serde(flatten)]
    inspection: Inspection,
}

fn list(json: bool) -> anyhow::Result<ExitCode> {
    // The built-in ones: no strangers.
    let sandbox = Sandbox::new(Limits::default())?;
    let mut rows = Vec::new();
    let builtin = FORMATS.iter().map(|builtin| (builtin.format, builtin.bytes));
    for (name, bytes) in builtin.chain([("probe", PROBER)]) {
        rows.push(Row { name, inspection: sandbox.inspect(name, bytes)? });
    }
    if json {
        output::json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format_args!("{:<8} {:<18} {:>8}  sha256", "name", "world", "bytes"))?;
    for row in rows {
        let world = row.inspection.world.map_or("none", Authority::world);
        output::line(format_args!(
            "{:<8} {:<18} {:>8}  {}",
            row.name, world, row.inspection.size_bytes, row.inspection.sha256
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The names in it come out of the component; the line ends are ours.
fn render(inspection: &Inspection) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let world = match inspection.world {
        Some(Authority::Prober) => "prober-only: it can compute, and nothing else",
        Some(Authority::ReadOnly) => {
            "read-only-format: it can read its image and what is granted, log, and nothing else"
        }
        Some(Authority::ReadWrite) => {
            "read-write-format: as read-only-format, and it can write, resize and sync files opened for writing"
        }
        None => "none: it is not loaded",
    };
    let _ = writeln!(text, "world     {world}");
    let contract = printable(inspection.contract.as_deref().unwrap_or("not used"));
    let _ = writeln!(text, "contract  blockhouse:format {contract}");
    let _ = writeln!(text, "size      {} bytes", inspection.size_bytes);
    let _ = writeln!(text, "sha256    {}", inspection.sha256);
    let _ = writeln!(text, "imports   {}", if inspection.imports.is_empty() { "nothing" } else { "" });
    for import in &inspection.imports {
        let level = match import.level {
            None => "  OUTSIDE every world",
            Some(Authority::ReadWrite) => "  read-write-format only",
            Some(_) => "",
        };
        let _ = writeln!(text, "  {} {}{level}", printable(&import.interface), printable(&import.function));
    }
    for name in &inspection.type_only {
        let _ = writeln!(text, "  {} (types only)", printable(name));
    }
    let _ = writeln!(text, "exports   {}", if inspection.exports.is_empty() { "nothing" } else { "" });
    for export in &inspection.exports {
        let _ = writeln!(text, "  {}", printable(export));
    }
    text
}
