//! Networks of podman: what a container has of one, and whether it can have the same at a target.
//!
//! podman's import asks netavark for the same address and MAC in a network of the same name. That
//! attaches the container's link to the network's bridge when it makes it, which is long before
//! the container runs there. So the import is shown the target's own network with another bridge
//! ([`Attachment::hold`]); all else is podman's: who has which address, rules of the firewall,
//! published ports.
//!
//! Absent, and refused by name: more than one network, networks that are no bridges, whose
//! addresses come from elsewhere, or with options that hang on the bridge.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::archive;
use super::command::{podman_at_once, told};
use super::members::{Given, Interface, Members, Prefix};

/// The only driver whose links are veths into a bridge.
const BRIDGE: &str = "bridge";

/// Who gives out addresses: podman, at each node.
const HOST_LOCAL: &str = "host-local";

/// Options of a network that mean the same wherever a link is attached first.
const OPTIONS: [&str; 6] = [
    "com.docker.network.bridge.name",
    "com.docker.network.driver.mtu",
    "metric",
    "mode",
    "mtu",
    "no_default_route",
];

/// In a network's description: its name, the bridge, and options, of which one is the size of
/// packets.
const NAME: &str = "name";
const INTERFACE: &str = "network_interface";
const SETTINGS: &str = "options";
const MTU: &str = "mtu";

/// Where descriptions of networks are for the import, in the migration's folder.
const FOLDER: &str = "networks";

/// Where the kernel tells of links.
const LINKS: &str = "/sys/class/net";

/// What the source's journal has of a container's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networked {
    name: String,
    /// Ports of the node, as people write them.
    published: Vec<String>,
    /// The bridge, and whether it has a port that leads out of the node.
    bridge: String,
    leads_out: bool,
}

/// What a container has of its network, as podman has exported it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub(super) network: String,
    pub(super) subnets: Vec<Given>,
    pub(super) published: Vec<Published>,
}

/// A network, as `podman network ls` describes it.
#[derive(Debug, Deserialize)]
struct Network {
    name: String,
    driver: String,
    #[serde(default)]
    network_interface: String,
    #[serde(default)]
    subnets: Vec<Subnet>,
    #[serde(default)]
    options: BTreeMap<String, String>,
    #[serde(default)]
    ipam_options: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
struct Subnet {
    subnet: Prefix,
    #[serde(default)]
    gateway: Option<IpAddr>,
}

/// Ports of the node that are forwarded to the container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Published {
    #[serde(default)]
    pub(super) host_ip: String,
    pub(super) host_port: u16,
    pub(super) container_port: u16,
    #[serde(default)]
    pub(super) range: u16,
    #[serde(default)]
    pub(super) protocol: String,
}

/// Of podman's record of a container.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default, rename = "newNetworks")]
    networks: Option<Map<String, Value>>,
    #[serde(default, rename = "newPortMappings")]
    published: Option<Vec<Published>>,
}

/// What netavark has made for a container in a network.
#[derive(Debug, Deserialize)]
struct Status {
    #[serde(default)]
    interfaces: BTreeMap<String, Interface>,
}

impl Networked {
    /// A container in the network `name`, if it can move from there.
    pub fn of(name: &str, published: Vec<String>) -> Result<Self, Failure> {
        let (network, _) = Network::of(name)?;
        network.check()?;
        Ok(Self {
            name: network.name,
            published,
            leads_out: leads_out(&network.network_interface),
            bridge: network.network_interface,
        })
    }

    /// Whether others than the node can reach it by its address.
    pub const fn leads_out(&self) -> bool {
        self.leads_out
    }

    /// What a move takes from the container's clients.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.published.is_empty() {
            notes.push(format!(
                "connections through the published ports {} are lost: they are the node's. New \
                 ones reach the container through the target's",
                self.published.join(", ")
            ));
        }
        if !self.leads_out {
            notes.push(format!(
                "connections with anybody outside of the node are lost: the bridge {} of podman's \
                 network {} leads nowhere, so that the node translates their addresses",
                self.bridge, self.name
            ));
        }
        notes
    }
}

