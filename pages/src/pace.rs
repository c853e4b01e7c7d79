//! Whether to spend time on compressing: tried out, not computed.
//!
//! Where the link holds a round up, every byte that is not sent is time saved. Where processors do,
//! a byte saved is worth only what sending it would cost them, and LZ4 often costs more. Which it
//! is depends on the link, on both nodes, on what else they do and on the memory itself, and none
//! of that can be seen from here. What can be seen is how fast a round goes. So both ways are tried
//! for a moment, the faster one is kept, and the other one is tried again now and then.
//!
//! Pure: time comes in. Absent: what either way means for a block, see [`crate::encode`].

use std::time::{Duration, Instant};

use crate::encode::Bottleneck;

/// Chooses the bottleneck that encoders assume.
#[derive(Debug)]
pub(super) struct Pace {
    assumed: Bottleneck,
    /// Bytes per second when the link, and when the processors were assumed.
    rates: [Option<f64>; 2],
    /// The other way is being tried.
    trying: bool,
    /// Windows since it was tried.
    windows: u32,
    window: Option<Window>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    opened: Instant,
    bytes: u64,
}

impl Pace {
    /// Assumes the link until it knows better.
    pub(super) fn new() -> Self {
        Self {
            assumed: Bottleneck::Link,
            rates: [None; 2],
            trying: false,
            windows: 0,
            window: None,
        }
    }

    /// What to assume now.
    pub(super) const fn bottleneck(&self) -> Bottleneck {
        self.assumed
    }

    /// A round begins. Time that has passed since the last one says nothing.
    pub(super) fn begin(&mut self, now: Instant) {
        if std::mem::take(&mut self.trying) {
            self.assumed = self.faster();
        }
        self.open(now);
    }

    /// So many bytes of pages are on their way.
    pub(super) fn note(&mut self, now: Instant, bytes: u64) {
        let Some(window) = &mut self.window else {
            return self.open(now);
        };
        // What was made before the change is still in the queues.
        let Some(measured) = now.checked_duration_since(window.opened + SETTLE) else {
            return;
        };
        window.bytes += bytes;
        if measured < WINDOW {
            return;
        }
        let rate = window.bytes as f64 / measured.as_secs_f64();
        self.rates[place(self.assumed)] = Some(rate);
        self.windows += 1;
        let other = other(self.assumed);
        let known = self.rates[place(other)].is_some();
        if self.trying || (known && self.windows < TRY_AGAIN_WINDOWS) {
            self.trying = false;
            self.assumed = self.faster();
        } else {
            self.trying = true;
            self.windows = 0;
            self.assumed = other;
        }
        self.open(now);
    }

    fn open(&mut self, now: Instant) {
        self.window = Some(Window {
            opened: now,
            bytes: 0,
        });
    }

    fn faster(&self) -> Bottleneck {
        match self.rates {
            [Some(link), Some(processor)] if link < processor => Bottleneck::Processor,
            [_, _] => Bottleneck::Link,
        }
    }
}

const fn place(bottleneck: Bottleneck) -> usize {
    match bottleneck {
        Bottleneck::Link => 0,
        Bottleneck::Processor => 1,
    }
}

const fn other(bottleneck: Bottleneck) -> Bottleneck {
    match bottleneck {
        Bottleneck::Link => Bottleneck::Processor,
        Bottleneck::Processor => Bottleneck::Link,
    }
}

/// How long one way is measured. At 0.3 GB/s these are 60 MiB, or 15 parcels.
const WINDOW: Duration = Duration::from_millis(200);

/// How long a change takes to be felt: the parcels of both queues at that rate.
const SETTLE: Duration = Duration::from_millis(100);

/// The other way is tried after so many windows, about ten seconds: a thirtieth of the time.
const TRY_AGAIN_WINDOWS: u32 = 30;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends for a time at a rate that depends on what is assumed; says for how much of the last
    /// half of it the link was.
    fn assumed_link(link: u64, processor: u64, seconds: u32) -> f64 {
        let mut now = Instant::now();
        let mut pace = Pace::new();
        pace.begin(now);
        let (steps, mut assumed) = (seconds * 100, 0_u32);
        for step in 0..steps {
            now += Duration::from_millis(10);
            let rate = match pace.bottleneck() {
                Bottleneck::Link => link,
                Bottleneck::Processor => processor,
            };
            pace.note(now, rate / 100);
            let counts = steps / 2 <= step && pace.bottleneck() == Bottleneck::Link;
            assumed += u32::from(counts);
        }
        f64::from(assumed) / f64::from(steps / 2)
    }

    #[test]
    fn the_faster_way_is_kept_and_the_other_tried_now_and_then() {
        let rare = 0.01..0.1;
        let slow_link = assumed_link(300 << 20, 100 << 20, 60);
        assert!(rare.contains(&(1.0 - slow_link)), "{slow_link}");
        let slow_processor = assumed_link(100 << 20, 300 << 20, 60);
        assert!(rare.contains(&slow_processor), "{slow_processor}");
    }

    #[test]
    fn a_round_never_begins_with_a_trial() {
        let mut now = Instant::now();
        let mut pace = Pace::new();
        pace.begin(now);
        for _ in 0..31 {
            now += Duration::from_millis(10);
            pace.note(now, 1 << 20);
        }
        assert_eq!(pace.bottleneck(), Bottleneck::Processor);
        pace.begin(now);
        assert_eq!(pace.bottleneck(), Bottleneck::Link);
    }

    #[test]
    fn time_between_rounds_is_not_measured() {
        let mut now = Instant::now();
        let mut pace = Pace::new();
        for _ in 0..100 {
            pace.begin(now);
            pace.note(now + Duration::from_millis(50), 1 << 20);
            now += Duration::from_secs(1);
        }
        assert_eq!(pace.rates, [None; 2]);
    }
}
