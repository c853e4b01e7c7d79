//! A move that is given up: the daemons say whether they still could.

use super::course::{Course, UNKNOWN, side_name};
use super::record::{Side, Why};
use super::{Action, Broken, Decision};
use crate::migration::Outcome;

impl Course<'_> {
    /// The agents ask their daemons to abort. Where the word was never given, nothing can commit
    /// any more, and the new pod may go at once.
    pub fn abort(&self) -> Decision {
        let over = self.is_over_at_source();
        let may_delete = !self.record().proceed || over || self.breaks(Broken::DeleteNewAlways);
        let left = self.left_new();
        if let Some(delete) = &left
            && may_delete
        {
            return match self.observed.new.as_ref() {
                Some(new) if new.deleting => self.wait_for_deletion(),
                _ => Decision {
                    actions: vec![delete.clone()],
                    ..Decision::default()
                },
            };
        }
        if !over && let Some(why) = self.source_forgot() {
            return self.block(why);
        }
        if !over {
            // Of a dead source the target says how it ended.
            return match self.record().fenced {
                Some(Side::Source) => self.wait_for(&[Side::Target]),
                _ => self.wait_for(&[Side::Source]),
            };
        }
        if !self.is_over_at_target() {
            return self.wait_for(&[Side::Target]);
        }
        let record = self.record();
        let unsaid = || Why::new("Failed", "it was given up");
        let why = record.why.clone().unwrap_or_else(unsaid);
        let result = match record.cancelled {
            true => Outcome::Cancelled,
            false => Outcome::Failed,
        };
        self.finish(result, why).into()
    }

    /// The pod that was made for this move, if it is there.
    fn left_new(&self) -> Option<Action> {
        let new = self.observed.new.as_ref().filter(|new| new.ours)?;
        let name = self.record().new_name.clone()?;
        // One that came after it was given up is known by no UID, and is ours all the same.
        let uid = new.uid.clone();
        Some(Action::DeleteNew { name, uid })
    }

    fn wait_for_deletion(&self) -> Decision {
        let limit = self.observed.timeouts.place;
        if self.observed.now - self.record().since < limit {
            return self.unblocked();
        }
        let name = self.record().new_name.as_deref().unwrap_or_default();
        let text = format!(
            "the new pod {name} is deleted and does not go: see whether its node and the kubelet \
             there are up"
        );
        self.block(Why::new("NewPodStays", text))
    }

    /// The source's daemon has nothing of it any more, or had nothing, or is dead.
    fn is_over_at_source(&self) -> bool {
        if self.record().fenced == Some(Side::Source) {
            let target = self.observed.target_report.as_ref();
            let refused = target.is_some_and(|report| report.is_final && !report.moved);
            return !self.record().proceed || refused;
        }
        let report = self.observed.source_report.as_ref();
        report.is_some_and(|report| {
            report.is_final && !report.moved && (!self.record().proceed || report.phase != UNKNOWN)
        })
    }

    fn is_over_at_target(&self) -> bool {
        if self.record().fenced == Some(Side::Target) || self.record().new_uid.is_none() {
            return true;
        }
        let report = self.observed.target_report.as_ref();
        report.is_some_and(|report| report.is_final)
    }

    /// Nothing changes any more, but that what came late goes.
    pub fn end(&self) -> Decision {
        let moved = matches!(
            self.record().result,
            Some(Outcome::Succeeded | Outcome::SucceededWithoutRestore)
        );
        let left = self.left_new().filter(|_| !moved);
        let source = self.observed.source.as_ref();
        let actions = match left {
            Some(delete) if !self.breaks(Broken::LeaveNew) => vec![delete],
            _ if source.is_some_and(|source| source.evicting) && !moved => {
                vec![Action::EndEviction]
            }
            _ if self.observed.held => vec![Action::LetGo],
            _ => Vec::new(),
        };
        Decision {
            actions,
            ..Decision::default()
        }
    }

    /// What became of a fenced side, for people.
    pub fn fenced_text(&self) -> String {
        self.record().fenced.map_or_else(String::new, |side| {
            format!("; the {} was declared dead", side_name(side))
        })
    }
}
