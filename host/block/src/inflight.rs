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
//! slow at worst. Nobody waits in a circle:
//!
//! * Slots are taken in ascending order. A thread that waits for a hold has no other one; for blocks of a file
//!   (`direct.rs`) it may have one of the disk, and nobody has these the other way round.
//! * The holds of requests that go on in the kernel are taken only where they can be had without waiting, and end
//!   when the thread of their lane sees that the request has. So this thread never waits for a hold, nor for a lock
//!   under which others wait for one: what has to is done by threads that keep no hold (`lane.rs`).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Locks of one disk.
const SLOTS: usize = 256;

/// The smallest unit that is locked: 64 KiB.
const MIN_SHIFT: u32 = 16;

// The bits of a slot's state. The rest counts those who share it.
const ALONE: u32 = 1 << 31;
/// Somebody sleeps, or is about to: whoever lets go wakes, and who comes goes the slow way.
const WAITED_FOR: u32 = 1 << 30;

/// A readers-writer lock whose holds are not tied to a thread or a borrow, so that a request which goes on
/// in the kernel can keep one. Who waits to be alone goes before those who come later to share; who waits to share
/// goes when the next one who was alone lets go. So neither waits for ever, however many come.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    state: AtomicU32,
    waiting: Mutex<Waiting>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Who wants to be alone.
    alone: u32,
    /// Who wants to share. Whoever was alone before them counts them into the state when it lets go.
    sharing: u32,
    /// How often that happened.
    handed_over: u64,
    all: u32,
}

impl Slot {
    /// Shares the slot if that is possible without waiting.
    fn try_share(&self) -> bool {
        let share = |state: u32| (state & (ALONE | WAITED_FOR) == 0).then(|| state.wrapping_add(1));
        self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, share).is_ok()
    }

    fn share(&self) {
        if self.try_share() {
            return;
        }
        let mut waiting = self.wait_for();
        if waiting.alone > 0 || self.state.load(Ordering::Acquire) & ALONE != 0 {
            // Somebody is alone, or will be, and hands the slot over.
            waiting.sharing += 1;
            let handed_over = waiting.handed_over;
            while waiting.handed_over == handed_over {
                waiting = self.sleep(waiting);
            }
        } else {
            self.state.fetch_add(1, Ordering::Acquire);
        }
        self.waited(waiting);
    }

    fn take(&self) {
        if self.state.compare_exchange(0, ALONE, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            return;
        }
        let mut waiting = self.wait_for();
        waiting.alone += 1;
        while self.state.load(Ordering::Acquire) & !WAITED_FOR != 0 {
            waiting = self.sleep(waiting);
        }
        self.state.fetch_or(ALONE, Ordering::Acquire);
        waiting.alone -= 1;
        self.waited(waiting);
    }

    /// As [`take`](Self::take), until then: whether it was had.
    fn take_until(&self, end: Instant) -> bool {
        if self.state.compare_exchange(0, ALONE, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            return true;
        }
        let mut waiting = self.wait_for();
        waiting.alone += 1;
        let mut left = end.saturating_duration_since(Instant::now());
        while self.state.load(Ordering::Acquire) & !WAITED_FOR != 0 && !left.is_zero() {
            waiting = self.released.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
            left = end.saturating_duration_since(Instant::now());
        }
        let had = self.state.load(Ordering::Acquire) & !WAITED_FOR == 0;
        waiting.alone -= 1;
        if had {
            self.state.fetch_or(ALONE, Ordering::Acquire);
        } else if waiting.alone == 0 && self.state.load(Ordering::Acquire) & ALONE == 0 {
            // Nobody is alone who would hand the slot over to those who waited behind this one.
            self.hand_over(&mut waiting, 0);
        }
        self.waited(waiting);
        had
    }

    fn let_go(&self) {
        let before = self.state.fetch_sub(1, Ordering::Release);
        debug_assert!(before & !(ALONE | WAITED_FOR) > 0, "a hold ended twice");
        if before & WAITED_FOR != 0 {
            // Under the lock: who has looked at the state and is about to sleep does sleep by now.
            let _waiting = self.lock();
            self.released.notify_all();
        }
    }

    fn let_go_alone(&self) {
        if self.state.compare_exchange(ALONE, 0, Ordering::Release, Ordering::Relaxed).is_ok() {
            return;
        }
        // In one step, under the lock: nobody who wants to be alone comes in between.
        self.hand_over(&mut self.lock(), ALONE);
    }

    /// Lets those go on who wait to share, and takes a bit out of the state, which whoever was alone has there.
    fn hand_over(&self, waiting: &mut Waiting, alone: u32) {
        let next = std::mem::take(&mut waiting.sharing);
        waiting.handed_over = waiting.handed_over.wrapping_add(1);
        self.state.fetch_sub(alone.wrapping_sub(next), Ordering::AcqRel);
        self.released.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&self) -> MutexGuard<'_, Waiting> {
        let mut waiting = self.lock();
        waiting.all += 1;
        self.state.fetch_or(WAITED_FOR, Ordering::AcqRel);
        waiting
    }

    fn sleep<'s>(&self, waiting: MutexGuard<'s, Waiting>) -> MutexGuard<'s, Waiting> {
        self.released.wait(waiting).unwrap_or_else(PoisonError::into_inner)
    }

    fn waited(&self, mut waiting: MutexGuard<'_, Waiting>) {
        waiting.all -= 1;
        if waiting.all == 0 {
            self.state.fetch_and(!WAITED_FOR, Ordering::AcqRel);
        }
    }
}

