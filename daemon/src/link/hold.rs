//! A bridge that nobody else is on, and that leads nowhere.
//!
//! An engine that makes a workload's network attaches its links to a bridge as it makes them, while
//! the workload runs elsewhere by the same addresses. So it is shown this bridge in the place of
//! its own; then the links are taken off, and become ports of the engine's when the workload runs.
//!
//! Invariants: the bridge is there from before an engine may attach anything to it until nobody
//! needs it, since an engine makes a bridge that is not there, with addresses; it has a port of our
//! own, since an engine that finds no port on its bridge takes away what others of that network
//! need; it is never up, so that no port of it forwards.

use std::os::fd::AsFd;
use std::sync::Arc;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{LinkFlags, LinkMessage};
use rtnetlink::{LinkBridge, LinkUnspec, LinkVeth};
use tokio::sync::Mutex;

use super::LinkError;
use super::netlink::{Netlink, failed};
use super::port::{NO_BRIDGE, controller_of, enslave, index_of, other_end};

/// The bridge.
pub const HOLD: &str = "pageferry-hold";

/// Its own port, and the other end of that.
const PORT: [&str; 2] = ["pageferry-h0", "pageferry-h1"];

/// The bridge of this node, and how many need it.
#[derive(Debug, Clone, Default)]
pub struct Holds(Arc<Mutex<usize>>);

/// The bridge is there.
#[derive(Debug)]
pub struct Hold(Holds);

impl Holds {
    /// Makes the bridge, if it is not there.
    pub async fn make(&self) -> Result<Hold, LinkError> {
        let mut users = self.0.lock().await;
        if *users == 0 {
            make().await?;
        }
        *users += 1;
        Ok(Hold(self.clone()))
    }

    /// Removes one that a dead daemon has left, unless somebody needs it. What is attached to it
    /// then is attached to nothing.
    pub async fn clean_up(&self) -> Result<(), LinkError> {
        match *self.0.lock().await {
            0 => remove().await,
            _ => Ok(()),
        }
    }
}

impl Hold {
    /// The bridge is removed if nobody else needs it.
    pub async fn release(self) -> Result<(), LinkError> {
        let mut users = self.0.0.lock().await;
        *users = users.saturating_sub(1);
        match *users {
            0 => remove().await,
            _ => Ok(()),
        }
    }

    /// Takes the links of the network namespace `net` off it: they are attached to nothing then.
    pub async fn take_off(&self, net: &impl AsFd) -> Result<(), LinkError> {
        let node = Netlink::open(None)?;
        let bridge = index_of(&node, HOLD).await?;
        let inside = Netlink::open(Some(net.as_fd()))?;
        let listed = inside.handle().link().get().execute().try_collect().await;
        let links: Vec<LinkMessage> = listed.map_err(failed("listing links of", "the network"))?;
        let own = |link: &&LinkMessage| !link.header.flags.contains(LinkFlags::Loopback);
        for link in links.iter().filter(own) {
            let Ok(end) = other_end(&node, link).await? else {
                continue;
            };
            if controller_of(&end) == Some(bridge) {
                let loose = LinkUnspec::new_with_index(end.header.index).controller(NO_BRIDGE);
                let taken = node.handle().link().set(loose.build()).execute().await;
                taken.map_err(failed("taking off a link of", HOLD))?;
            }
        }
        Ok(())
    }
}

async fn make() -> Result<(), LinkError> {
    // With whatever a dead daemon has left of it.
    remove().await?;
    let node = Netlink::open(None)?;
    let made = node.handle().link().add(LinkBridge::new(HOLD).build());
    made.execute()
        .await
        .map_err(failed("creating bridge", HOLD))?;
    let [port, other] = PORT;
    let made = node.handle().link().add(LinkVeth::new(port, other).build());
    made.execute()
        .await
        .map_err(failed("creating link", port))?;
    let bridge = index_of(&node, HOLD).await?;
    let index = index_of(&node, port).await?;
    enslave(&node, index, bridge, port).await
}

async fn remove() -> Result<(), LinkError> {
    let node = Netlink::open(None)?;
    for name in [HOLD, PORT[0]] {
        if let Ok(index) = index_of(&node, name).await {
            let deleted = node.handle().link().del(index).execute().await;
            deleted.map_err(failed("deleting link", name))?;
        }
    }
    Ok(())
}
