//! Routes of this node to addresses that a pod keeps when it moves.
//!
//! Each node has a network of its own for its pods, on a bridge: an address that has moved is not
//! where it seems to be. So the node that the pod has come to leads to it over its bridge, and the
//! one that it has left over the other node. Each of them answers on its bridge for what is not
//! there (`proxy_arp`), since pods take what is in their network for their neighbour.
//!
//! Invariants: each route has [`PROTOCOL`], and no route of another one is deleted. What was led
//! here goes when the workload does not come; whoever knows that nobody has a use for another ends
//! it: an address may be given to another pod one day, which must be found.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;

use futures_util::TryStreamExt;
use pageferry_proto::wire::description::{LinkAddress, LinkDescription};
use pageferry_sys::namespace::{self, NamespaceKind};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};

use super::LinkError;
use super::announce::announce;
use super::describe::Network;
use super::netlink::{Netlink, failed};
use super::port::{Port, index_of, is_one_of, mac_of, unless};

/// By which the kernel knows routes of ours: of the numbers that nobody has registered.
pub const PROTOCOL: RouteProtocol = RouteProtocol::Other(0x70);

/// The addresses of `links` are behind `ports`, one of each.
pub async fn lead_here(links: &[LinkDescription], ports: &[Port]) -> Result<(), LinkError> {
    let node = Netlink::open(None)?;
    for (link, port) in links.iter().zip(ports) {
        answer_on(port.bridge());
        let bridge = index_of(&node, port.bridge()).await?;
        for address in kept(link) {
            lead(&node, address, |route| Ok(route.output_interface(bridge))).await?;
        }
    }
    Ok(())
}

/// Whether addresses can be led to over `ports`.
pub async fn check(ports: &[Port]) -> Result<(), LinkError> {
    let node = Netlink::open(None)?;
    for port in ports {
        index_of(&node, port.bridge()).await?;
    }
    Ok(())
}

/// The addresses of `links` are not behind `ports` any more. Where they were led elsewhere before,
/// and not here since, they are still.
pub async fn lead_here_no_more(links: &[LinkDescription], ports: &[Port]) -> Result<(), LinkError> {
    let node = Netlink::open(None)?;
    for (link, port) in links.iter().zip(ports) {
        let bridge = match index_of(&node, port.bridge()).await {
            Ok(bridge) => bridge,
            // Its routes went with it.
            Err(LinkError::Netlink { source, .. }) if is_one_of(&source, &[libc::ENODEV]) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        for address in kept(link) {
            let (route, text) = to(address)?;
            delete(&node, route.output_interface(bridge).build(), text).await?;
        }
    }
    Ok(())
}

/// An address of a pod that others know it by, and that cannot be kept: nodes answer with ARP for
/// what has moved, and not yet in the way of IPv6.
pub fn unled(links: &[LinkDescription]) -> Option<IpAddr> {
    links.iter().flat_map(kept).find(IpAddr::is_ipv6)
}

/// A way to one address of version 4 that this node has of us.
#[derive(Clone, Debug)]
pub struct Led {
    /// Where it leads.
    pub address: Ipv4Addr,
    route: RouteMessage,
}

impl Led {
    /// There is no such way any more, unless it is another one by now.
    pub async fn end(self) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        delete(&node, self.route, format!("{}/32", self.address)).await
    }
}

/// All ways of ours.
pub async fn led() -> Result<Vec<Led>, LinkError> {
    let node = Netlink::open(None)?;
    let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let listing = node.handle().route().get(query).execute();
    let all: Vec<RouteMessage> = listing
        .try_collect()
        .await
        .map_err(failed("listing routes of", "this node"))?;
    let all = all.into_iter().filter_map(|route| {
        let address = led_to(&route)?;
        Some(Led { address, route })
    });
    Ok(all.collect())
}

/// The address that a route of ours leads to.
fn led_to(route: &RouteMessage) -> Option<Ipv4Addr> {
    let header = &route.header;
    let ours = header.protocol == PROTOCOL
        && header.kind == RouteType::Unicast
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.destination_prefix_length == 32;
    let mut attributes = route.attributes.iter().filter(|_| ours);
    attributes.find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })
}

