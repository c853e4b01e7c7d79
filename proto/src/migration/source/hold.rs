//! A migration that is held: it copies on at a slow pace when another round would not help, and
//! freezes only when somebody says so, whose target takes its own time.
//!
//! Invariant: after that word one whole round is sent before the freeze, since folders travel from
//! then on only.

use std::time::Duration;

use super::SourceMachine;
use super::state::{State, Step, Timer};
use crate::id::Round;
use crate::migration::timer::Time;

/// How long the workload runs between two rounds that are sent only to keep what is left small.
pub const HOLD_PACE: Duration = Duration::from_secs(1);

/// Whether it is held, and since when it is not.
#[derive(Debug)]
pub(super) struct Hold {
    held: bool,
    /// Another round would not help: it was met while it was held.
    reached: bool,
    /// The round under way was begun when it was held.
    begun_held: bool,
}

impl Hold {
    pub(super) const fn new(held: bool) -> Self {
        Self {
            held,
            reached: false,
            begun_held: false,
        }
    }

    /// A round begins; whether folders are in it.
    pub(super) const fn begin_round(&mut self) -> bool {
        self.begun_held = self.held;
        !self.held
    }

    /// Whether it must not freeze after the round that has just ended.
    pub(super) const fn forbids_freeze(&self) -> bool {
        self.held || self.begun_held
    }
}

impl SourceMachine {
    /// Whether only somebody's word is waited for.
    pub(super) fn is_holding(&self) -> bool {
        let undecided = matches!(self.state, State::Undecided(..));
        undecided && self.hold.held && self.hold.reached
    }

    /// It would freeze after `round`, and must not.
    pub(super) fn hold_on(&mut self, now: Time, round: Round) {
        let next = round.next();
        if !self.hold.held {
            return self.send_round(next);
        }
        let Some(step) = self.state.step() else {
            return self.out_of_place("a hold");
        };
        *step = Step::Holding { next };
        self.hold.reached = true;
        self.timers.set(Timer::Pause, now.after(HOLD_PACE));
    }

    /// It may freeze from here on. Nothing to do if it is not held, or over.
    pub(super) fn proceed(&mut self) {
        if !std::mem::replace(&mut self.hold.held, false) {
            return;
        }
        if let Some(round) = self.round {
            self.convergence.count_from(round);
        }
        if let Some(&mut Step::Holding { next }) = self.state.step() {
            self.timers.stop(Timer::Pause);
            self.send_round(next);
        }
    }
}