impl Attachment {
    /// What is exported, if the container is in a network of podman's.
    pub fn exported(exported: &[u8]) -> Result<Option<Self>, String> {
        let config = archive::entry(exported, archive::CONFIG)?.unwrap_or_default();
        let config: Config = serde_json::from_slice(&config).map_err(|e| e.to_string())?;
        let names: Vec<String> = config.networks.into_iter().flatten().map(|n| n.0).collect();
        let network = match &names[..] {
            [] => return Ok(None),
            [name] => name.clone(),
            more => return Err(format!("it is in the networks {}", more.join(", "))),
        };
        let status = archive::entry(exported, STATUS)?;
        let status = status.ok_or_else(|| format!("{STATUS} is not in it"))?;
        let mut status: BTreeMap<String, Status> =
            serde_json::from_slice(&status).map_err(|error| format!("{STATUS}: {error}"))?;
        let interfaces = status.remove(&network).map(|status| status.interfaces);
        let mut interfaces = interfaces.unwrap_or_default().into_values();
        match (interfaces.next(), interfaces.next()) {
            (Some(interface), None) => Ok(Some(Self {
                network,
                subnets: interface.subnets,
                published: config.published.unwrap_or_default(),
            })),
            _ => Err(format!("{STATUS} has not one link in {network}")),
        }
    }

    /// Compares the network of that name here with the source's, and looks whether addresses and
    /// ports are free. `leads_out` says whether the source's bridge does.
    pub fn check(&self, leads_out_there: bool) -> Result<(), Failure> {
        let (network, _) = Network::of(&self.network)?;
        network.check()?;
        network.check_subnets(&self.subnets)?;
        if let Some(members) = Members::of(&network.name) {
            members.check_free(&network.name, &self.subnets)?;
        }
        let (name, bridge) = (&network.name, &network.network_interface);
        if !Path::new(LINKS).join(bridge).join("bridge").exists() {
            return Err(unfit(format!(
                "the bridge {bridge} of podman's network {name} is not there at the target: podman \
                 makes it with the first container"
            )));
        }
        if leads_out_there && !leads_out(bridge) {
            return Err(unfit(format!(
                "the bridge {bridge} of podman's network {name} leads nowhere at the target, and \
                 out of the node at the source: the container's clients could not reach it there"
            )));
        }
        self.published.iter().try_for_each(Published::check_free)
    }

    /// Describes the network for the import, in `directory`, with the bridge `hold` instead of its
    /// own, whose packets are as large; answers with that.
    pub fn hold(&self, directory: &Path, hold: &str) -> Result<String, Failure> {
        let (network, mut described) = Network::of(&self.network)?;
        let bridge = &network.network_interface;
        set_mtu(&mut described, || mtu_of(bridge)).map_err(|why| {
            unfit(format!(
                "the bridge {bridge} of podman's network {}: {why}",
                network.name
            ))
        })?;
        described.insert(INTERFACE.to_owned(), hold.into());
        let folder = held_in(directory);
        let path = folder.join(format!("{}.json", network.name));
        let written = fs::create_dir_all(&folder)
            .and_then(|()| fs::write(&path, serde_json::to_vec(&described)?));
        written.map_err(|error: io::Error| {
            let text = format!("writing {}: {error}", path.display());
            Failure::new(ErrorCode::Internal, text)
        })?;
        Ok(network.network_interface)
    }
}

/// Has a network say how large packets are. Where it does not, a link is made for what its bridge
/// takes, which is to be the network's own.
fn set_mtu(
    described: &mut Map<String, Value>,
    bridge: impl FnOnce() -> Result<u32, String>,
) -> Result<(), String> {
    let options = described.entry(SETTINGS).or_insert(Value::Null);
    if options.is_null() {
        *options = Value::Object(Map::new());
    }
    let options = options.as_object_mut().ok_or("its options are none")?;
    let said = options.get(MTU).and_then(Value::as_str);
    if said.is_none_or(|said| said.parse() == Ok(0_u32)) {
        options.insert(MTU.to_owned(), bridge()?.to_string().into());
    }
    Ok(())
}

