//! Pods with Redis: how they are made, and what must be true of one that has moved.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::clients::Clients;
use super::report::Report;
use crate::client::load::{Dataset, LoadPlan};
use crate::cluster::kubectl::Kubectl;
use crate::cluster::wait::until;
use crate::cluster::worker;
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::workload::redis;

/// A pod that runs, as the API server has it.
#[derive(Clone, Debug)]
pub struct Placed {
    pub name: String,
    pub uid: String,
    pub address: Ipv4Addr,
    /// What the cluster calls its node.
    pub node: String,
}

impl Placed {
    /// The pod `name` when it is ready, which it must be soon.
    pub fn wait(kubectl: &Kubectl, name: &str) -> Result<Self> {
        until(&format!("the pod {name} is ready"), POD_TIME_MAX, || {
            let pod = kubectl.json(&["get", "pod", name])?;
            let status = &pod["status"];
            let conditions = status["conditions"].as_array().into_iter().flatten();
            let ready = conditions.filter(|one| one["type"] == "Ready" && one["status"] == "True");
            ensure!(ready.count() == 1, "it is {}: {status}", status["phase"]);
            Self::read(&pod)
        })
    }

    fn read(pod: &Value) -> Result<Self> {
        let text = |place: &str| {
            let text = pod.pointer(place).and_then(Value::as_str);
            let text = text.with_context(|| format!("a pod without {place}"));
            text.map(str::to_owned)
        };
        Ok(Self {
            name: text("/metadata/name")?,
            uid: text("/metadata/uid")?,
            address: text("/status/podIP")?.parse().context("its address")?,
            node: text("/spec/nodeName")?,
        })
    }
}

/// A pod with Redis whose clients, in the network of the lab's client, stay connected wherever it
/// goes.
#[derive(Debug)]
pub struct Watched {
    pub pod: Placed,
    pub clients: Clients,
}

impl Watched {
    /// Starts it at a node, fills it, and starts its clients.
    pub fn start(lab: &Lab, kubectl: &Kubectl, node: &Node, name: &str) -> Result<Self> {
        Self::start_with(lab, kubectl, node, name, BYTES)
    }

    /// The same with so many bytes of values.
    pub fn start_with(
        lab: &Lab,
        kubectl: &Kubectl,
        node: &Node,
        name: &str,
        bytes: u64,
    ) -> Result<Self> {
        kubectl.apply(&server(name, &worker::name(node)).to_string())?;
        let pod = Placed::wait(kubectl, name)?;
        let logs = lab.folder.logs().join(format!("load-{name}"));
        let load = (Dataset::first_row(bytes), LoadPlan::first_row());
        let clients = Clients::start(&lab.client.net, pod.address, load, &logs)?;
        Ok(Self { pod, clients })
    }

    /// Sees that the pod `name` at the node `to` is this one now: ready with the same address,
    /// never started anew, and with its clients. Of the pod that it was, which need not be deleted
    /// yet, no process runs; when it is deleted, nothing of it is left.
    pub fn check_moved(&mut self, lab: &Lab, kubectl: &Kubectl, to: &Node) -> Result<()> {
        let name = successor(&self.pod.name);
        let pod = Placed::wait(kubectl, &name)?;
        ensure!(
            pod.address == self.pod.address,
            "{name} has {}, and {} had {}",
            pod.address,
            self.pod.name,
            self.pod.address
        );
        ensure!(pod.node == worker::name(to), "{name} is at {}", pod.node);
        let listed = kubectl.json(&["get", "pod", &name])?;
        let containers = listed["status"]["containerStatuses"].as_array();
        let restarted = containers
            .context("it has containers")?
            .iter()
            .any(|one| one["restartCount"] != 0);
        ensure!(!restarted, "{name} was started anew: {}", listed["status"]);
        let ping = kubectl.run(&["exec", &name, "--", "redis-cli", "ping"])?;
        ensure!(ping.trim() == "PONG", "{name} says {ping:?}");
        self.clients.wait_for_writes(WRITES_AFTER)?;
        let from = lab
            .nodes
            .iter()
            .find(|node| worker::name(node) == self.pod.node);
        let from = from.context("the pod was at a node of the lab")?;
        until(
            "nothing is left of the pod that it was",
            POD_TIME_MAX,
            || check_gone(from, &self.pod.uid),
        )?;
        self.pod = pod;
        Ok(())
    }