/// The table of one disk.
#[derive(Debug)]
pub(crate) struct InFlight {
    slots: Box<[Slot]>,
    shift: u32,
}

/// A range that is read, or overwritten in place. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Shared<'t> {
    table: &'t InFlight,
    range: Range<u64>,
}

/// A range whose mapping may change. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Exclusive<'t> {
    table: &'t InFlight,
    range: Range<u64>,
}

/// A shared range that outlives the call which took it. Must be given to [`InFlight::end`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Kept(Range<u64>);

impl Kept {
    /// A hold of nothing, where there is nobody to wait for.
    pub(crate) fn nothing() -> Self {
        Self(0..0)
    }
}

impl Shared<'_> {
    pub(crate) fn keep(self) -> Kept {
        let range = self.range.clone();
        std::mem::forget(self);
        Kept(range)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.table.slots(&self.range).for_each(Slot::let_go);
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.table.slots(&self.range).for_each(Slot::let_go_alone);
    }
}

impl InFlight {
    /// A table for a disk whose top layer has clusters of this size (0: none).
    pub(crate) fn new(cluster_size: u32) -> Self {
        let shift = cluster_size.checked_ilog2().unwrap_or(0).max(MIN_SHIFT);
        Self { slots: (0..SLOTS).map(|_| Slot::default()).collect(), shift }
    }

