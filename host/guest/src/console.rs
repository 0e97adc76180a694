//! Text for people, written to the machine's console register.

use core::fmt;

use blockhouse_guest::{CONTROL_BASE, CONTROL_CONSOLE};

use crate::mmio::Registers;

/// The console. Every write leaves the virtual machine, so it sends eight bytes at a time.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let control = Registers::at(CONTROL_BASE);
        let (words, rest) = text.as_bytes().as_chunks::<8>();
        for word in words {
            control.write_u64(CONTROL_CONSOLE, u64::from_le_bytes(*word));
        }
        for byte in rest {
            control.write_u8(CONTROL_CONSOLE, *byte);
        }
        Ok(())
    }
}
