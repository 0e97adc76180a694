//! What a client does: a pattern of requests, so many at a time.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Which requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

/// Requests of one size, at random or one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) kind: Kind,
    pub(crate) random: bool,
    pub(crate) size: usize,
    /// From one place to the next: the size, or a cluster.
    pub(crate) step: usize,
    /// Requests in flight on each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    /// The part of the disk that is used.
    pub(crate) from: u64,
    pub(crate) length: u64,
    /// Every place is used once, then the workload ends: for writes that allocate.
    pub(crate) once: bool,
}

impl Workload {
    pub(crate) const fn new(kind: Kind, random: bool, size: usize, depth: usize) -> Self {
        Self { kind, random, size, step: size, depth, queues: 1, from: 0, length: 1 << 30, once: false }
    }

    /// `random-read-4k-d32`.
    pub(crate) fn name(&self) -> String {
        let order = if self.random { "random" } else { "sequential" };
        let kind = match self.kind {
            Kind::Read => "read",
            Kind::Write if self.once => "allocate",
            Kind::Write => "overwrite",
        };
        let size = if self.size >= 1 << 20 { format!("{}m", self.size >> 20) } else { format!("{}k", self.size >> 10) };
        let queues = if self.queues > 1 { format!("-q{}", self.queues) } else { String::new() };
        format!("{order}-{kind}-{size}-d{}{queues}", self.depth)
    }

    /// The places of one queue, in order.
    pub(crate) fn places(&self, queue: usize, round: usize) -> Places {
        let count = (self.length / self.step as u64).max(1);
        let share = (count / self.queues as u64).max(1);
        let first = share * queue as u64;
        Places {
            workload: *self,
            first,
            count: share,
            next: 0,
            // An odd step through a power of two meets every place once before any twice.
            random: (round as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (queue as u64) << 32 | 1,
        }
    }
}

/// Offsets, one after the other.
#[derive(Debug)]
pub(crate) struct Places {
    workload: Workload,
    first: u64,
    count: u64,
    next: u64,
    random: u64,
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let number = self.next;
        self.next += 1;
        if self.workload.once && number >= self.count {
            return None;
        }
        let place = if !self.workload.random {
            number % self.count
        } else if self.workload.once {
            // A permutation: multiplication by an odd number modulo a power of two.
            let modulus = self.count.next_power_of_two();
            let mut place = number;
            loop {
                place = place.wrapping_mul(self.random | 1).wrapping_add(12_345) % modulus;
                if place < self.count {
                    break place;
                }
            }
        } else {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) % self.count
        };
        Some(self.workload.from + (self.first + place) * self.workload.step as u64)
    }
}

/// Something that carries out requests.
pub(crate) trait System {
    /// Carries out a workload for so long, or to its end, and returns how many requests it was and how long
    /// they took.
    fn run(&mut self, workload: &Workload, round: usize, limit: Duration) -> Result<(u64, Duration)>;
}

/// Keeps `depth` requests in flight: `start` begins one in a slot, `ended` returns slots that are free again.
pub(crate) fn keep_busy<S>(
    system: &mut S,
    depth: usize,
    mut places: Places,
    limit: Duration,
    mut start: impl FnMut(&mut S, usize, u64) -> Result<()>,
    mut ended: impl FnMut(&mut S, &mut Vec<usize>) -> Result<()>,
) -> Result<(u64, Duration)> {
    let mut free: Vec<usize> = (0..depth).collect();
    let begun = Instant::now();
    let mut done = 0;
    let mut running = true;
    loop {
        while running && let Some(slot) = free.pop() {
            let Some(place) = places.next() else {
                free.push(slot);
                running = false;
                break;
            };
            start(system, slot, place)?;
        }
        if free.len() == depth {
            break;
        }
        let before = free.len();
        ended(system, &mut free)?;
        done += (free.len() - before) as u64;
        running &= begun.elapsed() < limit;
    }
    Ok((done, begun.elapsed()))
}
