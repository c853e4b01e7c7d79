//! File locks on storage that both nodes share: the workload does not run without all of them, and
//! others may take them whenever nobody has them.

use super::node::{SourceWorkload, TargetWorkload};
use super::oracle::Violation;
use super::world::World;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::wire::code::{ErrorCode, Failure};

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
    /// Whether this side has all of them.
    pub(super) fn has_locks(&self, side: Side) -> bool {
        self.locks.iter().all(|lock| *lock == Holder::Side(side))
    }

    /// Whether this side has any of them.
    pub(super) fn has_a_lock(&self, side: Side) -> bool {
        self.locks.contains(&Holder::Side(side))
    }

    /// Gives to nobody what this side has.
    pub(super) fn release_locks(&mut self, side: Side) {
        self.hand_over(Holder::Side(side), Holder::Nobody);
    }

    fn hand_over(&mut self, from: Holder, to: Holder) {
        for lock in self.locks.iter_mut().filter(|lock| **lock == from) {
            *lock = to;
        }
    }

    /// All of them, or none.
    fn take_locks(&mut self, side: Side) {
        if self.lock_is_taken() {
            self.release_locks(side);
        } else {
            self.hand_over(Holder::Nobody, Holder::Side(side));
        }
    }

    /// The other begins with the last.
    pub(super) fn take_lock(&mut self) {
        let free = |lock: &&mut Holder| **lock == Holder::Nobody;
        if let Some(lock) = self.locks.iter_mut().rev().find(free) {
            *lock = Holder::Other;
        }
    }

    /// The other does not give back what it has before it has had all of them. Says whether it did.
    pub(super) fn give_lock(&mut self) -> bool {
        if self.lock_is_taken() {
            self.hand_over(Holder::Nobody, Holder::Other);
        }
        let has_all = !self.locks.is_empty() && self.locks.iter().all(|l| *l == Holder::Other);
        if has_all {
            self.hand_over(Holder::Other, Holder::Nobody);
        }
        has_all
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
        self.release_locks(Side::Source);
        Ok(())
    }

    /// What was let go is had again before the workload is thawed. False if another has a lock.
    pub(super) fn take_locks_back(&mut self) -> bool {
        if self.source.let_go && self.source.workload == SourceWorkload::Frozen {
            self.take_locks(Side::Source);
            self.source.let_go = !self.has_locks(Side::Source);
        }
        !self.source.let_go || self.source.workload != SourceWorkload::Frozen
    }

    /// Whether what the target holds has the locks now.
    pub(super) fn lock_at_target(&mut self) -> bool {
        if self.target.workload == TargetWorkload::Held {
            self.take_locks(Side::Target);
        }
        self.has_locks(Side::Target)
    }

    /// Whether somebody else has a lock.
    pub fn lock_is_taken(&self) -> bool {
        self.locks.contains(&Holder::Other)
    }
}

pub(super) fn lock_taken() -> Failure {
    Failure::new(ErrorCode::LockTaken, "another has the workload's lock")
}
