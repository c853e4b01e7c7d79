//! From the objects of the API to what the plan looks at. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ContainerStatus, Node, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, OwnerReference, Time};
use kube::core::{Selector, SelectorExt};
use kube::{Resource, ResourceExt};

use crate::eligible::{self, Claims};
use crate::migration::Migration;
use crate::names::{
    ADOPT, DELETION_COST, EVICTING, FINALIZER, MIGRATION, ORIGIN, OUT_OF_SERVICE, RESOLVE,
    RESTORED, daemon_id, next_pod,
};
use crate::newpod::Adopt;
use crate::plan::{
    Adoption, Limits, NewPod, Observed, Record, Side, SourcePod, Step, Timeouts, Why,
};
use crate::policy::{MigrationPolicy, MigrationPolicySpec};
use crate::{probes, surroundings, target};

/// Everything that one Migration depends on.
#[derive(Debug, Default)]
pub struct Objects {
    pub migration: Option<Migration>,
    /// The pod of the name that the Migration says, whatever its UID.
    pub source: Option<Pod>,
    pub new: Option<Pod>,
    pub nodes: Vec<Node>,
    pub owner: Option<ReplicaSet>,
    /// The ReplicaSet that the new pod is to be given to, by its name.
    pub adopter: Option<ReplicaSet>,
    pub deployment: Option<Deployment>,
    pub claims: Claims,
    pub others: Vec<Migration>,
    /// Those of the cluster, where it is to be known what room there is.
    pub pods: Option<Vec<Pod>>,
    /// Those of the pod's namespace.
    pub budgets: Vec<PodDisruptionBudget>,
    pub policies: Vec<MigrationPolicy>,
    /// Labels of the pod's namespace.
    pub namespace: BTreeMap<String, String>,
}

/// What the controller has written down of a Migration.
pub fn record(migration: &Migration) -> Record {
    let status = migration.status.as_ref();
    status
        .and_then(|status| status.course.clone())
        .unwrap_or_default()
}

/// The source pod, if it is the very one.
pub fn source(objects: &Objects) -> Option<&Pod> {
    let migration = objects.migration.as_ref()?;
    let pod = objects.source.as_ref();
    pod.filter(|pod| pod.uid().as_deref() == Some(&migration.spec.pod.uid))
}

/// What the plan looks at. None where there is no Migration.
pub fn observe(objects: &Objects, now: i64) -> Option<Observed> {
    let migration = objects.migration.as_ref()?;
    let record = record(migration);
    let source = source(objects);
    let status = migration.status.clone().unwrap_or_default();
    let deleting = migration.metadata.deletion_timestamp.is_some();
    let node = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let at = source.and_then(node).unwrap_or_default();
    let mut seen = Observed {
        now,
        created: migration
            .metadata
            .creation_timestamp
            .as_ref()
            .map_or(now, seconds),
        cancel: migration.spec.cancel || deleting,
        held: migration.finalizers().iter().any(|one| one == FINALIZER),
        deleting,
        resolve: resolve(migration),
        target: target::choose(
            &migration.spec.target,
            source,
            &surroundings::cluster(objects),
        ),
        source_report: status.source_report,
        target_report: status.target_report,
        down: down(&record, &objects.nodes),
        absent: absent(&record, &objects.nodes),
        others: surroundings::others(migration, &objects.others),
        budgets: source.map_or_else(Vec::new, |pod| surroundings::budgets(pod, objects)),
        ..Observed::default()
    };
    if let Some(policy) = policy(objects) {
        seen.limits = Limits {
            per_node: usize::try_from(policy.at_once.per_node).unwrap_or(1),
            per_cluster: usize::try_from(policy.at_once.per_cluster).unwrap_or(1),
        };
        seen.timeouts.copy = policy.timeouts.move_seconds.into();
    }
    // What holds is what held when it began, whatever became of the policy.
    if record.step != Step::Waiting {
        let kept = status.budget.and_then(|budget| budget.move_ms);
        seen.timeouts.copy = kept.map_or(Timeouts::default().copy, |kept| kept / 1000);
    }
    if let Some(pod) = source {
        seen.refusal = eligible::refusal(pod, &objects.claims).or_else(|| policy_unknown(objects));
        seen.eager = probes::eager(policy(objects), pod);
        seen.new_name = next_pod(
            &pod.name_any(),
            pod.annotations().get(ORIGIN).map(String::as_str),
        );
        seen.source = Some(SourcePod {
            node: at,
            address: pod.status.as_ref().and_then(|status| status.pod_ip.clone()),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            ready: condition(pod, "Ready"),
            marked: pod
                .annotations()
                .get(DELETION_COST)
                .is_some_and(|cost| cost == LOWEST_COST),
            owned: eligible::owner(pod).is_some(),
            outdated: outdated(pod, objects),
            evicting: pod.annotations().get(EVICTING) == Some(&migration.name_any()),
        });
    }
    let uid = migration.uid().unwrap_or_default();
    seen.new = objects.new.as_ref().map(|pod| NewPod {
        adoption: adoption(pod, objects),
        ..new_pod(pod, &daemon_id(&uid), now)
    });
    seen.record = record;
    Some(seen)
}

