//! `blockhouse serve`: disks for other virtual machine monitors, over vhost-user.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, anyhow, bail};
use blockhouse_sandbox::LockMode;
use blockhouse_vhost::{BlockDeviceOptions, Handle, Server};
use blockhouse_walls::{Plan, Role, Walls};

use crate::args::HostArgs;
use crate::attendant;
use crate::control;
use crate::disk_arg::{self, DiskArg, User};
use crate::ending::{self, Early, Ending};
use crate::log;
use crate::open_disk::{ControlledDisk, OpenDisk, prometheus_of};
use crate::outlet::{MetricsArg, Outlet, listen};
use crate::output;
use crate::walls::beginning;

const AFTER_HELP: &str = "\
Examples:
  blockhouse serve --socket /run/vm1.sock \\
    --disk file=vm1.qcow2,format=qcow2,allow=base.qcow2,queues=2
  qemu-system-x86_64 -m 1G -M q35,memory-backend=mem \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=vm1,path=/run/vm1.sock,reconnect-ms=1000 \\
    -device vhost-user-blk-pci,chardev=vm1,num-queues=2 ...
      A disk for QEMU. The guest's memory has to be shared (share=on). With
      reconnect-ms the guest waits while `serve` is restarted, even after
      kill -9: requests in flight are taken up again. If new clusters were
      written and not flushed by then, they are gone, and the guest gets I/O
      errors until it is reset. With cache=writethrough, nothing is gone.
  cloud-hypervisor --memory size=1G,shared=on \\
    --disk vhost_user=true,socket=/run/vm1.sock,num_queues=2 ...
  blockhouse serve --socket fd:3 --disk file=vm1.raw,format=raw
      With a socket that was passed by systemd or another parent.

One front end is served at a time; another one waits until it is gone. SIGTERM,
SIGINT or SIGHUP ends the program: what is in flight is answered, everything is
made durable, the image is closed. While images are still being opened, which
takes a while if they are pinned, it ends at once. The exit code is 0; after a
second SIGTERM or SIGINT, which waits for nothing, it is 1. Under nohup, SIGHUP
is ignored.

Give each machine a process of its own. A front end is a process that its guest
may have taken over; it can crash the one that serves it, and then only its own
disk should be there.";

/// Serve disks to QEMU, cloud-hypervisor and others (vhost-user-blk)
///
/// The disk appears in the guest as a virtio-blk device of the machine monitor that connects to the socket.
/// That process needs no right to the image, and parses none.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The Unix socket to listen at: a path, where only your user can connect, or fd:N for a listening
    /// socket that was passed as file descriptor N. With several disks, each has its own: socket=
    #[arg(long, value_name = "SOCKET")]
    socket: Option<String>,

    /// The disk, as key=value fields (repeat the option for more disks)
    #[arg(long = "disk", value_name = "FIELDS", required = true, value_parser = DiskArg::for_serve,
        long_help = disk_arg::help(User::Serve))]
    disks: Vec<DiskArg>,

    /// Hand out what the disks did, as text for Prometheus: to whoever connects to a Unix socket (a path, or
    /// fd:N), over HTTP as well (curl --unix-socket), or in a file that is written every 5 seconds (file:PATH)
    #[arg(long, value_name = "SOCKET|file:PATH")]
    metrics: Option<MetricsArg>,

    /// Take commands at a Unix socket (a path, where only your user can connect, or fd:N): see `blockhouse control`
    #[arg(long, value_name = "SOCKET")]
    control: Option<String>,

    /// Print what the disks did as JSON at the end
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    host: HostArgs,
}

impl Args {
    /// What the command opens.
    pub(crate) fn plan(&self, plan: &mut Plan) -> anyhow::Result<()> {
        OpenDisk::plan_all(plan, &self.host, &self.disks)?;
        self.host.plan(plan)?;
        plan.sockets();
        let sockets = self.socket.iter().chain(self.disks.iter().filter_map(|disk| disk.socket.as_ref()));
        attendant::plan(plan, sockets.chain(&self.control), self.metrics.as_ref())
    }
}

