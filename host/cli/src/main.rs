//! The `blockhouse` program. It parses no disk format: every command goes through components.
//!
//! | file | what |
//! |---|---|
//! | `args.rs` | what every command that opens an image shares: format, grants, plug-ins, audit |
//! | `disk_arg.rs`, `open_disk.rs` | the disk strings of `run` and `serve`; the disks, opened and closed |
//! | `grant_arg.rs`, `policy.rs` | what is allowed, and how much of it; the policy file |
//! | `control.rs` | the control interface: commands on a socket |
//! | `metrics.rs`, `outlet.rs` | what disks did, as JSON and for Prometheus; the socket or file where that goes |
//! | `attendant.rs` | a process that removes sockets and writes the metrics file |
//! | `inherited.rs` | what the program was started with: open files, signals |
//! | `ending.rs` | how `serve` and `run` end when a signal asks for it |
//! | `helper.rs` | what that process and the one of `namer.rs` have in common |
//! | `requested.rs` | what was asked for against what was granted |
//! | `compiler.rs` | compilers for components of strangers, as processes |
//! | `walls.rs` | the walls around the program: what each command will open |
//! | `output.rs`, `size.rs`, `progress.rs` | standard output, JSON, exit codes; sizes; how far long work has come |
//! | `log.rs` | standard error: the log, and what people are told |
//! | `new_image.rs`, `target.rs`, `namer.rs` | a new image, which has its name once it is complete; who gives that |
//! | `segments.rs`, `copy.rs` | what of a disk is worth reading; its content moved to another disk |
//! | `commands/` | one file per command |

#![deny(unsafe_code)]
// They panic where nothing can be written: `output.rs` and `log.rs` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod attendant;
mod commands;
mod compiler;
mod control;
mod control_line;
mod copy;
mod disk_arg;
mod ending;
mod error_report;
mod grant_arg;
mod helper;
mod inherited;
mod log;
mod metrics;
mod namer;
mod new_image;
mod open_disk;
mod outlet;
mod output;
mod policy;
mod progress;
mod remedy;
mod requested;
mod segments;
mod size;
mod target;
mod walls;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

const LONG_ABOUT: &str = "\
Blockhouse opens disk images from strangers. The image is parsed by a WebAssembly component that holds \
the image, what you grant with --allow, and nothing else; backing files work, and a malicious reference \
goes nowhere.

The format is always stated by you and never guessed: a raw disk that looks like a qcow2 image stays a \
raw disk. `blockhouse probe` prints a guess if you have none.";

const AFTER_HELP: &str = "\
Examples:
  blockhouse info --format qcow2 untrusted.qcow2
      What the image is and what it refers to. Nothing but the image is opened.
  blockhouse info --format qcow2 --allow /images/base overlay.qcow2
      The same with its backing chain, if all of it lies in /images/base.
  blockhouse read --format qcow2 --allow base.qcow2 --output disk.raw \\
    overlay.qcow2
      The bytes that a guest would see.
  blockhouse run \\
    --disk file=overlay.qcow2,format=qcow2,allow=base.qcow2,readonly=on
      A KVM machine whose built-in guest reads the disk and prints its SHA-256.
  blockhouse run --disk ... --kernel vmlinuz --initrd initrd.img \\
    --cmdline 'console=ttyS0'
      The same with Linux.
  blockhouse serve --socket /run/disk.sock \\
    --disk file=overlay.qcow2,format=qcow2,allow=base.qcow2
      The disk for QEMU and others, over vhost-user.
  blockhouse create --format qcow2 --backing base.qcow2 \\
    --backing-format qcow2 overlay.qcow2
      A new overlay. The help of each command that changes images has more:
      check, resize, convert, ...

Exit codes:
  0 done    1 failed    2 wrong usage
  3 a file that the image names is not granted, or not there
  4 corrupt image       5 unsupported feature or format
  6 component failed or went over a limit
  7 `check` found lost space and nothing worse    8 `compare` found a difference
  9 --require-walls, and this kernel lacks one

With --json, an error is a line on standard output as well, if nothing else is:
  {\"error\":{\"kind\":\"denied\",\"image\":...,\"message\":...}}";

/// Disk images from strangers, parsed in a sandbox.
#[derive(Debug, Parser)]
#[command(name = "blockhouse", version, about, long_about = LONG_ABOUT, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Log more to standard error: -v for what was opened, -vv for debugging. RUST_LOG overrides it.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    #[command(flatten)]
    walls: walls::WallArgs,
}

/// The help of each command stands with its arguments.
#[derive(Debug, Subcommand)]
enum Command {
    Info(commands::info::Args),
    Map(commands::map::Args),
    Read(commands::read::Args),
    Run(commands::run::Args),
    Serve(commands::serve::Args),
    Create(commands::create::Args),
    Check(commands::check::Args),
    Resize(commands::resize::Args),
    Convert(commands::convert::Args),
    Compare(commands::compare::Args),
    Commit(commands::commit::Args),
    Rebase(commands::rebase::Args),
    /// List, make, apply and delete the snapshots inside an image
    #[command(subcommand)]
    Snapshot(commands::snapshot::Command),
    /// Look at format components, and compile them ahead
    #[command(subcommand)]
    Plugin(commands::plugin::Command),
    Probe(commands::probe::Args),
    Control(commands::control::Args),
}

fn main() -> ExitCode {
    if let Some(code) = compiler::serve_if_asked().or_else(namer::serve_if_asked).or_else(attendant::serve_if_asked) {
        return code;
    }
    inherited::put_in_order(std::env::args_os());
    log::begin();
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut Cli::command()).exit());
    let options = remedy::Options::of(&matches);
    let default = match cli.verbose {
        // Refused opens are in the error message already.
        0 => "warn,blockhouse::audit=off",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(log::fields())
        .with_writer(|| log::Stderr)
        // Whoever panics for a line of the log takes a disk with it.
        .log_internal_errors(false)
        // Colours are for a terminal; in a file or a pipe they are escape sequences in the log.
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();

    let walls = match cli.walls.raise(&cli.command) {
        Ok(walls) => walls,
        Err(error) => {
            target::forget_begun();
            attendant::dismiss();
            return output::fail(&error, options);
        }
    };
    let result = match cli.command {
        Command::Info(args) => commands::info::run(&args),
        Command::Map(args) => commands::map::run(&args),
        Command::Read(args) => commands::read::run(&args),
        Command::Serve(args) => commands::serve::run(&args, &walls),
        Command::Run(args) => commands::run::run(args, &walls),
        Command::Create(args) => commands::create::run(&args),
        Command::Check(args) => commands::check::run(&args),
        Command::Resize(args) => commands::resize::run(&args),
        Command::Convert(args) => commands::convert::run(&args),
        Command::Compare(args) => commands::compare::run(&args),
        Command::Commit(args) => commands::commit::run(&args),
        Command::Rebase(args) => commands::rebase::run(&args),
        Command::Snapshot(command) => commands::snapshot::run(command),
        Command::Plugin(command) => commands::plugin::run(&command),
        Command::Probe(args) => commands::probe::run(&args),
        Command::Control(args) => commands::control::run(&args),
    };
    target::forget_begun();
    attendant::dismiss();
    match result {
        Ok(code) => code,
        Err(error) => output::fail(&error, options),
    }
}
