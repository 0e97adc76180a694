//! What the device is: the features it offers and the config space it shows (section 5.2).

use std::sync::Arc;

use blockhouse_block::{BlockBackend, SECTOR_SIZE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::report::Report;
use crate::request::MAX_DESCRIPTORS;

/// The virtio device type of a block device (section 5.2.1).
pub const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;

/// The largest queue, in descriptors, that a transport should offer.
pub const QUEUE_SIZE: u16 = 256;

/// The most queues that one device may have.
pub const MAX_QUEUES: u16 = 64;

/// Bytes of the serial that `GET_ID` returns (section 5.2.6); a shorter serial is padded with NUL.
pub const SERIAL_LEN: usize = 20;

/// Data segments in one request: all descriptors but those of the header and of the status. What a
/// device says here must never be more than a chain can hold: a driver that believes a larger value
/// builds requests that fit no queue.
const SEG_MAX: u32 = MAX_DESCRIPTORS as u32 - 2;

/// Bytes of config space with a meaning: up to and including `num_queues` (section 5.2.4).
const CONFIG_LEN: usize = 36;

/// What a user chooses about a device, as opposed to what the disk behind it decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDeviceOptions {
    /// The serial that the guest sees (`/sys/block/vda/serial` in Linux), up to [`SERIAL_LEN`]
    /// bytes; what is longer is cut off.
    pub serial: String,
    /// The number of queues, held between 1 and [`MAX_QUEUES`].
    pub queues: u16,
}

impl Default for BlockDeviceOptions {
    fn default() -> Self {
        Self { serial: String::new(), queues: 1 }
    }
}

/// A virtio-blk device: one disk, seen by a guest.
///
/// Shared by the transport, which reads features and config space, and by the worker of each queue.
pub struct BlockDevice {
    backend: Arc<dyn BlockBackend>,
    serial: [u8; SERIAL_LEN],
    queues: u16,
    report: Report,
}

impl BlockDevice {
    /// A device that serves `backend`. The device offers writing exactly if the backend can write.
    pub fn new(backend: Arc<dyn BlockBackend>, options: &BlockDeviceOptions) -> Self {
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        Self {
            backend,
            serial,
            queues: options.queues.clamp(1, MAX_QUEUES),
            report: Report::new(options.serial.clone()),
        }
    }

    /// The feature bits that the device offers (sections 5.2.3 and 6). `VIRTIO_F_VERSION_1` is among
    /// them and must be accepted: there is no legacy interface.
    pub fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        if !self.backend.is_writable() {
            bits.push(VIRTIO_BLK_F_RO);
        }
        if self.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    /// The number of queues, at least one.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Fills `data` from config space at `offset` (section 5.2.4). Bytes past its end read as zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(from..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = rest.get(i).copied().unwrap_or(0);
        }
    }

    /// `struct virtio_blk_config`, little-endian. Fields of features that are not offered are zero.
    fn config(&self) -> [u8; CONFIG_LEN] {
        let topology = self.backend.topology();
        let sector = u32::try_from(SECTOR_SIZE).unwrap_or(u32::MAX);
        // A backend's hint that is no power of two would mislead the guest: round it down.
        let physical = topology.physical_block_size.max(sector);
        let physical_exponent = u8::try_from(physical.ilog2() - sector.ilog2()).unwrap_or(0);
        let min_io_sectors = u16::try_from(physical / sector).unwrap_or(u16::MAX);

        let mut config = [0; CONFIG_LEN];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (to, from) in config.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &(self.backend.capacity() / SECTOR_SIZE).to_le_bytes()); // capacity
        put(12, &SEG_MAX.to_le_bytes()); // seg_max
        put(20, &sector.to_le_bytes()); // blk_size
        put(24, &[physical_exponent, 0]); // physical_block_exp, alignment_offset
        put(26, &min_io_sectors.to_le_bytes()); // min_io_size
        put(28, &(topology.optimal_io_size / sector).to_le_bytes()); // opt_io_size
        put(34, &self.queues.to_le_bytes()); // num_queues
        config
    }

    pub(crate) fn backend(&self) -> &dyn BlockBackend {
        self.backend.as_ref()
    }

    pub(crate) fn serial(&self) -> &[u8; SERIAL_LEN] {
        &self.serial
    }

    pub(crate) fn report(&self) -> &Report {
        &self.report
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

    use super::*;
    use crate::driver::MemoryDisk;

    fn device(disk: MemoryDisk, queues: u16) -> BlockDevice {
        BlockDevice::new(Arc::new(disk), &BlockDeviceOptions { serial: "s".into(), queues })
    }

    fn config_u32(device: &BlockDevice, offset: u64) -> u32 {
        let mut bytes = [0xff; 4];
        device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn read_only_is_offered_exactly_if_the_disk_cannot_write() {
        let ro = 1 << VIRTIO_BLK_F_RO;
        assert_eq!(device(MemoryDisk::new(512), 1).features() & ro, 0);
        assert_eq!(device(MemoryDisk::read_only(512), 1).features() & ro, ro);
    }

    #[test]
    fn several_queues_are_offered_only_if_there_are_several() {
        let mq = 1 << VIRTIO_BLK_F_MQ;
        assert_eq!(device(MemoryDisk::new(512), 0).features() & mq, 0);
        let device = device(MemoryDisk::new(512), 4);
        assert_eq!(device.features() & mq, mq);
        assert_eq!(config_u32(&device, 32) >> 16, 4);
    }

    #[test]
    fn config_space_is_laid_out_as_specified() {
        let mut disk = MemoryDisk::new(7 * 512);
        disk.topology.physical_block_size = 4096;
        disk.topology.optimal_io_size = 65536;
        let device = device(disk, 1);
        assert_eq!(config_u32(&device, 0), 7, "capacity in sectors");
        assert_eq!(config_u32(&device, 4), 0);
        assert_eq!(config_u32(&device, 8), 0, "size_max is not offered");
        assert_eq!(config_u32(&device, 12), 254, "seg_max leaves room for header and status");
        assert_eq!(config_u32(&device, 20), 512);
        assert_eq!(config_u32(&device, 24), 3 | 8 << 16, "4096 is 512 shifted by 3, and 8 sectors");
        assert_eq!(config_u32(&device, 28), 128);
    }

    #[test]
    fn config_space_ends_in_zeroes_however_far_one_reads() {
        let device = device(MemoryDisk::new(512), 1);
        for offset in [34, 35, 36, 4096, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut bytes = [0xff; 8];
            device.read_config(offset, &mut bytes);
            assert_eq!(bytes[2..], [0; 6], "at {offset}");
        }
    }

    #[test]
    fn a_topology_that_makes_no_sense_does_not_reach_the_guest() {
        for (physical, exponent) in [(0, 0), (1, 0), (513, 0), (u32::MAX, 22)] {
            let mut disk = MemoryDisk::new(512);
            disk.topology.physical_block_size = physical;
            assert_eq!(config_u32(&device(disk, 1), 24) & 0xff, exponent, "for {physical}");
        }
    }
}
