//! The way of a move up to the hand-over.

use super::observed::{Adoption, NewPod, Observed, Report, SourcePod, Target};
use super::record::{Record, Side, Step, Why};
use super::turn::DISRUPTION;
use super::{Action, Broken, Decision};
use crate::migration::Outcome;
use crate::names::RESOLVE;

pub(super) struct Course<'a> {
    pub observed: &'a Observed,
    pub broken: Option<Broken>,
}

impl Course<'_> {
    pub fn next(&self) -> Decision {
        // What has been taken over is not asked back: a side that dies later dies like any node.
        let handing = matches!(self.record().step, Step::Moving | Step::Aborting);
        let taken = if handing { self.taken() } else { None };
        if let Some(record) = taken.or_else(|| self.fence()) {
            return record.into();
        }
        match self.record().step {
            Step::Waiting => self.wait(),
            Step::Copying => self.copy(),
            Step::Placing => self.place(),
            Step::Moving => self.follow(),
            Step::Aborting => self.abort(),
            Step::Switching => self.switch(),
            Step::Cleaning => self.clean(),
            Step::Ended => self.end(),
        }
    }

    pub fn record(&self) -> &Record {
        &self.observed.record
    }

    pub fn breaks(&self, rule: Broken) -> bool {
        self.broken == Some(rule)
    }

    /// The same at another step.
    pub fn to(&self, step: Step) -> Record {
        self.record().at(step, self.observed.now)
    }

    /// Whoever has made sure that a side is dead is written down: it cannot be taken back.
    fn fence(&self) -> Option<Record> {
        let record = self.record();
        if record.fenced.is_some() || matches!(record.step, Step::Waiting | Step::Ended) {
            return None;
        }
        let down = self.observed.down.first().copied();
        let absent = self.observed.absent.first().copied();
        let down = down.or_else(|| absent.filter(|_| self.breaks(Broken::AbsentIsDown)));
        let fenced = self.observed.resolve.or(down)?;
        Some(Record {
            fenced: Some(fenced),
            ..record.clone()
        })
    }

    /// Nothing is begun: it is refused, or waits for its turn.
    fn wait(&self) -> Decision {
        let seen = self.observed;
        if seen.cancel {
            return self.finish(Outcome::Cancelled, self.cancelled()).into();
        }
        let refuse = |why: &Why| Decision::from(self.finish(Outcome::Failed, why.clone()));
        let Some(source) = &seen.source else {
            return refuse(&source_gone());
        };
        if let Some(why) = seen.refusal.clone().or_else(|| unwanted(source)) {
            return refuse(&why);
        }
        let node = match &seen.target {
            Target::Node(node) => node,
            Target::None(why) => return refuse(why),
        };
        if !seen.held {
            return Decision {
                actions: vec![Action::Hold],
                ..Decision::default()
            };
        }
        if let Some(why) = self.has_no_turn(source, node) {
            return self.block(why);
        }
        // Others are to count it before it begins.
        let blocked = self.record().blocked.as_ref();
        if blocked.is_some_and(|why| why.reason == DISRUPTION) {
            return self.unblocked();
        }
        let record = Record {
            started: Some(seen.now),
            source: Some(source.node.clone()),
            target: Some(node.clone()),
            address: source.address.clone(),
            ..self.to(Step::Copying)
        };
        record.into()
    }

    /// What ends a move before the word is given.
    fn given_up(&self) -> Option<(Why, bool)> {
        let seen = self.observed;
        if seen.cancel {
            return Some((self.cancelled(), true));
        }
        let why = match &seen.source {
            None => Some(source_gone()),
            Some(source) => unwanted(source),
        };
        let why = why.or_else(|| self.source_failed());
        let why = why.or_else(|| self.too_late());
        why.or_else(|| self.side_down()).map(|why| (why, false))
    }

    fn side_down(&self) -> Option<Why> {
        let side = self.record().fenced?;
        let text = format!("the node of the {} is down", side_name(side));
        Some(Why::new("NodeDown", text))
    }

    fn too_late(&self) -> Option<Why> {
        let record = self.record();
        let since = record.started.unwrap_or(record.since);
        let limit = self.observed.timeouts.copy;
        let late = limit <= self.observed.now - since;
        late.then(|| {
            let text = format!(
                "not ready to hand over after {limit} s: the pod writes faster than the link \
                 carries, or a node does not answer; timeouts.moveSeconds of its policy says how \
                 long to try"
            );
            Why::new("TimedOut", text)
        })
    }

    fn source_failed(&self) -> Option<Why> {
        let report = self.observed.source_report.as_ref()?;
        if !report.is_final || report.moved || report.phase == UNKNOWN {
            return None;
        }
        let why = failure(report);
        match &self.observed.eager {
            Some(eager) if why.reason == FROZEN_TOO_LONG => {
                let text = format!("{}: {eager}", why.message);
                Some(Why::new(FROZEN_TOO_LONG, text))
            }
            _ => Some(why),
        }
    }

    fn copy(&self) -> Decision {
        if let Some((why, cancelled)) = self.given_up() {
            return self.give_up(why, cancelled).into();
        }
        let report = self.observed.source_report.as_ref();
        if report.is_some_and(|report| report.holding) {
            let record = Record {
                new_name: Some(self.observed.new_name.clone()),
                ..self.to(Step::Placing)
            };
            return record.into();
        }
        self.wait_for(&[Side::Source])
    }

    fn place(&self) -> Decision {
        if let Some((why, cancelled)) = self.given_up() {
            return self.give_up(why, cancelled).into();
        }
        let record = self.record();
        let (Some(name), Some(node)) = (&record.new_name, &record.target) else {
            let why = Why::new("RecordBroken", "its status lacks the new pod or the target");
            return self.give_up(why, false).into();
        };
        let Some(new) = &self.observed.new else {
            if record.new_uid.is_some() {
                return self.give_up(new_gone(name), false).into();
            }
            if let Some(why) = self.placing_too_long() {
                return self.give_up(why, false).into();
            }
            // Its sandbox is made with an address, which cannot be changed then.
            let prepared = self.observed.target_report.as_ref();
            let prepared = prepared.and_then(|report| report.prepared.as_ref());
            if record.address.is_some() && prepared != Some(name) {
                return self.wait_for(&[Side::Source, Side::Target]);
            }
            return Decision {
                actions: vec![Action::CreatePod {
                    name: name.clone(),
                    node: node.clone(),
                }],
                ..Decision::default()
            };
        };
        if !new.ours || record.new_uid.as_ref().is_some_and(|uid| *uid != new.uid) {
            let text = format!("there is another pod called {name}");
            return self.give_up(Why::new("NameTaken", text), false).into();
        }
        if record.new_uid.is_none() {
            let record = Record {
                new_uid: Some(new.uid.clone()),
                ..record.clone()
            };
            return record.into();
        }
        if let Some(why) = self.cannot_come(new) {
            return self.give_up(why, false).into();
        }
        if self.breaks(Broken::RestoredEarly) && new.node.is_some() && !new.restored {
            let (name, uid) = (name.clone(), new.uid.clone());
            return Decision {
                actions: vec![Action::SetRestored { name, uid }],
                ..Decision::default()
            };
        }
        if self.waits(new) {
            let record = Record {
                proceed: true,
                ..self.to(Step::Moving)
            };
            return record.into();
        }
        self.wait_for(&[Side::Source, Side::Target])
    }

    /// Whether the new pod is where it can be restored.
    fn waits(&self, new: &NewPod) -> bool {
        if self.breaks(Broken::ProceedEarly) {
            return true;
        }
        let report = self.observed.target_report.as_ref();
        report.is_some_and(|report| report.waiting && report.pod_uid.as_ref() == Some(&new.uid))
    }

    fn cannot_come(&self, new: &NewPod) -> Option<Why> {
        let name = self.record().new_name.as_deref().unwrap_or_default();
        if new.deleting {
            return Some(new_gone(name));
        }
        if let Some(why) = &new.unschedulable {
            let text = format!("the scheduler has no place for {name}: {why}");
            return Some(Why::new("Unschedulable", text));
        }
        if let Some(why) = &new.stuck {
            return Some(why.clone());
        }
        let report = self.observed.target_report.as_ref();
        let failed = report.filter(|report| report.is_final && report.phase != UNKNOWN);
        if let Some(report) = failed {
            return Some(failure(report));
        }
        self.owner_changed(new).or_else(|| self.placing_too_long())
    }

    /// What the new pod was made with is not what the source is by now.
    fn owner_changed(&self, new: &NewPod) -> Option<Why> {
        let owned = self.observed.source.as_ref().is_some_and(|one| one.owned);
        let changed = match new.adoption {
            Adoption::Moot => true,
            Adoption::Nobody => owned,
            Adoption::Pending | Adoption::Done => false,
        };
        changed.then(|| {
            let text = "the pod's owner is another one than when the new pod was made, or goes: \
                        move it again";
            Why::new("OwnerChanged", text)
        })
    }

    fn placing_too_long(&self) -> Option<Why> {
        let name = self.record().new_name.as_deref().unwrap_or_default();
        let limit = self.observed.timeouts.place;
        let late = limit <= self.observed.now - self.record().since;
        late.then(|| {
            let text = format!("{name} does not wait to be restored after {limit} s");
            Why::new("NewPodTimedOut", text)
        })
    }

    /// The daemons hand over: here it is followed.
    fn follow(&self) -> Decision {
        if self.breaks(Broken::DeleteSourceEarly)
            && let Some(report) = &self.observed.source_report
            && report.phase == "committed"
        {
            return Decision {
                actions: vec![Action::DeleteSource],
                ..Decision::default()
            };
        }
        if let Some(why) = self.source_failed() {
            return self.give_up(why, false).into();
        }
        let seen = self.observed;
        if seen.cancel {
            return self.give_up(self.cancelled(), true).into();
        }
        let source = seen.source.as_ref();
        if source.is_none_or(|source| source.deleting) {
            return self.give_up(source_gone(), false).into();
        }
        if seen.new.as_ref().is_none_or(|new| new.deleting) {
            let name = self.record().new_name.as_deref().unwrap_or_default();
            return self.give_up(new_gone(name), false).into();
        }
        if let Some(why) = self.side_down() {
            return self.give_up(why, false).into();
        }
        match self.source_forgot() {
            Some(why) => self.block(why),
            None => self.wait_for(&[Side::Source, Side::Target]),
        }
    }

    /// After the word, and the source's daemon knows nothing of it: how it ended is not known.
    pub fn source_forgot(&self) -> Option<Why> {
        let record = self.record();
        let report = self.observed.source_report.as_ref()?;
        let forgot = record.proceed && report.phase == UNKNOWN;
        (forgot && record.fenced != Some(Side::Source)).then(|| {
            let text = format!(
                "pageferryd at node {} was told to hand over, and has nothing of it any more: see \
                 where the pod runs; if it does not run there and cannot go on there, annotate \
                 the Migration with {RESOLVE}=source",
                record.source.as_deref().unwrap_or_default()
            );
            Why::new("SourceForgot", text)
        })
    }

    /// The workload is at the target: there is no way back.
    fn taken(&self) -> Option<Record> {
        let seen = self.observed;
        let source = seen.source_report.as_ref();
        let target = seen.target_report.as_ref();
        let taken = source.is_some_and(|report| report.has_taken(Side::Source))
            || target.is_some_and(|report| report.has_taken(Side::Target));
        taken.then(|| Record {
            why: None,
            cancelled: false,
            ..self.to(Step::Switching)
        })
    }

    pub fn give_up(&self, why: Why, cancelled: bool) -> Record {
        Record {
            why: Some(why),
            cancelled,
            ..self.to(Step::Aborting)
        }
    }

    pub fn finish(&self, result: Outcome, why: Why) -> Record {
        Record {
            result: Some(result),
            why: Some(why),
            ended: Some(self.observed.now),
            ..self.to(Step::Ended)
        }
    }

    /// Nothing to do but to wait; blocked if one of these says nothing.
    pub fn wait_for(&self, sides: &[Side]) -> Decision {
        match sides.iter().find_map(|side| self.silence(*side)) {
            Some(why) => self.block(why),
            None => self.unblocked(),
        }
    }

    /// Waits, and is blocked on nothing any more.
    pub fn unblocked(&self) -> Decision {
        if self.record().blocked.is_some() {
            return Record {
                blocked: None,
                ..self.record().clone()
            }
            .into();
        }
        Decision {
            again: Some(AGAIN),
            ..Decision::default()
        }
    }

    pub fn block(&self, why: Why) -> Decision {
        if self.record().blocked.as_ref() == Some(&why) {
            return Decision {
                again: Some(AGAIN),
                ..Decision::default()
            };
        }
        Record {
            blocked: Some(why),
            ..self.record().clone()
        }
        .into()
    }

    /// What there is to say of a side that is waited for.
    pub fn silence(&self, side: Side) -> Option<Why> {
        let seen = self.observed;
        let record = self.record();
        let (report, node) = match side {
            Side::Source => (&seen.source_report, &record.source),
            Side::Target => (&seen.target_report, &record.target),
        };
        let node = node.as_deref().unwrap_or_default();
        // Nothing more will come, and nothing is wanted.
        if report.as_ref().is_some_and(|report| report.is_final) {
            return None;
        }
        let last = report.as_ref().map_or(record.since, |report| report.at);
        // A step that has just begun is not held against who has not yet heard of it.
        let last = last.max(record.since);
        if seen.now - last < seen.timeouts.silent {
            report.as_ref().filter(|report| report.fence_wanted)?;
            return Some(self.fence_wanted(side, node));
        }
        if seen.absent.contains(&side) {
            let text = format!(
                "node {node} is no object of the cluster any more, and its agent says nothing, \
                 which does not say that it is down: {}",
                resolving(side)
            );
            return Some(Why::new("FenceWanted", text));
        }
        let text = format!(
            "the agent at node {node} says nothing: see whether it and pageferryd run there; if \
             the node is down for good, taint it with node.kubernetes.io/out-of-service"
        );
        Some(Why::new("AgentSilent", text))
    }

    /// The daemon at a side waits for somebody to say that the other one is dead.
    fn fence_wanted(&self, side: Side, node: &str) -> Why {
        let other = match side {
            Side::Source => Side::Target,
            Side::Target => Side::Source,
        };
        let how = match self.observed.absent.contains(&other) {
            true => format!(
                "the other one is no object of the cluster any more, which does not say that it \
                 is down: {}",
                resolving(other)
            ),
            false => "bring the other node back, or make sure that it is down and taint it with \
                      node.kubernetes.io/out-of-service"
                .to_owned(),
        };
        let text = format!("pageferryd at node {node} cannot know how the hand-over ended: {how}");
        Why::new("FenceWanted", text)
    }

    fn cancelled(&self) -> Why {
        Why::new("Cancelled", "it was asked for")
    }
}

