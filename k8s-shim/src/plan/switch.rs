//! The workload runs as the new pod: it takes the place of the old one in the cluster.

use super::course::{Course, failure, side_name};
use super::observed::{Adoption, NewPod, SourcePod};
use super::record::{Record, Side, Step, Why};
use super::{Action, Broken, Decision};
use crate::migration::Outcome;

impl Course<'_> {
    pub fn switch(&self) -> Decision {
        let seen = self.observed;
        let Some(name) = self.record().new_name.clone() else {
            return self.to(Step::Cleaning).into();
        };
        let uid = self.record().new_uid.clone();
        let new = seen
            .new
            .as_ref()
            .filter(|new| uid.as_ref() == Some(&new.uid));
        let Some(new) = new else {
            // Somebody has deleted it: nothing is left that could be lost by its source going.
            return match &seen.source {
                Some(_) => act(Action::DeleteSource),
                None => self.to(Step::Cleaning).into(),
            };
        };
        let uid = new.uid.clone();
        if new.bound {
            return act(Action::Release { name, uid });
        }
        if !new.restored {
            return act(Action::SetRestored { name, uid });
        }
        if new.adoption == Adoption::Pending && !self.breaks(Broken::DeleteBeforeAdoption) {
            if let Some(source) = seen
                .source
                .as_ref()
                .filter(|one| one.owned && !one.deleting)
            {
                if !source.marked {
                    return act(Action::MarkSource);
                }
                let lost = self.lost_at_target().is_some();
                if !lost && !outlives(source, new) && !self.breaks(Broken::AdoptBlindly) {
                    return self.wait_until_ready(&name);
                }
            }
            return act(Action::Adopt { name, uid });
        }
        if seen.source.is_some() {
            return act(Action::DeleteSource);
        }
        self.to(Step::Cleaning).into()
    }

    fn wait_until_ready(&self, name: &str) -> Decision {
        if self.observed.now - self.record().since < self.observed.timeouts.place {
            return self.unblocked();
        }
        let text = format!(
            "the new pod {name} runs, and is not ready: its owner would delete it and not the old \
             one"
        );
        self.block(Why::new("NewPodNotReady", text))
    }

    /// The daemons fill memory and remove what is left.
    pub fn clean(&self) -> Decision {
        let seen = self.observed;
        let fenced = self.record().fenced;
        let over = |side: Side| {
            let report = match side {
                Side::Source => &seen.source_report,
                Side::Target => &seen.target_report,
            };
            fenced == Some(side) || report.as_ref().is_some_and(|report| report.is_final)
        };
        let mut sides = [Side::Source, Side::Target].into_iter();
        if let Some(side) = sides.find(|side| !over(*side)) {
            let why = self.silence(side);
            return match why.or_else(|| self.cleaning_too_long(side)) {
                Some(why) => self.block(why),
                None => self.unblocked(),
            };
        }
        self.outcome().into()
    }

    fn cleaning_too_long(&self, side: Side) -> Option<Why> {
        let limit = self.observed.timeouts.clean;
        let late = limit <= self.observed.now - self.record().since;
        late.then(|| {
            let text = format!(
                "pageferryd at the {} is not done after {limit} s: ask it there, by `pageferry \
                 show`, what it waits for",
                side_name(side)
            );
            Why::new("CleaningTakesLong", text)
        })
    }

    fn outcome(&self) -> Record {
        let (result, mut why) = match self.lost() {
            None if self.is_unowned() => {
                let text = "the pod goes on at the target as it was, and without an owner: the \
                            one that it had is gone or goes, or had given it away";
                (Outcome::Succeeded, Why::new("MovedWithoutOwner", text))
            }
            None => {
                let text = "the pod goes on at the target as it was";
                (Outcome::Succeeded, Why::new("Moved", text))
            }
            Some(why) => (Outcome::SucceededWithoutRestore, why),
        };
        why.message += &self.fenced_text();
        self.finish(result, why)
    }

    fn is_unowned(&self) -> bool {
        let new = self.observed.new.as_ref();
        new.is_some_and(|new| new.adoption == Adoption::Moot)
    }

    /// Why what was in memory is not, or not all of it, in the new pod.
    fn lost(&self) -> Option<Why> {
        let record = self.record();
        let new = self.observed.new.as_ref();
        let new = new.filter(|new| record.new_uid.as_ref() == Some(&new.uid));
        let Some(new) = new else {
            let text = "the new pod was deleted before the move had ended";
            return Some(Why::new("NewPodGone", text));
        };
        if let Some(why) = self.lost_at_target() {
            return Some(why);
        }
        new.restarted.then(|| {
            let text = "the new pod ended after it had come, and was started anew";
            Why::new("NewPodRestarted", text)
        })
    }

    /// The target's daemon had let it run, and could not keep it.
    fn lost_at_target(&self) -> Option<Why> {
        let report = self.observed.target_report.as_ref();
        if self.breaks(Broken::LostIsMoved) || report.is_some_and(|report| report.moved) {
            return None;
        }
        if let Some(report) = report.filter(|report| report.is_final) {
            return Some(failure(report));
        }
        (self.record().fenced == Some(Side::Target)).then(|| {
            let text = "the target was lost before all of the pod's memory was there";
            Why::new("TargetLost", text)
        })
    }
}

fn act(action: Action) -> Decision {
    Decision {
        actions: vec![action],
        ..Decision::default()
    }
}

/// Whether a ReplicaSet with one pod too many would rather lose the source, which has the lowest
/// cost of deletion, than the new pod: it looks whether pods run, then whether they are ready, and
/// only then at the cost.
fn outlives(source: &SourcePod, new: &NewPod) -> bool {
    new.running && (new.ready || !source.ready)
}
