//! How a migration comes to its end, and how it may have ended.

use super::node::{SourceWorkload, TargetWorkload};
use super::oracle::Violation;
use super::world::{Survivor, World};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::source::SourceEvent;
use pageferry_proto::migration::status::{Phase, Status};
use pageferry_proto::migration::target::TargetEvent;
use pageferry_proto::wire::code::ErrorCode;

impl World {
    /// What an operator does who sees that a migration stands still. Says whether there was
    /// anything to do.
    pub(super) fn operate(&mut self) -> bool {
        let phase = |status: Option<Status>| status.map(|status| status.phase);
        let source = phase(self.status(Side::Source));
        let target = phase(self.status(Side::Target));
        if self
            .status(Side::Source)
            .is_some_and(|status| status.holding)
        {
            self.trace.push("proceed".to_owned());
            self.proceed();
            return true;
        }
        let target_gone = match source {
            Some(Phase::Committed) => {
                self.target.dead || self.target.workload == TargetWorkload::Lost
            }
            // Else it says itself that it is lost.
            Some(Phase::Draining) => self.target.dead,
            _ => false,
        };
        if target_gone {
            let wanted = self
                .status(Side::Source)
                .is_some_and(|status| status.fence_wanted);
            if wanted {
                self.trace.push("fence target".to_owned());
                self.at_source(SourceEvent::Fenced(Side::Target));
            }
            return wanted;
        }
        let waits = self.next_timer().is_none();
        if target == Some(Phase::Running) && self.source.dead && waits {
            let wanted = self
                .status(Side::Target)
                .is_some_and(|status| status.fence_wanted);
            if wanted {
                self.trace.push("fence source".to_owned());
                self.at_target(TargetEvent::Fenced(Side::Source));
            }
            return wanted;
        }
        if target != Some(Phase::Ready) || self.next_timer().is_some() {
            return false;
        }
        if self.source.dead {
            self.trace.push("fence source".to_owned());
            self.at_target(TargetEvent::Fenced(Side::Source));
            return true;
        }
        if source.is_none_or(Phase::is_final) {
            self.trace.push("abort at target".to_owned());
            self.at_target(TargetEvent::AbortRequested);
            return true;
        }
        false
    }

    pub(super) fn check_end(&self) -> Result<Survivor, Violation> {
        let survivor = self.survivor();
        let phase = |side| self.status(side).map(|status| status.phase);
        let (source, target) = (phase(Side::Source), phase(Side::Target));
        let stayed = source.is_none_or(|phase| phase == Phase::Aborted);
        let source_lost =
            self.source.dead || (self.source.workload == SourceWorkload::Gone && stayed);
        let target_lost = self.target.dead
            || matches!(
                self.target.workload,
                TargetWorkload::Lost | TargetWorkload::Ended
            );
        self.check_drain_end()?;
        if survivor == Survivor::Nobody && !source_lost && !target_lost {
            return Err(self.violation("the workload runs nowhere"));
        }
        if survivor != Survivor::Source && target_lost && self.starts == 0 && !source_lost {
            return Err(self.violation("the source does not get back what never started"));
        }
        let lost = |status: Status| {
            status.phase != Phase::Aborted
                || status.failure.map(|failure| failure.code()) == Some(ErrorCode::WorkloadGone)
        };
        if self.source.back_in_part && !self.status(Side::Source).is_none_or(lost) {
            return Err(self.violation("the source does not say that the workload is lost"));
        }
        let ended = |phase: Option<Phase>| phase.is_none_or(Phase::is_final);
        if !ended(source) {
            return Err(self.violation("the source does not come to an end"));
        }
        if !ended(target) && target != Some(Phase::Accepted) {
            return Err(self.violation("the target does not come to an end"));
        }
        match (source, survivor) {
            (Some(Phase::Done), Survivor::Source) => {
                Err(self.violation("the source says that the workload moved, and it did not"))
            }
            (Some(Phase::Aborted), Survivor::Target) if !self.source.dead => {
                Err(self.violation("the source says that the workload stayed, and it did not"))
            }
            (_, survivor) => Ok(survivor),
        }
    }
}
