//! The servers that are compared, each a process of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::client::Client;
use crate::workload::{System, Workload};

/// How long a server may take to end before it is killed: what it wrote may have to reach the disk.
const END_TIME: Duration = Duration::from_secs(30);

/// A server and a connection to it. Ends with its process.
pub(crate) struct Served {
    /// The first is that of the first disk.
    clients: Vec<Client>,
    child: Child,
    sockets: Vec<PathBuf>,
}

/// `blockhouse serve` of an image, with the file system below `allow` granted.
pub(crate) fn blockhouse(
    program: &Path,
    (image, format): (&Path, &str),
    queues: usize,
    writable: bool,
) -> Result<Served> {
    let socket = socket(image, "bh");
    let directory = image.parent().context("an image has a directory")?;
    let writable = if writable { "off" } else { "on" };
    let disk = format!(
        "file={},format={format},allow={},readonly={writable},queues={queues}",
        image.display(),
        directory.display()
    );
    let mut command = Command::new(program);
    command.args(["serve", "--socket"]).arg(&socket).args(["--disk", &disk]);
    start(command, vec![socket], queues)
}

/// `blockhouse serve` of several qcow2 images, read-only, each with a client.
pub(crate) fn blockhouse_disks(program: &Path, images: &[PathBuf]) -> Result<Served> {
    let mut command = Command::new(program);
    command.arg("serve");
    let sockets: Vec<_> = images.iter().map(|image| socket(image, "bh")).collect();
    for (image, socket) in images.iter().zip(&sockets) {
        let disk = format!("file={},format=qcow2,readonly=on,socket={}", image.display(), socket.display());
        command.args(["--disk", &disk]);
    }
    start(command, sockets, 1)
}

/// `qemu-storage-daemon` in its best configuration: io_uring, and a thread of its own for the export.
/// It takes no locks, so that it can have files that we have as well.
pub(crate) fn storage_daemon((image, format): (&Path, &str), queues: usize, writable: bool) -> Result<Served> {
    let socket = socket(image, "qsd");
    let read_only = if writable { "off" } else { "on" };
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--object", "iothread,id=io0"]).args([
        "--blockdev",
        &format!(
            "driver=file,filename={},node-name=f0,aio=io_uring,locking=off,read-only={read_only}",
            image.display()
        ),
    ]);
    let node = if format == "raw" {
        "f0"
    } else {
        command
            .args(["--blockdev", &format!("driver={format},file=f0,node-name=q0,discard=unmap,read-only={read_only}")]);
        "q0"
    };
    let on = if writable { "on" } else { "off" };
    command.args([
        "--export",
        &format!(
            "type=vhost-user-blk,id=e0,node-name={node},addr.type=unix,addr.path={},writable={on},num-queues={queues},\
             iothread=io0",
            socket.display()
        ),
    ]);
    start(command, vec![socket], queues)
}

fn socket(image: &Path, who: &str) -> PathBuf {
    image.with_extension(format!("{who}.sock"))
}

fn start(mut command: Command, sockets: Vec<PathBuf>, queues: usize) -> Result<Served> {
    for socket in &sockets {
        let _ = std::fs::remove_file(socket);
    }
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    let mut served = Served { clients: Vec::new(), child, sockets };
    for socket in &served.sockets {
        served.clients.push(Client::connect(socket, queues)?);
    }
    Ok(served)
}

impl Served {
    /// Resident memory of the process, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kilobytes: u64 = line.split_whitespace().next().context("no number")?.parse()?;
        Ok(kilobytes << 10)
    }
}

impl System for Served {
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)> {
        self.clients.first_mut().context("there is no connection")?.run(workload, round, limit)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.clients.clear();
        // In order: the next one who opens the image finds it closed, and its locks gone.
        let asked = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0))
            .and_then(|id| rustix::process::kill_process(id, rustix::process::Signal::TERM).ok());
        let until = Instant::now() + END_TIME;
        while asked.is_some() && Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Nothing to those that have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}
