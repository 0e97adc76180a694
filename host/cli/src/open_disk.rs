//! The disks of a command, from their descriptions to their end.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use blockhouse_block::{
    Access, BlockBackend, Disk, DiskOptions, Engine, Error, ErrorKind, HeaderGuard, Pool, Rings, SECTOR_SIZE,
};
use blockhouse_sandbox::{AuditList, GrantReport, LockMode, OpenRequest, Opener, Outcome, RepeatedOpen, Tally};
use blockhouse_vhost::DeviceStats;
use blockhouse_walls::{Plan, Role, Use, Walls};
use serde::Serialize;

use crate::args::HostArgs;
use crate::control_line::Controlled;
use crate::disk_arg::DiskArg;
use crate::log;
use crate::metrics::{self, Figures};
use crate::outlet::{self, MetricsArg};
use crate::output::printable;
use crate::requested;
use crate::target::{files_in_use, refuse_read_from};

/// Gives the figures of a disk at the moment.
type FiguresOf = Box<dyn Fn() -> Figures + Send + Sync>;

/// A disk that a guest gets.
pub(crate) struct OpenDisk {
    number: usize,
    path: PathBuf,
    /// How messages name it.
    name: String,
    disk: Arc<Disk>,
    guard_header: bool,
    format: String,
    /// What its images asked for.
    events: Arc<AuditList>,
    /// What its components were called for.
    tally: Arc<Tally>,
    /// What they may have.
    granted: Vec<GrantReport>,
    /// The images, and what was opened for them.
    files: Vec<PathBuf>,
    /// What the guest sees as the serial number.
    pub(crate) serial: String,
}

impl OpenDisk {
    /// What is opened for the disks.
    pub(crate) fn plan_all(plan: &mut Plan, host: &HostArgs, disks: &[DiskArg]) -> anyhow::Result<()> {
        for disk in disks {
            plan.add(&disk.file, if disk.readonly { Use::Read } else { Use::Write });
            host.plan_grants(plan, &disk.allow, &disk.allow_write, access_of(disk))?;
        }
        Ok(())
    }

    /// Opens each disk with its own grants, which may take minutes. `begun` is called when threads may be started, before
    /// any image is opened.
    pub(crate) fn open_all(
        host: &HostArgs,
        disks: &[DiskArg],
        locks: LockMode,
        walls: &Walls,
        begun: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<Self>> {
        // Before anything of a stranger is looked at: later no ring is made.
        let rings: Vec<Rings> = disks.iter().map(rings).collect();
        let (sandbox, formats) = host.components()?;
        begun()?;
        let audit = host.audit()?;
        let open = |(number, (disk, rings)): (usize, (&DiskArg, Rings))| {
            let access = access_of(disk);
            let grants = host.grants(&disk.allow, &disk.allow_write, access)?;
            let granted = grants.list();
            let events = Arc::new(AuditList::default());
            let tally = Arc::new(Tally::default());
            let opener = Opener::new(sandbox, formats.clone())
                .grants(grants)
                .direct(disk.direct)
                .locks(locks)
                .tally(Arc::clone(&tally))
                .audit(audit.clone().with(Arc::clone(&events) as Arc<_>));
            let request = OpenRequest {
                access,
                snapshot: disk.snapshot.clone(),
                disk: disk_options(disk),
                ..OpenRequest::new(&disk.file, &disk.format)
            };
            let opened = opener.open(&request).with_context(|| format!("cannot open disk {number}"))?;
            let serial = disk.serial.clone().unwrap_or_else(|| format!("blockhouse-{number}"));
            // One for each disk: who waits for a component must not keep other disks waiting.
            let begin = walls.thread_start(Role::DataPath);
            let (path, name, guard_header) = (disk.file.clone(), disk.file.display().to_string(), disk.guard_header);
            let format = disk.format.clone();
            let files = files_in_use(&opened.report);
            let disk = opened.disk.with_rings(rings).with_pool(Pool::beginning_with(move || begin()));
            let disk = Arc::new(disk);
            Ok(Self { number, path, name, disk, guard_header, format, events, tally, granted, files, serial })
        };
        disks.iter().zip(rings).enumerate().map(open).collect()
    }

    /// Fails if the file for metrics is one that a disk is made of: it would be replaced.
    pub(crate) fn refuse_replacing(disks: &[Self], metrics: Option<&MetricsArg>) -> anyhow::Result<()> {
        if let Some(MetricsArg::File(path)) = metrics
            && let Ok(metadata) = fs::symlink_metadata(path)
        {
            disks.iter().try_for_each(|disk| refuse_read_from(path, &metadata, &disk.files))?;
        }
        Ok(())
    }

    /// The disk as a device sees it.
    pub(crate) fn backend(&self) -> anyhow::Result<Arc<dyn BlockBackend>> {
        let disk: Arc<dyn BlockBackend> = Arc::clone(&self.disk) as _;
        if !self.guard_header {
            return Ok(disk);
        }
        let guard = HeaderGuard::new(disk, &self.name)?;
        // Other programs look for a footer in the last 512 bytes: here they would not be the last sector of the disk.
        let length = fs::metadata(&self.path).with_context(|| format!("cannot look at {}", self.name))?.len();
        if !length.is_multiple_of(SECTOR_SIZE) {
            let why = format!(
                "{}: guard-header=on needs a file of whole sectors, and this one has {length} bytes",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, why).into());
        }
        Ok(Arc::new(guard))
    }

