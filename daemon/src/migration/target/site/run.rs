//! How a held workload comes to run, and to all of its memory.
//!
//! Invariants: the network is attached only for a tree that its pager holds; that nothing ran is
//! said only when the pager, or its watcher, has said so.

use std::time::{Duration, Instant};

use pageferry_pager::client::{ClientError, Notice, PagerClient, Remains};
use pageferry_pager::message::State as PagerState;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::{Network, Pager, Site, no_pager, pager_failed};
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::detached;
use crate::runtime::kind::{self, about_to_run, lose, runs, settle};

/// How long a pager may take to let a tree go, or to undo it instead: five seconds for CRIU to give
/// up, ten for its tasks to die, and then it says that they do not.
const GO_TIMEOUT: Duration = Duration::from_secs(30);

/// Announcements after the first, for switches that were busy: at these times after attaching.
const ANNOUNCEMENTS: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(500)];

/// Why a workload does not run that was let go.
#[derive(Debug)]
pub enum LetGoError {
    /// It died before its first instruction, and nothing of it is left.
    NeverRan(Failure),
    /// It may have run, and nothing of it runs or ever will: what is left of it has no memory, and
    /// is frozen for good.
    Lost(Failure),
    /// It may run, or may yet.
    Unclear(Failure),
}

impl Site {
    /// Has the held workload take its file locks on shared storage, all of them or not. Storage
    /// that hangs may hold that up: a discard cuts it off.
    pub async fn lock(&mut self) -> Result<(), Failure> {
        let Some(Pager { client, .. }) = &self.pager else {
            return Err(no_pager());
        };
        let began = Instant::now();
        client.lock().await.map_err(pager_failed)?;
        tracing::debug!(migration = %self.id, took = ?began.elapsed(), "locked");
        Ok(())
    }

    /// Attaches the network and lets the workload run. Only when `Running` is durable; doing it
    /// again does no harm.
    pub async fn let_go(&mut self) -> Result<(), LetGoError> {
        // A daemon before this one may have come as far as that.
        self.may_have_run = true;
        block_in_place(|| about_to_run(&self.directory))?;
        let went = self.go().await;
        match &went {
            // An engine's container is not ours to remove any more.
            Ok(()) => block_in_place(|| runs(&self.directory)),
            Err(LetGoError::NeverRan(_)) => {
                self.may_have_run = false;
                block_in_place(|| kind::never_ran(&self.directory));
            }
            Err(LetGoError::Lost(failure)) => {
                block_in_place(|| lose(&self.directory, failure.text()));
            }
            Err(LetGoError::Unclear(_)) => {}
        }
        went
    }

    async fn go(&mut self) -> Result<(), LetGoError> {
        let Some(Pager { client, .. }) = &self.pager else {
            return self.without_pager();
        };
        let began = Instant::now();
        // Where a tree is dying the kernel would answer for it, with resets.
        if never_ran(client).await? != PagerState::Discarding {
            self.attach().await?;
        }
        block_in_place(|| self.intake.folders().hand_over())?;
        let attached = began.elapsed();
        let Some(Pager { client, .. }) = &self.pager else {
            return Err(no_pager().into());
        };
        let went = tokio::time::timeout(GO_TIMEOUT, client.go()).await;
        match went.unwrap_or(Err(ClientError::Silent(GO_TIMEOUT))) {
            Ok(()) => {}
            // It may run, so it keeps its network.
            Err(error @ ClientError::Failed { after_go: true, .. }) => {
                return Err(pager_failed(error).into());
            }
            Err(error) => {
                let known = match error {
                    // What it has left was written before the connection closed.
                    ClientError::Lost => self.without_pager(),
                    _ => never_ran(client).await.map(drop),
                };
                if let Err(LetGoError::NeverRan(_)) = &known {
                    self.detach().await;
                }
                known?;
                if !matches!(error, ClientError::Lost) {
                    return Err(pager_failed(error).into());
                }
            }
        }
        tracing::debug!(migration = %self.id, ?attached, resumed = ?began.elapsed(), "let go");
        self.announce_again();
        self.settle_folders();
        Ok(())
    }

