//! The extent map: what the disk remembers of the answers of its layers, flattened, within a budget.
//!
//! ```text
//!   offset >> shift
//!        │      ┌───────────┬───────────┬─────     stripes: the range of about a thousand clusters each
//!        └────▶ │ stripe 0  │ stripe 1  │ …
//!               └────┬──────┴───────────┴─────
//!                    ▼ a table that never changes: whoever changes the stripe puts another one in its place
//!               starts   [ 0      ][ 128    ][ 512 …        sorted, in sectors from the start of the stripe
//!               entries  [ extent ][ extent ][ extent …     non-overlapping; gaps: not known
//! ```
//!
//! A look-up takes no lock and writes to no memory that other threads read: it loads the table of its
//! stripe and searches in a thousand numbers that lie together. The cost depends on neither the size of
//! the disk nor the depth of the chain. Eviction is second-chance, a table at a time: one hand goes around
//! the disk and drops the tables that no look-up has met since it last came by.
//!
//! An extent takes 20 bytes, so positions are kept in sectors. What does not begin and end between
//! sectors, which no image of a known format has, is remembered as far as it does.

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwapOption;

use crate::backend::SECTOR_SIZE;
use crate::chain::MAX_CHAIN_DEPTH;
use crate::files::{FileId, MAX_FILES};
use crate::flat::{Flat, Target};

/// What an extent in the map costs, with its part of the table that holds it.
pub const EXTENT_BYTES: usize = 24;

/// Extents that the clusters of a stripe can be divided into, if no cluster is divided.
const STRIPE_CLUSTERS_SHIFT: u32 = 10;

/// The smallest stripe: 1 MiB.
const MIN_STRIPE_SHIFT: u32 = 20;

/// The most stripes, which take 24 bytes each. Larger disks get larger stripes.
const MAX_STRIPES: u64 = 1 << 17;

/// The smallest stripe of a disk whose top layer has no clusters, 64 MiB: its extents are large, and as many stripes as
/// there can be are 8 TiB, however small it was before it grew.
const STRIPE_SHIFT_WITHOUT_CLUSTERS: u32 = 26;

/// The most stripes of such a disk as it was opened.
const MAX_STRIPES_WITHOUT_CLUSTERS: u64 = 1 << 10;

/// The largest stripe, 2 TiB: its sectors are counted in 32 bits. What is beyond `MAX_STRIPES` of these
/// (2^58 bytes) is not remembered.
const MAX_STRIPE_SHIFT: u32 = 41;

/// How often a map can have twice as many stripes: from one to the most.
const GROWTHS: usize = 17;

/// The most extents of one table, which bounds what a change costs.
const MAX_TABLE_EXTENTS: usize = 16 << 10;

/// The most stripes that one answer is remembered in.
const MAX_STRIPES_OF_AN_ANSWER: usize = 1 << 10;

/// Parts of the counters, so that threads which look up at the same time do not write to the same memory.
const COUNTERS: usize = 16;

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

#[derive(Debug, Default)]
struct Stripe {
    table: ArcSwapOption<Table>,
    /// The generation when it was last changed: answers that are as old as that and older are not remembered.
    invalidated: AtomicU64,
    changing: Mutex<()>,
}

/// The extents of a stripe. No two continue each other.
#[derive(Debug, Default)]
struct Table {
    /// Where each begins, in sectors from the start of the stripe.
    starts: Box<[u32]>,
    entries: Box<[Entry]>,
    /// What entries of packed units point to.
    units: Box<[Unit]>,
    /// Whether a look-up met it since the hand came by.
    used: AtomicBool,
}

/// An extent without its start.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
struct Entry {
    /// Offset in a file, or the place in `units`.
    value: u64,
    /// In sectors.
    length: u32,
    /// Kind, file or nothing, layer: see the constants.
    what: u32,
}

#[derive(Clone, Copy, Debug)]
struct Unit {
    token: u64,
    skip: u32,
    unit: u32,
}

