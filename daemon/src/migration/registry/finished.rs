//! What becomes of migrations that have ended: the last ones are kept whole, and of older ones what
//! somebody may still ask.
//!
//! Invariants: what a target decided is forgotten only when its source has settled it, or an
//! operator says so; what became of a migration away from here, when there are many younger ones.
//! A migration whose driver is at work is not touched.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::record::Record;
use pageferry_proto::migration::source::SourceMachine;
use pageferry_proto::migration::target::{TargetMachine, answer};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::{Entry, Registry, parse};
use crate::migration::clock::Clock;
use crate::migration::journal::remains::{ANSWERS_MAX, OUTCOMES_MAX, Remains};
use crate::migration::journal::{FINISHED_MAX, JournalError};
use crate::migration::progress::Progress;
use crate::migration::source::folders::set_aside_left;
use crate::migration::target::orphans;
use crate::migration::text::{chain, internal};

/// Most kept answers that are listed at once.
pub const ANSWERS_LISTED_MAX: usize = 1000;

impl Registry {
    /// After the end of a driver: forgets what nobody needs, and keeps what somebody may ask.
    pub(super) async fn forget_oldest(&self) {
        // Nobody may take up again what is being removed.
        let _beginning = self.inner.beginnings.lock().await;
        if let Err(error) = self.close_answers().and_then(|()| self.bury_oldest()) {
            tracing::warn!("forgetting old journals: {}", chain(&error));
        }
    }

    /// Answers that were taken up, because their source asked, are put back, or go.
    fn close_answers(&self) -> Result<(), JournalError> {
        let over = self.over(|entry| entry.is_answer);
        for (id, entry) in over {
            if !entry.status.borrow().status.unsettled {
                self.inner.parts.journals.remove_kept(Remains::Answer, id)?;
                self.answers().remove(&id);
            }
            self.lock().remove(&id);
        }
        Ok(())
    }

    fn bury_oldest(&self) -> Result<(), JournalError> {
        let finished: Vec<MigrationId> = self
            .over(|entry| !entry.is_answer && entry.status.borrow().status.phase.is_final())
            .into_iter()
            .map(|(id, _)| id)
            .collect();
        if finished.len() <= FINISHED_MAX {
            return Ok(());
        }
        let journals = &self.inner.parts.journals;
        for id in journals.surplus(&finished)? {
            let role = self
                .lock()
                .get(&id)
                .map(|entry| entry.status.borrow().status.role);
            match role {
                Some(Side::Source) => {
                    let outcome = journals.read(id)?.records;
                    journals.bury(Remains::Outcome, id, &outcome)?;
                    self.outcomes().push_back(id);
                }
                Some(Side::Target) => match self.answer_of(id)? {
                    Some(answer) => {
                        journals.bury(Remains::Answer, id, &answer)?;
                        self.answers().insert(id);
                    }
                    None => journals.remove(id)?,
                },
                None => {}
            }
            self.lock().remove(&id);
        }
        self.forget_outcomes()
    }

    /// Nobody repeats a call that is as old as these.
    fn forget_outcomes(&self) -> Result<(), JournalError> {
        while self.outcomes().len() > OUTCOMES_MAX {
            let Some(oldest) = self.outcomes().pop_front() else {
                break;
            };
            let journals = &self.inner.parts.journals;
            journals.remove_kept(Remains::Outcome, oldest)?;
        }
        Ok(())
    }

    /// The records of a finished migration that came here, as far as they must be kept.
    fn answer_of(&self, id: MigrationId) -> Result<Option<Vec<Vec<u8>>>, JournalError> {
        let whole = self.inner.parts.journals.read(id)?;
        let kept = parse(id, &whole).map(|records| answer(&records));
        Ok(match kept {
            Ok(Ok(kept)) => kept.map(|kept| kept.iter().map(|record| record.to_bytes()).collect()),
            // It was made sense of at the start; whatever this is, it is not forgotten.
            Ok(Err(_)) | Err(_) => Some(whole.records),
        })
    }

    /// The migrations of this kind whose driver has ended.
    fn over(&self, is_one: impl Fn(&Entry) -> bool) -> Vec<(MigrationId, Entry)> {
        let entries = self.lock();
        let over = entries
            .iter()
            .filter(|(_, entry)| entry.requests.is_over() && is_one(entry));
        over.map(|(id, entry)| (*id, entry.clone())).collect()
    }

    /// Refuses what comes in when there is no room to remember it by.
    pub(super) fn refuse_without_room(&self) -> Result<(), Failure> {
        let kept = self.answers().len();
        if kept < ANSWERS_MAX {
            return Ok(());
        }
        let text = format!(
            "this node keeps how {kept} migrations ended, since their sources have not said that \
             they know: see `pageferry list --all` and `pageferry forget --help`"
        );
        Err(Failure::new(ErrorCode::Limit, text))
    }

