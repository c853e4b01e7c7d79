//! What comes for a workload while it stands still: kept, sent to the target, and given to the
//! workload here if it stays.
//!
//! ```text
//! close ──── from here on what comes is kept
//! shut ───── the tree is frozen: nothing of it leaves
//! forward ── from the final round on the target has what is kept, and what comes then
//!
//! it stays:  let_speak, before it runs: what it says is not lost
//!            stop, deliver: it has all of it here
//! it left:   mark: the target hears that it has all that came before
//!            relay: for some seconds what still comes here is sent there
//! ```
//!
//! Invariants: ports need not be closed where [`Parking::is_whole`], and nothing passes them when a
//! daemon dies; nothing is given to the workload here once it may run elsewhere; what cannot be
//! kept or sent on is lost as on any network, and no reason not to move.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_proto::id::Generation;
use pageferry_proto::wire::code::Failure;
use pageferry_proto::wire::description::LinkDescription;
use pageferry_proto::wire::stream::{StreamKind, seal};
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::JoinHandle;

use super::workload::Workload;
use crate::link::describe::describe;
use crate::link::park::datagram::frame;
use crate::link::park::{Lot, Means, Park, Parked};
use crate::link::port::Port;
use crate::link::{LinkError, park};
use crate::migration::text::{chain, internal, network_unfit};
use crate::net::stream::{DataSender, SendStreamError};
use crate::runtime::unread::Unread;

/// What keeps it, if anything does.
#[derive(Debug, Default)]
pub(super) struct Parking {
    park: Option<Park>,
    /// The workload's links, in the order of its ports.
    links: Vec<LinkDescription>,
    /// Looks for what the workload has not read.
    unread: Option<Unread>,
    /// The workload's network, which is there for as long as what still comes is sent on.
    net: Option<OwnedFd>,
    /// The target takes what is kept.
    is_wanted: bool,
    sending: Option<Sending>,
    /// When what still comes is sent on no more.
    relays_until: Option<Instant>,
}