// The bits of `Entry::what`.
const KIND_SHIFT: u32 = 30;
const OVERWRITE: u32 = 1 << 29;
const FILE_SHIFT: u32 = 16;
const FILE_MASK: u32 = 0xfff;
const DEPTH_MASK: u32 = 0xffff;
const DATA: u32 = 0;
const ZERO: u32 = 1;
const UNALLOCATED: u32 = 2;
const PACKED: u32 = 3;

const _: () = assert!(MAX_FILES <= FILE_MASK as usize + 1 && MAX_CHAIN_DEPTH <= DEPTH_MASK as usize);
const _: () = assert!(mem::size_of::<Entry>() + mem::size_of::<u32>() < EXTENT_BYTES);

#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter {
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct ExtentMap {
    /// Those of the disk as it was opened.
    stripes: Box<[Stripe]>,
    /// Those of what it gained since: each time as many as there were before.
    grown: [OnceLock<Box<[Stripe]>>; GROWTHS],
    shift: u32,
    extents: AtomicUsize,
    max_extents: usize,
    /// The stripe that the hand of the eviction points to.
    hand: Mutex<usize>,
    evictions: AtomicU64,
    /// Counts invalidations.
    generation: AtomicU64,
    counters: [Counter; COUNTERS],
}

impl ExtentMap {
    /// A map for a disk of `capacity` bytes in clusters of `cluster_size` (0: none) that uses about
    /// `budget` bytes of memory. With a budget of less than one extent it remembers nothing.
    pub(crate) fn new(capacity: u64, cluster_size: u32, budget: usize) -> Self {
        let (mut shift, most) = match cluster_size.checked_ilog2() {
            Some(cluster) => (cluster + STRIPE_CLUSTERS_SHIFT, MAX_STRIPES),
            None => (STRIPE_SHIFT_WITHOUT_CLUSTERS, MAX_STRIPES_WITHOUT_CLUSTERS),
        };
        shift = shift.clamp(MIN_STRIPE_SHIFT, MAX_STRIPE_SHIFT);
        while shift < MAX_STRIPE_SHIFT && capacity.div_ceil(1 << shift) > most {
            shift += 1;
        }
        let stripes = (0..capacity.div_ceil(1 << shift).clamp(1, MAX_STRIPES)).map(|_| Stripe::default()).collect();
        Self {
            stripes,
            grown: Default::default(),
            shift,
            extents: AtomicUsize::new(0),
            max_extents: budget / EXTENT_BYTES,
            hand: Mutex::default(),
            evictions: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            counters: Default::default(),
        }
    }

    /// Which stripe `offset` is in. May be past the last one.
    pub(crate) fn stripe_of(&self, offset: u64) -> usize {
        usize::try_from(offset >> self.shift).unwrap_or(usize::MAX)
    }

    fn stripe(&self, index: usize) -> Option<&Stripe> {
        self.stripes.get(index).or_else(|| self.grown_stripe(index))
    }

    fn grown_stripe(&self, index: usize) -> Option<&Stripe> {
        let first = self.stripes.len();
        let growth = index.checked_div(first)?.checked_ilog2()?;
        let before = first.checked_shl(growth)?;
        self.grown.get(usize::try_from(growth).ok()?)?.get()?.get(index.checked_sub(before)?)
    }

    /// Makes room for a disk that has `capacity` bytes by now. What is beyond the most stripes is not remembered.
    pub(crate) fn grow(&self, capacity: u64) {
        let most = usize::try_from(MAX_STRIPES).unwrap_or(usize::MAX);
        let wanted = self.stripe_of(capacity.saturating_sub(1)).saturating_add(1).min(most);
        let mut count = self.stripes.len();
        for growth in &self.grown {
            if count >= wanted {
                break;
            }
            growth.get_or_init(|| (0..count).map(|_| Stripe::default()).collect());
            count = count.saturating_mul(2);
        }
    }

    fn stripe_count(&self) -> usize {
        self.grown.iter().filter_map(OnceLock::get).fold(self.stripes.len(), |sum, more| sum.saturating_add(more.len()))
    }

    /// Where a stripe starts, in bytes.
    fn stripe_start(&self, stripe: usize) -> u64 {
        u64::try_from(stripe).unwrap_or(u64::MAX).saturating_mul(1 << self.shift)
    }

