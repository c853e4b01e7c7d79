//! Reading a workload's network as a description that the target can build again.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use futures_util::TryStreamExt;
use pageferry_proto::wire::description::{LinkAddress, LinkDescription, RouteDescription};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::LinkError;
use super::netlink::{Netlink, failed};
use super::port::Port;

/// A network as found at the source: what the target must build, and the ports to close here.
#[derive(Debug)]
pub struct Network {
    /// Every link but the loopback.
    pub links: Vec<LinkDescription>,
    /// Every route of the main table that no address brings by itself.
    pub routes: Vec<RouteDescription>,
    /// This node's ends of the links, in the order of `links`.
    pub ports: Vec<Port>,
}

/// Reads the network namespace `net`, whose links must be veths into a bridge of this node.
pub async fn describe(net: &impl AsFd) -> Result<Network, LinkError> {
    read(net.as_fd(), None).await
}

/// The same of one whose links must be veths of which this node's ends are attached to nothing, and
/// are to become ports of `bridge`.
pub(super) async fn describe_loose(net: &impl AsFd, bridge: &str) -> Result<Network, LinkError> {
    read(net.as_fd(), Some(bridge)).await
}

async fn read(net: BorrowedFd<'_>, loose: Option<&str>) -> Result<Network, LinkError> {
    let inside = Netlink::open(Some(net))?;
    let node = Netlink::open(None)?;
    let found: Vec<LinkMessage> = inside
        .handle()
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("listing links of", "the workload"))?;
    let mut network = Network {
        links: Vec::new(),
        routes: Vec::new(),
        ports: Vec::new(),
    };
    let mut names = Vec::new();
    for message in found {
        if message.header.flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let mut link = link(&message)?;
        let port = match loose {
            Some(bridge) => Port::loose(&node, &link.name, &message, bridge).await?,
            None => Port::behind(&node, &link.name, &message).await?,
        };
        link.bridge = Some(port.bridge().to_owned());
        names.push((message.header.index, link.name.clone()));
        network.links.push(link);
        network.ports.push(port);
    }
    addresses(&inside, &names, &mut network.links).await?;
    for version in [IpVersion::V4, IpVersion::V6] {
        routes(&inside, version, &names, &mut network.routes).await?;
    }
    Ok(network)
}

fn link(message: &LinkMessage) -> Result<LinkDescription, LinkError> {
    let mut link = LinkDescription {
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        addresses: Vec::new(),
        bridge: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().map_err(|_| {
                    LinkError::Unfit(format!("link {} is not an Ethernet link", link.name))
                })?;
            }
            _ => {}
        }
    }
    Ok(link)
}

async fn addresses(
    inside: &Netlink,
    names: &[(u32, String)],
    links: &mut [LinkDescription],
) -> Result<(), LinkError> {
    let mut stream = inside.handle().address().get().execute();
    while let Some(message) = stream
        .try_next()
        .await
        .map_err(failed("listing addresses of", "the workload"))?
    {
        let Some(position) = names
            .iter()
            .position(|(index, _)| *index == message.header.index)
        else {
            continue;
        };
        // IFA_LOCAL is the own address; on a point-to-point link IFA_ADDRESS is the peer's.
        let own = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            })
            .or_else(|| {
                message
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        AddressAttribute::Address(ip) => Some(*ip),
                        _ => None,
                    })
            });
        if let Some(ip) = own {
            links[position].addresses.push(LinkAddress {
                ip,
                prefix: message.header.prefix_len,
            });
        }
    }
    Ok(())
}

async fn routes(
    inside: &Netlink,
    version: IpVersion,
    names: &[(u32, String)],
    routes: &mut Vec<RouteDescription>,
) -> Result<(), LinkError> {
    let query = match version {
        IpVersion::V4 => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        IpVersion::V6 => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    };
    let mut stream = Box::pin(inside.handle().route().get(query).execute());
    while let Some(message) = stream
        .try_next()
        .await
        .map_err(failed("listing routes of", "the workload"))?
    {
        // The kernel's own routes come back with the addresses.
        if message.header.protocol == RouteProtocol::Kernel
            || message.header.kind != RouteType::Unicast
            || message.header.table != rtnetlink::packet_route::route::RouteHeader::RT_TABLE_MAIN
        {
            continue;
        }
        if let Some(route) = route(&message, names)? {
            routes.push(route);
        }
    }
    Ok(())
}

fn route(
    message: &RouteMessage,
    names: &[(u32, String)],
) -> Result<Option<RouteDescription>, LinkError> {
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return Ok(None),
    };
    let mut route = RouteDescription {
        destination: LinkAddress {
            ip: unspecified,
            prefix: message.header.destination_prefix_length,
        },
        gateway: None,
        device: String::new(),
        metric: 0,
        source: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => route.destination.ip = ip(to).unwrap_or(unspecified),
            RouteAttribute::Gateway(via) => route.gateway = ip(via),
            RouteAttribute::PrefSource(from) => route.source = ip(from),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => {
                let Some((_, name)) = names.iter().find(|(link, _)| link == index) else {
                    return Ok(None);
                };
                route.device.clone_from(name);
            }
            RouteAttribute::MultiPath(_) => {
                return Err(LinkError::Unfit(format!(
                    "route to {} has several next hops, which are not carried over",
                    route.destination.ip
                )));
            }
            _ => {}
        }
    }
    Ok((!route.device.is_empty()).then_some(route))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
