//! What cannot move, by name, before anything is touched.
//!
//! Whatever is not known to work is refused. Absent: what only the node's daemon can see (open
//! files, kinds of sockets, processors), which it refuses itself; and nodes (`target.rs`).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;

use crate::names::{OURS, RUNTIME_CLASS};
use crate::plan::Why;

/// Access modes of the claims that a pod's volumes name.
pub type Claims = BTreeMap<String, Vec<String>>;

/// Why a pod cannot move, wherever to.
pub fn refusal(pod: &Pod, claims: &Claims) -> Option<Why> {
    let Some(spec) = &pod.spec else {
        return Some(Why::new("NoSpec", "the pod has no spec"));
    };
    whose(pod)
        .or_else(|| running(pod, spec))
        .or_else(|| namespaces(spec))
        .or_else(|| containers(pod, spec))
        .or_else(|| {
            let mut volumes = spec.volumes.iter().flatten();
            volumes.find_map(|one| volume(one, claims))
        })
}

/// The one that a pod is counted by.
pub fn owner(pod: &Pod) -> Option<&OwnerReference> {
    let mut owners = pod.metadata.owner_references.iter().flatten();
    owners.find(|owner| owner.controller == Some(true))
}

fn whose(pod: &Pod) -> Option<Why> {
    let namespace = pod.namespace().unwrap_or_default();
    if namespace == "kube-system" {
        let text = "pods in kube-system are never moved";
        return Some(Why::new("SystemPod", text));
    }
    if pod.labels().get(OURS.0).is_some_and(|part| part == OURS.1) {
        return Some(Why::new("OwnPod", "it is one of pageferry's own"));
    }
    if pod
        .annotations()
        .contains_key("kubernetes.io/config.mirror")
    {
        let text = "it is a static pod: its node's kubelet has it from a file";
        return Some(Why::new("StaticPod", text));
    }
    let owner = owner(pod)?;
    let text = match owner.kind.as_str() {
        "ReplicaSet" => return None,
        "DaemonSet" => "it belongs to a DaemonSet, which has one at every node",
        "Job" => "it belongs to a Job, which would count it as failed",
        "StatefulSet" => "it belongs to a StatefulSet, whose pods keep their names",
        "Node" => "it is a static pod: its node's kubelet has it from a file",
        _ => {
            let text = format!(
                "it belongs to the {} {}, of which is not known what it makes of a move",
                owner.kind, owner.name
            );
            return Some(Why::new("OwnerUnknown", text));
        }
    };
    let reason = match owner.kind.as_str() {
        "Node" => "StaticPod",
        kind => kind,
    };
    Some(Why::new(reason, text))
}

fn running(pod: &Pod, spec: &PodSpec) -> Option<Why> {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if spec.node_name.is_none() || phase != Some("Running") {
        let text = format!("it does not run: it is {}", phase.unwrap_or("new"));
        return Some(Why::new("NotRunning", text));
    }
    let class = spec.runtime_class_name.as_deref();
    if let Some(class) = class.filter(|class| *class != RUNTIME_CLASS) {
        let text = format!("it runs by the RuntimeClass {class}");
        return Some(Why::new("RuntimeClass", text));
    }
    let selector = spec.node_selector.as_ref();
    if selector.is_some_and(|labels| labels.contains_key("kubernetes.io/hostname")) {
        let text = "its nodeSelector binds it to one node";
        return Some(Why::new("BoundToNode", text));
    }
    None
}

fn namespaces(spec: &PodSpec) -> Option<Why> {
    let yes = |flag: Option<bool>| flag == Some(true);
    let found = [
        (
            yes(spec.host_network),
            "HostNetwork",
            "it is in its node's network",
        ),
        (
            yes(spec.host_pid),
            "HostPID",
            "it sees its node's processes",
        ),
        (
            yes(spec.host_ipc),
            "HostIPC",
            "it is in its node's IPC namespace",
        ),
        (
            yes(spec.share_process_namespace),
            "SharedProcesses",
            "its containers share their processes",
        ),
        (
            spec.host_users == Some(false),
            "UserNamespace",
            "it has a user namespace",
        ),
        (
            spec.resource_claims.iter().flatten().next().is_some(),
            "Devices",
            "it has claims of resources",
        ),
    ];
    let (_, reason, text) = found.into_iter().find(|(found, ..)| *found)?;
    Some(Why::new(reason, text))
}

