//! How a migration is decided, given away, taken back and broken off.

use super::state::{Decided, Drain, Outcome, Over, Reclaim, Release, State, Step, Timer, Undo};
use super::{SourceAction, SourceMachine};
use crate::migration::handoff::{Evidence, Question, RETRY, Side, TELL_MAX};
use crate::migration::record::{Entry, Record};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::SourceMessage;

impl SourceMachine {
    /// Commits, if the target is ready and CRIU was told the truth about the mappings.
    pub(super) fn prepare_if_complete(&mut self) {
        match std::mem::replace(&mut self.state, State::Decided(Decided::prepared())) {
            State::Undecided(undecided, Step::Finishing(finishing)) if finishing.is_complete() => {
                self.timers.stop_all();
                self.journal(undecided.commit(self.generation, self.drains));
            }
            state @ (State::Undecided(..) | State::Decided(_) | State::Over(_)) => {
                self.state = state;
            }
        }
    }

    pub(super) fn journalled(&mut self, now: Time, record: &Record) {
        match &record.entry {
            Entry::Offered(_) => self.offer_recorded(now),
            Entry::Commit { .. } => self.commit_written(now, true),
            Entry::Started { .. } if self.drains => self.started_recorded(now, None),
            Entry::Started { .. } | Entry::Filled { .. } => self.kill(true),
            entry @ Entry::Fenced { .. } => self.evidence_recorded(entry),
            entry @ Entry::Aborted(_) => self.abort_recorded(now, entry),
            Entry::Done => self.closed(),
            entry @ (Entry::Accepted(_)
            | Entry::Ready(_)
            | Entry::Running { .. }
            | Entry::Refused { .. }
            | Entry::Settled { .. }) => self.out_of_place(entry.name()),
        }
    }

    /// A record that may or may not be found after a restart. What may follow it is only what is
    /// right in both cases.
    pub(super) fn journal_failed(&mut self, now: Time, record: &Record) {
        let text = format!("record {} could not be written", record.entry.name());
        let failure = Failure::new(ErrorCode::JournalFailed, text);
        match &record.entry {
            Entry::Offered(_) => match &self.state {
                State::Undecided(..) => self.abort(failure),
                State::Decided(_) | State::Over(_) => {}
            },
            Entry::Commit { .. } => {
                self.note(failure);
                self.commit_written(now, false);
            }
            Entry::Started { .. } if self.drains => self.started_recorded(now, Some(failure)),
            // It only spares a question after a restart.
            Entry::Started { .. } | Entry::Filled { .. } => self.kill(false),
            // Without it the workload must not be thawed: a restart might find the commit and
            // nothing after it, and tell the target to go.
            Entry::Fenced { .. } => self.retry_later(now, failure),
            entry @ Entry::Aborted(_) => match &self.state {
                State::Decided(Decided::Reclaiming {
                    step: Reclaim::Recording,
                    ..
                }) => self.retry_later(now, failure),
                // A restart would ask the target again.
                State::Decided(Decided::Releasing { .. }) => self.kill(false),
                // A restart would undo once more what is undone, which changes nothing.
                State::Undecided(..) | State::Decided(_) | State::Over(_) => {
                    self.abort_recorded(now, entry);
                }
            },
            Entry::Done => self.closed(),
            entry @ (Entry::Accepted(_)
            | Entry::Ready(_)
            | Entry::Running { .. }
            | Entry::Refused { .. }
            | Entry::Settled { .. }) => self.out_of_place(entry.name()),
        }
    }

    fn offer_recorded(&mut self, now: Time) {
        let Some(step @ Step::Journalling) = self.state.step() else {
            return self.out_of_place("offered");
        };
        *step = Step::Dialling;
        self.timers.set(Timer::Step, now.after(super::DIAL_MAX));
        self.dial();
    }

