//! All migrations of this node, and the only door to them.
//!
//! A migration belongs to the task of its driver; the registry keeps, for each, the receiver of its
//! status and the sender of requests. At start it reads the journals and sets every unfinished
//! migration going again, before a new one is taken.
//!
//! Limits: so many migrations in each direction at once; of those that ended the last
//! [`FINISHED_MAX`](super::journal::FINISHED_MAX) whole, and of older ones what a source may ask;
//! the last refused attempts.

mod finished;
mod incoming;
mod local;
mod recovery;
mod repeated;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use pageferry_proto::id::{MigrationId, NodeName, PodUid, WorkloadName};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::Record;
use pageferry_proto::migration::source::{SourceMachine, SourceOffer};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::{mpsc, oneshot, watch};

use super::clock::Clock;
use super::journal::{Journal, Journals, Recovered};
use super::progress::Progress;
use super::refusals::{Refusal, Refusals};
use super::source::site::{Asked, Site as SourceSite, SourceNode};
use super::source::{Ended, SourceDriver, SourceParts, SourceRequest};
use super::target::TargetRequest;
use super::target::site::TargetNode;
use super::text::chain;
use crate::net::endpoint::Endpoint;
use crate::runtime::kind::Named;

/// Requests that may wait for a driver.
const REQUESTS_MAX: usize = 8;

/// How long a workload that has just arrived may take to be filled before it can move on.
const FILL_TIMEOUT: Duration = Duration::from_secs(600);

/// How long aborting may hold up the end of the daemon.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything the migrations of this node share.
#[derive(Debug)]
pub struct RegistryParts {
    /// What sources need.
    pub source: SourceNode,
    /// What targets need.
    pub target: TargetNode,
    /// Dials and is dialled.
    pub endpoint: Arc<Endpoint>,
    /// The journals.
    pub journals: Journals,
    /// Connections per migration.
    pub lanes: u8,
    /// Incoming migrations at once.
    pub incoming_max: usize,
    /// Outgoing migrations at once.
    pub outgoing_max: usize,
}

/// The migrations of this node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    parts: RegistryParts,
    entries: Mutex<BTreeMap<MigrationId, Entry>>,
    /// Held while an incoming migration begins, or any is forgotten.
    beginnings: tokio::sync::Mutex<()>,
    /// Held while an outgoing migration begins: two of one workload must see each other.
    departures: tokio::sync::Mutex<()>,
    /// Migrations of which only the answer is kept.
    answers: Mutex<BTreeSet<MigrationId>>,
    /// Migrations away from here of which only the outcome is kept, the oldest first.
    outcomes: Mutex<VecDeque<MigrationId>>,
    refusals: Mutex<Refusals>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// When its journal was made.
    begun: SystemTime,
    /// If it leaves this node.
    departing: Option<Departing>,
    status: watch::Receiver<Arc<Progress>>,
    requests: Requests,
    /// It was over long ago, and its source asks once more: not listed.
    is_answer: bool,
}

/// Of a migration that leaves this node.
#[derive(Debug, Clone)]
struct Departing {
    /// The root of the workload's tree, in this node's pid namespace.
    root: i32,
    /// What was asked for.
    request: Arc<MigrateRequest>,
}

#[derive(Debug, Clone)]
enum Requests {
    Source(mpsc::Sender<SourceRequest>),
    Target(mpsc::Sender<TargetRequest>),
}

impl Requests {
    /// Whether the driver has ended.
    fn is_over(&self) -> bool {
        match self {
            Self::Source(requests) => requests.is_closed(),
            Self::Target(requests) => requests.is_closed(),
        }
    }
}

/// What an operator asks for.
#[derive(Debug, Clone)]
pub struct MigrateRequest {
    /// What the migration is to be called; one that is called so already is not begun again.
    pub id: Option<MigrationId>,
    /// What moves.
    pub workload: WorkloadName,
    /// Where to.
    pub target: NodeName,
    /// How.
    pub policy: Policy,
    /// It is held before its freeze, until [`Registry::proceed`].
    pub hold: bool,
    /// Beside that.
    pub asked: Asked,
}

impl Registry {
    /// Begins to move a workload away. Returns when the survey found nothing against it. What is
    /// refused is remembered.
    pub async fn migrate(&self, request: MigrateRequest) -> Result<MigrationId, Failure> {
        let (workload, target) = (request.workload.clone(), request.target.clone());
        let begun = self.depart(request).await;
        begun.map_err(|failure| {
            let failure = self.say_where(&workload, failure);
            self.refusals().add(Refusal {
                at: SystemTime::now(),
                workload,
                target,
                failure: failure.clone(),
            });
            failure
        })
    }

