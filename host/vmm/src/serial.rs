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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::Error::other("a screen that cannot be flushed"))
        }
    }

    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const DATA_READY: u8 = 1;

    #[test]
    fn text_goes_out_and_typing_comes_in_with_an_interrupt() {
        let screen = Screen::default();
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut port =
            SerialPort::new(irq.try_clone().unwrap(), Console::new(Box::new(screen.clone()), Arc::default()));
        for byte in b"hello" {
            port.write(DATA, *byte);
        }
        assert_eq!(*screen.0.lock().unwrap(), b"hello");

        port.write(INTERRUPT_ENABLE, 1);
        assert!(irq.read().is_err());
        assert_eq!(port.input(&[b'x'; 100]), 64, "as many as the buffer holds");
        assert_eq!(port.input(b"y"), 0);
        assert_eq!(irq.read().unwrap(), 1);
        let mut typed = Vec::new();
        while port.read(LINE_STATUS) & DATA_READY != 0 {
            typed.push(port.read(DATA));
        }
        assert_eq!(typed, [b'x'; 64]);
        assert_eq!(port.input(b"y"), 1);
    }
}
