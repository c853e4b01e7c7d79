//! The pod that comes: a copy of the source's, as far as it is to be one. Pure.
//!
//! Invariants: it cannot start cold beside a live source (its annotation makes the wrapper wait for
//! an order, and fail without one); no Service routes to it before it is what it was (the readiness
//! gate); its owner does not count it before the switch (it lacks labels of the owner's selector).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Container, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    Pod, PodReadinessGate, PodSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use crate::eligible::{is_sidecar, lasting};
use crate::names::{
    ADOPT, EVICTING, KEEP_ADDRESS, MIGRATION, MIGRATION_NAME, ON_EVICTION, ORIGIN, PREFIX,
    RESTORED, RUNTIME_CLASS, TEMPLATE_HASH,
};

/// What a pod gets of its owner at the switch.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Adopt {
    pub labels: BTreeMap<String, String>,
    pub owner_references: Vec<OwnerReference>,
}

/// A Migration, by the name that Kubernetes has for it and the one that daemons have.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub id: String,
    /// With it goes a pod that was made for it and that nobody has taken over.
    pub owner: Option<OwnerReference>,
}

/// The pod that comes in place of `source`. `selector` is that of the owner that counts it.
pub fn make(
    source: &Pod,
    name: &str,
    node: &str,
    migration: &Named,
    selector: Option<&LabelSelector>,
) -> Pod {
    let mut labels = source.labels().clone();
    labels.remove(MIGRATION_NAME);
    let mut annotations = source.annotations().clone();
    annotations.retain(|key, _| !key.starts_with(PREFIX) || key == ON_EVICTION);
    // It has arrived, and is evicted by nobody.
    annotations.remove(EVICTING);
    let mut add = |key: &str, value: String| annotations.insert(key.to_owned(), value);
    add(MIGRATION, migration.id.clone());
    let origin = source.annotations().get(ORIGIN).cloned();
    add(ORIGIN, origin.unwrap_or_else(|| source.name_any()));
    if let Some(address) = source
        .status
        .as_ref()
        .and_then(|status| status.pod_ip.clone())
    {
        add(KEEP_ADDRESS, address);
    }
    let owners = source.metadata.owner_references.clone().unwrap_or_default();
    let (counting, mut others): (Vec<_>, Vec<_>) = owners
        .into_iter()
        .partition(|owner| owner.controller == Some(true));
    if migration.name.len() <= LABEL_MAX {
        labels.insert(MIGRATION_NAME.to_owned(), migration.name.clone());
    }
    if !counting.is_empty() {
        let hidden = hidden(selector, &labels);
        labels.retain(|key, _| !hidden.contains_key(key));
        let adopt = Adopt {
            labels: hidden,
            owner_references: counting,
        };
        add(ADOPT, serde_json::to_string(&adopt).unwrap_or_default());
    }
    others.extend(migration.owner.clone());
    Pod {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: source.namespace(),
            labels: Some(labels),
            annotations: Some(annotations),
            owner_references: (!others.is_empty()).then_some(others),
            ..ObjectMeta::default()
        },
        spec: source.spec.clone().map(|spec| respec(spec, node)),
        status: None,
    }
}

/// The labels without which an owner does not count a pod: as few as will do.
fn hidden(
    selector: Option<&LabelSelector>,
    labels: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut hidden = labels.clone();
    let Some(selector) = selector else {
        return hidden;
    };
    let exact = selector.match_labels.clone().unwrap_or_default();
    if exact.contains_key(TEMPLATE_HASH) {
        hidden.retain(|key, _| key == TEMPLATE_HASH);
        return hidden;
    }
    let rules = selector.match_expressions.iter().flatten();
    let named: Vec<&String> = exact.keys().chain(rules.map(|rule| &rule.key)).collect();
    hidden.retain(|key, _| named.contains(&key));
    hidden
}

fn respec(mut spec: PodSpec, node: &str) -> PodSpec {
    spec.node_name = None;
    spec.runtime_class_name = Some(RUNTIME_CLASS.to_owned());
    // The API server computes these, and takes none but its own.
    spec.priority = None;
    spec.preemption_policy = None;
    spec.overhead = None;
    // What has done its work does not do it again.
    let sidecars = spec.init_containers.take().into_iter().flatten();
    let sidecars: Vec<Container> = sidecars.filter(is_sidecar).collect();
    spec.init_containers = (!sidecars.is_empty()).then_some(sidecars);
    if 1 < lasting(&spec).count() {
        let init = spec.init_containers.iter_mut().flatten();
        init.chain(&mut spec.containers).for_each(spare);
    }
    let gates = spec.readiness_gates.get_or_insert_default();
    if !gates.iter().any(|gate| gate.condition_type == RESTORED) {
        gates.push(PodReadinessGate {
            condition_type: RESTORED.to_owned(),
        });
    }
    pin(spec.affinity.get_or_insert_default(), node);
    spec
}

/// The kubelet takes a container for one that runs while it is held until all of its pod have come:
/// nobody is to kill it for that it does not answer.
fn spare(container: &mut Container) {
    if let Some(probe) = &mut container.liveness_probe {
        let delay = probe.initial_delay_seconds.get_or_insert_default();
        *delay = HELD_MAX.max(*delay);
    }
}

