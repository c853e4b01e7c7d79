//! What is made around the members of a party, before they are: a pod of an engine's, with its
//! namespaces and its network.
//!
//! Invariant: what was made is written down in the migration's folder, so that a discard finds it
//! whoever made it.

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Offer;
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::Site;
use crate::link::hold::HOLD;
use crate::runtime::kind::{Around, Arriving};

impl Site {
    /// Has it made, and takes its network from its neighbours: they may have to find the workload
    /// at its source.
    pub(super) async fn make_around(
        &mut self,
        around: &Around,
        members: &mut [Arriving],
        offer: &Offer,
    ) -> Result<(), Failure> {
        let description = &offer.description;
        if let Some(name) = &offer.network {
            let text = format!("the pod's engine makes its network, which cannot be {name}");
            return Err(Failure::new(ErrorCode::NetworkUnfit, text));
        }
        let held = block_in_place(|| around.hold_network(&self.directory, HOLD))?;
        let has_bridge = held.is_some();
        if let Some(bridge) = held {
            self.hold_network(description, bridge).await?;
        }
        let made = block_in_place(|| around.make(&self.directory, members))?;
        self.namespaces = made.namespaces;
        let net = self.namespace(NamespaceKind::Net);
        let net = net.map(|net| net.try_clone()).transpose();
        let net = net.map_err(|error| Failure::new(ErrorCode::NodeUnfit, error.to_string()))?;
        match net {
            Some(net) if has_bridge => self.join_held(&net).await?,
            // Its engine makes none but a loopback.
            Some(_) => self.make_network(description).await?,
            None => {}
        }
        let Some(uts) = self.namespace(NamespaceKind::Uts) else {
            return Ok(());
        };
        let named = namespace::set_names(uts, &description.hostname, &description.domainname);
        named.map_err(|error| {
            let text = format!("cannot set the host name of the pod: {error}");
            Failure::new(ErrorCode::NodeUnfit, text)
        })
    }
}
