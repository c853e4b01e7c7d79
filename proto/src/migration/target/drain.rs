//! What runs here lacks pages that only the frozen copy at the source has.
//!
//! Invariants: that all pages are here is on disk before the source hears it, as it then kills its
//! copy. If pages are lost, that is on disk before the workload is abandoned, and it never runs on
//! without them: it waits for them, and then it is frozen for good.

use super::state::{Abandon, Fate, Held, Loss, Run, State};
use super::{TargetAction, TargetMachine};
use crate::id::Generation;
use crate::migration::handoff::lost_in_drain;
use crate::migration::record::Entry;
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::TargetMessage;

impl TargetMachine {
    /// Whether pages of it are at the source alone.
    pub(super) const fn is_draining(&self) -> bool {
        self.drains && self.state.lacks_pages()
    }

    /// All pages are here: the source may hear of it when that is on disk.
    pub(super) fn record_filled(&mut self) {
        if let State::Decided(generation, Fate::Running(run)) = &mut self.state {
            let generation = *generation;
            *run = Run::Filled;
            self.journal(Entry::Filled { generation });
        }
    }

    pub(super) fn filled_recorded(&mut self) {
        let State::Decided(generation, Fate::Running(run @ Run::Filled)) = &mut self.state else {
            return self.out_of_place("filled");
        };
        let generation = *generation;
        *run = Run::Closing;
        self.failure = self.broken.clone();
        self.timers.stop_all();
        self.send(TargetMessage::Filled { generation });
        self.journal(Entry::Done);
    }

    /// The source keeps its copy for what is missing here, and wants to know.
    pub(super) fn source_drains(&mut self, asked: Generation) {
        match &self.state {
            State::Decided(generation, Fate::Running(run)) if *generation == asked => {
                if run.is_filled() {
                    self.send(TargetMessage::Filled { generation: asked });
                }
            }
            State::Decided(generation, Fate::Abandoned(abandon)) if *generation == asked => {
                if abandon.is_recorded() {
                    self.say_lost(asked);
                }
            }
            // It has run, and is gone: only the source did not know of that.
            State::Decided(generation, Fate::Lost(loss)) if *generation == asked => {
                if matches!(loss, Loss::Closed) {
                    self.say_lost(asked);
                }
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.answer(asked);
            }
        }
    }

    /// The source has lost its copy, or a page of it. What is here already is not lost.
    pub(super) fn source_lost(&mut self, now: Time, asked: Generation, failure: Failure) {
        match &self.state {
            State::Decided(generation, Fate::Running(run))
                if *generation == asked && !run.is_filled() =>
            {
                self.drain_lost(now, failure);
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.source_drains(asked);
            }
        }
    }

    /// A page that is missing never comes.
    pub(super) fn drain_lost(&mut self, now: Time, failure: Failure) {
        if !self.drains {
            return self.failed(now, failure);
        }
        match &self.state {
            State::Unready(_) | State::Held(_) => self.withdraw(failure),
            State::Decided(_, Fate::Running(run)) => match run {
                Run::Filling => self.abandon(&failure),
                // When it is known that it runs.
                Run::Recording { .. } | Run::LettingGo { .. } => {
                    self.pages_lost.get_or_insert(failure);
                }
                Run::Filled | Run::Closing | Run::Closed => {}
            },
            State::Decided(_, Fate::Refusing(_) | Fate::Lost(_) | Fate::Abandoned(_))
            | State::Absent(_) => {}
        }
    }

    /// The operator says that the source is dead, which alone has what is missing. Says whether
    /// that means anything here.
    pub(super) fn fenced_in_drain(&mut self, failure: &Failure) -> bool {
        if !self.drains {
            return false;
        }
        match &self.state {
            State::Held(Held::Readying { .. } | Held::Ready { .. } | Held::Locking { .. }) => {
                let text = format!("{}, and pages that were to follow with it", failure.text());
                self.withdraw(Failure::new(ErrorCode::LostInDrain, text));
                true
            }
            State::Decided(_, Fate::Running(Run::Filling)) => {
                self.abandon(failure);
                true
            }
            State::Decided(_, Fate::Running(Run::Recording { .. } | Run::LettingGo { .. })) => {
                self.pages_lost.get_or_insert_with(|| failure.clone());
                true
            }
            State::Unready(_) | State::Decided(..) | State::Absent(_) => false,
        }
    }

    /// What runs is given up, once that is on disk.
    pub(super) fn abandon(&mut self, lost: &Failure) {
        let State::Decided(_, fate) = &mut self.state else {
            return self.out_of_place("a lost drain");
        };
        *fate = Fate::Abandoned(Abandon::Recording);
        self.timers.stop_all();
        let failure = lost_in_drain(lost);
        self.failure = Some(failure.clone());
        self.journal(Entry::Aborted(failure));
    }

    /// That pages are lost is on disk.
    pub(super) fn loss_recorded(&mut self) {
        let State::Decided(generation, Fate::Abandoned(abandon @ Abandon::Recording)) =
            &mut self.state
        else {
            return self.out_of_place("aborted");
        };
        let generation = *generation;
        *abandon = Abandon::Freezing;
        self.timers.stop_all();
        self.actions.push_back(TargetAction::Abandon);
        self.say_lost(generation);
    }

    /// Nothing of it is left.
    pub(super) fn abandoned(&mut self) {
        match &mut self.state {
            State::Decided(_, Fate::Abandoned(abandon @ Abandon::Freezing)) => {
                *abandon = Abandon::Closing;
                self.journal(Entry::Done);
            }
            // Asked for twice, and done twice.
            State::Decided(_, Fate::Abandoned(Abandon::Closing | Abandon::Closed)) => {}
            State::Unready(_) | State::Held(_) | State::Decided(..) | State::Absent(_) => {
                self.out_of_place("an abandoned workload");
            }
        }
    }

    fn say_lost(&mut self, generation: Generation) {
        let unknown = || Failure::new(ErrorCode::LostInDrain, "what ran at the target is lost");
        let failure = self.failure.as_ref().map_or_else(unknown, lost_in_drain);
        self.send(TargetMessage::DrainLost {
            generation,
            failure,
        });
    }
}
