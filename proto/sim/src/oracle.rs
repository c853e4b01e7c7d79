//! What must never be, asked at the moments when it could come to be.

use super::memory::Memory;
use super::node::{SourceJob, SourceWorkload, TargetJob, TargetWorkload};
use super::world::World;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::record::{Entry, Record};
use pageferry_proto::migration::source::SourceAction;
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};

/// An oracle's verdict, and how it came to that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}, after:\n{}", trace.join("\n"))]
pub struct Violation {
    /// What must never be.
    pub what: String,
    /// What happened, one line per step.
    pub trace: Vec<String>,
}

/// Most actions that a machine may have in its queue after one event. The longest answer is an
/// abort: a message, a thaw and a report; timers add one each.
const ACTIONS_MAX: usize = 8;

impl World {
    pub(super) fn violation(&self, what: &str) -> Violation {
        Violation {
            what: what.to_owned(),
            trace: self.trace.clone(),
        }
    }

    pub(super) fn demand(&self, holds: bool, what: &str) -> Result<(), Violation> {
        if holds {
            Ok(())
        } else {
            Err(self.violation(what))
        }
    }

    /// The source is about to run the workload.
    pub(super) fn check_thaw(&self) -> Result<(), Violation> {
        self.demand(
            self.target.workload != TargetWorkload::Running,
            "the source thaws what runs at the target",
        )?;
        self.check_not_drained()?;
        let ours = self.source.journal.durable();
        let committed = ours
            .iter()
            .any(|record| matches!(record.entry, Entry::Commit { .. }));
        let fenced = ours
            .iter()
            .any(|record| matches!(record.entry, Entry::Fenced { .. }));
        let theirs = self.target.journal.durable();
        let refused = theirs
            .iter()
            .any(|record| matches!(record.entry, Entry::Refused { .. }));
        self.demand(
            !(committed || self.go_said) || fenced || refused,
            "the source thaws after a commit without a refusal or a fence",
        )
    }

    /// The source is about to record something: an abort only when the workload is left alone.
    pub(super) fn check_aborted(&self, entry: &Entry) -> Result<(), Violation> {
        let untracks = |job: &SourceJob| matches!(job, SourceJob::Thaw { untrack: true });
        let pending = self.source.jobs.iter().any(untracks) && !self.source.untracked;
        self.demand(
            !(matches!(entry, Entry::Aborted(_)) && pending),
            "the source records an abort while it is still undoing",
        )
    }

    /// The target is about to run the workload.
    pub(super) fn check_let_go(&self) -> Result<(), Violation> {
        self.demand(
            self.source.workload != SourceWorkload::Running,
            "the target starts what runs at the source",
        )?;
        self.demand(self.starts == 0, "the target starts twice")?;
        let ours = self.target.journal.durable();
        let refused = ours
            .iter()
            .any(|record| matches!(record.entry, Entry::Refused { .. }));
        let running = ours
            .iter()
            .any(|record| matches!(record.entry, Entry::Running { .. }));
        self.demand(!refused, "the target starts after refusing")?;
        self.demand(
            self.has_locks(Side::Target),
            "the target starts without the workload's locks",
        )?;
        self.demand(running, "the target starts before that is on disk")?;
        let theirs = self.source.journal.durable();
        let committed = theirs
            .iter()
            .any(|record| matches!(record.entry, Entry::Commit { .. }));
        self.demand(
            committed || self.source.dead,
            "the target starts what the source has not committed",
        )?;
        let (memory, images) = &self.target.restored;
        let frozen = self.frozen.as_ref();
        let is_same = |frozen: &Memory| {
            let absent = |space, page| {
                let missing = self.target.absent.missing(space);
                missing.is_some_and(|missing| missing.contains(page))
            };
            frozen.without(absent) == *memory
        };
        self.demand(
            frozen.is_some_and(|frozen| is_same(&frozen.0)),
            "the memory at the target is not the memory at the source",
        )?;
        self.demand(
            frozen.is_some_and(|frozen| frozen.1 == *images),
            "the images at the target are not those of the last attempt",
        )
    }

    /// The source is about to kill its copy.
    pub(super) fn check_release(&self) -> Result<(), Violation> {
        self.demand(
            self.starts == 1,
            "the source kills what never started at the target",
        )?;
        self.check_drained()
    }

    /// The target is about to drop what it has.
    pub(super) fn check_discard(&self) -> Result<(), Violation> {
        self.demand(
            self.target.workload != TargetWorkload::Running,
            "the target discards what it runs",
        )
    }

    /// The target writes how things stand: nothing is over that is still being discarded, since a
    /// restart would not go on with that.
    pub(super) fn check_over(&self, record: &Record) -> Result<(), Violation> {
        let discarding = |job: &TargetJob| matches!(job, TargetJob::Discard);
        self.demand(
            !(matches!(record.entry, Entry::Aborted(_)) && self.target.jobs.iter().any(discarding)),
            "the target writes that it is over while it discards",
        )
    }

