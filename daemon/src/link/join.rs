//! Joining a network that somebody else has made for a workload, unattached.
//!
//! It is compared with the one the workload has, and nothing of it is changed before the hand-off:
//! this node's ends of its links must be attached to nothing, as they would be had we made them.
//! Then they become ports of the node's bridge. Whoever made it takes it away again.

use std::net::IpAddr;
use std::os::fd::AsFd;

use futures_util::TryStreamExt;
use pageferry_proto::wire::description::{LinkDescription, RouteDescription};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};

use super::describe::{Network, describe, describe_loose};
use super::netlink::{Netlink, failed};
use super::port::{Port, check_bridge, index_of};
use super::{LinkError, announce, route};

/// A network that somebody else has made, and that waits for its workload.
#[derive(Debug, Clone)]
pub struct JoinedNetwork {
    ports: Vec<Port>,
    /// As they are here: another MAC is no reason not to move.
    links: Vec<LinkDescription>,
}

impl JoinedNetwork {
    /// Compares what is inside the network namespace `net` with `links` and `routes`. Its links are
    /// to become ports of `bridge`.
    pub async fn compare(
        net: &impl AsFd,
        links: &[LinkDescription],
        routes: &[RouteDescription],
        bridge: &str,
    ) -> Result<Self, LinkError> {
        if !links.is_empty() {
            index_of(&Netlink::open(None)?, bridge).await?;
        }
        let found = describe_loose(net, bridge).await?;
        for link in links {
            check_link(link, &found)?;
        }
        let known = |link: &LinkDescription| links.iter().any(|wanted| wanted.name == link.name);
        if let Some(more) = found.links.iter().find(|link| !known(link)) {
            return Err(differs(format!("has a link {} more", more.name)));
        }
        for route in routes {
            check_route(route, &found)?;
        }
        let addresses = links.iter().flat_map(|link| &link.addresses);
        // Nobody on such a network could have one of the kernel's own making.
        let wanted = addresses.map(|address| address.ip);
        let wanted: Vec<IpAddr> = wanted.filter(|ip| !is_made_by_kernel(*ip)).collect();
        check_usable(&Netlink::open(Some(net.as_fd()))?, &wanted).await?;
        Ok(Self {
            ports: found.ports,
            links: found.links,
        })
    }

    /// The network of a pod's sandbox, whose links are attached already: their other ends are
    /// detached, until it is known that the workload runs there. Each of `links` has one by its
    /// name with the same addresses; how large their networks are may differ, and so may routes.
    pub async fn in_sandbox(net: &impl AsFd, links: &[LinkDescription]) -> Result<Self, LinkError> {
        let found = describe(net).await?;
        for wanted in links {
            let name = &wanted.name;
            let link = found.links.iter().find(|link| link.name == *name);
            let link = link.ok_or_else(|| differs(format!("has no link {name}")))?;
            let has = |ip: IpAddr| link.addresses.iter().any(|address| address.ip == ip);
            let ips = wanted.addresses.iter().map(|address| address.ip);
            let mut kept = ips.filter(|ip| !is_made_by_kernel(*ip));
            if let Some(ip) = kept.find(|ip| !has(*ip)) {
                return Err(differs(format!(
                    "has no address {ip} on link {name}: connections to it could not go on. Have \
                     the pod there keep it (pageferry.dev/keep-address)"
                )));
            }
            if link.mtu < wanted.mtu {
                return Err(differs(format!(
                    "has an MTU of {} on link {name}, less than {}",
                    link.mtu, wanted.mtu
                )));
            }
        }
        let joined = Self {
            ports: found.ports,
            links: found.links,
        };
        // It must not be found out only when nothing of it may fail any more.
        route::check(&joined.ports).await?;
        joined.detach().await?;
        Ok(joined)
    }

    /// What was compared before, known from a journal.
    pub const fn recovered(ports: Vec<Port>, links: Vec<LinkDescription>) -> Self {
        Self { ports, links }
    }

    /// Its links.
    pub fn links(&self) -> &[LinkDescription] {
        &self.links
    }

