//! The lab's network: a switch, node links, a client, all in namespaces of the lab.
//!
//! ```text
//!   client 10.90.0.1 ── eth0 ══ switch (bridge br0) ══ eth0 ── br0 10.90.0.11 node a
//!                                       ║                       ├─ workload's veth
//!                                       ╚═══ eth0 ── br0 10.90.0.12 node b
//! ```
//! Nodes, workloads and the client share one broadcast domain, so a moved workload keeps its
//! address. A shaped link has a token bucket at each end. Nothing here touches the host's
//! namespace.

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::inside::Inside;
use super::node::Node;

/// The speed of the links between nodes and switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    Unshaped,
    /// A rate as `tc` understands it ("1gbit", "200mbit").
    Shaped(String),
    /// Radio: a rate, a delay and packets that are lost. Needs netem.
    Radio(&'static Radio),
}

/// A link by radio, as `tc` understands it; half of the delay is at each end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Radio {
    pub name: &'static str,
    rate: &'static str,
    delay: &'static str,
    loss: &'static str,
}

/// Rates, delays and losses that were measured in the field.
static RADIOS: [Radio; 3] = [
    Radio {
        name: "wifi",
        rate: "800mbit",
        delay: "2500us",
        loss: "0.00001%",
    },
    Radio {
        name: "lte",
        rate: "50mbit",
        delay: "20ms",
        loss: "0.08%",
    },
    Radio {
        name: "satellite",
        rate: "100mbit",
        delay: "22500us",
        loss: "1%",
    },
];

impl FromStr for Link {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "unshaped" {
            return Ok(Self::Unshaped);
        }
        if let Some(radio) = RADIOS.iter().find(|radio| radio.name == text) {
            return Ok(Self::Radio(radio));
        }
        let digits = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        if digits.len() == text.len() || !["kbit", "mbit", "gbit"].contains(&digits) {
            bail!("a link is \"unshaped\" or a rate such as 1gbit or 200mbit, not {text:?}");
        }
        Ok(Self::Shaped(text.to_owned()))
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unshaped => f.write_str("unshaped"),
            Self::Shaped(rate) => f.write_str(rate),
            Self::Radio(radio) => f.write_str(radio.name),
        }
    }
}

pub fn node_address(index: usize) -> Ipv4Addr {
    host(NODE_FIRST, index)
}

pub fn workload_address(number: usize) -> Ipv4Addr {
    host(WORKLOAD_FIRST, number)
}

pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 1);
pub const PREFIX: u8 = 24;
pub const BRIDGE: &str = "br0";

fn host(first: u8, index: usize) -> Ipv4Addr {
    let last = u8::try_from(index)
        .ok()
        .and_then(|index| first.checked_add(index));
    Ipv4Addr::new(
        10,
        90,
        0,
        last.expect("the lab bounds its nodes and workloads"),
    )
}

/// A locally administered MAC that says which address it belongs to.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x00, a, b, c, d]
}

pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Makes switch, client and links. `nodes` must be fresh.
pub fn build(switch: &OwnedFd, client: &OwnedFd, nodes: &[Node], link: &Link) -> Result<()> {
    // The switch has no files of its own: it borrows the tools of the first node.
    let tools = nodes.first().context("a lab has at least one node")?;
    ip(tools, switch, &[], |_| {
        format!("link set lo up\n{}link set {BRIDGE} up\n", add_bridge(None))
    })?;
    ip(tools, client, &[switch], |switch| {
        format!(
            "link set lo up\n\
             link add eth0 address {mac} type veth peer name client netns {}\n\
             addr add {CLIENT_ADDRESS}/{PREFIX} dev eth0\n\
             link set eth0 up\n",
            switch[0],
            mac = mac_text(mac_of(CLIENT_ADDRESS)),
        )
    })?;
    ip(tools, switch, &[], |_| {
        format!("link set client master {BRIDGE} up\n")
    })?;
    for node in nodes {
        connect_node(tools, switch, node)?;
    }
    reshape(switch, nodes, link)
}

/// Gives the links of a lab that is up another speed.
pub fn reshape(switch: &OwnedFd, nodes: &[Node], link: &Link) -> Result<()> {
    let tools = nodes.first().context("a lab has at least one node")?;
    for node in nodes {
        let ends = [
            (&node.namespaces.net, "eth0".to_owned()),
            (switch, format!("node-{}", node.name())),
        ];
        for (net, interface) in ends {
            match link {
                Link::Shaped(rate) => shape(tools, net, &interface, rate)?,
                Link::Unshaped => {
                    let command = tool(tools, net, "tc")?;
                    let free = ["qdisc", "replace", "dev", &interface, "root", "noqueue"];
                    command.args(free).run().context("freeing a link")?;
                }
                Link::Radio(radio) => disturb(tools, net, &interface, radio)?,
            }
        }
    }
    Ok(())
}

/// Why a link cannot be had on this machine, if it cannot.
pub fn unfit(nodes: &[Node], link: &Link) -> Result<Option<String>> {
    let Link::Radio(radio) = link else {
        return Ok(None);
    };
    let tools = nodes.first().context("a lab has at least one node")?;
    let net = &tools.namespaces.net;
    if disturb(tools, net, "lo", radio).is_err() {
        let why = "this kernel has no netem (CONFIG_NET_SCH_NETEM) to delay and lose packets";
        return Ok(Some(why.to_owned()));
    }
    let free = ["qdisc", "del", "dev", "lo", "root"];
    tool(tools, net, "tc")?
        .args(free)
        .run()
        .context("freeing a link")?;
    Ok(None)
}

