//! The control registers of the built-in guest: console, reports, exit.

use std::io::Write;

use blockhouse_guest::{CONTROL_CONSOLE, CONTROL_DISKS, CONTROL_EXIT, CONTROL_REPORT, Record};
use vm_memory::{Bytes, GuestAddress};

use crate::console::Console;
use crate::machine::ExitReason;
use crate::memory::Memory;

/// The control registers. Only a machine with the built-in guest has them.
pub(crate) struct Control {
    disks: u32,
    memory: Memory,
    console: Console,
    records: Vec<Record>,
}

impl Control {
    pub(crate) fn new(disks: u32, memory: Memory, console: Console) -> Self {
        Self { disks, memory, console, records: Vec::new() }
    }

    /// The guest reads at `offset`; what is no register reads as zero.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == CONTROL_DISKS {
            for (to, from) in data.iter_mut().zip(self.disks.to_le_bytes()) {
                *to = from;
            }
        }
    }

    /// The guest writes at `offset`. Returns how the machine ends, if this ends it.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitReason> {
        match (offset, data) {
            (CONTROL_CONSOLE, text) => {
                // The console reports its own failures.
                let _ = self.console.write(text);
                let _ = self.console.flush();
            }
            (CONTROL_EXIT, &[a, b, c, d]) => return Some(ExitReason::Guest(u32::from_le_bytes([a, b, c, d]))),
            (CONTROL_REPORT, address) => {
                if let Ok(address) = <[u8; 8]>::try_from(address) {
                    self.report(GuestAddress(u64::from_le_bytes(address)));
                }
            }
            _ => {}
        }
        None
    }

    /// Takes a record: one per disk, however often the guest reports.
    fn report(&mut self, address: GuestAddress) {
        let mut bytes = [0; Record::LEN];
        let record = self.memory.read_slice(&mut bytes, address).ok().and_then(|()| Record::decode(&bytes));
        match record {
            Some(record) if record.disk < self.disks && self.records.iter().all(|known| known.disk != record.disk) => {
                self.records.push(record);
            }
            _ => tracing::warn!("the guest reported something that is no record of a disk"),
        }
    }

    /// What was reported, in order of disks.
    pub(crate) fn into_records(mut self) -> Vec<Record> {
        self.records.sort_by_key(|record| record.disk);
        self.records
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use blockhouse_guest::{Finding, SERIAL_LEN};

    use super::*;
    use crate::memory;

    #[test]
    fn only_whole_records_of_existing_disks_are_taken_and_once() {
        let memory = memory::allocate(8 << 20).unwrap();
        let mut control = Control::new(2, memory.clone(), Console::new(Box::new(std::io::sink()), Arc::default()));
        let mut report = |disk: u32, address: u64| {
            let record = Record {
                disk,
                read_only: false,
                bytes: u64::from(disk),
                serial: [0; SERIAL_LEN],
                finding: Finding::ReadError { sector: address },
            };
            let _ = memory.write_slice(&record.encode(), GuestAddress(address));
            assert_eq!(control.write(CONTROL_REPORT, &address.to_le_bytes()), None);
        };
        report(1, 0x1000);
        report(0, 0x2000);
        report(1, 0x3000);
        report(2, 0x4000);
        report(0, (8 << 20) - 8);
        report(0, u64::MAX - 3);
        assert_eq!(control.write(CONTROL_REPORT, &[0; 4]), None);
        let found: Vec<_> = control.into_records().into_iter().map(|r| (r.disk, r.finding)).collect();
        assert_eq!(found, [(0, Finding::ReadError { sector: 0x2000 }), (1, Finding::ReadError { sector: 0x1000 })]);
    }
}
