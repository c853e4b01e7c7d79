//! What the target says: actions and reports.

use super::state::{Absent, Fate, Loss, Run, State};
use super::{TargetAction, TargetMachine};
use crate::migration::record::{Entry, Record};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::TargetMessage;

impl TargetMachine {
    /// What is sent without a connection is lost, like what was in flight when it broke; the
    /// source asks again.
    pub(super) fn send(&mut self, message: TargetMessage) {
        if self.connected {
            self.actions.push_back(TargetAction::Send(message));
        }
    }

    pub(super) fn journal(&mut self, entry: Entry) {
        self.actions.push_back(TargetAction::Journal(Record {
            migration: self.id,
            entry,
        }));
    }

    /// An event that has no place in the present state. It ends the migration before `Ready`,
    /// is noted after it, and is ignored where an undone action may still report.
    pub(super) fn out_of_place(&mut self, what: &str) {
        let text = format!("{what} has no place in phase {}", self.state.phase());
        let failure = Failure::new(ErrorCode::Unexpected, text);
        match &self.state {
            State::Absent(Absent::Idle) => self.send(TargetMessage::Failed(failure)),
            State::Unready(_) => self.give_up(failure),
            State::Decided(
                _,
                Fate::Running(Run::Closed)
                | Fate::Refusing(_)
                | Fate::Lost(Loss::Closing | Loss::Closed)
                | Fate::Abandoned(_),
            )
            | State::Absent(_) => {}
            State::Held(_) | State::Decided(..) => self.note(failure),
        }
    }

    /// Keeps what went wrong where the operator sees it; the cause of an end stays.
    pub(super) fn note(&mut self, failure: Failure) {
        match &self.state {
            State::Decided(
                _,
                Fate::Running(Run::Closed)
                | Fate::Refusing(_)
                | Fate::Lost(Loss::Closing | Loss::Closed)
                | Fate::Abandoned(_),
            )
            | State::Absent(_) => {
                self.failure.get_or_insert(failure);
            }
            State::Unready(_) | State::Held(_) | State::Decided(..) => self.failure = Some(failure),
        }
    }

    pub(super) fn failure_or_unknown(&self) -> Failure {
        let unknown = || Failure::new(ErrorCode::Unknown, "no reason was recorded");
        self.failure.clone().unwrap_or_else(unknown)
    }

    /// Publishes the status if it says anything new. An older report that nobody took yet is
    /// superseded, so reports do not pile up.
    pub(super) fn report(&mut self, now: Time) {
        let Some(status) = self.status(now).news(&mut self.reported) else {
            return;
        };
        self.actions
            .retain(|action| !matches!(action, TargetAction::Report(_)));
        self.actions.push_back(TargetAction::Report(status));
    }
}
