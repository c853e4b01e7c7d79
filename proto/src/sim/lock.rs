//! A file lock on storage that both nodes share: the workload does not run without it, and others
//! may take it whenever nobody has it.

use super::node::{SourceWorkload, TargetWorkload};
use super::oracle::Violation;
use super::world::World;
use crate::migration::handoff::Side;
use crate::migration::record::Entry;
use crate::wire::code::{ErrorCode, Failure};

/// Who has the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    Nobody,
    /// Who has nothing to do with the workload; or storage that keeps it for a dead node.
    Other,
    /// What there is of the workload at a side.
    Side(Side),
}

impl World {
    pub(super) fn has_lock(&self, side: Side) -> bool {
        self.lock.is_none_or(|holder| holder == Holder::Side(side))
    }

    /// Gives the lock to nobody if this side has it.
    pub(super) fn release_lock(&mut self, side: Side) {
        if self.lock == Some(Holder::Side(side)) {
            self.lock = Some(Holder::Nobody);
        }
    }

    pub(super) fn take_lock(&mut self) {
        if self.lock == Some(Holder::Nobody) {
            self.lock = Some(Holder::Other);
        }
    }

    pub(super) fn give_lock(&mut self) {
        if self.lock == Some(Holder::Other) {
            self.lock = Some(Holder::Nobody);
        }
    }

    /// The source is about to let go of the lock.
    pub(super) fn unlock_at_source(&mut self) -> Result<(), Violation> {
        let durable = self.source.journal.durable();
        let committed = durable
            .iter()
            .any(|record| matches!(record.entry, Entry::Commit { .. }));
        self.demand(
            committed,
            "the source lets go of its lock before the commit is on disk",
        )?;
        self.demand(
            self.source.workload != SourceWorkload::Running,
            "the source lets go of the lock of what it runs",
        )?;
        self.source.let_go = true;
        self.release_lock(Side::Source);
        Ok(())
    }

    /// What was let go is had again before the workload is thawed. False if another has it.
    pub(super) fn take_lock_back(&mut self) -> bool {
        if self.source.let_go && self.source.workload == SourceWorkload::Frozen {
            if self.lock == Some(Holder::Nobody) {
                self.lock = Some(Holder::Side(Side::Source));
            }
            self.source.let_go = !self.has_lock(Side::Source);
        }
        !self.source.let_go || self.source.workload != SourceWorkload::Frozen
    }

    /// Whether what the target holds has the lock now.
    pub(super) fn lock_at_target(&mut self) -> bool {
        if self.target.workload == TargetWorkload::Held && self.lock == Some(Holder::Nobody) {
            self.lock = Some(Holder::Side(Side::Target));
        }
        self.has_lock(Side::Target)
    }

    /// Whether somebody else has the lock.
    pub fn lock_is_taken(&self) -> bool {
        self.lock == Some(Holder::Other)
    }
}

pub(super) fn lock_taken() -> Failure {
    Failure::new(ErrorCode::LockTaken, "another has the workload's lock")
}
