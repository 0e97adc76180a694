//! The memory for requests in flight, and a session, for their fuzz targets. No part of the interface.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blockhouse_virtio::{BlockDevice, InFlightRecord};
use vhost::vhost_user::message::VhostUserInflight;

use crate::handler::Handler;
use crate::inflight::InFlightMemory;
use crate::lines::NewsChannel;
use crate::session;

/// Serves one front end of `device` to its end.
pub fn serve(stream: UnixStream, device: &Arc<BlockDevice>, name: &str) {
    session::serve(
        stream,
        Handler::new(Arc::clone(device), name.to_owned(), 0),
        &NewsChannel::default(),
        name,
        &AtomicBool::default(),
    );
}

/// See [`InFlightMemory`].
pub struct InFlight(InFlightMemory);

impl InFlight {
    /// New memory, and the file of it; `None` if there cannot be such memory.
    #[must_use]
    pub fn create(queues: u16, queue_size: u16) -> Option<(Self, File)> {
        let asked = VhostUserInflight::new(0, 0, queues, queue_size);
        let (memory, _, file) = InFlightMemory::create(&asked).ok()?;
        Some((Self(memory), file))
    }

    /// Memory that somebody else made; `None` if it is refused.
    #[must_use]
    pub fn adopt(queues: u16, queue_size: u16, size: u64, offset: u64, file: File) -> Option<Self> {
        InFlightMemory::adopt(&VhostUserInflight::new(size, offset, queues, queue_size), file).ok().map(Self)
    }

    /// The record of a queue, and what was in flight; `None` if it is refused.
    #[must_use]
    pub fn record(&self, index: u16, size: u16, used_idx: u16) -> Option<(Box<dyn InFlightRecord>, Vec<u16>)> {
        let (record, again) = self.0.record(index, size, used_idx).ok()?;
        Some((Box::new(record), again))
    }
}
