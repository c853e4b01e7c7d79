//! The loopback of the workload's network here: the pagers shut it while the sockets of both ends
//! of a connection come, and open it when they are all there.
//!
//! All pagers of a party hold one gate. The first of them that lets its tree go opens it: by then
//! all trees are held, and so all sockets are there.
//!
//! Invariant: from the hand-over on the pagers alone hold it, so that it is shut for as long as
//! there is a restore, with or without a daemon, and opens when the last pager ends.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use criu_glue::image::inet;
use pageferry_proto::wire::code::Failure;
use pageferry_sys::namespace::NamespaceKind;
use tokio::task::block_in_place;

use super::Site;
use crate::link::LinkError;
use crate::link::loopback::LoGate;
use crate::migration::target::images::criu_failed;
use crate::migration::text::chain;
use crate::runtime::loopback::not_held_back;

impl Site {
    /// What shuts the loopback of a network that is known, which takes too long to make for a
    /// freeze. Where it cannot be made that is noted.
    pub(super) fn loopback_gate(&mut self) -> Option<LoGate> {
        let net = self.namespace(NamespaceKind::Net)?;
        let made = block_in_place(|| LoGate::make(net));
        self.made(made)
    }

    /// The same of a network that an engine has made for its only member, and that is known only
    /// now: gives it to the pager.
    pub(super) async fn hand_over_loopback_of(&mut self, net: &OwnedFd) -> Result<(), Failure> {
        let made = block_in_place(|| LoGate::make(net));
        let Some(gate) = self.made(made) else {
            return Ok(());
        };
        for seat in &self.seats {
            seat.hand_over(&gate).await?;
        }
        Ok(())
    }

    fn made(&mut self, made: Result<LoGate, LinkError>) -> Option<LoGate> {
        match made {
            Ok(gate) => Some(gate),
            Err(error) => {
                let why = chain(&error);
                tracing::info!(migration = %self.id,
                    "a workload with connections over loopback could not come: {why}");
                self.ungated = Some(why);
                None
            }
        }
    }

    /// Refuses a connection of which both ends come, with one member or with two, if nothing can
    /// keep what one of them sends from a place where the other is not yet. `images` are the
    /// folders of all members.
    pub(super) fn check_connections(&self, images: &[PathBuf]) -> Result<(), Failure> {
        let Some(why) = &self.ungated else {
            return Ok(());
        };
        match inet::pair(images).map_err(|error| criu_failed(&error))? {
            Some((here, there)) => Err(not_held_back(here, there, why)),
            None => Ok(()),
        }
    }
}
