//! Rules that hold whatever dies, looked for while moves go on: the same that the simulation
//! checks, as far as the API server's objects tell.
//!
//! What is seen of several objects is not of one moment: something counts as broken only when it
//! has been seen at two looks, and for as long as no lag of the API server explains it. Then it is
//! counted once. Nothing is decided by it.
//!
//! Absent: what only a node can see, such as a process that runs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::migration::Outcome;
use crate::plan::{Observed, Step};

/// What must not be.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Rule {
    /// The new pod runs, and nothing was handed over to it.
    ColdStart,
    /// The new pod runs, and the old one goes on for good.
    TwoCopies,
    /// The new pod is said to be restored, and Services route to it, before it was.
    RestoredEarly,
    /// One of kube-system's or of our own moves.
    ForeignPod,
    /// It has ended, and the pod that is not the workload is there still.
    LeftBehind,
    /// It does not end, and does not say what it waits for.
    NoEnd,
}

/// All rules.
pub const ALL: [Rule; 6] = [
    Rule::ColdStart,
    Rule::TwoCopies,
    Rule::RestoredEarly,
    Rule::ForeignPod,
    Rule::LeftBehind,
    Rule::NoEnd,
];

/// What they are called, in the same order.
pub const NAMES: [&str; ALL.len()] = {
    let mut names = [""; ALL.len()];
    let mut index = 0;
    while index < ALL.len() {
        names[index] = ALL[index].name();
        index += 1;
    }
    names
};

impl Rule {
    /// For programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ColdStart => "cold-start",
            Self::TwoCopies => "two-copies",
            Self::RestoredEarly => "restored-early",
            Self::ForeignPod => "foreign-pod",
            Self::LeftBehind => "left-behind",
            Self::NoEnd => "no-end",
        }
    }

    /// For how long it must be seen to count.
    const fn seen_for(self) -> Duration {
        match self {
            Self::ColdStart | Self::TwoCopies | Self::RestoredEarly | Self::ForeignPod => {
                Duration::from_secs(2)
            }
            // Kubernetes takes its time to end a pod.
            Self::LeftBehind | Self::NoEnd => Duration::from_secs(60),
        }
    }
}

/// What is broken, as things look now.
pub fn broken(seen: &Observed) -> Vec<Rule> {
    let holds = |rule: &Rule| match rule {
        Rule::ColdStart => !is_cold(seen),
        Rule::TwoCopies => !are_two(seen),
        Rule::RestoredEarly => !is_early(seen),
        Rule::ForeignPod => !is_foreign(seen),
        Rule::LeftBehind => !is_left(seen),
        Rule::NoEnd => !has_no_end(seen),
    };
    ALL.into_iter().filter(|rule| !holds(rule)).collect()
}

/// The new pod runs as ours.
fn runs(seen: &Observed) -> bool {
    let new = seen.new.as_ref();
    new.is_some_and(|new| new.ours && new.running && !new.deleting)
}

fn is_cold(seen: &Observed) -> bool {
    let record = &seen.record;
    let before = matches!(record.step, Step::Copying | Step::Placing | Step::Aborting);
    before && !record.proceed && runs(seen)
}

fn are_two(seen: &Observed) -> bool {
    let stays = seen.source_report.as_ref().is_some_and(|report| {
        let known = !matches!(report.phase.as_str(), "unknown" | "refused");
        report.is_final && !report.moved && known
    });
    // A side that somebody has declared dead says nothing that is true.
    stays && seen.record.fenced.is_none() && seen.source.is_some() && runs(seen)
}

fn is_early(seen: &Observed) -> bool {
    let handed = matches!(
        seen.record.step,
        Step::Switching | Step::Cleaning | Step::Ended
    );
    let new = seen.new.as_ref();
    !handed && new.is_some_and(|new| new.ours && new.restored)
}

fn is_foreign(seen: &Observed) -> bool {
    let moves = !matches!(
        seen.record.step,
        Step::Waiting | Step::Ended | Step::Aborting
    );
    let why = seen.refusal.as_ref();
    moves && why.is_some_and(|why| matches!(why.reason.as_str(), "SystemPod" | "OwnPod"))
}

fn is_left(seen: &Observed) -> bool {
    let record = &seen.record;
    if record.step != Step::Ended {
        return false;
    }
    match record.result {
        Some(Outcome::Failed | Outcome::Cancelled) => seen
            .new
            .as_ref()
            .is_some_and(|new| new.ours && !new.deleting),
        // Where its node is gone for good, nobody can end it.
        Some(Outcome::Succeeded | Outcome::SucceededWithoutRestore) => {
            let source = seen.source.as_ref();
            record.fenced.is_none() && source.is_some_and(|source| !source.deleting)
        }
        None => false,
    }
}

