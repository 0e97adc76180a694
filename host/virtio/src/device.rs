//! What the device is: the features it offers and the config space it shows (section 5.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockhouse_block::{BlockBackend, SECTOR_SIZE, UnflushedWatch};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::counters::{DeviceStats, QueueCounters};
use crate::limit::{Limiter, RateLimits};
use crate::ranges::{DISCARD, WRITE_ZEROES};
use crate::report::Report;
use crate::request::MAX_DESCRIPTORS;
use crate::worker::Beginning;

/// The virtio device type of a block device (section 5.2.1).
pub const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;

/// The largest queue, in descriptors, that a transport should offer.
pub const QUEUE_SIZE: u16 = 256;

/// The most queues that one device may have.
pub const MAX_QUEUES: u16 = 64;

/// How long a queue is looked at before its thread waits, if nobody says otherwise: about what waiting and
/// waking costs.
pub const DEFAULT_POLL: Duration = Duration::from_micros(20);

/// The longest that a queue is looked at.
pub const MAX_POLL: Duration = Duration::from_millis(10);

/// Bytes of the serial that `GET_ID` returns (section 5.2.6); a shorter serial is padded with NUL.
pub const SERIAL_LEN: usize = 20;

/// The least `discard_sector_alignment`, 4 KiB: a page of the host, and what the Windows driver takes
/// for the least as well.
const MIN_DISCARD_ALIGNMENT: u32 = 8;

/// The most, 2 MiB: the largest cluster that a format in use has. It divides the longest discard.
const MAX_DISCARD_ALIGNMENT: u32 = 4096;

/// Bytes of config space with a meaning: up to `write_zeroes_may_unmap` and what pads it (section 5.2.4).
const CONFIG_LEN: usize = 60;

/// Where `writeback` is in config space.
const WRITEBACK: u64 = 32;

/// When a write is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// After the driver's next flush. A driver that cannot flush, or that sets `writeback` to 0, has
    /// every request that changes the disk flushed before it is answered (sections 5.2.5 and 5.2.6.2).
    #[default]
    WriteBack,
    /// When it is answered, whatever the driver says.
    WriteThrough,
    /// Some time. A flush succeeds at once and does nothing: **a crash of the host, or of this
    /// process, loses what was written and may destroy the image.** For disks that can be made again.
    Unsafe,
}

/// What a user chooses about a device, as opposed to what the disk behind it decides.
#[derive(Clone, Debug)]
pub struct BlockDeviceOptions {
    /// The serial that the guest sees (`/sys/block/vda/serial` in Linux), up to [`SERIAL_LEN`]
    /// bytes; what is longer is cut off.
    pub serial: String,
    /// The number of queues, held between 1 and [`MAX_QUEUES`].
    pub queues: u16,
    /// How many descriptors a queue has at least, as far as the device is told: a driver is to make no request that
    /// needs more (section 2.7.5.3.1), and Linux before 4.13 ends with `BUG` over one that does. `None`: what the
    /// transport says, [`QUEUE_SIZE`] if that says nothing.
    pub queue_size: Option<u16>,
    /// Refuse every change, even if the backend can be written.
    pub read_only: bool,
    /// When a write is durable.
    pub cache: CacheMode,
    /// Offer discards, and let the disk give back the space of zeroes. Without, zeroes are still
    /// offered, and their space stays allocated.
    pub discard: bool,
    /// How long the thread of a queue looks for more requests before it waits to be notified, at most
    /// [`MAX_POLL`]. Costs processor time and saves a notification and a wake-up.
    pub poll: Duration,
    /// How fast the device may be used.
    pub limits: RateLimits,
    /// What the thread of each queue calls first.
    pub beginning: Beginning,
}

impl Default for BlockDeviceOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            queue_size: None,
            read_only: false,
            cache: CacheMode::WriteBack,
            discard: true,
            poll: DEFAULT_POLL,
            limits: RateLimits::default(),
            beginning: Beginning::default(),
        }
    }
}

