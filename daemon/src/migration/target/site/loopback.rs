//! The loopback of the workload's network here: the pager shuts it while the sockets of both ends
//! of a connection come, and opens it when they are all there.
//!
//! Invariant: from the hand-over on the pager alone holds it, so that it is shut for as long as
//! there is a restore, with or without a daemon, and opens when the pager ends.

use std::os::fd::OwnedFd;
use std::path::Path;

use criu_glue::image::inet;
use pageferry_proto::wire::code::Failure;
use pageferry_sys::namespace::NamespaceKind;
use tokio::task::block_in_place;

use super::{Site, no_pager, pager_failed};
use crate::link::LinkError;
use crate::link::loopback::LoGate;
use crate::migration::target::images::criu_failed;
use crate::migration::text::{chain, network_unfit};
use crate::runtime::loopback::not_held_back;

impl Site {
    /// Makes what shuts the loopback of a network of its own, which takes too long for a freeze,
    /// and gives it to the pager. Where it cannot be made that is noted.
    pub(super) async fn hand_over_loopback(&mut self) -> Result<(), Failure> {
        let made = self
            .namespace(NamespaceKind::Net)
            .map(|net| block_in_place(|| LoGate::make(net)));
        match made {
            Some(made) => self.hand_over(made).await,
            None => Ok(()),
        }
    }

    /// The same of a network that an engine has made, and that is known only now.
    pub(super) async fn hand_over_loopback_of(&mut self, net: &OwnedFd) -> Result<(), Failure> {
        self.hand_over(block_in_place(|| LoGate::make(net))).await
    }

    async fn hand_over(&mut self, made: Result<LoGate, LinkError>) -> Result<(), Failure> {
        let gate = match made {
            Ok(gate) => gate,
            Err(error) => {
                let why = chain(&error);
                tracing::info!(migration = %self.id,
                    "a workload with connections over loopback could not come: {why}");
                self.ungated = Some(why);
                return Ok(());
            }
        };
        let client = &self.pager.as_ref().ok_or_else(no_pager)?.client;
        let descriptors = gate.descriptors().map_err(|error| network_unfit(&error))?;
        client.lo_gate(&descriptors).await.map_err(pager_failed)
    }

    /// Refuses a connection of which both ends come, if nothing can keep what one of them sends
    /// from a place where the other is not yet.
    pub(super) fn check_connections(&self, images: &Path) -> Result<(), Failure> {
        let Some(why) = &self.ungated else {
            return Ok(());
        };
        match inet::pair(images).map_err(|error| criu_failed(&error))? {
            Some((here, there)) => Err(not_held_back(here, there, why)),
            None => Ok(()),
        }
    }
}
