//! What rounds that do not get anywhere still tell: how small the rest can be met.
//!
//! A workload that writes as fast as the link sends does not always write equally fast. Once rounds
//! have stalled they go on for a while, and the smallest rest is kept: the freeze comes when the
//! rest is near that again, and not at the moment when the rounds happened to be given up. Beside
//! that the downtime that is allowed rises, in steps, to the most that the policy allows.

use std::time::Duration;

/// Rounds that are watched before the rest is compared with the smallest: a workload that works
/// in turns has then been seen in more than one.
pub const WATCHED_ROUNDS: u32 = 3;

/// Rounds after which the smallest rest is not waited for any more.
pub const WATCHED_ROUNDS_MAX: u32 = 12;

/// The rest is near the smallest if it is at most so many percent of it.
pub const NEAR_PERCENT: u64 = 104;

/// Steps in which the downtime that is allowed rises, one for each stalled round.
pub const BUDGET_STEPS: u32 = 4;

/// What the rounds since the first that stalled have left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stall {
    rounds: u32,
    smallest_bytes: u64,
}

impl Stall {
    pub(super) const fn has_begun(&self) -> bool {
        self.rounds != 0
    }

    /// A round has left so much.
    pub(super) fn observe(&mut self, left_bytes: u64) {
        self.smallest_bytes = if self.has_begun() {
            self.smallest_bytes.min(left_bytes)
        } else {
            left_bytes
        };
        self.rounds += 1;
    }

    /// The downtime that is allowed now: at first `least`, and `most` in the end.
    pub(super) fn budget(&self, least: Duration, most: Duration) -> Duration {
        let steps = self.rounds.min(BUDGET_STEPS);
        least.saturating_add(most.saturating_sub(least) / BUDGET_STEPS * steps)
    }

    /// Whether it is time to freeze after a round that has left so much.
    pub(super) fn is_met(&self, left_bytes: u64) -> bool {
        let left = u128::from(left_bytes) * 100;
        let near = left <= u128::from(self.smallest_bytes) * u128::from(NEAR_PERCENT);
        (WATCHED_ROUNDS <= self.rounds && near) || WATCHED_ROUNDS_MAX <= self.rounds
    }
}