/// By whom a move is bound.
pub fn policy(objects: &Objects) -> Option<&MigrationPolicySpec> {
    let migration = objects.migration.as_ref()?;
    if let Some(name) = &migration.spec.policy {
        let named = objects.policies.iter().find(|one| one.name_any() == *name);
        return named.map(|one| &one.spec);
    }
    let labels = objects.source.as_ref().map(|pod| pod.labels().clone());
    selecting(
        &objects.policies,
        &labels.unwrap_or_default(),
        &objects.namespace,
    )
}

/// The first by name that selects a pod of these labels, in a namespace of those.
pub fn selecting<'a>(
    policies: &'a [MigrationPolicy],
    pod: &BTreeMap<String, String>,
    namespace: &BTreeMap<String, String>,
) -> Option<&'a MigrationPolicySpec> {
    let mut policies: Vec<&MigrationPolicy> = policies.iter().collect();
    policies.sort_by_key(|one| one.name_any());
    let mut specs = policies.into_iter().map(|one| &one.spec);
    specs.find(|spec| {
        selects(&spec.pod_selector, pod) && selects(&spec.namespace_selector, namespace)
    })
}

/// One that nobody can read selects nothing.
pub fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    Selector::try_from(selector.clone()).is_ok_and(|selector| selector.matches(labels))
}

/// One that is named and is not there: its limits are not known, and others were not asked for.
fn policy_unknown(objects: &Objects) -> Option<Why> {
    let name = objects.migration.as_ref()?.spec.policy.as_ref()?;
    policy(objects).is_none().then(|| {
        let text = format!("there is no MigrationPolicy {name}: make it, or name another one");
        Why::new("PolicyUnknown", text)
    })
}

fn resolve(migration: &Migration) -> Option<Side> {
    match migration.annotations().get(RESOLVE)?.as_str() {
        "source" => Some(Side::Source),
        "target" => Some(Side::Target),
        _ => None,
    }
}

/// Nodes of which a person has said that they are down.
fn down(record: &Record, nodes: &[Node]) -> Vec<Side> {
    sides(record, |name| {
        let node = nodes.iter().find(|node| node.name_any() == name);
        node.is_some_and(|node| {
            let mut taints = node
                .spec
                .iter()
                .flat_map(|spec| spec.taints.iter().flatten());
            taints.any(|taint| taint.key == OUT_OF_SERVICE)
        })
    })
}

/// Nodes that the API server does not have. They may run nevertheless: an object is no machine.
fn absent(record: &Record, nodes: &[Node]) -> Vec<Side> {
    sides(record, |name| {
        !nodes.iter().any(|node| node.name_any() == name)
    })
}

fn sides(record: &Record, of: impl Fn(&str) -> bool) -> Vec<Side> {
    let sides = [
        (Side::Source, &record.source),
        (Side::Target, &record.target),
    ];
    let sides = sides.into_iter();
    let sides = sides.filter(|(_, name)| name.as_deref().is_some_and(&of));
    sides.map(|(side, _)| side).collect()
}

/// Why the pod's owner wants other pods by now.
fn outdated(pod: &Pod, objects: &Objects) -> Option<String> {
    let owner = eligible::owner(pod).filter(|owner| owner.kind == "ReplicaSet")?;
    let set = objects.owner.as_ref();
    let Some(set) = set.filter(|set| set.uid().as_deref() == Some(&owner.uid)) else {
        return Some(format!("its ReplicaSet {} is gone", owner.name));
    };
    let wanted = set.spec.replicas.unwrap_or(1);
    if set.metadata.deletion_timestamp.is_some() || wanted == 0 {
        return Some(format!("its ReplicaSet {} wants no pods", owner.name));
    }
    let revision = |annotations: &BTreeMap<String, String>| annotations.get(REVISION).cloned();
    let newest = objects
        .deployment
        .as_ref()
        .and_then(|one| revision(one.annotations()))?;
    let own = revision(set.annotations())?;
    (own != newest).then(|| {
        format!("its Deployment is at revision {newest}, and the pod is of revision {own}")
    })
}

