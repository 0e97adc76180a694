//! Which parts of a disk are being used right now, so that a look-up and the I/O that follows from it are
//! one step for everybody who changes the mapping.
//!
//! ```text
//!   offset >> shift     granule: a cluster, or 64 KiB if clusters are smaller
//!        │ % SLOTS
//!        ▼
//!   [ slot 0 ][ slot 1 ] … [ slot 255 ]     each a readers-writer lock on a cache line of its own
//! ```
//!
//! Reads and overwrites in place share a range. Whoever changes where bytes live (an allocating write,
//! zeroes, a discard) has it alone. So when space is unmapped no request is on its way to it any more,
//! and none can find it afterwards. Ranges whose slots are the same by chance wait for each other, which is
//! slow at worst. Slots are taken in ascending order and no thread takes two holds, so that nobody waits
//! in a circle.

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locks of one disk.
const SLOTS: usize = 256;

/// The smallest unit that is locked: 64 KiB.
const MIN_SHIFT: u32 = 16;

/// Slots of a hold that need no allocation: a request of 128 KiB covers at most three granules.
const NEAR: usize = 4;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot(RwLock<()>);

/// The table of one disk.
#[derive(Debug)]
pub(crate) struct InFlight {
    slots: Box<[Slot]>,
    shift: u32,
}

/// A range that is read, or overwritten in place. Ends when dropped.
#[derive(Debug, Default)]
pub(crate) struct Shared<'t> {
    _near: [Option<RwLockReadGuard<'t, ()>>; NEAR],
    _far: Vec<RwLockReadGuard<'t, ()>>,
}

/// A range whose mapping may change. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Exclusive<'t> {
    _slots: Vec<RwLockWriteGuard<'t, ()>>,
}

impl InFlight {
    /// A table for a disk whose top layer has clusters of this size (0: none).
    pub(crate) fn new(cluster_size: u32) -> Self {
        let shift = cluster_size.checked_ilog2().unwrap_or(0).max(MIN_SHIFT);
        Self { slots: (0..SLOTS).map(|_| Slot::default()).collect(), shift }
    }

    /// Waits until nobody has a part of `start..end` alone.
    pub(crate) fn shared(&self, start: u64, end: u64) -> Shared<'_> {
        let mut slots = self.slots(start, end).map(|slot| slot.0.read().unwrap_or_else(PoisonError::into_inner));
        let near = std::array::from_fn(|_| slots.next());
        Shared { _near: near, _far: slots.collect() }
    }

    /// Waits until nobody has any of the clusters that `start..end` touches.
    pub(crate) fn exclusive(&self, start: u64, end: u64) -> Exclusive<'_> {
        let slots = self.slots(start, end).map(|slot| slot.0.write().unwrap_or_else(PoisonError::into_inner));
        Exclusive { _slots: slots.collect() }
    }

    /// Waits until no request is in flight.
    pub(crate) fn all(&self) -> Exclusive<'_> {
        self.exclusive(0, u64::MAX)
    }

    /// The slots of a range, each once, in ascending order.
    fn slots(&self, start: u64, end: u64) -> impl Iterator<Item = &Slot> {
        let (low, high) = self.indices(start, end);
        low.chain(high).filter_map(|index| self.slots.get(index))
    }

    fn indices(&self, start: u64, end: u64) -> (Range<usize>, Range<usize>) {
        let Some(last) = end.checked_sub(1).filter(|last| *last >= start) else { return (0..0, 0..0) };
        let (first, last) = (start >> self.shift, last >> self.shift);
        let count = usize::try_from(last - first).unwrap_or(usize::MAX).saturating_add(1);
        if count >= SLOTS {
            return (0..SLOTS, 0..0);
        }
        let from = usize::try_from(first % SLOTS as u64).unwrap_or(0);
        let to = from + count;
        if to <= SLOTS { (from..to, 0..0) } else { (0..to - SLOTS, from..SLOTS) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn covered(table: &InFlight, start: u64, end: u64) -> Vec<usize> {
        let (low, high) = table.indices(start, end);
        low.chain(high).collect()
    }

    #[test]
    fn a_range_covers_its_granules_once_and_in_order() {
        let table = InFlight::new(0);
        assert_eq!(covered(&table, 0, 1), [0]);
        assert_eq!(covered(&table, 65535, 65537), [0, 1]);
        assert_eq!(covered(&table, 5, 5), [0usize; 0]);
        assert_eq!(covered(&table, 255 << 16, 257 << 16), [0, 255]);
        assert_eq!(covered(&table, 0, 256 << 16).len(), SLOTS);
        assert_eq!(covered(&table, 1, u64::MAX).len(), SLOTS);
        assert_eq!(covered(&InFlight::new(2 << 20), 0, 2 << 20), [0]);
    }

    #[test]
    fn clusters_are_shared_or_alone() {
        let table = InFlight::new(1 << 16);
        let shared = table.shared(0, 1 << 20);
        drop(table.shared(4096, 8192));
        drop(table.exclusive(1 << 20, 2 << 20));
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                drop(table.exclusive((1 << 20) - 1, 2 << 20));
                sender.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err(), "a shared cluster was had alone");
            drop(shared);
            receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        });
    }
}
