//! The moment of a hand-over: what is asked of the API server then takes processors, there and
//! wherever it is heard, that the nodes' daemons need while the pod stands still. So nothing is
//! asked without need.
//!
//! Invariant: what a person or an agent says ends it. Absent: deciding anything. Whoever leads next
//! knows of no moment, and looks at once.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::ResourceExt;

use crate::migration::Migration;
use crate::observe;
use crate::plan::{Report, Side, Step};

/// Migrations by their UIDs, and since when they hand over.
#[derive(Debug, Default)]
pub struct Moments(Mutex<BTreeMap<String, Instant>>);

impl Moments {
    /// The word to hand over has just been written down.
    pub fn begin(&self, migration: &Migration) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, since| since.elapsed() < MOMENT);
        all.insert(migration.uid().unwrap_or_default(), Instant::now());
    }

    /// For how long yet nothing is to be looked at, if this is all that is known of it.
    pub fn left(&self, migration: &Migration) -> Option<Duration> {
        let uid = migration.uid()?;
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = MOMENT.checked_sub(all.get(&uid)?.elapsed())?;
        drop(all);
        (!is_spoken_of(migration)).then_some(left)
    }
}

/// Whether there is something to be done about it at once.
fn is_spoken_of(migration: &Migration) -> bool {
    let status = migration.status.as_ref();
    let said = |report: Option<&Report>, side| {
        report.is_some_and(|report| {
            report.is_final
                || report.has_taken(side)
                || report.fence_wanted
                || report.failure.is_some()
        })
    };
    // The word itself may not have been heard yet.
    let step = observe::record(migration).step;
    !matches!(step, Step::Placing | Step::Moving)
        || migration.spec.cancel
        || migration.metadata.deletion_timestamp.is_some()
        || said(
            status.and_then(|one| one.source_report.as_ref()),
            Side::Source,
        )
        || said(
            status.and_then(|one| one.target_report.as_ref()),
            Side::Target,
        )
}

/// Longer than most pods stand still, with the round before.
const MOMENT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn migration(status: &Value, cancel: bool) -> Migration {
        serde_json::from_value(json!({
            "apiVersion": "pageferry.dev/v1alpha1",
            "kind": "Migration",
            "metadata": {"name": "web", "uid": "u-1"},
            "spec": {"pod": {"name": "web", "uid": "u-2"}, "cancel": cancel},
            "status": status,
        }))
        .expect("a Migration")
    }

    #[test]
    fn a_moment_lasts_until_somebody_says_something() {
        let moments = Moments::default();
        let moving = json!({"course": {"step": "Moving", "proceed": true}});
        let quiet = migration(&moving, false);
        assert_eq!(moments.left(&quiet), None);
        moments.begin(&quiet);
        let left = moments.left(&quiet).expect("it has just begun");
        assert!(left <= MOMENT, "{left:?}");
        assert_eq!(moments.left(&migration(&moving, true)), None);
        for (field, report) in [
            ("sourceReport", json!({"isFinal": true})),
            ("sourceReport", json!({"moved": true})),
            ("sourceReport", json!({"fenceWanted": true})),
            ("targetReport", json!({"phase": "running"})),
            (
                "targetReport",
                json!({"failure": {"reason": "CriuFailed", "message": ""}}),
            ),
        ] {
            let mut status = moving.clone();
            status[field] = report.clone();
            assert_eq!(moments.left(&migration(&status, false)), None, "{report}");
        }
        let mut status = moving;
        status["targetReport"] = json!({"phase": "restoring", "waiting": true});
        assert!(moments.left(&migration(&status, false)).is_some());
        let later = migration(&json!({"course": {"step": "Switching"}}), false);
        assert_eq!(moments.left(&later), None);
    }
}
