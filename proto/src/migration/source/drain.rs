//! The workload runs at the target with pages missing, which only the frozen copy here has.
//!
//! Invariants: from when the target has said that the workload runs, nothing thaws the copy, no
//! refusal and no fence either, and no restart, as the commit says that it drains. It is killed
//! when the target has all pages on record, or when it is on record that the rest is lost.
//!
//! Whether it is lost only the target can tell: what cannot be read here may be there already. So
//! the target is asked. If it is dead the operator says so, and that is the end of the workload.

use super::SourceAction;
use super::SourceMachine;
use super::state::{Decided, Drain, Outcome, Release, State, Timer};
use crate::id::Generation;
use crate::migration::handoff::lost_in_drain;
use crate::migration::record::Entry;
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::SourceMessage;

impl SourceMachine {
    /// The target runs the workload, and lacks pages.
    pub(super) fn drain(&mut self, now: Time) {
        self.state = State::Decided(Decided::Draining(Drain {
            recorded: false,
            lost: None,
        }));
        self.record_started();
        self.actions.push_back(SourceAction::Drain);
        self.timers
            .set(Timer::Silence, now.after(super::SILENCE_MAX));
        self.speak(now);
    }

    pub(super) fn record_started(&mut self) {
        self.journal(Entry::Started {
            generation: self.generation,
        });
    }

    /// That the workload has started is on disk, or may be. It is served all the same.
    pub(super) fn started_recorded(&mut self, now: Time, failed: Option<Failure>) {
        let State::Decided(Decided::Draining(drain)) = &mut self.state else {
            // It has ended meanwhile, which says as much.
            return;
        };
        match failed {
            Some(failure) => self.retry_later(now, failure),
            None => {
                drain.recorded = true;
                self.held_up = None;
            }
        }
    }

    /// Tells the target that the copy waits for it, or asks whether it needs what is lost here.
    pub(super) fn say_draining(&mut self, now: Time) {
        let generation = self.generation;
        let State::Decided(Decided::Draining(drain)) = &self.state else {
            return;
        };
        let message = match drain.lost.clone() {
            None => SourceMessage::Draining { generation },
            Some(failure) => SourceMessage::DrainLost {
                generation,
                failure,
            },
        };
        // One that nobody has sent yet is superseded, so that they do not pile up.
        self.actions.retain(|action| {
            !matches!(
                action,
                SourceAction::Send(
                    SourceMessage::Draining { .. } | SourceMessage::DrainLost { .. }
                )
            )
        });
        self.send_or_dial(now, message);
    }

    /// What the target has not fetched may be lost.
    pub(super) fn drain_lost(&mut self, now: Time, failure: Failure) {
        match &mut self.state {
            State::Decided(Decided::Draining(drain)) => {
                if drain.lost.is_none() {
                    drain.lost = Some(failure.clone());
                    self.failure = Some(failure);
                    self.speak(now);
                }
            }
            State::Undecided(..) => self.abort(failure),
            State::Decided(Decided::Releasing { .. }) | State::Over(_) => {}
            State::Decided(_) => self.note(failure),
        }
    }

    /// The target has all pages, and that on disk.
    pub(super) fn target_filled(&mut self, generation: Generation) {
        match &self.state {
            State::Decided(Decided::Draining(_)) if generation == self.generation => {
                self.failure = None;
                let filled = Entry::Filled { generation };
                self.end_drain(Outcome::Moved, filled);
            }
            // Said twice.
            State::Decided(Decided::Releasing { .. }) | State::Over(_) => {}
            State::Undecided(..) | State::Decided(_) => self.out_of_place("a filled workload"),
        }
    }

    /// The target does not run it any more, as pages are missing for good. It has that on disk.
    pub(super) fn target_lost(&mut self, generation: Generation, failure: &Failure) {
        match &self.state {
            State::Decided(Decided::Draining(_)) if generation == self.generation => {
                self.lose(failure);
            }
            State::Decided(Decided::Releasing { .. }) | State::Over(_) => {}
            State::Undecided(..) | State::Decided(_) => self.out_of_place("a lost workload"),
        }
    }

    /// The operator says that the target is dead: the only workload there is has gone with it.
    pub(super) fn fenced_in_drain(&mut self) {
        let text = "the operator declared the target dead, which ran it";
        // Nobody is left to be told that it may forget.
        self.answered = false;
        self.lose(&Failure::new(ErrorCode::Fenced, text));
    }

    fn lose(&mut self, lost: &Failure) {
        let failure = lost_in_drain(lost);
        self.failure = Some(failure.clone());
        self.end_drain(Outcome::Aborted, Entry::Aborted(failure));
    }

    fn end_drain(&mut self, outcome: Outcome, entry: Entry) {
        self.held_up = None;
        self.fence_wanted = false;
        self.timers.stop_all();
        let step = Release::Recording;
        self.state = State::Decided(Decided::Releasing { outcome, step });
        self.journal(entry);
    }

    /// The target says something: it is not silent.
    pub(super) fn heard_in_drain(&mut self, now: Time) {
        if let State::Decided(Decided::Draining(_)) = self.state {
            self.fence_wanted = false;
            self.timers
                .set(Timer::Silence, now.after(super::SILENCE_MAX));
        }
    }
}