    async fn depart(&self, request: MigrateRequest) -> Result<MigrationId, Failure> {
        if let Some(known) = self.repeated(&request)? {
            return Ok(known);
        }
        let parts = &self.inner.parts;
        if !parts.endpoint.peers().any(|peer| *peer == request.target) {
            return Err(Failure::new(
                ErrorCode::PeerUnknown,
                format!(
                    "node {} is not a peer in this node's configuration",
                    request.target
                ),
            ));
        }
        let named = Named::of(&request.workload)?;
        self.wait_filled(&request.workload, named.root()).await?;
        let _departing = self.inner.departures.lock().await;
        // Another call with the same id may have been faster.
        if let Some(known) = self.repeated(&request)? {
            return Ok(known);
        }
        self.refuse_busy(&request.workload, named.root(), None)?;
        self.begin_outgoing(named, request).await
    }

    async fn begin_outgoing(
        &self,
        named: Named,
        request: MigrateRequest,
    ) -> Result<MigrationId, Failure> {
        let parts = &self.inner.parts;
        let id = request.id.unwrap_or_else(|| MigrationId::new(random()));
        let (cancel, cancelled) = watch::channel(false);
        let (node, asked) = (parts.source.clone(), &request.asked);
        let survey = SourceSite::survey(node, id, named, request.policy, asked, cancelled).await?;
        let journal = parts
            .journals
            .create(id)
            .map_err(|error| Failure::new(ErrorCode::JournalFailed, chain(&error)))?;
        let clock = Clock::start();
        let offer = SourceOffer {
            id,
            workload: request.workload.clone(),
            peer: request.target.clone(),
            policy: request.policy,
            description: survey.description,
            network: request.asked.network.clone(),
            hold: request.hold,
            state: survey.state,
        };
        let machine = SourceMachine::new(offer, clock.now());
        let peer = parts.endpoint.address(&request.target);
        let site = (survey.site.to(peer), cancel);
        self.start_source(machine, clock, site, journal, request, &Origin::Asked);
        Ok(id)
    }

    /// A workload that came here a moment ago can be tracked only when its memory is in place.
    async fn wait_filled(&self, workload: &WorkloadName, root: i32) -> Result<(), Failure> {
        let filling = self.lock().values().find_map(|entry| {
            let progress = entry.status.borrow();
            let status = &progress.status;
            let arriving = status.role == Side::Target && status.phase == Phase::Running;
            (arriving && local::root(entry.departing.as_ref(), &progress) == Some(root))
                .then(|| entry.status.clone())
        });
        let Some(mut status) = filling else {
            return Ok(());
        };
        tracing::info!(%workload, "waiting until its memory is in place");
        let filled = status.wait_for(|known| known.status.phase.is_final());
        match tokio::time::timeout(FILL_TIMEOUT, filled).await {
            // A closed channel means that the driver has ended.
            Ok(_) => Ok(()),
            Err(_) => Err(Failure::new(
                ErrorCode::WorkloadBusy,
                format!("{workload} is still being filled after {FILL_TIMEOUT:?}"),
            )),
        }
    }

    /// `except` is a migration that has ended, though its status does not say so yet.
    fn refuse_busy(
        &self,
        workload: &WorkloadName,
        root: i32,
        except: Option<MigrationId>,
    ) -> Result<(), Failure> {
        let (mut outgoing, mut busy) = (0, None);
        for (id, entry) in self.lock().iter() {
            let progress = entry.status.borrow();
            let status = &progress.status;
            if status.phase.is_final() || Some(*id) == except {
                continue;
            }
            outgoing += usize::from(status.role == Side::Source);
            if local::root(entry.departing.as_ref(), &progress)
                .is_some_and(|theirs| local::overlap(theirs, root))
            {
                busy = Some(*id);
            }
        }
        if let Some(id) = busy {
            return Err(Failure::new(
                ErrorCode::WorkloadBusy,
                format!(
                    "{workload}, or a part of it, or what it is a part of, is being moved by \
                     migration {id}"
                ),
            ));
        }
        let max = self.inner.parts.outgoing_max;
        if outgoing >= max {
            return Err(Failure::new(
                ErrorCode::Limit,
                format!("{outgoing} migrations leave this node already; the limit is {max}"),
            ));
        }
        Ok(())
    }

