//! How fast a disk may be used: requests and bytes in a second, shared by all of its queues.
//!
//! ```text
//!   debt ▲      ╱│ a request adds what it costs, however much that is
//!  burst ┤─ ─ ─╱─│─ ─ ─ ─ ─ ─ ─   below, the next request is taken; above, it stays in the queue
//!        │    ╱  │╲
//!      0 ┴───╱───┴─╲──────▶ time   time takes it away, so much in a second
//! ```
//!
//! What a request costs is known once it was taken. So one that costs more than there is left is not held back
//! but leaves a debt, and those after it wait for longer: in the long run the rate is kept exactly, and a request
//! that is larger than the burst goes as well.
//!
//! All of it is one number for each limit, the time at which the debt is paid, which queues change without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The unit of time here, a sixteenth of a nanosecond: small against what one byte takes at a realistic rate,
/// and enough of them in 64 bits for 36 years.
const TICKS_PER_NANOSECOND: u64 = 16;
const TICKS_PER_SECOND: u64 = 1_000_000_000 * TICKS_PER_NANOSECOND;

/// So much in a second, and so much at once after a pause. Zero counts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

/// The limits of a disk. None by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Requests of all kinds.
    pub requests: Option<Rate>,
    /// Bytes that are read, written or made zero. A discard moves none.
    pub bytes: Option<Rate>,
}

/// One limit.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    /// The most debt, in ticks, with which a request is taken.
    most: u64,
    /// When the debt is paid, in ticks since the start.
    paid: AtomicU64,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        let mut bucket = Self { per_second: rate.per_second.max(1), most: 0, paid: AtomicU64::new(0) };
        // With a burst of one, one request goes, and then none before it is paid.
        bucket.most = bucket.cost(rate.burst.max(1)).saturating_sub(bucket.cost(1));
        bucket
    }

    /// How long it takes to pay for so much, in ticks.
    fn cost(&self, amount: u64) -> u64 {
        let ticks = u128::from(amount).saturating_mul(TICKS_PER_SECOND.into()).div_ceil(self.per_second.into());
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// How long, in ticks, until a request may be taken.
    fn wait(&self, now: u64) -> u64 {
        self.paid.load(Ordering::Relaxed).saturating_sub(now).saturating_sub(self.most)
    }

    fn charge(&self, now: u64, amount: u64) {
        let cost = self.cost(amount);
        let owe = |paid: u64| Some(paid.max(now).saturating_add(cost));
        let _always = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, owe);
    }
}

/// The limits of one disk as they are kept.
pub(crate) struct Limiter {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    now: Box<dyn Fn() -> Duration + Send + Sync>,
}

impl Limiter {
    /// `None` if there is no limit.
    pub(crate) fn new(limits: &RateLimits) -> Option<Self> {
        let start = Instant::now();
        Self::with_clock(limits, move || start.elapsed())
    }

    /// As `new`, with the time since some moment.
    pub(crate) fn with_clock(limits: &RateLimits, now: impl Fn() -> Duration + Send + Sync + 'static) -> Option<Self> {
        let (requests, bytes) = (limits.requests.map(Bucket::new), limits.bytes.map(Bucket::new));
        (requests.is_some() || bytes.is_some()).then(|| Self { requests, bytes, now: Box::new(now) })
    }

    fn now(&self) -> u64 {
        let now = u64::try_from((self.now)().as_nanos()).unwrap_or(u64::MAX);
        now.saturating_mul(TICKS_PER_NANOSECOND)
    }

    /// How long until the next request may be taken; `None` if that is now.
    pub(crate) fn wait(&self) -> Option<Duration> {
        let now = self.now();
        let ticks = self.requests.iter().chain(&self.bytes).map(|bucket| bucket.wait(now)).max().unwrap_or(0);
        (ticks > 0).then(|| Duration::from_nanos(ticks.div_ceil(TICKS_PER_NANOSECOND)))
    }

    /// A request was taken that moves so many bytes.
    pub(crate) fn charge(&self, bytes: u64) {
        let now = self.now();
        if let Some(requests) = &self.requests {
            requests.charge(now, 1);
        }
        if let Some(of_bytes) = self.bytes.as_ref().filter(|_| bytes > 0) {
            of_bytes.charge(now, bytes);
        }
    }
}

