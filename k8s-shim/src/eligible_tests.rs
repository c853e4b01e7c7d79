use serde_json::{Value, json};

use super::*;

fn pod(change: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "nodeName": "node-a",
            "containers": [{"name": "web", "image": "web"}],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
        "status": {"phase": "Running"},
    });
    merge(&mut pod, change);
    serde_json::from_value(pod).expect("a pod")
}

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

fn reason(change: Value) -> Option<String> {
    let claims = Claims::from([
        ("one".to_owned(), vec!["ReadWriteOnce".to_owned()]),
        ("many".to_owned(), vec!["ReadWriteMany".to_owned()]),
    ]);
    refusal(&pod(change), &claims).map(|why| why.reason)
}

fn owned(kind: &str) -> Value {
    json!({"metadata": {"ownerReferences": [
        {"apiVersion": "v1", "kind": kind, "name": "o", "uid": "u", "controller": true}
    ]}})
}

fn with_container(more: Value) -> Value {
    let mut container = json!({"name": "web", "image": "web"});
    merge(&mut container, more);
    json!({"spec": {"containers": [container]}})
}

fn with_volume(source: Value) -> Value {
    let mut volume = json!({"name": "data"});
    merge(&mut volume, source);
    json!({"spec": {"volumes": [volume]}})
}

#[test]
fn what_cannot_move_is_refused_by_name() {
    let hook = json!({"lifecycle": {"postStart": {"exec": {"command": ["true"]}}}});
    let cases = [
        (json!({}), None),
        (owned("ReplicaSet"), None),
        (owned("DaemonSet"), Some("DaemonSet")),
        (owned("Job"), Some("Job")),
        (owned("StatefulSet"), Some("StatefulSet")),
        (owned("Node"), Some("StaticPod")),
        (owned("Database"), Some("OwnerUnknown")),
        (
            json!({"metadata": {"namespace": "kube-system"}}),
            Some("SystemPod"),
        ),
        (
            json!({"metadata": {"labels": {OURS.0: OURS.1}}}),
            Some("OwnPod"),
        ),
        (
            json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "x"}}}),
            Some("StaticPod"),
        ),
        (json!({"status": {"phase": "Pending"}}), Some("NotRunning")),
        (
            json!({"spec": {"runtimeClassName": "gvisor"}}),
            Some("RuntimeClass"),
        ),
        (
            json!({"spec": {"nodeSelector": {"kubernetes.io/hostname": "node-a"}}}),
            Some("BoundToNode"),
        ),
        (json!({"spec": {"hostNetwork": true}}), Some("HostNetwork")),
        (json!({"spec": {"hostPID": true}}), Some("HostPID")),
        (json!({"spec": {"hostIPC": true}}), Some("HostIPC")),
        (
            json!({"spec": {"shareProcessNamespace": true}}),
            Some("SharedProcesses"),
        ),
        (json!({"spec": {"hostUsers": false}}), Some("UserNamespace")),
        (json!({"spec": {"initContainers": [{"name": "i"}]}}), None),
        (with_container(json!({"tty": true})), Some("Terminal")),
        (with_container(hook), Some("PostStart")),
        (
            with_container(json!({"resources": {"limits": {"gpu.example/one": "1"}}})),
            Some("Devices"),
        ),
        (
            with_container(json!({"resources": {"limits": {"cpu": "1"}}})),
            None,
        ),
    ];
    check(cases);
}

fn check<const COUNT: usize>(cases: [(Value, Option<&str>); COUNT]) {
    for (change, wanted) in cases {
        let text = change.to_string();
        assert_eq!(reason(change).as_deref(), wanted, "{text}");
    }
}

#[test]
fn containers_that_do_not_run_or_cannot_wait_for_others_are_refused() {
    let two = json!([{"name": "a"}, {"name": "b"}]);
    let eager = json!([{"name": "a", "startupProbe": {}}, {"name": "b"}]);
    let eager_sidecar = json!([{"name": "s", "restartPolicy": "Always", "startupProbe": {}}]);
    let ended = |state: Value| {
        let of = json!({"name": "web", "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": state});
        json!({"status": {"containerStatuses": [of]}})
    };
    let sidecar = json!([{"name": "s", "restartPolicy": "Always"}]);
    check([
        (json!({"spec": {"containers": eager}}), Some("StartupProbe")),
        (
            json!({"spec": {"initContainers": eager_sidecar}}),
            Some("StartupProbe"),
        ),
        (json!({"spec": {"containers": two}}), None),
        (json!({"spec": {"initContainers": sidecar}}), None),
        (with_container(json!({"startupProbe": {}})), None),
        (
            ended(json!({"terminated": {"exitCode": 0}})),
            Some("ContainerEnded"),
        ),
        (ended(json!({"waiting": {}})), Some("ContainerEnded")),
        (ended(json!({"running": {}})), None),
    ]);
}

#[test]
fn volumes_that_are_at_one_node_alone_are_refused() {
    let claim = |name: &str| with_volume(json!({"persistentVolumeClaim": {"claimName": name}}));
    check([
        (
            with_volume(json!({"hostPath": {"path": "/"}})),
            Some("HostPath"),
        ),
        (with_volume(json!({"configMap": {"name": "c"}})), None),
        (
            with_volume(json!({"csi": {"driver": "d"}})),
            Some("VolumeUnknown"),
        ),
        (claim("one"), Some("ReadWriteOnce")),
        (claim("many"), None),
        // One that is not there yet has no modes.
        (claim("none"), Some("ReadWriteOnce")),
    ]);
}
