//! What is done to an image. It depends on a seed alone: the process that does it and the one that judges it
//! make the same plan, each for itself.

use crate::images::{SECTOR, Template};

/// Numbers that depend on the seed alone.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds have nothing in common.
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// Which plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Some threads, some dozens of operations, perhaps closed and opened in between.
    Work,
    /// Work of one thread.
    Alone,
    /// An image that somebody left behind is written and closed.
    Recovery,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Open,
    Write,
    Zero { may_unmap: bool },
    Discard,
    Flush,
    Close,
}

/// One operation. The range is in sectors.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    /// Its name in the recording: its place in [`Plan::operations`].
    pub(crate) number: usize,
    pub(crate) phase: usize,
    pub(crate) what: What,
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// What it writes, by sector.
    pub(crate) ids: Vec<u64>,
}

/// From opening to closing, or to being dropped.
pub(crate) struct Phase {
    pub(crate) open: Operation,
    /// Each has a part of the disk for itself.
    pub(crate) threads: Vec<Vec<Operation>>,
    pub(crate) close: Option<Operation>,
}

pub(crate) struct Plan {
    pub(crate) phases: Vec<Phase>,
}

impl Plan {
    pub(crate) fn new(template: &Template, seed: u64, kind: Kind) -> Self {
        let mut random = Random::new(seed);
        let mut maker = Maker {
            template,
            next: 0,
            phase: 0,
            written: 0,
            first_id: 1 << if kind == Kind::Recovery { 41 } else { 40 },
        };
        let (phases, threads) = match kind {
            Kind::Work => (1 + random.below(2), 1 + random.below(3)),
            Kind::Alone => (2, 1),
            Kind::Recovery => (1, 1),
        };
        let mut plan = Self { phases: Vec::new() };
        for phase in 0..phases {
            maker.phase = phase as usize;
            let open = maker.operation(What::Open, 0, 0);
            let sectors = template.size / SECTOR;
            let mut all = Vec::new();
            for thread in 0..threads {
                let (from, to) = (sectors * thread / threads, sectors * (thread + 1) / threads);
                let count = if kind == Kind::Recovery { 3 } else { 4 + random.below(20 / threads) };
                let mut operations: Vec<_> = (0..count).map(|_| maker.random(&mut random, from, to)).collect();
                if kind == Kind::Recovery {
                    operations.push(maker.operation(What::Flush, 0, 0));
                }
                all.push(operations);
            }
            let closed = kind == Kind::Recovery || random.below(3) > 0;
            let close = closed.then(|| maker.operation(What::Close, 0, 0));
            plan.phases.push(Phase { open, threads: all, close });
        }
        plan
    }

    pub(crate) fn operations(&self) -> Vec<&Operation> {
        let mut all: Vec<_> = self
            .phases
            .iter()
            .flat_map(|phase| {
                std::iter::once(&phase.open).chain(phase.threads.iter().flatten()).chain(phase.close.as_ref())
            })
            .collect();
        all.sort_by_key(|operation| operation.number);
        all
    }

    pub(crate) fn threads(&self) -> usize {
        self.phases.iter().map(|phase| phase.threads.len()).max().unwrap_or(0)
    }
}

struct Maker<'a> {
    template: &'a Template,
    next: usize,
    phase: usize,
    first_id: u64,
    /// The end of the cluster that was written last, in sectors.
    written: u64,
}

impl Maker<'_> {
    fn operation(&mut self, what: What, first: u64, count: u64) -> Operation {
        let number = self.next;
        self.next += 1;
        let id = self.first_id + number as u64 * (1 << 20);
        let ids = match what {
            What::Write => (0..count).map(|sector| id + sector).collect(),
            What::Zero { .. } | What::Discard => vec![0; count as usize],
            What::Open | What::Flush | What::Close => Vec::new(),
        };
        Operation { number, phase: self.phase, what, first, count, ids }
    }

    /// An operation on the sectors `from..to`.
    fn random(&mut self, random: &mut Random, from: u64, to: u64) -> Operation {
        let cluster = self.template.cluster / SECTOR;
        let end = self.template.size / SECTOR;
        // Whole clusters; the end of the disk ends one.
        let (first, last) = (from.div_ceil(cluster), if to == end { to.div_ceil(cluster) } else { to / cluster });
        let anywhere = |random: &mut Random| {
            let start = from + random.below(to - from);
            (start, 1 + random.below((3 * cluster).clamp(4, 700).min(to - start)))
        };
        let whole = |random: &mut Random| {
            let start = first + random.below(last - first);
            let stop = start + 1 + random.below((last - start).min(6));
            (start * cluster, (stop * cluster).min(to) - start * cluster)
        };
        let (what, (start, count)) = match random.below(10) {
            // From the end of the cluster that was written last.
            0..=1 if (from..to).contains(&self.written) => {
                let start = self.written;
                (What::Write, (start, (1 + random.below(cluster * 2)).min(to - start)))
            }
            0..=4 => (What::Write, anywhere(random)),
            5 => (What::Zero { may_unmap: random.below(2) == 0 }, anywhere(random)),
            6 if first < last => (What::Zero { may_unmap: random.below(4) > 0 }, whole(random)),
            7 if first < last => (What::Discard, whole(random)),
            _ => (What::Flush, (0, 0)),
        };
        if what == What::Write {
            self.written = (start + count).next_multiple_of(cluster);
        }
        self.operation(what, start, count)
    }
}
