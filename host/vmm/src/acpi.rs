//! How a Linux guest learns what the machine has: ACPI tables.
//!
//! ```text
//!  boot parameters ─▶ RSDP ─▶ XSDT ─┬▶ FADT ─▶ DSDT   serial port, one device per disk, \_S5
//!                                   └▶ MADT           vCPUs, I/O APIC
//! ```
//! Stock distribution kernels do not take virtio-mmio devices from the command line
//! (`CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES` is off), but every one of them takes them from here, by the
//! identifier `LNRO0005`. The platform is the "hardware-reduced" one of ACPI (6.5, 4.1): no fixed
//! hardware of 1996 to emulate, only a register to switch off and one to reset.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use blockhouse_guest::DISK_STRIDE;
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, ErrorKind, Result};
use crate::layout::{
    ACPI, DiskSlot, HIMEM, IO_APIC, LOCAL_APIC, RESET_PORT, SERIAL_GSI, SERIAL_PORT, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT, disk_slots,
};
use crate::memory::Memory;
use crate::power::{RESET_VALUE, SLEEP_TYPE_OFF};

const OEM: [u8; 6] = *b"BLKHSE";
const OEM_TABLE: [u8; 8] = *b"BLOCKHSE";
const OEM_REVISION: u32 = 1;

/// "No VGA" and "no real-time clock" of the FADT's boot flags (ACPI 6.5, 5.2.9.3). That there is no
/// keyboard controller is said by the absence of its flag.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;

/// Writes the tables for `vcpus` vCPUs and `disks` disks and returns the address of the RSDP.
pub(crate) fn write(memory: &Memory, vcpus: u8, disks: usize) -> Result<u64> {
    let mut writer = Writer { memory, next: ACPI + RSDP_ROOM };
    let dsdt = writer.put(&dsdt(disks))?;
    let fadt = writer.put(&fadt(dsdt))?;
    let madt = writer.put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.put(&xsdt)?;
    // The RSDP comes first in memory, so that a kernel that searches finds it, too.
    writer.next = ACPI;
    writer.put(&Rsdp::new(OEM, xsdt))
}

/// Room for the RSDP in front of the tables.
const RSDP_ROOM: u64 = 0x40;

struct Writer<'a> {
    memory: &'a Memory,
    next: u64,
}

impl Writer<'_> {
    /// Writes one table, aligned to 16 bytes, and returns its address.
    fn put(&mut self, table: &dyn Aml) -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.next;
        let end = address + bytes.len() as u64;
        if end > HIMEM {
            return Err(Error::new(
                ErrorKind::Config,
                "too many devices for the ACPI tables: use fewer disks or vCPUs",
            ));
        }
        self.memory.write_slice(&bytes, GuestAddress(address)).map_err(Error::host("write the ACPI tables"))?;
        self.next = end.next_multiple_of(16);
        Ok(address)
    }
}

/// The description of the devices, in ACPI's own language.
fn dsdt(disks: usize) -> Sdt {
    let mut body = Vec::new();
    let off = SLEEP_TYPE_OFF;
    let zero = aml::ZERO;
    Name::new("_S5_".into(), &Package::new(vec![&off, &zero, &zero, &zero])).to_aml_bytes(&mut body);

    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8),
                    &Interrupt::new(true, true, false, false, SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut body);

    for (index, slot) in (0_u32..).zip(disk_slots().take(disks)) {
        Scope::new("_SB_".into(), vec![&Disk { index, slot }]).to_aml_bytes(&mut body);
    }

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// One disk: a virtio-mmio device.
struct Disk {
    index: u32,
    slot: DiskSlot,
}

impl Aml for Disk {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        // The machine's devices lie below 4 GiB.
        let base = u32::try_from(self.slot.base).unwrap_or(0);
        let len = u32::try_from(DISK_STRIDE).unwrap_or(0);
        Device::new(
            format!("VD{:02}", self.index).as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &self.index),
                // Coherent, as everything that KVM shows.
                &Name::new("_CCA".into(), &aml::ONE),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base, len),
                        // Edge-triggered: an irqfd has no level to hold.
                        &Interrupt::new(true, true, false, false, self.slot.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // Its id must differ from those of the vCPUs on old kernels; they ignore it otherwise.
    madt.add_structure(IoApic::new(vcpus, IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use super::*;
    use crate::layout::{MAX_DISKS, MAX_VCPUS};
    use crate::memory;

    fn read(memory: &Memory, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// A table by its address, with its checksum verified.
    fn table(memory: &Memory, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        assert_eq!(address % 16, 0);
        let header = read(memory, address, 36);
        assert_eq!(&header[..4], signature);
        let len = u32::from_le_bytes(header[4..8].try_into().unwrap());
        let bytes = read(memory, address, usize::try_from(len).unwrap());
        assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum of {signature:?}");
        bytes
    }

    #[test]
    fn the_largest_machine_is_described_completely() {
        let memory = memory::allocate(16 << 20).unwrap();
        let rsdp = write(&memory, MAX_VCPUS, MAX_DISKS).unwrap();
        let rsdp = read(&memory, rsdp, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64_at(&rsdp, 24), b"XSDT");
        let fadt = table(&memory, u64_at(&xsdt, 36), b"FACP");
        let madt = table(&memory, u64_at(&xsdt, 44), b"APIC");
        assert_eq!(madt.len(), 44 + 8 * usize::from(MAX_VCPUS) + 12);
        let dsdt = table(&memory, u64_at(&fadt, 140), b"DSDT");
        let devices = dsdt.windows(8).filter(|bytes| *bytes == b"LNRO0005").count();
        assert_eq!(devices, MAX_DISKS);
    }
}
