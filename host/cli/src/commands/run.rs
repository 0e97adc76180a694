//! `blockhouse run`: a KVM machine with virtio-blk disks.

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use blockhouse_sandbox::{GrantReport, LockMode, OpenEvent};
use blockhouse_vmm::{ConsoleInput, DiskConfig, DiskReport, DiskResult, ExitReason, Machine, MachineConfig, Payload};
use blockhouse_walls::{Plan, Role, Use, Walls};
use serde::Serialize;

use crate::args::HostArgs;
use crate::disk_arg::{self, DiskArg, User};
use crate::open_disk::OpenDisk;
use crate::output;
use crate::size::parse_size;
use crate::walls::beginning;

/// Run a KVM machine with virtio-blk disks
///
/// Without --kernel the built-in guest runs: it reads every disk from its first byte to its last and
/// prints the SHA-256 of each.
#[derive(Debug, clap::Args)]
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

    /// Print what the built-in guest found as JSON; its console goes to standard error
    #[arg(long, conflicts_with = "kernel")]
    json: bool,

    #[command(flatten)]
    host: HostArgs,
}

/// What the built-in guest found on one disk.
#[derive(Serialize)]
struct DiskRow<'a> {
    disk: u32,
    image: String,
    bytes: u64,
    read_only: bool,
    serial: &'a str,
    sha256: Option<&'a str>,
    error: Option<String>,
    #[serde(flatten)]
    asked: Option<&'a Asked>,
}

/// What the images of a disk asked for, and what they could have.
#[derive(Serialize)]
struct Asked {
    requested: Vec<OpenEvent>,
    granted: Vec<GrantReport>,
}

impl Asked {
    fn of(disk: &OpenDisk) -> Self {
        Self { requested: disk.requested(), granted: disk.granted.clone() }
    }
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        OpenDisk::plan_all(plan, &self.host, &self.disks)?;
        self.kernel.iter().chain(&self.initrd).for_each(|path| plan.read(path));
        plan.add("/dev/kvm", Use::Device);
        self.host.plan(plan)
    }
}

pub(crate) fn run(args: Args, mut walls: Walls) -> anyhow::Result<ExitCode> {
    let opened = OpenDisk::open_all(&args.host, &args.disks, LockMode::Enforce, &walls)?;
    let disks = opened.iter().zip(&args.disks).map(|(opened, disk)| {
        Ok(DiskConfig {
            read_only: disk.readonly,
            cache: disk.cache,
            discard: disk.discard,
            poll: disk.poll,
            queues: disk.queues,
            beginning: beginning(&walls, Role::DataPath),
            ..DiskConfig::new(opened.backend()?, &opened.serial)
        })
    });
    let disks = disks.collect::<anyhow::Result<_>>()?;
    let payload = match args.kernel {
        Some(kernel) => Payload::Linux { kernel, initramfs: args.initrd, cmdline: args.cmdline },
        None => Payload::BuiltinGuest,
    };
    let linux = matches!(payload, Payload::Linux { .. });
    let console: Box<dyn Write + Send> = if args.json { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
    let machine = Machine::new(MachineConfig { memory_bytes: args.memory, vcpus: args.cpus, payload, disks, console })?;
    if linux {
        forward_input(machine.console_input());
    }
    let machine = machine.vcpus_beginning_with(beginning(&walls, Role::Vcpu));
    // All is open and compiled.
    walls.seal();
    let ended = machine.run();
    // A guest that was switched off, or killed, may not have flushed what it wrote.
    OpenDisk::summarize_all(&opened);
    let asked: Vec<Asked> = opened.iter().map(Asked::of).collect();
    OpenDisk::close_all(opened)?;
    let exit = ended?;
    if args.json {
        output::json(&rows(&exit.disks, &args.disks, &asked))?;
    }
    match exit.reason {
        ExitReason::Guest(0) | ExitReason::Shutdown | ExitReason::Stopped => Ok(ExitCode::SUCCESS),
        ExitReason::Guest(1) => bail!("the guest could not read every disk"),
        ExitReason::Guest(code) => bail!("the built-in guest failed with code {code}"),
        ExitReason::Reset => {
            eprintln!("blockhouse: the guest reset the machine");
            Ok(ExitCode::SUCCESS)
        }
        other => bail!("the machine ended in an unknown way: {other:?}"),
    }
}

fn rows<'a>(reports: &'a [DiskReport], disks: &[DiskArg], asked: &'a [Asked]) -> Vec<DiskRow<'a>> {
    let row = |report: &'a DiskReport| {
        let disk = usize::try_from(report.disk).ok().and_then(|disk| disks.get(disk));
        let asked = usize::try_from(report.disk).ok().and_then(|disk| asked.get(disk));
        let (sha256, error) = match &report.result {
            DiskResult::Sha256(digest) => (Some(digest.as_str()), None),
            DiskResult::ReadError { sector } => (None, Some(format!("I/O error at sector {sector}"))),
            DiskResult::Device(why) => (None, Some(why.clone())),
        };
        DiskRow {
            disk: report.disk,
            image: disk.map(|disk| disk.file.display().to_string()).unwrap_or_default(),
            bytes: report.bytes,
            read_only: report.read_only,
            serial: &report.serial,
            sha256,
            error,
            asked,
        }
    };
    reports.iter().map(row).collect()
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