/// A task that ends with this, and what it sends by.
#[derive(Debug)]
struct Sending {
    task: JoinHandle<()>,
    data: DataSender,
    generation: Generation,
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Parking {
    /// Makes what keeps it, before the first freeze would have to wait for that. Where nothing can,
    /// that is said, and ports are closed.
    pub(super) async fn make(
        &mut self,
        means: Means,
        workload: &Workload,
        ports: &[Port],
    ) -> Result<(), Failure> {
        if ports.is_empty() || !workload.own.contains(&NamespaceKind::Net) {
            return Ok(());
        }
        let net = namespace::open(workload.root(), NamespaceKind::Net);
        let net = net.map_err(|error| internal(&error))?;
        workload.check_root()?;
        let made = async {
            let found = describe(&net).await?;
            let link_of = |port: &Port| {
                let mut all = found.ports.iter().zip(&found.links);
                let found = all.find(|(found, _)| found.ends() == port.ends());
                found.map(|(_, link)| link.clone())
            };
            let links: Option<Vec<LinkDescription>> = ports.iter().map(link_of).collect();
            let Some(links) = links else {
                let text = "links of the workload were changed since it was surveyed".to_owned();
                return Err(LinkError::Unfit(text));
            };
            let parked = ports.iter().zip(&links);
            let parked: Vec<Parked<'_>> = parked
                .map(|(port, LinkDescription { mac, .. })| Parked { port, mac: *mac })
                .collect();
            Ok((Park::make(means, &parked).await?, links))
        };
        match made.await {
            Ok((park, links)) => (self.park, self.links) = (park, links),
            Err(error) => tracing::info!(
                root = workload.root(),
                "what comes for the frozen workload is lost: {}",
                chain(&error)
            ),
        }
        let unread = self.park.is_some().then(|| Unread::open(net.as_fd()));
        self.unread = unread.transpose().unwrap_or_else(|error| {
            tracing::info!(%error, "datagrams that the workload has not read are lost");
            None
        });
        self.net = Some(net);
        Ok(())
    }

    /// Keeps what the frozen processes have not read of their datagrams: CRIU drops it.
    pub(super) fn keep_unread(&mut self, pids: &[i32]) {
        let (Some(park), Some(unread), true) = (&self.park, &mut self.unread, self.is_wanted)
        else {
            return;
        };
        let found = match unread.look(pids, UNREAD_BYTES_MAX) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "datagrams that the workload has not read are lost");
                return;
            }
        };
        let mut frames = Vec::new();
        for waiting in found {
            let made = waiting.datagrams.iter();
            frames.extend(made.filter_map(|one| frame(one, waiting.port, &self.links)));
        }
        if !frames.is_empty() {
            tracing::debug!(count = frames.len(), "unread datagrams are carried over");
            park.lot().put_unread(frames);
        }
    }

    /// The target has said whether it takes what is kept.
    pub(super) fn accepted(&mut self, parks: bool) {
        self.is_wanted = parks;
    }

    /// Whether nothing is kept.
    pub(super) fn is_nothing(&self) -> bool {
        self.park.is_none()
    }

    /// Whether no port need be closed.
    pub(super) fn is_whole(&self) -> bool {
        self.park.as_ref().is_some_and(Park::is_whole)
    }

    /// From here on what comes is kept, if it can be. Ports that must be closed are.
    pub(super) fn close(&self) -> Result<(), Failure> {
        self.tell(Park::hold)
    }

    /// The tree is frozen: nothing of it leaves.
    pub(super) fn shut(&self) -> Result<(), Failure> {
        self.tell(Park::shut)
    }

    /// The workload stays, and is about to run: what it says is not lost, or its peers would wait
    /// for that to be said again. What fails fails again when it has what was kept.
    pub(super) fn let_speak(&self) {
        drop(self.tell(Park::let_speak));
    }

    /// The target has what is kept of this attempt, and what comes from now on.
    pub(super) fn forward(&mut self, data: DataSender, generation: Generation) {
        let Some(park) = self.park.as_ref().filter(|_| self.is_wanted) else {
            return;
        };
        let task = tokio::spawn(send(park.lot(), data.clone(), generation));
        self.sending = Some(Sending {
            task,
            data,
            generation,
        });
    }

    /// The workload runs at the target, and its neighbours know: the target hears how much came
    /// here before, and need not hold back any more what comes there.
    pub(super) fn mark(&self) {
        let (Some(park), Some(sending)) = (&self.park, &self.sending) else {
            return;
        };
        let (lot, data, generation) = (park.lot(), sending.data.clone(), sending.generation);
        tokio::spawn(async move {
            lot.catch_up();
            let sent = async {
                send_waiting(&lot, &data, generation).await?;
                send_one(&data, lot.mark(generation)).await
            };
            if let Err(error) = sent.await {
                tracing::debug!("the end of parked frames: {}", chain(&error));
            }
        });
    }

    /// The target is about to be told to run the workload.
    pub(super) fn commit(&self) {
        if let Some(park) = &self.park {
            park.commit();
        }
    }

    /// The workload stays: nothing more is sent to the target. Ports that are closed are opened
    /// behind this.
    pub(super) fn stop(&self) {
        if let Some(sending) = &self.sending {
            sending.task.abort();
        }
        if let Some(park) = &self.park {
            park.stop();
        }
    }

    /// It runs, and its ports are open: it has what was kept.
    pub(super) fn deliver(&self) -> Result<(), Failure> {
        self.tell(Park::deliver)
    }

    /// The workload runs at the target. Whether what still comes is sent there: then its links stay
    /// until [`Parking::relayed`]. Not those in a network that somebody else keeps, who may want to
    /// make others by their names.
    pub(super) fn relay(&mut self, workload: &Workload, is_engines: bool) -> bool {
        // An engine makes them by other names.
        let is_own = is_engines || self.net.as_ref().is_some_and(|net| !is_named(net));
        let relays = is_own && self.is_whole() && self.sending.is_some();
        self.tell_counts(workload);
        match &self.park {
            Some(park) if relays => {
                park.lot().relay();
                self.relays_until = Some(Instant::now() + RELAY_TIME);
            }
            Some(_) | None => self.end(),
        }
        relays
    }

    fn tell_counts(&self, workload: &Workload) {
        let Some((kept, lost)) = self.park.as_ref().map(|park| park.lot().counts()) else {
            return;
        };
        let root = workload.root();
        tracing::info!(
            root,
            kept,
            "frames came for the workload while it stood still"
        );
        if 0 < lost {
            tracing::warn!(root, lost, "there was no room for more frames");
        }
    }

    /// Waits until neighbours have learnt where the workload is. Whether there are links that have
    /// waited for that.
    pub(super) async fn relayed(&mut self) -> bool {
        let Some(until) = self.relays_until.take() else {
            return false;
        };
        tokio::time::sleep_until(until.into()).await;
        true
    }

    /// Keeps nothing any more.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }

    fn tell(&self, tell: impl FnOnce(&Park) -> Result<(), LinkError>) -> Result<(), Failure> {
        let told = self.park.as_ref().map_or(Ok(()), tell);
        told.map_err(|error| network_unfit(&error))
    }
}

/// Takes what this daemon, or one before it, has attached to the ports off them.
pub(super) async fn clear(ports: &[Port]) -> Result<(), Failure> {
    let cleared = park::end(ports).await;
    cleared.map_err(|error| network_unfit(&error))
}

/// Sends what waits, and what comes, until the connection is lost.
async fn send(lot: Arc<Lot>, data: DataSender, generation: Generation) {
    loop {
        if let Err(error) = send_waiting(&lot, &data, generation).await {
            tracing::debug!("parked frames: {}", chain(&error));
            return;
        }
        lot.came().await;
    }
}

async fn send_waiting(
    lot: &Lot,
    data: &DataSender,
    generation: Generation,
) -> Result<(), SendStreamError> {
    while let Some(body) = lot.stream(generation) {
        send_one(data, body).await?;
    }
    Ok(())
}

async fn send_one(data: &DataSender, mut body: Vec<u8>) -> Result<(), SendStreamError> {
    seal(&mut body);
    data.send_stream(StreamKind::Parked, body.into()).await
}

/// Whether a network namespace is kept by a name, so that it outlives the workload.
fn is_named(net: &OwnedFd) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: std::path::PathBuf| {
        let known = std::fs::metadata(path).ok()?;
        Some((known.dev(), known.ino()))
    };
    let number = std::os::fd::AsRawFd::as_raw_fd(&net.as_fd());
    let own = identity(format!("/proc/self/fd/{number}").into());
    let names = std::fs::read_dir("/run/netns").into_iter().flatten();
    let mut names = names.filter_map(Result::ok);
    own.is_none() || names.any(|entry| identity(entry.path()) == own)
}

/// Most bytes of one socket that are looked at: as much as is kept of all.
const UNREAD_BYTES_MAX: usize = 8 << 20;

/// How long what still comes here is sent to where the workload runs: by then whoever has missed
/// the announcement has asked again.
const RELAY_TIME: Duration = Duration::from_secs(3);