    /// What gives the figures of the disk, with those of the device that `device` gives.
    fn figures(&self, device: impl Fn() -> DeviceStats + Send + Sync + 'static) -> FiguresOf {
        let (disk, tally, events) = (Arc::clone(&self.disk), Arc::clone(&self.tally), Arc::clone(&self.events));
        let (number, image, format, serial) =
            (self.number, self.name.clone(), self.format.clone(), self.serial.clone());
        Box::new(move || {
            let device = device();
            Figures {
                disk: format!("disk{number}"),
                image: image.clone(),
                format: format.clone(),
                serial: serial.clone(),
                capacity_bytes: disk.capacity(),
                requests: metrics::requests(&device),
                requests_in_flight: device.in_flight,
                limit_waits: device.limit_waits,
                component_calls: tally.calls().collect(),
                component_failures: tally.failures(),
                component_restarts: tally.restarts(),
                map: disk.map_stats().into(),
                opens_granted: events.count(Outcome::Allowed),
                opens_refused: events.count(Outcome::Denied),
            }
        })
    }

    /// Says what each disk's images asked for against what was granted, if there is anything to say.
    pub(crate) fn summarize_all(disks: &[ControlledDisk]) {
        for ControlledDisk { open: disk, .. } in disks {
            let events = disk.events.events();
            if !(events.is_empty() && disk.granted.is_empty()) {
                let (asked, granted) =
                    (requested::requested(&events, disk.events.left_out()), requested::granted(&disk.granted));
                log::line(format_args!("{}: {asked}; {granted}", printable(&disk.name)));
            }
        }
    }

    /// Makes what was written durable and ends the use of each image, even if another one cannot be closed.
    pub(crate) fn close_all<'d>(disks: impl IntoIterator<Item = &'d ControlledDisk>) -> anyhow::Result<()> {
        let close = |ControlledDisk { open: disk, .. }: &ControlledDisk| {
            disk.disk.close().with_context(|| format!("cannot close disk {}", disk.number))
        };
        let closed: Vec<anyhow::Result<()>> = disks.into_iter().map(close).collect();
        closed.into_iter().collect()
    }
}

/// A disk in the hands of the operator, while it is used.
pub(crate) struct ControlledDisk {
    open: OpenDisk,
    figures: FiguresOf,
    /// Tells the guest that the disk has another size: whether it could be told.
    tell: Box<dyn Fn() -> bool + Send + Sync>,
}

