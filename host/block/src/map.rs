//! The extent map: what the disk remembers of the answers of its layers, flattened, within a budget.
//!
//! ```text
//!   offset >> shift
//!        │      ┌───────────┬───────────┬─────     one lock for each stripe of the disk,
//!        └────▶ │ stripe 0  │ stripe 1  │ …        at most MAX_STRIPES stripes
//!               └────┬──────┴───────────┴─────
//!                    ▼ sorted, non-overlapping, each inside its stripe
//!               [ extent ]   [ extent ][ extent ]       gaps: not known
//! ```
//!
//! A look-up takes one shared lock and searches one ordered tree; the cost depends on neither the size
//! of the disk nor the depth of the chain. Eviction is second-chance: one hand goes around the disk and
//! drops the extents that no look-up has met since it last came by.

use std::collections::BTreeMap;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use crate::flat::Flat;

/// What an extent in the map costs. A B-tree that is filled in order keeps its nodes half full.
pub const EXTENT_BYTES: usize = 2 * (mem::size_of::<u64>() + mem::size_of::<Entry>());

/// The smallest stripe: 64 MiB, the range of a question to a layer.
const MIN_STRIPE_SHIFT: u32 = 26;

/// The most stripes. Larger disks get larger stripes.
const MAX_STRIPES: u64 = 4096;

#[derive(Debug)]
struct Entry {
    flat: Flat,
    /// Whether a look-up met it since the hand came by.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Stripe {
    extents: RwLock<BTreeMap<u64, Entry>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// What the map did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapStats {
    /// Look-ups that found an extent.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Extents that were dropped to stay within the budget.
    pub evictions: u64,
    /// Extents in the map now.
    pub extents: u64,
    /// The most extents that the budget allows.
    pub max_extents: u64,
}

/// Proves that no range was invalidated since it was taken. See [`ExtentMap::insert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation(u64);

/// Position of the hand: a stripe and an offset.
#[derive(Debug, Default)]
struct Hand {
    stripe: usize,
    offset: u64,
}

#[derive(Debug)]
pub(crate) struct ExtentMap {
    stripes: Box<[Stripe]>,
    shift: u32,
    count: AtomicUsize,
    max_extents: usize,
    hand: Mutex<Hand>,
    evictions: AtomicU64,
    generation: AtomicU64,
}

impl ExtentMap {
    /// A map for a disk of `capacity` bytes that uses about `budget` bytes of memory, and room for at
    /// least one extent.
    pub(crate) fn new(capacity: u64, budget: usize) -> Self {
        let mut shift = MIN_STRIPE_SHIFT;
        while capacity.div_ceil(1 << shift) > MAX_STRIPES {
            shift += 1;
        }
        let stripes = (0..capacity.div_ceil(1 << shift)).map(|_| Stripe::default()).collect();
        Self {
            stripes,
            shift,
            count: AtomicUsize::new(0),
            max_extents: (budget / EXTENT_BYTES).max(1),
            hand: Mutex::default(),
            evictions: AtomicU64::new(0),
            generation: AtomicU64::new(0),
        }
    }

    /// Which part of the disk shares a lock with `offset`.
    pub(crate) fn stripe_of(&self, offset: u64) -> usize {
        usize::try_from(offset >> self.shift).unwrap_or(usize::MAX)
    }

    /// The end of a stripe in bytes.
    fn stripe_end(&self, stripe: usize) -> u64 {
        u64::try_from(stripe).unwrap_or(u64::MAX).saturating_add(1).saturating_mul(1 << self.shift)
    }