fn new_pod(pod: &Pod, migration: &str, now: i64) -> NewPod {
    let status = pod.status.as_ref();
    // Of init containers it has none but sidecars.
    let containers = status.iter().flat_map(|one| {
        let init = one.init_container_statuses.iter().flatten();
        init.chain(one.container_statuses.iter().flatten())
    });
    let containers: Vec<&ContainerStatus> = containers.collect();
    let state =
        |one: &&ContainerStatus| one.state.as_ref().is_some_and(|one| one.running.is_some());
    let owners = pod.owner_references();
    NewPod {
        uid: pod.uid().unwrap_or_default(),
        ours: pod
            .annotations()
            .get(MIGRATION)
            .is_some_and(|id| id == migration),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        created: pod
            .metadata
            .creation_timestamp
            .as_ref()
            .map_or(now, seconds),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        unschedulable: unschedulable(pod, now),
        stuck: containers
            .iter()
            .find_map(|one| stuck(one))
            .or_else(|| failed(pod)),
        running: !containers.is_empty() && containers.iter().all(state),
        ready: condition(pod, "Ready"),
        restored: condition(pod, RESTORED),
        bound: owners
            .iter()
            .any(|owner| owner.kind == Migration::kind(&())),
        restarted: containers.iter().any(|one| has_run_before(one)),
        // By the source, and by the owner: below.
        adoption: Adoption::Nobody,
    }
}

/// How a pod that comes is to the owner that the source had when it was made.
fn adoption(new: &Pod, objects: &Objects) -> Adoption {
    let Some(wanted) = adopter(new) else {
        return Adoption::Nobody;
    };
    if eligible::owner(new).is_some() {
        return Adoption::Done;
    }
    let set = objects.adopter.as_ref();
    let there = set.is_some_and(|set| {
        set.uid().as_deref() == Some(&wanted.uid) && set.metadata.deletion_timestamp.is_none()
    });
    let same = source(objects)
        .is_none_or(|pod| eligible::owner(pod).is_some_and(|owner| owner.uid == wanted.uid));
    match there && same {
        true => Adoption::Pending,
        false => Adoption::Moot,
    }
}

/// Whom a pod that comes is to be given to. One that nobody can read has no UID, and is nobody's.
pub fn adopter(new: &Pod) -> Option<OwnerReference> {
    let text = new.annotations().get(ADOPT)?;
    let adopt: Adopt = serde_json::from_str(text).unwrap_or_default();
    let mut owners = adopt.owner_references.into_iter();
    Some(owners.next().unwrap_or_default())
}

fn condition(pod: &Pod, wanted: &str) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|one| one.conditions.iter().flatten());
    let mut found = conditions.filter(|one| one.type_ == wanted && one.status == "True");
    found.next().is_some()
}

/// What the scheduler says, when it has had time to find room.
fn unschedulable(pod: &Pod, now: i64) -> Option<String> {
    let conditions = pod
        .status
        .iter()
        .flat_map(|one| one.conditions.iter().flatten());
    let mut conditions = conditions.filter(|one| one.type_ == "PodScheduled");
    let said = conditions.find(|one| one.status == "False")?;
    let created = pod
        .metadata
        .creation_timestamp
        .as_ref()
        .map_or(now, seconds);
    let waited = SCHEDULER_TIME <= now - created;
    let unsaid = || "it does not say why".to_owned();
    waited.then(|| said.message.clone().unwrap_or_else(unsaid))
}

fn stuck(container: &ContainerStatus) -> Option<Why> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let unhelpful = [
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CrashLoopBackOff",
    ];
    unhelpful.contains(&reason).then(|| {
        let last = container
            .last_state
            .as_ref()
            .and_then(|last| last.terminated.as_ref());
        let said = waiting
            .message
            .clone()
            .or_else(|| last.and_then(|last| last.message.clone()));
        let said = said.unwrap_or_default();
        Why::new(
            reason,
            format!("container {} of the new pod: {said}", container.name),
        )
    })
}

