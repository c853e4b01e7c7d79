//! How a workload comes to run at the target, or never does.

use super::state::{
    Abandon, Absent, Fate, Held, Loss, Refusal, Run, State, Step, Timer, Told, Verdict,
};
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
            Entry::Accepted(_) => self.receive(),
            Entry::Ready(_) => self.ready(),
            Entry::Running { .. } => self.let_go(1),
            Entry::Filled { .. } => self.filled_recorded(),
            Entry::Refused { .. } => self.refusal_recorded(),
            Entry::Settled { .. } => self.say_forgotten(),
            Entry::Aborted(_) if self.is_abandoned() => self.loss_recorded(),
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
            Entry::Accepted(_) => match &self.state {
                State::Unready(_) => self.give_up(failure),
                State::Held(_) | State::Decided(..) | State::Absent(_) => {}
            },
            Entry::Ready(_) => self.ready_failed(now, failure),
            // Either decision stands once it was asked for: the record may be on disk.
            Entry::Running { .. } | Entry::Refused { .. } => self.retry_later(now, failure),
            // The source keeps its copy until it hears of it.
            Entry::Filled { .. } => self.retry_later(now, failure),
            // Pages are missing: it must not run on, and waits meanwhile.
            Entry::Aborted(_) if self.is_abandoned() => self.retry_later(now, failure),
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
        let State::Held(Held::Readying {
            entry,
            said,
            verdict,
        }) = &mut self.state
        else {
            return self.out_of_place("ready");
        };
        let (generation, said) = (entry.generation, *said);
        match std::mem::replace(verdict, Verdict::Hold) {
            Verdict::Hold => {
                self.state = State::Held(Held::Ready { generation });
                if !said {
                    let incarnation = self.incarnation;
                    self.send(TargetMessage::Ready {
                        generation,
                        incarnation,
                    });
                }
            }
            Verdict::Refuse(failure) => self.refuse(generation, failure),
            Verdict::Run => self.lock_and_run(generation, Told::Fenced),
        }
    }

    /// If `Ready` was never said, nobody can have committed to it, wherever the record is.
    fn ready_failed(&mut self, now: Time, failure: Failure) {
        match &self.state {
            State::Held(Held::Readying { said: false, .. }) => self.give_up(failure),
            State::Held(Held::Readying { said: true, .. }) => self.retry_later(now, failure),
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.out_of_place("ready");
            }
        }
    }

    /// The decision to run: from here on only proof that nothing ran permits to refuse.
    pub(super) fn run(&mut self, generation: Generation) {
        let recording = Run::Recording { filled: false };
        self.state = State::Decided(generation, Fate::Running(recording));
        self.journal(Entry::Running { generation });
    }

    fn let_go(&mut self, tries: u32) {
        let State::Decided(
            generation,
            Fate::Running(Run::Recording { filled } | Run::LettingGo { filled, .. }),
        ) = self.state
        else {
            return self.out_of_place("running");
        };
        let letting_go = Run::LettingGo { tries, filled };
        self.state = State::Decided(generation, Fate::Running(letting_go));
        self.actions.push_back(TargetAction::LetGo { generation });
    }

    pub(super) fn resumed(&mut self) {
        let State::Decided(generation, Fate::Running(run)) = &mut self.state else {
            return self.out_of_place("a resumed workload");
        };
        let filled = match *run {
            Run::LettingGo { filled, .. } => filled,
            // Let go twice, resumed twice.
            Run::Filling | Run::Filled | Run::Closing | Run::Closed => return,
            Run::Recording { .. } => return self.out_of_place("a resumed workload"),
        };
        *run = Run::Filling;
        let generation = *generation;
        self.failure = self.broken.clone();
        self.timers.stop_all();
        self.send(TargetMessage::Started {
            generation,
            root_pid: None,
        });
        let lost = self.pages_lost.take();
        match lost {
            _ if filled => self.filled(),
            Some(lost) => self.abandon(&lost),
            None => {}
        }
    }

    /// Whether what ran is being given up, and that is not on disk.
    const fn is_abandoned(&self) -> bool {
        matches!(
            self.state,
            State::Decided(_, Fate::Abandoned(Abandon::Recording))
        )
    }

    pub(super) fn filled(&mut self) {
        let run = match &mut self.state {
            State::Decided(_, Fate::Running(run)) => run,
            // Nobody lets it go any more.
            State::Decided(_, Fate::Lost(_) | Fate::Abandoned(_)) => return,
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                return self.out_of_place("a filled workload");
            }
        };
        match run {
            Run::Recording { filled } | Run::LettingGo { filled, .. } => *filled = true,
            Run::Filling if self.drains => self.record_filled(),
            Run::Filling => {
                *run = Run::Closing;
                self.journal(Entry::Done);
            }
            Run::Filled | Run::Closing | Run::Closed => {}
        }
    }

    /// The decision never to run: excludes `Running` from here on.
    pub(super) fn refuse(&mut self, generation: Generation, failure: Failure) {
        self.timers.stop_all();
        self.failure = Some(failure);
        self.state = State::Decided(generation, Fate::Refusing(Refusal::Recording));
        self.journal(Entry::Refused { generation });
        // It may have said so before there was anything to refuse.
        self.settle();
    }

    /// What was to run cannot, and did not: the source may have it back. Before `Started` nobody
    /// was told otherwise.
    pub(super) fn never_ran(&mut self, now: Time, failure: Failure) {
        match &self.state {
            State::Decided(generation, Fate::Running(Run::LettingGo { .. })) => {
                let generation = *generation;
                self.refuse(generation, failure);
            }
            // Asked for twice, and known already.
            State::Decided(_, Fate::Refusing(_)) => {}
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.failed(now, failure);
            }
        }
    }

    /// What was to run never will any more, and may have: that is neither a start nor a refusal.
    pub(super) fn lost(&mut self, now: Time, failure: Failure) {
        let State::Decided(_, fate) = &mut self.state else {
            return self.failed(now, failure);
        };
        match fate {
            Fate::Running(Run::LettingGo { .. }) | Fate::Lost(Loss::Stuck | Loss::Burying) => {
                *fate = Fate::Lost(Loss::Closing);
                self.timers.stop_all();
                self.failure = Some(failure.clone());
                self.journal(Entry::Aborted(failure));
            }
            // Asked for twice, and known already.
            Fate::Lost(Loss::Closing | Loss::Closed) => {}
            // It is asked for again when `Running` is on disk. If it has run, that is the answer.
            Fate::Running(Run::Recording { .. } | Run::Filling | Run::Filled | Run::Closing) => {
                self.note(failure);
            }
            Fate::Running(Run::Closed) | Fate::Refusing(_) | Fate::Abandoned(_) => {
                self.failed(now, failure);
            }
        }
    }

    /// Nobody tries any more to let it go, and only the operator can end that.
    pub(super) fn gave_up(&mut self, now: Time, failure: Failure) {
        let State::Decided(_, fate @ Fate::Running(Run::LettingGo { .. })) = &mut self.state else {
            return self.failed(now, failure);
        };
        *fate = Fate::Lost(Loss::Stuck);
        self.timers.stop_all();
        let text = format!(
            "letting it go was given up, and whether it runs is not known: {}. If it does not, \
             declare the target dead at the target itself: `pageferry resolve --help`",
            failure.text()
        );
        self.note(Failure::new(failure.code(), text));
    }

    fn refusal_recorded(&mut self) {
        let State::Decided(_, Fate::Refusing(refusal @ Refusal::Recording)) = &mut self.state
        else {
            return self.out_of_place("refused");
        };
        *refusal = Refusal::Discarding;
        self.actions.push_back(TargetAction::Discard);
    }

    /// Gives up before `Ready`, and says so to a source that did not ask for it.
    pub(super) fn give_up(&mut self, failure: Failure) {
        let message = match &self.state {
            State::Unready(Step::Preparing { .. }) => TargetMessage::Declined(failure.clone()),
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                TargetMessage::Failed(failure.clone())
            }
        };
        self.send(message);
        self.undo(failure, None);
    }

    pub(super) fn undo(&mut self, failure: Failure, asked: Option<Generation>) {
        self.failure = Some(failure);
        self.timers.stop_all();
        self.state = State::Absent(Absent::Discarding { asked });
        self.actions.push_back(TargetAction::Discard);
    }

    pub(super) fn discarded(&mut self) {
        match &mut self.state {
            State::Decided(generation, Fate::Refusing(refusal @ Refusal::Discarding)) => {
                let generation = *generation;
                *refusal = Refusal::Closing;
                let failure = self.failure.clone();
                self.send(TargetMessage::Refused {
                    generation,
                    failure,
                });
                self.journal(Entry::Aborted(self.failure_or_unknown()));
            }
            State::Decided(_, Fate::Lost(loss @ Loss::Burying)) => {
                *loss = Loss::Closing;
                self.journal(Entry::Aborted(self.failure_or_unknown()));
            }
            State::Absent(Absent::Discarding { asked }) => {
                self.state = State::Absent(Absent::Closing { asked: *asked });
                if self.recorded {
                    self.journal(Entry::Aborted(self.failure_or_unknown()));
                } else {
                    self.closed();
                }
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.out_of_place("a discarded workload");
            }
        }
    }

    /// What cannot be discarded is not run either: that is all that the source must know of what
    /// never ran. What may have run is not over.
    pub(super) fn discard_failed(&mut self, failure: Failure) {
        self.note(failure);
        if let State::Decided(_, Fate::Lost(loss @ Loss::Burying)) = &mut self.state {
            *loss = Loss::Stuck;
        } else {
            self.discarded();
        }
    }

    /// The last record is written, or could not be: nothing depends on it.
    fn closed(&mut self) {
        match &mut self.state {
            State::Decided(_, Fate::Refusing(refusal @ Refusal::Closing)) => {
                *refusal = Refusal::Closed;
            }
            State::Decided(_, Fate::Running(run @ Run::Closing)) => *run = Run::Closed,
            State::Decided(_, Fate::Lost(loss @ Loss::Closing)) => *loss = Loss::Closed,
            State::Decided(_, Fate::Abandoned(abandon @ Abandon::Closing)) => {
                *abandon = Abandon::Closed;
            }
            State::Absent(Absent::Closing { asked }) => {
                let asked = *asked;
                self.state = State::Absent(Absent::Closed);
                if let Some(generation) = asked {
                    self.send(TargetMessage::Unknown { generation });
                }
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.out_of_place("the last record");
            }
        }
    }

    pub(super) fn failed(&mut self, now: Time, failure: Failure) {
        match &self.state {
            State::Unready(_) | State::Held(_) => self.withdraw(failure),
            State::Decided(_, Fate::Running(run)) => match *run {
                Run::LettingGo { tries, .. } if tries < LET_GO_TRIES_MAX => {
                    self.retry_later(now, failure);
                }
                Run::LettingGo { .. } => self.gave_up(now, failure),
                Run::Closed => {}
                Run::Recording { .. } | Run::Filling | Run::Filled | Run::Closing => {
                    self.note(failure);
                }
            },
            State::Decided(_, Fate::Lost(_)) => self.note(failure),
            State::Decided(_, Fate::Abandoned(Abandon::Freezing)) => {
                self.retry_later(now, failure);
            }
            // What is being undone may still report that it failed; the discard goes on.
            State::Decided(_, Fate::Refusing(Refusal::Discarding))
            | State::Absent(Absent::Discarding { .. }) => self.note(failure),
            State::Decided(..) | State::Absent(_) => {}
        }
    }

    pub(super) fn abort_requested(&mut self) {
        self.withdraw(Failure::new(
            ErrorCode::Aborted,
            "the operator ended the migration",
        ));
    }

    /// Sees to it that the workload never runs here, unless that is decided.
    pub(super) fn withdraw(&mut self, failure: Failure) {
        match &mut self.state {
            State::Unready(_) => self.give_up(failure),
            State::Held(Held::Readying { verdict, .. }) => *verdict = Verdict::Refuse(failure),
            State::Held(Held::Ready { generation } | Held::Locking { generation, .. }) => {
                let generation = *generation;
                self.refuse(generation, failure);
            }
            State::Decided(..) | State::Absent(_) => {}
        }
    }

    pub(super) fn fenced(&mut self, side: Side) {
        let text = format!("the operator declared the {side} dead");
        let failure = Failure::new(ErrorCode::Fenced, text);
        if side == Side::Source && self.fenced_in_drain(&failure) {
            return;
        }
        match (&mut self.state, side) {
            (State::Held(Held::Readying { verdict, .. }), Side::Source) => {
                // What was decided before stays: a source that aborted has run on.
                if matches!(verdict, Verdict::Hold) {
                    *verdict = Verdict::Run;
                }
            }
            (State::Held(Held::Ready { generation }), Side::Source) => {
                let generation = *generation;
                self.lock_and_run(generation, Told::Fenced);
            }
            (State::Held(Held::Locking { why, .. }), Side::Source) => *why = Told::Fenced,
            // Nobody lets it go any more: from here on nobody may run it here either.
            (State::Decided(_, Fate::Lost(loss @ Loss::Stuck)), Side::Target) => {
                *loss = Loss::Burying;
                self.failure = Some(failure);
                self.actions.push_back(TargetAction::Discard);
            }
            (_, Side::Source | Side::Target) => self.withdraw(failure),
        }
    }

    /// Does once more what failed and must succeed.
    pub(super) fn again(&mut self) {
        match &self.state {
            State::Held(Held::Readying {
                entry, said: true, ..
            }) => self.journal(Entry::Ready(entry.clone())),
            State::Held(Held::Locking { tries, .. }) => {
                let tries = *tries + 1;
                self.lock_again(tries);
            }
            &State::Decided(generation, Fate::Running(Run::Recording { .. })) => {
                self.journal(Entry::Running { generation });
            }
            State::Decided(_, Fate::Running(Run::LettingGo { tries, .. })) => {
                self.let_go(*tries + 1);
            }
            &State::Decided(generation, Fate::Refusing(Refusal::Recording)) => {
                self.journal(Entry::Refused { generation });
            }
            &State::Decided(generation, Fate::Running(Run::Filled)) => {
                self.journal(Entry::Filled { generation });
            }
            State::Decided(_, Fate::Abandoned(Abandon::Recording)) => {
                self.journal(Entry::Aborted(self.failure_or_unknown()));
            }
            State::Decided(_, Fate::Abandoned(Abandon::Freezing)) => {
                self.actions.push_back(TargetAction::Abandon);
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {}
        }
    }

    pub(super) fn retry_later(&mut self, now: Time, failure: Failure) {
        self.note(failure);
        self.timers.set(Timer::Retry, now.after(RETRY));
    }
}