/// A disk that there is.
#[derive(Serialize)]
struct Status {
    disk: String,
    image: String,
    format: String,
    serial: String,
    read_only: bool,
    virtual_size_bytes: u64,
}

impl ControlledDisk {
    /// With the figures of its device, and what tells its guest.
    pub(crate) fn new(
        open: OpenDisk,
        device: impl Fn() -> DeviceStats + Send + Sync + 'static,
        tell: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        let figures = open.figures(device);
        Self { open, figures, tell: Box::new(tell) }
    }

    pub(crate) fn figures(&self) -> Figures {
        (self.figures)()
    }

    /// What became of it.
    pub(crate) fn row(&self) -> DiskRow {
        let open = &self.open;
        DiskRow {
            disk: self.name(),
            image: open.name.clone(),
            format: open.format.clone(),
            serial: open.serial.clone(),
            read_only: !open.disk.is_writable(),
            requested: open.events.opens(),
            requested_left_out: open.events.left_out(),
            granted: open.granted.clone(),
            figures: self.figures(),
        }
    }
}

impl Controlled for ControlledDisk {
    fn name(&self) -> String {
        format!("disk{}", self.open.number)
    }

    fn capacity(&self) -> u64 {
        self.open.disk.capacity()
    }

    fn status(&self) -> impl Serialize {
        Status {
            disk: self.name(),
            image: self.open.name.clone(),
            format: self.open.format.clone(),
            serial: self.open.serial.clone(),
            read_only: !self.open.disk.is_writable(),
            virtual_size_bytes: self.capacity(),
        }
    }

    fn metrics(&self) -> impl Serialize {
        self.row()
    }

    fn grow(&self, size: u64) -> blockhouse_block::Result<bool> {
        if self.open.guard_header {
            // The guard knows where the last sector is.
            let why = "a disk with guard-header=on keeps its size: stop it, then change it with `resize`";
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let before = self.capacity();
        let grown = self.open.disk.grow(size);
        // Over a longer base it may have become larger, if not as large as it should.
        let told = (grown.is_ok() || self.capacity() != before) && (self.tell)();
        grown.map(|()| told)
    }
}

/// What gives the figures of disks as text for Prometheus.
pub(crate) fn prometheus_of(disks: &Arc<[ControlledDisk]>) -> outlet::Figures {
    let disks = Arc::clone(disks);
    Arc::new(move || metrics::prometheus(&disks.iter().map(ControlledDisk::figures).collect::<Vec<_>>()))
}

/// What became of a disk, for programs.
#[derive(Serialize)]
pub(crate) struct DiskRow {
    /// Its name: `disk0`.
    disk: String,
    image: String,
    format: String,
    serial: String,
    read_only: bool,
    /// What its images asked for, how many attempts are not listed, and what they could have.
    requested: Vec<RepeatedOpen>,
    requested_left_out: u64,
    granted: Vec<GrantReport>,
    figures: Figures,
}

/// Space that is reserved ahead of a guest that writes without gaps: a call of the component for megabytes.
const ALLOCATE_AHEAD: u64 = 8 << 20;

fn access_of(disk: &DiskArg) -> Access {
    if disk.readonly { Access::ReadOnly } else { Access::ReadWrite }
}

/// One for each queue.
fn rings(disk: &DiskArg) -> Rings {
    match disk.engine {
        Engine::Auto => Rings::make(disk.queues.into()),
        Engine::Threads => Rings::default(),
    }
}

fn disk_options(disk: &DiskArg) -> DiskOptions {
    let usual = DiskOptions::default();
    DiskOptions {
        extent_map_bytes: disk.map.unwrap_or(usual.extent_map_bytes),
        allocate_ahead_bytes: ALLOCATE_AHEAD,
        engine: disk.engine,
        ..usual
    }
}