    /// What is known from `offset` on: an extent that starts there.
    pub(crate) fn lookup(&self, offset: u64) -> Option<Flat> {
        let stripe = self.stripes.get(self.stripe_of(offset))?;
        let extents = stripe.extents.read().unwrap_or_else(PoisonError::into_inner);
        let found = extents.range(..=offset).next_back().filter(|(_, entry)| offset < entry.flat.end());
        let Some((_, entry)) = found else {
            stripe.misses.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        stripe.hits.fetch_add(1, Ordering::Relaxed);
        // A load first: a store would take the cache line from the other readers every time.
        if !entry.used.load(Ordering::Relaxed) {
            entry.used.store(true, Ordering::Relaxed);
        }
        Some(entry.flat.tail(offset))
    }

    /// To be taken *before* layers are asked for what is inserted afterwards.
    pub(crate) fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::SeqCst))
    }

    /// Remembers extents, which replace what was known of their ranges. At most half of the budget is
    /// taken, from the first extent on. Does nothing if a range was invalidated since `since`: the
    /// answers may be older than that.
    pub(crate) fn insert(&self, flats: &[Flat], since: Generation) {
        let mut room = self.max_extents.div_ceil(2);
        'flats: for flat in flats {
            let mut rest = *flat;
            while rest.length > 0 {
                if room == 0 {
                    break 'flats;
                }
                room -= 1;
                let index = self.stripe_of(rest.start);
                let cut = self.stripe_end(index).min(rest.end());
                let Some(stripe) = self.stripes.get(index) else { break 'flats };
                let mut extents = stripe.extents.write().unwrap_or_else(PoisonError::into_inner);
                // Under the lock: an invalidation that comes later finds what is inserted here.
                if self.generation() != since {
                    break 'flats;
                }
                let before = extents.len();
                insert_one(&mut extents, rest.head(cut));
                let after = extents.len();
                drop(extents);
                self.count_change(before, after);
                rest = rest.tail(cut);
            }
        }
        self.evict();
    }

    /// Forgets a range, and makes sure that answers which are on their way are not remembered.
    pub(crate) fn invalidate(&self, start: u64, length: u64) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        let end = start.saturating_add(length);
        let mut position = start;
        while position < end {
            let index = self.stripe_of(position);
            let cut = self.stripe_end(index).min(end);
            let Some(stripe) = self.stripes.get(index) else { return };
            let mut extents = stripe.extents.write().unwrap_or_else(PoisonError::into_inner);
            let before = extents.len();
            clear(&mut extents, position, cut);
            let after = extents.len();
            drop(extents);
            self.count_change(before, after);
            position = cut;
        }
    }

    pub(crate) fn stats(&self) -> MapStats {
        let sum = |counter: fn(&Stripe) -> &AtomicU64| {
            self.stripes.iter().map(|stripe| counter(stripe).load(Ordering::Relaxed)).sum()
        };
        MapStats {
            hits: sum(|stripe| &stripe.hits),
            misses: sum(|stripe| &stripe.misses),
            evictions: self.evictions.load(Ordering::Relaxed),
            extents: u64::try_from(self.count.load(Ordering::Relaxed)).unwrap_or(u64::MAX),
            max_extents: u64::try_from(self.max_extents).unwrap_or(u64::MAX),
        }
    }

    fn count_change(&self, before: usize, after: usize) {
        if after >= before {
            self.count.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.count.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Drops extents until the map is within its budget, and a sixteenth below, so that the next
    /// insertion does not pay again.
    fn evict(&self) {
        if self.count.load(Ordering::Relaxed) <= self.max_extents {
            return;
        }
        let goal = self.max_extents - self.max_extents / 16;
        let mut hand = self.hand.lock().unwrap_or_else(PoisonError::into_inner);
        // Twice around: the first time may only take the marks of use away. Look-ups that put marks
        // back all the while cannot keep this here.
        let mut visits = self.stripes.len().saturating_mul(2).saturating_add(1);
        while visits > 0 {
            let excess = self.count.load(Ordering::Relaxed).saturating_sub(goal);
            if excess == 0 {
                break;
            }
            let Some(stripe) = self.stripes.get(hand.stripe) else {
                *hand = Hand::default();
                continue;
            };
            let mut extents = stripe.extents.write().unwrap_or_else(PoisonError::into_inner);
            let mut dropped = 0;
            let mut last = 0;
            let unused = extents.extract_if(hand.offset.., |_, entry| !mem::take(entry.used.get_mut()));
            for (start, _) in unused.take(excess) {
                dropped += 1;
                last = start;
            }
            drop(extents);
            self.count.fetch_sub(dropped, Ordering::Relaxed);
            self.evictions.fetch_add(u64::try_from(dropped).unwrap_or(u64::MAX), Ordering::Relaxed);
            if dropped == excess {
                hand.offset = last.saturating_add(1);
            } else {
                *hand = Hand { stripe: hand.stripe + 1, offset: 0 };
                visits -= 1;
            }
        }
    }
}

/// Puts one extent into a stripe, as part of its left neighbour where it continues that.
fn insert_one(extents: &mut BTreeMap<u64, Entry>, flat: Flat) {
    clear(extents, flat.start, flat.end());
    if let Some((_, left)) = extents.range_mut(..flat.start).next_back()
        && left.flat.merge(&flat)
    {
        return;
    }
    extents.insert(flat.start, Entry { flat, used: AtomicBool::new(false) });
}

/// Forgets `start..end` in a stripe.
fn clear(extents: &mut BTreeMap<u64, Entry>, start: u64, end: u64) {
    let mut rests: [Option<Flat>; 2] = [None, None];
    if let Some((_, left)) = extents.range_mut(..start).next_back()
        && left.flat.end() > start
    {
        if left.flat.end() > end {
            rests[0] = Some(left.flat.tail(end));
        }
        left.flat = left.flat.head(start);
    }
    for (_, entry) in extents.extract_if(start..end, |_, _| true) {
        if entry.flat.end() > end {
            rests[1] = Some(entry.flat.tail(end));
        }
    }
    for flat in rests.into_iter().flatten() {
        extents.insert(flat.start, Entry { flat, used: AtomicBool::new(false) });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
    #![allow(clippy::cast_possible_truncation)]

    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::flat::Target;

    /// An extent that is told from others by its depth and is never joined with them.
    fn flat(start: u64, length: u64, depth: u16) -> Flat {
        Flat { start, length, depth, target: Target::Zero }
    }

    fn map(capacity: u64, extents: usize) -> ExtentMap {
        ExtentMap::new(capacity, extents * EXTENT_BYTES)
    }

    #[test]
    fn an_extent_in_the_middle_of_another_leaves_both_ends() {
        let map = map(1 << 20, 100);
        map.insert(&[flat(0, 100, 1)], map.generation());
        map.insert(&[flat(40, 20, 2)], map.generation());
        assert_eq!(map.lookup(10), Some(flat(10, 30, 1)));
        assert_eq!(map.lookup(50), Some(flat(50, 10, 2)));
        assert_eq!(map.lookup(60), Some(flat(60, 40, 1)));
        map.invalidate(45, 5);
        assert_eq!(map.lookup(45), None);
        assert_eq!(map.lookup(50), Some(flat(50, 10, 2)));
        assert_eq!(map.stats().extents, 4);
    }

    #[test]
    fn an_answer_older_than_an_invalidation_is_not_remembered() {
        let map = map(1 << 20, 100);
        let since = map.generation();
        map.invalidate(4096, 512);
        map.insert(&[flat(0, 8192, 1)], since);
        assert_eq!(map.lookup(0), None);
        map.insert(&[flat(0, 8192, 1)], map.generation());
        assert_eq!(map.lookup(0), Some(flat(0, 8192, 1)));
    }

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let map = map(1 << 30, 100);
        map.insert(&[flat(0, 512, 1)], map.generation());
        for index in 1..1000u64 {
            assert!(map.lookup(0).is_some(), "the used extent was dropped at {index}");
            map.insert(&[flat(index * 1024, 512, 1)], map.generation());
        }
        let stats = map.stats();
        assert!(stats.extents <= 100 && stats.evictions >= 900, "{stats:?}");
    }

    #[test]
    fn neighbours_that_continue_each_other_are_one() {
        let map = map(1 << 30, 100);
        let parts: Vec<_> = (0..1000).map(|index| flat(index * 512, 512, 3)).collect();
        for part in &parts {
            map.insert(std::slice::from_ref(part), map.generation());
        }
        assert_eq!(map.stats().extents, 1);
        assert_eq!(map.lookup(512), Some(flat(512, 999 * 512, 3)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// With room for everything the map equals an array; three stripes of 64 MiB, 1 MiB a cell.
        #[test]
        fn equals_an_array(steps in prop::collection::vec((0u64..160, 1u64..60, 0u16..6), 1..80)) {
            const CELLS: u64 = 160;
            let map = map(CELLS << 20, 10_000);
            let mut model = vec![0u16; CELLS as usize];
            for (start, length, depth) in steps {
                let length = length.min(CELLS - start);
                if depth == 0 {
                    map.invalidate(start << 20, length << 20);
                } else {
                    map.insert(&[flat(start << 20, length << 20, depth)], map.generation());
                }
                model[start as usize..(start + length) as usize].fill(depth);
                for cell in 0..CELLS {
                    let found = map.lookup((cell << 20) + 1);
                    prop_assert_eq!(found.map_or(0, |flat| flat.depth), model[cell as usize]);
                    if let Some(flat) = found {
                        let reach = (flat.end() >> 20) as usize;
                        prop_assert!(model[cell as usize..reach].iter().all(|depth| *depth == flat.depth));
                    }
                }
            }
        }
    }

    /// Not a promise, which would depend on the machine; a look-up that became a search of everything
    /// would take a hundred times as long as this allows.
    #[test]
    fn a_look_up_is_fast_among_many() {
        const EXTENTS: u64 = 100_000;
        let map = map(EXTENTS << 16, 4 * EXTENTS as usize);
        let flats: Vec<_> = (0..EXTENTS).map(|index| flat(index << 16, 1 << 16, (index % 2) as u16)).collect();
        flats.iter().for_each(|flat| map.insert(std::slice::from_ref(flat), map.generation()));
        assert_eq!(map.stats().extents, EXTENTS);
        let mut offset = 0u64;
        let start = Instant::now();
        for _ in 0..1_000_000 {
            offset = offset.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::hint::black_box(map.lookup((offset >> 20) % (EXTENTS << 16)).unwrap());
        }
        let nanoseconds = start.elapsed().as_nanos() / 1_000_000;
        println!("{nanoseconds} ns for each look-up among {EXTENTS} extents");
        assert!(nanoseconds < 5000, "{nanoseconds} ns");
    }
}