    pub(super) fn check_said_by_source(&self, message: &SourceMessage) -> Result<(), Violation> {
        match message {
            SourceMessage::Go { generation } => {
                let is_commit = |entry: &Entry| match entry {
                    Entry::Commit {
                        generation: ours, ..
                    } => ours == generation,
                    _ => false,
                };
                let durable = self.source.journal.durable();
                self.demand(
                    durable.iter().any(|record| is_commit(&record.entry)),
                    "the source says go before the commit is on disk",
                )?;
                self.demand(
                    !self.has_a_lock(Side::Source),
                    "the source says go while it has a lock of the workload",
                )
            }
            SourceMessage::Query { .. } => self.demand(
                !self.source.knows_maimed || self.source.abort_asked || self.is_drain(),
                "the source asks for a copy back that is not whole, of its own accord",
            ),
            SourceMessage::Settled { .. } => self.demand(
                !self.source_may_ask(),
                "the source says settled before that is on disk",
            ),
            SourceMessage::Abort { .. }
            | SourceMessage::DrainLost { .. }
            | SourceMessage::Draining { .. }
            | SourceMessage::Final(_)
            | SourceMessage::Offer(_)
            | SourceMessage::RoundEnd(_) => Ok(()),
        }
    }

    /// Whether the source, or the next one that its journal makes, may ask how it ended: it may
    /// find a commit, and need not find what came of that.
    fn source_may_ask(&self) -> bool {
        let found = self.source.journal.records();
        let committed = found
            .iter()
            .any(|record| matches!(record.entry, Entry::Commit { .. }));
        let drains = self.is_drain();
        let ended = self.source.journal.durable().iter().any(|record| {
            matches!(
                record.entry,
                Entry::Filled { .. } | Entry::Fenced { .. } | Entry::Aborted(_) | Entry::Done
            ) || (matches!(record.entry, Entry::Started { .. }) && !drains)
        });
        committed && !ended
    }

    pub(super) fn check_said_by_target(&self, message: &TargetMessage) -> Result<(), Violation> {
        let durable = self.target.journal.durable();
        let is_known =
            |known: &dyn Fn(&Entry) -> bool| durable.iter().any(|record| known(&record.entry));
        match message {
            TargetMessage::Ready { generation, .. } => self.demand(
                is_known(&|entry| {
                    matches!(entry, Entry::Ready(ready) if ready.generation == *generation)
                }),
                "the target says ready before that is on disk",
            ),
            TargetMessage::Refused { generation, .. } => {
                self.demand(self.starts == 0, "the target refuses what it has run")?;
                self.demand(
                    !self.has_a_lock(Side::Target),
                    "the target refuses and keeps a lock of the workload",
                )?;
                self.demand(
                    is_known(&|entry| *entry == Entry::Refused { generation: *generation }),
                    "the target says refused before that is on disk",
                )
            }
            TargetMessage::Started { .. } => self.demand(
                self.starts == 1,
                "the target says started before the workload runs",
            ),
            TargetMessage::Unknown { generation } => {
                let decided = |entry: &Entry| match entry {
                    Entry::Running { generation: ours } => ours == generation,
                    Entry::Refused { generation: ours } => ours >= generation,
                    _ => false,
                };
                // Of what was lost with the power that is all that anybody knows.
                let is_lost = self.target.workload == TargetWorkload::Lost;
                self.demand(
                    is_lost || !(is_known(&decided) && self.source_may_ask()),
                    "the target has forgotten what the source still asks",
                )
            }
            TargetMessage::FinalHeld { .. } => self.check_final_held(),
            TargetMessage::Filled { .. } => self.check_filled(),
            TargetMessage::DrainLost { .. } => self.check_said_lost(),
            TargetMessage::Accepted { .. }
            | TargetMessage::Declined(_)
            | TargetMessage::Failed(_)
            | TargetMessage::Fetch(_)
            | TargetMessage::Forgotten { .. }
            | TargetMessage::RoundHeld { .. } => Ok(()),
        }
    }

    pub(super) fn check_report(&mut self, side: usize, generation: u64) -> Result<(), Violation> {
        let newer = self.reported[side] < generation;
        self.reported[side] = generation;
        self.demand(newer, "the generation of a status does not grow")
    }

    /// Asked after every step and every fault.
    pub(super) fn check(&self) -> Result<(), Violation> {
        let source = self.source.workload == SourceWorkload::Running;
        let target = self.target.workload == TargetWorkload::Running;
        self.demand(!(source && target), "the workload runs twice")?;
        self.demand(
            (!source || self.has_locks(Side::Source)) && (!target || self.has_locks(Side::Target)),
            "the workload runs without its locks",
        )?;
        self.check_pages()?;
        self.check_stillness()?;
        self.check_collected()?;
        let longest = self.source.actions.len().max(self.target.actions.len());
        self.demand(longest <= ACTIONS_MAX, "a machine piles up actions")
    }

    /// A source that is alive and has not committed lets nothing stand still beyond its bound: then
    /// the thaw is at least asked for. How fast that is done is the driver's affair.
    fn check_stillness(&self) -> Result<(), Violation> {
        let frozen = self.source.workload == SourceWorkload::Frozen;
        let Some(since) = self.source.frozen_at.filter(|_| frozen) else {
            return Ok(());
        };
        if self.source.machine.is_none() || self.commit_asked() {
            return Ok(());
        }
        let is_asked_back = self.source.actions.iter().any(is_thaw);
        self.demand(
            is_asked_back || self.now.since(since) <= self.frozen_max,
            "the workload stands still for longer than it may",
        )
    }

    fn commit_asked(&self) -> bool {
        let is_commit = |action: &SourceAction| {
            matches!(action, SourceAction::Journal(record)
                if matches!(record.entry, Entry::Commit { .. }))
        };
        self.commit_found() || self.source.actions.iter().any(is_commit)
    }
}

fn is_thaw(action: &SourceAction) -> bool {
    matches!(action, SourceAction::Thaw { .. })
}