/// Binds it to one node by way of the scheduler, which knows what there is room for.
fn pin(affinity: &mut Affinity, node: &str) {
    let required = affinity
        .node_affinity
        .get_or_insert_with(NodeAffinity::default)
        .required_during_scheduling_ignored_during_execution
        .get_or_insert_with(NodeSelector::default);
    let terms = &mut required.node_selector_terms;
    if terms.is_empty() {
        terms.push(NodeSelectorTerm::default());
    }
    // One of the terms must fit, and of that everything. A term of an earlier move is another's.
    for term in terms {
        let fields = term.match_fields.get_or_insert_default();
        fields.retain(|field| field.key != NODE_NAME);
        fields.push(NodeSelectorRequirement {
            key: NODE_NAME.to_owned(),
            operator: "In".to_owned(),
            values: Some(vec![node.to_owned()]),
        });
    }
}

/// So long, in seconds, a container may be held: the kubelet waits two minutes for the last one.
const HELD_MAX: i32 = 120;
/// As long as the API server lets the value of a label be.
const LABEL_MAX: usize = 63;
const NODE_NAME: &str = "metadata.name";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source() -> Pod {
        let pod = json!({
            "metadata": {
                "name": "web-abc", "namespace": "shop", "uid": "s", "resourceVersion": "7",
                "labels": {"app": "web", "pod-template-hash": "abc"},
                "annotations": {"team": "t", "pageferry.dev/migrate-to": "b"},
                "ownerReferences": [
                    {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "r",
                     "controller": true},
                ],
            },
            "spec": {
                "nodeName": "a", "priority": 0,
                "initContainers": [{"name": "i"}],
                "containers": [{"name": "web", "image": "web"}],
            },
            "status": {"podIP": "10.1.2.3"},
        });
        serde_json::from_value(pod).expect("a pod")
    }

    fn named() -> Named {
        Named {
            name: "web-1".to_owned(),
            id: "id".to_owned(),
            owner: None,
        }
    }

    fn selector() -> LabelSelector {
        let labels = json!({"matchLabels": {"app": "web", "pod-template-hash": "abc"}});
        serde_json::from_value(labels).expect("a selector")
    }

    #[test]
    fn it_is_counted_by_nobody_and_routed_to_by_nobody() {
        let new = make(&source(), "web-abc-m1", "b", &named(), Some(&selector()));
        assert_eq!(
            new.labels(),
            &BTreeMap::from([
                ("app".to_owned(), "web".to_owned()),
                (MIGRATION_NAME.to_owned(), "web-1".to_owned()),
            ])
        );
        assert_eq!(new.metadata.owner_references, None);
        assert_eq!(
            (new.metadata.uid, new.metadata.resource_version),
            (None, None)
        );
        let annotations = new.metadata.annotations.expect("annotations");
        let kept: Adopt = serde_json::from_str(&annotations[ADOPT]).expect("what it gets");
        assert_eq!(kept.labels[TEMPLATE_HASH], "abc");
        assert_eq!(kept.owner_references[0].uid, "r");
        assert_eq!(annotations[KEEP_ADDRESS], "10.1.2.3");
        assert_eq!(annotations[MIGRATION], "id");
        assert_eq!(annotations[ORIGIN], "web-abc");
        assert_eq!(annotations["team"], "t");
        assert!(!annotations.contains_key("pageferry.dev/migrate-to"));
        let spec = new.spec.expect("a spec");
        assert_eq!(
            (spec.node_name, spec.priority, spec.init_containers),
            (None, None, None)
        );
        assert_eq!(spec.runtime_class_name.as_deref(), Some(RUNTIME_CLASS));
        assert_eq!(
            spec.readiness_gates.expect("gates")[0].condition_type,
            RESTORED
        );
    }

    #[test]
    fn sidecars_come_along_and_nobody_is_killed_while_the_others_come() {
        let mut source = source();
        let spec = json!({
            "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
            "containers": [
                {"name": "web", "livenessProbe": {"periodSeconds": 1}},
                {"name": "db", "livenessProbe": {"initialDelaySeconds": 300}},
                {"name": "plain"},
            ],
        });
        source.spec = serde_json::from_value(spec).expect("a spec");
        let new = make(&source, "web-abc-m1", "b", &named(), Some(&selector()));
        let spec = new.spec.expect("a spec");
        let init = spec.init_containers.iter().flatten();
        assert!(init.map(|one| &*one.name).eq(["s"]));
        let delays = spec.containers.iter().map(|one| {
            let probe = one.liveness_probe.as_ref()?;
            probe.initial_delay_seconds
        });
        assert!(delays.eq([Some(HELD_MAX), Some(300), None]));
    }

    #[test]
    fn a_second_move_goes_to_its_own_node() {
        let mut first = make(&source(), "web-abc-m1", "b", &named(), Some(&selector()));
        first.metadata.labels = source().metadata.labels;
        let second = make(&first, "web-abc-m2", "a", &named(), None);
        let spec = second.spec.expect("a spec");
        let affinity = spec
            .affinity
            .and_then(|all| all.node_affinity)
            .expect("of nodes");
        let required = affinity.required_during_scheduling_ignored_during_execution;
        let terms = required.expect("what is required").node_selector_terms;
        let fields = terms[0].match_fields.clone().expect("fields");
        assert_eq!((terms.len(), fields.len()), (1, 1));
        assert_eq!(fields[0].values, Some(vec!["a".to_owned()]));
        assert_eq!(spec.readiness_gates.map(|gates| gates.len()), Some(1));
    }

    #[test]
    fn an_owner_that_selects_otherwise_is_hidden_from_too() {
        let rules = json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "Exists"}],
        });
        let selector: LabelSelector = serde_json::from_value(rules).expect("a selector");
        let labels = ["app", "tier", "team"].map(|key| (key.to_owned(), "x".to_owned()));
        let hidden = hidden(Some(&selector), &BTreeMap::from(labels));
        assert_eq!(hidden.keys().collect::<Vec<_>>(), ["app", "tier"]);
    }
}
