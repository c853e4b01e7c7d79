//! When to freeze: pure arithmetic over what the rounds measured.
//!
//! Every further round costs time and bandwidth; the freeze costs downtime. Freeze when the
//! final round is predicted to fit the downtime the operator allows and more rounds would not make
//! it much shorter, when another round would hardly help at all, or when there have been enough.

use std::time::Duration;

use crate::id::Round;
use crate::page::PageCount;

/// Most rounds that any policy may ask for: beyond this the workload outruns the link anyway.
pub const ROUNDS_LIMIT: u32 = 1000;

/// The part of the downtime that does not depend on memory: freezing, CRIU's dump and restore,
/// two fsyncs and three round trips. Measured at 30 to 50 ms with stock CRIU 4.2.1.
pub const FIXED_COST: Duration = Duration::from_millis(40);

/// A round that leaves at least this many percent of what it sent has stalled.
pub const STALLED_PERCENT: u64 = 90;

/// While a round leaves less than this many percent of what it sent, the next one costs little and
/// saves downtime, so it is sent even if the downtime would do already.
pub const SHRINKING_PERCENT: u64 = 60;

/// Transfer in the freeze that is not worth another round: a quarter of [`FIXED_COST`].
pub const TRANSFER_SHORT: Duration = Duration::from_millis(10);

/// Rounds shorter than this, in bytes read (1 MiB), say more of latency than of the link's
/// rate; the rate of the round before is kept.
pub const RATE_BYTES_MIN: u64 = 1 << 20;

/// How a workload is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Freeze when the predicted downtime is at most this, and rounds no longer shrink fast.
    pub downtime_max: Duration,
    /// Freeze after this many rounds at the latest: 1 to [`ROUNDS_LIMIT`].
    pub rounds_max: u32,
    /// Give up if the workload is not frozen after this time.
    pub timeout: Duration,
    /// Compare every live page by digest before the target may restore.
    pub verify: bool,
    /// Freeze even if CRIU has to copy more memory than the budget allows.
    pub force_eager: bool,
}

/// What the source measured of one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundReport {
    /// The round.
    pub round: Round,
    /// Parcels sent in it.
    pub parcels: u32,
    /// Pages in those parcels, zero pages too.
    pub pages_sent: PageCount,
    /// Pages dirtied during it, as far as known: what the next round would send.
    pub pages_dirtied_estimate: PageCount,
    /// Bytes of the pages sent, before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// From the first scan to the last byte handed to the lanes.
    pub duration: Duration,
    /// Bytes that only CRIU can copy, and only in the freeze.
    pub eager_bytes: u64,
}

/// What follows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Freeze now.
    Freeze(FreezeReason),
    /// Another round.
    Round,
}

/// Why it is time to freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeReason {
    /// The predicted downtime fits.
    Converged,
    /// As many rounds as the policy allows.
    RoundsMax,
    /// The round left nearly as much as it sent.
    Stalled,
}

/// What is known after the rounds so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Convergence {
    /// Raw bytes per second of the last round that was long enough to tell.
    bytes_per_second: Option<u64>,
    dirtied_per_second: Option<u64>,
    predicted_downtime: Option<Duration>,
}

impl Policy {
    /// The default of [`Policy::downtime_max`].
    pub const DOWNTIME_MAX: Duration = Duration::from_millis(300);
    /// The default of [`Policy::rounds_max`].
    pub const ROUNDS_MAX: u32 = 30;
    /// The default of [`Policy::timeout`]: one hour.
    pub const TIMEOUT: Duration = Duration::from_secs(3600);

    /// The defaults, nothing forced.
    pub const DEFAULT: Self = Self {
        downtime_max: Self::DOWNTIME_MAX,
        rounds_max: Self::ROUNDS_MAX,
        timeout: Self::TIMEOUT,
        verify: false,
        force_eager: false,
    };
}

impl Convergence {
    /// Takes in a round and says what should follow.
    pub fn after(&mut self, policy: &Policy, report: &RoundReport) -> Decision {
        let known = self.bytes_per_second;
        if known.is_none() || RATE_BYTES_MIN <= report.raw_bytes {
            self.bytes_per_second = per_second(report.raw_bytes, report.duration).or(known);
        }
        let dirtied = report.pages_dirtied_estimate;
        self.dirtied_per_second = per_second(dirtied.0, report.duration);
        let final_bytes = dirtied.bytes().saturating_add(report.eager_bytes);
        let predicted = predict(final_bytes, self.bytes_per_second);
        self.predicted_downtime = Some(predicted);
        let left = dirtied.0.saturating_mul(100);
        let sent = report.pages_sent.0;
        let shrinking = left < sent.saturating_mul(SHRINKING_PERCENT)
            && FIXED_COST + TRANSFER_SHORT < predicted;
        if predicted <= policy.downtime_max && !shrinking {
            return Decision::Freeze(FreezeReason::Converged);
        }
        if policy.rounds_max <= report.round.number() {
            return Decision::Freeze(FreezeReason::RoundsMax);
        }
        if sent.saturating_mul(STALLED_PERCENT) <= left {
            return Decision::Freeze(FreezeReason::Stalled);
        }
        Decision::Round
    }