    /// What is known from `offset` on: an extent that starts there.
    pub(crate) fn lookup(&self, offset: u64) -> Option<Flat> {
        let found = self.find(offset);
        match found {
            Some(_) => self.count_hits(1),
            None => self.count(|counter| &counter.misses, 1),
        }
        found
    }

    /// As [`lookup`](Self::lookup), and counts nothing.
    pub(crate) fn find(&self, offset: u64) -> Option<Flat> {
        let index = self.stripe_of(offset);
        let table = self.stripe(index)?.table.load();
        let table = table.as_ref()?;
        let flat = table.find(self.stripe_start(index), offset)?;
        // A load first: a store would take the cache line from the other readers every time.
        if !table.used.load(Ordering::Relaxed) {
            table.used.store(true, Ordering::Relaxed);
        }
        Some(flat)
    }

    /// Counts look-ups by [`find`](Self::find) that found an extent. Who counts many at a time spares each of them
    /// a change of memory that other threads read.
    pub(crate) fn count_hits(&self, count: u64) {
        if count > 0 {
            self.count(|counter| &counter.hits, count);
        }
    }

    fn count(&self, of: fn(&Counter) -> &AtomicU64, count: u64) {
        if let Some(counter) = self.counters.get(counter_of_thread()) {
            of(counter).fetch_add(count, Ordering::Relaxed);
        }
    }

