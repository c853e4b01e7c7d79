//! How a workload comes to run at the target, or never does.

use super::state::{Aborting, Place, Refusal, Refusing, Running, Start, State, Timer, Verdict};
use super::{TargetAction, TargetMachine};
use crate::id::Generation;
use crate::migration::handoff::{RETRY, Side};
use crate::migration::record::{Entry, Record};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::TargetMessage;

/// How often a workload that must run is let go before the operator has to look. Letting go is
/// one message to the pager; what fails five times in as many seconds fails for good.
pub const LET_GO_TRIES_MAX: u32 = 5;

impl TargetMachine {
    pub(super) fn journalled(&mut self, record: &Record) {
        match &record.entry {
            Entry::Accepted(_) => match &self.state {
                State::Accepting => self.receive(),
                State::Idle
                | State::Preparing { .. }
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
                | State::Done { .. } => self.out_of_place("accepted"),
            },
            Entry::Ready(_) => self.ready(),
            Entry::Running { .. } => self.let_go(1),
            Entry::Refused { .. } => self.refusal_recorded(),
            Entry::Settled { .. } => self.say_forgotten(),
            Entry::Aborted(_) => self.closed(),
            Entry::Done => self.closed(),
            entry @ (Entry::Offered(_)
            | Entry::Commit { .. }
            | Entry::Started { .. }
            | Entry::Fenced { .. }) => self.out_of_place(entry.name()),
        }
    }

    /// A record that may or may not be found after a restart. What may follow it is only what is
    /// right in both cases.
    pub(super) fn journal_failed(&mut self, now: Time, record: &Record) {
        let text = format!("record {} could not be written", record.entry.name());
        let failure = Failure::new(ErrorCode::JournalFailed, text);
        match &record.entry {
            Entry::Accepted(_) => match self.state.place() {
                Place::Unready => self.give_up(failure),
                Place::Nowhere | Place::Decisive | Place::Over => {}
            },
            Entry::Ready(_) => self.ready_failed(now, failure),
            // Either decision stands once it was asked for: the record may be on disk.
            Entry::Running { .. } | Entry::Refused { .. } => self.retry_later(now, failure),
            // Without it the answer is kept after a restart.
            Entry::Settled { .. } => self.say_forgotten(),
            // A restart would undo once more what is undone, or fill what is filled.
            Entry::Aborted(_) | Entry::Done => self.closed(),
            entry @ (Entry::Offered(_)
            | Entry::Commit { .. }
            | Entry::Started { .. }
            | Entry::Fenced { .. }) => self.out_of_place(entry.name()),
        }
    }

    /// The workload is held, and that is durable.
    fn ready(&mut self) {
        let State::Readying {
            entry,
            said,
            verdict,
        } = &mut self.state
        else {
            return self.out_of_place("ready");
        };
        let (generation, said) = (entry.generation, *said);
        match std::mem::replace(verdict, Verdict::Hold) {
            Verdict::Hold => {
                self.state = State::Ready { generation };
                if !said {
                    let incarnation = self.incarnation;
                    self.send(TargetMessage::Ready {
                        generation,
                        incarnation,
                    });
                }
            }
            Verdict::Refuse(failure) => self.refuse(generation, failure),
            Verdict::Run => self.run(generation),
        }
    }

    /// If `Ready` was never said, nobody can have committed to it, wherever the record is.
    fn ready_failed(&mut self, now: Time, failure: Failure) {
        match &self.state {
            State::Readying { said: false, .. } => self.give_up(failure),
            State::Readying { said: true, .. } => self.retry_later(now, failure),
            State::Idle
            | State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Ready { .. }
            | State::Running(_)
            | State::Refusing(_)
            | State::Refused { .. }
            | State::Aborting(_)
            | State::Aborted
            | State::Done { .. } => self.out_of_place("ready"),
        }
    }

