//! What a node of the lab needs to be one of the cluster: containerd with images, a network of its
//! own for pods, and a kubelet.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::build::{PAUSE_NAME, PROGRAMS};
use super::certificates::{Authority, Subject, kubeconfig, write};
use super::control::{Part, SERVICES, server_url};
use crate::lab::Lab;
use crate::lab::containerd::{self, Engine};
use crate::lab::network::{self, CLIENT_ADDRESS};
use crate::lab::node::Node;
use crate::workload::containerd::{IMAGE_FILE, make_image};

/// What the cluster calls a node of the lab.
pub fn name(node: &Node) -> String {
    format!("node-{}", node.name())
}

/// The addresses of a node's pods: its own number is in them.
fn pods(node: &Node) -> String {
    let [.., last] = node.address().octets();
    format!("10.244.{last}.0/24")
}

/// Starts a node's containerd, and gives it the images.
pub fn start_engine(lab: &Lab, node: &Node) -> Result<Engine> {
    node.command("sh")?
        .args(["-ec", PREPARE])
        .run()
        .with_context(|| format!("preparing node {}", node.name()))?;
    write(&node.path(CNI_CONFIG), &cni_config(node))?;
    write(&node.path(ENGINE_CONFIG), ENGINE_CONFIG_TEXT)?;
    if lab.has_daemons() {
        // containerd reads what this does when it starts.
        set_up(node, &[])?;
    }
    let engine = Engine::start(node, ENGINE_CONFIG, &lab.folder.logs())?;
    let pause = format!("/{PROGRAMS}/{PAUSE_NAME}");
    make_image(node, PAUSE_IMAGE, PAUSE_FILE, &[pause])?;
    for file in [IMAGE_FILE, PAUSE_FILE] {
        containerd::import(node, NAMESPACE, file)?;
    }
    Ok(engine)
}

/// Has a node prepared for pods that come, or what else the flags say; what it said.
pub fn set_up(node: &Node, flags: &[&str]) -> Result<String> {
    let setup = ["setup", "kubernetes", "--config", ENGINE_CONFIG];
    let command = node.command("pageferry")?.args(setup).args(flags);
    command.run()
}

/// Fails unless its files are those that the lab wrote: nobody has set it up.
pub fn check_untouched(node: &Node) -> Result<()> {
    for (path, text) in [
        (CNI_CONFIG, &*cni_config(node)),
        (ENGINE_CONFIG, ENGINE_CONFIG_TEXT),
    ] {
        let now = fs::read_to_string(node.path(path)).with_context(|| format!("reading {path}"))?;
        ensure!(now == text, "{path} of {} is {now}", name(node));
    }
    Ok(())
}

/// The bridge of each node's pods, and routes between the pods of all nodes, the client, and
/// services. The network plugin would make the bridge with the first pod, which may be one that
/// comes, and its daemon asks for it before.
pub fn connect(lab: &Lab, service: Ipv4Addr) -> Result<()> {
    let tools = lab.nodes.first().context("a lab has at least one node")?;
    let to_pods = |but: Option<&Node>| -> String {
        let others = lab.nodes.iter();
        let others = others.filter(|node| but.is_none_or(|but| but.name() != node.name()));
        let route = |node: &Node| format!("route add {} via {}\n", pods(node), node.address());
        others.map(route).collect()
    };
    network::ip(tools, &lab.client.net, &[], |_| {
        format!("addr add {service}/32 dev lo\n{}", to_pods(None))
    })?;
    for node in &lab.nodes {
        let script = |_: &[String]| {
            format!(
                "link add {BRIDGE} type bridge forward_delay 0\n\
                 link set {BRIDGE} up\n\
                 route add {SERVICES} via {CLIENT_ADDRESS}\n{}",
                to_pods(Some(node))
            )
        };
        network::ip(tools, &node.namespaces.net, &[], script)?;
    }
    Ok(())
}

/// Starts the kubelet of a node, which brings the node into the cluster.
pub fn start_kubelet(lab: &Lab, node: &Node, authority: &Authority) -> Result<Part> {
    let folder = node.path(FOLDER);
    let name = name(node);
    write(&folder.join("ca.pem"), &authority.certificate)?;
    let user = format!("system:node:{name}");
    let identity = Subject {
        name: &user,
        group: Some("system:nodes"),
        addresses: &[node.address()],
        hosts: &[&name],
    };
    authority.issue(&identity)?.write(&folder, "node")?;
    let config = kubeconfig(&server_url(), FOLDER.as_ref(), "node");
    write(&folder.join("node.conf"), &config.to_string())?;
    write(&folder.join("kubelet.json"), &kubelet_config(node))?;
    run_kubelet(lab, node)
}

