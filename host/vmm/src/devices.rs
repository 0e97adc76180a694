//! What an address or a port of the guest means.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockhouse_guest::{CONTROL_BASE, CONTROL_LEN, DISK_BASE, DISK_STRIDE};

use crate::control::Control;
use crate::layout::SERIAL_PORT;
use crate::machine::ExitReason;
use crate::mmio::MmioDevice;
use crate::power;
use crate::serial::SerialPort;

/// Registers of a 16550.
const SERIAL_LEN: u16 = 8;

/// All devices. Each has its own lock, so that a vCPU that waits for one disk's reset holds up none
/// that uses another device.
pub(crate) struct Devices {
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    pub(crate) disks: Vec<Mutex<MmioDevice>>,
    pub(crate) control: Option<Mutex<Control>>,
}

impl Devices {
    /// The guest reads memory that is none. What no device answers for reads as ones, like an empty
    /// bus.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some((disk, offset)) = self.disk(address) {
            lock(disk).read(offset, data);
        } else if let Some((control, offset)) = self.control(address) {
            lock(control).read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// The guest writes memory that is none. Returns how the machine ends, if this ends it.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) -> Option<ExitReason> {
        if let Some((disk, offset)) = self.disk(address) {
            lock(disk).write(offset, data);
            None
        } else {
            let (control, offset) = self.control(address)?;
            lock(control).write(offset, data)
        }
    }

    /// The guest reads a port, `data.len()` times if it is a string instruction.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match serial_register(port) {
                Some(register) => lock(&self.serial).read(register),
                None => power::read(port).unwrap_or(0xff),
            };
        }
    }

    /// The guest writes a port. Returns how the machine ends, if this ends it.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        match serial_register(port) {
            Some(register) => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    serial.write(register, *byte);
                }
                None
            }
            None => data.iter().find_map(|byte| power::write(port, *byte)),
        }
    }

    fn disk(&self, address: u64) -> Option<(&Mutex<MmioDevice>, u64)> {
        let offset = address.checked_sub(DISK_BASE)?;
        let index = usize::try_from(offset / DISK_STRIDE).ok()?;
        Some((self.disks.get(index)?, offset % DISK_STRIDE))
    }

    fn control(&self, address: u64) -> Option<(&Mutex<Control>, u64)> {
        let offset = address.checked_sub(CONTROL_BASE).filter(|offset| *offset < CONTROL_LEN)?;
        Some((self.control.as_ref()?, offset))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT).filter(|offset| *offset < SERIAL_LEN)?;
    u8::try_from(offset).ok()
}

/// Takes a device's lock. A thread that panicked with it is a bug of the machine that ends with its
/// own error; the others may still look.
pub(crate) fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use blockhouse_guest::{CONTROL_DISKS, CONTROL_EXIT};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::console::Console;
    use crate::memory;

    fn devices(with_control: bool) -> Devices {
        let console = Console::new(Box::new(std::io::sink()), Arc::default());
        let serial = SerialPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console.clone());
        let memory = memory::allocate(8 << 20).unwrap();
        let control = with_control.then(|| Mutex::new(Control::new(3, memory, console)));
        Devices { serial: Arc::new(Mutex::new(serial)), disks: Vec::new(), control }
    }

    #[test]
    fn where_nothing_is_reads_as_ones_and_writes_do_nothing() {
        let devices = devices(true);
        for address in [0x1_0000_0000, DISK_BASE, CONTROL_BASE - 1, u64::MAX] {
            let mut data = [0; 4];
            devices.mmio_read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            assert_eq!(devices.mmio_write(address, &data), None);
        }
        for port in [0, 0x3f7, 0x400, 0xcf8, 0xffff] {
            let mut data = [0; 2];
            devices.port_read(port, &mut data);
            assert_eq!(data, [0xff; 2], "{port:#x}");
            assert_eq!(devices.port_write(port, &data), None);
        }
    }

    #[test]
    fn only_the_built_in_guest_has_control_registers() {
        for present in [true, false] {
            let devices = devices(present);
            let mut count = [0; 4];
            devices.mmio_read(CONTROL_BASE + CONTROL_DISKS, &mut count);
            assert_eq!(u32::from_le_bytes(count), if present { 3 } else { u32::MAX });
            let end = devices.mmio_write(CONTROL_BASE + CONTROL_EXIT, &7_u32.to_le_bytes());
            assert_eq!(end, present.then_some(ExitReason::Guest(7)));
        }
    }

    #[test]
    fn a_string_instruction_writes_every_byte() {
        let devices = devices(false);
        assert_eq!(devices.port_write(0x64, &[0, 0, 0xfe]), Some(ExitReason::Reset));
    }
}
