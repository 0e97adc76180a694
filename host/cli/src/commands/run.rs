//! `blockhouse run`: a KVM machine with virtio-blk disks.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use blockhouse_sandbox::LockMode;
use blockhouse_vmm::{ConsoleInput, DiskConfig, DiskReport, DiskResult, ExitReason, Machine, MachineConfig, Payload};
use blockhouse_walls::{Plan, Role, Use, Walls};
use serde::Serialize;

use crate::args::HostArgs;
use crate::attendant;
use crate::control;
use crate::disk_arg::{self, DiskArg, User};
use crate::ending::{self, Early, Ending};
use crate::log;
use crate::open_disk::{ControlledDisk, DiskRow, OpenDisk, prometheus_of};
use crate::outlet::{MetricsArg, Outlet, listen};
use crate::output;
use crate::size::parse_size;
use crate::walls::beginning;

/// Run a KVM machine with virtio-blk disks
///
/// Without --kernel the built-in guest runs: it reads every disk from its first byte to its last and
/// prints the SHA-256 of each.
///
/// The exit code is 0 if the guest read every disk, switched the machine off or reset it, and 1 if it could
/// not read a disk, or crashed (triple fault).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
SIGTERM, SIGINT or SIGHUP switches the machine off: what is in flight is
answered, everything that the guest wrote is made durable, the images are
closed. A second SIGTERM or SIGINT waits for nothing. Under nohup, SIGHUP is
ignored. The exit code is 0 with --kernel, and 1 if it is the built-in guest
that did not come to its end, or after a second signal.")]
pub(crate) struct Args {
    /// A disk, as key=value fields (repeat the option for more disks)
    #[arg(long = "disk", value_name = "FIELDS", required = true, value_parser = DiskArg::for_run,
        long_help = disk_arg::help(User::Run))]
    disks: Vec<DiskArg>,

    /// A Linux kernel to boot: bzImage or vmlinux
    #[arg(long, value_name = "FILE", help_heading = "Linux")]
    kernel: Option<PathBuf>,

    /// Its initramfs
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Linux")]
    initrd: Option<PathBuf>,

    /// Its command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", requires = "kernel", help_heading = "Linux")]
    cmdline: String,

    /// Memory of the machine; K, M, G multiply
    #[arg(long, value_name = "N", default_value = "512M", value_parser = parse_size)]
    memory: u64,

    /// vCPUs of the machine
    #[arg(long, value_name = "N", default_value = "1")]
    cpus: u8,

    /// Hand out what the disks did, as text for Prometheus: to whoever connects to a Unix socket (a path, or
    /// fd:N), over HTTP as well (curl --unix-socket), or in a file that is written every 5 seconds (file:PATH)
    #[arg(long, value_name = "SOCKET|file:PATH")]
    metrics: Option<MetricsArg>,

    /// Take commands at a Unix socket (a path, where only your user can connect, or fd:N): see `blockhouse control`
    #[arg(long, value_name = "SOCKET")]
    control: Option<String>,

    /// Print what the disks did as JSON at the end, and what the built-in guest found on them; the console goes
    /// to standard error
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    host: HostArgs,
}

/// What became of a disk, and what the built-in guest found on it.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    disk: DiskRow,
    #[serde(flatten)]
    found: Option<Found<'a>>,
}

/// What the built-in guest found on one disk.
#[derive(Serialize)]
struct Found<'a> {
    bytes: u64,
    sha256: Option<&'a str>,
    error: Option<String>,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        OpenDisk::plan_all(plan, &self.host, &self.disks)?;
        self.kernel.iter().chain(&self.initrd).for_each(|path| plan.read(path));
        plan.add("/dev/kvm", Use::Device);
        self.host.plan(plan)?;
        // For the operator; and signals are told to a thread through a pair.
        plan.sockets();
        attendant::plan(plan, self.control.iter(), self.metrics.as_ref())
    }
}

