//! When to freeze: pure arithmetic over what the rounds measured.
//!
//! Every further round costs time and bandwidth; the freeze costs downtime. Freeze when the
//! final round is predicted to fit the downtime the operator allows and more rounds would not make
//! it much shorter, when another round would hardly help at all, or when there have been enough.
//!
//! And how long the workload may then stand still before it is given back.

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

/// How fast CRIU copies memory in the freeze, in bytes per second: 64 MiB of shared memory took
/// 276 ms.
pub const EAGER_BYTES_PER_SECOND: u64 = 240 << 20; // 240 MiB/s

/// How fast live pages are read and hashed for a comparison, in bytes per second (5 GiB/s): 0.15 to
/// 0.2 s per GiB were measured on two cores, and the slower one counts.
pub const HASHED_BYTES_PER_SECOND: u64 = 5 << 30;

/// How long any workload may stand still before the commit, unless the policy says otherwise. A
/// hundred times what most need, so that a node that is busy for a moment costs no migration; and
/// less than what clients usually wait for.
pub const FROZEN_MAX_LEAST: Duration = Duration::from_secs(5);

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
    /// How long the workload may stand still before the commit. None: the larger of
    /// [`FROZEN_MAX_LEAST`] and twice the freeze that is predicted.
    pub frozen_max: Option<Duration>,
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
    /// Nothing that was sent up to the end of this round counts: the next one sends every page.
    pub anew: bool,
    /// What it sent of folders that travel.
    pub files: FilesReport,
}

/// What a round sent of folders that travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilesReport {
    /// Differences: one of each folder.
    pub streams: u32,
    /// Bytes of them.
    pub sent_bytes: u64,
    /// Bytes that the next round would send, as far as known.
    pub left_bytes: u64,
    /// How long it takes to find and apply a difference, whatever is in it.
    pub look: Duration,
    /// They were the first, which say nothing of the next.
    pub first: bool,
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
    estimated_freeze: Option<Duration>,
    /// A round was long enough to tell how fast the link is.
    measured: bool,
    /// The rounds before the first that counts.
    before: u32,
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
        frozen_max: None,
    };
}

impl Convergence {
    /// Takes in a round of a workload with this much memory, and says what should follow.
    pub fn after(&mut self, policy: &Policy, report: &RoundReport, memory: PageCount) -> Decision {
        let known = self.bytes_per_second;
        let sent_bytes = report.raw_bytes.saturating_add(report.files.sent_bytes);
        self.measured |= RATE_BYTES_MIN <= sent_bytes;
        if known.is_none() || RATE_BYTES_MIN <= sent_bytes {
            self.bytes_per_second = per_second(sent_bytes, report.duration).or(known);
        }
        let dirtied = report.pages_dirtied_estimate;
        self.dirtied_per_second = per_second(dirtied.0, report.duration);
        let left_bytes = dirtied.bytes().saturating_add(report.files.left_bytes);
        let final_bytes = left_bytes.saturating_add(report.eager_bytes);
        let predicted = predict(final_bytes, self.bytes_per_second);
        let predicted = predicted.saturating_add(report.files.look);
        self.predicted_downtime = Some(predicted);
        let copying = time_for(report.eager_bytes, Some(EAGER_BYTES_PER_SECOND));
        let hashed_bytes = if policy.verify { memory.bytes() } else { 0 };
        let hashing = time_for(hashed_bytes, Some(HASHED_BYTES_PER_SECOND));
        self.estimated_freeze = (predicted < Duration::MAX)
            .then(|| predicted.saturating_add(copying).saturating_add(hashing));
        if report.anew {
            self.before = report.round.number();
            return Decision::Round;
        }
        let rounds = report.round.number().saturating_sub(self.before);
        if report.files.first && rounds < policy.rounds_max {
            return Decision::Round;
        }
        let left = left_bytes.saturating_mul(100);
        let sent = report
            .pages_sent
            .bytes()
            .saturating_add(report.files.sent_bytes);
        let shrinking = left < sent.saturating_mul(SHRINKING_PERCENT)
            && (FIXED_COST + TRANSFER_SHORT).saturating_add(report.files.look) < predicted;
        if predicted <= policy.downtime_max && !shrinking {
            return Decision::Freeze(FreezeReason::Converged);
        }
        if policy.rounds_max <= rounds {
            return Decision::Freeze(FreezeReason::RoundsMax);
        }
        if sent.saturating_mul(STALLED_PERCENT) <= left {
            return Decision::Freeze(FreezeReason::Stalled);
        }
        Decision::Round
    }