    /// To be taken *before* layers are asked for what is inserted afterwards.
    pub(crate) fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::SeqCst))
    }

    /// Remembers extents, which replace what was known of their ranges. At most half of the budget is
    /// taken, from the first extent on. Does nothing for stripes of which a range was invalidated since
    /// `since`: the answers may be older than that.
    pub(crate) fn insert(&self, flats: &[Flat], since: Generation) {
        let mut room = self.max_extents.div_ceil(2).min(self.max_extents);
        let mut stripes = MAX_STRIPES_OF_AN_ANSWER;
        let mut flats = flats.iter().filter_map(whole_sectors);
        let mut next = flats.next();
        // One run after the other: extents that follow each other, inside of one stripe.
        while let Some(first) = next.take().or_else(|| flats.next()) {
            let index = self.stripe_of(first.start);
            let end = self.stripe_start(index.saturating_add(1));
            let Some(stripe) = self.stripe(index).filter(|_| stripes > 0 && room > 0) else { break };
            stripes -= 1;
            let mut run = Vec::new();
            let mut flat = first;
            loop {
                room = room.saturating_sub(1);
                let inside = flat.head(end);
                let position = inside.end();
                run.push(inside);
                if flat.end() > position {
                    next = Some(flat.tail(position));
                    break;
                }
                match flats.next() {
                    Some(follower) if follower.start == position && position < end && room > 0 => flat = follower,
                    other => {
                        next = other;
                        break;
                    }
                }
            }
            self.change(stripe, index, Some(since), &run);
        }
        self.evict();
    }

    /// Forgets a range, and makes sure that answers which are on their way are not remembered.
    pub(crate) fn invalidate(&self, start: u64, length: u64) {
        let end = start.saturating_add(length);
        self.generation.fetch_add(1, Ordering::SeqCst);
        let mut index = self.stripe_of(start);
        let mut position = start;
        while position < end
            && let Some(stripe) = self.stripe(index)
        {
            let cut = self.stripe_start(index.saturating_add(1)).min(end);
            {
                let _changing = stripe.changing.lock().unwrap_or_else(PoisonError::into_inner);
                self.mark(stripe);
                let table = stripe.table.load_full();
                if let Some(table) = table {
                    let rest = table.replaced(self.stripe_start(index), position, cut, &[]);
                    self.replace(stripe, Some(&table), rest);
                }
            }
            position = cut;
            index = index.saturating_add(1);
        }
        // What is forgotten in the middle of an extent leaves two.
        self.evict();
    }

    /// Remembers where a range lives from now on, whatever was known or is on its way.
    pub(crate) fn publish(&self, flat: &Flat) {
        if whole_sectors(flat) != Some(*flat) {
            return self.invalidate(flat.start, flat.length);
        }
        self.generation.fetch_add(1, Ordering::SeqCst);
        let mut rest = *flat;
        while rest.length > 0 {
            let index = self.stripe_of(rest.start);
            let end = self.stripe_start(index.saturating_add(1));
            let Some(stripe) = self.stripe(index) else { break };
            self.change(stripe, index, None, &[rest.head(end)]);
            rest = rest.tail(end.min(rest.end()));
        }
        self.evict();
    }

    /// Refuses answers to questions that were asked before now. The caller has the stripe locked, so that the number
    /// in it never gets less: that of a change which waited for the lock would be older than what others left there.
    fn mark(&self, stripe: &Stripe) {
        stripe.invalidated.store(self.generation().0, Ordering::SeqCst);
    }

    /// Puts a run of extents into a stripe; without `since`, as the newest truth.
    fn change(&self, stripe: &Stripe, index: usize, since: Option<Generation>, run: &[Flat]) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
        let base = self.stripe_start(index);
        let _changing = stripe.changing.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: an invalidation that comes later finds what is inserted here.
        match since {
            Some(since) if stripe.invalidated.load(Ordering::SeqCst) > since.0 => return,
            Some(_) => {}
            None => self.mark(stripe),
        }
        let old = stripe.table.load_full();
        let most = MAX_TABLE_EXTENTS.min(self.max_extents);
        let new = match &old {
            Some(old) if old.len().saturating_add(run.len()) <= most => {
                old.replaced(base, first.start, last.end(), run)
            }
            // Too much for one table: what was asked for last stays.
            _ => {
                let run = run.get(..run.len().min(most)).unwrap_or_default();
                let nothing =
                    Table { used: AtomicBool::new(old.as_ref().is_some_and(|old| old.is_used())), ..Table::default() };
                nothing.replaced(base, first.start, last.end(), run)
            }
        };
        self.replace(stripe, old.as_deref(), new);
    }

    fn replace(&self, stripe: &Stripe, old: Option<&Table>, new: Option<Table>) {
        let (before, after) = (old.map_or(0, Table::len), new.as_ref().map_or(0, Table::len));
        stripe.table.store(new.map(Arc::new));
        if after >= before {
            self.extents.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.extents.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    pub(crate) fn stats(&self) -> MapStats {
        let sum = |of: fn(&Counter) -> &AtomicU64| {
            self.counters.iter().map(|counter| of(counter).load(Ordering::Relaxed)).sum()
        };
        MapStats {
            hits: sum(|counter| &counter.hits),
            misses: sum(|counter| &counter.misses),
            evictions: self.evictions.load(Ordering::Relaxed),
            extents: u64::try_from(self.extents.load(Ordering::Relaxed)).unwrap_or(u64::MAX),
            max_extents: u64::try_from(self.max_extents).unwrap_or(u64::MAX),
        }
    }

    /// Drops tables until the map is within its budget, and a sixteenth below, so that the next insertion
    /// does not pay again.
    fn evict(&self) {
        if self.extents.load(Ordering::Relaxed) <= self.max_extents {
            return;
        }
        let goal = self.max_extents - self.max_extents / 16;
        let mut hand = self.hand.lock().unwrap_or_else(PoisonError::into_inner);
        // Twice around: the first time may only take the marks of use away. Look-ups that put marks
        // back all the while cannot keep this here.
        for _ in 0..self.stripe_count().saturating_mul(2) {
            if self.extents.load(Ordering::Relaxed) <= goal {
                break;
            }
            let stripe = match self.stripe(*hand) {
                Some(stripe) => stripe,
                None => {
                    *hand = 0;
                    let Some(stripe) = self.stripes.first() else { break };
                    stripe
                }
            };
            *hand = hand.saturating_add(1);
            let _changing = stripe.changing.lock().unwrap_or_else(PoisonError::into_inner);
            let table = stripe.table.load_full();
            if let Some(table) = table
                && !table.used.swap(false, Ordering::Relaxed)
            {
                self.replace(stripe, Some(&table), None);
                let dropped = u64::try_from(table.len()).unwrap_or(u64::MAX);
                self.evictions.fetch_add(dropped, Ordering::Relaxed);
            }
        }
    }
}

/// The counter that this thread adds to.
fn counter_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = NEXT.fetch_add(1, Ordering::Relaxed) % COUNTERS;
    }
    OWN.with(|own| *own)
}

