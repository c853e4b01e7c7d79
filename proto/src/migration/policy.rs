//! When to freeze: pure arithmetic over what the rounds measured.
//!
//! Every further round costs time and bandwidth; the freeze costs downtime. Freeze when the
//! final round is predicted to fit the downtime the operator allows and more rounds would not make
//! it much shorter, when another round would hardly help at all, or when there have been enough.
//!
//! And how long the workload may then stand still before it is given back.
//!
//! A policy may allow that pages are missing when the workload starts at the target. Then rounds
//! end in a *switch* where they would not do: a freeze that sends no pages.

mod mode;
mod stall;

use std::time::Duration;

use crate::id::Round;
use crate::page::PageCount;
pub use mode::{Mode, OnTimeout, UnknownMode, UnknownOnTimeout};
use stall::Stall;
pub use stall::{BUDGET_STEPS, NEAR_PERCENT, WATCHED_ROUNDS, WATCHED_ROUNDS_MAX};

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
    /// Whether pages may be missing when it starts at the target.
    pub mode: Mode,
    /// What follows when the time, or the rounds, are over.
    pub on_timeout: OnTimeout,
    /// The most downtime that is allowed once rounds have stalled: the budget rises to it from
    /// [`Policy::downtime_max`]. None: with [`Mode::Precopy`] stalled rounds end in a freeze of any
    /// downtime, else the budget does not rise.
    pub downtime_bound: Option<Duration>,
}

/// A policy that nobody can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "pages are compared before the workload starts at the target, and some may be missing then: \
     either verify, or a mode and an end of time other than precopy's"
)]
pub struct VerifySwitches;

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
    /// Freeze now, and send what is left then.
    Freeze(FreezeReason),
    /// Another round.
    Round,
    /// Freeze now, and leave what is left at the source: it follows the workload.
    Switch(FreezeReason),
    /// No more rounds are allowed, and no downtime as long as this: [`Policy::on_timeout`] says
    /// what follows.
    TimeOver,
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
    /// Rounds do not do, and what is left is nearly the least of what they have left.
    Smallest,
    /// The policy has all pages follow the workload.
    Postcopy,
    /// Time is over.
    TimeOver,
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
    /// What the freeze takes if no page is sent in it.
    without_pages: Freeze,
    stall: Stall,
    /// How long all rounds took.
    elapsed: Duration,
}

/// What a freeze that begins now would take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Freeze {
    downtime: Duration,
    /// None if nothing is known.
    stillness: Option<Duration>,
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
        mode: Mode::Precopy,
        on_timeout: OnTimeout::Cancel,
        downtime_bound: None,
    };

    /// Whether it allows that pages are missing when the workload starts at the target.
    pub fn may_switch(&self) -> bool {
        self.mode != Mode::Precopy || self.on_timeout == OnTimeout::Postcopy
    }

    /// Whether it wants that, if it comes to it, rather than rounds that do not do.
    pub fn must_switch(&self) -> bool {
        matches!(self.mode, Mode::Hybrid | Mode::Postcopy) || self.on_timeout == OnTimeout::Postcopy
    }

    /// Whether anybody can follow it.
    pub fn check(&self) -> Result<(), VerifySwitches> {
        if self.verify && self.may_switch() {
            return Err(VerifySwitches);
        }
        Ok(())
    }

    /// The most downtime that it allows once rounds have stalled.
    fn bound(&self) -> Duration {
        self.downtime_bound
            .unwrap_or_default()
            .max(self.downtime_max)
    }
}

impl Convergence {
    /// Takes in a round of a workload with this much memory, and says what should follow.
    pub fn after(&mut self, policy: &Policy, report: &RoundReport, memory: PageCount) -> Decision {
        self.measure(policy, report, memory);
        let left_bytes = left_bytes(report);
        let sent_bytes = sent_bytes(report);
        if report.anew {
            self.before = report.round.number();
            return Decision::Round;
        }
        let rounds = report.round.number().saturating_sub(self.before);
        if report.files.first && rounds < policy.rounds_max {
            return Decision::Round;
        }
        if policy.mode == Mode::Postcopy {
            return self.switch(FreezeReason::Postcopy);
        }
        let predicted = self.predicted_downtime.unwrap_or(Duration::MAX);
        let shrinking = is_less(left_bytes, sent_bytes, SHRINKING_PERCENT)
            && (FIXED_COST + TRANSFER_SHORT).saturating_add(report.files.look) < predicted;
        if predicted <= policy.downtime_max && !shrinking {
            return Decision::Freeze(FreezeReason::Converged);
        }
        if policy.mode == Mode::Precopy && policy.downtime_bound.is_none() {
            if policy.rounds_max <= rounds {
                return Decision::Freeze(FreezeReason::RoundsMax);
            }
            if !is_less(left_bytes, sent_bytes, STALLED_PERCENT) {
                return Decision::Freeze(FreezeReason::Stalled);
            }
            return Decision::Round;
        }
        self.after_bounded(policy, report, rounds)
    }