    /// Ends the clients, and judges what they saw. The pod stays.
    pub fn finish(self, report: &mut Report) -> Result<Placed> {
        self.clients.finish(report)?;
        Ok(self.pod)
    }
}

/// What a pod is called after a move: a name that does not grow with each one.
pub fn successor(name: &str) -> String {
    let numbered = name
        .rsplit_once("-m")
        .and_then(|(base, number)| Some((base, number.parse::<u32>().ok()?)));
    match numbered {
        Some((base, number)) => format!("{base}-m{}", number + 1),
        None => format!("{name}-m1"),
    }
}

/// The pod that one is to come as, at another node, by the migration `id`.
pub fn destination(kubectl: &Kubectl, pod: &Placed, to: &str, id: &str) -> Result<Value> {
    let mut source = kubectl.json(&["get", "pod", &pod.name])?;
    let mut spec = source["spec"].take();
    let fields = spec.as_object_mut().context("a pod has a specification")?;
    for bound in ["nodeName", "nodeSelector"] {
        fields.remove(bound);
    }
    let at = json!({"key": "kubernetes.io/hostname", "operator": "In", "values": [to]});
    spec["affinity"] = json!({"nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [at]}],
        },
    }});
    spec["runtimeClassName"] = json!("pageferry");
    spec["readinessGates"] = json!([{"conditionType": RESTORED}]);
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": successor(&pod.name),
            "labels": source["metadata"]["labels"],
            "annotations": {
                "pageferry.dev/migration": id,
                "pageferry.dev/keep-address": pod.address,
            },
        },
        "spec": spec,
    }))
}

/// Whether nothing of a pod is left at a node: no process, no cgroup, no folder.
pub fn check_gone(node: &Node, uid: &str) -> Result<()> {
    let script = format!(
        "find /sys/fs/cgroup -type d -name 'pod{uid}*' -exec sh -c \
         'echo $1 $(cat $1/cgroup.procs $1/*/cgroup.procs)' sh {{}} ';' -prune; \
         ls -d /var/lib/kubelet/pods/{uid}; true"
    );
    let output = node.command("sh")?.args(["-c", &script]).output()?;
    let left = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(left.is_empty(), "{} still has {left}", worker::name(node));
    Ok(())
}

/// A bare pod with Redis.
pub fn server(name: &str, node: &str) -> Value {
    let mut pod = pod(name, node, &redis::plan().arguments);
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"tcpSocket": {"port": redis::PORT}, "periodSeconds": 1});
    pod
}

/// A bare pod with one container, at a node without being bound to it.
pub fn pod(name: &str, node: &str, command: &[String]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "redis",
                "image": "localhost/redis:1",
                "imagePullPolicy": "Never",
                "command": command,
                "resources": {"requests": {"memory": "64Mi", "cpu": "50m"}},
            }],
        },
    })
}

/// The condition of a pod that came, without which it is not ready.
pub const RESTORED: &str = "pageferry.dev/restored";
/// How long a pod may take to be what it is to be.
pub const POD_TIME_MAX: Duration = Duration::from_secs(60);
/// Values alone.
const BYTES: u64 = 64 << 20; // 64 MiB
/// A quarter of a second of the load.
const WRITES_AFTER: u64 = 3_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_grow_with_each_move() {
        assert_eq!(successor("web"), "web-m1");
        assert_eq!(successor("web-m1"), "web-m2");
        assert_eq!(successor("web-m9"), "web-m10");
        assert_eq!(successor("web-main"), "web-main-m1");
    }
}
