//! Device registers.

use core::ptr::with_exposed_provenance_mut;

/// A block of device registers, at a guest physical address that is mapped to itself.
#[derive(Clone, Copy)]
pub(crate) struct Registers {
    base: u64,
}

impl Registers {
    /// The registers at `base`: [`CONTROL_BASE`](blockhouse_guest::CONTROL_BASE) or those of a disk.
    pub(crate) fn at(base: u64) -> Self {
        Self { base }
    }

    pub(crate) fn read_u32(self, offset: u64) -> u32 {
        // SAFETY: the machine maps all device registers, which are no memory that Rust knows of;
        // offsets are those of 4-byte registers, hence aligned.
        unsafe { self.pointer::<u32>(offset).read_volatile() }
    }

    pub(crate) fn write_u8(self, offset: u64, value: u8) {
        // SAFETY: as in `read_u32`; a byte is always aligned.
        unsafe { self.pointer::<u8>(offset).write_volatile(value) }
    }

    pub(crate) fn write_u32(self, offset: u64, value: u32) {
        // SAFETY: as in `read_u32`.
        unsafe { self.pointer::<u32>(offset).write_volatile(value) }
    }

    pub(crate) fn write_u64(self, offset: u64, value: u64) {
        // SAFETY: as in `read_u32`, for registers of 8 bytes.
        unsafe { self.pointer::<u64>(offset).write_volatile(value) }
    }

    /// Writes a 64-bit value to the two 32-bit registers at `offset` and `offset + 4`.
    pub(crate) fn write_pair(self, offset: u64, value: u64) {
        let [low, high] = [value & 0xffff_ffff, value >> 32];
        // Both halves fit 32 bits by construction.
        self.write_u32(offset, u32::try_from(low).unwrap_or(0));
        self.write_u32(offset + 4, u32::try_from(high).unwrap_or(0));
    }

    fn pointer<T>(self, offset: u64) -> *mut T {
        // The guest is a 64-bit program: no address is lost.
        with_exposed_provenance_mut(usize::try_from(self.base + offset).unwrap_or(0))
    }
}
