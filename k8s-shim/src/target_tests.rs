use serde_json::{Value, json};

use super::*;

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn node(name: &str, change: Value) -> Node {
    let mut node = json!({
        "metadata": {"name": name, "labels": {READY: "true", "zone": "z", "cores": "8"}},
        "spec": {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "allocatable": {"cpu": "2", "memory": "1Gi", "pods": "10"},
        },
    });
    merge(&mut node, change);
    serde_json::from_value(node).expect("a node")
}

fn pod(at: &str, spec: Value) -> Pod {
    let requests = json!({"requests": {"cpu": "1", "memory": "256Mi"}});
    let mut pod = json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"nodeName": at, "containers": [{"name": "web", "resources": requests}]},
    });
    merge(&mut pod["spec"], spec);
    serde_json::from_value(pod).expect("a pod")
}

fn to(node: &str) -> migration::Target {
    migration::Target {
        node: Some(node.to_owned()),
        node_selector: None,
    }
}

fn said(target: Target) -> String {
    match target {
        Target::Node(node) => node,
        Target::None(why) => why.reason,
    }
}

#[test]
fn a_target_is_looked_at_before_anything_is_begun() {
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
    let nodes = [
        node("a", json!({})),
        node("b", json!({"spec": {"unschedulable": true}})),
        node("c", unready),
        node("d", json!({"metadata": {"labels": {READY: "false"}}})),
        node("e", json!({})),
    ];
    let cluster = Cluster {
        nodes: &nodes,
        ..Cluster::default()
    };
    let source = pod("a", json!({}));
    let reason = |wanted: &migration::Target| said(choose(wanted, Some(&source), &cluster));
    assert_eq!(reason(&to("a")), "TargetIsSource");
    assert_eq!(reason(&to("b")), "TargetCordoned");
    assert_eq!(reason(&to("c")), "TargetNotReady");
    assert_eq!(reason(&to("d")), "TargetUnprepared");
    assert_eq!(reason(&to("e")), "e");
    assert_eq!(reason(&to("f")), "TargetUnknown");
    let mut by_label = migration::Target {
        node: None,
        node_selector: Some(BTreeMap::from([("zone".to_owned(), "z".to_owned())])),
    };
    assert_eq!(reason(&by_label), "e");
    by_label.node_selector = Some(BTreeMap::from([("zone".to_owned(), "y".to_owned())]));
    assert_eq!(reason(&by_label), "NoTarget");
    assert_eq!(reason(&migration::Target::default()), "e");
}

#[test]
fn what_the_scheduler_would_not_have_is_refused() {
    let taint = json!([{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]);
    let soft = json!([{"key": "slow", "effect": "PreferNoSchedule"}]);
    let nodes = [
        node("a", json!({"spec": {"taints": taint}})),
        node("b", json!({"spec": {"taints": soft}})),
    ];
    let cluster = Cluster {
        nodes: &nodes,
        ..Cluster::default()
    };
    let reason = |node: &str, spec: Value| {
        let source = pod("s", spec);
        said(choose(&to(node), Some(&source), &cluster))
    };
    let tolerates = |one: Value| json!({"tolerations": [one]});
    let required = |terms: Value| {
        json!({"affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
        }}})
    };
    let rule = |key: &str, operator: &str, value: &str| {
        let rule = json!({"key": key, "operator": operator, "values": [value]});
        json!([{"matchExpressions": [rule]}])
    };
    let field = json!([{"matchFields": [
        {"key": "metadata.name", "operator": "In", "values": ["s"]},
    ]}]);
    for (at, spec, wanted) in [
        ("a", json!({}), "TargetTainted"),
        ("a", tolerates(json!({"operator": "Exists"})), "a"),
        ("a", tolerates(json!({"key": "gpu", "value": "yes"})), "a"),
        (
            "a",
            tolerates(json!({"key": "gpu", "value": "no"})),
            "TargetTainted",
        ),
        (
            "a",
            tolerates(json!({"key": "gpu", "operator": "Exists", "effect": "NoExecute"})),
            "TargetTainted",
        ),
        ("b", json!({}), "b"),
        ("b", json!({"nodeSelector": {"zone": "z"}}), "b"),
        (
            "b",
            json!({"nodeSelector": {"zone": "y"}}),
            "TargetAffinity",
        ),
        ("b", required(rule("zone", "In", "z")), "b"),
        ("b", required(rule("zone", "NotIn", "z")), "TargetAffinity"),
        ("b", required(rule("none", "NotIn", "z")), "b"),
        ("b", required(rule("none", "Exists", "")), "TargetAffinity"),
        ("b", required(rule("none", "DoesNotExist", "")), "b"),
        ("b", required(rule("cores", "Gt", "4")), "b"),
        ("b", required(rule("cores", "Lt", "4")), "TargetAffinity"),
        ("b", required(json!([{}])), "TargetAffinity"),
        // By an earlier move.
        ("b", required(field), "b"),
    ] {
        let text = spec.to_string();
        assert_eq!(reason(at, spec), wanted, "{at} {text}");
    }
}

#[test]
fn the_one_with_the_most_room_is_chosen() {
    let nodes = [
        node("a", json!({})),
        node("b", json!({})),
        node("c", json!({})),
    ];
    let there = [
        pod("a", json!({})),
        pod("b", json!({"priority": -1})),
        pod("b", json!({})),
    ];
    let source = pod("s", json!({}));
    let mut cluster = Cluster {
        nodes: &nodes,
        pods: Some(&there),
        coming: Vec::new(),
    };
    let any = migration::Target::default();
    assert_eq!(said(choose(&any, Some(&source), &cluster)), "c");
    // As many as possible go different ways.
    cluster.coming = vec![("c", Some(&source))];
    assert_eq!(said(choose(&any, Some(&source), &cluster)), "a");
    cluster.coming = vec![
        ("c", Some(&source)),
        ("c", Some(&source)),
        ("a", Some(&source)),
    ];
    let Target::None(why) = choose(&any, Some(&source), &cluster) else {
        panic!("there is room");
    };
    assert_eq!(why.reason, "NoTarget");
    assert!(
        why.message.contains("a is full: it has 0 of cpu left"),
        "{}",
        why.message
    );
    // Whoever is named drives others away.
    assert_eq!(said(choose(&to("b"), Some(&source), &cluster)), "b");
    assert_eq!(
        said(choose(&to("c"), Some(&source), &cluster)),
        "TargetFull"
    );
}
