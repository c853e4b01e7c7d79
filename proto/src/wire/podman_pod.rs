//! What podman has of a pod: enough to make it again.
//!
//! A pod has an infra container, which holds its namespaces and its network and runs nothing of the
//! workload. That one stays at the source; the target makes its own. podman gives out ids by
//! itself, so those of pod and infra differ there, and so do paths that have them in their names.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::id::ContainerId;
use crate::wire::control::{ControlError, missing, short};
use crate::wire::description::{
    ADDRESSES_MAX, LINK_NAME_BYTES_MAX, LinkAddress, NAME_BYTES_MAX, ip_bytes, network, optional_ip,
};
use crate::wire::schema;

/// Most bytes of all labels of a pod.
pub const LABELS_BYTES_MAX: usize = 64 << 10; // 64 KiB
/// Most entries of each list, and the longest text in one, in bytes.
pub const LIST_MAX: usize = 256;
/// The longest text.
pub const TEXT_BYTES_MAX: usize = 512;

/// A pod, as the source's podman has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodmanPodDescription {
    /// As podman calls it.
    pub name: ContainerId,
    /// Its id at the source.
    pub id: ContainerId,
    /// That of its infra container.
    pub infra_id: ContainerId,
    /// What that is called.
    pub infra_name: ContainerId,
    /// Its host name.
    pub hostname: String,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
    /// Namespaces that its containers share, as `--share` has them: `net`, `ipc`, `uts`.
    pub shared: Vec<String>,
    /// When its containers are started again, as `--restart` has it; empty for never.
    pub restart: String,
    /// What becomes of it when they have ended, as `--exit-policy` has it.
    pub exit_policy: String,
    /// What it has of a network; none if it has only its loopback.
    pub network: Option<PodmanNetwork>,
    /// Lines of its hosts file, as `--add-host` has them.
    pub hosts: Vec<String>,
    /// Whether podman leaves its hosts file alone.
    pub no_hosts: bool,
    /// Its name servers, as `--dns` has them.
    pub dns_servers: Vec<String>,
    /// Domains it looks in, as `--dns-search` has them.
    pub dns_searches: Vec<String>,
    /// Options of its resolver, as `--dns-option` has them.
    pub dns_options: Vec<String>,
    /// Size of its `/dev/shm`, in bytes; 0 if it is not said.
    pub shm_bytes: u64,
}

/// What a pod has of a network of podman's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodmanNetwork {
    /// The network, which is to be there at the target.
    pub name: String,
    /// The link in the pod.
    pub interface: String,
    /// The link's hardware address.
    pub mac: [u8; 6],
    /// Its addresses.
    pub addresses: Vec<PodmanAddress>,
    /// Ports of the node that are forwarded to it.
    pub published: Vec<PublishedPort>,
    /// Whether its bridge has a port that leads out of the source.
    pub leads_out: bool,
}

/// An address that podman has given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodmanAddress {
    /// The address, and the length of its subnet's prefix.
    pub address: LinkAddress,
    /// The subnet's gateway.
    pub gateway: Option<IpAddr>,
}

/// Ports of the node that are forwarded to the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedPort {
    /// The node's address; empty for all.
    pub host_ip: String,
    /// The first port of the node.
    pub host_port: u16,
    /// The first port of the pod.
    pub container_port: u16,
    /// How many ports; 0 and 1 are one.
    pub range: u16,
    /// `tcp`, `udp` or `sctp`; empty for `tcp`.
    pub protocol: String,
}

impl From<&PodmanPodDescription> for schema::PodmanPod {
    fn from(pod: &PodmanPodDescription) -> Self {
        Self {
            name: pod.name.to_string(),
            id: pod.id.to_string(),
            infra_id: pod.infra_id.to_string(),
            infra_name: pod.infra_name.to_string(),
            hostname: pod.hostname.clone(),
            labels: pod.labels.clone().into_iter().collect(),
            shared: pod.shared.clone(),
            restart: pod.restart.clone(),
            exit_policy: pod.exit_policy.clone(),
            network: pod.network.as_ref().map(Into::into),
            hosts: pod.hosts.clone(),
            no_hosts: pod.no_hosts,
            dns_servers: pod.dns_servers.clone(),
            dns_searches: pod.dns_searches.clone(),
            dns_options: pod.dns_options.clone(),
            shm_bytes: pod.shm_bytes,
        }
    }
}

