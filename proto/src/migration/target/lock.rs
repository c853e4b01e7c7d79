//! How the held workload gets its file locks on shared storage, before that it runs is written.
//!
//! The source has let go of them, or is dead. What another has taken meanwhile is waited for, and
//! not for ever while there is a source that can have the workload back: it would not run here
//! without its locks, and does not there.

use super::state::{Held, State, Told};
use super::{TargetAction, TargetMachine};
use crate::id::Generation;
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};

/// How often the locks are tried that the source has let go, before the workload is given back to
/// it. Whoever only looks whether it can have one gives it back at once.
pub const LOCK_TRIES_MAX: u32 = 5;

impl TargetMachine {
    /// The workload is to run, as soon as it has its locks.
    pub(super) fn lock_and_run(&mut self, generation: Generation, why: Told) {
        if !self.locks {
            return self.run(generation);
        }
        self.state = State::Held(Held::Locking {
            generation,
            tries: 1,
            why,
        });
        self.actions.push_back(TargetAction::Lock);
    }

    pub(super) fn lock_again(&mut self, next: u32) {
        if let State::Held(Held::Locking { tries, .. }) = &mut self.state {
            *tries = next;
            self.actions.push_back(TargetAction::Lock);
        }
    }

    pub(super) fn locked(&mut self) {
        match &self.state {
            State::Held(Held::Locking { generation, .. }) => {
                let generation = *generation;
                self.timers.stop_all();
                self.failure = self.broken.clone();
                self.run(generation);
            }
            // It was refused meanwhile: what is discarded gives its locks back.
            State::Decided(..) | State::Absent(_) => {}
            State::Unready(_) | State::Held(_) => self.out_of_place("locks"),
        }
    }

    pub(super) fn not_locked(&mut self, now: Time, failure: Failure) {
        if failure.code() == ErrorCode::LockTaken {
            self.broken = Some(failure.clone());
        }
        match &self.state {
            State::Held(Held::Locking {
                generation,
                tries,
                why,
            }) => match why {
                // Without a connection there may be no source left to have it back.
                Told::Go if LOCK_TRIES_MAX <= *tries && self.connected => {
                    let generation = *generation;
                    self.refuse(generation, failure);
                }
                Told::Go | Told::Fenced => self.retry_later(now, failure),
            },
            State::Decided(..) | State::Absent(_) => {}
            State::Unready(_) | State::Held(_) => self.out_of_place("locks"),
        }
    }
}
