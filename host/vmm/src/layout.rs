//! What lies where in guest physical memory.
//!
//! ```text
//!  0x0000_0500  GDT                      ┐
//!  0x0000_7000  boot parameters          │ written once, before the guest starts
//!  0x0000_9000  page tables, 6 pages     │
//!  0x0002_0000  kernel command line      ┘
//!  0x000e_0000  ACPI tables (reserved, up to 1 MiB)
//!  0x000f_fff0  what runs if the guest starts over like a PC (Linux)
//!  0x0010_0000  kernel (Linux), initramfs at the end of low memory
//!  0x0020_0000  built-in guest
//!  0xc000_0000  end of low memory at the latest; what is left of memory starts at 4 GiB
//!  0xcfff_f000  control registers of the built-in guest
//!  0xd000_0000  virtio-mmio, one page per disk
//!  0xfec0_0000  I/O APIC, 0xfee0_0000 local APIC (both in KVM)
//!  0xfffb_c000  KVM's own pages (identity map, TSS)
//!  0x1_0000_0000 memory above the hole
//! ```

use blockhouse_guest::{DISK_BASE, DISK_STRIDE};

/// The global descriptor table.
pub(crate) const GDT: u64 = 0x500;

/// `struct boot_params`, Linux's "zero page".
pub(crate) const BOOT_PARAMS: u64 = 0x7000;

/// The stack that a kernel starts with; it grows down from here.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;

/// The top page table; the others follow it.
pub(crate) const PAGE_TABLES: u64 = 0x9000;

/// The kernel command line, NUL-terminated.
pub(crate) const CMDLINE: u64 = 0x2_0000;

/// The end of memory that a PC has below its firmware's data area.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;

/// The ACPI tables, the RSDP first.
pub(crate) const ACPI: u64 = 0xe_0000;

/// Where a processor starts in a PC, in real mode.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;

/// Where memory proper starts, after what a PC reserves for firmware.
pub(crate) const HIMEM: u64 = 0x10_0000;

/// Where the hole for devices starts.
pub(crate) const HOLE_START: u64 = 0xc000_0000;

/// Where the hole for devices ends.
pub(crate) const HOLE_END: u64 = 0x1_0000_0000;

/// The I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;

/// The local APIC of each vCPU.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// A page that KVM needs on Intel hosts to run real-mode code.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Three pages that KVM needs on Intel hosts.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// The smallest memory of a machine, in bytes.
pub const MIN_MEMORY: u64 = 8 << 20;

/// The largest memory of a machine, in bytes.
pub const MAX_MEMORY: u64 = 1 << 40;

/// The most vCPUs of a machine. APIC ids are 8 bits and 255 means all of them.
pub const MAX_VCPUS: u8 = 64;

/// The most disks of a machine: as many as there are interrupt lines for them.
pub const MAX_DISKS: usize = DISK_GSI.len();

/// Interrupt lines of the disks, in order. The I/O APIC has 24; those that a PC has given away since
/// 1984 stay free, because drivers take them without asking (0-4, 8, 12, 13).
const DISK_GSI: [u32; 16] = [5, 6, 7, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// Where a disk's registers are and which interrupt line it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskSlot {
    pub(crate) base: u64,
    pub(crate) gsi: u32,
}

/// The slots of all disks that a machine can have, in order.
pub(crate) fn disk_slots() -> impl Iterator<Item = DiskSlot> {
    (0..).map(|i| DISK_BASE + DISK_STRIDE * i).zip(DISK_GSI).map(|(base, gsi)| DiskSlot { base, gsi })
}

/// The serial port of the console.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;

/// The serial port's interrupt line.
pub(crate) const SERIAL_GSI: u32 = 4;

/// ACPI's sleep control register: how a guest switches the machine off.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;

/// ACPI's sleep status register.
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;

/// ACPI's reset register.
pub(crate) const RESET_PORT: u16 = 0x602;
