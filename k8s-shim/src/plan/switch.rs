//! The workload runs as the new pod: it takes the place of the old one in the cluster.

use super::course::Course;
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
                if !outlives(source, new) && !self.breaks(Broken::AdoptBlindly) {
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
        if let Some(side) = [Side::Source, Side::Target]
            .into_iter()
            .find(|side| !over(*side))
        {
            return self.wait_for(&[side]);
        }
        self.outcome().into()
    }

    fn outcome(&self) -> Record {
        let record = self.record();
        let new = self.observed.new.as_ref();
        let new = new.filter(|new| record.new_uid.as_ref() == Some(&new.uid));
        let lost = match new {
            None => Some((
                "NewPodGone",
                "the new pod was deleted before the move had ended",
            )),
            Some(new) if new.restarted => Some((
                "NewPodRestarted",
                "the new pod ended after it had come, and was started anew",
            )),
            Some(_) => None,
        };
        let (result, reason, text) = match lost {
            None => (
                Outcome::Succeeded,
                "Moved",
                "the pod goes on at the target as it was",
            ),
            Some((reason, text)) => (Outcome::SucceededWithoutRestore, reason, text),
        };
        let text = format!("{text}{}", self.fenced_text());
        self.finish(result, Why::new(reason, text))
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