    /// The fate of the commit is known: it is durable, or it may be. In doubt the target is
    /// asked to refuse: telling it to go would rest on a record that a restart may not find.
    fn commit_written(&mut self, now: Time, durable: bool) {
        let State::Decided(Decided::Prepared { evidence, question }) = &mut self.state else {
            return self.out_of_place("commit");
        };
        if let Some(evidence) = evidence.take() {
            return self.reclaim(evidence);
        }
        let question = if durable { *question } else { Question::Query };
        if durable {
            self.edges.committed = Some(now);
        }
        match question {
            Question::Go if self.locks => self.unlock(1),
            Question::Go | Question::Query => self.await_answer(now, question),
        }
    }

    /// From here on the target says what becomes of the workload.
    pub(super) fn await_answer(&mut self, now: Time, question: Question) {
        self.held_up = None;
        self.state = State::Decided(Decided::Committed { question });
        self.timers
            .set(Timer::Silence, now.after(super::SILENCE_MAX));
        self.speak(now);
    }

    /// The target runs the workload.
    pub(super) fn started(&mut self, now: Time) {
        self.edges.started = Some(now);
        self.answered = true;
        self.failure = None;
        self.held_up = None;
        self.fence_wanted = false;
        self.timers.stop_all();
        if self.drains {
            return self.drain(now);
        }
        self.state = State::Decided(Decided::Releasing {
            outcome: Outcome::Moved,
            step: Release::Recording,
        });
        self.record_started();
    }

    fn kill(&mut self, recorded: bool) {
        let State::Decided(Decided::Releasing {
            step: step @ Release::Recording,
            ..
        }) = &mut self.state
        else {
            return self.out_of_place("the end of the copy");
        };
        *step = Release::Killing { recorded };
        self.actions.push_back(SourceAction::Release);
        if recorded && self.answered {
            self.say_settled();
        }
    }

    pub(super) fn released(&mut self, now: Time) {
        let State::Decided(Decided::Releasing {
            outcome,
            step: Release::Killing { recorded },
        }) = self.state
        else {
            return self.out_of_place("a release");
        };
        self.held_up = None;
        // A restart that finds nothing of it asks the target again.
        if recorded {
            self.settle_or_close(now, outcome);
        } else {
            self.close(outcome);
        }
    }

    /// The target will never run the workload. That goes to disk before the workload runs here.
    pub(super) fn reclaim(&mut self, evidence: Evidence) {
        self.held_up = None;
        self.failure = Some(evidence.failure());
        self.fence_wanted = false;
        self.timers.stop_all();
        self.journal(evidence.entry());
        self.state = State::Decided(Decided::Reclaiming {
            evidence,
            step: Reclaim::Recording,
        });
    }

    fn evidence_recorded(&mut self, entry: &Entry) {
        let State::Decided(Decided::Reclaiming {
            evidence,
            step: step @ Reclaim::Recording,
        }) = &mut self.state
        else {
            return self.out_of_place(entry.name());
        };
        let Some(permit) = evidence.permit(entry) else {
            return self.out_of_place(entry.name());
        };
        *step = Reclaim::Thawing(permit);
        self.held_up = None;
        self.thaw(permit, true);
    }

    fn abort_recorded(&mut self, now: Time, entry: &Entry) {
        match &self.state {
            State::Decided(Decided::Reclaiming {
                step: Reclaim::Recording,
                ..
            }) => self.evidence_recorded(entry),
            State::Decided(Decided::Reclaiming {
                step: Reclaim::Concluding,
                ..
            })
            | State::Over(Over::Aborting(Undo::Recording)) => self.conclude(now),
            State::Decided(Decided::Releasing {
                outcome: Outcome::Aborted,
                ..
            }) => self.kill(true),
            State::Undecided(..) | State::Decided(_) | State::Over(_) => {
                self.out_of_place("aborted");
            }
        }
    }

    /// Breaks the migration off. Only before a commit: afterwards there is no permit to be had.
    pub(super) fn abort(&mut self, failure: Failure) {
        let permit = match &self.state {
            State::Undecided(undecided, _) => undecided.permit(),
            State::Decided(_) => return self.note(failure),
            State::Over(_) => return,
        };
        self.timers.stop_all();
        if !self.offered {
            self.told = true;
        } else if !self.told {
            let generation = self.generation;
            self.send(SourceMessage::Abort {
                generation,
                failure: failure.clone(),
            });
        }
        self.failure = Some(failure);
        if self.touched {
            self.thaw(permit, true);
            self.state = State::Over(Over::Aborting(Undo::Thawing(permit)));
        } else {
            self.record_abort();
        }
    }