/// A virtio-blk device: one disk, seen by a guest.
///
/// Shared by the transport, which reads features and config space, and by the worker of each queue.
pub struct BlockDevice {
    backend: Arc<dyn BlockBackend>,
    serial: [u8; SERIAL_LEN],
    queues: u16,
    /// Data segments in one request: all descriptors but those of the header and of the status.
    seg_max: u32,
    read_only: bool,
    cache: CacheMode,
    discard: bool,
    poll: Duration,
    /// The features that the driver accepted.
    accepted: AtomicU64,
    /// The field of config space with this name, while it can be toggled.
    writeback: AtomicBool,
    /// Whether the disk is without something that its guest believes to be there.
    lost: AtomicBool,
    report: Report,
    /// One for each queue.
    counters: Box<[QueueCounters]>,
    limiter: Option<Limiter>,
    beginning: Beginning,
}

impl BlockDevice {
    /// A device that serves `backend`. The device offers writing exactly if the backend can write and
    /// the options do not forbid it.
    pub fn new(backend: Arc<dyn BlockBackend>, options: &BlockDeviceOptions) -> Self {
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let read_only = options.read_only || !backend.is_writable();
        let queues = options.queues.clamp(1, MAX_QUEUES);
        let descriptors = options.queue_size.unwrap_or(QUEUE_SIZE).min(MAX_DESCRIPTORS);
        Self {
            backend,
            serial,
            queues,
            seg_max: u32::from(descriptors).saturating_sub(2).max(1),
            read_only,
            cache: options.cache,
            discard: options.discard,
            poll: options.poll.min(MAX_POLL),
            accepted: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            lost: AtomicBool::new(false),
            report: Report::new(options.serial.clone()),
            counters: (0..queues).map(|_| QueueCounters::default()).collect(),
            limiter: Limiter::new(&options.limits),
            beginning: options.beginning.clone(),
        }
    }