/// The part of an extent that is made of whole sectors.
fn whole_sectors(flat: &Flat) -> Option<Flat> {
    let start = flat.start.checked_next_multiple_of(SECTOR_SIZE)?;
    let end = flat.end() / SECTOR_SIZE * SECTOR_SIZE;
    (start < end).then(|| flat.tail(start).head(end))
}

impl Table {
    fn len(&self) -> usize {
        self.entries.len()
    }

    fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// The extent at `offset`, from there on, in a stripe that starts at `base`.
    fn find(&self, base: u64, offset: u64) -> Option<Flat> {
        let sector = u32::try_from(offset.checked_sub(base)? / SECTOR_SIZE).ok()?;
        let index = self.starts.partition_point(|start| *start <= sector).checked_sub(1)?;
        let flat = self.flat(base, index)?;
        (offset < flat.end()).then(|| flat.tail(offset))
    }

    fn flat(&self, base: u64, index: usize) -> Option<Flat> {
        let start = *self.starts.get(index)?;
        let Entry { value, length, what } = *self.entries.get(index)?;
        let target = match what >> KIND_SHIFT {
            DATA => Target::Data {
                file: FileId::from_bits(u16::try_from(what >> FILE_SHIFT & FILE_MASK).ok()?),
                offset: value,
                overwrite: what & OVERWRITE != 0,
            },
            ZERO => Target::Zero,
            UNALLOCATED => Target::Unallocated,
            _ => {
                let Unit { token, skip, unit } = *self.units.get(usize::try_from(value).ok()?)?;
                Target::Packed { token, skip, unit }
            }
        };
        Some(Flat {
            start: position(base, start),
            length: u64::from(length) * SECTOR_SIZE,
            depth: u16::try_from(what & DEPTH_MASK).ok()?,
            target,
        })
    }

    fn flats(&self, base: u64, indices: Range<usize>) -> impl Iterator<Item = Flat> {
        indices.filter_map(move |index| self.flat(base, index))
    }

    /// The table with `run` in the place of `start..end`, or `None` if it is empty then. What is around that is
    /// copied as it lies: a change costs little more than a copy, however many extents there are.
    fn replaced(&self, base: u64, start: u64, end: u64, run: &[Flat]) -> Option<Self> {
        let begin_before = |bytes: u64| self.starts.partition_point(|at| position(base, *at) < bytes);
        let (before, after) = (begin_before(start), begin_before(end));
        // The last one before and the first one after may be cut, or continued by what is new.
        let first = before.saturating_sub(1);
        let mut changed = Vec::with_capacity(run.len().saturating_add(3));
        changed.extend(self.flats(base, first..before).map(|flat| flat.head(start)));
        changed.extend(run);
        let cut = self.flats(base, after.saturating_sub(1)..after).filter(|flat| flat.end() > end);
        changed.extend(cut.map(|flat| flat.tail(end)));
        let rest = after.saturating_add(1);
        changed.extend(self.flats(base, after..rest));
        changed.dedup_by(|next, left| left.merge(next));

        let room = first.saturating_add(changed.len()).saturating_add(self.len().saturating_sub(rest));
        let (mut starts, mut entries) = (Vec::with_capacity(room), Vec::with_capacity(room));
        let mut units = self.units.to_vec();
        starts.extend_from_slice(self.starts.get(..first).unwrap_or_default());
        entries.extend_from_slice(self.entries.get(..first).unwrap_or_default());
        for flat in changed.iter().filter_map(whole_sectors) {
            if let Some((start, entry)) = Entry::of(base, &flat, &mut units) {
                starts.push(start);
                entries.push(entry);
            }
        }
        starts.extend_from_slice(self.starts.get(rest..).unwrap_or_default());
        entries.extend_from_slice(self.entries.get(rest..).unwrap_or_default());
        if entries.is_empty() {
            return None;
        }
        let units = units_in_use(&mut entries, &units);
        Some(Self { starts: starts.into(), entries: entries.into(), units, used: AtomicBool::new(self.is_used()) })
    }
}

