//! The network that a workload comes to: made by us, joined, or made by its engine.
//!
//! An engine makes it while the workload runs elsewhere, and attaches it to the bridge that leads
//! nowhere ([`crate::link::hold`]); from when its runtime waits it is one that is joined.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Offer;
use pageferry_proto::wire::description::{
    LinkDescription, Namespaces, RouteDescription, WorkloadDescription,
};
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::Site;
use crate::link::conntrack;
use crate::link::hold::{HOLD, Hold};
use crate::migration::target::network::Network;
use crate::migration::text::{chain, network_unfit};
use crate::runtime::kind::Arriving;

/// What is to be found in the network that an engine makes.
#[derive(Debug)]
pub(super) struct EngineNetwork {
    links: Vec<LinkDescription>,
    routes: Vec<RouteDescription>,
    /// The engine's, to which they are attached when the workload runs.
    bridge: String,
    /// Where they are attached until we know them.
    hold: Hold,
}

impl Site {
    /// Makes the workload's network, if it has one of its own, or joins what was made for it, or
    /// makes ready for an engine that will.
    pub(super) async fn prepare_network(
        &mut self,
        offer: &Offer,
        arriving: &Arriving,
    ) -> Result<(), Failure> {
        let description = &offer.description;
        let unfit = |text: String| Err(Failure::new(ErrorCode::NetworkUnfit, text));
        if !description.own_namespaces.contains(Namespaces::NET) {
            return match &offer.network {
                None => Ok(()),
                Some(name) => unfit(format!(
                    "the workload has no network of its own that could be {name}"
                )),
            };
        }
        let held = block_in_place(|| arriving.hold_network(&self.directory, HOLD))?;
        match (held, &offer.network) {
            (Some(bridge), None) => self.hold_network(description, bridge).await,
            (Some(_), Some(name)) => unfit(format!(
                "the container's engine makes its network, which therefore cannot be {name}"
            )),
            (None, Some(name)) => {
                let bridge = self.bridge(&description.links)?;
                let (network, net) = Network::join(name, description, &bridge).await?;
                self.network = Some(network);
                self.namespaces.push((NamespaceKind::Net, net));
                block_in_place(|| forget(&description.links));
                Ok(())
            }
            (None, None) => {
                self.make_network(description).await?;
                block_in_place(|| forget(&description.links));
                Ok(())
            }
        }
    }

    pub(super) async fn make_network(
        &mut self,
        description: &WorkloadDescription,
    ) -> Result<(), Failure> {
        let bridge = self.bridge(&description.links)?;
        // What is begun is known from here on: it may be cut off.
        self.network = Some(Network::begun(self.id, description, &bridge));
        let net = self
            .namespace(NamespaceKind::Net)
            .ok_or_else(|| Failure::new(ErrorCode::Internal, "no network namespace was made"))?;
        let made = Network::make(self.id, description, &bridge, net).await?;
        self.network = Some(made);
        Ok(())
    }

    pub(super) async fn hold_network(
        &mut self,
        description: &WorkloadDescription,
        bridge: String,
    ) -> Result<(), Failure> {
        let hold = self.node.holds.make().await;
        self.engine_network = Some(EngineNetwork {
            links: description.links.clone(),
            routes: description.routes.clone(),
            bridge,
            hold: hold.map_err(|error| network_unfit(&error))?,
        });
        Ok(())
    }

    /// Finds what an engine has made, when its runtime waits, and takes it off the bridge that
    /// leads nowhere: nothing of it is attached to anything then. Answers with it, if there is one.
    pub(super) async fn join_engine_network(&mut self) -> Result<Option<OwnedFd>, Failure> {
        let arriving = self.seats.first().and_then(|seat| seat.arriving.as_ref());
        let (Some(_), Some(arriving)) = (&self.engine_network, arriving) else {
            return Ok(None);
        };
        let Some(path) = block_in_place(|| arriving.network_path())? else {
            return Ok(None);
        };
        let net = namespace::open_bound(&path, NamespaceKind::Net).map_err(|error| {
            let text = format!("the network {} of the engine: {error}", path.display());
            Failure::new(ErrorCode::NetworkUnfit, text)
        })?;
        self.join_held(&net).await?;
        Ok(Some(net))
    }

    /// Takes `net`, which an engine has made, off the bridge that leads nowhere, if it is what the
    /// workload needs.
    pub(super) async fn join_held(&mut self, net: &OwnedFd) -> Result<(), Failure> {
        let Some(made) = &self.engine_network else {
            return Ok(());
        };
        let taken = made.hold.take_off(net).await;
        taken.map_err(|error| network_unfit(&error))?;
        let wanted = (&*made.links, &*made.routes);
        let found = Network::compare(net, wanted, &made.bridge).await?;
        block_in_place(|| forget(&made.links));
        self.network = Some(found);
        Ok(())
    }

    /// Looks for the bridge once more, before it is said that the workload is ready to run: nothing
    /// holds it while no link is attached. One of a pod's sandbox is its own.
    pub(super) async fn check_bridges(&self) -> Result<(), Failure> {
        let there = match &self.network {
            Some(Network::Made(made)) => made.check_bridge().await,
            Some(Network::Joined(joined)) => joined.check_bridges().await,
            Some(Network::Sandbox(_)) | None => Ok(()),
        };
        there.map_err(|error| network_unfit(&error))
    }

    /// Nothing of an engine is attached to the bridge that leads nowhere any more, nor will be.
    pub(super) async fn end_hold(&mut self) {
        if let Some(made) = self.engine_network.take()
            && let Err(error) = made.hold.release().await
        {
            tracing::warn!(migration = %self.id, "the bridge {HOLD} is left: {}", chain(&error));
        }
    }

    fn bridge(&self, links: &[LinkDescription]) -> Result<String, Failure> {
        if links.is_empty() {
            return Ok(String::new());
        }
        self.node.bridge.clone().ok_or_else(|| {
            Failure::new(
                ErrorCode::NetworkUnfit,
                "the workload has network links, and the target has no bridge configured",
            )
        })
    }
}

/// Has the node's firewall forget connections that the workload had when it was here before. Only
/// when its network is found fit: until then the addresses may be somebody else's.
fn forget(links: &[LinkDescription]) {
    let addresses = links.iter().flat_map(|link| &link.addresses);
    let addresses: Vec<IpAddr> = addresses.map(|address| address.ip).collect();
    match conntrack::forget(&addresses) {
        Ok(0) => {}
        Ok(count) => tracing::debug!(count, "connections are forgotten, and followed anew"),
        Err(error) => tracing::debug!(%error, "connections of the workload are not followed"),
    }
}
