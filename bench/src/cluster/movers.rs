//! What moves pods in the lab's cluster: a controller, and an agent at each node, with the rights
//! that a cluster gives them and no others.
//!
//! The controller is a process of this machine in the client's network, as the control plane is;
//! agents are processes of their nodes.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::certificates::write;
use super::control::{ADMINISTRATOR, CGROUP, Part};
use super::kubectl::Kubectl;
use super::wait::until;
use super::worker;
use crate::lab::Lab;
use crate::lab::inside::{Inside, in_network};
use crate::lab::network::{self, CLIENT_ADDRESS};
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
        for objects in [DEFINITIONS, RIGHTS, WEBHOOK] {
            kubectl.apply(objects)?;
        }
        serve_service(lab, kubectl)?;
        let established = ["wait", "--for=condition=Established", "--timeout=20s"];
        let names = [
            "crd/migrations.pageferry.dev",
            "crd/migrationpolicies.pageferry.dev",
        ];
        kubectl.run(&[&established[..], &names].concat())?;
        let folder = lab.folder.kubernetes();
        let config = config(kubectl, &folder, "pageferry-controller")?;
        let path = folder.join(CONTROLLER_CONFIG);
        write(&path, &config.to_string())?;
        let controllers = (0..controllers).map(|index| start_controller(lab, &path, index));
        let controllers = controllers.collect::<Result<_>>()?;
        let agents = lab.nodes.iter().map(|node| start_agent(lab, kubectl, node));
        Ok(Self {
            controllers,
            agents: agents.collect::<Result<_>>()?,
        })
    }

    /// `kill -9` of a controller, and another one in its place.
    pub fn kill_controller(&mut self, lab: &Lab, index: usize) -> Result<()> {
        let controller = self.controllers.get_mut(index);
        let controller = controller.with_context(|| format!("there is no controller {index}"))?;
        controller.kill()?;
        let config = lab.folder.kubernetes().join(CONTROLLER_CONFIG);
        *controller = start_controller(lab, &config, index)?;
        Ok(())
    }

    /// `kill -9` of a node's agent, and another one in its place.
    pub fn kill_agent(&mut self, lab: &Lab, node: usize) -> Result<()> {
        self.agents[node].kill()?;
        self.agents[node] = run_agent(lab, &lab.nodes[node])?;
        Ok(())
    }

    /// Ends one agent after the other, and starts another one, as a rolling update does.
    pub fn replace_agents(&mut self, lab: &Lab) -> Result<()> {
        for (agent, node) in self.agents.iter_mut().zip(&lab.nodes) {
            agent.end()?;
            *agent = run_agent(lab, node)?;
        }
        Ok(())
    }

    /// Starts controllers again that have ended, as the kubelet does: without the API server none
    /// keeps its lease.
    pub fn revive(&mut self, lab: &Lab) -> Result<()> {
        let config = lab.folder.kubernetes().join(CONTROLLER_CONFIG);
        for (index, controller) in self.controllers.iter_mut().enumerate() {
            if controller.check().is_err() {
                *controller = start_controller(lab, &config, index)?;
            }
        }
        Ok(())
    }

    /// The same, until all go on and answer; how often those that do have seen a rule broken.
    pub fn wait_revived(&mut self, lab: &Lab) -> Result<u64> {
        until("controllers go on, and answer", REVIVED_TIME_MAX, || {
            self.revive(lab)?;
            self.agents.iter_mut().try_for_each(Part::check)?;
            self.violations(lab)
        })
    }

    /// How often the controllers have seen a rule broken.
    pub fn violations(&self, lab: &Lab) -> Result<u64> {
        let all = (0..self.controllers.len()).map(|index| self.violations_of(lab, index));
        all.sum()
    }

    /// How often one of them has.
    fn violations_of(&self, lab: &Lab, index: usize) -> Result<u64> {
        let text = metrics(lab, metrics_address(index))?;
        let counted = text.lines().filter(|line| line.starts_with(VIOLATIONS));
        let counted: Vec<&str> = counted.collect();
        ensure!(
            !counted.is_empty(),
            "controller {index} counts no rules: {text}"
        );
        let numbers = counted.iter().map(|line| {
            let number = line
                .rsplit_once(' ')
                .and_then(|(_, number)| number.parse::<u64>().ok());
            number.with_context(|| format!("a metric is {line:?}"))
        });
        numbers.sum()
    }

    /// How often the controllers have written that they saw one broken, those among them that are
    /// gone with what they had counted.
    pub fn violations_written(&self, lab: &Lab) -> Result<usize> {
        let mut all = 0;
        for index in 0..self.controllers.len() {
            let log = controller_log(lab, index);
            let text = fs::read_to_string(&log);
            let text = text.with_context(|| format!("reading {}", log.display()))?;
            all += text.lines().filter(|line| line.contains(BROKEN)).count();
        }
        Ok(all)
    }

    /// # Errors
    /// When one of them has ended.
    pub fn check(&mut self) -> Result<()> {
        let mut parts = self.controllers.iter_mut().chain(&mut self.agents);
        parts.try_for_each(Part::check)
    }
}