/// Runs it, of a node where one was started before.
pub fn run_kubelet(lab: &Lab, node: &Node) -> Result<Part> {
    let name = name(node);
    let command = node.command("kubelet")?.args([
        format!("--config={FOLDER}/kubelet.json"),
        format!("--kubeconfig={FOLDER}/node.conf"),
        format!("--hostname-override={name}"),
        format!("--node-ip={}", node.address()),
    ]);
    let log = lab.folder.logs().join(node.name()).join("kubelet.log");
    Part::start(&format!("the kubelet of {name}"), command, log)
}

fn kubelet_config(node: &Node) -> String {
    // Nodes share a machine that others fill as well: nothing is evicted for that.
    let never = "0%";
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address(),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{FOLDER}/ca.pem")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{FOLDER}/node.pem"),
        "tlsPrivateKeyFile": format!("{FOLDER}/node.key"),
        "readOnlyPort": 0,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "maxOpenFiles": 20_000,
        "localStorageCapacityIsolation": false,
        "enforceNodeAllocatable": [],
        "evictionHard": {
            "memory.available": never, "nodefs.available": never,
            "nodefs.inodesFree": never, "imagefs.available": never,
        },
        "imageGCHighThresholdPercent": 100,
        // Nodes have no name server.
        "resolvConf": "",
        "clusterDomain": "cluster.local",
    })
    .to_string()
}

/// A bridge of pods, and routes by way of the node: without address translation, so that pods and
/// the client see each other's addresses.
fn cni_config(node: &Node) -> String {
    let range = json!({
        "type": "host-local",
        "ranges": [[{"subnet": pods(node)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    });
    json!({
        "cniVersion": "1.1.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "hairpinMode": true,
            "ipam": range,
        }],
    })
    .to_string()
}

/// Gives an address back at every node that its pod, which has ended, may have left.
pub fn release(lab: &Lab, address: Ipv4Addr) -> Result<()> {
    let release = ["release", &address.to_string()];
    let mut nodes = lab.nodes.iter();
    nodes.try_for_each(|node| node.command(ADDRESSES)?.args(release).run().map(drop))
}

/// Whether nothing is left at a node of what pods had there, but for the records that the kubelet
/// has containerd keep of dead containers, for up to a minute.
pub fn check_no_pods(node: &Node) -> Result<()> {
    let script = format!(
        "ctr --namespace {NAMESPACE} tasks list -q; \
         find /run/netns /var/lib/kubelet/pods -mindepth 1; \
         find /var/lib/cni/networks -name '*.*.*.*'; ip -o link show master {BRIDGE}; \
         find /run/pageferry/ipam /var/lib/pageferry/ipam -type f ! -name lock; \
         find /sys/fs/cgroup -type d -name 'pod*'; \
         grep -e /var/lib/kubelet/pods -e /run/containerd/io. /proc/mounts; true"
    );
    let output = node.command("sh")?.args(["-c", &script]).output()?;
    let left = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(left.is_empty(), "{} still has {left}", name(node));
    Ok(())
}

/// The program for addresses, where networks have theirs.
pub const ADDRESSES: &str = "/usr/lib/cni/pageferry-ipam";
/// What containerd has for the kubelet.
pub const NAMESPACE: &str = "k8s.io";
/// Whose ports the links of pods are.
pub const BRIDGE: &str = "cni0";
/// What holds the namespaces of pods.
const PAUSE_IMAGE: &str = "localhost/pause:1";
const PAUSE_FILE: &str = "/srv/images/pause.tar";
const FOLDER: &str = "/etc/kubernetes";
const CNI_CONFIG: &str = "/etc/cni/net.d/10-lab.conflist";
pub const ENGINE_CONFIG: &str = "/etc/containerd/kubernetes.toml";
const ENGINE_CONFIG_TEXT: &str = r#"version = 3
oom_score = 0
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "localhost/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/etc/cni/net.d"
"#;
/// What the kubelet of a machine finds there. The tunables of the kernel that it sets are those of
/// all of this machine: it gets files instead.
const PREPARE: &str = "
mount --make-rshared /
mkdir -p /var/lib/kubelet /etc/cni/net.d /run/tunables
mount -t tmpfs -o mode=755 tmpfs /var/lib/kubelet
mknod /dev/kmsg c 1 11
tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
[ -e /etc/hosts ] || echo 127.0.0.1 localhost >/etc/hosts
[ -e /etc/resolv.conf ] || touch /etc/resolv.conf
for tunable in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  file=/run/tunables/${tunable##*/}
  cat /proc/sys/$tunable >$file
  mount --bind $file /proc/sys/$tunable
done
echo 1 >/proc/sys/net/ipv4/ip_forward
";