async fn delete(node: &Netlink, route: RouteMessage, text: String) -> Result<(), LinkError> {
    let deleted = node.handle().route().del(route).execute().await;
    unless(&[libc::ESRCH], deleted).map_err(failed("leading no more to", text))
}

/// The addresses of `network`, which is here yet, are behind the node `peer` from now on.
pub async fn lead_away(network: &Network, peer: IpAddr) -> Result<(), LinkError> {
    let node = Netlink::open(None)?;
    for (link, port) in network.links.iter().zip(&network.ports) {
        answer_on(port.bridge());
        let all = kept(link).filter(|address| address.is_ipv4() == peer.is_ipv4());
        let addresses: Vec<IpAddr> = all.collect();
        for address in &addresses {
            lead(&node, *address, |route| {
                let led = route.gateway(peer);
                led.map_err(|error| LinkError::Unfit(format!("a route over {peer}: {error}")))
            })
            .await?;
        }
        answer_for(&node, port.bridge(), &addresses).await?;
    }
    Ok(())
}

/// Tells the neighbours on a bridge that this node answers for addresses.
async fn answer_for(node: &Netlink, bridge: &str, addresses: &[IpAddr]) -> Result<(), LinkError> {
    let io = |source| LinkError::Io {
        action: "opening the node's own network",
        source,
    };
    // That of this thread, as netlink's.
    let own = namespace::open(nix::unistd::gettid().as_raw(), NamespaceKind::Net);
    let own = own.map_err(io)?;
    let link = LinkDescription {
        name: bridge.to_owned(),
        mac: mac_of(node, bridge).await?,
        mtu: 0,
        addresses: addresses
            .iter()
            .map(|ip| LinkAddress { ip: *ip, prefix: 0 })
            .collect(),
        bridge: None,
    };
    announce(own.as_fd(), &[link])
}

/// Addresses that others know it by.
fn kept(link: &LinkDescription) -> impl Iterator<Item = IpAddr> {
    let all = link.addresses.iter().map(|address| address.ip);
    all.filter(|ip| match ip {
        IpAddr::V4(ip) => !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    })
}

type Builder = RouteMessageBuilder<IpAddr>;

async fn lead(
    node: &Netlink,
    address: IpAddr,
    how: impl FnOnce(Builder) -> Result<Builder, LinkError>,
) -> Result<(), LinkError> {
    let (route, text) = to(address)?;
    let replaced = node.handle().route().add(how(route)?.build()).replace();
    let done = replaced.execute().await;
    done.map_err(failed("leading to", text))
}

/// A route of ours to an address, and what it leads to.
fn to(address: IpAddr) -> Result<(Builder, String), LinkError> {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let text = format!("{address}/{bits}");
    match Builder::new().destination_prefix(address, bits) {
        Ok(route) => Ok((route.protocol(PROTOCOL), text)),
        Err(error) => Err(LinkError::Unfit(format!("{text}: {error}"))),
    }
}

/// Has the node answer on a bridge for addresses that are not there. Where that cannot be said,
/// neighbours that believe an address to be theirs do not find it.
fn answer_on(bridge: &str) {
    let tunables = [
        (format!("/proc/sys/net/ipv4/conf/{bridge}/proxy_arp"), "1"),
        // Others wait for up to 0.8 s, in case somebody else answers.
        (
            format!("/proc/sys/net/ipv4/neigh/{bridge}/proxy_delay"),
            "0",
        ),
    ];
    for (path, value) in tunables {
        if let Err(error) = fs::write(&path, value) {
            tracing::warn!(%error, "{path}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_ipv6_is_not_led_to_unless_it_is_the_links_own() {
        let link = |ips: &[&str]| LinkDescription {
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: ips
                .iter()
                .map(|ip| LinkAddress {
                    ip: ip.parse().unwrap(),
                    prefix: 64,
                })
                .collect(),
            bridge: None,
        };
        assert_eq!(unled(&[link(&["10.0.0.1", "fe80::1"])]), None);
        let found = unled(&[link(&["10.0.0.1"]), link(&["fe80::1", "fd00::2"])]);
        assert_eq!(found, Some("fd00::2".parse().unwrap()));
    }
}
