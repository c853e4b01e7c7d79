//! This node's end of a workload's link: the veth that is a port of a bridge.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{
    BridgePortState, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkBridgePort, LinkUnspec};

use super::LinkError;
use super::netlink::{Netlink, failed};

/// As a link's controller: none.
pub(super) const NO_BRIDGE: u32 = 0;

/// One bridge port.
///
/// It is known by its index; the kernel never reuses an index while the link lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    index: u32,
    /// The index of the workload's end, in the namespace of that.
    peer: u32,
    name: String,
    bridge: String,
}

impl Port {
    /// Finds this node's end of the workload's link `inside`.
    pub async fn behind(
        node: &Netlink,
        name: &str,
        inside: &LinkMessage,
    ) -> Result<Self, LinkError> {
        let unfit = |why: &str| {
            LinkError::Unfit(format!(
                "link {name} of the workload {why}: only veths whose other \
                 end is a port of this node's bridge can be moved"
            ))
        };
        let message = other_end(node, inside).await?.map_err(unfit)?;
        let controller =
            controller_of(&message).ok_or_else(|| unfit("is not attached to a bridge"))?;
        let bridge = find(node, controller)
            .await?
            .and_then(|message| name_of(&message))
            .ok_or_else(|| unfit("is attached to something unknown"))?;
        Ok(Self {
            index: message.header.index,
            peer: inside.header.index,
            name: name_of(&message).ok_or_else(|| unfit("has a nameless other end"))?,
            bridge,
        })
    }

    /// Finds this node's end of a link `inside` a network that somebody else has made: it is no
    /// port yet, and is to become one of `bridge`.
    pub async fn loose(
        node: &Netlink,
        name: &str,
        inside: &LinkMessage,
        bridge: &str,
    ) -> Result<Self, LinkError> {
        let unfit = |why: &str| {
            LinkError::Unfit(format!(
                "link {name} of the network {why}: only one of veths whose other ends are at the \
                 target, and attached to nothing, can be joined"
            ))
        };
        let message = other_end(node, inside).await?.map_err(unfit)?;
        if controller_of(&message).is_some() {
            return Err(unfit(
                "is attached already, and would answer for the workload",
            ));
        }
        Ok(Self {
            index: message.header.index,
            peer: inside.header.index,
            name: name_of(&message).ok_or_else(|| unfit("has a nameless other end"))?,
            bridge: bridge.to_owned(),
        })
    }

    /// The port of this index and other end, known from a journal; `None` if that link is gone. A
    /// name is nothing to go by: another link may have it by now.
    pub async fn again(
        node: &Netlink,
        (index, peer): (u32, u32),
        bridge: &str,
    ) -> Result<Option<Self>, LinkError> {
        let Some(message) = find(node, index).await? else {
            return Ok(None);
        };
        let back = LinkAttribute::Link(peer);
        let name = name_of(&message).filter(|_| is_veth(&message));
        let ours = name.filter(|_| message.attributes.contains(&back));
        Ok(ours.map(|name| Self {
            index,
            peer,
            name,
            bridge: bridge.to_owned(),
        }))
    }

    /// The indices of this node's end and of the workload's, each in its own namespace.
    pub const fn ends(&self) -> (u32, u32) {
        (self.index, self.peer)
    }

    /// The bridge it is a port of.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Its name at this node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Closes the port: from the kernel's answer on, no frame passes in either direction.
    ///
    /// `LISTENING`, because without STP it is the only closed state that stays: each change makes
    /// the bridge select states anew, which turns `BLOCKING` into `FORWARDING`
    /// (`br_port_state_selection`), and each event of the link turns a `DISABLED` port on again
    /// (`br_port_carrier_check`). In all three no frame is received or sent. A link that is gone
    /// lets none pass either.
    pub async fn close(&self, node: &Netlink) -> Result<(), LinkError> {
        let closed = self.set_state(node, BridgePortState::Listening).await;
        unless(&[libc::ENODEV], closed).map_err(failed("closing port", &self.name))
    }

    /// As [`Self::close`], for whoever deletes the link: one that is no port of a bridge any more
    /// lets none pass either.
    pub async fn shut(&self, node: &Netlink) -> Result<(), LinkError> {
        let closed = self.set_state(node, BridgePortState::Listening).await;
        match closed {
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::EOPNOTSUPP => {
                let down = LinkUnspec::new_with_index(self.index).down();
                let down = node.handle().link().set(down.build()).execute().await;
                unless(&[libc::ENODEV], down).map_err(failed("taking down link", &self.name))
            }
            closed => unless(&[libc::ENODEV], closed).map_err(failed("closing port", &self.name)),
        }
    }

    /// Lets frames pass again. A link that is gone, or is no port of a bridge any more, has nothing
    /// that could be opened.
    pub async fn open(&self, node: &Netlink) -> Result<(), LinkError> {
        let opened = self.set_state(node, BridgePortState::Forwarding).await;
        unless(&[libc::ENODEV, libc::EOPNOTSUPP], opened)
            .map_err(failed("opening port", &self.name))
    }