impl From<&PodmanNetwork> for schema::PodmanNetwork {
    fn from(network: &PodmanNetwork) -> Self {
        let address = |given: &PodmanAddress| schema::PodmanAddress {
            ip: ip_bytes(given.address.ip),
            prefix: given.address.prefix.into(),
            gateway: given.gateway.map(ip_bytes).unwrap_or_default(),
        };
        let published = |port: &PublishedPort| schema::PublishedPort {
            host_ip: port.host_ip.clone(),
            host_port: port.host_port.into(),
            container_port: port.container_port.into(),
            range: port.range.into(),
            protocol: port.protocol.clone(),
        };
        Self {
            name: network.name.clone(),
            interface: network.interface.clone(),
            mac: network.mac.to_vec(),
            addresses: network.addresses.iter().map(address).collect(),
            published: network.published.iter().map(published).collect(),
            leads_out: network.leads_out,
        }
    }
}

impl TryFrom<schema::PodmanPod> for PodmanPodDescription {
    type Error = ControlError;

    fn try_from(wire: schema::PodmanPod) -> Result<Self, ControlError> {
        let id = |field: &'static str, text: String| -> Result<ContainerId, ControlError> {
            text.parse().map_err(|_| missing(field))
        };
        short("podman_pod.hostname", wire.hostname.len(), NAME_BYTES_MAX)?;
        let labels = wire.labels.iter();
        let labels = labels.map(|(key, value)| key.len() + value.len()).sum();
        short("podman_pod.labels", labels, LABELS_BYTES_MAX)?;
        for list in [
            &wire.shared,
            &wire.hosts,
            &wire.dns_servers,
            &wire.dns_searches,
            &wire.dns_options,
        ] {
            short("podman_pod list", list.len(), LIST_MAX)?;
            list.iter().try_for_each(|text| word(text))?;
        }
        [&wire.restart, &wire.exit_policy]
            .into_iter()
            .try_for_each(|text| word(text))?;
        Ok(Self {
            name: id("podman_pod.name", wire.name)?,
            id: id("podman_pod.id", wire.id)?,
            infra_id: id("podman_pod.infra_id", wire.infra_id)?,
            infra_name: id("podman_pod.infra_name", wire.infra_name)?,
            hostname: wire.hostname,
            labels: wire.labels.into_iter().collect(),
            shared: wire.shared,
            restart: wire.restart,
            exit_policy: wire.exit_policy,
            network: wire.network.map(TryInto::try_into).transpose()?,
            hosts: wire.hosts,
            no_hosts: wire.no_hosts,
            dns_servers: wire.dns_servers,
            dns_searches: wire.dns_searches,
            dns_options: wire.dns_options,
            shm_bytes: wire.shm_bytes,
        })
    }
}

impl TryFrom<schema::PodmanNetwork> for PodmanNetwork {
    type Error = ControlError;

    fn try_from(wire: schema::PodmanNetwork) -> Result<Self, ControlError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let is_named = |text: &str| {
            text.starts_with(|first: char| first.is_ascii_alphanumeric()) && text.bytes().all(plain)
        };
        if !is_named(&wire.name) || !is_named(&wire.interface) {
            return Err(missing("podman_pod.network.name"));
        }
        short("podman_pod.network.name", wire.name.len(), TEXT_BYTES_MAX)?;
        let interface = "podman_pod.network.interface";
        short(interface, wire.interface.len(), LINK_NAME_BYTES_MAX)?;
        short(
            "podman_pod.network.addresses",
            wire.addresses.len(),
            ADDRESSES_MAX,
        )?;
        short(
            "podman_pod.network.published",
            wire.published.len(),
            LIST_MAX,
        )?;
        let length = i64::try_from(wire.mac.len()).unwrap_or(i64::MAX);
        let mac = wire.mac.try_into().map_err(|_| ControlError::Invalid {
            field: "podman_pod.network.mac",
            value: length,
        })?;
        let addresses = wire.addresses.iter().map(address);
        let published = wire.published.into_iter().map(published);
        Ok(Self {
            name: wire.name,
            interface: wire.interface,
            mac,
            addresses: addresses.collect::<Result<_, _>>()?,
            published: published.collect::<Result<_, _>>()?,
            leads_out: wire.leads_out,
        })
    }
}

