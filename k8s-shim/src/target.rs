//! Where a pod goes to: the node that was named, or one that takes it. Pure.
//!
//! Whatever is known here before anything is begun is refused by name; what only the scheduler
//! knows, it says when the new pod is made.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration,
};
use kube::ResourceExt;

use crate::migration;
use crate::names::READY;
use crate::plan::{Target, Why};
use crate::room;

/// Nodes, and what is at them or on its way there.
#[derive(Clone, Debug, Default)]
pub struct Cluster<'a> {
    pub nodes: &'a [Node],
    /// None: not known, and nothing is said of room.
    pub pods: Option<&'a [Pod]>,
    /// Pods that move, by the node that they move to, as long as they are not among its pods.
    pub coming: Vec<(&'a str, Option<&'a Pod>)>,
}

impl<'a> Cluster<'a> {
    fn at(&self, node: &str) -> impl Iterator<Item = &'a Pod> {
        let here = self.pods.into_iter().flatten();
        let here = here.filter(move |pod| {
            let at = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
            at == Some(node)
        });
        let coming = self.coming.iter().filter(move |(to, _)| *to == node);
        here.chain(coming.filter_map(|(_, pod)| *pod))
    }
}

/// The node that a pod would go to.
pub fn choose(wanted: &migration::Target, pod: Option<&Pod>, cluster: &Cluster<'_>) -> Target {
    let Some(name) = &wanted.node else {
        return any(wanted, pod, cluster);
    };
    let node = cluster.nodes.iter().find(|node| node.name_any() == *name);
    let why = match node {
        None => Some(Why::new(
            "TargetUnknown",
            format!("there is no node {name}"),
        )),
        // Whoever names a node may drive others of less priority away there.
        Some(node) => unfit(node, pod, cluster, true),
    };
    why.map_or_else(|| Target::Node(name.clone()), Target::None)
}

/// The one to which the fewest are on their way, and which has the most memory left.
fn any(wanted: &migration::Target, pod: Option<&Pod>, cluster: &Cluster<'_>) -> Target {
    let labels = wanted.node_selector.clone().unwrap_or_default();
    let mut fitting: Vec<&Node> = cluster.nodes.iter().collect();
    fitting.retain(|node| {
        let has = |(name, value): (&String, &String)| node.labels().get(name) == Some(value);
        labels.iter().all(has)
    });
    fitting.sort_by_cached_key(|node| {
        let name = node.name_any();
        let coming = cluster.coming.iter().filter(|(to, _)| *to == name).count();
        let left = room::memory_left(node, cluster.at(&name));
        (coming, Reverse(left), name)
    });
    let mut whys = Vec::new();
    for node in fitting {
        match unfit(node, pod, cluster, false) {
            None => return Target::Node(node.name_any()),
            Some(why) => whys.push(why.message),
        }
    }
    let text = match (whys.is_empty(), labels.is_empty()) {
        (true, true) => "the cluster has no node".to_owned(),
        (true, false) => "no node has the labels of spec.target.nodeSelector".to_owned(),
        (false, _) => format!("no node will do: {}", whys.join("; ")),
    };
    Target::None(Why::new("NoTarget", text))
}

/// Why a pod cannot go to a node. `named`: a person has chosen that.
fn unfit(node: &Node, pod: Option<&Pod>, cluster: &Cluster<'_>, named: bool) -> Option<Why> {
    let name = node.name_any();
    let spec = pod.and_then(|pod| pod.spec.as_ref());
    if spec.and_then(|spec| spec.node_name.as_ref()) == Some(&name) {
        return Some(Why::new("TargetIsSource", format!("the pod is at {name}")));
    }
    if let Some(why) = unready(node) {
        return Some(why);
    }
    let spec = spec?;
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let taints = node.spec.iter().flat_map(|one| one.taints.iter().flatten());
    let mut taints = taints.filter(|taint| taint.effect != "PreferNoSchedule");
    if let Some(taint) = taints.find(|taint| !tolerates(tolerations, taint)) {
        let text = format!(
            "{name} has the taint {}, which it does not tolerate",
            taint.key
        );
        return Some(Why::new("TargetTainted", text));
    }
    let affinity = spec.affinity.as_ref();
    let affinity = affinity.and_then(|one| one.node_affinity.as_ref());
    let required = affinity
        .and_then(|one| {
            one.required_during_scheduling_ignored_during_execution
                .as_ref()
        })
        .map(|one| &one.node_selector_terms);
    let selected = spec.node_selector.iter().flatten();
    let mut selected = selected.filter(|(key, value)| node.labels().get(*key) != Some(value));
    let wanted = required.is_none_or(|terms| terms.iter().any(|term| is_of(term, node)));
    if selected.next().is_some() || !wanted {
        let text = format!("{name} is not one that its nodeSelector or affinity asks for");
        return Some(Why::new("TargetAffinity", text));
    }
    cluster.pods?;
    let priority = |pod: &Pod| {
        pod.spec
            .as_ref()
            .and_then(|spec| spec.priority)
            .unwrap_or(0)
    };
    let own = pod.map_or(0, priority);
    let others = cluster
        .at(&name)
        .filter(|other| !named || own <= priority(other));
    let lacks = room::lacks(node, others, pod?)?;
    Some(Why::new("TargetFull", format!("{name} is full: {lacks}")))
}

/// Why nothing can come to a node at the moment.
fn unready(node: &Node) -> Option<Why> {
    let name = node.name_any();
    let condition = |wanted: &str| {
        let status = node.status.as_ref()?;
        let mut conditions = status.conditions.iter().flatten();
        conditions
            .find(|one| one.type_ == wanted)
            .map(|one| &one.status)
    };
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        return Some(Why::new("TargetCordoned", format!("{name} is cordoned")));
    }
    if condition("Ready").is_none_or(|status| status != "True") {
        return Some(Why::new("TargetNotReady", format!("{name} is not ready")));
    }
    if node.labels().get(READY).is_none_or(|ready| ready != "true") {
        let text = format!(
            "{name} has no label {READY}=true: pageferryd, its agent or the wrapper is not there"
        );
        return Some(Why::new("TargetUnprepared", text));
    }
    None
}

fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|one| {
        let key = one.key.as_deref().unwrap_or_default();
        let effect = one.effect.as_deref().unwrap_or_default();
        let value = match one.operator.as_deref() {
            Some("Exists") => true,
            _ => one.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or(""),
        };
        (key.is_empty() || key == taint.key)
            && (effect.is_empty() || effect == taint.effect)
            && value
    })
}

/// Whether a node is of a term of a pod's affinity. The field by which an earlier move bound it to
/// its node does not count: the new pod gets its own.
fn is_of(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|one| holds(one, node.labels()))
}

fn holds(rule: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&rule.key);
    let values = rule.values.as_deref().unwrap_or_default();
    let among = value.is_some_and(|value| values.contains(value));
    let number = |text: Option<&String>| text.and_then(|text| text.parse::<i64>().ok());
    let pair = number(value).zip(number(values.first()));
    match rule.operator.as_str() {
        "In" => among,
        "NotIn" => !among,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => pair.is_some_and(|(has, wanted)| wanted < has),
        "Lt" => pair.is_some_and(|(has, wanted)| has < wanted),
        // What nobody knows here, the scheduler may.
        _ => true,
    }
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