/// The byte offset of a place in a stripe that starts at `base`.
fn position(base: u64, sector: u32) -> u64 {
    base.saturating_add(u64::from(sector) * SECTOR_SIZE)
}

impl Entry {
    /// An extent in a stripe that starts at `base`, and where it begins. `None` if it is too long. A packed unit is
    /// added to `units`.
    fn of(base: u64, flat: &Flat, units: &mut Vec<Unit>) -> Option<(u32, Self)> {
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_SIZE).ok();
        let (start, length) = (sectors(flat.start.checked_sub(base)?)?, sectors(flat.length)?);
        let (value, what) = match flat.target {
            Target::Data { file, offset, overwrite } => {
                let overwrite = if overwrite { OVERWRITE } else { 0 };
                (offset, DATA << KIND_SHIFT | overwrite | u32::from(file.bits()) << FILE_SHIFT)
            }
            Target::Zero => (0, ZERO << KIND_SHIFT),
            Target::Unallocated => (0, UNALLOCATED << KIND_SHIFT),
            Target::Packed { token, skip, unit } => {
                units.push(Unit { token, skip, unit });
                (units.len() as u64 - 1, PACKED << KIND_SHIFT)
            }
        };
        Some((start, Self { value, length, what: what | u32::from(flat.depth) }))
    }
}

