//! What moves pods in the lab's cluster: a controller, and an agent at each node, with the rights
//! that a cluster gives them and no others.
//!
//! The controller is a process of this machine in the client's network, as the control plane is;
//! agents are processes of their nodes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::certificates::write;
use super::control::{ADMINISTRATOR, CGROUP, Part};
use super::kubectl::Kubectl;
use super::worker;
use crate::lab::Lab;
use crate::lab::inside::Inside;
use crate::lab::node::Node;

/// They go when this goes.
#[derive(Debug)]
pub struct Movers {
    pub controllers: Vec<Part>,
    /// By index of their nodes.
    pub agents: Vec<Part>,
}

impl Movers {
    /// Makes the resources and the rights known, and starts so many controllers, and the agents.
    pub fn start(lab: &Lab, kubectl: &Kubectl, controllers: usize) -> Result<Self> {
        for objects in [DEFINITIONS, RIGHTS] {
            kubectl.apply(objects)?;
        }
        let established = ["wait", "--for=condition=Established", "--timeout=20s"];
        let names = [
            "crd/migrations.pageferry.dev",
            "crd/migrationpolicies.pageferry.dev",
        ];
        kubectl.run(&[&established[..], &names].concat())?;
        let folder = lab.folder.kubernetes();
        let config = config(kubectl, &folder, "pageferry-controller")?;
        let path = folder.join("pageferry-controller.conf");
        write(&path, &config.to_string())?;
        let controllers = (0..controllers).map(|index| start_controller(lab, &path, index));
        let controllers = controllers.collect::<Result<_>>()?;
        let agents = lab.nodes.iter().map(|node| start_agent(lab, kubectl, node));
        Ok(Self {
            controllers,
            agents: agents.collect::<Result<_>>()?,
        })
    }

    /// # Errors
    /// When one of them has ended.
    pub fn check(&mut self) -> Result<()> {
        let mut parts = self.controllers.iter_mut().chain(&mut self.agents);
        parts.try_for_each(Part::check)
    }
}

/// Starts a controller, which waits for the one that leads to end.
pub fn start_controller(lab: &Lab, config: &Path, index: usize) -> Result<Part> {
    let program = built("pageferry-controller")?;
    let name = format!("pageferry-controller-{index}");
    let command = Inside::new(&program.display().to_string())
        .env("KUBECONFIG", &config.display().to_string())
        .env("POD_NAME", &name)
        .env("RUST_LOG", LOG)
        .cgroups(&lab.cgroups(CGROUP)?)
        .enter(&lab.client.net)?;
    let log = lab.folder.logs().join(CGROUP).join(format!("{name}.log"));
    Part::start(&name, command, log)
}

/// Starts the agent of a node.
pub fn start_agent(lab: &Lab, kubectl: &Kubectl, node: &Node) -> Result<Part> {
    let name = worker::name(node);
    let config = config(kubectl, &lab.folder.kubernetes(), "pageferry-agent")?;
    write(&node.path(AGENT_CONFIG), &config.to_string())?;
    let command = node
        .command("pageferry-agent")?
        .env("KUBECONFIG", AGENT_CONFIG)
        .env("NODE_NAME", &name)
        .env("PAGEFERRY_NODE", node.name())
        .env("RUST_LOG", LOG);
    let log = lab.folder.logs().join(node.name()).join("agent.log");
    Part::start(&format!("the agent of {name}"), command, log)
}

/// What an account reaches the API server with: its own token, and the authority's certificate in
/// the file itself.
fn config(kubectl: &Kubectl, folder: &Path, account: &str) -> Result<Value> {
    let token = ["create", "token", account, "--namespace", NAMESPACE];
    let token = kubectl.run(&[&token[..], &["--duration=24h"]].concat())?;
    let text = fs::read_to_string(folder.join(format!("{ADMINISTRATOR}.conf")));
    let mut config: Value = serde_json::from_str(&text.context("reading the administrator's")?)?;
    let authority = kubectl.run(&[
        "config",
        "view",
        "--raw",
        "--flatten",
        "--output=jsonpath={.clusters[0].cluster.certificate-authority-data}",
    ])?;
    ensure!(
        !authority.trim().is_empty(),
        "the authority has no certificate"
    );
    let server = config["clusters"][0]["cluster"]["server"].take();
    config["clusters"][0]["cluster"] = json!({
        "server": server, "certificate-authority-data": authority.trim(),
    });
    config["users"][0]["user"] = json!({"token": token.trim()});
    Ok(config)
}

/// A program of this build.
pub fn built(name: &str) -> Result<PathBuf> {
    let lab = std::env::current_exe().context("finding the lab's own binary")?;
    let program = lab.with_file_name(name);
    ensure!(
        program.is_file(),
        "{} is not built (cargo build --workspace)",
        program.display()
    );
    Ok(program)
}

const DEFINITIONS: &str = include_str!("../../../deploy/crds.yaml");
const RIGHTS: &str = include_str!("../../../deploy/kubernetes/rbac.yaml");
const NAMESPACE: &str = "pageferry-system";
const AGENT_CONFIG: &str = "/etc/kubernetes/agent.conf";
const LOG: &str = "info";
