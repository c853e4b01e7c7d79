//! Building the workload's network at the target, unattached.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use pageferry_proto::wire::description::{LinkDescription, RouteDescription};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netlink::{Netlink, failed};
use super::port::{NO_BRIDGE, check_bridge, enslave, index_of};
use super::{LinkError, announce};

/// How many links a workload may have.
pub const LINKS_MAX: usize = 16;

/// A network that waits for its workload: complete inside, attached to nothing outside.
///
/// The links vanish with the namespace, that is with the last of its descriptors and processes.
#[derive(Debug, Clone)]
pub struct PreparedNetwork {
    /// This node's ends, by name, in the order of the description.
    node_ends: Vec<String>,
    /// The bridge they will be ports of.
    bridge: String,
    links: Vec<LinkDescription>,
}

impl PreparedNetwork {
    /// Builds `links` and `routes` inside the network namespace `net`.
    ///
    /// `prefix` makes the names of this node's ends unique; with an index behind it a name has at
    /// most 15 characters.
    pub async fn build(
        net: &impl AsFd,
        links: &[LinkDescription],
        routes: &[RouteDescription],
        bridge: &str,
        prefix: &str,
    ) -> Result<Self, LinkError> {
        if links.len() > LINKS_MAX {
            return Err(LinkError::Unfit(format!(
                "the workload has {} links, more than {LINKS_MAX}",
                links.len()
            )));
        }
        let node = Netlink::open(None)?;
        let inside = Netlink::open(Some(net.as_fd()))?;
        // Asked for now, so that a missing bridge refuses the workload before anything moves.
        if !links.is_empty() {
            index_of(&node, bridge).await?;
        }
        let mut node_ends = Vec::with_capacity(links.len());
        for (number, link) in links.iter().enumerate() {
            let node_end = format!("{prefix}{number}");
            pair(&node, net.as_fd(), link, &node_end).await?;
            node_ends.push(node_end);
        }
        up(&inside, "lo").await?;
        for (link, node_end) in links.iter().zip(&node_ends) {
            for address in &link.addresses {
                add_address(&inside, link, address.ip, address.prefix).await?;
            }
            up(&inside, &link.name).await?;
            up(&node, node_end).await?;
        }
        // A route through a gateway needs the route to the gateway first.
        let (direct, through): (Vec<_>, Vec<_>) =
            routes.iter().partition(|route| route.gateway.is_none());
        for route in direct.into_iter().chain(through) {
            add_route(&inside, route).await?;
        }
        Ok(Self {
            node_ends,
            bridge: bridge.to_owned(),
            links: links.to_vec(),
        })
    }

    /// What [`PreparedNetwork::build`] made, known from a journal.
    pub fn recovered(links: &[LinkDescription], bridge: &str, prefix: &str) -> Self {
        let node_ends = (0..links.len())
            .map(|number| format!("{prefix}{number}"))
            .collect();
        Self {
            node_ends,
            bridge: bridge.to_owned(),
            links: links.to_vec(),
        }
    }

    /// The bridge that its links will be ports of.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Its links.
    pub fn links(&self) -> &[LinkDescription] {
        &self.links
    }

    /// The numbers of this node's ends, in the order of the links.
    pub async fn ends(&self) -> Result<Vec<u32>, LinkError> {
        let node = Netlink::open(None)?;
        let mut ends = Vec::with_capacity(self.node_ends.len());
        for name in &self.node_ends {
            ends.push(index_of(&node, name).await?);
        }
        Ok(ends)
    }

    /// Whether the bridge that the links are for is there.
    pub async fn check_bridge(&self) -> Result<(), LinkError> {
        match self.links.is_empty() {
            true => Ok(()),
            false => check_bridge(&Netlink::open(None)?, &self.bridge).await,
        }
    }

