//! The disks of a command, from their descriptions to their end.

use std::sync::Arc;

use anyhow::Context;
use blockhouse_block::{Access, BlockBackend, Disk, DiskOptions, HeaderGuard, Pool};
use blockhouse_sandbox::{AuditList, GrantReport, LockMode, OpenEvent, OpenRequest, Opener, Outcome, Tally};
use blockhouse_vhost::DeviceStats;
use blockhouse_walls::{Plan, Role, Use, Walls};
use serde::Serialize;

use crate::args::HostArgs;
use crate::disk_arg::DiskArg;
use crate::metrics::{self, Figures};
use crate::output::printable;
use crate::requested;

/// Gives the figures of a disk at the moment.
pub(crate) type FiguresOf = Box<dyn Fn() -> Figures + Send + Sync>;

/// A disk that a guest gets.
pub(crate) struct OpenDisk {
    number: usize,
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
    /// What the guest sees as the serial number.
    pub(crate) serial: String,
}

impl OpenDisk {
    /// What is opened for the disks.
    pub(crate) fn plan_all(plan: &mut Plan, host: &HostArgs, disks: &[DiskArg]) -> anyhow::Result<()> {
        for disk in disks {
            plan.add(&disk.file, if disk.readonly { Use::Read } else { Use::Write });
            host.plan_grants(plan, &disk.allow, &disk.allow_write)?;
        }
        Ok(())
    }

    /// Opens each disk with its own grants.
    pub(crate) fn open_all(
        host: &HostArgs,
        disks: &[DiskArg],
        locks: LockMode,
        walls: &Walls,
    ) -> anyhow::Result<Vec<Self>> {
        let sandbox = host.sandbox()?;
        let formats = host.formats(&sandbox)?;
        let audit = host.audit()?;
        let open = |(number, disk): (usize, &DiskArg)| {
            let access = if disk.readonly { Access::ReadOnly } else { Access::ReadWrite };
            let grants = host.grants(&disk.allow, &disk.allow_write, access)?;
            let granted = grants.list();
            let events = Arc::new(AuditList::default());
            let tally = Arc::new(Tally::default());
            let opener = Opener::new(&sandbox, formats.clone())
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
            let (name, guard_header) = (disk.file.display().to_string(), disk.guard_header);
            let format = disk.format.clone();
            let disk = Arc::new(opened.disk.with_pool(Pool::beginning_with(move || begin())));
            Ok(Self { number, name, disk, guard_header, format, events, tally, granted, serial })
        };
        disks.iter().enumerate().map(open).collect()
    }

    /// The disk as a device sees it.
    pub(crate) fn backend(&self) -> anyhow::Result<Arc<dyn BlockBackend>> {
        let disk: Arc<dyn BlockBackend> = Arc::clone(&self.disk) as _;
        Ok(if self.guard_header { Arc::new(HeaderGuard::new(disk, &self.name)?) } else { disk })
    }

    /// What gives the figures of the disk, with those of the device that `device` gives.
    pub(crate) fn figures(&self, device: impl Fn() -> DeviceStats + Send + Sync + 'static) -> FiguresOf {
        let (disk, tally, events) = (Arc::clone(&self.disk), Arc::clone(&self.tally), Arc::clone(&self.events));
        let (number, image, format, serial) =
            (self.number, self.name.clone(), self.format.clone(), self.serial.clone());
        Box::new(move || {
            let device = device();
            let opens = |outcome| u64::try_from(events.count(outcome)).unwrap_or(u64::MAX);
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
                opens_granted: opens(Outcome::Allowed),
                opens_refused: opens(Outcome::Denied),
            }
        })
    }

    /// What became of it, with figures that [`figures`](Self::figures) gave.
    pub(crate) fn row(&self, figures: Figures) -> DiskRow {
        DiskRow {
            disk: self.number,
            image: self.name.clone(),
            format: self.format.clone(),
            serial: self.serial.clone(),
            read_only: !self.disk.is_writable(),
            requested: self.events.events(),
            granted: self.granted.clone(),
            figures,
        }
    }

    /// Says what each disk's images asked for against what was granted, if there is anything to say.
    pub(crate) fn summarize_all(disks: &[Self]) {
        for disk in disks {
            let events = disk.events.events();
            if !(events.is_empty() && disk.granted.is_empty()) {
                let (asked, granted) = (requested::requested(&events), requested::granted(&disk.granted));
                eprintln!("{}: {asked}; {granted}", printable(&disk.name));
            }
        }
    }

    /// Makes what was written durable and ends the use of each image, even if another one cannot be closed.
    pub(crate) fn close_all(disks: &[Self]) -> anyhow::Result<()> {
        let close = |disk: &Self| disk.disk.close().with_context(|| format!("cannot close disk {}", disk.number));
        let closed: Vec<anyhow::Result<()>> = disks.iter().map(close).collect();
        closed.into_iter().collect()
    }
}

/// What became of a disk, for programs.
#[derive(Serialize)]
pub(crate) struct DiskRow {
    /// Its number, from 0.
    disk: usize,
    image: String,
    format: String,
    serial: String,
    read_only: bool,
    /// What its images asked for, and what they could have.
    requested: Vec<OpenEvent>,
    granted: Vec<GrantReport>,
    figures: Figures,
}

/// Space that is reserved ahead of a guest that writes without gaps: a call of the component for megabytes.
const ALLOCATE_AHEAD: u64 = 8 << 20;

fn disk_options(disk: &DiskArg) -> DiskOptions {
    let usual = DiskOptions::default();
    DiskOptions {
        extent_map_bytes: disk.map.unwrap_or(usual.extent_map_bytes),
        allocate_ahead_bytes: ALLOCATE_AHEAD,
        engine: disk.engine,
        ..usual
    }
}
