//! A container of podman in a network of podman's own, with the network that podman gives by
//! default.
//!
//! podman makes the bridge for its first container, and it leads nowhere then: here it is made
//! before that, and joined with the lab's segment, so that the client reaches containers of both
//! nodes by their addresses.
//!
//! ```text
//!   client 10.90.0.1, 10.88.255.1 ══ switch ══ br0 ── pod-br ─ pod-up ── podman0 ── container
//! ```

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};

use super::container::{self, Plan};
use super::{Workload, podman, redis};
use crate::lab::Lab;
use crate::lab::network::{CLIENT_ADDRESS, WorkloadLink, ip, mac_of, mac_text};
use crate::lab::node::Node;

/// Joins podman's bridges of all nodes, and has the client be among their neighbours.
pub fn join_segment(lab: &Lab) -> Result<()> {
    for node in &lab.nodes {
        ip(node, &node.namespaces.net, &[], |_| {
            let mac = mac_text(mac_of(node.address()));
            format!(
                "link add {BRIDGE} type bridge stp_state 0 forward_delay 0\n\
                 addr add 10.88.0.1/16 dev {BRIDGE}\n\
                 link set {BRIDGE} up\n\
                 link add pod-up address {mac} type veth peer name pod-br\n\
                 link set pod-up master {BRIDGE} up\n\
                 link set pod-br master br0 up\n"
            )
        })?;
    }
    let tools = lab.nodes.first().context("a lab has nodes")?;
    ip(tools, &lab.client.net, &[], |_| {
        format!("addr add {CLIENT}/16 dev eth0\n")
    })
    .with_context(|| format!("beside {CLIENT_ADDRESS}"))
}

/// Starts Redis in a container of the network that podman gives, and waits until it listens.
pub fn start(lab: &mut Lab, at: &str, options: &[&str]) -> Result<Workload> {
    let (number, plan) = (lab.next_workload()?, Plan::redis());
    podman::prepare(lab, &plan, at)?;
    let name = format!("{}-{number}", plan.name);
    let networked = ("podman", options);
    let (container, pid) = podman::run_in(lab, &plan, (&name, at), networked)?;
    let (address, port) = (address(lab.node(at)?, &name)?, String::new());
    let workload = Workload {
        number,
        pid,
        link: WorkloadLink { port, address },
        container: Some(container),
        containerd: None,
        pod: None,
    };
    workload.wait_until_it_listens(lab, redis::PORT)?;
    Ok(workload)
}

/// The address of a container, as podman of a node says.
pub fn address(node: &Node, name: &str) -> Result<Ipv4Addr> {
    let format = "{{.NetworkSettings.Networks.podman.IPAddress}}";
    let said = podman::podman(node)?.args(["container", "inspect", "--format", format, name]);
    let said = said.run()?;
    said.trim()
        .parse()
        .with_context(|| format!("podman says of the address of {name}: {said}"))
}

/// Whether podman of this node has it with the same address, on its own bridge.
pub fn check_here(node: &Node, workload: &Workload) -> Result<()> {
    let container = workload.container.as_ref().context("a container")?;
    container::check_here(node, container, workload.pid)?;
    let (has, wanted) = (address(node, &container.id)?, workload.link.address);
    ensure!(has == wanted, "podman says it has {has}, and not {wanted}");
    check_ports(node, 2)
}

/// Whether so many links are on podman's bridge of this node, that of the segment among them, and
/// the bridge that leads nowhere is gone again.
pub fn check_ports(node: &Node, count: usize) -> Result<()> {
    let ports = ports(node)?;
    ensure!(ports.len() == count, "ports of {BRIDGE}: {ports:?}");
    check_hold(node)
}

/// Whether nothing of it is left here: no address is given out, and nobody is on the bridge.
pub fn check_gone(node: &Node, workload: &Workload) -> Result<()> {
    let container = workload.container.as_ref().context("a container")?;
    container::check_gone(node, container)?;
    let ports = ports(node)?;
    ensure!(ports == ["pod-up"], "ports of {BRIDGE}: {ports:?}");
    let named = node.command("ls")?.args(["-A", "/run/netns"]).output()?;
    let named = String::from_utf8_lossy(&named.stdout).into_owned();
    ensure!(named.is_empty(), "networks that are left: {named}");
    check_hold(node)
}

/// Whether the bridge that leads nowhere is gone again.
fn check_hold(node: &Node) -> Result<()> {
    let listed = node.command("ls")?.arg("/sys/class/net").run()?;
    ensure!(
        !listed.contains("pageferry"),
        "links that are left: {listed}"
    );
    Ok(())
}

fn ports(node: &Node) -> Result<Vec<String>> {
    let folder = format!("/sys/class/net/{BRIDGE}/brif");
    let listed = node.command("ls")?.arg(folder).run()?;
    Ok(listed.lines().map(str::to_owned).collect())
}

/// podman's own name for it.
const BRIDGE: &str = "podman0";
/// No container gets so far.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 88, 255, 1);
