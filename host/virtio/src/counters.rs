//! What a device did: requests, bytes, errors and latencies of each queue.
//!
//! ```text
//!   queue 0's thread ──▶ [ counters ]      each written by one thread, in memory of its own
//!   queue 1's thread ──▶ [ counters ]
//!                             └── summed when somebody asks ──▶ DeviceStats
//! ```
//!
//! Counting takes no lock and no atomic read-modify-write: a thread adds to what nobody else writes. A clock is
//! read once for all requests that are taken together, and once for all that are found to have ended together.
//! So a latency is the time from when the queue was looked at to when the end was seen, which is what the driver
//! waits for, but for the time that a request lay in the queue before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a request asked for, as it is counted (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// `VIRTIO_BLK_T_IN`.
    Read,
    /// `VIRTIO_BLK_T_OUT`.
    Write,
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`.
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    WriteZeroes,
    /// `VIRTIO_BLK_T_GET_ID`.
    GetId,
    /// A type that the device does not know, and what is no request at all.
    Other,
}

impl RequestKind {
    /// All of them, in the order in which they are counted.
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes, Self::GetId, Self::Other];

    /// One word for metrics: `write_zeroes`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::GetId => "get_id",
            Self::Other => "other",
        }
    }
}

/// Buckets of a [`RequestStats::latency`] that have an upper bound. One follows that has none.
pub const LATENCY_BUCKETS: usize = 24;

/// The upper bound of the first bucket is two to the power of this, in nanoseconds: about two microseconds.
const FIRST_BOUND_SHIFT: u32 = 11;

/// The upper bound of a bucket, included: 2.048 µs, and twice that of the bucket before; 17 s for the last.
pub fn latency_bound(bucket: usize) -> Duration {
    let shift = u32::try_from(bucket).unwrap_or(u32::MAX).saturating_add(FIRST_BOUND_SHIFT);
    Duration::from_nanos(1_u64.checked_shl(shift).unwrap_or(u64::MAX))
}

/// The bucket of a latency.
fn bucket_of(nanoseconds: u64) -> usize {
    let bits = u64::BITS - nanoseconds.saturating_sub(1).leading_zeros();
    usize::try_from(bits.saturating_sub(FIRST_BOUND_SHIFT)).unwrap_or(LATENCY_BUCKETS).min(LATENCY_BUCKETS)
}

/// Requests of one kind, from the start of the device on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestStats {
    /// Requests that were answered.
    pub requests: u64,
    /// Of these, those that were answered with an error.
    pub errors: u64,
    /// Bytes that the others moved, discarded or made zero.
    pub bytes: u64,
    /// Requests by their latency; bucket `i` holds those of [`latency_bound`]`(i)` at most that are in no bucket
    /// before. Not cumulative.
    pub latency: [u64; LATENCY_BUCKETS + 1],
    /// The latencies of all requests together.
    pub latency_sum: Duration,
}

/// What a device did, and does. Numbers of different queues may be a moment apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    kinds: [RequestStats; RequestKind::ALL.len()],
    /// Requests that were taken and are not answered.
    pub in_flight: u64,
    /// How often a queue waited because of a limit.
    pub limit_waits: u64,
}

impl DeviceStats {
    /// Requests of one kind.
    pub fn of(&self, kind: RequestKind) -> RequestStats {
        self.kinds.get(kind as usize).copied().unwrap_or_default()
    }

    pub(crate) fn sum<'q>(queues: impl IntoIterator<Item = &'q QueueCounters>) -> Self {
        let mut sum = Self::default();
        for queue in queues {
            sum.in_flight = sum.in_flight.saturating_add(get(&queue.in_flight));
            sum.limit_waits = sum.limit_waits.saturating_add(get(&queue.limit_waits));
            for (to, from) in sum.kinds.iter_mut().zip(&queue.kinds) {
                to.requests = to.requests.saturating_add(get(&from.requests));
                to.errors = to.errors.saturating_add(get(&from.errors));
                to.bytes = to.bytes.saturating_add(get(&from.bytes));
                to.latency_sum = to.latency_sum.saturating_add(Duration::from_nanos(get(&from.nanoseconds)));
                for (to, from) in to.latency.iter_mut().zip(&from.latency) {
                    *to = to.saturating_add(get(from));
                }
            }
        }
        sum
    }
}

/// The counters of one queue, which only the thread writes that serves it. On cache lines of their own: two,
/// since processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct QueueCounters {
    kinds: [KindCounters; RequestKind::ALL.len()],
    in_flight: AtomicU64,
    limit_waits: AtomicU64,
}

#[derive(Debug, Default)]
struct KindCounters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS + 1],
}

impl QueueCounters {
    /// A request was answered: with an error, or after moving so many bytes.
    pub(crate) fn answered(&self, kind: RequestKind, result: Result<u64, ()>, latency: Duration) {
        let Some(counters) = self.kinds.get(kind as usize) else { return };
        add(&counters.requests, 1);
        match result {
            Ok(bytes) => add(&counters.bytes, bytes),
            Err(()) => add(&counters.errors, 1),
        }
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        add(&counters.nanoseconds, nanoseconds);
        if let Some(bucket) = counters.latency.get(bucket_of(nanoseconds)) {
            add(bucket, 1);
        }
    }

    /// The queue has requests that it must not take yet.
    pub(crate) fn limited(&self) {
        add(&self.limit_waits, 1);
    }

    pub(crate) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Not `fetch_add`: nobody else writes, so nobody has to be kept out.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn every_latency_is_in_the_first_bucket_whose_bound_it_does_not_pass() {
        for (nanoseconds, bucket) in
            [(0, 0), (1, 0), (2048, 0), (2049, 1), (4096, 1), (4097, 2), (1 << 34, 23), ((1 << 34) + 1, 24)]
        {
            assert_eq!(bucket_of(nanoseconds), bucket, "{nanoseconds} ns");
        }
        assert_eq!(bucket_of(u64::MAX), LATENCY_BUCKETS);
        for bucket in 0..LATENCY_BUCKETS {
            let bound = u64::try_from(latency_bound(bucket).as_nanos()).unwrap_or(0);
            assert_eq!((bucket_of(bound), bucket_of(bound + 1)), (bucket, bucket + 1));
        }
        assert_eq!(latency_bound(usize::MAX), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn queues_are_summed_by_kind() {
        let queues = [QueueCounters::default(), QueueCounters::default()];
        queues[0].answered(RequestKind::Read, Ok(4096), Duration::from_micros(3));
        queues[1].answered(RequestKind::Read, Ok(512), Duration::from_micros(5));
        queues[1].answered(RequestKind::Read, Err(()), Duration::from_micros(5));
        queues[1].answered(RequestKind::Flush, Ok(0), Duration::ZERO);
        queues[0].set_in_flight(3);
        queues[1].set_in_flight(4);
        let sum = DeviceStats::sum(&queues);
        assert_eq!(sum.in_flight, 7);
        let read = sum.of(RequestKind::Read);
        assert_eq!((read.requests, read.errors, read.bytes), (3, 1, 4608));
        assert_eq!(read.latency_sum, Duration::from_micros(13));
        assert_eq!((read.latency[1], read.latency[2]), (1, 2));
        assert_eq!(read.latency.iter().sum::<u64>(), 3);
        assert_eq!(sum.of(RequestKind::Flush).requests, 1);
        assert_eq!(sum.of(RequestKind::Write), RequestStats::default());
    }

    #[test]
    fn kinds_stand_where_they_are_counted() {
        for (at, kind) in RequestKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at);
        }
    }
}