    /// The same for a policy that does not allow any downtime once rounds have stalled.
    fn after_bounded(&mut self, policy: &Policy, report: &RoundReport, rounds: u32) -> Decision {
        let (left_bytes, sent_bytes) = (left_bytes(report), sent_bytes(report));
        let is_last = policy.rounds_max <= rounds;
        let stalls = match policy.mode {
            Mode::Precopy => !is_less(left_bytes, sent_bytes, STALLED_PERCENT),
            Mode::Hybrid | Mode::Postcopy => !is_less(left_bytes, sent_bytes, SHRINKING_PERCENT),
            Mode::Auto => !self.will_do(policy, report, rounds),
        };
        if !(self.stall.has_begun() || stalls || is_last) {
            return Decision::Round;
        }
        self.stall.observe(left_bytes);
        let budget = self.stall.budget(policy.downtime_max, policy.bound());
        if self.predicted_downtime.is_some_and(|it| it <= budget) {
            return Decision::Freeze(FreezeReason::Converged);
        }
        if policy.mode == Mode::Precopy {
            return if is_last {
                Decision::TimeOver
            } else {
                Decision::Round
            };
        }
        if is_last {
            return self.switch(FreezeReason::RoundsMax);
        }
        if self.stall.is_met(left_bytes) {
            return self.switch(FreezeReason::Smallest);
        }
        Decision::Round
    }

    /// Whether the rounds that are allowed will bring the downtime below its bound, if each leaves
    /// the same part of what it sends as the last one.
    fn will_do(&self, policy: &Policy, report: &RoundReport, rounds: u32) -> bool {
        let (left, sent) = (left_bytes(report), sent_bytes(report));
        if !is_less(left, sent, STALLED_PERCENT) {
            return left == 0;
        }
        let rate = self.bytes_per_second;
        let mut elapsed = self.elapsed;
        let mut rest = left;
        for _ in rounds..policy.rounds_max {
            let downtime = predict(rest.saturating_add(report.eager_bytes), rate);
            if downtime.saturating_add(report.files.look) <= policy.bound() {
                return true;
            }
            elapsed = elapsed.saturating_add(time_for(rest, rate));
            if policy.timeout < elapsed {
                return false;
            }
            let next = u128::from(rest) * u128::from(left) / u128::from(sent);
            rest = u64::try_from(next).unwrap_or(u64::MAX);
        }
        predict(rest.saturating_add(report.eager_bytes), rate) <= policy.bound()
    }

    /// Leaves what is left at the source: the downtime is that of a freeze without it.
    pub fn switch(&mut self, reason: FreezeReason) -> Decision {
        self.predicted_downtime = Some(self.without_pages.downtime);
        self.estimated_freeze = self.without_pages.stillness;
        Decision::Switch(reason)
    }

    fn measure(&mut self, policy: &Policy, report: &RoundReport, memory: PageCount) {
        let known = self.bytes_per_second;
        let sent_bytes = report.raw_bytes.saturating_add(report.files.sent_bytes);
        self.measured |= RATE_BYTES_MIN <= sent_bytes;
        if known.is_none() || RATE_BYTES_MIN <= sent_bytes {
            self.bytes_per_second = per_second(sent_bytes, report.duration).or(known);
        }
        self.elapsed = self.elapsed.saturating_add(report.duration);
        let dirtied = report.pages_dirtied_estimate;
        self.dirtied_per_second = per_second(dirtied.0, report.duration);
        let copying = time_for(report.eager_bytes, Some(EAGER_BYTES_PER_SECOND));
        let hashed_bytes = if policy.verify { memory.bytes() } else { 0 };
        let hashing = time_for(hashed_bytes, Some(HASHED_BYTES_PER_SECOND));
        let freeze = |left_bytes: u64| {
            let final_bytes = left_bytes.saturating_add(report.eager_bytes);
            let predicted = predict(final_bytes, self.bytes_per_second);
            let downtime = predicted.saturating_add(report.files.look);
            let beside = copying.saturating_add(hashing);
            let stillness = (downtime < Duration::MAX).then(|| downtime.saturating_add(beside));
            Freeze {
                downtime,
                stillness,
            }
        };
        let with_pages = freeze(left_bytes(report));
        self.without_pages = freeze(report.files.left_bytes);
        self.predicted_downtime = Some(with_pages.downtime);
        self.estimated_freeze = with_pages.stillness;
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

/// What a round has left: what the next one would send.
fn left_bytes(report: &RoundReport) -> u64 {
    let dirtied = report.pages_dirtied_estimate.bytes();
    dirtied.saturating_add(report.files.left_bytes)
}

/// What a round has sent, before compression.
fn sent_bytes(report: &RoundReport) -> u64 {
    let pages = report.pages_sent.bytes();
    pages.saturating_add(report.files.sent_bytes)
}

/// Whether `part` is less than so many percent of `whole`.
fn is_less(part: u64, whole: u64, percent: u64) -> bool {
    u128::from(part) * 100 < u128::from(whole) * u128::from(percent)
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
mod switch_tests;
#[cfg(test)]
mod tests;