    /// Waits until nobody has a part of `start..end` alone.
    pub(crate) fn shared(&self, start: u64, end: u64) -> Shared<'_> {
        let range = start..end;
        self.slots(&range).for_each(Slot::share);
        Shared { table: self, range }
    }

    /// As [`shared`](Self::shared), or `None` where that would have to wait.
    pub(crate) fn try_shared(&self, start: u64, end: u64) -> Option<Shared<'_>> {
        let range = start..end;
        // The usual request is in one granule.
        if let Some(slot) = self.only(&range) {
            return slot.try_share().then(|| Shared { table: self, range });
        }
        let shared = self.slots(&range).take_while(|slot| slot.try_share()).count();
        if shared < self.slots(&range).count() {
            self.slots(&range).take(shared).for_each(Slot::let_go);
            return None;
        }
        Some(Shared { table: self, range })
    }

    /// Ends a hold that was kept.
    pub(crate) fn end(&self, kept: Kept) {
        match self.only(&kept.0) {
            Some(slot) => slot.let_go(),
            None => drop(Shared { table: self, range: kept.0 }),
        }
    }

    /// Waits until nobody has any of the clusters that `start..end` touches.
    pub(crate) fn exclusive(&self, start: u64, end: u64) -> Exclusive<'_> {
        let range = start..end;
        self.slots(&range).for_each(Slot::take);
        Exclusive { table: self, range }
    }

    /// Waits until no request is in flight.
    pub(crate) fn all(&self) -> Exclusive<'_> {
        self.exclusive(0, u64::MAX)
    }

    /// As [`all`](Self::all), or `None` if it takes longer than that: who keeps a hold may be waiting for somebody who
    /// wants it to.
    pub(crate) fn all_within(&self, time: Duration) -> Option<Exclusive<'_>> {
        let now = Instant::now();
        let end = now.checked_add(time).unwrap_or(now);
        let taken = self.slots.iter().take_while(|slot| slot.take_until(end)).count();
        if taken < self.slots.len() {
            self.slots.iter().take(taken).for_each(Slot::let_go_alone);
            return None;
        }
        Some(Exclusive { table: self, range: 0..u64::MAX })
    }

    /// The slot of a range that is in one granule.
    fn only(&self, range: &Range<u64>) -> Option<&Slot> {
        let granule = range.start >> self.shift;
        let inside = range.start < range.end && range.end.wrapping_sub(1) >> self.shift == granule;
        if inside { self.slots.get(usize::try_from(granule % SLOTS as u64).ok()?) } else { None }
    }

    /// The slots of a range, each once, in ascending order.
    fn slots(&self, range: &Range<u64>) -> impl Iterator<Item = &Slot> {
        let (low, high) = self.indices(range.start, range.end);
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

    use super::*;

    /// Eight threads on four slots: nobody is alone with anybody, everybody comes through.
    #[test]
    fn holds_exclude_each_other_under_load() {
        use std::sync::atomic::AtomicI32;
        let table = InFlight::new(1 << 16);
        let users: [AtomicI32; 4] = Default::default();
        thread::scope(|scope| {
            for thread in 0..8u64 {
                let (table, users) = (&table, &users);
                scope.spawn(move || {
                    for step in 0..20_000u64 {
                        let from = (thread * 7 + step * 5) % 4;
                        let to = (from + 1 + step % 2).min(4);
                        let (start, end) = (from << 16, to << 16);
                        let mine = &users[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()];
                        if (step + thread) % 3 == 0 {
                            let hold = table.exclusive(start, end);
                            for user in mine {
                                assert_eq!(user.swap(-1, Ordering::SeqCst), 0, "somebody else was there");
                            }
                            mine.iter().for_each(|user| user.store(0, Ordering::SeqCst));
                            drop(hold);
                            continue;
                        }
                        let hold = match table.try_shared(start, end) {
                            Some(hold) if step % 2 == 0 => {
                                let kept = hold.keep();
                                table.end(kept);
                                continue;
                            }
                            Some(hold) => hold,
                            None => table.shared(start, end),
                        };
                        for user in mine {
                            assert!(user.fetch_add(1, Ordering::SeqCst) >= 0, "somebody was alone");
                        }
                        for user in mine {
                            assert!(user.fetch_sub(1, Ordering::SeqCst) > 0);
                        }
                        drop(hold);
                    }
                });
            }
        });
        assert!(table.slots.iter().all(|slot| slot.state.load(Ordering::SeqCst) == 0));
    }

    #[test]
    fn a_hold_that_would_wait_is_not_had_and_leaves_nothing() {
        let table = InFlight::new(1 << 16);
        let alone = table.exclusive(2 << 16, 3 << 16);
        assert!(table.try_shared(0, 3 << 16).is_none());
        drop(alone);
        drop(table.exclusive(0, u64::MAX));
        let kept = table.try_shared(0, 3 << 16).unwrap().keep();
        table.end(kept);
        drop(table.exclusive(0, u64::MAX));
    }

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

    /// Waits until a slot is as a test needs it.
    fn until(slot: &Slot, is: impl Fn(&Waiting) -> bool) {
        let started = Instant::now();
        while !is(&slot.lock()) {
            assert!(started.elapsed() < Duration::from_secs(20), "never: {slot:?}");
            thread::yield_now();
        }
    }

    /// Sharers and those who want to be alone take turns: a hold of everything, as long discards and zeroes have one
    /// after the other, keeps out nobody who came before it ended, and is kept out by nobody who came after.
    #[test]
    fn who_waits_to_share_goes_before_the_next_one_who_is_alone() {
        let table = InFlight::new(1 << 16);
        let slot = &table.slots[0];
        let order = Mutex::new(Vec::new());
        let entered = |who: &'static str| order.lock().unwrap().push(who);
        let (sender, readers) = mpsc::channel::<()>();
        let readers = Mutex::new(readers);
        thread::scope(|scope| {
            // In here, so that it goes, and all threads end, if something fails.
            let readers_end = sender;
            let first = table.all();
            scope.spawn(|| {
                let _alone = table.all();
                entered("alone");
            });
            until(slot, |waiting| waiting.alone == 1);
            for count in 1..=3 {
                scope.spawn(|| {
                    let _shared = table.shared(0, 4096);
                    entered("early");
                    let _ended = readers.lock().unwrap().recv();
                });
                until(slot, |waiting| waiting.sharing == count);
            }
            drop(first);
            assert_eq!(slot.state.load(Ordering::SeqCst), WAITED_FOR | 3, "all who waited share it at once");
            assert!(table.try_shared(0, 4096).is_none(), "somebody waits to be alone");
            scope.spawn(|| {
                let _shared = table.shared(0, 4096);
                entered("late");
            });
            until(slot, |waiting| waiting.sharing == 1);
            drop(readers_end);
        });
        assert_eq!(order.into_inner().unwrap(), ["early", "early", "early", "alone", "late"]);
        assert!(table.slots.iter().all(|slot| slot.state.load(Ordering::SeqCst) == 0));
    }

    /// Whoever gives up leaves nothing behind, and lets those go on who waited for it.
    #[test]
    fn who_gives_up_waiting_keeps_nobody_out() {
        // For ever, as a thread that nobody lets go on.
        let table: &'static InFlight = Box::leak(Box::new(InFlight::new(1 << 16)));
        let slot = &table.slots[3];
        let (started, long) = (Instant::now(), Duration::from_secs(3600));
        let kept = table.shared(3 << 16, 4 << 16).keep();
        assert!(table.all_within(Duration::ZERO).is_none());
        assert!(table.slots.iter().all(|slot| slot.try_share()), "something was left");
        table.slots.iter().for_each(Slot::let_go);
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let waits = scope.spawn(|| table.all_within(Duration::from_secs(1)).is_none());
            until(slot, |waiting| waiting.alone == 1 || waits.is_finished());
            thread::spawn(move || {
                drop(table.shared(3 << 16, 4 << 16));
                sender.send(()).unwrap();
            });
            until(slot, |waiting| waiting.sharing == 1 || waits.is_finished());
            assert!(waits.join().unwrap(), "it was had together with somebody");
            // It shares the slot with the one that is still there.
            receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        });
        // Another one who wants to be alone goes on waiting, and whoever shares waits for that one.
        thread::scope(|scope| {
            let waits = scope.spawn(|| table.exclusive(3 << 16, 4 << 16));
            until(slot, |waiting| waiting.alone == 1);
            assert!(table.all_within(Duration::from_millis(1)).is_none());
            scope.spawn(|| drop(table.shared(3 << 16, 4 << 16)));
            until(slot, |waiting| waiting.sharing == 1);
            table.end(kept);
            drop(waits.join().unwrap());
        });
        drop(table.all_within(long).unwrap());
        assert!(table.slots.iter().all(|slot| slot.state.load(Ordering::SeqCst) == 0));
        assert!(started.elapsed() < long);
    }
}