    /// Attaches the network, in a bounded time.
    async fn attach(&mut self) -> Result<(), Failure> {
        let attached = tokio::time::timeout(GO_TIMEOUT, self.attach_links()).await;
        attached.unwrap_or_else(|_| {
            let text = format!("the network was not attached within {GO_TIMEOUT:?}");
            Err(Failure::new(ErrorCode::Timeout, text))
        })
    }

    async fn attach_links(&mut self) -> Result<(), Failure> {
        let Some(Pager { client, .. }) = &self.pager else {
            return Err(no_pager());
        };
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
    async fn detach(&self) {
        if let Some(network) = &self.network
            && let Err(error) = network.detach().await
        {
            // Discarding deletes it.
            tracing::warn!(migration = %self.id, "the network stays attached: {}", chain(&error));
        }
    }

    /// What an ended pager has left says whether the workload runs.
    fn without_pager(&mut self) -> Result<(), LetGoError> {
        let remains = Remains::read(&self.directory).map_err(|error| internal(&error))?;
        match remains {
            Remains::Filled(_) => {
                self.settle_folders();
                Ok(())
            }
            Remains::FillLost(line) => {
                Err(LetGoError::Lost(Failure::new(ErrorCode::FillLost, line)))
            }
            Remains::RestoreLost(line) => {
                let failure = Failure::new(ErrorCode::CriuFailed, line);
                Err(LetGoError::NeverRan(failure))
            }
            Remains::Nothing if self.is_of_another_boot => Err(LetGoError::Lost(restarted())),
            Remains::Nothing => Err(no_pager().into()),
        }
    }

    /// Repeats the announcements in the background.
    fn announce_again(&self) {
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

    /// Waits until all memory of the running workload is in place.
    pub async fn filled(&mut self) -> Result<(), Failure> {
        if let Some(pager) = &mut self.pager {
            match pager.notices.recv().await {
                Some(Notice::Filled(report)) => {
                    tracing::info!(migration = %self.id, ?report, "filled");
                }
                Some(Notice::Failed { failure, .. }) => return Err(failure),
                Some(Notice::Lost) | None => {
                    self.without_pager().map_err(LetGoError::failure)?;
                }
            }
        }
        block_in_place(|| settle(&self.directory));
        self.folders_settled().await;
        self.end_hold().await;
        self.clear();
        Ok(())
    }

    /// Waits until the pager of a workload that has not been let go tells of its end.
    pub async fn trouble(&mut self) -> Failure {
        let Some(pager) = &mut self.pager else {
            return std::future::pending().await;
        };
        let notice = pager.notices.recv().await;
        // What is undone now may be unmounted. Nobody waits for whoever applies something yet.
        let folders = self.intake.folders().clone();
        drop(detached::begin("close", move || folders.close()));
        match notice {
            Some(Notice::Failed { failure, .. }) => failure,
            // Nothing is filled before it runs, so whatever else is said, the pager is at its end.
            Some(Notice::Filled(_) | Notice::Lost) | None => {
                self.pager = None;
                no_pager()
            }
        }
    }
}

impl LetGoError {
    fn failure(self) -> Failure {
        match self {
            Self::NeverRan(failure) | Self::Lost(failure) | Self::Unclear(failure) => failure,
        }
    }
}

impl From<Failure> for LetGoError {
    fn from(failure: Failure) -> Self {
        Self::Unclear(failure)
    }
}

fn restarted() -> Failure {
    Failure::new(
        ErrorCode::FillLost,
        "this node was restarted after it was told to run the workload: whether it ran is not \
         known, and nothing of it is left here",
    )
}

/// Fails if the pager says that its tree died before it was let go, which it says only when nothing
/// of the tree is left; else says how things stand. A pager that does not answer proves nothing,
/// but its tree may be dying, and its network must not be attached.
async fn never_ran(pager: &PagerClient) -> Result<PagerState, LetGoError> {
    let status = tokio::time::timeout(GO_TIMEOUT, pager.status()).await;
    let status = status.unwrap_or(Err(ClientError::Silent(GO_TIMEOUT)));
    let status = status.map_err(pager_failed)?;
    match status.failure {
        Some(fault) if status.state == PagerState::Failed && !fault.after_go => {
            Err(LetGoError::NeverRan(fault.failure()))
        }
        Some(_) | None => Ok(status.state),
    }
}
