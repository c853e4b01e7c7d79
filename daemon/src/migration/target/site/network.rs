//! The network of a workload's place, if it has one of its own.

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Offer;
use pageferry_proto::wire::description::{LinkDescription, Namespaces};
use pageferry_sys::namespace::NamespaceKind;

use super::{Network, Site};

impl Site {
    /// Makes the workload's network, if it has one of its own, or joins what was made for it.
    pub(super) async fn prepare_network(&mut self, offer: &Offer) -> Result<(), Failure> {
        let description = &offer.description;
        if !description.own_namespaces.contains(Namespaces::NET) {
            return match &offer.network {
                None => Ok(()),
                Some(name) => Err(Failure::new(
                    ErrorCode::NetworkUnfit,
                    format!("the workload has no network of its own that could be {name}"),
                )),
            };
        }
        let bridge = self.bridge(&description.links)?;
        if let Some(name) = &offer.network {
            let (network, net) = Network::join(name, description, &bridge).await?;
            self.network = Some(network);
            self.namespaces.push((NamespaceKind::Net, net));
            return Ok(());
        }
        // What is begun is known from here on: it may be cut off.
        self.network = Some(Network::begun(self.id, description, &bridge));
        let net = self
            .namespace(NamespaceKind::Net)
            .ok_or_else(|| Failure::new(ErrorCode::Internal, "no network namespace was made"))?;
        let made = Network::make(self.id, description, &bridge, net).await?;
        self.network = Some(made);
        Ok(())
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