fn address(wire: &schema::PodmanAddress) -> Result<PodmanAddress, ControlError> {
    let field = "podman_pod.network.addresses";
    Ok(PodmanAddress {
        address: network(field, &wire.ip, wire.prefix)?,
        gateway: optional_ip(field, &wire.gateway)?,
    })
}

fn published(wire: schema::PublishedPort) -> Result<PublishedPort, ControlError> {
    let port = |number: u32| {
        u16::try_from(number).map_err(|_| ControlError::Invalid {
            field: "podman_pod.network.published",
            value: number.into(),
        })
    };
    word(&wire.host_ip)?;
    word(&wire.protocol)?;
    Ok(PublishedPort {
        host_ip: wire.host_ip,
        host_port: port(wire.host_port)?,
        container_port: port(wire.container_port)?,
        range: port(wire.range)?,
        protocol: wire.protocol,
    })
}

/// A word of podman's command line, which is to be no option of it.
fn word(text: &str) -> Result<(), ControlError> {
    short("podman_pod text", text.len(), TEXT_BYTES_MAX)?;
    match text.starts_with('-') || text.contains(['\0', '\n']) {
        true => Err(missing("podman_pod text")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> schema::PodmanPod {
        schema::PodmanPod {
            name: "shop".to_owned(),
            id: "0a".to_owned(),
            infra_id: "0b".to_owned(),
            infra_name: "0a-infra".to_owned(),
            hostname: "shop".to_owned(),
            labels: [("app".to_owned(), "shop".to_owned())].into(),
            shared: ["net", "ipc", "uts"].map(str::to_owned).to_vec(),
            restart: "always".to_owned(),
            exit_policy: "continue".to_owned(),
            network: Some(schema::PodmanNetwork {
                name: "podman".to_owned(),
                interface: "eth0".to_owned(),
                mac: vec![2, 0, 0, 0, 0, 1],
                addresses: vec![schema::PodmanAddress {
                    ip: vec![10, 88, 0, 2],
                    prefix: 16,
                    gateway: vec![10, 88, 0, 1],
                }],
                published: vec![schema::PublishedPort {
                    host_port: 8080,
                    container_port: 80,
                    range: 1,
                    protocol: "tcp".to_owned(),
                    ..schema::PublishedPort::default()
                }],
                leads_out: true,
            }),
            ..schema::PodmanPod::default()
        }
    }

    // clause: M-5
    #[test]
    fn a_pod_is_read_as_it_was_written_and_is_no_option_of_podmans() {
        let pod = PodmanPodDescription::try_from(wire()).unwrap();
        assert_eq!(
            PodmanPodDescription::try_from(schema::PodmanPod::from(&pod)),
            Ok(pod)
        );
        let read = |change: fn(&mut schema::PodmanPod)| {
            let mut wire = wire();
            change(&mut wire);
            PodmanPodDescription::try_from(wire)
        };
        read(|pod| pod.network = None).unwrap();
        read(|pod| pod.name = "--all".to_owned()).unwrap_err();
        read(|pod| pod.hosts = vec!["--privileged".to_owned()]).unwrap_err();
        read(|pod| pod.hosts = vec!["a".repeat(TEXT_BYTES_MAX + 1)]).unwrap_err();
        read(|pod| pod.shared = vec![String::new(); LIST_MAX + 1]).unwrap_err();
        let network = |change: fn(&mut schema::PodmanNetwork)| {
            let mut wire = wire();
            wire.network.iter_mut().for_each(change);
            PodmanPodDescription::try_from(wire)
        };
        network(|network| network.name = "-a".to_owned()).unwrap_err();
        network(|network| network.mac.truncate(5)).unwrap_err();
        network(|network| network.published[0].host_port = 1 << 16).unwrap_err();
        network(|network| network.addresses[0].prefix = 33).unwrap_err();
        network(|network| network.addresses[0].gateway = vec![1]).unwrap_err();
    }
}