/// Containers that run for as long as the pod does, in the order in which they are started:
/// sidecars first.
pub fn lasting(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let init = spec.init_containers.iter().flatten();
    init.filter(|one| is_sidecar(one)).chain(&spec.containers)
}

/// Whether an init container runs beside those after it.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn containers(pod: &Pod, spec: &PodSpec) -> Option<Why> {
    if spec.ephemeral_containers.iter().flatten().next().is_some() {
        let text = "somebody has put an ephemeral container into it";
        return Some(Why::new("EphemeralContainer", text));
    }
    let mut all = lasting(spec);
    if let Some(why) = all.find_map(|one| container(one).or_else(|| ended(pod, &one.name))) {
        return Some(why);
    }
    // The kubelet believes that those before the last one run while they wait for it.
    let mut several = lasting(spec).filter(|_| 1 < lasting(spec).count());
    let eager = several.find(|one| one.startup_probe.is_some())?;
    let text = format!(
        "container {} has a startupProbe, and is not the only one: it would be asked, and killed, \
         while it waits for the others to come",
        eager.name
    );
    Some(Why::new("StartupProbe", text))
}

/// One that does not run has nothing to move, and would begin anew at the target.
fn ended(pod: &Pod, name: &str) -> Option<Why> {
    let status = pod.status.as_ref()?;
    let init = status.init_container_statuses.iter().flatten();
    let mut all = init.chain(status.container_statuses.iter().flatten());
    let state = all.find(|one| one.name == name)?.state.as_ref()?;
    state.running.is_none().then(|| {
        let what = match (&state.terminated, &state.waiting) {
            (Some(ended), _) => format!("has ended with {}", ended.exit_code),
            (None, waiting) => {
                let waiting = waiting.as_ref().and_then(|one| one.reason.as_deref());
                format!("waits: {}", waiting.unwrap_or("for its start"))
            }
        };
        let text = format!("container {name} does not run, and would begin anew: it {what}");
        Why::new("ContainerEnded", text)
    })
}

fn container(container: &Container) -> Option<Why> {
    let name = &container.name;
    let lifecycle = container.lifecycle.as_ref();
    let extended = container.resources.as_ref().and_then(|resources| {
        let mut limits = resources.limits.iter().flatten();
        limits.find(|(name, _)| name.contains('/'))
    });
    let found = [
        (
            container.stdin == Some(true) || container.tty == Some(true),
            "Terminal",
            "has a terminal or standard input",
        ),
        (
            lifecycle.is_some_and(|lifecycle| lifecycle.post_start.is_some()),
            "PostStart",
            "has a postStart hook, which would run again",
        ),
        (
            extended.is_some() || container.volume_devices.iter().flatten().next().is_some(),
            "Devices",
            "has devices",
        ),
    ];
    let (_, reason, text) = found.into_iter().find(|(found, ..)| *found)?;
    Some(Why::new(reason, format!("container {name} {text}")))
}

fn volume(volume: &Volume, claims: &Claims) -> Option<Why> {
    let name = &volume.name;
    let travels = volume.empty_dir.is_some()
        || volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some()
        || volume.nfs.is_some();
    if travels {
        return None;
    }
    if volume.host_path.is_some() {
        let text = format!("volume {name} is a folder of its node");
        return Some(Why::new("HostPath", text));
    }
    let Some(claim) = &volume.persistent_volume_claim else {
        let text = format!("volume {name} is of a kind that is not known to be at two nodes");
        return Some(Why::new("VolumeUnknown", text));
    };
    let modes = claims.get(&claim.claim_name);
    let shared = |mode: &String| mode == "ReadWriteMany" || mode == "ReadOnlyMany";
    if modes.is_some_and(|modes| modes.iter().any(shared)) {
        return None;
    }
    let text = format!(
        "volume {name} (claim {}) is at one node at a time",
        claim.claim_name
    );
    Some(Why::new("ReadWriteOnce", text))
}

#[cfg(test)]
#[path = "eligible_tests.rs"]
mod tests;
