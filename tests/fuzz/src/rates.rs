//! The limits of a disk (`iops=`, `bps=`), beside the same in exact arithmetic.
//!
//! Whatever the rates, the sizes and the times are: a request goes only while what is owed is below the burst, so that
//! in any time no more goes than the rate times that time, the burst, and the request that went last. Nobody waits for
//! longer than it takes to pay what is owed, and once that wait is over, the next request goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arbitrary::{Result, Unstructured};

use crate::included::limit::{Limiter, Rate, RateLimits};
use crate::say;

/// The limiter counts sixteenths of a nanosecond. Here, what is owed is counted in parts of a request, or of a byte, of
/// which a rate of one pays one in such a time: then nothing has to be rounded.
const TICKS: u128 = 16;
const ONE: u128 = 1_000_000_000 * TICKS;
/// Half of what the limiter can count, 18 years. What is owed for longer is not paid in the life of a host.
const HORIZON: u128 = 1 << 63;

/// A limit in exact arithmetic.
struct Exact {
    rate: u128,
    burst: u128,
    /// What is owed.
    owed: u128,
    /// The same, if each request is charged a tick too much, which is what rounding may add.
    rounded: u128,
}

impl Exact {
    fn new(rate: Rate) -> Self {
        let Rate { per_second, burst } = rate;
        Self { rate: per_second.max(1).into(), burst: burst.max(1).into(), owed: 0, rounded: 0 }
    }

    fn charge(&mut self, amount: u64) {
        self.owed += u128::from(amount) * ONE;
        self.rounded += u128::from(amount) * ONE + self.rate;
    }

    fn pass(&mut self, nanoseconds: u64) {
        let paid = u128::from(nanoseconds) * TICKS * self.rate;
        self.owed = self.owed.saturating_sub(paid);
        self.rounded = self.rounded.saturating_sub(paid);
    }

    fn is_beyond(&self) -> bool {
        self.rounded / self.rate >= HORIZON
    }

    /// What may be owed when a request goes.
    fn room(&self) -> u128 {
        (self.burst - 1) * ONE
    }

    /// Whether a request may go. The burst as a time is rounded, too.
    fn may_go(&self) -> bool {
        self.is_beyond() || self.owed <= self.room() + self.rate
    }

    /// Whether it may have to wait for so long.
    fn may_wait(&self, nanoseconds: u128) -> bool {
        let ticks = (nanoseconds - 1) * TICKS + 1;
        self.is_beyond() || (ticks * self.rate).saturating_add(self.room()) <= self.rounded + self.rate
    }
}

pub(crate) fn run(data: &[u8]) {
    let _input_ends = limit(&mut Unstructured::new(data));
}

fn some_number(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=5u8)? {
        0 => u.arbitrary()?,
        1 => u64::MAX - u64::from(u.arbitrary::<u8>()?),
        2 => 1 << u.int_in_range(0..=63)?,
        3 => u.arbitrary::<u32>()?.into(),
        _ => u.arbitrary::<u16>()?.into(),
    })
}

fn some_rate(u: &mut Unstructured<'_>) -> Result<Option<Rate>> {
    if u.ratio(1, 4)? {
        return Ok(None);
    }
    Ok(Some(Rate { per_second: some_number(u)?, burst: some_number(u)? }))
}

fn limit(u: &mut Unstructured<'_>) -> Result<()> {
    let limits = RateLimits { requests: some_rate(u)?, bytes: some_rate(u)? };
    let clock = Arc::new(AtomicU64::new(0));
    let now = Arc::clone(&clock);
    let limiter = Limiter::with_clock(&limits, move || Duration::from_nanos(now.load(Ordering::Relaxed)));
    assert_eq!(limiter.is_some(), limits != RateLimits::default());
    let Some(limiter) = limiter else { return Ok(()) };
    let (mut requests, mut bytes) = (limits.requests.map(Exact::new), limits.bytes.map(Exact::new));
    say!("{limits:?}");
    for _ in 0..100 {
        if u.is_empty() {
            break;
        }
        let wait = limiter.wait();
        let mut of_all = requests.iter().chain(&bytes);
        let passes = if let Some(wait) = wait {
            assert!(of_all.any(|exact| exact.may_wait(wait.as_nanos())), "{wait:?} is too long");
            let wait = u64::try_from(wait.as_nanos()).expect("36 years at most");
            // All of it, not quite, or some time.
            match u.int_in_range(0..=2u8)? {
                0 => wait,
                1 => wait - 1,
                _ => u.arbitrary::<u32>()?.into(),
            }
        } else {
            assert!(of_all.all(Exact::may_go), "a request goes too early");
            let amount = if u.ratio(1, 8)? { some_number(u)? } else { u.int_in_range(0..=1 << 20)? };
            say!("{amount} bytes go");
            limiter.charge(amount);
            if let Some(requests) = &mut requests {
                requests.charge(1);
            }
            if let Some(bytes) = &mut bytes {
                bytes.charge(amount);
            }
            if u.arbitrary()? { 0 } else { some_number(u)? >> u.int_in_range(0..=63)? }
        };
        let before = clock.load(Ordering::Relaxed);
        let Some(after) = before.checked_add(passes).filter(|after| u128::from(*after) * TICKS < HORIZON) else {
            break;
        };
        say!("{passes} ns pass");
        clock.store(after, Ordering::Relaxed);
        requests.iter_mut().chain(&mut bytes).for_each(|exact| exact.pass(passes));
        if let Some(wait) = wait {
            let over = u128::from(passes) >= wait.as_nanos();
            assert_eq!(limiter.wait().is_none(), over, "{passes} ns of {wait:?} passed");
        }
    }
    Ok(())
}