fn mtu_of(link: &str) -> Result<u32, String> {
    let path = Path::new(LINKS).join(link).join("mtu");
    let read = fs::read_to_string(&path).map_err(|error| error.to_string());
    let read = read.and_then(|text| text.trim().parse().map_err(|_| format!("{text:?}")));
    read.map_err(|why| format!("{}: {why}", path.display()))
}

/// The folder of the networks that the import is shown.
pub fn held_in(directory: &Path) -> PathBuf {
    directory.join(FOLDER)
}

/// A network, and the same as podman prints it.
type Described = (Network, Map<String, Value>);

impl Network {
    /// Asks podman; the same unread, too.
    fn of(name: &str) -> Result<Described, Failure> {
        // It is to be no option.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if name.starts_with('-') || !name.bytes().all(plain) {
            return Err(unfit(format!("podman has no network called {name:?}")));
        }
        // Unlike `inspect` it waits for no container of the network.
        let printed = podman_at_once(["network", "ls", "--format", "json"]);
        let printed = printed.map_err(|error| Failure::new(ErrorCode::NodeUnfit, told(&error)))?;
        let found = Self::parse(&printed, name).map_err(|why| {
            unfit(format!(
                "what podman says of its network {name} cannot be read: {why}"
            ))
        })?;
        found.ok_or_else(|| unfit(format!("podman has no network {name} here")))
    }

    /// The one of that name in what is printed.
    fn parse(printed: &str, name: &str) -> Result<Option<Described>, String> {
        let all: Vec<Map<String, Value>> =
            serde_json::from_str(printed).map_err(|error| error.to_string())?;
        let is_it = |one: &Map<String, Value>| one.get(NAME).is_some_and(|has| has == name);
        let Some(described) = all.into_iter().find(is_it) else {
            return Ok(None);
        };
        let network = serde_json::from_value(Value::Object(described.clone()));
        Ok(Some((
            network.map_err(|error| error.to_string())?,
            described,
        )))
    }

    /// Refuses what is not moved yet.
    fn check(&self) -> Result<(), Failure> {
        let refused = |why: String| {
            let text = format!(
                "podman's network {} {why}, which is not moved yet",
                self.name
            );
            Err(unfit(text))
        };
        if self.driver != BRIDGE {
            return refused(format!("is one of the driver {:?}", self.driver));
        }
        match self.ipam_options.get("driver") {
            Some(driver) if driver != HOST_LOCAL => {
                return refused(format!("has its addresses from {driver:?}"));
            }
            Some(_) | None => {}
        }
        let is_known = |option: &&String| OPTIONS.contains(&&***option);
        match self.options.keys().find(|option| !is_known(option)) {
            Some(option) => refused(format!("has the option {option}")),
            None => Ok(()),
        }
    }

    /// Whether all of `given` is of this network.
    fn check_subnets(&self, given: &[Given]) -> Result<(), Failure> {
        let has = |given: &Given| {
            let mut subnets = self.subnets.iter();
            subnets.any(|has| has.subnet.holds(given.ipnet) && has.gateway == given.gateway)
        };
        match given.iter().find(|given| !has(given)) {
            None => Ok(()),
            Some(Given { ipnet, gateway }) => Err(unfit(format!(
                "podman's network {} at the target has not the subnet of {}/{} with the gateway {}",
                self.name,
                ipnet.ip,
                ipnet.length,
                gateway.map_or_else(|| "none".to_owned(), |ip| ip.to_string())
            ))),
        }
    }
}

impl Published {
    /// As podman does when it publishes it: by listening.
    fn check_free(&self) -> Result<(), Failure> {
        let ip = match &*self.host_ip {
            "" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            text => text.parse().map_err(|_| {
                unfit(format!(
                    "the container publishes a port of {text:?}, which is no address"
                ))
            })?,
        };
        let more = self.range.saturating_sub(1);
        for port in self.host_port..=self.host_port.saturating_add(more) {
            let address = SocketAddr::new(ip, port);
            let listened = match &*self.protocol {
                "udp" => UdpSocket::bind(address).map(drop),
                "" | "tcp" => TcpListener::bind(address).map(drop),
                // Nobody listens for it.
                _ => Ok(()),
            };
            listened.map_err(|error| {
                unfit(format!(
                    "the container publishes {address}/{}, which cannot be had at the target: \
                     {error}",
                    self.protocol
                ))
            })?;
        }
        Ok(())
    }
}