    pub(super) fn abort_with(&mut self, code: ErrorCode, text: &str) {
        self.abort(Failure::new(code, text));
    }

    fn record_abort(&mut self) {
        self.state = State::Over(Over::Aborting(Undo::Recording));
        self.journal(Entry::Aborted(self.failure_or_unknown()));
    }

    pub(super) fn thawed(&mut self, now: Time, untrack: bool) {
        // That of a freeze that was given up; what came since asks for more, and waits for it.
        if !untrack && !matches!(self.state, State::Undecided(_, Step::Retrying(_))) {
            return;
        }
        self.keep_broken();
        self.held_up = None;
        match &mut self.state {
            State::Undecided(_, Step::Retrying(retrying)) => {
                retrying.thawed = true;
                if retrying.pause.is_zero() {
                    retrying.rested = true;
                } else {
                    self.timers.set(Timer::Pause, now.after(retrying.pause));
                }
                self.continue_after_retry();
            }
            State::Over(Over::Aborting(Undo::Thawing(_))) => {
                self.timers.stop(Timer::Retry);
                self.record_abort();
            }
            State::Decided(Decided::Reclaiming {
                evidence,
                step: step @ Reclaim::Thawing(_),
            }) => {
                self.timers.stop(Timer::Retry);
                match evidence {
                    Evidence::Fenced(_) => {
                        *step = Reclaim::Concluding;
                        self.journal(Entry::Aborted(self.failure_or_unknown()));
                    }
                    Evidence::Refused(..) => self.conclude(now),
                }
            }
            // A thaw that was asked for twice.
            State::Decided(Decided::Reclaiming { .. }) | State::Over(_) => {}
            State::Undecided(..) | State::Decided(_) => self.out_of_place("a thaw"),
        }
    }

    /// A lock that another has had meanwhile is had again, and what it protects may have changed:
    /// that is not over with the wait.
    fn keep_broken(&mut self) {
        let Some(broken) = self.held_up.take_if(|held_up| is_taken(held_up)) else {
            return;
        };
        match &self.failure {
            Some(failure) if is_taken(failure) || failure.code() == ErrorCode::WorkloadGone => {}
            Some(failure) => {
                let text = format!("{failure}; then {}", broken.text());
                self.failure = Some(Failure::new(ErrorCode::LockTaken, text));
            }
            None => self.failure = Some(broken),
        }
    }

    /// The copy here is not what it was, which is what there is to say of it.
    pub(super) fn thawed_in_part(&mut self, now: Time, untrack: bool, lost: Failure) {
        if untrack {
            self.failure = Some(lost);
        }
        self.thawed(now, untrack);
    }

    /// The workload runs here, and that is on disk. What the target may still hold it can give
    /// up, once it is told.
    fn conclude(&mut self, now: Time) {
        if self.told {
            return self.settle_or_close(now, Outcome::Aborted);
        }
        self.state = State::Over(Over::Telling);
        self.timers.set(Timer::Tell, now.after(TELL_MAX));
        self.speak(now);
    }

    pub(super) fn target_told(&mut self) {
        self.told = true;
        if let State::Over(Over::Telling) = self.state {
            self.close(Outcome::Aborted);
        }
    }

    pub(super) fn close(&mut self, outcome: Outcome) {
        if outcome == Outcome::Moved {
            self.failure = None;
        }
        self.timers.stop_all();
        self.state = State::Over(Over::Closing { outcome });
        self.journal(Entry::Done);
    }

    fn closed(&mut self) {
        let State::Over(Over::Closing { outcome }) = self.state else {
            return self.out_of_place("done");
        };
        self.state = State::Over(Over::Closed { outcome });
    }