    fn start_source(
        &self,
        machine: SourceMachine,
        clock: Clock,
        (site, cancel): (SourceSite, watch::Sender<bool>),
        journal: Journal,
        request: MigrateRequest,
        origin: &Origin,
    ) {
        let (id, begun) = (machine.id(), journal.begun());
        let (recovered, root) = (origin.is_recovered(), site.root());
        let notes = site.notes();
        for note in &notes {
            tracing::warn!(migration = %id, "{note}");
        }
        let successor = origin.successor();
        let (status, watched) = watch::channel(Arc::new(Progress {
            successor,
            notes,
            recovered,
            ..Progress::of(machine.status(clock.now()))
        }));
        let (requests, asked) = mpsc::channel(REQUESTS_MAX);
        // Whoever holds one says by its id that it may proceed.
        let repeatable = !recovered && !request.hold && request.asked.instead_of.is_none();
        let driver = SourceDriver::new(SourceParts {
            machine,
            clock,
            site,
            cancel,
            requests: asked,
            status,
            journal,
            endpoint: Arc::clone(&self.inner.parts.endpoint),
            peer: request.target.clone(),
            lanes: self.inner.parts.lanes,
            repeatable,
            successor,
            recovered,
        });
        let request = Arc::new(request);
        let entry = Entry {
            begun,
            departing: Some(Departing {
                root,
                request: Arc::clone(&request),
            }),
            status: watched,
            requests: Requests::Source(requests),
            is_answer: false,
        };
        self.lock().insert(id, entry);
        let registry = self.clone();
        self.run(async move {
            if let Ended::Repeat(last, status) = driver.run().await {
                registry.repeat(id, *last, &status, &request).await;
            }
        });
    }

    /// Starts a migration in place of one that failed for a reason which another would not meet,
    /// and only then lets the failure be seen.
    async fn repeat(
        &self,
        id: MigrationId,
        mut last: Progress,
        status: &watch::Sender<Arc<Progress>>,
        request: &MigrateRequest,
    ) {
        let mut again = MigrateRequest {
            id: None,
            ..request.clone()
        };
        again.asked.instead_of = Some(id);
        // Boxed: a migration that is repeated ends in this function.
        let successor = Box::pin(self.depart_again(id, again)).await;
        match successor {
            Ok(successor) => {
                tracing::info!(migration = %id, %successor, "started again with the true smaps");
                last.successor = Some(successor);
            }
            Err(failure) => tracing::warn!(migration = %id, %failure, "not started again"),
        }
        status.send_replace(Arc::new(last));
    }

    /// Begins `again` in place of migration `id`, which has ended.
    async fn depart_again(
        &self,
        id: MigrationId,
        again: MigrateRequest,
    ) -> Result<MigrationId, Failure> {
        let named = Named::of(&again.workload)?;
        let _departing = self.inner.departures.lock().await;
        self.refuse_busy(&again.workload, named.root(), Some(id))?;
        self.begin_outgoing(named, again).await
    }

    fn run(&self, driver: impl Future<Output = ()> + Send + 'static) {
        let registry = self.clone();
        tokio::spawn(async move {
            driver.await;
            registry.forget_oldest().await;
        });
    }

    /// The last attempts that were refused before they began, the newest first.
    pub fn list_refusals(&self) -> Vec<Refusal> {
        self.refusals().list()
    }

