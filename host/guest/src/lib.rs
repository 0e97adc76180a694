//! What the built-in guest and the machine that runs it have agreed on.
//!
//! The built-in guest is a program of a few kilobytes that runs in a virtual machine instead of an
//! operating system: it drives every virtio-blk device itself, reads each disk from the first to the
//! last sector, and reports a digest of what it saw. It shows that a disk works, as a guest sees it,
//! without a kernel to boot.
//!
//! ```text
//!  guest physical memory
//!  0x0020_0000  the guest: code, data, stack, rings, buffers (src/main.rs)
//!  0xcfff_f000  CONTROL_BASE: console, number of disks, reports, exit
//!  0xd000_0000  DISK_BASE: virtio-mmio registers of disk 0, DISK_STRIDE later of disk 1, …
//! ```
//! The machine starts the guest in 64-bit user mode (privilege level 3) with all of this mapped to
//! itself, and the guest never leaves that mode. So it needs no interrupt table, no privileged
//! instruction and no system call; where KVM is implemented in software, only user mode runs at full
//! speed and only memory accesses can leave it. Everything that it says, it says by memory access.

#![no_std]

/// Guest physical address of the control registers, one page.
pub const CONTROL_BASE: u64 = 0xcfff_f000;

/// Bytes of the control registers.
pub const CONTROL_LEN: u64 = 0x1000;

/// Write 1 to 8 bytes: they appear on the console in this order.
pub const CONTROL_CONSOLE: u64 = 0x00;

/// Write 4 bytes: the machine ends with this code.
pub const CONTROL_EXIT: u64 = 0x08;

/// Read 4 bytes: the number of disks.
pub const CONTROL_DISKS: u64 = 0x10;

/// Write 8 bytes: the address of an encoded [`Record`], which the machine copies before it returns.
pub const CONTROL_REPORT: u64 = 0x18;

/// Guest physical address of the virtio-mmio registers of disk 0.
pub const DISK_BASE: u64 = 0xd000_0000;

/// Bytes between the registers of one disk and the next.
pub const DISK_STRIDE: u64 = 0x1000;

/// Memory that the guest needs to have, in bytes.
pub const MEMORY_LEN: u64 = 4 << 20;

/// Exit code: every disk was read whole.
pub const EXIT_OK: u32 = 0;

/// Exit code: at least one disk could not be read; the records say which and where.
pub const EXIT_DISK_ERROR: u32 = 1;

/// Exit code: the guest itself failed (a panic; the console has its message).
pub const EXIT_PANIC: u32 = 2;

/// Bytes of a serial, padded with NUL (virtio 1.3, 5.2.6).
pub const SERIAL_LEN: usize = 20;

/// Why the guest could not use a device at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFault {
    /// The registers are not those of a virtio-mmio (version 2) block device.
    NotABlockDevice,
    /// The device did not accept the features that the guest chose, or offers too few.
    Features,
    /// The queue is too small or the device did not accept it.
    Queue,
    /// The device asked for a reset, or answered with something that was not asked.
    Broken,
}

impl DeviceFault {
    const fn code(self) -> u8 {
        match self {
            Self::NotABlockDevice => 0,
            Self::Features => 1,
            Self::Queue => 2,
            Self::Broken => 3,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::NotABlockDevice),
            1 => Some(Self::Features),
            2 => Some(Self::Queue),
            3 => Some(Self::Broken),
            _ => None,
        }
    }

    /// One short sentence.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotABlockDevice => "not a virtio block device",
            Self::Features => "feature negotiation failed",
            Self::Queue => "the device refused the queue",
            Self::Broken => "the device stopped working",
        }
    }
}

/// How reading a disk went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The SHA-256 of all bytes of the disk.
    Digest([u8; 32]),
    /// The device answered with an I/O error; `sector` is the first that cannot be read.
    ReadError {
        /// In units of 512 bytes.
        sector: u64,
    },
    /// The device cannot be used.
    Device(DeviceFault),
}

/// What the guest found out about one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The number of the disk, from 0.
    pub disk: u32,
    /// Whether the device offers no writing.
    pub read_only: bool,
    /// The capacity in bytes that the device shows; 0 if it cannot be used.
    pub bytes: u64,
    /// The serial, padded with NUL.
    pub serial: [u8; SERIAL_LEN],
    /// How reading it went.
    pub finding: Finding,
}

impl Record {
    /// Bytes of an encoded record.
    pub const LEN: usize = 80;

    /// The record as bytes, numbers little-endian: disk at 0 (4 bytes), read-only at 4 (1), tag of
    /// the finding at 5 (1), fault at 6 (1), bytes at 8 (8), sector at 16 (8), digest at 24 (32),
    /// serial at 56 (20). The rest is zero.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let (tag, fault, sector, digest) = match self.finding {
            Finding::Digest(digest) => (0, 0, 0, digest),
            Finding::ReadError { sector } => (1, 0, sector, [0; 32]),
            Finding::Device(fault) => (2, fault.code(), 0, [0; 32]),
        };
        let mut bytes = [0; Self::LEN];
        let mut put = |offset: usize, field: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(offset).zip(field) {
                *to = *from;
            }
        };
        put(0, &self.disk.to_le_bytes());
        put(4, &[u8::from(self.read_only), tag, fault]);
        put(8, &self.bytes.to_le_bytes());
        put(16, &sector.to_le_bytes());
        put(24, &digest);
        put(56, &self.serial);
        bytes
    }

    /// The record that [`encode`](Self::encode) made these bytes from, if there is one.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let [read_only, tag, fault] = field(bytes, 4)?;
        let finding = match tag {
            0 => Finding::Digest(field(bytes, 24)?),
            1 => Finding::ReadError { sector: u64::from_le_bytes(field(bytes, 16)?) },
            2 => Finding::Device(DeviceFault::from_code(fault)?),
            _ => return None,
        };
        Some(Self {
            disk: u32::from_le_bytes(field(bytes, 0)?),
            read_only: match read_only {
                0 => false,
                1 => true,
                _ => return None,
            },
            bytes: u64::from_le_bytes(field(bytes, 8)?),
            serial: field(bytes, 56)?,
            finding,
        })
    }
}

/// `N` bytes at `offset`.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn records_survive_the_way_through_memory() {
        let findings = [
            Finding::Digest(core::array::from_fn(|i| u8::try_from(i).unwrap())),
            Finding::ReadError { sector: u64::MAX - 1 },
            Finding::Device(DeviceFault::NotABlockDevice),
            Finding::Device(DeviceFault::Features),
            Finding::Device(DeviceFault::Queue),
            Finding::Device(DeviceFault::Broken),
        ];
        for finding in findings {
            for read_only in [false, true] {
                let serial = *b"twenty bytes serial.";
                let record = Record { disk: 3, read_only, bytes: 0x0102_0304_0506_0708, serial, finding };
                assert_eq!(Record::decode(&record.encode()), Some(record));
            }
        }
    }

    #[test]
    fn what_is_no_record_is_not_decoded() {
        let record = Record {
            disk: 0,
            read_only: false,
            bytes: 0,
            serial: [0; SERIAL_LEN],
            finding: Finding::Device(DeviceFault::Queue),
        };
        for (offset, value) in [(4, 2), (5, 3), (6, 4), (6, 0xff)] {
            let mut bytes = record.encode();
            *bytes.get_mut(offset).unwrap() = value;
            assert_eq!(Record::decode(&bytes), None, "{value} at {offset}");
        }
    }
}
