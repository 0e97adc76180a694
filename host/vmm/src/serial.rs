//! The serial port: a 16550 that writes to the console.

use std::io;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;

/// The serial port's interrupt.
pub(crate) struct SerialIrq(EventFd);

impl Trigger for SerialIrq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port.
pub(crate) struct SerialPort {
    uart: Serial<SerialIrq, NoEvents, Console>,
}

impl SerialPort {
    pub(crate) fn new(irq: EventFd, console: Console) -> Self {
        Self { uart: Serial::new(SerialIrq(irq), console) }
    }

    /// The guest reads the register at `offset`.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// The guest writes the register at `offset`.
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        // What can fail: the console, which reports for itself; the receive buffer in loop-back mode,
        // which the guest filled itself; the interrupt, whose counter is full only if nobody looks.
        if let Err(error) = self.uart.write(offset, value) {
            tracing::trace!(?error, "serial port");
        }
    }

    /// The user typed something. Returns how many bytes the port's buffer had room for.
    pub(crate) fn input(&mut self, bytes: &[u8]) -> usize {
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}
