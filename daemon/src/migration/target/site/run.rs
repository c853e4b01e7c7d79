//! How a held workload gets its locks and its network, and how one that runs gets all of its
//! memory.

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use pageferry_pager::client::Notice;
use pageferry_pager::message::FillReport;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::go::GO_TIMEOUT;
use super::seat::Seat;
use super::{Network, Site, no_pager, pager_failed};
use crate::migration::progress::Waited;
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::detached;
use crate::runtime::kind::{lose, settle};

/// Announcements after the first, for switches that were busy: at these times after attaching.
const ANNOUNCEMENTS: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(500)];

impl Site {
    /// Has the held workload take its file locks on shared storage, all of them or not. Storage
    /// that hangs may hold that up: a discard cuts it off.
    pub async fn lock(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        let all = self.seats.iter().map(async |seat| {
            let locked = seat.client()?.lock().await;
            locked.map_err(pager_failed)
        });
        try_join_all(all).await?;
        tracing::debug!(migration = %self.id, took = ?began.elapsed(), "locked");
        Ok(())
    }

    /// Attaches the network, in a bounded time.
    pub(super) async fn attach(&mut self) -> Result<(), Failure> {
        let attached = tokio::time::timeout(GO_TIMEOUT, self.attach_links()).await;
        attached.unwrap_or_else(|_| {
            let text = format!("the network was not attached within {GO_TIMEOUT:?}");
            Err(Failure::new(ErrorCode::Timeout, text))
        })
    }

    async fn attach_links(&mut self) -> Result<(), Failure> {
        let mut pagers = self.seats.iter().filter_map(|seat| seat.pager.as_ref());
        let client = &pagers.next().ok_or_else(no_pager)?.client;
        let has_links = self.network.as_ref().is_some_and(Network::has_links);
        if has_links && self.namespace(NamespaceKind::Net).is_none() {
            let status = client.status().await.map_err(pager_failed)?;
            let root = status.root_pid.ok_or_else(no_pager)?;
            let net = namespace::open(root, NamespaceKind::Net).map_err(|e| internal(&e))?;
            self.namespaces.push((NamespaceKind::Net, net));
        }
        if let (Some(network), Some(net)) = (&self.network, self.namespace(NamespaceKind::Net)) {
            network
                .attach(net)
                .await
                .map_err(|error| network_unfit(&error))?;
        }
        Ok(())
    }

    /// Takes the network of a tree that has died away from its neighbours: the kernel would answer
    /// them with resets.
    pub(super) async fn detach(&self) {
        if let Some(network) = &self.network
            && let Err(error) = network.detach().await
        {
            // Discarding deletes it.
            tracing::warn!(migration = %self.id, "the network stays attached: {}", chain(&error));
        }
    }

    /// Repeats the announcements in the background.
    pub(super) fn announce_again(&self) {
        let (Some(network), Some(net)) = (&self.network, self.namespace(NamespaceKind::Net)) else {
            return;
        };
        let (network, Ok(net)) = (network.clone(), net.try_clone()) else {
            return;
        };
        tokio::spawn(async move {
            for pause in ANNOUNCEMENTS {
                tokio::time::sleep(pause).await;
                if let Err(error) = network.announce(&net) {
                    // The workload may have moved on or ended.
                    tracing::debug!("announcing again: {}", chain(&error));
                    return;
                }
            }
        });
    }

    /// Waits until all memory of the running workload is in place. What is lost of a member is said
    /// at once; the others run on.
    pub async fn filled(&mut self) -> Result<(), Failure> {
        let boot = self.is_of_another_boot;
        let seats = self.seats.iter_mut();
        try_join_all(seats.map(|seat| seat.filled(boot))).await?;
        self.over().await;
        Ok(())
    }

    /// The workload has run, and pages of it never come: it is frozen for good, at once. Waits
    /// until nothing is left of it; somebody must kill it.
    pub async fn abandon(&mut self) -> Result<(), Failure> {
        const WHY: &str = "pages of its memory were lost with its source";
        for seat in &mut self.seats {
            seat.is_lost = true;
            if !seat.freezer.is_empty() {
                let frozen = block_in_place(|| seat.freezer.freeze());
                frozen.map_err(|error| internal(&error))?;
            }
            block_in_place(|| lose(&seat.directory, WHY));
        }
        tracing::error!(migration = %self.id, "frozen for good: {WHY}");
        self.emptied().await;
        Ok(())
    }

    /// How long threads waited for pages that had not come, if any did: of the member that has
    /// waited longest.
    pub fn waited(&self) -> Option<Waited> {
        let all = self.seats.iter().filter_map(|seat| seat.waited);
        let waited = all.filter(|waited| 0 < waited.faults);
        waited.max_by_key(|waited| waited.p99_us)
    }

    /// Nobody waits for any memory any more.
    async fn over(&mut self) {
        block_in_place(|| self.seats.iter().for_each(|seat| settle(&seat.directory)));
        self.folders_settled().await;
        self.end_hold().await;
        self.clear();
    }

    /// Waits until the pager of a workload that has not been let go tells of its end.
    pub async fn trouble(&mut self) -> Failure {
        let (index, notice) = poll_fn(|context| {
            for (index, seat) in self.seats.iter_mut().enumerate() {
                if let Some(pager) = &mut seat.pager
                    && let Poll::Ready(notice) = pager.notices.poll_recv(context)
                {
                    return Poll::Ready((index, notice));
                }
            }
            Poll::Pending
        })
        .await;
        // What is undone now may be unmounted. Nobody waits for whoever applies something yet.
        let folders = self.intake.folders().clone();
        drop(detached::begin("close", move || folders.close()));
        match notice {
            Some(Notice::Failed { failure, .. }) => failure,
            // Nothing is filled before it runs, so whatever else is said, the pager is at its end.
            Some(Notice::Filled(_) | Notice::Lost) | None => {
                self.seats[index].pager = None;
                no_pager()
            }
        }
    }
}

fn waited(report: &FillReport) -> Waited {
    let of = &report.waited;
    Waited {
        faults: of.faults,
        p50_us: of.p50_us,
        p99_us: of.p99_us,
        max_us: of.max_us,
    }
}

impl Seat {
    /// Waits until it has all its memory, or never will. May be cut off, and asked again.
    pub(super) async fn filled(&mut self, is_of_another_boot: bool) -> Result<(), Failure> {
        if self.is_filled {
            return Ok(());
        }
        let notice = match &mut self.pager {
            Some(pager) => pager.notices.recv().await,
            // It has filled, or a daemon before this one has been told.
            None => Some(Notice::Lost),
        };
        let filled = match notice {
            Some(Notice::Filled(report)) => {
                tracing::info!(migration = %self.id, member = %self.member, ?report, "filled");
                self.waited = Some(waited(&report));
                Ok(())
            }
            Some(Notice::Failed { failure, .. }) => Err(failure),
            Some(Notice::Lost) | None => self.was_filled(is_of_another_boot),
        };
        self.is_filled = filled.is_ok();
        self.is_lost = filled.is_err();
        filled
    }
}
