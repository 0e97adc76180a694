//! Systems in this process, without a transport: what a server could reach at most.

#![allow(unsafe_code)]

use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blockhouse_sandbox::block::{BlockBackend, Disk, Lane, LaneRequest, Operation, VolatileSlice};
use blockhouse_sandbox::{Formats, Grants, Limits, OpenRequest, Opener, Sandbox};
use io_uring::{IoUring, opcode, types};
use rustix::event::{PollFd, PollFlags, poll};

use crate::workload::{Kind, System, Workload, keep_busy};

/// The largest request and depth.
const MAX_REQUEST: usize = 1 << 20;
const MAX_DEPTH: usize = 128;

fn buffers() -> Vec<Vec<u8>> {
    (0..MAX_DEPTH).map(|_| vec![0; MAX_REQUEST]).collect()
}

/// Reads of a file by io_uring, with nothing in between.
pub(crate) struct Bare {
    ring: IoUring,
    _file: File,
    buffers: Vec<Vec<u8>>,
}

impl Bare {
    pub(crate) fn new(raw: &Path) -> Result<Self> {
        let ring = IoUring::new(256)?;
        let file = File::open(raw)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self { ring, _file: file, buffers: buffers() })
    }
}

impl System for Bare {
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)> {
        ensure!(workload.kind == Kind::Read && workload.queues == 1, "it only reads");
        keep_busy(
            self,
            workload.depth,
            workload.places(0, round),
            limit,
            |bare, slot, place| {
                let buffer = bare.buffers.get_mut(slot).context("a slot")?;
                let entry = opcode::Read::new(types::Fixed(0), buffer.as_mut_ptr(), u32::try_from(workload.size)?)
                    .offset(place)
                    .build()
                    .user_data(slot as u64);
                // SAFETY: the buffer stays where it is until its completion, for which `keep_busy` waits.
                unsafe { bare.ring.submission().push(&entry) }?;
                Ok(())
            },
            |bare, free| {
                bare.ring.submit_and_wait(1)?;
                for completion in bare.ring.completion() {
                    ensure!(usize::try_from(completion.result()) == Ok(workload.size), "a short read");
                    free.push(usize::try_from(completion.user_data())?);
                }
                Ok(())
            },
        )
    }
}

/// A disk of Blockhouse, on a lane.
pub(crate) struct Sandboxed {
    lane: Box<dyn Lane>,
    buffers: Vec<Vec<u8>>,
}

/// Opens an image and its chain, read-only.
pub(crate) fn open(image: &Path, format: &str) -> Result<Disk> {
    let sandbox = Sandbox::new(Limits::default())?;
    let mut formats = Formats::new();
    for builtin in blockhouse_formats::FORMATS {
        formats.add_bytes(builtin.format, builtin.format, builtin.bytes);
    }
    let grants = Grants::new().allow(image.parent().context("an image has a directory")?)?;
    Ok(Opener::new(&sandbox, formats).grants(grants).open(&OpenRequest::new(image, format))?.disk)
}

impl Sandboxed {
    pub(crate) fn new(image: &Path, format: &str) -> Result<Self> {
        Ok(Self { lane: Arc::new(open(image, format)?).lane()?, buffers: buffers() })
    }
}

impl System for Sandboxed {
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)> {
        ensure!(workload.kind == Kind::Read && workload.queues == 1, "it only reads");
        keep_busy(
            self,
            workload.depth,
            workload.places(0, round),
            limit,
            |disk, slot, place| {
                let buffer = disk.buffers.get_mut(slot).and_then(|buffer| buffer.get_mut(..workload.size));
                let slices = [VolatileSlice::from(buffer.context("a slot")?)];
                let token = slot as u64;
                let request = LaneRequest { token, operation: Operation::Read, offset: place, buffers: &slices };
                // SAFETY: the buffer stays where it is until its completion, for which `keep_busy` waits.
                unsafe { disk.lane.start(&request) };
                Ok(())
            },
            |disk, free| {
                disk.lane.submit();
                let before = free.len();
                let mut failed = None;
                disk.lane.complete(&mut |token, result| {
                    free.push(usize::try_from(token).unwrap_or(0));
                    failed = failed.take().or(result.err());
                });
                if let Some(error) = failed {
                    bail!("a request failed: {error}");
                }
                if free.len() == before {
                    let ready = disk.lane.ready();
                    let mut polled: Vec<_> = ready
                        .iter()
                        .flatten()
                        .map(|ready| PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN))
                        .collect();
                    poll(&mut polled, None)?;
                    drop(polled);
                    disk.lane.acknowledge();
                }
                Ok(())
            },
        )
    }
}

/// imago's own reader of qcow2 in this process, with this process's rights.
pub(crate) struct Native {
    access: imago::FormatAccess<imago::file::File>,
    buffers: Vec<Vec<u8>>,
}

impl Native {
    pub(crate) fn new(image: &Path) -> Result<Self> {
        use imago::qcow2::Qcow2;
        use imago::{DenyImplicitOpenGate, FormatDriverBuilder};
        let storage = imago::file::File::try_from(File::open(image)?)?;
        let qcow2 = now(Qcow2::<imago::file::File>::builder(storage).open(DenyImplicitOpenGate::default()))?;
        Ok(Self { access: imago::FormatAccess::new(qcow2), buffers: buffers() })
    }
}

/// imago's file driver makes blocking system calls: the first poll is the last.
fn now<T>(future: impl Future<Output = std::io::Result<T>>) -> Result<T> {
    match pin!(future).poll(&mut TaskContext::from_waker(Waker::noop())) {
        Poll::Ready(result) => Ok(result?),
        Poll::Pending => bail!("imago waits for something"),
    }
}

impl System for Native {
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)> {
        ensure!(workload.kind == Kind::Read && workload.queues == 1, "it only reads");
        // A file driver that blocks gains nothing from depth: one at a time is its best.
        keep_busy(
            self,
            1,
            workload.places(0, round),
            limit,
            |native, _, place| {
                let buffer = native.buffers.first_mut().and_then(|buffer| buffer.get_mut(..workload.size));
                now(native.access.read(buffer.context("a buffer")?, place))
            },
            |_, free| {
                free.push(0);
                Ok(())
            },
        )
    }
}