impl From<Record> for Decision {
    fn from(record: Record) -> Self {
        Self {
            record: Some(record),
            ..Self::default()
        }
    }
}

/// What a person is to do about a node that has no object to be tainted.
fn resolving(side: Side) -> String {
    format!(
        "make sure that it is off, then annotate the Migration with {RESOLVE}={}",
        side_name(side)
    )
}

/// What of the source says that it is not to move any more.
fn unwanted(source: &SourcePod) -> Option<Why> {
    if source.deleting {
        return Some(source_gone());
    }
    let text = source.outdated.as_ref()?;
    Some(Why::new("OwnerMovedOn", text.clone()))
}

fn source_gone() -> Why {
    Why::new("PodGone", "the pod was deleted")
}

fn new_gone(name: &str) -> Why {
    Why::new("NewPodGone", format!("the new pod {name} was deleted"))
}

pub fn failure(report: &Report) -> Why {
    let unsaid = || Why::new("Failed", "the daemon says that it failed, and not why");
    report.failure.clone().unwrap_or_else(unsaid)
}

pub fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Target => "target",
    }
}

/// It stood still for as long as it may, or would have.
const FROZEN_TOO_LONG: &str = "FrozenTooLong";
/// A daemon's migration that it does not have.
pub const UNKNOWN: &str = "unknown";
/// How often what waits is looked at, in seconds: reports come by themselves.
const AGAIN: i64 = 5;
