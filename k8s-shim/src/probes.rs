//! How long a pod may stand still, by its own probes. Pure.
//!
//! A pod that stands still answers nobody. Its kubelet asks a container to end whose liveness or
//! startup probe fails so many times in a row, and that comes true when the pod goes on where it
//! was. So up to the commit it stands still for less than that takes, with time left to answer.
//! After the commit a kubelet may ask for what it likes: nothing of the pod runs there any more.
//!
//! Absent: readiness probes, which end nothing; and failures that a kubelet counts before the move.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Pod, Probe};

use crate::migration::Budget;
use crate::policy::{MigrationPolicySpec, Timeouts};

/// What bounds the time for which a pod may stand still before the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patience {
    pub millis: i64,
    /// Whose, for people.
    pub whose: String,
}

/// That of the most eager probe; none of a pod without such probes.
pub fn patience(pod: &Pod) -> Option<Patience> {
    let spec = pod.spec.as_ref()?;
    let statuses = pod.status.iter();
    let statuses = statuses.flat_map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        status.container_statuses.iter().flatten().chain(init)
    });
    let started = statuses.filter(|one| one.started == Some(true));
    let started: BTreeSet<&str> = started.map(|one| one.name.as_str()).collect();
    let sidecars = spec.init_containers.iter().flatten();
    let containers = spec.containers.iter().chain(sidecars);
    let all = containers.flat_map(|container| {
        let name = container.name.as_str();
        let liveness = container.liveness_probe.as_ref();
        // It is not asked any more once the container has started.
        let startup = container.startup_probe.as_ref();
        let startup = startup.filter(|_| !started.contains(name));
        let both = [("liveness", liveness), ("startup", startup)].into_iter();
        both.filter_map(move |(kind, probe)| Some(of(name, kind, probe?)))
    });
    all.min_by_key(|one| one.millis)
}

fn of(container: &str, kind: &str, probe: &Probe) -> Patience {
    let seconds = |value: Option<i32>, default| i64::from(value.unwrap_or(default)).max(1);
    let (period, timeout) = (
        seconds(probe.period_seconds, 10),
        seconds(probe.timeout_seconds, 1),
    );
    let times = seconds(probe.failure_threshold, 3);
    // The first one may have been sent when the pod was about to stand still; one that is late
    // holds up the next.
    let fails = timeout + (times - 1) * period.max(timeout);
    Patience {
        // The rest is for the thaw and the answer.
        millis: fails * 750,
        whose: format!(
            "the {kind} probe of container {container} has the kubelet end it after {fails} s \
             without an answer"
        ),
    }
}

/// What the daemons have for the move of a pod, by its policy and its probes.
pub fn budget(policy: Option<&MigrationPolicySpec>, pod: Option<&Pod>) -> Option<Budget> {
    let frozen = frozen_most(policy, pod);
    let least = |millis: i32| frozen.map_or(millis.into(), |most| most.min(millis.into()));
    match policy {
        None => frozen.map(|most| Budget {
            frozen_ms: Some(most),
            ..Budget::default()
        }),
        Some(policy) => Some(Budget {
            downtime_ms: Some(least(policy.downtime_budget_ms)),
            frozen_ms: Some(least(policy.timeouts.frozen_ms)),
            move_ms: Some(i64::from(policy.timeouts.move_seconds) * 1000),
        }),
    }
}

/// Of a pod with probes; without a policy what one would say that says nothing.
fn frozen_most(policy: Option<&MigrationPolicySpec>, pod: Option<&Pod>) -> Option<i64> {
    let patience = patience(pod?)?;
    Some(patience.millis.min(allowed(policy)))
}

fn allowed(policy: Option<&MigrationPolicySpec>) -> i64 {
    let frozen = policy.map_or(Timeouts::default().frozen_ms, |one| one.timeouts.frozen_ms);
    frozen.into()
}

/// What there is to say if the pod was not let stand still for long enough: its probes, if it is
/// for them.
pub fn eager(policy: Option<&MigrationPolicySpec>, pod: &Pod) -> Option<String> {
    let found = patience(pod).filter(|one| one.millis < allowed(policy))?;
    Some(format!(
        "it may stand still for {} ms, as {}",
        found.millis, found.whose
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(probes: &Value, started: bool) -> Pod {
        let mut container = json!({"name": "web"});
        for (name, probe) in probes.as_object().expect("probes") {
            container[name] = probe.clone();
        }
        let status = json!({
            "name": "web", "started": started, "ready": true, "restartCount": 0, "image": "web",
            "imageID": "web",
        });
        serde_json::from_value(json!({
            "metadata": {"name": "web"},
            "spec": {"containers": [container]},
            "status": {"containerStatuses": [status]},
        }))
        .expect("a pod")
    }

    fn millis(probes: &Value, started: bool) -> Option<i64> {
        patience(&pod(probes, started)).map(|one| one.millis)
    }

    #[test]
    fn a_pod_stands_still_for_less_than_its_probes_bear() {
        assert_eq!(millis(&json!({}), true), None);
        assert_eq!(
            millis(&json!({"readinessProbe": {"periodSeconds": 1}}), true),
            None
        );
        let eager = json!({"periodSeconds": 1, "failureThreshold": 1});
        assert_eq!(millis(&json!({"livenessProbe": eager}), true), Some(750));
        // What the API server writes where nothing is said.
        assert_eq!(millis(&json!({"livenessProbe": {}}), true), Some(15_750));
        let slow = json!({"periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 2});
        assert_eq!(millis(&json!({"livenessProbe": slow}), true), Some(7_500));
        let startup = json!({"livenessProbe": {}, "startupProbe": eager});
        assert_eq!(millis(&startup, false), Some(750));
        assert_eq!(millis(&startup, true), Some(15_750));
    }

    #[test]
    fn probes_shorten_what_a_policy_allows_and_never_lengthen_it() {
        let policy = |frozen: i32| MigrationPolicySpec {
            downtime_budget_ms: 300,
            timeouts: Timeouts {
                frozen_ms: frozen,
                ..Timeouts::default()
            },
            ..serde_json::from_value(json!({})).expect("a policy that says nothing")
        };
        let with = |threshold: i32| {
            let probe = json!({"periodSeconds": 1, "failureThreshold": threshold});
            pod(&json!({"livenessProbe": probe}), true)
        };
        let frozen = |policy: Option<MigrationPolicySpec>, pod: &Pod| {
            budget(policy.as_ref(), Some(pod)).and_then(|one| one.frozen_ms)
        };
        let plain = pod(&json!({}), true);
        assert_eq!(frozen(None, &plain), None);
        assert_eq!(frozen(Some(policy(9_000)), &plain), Some(9_000));
        assert_eq!(frozen(None, &with(1)), Some(750));
        assert_eq!(frozen(None, &with(60)), Some(5_000));
        assert_eq!(frozen(Some(policy(9_000)), &with(4)), Some(3_000));
        assert_eq!(frozen(Some(policy(400)), &with(4)), Some(400));
        let tight = budget(Some(&policy(9_000)), Some(&with(1))).expect("a budget");
        assert_eq!(tight.downtime_ms, Some(300));
        let text = eager(None, &with(1)).expect("probes bound it");
        assert!(text.contains("liveness probe of container web"), "{text}");
        assert_eq!(eager(Some(&policy(400)), &with(4)), None);
        assert_eq!(budget(None, None), None);
    }
}