    /// To be called first by a thread that is going to serve a queue.
    pub(crate) fn begin_thread(&self) {
        self.beginning.call();
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
        if self.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
            if self.discard {
                bits.push(VIRTIO_BLK_F_DISCARD);
            }
            // The other modes are the operator's word, which the guest does not change.
            if self.cache == CacheMode::WriteBack {
                bits.push(VIRTIO_BLK_F_CONFIG_WCE);
            }
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

    /// What the device did since it was made.
    pub fn stats(&self) -> DeviceStats {
        DeviceStats::sum(&self.counters)
    }

    /// What keeps its queues from being too fast, if anything does.
    pub(crate) fn limiter(&self) -> Option<&Limiter> {
        self.limiter.as_ref()
    }

    #[cfg(test)]
    pub(crate) fn with_limiter(self, limiter: Option<Limiter>) -> Self {
        Self { limiter, ..self }
    }

    /// What the thread counts in that serves a queue.
    pub(crate) fn counters(&self, queue: u16) -> Option<&QueueCounters> {
        self.counters.get(usize::from(queue))
    }

    /// The transport says what the driver accepted, when it did (`FEATURES_OK`, section 3.1.1).
    pub fn accept_features(&self, features: u64) {
        self.accepted.store(features, Ordering::Release);
        // A driver that cannot flush starts with writes that are durable (section 5.2.5.2).
        self.writeback.store(features & 1 << VIRTIO_BLK_F_FLUSH != 0, Ordering::Release);
    }

    /// The transport says that the driver reset the device, after the last request was answered.
    pub fn reset(&self) {
        self.accepted.store(0, Ordering::Release);
        self.writeback.store(true, Ordering::Release);
        self.lost.store(false, Ordering::Release);
    }

    /// The transport says whether the disk is without changes that were answered and not flushed, which nobody has
    /// any more. Whatever is asked of the disk is an I/O error then, until the driver resets the device: a flush would
    /// promise what is not so, and a read could give bytes of before.
    pub fn set_lost(&self, lost: bool) {
        self.lost.store(lost, Ordering::Release);
    }

    /// Whether all that is asked of the disk is an I/O error; see [`set_lost`](Self::set_lost).
    pub fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Has `watch` hear, instead of whoever did before, whether changes that the driver believes to be on the disk, or
    /// that it has yet to flush, would be lost if this process ended now. See
    /// [`watch_unflushed`](BlockBackend::watch_unflushed) of the backend. To be called again, with no request in flight,
    /// when it has changed whether the driver flushes.
    pub fn watch_unflushed(self: &Arc<Self>, watch: Option<UnflushedWatch>) {
        let device = Arc::downgrade(self);
        self.backend.watch_unflushed(watch.map(|watch| -> UnflushedWatch {
            // What is said at once is of before, however that was written.
            let of_before = AtomicBool::new(true);
            Arc::new(move |unflushed| {
                let of_before = of_before.swap(false, Ordering::Relaxed);
                // What is written through is not answered before it is flushed. That says nothing of what was before.
                let through = |device: Arc<Self>| device.writes_through(device.accepted.load(Ordering::Acquire));
                if of_before || !(unflushed && device.upgrade().is_some_and(through)) {
                    watch(unflushed);
                }
            })
        }));
    }

    /// The guest writes `data` to config space at `offset`. One byte can be written, `writeback`, by a
    /// driver that accepted `VIRTIO_BLK_F_CONFIG_WCE`, and only with 0 or 1; all else does nothing.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        if let Some(writeback) = Self::writeback_in(offset, data) {
            self.set_writeback(writeback);
        }
    }

    /// What a write of `data` to config space at `offset` says about `writeback`, if it says anything.
    pub fn writeback_in(offset: u64, data: &[u8]) -> Option<bool> {
        let at = usize::try_from(WRITEBACK.checked_sub(offset)?).ok()?;
        data.get(at).filter(|value| **value <= 1).map(|value| *value == 1)
    }

    /// Sets `writeback` in config space, for a driver that accepted `VIRTIO_BLK_F_CONFIG_WCE`.
    pub fn set_writeback(&self, writeback: bool) {
        let accepted = self.accepted.load(Ordering::Acquire) & self.features();
        if accepted & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 {
            self.writeback.store(writeback, Ordering::Release);
        }
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
        put(12, &self.seg_max.to_le_bytes()); // seg_max
        put(20, &sector.to_le_bytes()); // blk_size
        put(24, &[physical_exponent, 0]); // physical_block_exp, alignment_offset
        put(26, &min_io_sectors.to_le_bytes()); // min_io_size
        put(28, &(topology.optimal_io_size / sector).to_le_bytes()); // opt_io_size
        put(34, &self.queues.to_le_bytes()); // num_queues
        if self.read_only {
            return config;
        }
        if self.cache == CacheMode::WriteBack {
            put(32, &[self.writeback.load(Ordering::Acquire).into()]); // writeback
        }
        if self.discard {
            put(36, &DISCARD.sectors.to_le_bytes()); // max_discard_sectors
            put(40, &DISCARD.ranges.to_le_bytes()); // max_discard_seg
            put(44, &self.discard_alignment().to_le_bytes()); // discard_sector_alignment
        }
        put(48, &WRITE_ZEROES.sectors.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &WRITE_ZEROES.ranges.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[self.discard.into()]); // write_zeroes_may_unmap
        config
    }

    /// The unit in which the disk gives space back, in sectors: a power of two. The preferred size of
    /// a request is that of a cluster where there are clusters.
    fn discard_alignment(&self) -> u32 {
        let topology = self.backend.topology();
        let sector = u32::try_from(SECTOR_SIZE).unwrap_or(u32::MAX);
        let largest = topology.optimal_io_size.max(topology.physical_block_size) / sector;
        let clamped = largest.clamp(MIN_DISCARD_ALIGNMENT, MAX_DISCARD_ALIGNMENT);
        // A hint that is no power of two is rounded down, as that of the block size is.
        1 << clamped.ilog2()
    }

    /// Whether a request that changes the disk is flushed before it is answered, for a driver that
    /// accepted `features`.
    pub(crate) fn writes_through(&self, features: u64) -> bool {
        // Without a way to flush no write may stay volatile, whatever `writeback` says.
        self.cache == CacheMode::WriteThrough
            || features & 1 << VIRTIO_BLK_F_FLUSH == 0
            || features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 && !self.writeback.load(Ordering::Acquire)
    }

    pub(crate) fn poll(&self) -> Duration {
        self.poll
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(crate) fn cache_mode(&self) -> CacheMode {
        self.cache
    }

    /// Whether space that is not needed is given back to the host.
    pub(crate) fn gives_back(&self) -> bool {
        self.discard
    }

    pub(crate) fn backend(&self) -> &Arc<dyn BlockBackend> {
        &self.backend
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
        BlockDevice::new(
            Arc::new(disk),
            &BlockDeviceOptions { serial: "s".into(), queues, ..BlockDeviceOptions::default() },
        )
    }

    fn config_u32(device: &BlockDevice, offset: u64) -> u32 {
        let mut bytes = [0xff; 4];
        device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Never more than a chain can hold, in the smallest queue that there may be.
    #[test]
    fn as_many_segments_are_offered_as_a_queue_has_room_for() {
        for (queue_size, seg_max) in [
            (None, 254),
            (Some(128), 126),
            (Some(256), 254),
            (Some(1024), 1022),
            (Some(32768), 1022),
            (Some(2), 1),
            (Some(0), 1),
        ] {
            let options = BlockDeviceOptions { queue_size, ..BlockDeviceOptions::default() };
            let device = BlockDevice::new(Arc::new(MemoryDisk::new(512)), &options);
            assert_eq!(config_u32(&device, 12), seg_max, "{queue_size:?}");
        }
    }

    /// Neither needs what is written through a mark, nor has it flushed what was written before.
    #[test]
    fn what_is_written_through_marks_nothing_and_takes_no_mark_away() {
        let disk = Arc::new(MemoryDisk::new(512));
        let device = Arc::new(BlockDevice::new(Arc::clone(&disk) as _, &BlockDeviceOptions::default()));
        let heard = Arc::new(std::sync::Mutex::new(Vec::new()));
        let watch = Arc::clone(&heard);
        let watch: UnflushedWatch = Arc::new(move |unflushed| watch.lock().unwrap().push(unflushed));
        device.watch_unflushed(Some(Arc::clone(&watch)));
        let said = || std::mem::take(&mut *heard.lock().unwrap());
        let hears = |unflushed| {
            disk.note_unflushed(unflushed);
            said()
        };
        // A driver that cannot flush yet.
        assert_eq!((said(), hears(true), hears(false)), (vec![false], vec![], vec![false]));
        // Nor could the one that wrote this, which another one did that could.
        disk.note_unflushed(true);
        device.watch_unflushed(Some(watch));
        assert_eq!((said(), hears(true), hears(false)), (vec![true], vec![], vec![false]));
        device.accept_features(device.features());
        assert_eq!((hears(true), hears(true), hears(false)), (vec![true], vec![true], vec![false]));
        device.set_writeback(false);
        assert_eq!((hears(true), hears(false)), (vec![], vec![false]));
        device.set_writeback(true);
        assert_eq!(hears(true), [true]);
    }

    #[test]
    fn read_only_is_offered_exactly_if_the_disk_cannot_write() {
        let ro = 1 << VIRTIO_BLK_F_RO;
        assert_eq!(device(MemoryDisk::new(512), 1).features() & ro, 0);
        assert_eq!(device(MemoryDisk::read_only(512), 1).features() & ro, ro);
    }

    #[test]
    fn a_disk_that_can_be_written_is_read_only_if_the_options_say_so() {
        let options = BlockDeviceOptions { read_only: true, ..BlockDeviceOptions::default() };
        let device = BlockDevice::new(Arc::new(MemoryDisk::new(512)), &options);
        let all = bit(VIRTIO_BLK_F_RO) | CHANGES;
        assert_eq!(device.features() & all, bit(VIRTIO_BLK_F_RO));
        let mut config = [0xff; 28];
        device.read_config(32, &mut config);
        assert_eq!(config, [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    const CHANGES: u64 = bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES) | bit(VIRTIO_BLK_F_CONFIG_WCE);

    const fn bit(feature: u32) -> u64 {
        1 << feature
    }

    /// Every field of what is offered has a value: a driver for Windows crashes on zeroes here.
    #[test]
    fn limits_of_discards_and_zeroes_are_in_config_space() {
        for (optimal, alignment) in [(0, 8), (512, 8), (4096, 8), (65536, 128), (100_000, 128), (u32::MAX, 4096)] {
            let mut disk = MemoryDisk::new(512);
            disk.topology.optimal_io_size = optimal;
            let device = device(disk, 1);
            assert_eq!(device.features() & CHANGES, CHANGES);
            let fields = [36, 40, 44, 48, 52, 56].map(|offset| config_u32(&device, offset));
            assert_eq!(fields, [524_288, 16, alignment, 65536, 1, 1], "for {optimal}");
            assert_eq!(fields[0] % alignment, 0);
        }
    }

    #[test]
    fn without_discard_zeroes_stay_and_nothing_is_given_back() {
        let options = BlockDeviceOptions { discard: false, ..BlockDeviceOptions::default() };
        let device = BlockDevice::new(Arc::new(MemoryDisk::new(512)), &options);
        assert_eq!(device.features() & CHANGES, CHANGES & !bit(VIRTIO_BLK_F_DISCARD));
        let fields = [36, 40, 44, 48, 52, 56].map(|offset| config_u32(&device, offset));
        assert_eq!(fields, [0, 0, 0, 65536, 1, 0]);
    }

    fn writeback(device: &BlockDevice) -> u32 {
        config_u32(device, 32) & 0xff
    }

    #[test]
    fn writeback_is_written_by_a_driver_that_accepted_it() {
        let device = device(MemoryDisk::new(512), 1);
        let (wce, flush) = (bit(VIRTIO_BLK_F_CONFIG_WCE), bit(VIRTIO_BLK_F_FLUSH));
        for (features, first, second) in [(0, 0, 0), (flush, 1, 1), (wce, 0, 0), (wce | flush, 1, 0)] {
            device.reset();
            assert_eq!(writeback(&device), 1);
            device.write_config(32, &[0]);
            assert_eq!(writeback(&device), 1, "nothing was accepted yet");
            device.accept_features(features);
            assert_eq!(writeback(&device), first, "{features:#x}");
            device.write_config(32, &[0]);
            assert_eq!(writeback(&device), second, "{features:#x}");
        }
        device.write_config(30, &[9, 9, 1, 9]);
        assert_eq!(writeback(&device), 1, "in the middle of a longer write");
        for (offset, data) in [(33, &[0; 8][..]), (28, &[0; 4]), (32, &[]), (32, &[2]), (u64::MAX, &[0]), (0, &[0])] {
            device.write_config(offset, data);
            assert_eq!(writeback(&device), 1, "{data:?} at {offset}");
        }
        let before = config_u32(&device, 36);
        device.write_config(0, &[0; 64]);
        assert_eq!((writeback(&device), config_u32(&device, 36)), (0, before));
    }

    #[test]
    fn the_guest_does_not_change_what_the_operator_fixed() {
        for cache in [CacheMode::WriteThrough, CacheMode::Unsafe] {
            let options = BlockDeviceOptions { cache, ..BlockDeviceOptions::default() };
            let device = BlockDevice::new(Arc::new(MemoryDisk::new(512)), &options);
            assert_eq!(device.features() & bit(VIRTIO_BLK_F_CONFIG_WCE), 0);
            assert_ne!(device.features() & bit(VIRTIO_BLK_F_FLUSH), 0);
            device.accept_features(u64::MAX);
            device.write_config(32, &[1]);
            assert_eq!(writeback(&device), 0);
        }
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
        for offset in [58, 59, 60, 4096, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
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
