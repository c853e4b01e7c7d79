//! How the target gets to forget.
//!
//! A target keeps what it answers for as long as its source may ask. So a source whose own journal
//! says how it ended, and whose restart would ask no more, says so until the target has heard it,
//! within limits: what is lost here costs the target a few hundred bytes, and nothing else.

use super::SourceMachine;
use super::state::{Decided, Outcome, Over, State, Timer};
use crate::id::Generation;
use crate::migration::handoff::TELL_MAX;
use crate::migration::timer::Time;
use crate::wire::control::SourceMessage;

impl SourceMachine {
    /// The workload is where it belongs, and how that came about is durable.
    pub(super) fn settle_or_close(&mut self, now: Time, outcome: Outcome) {
        if !self.answered {
            return self.close(outcome);
        }
        if outcome == Outcome::Moved {
            self.failure = None;
        }
        self.state = State::Over(Over::Settling { outcome });
        self.timers.set(Timer::Tell, now.after(TELL_MAX));
        self.settle(now);
    }

    /// Says it again, or gets the connection to say it on.
    pub(super) fn settle(&mut self, now: Time) {
        let generation = self.generation;
        self.send_or_dial(now, SourceMessage::Settled { generation });
    }

    /// Says it early, while the connection is there.
    pub(super) fn say_settled(&mut self) {
        let generation = self.generation;
        self.send(SourceMessage::Settled { generation });
    }

    pub(super) fn forgotten(&mut self, generation: Generation) {
        if generation < self.generation {
            return;
        }
        match self.state {
            State::Decided(Decided::Releasing { .. }) => self.answered = false,
            State::Over(Over::Settling { outcome }) => {
                self.answered = false;
                self.close(outcome);
            }
            // An abort lets the target forget too.
            State::Over(_) => {}
            State::Undecided(..) | State::Decided(_) => self.out_of_place("a target that forgets"),
        }
    }
}
