//! What each message of the front end does.

use std::fs::File;
use std::sync::Arc;

use blockhouse_virtio::BlockDevice;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VHOST_USER_CONFIG_OFFSET, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use crate::inflight::InFlightMemory;
use crate::memory::{MAX_REGIONS, MemoryMap};
use crate::refusal::{self, Refusal, refuse};
use crate::ring::{Addresses, Common, Ring};

/// The feature bit that stands for protocol features. It is the front end's, not the driver's.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The device as one front end sets it up. Dropping it stops every queue.
pub(crate) struct Handler {
    common: Common,
    rings: Vec<Ring>,
}

impl Handler {
    /// `device` as after power-on; `name` is for threads and the log, `owner` for the memory that the front end keeps.
    pub(crate) fn new(device: Arc<BlockDevice>, name: String, owner: u64) -> Self {
        device.reset();
        device.watch_unflushed(None);
        let rings = Ring::all(device.queues());
        let memory = MemoryMap::default();
        let common = Common { device, memory, inflight: None, features: None, writeback: None, name, owner };
        Self { common, rings }
    }

    /// Stops every queue: nothing is in flight when this returns.
    pub(crate) fn stop(&mut self) {
        for ring in &mut self.rings {
            ring.stop();
        }
    }

    /// Starts what is complete. Every message that changes something for all rings ends with this.
    ///
    /// A ring whose memory is away is not complete: a front end that changes a region takes it away first.
    fn settle(&mut self) -> refusal::Result<()> {
        let Self { common, rings } = self;
        for ring in rings {
            if ring.is_in(&common.memory) {
                ring.settle(common)?;
            } else {
                let (disk, queue) = (&common.name, ring.index());
                tracing::info!(disk, queue, "a queue rests: the memory that it lies in was taken away");
            }
        }
        Ok(())
    }

    fn change_ring(
        &mut self,
        index: impl Into<u32>,
        change: impl FnOnce(&mut Ring) -> refusal::Result<()>,
    ) -> Result<()> {
        let ring = ring(&mut self.rings, index.into())?;
        change(ring)?;
        Ok(ring.settle(&self.common)?)
    }

    /// Changes what all rings use, while none is served.
    fn change_common(&mut self, change: impl FnOnce(&mut Common) -> refusal::Result<()>) -> Result<()> {
        self.stop();
        change(&mut self.common)?;
        Ok(self.settle()?)
    }

    /// What the front end said about `writeback` stays: QEMU sends this when its guest starts again, shows the
    /// guest what it said before, and does not say it again.
    fn reset(&mut self) {
        for ring in &mut self.rings {
            ring.reset();
        }
        if let Some(inflight) = &self.common.inflight {
            inflight.forget_lost();
        }
        self.common.record_in(None);
        self.common.features = None;
        self.common.device.reset();
    }
}

fn ring(rings: &mut [Ring], index: u32) -> refusal::Result<&mut Ring> {
    let count = rings.len();
    let ring = usize::try_from(index).ok().and_then(|index| rings.get_mut(index));
    ring.ok_or_else(|| Refusal::new(format!("there is no queue {index}: the disk has {count}")))
}

/// For messages of features that are not offered.
fn not_offered<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated, and unclear in what it resets; stopping is what is safe.
    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.common.device.features() | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.common.device.features() | PROTOCOL_FEATURES;
        self.change_common(|common| {
            let unknown = features & !offered;
            if unknown != 0 {
                return refuse!("features {unknown:#x} were not offered");
            }
            let features = features & !PROTOCOL_FEATURES;
            // Some front ends say it again on each start of a queue; the driver chose once.
            if common.features != Some(features) {
                common.device.accept_features(features);
                common.features = Some(features);
                common.settle_writeback();
            }
            Ok(())
        })?;
        if features & PROTOCOL_FEATURES == 0 {
            // Without protocol features there is no message that enables a queue.
            self.rings.iter_mut().for_each(|ring| ring.enable(true));
        }
        Ok(self.settle()?)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.change_common(|common| common.memory.replace(regions, files))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.change_ring(index, |ring| ring.set_size(num))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change_ring(index, |ring| {
            if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
                return refuse!("a log of changed memory was not offered");
            }
            ring.set_addresses(Addresses { descriptors: descriptor, available, used });
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.change_ring(index, |ring| ring.set_next_avail(base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next_avail = ring(&mut self.rings, index)?.end();
        Ok(VhostUserVringState::new(index, next_avail.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change_ring(index, |ring| ring.set_kick(fd))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        Ok(ring(&mut self.rings, index.into())?.set_call(fd)?)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        Ok(ring(&mut self.rings, index.into())?.set_err(fd)?)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return Ok(refuse!("protocol features {unknown:#x} were not offered")?);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.common.device.queues().into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change_ring(index, |ring| {
            ring.enable(enable);
            Ok(())
        })
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // Where virtio-mmio has it: cloud-hypervisor asked for it there until 2026, and no byte of it is so far.
        let offset = offset.checked_sub(VHOST_USER_CONFIG_OFFSET).unwrap_or(offset);
        // The crate asks for no more than a page.
        let mut config = vec![0; usize::try_from(size).map_err(Refusal::because)?];
        self.common.device.read_config(offset.into(), &mut config);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, config: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // Also before features are set, which QEMU does when the driver is ready.
        if let Some(writeback) = BlockDevice::writeback_in(offset.into(), config) {
            // Nothing is in flight meanwhile: what is written through is decided before it is written and after.
            self.change_common(|common| {
                common.writeback = Some(writeback);
                common.settle_writeback();
                Ok(())
            })?;
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered("this is a disk")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered("shared objects are not offered")
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (memory, told, file) = InFlightMemory::create(asked)?;
        self.change_common(|common| {
            common.record_in(Some(memory));
            common.settle_writeback();
            Ok(())
        })?;
        Ok((told, file))
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        self.change_common(|common| {
            let memory = InFlightMemory::adopt(told, file)?;
            common.writeback = common.writeback.or(memory.writeback());
            common.record_in(Some(memory));
            common.settle_writeback();
            Ok(())
        })
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(u64::try_from(MAX_REGIONS).map_err(Refusal::because)?)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change_common(|common| common.memory.add(region, file))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_common(|common| common.memory.remove(region))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        not_offered("there is no state to transfer")
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered("there is no state to transfer")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered("there is no shared memory")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered("a log of changed memory is not offered")
    }
}
