//! What the source says, and what the target makes of it.

use super::state::{Absent, Fate, Held, Receiving, State, Step, Told};
use super::{TargetAction, TargetMachine};
use crate::id::{Generation, Round};
use crate::migration::record::Entry;
use crate::migration::timer::Time;
use crate::page::PageCount;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::{Final, Offer, RoundEnd, SourceMessage, TargetMessage};

impl TargetMachine {
    pub(super) fn message(&mut self, now: Time, message: SourceMessage) {
        match message {
            SourceMessage::Abort {
                generation,
                failure,
            } => self.source_aborted(generation, failure),
            SourceMessage::DrainLost {
                generation,
                failure,
            } => self.source_lost(now, generation, failure),
            SourceMessage::Draining { generation } => self.source_drains(generation),
            SourceMessage::Final(last) => self.final_ended(last),
            SourceMessage::Go { generation } => self.go(generation),
            SourceMessage::Offer(offer) => self.offered(offer),
            SourceMessage::Query { generation } => self.queried(generation),
            SourceMessage::RoundEnd(end) => self.round_ended(end),
            SourceMessage::Settled { generation } => self.source_settled(generation),
        }
    }

    fn offered(&mut self, offer: Box<Offer>) {
        let State::Absent(Absent::Idle) = self.state else {
            return self.out_of_place("an offer");
        };
        let bytes = offer
            .description
            .spaces
            .iter()
            .map(|space| space.memory_bytes)
            .sum();
        self.memory = PageCount::covering(bytes);
        self.workload = Some(offer.workload.clone());
        self.state = State::Unready(Step::Preparing {
            workload: offer.workload.clone(),
        });
        self.actions.push_back(TargetAction::Prepare(offer));
    }

    fn round_ended(&mut self, end: RoundEnd) {
        let State::Unready(Step::Receiving(receiving)) = &mut self.state else {
            return self.out_of_place("the end of a round");
        };
        if receiving.open != end.round || receiving.ended.is_some() {
            return self.out_of_place("the end of another round");
        }
        receiving.ended = Some(end.round);
        self.round = Some(end.round);
        self.actions.push_back(TargetAction::AwaitRound(end));
    }

    fn final_ended(&mut self, last: Final) {
        let State::Unready(Step::Receiving(receiving)) = &self.state else {
            return self.out_of_place("the end of the final round");
        };
        if receiving.open != last.round || receiving.ended.is_some() {
            return self.out_of_place("the end of another final round");
        }
        self.round = Some(last.round);
        self.locks = last.locks != 0;
        self.drains = last.absent_pages != PageCount::ZERO;
        self.actions.push_back(TargetAction::AwaitFinal(last));
        self.state = State::Unready(Step::Storing(last));
    }

    /// The source has committed this generation, durably, and has let go of its locks.
    fn go(&mut self, asked: Generation) {
        match &self.state {
            State::Held(Held::Ready { generation }) if *generation == asked => {
                self.lock_and_run(asked, Told::Go);
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.answer(asked);
            }
        }
    }

    /// The source wants to know; if the workload does not run yet, it must never.
    fn queried(&mut self, asked: Generation) {
        match &self.state {
            State::Held(Held::Ready { generation } | Held::Locking { generation, .. })
                if *generation == asked =>
            {
                let text = "the source asked for the workload back";
                self.refuse(asked, Failure::new(ErrorCode::Refused, text));
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.answer(asked);
            }
        }
    }

    /// What the state says of a generation that cannot be run or refused just now. No answer
    /// where the journal has still to say: the source asks again.
    pub(super) fn answer(&mut self, asked: Generation) {
        let answer = match self.state {
            State::Held(Held::Readying { .. }) => return,
            State::Held(Held::Locking { generation, .. }) if generation == asked => return,
            State::Decided(_, fate) if !fate.is_known() => return,
            State::Decided(generation, Fate::Running(_) | Fate::Abandoned(_))
                if generation == asked =>
            {
                TargetMessage::Started {
                    generation,
                    root_pid: None,
                }
            }
            State::Decided(generation, Fate::Refusing(_)) if asked <= generation => {
                TargetMessage::Refused {
                    generation,
                    failure: self.failure.clone(),
                }
            }
            // A source that has committed was told `Ready`. If this is not what the journal
            // says, the journal is not the one that said it.
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                TargetMessage::Unknown { generation: asked }
            }
        };
        self.send(answer);
    }

    /// The source has not committed any generation up to this one, and never will.
    fn source_aborted(&mut self, ended: Generation, failure: Failure) {
        self.over_at_source = self.over_at_source.max(Some(ended));
        match &mut self.state {
            State::Unready(_) => self.undo(failure, Some(ended)),
            State::Held(held) if held.generation() <= ended => self.withdraw(failure),
            // A generation that this target has left behind.
            State::Held(_) => {}
            State::Decided(generation, fate) => {
                let (generation, fate) = (*generation, *fate);
                match fate {
                    Fate::Running(_) | Fate::Abandoned(_) => {
                        self.note_late_abort();
                        self.answer(generation);
                    }
                    Fate::Refusing(_) => self.answer(generation),
                    Fate::Lost(_) => {
                        if !fate.is_known() {
                            self.note_late_abort();
                        }
                        self.answer(ended);
                    }
                }
            }
            State::Absent(Absent::Discarding { asked } | Absent::Closing { asked }) => {
                *asked = Some(ended);
            }
            State::Absent(Absent::Idle | Absent::Closed) => self.answer(ended),
        }
        self.settle();
    }

    /// The source has on disk how this ended, and never asks again.
    fn source_settled(&mut self, settled: Generation) {
        match &self.state {
            State::Decided(..) => {
                self.over_at_source = self.over_at_source.max(Some(settled));
                if self.settled {
                    self.say_forgotten();
                } else {
                    self.settle();
                }
            }
            // It was said before, and the answer was lost.
            State::Absent(Absent::Idle | Absent::Closed) => {
                self.send(TargetMessage::Forgotten {
                    generation: settled,
                });
            }
            State::Unready(_) | State::Held(_) | State::Absent(_) => {
                self.out_of_place("a settled migration");
            }
        }
    }

    /// Writes that nothing need be remembered, once, if the source has said so of what is decided.
    pub(super) fn settle(&mut self) {
        let Some(generation) = self.state.decided() else {
            return;
        };
        if !self.settled && Some(generation) <= self.over_at_source {
            self.settled = true;
            self.journal(Entry::Settled { generation });
        }
    }

    pub(super) fn say_forgotten(&mut self) {
        if let Some(generation) = self.over_at_source {
            self.send(TargetMessage::Forgotten { generation });
        }
    }

    /// Only a source that took the target for dead aborts what it has committed.
    fn note_late_abort(&mut self) {
        self.note(Failure::new(
            ErrorCode::Unexpected,
            "the source aborted what it had told this node to run",
        ));
    }

    pub(super) fn receive(&mut self) {
        let State::Unready(step @ Step::Accepting) = &mut self.state else {
            return self.out_of_place("accepted");
        };
        *step = Step::Receiving(Receiving {
            open: Round::FIRST,
            ended: None,
        });
        self.send(TargetMessage::Accepted {
            incarnation: self.incarnation,
            kept: Vec::new(),
            parks: false,
            drains: false,
        });
    }
}
