//! What one move has to mind of all the others, of nodes and of disruption budgets. Pure.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;

use crate::migration::Migration;
use crate::observe::{Objects, record, selects};
use crate::plan::{DISRUPTION, Disruption, Other, Step};
use crate::target::Cluster;

/// Those that go on, and those that wait and came first: they go first.
fn before<'a>(
    migration: Option<&'a Migration>,
    all: &'a [Migration],
) -> impl Iterator<Item = &'a Migration> {
    let age = |one: &Migration| (one.metadata.creation_timestamp.clone(), one.uid());
    let own = migration.map(age);
    all.iter().filter(move |other| {
        let same = migration.is_some_and(|migration| migration.uid() == other.uid());
        let first = own.as_ref().is_none_or(|own| age(other) < *own);
        match record(other).step {
            Step::Ended => false,
            Step::Waiting => !same && first,
            _ => !same,
        }
    })
}

/// The other moves, as far as limits go.
pub fn others(migration: &Migration, all: &[Migration]) -> Vec<Other> {
    let before = before(Some(migration), all).filter(|other| {
        let course = record(other);
        let waits = course.step == Step::Waiting;
        !waits || course.blocked.is_none_or(|why| why.reason != DISRUPTION)
    });
    let others = before.map(|other| {
        let record = record(other);
        let wanted = other.spec.target.node.clone();
        let nodes = [record.source, record.target.or(wanted)];
        let nodes: Vec<String> = nodes.into_iter().flatten().collect();
        let anywhere = nodes.len() < 2;
        Other { nodes, anywhere }
    });
    others.collect()
}

/// The nodes, with what is at them and what is on its way there.
pub fn cluster(objects: &Objects) -> Cluster<'_> {
    let pods = objects.pods.as_deref();
    let going = objects.others.iter().filter(|other| {
        let own = objects.migration.as_ref().and_then(ResourceExt::uid);
        own.is_none() || other.uid() != own
    });
    let coming = going.filter_map(|other| {
        let course = other.status.as_ref()?.course.as_ref()?;
        let target = course.target.as_deref()?;
        let arrived = course.new_name.as_deref();
        let arrived = arrived.and_then(|name| find(pods, other, name));
        let here = arrived.is_some_and(|pod| is_at(pod, target));
        let over = matches!(course.step, Step::Ended | Step::Aborting);
        (!over && !here).then(|| (target, find(pods, other, &other.spec.pod.name)))
    });
    Cluster {
        nodes: &objects.nodes,
        pods,
        coming: coming.collect(),
    }
}

fn find<'a>(pods: Option<&'a [Pod]>, near: &Migration, name: &str) -> Option<&'a Pod> {
    let mut pods = pods.into_iter().flatten();
    pods.find(|pod| pod.namespace() == near.namespace() && pod.name_any() == name)
}

fn is_at(pod: &Pod, node: &str) -> bool {
    let spec = pod.spec.as_ref();
    spec.and_then(|spec| spec.node_name.as_deref()) == Some(node)
}

/// What the budgets say that count a pod.
pub fn budgets(pod: &Pod, objects: &Objects) -> Vec<Disruption> {
    let counting = objects.budgets.iter().filter(|one| counts(one, pod));
    let budgets = counting.map(|budget| {
        let status = budget.status.clone().unwrap_or_default();
        let number = |of: Option<i32>| usize::try_from(of.unwrap_or(0)).unwrap_or(0);
        let healthy = number(status.current_healthy).min(number(status.expected_pods));
        let moving = before(objects.migration.as_ref(), &objects.others)
            .filter(|other| other.namespace() == pod.namespace())
            .filter(|other| moves_one_of(other, budget, objects));
        Disruption {
            name: budget.name_any(),
            healthy,
            wanted: number(status.desired_healthy),
            moving: moving.count(),
        }
    });
    budgets.collect()
}

fn counts(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let spec = budget.spec.as_ref();
    let selector = spec.and_then(|spec| spec.selector.as_ref());
    budget.namespace() == pod.namespace()
        && selector.is_some_and(|selector| selects(selector, pod.labels()))
}