    /// Rounds up to this one do not count for the last one allowed.
    pub const fn count_from(&mut self, round: Round) {
        self.before = round.number();
    }

    /// Pages dirtied per second in the last round.
    pub const fn dirtied_per_second(&self) -> Option<u64> {
        self.dirtied_per_second
    }

    /// The downtime if the workload were frozen now.
    pub const fn predicted_downtime(&self) -> Option<Duration> {
        self.predicted_downtime
    }

    /// How long the workload would stand still if it were frozen now: the downtime, and beside it
    /// CRIU's copying and the hashing, which no rate of the link says anything of. None as long as
    /// no round was long enough to tell how fast the link is: a short one measures its own round
    /// trips, and says too much of what is larger.
    pub fn predicted_freeze(&self) -> Option<Duration> {
        self.estimated_freeze.filter(|_| self.measured)
    }

    /// How long a freeze that begins now may last before the commit.
    pub fn frozen_max(&self, policy: &Policy) -> Duration {
        // Too much does no harm here.
        let predicted = self.estimated_freeze.unwrap_or_default();
        let default = FROZEN_MAX_LEAST.max(predicted.saturating_mul(2));
        policy.frozen_max.unwrap_or(default)
    }
}

/// How long the workload would be gone if `final_bytes` were all that is left to send.
fn predict(final_bytes: u64, bytes_per_second: Option<u64>) -> Duration {
    time_for(final_bytes, bytes_per_second).saturating_add(FIXED_COST)
}

