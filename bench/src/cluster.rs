//! A Kubernetes cluster in the lab: the lab's nodes are its nodes.
//!
//! ```text
//!   client 10.90.0.1, 10.96.0.1    etcd, kube-apiserver, controllers   (processes of the host)
//!     │
//!   node a 10.90.0.11 ── cni0 10.244.11.0/24   containerd, kubelet, pods   (inside the node)
//!   node b 10.90.0.12 ── cni0 10.244.12.0/24
//! ```
//! Everything is what a cluster anywhere has: certificates of one authority, node authorization,
//! RBAC, the service accounts' tokens. What is missing: kube-proxy and a name server. All of it is
//! born in the lab's cgroups and writes into the lab's run folder, and goes with the lab.
//!
//! The nodes have what moves of pods need, unless the lab is without daemons: containerd's runtime
//! handler, the program for addresses, and a pageferryd to which `cni0` is the bridge.

pub mod build;
pub mod certificates;
pub mod control;
pub mod kubectl;
pub mod laps;
pub mod movers;
pub mod wait;
pub mod watching;
pub mod worker;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::containerd::Engine;
use crate::lab::network::Link;
use crate::lab::{Lab, LabOptions};
use crate::workload::containerd::LAYER;
use certificates::Authority;
use control::Part;
use kubectl::Kubectl;
use laps::Laps;

/// What the lab of a cluster is to have. Builds the programs if the cache does not have them, which
/// takes long, and no lab is up meanwhile.
pub fn lab_options(nodes: usize, link: Link, daemons: bool) -> Result<LabOptions> {
    Ok(LabOptions {
        nodes,
        link,
        daemons,
        bridge: worker::BRIDGE,
        layer: Some(&LAYER),
        programs: Some(build::ensure_programs()?),
        keep: false,
    })
}

/// A cluster that this process has brought up. It stays as long as its lab.
#[derive(Debug)]
pub struct Cluster {
    pub kubectl: Kubectl,
    /// By index of their nodes.
    pub engines: Vec<Engine>,
    pub kubelets: Vec<Part>,
    /// etcd, the API server, the controller manager, the scheduler.
    pub control: Vec<Part>,
}

impl Cluster {
    /// Brings it up in a lab made with [`lab_options`]. Its nodes are ready then.
    pub fn up(lab: &Lab, laps: &mut Laps) -> Result<Self> {
        let folder = lab.folder.kubernetes();
        let built = lab
            .programs()
            .context("this lab was not made for Kubernetes")?;
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let programs = folder.join(PROGRAMS);
        symlink(built.join(build::PROGRAMS), &programs).context("finding the programs")?;
        let authority = Authority::new()?;
        control::make_identities(&folder, &authority)?;
        worker::connect(lab, control::SERVICE_ADDRESS)?;
        let mut control = control::start_server(lab, &folder, &programs)?;
        let engines = lab.nodes.iter().map(|node| worker::start_engine(lab, node));
        let engines = engines.collect::<Result<Vec<_>>>()?;
        laps.lap("containerd has its images");
        let kubectl = kubectl(lab)?;
        wait::until("the API server answers", SERVER_TIME_MAX, || {
            control.iter_mut().try_for_each(Part::check)?;
            kubectl.run(&["get", "--raw", "/readyz"])
        })?;
        laps.lap("the API server answers");
        control.extend(control::start_controllers(lab, &folder, &programs)?);
        let kubelets = lab.nodes.iter();
        let kubelets = kubelets.map(|node| worker::start_kubelet(lab, node, &authority));
        let mut kubelets = kubelets.collect::<Result<Vec<_>>>()?;
        wait::until("the nodes are ready", NODES_TIME_MAX, || {
            let mut parts = control.iter_mut().chain(&mut kubelets);
            parts.try_for_each(Part::check)?;
            check_ready(&kubectl, lab)
        })?;
        kubectl.apply(RUNTIME_CLASS)?;
        laps.lap("the nodes are ready");
        Ok(Self {
            kubectl,
            engines,
            kubelets,
            control,
        })
    }
}

impl Cluster {
    /// Has the API server not be there while something is done.
    pub fn without_server(&mut self, lab: &Lab, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let folder = lab.folder.kubernetes();
        let server = self.control.get_mut(API_SERVER);
        let server = server.context("a control plane has an API server")?;
        server.kill()?;
        let worked = work();
        *server = control::start_api_server(lab, &folder, &folder.join(PROGRAMS))?;
        wait::until("the API server answers", SERVER_TIME_MAX, || {
            server.check()?;
            self.kubectl.run(&["get", "--raw", "/readyz"])
        })?;
        worked
    }
}

/// kubectl for the cluster of a lab, whoever brought it up.
pub fn kubectl(lab: &Lab) -> Result<Kubectl> {
    let folder = lab.folder.kubernetes();
    ensure!(
        folder.is_dir(),
        "the lab has no Kubernetes: lab down, then lab up --kubernetes"
    );
    Ok(Kubectl {
        program: folder.join(PROGRAMS).join("kubectl"),
        config: folder.join(format!("{}.conf", control::ADMINISTRATOR)),
        cache: folder.join("cache"),
        net: lab.client.net.try_clone().context("the client's network")?,
        cgroups: lab.cgroups(control::CGROUP)?,
    })
}

/// Whether the lab has a cluster.
pub fn is_in(lab: &Lab) -> bool {
    lab.folder.kubernetes().is_dir()
}

/// Whether every node of the lab is a ready one of the cluster, and pods have their account.
fn check_ready(kubectl: &Kubectl, lab: &Lab) -> Result<()> {
    let listed = kubectl.json(&["get", "nodes"])?;
    let nodes = listed["items"].as_array().context("a list of nodes")?;
    for wanted in lab.nodes.iter().map(worker::name) {
        let node = nodes
            .iter()
            .find(|node| node["metadata"]["name"] == *wanted);
        let node = node.with_context(|| format!("{wanted} has not joined"))?;
        let conditions = node["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        let ready = conditions.find(|condition| condition["type"] == "Ready");
        let ready = ready.with_context(|| format!("{wanted} has not said how it is"))?;
        ensure!(ready["status"] == "True", "{wanted}: {}", ready["message"]);
        ensure!(
            node["spec"]["taints"].is_null(),
            "{wanted} has taints: {}",
            node["spec"]
        );
    }
    kubectl.run(&["get", "serviceaccount", "default"])?;
    Ok(())
}

/// Writes down what the cluster says of itself, beside the logs.
pub fn keep_state(lab: &Lab, kubectl: &Kubectl) -> Result<()> {
    let mut text = String::new();
    for question in [
        ["get", "pods,nodes", "--all-namespaces", "--output=yaml"],
        ["get", "events", "--all-namespaces", "--output=wide"],
    ] {
        text += &kubectl.run(&question)?;
    }
    let path = lab.folder.logs().join(control::CGROUP).join("cluster.txt");
    write(&path, &text)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// What pods name that come by a migration.
const RUNTIME_CLASS: &str = include_str!("../../deploy/kubernetes/runtimeclass.yaml");
/// Where it is among the parts of the control plane.
const API_SERVER: usize = 1;
/// Below the cluster's folder.
const PROGRAMS: &str = "programs";
/// Three seconds on an idle machine.
const SERVER_TIME_MAX: Duration = Duration::from_secs(90);
const NODES_TIME_MAX: Duration = Duration::from_secs(120);
