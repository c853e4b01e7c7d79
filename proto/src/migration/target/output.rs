//! What the target says: actions and reports.

use super::state::Place;
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
        match self.state.place() {
            Place::Nowhere => self.send(TargetMessage::Failed(failure)),
            Place::Unready => self.give_up(failure),
            Place::Decisive => self.note(failure),
            Place::Over => {}
        }
    }

    /// Keeps what went wrong where the operator sees it; the cause of an end stays.
    pub(super) fn note(&mut self, failure: Failure) {
        match self.state.place() {
            Place::Nowhere | Place::Unready | Place::Decisive => self.failure = Some(failure),
            Place::Over => {
                self.failure.get_or_insert(failure);
            }
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
