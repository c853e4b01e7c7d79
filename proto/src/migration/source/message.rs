//! What the target says, and what the source makes of it.

use super::state::{Decided, Over, State, Step, Timer};
use super::{SourceAction, SourceMachine};
use crate::id::{Generation, Incarnation, Round};
use crate::migration::handoff::Evidence;
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::TargetMessage;

impl SourceMachine {
    pub(super) fn message(&mut self, now: Time, message: TargetMessage) {
        self.heard_in_drain(now);
        match message {
            TargetMessage::Accepted {
                incarnation,
                kept: _,
                parks: _,
                drains,
            } => self.accepted(now, incarnation, drains),
            TargetMessage::Declined(failure) => self.target_gave_up(failure),
            TargetMessage::DrainLost {
                generation,
                failure,
            } => self.target_lost(generation, &failure),
            TargetMessage::Failed(failure) => self.target_gave_up(failure),
            // The driver's affair.
            TargetMessage::Fetch(_) => {}
            TargetMessage::Filled { generation } => self.target_filled(generation),
            TargetMessage::FinalHeld { generation } => self.final_held(now, generation),
            TargetMessage::Forgotten { generation } => self.forgotten(generation),
            TargetMessage::Ready {
                generation,
                incarnation,
            } => {
                self.ready(now, generation, incarnation);
            }
            TargetMessage::Refused {
                generation,
                failure,
            } => self.refused(generation, failure),
            TargetMessage::RoundHeld { round } => self.round_held(now, round),
            TargetMessage::Started {
                generation,
                root_pid: _,
            } => self.target_started(now, generation),
            TargetMessage::Unknown { generation: _ } => self.unknown(),
        }
    }

    fn accepted(&mut self, now: Time, incarnation: Incarnation, drains: bool) {
        let Some(Step::Offered) = self.state.step() else {
            return self.out_of_place("an acceptance");
        };
        if !self.agree_to_drain(drains) {
            return;
        }
        let Some(step) = self.state.step() else {
            return;
        };
        *step = Step::Tracking;
        self.incarnation = Some(incarnation);
        self.touched = true;
        self.timers.set(Timer::Step, now.after(super::TRACK_MAX));
        self.actions.push_back(SourceAction::Track);
    }

    /// The target holds nothing any more, and says so before it was ready, or in answer to an
    /// abort.
    fn target_gave_up(&mut self, failure: Failure) {
        match &self.state {
            State::Undecided(..) => {
                self.told = true;
                self.abort(failure);
            }
            // After a commit only a durable refusal counts; this is not one.
            State::Decided(_) => self.note(failure),
            State::Over(_) => self.target_told(),
        }
    }

    fn round_held(&mut self, now: Time, round: Round) {
        match &mut self.state {
            State::Undecided(_, Step::Copying(copying)) if copying.round == round => {
                match copying.report {
                    Some(report) => self.round_complete(now, &report),
                    None => self.out_of_place("a round held before it was sent"),
                }
            }
            State::Undecided(_, Step::Retrying(retrying)) if retrying.round == round => {
                retrying.held = true;
                self.continue_after_retry();
            }
            State::Undecided(..) | State::Decided(_) | State::Over(_) => {
                self.out_of_place("a held round");
            }
        }
    }

    fn final_held(&mut self, now: Time, generation: Generation) {
        let Some(Step::Finishing(finishing)) = self.state.step() else {
            return self.out_of_place("a held final round");
        };
        if !finishing.sent || generation != self.generation {
            return self.out_of_place("a held final round that was not sent");
        }
        self.edges.held = Some(now);
    }

    fn ready(&mut self, now: Time, generation: Generation, incarnation: Incarnation) {
        let Some(Step::Finishing(finishing)) = self.state.step() else {
            return self.out_of_place("a ready target");
        };
        if !finishing.sent || generation != self.generation {
            return self.out_of_place("a target ready for a final round that was not sent");
        }
        if self.incarnation != Some(incarnation) {
            return self.out_of_place("a target ready that is not the one that was sent pages");
        }
        finishing.ready = true;
        self.edges.held.get_or_insert(now);
        self.edges.ready = Some(now);
        self.prepare_if_complete();
    }

    /// The target runs the workload. Only what the source committed can have been started, so
    /// anywhere but in `Committed` this is a repetition or a lie.
    fn target_started(&mut self, now: Time, generation: Generation) {
        match &self.state {
            State::Decided(Decided::Unlocking { .. } | Decided::Committed { .. })
                if generation == self.generation =>
            {
                self.started(now);
            }
            State::Decided(Decided::Draining(_) | Decided::Releasing { .. }) => {}
            State::Decided(Decided::Reclaiming { .. })
            | State::Over(Over::Aborting(_) | Over::Telling) => {
                self.answered = true;
                self.note(Failure::new(
                    ErrorCode::Unexpected,
                    "the target runs the workload though it was declared dead or never told to",
                ));
                self.target_told();
            }
            State::Undecided(..) | State::Decided(_) | State::Over(_) => {
                self.out_of_place("a started workload");
            }
        }
    }

    /// The target will never run this generation or an older one.
    fn refused(&mut self, generation: Generation, reason: Option<Failure>) {
        self.answered = true;
        let refused = Evidence::refused(generation, reason);
        match &mut self.state {
            State::Undecided(..) => {
                self.told = true;
                self.abort(refused.failure());
            }
            State::Decided(Decided::Prepared { evidence, .. }) if self.generation <= generation => {
                evidence.get_or_insert(refused);
            }
            State::Decided(Decided::Unlocking { .. } | Decided::Committed { .. })
                if self.generation <= generation =>
            {
                self.told = true;
                self.reclaim(refused);
            }
            State::Decided(Decided::Reclaiming { .. }) => self.told = true,
            State::Decided(_) => self.out_of_place("a refusal of another generation"),
            State::Over(_) => self.target_told(),
        }
    }

    /// The target's journal knows nothing of the generation. That is no refusal: the journal
    /// may be a new one on a node that runs the workload.
    fn unknown(&mut self) {
        match &self.state {
            State::Decided(
                Decided::Unlocking { .. } | Decided::Committed { .. } | Decided::Draining(_),
            ) => {
                self.fence_wanted = true;
            }
            State::Undecided(..) | State::Decided(_) => {
                self.out_of_place("a target that knows of nothing");
            }
            State::Over(_) => self.target_told(),
        }
    }
}
