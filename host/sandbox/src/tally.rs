//! How often components were called, and started again: for the operator.

use std::sync::atomic::{AtomicU64, Ordering};

/// The functions that are counted by name: those that a disk calls while it is used.
pub const FUNCTIONS: [&str; 14] = [
    "open", "connect", "begin", "locate", "unpack", "prepare", "commit", "abandon", "zero", "discard", "flush", "pack",
    "finish", "resize",
];

/// Counts what happens with the components of all layers of a disk. See [`Opener::tally`](crate::Opener::tally).
#[derive(Debug, Default)]
pub struct Tally {
    calls: [AtomicU64; FUNCTIONS.len()],
    others: AtomicU64,
    restarts: AtomicU64,
    failures: AtomicU64,
}

impl Tally {
    /// Calls so far, by the name of the function; `other` for those that have no name here.
    pub fn calls(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let named = FUNCTIONS.into_iter().zip(&self.calls);
        let all = named.chain([("other", &self.others)]);
        all.map(|(name, count)| (name, count.load(Ordering::Relaxed))).collect::<Vec<_>>().into_iter()
    }

    /// Components that were started again after they had broken down.
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Calls in which a component broke down: it trapped, or went over a limit.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(crate) fn called(&self, function: &str) {
        let named = FUNCTIONS.iter().position(|name| *name == function).and_then(|at| self.calls.get(at));
        named.unwrap_or(&self.others).fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn restarted(&self) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_name() {
        let tally = Tally::default();
        for function in ["locate", "flush", "locate", "check"] {
            tally.called(function);
        }
        let called: Vec<_> = tally.calls().filter(|(_, count)| *count > 0).collect();
        assert_eq!(called, [("locate", 2), ("flush", 1), ("other", 1)]);
    }
}
