//! Routes of this node to addresses that a pod keeps when it moves.
//!
//! Each node has a network of its own for its pods, on a bridge: an address that has moved is not
//! where it seems to be. So the node that the pod has come to leads to it over its bridge, and the
//! one that it has left over the other node. Each of them answers on its bridge for what is not
//! there (`proxy_arp`), since pods take what is in their network for their neighbour.

use std::fs;
use std::net::IpAddr;
use std::os::fd::AsFd;

use pageferry_proto::wire::description::{LinkAddress, LinkDescription};
use pageferry_sys::namespace::{self, NamespaceKind};
use rtnetlink::RouteMessageBuilder;

use super::LinkError;
use super::announce::announce;
use super::describe::Network;
use super::netlink::{Netlink, failed};
use super::port::{Port, index_of, mac_of};

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

/// An address of a pod that others know it by, and that cannot be kept: nodes answer with ARP for
/// what has moved, and not yet in the way of IPv6.
pub fn unled(links: &[LinkDescription]) -> Option<IpAddr> {
    links.iter().flat_map(kept).find(IpAddr::is_ipv6)
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
    let own = namespace::open(std::process::id().cast_signed(), NamespaceKind::Net);
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
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let route = Builder::new().destination_prefix(address, bits);
    let route = route.map_err(|error| LinkError::Unfit(format!("{address}/{bits}: {error}")))?;
    let replaced = node.handle().route().add(how(route)?.build()).replace();
    let done = replaced.execute().await;
    done.map_err(failed("leading to", format!("{address}/{bits}")))
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
