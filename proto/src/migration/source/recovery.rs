//! A source that was restarted: what its journal proves, and what follows.

use std::collections::VecDeque;

use super::SourceMachine;
use super::hold::Hold;
use super::state::{Decided, Link, Outcome, Over, Release, State, Step};
use crate::id::Generation;
use crate::migration::handoff::{Evidence, RecoverError, SourceFacts, Undecided};
use crate::migration::policy::Convergence;
use crate::migration::record::{Entry, Record};
use crate::migration::status::{Counters, Edges};
use crate::migration::timer::{Time, Timers};
use crate::wire::code::ErrorCode;

impl SourceMachine {
    /// The machine that these records, in the order they were written, leave behind. They must
    /// all be of one migration.
    ///
    /// Without a commit the migration is broken off. With one it goes on: the commit is written
    /// again, and only then is the target told to go.
    pub fn recover(records: &[Record], now: Time) -> Result<Self, RecoverError> {
        let facts = SourceFacts::from_records(records)?;
        let id = records.first().ok_or(RecoverError::NoBeginning)?.migration;
        let offered = facts.offered.clone().ok_or(RecoverError::NoBeginning)?;
        let mut machine = Self {
            id,
            workload: offered.workload,
            peer: offered.peer,
            policy: offered.policy,
            driver_state: offered.state,
            description: None,
            network: None,
            state: match facts.commit {
                None => State::Undecided(Undecided::without_commit(), Step::Journalling),
                Some(_) => State::Decided(Decided::prepared()),
            },
            // An abort ends every generation; which was the last is not recorded.
            generation: facts.commit.unwrap_or(Generation::LAST),
            retries: 0,
            given_up: None,
            link: Link::Down,
            offered: true,
            touched: true,
            told: false,
            answered: false,
            incarnation: None,
            // Whether there are any the workload itself tells.
            locks: true,
            may_drain: facts.drains,
            switching: facts.drains,
            drains: facts.drains,
            time_is_over: false,
            failure: facts.aborted.clone(),
            held_up: None,
            fence_wanted: false,
            convergence: Convergence::default(),
            hold: Hold::new(offered.hold),
            round: None,
            frozen_max: None,
            waiting: Vec::new(),
            counters: Counters::default(),
            edges: Edges::default(),
            started_at: now,
            timers: Timers::new(),
            actions: VecDeque::new(),
            reported: None,
        };
        machine.resume(&facts, now);
        machine.report(now);
        Ok(machine)
    }

    fn resume(&mut self, facts: &SourceFacts, now: Time) {
        if facts.done {
            // `Started` may be missing: it is only a help. What brings a committed workload back
            // is not.
            let back = facts.fenced || facts.aborted.is_some() || facts.commit.is_none();
            let outcome = if back {
                Outcome::Aborted
            } else {
                Outcome::Moved
            };
            self.state = State::Over(Over::Closed { outcome });
        } else if facts.has_started() {
            self.resume_started(facts, now);
        } else if let Some(generation) = facts.commit {
            self.resume_decided(generation, facts);
        } else {
            let text = "the daemon was restarted before the hand-off was decided";
            match facts.aborted.clone() {
                Some(failure) => self.abort(failure),
                None => self.abort_with(ErrorCode::Restarted, text),
            }
        }
    }

    /// The target has run it, and nothing thaws the copy.
    fn resume_started(&mut self, facts: &SourceFacts, now: Time) {
        self.answered = true;
        let generation = self.generation;
        let (outcome, entry) = match facts.aborted.clone() {
            Some(failure) => (Outcome::Aborted, Entry::Aborted(failure)),
            None if facts.filled => (Outcome::Moved, Entry::Filled { generation }),
            None if facts.drains => return self.drain(now),
            None => (Outcome::Moved, Entry::Started { generation }),
        };
        let step = Release::Recording;
        self.state = State::Decided(Decided::Releasing { outcome, step });
        self.journal(entry);
    }

    fn resume_decided(&mut self, generation: Generation, facts: &SourceFacts) {
        if facts.fenced {
            self.reclaim(Evidence::Fenced(generation));
        } else if let Some(failure) = &facts.aborted {
            // After a commit this record stands for the target's refusal.
            self.told = true;
            self.answered = true;
            self.reclaim(Evidence::Refused(generation, failure.clone()));
        } else {
            // The machine was made as one whose commit is being written.
            let drains = facts.drains;
            self.journal(Entry::Commit { generation, drains });
        }
    }
}