    /// Pages dirtied per second in the last round.
    pub const fn dirtied_per_second(&self) -> Option<u64> {
        self.dirtied_per_second
    }

    /// The downtime if the workload were frozen now.
    pub const fn predicted_downtime(&self) -> Option<Duration> {
        self.predicted_downtime
    }
}

/// How long the workload would be gone if `final_bytes` were all that is left to send.
fn predict(final_bytes: u64, bytes_per_second: Option<u64>) -> Duration {
    let transfer = match (final_bytes, bytes_per_second) {
        (0, _) => Duration::ZERO,
        (_, None | Some(0)) => Duration::MAX,
        (bytes, Some(rate)) => {
            let micros = u128::from(bytes) * 1_000_000 / u128::from(rate);
            Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
        }
    };
    transfer.saturating_add(FIXED_COST)
}

fn per_second(amount: u64, duration: Duration) -> Option<u64> {
    let micros = duration.as_micros();
    if micros == 0 {
        return None;
    }
    Some(u64::try_from(u128::from(amount) * 1_000_000 / micros).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn report(round: u32, sent: u64, dirtied: u64, duration: Duration) -> RoundReport {
        RoundReport {
            round: Round::new(round).unwrap(),
            parcels: 1,
            pages_sent: PageCount(sent),
            pages_dirtied_estimate: PageCount(dirtied),
            raw_bytes: PageCount(sent).bytes(),
            wire_bytes: PageCount(sent).bytes(),
            duration,
            eager_bytes: 0,
        }
    }

    fn check(reports: &[RoundReport], expected: &[Decision]) {
        let mut convergence = Convergence::default();
        let decisions: Vec<Decision> = reports
            .iter()
            .map(|round| convergence.after(&Policy::DEFAULT, round))
            .collect();
        assert_eq!(decisions, expected);
    }

    // clause: R-6
    #[test]
    fn the_freeze_comes_when_the_rest_fits_the_downtime() {
        // 100000 pages/s: 260 ms are 26000 pages.
        check(
            &[
                report(1, 100_000, 40_000, SECOND),
                report(2, 40_000, 26_000, SECOND * 2 / 5),
            ],
            &[Decision::Round, Decision::Freeze(FreezeReason::Converged)],
        );
    }

    #[test]
    fn rounds_go_on_while_each_is_much_smaller_than_the_last() {
        check(
            &[
                report(1, 100_000, 20_000, SECOND),
                report(2, 20_000, 4_000, SECOND / 5),
                report(3, 4_000, 1_000, SECOND / 25),
            ],
            &[
                Decision::Round,
                Decision::Round,
                Decision::Freeze(FreezeReason::Converged),
            ],
        );
    }

    #[test]
    fn a_round_that_leaves_nine_tenths_has_stalled() {
        check(
            &[report(1, 100_000, 90_000, SECOND)],
            &[Decision::Freeze(FreezeReason::Stalled)],
        );
        check(&[report(1, 100_000, 89_999, SECOND)], &[Decision::Round]);
    }

    #[test]
    fn the_last_round_allowed_is_followed_by_the_freeze() {
        let round = |number| report(number, 100_000, 80_000, SECOND);
        check(
            &[round(29), round(30)],
            &[Decision::Round, Decision::Freeze(FreezeReason::RoundsMax)],
        );
    }

    #[test]
    fn a_short_round_does_not_change_the_rate() {
        let mut convergence = Convergence::default();
        convergence.after(&Policy::DEFAULT, &report(1, 100_000, 1000, SECOND));
        // Ten pages in a second would be a rate of 40 KiB/s.
        convergence.after(&Policy::DEFAULT, &report(2, 10, 1000, SECOND));
        assert_eq!(
            convergence.predicted_downtime(),
            Some(Duration::from_millis(50))
        );
        assert_eq!(convergence.dirtied_per_second(), Some(1000));
    }

    #[test]
    fn memory_that_only_criu_copies_counts() {
        let mut convergence = Convergence::default();
        let mut round = report(1, 100_000, 0, SECOND);
        round.eager_bytes = PageCount(100_000).bytes();
        convergence.after(&Policy::DEFAULT, &round);
        assert_eq!(convergence.predicted_downtime(), Some(SECOND + FIXED_COST));
    }

    #[test]
    fn nothing_measured_and_something_left_is_no_prediction_that_fits() {
        check(
            &[report(1, 0, 10, Duration::ZERO)],
            &[Decision::Freeze(FreezeReason::Stalled)],
        );
        check(
            &[report(1, 0, 0, Duration::ZERO)],
            &[Decision::Freeze(FreezeReason::Converged)],
        );
    }
}
