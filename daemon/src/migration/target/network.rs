//! The network a workload comes to, if it has one of its own: made for it, or joined.
//!
//! A *made* one is ours: links, addresses and routes as the source described them, in a namespace
//! that ends with the workload. A *joined* one somebody else has made, an engine or an
//! administrator: it is compared with what the source described, and stays when the workload goes.
//!
//! Invariants: until [`Network::attach`] no neighbour can reach it; after [`Network::detach`] none
//! can again.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use pageferry_proto::id::{MigrationId, NetworkName};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{
    LinkAddress, LinkDescription, RouteDescription, WorkloadDescription,
};
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};

use crate::link::LinkError;
use crate::link::join::JoinedNetwork;
use crate::link::park::Awaited;
use crate::link::prepare::PreparedNetwork;
use crate::link::route;
use crate::migration::ports::PortState;
use crate::migration::text::{chain, network_unfit};

/// Where `ip netns` and container engines keep the network namespaces that have names.
const NAMED: &str = "/run/netns";

/// A network of a workload's own.
#[derive(Debug, Clone)]
pub(super) enum Network {
    Made(PreparedNetwork),
    Joined(JoinedNetwork),
    /// Of a pod's sandbox: attached by whoever made it, until it was joined.
    Sandbox(JoinedNetwork),
}