    /// This node's ends of them.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Whether the bridges that the links are for are there.
    pub async fn check_bridges(&self) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        for port in &self.ports {
            check_bridge(&node, port.bridge()).await?;
        }
        Ok(())
    }

    /// Attaches the links to their bridge and announces their addresses from inside `net`.
    ///
    /// Call it only when `Running` is durable. Doing it twice does no harm.
    pub async fn attach(&self, net: &impl AsFd) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        for port in &self.ports {
            let bridge = index_of(&node, port.bridge()).await?;
            port.attach(&node, bridge).await?;
        }
        self.announce(net)
    }

    /// Takes the links off the bridge again; from the kernel's answer on, no frame passes.
    pub async fn detach(&self) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        for port in &self.ports {
            port.detach(&node).await?;
        }
        Ok(())
    }

    /// Announces the addresses once more, for switches that lost the first frame.
    pub fn announce(&self, net: &impl AsFd) -> Result<(), LinkError> {
        announce::announce(net.as_fd(), &self.links)
    }
}

/// A link by the same name must have at least the same addresses, and take packets as large.
fn check_link(wanted: &LinkDescription, found: &Network) -> Result<(), LinkError> {
    let name = &wanted.name;
    let link = found.links.iter().find(|link| link.name == *name);
    let link = link.ok_or_else(|| differs(format!("has no link {name}")))?;
    if let Some(address) = wanted
        .addresses
        .iter()
        .find(|address| !link.addresses.contains(address) && !is_made_by_kernel(address.ip))
    {
        return Err(differs(format!(
            "has no address {}/{} on link {name}",
            address.ip, address.prefix
        )));
    }
    if link.mtu < wanted.mtu {
        return Err(differs(format!(
            "has an MTU of {} on link {name}, less than {}",
            link.mtu, wanted.mtu
        )));
    }
    Ok(())
}

/// Such an address comes from the MAC, which may be another one.
fn is_made_by_kernel(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Which of several equal routes is taken may be different.
fn check_route(wanted: &RouteDescription, found: &Network) -> Result<(), LinkError> {
    let same = |route: &RouteDescription| {
        RouteDescription {
            metric: wanted.metric,
            ..route.clone()
        } == *wanted
    };
    if found.routes.iter().any(same) {
        return Ok(());
    }
    let (to, device) = (&wanted.destination, &wanted.device);
    Err(differs(match wanted.gateway {
        Some(gateway) => format!(
            "has no route to {}/{} by {gateway} and {device}",
            to.ip, to.prefix
        ),
        None => format!("has no route to {}/{} by {device}", to.ip, to.prefix),
    }))
}

/// Sockets are restored at addresses, so these must be in use.
async fn check_usable(inside: &Netlink, wanted: &[IpAddr]) -> Result<(), LinkError> {
    let mut links = inside.handle().link().get().execute();
    let listing = "listing links of";
    while let Some(message) = links
        .try_next()
        .await
        .map_err(failed(listing, "the network"))?
    {
        let flags = message.header.flags;
        if !flags.contains(LinkFlags::Up | LinkFlags::Running) {
            let named = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.as_str()),
                    _ => None,
                });
            let name = named.unwrap_or("without a name");
            return Err(unfit(format!(
                "link {name} of the network is down, or its other end is"
            )));
        }
    }
    let mut addresses = inside.handle().address().get().execute();
    let listing = "listing addresses of";
    while let Some(message) = addresses
        .try_next()
        .await
        .map_err(failed(listing, "the network"))?
    {
        let unsure = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
        if !message.header.flags.intersects(unsure) {
            continue;
        }
        let found = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
        if let Some(ip) = found.filter(|ip| wanted.contains(ip)) {
            let why = "of the network is being checked for another owner, or has one";
            return Err(unfit(format!("address {ip} {why}")));
        }
    }
    Ok(())
}

fn differs(what: impl std::fmt::Display) -> LinkError {
    unfit(format!("the network that the workload is to join {what}"))
}

fn unfit(text: String) -> LinkError {
    LinkError::Unfit(text)
}