    pub(super) fn failed(&mut self, now: Time, failure: Failure) {
        match &self.state {
            State::Undecided(..) => self.abort(failure),
            State::Decided(
                Decided::Releasing {
                    step: Release::Killing { .. },
                    ..
                }
                | Decided::Reclaiming {
                    step: Reclaim::Thawing(_),
                    ..
                },
            )
            | State::Over(Over::Aborting(Undo::Thawing(_))) => self.retry_later(now, failure),
            State::Decided(Decided::Unlocking { tries }) => {
                let tries = *tries;
                self.unlock_failed(now, tries, failure);
            }
            State::Decided(_) => self.note(failure),
            State::Over(_) => {}
        }
    }

    pub(super) fn abort_requested(&mut self, now: Time) {
        match &mut self.state {
            State::Undecided(..) => {
                self.abort_with(ErrorCode::Aborted, "the operator ended the migration");
            }
            State::Decided(Decided::Prepared { question, .. }) => *question = Question::Query,
            State::Decided(Decided::Committed { question }) => {
                *question = Question::Query;
                self.speak(now);
            }
            State::Decided(Decided::Unlocking { .. }) => self.await_answer(now, Question::Query),
            State::Decided(_) | State::Over(_) => {}
        }
    }

    /// A source is never fenced at itself: whoever can be told is alive.
    pub(super) fn fenced(&mut self, side: Side) {
        if side == Side::Source {
            return;
        }
        let fenced = Evidence::Fenced(self.generation);
        match &mut self.state {
            State::Undecided(..) => self.abort(fenced.failure()),
            State::Decided(Decided::Prepared { evidence, .. }) => {
                evidence.get_or_insert(fenced);
            }
            State::Decided(Decided::Unlocking { .. } | Decided::Committed { .. }) => {
                self.reclaim(fenced);
            }
            State::Decided(Decided::Draining(_)) => self.fenced_in_drain(),
            State::Decided(_) | State::Over(_) => {}
        }
    }

    pub(super) fn expired(&mut self, now: Time, timer: Timer) {
        match timer {
            Timer::Overall => self.overdue(),
            Timer::Step => {
                let text = format!("{} took too long", self.state.phase());
                self.abort_with(ErrorCode::Timeout, &text);
            }
            Timer::Frozen => self.frozen_too_long(now),
            Timer::Pause => match self.state.step() {
                Some(Step::Retrying(retrying)) => {
                    retrying.rested = true;
                    self.continue_after_retry();
                }
                Some(Step::Holding { next }) => {
                    let next = *next;
                    self.send_round(next);
                }
                _ => {}
            },
            Timer::Resend | Timer::Redial => self.speak(now),
            Timer::Retry => self.again(),
            Timer::Silence => self.fence_wanted = true,
            Timer::Tell => {
                if let State::Over(Over::Settling { outcome }) = self.state {
                    self.close(outcome);
                } else {
                    self.target_told();
                }
            }
        }
    }

    /// Does once more what failed and must succeed.
    fn again(&mut self) {
        match &self.state {
            State::Decided(Decided::Draining(Drain {
                recorded: false, ..
            })) => self.record_started(),
            State::Decided(Decided::Releasing {
                step: Release::Killing { .. },
                ..
            }) => {
                self.actions.push_back(SourceAction::Release);
            }
            State::Decided(Decided::Reclaiming {
                evidence,
                step: Reclaim::Recording,
            }) => self.journal(evidence.entry()),
            State::Decided(Decided::Reclaiming {
                step: Reclaim::Thawing(permit),
                ..
            })
            | State::Over(Over::Aborting(Undo::Thawing(permit))) => self.thaw(*permit, true),
            State::Decided(Decided::Unlocking { tries }) => {
                let tries = *tries;
                self.unlock(tries + 1);
            }
            State::Undecided(..) | State::Decided(_) | State::Over(_) => {}
        }
    }

    pub(super) fn retry_later(&mut self, now: Time, failure: Failure) {
        self.held_up = Some(failure);
        self.timers.set(Timer::Retry, now.after(RETRY));
    }
}

fn is_taken(failure: &Failure) -> bool {
    failure.code() == ErrorCode::LockTaken
}