/// What a restarted daemon needs to find it again: kept in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum NetworkState {
    Made {
        bridge: String,
        links: Vec<LinkState>,
    },
    Joined {
        ports: Vec<PortState>,
        links: Vec<LinkState>,
    },
    Sandbox {
        ports: Vec<PortState>,
        links: Vec<LinkState>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LinkState {
    name: String,
    mac: [u8; 6],
    mtu: u32,
    addresses: Vec<(std::net::IpAddr, u8)>,
}

impl Network {
    /// What [`Network::make`] may have begun when it is cut off.
    pub(super) fn begun(id: MigrationId, description: &WorkloadDescription, bridge: &str) -> Self {
        let prefix = link_prefix(id);
        Self::Made(PreparedNetwork::recovered(
            &description.links,
            bridge,
            &prefix,
        ))
    }

    /// Makes the workload's links, addresses and routes in the namespace `net`, which is empty.
    pub(super) async fn make(
        id: MigrationId,
        description: &WorkloadDescription,
        bridge: &str,
        net: &OwnedFd,
    ) -> Result<Self, Failure> {
        let (links, routes, prefix) = (&description.links, &description.routes, link_prefix(id));
        let made = PreparedNetwork::build(net, links, routes, bridge, &prefix).await;
        made.map(Self::Made).map_err(|error| network_unfit(&error))
    }

    /// Finds the network namespace of that name here, with what the workload needs in it. Nothing
    /// of it is changed.
    pub(super) async fn join(
        name: &NetworkName,
        description: &WorkloadDescription,
        bridge: &str,
    ) -> Result<(Self, OwnedFd), Failure> {
        let net = open_named(name)?;
        let wanted = (&*description.links, &*description.routes);
        Ok((Self::compare(&net, wanted, bridge).await?, net))
    }

    /// One that somebody else has made, attached to nothing, with what the workload needs in it.
    pub(super) async fn compare(
        net: &OwnedFd,
        (links, routes): (&[LinkDescription], &[RouteDescription]),
        bridge: &str,
    ) -> Result<Self, Failure> {
        let joined = JoinedNetwork::compare(net, links, routes, bridge).await;
        let joined = joined.map_err(|error| network_unfit(&error))?;
        Ok(Self::Joined(joined))
    }

    /// Takes the network of a pod's sandbox from its neighbours, if it has what the workload needs.
    pub(super) async fn in_sandbox(
        net: &OwnedFd,
        links: &[LinkDescription],
    ) -> Result<Self, Failure> {
        let joined = JoinedNetwork::in_sandbox(net, links).await;
        joined
            .map(Self::Sandbox)
            .map_err(|error| network_unfit(&error))
    }

    /// What a dead daemon has left.
    pub(super) async fn recover(id: MigrationId, state: NetworkState) -> Result<Self, LinkError> {
        let links = |links: Vec<LinkState>| links.into_iter().map(LinkState::described).collect();
        Ok(match state {
            NetworkState::Made {
                bridge,
                links: known,
            } => {
                let known: Vec<_> = links(known);
                let prefix = link_prefix(id);
                Self::Made(PreparedNetwork::recovered(&known, &bridge, &prefix))
            }
            NetworkState::Joined {
                ports,
                links: known,
            } => {
                let ports = PortState::again(&ports).await?;
                Self::Joined(JoinedNetwork::recovered(ports, links(known)))
            }
            NetworkState::Sandbox {
                ports,
                links: known,
            } => {
                let ports = PortState::again(&ports).await?;
                Self::Sandbox(JoinedNetwork::recovered(ports, links(known)))
            }
        })
    }

    /// For the journal.
    pub(super) fn state(&self) -> NetworkState {
        let links = self.links().iter().map(LinkState::of).collect();
        match self {
            Self::Made(made) => NetworkState::Made {
                bridge: made.bridge().to_owned(),
                links,
            },
            Self::Joined(joined) => NetworkState::Joined {
                ports: joined.ports().iter().map(PortState::of).collect(),
                links,
            },
            Self::Sandbox(joined) => NetworkState::Sandbox {
                ports: joined.ports().iter().map(PortState::of).collect(),
                links,
            },
        }
    }

    /// Whether there is anything to be reached through.
    pub(super) fn has_links(&self) -> bool {
        !self.links().is_empty()
    }

    fn links(&self) -> &[LinkDescription] {
        match self {
            Self::Made(made) => made.links(),
            Self::Joined(joined) | Self::Sandbox(joined) => joined.links(),
        }
    }

    /// This node's ends of its links, as far as they are among those that are `offered`.
    pub(super) async fn awaited(
        &self,
        offered: &[LinkDescription],
    ) -> Result<Vec<Awaited>, LinkError> {
        let ends = match self {
            Self::Made(made) => made.ends().await?,
            Self::Joined(joined) | Self::Sandbox(joined) => {
                joined.ports().iter().map(|port| port.ends().0).collect()
            }
        };
        let own = self.links().iter().zip(ends);
        let awaited = own.filter_map(|(own, index)| {
            let place = offered.iter().position(|link| link.name == own.name)?;
            Some(Awaited {
                link: u8::try_from(place).ok()?,
                index,
                macs: (offered[place].mac, own.mac),
            })
        });
        Ok(awaited.collect())
    }

    /// Attaches its links and says where their addresses are. Only when `Running` is durable; doing
    /// it again does no harm.
    pub(super) async fn attach(&self, net: &OwnedFd) -> Result<(), LinkError> {
        match self {
            Self::Made(made) => made.attach(net).await,
            Self::Joined(joined) => joined.attach(net).await,
            Self::Sandbox(joined) => {
                joined.attach(net).await?;
                lead_here(joined).await;
                Ok(())
            }
        }
    }

    /// Takes its links away from their neighbours again.
    pub(super) async fn detach(&self) -> Result<(), LinkError> {
        match self {
            Self::Made(made) => made.detach().await,
            Self::Joined(joined) => joined.detach().await,
            Self::Sandbox(joined) => unlead(joined).await,
        }
    }

    /// Says once more where its addresses are.
    pub(super) fn announce(&self, net: &OwnedFd) -> Result<(), LinkError> {
        match self {
            Self::Made(made) => made.announce(net),
            Self::Joined(joined) | Self::Sandbox(joined) => joined.announce(net),
        }
    }

    /// The workload does not come, or is gone: what was made goes, and what was joined is left as
    /// it was found.
    pub(super) async fn give_up(&self) -> Result<(), LinkError> {
        match self {
            Self::Made(made) => made.delete().await,
            Self::Joined(joined) => joined.detach().await,
            Self::Sandbox(joined) => unlead(joined).await,
        }
    }
}

/// Takes a sandbox from its neighbours, and leads nobody there: they may have to find the workload
/// at its source.
async fn unlead(joined: &JoinedNetwork) -> Result<(), LinkError> {
    joined.detach().await?;
    route::lead_here_no_more(joined.links(), joined.ports()).await
}

impl LinkState {
    fn of(link: &LinkDescription) -> Self {
        let addresses = link.addresses.iter();
        Self {
            name: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            addresses: addresses
                .map(|address| (address.ip, address.prefix))
                .collect(),
        }
    }

    fn described(self) -> LinkDescription {
        let addresses = self.addresses.into_iter();
        LinkDescription {
            name: self.name,
            mac: self.mac,
            mtu: self.mtu,
            addresses: addresses
                .map(|(ip, prefix)| LinkAddress { ip, prefix })
                .collect(),
            bridge: None,
        }
    }
}

/// Has this node lead to the addresses of a pod. Without that only its neighbours on its bridge
/// reach it, but it runs nowhere else: it is no reason not to let it run. What fails is tried a few
/// times more, in the background.
async fn lead_here(joined: &JoinedNetwork) {
    let lead = async |joined: &JoinedNetwork| {
        let led = route::lead_here(joined.links(), joined.ports());
        match tokio::time::timeout(LEAD_MAX, led).await {
            Ok(led) => led.map_err(|error| chain(&error)),
            Err(_) => Err(format!("the kernel takes no routes for {LEAD_MAX:?}")),
        }
    };
    let Err(why) = lead(joined).await else { return };
    tracing::warn!("this node does not lead to the addresses of a pod that has come: {why}");
    let joined = joined.clone();
    tokio::spawn(async move {
        for pause in LEAD_PAUSES {
            tokio::time::sleep(pause).await;
            match lead(&joined).await {
                Ok(()) => {
                    tracing::info!("this node leads to the addresses of a pod that has come");
                    return;
                }
                Err(why) => tracing::warn!("nor does it now: {why}"),
            }
        }
        tracing::error!("the addresses of a pod that runs here are reached only over its bridge");
    });
}

/// How long the kernel may take for routes; the workload stands still meanwhile.
const LEAD_MAX: Duration = Duration::from_secs(1);

/// Before each try but the first.
const LEAD_PAUSES: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
];