impl std::fmt::Debug for Limiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limiter").field("requests", &self.requests).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    /// A limiter, and its clock in nanoseconds.
    fn limiter(requests: Option<(u64, u64)>, bytes: Option<(u64, u64)>) -> (Limiter, Arc<AtomicU64>) {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        let limits = RateLimits { requests: requests.map(rate), bytes: bytes.map(rate) };
        let clock = Arc::new(AtomicU64::new(0));
        let now = Arc::clone(&clock);
        let limiter = Limiter::with_clock(&limits, move || Duration::from_nanos(now.load(Ordering::Relaxed)));
        (limiter.unwrap(), clock)
    }

    /// How many requests of so many bytes go now.
    fn go(limiter: &Limiter, bytes: u64) -> u64 {
        let mut count = 0;
        while limiter.wait().is_none() {
            limiter.charge(bytes);
            count += 1;
            assert!(count < 100_000, "there is no end");
        }
        count
    }

    fn at(clock: &AtomicU64, milliseconds: u64) {
        clock.store(milliseconds * 1_000_000, Ordering::Relaxed);
    }

    #[test]
    fn a_burst_goes_at_once_and_then_the_rate() {
        let (limiter, clock) = limiter(Some((1000, 50)), None);
        assert_eq!(go(&limiter, 1 << 20), 50);
        at(&clock, 1);
        assert_eq!(go(&limiter, 0), 1);
        at(&clock, 21);
        assert_eq!(go(&limiter, 0), 20);
        // A pause gives a burst, however long it is.
        at(&clock, 3_600_000);
        assert_eq!(go(&limiter, 0), 50);
    }

    #[test]
    fn the_wait_is_as_long_as_it_says() {
        let (limiter, clock) = limiter(Some((1000, 1)), None);
        assert_eq!(go(&limiter, 0), 1);
        let wait = limiter.wait().unwrap();
        assert!(wait >= Duration::from_micros(999) && wait <= Duration::from_millis(1) + Duration::from_nanos(1));
        clock.store(u64::try_from(wait.as_nanos()).unwrap() - 2, Ordering::Relaxed);
        assert!(limiter.wait().is_some());
        clock.store(u64::try_from(wait.as_nanos()).unwrap(), Ordering::Relaxed);
        assert_eq!(go(&limiter, 0), 1);
    }

    #[test]
    fn what_is_larger_than_the_burst_goes_and_is_paid_for() {
        let (limiter, clock) = limiter(None, Some((1 << 20, 4096)));
        assert_eq!(go(&limiter, 1 << 20), 1, "a second's worth");
        at(&clock, 990);
        assert_eq!(go(&limiter, 512), 0);
        at(&clock, 1000);
        assert_eq!(go(&limiter, 512), 8, "the burst, and no more");
        // What moves no bytes costs none.
        let (limiter, _) = self::limiter(None, Some((1, 1)));
        limiter.charge(0);
        assert!(limiter.wait().is_none());
    }

    #[test]
    fn a_wait_is_not_a_part_of_a_nanosecond_too_short() {
        // A third of a second is no whole number of nanoseconds.
        let (limiter, clock) = limiter(Some((3, 1)), None);
        limiter.charge(0);
        assert_eq!(limiter.wait(), Some(Duration::from_nanos(333_333_334)));
        clock.store(333_333_333, Ordering::Relaxed);
        assert_eq!(limiter.wait(), Some(Duration::from_nanos(1)));
        clock.store(333_333_334, Ordering::Relaxed);
        assert_eq!(limiter.wait(), None);
    }

    #[test]
    fn zero_counts_as_one() {
        let (limiter, clock) = limiter(Some((0, 0)), None);
        assert_eq!(go(&limiter, 0), 1);
        at(&clock, 999);
        assert_eq!(go(&limiter, 0), 0);
        at(&clock, 1000);
        assert_eq!(go(&limiter, 0), 1);
    }

    /// What nobody lives to see paid stays a debt.
    #[test]
    fn a_debt_has_an_end_and_is_not_forgotten_there() {
        let (limiter, clock) = limiter(None, Some((1, 1)));
        for amount in [u64::MAX, 1, u64::MAX, 1] {
            limiter.charge(amount);
            assert_eq!(go(&limiter, 1), 0);
        }
        // Ten years.
        at(&clock, 10 * 366 * 86_400_000);
        assert_eq!(go(&limiter, 1), 0);
    }

    #[test]
    fn both_limits_hold() {
        let (limiter, clock) = limiter(Some((100, 100)), Some((4096 * 10, 4096 * 10)));
        assert_eq!(go(&limiter, 4096), 10, "the bytes are the tighter one");
        at(&clock, 1000);
        assert_eq!(go(&limiter, 1), 100, "the requests are");
    }

    /// In the long run it is the rate, whatever the sizes, to a request; and extreme rates do not overflow.
    #[test]
    fn the_long_run_is_exact() {
        let (limiter, clock) = limiter(None, Some((1_000_000_007, 2 << 20)));
        let mut bytes = 0_u64;
        for millisecond in 0..10_000 {
            at(&clock, millisecond);
            while limiter.wait().is_none() {
                limiter.charge(4095);
                bytes += 4095;
            }
        }
        let expected = 1_000_000_007_u64 * 9_999 / 1000 + (2 << 20);
        assert!(bytes.abs_diff(expected) < 8192, "{bytes} of {expected}");
        let (limiter, clock) = self::limiter(Some((u64::MAX, u64::MAX)), Some((1, 1)));
        limiter.charge(u64::MAX);
        clock.store(u64::MAX, Ordering::Relaxed);
        let _ = limiter.wait();
        limiter.charge(u64::MAX);
    }

    #[test]
    fn without_a_limit_there_is_none() {
        assert!(Limiter::new(&RateLimits::default()).is_none());
    }
}