fn has_no_end(seen: &Observed) -> bool {
    let record = &seen.record;
    let goes_on = !matches!(record.step, Step::Waiting | Step::Ended);
    let timeouts = &seen.timeouts;
    let longest = timeouts.copy + timeouts.place + timeouts.clean;
    goes_on && record.blocked.is_none() && longest < seen.now - record.since
}

/// What has been seen broken, and since when.
#[derive(Debug, Default)]
pub struct Suspicions {
    /// By the Migration's UID. The time is none where it has been counted.
    all: Mutex<BTreeMap<(String, Rule), Option<Instant>>>,
}

impl Suspicions {
    fn all(&self) -> MutexGuard<'_, BTreeMap<(String, Rule), Option<Instant>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what looks broken of a Migration now. Answers with what counts from now on, and
    /// whether to look again soon.
    pub fn look(&self, uid: &str, broken: &[Rule], now: Instant) -> (Vec<Rule>, bool) {
        let mut all = self.all();
        all.retain(|(of, rule), _| of != uid || broken.contains(rule));
        let (mut counted, mut again) = (Vec::new(), false);
        for rule in broken {
            let since = all.entry((uid.to_owned(), *rule)).or_insert(Some(now));
            match since {
                Some(first) if rule.seen_for() <= now.saturating_duration_since(*first) => {
                    *since = None;
                    counted.push(*rule);
                }
                Some(_) => again = true,
                None => {}
            }
        }
        (counted, again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{NewPod, Record, Report, SourcePod, Why};

    fn at(step: Step) -> Observed {
        Observed {
            source: Some(SourcePod::default()),
            record: Record {
                step,
                proceed: step == Step::Moving,
                ..Record::default()
            },
            ..Observed::default()
        }
    }

    fn new() -> NewPod {
        NewPod {
            ours: true,
            ..NewPod::default()
        }
    }

    #[test]
    fn what_is_as_it_must_be_breaks_no_rule() {
        for step in [Step::Waiting, Step::Placing, Step::Moving, Step::Aborting] {
            let mut seen = at(step);
            assert_eq!(broken(&seen), [], "{step:?}");
            seen.new = Some(new());
            assert_eq!(broken(&seen), [], "{step:?}");
        }
        let mut handed = at(Step::Switching);
        handed.new = Some(NewPod {
            running: true,
            restored: true,
            ..new()
        });
        assert_eq!(broken(&handed), []);
    }

    #[test]
    fn each_rule_is_seen_broken() {
        let running = Some(NewPod {
            running: true,
            ..new()
        });
        let mut cold = at(Step::Placing);
        cold.new = running.clone();
        assert_eq!(broken(&cold), [Rule::ColdStart]);
        let mut two = at(Step::Moving);
        two.new = running;
        two.source_report = Some(Report {
            phase: "aborted".to_owned(),
            is_final: true,
            ..Report::default()
        });
        assert_eq!(broken(&two), [Rule::TwoCopies]);
        let mut early = at(Step::Moving);
        early.new = Some(NewPod {
            restored: true,
            ..new()
        });
        assert_eq!(broken(&early), [Rule::RestoredEarly]);
        let mut foreign = at(Step::Copying);
        foreign.refusal = Some(Why::new("SystemPod", "it is kube-system's"));
        assert_eq!(broken(&foreign), [Rule::ForeignPod]);
        for (result, new) in [
            (Outcome::Cancelled, Some(new())),
            (Outcome::Succeeded, None),
        ] {
            let mut left = at(Step::Ended);
            (left.record.result, left.new) = (Some(result), new);
            assert_eq!(broken(&left), [Rule::LeftBehind]);
        }
        let mut stuck = at(Step::Cleaning);
        stuck.now = 10_000;
        assert_eq!(broken(&stuck), [Rule::NoEnd]);
        stuck.record.blocked = Some(Why::new("FenceWanted", "the target is silent"));
        assert_eq!(broken(&stuck), []);
    }

    #[test]
    fn what_is_seen_once_is_not_counted_and_what_lasts_is_once() {
        let suspicions = Suspicions::default();
        let began = Instant::now();
        let look = |broken: &[Rule], seconds| {
            suspicions.look("u", broken, began + Duration::from_secs(seconds))
        };
        let cold = [Rule::ColdStart];
        assert_eq!(look(&cold, 0), (vec![], true));
        assert_eq!(look(&[], 1), (vec![], false));
        assert_eq!(look(&cold, 2), (vec![], true));
        assert_eq!(look(&cold, 5), (vec![Rule::ColdStart], false));
        assert_eq!(look(&cold, 9), (vec![], false));
        // Of another Migration it is another matter.
        let other = suspicions.look("v", &cold, began + Duration::from_secs(9));
        assert_eq!(other, (vec![], true));
    }
}