    /// Attaches the links to the bridge and announces their addresses from inside `net`.
    ///
    /// Call it only when `Running` is durable. Doing it twice does no harm.
    pub async fn attach(&self, net: &impl AsFd) -> Result<(), LinkError> {
        if self.links.is_empty() {
            return Ok(());
        }
        let node = Netlink::open(None)?;
        let bridge = index_of(&node, &self.bridge).await?;
        for name in &self.node_ends {
            let index = index_of(&node, name).await?;
            enslave(&node, index, bridge, name).await?;
        }
        announce::announce(net.as_fd(), &self.links)
    }

    /// Takes the links off the bridge again; from the kernel's answer on, no frame passes.
    pub async fn detach(&self) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        for name in &self.node_ends {
            let index = index_of(&node, name).await?;
            enslave(&node, index, NO_BRIDGE, name).await?;
        }
        Ok(())
    }

    /// Announces the addresses once more, for switches that lost the first frame.
    pub fn announce(&self, net: &impl AsFd) -> Result<(), LinkError> {
        announce::announce(net.as_fd(), &self.links)
    }

    /// Deletes the links at once, where the namespace may live a little longer.
    pub async fn delete(&self) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        for name in &self.node_ends {
            if let Ok(index) = index_of(&node, name).await {
                let deleted = node.handle().link().del(index).execute().await;
                deleted.map_err(failed("deleting link", name))?;
            }
        }
        Ok(())
    }
}

async fn pair(
    node: &Netlink,
    net: BorrowedFd<'_>,
    link: &LinkDescription,
    node_end: &str,
) -> Result<(), LinkError> {
    let inside = LinkMessageBuilder::<LinkUnspec>::new()
        .name(link.name.clone())
        .address(link.mac.to_vec())
        .mtu(link.mtu)
        .setns_by_fd(net.as_raw_fd())
        .build();
    let message = LinkVeth::new(node_end, &link.name)
        .mtu(link.mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
        .build();
    node.handle()
        .link()
        .add(message)
        .execute()
        .await
        .map_err(failed(
            "creating link",
            format!("{} ({node_end} at this node)", link.name),
        ))
}

pub(super) async fn up(netlink: &Netlink, name: &str) -> Result<(), LinkError> {
    let index = index_of(netlink, name).await?;
    netlink
        .handle()
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .map_err(failed("bringing up link", name))
}

async fn add_address(
    inside: &Netlink,
    link: &LinkDescription,
    ip: std::net::IpAddr,
    prefix: u8,
) -> Result<(), LinkError> {
    let index = index_of(inside, &link.name).await?;
    let mut request = inside.handle().address().add(index, ip, prefix).replace();
    if ip.is_ipv6() {
        // Duplicate address detection would hold the address back for a second or more, and it
        // is in use at the source on purpose.
        request
            .message_mut()
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    request.execute().await.map_err(failed(
        "adding address",
        format!("{ip}/{prefix} to {}", link.name),
    ))
}

async fn add_route(inside: &Netlink, route: &RouteDescription) -> Result<(), LinkError> {
    let object = format!(
        "{}/{} dev {}",
        route.destination.ip, route.destination.prefix, route.device
    );
    let unfit = |error| LinkError::Unfit(format!("route {object} cannot be built: {error}"));
    let mut builder = RouteMessageBuilder::<std::net::IpAddr>::new()
        .destination_prefix(route.destination.ip, route.destination.prefix)
        .map_err(unfit)?
        .output_interface(index_of(inside, &route.device).await?);
    match route.gateway {
        Some(gateway) => builder = builder.gateway(gateway).map_err(unfit)?,
        None => builder = builder.scope(rtnetlink::packet_route::route::RouteScope::Link),
    }
    // The kernel's default for IPv4 is 0 and cannot be asked for; IPv6 chooses its own.
    if route.metric > 0 {
        builder = builder.priority(route.metric);
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(unfit)?;
    }
    inside
        .handle()
        .route()
        .add(builder.build())
        .replace()
        .execute()
        .await
        .map_err(failed("adding route", object))
}
