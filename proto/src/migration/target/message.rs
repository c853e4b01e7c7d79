//! What the source says, and what the target makes of it.

use super::state::{Aborting, Receiving, Refusal, Running, Start, State, Verdict};
use super::{TargetAction, TargetMachine};
use crate::id::{Generation, Round};
use crate::migration::record::Entry;
use crate::page::PageCount;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::{Final, Offer, RoundEnd, SourceMessage, TargetMessage};

impl TargetMachine {
    pub(super) fn message(&mut self, message: SourceMessage) {
        match message {
            SourceMessage::Abort {
                generation,
                failure,
            } => self.source_aborted(generation, failure),
            SourceMessage::Final(last) => self.final_ended(last),
            SourceMessage::Go { generation } => self.go(generation),
            SourceMessage::Offer(offer) => self.offered(offer),
            SourceMessage::Query { generation } => self.queried(generation),
            SourceMessage::RoundEnd(end) => self.round_ended(end),
            SourceMessage::Settled { generation } => self.source_settled(generation),
        }
    }

    fn offered(&mut self, offer: Box<Offer>) {
        let State::Idle = self.state else {
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
        self.state = State::Preparing {
            workload: offer.workload.clone(),
        };
        self.actions.push_back(TargetAction::Prepare(offer));
    }

    fn round_ended(&mut self, end: RoundEnd) {
        let State::Receiving(receiving) = &mut self.state else {
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
        let State::Receiving(receiving) = &self.state else {
            return self.out_of_place("the end of the final round");
        };
        if receiving.open != last.round || receiving.ended.is_some() {
            return self.out_of_place("the end of another final round");
        }
        self.round = Some(last.round);
        self.actions.push_back(TargetAction::AwaitFinal(last));
        self.state = State::Storing(last);
    }

    /// The source has committed this generation, durably.
    fn go(&mut self, asked: Generation) {
        match &self.state {
            State::Ready { generation } if *generation == asked => self.run(asked),
            State::Idle
            | State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Readying { .. }
            | State::Ready { .. }
            | State::Running(_)
            | State::Refusing(_)
            | State::Refused { .. }
            | State::Aborting(_)
            | State::Aborted
            | State::Done { .. } => self.answer(asked),
        }
    }

    /// The source wants to know; if the workload does not run yet, it must never.
    fn queried(&mut self, asked: Generation) {
        match &self.state {
            State::Ready { generation } if *generation == asked => {
                self.refuse(
                    *generation,
                    Failure::new(ErrorCode::Refused, "the source asked for the workload back"),
                );
            }
            State::Idle
            | State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Readying { .. }
            | State::Ready { .. }
            | State::Running(_)
            | State::Refusing(_)
            | State::Refused { .. }
            | State::Aborting(_)
            | State::Aborted
            | State::Done { .. } => self.answer(asked),
        }
    }

    /// What the state says of a generation that cannot be run or refused just now. No answer
    /// where the journal has still to say: the source asks again.
    fn answer(&mut self, asked: Generation) {
        let answer = match &self.state {
            State::Running(running) => match running.step {
                Start::Recording | Start::LettingGo { .. } | Start::Stuck | Start::Burying => None,
                Start::Filling | Start::Closing => self.answer_started(running.generation, asked),
                // It may have run: only the operator can say what that is worth.
                Start::Losing | Start::Lost => Some(TargetMessage::Unknown { generation: asked }),
            },
            State::Done { generation } => self.answer_started(*generation, asked),
            State::Refused { generation } => self.answer_refused(*generation, asked),
            State::Refusing(refusing) => match refusing.step {
                Refusal::Recording | Refusal::Discarding => None,
                Refusal::Closing => self.answer_refused(refusing.generation, asked),
            },
            State::Readying { .. } => None,
            // A source that has committed was told `Ready`. If this is not what the journal
            // says, the journal is not the one that said it.
            State::Idle
            | State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Ready { .. }
            | State::Aborting(_)
            | State::Aborted => Some(TargetMessage::Unknown { generation: asked }),
        };
        if let Some(answer) = answer {
            self.send(answer);
        }
    }

    fn answer_started(&self, running: Generation, asked: Generation) -> Option<TargetMessage> {
        let generation = asked;
        if running == asked {
            Some(TargetMessage::Started {
                generation,
                root_pid: None,
            })
        } else {
            Some(TargetMessage::Unknown { generation })
        }
    }

    fn answer_refused(&self, refused: Generation, asked: Generation) -> Option<TargetMessage> {
        let generation = asked;
        if asked <= refused {
            Some(TargetMessage::Refused {
                generation: refused,
            })
        } else {
            Some(TargetMessage::Unknown { generation })
        }
    }

    /// The source has not committed any generation up to this one, and never will.
    fn source_aborted(&mut self, ended: Generation, failure: Failure) {
        self.over_at_source = self.over_at_source.max(Some(ended));
        match &mut self.state {
            State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. } => self.undo(failure, Some(ended)),
            State::Readying { entry, verdict, .. } if entry.generation <= ended => {
                *verdict = Verdict::Refuse(failure);
            }
            State::Ready { generation } if *generation <= ended => {
                let generation = *generation;
                self.refuse(generation, failure);
            }
            State::Aborting(Aborting { asked, .. }) => *asked = Some(ended),
            State::Refused { generation } => {
                let generation = *generation;
                self.send(TargetMessage::Refused { generation });
            }
            State::Refusing(refusing) if refusing.step == Refusal::Closing => {
                let generation = refusing.generation;
                self.send(TargetMessage::Refused { generation });
            }
            State::Idle
            | State::Aborted
            | State::Running(Running {
                step: Start::Losing | Start::Lost,
                ..
            }) => {
                self.send(TargetMessage::Unknown { generation: ended });
            }
            State::Running(_) | State::Done { .. } => self.abort_too_late(),
            // A generation that this target has left behind, or a refusal on its way.
            State::Readying { .. } | State::Ready { .. } | State::Refusing(_) => {}
        }
        self.settle();
    }

    /// The source has on disk how this ended, and never asks again.
    fn source_settled(&mut self, settled: Generation) {
        match &self.state {
            State::Running(_) | State::Refusing(_) | State::Refused { .. } | State::Done { .. } => {
                self.over_at_source = self.over_at_source.max(Some(settled));
                if self.settled {
                    self.say_forgotten();
                } else {
                    self.settle();
                }
            }
            // It was said before, and the answer was lost.
            State::Idle | State::Aborted => {
                self.send(TargetMessage::Forgotten {
                    generation: settled,
                });
            }
            State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Readying { .. }
            | State::Ready { .. }
            | State::Aborting(_) => self.out_of_place("a settled migration"),
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
    fn abort_too_late(&mut self) {
        let generation = match &self.state {
            State::Running(running) => match running.step {
                Start::Recording
                | Start::LettingGo { .. }
                | Start::Stuck
                | Start::Burying
                | Start::Losing
                | Start::Lost => None,
                Start::Filling | Start::Closing => Some(running.generation),
            },
            State::Done { generation } => Some(*generation),
            State::Idle
            | State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Readying { .. }
            | State::Ready { .. }
            | State::Refusing(_)
            | State::Refused { .. }
            | State::Aborting(_)
            | State::Aborted => None,
        };
        self.note(Failure::new(
            ErrorCode::Unexpected,
            "the source aborted what it had told this node to run",
        ));
        if let Some(generation) = generation {
            self.send(TargetMessage::Started {
                generation,
                root_pid: None,
            });
        }
    }

    pub(super) fn receive(&mut self) {
        self.state = State::Receiving(Receiving {
            open: Round::FIRST,
            ended: None,
        });
        self.send(TargetMessage::Accepted {
            incarnation: self.incarnation,
        });
    }
}
