//! virtio-mmio, version 2: a block device as a page of registers (virtio 1.3, section 4.2).
//!
//! ```text
//!  guest writes            here                              worker threads
//!  Status: FEATURES_OK ──▶ features checked
//!  QueueReady          ──▶ addresses checked
//!  Status: DRIVER_OK   ──▶ one Worker per ready queue ────▶  kick ▸ BlockQueue ▸ used ring ▸ irq
//!  QueueNotify         ──▶ (ioeventfd, does not come here)
//!  Status: 0           ──▶ workers stopped and joined, then everything as after power-on
//! ```
//! A reset returns when nothing of the old life of the device is in flight: a vCPU that resets a
//! device waits for at most [`LANE_REQUESTS`](blockhouse_block::LANE_REQUESTS) requests per queue.

use std::sync::Arc;

use blockhouse_virtio::{BlockDevice, BlockQueue, DEVICE_ID, QUEUE_SIZE, Worker};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::memory::Memory;

/// Where a guest notifies: the register behind every queue's ioeventfd.
pub(crate) const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt".
const MAGIC: u32 = 0x7472_6976;

/// The version of the interface without legacy.
const VERSION: u32 = 2;

/// "BLKH".
const VENDOR: u32 = 0x484b_4c42;

/// Bits of the device status that a driver sets one after the other.
const STATUS_OF_DRIVER: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// The registers of one block device and what they control.
pub(crate) struct MmioDevice {
    name: String,
    device: Arc<BlockDevice>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    queues: Vec<QueueState>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// One queue as the driver configures it, and its worker while the device runs.
struct QueueState {
    config: Queue,
    impossible: Impossible,
    kick: EventFd,
    worker: Option<Worker>,
}

/// What of the driver's last choices no queue can have: it must not get another one instead, such as the one before.
#[derive(Default, PartialEq, Eq)]
struct Impossible {
    size: bool,
    descriptors: bool,
    available: bool,
    used: bool,
}

/// How the parts of a queue are aligned (section 2.7), in bytes.
const DESCRIPTORS_ALIGN: u32 = 16;
const AVAILABLE_ALIGN: u32 = 2;
const USED_ALIGN: u32 = 4;

impl QueueState {
    fn reset(&mut self) {
        // Joins the thread, so that what follows is not seen by it.
        self.worker = None;
        self.config.reset();
        self.impossible = Impossible::default();
    }
}

impl MmioDevice {
    /// The device as after power-on. `kicks` has one ioeventfd per queue, `irq` is the irqfd.
    pub(crate) fn new(
        name: String,
        device: Arc<BlockDevice>,
        memory: Memory,
        kicks: Vec<EventFd>,
        irq: EventFd,
    ) -> Result<Self> {
        let queues = kicks
            .into_iter()
            .map(|kick| {
                let config = Queue::new(QUEUE_SIZE).map_err(Error::host("create a virtqueue"))?;
                Ok(QueueState { config, impossible: Impossible::default(), kick, worker: None })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            name,
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(irq)),
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        })
    }

    /// The device behind the registers, and its interrupt.
    pub(crate) fn parts(&self) -> (Arc<BlockDevice>, Arc<Interrupt>) {
        (Arc::clone(&self.device), Arc::clone(&self.interrupt))
    }

