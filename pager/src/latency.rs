//! How long something took, of many: counted in buckets, so that it costs no memory and no lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::message::Waited;

/// Parts of each doubling: what is said is at most an eighth too much.
const PARTS: u64 = 8;

/// Up to 2^32 µs, which is more than an hour.
const BUCKETS: usize = 33 * PARTS as usize;

/// Counts of durations, by microseconds.
#[derive(Debug)]
pub struct Latency {
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            longest: AtomicU64::new(0),
        }
    }
}

impl Latency {
    /// One more took so long.
    pub fn note(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(micros, Ordering::Relaxed);
    }

    /// What they come to.
    pub fn sum_up(&self) -> Waited {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .collect();
        let faults: u64 = counts.iter().sum();
        let max_us = self.longest.load(Ordering::Relaxed);
        let within = |percent: u64| {
            let wanted = (faults * percent).div_ceil(100).max(1);
            let mut seen = 0;
            let found = counts.iter().position(|count| {
                seen += count;
                wanted <= seen
            });
            found.map_or(0, |bucket| end(bucket).min(max_us))
        };
        Waited {
            faults,
            p50_us: within(50),
            p99_us: within(99),
            max_us,
        }
    }
}

/// Below 8 each has its own; from there on each doubling has eight.
fn bucket(micros: u64) -> usize {
    let Some(doublings) = micros.checked_ilog2().filter(|_| PARTS <= micros) else {
        return usize::try_from(micros).unwrap_or(0);
    };
    let doublings = u64::from(doublings);
    // The three bits after the first.
    let part = (micros >> (doublings - 3)) - PARTS;
    let bucket = (doublings - 2) * PARTS + part;
    usize::try_from(bucket).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The most that is in a bucket.
fn end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PARTS {
        return bucket;
    }
    let doublings = bucket / PARTS + 2;
    ((bucket % PARTS + PARTS + 1) << (doublings - 3)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_in_the_bucket_that_ends_at_most_an_eighth_above_it() {
        let mut last = 0;
        for micros in (0..5000).chain((5000..10_000_000).step_by(977)) {
            let bucket = bucket(micros);
            assert!(last <= bucket, "{micros}");
            last = bucket;
            let end = end(bucket);
            assert!(
                micros <= end && end <= micros + micros / 8,
                "{micros}: {end}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_median_and_the_tail_are_told_apart() {
        let latency = Latency::default();
        assert_eq!(latency.sum_up(), Waited::default());
        for _ in 0..98 {
            latency.note(Duration::from_micros(100));
        }
        for _ in 0..2 {
            latency.note(Duration::from_micros(9000));
        }
        let sum = latency.sum_up();
        assert_eq!((sum.faults, sum.max_us), (100, 9000));
        assert!((100..=112).contains(&sum.p50_us), "{sum:?}");
        assert_eq!(sum.p99_us, 9000);
    }
}