/// Whether a bridge of this node has a port that is no container's: such a one is no veth, or one
/// whose other end is here.
fn leads_out(bridge: &str) -> bool {
    let ports = fs::read_dir(Path::new(LINKS).join(bridge).join("brif"));
    let ports = ports.into_iter().flatten().flatten();
    let number = |link: &Path, name: &str| -> Option<u32> {
        fs::read_to_string(link.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let links: Vec<PathBuf> = fs::read_dir(LINKS)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    ports.into_iter().any(|port| {
        let port = Path::new(LINKS).join(port.file_name());
        let (own, other) = (number(&port, "ifindex"), number(&port, "iflink"));
        // A vlan is on another link; the same number may be that of any link, if it is elsewhere.
        let is_vlan = fs::read_to_string(port.join("uevent"))
            .is_ok_and(|text| text.lines().any(|line| line == "DEVTYPE=vlan"));
        let is_end =
            |link: &PathBuf| number(link, "ifindex") == other && number(link, "iflink") == own;
        own.is_some() && (own == other || is_vlan || links.iter().any(is_end))
    })
}

/// What netavark has said, in an export.
const STATUS: &str = "network.status";

fn unfit(text: String) -> Failure {
    Failure::new(ErrorCode::NetworkUnfit, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tar::{Builder, Header};

    fn network(change: impl FnOnce(&mut Value)) -> Network {
        let mut one = json!({
            "name": "podman", "id": "2f", "driver": "bridge", "network_interface": "podman0",
            "subnets": [{"subnet": "10.88.0.0/16", "gateway": "10.88.0.1"}],
            "ipv6_enabled": false, "ipam_options": {"driver": "host-local"},
        });
        change(&mut one);
        let printed = json!([{"name": "other"}, one]).to_string();
        assert!(Network::parse(&printed, "podma").unwrap().is_none());
        Network::parse(&printed, "podman").unwrap().unwrap().0
    }

    fn given(ipnet: &str) -> Vec<Given> {
        serde_json::from_value(json!([{"ipnet": ipnet, "gateway": "10.88.0.1"}])).unwrap()
    }

    fn export(entries: &[(&str, Value)]) -> Vec<u8> {
        let mut written = Builder::new(Vec::new());
        for (path, value) in entries {
            let bytes = value.to_string().into_bytes();
            let mut header = Header::new_gnu();
            header.set_size(bytes.len() as u64);
            written.append_data(&mut header, path, &bytes[..]).unwrap();
        }
        written.into_inner().unwrap()
    }

    #[test]
    fn a_network_that_is_not_moved_is_refused_by_its_name() {
        network(|_| ()).check().unwrap();
        let refused = |change: fn(&mut Value)| network(change).check().unwrap_err().to_string();
        assert!(refused(|one| one["driver"] = "macvlan".into()).contains("\"macvlan\""));
        let ipam = refused(|one| one["ipam_options"]["driver"] = "dhcp".into());
        assert!(
            ipam.starts_with("network-unfit") && ipam.contains("\"dhcp\""),
            "{ipam}"
        );
        let vlan = refused(|one| one["options"] = json!({"mtu": "1400", "vlan": "7"}));
        assert!(vlan.contains("option vlan"), "{vlan}");
        network(|one| one["options"] = json!({"mode": "unmanaged"}))
            .check()
            .unwrap();
    }

    #[test]
    fn an_address_is_of_the_same_subnet() {
        let here = network(|_| ());
        here.check_subnets(&given("10.88.0.2/16")).unwrap();
        for other in ["10.89.0.2/16", "10.88.0.2/24", "fd00::2/16"] {
            let refused = here.check_subnets(&given(other)).unwrap_err();
            assert!(refused.to_string().contains(other), "{refused}");
        }
        let gateway = network(|one| one["subnets"][0]["gateway"] = "10.88.0.9".into());
        assert!(gateway.check_subnets(&given("10.88.0.2/16")).is_err());
    }

    #[test]
    fn a_network_without_a_size_of_packets_has_that_of_its_bridge() {
        let set = |mut one: Value| {
            set_mtu(one.as_object_mut().unwrap(), || Ok(9000)).map(|()| one["options"].clone())
        };
        for none in [
            json!({}),
            json!({"options": null}),
            json!({"options": {"mtu": "0"}}),
        ] {
            assert_eq!(set(none), Ok(json!({"mtu": "9000"})));
        }
        let own = json!({"options": {"mtu": "1400", "metric": "7"}});
        assert_eq!(set(own.clone()), Ok(own["options"].clone()));
        set(json!({"options": "mtu"})).unwrap_err();
        assert!(mtu_of("lo").unwrap() > 0);
        assert!(mtu_of("none-such").unwrap_err().contains("none-such/mtu"));
    }

    #[test]
    fn the_last_port_is_looked_at_too() {
        let published = Published {
            host_ip: "127.0.0.2".to_owned(),
            host_port: u16::MAX,
            container_port: 80,
            range: 3,
            protocol: "tcp".to_owned(),
        };
        let taken = TcpListener::bind(("127.0.0.2", u16::MAX)).unwrap();
        published.check_free().unwrap_err();
        drop(taken);
        published.check_free().unwrap();
    }

    #[test]
    fn a_published_port_that_somebody_has_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let published = |protocol: &str| Published {
            host_ip: "127.0.0.1".to_owned(),
            host_port: port,
            container_port: 80,
            range: 1,
            protocol: protocol.to_owned(),
        };
        let refused = published("tcp").check_free().unwrap_err().to_string();
        assert!(
            refused.contains(&format!("127.0.0.1:{port}/tcp")),
            "{refused}"
        );
        drop(taken);
        published("tcp").check_free().unwrap();
        published("sctp").check_free().unwrap();
    }

    #[test]
    fn an_export_says_which_network_and_which_address() {
        let config = json!({
            "id": "0a", "newNetworks": {"podman": {"interface_name": "eth0"}},
            "newPortMappings": [{"host_ip": "", "container_port": 80, "host_port": 8080,
                                 "range": 1, "protocol": "tcp"}],
        });
        let status = json!({"podman": {"interfaces": {"eth0": {
            "subnets": [{"ipnet": "10.88.0.2/16", "gateway": "10.88.0.1"}],
            "mac_address": "7a:ef:77:49:09:b1"}}}});
        let exported = export(&[("config.dump", config.clone()), (STATUS, status)]);
        let attachment = Attachment::exported(&exported).unwrap().unwrap();
        assert_eq!(attachment.subnets, given("10.88.0.2/16"));
        assert_eq!(attachment.published[0].host_port, 8080);
        let bare = export(&[("config.dump", json!({"id": "0a"}))]);
        assert_eq!(Attachment::exported(&bare), Ok(None));
        let silent = export(&[("config.dump", config)]);
        assert!(Attachment::exported(&silent).unwrap_err().contains(STATUS));
        let two = json!({"id": "0a", "newNetworks": {"one": {}, "two": {}}});
        let two = Attachment::exported(&export(&[("config.dump", two)])).unwrap_err();
        assert!(two.contains("one, two"), "{two}");
    }

    #[test]
    fn what_is_lost_is_said_beforehand() {
        let networked = |leads_out: bool, published: &[&str]| Networked {
            name: "podman".to_owned(),
            published: published.iter().map(|&port| port.to_owned()).collect(),
            bridge: "podman0".to_owned(),
            leads_out,
        };
        assert!(networked(true, &[]).notes().is_empty());
        let notes = networked(false, &["0.0.0.0:8080->80/tcp"]).notes();
        assert!(
            notes[0].contains("8080->80/tcp") && notes[1].contains("podman0"),
            "{notes:?}"
        );
    }
}