    /// The decision to run: from here on only proof that nothing ran permits to refuse.
    pub(super) fn run(&mut self, generation: Generation) {
        self.state = State::Running(Running {
            generation,
            step: Start::Recording,
            filled: false,
        });
        self.journal(Entry::Running { generation });
    }

    fn let_go(&mut self, tries: u32) {
        let State::Running(running) = &mut self.state else {
            return self.out_of_place("running");
        };
        running.step = Start::LettingGo { tries };
        let generation = running.generation;
        self.actions.push_back(TargetAction::LetGo { generation });
    }

    pub(super) fn resumed(&mut self) {
        let State::Running(running) = &mut self.state else {
            return self.out_of_place("a resumed workload");
        };
        match running.step {
            Start::LettingGo { .. } => {}
            // Let go twice, resumed twice.
            Start::Filling | Start::Closing => return,
            Start::Recording | Start::Stuck | Start::Burying | Start::Losing | Start::Lost => {
                return self.out_of_place("a resumed workload");
            }
        }
        running.step = Start::Filling;
        let (generation, filled) = (running.generation, running.filled);
        self.failure = None;
        self.timers.stop_all();
        self.send(TargetMessage::Started {
            generation,
            root_pid: None,
        });
        if filled {
            self.filled();
        }
    }

    pub(super) fn filled(&mut self) {
        let State::Running(running) = &mut self.state else {
            return self.out_of_place("a filled workload");
        };
        running.filled = true;
        match running.step {
            Start::Filling => {
                running.step = Start::Closing;
                self.journal(Entry::Done);
            }
            Start::Recording
            | Start::LettingGo { .. }
            | Start::Closing
            | Start::Stuck
            | Start::Burying
            | Start::Losing
            | Start::Lost => {}
        }
    }

    /// The decision never to run: excludes `Running` from here on.
    pub(super) fn refuse(&mut self, generation: Generation, failure: Failure) {
        self.failure = Some(failure);
        self.state = State::Refusing(Refusing {
            generation,
            step: Refusal::Recording,
        });
        self.journal(Entry::Refused { generation });
        // It may have said so before there was anything to refuse.
        self.settle();
    }