/// Of a move whose pods are not seen it is not known: it counts.
fn moves_one_of(other: &Migration, budget: &PodDisruptionBudget, objects: &Objects) -> bool {
    let pods = objects.pods.as_deref();
    let course = record(other);
    let names = [Some(other.spec.pod.name.clone()), course.new_name];
    let known = names.iter().flatten();
    let known: Vec<&Pod> = known.filter_map(|name| find(pods, other, name)).collect();
    known.is_empty() || known.iter().any(|pod| counts(budget, pod))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn migration(name: &str, second: u32, status: &Value) -> Migration {
        let object = json!({
            "apiVersion": "pageferry.dev/v1alpha1", "kind": "Migration",
            "metadata": {
                "name": name, "uid": name, "namespace": "shop",
                "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
            },
            "spec": {"pod": {"name": name, "uid": name}},
            "status": status,
        });
        serde_json::from_value(object).expect("a Migration")
    }

    fn at(step: &str) -> Value {
        json!({"course": {
            "step": step, "source": "node-a", "target": "node-b", "newName": "new",
        }})
    }

    fn pod(name: &str, node: &str) -> Pod {
        let object = json!({
            "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web"}},
            "spec": {"nodeName": node, "containers": []},
        });
        serde_json::from_value(object).expect("a pod")
    }

    #[test]
    fn who_came_first_goes_first() {
        let all = [
            migration("old", 1, &json!({})),
            migration("own", 2, &json!({})),
            migration("young", 3, &json!({})),
            migration("going", 4, &at("Copying")),
            migration("ended", 0, &at("Ended")),
            migration(
                "budget",
                0,
                &json!({"course": {
                    "step": "Waiting", "blocked": {"reason": DISRUPTION, "message": ""},
                }}),
            ),
        ];
        let others = others(&all[1], &all);
        assert_eq!(others.len(), 2);
        assert!(others[0].anywhere && others[0].nodes.is_empty());
        assert_eq!(others[1].nodes, ["node-a", "node-b"]);
    }

    #[test]
    fn what_is_on_its_way_takes_room_once() {
        let mut objects = Objects {
            others: vec![migration("going", 1, &at("Placing"))],
            pods: Some(vec![pod("going", "node-a")]),
            ..Objects::default()
        };
        let coming = |objects: &Objects| cluster(objects).coming.len();
        assert_eq!(coming(&objects), 1);
        assert!(cluster(&objects).coming[0].1.is_some());
        // The new pod is at its node.
        objects.pods = Some(vec![pod("going", "node-a"), pod("new", "node-b")]);
        assert_eq!(coming(&objects), 0);
        objects.pods = None;
        objects.others = vec![migration("going", 1, &at("Aborting"))];
        assert_eq!(coming(&objects), 0);
    }

    #[test]
    fn a_budget_counts_its_own_pods() {
        let budget = |app: &str| -> PodDisruptionBudget {
            let object = json!({
                "metadata": {"name": app, "namespace": "shop"},
                "spec": {"selector": {"matchLabels": {"app": app}}},
                "status": {
                    "currentHealthy": 4, "expectedPods": 3, "desiredHealthy": 2,
                    "disruptionsAllowed": 2,
                },
            });
            serde_json::from_value(object).expect("a budget")
        };
        let mut other = pod("other", "node-a");
        other.metadata.labels = None;
        let objects = Objects {
            migration: Some(migration("own", 5, &json!({}))),
            budgets: vec![budget("web"), budget("db")],
            others: vec![
                migration("going", 1, &at("Copying")),
                migration("other", 2, &json!({})),
                migration("gone", 3, &json!({})),
                migration("own", 5, &json!({})),
            ],
            pods: Some(vec![pod("going", "node-a"), other]),
            ..Objects::default()
        };
        let found = budgets(&pod("own", "node-a"), &objects);
        assert_eq!(found.len(), 1);
        let budget = &found[0];
        // A copy that has come and whose source is not yet gone is no spare one.
        assert_eq!((budget.healthy, budget.wanted, budget.moving), (3, 2, 2));
    }
}
