//! What follows a round, and the end of the policy's time: another round, a freeze, or one in which
//! pages stay behind.
//!
//! Invariant: pages stay behind only if the policy allows it and the target has said that it takes
//! such a workload.

use super::SourceMachine;
use super::state::{State, Step};
use crate::migration::policy::{Decision, FreezeReason, Mode, OnTimeout, Policy, RoundReport};
use crate::migration::timer::Time;
use crate::wire::code::ErrorCode;

impl SourceMachine {
    /// The target has said whether it takes a workload with pages missing. False if that ends the
    /// migration.
    pub(super) fn agree_to_drain(&mut self, drains: bool) -> bool {
        self.may_drain = drains && self.policy.may_switch();
        if drains || !self.policy.must_switch() {
            return true;
        }
        let text = "the target takes no workload with pages missing: it is of an older version, or \
                    configured so. Move it with --mode precopy";
        self.abort_with(ErrorCode::PostcopyForbidden, text);
        false
    }

    /// A round is at the target: the policy says what follows.
    pub(super) fn round_complete(&mut self, now: Time, report: &RoundReport) {
        let next = report.round.next();
        let memory = self.counters.memory;
        let policy = self.followed();
        let decision = self.convergence.after(&policy, report, memory);
        let freezes = match decision {
            Decision::Round if self.time_is_over && !report.anew => self.after_time(),
            Decision::Round => None,
            Decision::Freeze(_) => Some(false),
            Decision::Switch(_) => Some(true),
            Decision::TimeOver => match self.policy.on_timeout {
                OnTimeout::Cancel => {
                    let text = "as many rounds as are allowed have not brought the downtime below \
                                its bound";
                    return self.abort_with(ErrorCode::Timeout, text);
                }
                OnTimeout::Force | OnTimeout::Postcopy => self.after_time(),
            },
        };
        match freezes {
            None => self.send_round(next),
            Some(_) if self.hold.forbids_freeze() => self.hold_on(now, report.round),
            Some(switching) => {
                self.switching = switching;
                self.freeze(now, next);
            }
        }
    }

    /// The policy, as far as the target allows it.
    fn followed(&self) -> Policy {
        let mut policy = self.policy;
        if !self.may_drain {
            policy.mode = Mode::Precopy;
        }
        policy
    }

    /// Time is over, and that does not end the migration: whether pages stay behind.
    fn after_time(&mut self) -> Option<bool> {
        let switches = self.may_drain && self.policy.on_timeout == OnTimeout::Postcopy;
        if switches {
            self.convergence.switch(FreezeReason::TimeOver);
        }
        Some(switches)
    }

    /// The policy's time is over.
    pub(super) fn overdue(&mut self) {
        let copies = matches!(
            self.state,
            State::Undecided(_, Step::Copying(_) | Step::Retrying(_))
        );
        if copies && self.policy.on_timeout != OnTimeout::Cancel {
            self.time_is_over = true;
            return;
        }
        let given_up = self.given_up.as_ref().map(|given_up| {
            let tries = self.retries;
            format!("; {tries} freezes were given up, the last because: {given_up}")
        });
        let text = format!(
            "the workload was not frozen in time{}",
            given_up.unwrap_or_default()
        );
        self.abort_with(ErrorCode::Timeout, &text);
    }
}