    fn refusals(&self) -> MutexGuard<'_, Refusals> {
        let refusals = self.inner.refusals.lock();
        refusals.unwrap_or_else(PoisonError::into_inner)
    }

    /// All migrations, the newest first.
    pub fn list(&self) -> Vec<Arc<Progress>> {
        let mut entries: Vec<Entry> = self.lock().values().cloned().collect();
        entries.retain(|entry| !entry.is_answer);
        entries.sort_by_key(|entry| Reverse(entry.begun));
        entries
            .iter()
            .map(|entry| Arc::clone(&entry.status.borrow()))
            .collect()
    }

    /// One migration's status and its changes.
    pub fn watch(&self, id: MigrationId) -> Result<watch::Receiver<Arc<Progress>>, Failure> {
        let entry = self.entry(id).map(|entry| entry.status);
        entry.or_else(|failure| self.watch_kept(id).ok_or(failure))
    }

    /// Asks a migration to give up.
    pub async fn abort(&self, id: MigrationId) -> Result<(), Failure> {
        match self.entry(id)?.requests {
            Requests::Source(requests) => requests.send(SourceRequest::Abort).await.is_ok(),
            Requests::Target(requests) => requests.send(TargetRequest::Abort).await.is_ok(),
        }
        .then_some(())
        .ok_or_else(|| over(id))
    }

    /// Lets a migration that leaves this node, and is held, go on to its freeze.
    pub async fn proceed(&self, id: MigrationId) -> Result<(), Failure> {
        let sent = match self.entry(id)?.requests {
            Requests::Source(requests) => requests.send(SourceRequest::Proceed).await.is_ok(),
            Requests::Target(_) => {
                let text = format!("migration {id} comes to this node: its source is to proceed");
                return Err(Failure::new(ErrorCode::Unexpected, text));
            }
        };
        sent.then_some(()).ok_or_else(|| over(id))
    }

    /// Says which pod it is that a migration of a pod comes as.
    pub async fn expect(&self, id: MigrationId, pod: PodUid) -> Result<(), Failure> {
        let requests = match self.entry(id)?.requests {
            Requests::Target(requests) => requests,
            Requests::Source(_) => {
                let text = format!("migration {id} leaves this node: its target expects a pod");
                return Err(Failure::new(ErrorCode::Unexpected, text));
            }
        };
        let (answer, answered) = oneshot::channel();
        let asked = requests.send(TargetRequest::Expect { pod, answer }).await;
        asked.map_err(|_| over(id))?;
        answered.await.unwrap_or_else(|_| Err(over(id)))
    }

    /// Tells a migration that a side is dead for certain.
    pub async fn resolve(&self, id: MigrationId, fenced: Side) -> Result<(), Failure> {
        match self.entry(id)?.requests {
            Requests::Source(requests) => requests.send(SourceRequest::Fence(fenced)).await.is_ok(),
            Requests::Target(requests) => requests.send(TargetRequest::Fence(fenced)).await.is_ok(),
        }
        .then_some(())
        .ok_or_else(|| over(id))
    }

    /// Before the daemon stops: aborts what can still be aborted, so that no workload stays frozen
    /// for want of a daemon. What is committed goes on with the next one.
    pub async fn give_up(&self) {
        let entries: Vec<Entry> = self.lock().values().cloned().collect();
        let undecided = entries.into_iter().filter(|entry| {
            let status = &entry.status.borrow().status;
            status.role == Side::Source && !status.phase.is_final() && !is_decided(status.phase)
        });
        let aborted = undecided.map(|mut entry| async move {
            if let Requests::Source(requests) = &entry.requests {
                requests.send(SourceRequest::Abort).await.unwrap_or(());
            }
            drop(
                entry
                    .status
                    .wait_for(|known| known.status.phase.is_final())
                    .await,
            );
        });
        let aborted = futures_util::future::join_all(aborted);
        drop(tokio::time::timeout(GIVE_UP_TIMEOUT, aborted).await);
    }

    fn entry(&self, id: MigrationId) -> Result<Entry, Failure> {
        self.lock().get(&id).cloned().ok_or_else(|| {
            Failure::new(
                ErrorCode::MigrationUnknown,
                format!("there is no migration {id}"),
            )
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Entry>> {
        self.inner
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a driver is made of.
#[derive(Debug)]
enum Origin {
    /// An operator's request.
    Asked,
    /// A source that has connected.
    Offered,
    /// A whole journal, and the migration that another journal says was begun in place of this one.
    Journal { successor: Option<MigrationId> },
    /// The answer that is kept of one.
    Answer,
}

impl Origin {
    /// Whether what was measured has been lost.
    const fn is_recovered(&self) -> bool {
        match self {
            Self::Journal { .. } | Self::Answer => true,
            Self::Asked | Self::Offered => false,
        }
    }

    const fn successor(&self) -> Option<MigrationId> {
        match self {
            Self::Journal { successor } => *successor,
            Self::Answer | Self::Asked | Self::Offered => None,
        }
    }
}

/// From here on only the target or an operator ends it.
const fn is_decided(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::Committed | Phase::Draining | Phase::Reclaiming
    )
}

fn parse(id: MigrationId, recovered: &Recovered) -> Result<Vec<Record>, Failure> {
    let parsed = recovered
        .records
        .iter()
        .map(|bytes| Record::from_bytes(bytes));
    parsed.collect::<Result<_, _>>().map_err(|error| {
        Failure::new(
            ErrorCode::JournalFailed,
            format!("journal of {id}: {}", chain(&error)),
        )
    })
}

fn over(id: MigrationId) -> Failure {
    Failure::new(ErrorCode::Finished, format!("migration {id} is over"))
}

/// Random bytes from the provider that also makes the keys of connections.
fn random<const BYTES: usize>() -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    let provider = rustls::crypto::ring::default_provider();
    // It reads getrandom(2), which cannot fail once the kernel has booted.
    provider
        .secure_random
        .fill(&mut bytes)
        .expect("the kernel gives random bytes");
    bytes
}
