//! One disk: the handshake of virtio-mmio, then every sector once.

use blockhouse_guest::{DeviceFault, Finding, Record, SERIAL_LEN};
use sha2::{Digest, Sha256};

use crate::mmio::Registers;
use crate::ring::{Completion, QUEUE_SIZE, Ring, SLOT_LEN, SLOTS, TYPE_GET_ID, TYPE_IN};

const SECTOR_LEN: u32 = 512;

// Registers of virtio-mmio, version 2 (virtio 1.3, 4.2.2).
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG_CAPACITY: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const BLOCK_DEVICE: u32 = 2;

// Device status (2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

// Features (5.2.3 and 6), as (which half, bit).
const RO: u32 = 1 << 5;
const EVENT_IDX: u32 = 1 << 29;
const VERSION_1: u32 = 1 << 0;

/// How often the guest looks at the ring before it asks the device whether it is still alive.
const PATIENCE: u32 = 1 << 22;

/// Reads the whole disk behind `registers`.
pub(crate) fn examine(number: u32, registers: Registers) -> Record {
    let mut record = Record {
        disk: number,
        read_only: false,
        bytes: 0,
        serial: [0; SERIAL_LEN],
        finding: Finding::Device(DeviceFault::Broken),
    };
    record.finding = match Disk::open(registers) {
        Ok(mut disk) => {
            record.read_only = disk.read_only;
            record.bytes = disk.sectors.saturating_mul(u64::from(SECTOR_LEN));
            disk.serial(&mut record.serial).and_then(|()| disk.read_whole()).unwrap_or_else(Finding::Device)
        }
        Err(fault) => Finding::Device(fault),
    };
    // Whatever is in flight must not reach memory that the next disk uses.
    registers.write_u32(STATUS, 0);
    record
}

/// A device that accepted its driver.
struct Disk {
    registers: Registers,
    ring: Ring,
    sectors: u64,
    read_only: bool,
}

/// How a request ended.
enum Answer {
    Done(Completion),
    Failed,
}

impl Disk {
    /// The initialisation of section 3.1.1.
    fn open(registers: Registers) -> Result<Self, DeviceFault> {
        let identity = [MAGIC, VERSION, DEVICE_ID].map(|offset| registers.read_u32(offset));
        if identity != [MAGIC_VALUE, 2, BLOCK_DEVICE] {
            return Err(DeviceFault::NotABlockDevice);
        }
        registers.write_u32(STATUS, 0);
        let mut status = ACKNOWLEDGE | DRIVER;
        registers.write_u32(STATUS, status);

        let [low, high] = [0, 1].map(|half| {
            registers.write_u32(DEVICE_FEATURES_SEL, half);
            registers.read_u32(DEVICE_FEATURES)
        });
        if high & VERSION_1 == 0 || low & EVENT_IDX == 0 {
            return Err(DeviceFault::Features);
        }
        let read_only = low & RO != 0;
        for (half, features) in [(0, EVENT_IDX | low & RO), (1, VERSION_1)] {
            registers.write_u32(DRIVER_FEATURES_SEL, half);
            registers.write_u32(DRIVER_FEATURES, features);
        }
        status |= FEATURES_OK;
        registers.write_u32(STATUS, status);
        if registers.read_u32(STATUS) & FEATURES_OK == 0 {
            return Err(DeviceFault::Features);
        }

        registers.write_u32(QUEUE_SEL, 0);
        if registers.read_u32(QUEUE_NUM_MAX) < u32::from(QUEUE_SIZE) {
            return Err(DeviceFault::Queue);
        }
        let ring = Ring::new();
        let addresses = ring.addresses();
        registers.write_u32(QUEUE_NUM, u32::from(QUEUE_SIZE));
        registers.write_pair(QUEUE_DESC, addresses.descriptors);
        registers.write_pair(QUEUE_DRIVER, addresses.avail);
        registers.write_pair(QUEUE_DEVICE, addresses.used);
        registers.write_u32(QUEUE_READY, 1);
        if registers.read_u32(QUEUE_READY) != 1 {
            return Err(DeviceFault::Queue);
        }
        registers.write_u32(STATUS, status | DRIVER_OK);

        let [low, high] = [0, 4].map(|half| registers.read_u32(CONFIG_CAPACITY + half));
        let sectors = u64::from(low) | u64::from(high) << 32;
        Ok(Self { registers, ring, sectors, read_only })
    }

