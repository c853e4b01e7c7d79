//! What must hold after every step, and at the end.

use pageferry_k8s::migration::Outcome;
use pageferry_k8s::plan::{Side, Step};

use crate::cluster::SOURCE;
use crate::daemons::{SourcePhase, TargetPhase};
use crate::world::World;

impl World {
    /// After every step.
    pub fn check(&self) -> Result<(), String> {
        let daemons = &self.daemons;
        let fail = |text: &str| Err(text.to_owned());
        if daemons.restores > 1 {
            return fail("a checkpoint was restored twice");
        }
        if daemons.froze_for_nothing {
            return fail("the source froze though nobody waited at the target");
        }
        if self.source_alive() && self.new_alive {
            return fail("two copies run");
        }
        if self.new_alive && daemons.target < TargetPhase::Running {
            return fail("the new pod started cold");
        }
        let restored = self.api.new_pod().is_some_and(|pod| pod.restored);
        if restored && daemons.target < TargetPhase::Running {
            return fail("a pod is said to be restored, and was not");
        }
        if self.lost && !self.meddled {
            return fail("the workload was lost, and nobody else did it");
        }
        let third = self.api.pods.values().any(|pod| pod.name == "other");
        if third && !self.meddled {
            return fail("the owner made a third pod");
        }
        let in_list = [Step::Waiting, Step::Ended].contains(&self.api.record.step);
        if in_list && self.api.record.blocked.is_some() && self.api.record.result.is_some() {
            return fail("it has ended and is blocked");
        }
        Ok(())
    }

    /// When faults have stopped, and all had time.
    pub fn check_end(&self) -> Result<String, String> {
        let record = &self.api.record;
        let daemons = &self.daemons;
        if record.step != Step::Ended && !self.api.gone {
            return match &record.blocked {
                Some(why) if self.may_block(&why.reason) => Ok("Blocked".to_owned()),
                other => Err(format!("it does not end: {:?} {other:?}", record.step)),
            };
        }
        let Some(result) = record.result else {
            return Err("it has ended without a result".to_owned());
        };
        let moved = self.api.moved();
        let known = [
            (Side::Source, daemons.source_down),
            (Side::Target, daemons.target_down),
        ];
        for (side, down) in known {
            if let Some(known) = daemons.known(side)
                && !known.is_final
                && !known.refused
                && !down
            {
                return Err(format!("the daemon of the {side:?} still has it"));
            }
        }
        if !moved && self.api.new_pod().is_some_and(|pod| !pod.deleting) {
            return Err(format!("{result:?}, and the new pod is there"));
        }
        if self.api.held {
            return Err("the finalizer is left".to_owned());
        }
        if moved && self.api.pods.contains_key(SOURCE) {
            return Err(format!("{result:?}, and the source pod is there"));
        }
        if moved
            != (daemons.target >= TargetPhase::Running && daemons.target != TargetPhase::Aborted)
        {
            return Err(format!("{result:?}, and the daemons say otherwise"));
        }
        if !moved && !self.meddled && !self.source_alive() && !daemons.source_down {
            return Err(format!("{result:?}, and the source does not run"));
        }
        if !moved && daemons.source == SourcePhase::Done {
            return Err(format!("{result:?}, and it has moved"));
        }
        if result == Outcome::Succeeded && !self.new_alive && !self.meddled {
            return Err("it succeeded, and the new pod does not run".to_owned());
        }
        if result == Outcome::Succeeded && daemons.target == TargetPhase::Lost {
            return Err("it succeeded, and the target could not keep it".to_owned());
        }
        if result == Outcome::Succeeded && self.new_restarted_before_end {
            return Err("it succeeded, and the pod began anew".to_owned());
        }
        Ok(format!("{result:?}"))
    }

    /// What nobody but a person can help.
    fn may_block(&self, reason: &str) -> bool {
        match reason {
            "AgentSilent" | "FenceWanted" | "NewPodStays" => {
                self.daemons.source_down || self.daemons.target_down
            }
            _ => false,
        }
    }
}