    /// Forgets how a migration ended. Of one whose source may still ask only if the operator is
    /// `sure` that it never does: a source that asks in vain offers its operator to declare this
    /// node dead, and would then run what ran here.
    pub async fn forget(&self, id: MigrationId, sure: bool) -> Result<(), Failure> {
        let _beginning = self.inner.beginnings.lock().await;
        let status = Arc::clone(&self.watch(id)?.borrow());
        let known = self.lock().get(&id).cloned();
        let at_work = known
            .as_ref()
            .is_some_and(|entry| !entry.requests.is_over());
        if at_work {
            return Err(Failure::new(
                ErrorCode::Unexpected,
                format!(
                    "migration {id} is not over yet, or has still something to say to node {}, or \
                     to hear from it",
                    status.status.peer
                ),
            ));
        }
        let status = &status.status;
        if status.unsettled && !sure {
            let (workload, peer) = (status.workload.as_ref(), &status.peer);
            let workload = workload.map(ToString::to_string).unwrap_or_default();
            return Err(Failure::new(
                ErrorCode::Unexpected,
                format!(
                    "node {peer} has not said that it knows how this ended ({workload}: {}). If it \
                     asks after this it hears that nobody knows, and if node {} is then declared \
                     dead there, {workload} runs twice. Look at node {peer} first: `pageferry show \
                     {id}` must say `done` or `aborted` there, or {peer} must be gone for good. \
                     Then: `pageferry forget {id} --sure`",
                    status.phase,
                    self.inner.parts.endpoint.node(),
                ),
            ));
        }
        let journals = &self.inner.parts.journals;
        let removed = if known.is_some_and(|entry| !entry.is_answer) {
            journals.remove(id)
        } else {
            let answer = journals.remove_kept(Remains::Answer, id);
            answer.and_then(|()| journals.remove_kept(Remains::Outcome, id))
        };
        removed.map_err(|error| internal(&error))?;
        self.lock().remove(&id);
        self.answers().remove(&id);
        self.outcomes().retain(|kept| *kept != id);
        tracing::info!(migration = %id, "forgotten by the operator");
        Ok(())
    }

    /// Takes away what a daemon that was killed has left of migrations it had not begun to record.
    pub(super) async fn clean_up(&self) {
        let is_known = |id| self.lock().contains_key(&id) || self.answers().contains(&id);
        orphans::clean_up(&self.inner.parts.target, is_known).await;
        block_in_place(|| set_aside_left(&self.inner.parts.source.keep));
    }

    /// What is kept of migrations that are not listed any more, at most [`ANSWERS_LISTED_MAX`].
    pub fn list_answers(&self) -> Vec<Arc<Progress>> {
        let kept: Vec<MigrationId> = self
            .answers()
            .iter()
            .take(ANSWERS_LISTED_MAX)
            .copied()
            .collect();
        let read = kept.into_iter().map(|id| self.read_answer(id));
        read.filter_map(Result::ok).map(Arc::new).collect()
    }

    /// How many answers are kept.
    pub fn answers_kept(&self) -> usize {
        self.answers().len()
    }

    /// The status of a migration of which only the answer or the outcome is kept.
    pub(super) fn watch_kept(&self, id: MigrationId) -> Option<watch::Receiver<Arc<Progress>>> {
        let progress = if self.answers().contains(&id) {
            self.read_answer(id).ok()?
        } else if self.outcomes().contains(&id) {
            self.read_outcome(id).ok()?
        } else {
            return None;
        };
        Some(watch::channel(Arc::new(progress)).1)
    }

    fn read_answer(&self, id: MigrationId) -> Result<Progress, Failure> {
        let records = self.read_kept(Remains::Answer, id)?;
        let now = Clock::start().now();
        let machine = TargetMachine::recover(&records, now);
        let machine = machine.map_err(|error| internal(&error))?;
        Ok(Progress {
            recovered: true,
            ..Progress::of(machine.status(now))
        })
    }

    fn read_outcome(&self, id: MigrationId) -> Result<Progress, Failure> {
        let records = self.read_kept(Remains::Outcome, id)?;
        let now = Clock::start().now();
        let machine = SourceMachine::recover(&records, now);
        let machine = machine.map_err(|error| internal(&error))?;
        Ok(Progress {
            recovered: true,
            ..Progress::of(machine.status(now))
        })
    }

    pub(super) fn read_kept(&self, what: Remains, id: MigrationId) -> Result<Vec<Record>, Failure> {
        let kept = self.inner.parts.journals.read_kept(what, id);
        parse(id, &kept.map_err(|error| internal(&error))?)
    }

    pub(super) fn outcomes(&self) -> MutexGuard<'_, VecDeque<MigrationId>> {
        let outcomes = self.inner.outcomes.lock();
        outcomes.unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answers(&self) -> MutexGuard<'_, BTreeSet<MigrationId>> {
        let answers = self.inner.answers.lock();
        answers.unwrap_or_else(PoisonError::into_inner)
    }
}
