//! How the source lets go of file locks that the target must have before the workload runs there.
//!
//! Between the commit and `Go` nobody has them: the copy here is frozen for good unless the target
//! refuses, and the target has not been told to go. If they cannot be let go, the target is asked
//! to refuse, and the workload comes back. Not if a process of the frozen copy has ended meanwhile:
//! then what the target has is the only whole copy, and it is for the operator to end that.

use super::state::{Decided, State};
use super::{SourceAction, SourceMachine};
use crate::migration::handoff::Question;
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};

/// How often the source tries to let go of its locks. That is one call for each of them; what fails
/// five times in as many seconds fails for good.
pub const UNLOCK_TRIES_MAX: u32 = 5;

impl SourceMachine {
    /// The commit is durable, and nobody has been told.
    pub(super) fn unlock(&mut self, tries: u32) {
        self.state = State::Decided(Decided::Unlocking { tries });
        self.actions.push_back(SourceAction::Unlock);
    }

    pub(super) fn unlocked(&mut self, now: Time) {
        match &self.state {
            State::Decided(Decided::Unlocking { .. }) => self.await_answer(now, Question::Go),
            // What came meanwhile asks for the workload back, or is an answer already.
            State::Decided(
                Decided::Committed { .. }
                | Decided::Reclaiming { .. }
                | Decided::Draining(_)
                | Decided::Releasing { .. },
            )
            | State::Over(_) => {}
            State::Undecided(..) | State::Decided(Decided::Prepared { .. }) => {
                self.out_of_place("locks let go");
            }
        }
    }

    pub(super) fn unlock_failed(&mut self, now: Time, tries: u32, failure: Failure) {
        let code = failure.code();
        // What is not let go nobody gets.
        let may_pass = tries < UNLOCK_TRIES_MAX && code != ErrorCode::SharedLock;
        // A copy of which a process has ended is not whole. What the target has is, unless it lacks
        // pages: then nothing is, and the target need not begin.
        if may_pass || (code == ErrorCode::WorkloadGone && !self.drains) {
            return self.retry_later(now, failure);
        }
        self.note(failure);
        self.await_answer(now, Question::Query);
    }
}