fn failed(pod: &Pod) -> Option<Why> {
    let status = pod.status.as_ref()?;
    let phase = status.phase.as_deref()?;
    (phase == "Failed").then(|| {
        let reason = status
            .reason
            .clone()
            .unwrap_or_else(|| "NewPodFailed".to_owned());
        let said = status.message.clone().unwrap_or_default();
        Why::new(&reason, format!("the new pod has failed: {said}"))
    })
}

/// Whether a container of the pod has run and ended: one that never began does not count.
fn has_run_before(container: &ContainerStatus) -> bool {
    let ended = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
        let ended = state.as_ref().and_then(|state| state.terminated.as_ref());
        ended.is_some_and(|ended| {
            let never = ["StartError", "ContainerCannotRun", "RunContainerError"];
            ended
                .reason
                .as_deref()
                .is_none_or(|reason| !never.contains(&reason))
        })
    };
    ended(&container.last_state) || ended(&container.state)
}

pub fn seconds(time: &Time) -> i64 {
    time.0.as_second()
}

/// So long the scheduler may look for room.
const SCHEDULER_TIME: i64 = 10;
/// Of which an owner deletes first.
pub const LOWEST_COST: &str = "-2147483648";
/// Deployments number their ReplicaSets by it.
const REVISION: &str = "deployment.kubernetes.io/revision";

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{NodeSpec, Taint};

    use super::*;

    #[test]
    fn a_node_without_an_object_is_not_down() {
        let record = Record {
            source: Some("node-a".to_owned()),
            target: Some("node-b".to_owned()),
            ..Record::default()
        };
        let mut node = Node::default();
        node.metadata.name = Some("node-b".to_owned());
        let nodes = [node.clone()];
        assert_eq!(down(&record, &nodes), []);
        assert_eq!(absent(&record, &nodes), [Side::Source]);
        node.spec = Some(NodeSpec {
            taints: Some(vec![Taint {
                key: OUT_OF_SERVICE.to_owned(),
                effect: "NoExecute".to_owned(),
                ..Taint::default()
            }]),
            ..NodeSpec::default()
        });
        assert_eq!(down(&record, &[node]), [Side::Target]);
    }

    fn set(uid: &str) -> ReplicaSet {
        let mut set = ReplicaSet::default();
        set.metadata.name = Some("web".to_owned());
        set.metadata.uid = Some(uid.to_owned());
        set
    }

    fn owned(uid: &str) -> OwnerReference {
        OwnerReference {
            kind: "ReplicaSet".to_owned(),
            name: "web".to_owned(),
            uid: uid.to_owned(),
            controller: Some(true),
            ..OwnerReference::default()
        }
    }

    #[test]
    fn only_the_owner_that_the_source_has_adopts() {
        let mut new = Pod::default();
        let mut objects = Objects::default();
        assert_eq!(adoption(&new, &objects), Adoption::Nobody);
        let adopt = Adopt {
            owner_references: vec![owned("one")],
            ..Adopt::default()
        };
        let text = serde_json::to_string(&adopt).expect("JSON");
        new.metadata.annotations = Some(BTreeMap::from([(ADOPT.to_owned(), text)]));
        // It is gone.
        assert_eq!(adoption(&new, &objects), Adoption::Moot);
        objects.adopter = Some(set("one"));
        assert_eq!(adoption(&new, &objects), Adoption::Pending);
        // Another one has its name.
        objects.adopter = Some(set("two"));
        assert_eq!(adoption(&new, &objects), Adoption::Moot);
        // It is being deleted.
        let mut going = set("one");
        going.metadata.deletion_timestamp = Some(Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH));
        objects.adopter = Some(going);
        assert_eq!(adoption(&new, &objects), Adoption::Moot);
        // The source is another's by now.
        objects.adopter = Some(set("one"));
        let mut source = Pod::default();
        source.metadata.uid = Some("source".to_owned());
        source.metadata.owner_references = Some(vec![owned("two")]);
        objects.source = Some(source);
        let spec: crate::migration::MigrationSpec = serde_json::from_value(serde_json::json!({
            "pod": {"name": "web", "uid": "source"}, "target": {"node": "node-b"},
        }))
        .expect("a spec");
        objects.migration = Some(Migration::new("one", spec));
        assert_eq!(adoption(&new, &objects), Adoption::Moot);
        if let Some(source) = &mut objects.source {
            source.metadata.owner_references = Some(vec![owned("one")]);
        }
        assert_eq!(adoption(&new, &objects), Adoption::Pending);
    }
}
