//! What the operator hears about a device, without letting a guest flood the log.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use blockhouse_block::ErrorKind;

use crate::request::Malformed;

/// What can go wrong with a request, as far as the log tells cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// The disk answered with an error.
    Backend(ErrorKind),
    /// The guest sent something that is not a request.
    Malformed(Malformed),
    /// The guest broke a queue.
    BrokenQueue,
    /// The disk is without what its guest believes to be there.
    Lost,
    /// The guest asked for something that the device or this disk does not do.
    Refused(&'static str),
}

/// Counts faults by kind and logs the 1st, 2nd, 4th, 8th … of each: a guest that repeats a bad
/// request for a year writes some forty lines.
pub(crate) struct Report {
    serial: String,
    counts: Mutex<HashMap<Fault, u64>>,
}

impl Report {
    pub(crate) fn new(serial: String) -> Self {
        Self { serial, counts: Mutex::new(HashMap::new()) }
    }

    /// Counts `fault`, which happened at byte `offset` of the disk if it is about one.
    pub(crate) fn fault(&self, fault: Fault, offset: Option<u64>, detail: &dyn std::fmt::Display) {
        let count = {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(fault).or_insert(0);
            *count = count.saturating_add(1);
            *count
        };
        if !count.is_power_of_two() {
            return;
        }
        let serial = self.serial.as_str();
        match fault {
            Fault::Backend(kind) => {
                tracing::warn!(serial, %kind, offset, count, "disk error, the guest gets an I/O error: {detail}");
            }
            Fault::BrokenQueue | Fault::Lost => tracing::warn!(serial, count, "{detail}"),
            Fault::Malformed(_) | Fault::Refused(_) => {
                tracing::warn!(serial, offset, count, "refused a request of the guest: {detail}");
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn count(&self, fault: Fault) -> u64 {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).get(&fault).copied().unwrap_or(0)
    }
}