    /// Makes the link a port of its bridge, which has the index `bridge`; it forwards at once.
    pub async fn attach(&self, node: &Netlink, bridge: u32) -> Result<(), LinkError> {
        enslave(node, self.index, bridge, &self.name).await
    }

    /// Takes it off its bridge; from the kernel's answer on, no frame passes. A link that is gone
    /// lets none pass either.
    pub async fn detach(&self, node: &Netlink) -> Result<(), LinkError> {
        let link = LinkUnspec::new_with_index(self.index).controller(NO_BRIDGE);
        let detached = node.handle().link().set(link.build()).execute().await;
        unless(&[libc::ENODEV], detached).map_err(failed("detaching link", &self.name))
    }

    /// Opens all of `ports`, also behind one that fails, whose error it returns then.
    pub async fn open_all(ports: &[Self], node: &Netlink) -> Result<(), LinkError> {
        let mut all = Ok(());
        for port in ports {
            let opened = port.open(node).await;
            all = all.and(opened);
        }
        all
    }

    /// Deletes the link, and with it the workload's end.
    pub async fn delete(&self, node: &Netlink) -> Result<(), LinkError> {
        let deleted = node.handle().link().del(self.index).execute().await;
        unless(&[libc::ENODEV], deleted).map_err(failed("deleting link", &self.name))
    }

    async fn set_state(
        &self,
        node: &Netlink,
        state: BridgePortState,
    ) -> Result<(), rtnetlink::Error> {
        node.handle()
            .link()
            .set_port(LinkBridgePort::new(self.index).state(state).build())
            .execute()
            .await
    }
}

/// This node's end of the veth `inside`, or why there is none.
pub(super) async fn other_end(
    node: &Netlink,
    inside: &LinkMessage,
) -> Result<Result<LinkMessage, &'static str>, LinkError> {
    if !is_veth(inside) {
        return Ok(Err("is not a veth"));
    }
    let peer = inside
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        });
    let Some(peer) = peer else {
        return Ok(Err("has no other end"));
    };
    // The same index may belong to an unrelated link if the true peer is elsewhere.
    let back = LinkAttribute::Link(inside.header.index);
    let found = find(node, peer).await?;
    let found = found.filter(|message| is_veth(message) && message.attributes.contains(&back));
    Ok(found.ok_or("has its other end in another namespace"))
}

pub(super) fn controller_of(message: &LinkMessage) -> Option<u32> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) if *index != NO_BRIDGE => Some(*index),
            _ => None,
        })
}

/// Takes the kernel's answers `numbers` for success.
pub(super) fn unless(
    numbers: &[i32],
    result: Result<(), rtnetlink::Error>,
) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if is_one_of(&error, numbers) => Ok(()),
        other => other,
    }
}

/// Refuses a bridge that is not there, before anything hangs on it.
pub(super) async fn check_bridge(node: &Netlink, name: &str) -> Result<(), LinkError> {
    match index_of(node, name).await {
        Err(LinkError::Unfit(why)) => Err(LinkError::Unfit(format!(
            "the bridge of the workload's links is gone: {why}. An engine deletes one with its \
             last port; a container that stays in its network keeps it"
        ))),
        found => found.map(drop),
    }
}

/// Whether that is one of the kernel's answers `numbers`.
pub(super) fn is_one_of(error: &rtnetlink::Error, numbers: &[i32]) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(error) => numbers.contains(&-error.raw_code()),
        _ => false,
    }
}

/// The index of the link called `name`.
pub(super) async fn index_of(netlink: &Netlink, name: &str) -> Result<u32, LinkError> {
    let found = netlink
        .handle()
        .link()
        .get()
        .match_name(name)
        .execute()
        .try_next()
        .await
        .map_err(failed("finding link", name))?;
    found
        .map(|message| message.header.index)
        .ok_or_else(|| LinkError::Unfit(format!("there is no link {name} at this node")))
}

/// The hardware address of the link called `name`.
pub(super) async fn mac_of(netlink: &Netlink, name: &str) -> Result<[u8; 6], LinkError> {
    let index = index_of(netlink, name).await?;
    let found = find(netlink, index).await?;
    let mac = found.and_then(|message| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
                _ => None,
            })
    });
    mac.ok_or_else(|| LinkError::Unfit(format!("link {name} is not an Ethernet link")))
}

/// Makes the link `index` a port of the bridge `bridge`; it forwards at once.
pub(super) async fn enslave(
    node: &Netlink,
    index: u32,
    bridge: u32,
    name: &str,
) -> Result<(), LinkError> {
    node.handle()
        .link()
        .set(LinkUnspec::new_with_index(index).controller(bridge).build())
        .execute()
        .await
        .map_err(failed("attaching link", name))
}

async fn find(node: &Netlink, index: u32) -> Result<Option<LinkMessage>, LinkError> {
    match node
        .handle()
        .link()
        .get()
        .match_index(index)
        .execute()
        .try_next()
        .await
    {
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(None),
        result => result.map_err(failed("finding link", index.to_string())),
    }
}

fn name_of(message: &LinkMessage) -> Option<String> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
}

fn is_veth(message: &LinkMessage) -> bool {
    message.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    })
}