fn open_named(name: &NetworkName) -> Result<OwnedFd, Failure> {
    let path = Path::new(NAMED).join(name.as_str());
    namespace::open_bound(&path, NamespaceKind::Net).map_err(|error| {
        let text = format!("the network {} of the target: {error}", path.display());
        Failure::new(ErrorCode::NetworkUnfit, text)
    })
}

/// Names of this node's link ends begin with this: `pf`, nine digits that stand for the migration,
/// and a number of at most two follows, 13 characters of the 15 that a name may have. Ids may be
/// chosen, and then begin all the same: the digits are of all of it.
fn link_prefix(id: MigrationId) -> String {
    let mut digest = FNV_OFFSET;
    for byte in id.as_bytes() {
        digest = (digest ^ u64::from(*byte)).wrapping_mul(FNV_PRIME);
    }
    format!("pf{:09x}n", digest >> 28)
}

/// Those of FNV-1a.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_state_of_a_network_keeps_its_form_and_says_who_made_it() {
        let link =
            r#"{"name":"eth0","mac":[2,0,0,0,0,1],"mtu":1500,"addresses":[["10.0.0.1",24]]}"#;
        let links = format!(r#""links":[{link}]"#);
        let made = format!(r#"{{"made":{{"bridge":"br0",{links}}}}}"#);
        // Nobody has a link of such a number.
        let port = r#"{"ends":[2147483647,2],"name":"v0","bridge":"br0"}"#;
        let joined = format!(r#"{{"joined":{{"ports":[{port}],{links}}}}}"#);
        let sandbox = joined.replace("joined", "sandbox");
        for text in [made, joined, sandbox] {
            let state: NetworkState = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&state).unwrap(), text);
            let network = Network::recover(MigrationId::new([1; 16]), state)
                .await
                .unwrap();
            assert_eq!(network.links()[0].addresses[0].prefix, 24);
            match network {
                Network::Made(made) => assert_eq!(made.bridge(), "br0"),
                Network::Joined(joined) | Network::Sandbox(joined) => {
                    assert_eq!(joined.ports(), []);
                }
            }
        }
    }

    #[test]
    fn links_of_migrations_whose_ids_begin_alike_have_different_names() {
        let prefix = |last: u8| {
            let mut id = [0; 16];
            id[15] = last;
            link_prefix(MigrationId::new(id))
        };
        let mut all: Vec<String> = (0..=255).map(prefix).collect();
        assert!(all.iter().all(|prefix| prefix.len() == 12), "{all:?}");
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 256);
    }
}
