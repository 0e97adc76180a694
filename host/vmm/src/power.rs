//! The ways in which a guest ends the machine by itself.

use crate::layout::{RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
use crate::machine::ExitReason;

/// The keyboard controller's status and command port. It has no keyboard; Linux resets by it.
const I8042_COMMAND: u16 = 0x64;

/// "Pulse the reset line."
const I8042_RESET: u8 = 0xfe;

/// What a guest writes to the ACPI reset register (any value means the same here).
pub(crate) const RESET_VALUE: u8 = 1;

/// In real mode: `mov al, 0xfe; out 0x64, al; hlt`.
///
/// For want of EFI, Linux starts over where the firmware of a PC is, if ACPI says that the hardware is reduced and
/// nothing is said of `reboot=`: it would run through empty memory for ever.
pub(crate) const RESET_CODE: [u8; 5] = [0xb0, I8042_RESET, 0xe6, 0x64, 0xf4];

/// The sleep type of S5, "soft off", as `\_S5` in the DSDT says.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;

/// `SLP_EN` and the place of the sleep type in the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// What a write to a port does to the machine, if anything.
pub(crate) fn write(port: u16, value: u8) -> Option<ExitReason> {
    match port {
        I8042_COMMAND if value == I8042_RESET => Some(ExitReason::Reset),
        RESET_PORT if value == RESET_VALUE => Some(ExitReason::Reset),
        SLEEP_CONTROL_PORT if value & !3 == SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT => {
            Some(ExitReason::Shutdown)
        }
        _ => None,
    }
}

/// What a port reads as, if it is one of these. The keyboard controller is always ready for a
/// command; nothing is ever asleep.
pub(crate) fn read(port: u16) -> Option<u8> {
    matches!(port, I8042_COMMAND | SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT).then_some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_ways_out_and_no_fourth() {
        assert_eq!(write(0x64, 0xfe), Some(ExitReason::Reset));
        assert_eq!(write(RESET_PORT, RESET_VALUE), Some(ExitReason::Reset));
        assert_eq!(write(SLEEP_CONTROL_PORT, 0x34), Some(ExitReason::Shutdown));
        for (port, value) in [(0x64, 0xd1), (0x60, 0xfe), (RESET_PORT, 0), (SLEEP_CONTROL_PORT, 0x14), (0x80, 0)] {
            assert_eq!(write(port, value), None, "{value:#x} to {port:#x}");
        }
    }
}