/// How long so many bytes take at this rate; without one, for ever.
fn time_for(bytes: u64, bytes_per_second: Option<u64>) -> Duration {
    match (bytes, bytes_per_second) {
        (0, _) => Duration::ZERO,
        (_, None | Some(0)) => Duration::MAX,
        (bytes, Some(rate)) => {
            let micros = u128::from(bytes) * 1_000_000 / u128::from(rate);
            Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
        }
    }
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
    const MEMORY: PageCount = PageCount(100_000);

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
            anew: false,
            files: FilesReport::default(),
        }
    }

    fn check(reports: &[RoundReport], expected: &[Decision]) {
        let mut convergence = Convergence::default();
        let decisions: Vec<Decision> = reports
            .iter()
            .map(|round| convergence.after(&Policy::DEFAULT, round, MEMORY))
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

    // clause: R-8
    #[test]
    fn a_round_after_which_all_begins_anew_is_followed_by_another_and_counts_no_more() {
        let policy = Policy {
            rounds_max: 2,
            ..Policy::DEFAULT
        };
        let mut convergence = Convergence::default();
        let mut after = |number, sent, anew| {
            let left = if anew { 100_000 } else { sent * 4 / 5 };
            let round = RoundReport {
                anew,
                ..report(number, sent, left, SECOND)
            };
            convergence.after(&policy, &round, MEMORY)
        };
        // It would have stalled, and be the last one allowed.
        assert_eq!(after(1, 100_000, false), Decision::Round);
        assert_eq!(after(2, 80_000, true), Decision::Round);
        assert_eq!(after(3, 100_000, false), Decision::Round);
        let last = Decision::Freeze(FreezeReason::RoundsMax);
        assert_eq!(after(4, 80_000, false), last);
    }

    #[test]
    fn a_short_round_does_not_change_the_rate() {
        let mut convergence = Convergence::default();
        convergence.after(&Policy::DEFAULT, &report(1, 100_000, 1000, SECOND), MEMORY);
        // Ten pages in a second would be a rate of 40 KiB/s.
        convergence.after(&Policy::DEFAULT, &report(2, 10, 1000, SECOND), MEMORY);
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
        convergence.after(&Policy::DEFAULT, &round, MEMORY);
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

    // clause: F-7
    #[test]
    fn a_freeze_is_bounded_by_five_seconds_or_twice_what_is_predicted() {
        let gib = PageCount(1 << 18);
        let verified = Policy {
            verify: true,
            ..Policy::DEFAULT
        };
        let said = Policy {
            frozen_max: Some(SECOND / 2),
            ..verified
        };
        let fixed = FIXED_COST * 2;
        // 100000 pages/s are sent; what CRIU copies is copied first, and sent after.
        let eager_gib = 2 * (1024 * SECOND / 240 + gib.bytes() as u32 / 40960 * SECOND / 10_000);
        for (policy, dirtied, eager, memory, expected) in [
            (Policy::DEFAULT, 0, 0, gib, SECOND * 5),
            (Policy::DEFAULT, 245_000, 0, gib, SECOND * 5),
            (Policy::DEFAULT, 300_000, 0, gib, SECOND * 6 + fixed),
            (Policy::DEFAULT, 0, gib.bytes(), gib, eager_gib + fixed),
            (
                Policy::DEFAULT,
                300_000,
                0,
                PageCount(64 * gib.0),
                SECOND * 6 + fixed,
            ),
            (verified, 0, 0, gib, SECOND * 5),
            (verified, 0, 0, PageCount(50 * gib.0), SECOND * 20 + fixed),
            (said, 300_000, gib.bytes(), gib, SECOND / 2),
        ] {
            let mut convergence = Convergence::default();
            let mut round = report(1, 100_000, dirtied, SECOND);
            round.eager_bytes = eager;
            convergence.after(&policy, &round, memory);
            let difference = convergence.frozen_max(&policy).abs_diff(expected);
            assert!(
                difference < SECOND / 1000,
                "{dirtied} dirty, {eager} eager: {difference:?} from {expected:?}"
            );
        }
    }

    // clause: F-7
    #[test]
    fn a_first_round_that_is_short_forbids_no_freeze() {
        // 300 KiB in 30 ms: at that rate 64 MiB of shared memory would take 7 s.
        let mut convergence = Convergence::default();
        let mut round = report(1, 75, 0, SECOND * 3 / 100);
        round.eager_bytes = 64 << 20;
        convergence.after(&Policy::DEFAULT, &round, MEMORY);
        assert_eq!(convergence.predicted_freeze(), None);
        // It may well be so, and then there is time for it.
        assert!(FROZEN_MAX_LEAST < convergence.frozen_max(&Policy::DEFAULT));
        convergence.after(&Policy::DEFAULT, &report(2, 25_600, 0, SECOND), MEMORY);
        assert!(convergence.predicted_freeze().is_some());
    }

    #[test]
    fn a_link_of_which_nothing_is_known_gives_no_freeze_without_a_bound() {
        let mut convergence = Convergence::default();
        let policy = Policy::DEFAULT;
        assert_eq!(convergence.frozen_max(&policy), FROZEN_MAX_LEAST);
        convergence.after(&policy, &report(1, 0, 10, Duration::ZERO), MEMORY);
        assert_eq!(convergence.predicted_downtime(), Some(Duration::MAX));
        assert_eq!(convergence.predicted_freeze(), None);
        assert_eq!(convergence.frozen_max(&policy), FROZEN_MAX_LEAST);
    }

    // clause: R-6
    #[test]
    fn folders_that_travel_count_like_memory_and_so_does_looking_for_differences() {
        let round = |number, files: FilesReport| RoundReport {
            files,
            raw_bytes: PageCount(100).bytes(),
            ..report(number, 100, 0, SECOND)
        };
        let mib = |sent: u64, left: u64| FilesReport {
            streams: 1,
            sent_bytes: sent << 20,
            left_bytes: left << 20,
            look: SECOND / 50,
            first: false,
        };
        let first = FilesReport {
            first: true,
            ..mib(1024, 0)
        };
        let mut convergence = Convergence::default();
        let mut after = |round| {
            let decision = convergence.after(&Policy::DEFAULT, &round, MEMORY);
            (decision, convergence.predicted_downtime().unwrap())
        };
        // It says nothing of the next, whatever it left.
        let (decision, predicted) = after(round(1, first));
        assert_eq!(
            (decision, predicted),
            (Decision::Round, FIXED_COST + SECOND / 50)
        );
        let (decision, predicted) = after(round(2, mib(1024, 512)));
        assert_eq!(decision, Decision::Round);
        assert!(
            SECOND / 2 < predicted && predicted < SECOND * 6 / 10,
            "{predicted:?}"
        );
        let (decision, _) = after(round(3, mib(512, 500)));
        assert_eq!(decision, Decision::Freeze(FreezeReason::Stalled));
        let (decision, _) = after(round(3, mib(512, 1)));
        assert_eq!(decision, Decision::Freeze(FreezeReason::Converged));
    }
}