    /// The guest reads at `offset`. Registers are read as 4 aligned bytes, config space as it likes;
    /// anything else reads as zero.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.device.read_config(offset, data);
            return;
        }
        data.fill(0);
        if let (Ok(offset), Ok(data)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => DEVICE_ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.device.features(), self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.config.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| queue.config.ready().into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS if self.interrupt.needs_reset() => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(self.capacity()),
            // A shared memory region that does not exist is all ones long (section 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// The guest writes at `offset`: 4 aligned bytes, or nothing happens; to config space as it likes.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.device.write_config(offset, data);
            return;
        }
        let (Ok(offset), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                match self.driver_features_sel {
                    0 => self.driver_features = self.driver_features >> 32 << 32 | u64::from(value),
                    1 => self.driver_features = self.driver_features << 32 >> 32 | u64::from(value) << 32,
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            // Normally an ioeventfd takes this before it gets here.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value),
            _ => self.configure_queue(offset, value),
        }
    }

    /// The field `capacity` of config space, which changes before anybody says so.
    fn capacity(&self) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn queue(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn notify(&self, queue: u32) {
        let queue = usize::try_from(queue).ok().and_then(|index| self.queues.get(index));
        if let Some(Err(error)) = queue.map(|queue| queue.kick.write(1)) {
            tracing::warn!(%error, "cannot notify a queue");
        }
    }

    fn configure_queue(&mut self, offset: u32, value: u32) {
        let running = self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let Some(queue) = usize::try_from(self.queue_sel).ok().and_then(|index| self.queues.get_mut(index)) else {
            return;
        };
        if running || queue.config.ready() {
            return;
        }
        let QueueState { config, impossible, .. } = queue;
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => {
                impossible.size = !u16::try_from(value).is_ok_and(|size| config.try_set_size(size).is_ok());
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                impossible.descriptors = !value.is_multiple_of(DESCRIPTORS_ALIGN);
                config.set_desc_table_address(Some(value), None);
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => config.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                impossible.available = !value.is_multiple_of(AVAILABLE_ALIGN);
                config.set_avail_ring_address(Some(value), None);
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => config.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => {
                impossible.used = !value.is_multiple_of(USED_ALIGN);
                config.set_used_ring_address(Some(value), None);
            }
            VIRTIO_MMIO_QUEUE_USED_HIGH => config.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// A queue is ready if it can be, and lies in memory; the driver reads back whether it is.
    fn set_queue_ready(&mut self, value: u32) {
        let running = self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let Some(queue) = usize::try_from(self.queue_sel).ok().and_then(|index| self.queues.get_mut(index)) else {
            return;
        };
        match value {
            0 => {
                queue.worker = None;
                queue.config.set_ready(false);
            }
            1 if !running => {
                queue.config.set_ready(true);
                if queue.impossible != Impossible::default() || !queue.config.is_valid(self.memory.as_ref()) {
                    queue.config.set_ready(false);
                }
            }
            _ => {}
        }
    }

    /// The driver walks through section 3.1.1. Bits only ever get set; writing 0 resets.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & STATUS_OF_DRIVER & !self.status;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_acceptable() {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let features_ok = (self.status | new) & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !features_ok {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= new;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            self.device.accept_features(self.driver_features);
        }
        if new & VIRTIO_CONFIG_S_FAILED != 0 {
            self.stop();
        } else if new & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && let Err(error) = self.start()
        {
            tracing::warn!(disk = self.name, error = %error, "the device cannot start");
            self.stop();
            self.interrupt.ask_for_reset();
        }
    }

    /// Nothing that was not offered, and the modern interface.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device.features() == 0 && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn start(&mut self) -> Result<()> {
        for (index, state) in (0..).zip(&mut self.queues) {
            if !state.config.ready() {
                continue;
            }
            // The worker gets a queue of its own; the registers keep theirs to answer the guest.
            let queue = Queue::try_from(state.config.state()).map_err(Error::host("hand over a virtqueue"))?;
            let queue = BlockQueue::new(self.device.clone(), index, queue, self.driver_features);
            let kick = state.kick.try_clone().map_err(Error::host("duplicate an eventfd"))?;
            let name = format!("{}-queue{index}", self.name);
            let worker = Worker::start(name, queue, self.memory.clone(), kick, self.interrupt.clone())
                .map_err(Error::host("start a thread for a disk"))?;
            state.worker = Some(worker);
        }
        Ok(())
    }

    fn stop(&mut self) {
        for queue in &mut self.queues {
            queue.worker = None;
        }
    }

    /// The state after power-on. When this returns, no request is in flight.
    fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.reset();
        }
        // After the workers: the last one may still have raised it.
        self.interrupt.reset();
        self.device.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
    }
}

/// The 32 bits of `features` that `selector` stands for.
fn half(features: u64, selector: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match selector {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
