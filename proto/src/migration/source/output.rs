//! What the source says: actions, questions to the target, reports.

use super::state::{Decided, Link, Over, State, Timer};
use super::{SourceAction, SourceMachine};
use crate::migration::handoff::{Question, REDIAL, RESEND, ThawPermit};
use crate::migration::record::{Entry, Record};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::SourceMessage;

impl SourceMachine {
    /// Says what the target has still to hear or to answer, if there is anything, over and over.
    pub(super) fn speak(&mut self, now: Time) {
        match self.state {
            State::Decided(Decided::Committed { question }) => self.ask(now, question),
            State::Decided(Decided::Draining(_)) => self.say_draining(now),
            State::Over(Over::Telling) => self.tell(now),
            State::Over(Over::Settling { .. }) => self.settle(now),
            State::Undecided(..) | State::Decided(_) | State::Over(_) => {}
        }
    }

    /// Asks the target what became of the committed generation.
    fn ask(&mut self, now: Time, question: Question) {
        let generation = self.generation;
        let message = match question {
            Question::Go => SourceMessage::Go { generation },
            Question::Query => SourceMessage::Query { generation },
        };
        self.send_or_dial(now, message);
    }

    /// Tells the target that nothing will come of the migration.
    fn tell(&mut self, now: Time) {
        let (generation, failure) = (self.generation, self.failure_or_unknown());
        self.send_or_dial(
            now,
            SourceMessage::Abort {
                generation,
                failure,
            },
        );
    }

    pub(super) fn send_or_dial(&mut self, now: Time, message: SourceMessage) {
        match self.link {
            Link::Up => {
                self.send(message);
                self.timers.set(Timer::Resend, now.after(RESEND));
            }
            Link::Down => self.dial(),
            Link::Dialling => {}
        }
    }

    pub(super) fn redial_later(&mut self, now: Time) {
        self.timers.set(Timer::Redial, now.after(REDIAL));
    }

    pub(super) fn dial(&mut self) {
        self.link = Link::Dialling;
        self.actions.push_back(SourceAction::Connect);
    }

    /// What is sent without a connection is lost, like what was in flight when it broke.
    pub(super) fn send(&mut self, message: SourceMessage) {
        match self.link {
            Link::Up => self.actions.push_back(SourceAction::Send(message)),
            Link::Down | Link::Dialling => {}
        }
    }

    pub(super) fn journal(&mut self, entry: Entry) {
        self.actions.push_back(SourceAction::Journal(Record {
            migration: self.id,
            entry,
        }));
    }

    /// The only way to thaw: nobody thaws without a proof that the target does not run.
    pub(super) fn thaw(&mut self, _proof: ThawPermit, untrack: bool) {
        self.actions.push_back(SourceAction::Thaw { untrack });
    }

    /// An event that has no place in the present state. It breaks the migration off before the
    /// commit, is noted after it, and is ignored where an undone action may still report.
    pub(super) fn out_of_place(&mut self, what: &str) {
        let text = format!("{what} has no place in phase {}", self.state.phase());
        let failure = Failure::new(ErrorCode::Unexpected, text);
        match &self.state {
            State::Undecided(..) => self.abort(failure),
            State::Decided(_) => self.note(failure),
            State::Over(_) => {}
        }
    }

    /// Keeps what went wrong where the operator sees it: the latest while the outcome is open,
    /// the first once it is not.
    pub(super) fn note(&mut self, failure: Failure) {
        match &self.state {
            State::Decided(
                Decided::Prepared { .. }
                | Decided::Unlocking { .. }
                | Decided::Committed { .. }
                | Decided::Draining(_),
            ) => {
                self.failure = Some(failure);
            }
            State::Undecided(..) | State::Decided(_) | State::Over(_) => {
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
            .retain(|action| !matches!(action, SourceAction::Report(_)));
        self.actions.push_back(SourceAction::Report(status));
    }
}
