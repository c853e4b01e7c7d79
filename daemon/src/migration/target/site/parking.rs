//! The links by which frames come for the workload while it does not run here yet.
//!
//! Invariant: what makes them wait is there before they are attached to anything.

use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::wire::description::LinkDescription;
use tokio::task::block_in_place;

use super::Site;
use crate::link::park::Await;
use crate::migration::text::chain;

/// The links as the source described them.
#[derive(Debug, Default)]
pub(super) struct Offered(Vec<LinkDescription>);

impl Offered {
    pub(super) fn of(links: &[LinkDescription]) -> Self {
        Self(links.to_vec())
    }
}

impl Site {
    /// Gives the workload, which runs, what came for it; what came here when the source has said
    /// that nothing is on its way that others sent before, or has not said so for a while.
    pub(super) fn deliver_frames(&self) {
        block_in_place(|| self.intake.parking().deliver());
        let intake = Arc::clone(&self.intake);
        tokio::spawn(async move {
            tokio::time::sleep(ON_THE_WAY).await;
            block_in_place(|| intake.parking().open());
        });
    }

    /// Makes what comes by the links of the workload's network wait, if it is there already: that
    /// takes too long for a freeze. Where it cannot be made what comes is not kept.
    pub(super) async fn await_frames(&self) {
        let parking = self.intake.parking();
        let Some(network) = self.network.as_ref().filter(|_| parking.is_open()) else {
            return;
        };
        if !network.has_links() {
            return;
        }
        let made = match network.awaited(&self.offered.0).await {
            Ok(awaited) => block_in_place(|| Await::make(&awaited)),
            Err(error) => Err(error),
        };
        match made {
            Ok(links) => parking.await_by(links),
            Err(error) => tracing::info!(migration = %self.id,
                "what comes for the workload before it runs is lost: {}", chain(&error)),
        }
    }
}

/// How long it is waited for the source to say so, when the workload runs: it hears that in half a
/// millisecond, and what it has sent on takes as long.
const ON_THE_WAY: Duration = Duration::from_millis(10);