/// Delays and loses what an interface sends.
fn disturb(tools: &Node, net: &OwnedFd, interface: &str, radio: &Radio) -> Result<()> {
    let netem = ["qdisc", "replace", "dev", interface, "root", "netem"];
    tool(tools, net, "tc")?
        .args(netem)
        .args(["delay", radio.delay, "loss", radio.loss, "rate", radio.rate])
        .args(["limit", RADIO_PACKETS])
        .run()
        .context("disturbing a link")?;
    Ok(())
}

fn connect_node(tools: &Node, switch: &OwnedFd, node: &Node) -> Result<()> {
    let port = format!("node-{}", node.name());
    let address = node.address();
    ip(tools, &node.namespaces.net, &[switch], |switch| {
        format!(
            "link set lo up\n{}\
             link add eth0 type veth peer name {port} netns {}\n\
             link set eth0 master {BRIDGE} up\n\
             addr add {address}/{PREFIX} dev {BRIDGE}\n\
             link set {BRIDGE} up\n",
            add_bridge(Some(mac_of(address))),
            switch[0],
        )
    })?;
    ip(tools, switch, &[], |_| {
        format!("link set {port} master {BRIDGE} up\n")
    })
}

/// A bridge that forwards at once and keeps its MAC when ports come and go.
fn add_bridge(mac: Option<[u8; 6]>) -> String {
    let address = mac
        .map(|mac| format!("address {} ", mac_text(mac)))
        .unwrap_or_default();
    format!("link add {BRIDGE} {address}type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n")
}

/// A token bucket on the sending side of one interface.
fn shape(tools: &Node, net: &OwnedFd, interface: &str, rate: &str) -> Result<()> {
    let command = tool(tools, net, "tc")?;
    let arguments = [
        "qdisc", "replace", "dev", interface, "root", "tbf", "rate", rate,
    ];
    // The burst holds one full GSO packet and 1 ms at 1 Gbit/s, or more for faster links; the
    // queue is what a switch port has.
    let burst = if rate.ends_with("gbit") && rate != "1gbit" {
        "2mb"
    } else {
        "256kb"
    };
    let bucket = ["burst", burst, "latency", "20ms"];
    command
        .args(arguments)
        .args(bucket)
        .run()
        .context("shaping a link")?;
    Ok(())
}

/// One end of a workload's link: a veth whose outer end may be a port of the node's bridge.
#[derive(Clone, Debug)]
pub struct WorkloadLink {
    /// The outer interface, in the node's namespace.
    pub port: String,
    pub address: Ipv4Addr,
}

impl WorkloadLink {
    pub fn new(number: usize) -> Self {
        Self {
            port: format!("w{number}"),
            address: workload_address(number),
        }
    }

    /// Makes the link between `node` and a fresh network namespace; the port stays off the bridge.
    pub fn create(&self, node: &Node, inner: &OwnedFd) -> Result<()> {
        ip(node, &node.namespaces.net, &[inner], |inner| {
            let mac = mac_text(mac_of(self.address));
            format!(
                "link add {} type veth peer name eth0 address {mac} netns {}\nlink set {} up\n",
                self.port, inner[0], self.port
            )
        })?;
        ip(node, inner, &[], |_| {
            format!(
                "link set lo up\n\
                 addr add {}/{PREFIX} dev eth0\n\
                 link set eth0 up\n\
                 route add default via {CLIENT_ADDRESS}\n",
                self.address
            )
        })
    }

    /// Makes the outer end a port of the node's bridge.
    pub fn open(&self, node: &Node) -> Result<()> {
        let script = format!("link set {} master {BRIDGE}\n", self.port);
        ip(node, &node.namespaces.net, &[], |_| script)
    }

    /// Takes the port off the bridge: no frame gets in or out, and the carrier stays.
    pub fn close(&self, node: &Node) -> Result<()> {
        let script = format!("link set {} nomaster\n", self.port);
        ip(node, &node.namespaces.net, &[], |_| script)
    }
}

/// Runs an `ip -batch` script in the network namespace `net` with the tools of `tools`. `others`
/// are handed down; the script gets the paths that name them.
pub fn ip(
    tools: &Node,
    net: &OwnedFd,
    others: &[&OwnedFd],
    script: impl FnOnce(&[String]) -> String,
) -> Result<()> {
    let mut command = tool(tools, net, "ip")?.args(["-batch", "-"]);
    let mut paths = Vec::new();
    for other in others {
        paths.push(command.inherit(other)?);
    }
    let script = script(&paths);
    command
        .run_with_input(&script)
        .with_context(|| format!("network set-up {script:?}"))?;
    Ok(())
}

/// A program of a node's image in another network namespace.
pub fn tool(tools: &Node, net: impl AsFd, program: &str) -> Result<Inside> {
    Inside::new(program)
        .cgroups(&tools.record.cgroups)
        .root(&tools.namespaces)?
        .enter(net)
}

/// What is under way in a delay of 23 ms at 100 Mbit/s, and as much again.
const RADIO_PACKETS: &str = "1000";
const NODE_FIRST: u8 = 11;
const WORKLOAD_FIRST: u8 = 101;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_unshaped_or_a_rate() {
        assert_eq!("unshaped".parse::<Link>().unwrap(), Link::Unshaped);
        assert_eq!(
            "1gbit".parse::<Link>().unwrap(),
            Link::Shaped("1gbit".to_owned())
        );
        for wrong in ["", "fast", "gbit", "10", "1gbit x"] {
            assert!(wrong.parse::<Link>().is_err(), "{wrong:?} is not a link");
        }
    }

    #[test]
    fn macs_are_local_and_name_their_address() {
        assert_eq!(mac_text(mac_of(workload_address(0))), "02:00:0a:5a:00:65");
    }
}