/// Has the client's network serve what a Service of the cluster would lead to: nodes have no
/// kube-proxy, and controllers are no pods here.
fn serve_service(lab: &Lab, kubectl: &Kubectl) -> Result<()> {
    let address = kubectl.run(&[
        "get",
        "service",
        "pageferry-webhook",
        "--namespace",
        NAMESPACE,
        "--output=jsonpath={.spec.clusterIP}",
    ])?;
    let tools = lab.nodes.first().context("a lab has at least one node")?;
    let address: Ipv4Addr = address.trim().parse().context("a Service has an address")?;
    network::ip(tools, &lab.client.net, &[], |_| {
        format!("addr add {address}/32 dev lo\n")
    })
}

/// Waits until the API server asks before it evicts.
pub fn wait_asked(kubectl: &Kubectl) -> Result<()> {
    let bundle = "--output=jsonpath={.webhooks[0].clientConfig.caBundle}";
    let configuration = ["get", "validatingwebhookconfiguration", "pageferry", bundle];
    until("the webhook has a certificate", WEBHOOK_TIME_MAX, || {
        let found = kubectl.run(&configuration)?;
        ensure!(!found.trim().is_empty(), "there is none");
        Ok(())
    })
}

/// Starts a controller, which waits for the one that leads to end. The first answers at the
/// Service's address.
pub fn start_controller(lab: &Lab, config: &Path, index: usize) -> Result<Part> {
    let program = built("pageferry-controller")?;
    let name = format!("pageferry-controller-{index}");
    let command = Inside::new(&program.display().to_string())
        .env("KUBECONFIG", &config.display().to_string())
        .env("POD_NAME", &name)
        .env("PAGEFERRY_METRICS", &metrics_address(index).to_string())
        .env("PAGEFERRY_WEBHOOK", &format!("0.0.0.0:{}", 9443 + index))
        .env("RUST_LOG", LOG)
        .cgroups(&lab.cgroups(CGROUP)?)
        .enter(&lab.client.net)?;
    Part::start(&name, command, controller_log(lab, index))
}

fn controller_log(lab: &Lab, index: usize) -> PathBuf {
    let name = format!("pageferry-controller-{index}.log");
    lab.folder.logs().join(CGROUP).join(name)
}

/// Starts the agent of a node.
pub fn start_agent(lab: &Lab, kubectl: &Kubectl, node: &Node) -> Result<Part> {
    let config = config(kubectl, &lab.folder.kubernetes(), "pageferry-agent")?;
    write(&node.path(AGENT_CONFIG), &config.to_string())?;
    run_agent(lab, node)
}

/// Runs it, of a node where one was started before.
fn run_agent(lab: &Lab, node: &Node) -> Result<Part> {
    let name = worker::name(node);
    let command = node
        .command("pageferry-agent")?
        .env("KUBECONFIG", AGENT_CONFIG)
        .env("NODE_NAME", &name)
        .env(
            "PAGEFERRY_METRICS",
            &format!("{}:{METRICS_PORT}", node.address()),
        )
        .env("RUST_LOG", LOG);
    let log = lab.folder.logs().join(node.name()).join("agent.log");
    Part::start(&format!("the agent of {name}"), command, log)
}

/// What a program serves as metrics, as the lab's client gets it.
fn metrics(lab: &Lab, address: SocketAddr) -> Result<String> {
    let asked = in_network(&lab.client.net, || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, METRICS_TIME_MAX)?;
        stream.set_read_timeout(Some(METRICS_TIME_MAX))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    asked.with_context(|| format!("asking {address} for metrics"))
}

/// Where a controller serves its metrics. They share a network.
fn metrics_address(index: usize) -> SocketAddr {
    let index = u16::try_from(index).unwrap_or_default();
    SocketAddr::from((CLIENT_ADDRESS, METRICS_PORT + index))
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

const DEFINITIONS: &str = include_str!("../../../deploy/kubernetes/crds.yaml");
const RIGHTS: &str = include_str!("../../../deploy/kubernetes/rbac.yaml");
const WEBHOOK: &str = include_str!("../../../deploy/kubernetes/webhook.yaml");
const NAMESPACE: &str = "pageferry-system";
/// Below the cluster's folder.
const CONTROLLER_CONFIG: &str = "pageferry-controller.conf";
const METRICS_PORT: u16 = 9464;
const METRICS_TIME_MAX: Duration = Duration::from_secs(5);
/// What a controller writes when it counts one.
const BROKEN: &str = "a rule is broken";
const VIOLATIONS: &str = "pageferry_invariant_violations_total{";
const REVIVED_TIME_MAX: Duration = Duration::from_secs(60);
const WEBHOOK_TIME_MAX: Duration = Duration::from_secs(30);
const AGENT_CONFIG: &str = "/etc/kubernetes/agent.conf";
const LOG: &str = "info";