/// The units that entries point to, which point to their new places then.
fn units_in_use(entries: &mut [Entry], units: &[Unit]) -> Box<[Unit]> {
    let mut in_use = Vec::new();
    // Without units no entry is packed: most tables have none.
    let packed = entries.iter_mut().filter(|entry| !units.is_empty() && entry.what >> KIND_SHIFT == PACKED);
    for entry in packed {
        let value = entry.value;
        let unit = usize::try_from(value).ok().and_then(|index| units.get(index));
        in_use.extend(unit);
        entry.value = (in_use.len() as u64).saturating_sub(1);
    }
    in_use.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
    #![allow(clippy::cast_possible_truncation)]

    use std::thread;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::flat::Target;

    /// An extent that is told from others by its depth and is never joined with them.
    fn flat(start: u64, length: u64, depth: u16) -> Flat {
        Flat { start, length, depth, target: Target::Zero }
    }

    fn map(capacity: u64, extents: usize) -> ExtentMap {
        ExtentMap::new(capacity, 65536, extents * EXTENT_BYTES)
    }

    #[test]
    fn an_extent_in_the_middle_of_another_leaves_both_ends() {
        let map = map(1 << 20, 100);
        map.insert(&[flat(0, 51200, 1)], map.generation());
        map.insert(&[flat(20480, 10240, 2)], map.generation());
        assert_eq!(map.lookup(5120), Some(flat(5120, 15360, 1)));
        assert_eq!(map.lookup(25601), Some(flat(25601, 5119, 2)));
        assert_eq!(map.lookup(30720), Some(flat(30720, 20480, 1)));
        map.invalidate(23000, 2600);
        assert_eq!(map.lookup(23100), None);
        assert_eq!(map.lookup(25600), Some(flat(25600, 5120, 2)));
        assert_eq!(map.stats().extents, 4);
    }

    /// What a disk gained is remembered as what it had before is, and evicted as that is.
    #[test]
    fn a_map_grows_with_its_disk() {
        const STRIPE: u64 = 64 << 20;
        let map = map(3 * STRIPE, 100);
        assert_eq!(map.stripe_count(), 3);
        let everywhere = |map: &ExtentMap| (0..20).filter(|i| map.lookup(i * STRIPE).is_some()).count();
        for i in 0..20 {
            map.insert(&[flat(i * STRIPE, 512, 1)], map.generation());
        }
        assert_eq!(everywhere(&map), 3);
        map.grow(20 * STRIPE);
        assert_eq!(map.stripe_count(), 24, "twice as many, three times");
        // Each has a place of its own.
        for i in 0..20 {
            map.publish(&flat(i * STRIPE, 512, u16::try_from(i).unwrap()));
        }
        for i in 0..20 {
            assert_eq!(map.lookup(i * STRIPE), Some(flat(i * STRIPE, 512, u16::try_from(i).unwrap())));
        }
        map.grow(STRIPE);
        assert_eq!(everywhere(&map), 20, "it never gets smaller");
        map.invalidate(0, u64::MAX);
        assert_eq!((everywhere(&map), map.stats().extents), (0, 0));
        for i in 0..200_u16 {
            map.insert(&[flat(u64::from(i % 20) * STRIPE + u64::from(i) * 1024, 512, i)], map.generation());
        }
        assert!(map.stats().extents <= 100, "what is new is evicted as well");
        map.grow(u64::MAX);
        assert!(map.stripe_count() <= 2 * usize::try_from(MAX_STRIPES).unwrap());
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

    /// One that began before another, and comes to a stripe after it, does not let answers in from between the two.
    #[test]
    fn an_invalidation_that_had_to_wait_hides_no_later_one() {
        const STRIPE: u64 = 64 << 20;
        let map = map(2 * STRIPE, 100);
        let answer = flat(STRIPE + 4096, 512, 1);
        let before = map.generation();
        let since = thread::scope(|scope| {
            let first = map.stripes[0].changing.lock().unwrap();
            scope.spawn(|| map.invalidate(STRIPE - 512, 1024));
            let started = Instant::now();
            while map.generation() == before {
                assert!(started.elapsed().as_secs() < 20, "the invalidation never began");
                thread::yield_now();
            }
            // It is under way, and waits for the first stripe. Somebody asks where something else is now.
            let since = map.generation();
            map.invalidate(answer.start, answer.length);
            drop(first);
            since
        });
        map.insert(&[answer], since);
        assert_eq!(map.lookup(answer.start), None, "where it was before it was forgotten");
    }

    #[test]
    fn what_is_published_is_newer_than_answers_on_their_way() {
        let map = map(1 << 30, 100);
        let since = map.generation();
        map.publish(&flat(65536, 65536, 7));
        map.insert(&[flat(0, 1 << 20, 1)], since);
        assert_eq!(map.lookup(65536), Some(flat(65536, 65536, 7)));
        assert_eq!(map.lookup(0), None);
        // Another stripe is not concerned.
        map.insert(&[flat(512 << 20, 1 << 20, 1)], since);
        assert_eq!(map.lookup(512 << 20), Some(flat(512 << 20, 1 << 20, 1)));
    }

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let map = map(1 << 40, 100);
        map.insert(&[flat(0, 512, 1)], map.generation());
        for index in 1..1000u64 {
            assert!(map.lookup(0).is_some(), "the used extent was dropped at {index}");
            map.insert(&[flat(index << 26, 512, 1)], map.generation());
        }
        let stats = map.stats();
        assert!(stats.extents <= 100 && stats.evictions >= 900, "{stats:?}");
    }

    #[test]
    fn one_stripe_does_not_take_more_than_the_budget() {
        let map = map(1 << 26, 100);
        for index in 0..1000u64 {
            map.insert(&[flat(index * 1024, 512, 1)], map.generation());
            assert!(map.lookup(index * 1024).is_some());
            assert!(map.stats().extents <= 100);
        }
    }

    /// As a guest does that discards every second cluster of a disk.
    #[test]
    fn forgetting_the_middle_of_extents_keeps_the_budget() {
        let map = map(1 << 30, 20);
        for stripe in 0..16 {
            map.insert(&[flat(stripe << 26, 1 << 26, 1)], map.generation());
        }
        for cluster in 0..1 << 14 {
            map.invalidate(cluster << 16, 1 << 15);
            let stats = map.stats();
            assert!(stats.extents <= stats.max_extents, "after {cluster}: {stats:?}");
        }
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

    #[test]
    fn what_has_no_whole_sector_is_not_remembered() {
        let map = map(1 << 20, 100);
        map.insert(&[flat(0, 1000, 1), flat(1000, 100, 2), flat(1100, 1000, 3)], map.generation());
        assert_eq!(map.lookup(0), Some(flat(0, 512, 1)));
        assert_eq!(map.lookup(1000), None);
        assert_eq!(map.lookup(1536), Some(flat(1536, 512, 3)));
        assert_eq!(map.lookup(2048), None);
    }

    #[test]
    fn every_kind_comes_back_as_it_was() {
        let map = map(1 << 30, 100);
        let target = |index| match index % 5 {
            0 => Target::Data { file: FileId::from_bits(4095), offset: u64::MAX >> 1, overwrite: true },
            1 => Target::Packed { token: u64::MAX, skip: (16 << 20) - 512, unit: 16 << 20 },
            2 => Target::Zero,
            3 => Target::Data { file: FileId::from_bits(0), offset: 3, overwrite: false },
            _ => Target::Unallocated,
        };
        let flats: Vec<_> = (0..20)
            .map(|index| Flat { start: index << 20, length: 1 << 20, depth: 1023, target: target(index) })
            .collect();
        map.insert(&flats, map.generation());
        for flat in &flats {
            assert_eq!(map.lookup(flat.start), Some(*flat));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// With room for everything the map equals an array, and has as few extents as possible; three stripes of
        /// 64 MiB, 1 MiB a cell. Cells of one kind continue each other, but for packed ones of another unit.
        #[test]
        fn equals_an_array(steps in prop::collection::vec((0u64..160, 1u64..60, 0u16..6, 0u64..1024), 1..80)) {
            const CELLS: u64 = 160;
            let cell = |index: u64, kind: u16| {
                let start = index << 20;
                let target = match kind {
                    1 => Target::Zero,
                    2 => Target::Unallocated,
                    3 => Target::Packed { token: start >> 22, skip: (start & 0x3f_ffff) as u32, unit: 4 << 20 },
                    _ => Target::Data { file: FileId::from_bits(kind), offset: start, overwrite: kind == 4 },
                };
                Flat { start, length: 1 << 20, depth: kind, target }
            };
            let map = map(CELLS << 20, 10_000);
            let mut model = vec![0u16; CELLS as usize];
            for (start, length, kind, odd) in steps {
                let end = (start + length).min(CELLS);
                let cells: Vec<Flat> = (start..end).map(|index| cell(index, kind)).collect();
                match (kind, cells.as_slice()) {
                    // What is forgotten of a sector is forgotten of all of it.
                    (0, _) => map.invalidate((start << 20) + odd % 512, ((end - start) << 20) - odd % 512 - odd / 512),
                    (_, [one]) => map.publish(one),
                    _ => map.insert(&cells, map.generation()),
                }
                model[start as usize..end as usize].fill(kind);
                for (index, kind) in (0..).zip(&model) {
                    let expected = (*kind != 0).then(|| cell(index, *kind).tail((index << 20) + 512).target);
                    let found = map.lookup((index << 20) + 512);
                    prop_assert_eq!(found.map(|flat| flat.target), expected, "cell {}", index);
                    if let Some(flat) = found {
                        let reach = (flat.end() >> 20) as usize;
                        prop_assert!(model[index as usize..reach].iter().all(|other| other == kind));
                    }
                }
                let begins = |index: usize| model[index] != 0 && (index.is_multiple_of(64)
                    || model[index - 1] != model[index] || model[index] == 3 && index.is_multiple_of(4));
                let fewest = (0..CELLS as usize).filter(|index| begins(*index)).count() as u64;
                prop_assert_eq!(map.stats().extents, fewest);
                let units = |stripe: &Stripe| stripe.table.load().as_ref().map_or(0, |table| table.units.len());
                let packed = (0..CELLS as usize).filter(|index| begins(*index) && model[*index] == 3).count();
                prop_assert_eq!(map.stripes.iter().map(units).sum::<usize>(), packed, "units that nothing points to");
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
        flats.chunks(1024).for_each(|flats| map.insert(flats, map.generation()));
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