    /// What was to run cannot, and did not: the source may have it back. Before `Started` nobody
    /// was told otherwise.
    pub(super) fn never_ran(&mut self, now: Time, failure: Failure) {
        match &self.state {
            State::Running(Running {
                generation,
                step: Start::LettingGo { .. },
                ..
            }) => {
                let generation = *generation;
                self.timers.stop_all();
                self.refuse(generation, failure);
            }
            // Asked for twice, and known already.
            State::Refusing(_) | State::Refused { .. } => {}
            State::Idle
            | State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. }
            | State::Readying { .. }
            | State::Ready { .. }
            | State::Running(_)
            | State::Aborting(_)
            | State::Aborted
            | State::Done { .. } => self.failed(now, failure),
        }
    }

    /// What was to run never will any more, and may have: that is neither a start nor a refusal.
    pub(super) fn lost(&mut self, now: Time, failure: Failure) {
        match &mut self.state {
            State::Running(running) => match running.step {
                Start::LettingGo { .. } | Start::Stuck | Start::Burying => {
                    running.step = Start::Losing;
                    self.timers.stop_all();
                    self.failure = Some(failure.clone());
                    self.journal(Entry::Aborted(failure));
                }
                // Asked for twice, and known already.
                Start::Losing | Start::Lost => {}
                // It is asked for again when that is on disk.
                Start::Recording => self.note(failure),
                // It has run, which is the answer.
                Start::Filling | Start::Closing => self.note(failure),
            },
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
            | State::Aborted
            | State::Done { .. } => self.failed(now, failure),
        }
    }

    /// Nobody tries any more to let it go, and only the operator can end that.
    pub(super) fn gave_up(&mut self, now: Time, failure: Failure) {
        let State::Running(Running {
            step: step @ Start::LettingGo { .. },
            ..
        }) = &mut self.state
        else {
            return self.failed(now, failure);
        };
        *step = Start::Stuck;
        self.timers.stop_all();
        let text = format!(
            "letting it go was given up, and whether it runs is not known: {}. If it does not, \
             declare the target dead at the target itself: `pageferry resolve --help`",
            failure.text()
        );
        self.note(Failure::new(failure.code(), text));
    }

    fn refusal_recorded(&mut self) {
        let State::Refusing(refusing) = &mut self.state else {
            return self.out_of_place("refused");
        };
        refusing.step = Refusal::Discarding;
        self.actions.push_back(TargetAction::Discard);
    }

    /// Gives up before `Ready`, and says so to a source that did not ask for it.
    pub(super) fn give_up(&mut self, failure: Failure) {
        let message = match &self.state {
            State::Preparing { .. } => TargetMessage::Declined(failure.clone()),
            State::Idle
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
            | State::Done { .. } => TargetMessage::Failed(failure.clone()),
        };
        self.send(message);
        self.undo(failure, None);
    }

    pub(super) fn undo(&mut self, failure: Failure, asked: Option<Generation>) {
        self.failure = Some(failure);
        self.timers.stop_all();
        self.state = State::Aborting(Aborting {
            asked,
            discarded: false,
        });
        self.actions.push_back(TargetAction::Discard);
    }

    pub(super) fn discarded(&mut self) {
        match &mut self.state {
            State::Refusing(refusing) if refusing.step == Refusal::Discarding => {
                refusing.step = Refusal::Closing;
                let generation = refusing.generation;
                self.send(TargetMessage::Refused { generation });
                self.journal(Entry::Aborted(self.failure_or_unknown()));
            }
            State::Running(Running {
                step: step @ Start::Burying,
                ..
            }) => {
                *step = Start::Losing;
                self.journal(Entry::Aborted(self.failure_or_unknown()));
            }
            State::Aborting(aborting) if !aborting.discarded => {
                aborting.discarded = true;
                if self.recorded {
                    self.journal(Entry::Aborted(self.failure_or_unknown()));
                } else {
                    self.closed();
                }
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
            | State::Done { .. } => self.out_of_place("a discarded workload"),
        }
    }

    /// What cannot be discarded is not run either: that is all that the source must know of what
    /// never ran. What may have run is not over.
    pub(super) fn discard_failed(&mut self, failure: Failure) {
        self.note(failure);
        if let State::Running(Running {
            step: step @ Start::Burying,
            ..
        }) = &mut self.state
        {
            *step = Start::Stuck;
        } else {
            self.discarded();
        }
    }

    /// The last record is written, or could not be: nothing depends on it.
    fn closed(&mut self) {
        match &self.state {
            State::Refusing(refusing) if refusing.step == Refusal::Closing => {
                self.state = State::Refused {
                    generation: refusing.generation,
                };
            }
            State::Running(running) if running.step == Start::Closing => {
                self.state = State::Done {
                    generation: running.generation,
                };
            }
            State::Running(running) if running.step == Start::Losing => {
                self.state = State::Running(Running {
                    generation: running.generation,
                    step: Start::Lost,
                    filled: false,
                });
            }
            State::Aborting(aborting) if aborting.discarded => {
                let asked = aborting.asked;
                self.state = State::Aborted;
                if let Some(generation) = asked {
                    self.send(TargetMessage::Unknown { generation });
                }
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
            | State::Done { .. } => self.out_of_place("the last record"),
        }
    }

    pub(super) fn failed(&mut self, now: Time, failure: Failure) {
        match &mut self.state {
            State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. } => self.give_up(failure),
            State::Readying { verdict, .. } => *verdict = Verdict::Refuse(failure),
            State::Ready { generation } => {
                let generation = *generation;
                self.refuse(generation, failure);
            }
            State::Running(running) => match running.step {
                Start::LettingGo { tries } if tries < LET_GO_TRIES_MAX => {
                    self.retry_later(now, failure);
                }
                Start::LettingGo { .. } => self.gave_up(now, failure),
                Start::Recording
                | Start::Filling
                | Start::Closing
                | Start::Stuck
                | Start::Burying
                | Start::Losing
                | Start::Lost => self.note(failure),
            },
            // What is being undone may still report that it failed; the discard goes on.
            State::Refusing(Refusing {
                step: Refusal::Discarding,
                ..
            })
            | State::Aborting(Aborting {
                discarded: false, ..
            }) => self.note(failure),
            State::Idle
            | State::Refusing(_)
            | State::Refused { .. }
            | State::Aborting(_)
            | State::Aborted
            | State::Done { .. } => {}
        }
    }

    pub(super) fn abort_requested(&mut self) {
        let failure = Failure::new(ErrorCode::Aborted, "the operator ended the migration");
        match &mut self.state {
            State::Preparing { .. }
            | State::Accepting
            | State::Receiving(_)
            | State::Storing(_)
            | State::Restoring { .. } => self.give_up(failure),
            State::Readying { verdict, .. } => *verdict = Verdict::Refuse(failure),
            State::Ready { generation } => {
                let generation = *generation;
                self.refuse(generation, failure);
            }
            State::Idle
            | State::Running(_)
            | State::Refusing(_)
            | State::Refused { .. }
            | State::Aborting(_)
            | State::Aborted
            | State::Done { .. } => {}
        }
    }

    pub(super) fn fenced(&mut self, side: Side) {
        let text = format!("the operator declared the {side} dead");
        let failure = Failure::new(ErrorCode::Fenced, text);
        match (&mut self.state, side) {
            (
                State::Preparing { .. }
                | State::Accepting
                | State::Receiving(_)
                | State::Storing(_)
                | State::Restoring { .. },
                Side::Source | Side::Target,
            ) => self.give_up(failure),
            // What was decided before stays: a source that aborted has run on.
            (
                State::Readying {
                    verdict: verdict @ Verdict::Hold,
                    ..
                },
                Side::Source,
            ) => {
                *verdict = Verdict::Run;
            }
            (State::Readying { verdict, .. }, Side::Target) => {
                *verdict = Verdict::Refuse(failure);
            }
            (State::Ready { generation }, Side::Source) => {
                let generation = *generation;
                self.run(generation);
            }
            (State::Ready { generation }, Side::Target) => {
                let generation = *generation;
                self.refuse(generation, failure);
            }
            // Nobody lets it go any more: from here on nobody may run it here either.
            (
                State::Running(Running {
                    step: step @ Start::Stuck,
                    ..
                }),
                Side::Target,
            ) => {
                *step = Start::Burying;
                self.failure = Some(failure);
                self.actions.push_back(TargetAction::Discard);
            }
            (
                State::Idle
                | State::Readying { .. }
                | State::Running(_)
                | State::Refusing(_)
                | State::Refused { .. }
                | State::Aborting(_)
                | State::Aborted
                | State::Done { .. },
                Side::Source | Side::Target,
            ) => {}
        }
    }

    /// Does once more what failed and must succeed.
    pub(super) fn again(&mut self) {
        match &self.state {
            State::Readying {
                entry, said: true, ..
            } => {
                self.journal(Entry::Ready(entry.clone()));
            }
            State::Running(Running {
                generation, step, ..
            }) => match *step {
                Start::Recording => self.journal(Entry::Running {
                    generation: *generation,
                }),
                Start::LettingGo { tries } => self.let_go(tries + 1),
                Start::Filling
                | Start::Closing
                | Start::Stuck
                | Start::Burying
                | Start::Losing
                | Start::Lost => {}
            },
            State::Refusing(Refusing {
                generation,
                step: Refusal::Recording,
            }) => {
                self.journal(Entry::Refused {
                    generation: *generation,
                });
            }
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
            | State::Aborted
            | State::Done { .. } => {}
        }
    }

    fn retry_later(&mut self, now: Time, failure: Failure) {
        self.note(failure);
        self.timers.set(Timer::Retry, now.after(RETRY));
    }
}
