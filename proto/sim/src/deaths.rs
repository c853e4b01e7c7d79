//! What dies: processes of a frozen copy, what the target holds, nodes.

use super::lock::{Holder, lock_taken};
use super::memory::Memory;
use super::node::{SourceJob, SourceWorkload, TargetWorkload};
use super::oracle::Violation;
use super::world::{World, workload_gone};
use pageferry_proto::migration::absent::Absent;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::source::SourceEvent;
use pageferry_proto::migration::target::TargetEvent;

impl World {
    /// A process of the frozen copy dies, and with it goes what it had.
    pub(super) fn drop_copy(&mut self) {
        if self.source.workload == SourceWorkload::Frozen && self.commit_found() {
            self.source.workload = SourceWorkload::Maimed;
            self.release_locks(Side::Source);
            self.lose_pages();
        }
    }

    /// Whether a process of the frozen copy has died.
    pub fn copy_is_maimed(&self) -> bool {
        self.source.workload == SourceWorkload::Maimed
    }

    pub(super) fn lose_power(&mut self, side: Side, found: u8) {
        self.crash(side, found);
        self.release_locks(side);
        match side {
            Side::Source => self.source.workload = SourceWorkload::Gone,
            Side::Target => {
                self.target.store = Memory::default();
                self.target.absent = Absent::default();
                self.target.workload = match self.target.workload {
                    TargetWorkload::Nothing => TargetWorkload::Nothing,
                    // What told that it never ran is lost with the power.
                    TargetWorkload::Held
                    | TargetWorkload::Dropped
                    | TargetWorkload::Running
                    | TargetWorkload::Lost => TargetWorkload::Lost,
                    TargetWorkload::Ended => TargetWorkload::Ended,
                };
            }
        }
    }

    pub(super) fn drop_held(&mut self) {
        if self.target.workload == TargetWorkload::Held {
            self.target.workload = TargetWorkload::Dropped;
            self.release_locks(Side::Target);
            self.at_target(TargetEvent::Failure(workload_gone()));
        }
    }

    /// Only one side can be fenced: nobody is left to tell about the second.
    pub(super) fn fence(&mut self, dead: Side) -> Result<(), Violation> {
        if self.source.dead || self.target.dead {
            return Ok(());
        }
        let kept = self.locks.clone();
        self.lose_power(dead, 0);
        // The storage keeps them for a while for who does not come back.
        for (lock, before) in self.locks.iter_mut().zip(kept) {
            if before == Holder::Side(dead) {
                *lock = Holder::Other;
            }
        }
        match dead {
            Side::Source => {
                self.source.dead = true;
                self.at_target(TargetEvent::Fenced(Side::Source));
            }
            Side::Target => {
                self.target.dead = true;
                if self.thaws_by_fence() {
                    self.thaw_at_source(true)?;
                }
                self.at_source(SourceEvent::Fenced(Side::Target));
            }
        }
        Ok(())
    }

    /// A thaw takes the lock back first; where another has it the workload stays frozen.
    pub(super) fn thaw_at_source(&mut self, untrack: bool) -> Result<SourceJob, Violation> {
        self.undo_at_source();
        self.check_thaw()?;
        if !self.take_locks_back() {
            return Ok(SourceJob::Late(SourceEvent::Failure(lock_taken())));
        }
        if self.source.workload == SourceWorkload::Maimed {
            self.source.workload = SourceWorkload::Gone;
            self.source.back_in_part = true;
        }
        if self.source.workload == SourceWorkload::Frozen {
            self.source.workload = SourceWorkload::Running;
            self.source.frozen_at = None;
        }
        Ok(SourceJob::Thaw { untrack })
    }
}