pub(crate) fn run(args: &Args, walls: &Walls) -> anyhow::Result<ExitCode> {
    let signals = ending::signals()?;
    // Sockets first: those that were passed must be taken before other files get their numbers, and a socket
    // that is in use says so before an image is touched.
    let sockets = sockets(args)?;
    let listeners = sockets.iter().map(|socket| listen(socket)).collect::<anyhow::Result<Vec<_>>>()?;
    let outlet = args.metrics.as_ref().map(Outlet::open).transpose()?;
    let control = args.control.as_ref().map(|socket| listen(socket)).transpose()?;
    let ending = Ending::new((listeners, outlet, control));
    let begun = || ending.heed(signals, Early { fails: false, json: args.json });
    // A server that was killed may have left something in flight.
    let disks = OpenDisk::open_all(&args.host, &args.disks, LockMode::Patient, walls, begun)?;
    OpenDisk::refuse_replacing(&disks, args.metrics.as_ref())?;

    let (servers, outlet, control) = ending.serve(|(listeners, outlet, control)| {
        let mut servers = Vec::new();
        for (number, ((listener, opened), disk)) in listeners.into_iter().zip(&disks).zip(&args.disks).enumerate() {
            let options = BlockDeviceOptions {
                serial: opened.serial.clone(),
                queues: disk.queues,
                queue_size: Some(disk.queue_size),
                read_only: disk.readonly,
                cache: disk.cache,
                discard: disk.discard,
                poll: disk.poll,
                limits: disk.limits(),
                beginning: beginning(walls, Role::DataPath),
            };
            servers.push(Server::new(listener, opened.backend()?, &options, format!("disk{number}"))?);
        }
        let handles: Vec<Handle> = servers.iter().map(Server::handle).collect();
        let stop = move || handles.iter().for_each(Handle::stop);
        Ok(((servers, outlet, control), Box::new(stop)))
    })?;
    let handles: Vec<Handle> = servers.iter().map(Server::handle).collect();
    let disks: Arc<[ControlledDisk]> = disks
        .into_iter()
        .zip(&handles)
        .map(|(disk, handle)| {
            let (stats, news) = (handle.clone(), handle.clone());
            ControlledDisk::new(disk, move || stats.stats(), move || news.config_changed())
        })
        .collect();
    // All is open and compiled.
    walls.seal(Role::Server).context("no disk is served")?;
    log::never_wait();
    let metrics = outlet.map(|outlet| outlet.start(walls, prometheus_of(&disks))).transpose()?;
    let control = control.map(|listener| control::start(listener, walls, Arc::clone(&disks))).transpose()?;
    for (disk, socket) in args.disks.iter().zip(&sockets) {
        log::line(format_args!(
            "blockhouse: {} is served at {}",
            output::printable(&disk.file.display().to_string()),
            socket
        ));
    }

    let ended = thread::scope(|scope| {
        let serve = |server| {
            let handles = &handles;
            let begin = walls.thread_start(Role::FrontEnd);
            scope.spawn(move || {
                // This thread, which the sockets' names do not concern, and those that it starts.
                begin();
                let ended = Server::run(server);
                // One disk that cannot be served any more is the end of all: whoever looks after the
                // process then notices.
                handles.iter().for_each(Handle::stop);
                ended
            })
        };
        let threads: Vec<_> = servers.iter().map(serve).collect();
        let ended = threads.into_iter().map(|thread| match thread.join() {
            Ok(ended) => ended.map_err(anyhow::Error::from),
            Err(_) => Err(anyhow!("a server panicked")),
        });
        ended.collect::<Vec<_>>()
    });
    // The names of the sockets go last: whoever waits for them to go may take the images.
    drop((control, metrics));
    OpenDisk::summarize_all(&disks);
    // What is asked of a disk whose front end holds up the end is left to the next back end, not refused.
    let is_held_up = |ended: &anyhow::Result<()>| {
        let error = ended.as_ref().err().and_then(|error| error.downcast_ref());
        matches!(error, Some(blockhouse_vhost::Error::HeldUp))
    };
    let idle = disks.iter().zip(&ended).filter(|(_, ended)| !is_held_up(ended)).map(|(disk, _)| disk);
    let closed = OpenDisk::close_all(idle);
    if args.json {
        output::json(&disks.iter().map(ControlledDisk::row).collect::<Vec<_>>())?;
    }
    // What is left of the images, and of their locks.
    drop(disks);
    closed?;
    drop(servers);
    ended.into_iter().collect::<anyhow::Result<()>>()?;
    Ok(ExitCode::SUCCESS)
}

/// The socket of each disk.
fn sockets(args: &Args) -> anyhow::Result<Vec<&str>> {
    match (&args.socket, args.disks.as_slice()) {
        (Some(_), [disk]) if disk.socket.is_some() => bail!("the disk has two sockets: --socket and socket="),
        (Some(socket), [_]) => Ok(vec![socket]),
        (Some(_), _) => bail!("each disk needs a socket of its own: --disk ...,socket=SOCKET instead of --socket"),
        (None, disks) => disks.iter().map(own_socket).collect(),
    }
}

fn own_socket(disk: &DiskArg) -> anyhow::Result<&str> {
    disk.socket.as_deref().with_context(|| {
        let file = disk.file.display();
        format!("where is {file} to be served? Add --socket SOCKET, or socket=SOCKET to the disk")
    })
}