pub(crate) fn run(args: Args, walls: &Walls) -> anyhow::Result<ExitCode> {
    let signals = ending::signals()?;
    let outlet = args.metrics.as_ref().map(Outlet::open).transpose()?;
    let control = args.control.as_ref().map(|socket| listen(socket)).transpose()?;
    let linux = args.kernel.is_some();
    let ending = Ending::new((outlet, control));
    let begun = || ending.heed(signals, Early { fails: !linux, json: args.json });
    let opened = OpenDisk::open_all(&args.host, &args.disks, LockMode::Enforce, walls, begun)?;
    OpenDisk::refuse_replacing(&opened, args.metrics.as_ref())?;
    let disks = opened.iter().zip(&args.disks).map(|(opened, disk)| {
        Ok(DiskConfig {
            read_only: disk.readonly,
            cache: disk.cache,
            discard: disk.discard,
            poll: disk.poll,
            limits: disk.limits(),
            queues: disk.queues,
            beginning: beginning(walls, Role::DataPath),
            ..DiskConfig::new(opened.backend()?, &opened.serial)
        })
    });
    let disks = disks.collect::<anyhow::Result<_>>()?;
    let payload = match args.kernel {
        Some(kernel) => Payload::Linux { kernel, initramfs: args.initrd, cmdline: args.cmdline },
        None => Payload::BuiltinGuest,
    };
    // Not by way of `Stdout`: that would hold up the end of the machine until somebody reads.
    let text: OwnedFd = match args.json {
        true => io::stderr().as_fd().try_clone_to_owned(),
        false => io::stdout().as_fd().try_clone_to_owned(),
    }
    .context("the console of the guest cannot be opened")?;
    let console = Box::new(File::from(text));
    let machine = Machine::new(MachineConfig { memory_bytes: args.memory, vcpus: args.cpus, payload, disks, console })?;
    let stop = machine.stop_handle();
    let (outlet, control) = ending.serve(|sockets| Ok((sockets, Box::new(move || stop.stop()))))?;
    if linux {
        forward_input(machine.console_input());
    }
    let handles = machine.disks().into_iter();
    let disks: Arc<[ControlledDisk]> = opened
        .into_iter()
        .zip(handles)
        .map(|(disk, handle)| {
            let news = handle.clone();
            let tell = move || {
                news.config_changed();
                true
            };
            ControlledDisk::new(disk, move || handle.stats(), tell)
        })
        .collect();
    let machine = machine.vcpus_beginning_with(beginning(walls, Role::Vcpu));
    // All is open and compiled.
    walls.seal(Role::Control).context("the guest was not started")?;
    log::never_wait();
    let metrics = outlet.map(|outlet| outlet.start(walls, prometheus_of(&disks))).transpose()?;
    let control = control.map(|listener| control::start(listener, walls, Arc::clone(&disks))).transpose()?;
    let ended = machine.run();
    drop((control, metrics));
    // A guest that was switched off, or killed, may not have flushed what it wrote.
    OpenDisk::summarize_all(&disks);
    OpenDisk::close_all(disks.iter())?;
    let exit = ended?;
    if args.json {
        let rows = (0..).zip(disks.iter()).map(|(number, disk)| {
            let found = exit.disks.iter().find(|report| report.disk == number).map(Found::new);
            Row { disk: disk.row(), found }
        });
        output::json(&rows.collect::<Vec<_>>())?;
    }
    match exit.reason {
        ExitReason::Stopped if !linux => bail!("ended by a signal before the guest had read every disk"),
        ExitReason::Guest(0) | ExitReason::Shutdown | ExitReason::Stopped => Ok(ExitCode::SUCCESS),
        ExitReason::Guest(1) => bail!("the guest could not read every disk"),
        ExitReason::Guest(code) => bail!("the built-in guest failed with code {code}"),
        ExitReason::Reset => {
            log::line(format_args!("blockhouse: the guest reset the machine"));
            Ok(ExitCode::SUCCESS)
        }
        ExitReason::Crashed => bail!(
            "the guest crashed (triple fault). If its kernel said nothing, look at --kernel, --initrd and --memory; if \
             it was to reset the machine, boot it with reboot=acpi"
        ),
        other => bail!("the machine ended in an unknown way: {other:?}"),
    }
}

impl<'a> Found<'a> {
    fn new(report: &'a DiskReport) -> Self {
        let (sha256, error) = match &report.result {
            DiskResult::Sha256(digest) => (Some(digest.as_str()), None),
            DiskResult::ReadError { sector } => (None, Some(format!("I/O error at sector {sector}"))),
            DiskResult::Device(why) => (None, Some(why.clone())),
        };
        Self { bytes: report.bytes, sha256, error }
    }
}

/// Types what comes from a terminal or a pipe into the guest's serial port. The thread ends with the
/// process.
fn forward_input(input: ConsoleInput) {
    if !io::stdin().is_terminal() {
        // Without a terminal there is nobody to type; reading would only steal a script's input.
        return;
    }
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok(read @ 1..) = io::stdin().read(&mut buffer) {
            let mut rest = buffer.get(..read).unwrap_or_default();
            while !rest.is_empty() {
                let taken = input.send(rest);
                rest = rest.get(taken..).unwrap_or_default();
                if taken == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    });
}