    /// Fetches the serial; a device that has none leaves it empty.
    fn serial(&mut self, serial: &mut [u8; SERIAL_LEN]) -> Result<(), DeviceFault> {
        let len = u32::try_from(SERIAL_LEN).unwrap_or(0);
        if let Answer::Done(completion) = self.request(TYPE_GET_ID, 0, len)? {
            for (to, from) in serial.iter_mut().zip(self.ring.data(&completion, len)) {
                *to = *from;
            }
        }
        Ok(())
    }

    /// Reads all sectors, with [`SLOTS`] requests in flight: the device fetches while the guest
    /// computes the digest.
    fn read_whole(&mut self) -> Result<Finding, DeviceFault> {
        let chunk = u64::from(SLOT_LEN / SECTOR_LEN);
        let chunks = self.sectors.div_ceil(chunk);
        let mut digest = Sha256::new();
        let mut submitted = 0;
        // Completions may come in any order, the digest wants one: chunk n is in slot n % SLOTS.
        let mut completed: [Option<Completion>; SLOTS as usize] = [const { None }; SLOTS as usize];
        for current in 0..chunks {
            while submitted < chunks.min(current + u64::from(SLOTS)) {
                self.submit(slot_of(submitted), TYPE_IN, submitted * chunk, self.len_at(submitted * chunk));
                submitted += 1;
            }
            let completion = loop {
                if let Some(completion) = completed.get_mut(usize::from(slot_of(current))).and_then(Option::take) {
                    break completion;
                }
                let completion = self.wait()?;
                let place = completed.get_mut(usize::from(completion.slot)).ok_or(DeviceFault::Broken)?;
                *place = Some(completion);
            };
            let sector = current * chunk;
            if !completion.ok {
                // Let the others come back first: their slots are needed to find the sector.
                let arrived = completed.iter().flatten().count() as u64;
                for _ in arrived..submitted - current - 1 {
                    self.wait()?;
                }
                return self.first_bad_sector(sector).map(|sector| Finding::ReadError { sector });
            }
            digest.update(self.ring.data(&completion, self.len_at(sector)));
        }
        Ok(Finding::Digest(digest.finalize().into()))
    }

    /// Reads the chunk at `sector` again, one sector at a time. If all of them can be read now, the
    /// chunk's first sector is the answer.
    fn first_bad_sector(&mut self, sector: u64) -> Result<u64, DeviceFault> {
        let end = sector + u64::from(self.len_at(sector) / SECTOR_LEN);
        for candidate in sector..end {
            if matches!(self.request(TYPE_IN, candidate, SECTOR_LEN)?, Answer::Failed) {
                return Ok(candidate);
            }
        }
        Ok(sector)
    }

    /// The length in bytes of the request at `sector`: a full slot, or what is left of the disk.
    fn len_at(&self, sector: u64) -> u32 {
        let left = self.sectors.saturating_sub(sector).saturating_mul(u64::from(SECTOR_LEN));
        u32::try_from(left).unwrap_or(u32::MAX).min(SLOT_LEN)
    }

    /// One request on its own, with no other in flight.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> Result<Answer, DeviceFault> {
        self.submit(0, kind, sector, len);
        let completion = self.wait()?;
        if completion.slot != 0 {
            return Err(DeviceFault::Broken);
        }
        Ok(if completion.ok { Answer::Done(completion) } else { Answer::Failed })
    }

    fn submit(&mut self, slot: u16, kind: u32, sector: u64, len: u32) {
        if self.ring.submit(slot, kind, sector, len) {
            self.registers.write_u32(QUEUE_NOTIFY, 0);
        }
    }

    fn wait(&mut self) -> Result<Completion, DeviceFault> {
        loop {
            for _ in 0..PATIENCE {
                match self.ring.poll() {
                    Ok(Some(completion)) => return Ok(completion),
                    Ok(None) => core::hint::spin_loop(),
                    Err(_) => return Err(DeviceFault::Broken),
                }
            }
            let status = self.registers.read_u32(STATUS);
            if status & DRIVER_OK == 0 || status & NEEDS_RESET != 0 {
                return Err(DeviceFault::Broken);
            }
        }
    }
}

fn slot_of(chunk: u64) -> u16 {
    // Less than SLOTS by construction.
    u16::try_from(chunk % u64::from(SLOTS)).unwrap_or(0)
}
