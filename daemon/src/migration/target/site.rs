//! The place a workload comes to: its namespaces, network, cgroup, pager, and what it is restored
//! from.
//!
//! Invariants: until [`Site::let_go`] nothing here can be reached from outside and nothing of the
//! workload has run; [`Site::discard`] leaves nothing behind from any point before; a [`Site`] that
//! was recovered can let go or discard what a dead daemon has prepared, since the pager that holds
//! the workload has outlived it.

mod course;
mod files;
mod go;
mod loopback;
mod network;
mod parking;
mod party;
mod pod;
mod request;
mod run;
mod seat;
mod undo;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_pager::client::ClientError;
use pageferry_pages::store::{Growth, MemoryFile, Store, StoreLimits};
use pageferry_proto::id::{MemberIndex, MigrationId, SpaceId};
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::migration::timeline as names;
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Offer;
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_proto::wire::needs::Needs;
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};
use tokio::task::{JoinHandle, block_in_place};

use super::admission::{Ledger, Promise};
use super::cut_off;
use super::folders::{Folders, Shelf};
use super::intake::Intake;
use super::network::{Network, NetworkState};
use crate::link::hold::Holds;
use crate::link::loopback::LoGate;
use crate::metrics::Metrics;
use crate::migration::text::{chain, internal, network_unfit};
use crate::migration::timeline::Timeline;
use crate::runtime::kind::{Arriving, Coming};
use crate::runtime::shared::lengths;
use crate::runtime::{detached, identity};
pub use go::LetGoError;
use network::EngineNetwork;
use parking::Offered;
use pod::Pod;
use seat::{Seat, SeatState};

/// Most address spaces of a workload; each has a memory file.
const SPACES_MAX: usize = 4096;

/// No page comes before an offer is accepted, and memory promised.
const UNPROMISED: StoreLimits = StoreLimits {
    data_pages_max: PageCount::ZERO,
    spaces_max: SPACES_MAX,
};

/// What every target of this node shares.
#[derive(Debug, Clone)]
pub struct TargetNode {
    /// The `criu` program.
    pub criu: PathBuf,
    /// CRIU's view library.
    pub view_library: PathBuf,
    /// What container runtimes are to find as CRIU.
    pub stand_in: PathBuf,
    /// CRIU's version as the wire carries it.
    pub criu_version: u32,
    /// The pager program.
    pub pager: PathBuf,
    /// A tmpfs folder in which each migration has one of its own.
    pub migrations: PathBuf,
    /// Where freezer cgroups are made.
    pub freezers: FreezerRoot,
    /// Where all other cgroups are made.
    pub hierarchies: Hierarchies,
    /// The bridge that links become ports of; without one only workloads without links may come.
    pub bridge: Option<String>,
    /// Where engines attach links of workloads that do not run yet.
    pub holds: Holds,
    /// What incoming workloads have been promised of this node's memory.
    pub memory: Ledger,
    /// Where folders are that come, and those that have left.
    pub shelf: Shelf,
    /// Threads that decode.
    pub workers: usize,
    /// Whether what came for a frozen workload is taken from its source.
    pub parks: bool,
    /// Whether workloads may come with pages missing, which the loss of their source would lose.
    pub drains: bool,
    /// Counts what comes.
    pub metrics: Metrics,
}

/// What a restarted daemon needs to find: kept in the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SiteState {
    /// The first member.
    #[serde(flatten)]
    first: SeatState,
    /// If it has one of its own.
    network: Option<NetworkState>,
    /// The boot in which it was written: nothing of a workload outlives it.
    boot: String,
    /// The members after the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    members: Vec<SeatState>,
}

/// A workload's place at its target.
#[derive(Debug)]
pub struct Site {
    node: TargetNode,
    id: MigrationId,
    directory: PathBuf,
    /// Of each member, the first one first; never none.
    seats: Vec<Seat>,
    namespaces: Vec<(NamespaceKind, OwnedFd)>,
    /// If it has one of its own.
    network: Option<Network>,
    /// If its engine makes that.
    engine_network: Option<EngineNetwork>,
    /// Why what passes its loopback cannot be held back here, if so.
    ungated: Option<String>,
    /// Its links as they are offered, once they are.
    offered: Offered,
    /// What a pod is joined to, until it has the names and the rank that it is to have here.
    pod: Option<Pod>,
    intake: Arc<Intake>,
    /// Whoever makes its folders its own.
    settling: Option<JoinHandle<()>>,
    /// It was tried to let it go, and it is not known that nothing ran.
    may_have_run: bool,
    /// It was made in a boot before this one: no process of it is left.
    is_of_another_boot: bool,
    /// Until it has all its memory, or is gone. What a recovered one needs is taken already.
    promise: Option<Arc<Promise>>,
    /// From the request to CRIU's post-restore: that of the member that took longest.
    pub(super) restore_time: Option<Duration>,
    /// Where what takes long is noted.
    timeline: Timeline,
}

impl Site {
    /// A place with nothing in it but a folder.
    pub fn new(node: TargetNode, id: MigrationId) -> Result<Self, Failure> {
        let images = node.migrations.join(id.to_string()).join("images");
        let store = Arc::new(Store::new(UNPROMISED));
        let folders = Folders::new(node.shelf.clone(), id);
        let intake = Intake::new(store, images, folders, node.workers)?;
        let intake = intake.counted_by(&node.metrics);
        if !node.parks {
            intake.parking().close();
        }
        Ok(Self::with(node, id, intake))
    }

    fn with(node: TargetNode, id: MigrationId, intake: Intake) -> Self {
        let first = Seat::new(&node, id, MemberIndex::FIRST);
        Self {
            directory: first.directory.clone(),
            seats: vec![first],
            node,
            id,
            namespaces: Vec::new(),
            network: None,
            engine_network: None,
            ungated: None,
            offered: Offered::default(),
            pod: None,
            intake: Arc::new(intake),
            settling: None,
            may_have_run: false,
            is_of_another_boot: false,
            promise: None,
            restore_time: None,
            timeline: Timeline::default(),
        }
    }

    /// The place a dead daemon has left.
    pub async fn recover(
        node: TargetNode,
        id: MigrationId,
        state: &DriverState,
    ) -> Result<Self, Failure> {
        let store = Arc::new(Store::new(UNPROMISED));
        let folders = Folders::new(node.shelf.clone(), id);
        let mut site = Self::with(node, id, Intake::detached(store, folders));
        if state.as_bytes().is_empty() {
            return Ok(site);
        }
        let unreadable = |why: &dyn std::fmt::Display| {
            let text = format!("the journal of {id} is not readable: {why}");
            Failure::new(ErrorCode::Internal, text)
        };
        let state: SiteState =
            serde_json::from_slice(state.as_bytes()).map_err(|error| unreadable(&error))?;
        let boot = identity::boot().map_err(|error| internal(&error))?;
        site.is_of_another_boot = state.boot != boot;
        site.seat(1 + state.members.len())
            .map_err(|failure| unreadable(&failure))?;
        let states = std::iter::once(state.first).chain(state.members);
        for (seat, state) in site.seats.iter_mut().zip(states) {
            seat.recover(state, site.is_of_another_boot);
        }
        site.find_missing().await?;
        // After another boot nothing is left of it.
        if let Some(network) = state.network.filter(|_| !site.is_of_another_boot) {
            let network = Network::recover(id, network).await;
            site.network = Some(network.map_err(|error| network_unfit(&error))?);
        }
        Ok(site)
    }

    /// Asks the pagers what has not come, and goes on bringing it.
    async fn find_missing(&mut self) -> Result<(), Failure> {
        let store = self.intake.store();
        let mut missing = BTreeMap::new();
        for seat in &self.seats {
            let Ok(client) = seat.client() else { continue };
            for found in client.missing().await.map_err(pager_failed)? {
                let id = SpaceId::of(seat.member, found.space.0);
                let id = id.map_err(|error| internal(&error))?;
                let memory = MemoryFile::new(found.store);
                let memory = memory.map_err(|error| internal(&error))?;
                let adopted = store.adopt(id, memory);
                adopted.map_err(|error| internal(&error))?;
                missing.insert(id, found.pages);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        // It was promised to what the pager holds.
        let pages = missing.values().map(PageSet::len).sum();
        let none_beyond = Growth::new(|held| {
            let text = format!("{held} pages have come, more than were missing");
            Err(Failure::new(ErrorCode::Limit, text))
        });
        store.admit(pages, none_beyond);
        tracing::info!(migration = %self.id, %pages, "not all memory has come: it is fetched on");
        self.intake.feed().begin(None, missing);
        for seat in &self.seats {
            if let Ok(client) = seat.client() {
                self.intake.feed().attach(seat.member, client);
            }
        }
        Ok(())
    }

    /// Whether workloads may come to this node with pages missing.
    pub fn drains(&self) -> bool {
        self.node.drains
    }

    /// Whether pages of it are at the source alone.
    pub fn is_draining(&self) -> bool {
        self.intake.feed().is_needed()
    }

    /// Has a seat for each of so many members.
    fn seat(&mut self, members: usize) -> Result<(), Failure> {
        for number in self.seats.len()..members {
            let member = MemberIndex::new(number);
            let member =
                member.map_err(|error| Failure::new(ErrorCode::Malformed, error.to_string()))?;
            self.seats.push(Seat::new(&self.node, self.id, member));
        }
        Ok(())
    }

    /// Makes the folders of all members.
    fn make_folders(&self) -> Result<(), Failure> {
        let mut folders = self.seats.iter().map(|seat| &seat.directory);
        let made = folders.try_for_each(std::fs::create_dir_all);
        made.map_err(|error| internal(&error))
    }

    /// Why what was held when a daemon died is not held any more, if so.
    pub fn is_dropped(&self) -> Option<Failure> {
        let is_gone = self.seats.iter().any(|seat| seat.pager.is_none());
        is_gone.then(|| match self.is_of_another_boot {
            true => Failure::new(
                ErrorCode::FillLost,
                "this node was restarted: the workload that it held, and never ran, is gone",
            ),
            false => no_pager(),
        })
    }

    /// The workload's root in this node's pid namespace, once it is restored: that of its first
    /// member.
    pub fn root_pid(&self) -> Option<i32> {
        self.seats.first().and_then(|seat| seat.root_pid)
    }

    /// Where what takes long is noted.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Where streams of pages and images go.
    pub fn intake(&self) -> Arc<Intake> {
        Arc::clone(&self.intake)
    }

    /// Compares the offer with this node and makes what the workload needs.
    pub async fn prepare(&mut self, offer: &Offer) -> Result<DriverState, Failure> {
        let description = &offer.description;
        self.check_version(description)?;
        // Before threads begin.
        let coming = Coming::begin(&offer.workload, description)?;
        let (kinds, described) = (coming.clone(), description.clone());
        // Files may be on storage that does not answer.
        detached::done("check", move || kinds.check(&described)).await??;
        self.admit(offer)?;
        self.offered = Offered::of(&description.links);
        self.seat(coming.members.len())?;
        self.make_folders()?;
        self.intake.expect(self.seats.len());
        block_in_place(|| self.make_places(&coming, description))?;
        if offer.policy.verify {
            // No page comes before the offer is accepted.
            self.intake.store().keep_digests();
        }
        self.make_namespaces(&coming, offer)?;
        for (seat, description) in self.seats.iter_mut().zip(description.all_members()) {
            seat.mounts.clone_from(&description.mounts);
        }
        let Coming {
            mut members,
            around,
        } = coming;
        if members.iter().all(Arriving::is_pod) {
            self.pod = Some(Pod::of(&description.links)?);
            for (seat, arriving) in self.seats.iter_mut().zip(members) {
                seat.arriving = Some(arriving);
            }
            return self.state();
        }
        match around {
            Some(around) => self.make_around(&around, &mut members, offer).await?,
            None => self.prepare_network(offer, &members[0]).await?,
        }
        for ((seat, arriving), described) in self
            .seats
            .iter_mut()
            .zip(members)
            .zip(description.all_members())
        {
            seat.take(&self.node, arriving, described.needs.limits)?;
        }
        self.start_pagers().await?;
        if let Some(net) = self.join_engine_network().await? {
            self.hand_over_loopback_of(&net).await?;
            self.await_frames().await;
        }
        block_in_place(|| self.find_overlays())?;
        self.state()
    }

    fn check_version(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        let (theirs, ours) = (description.criu_version, self.node.criu_version);
        if theirs <= ours {
            return Ok(());
        }
        Err(Failure::new(
            ErrorCode::NodeUnfit,
            format!(
                "the source's criu {} is newer than the target's {}: images may not be readable",
                version_text(theirs),
                version_text(ours)
            ),
        ))
    }

    /// Makes the namespaces of the workload's own that are not its engine's.
    fn make_namespaces(&mut self, coming: &Coming, offer: &Offer) -> Result<(), Failure> {
        let description = &offer.description;
        let mut kinds = coming.namespaces(description);
        // One that is joined is there already.
        kinds.retain(|kind| *kind != NamespaceKind::Net || offer.network.is_none());
        let unfit = |what: &str, error: &dyn std::fmt::Display| {
            let text = format!("cannot {what}: {error}");
            Failure::new(ErrorCode::NodeUnfit, text)
        };
        let made = block_in_place(|| namespace::create(&kinds));
        let made = made.map_err(|error| unfit("make namespaces", &error))?;
        self.namespaces = kinds.into_iter().zip(made).collect();
        if let Some(uts) = self.namespace(NamespaceKind::Uts) {
            let named = namespace::set_names(uts, &description.hostname, &description.domainname);
            named.map_err(|error| unfit("set the host name", &error))?;
        }
        Ok(())
    }

    /// Starts the pager of each member, and in it a CRIU that waits.
    async fn start_pagers(&mut self) -> Result<(), Failure> {
        let gate = self.loopback_gate();
        self.await_frames().await;
        let images = self.images();
        let namespaces = request::criu_namespaces(&self.namespaces)?;
        let inside: (&request::CriuNamespaces<'_>, Option<&LoGate>) = (&namespaces, gate.as_ref());
        let node = &self.node;
        let seats = self.seats.iter_mut().zip(images);
        try_join_all(seats.map(|(seat, images)| seat.start_pager(node, images, inside)))
            .await
            .map(drop)
    }

    /// The folder with the images of each member.
    fn images(&self) -> Vec<PathBuf> {
        let members = self.seats.iter().map(|seat| seat.member);
        members.map(|member| self.intake.images(member)).collect()
    }

    /// Has the memory promised that the workload may need: the sum of what its members do.
    fn admit(&mut self, offer: &Offer) -> Result<(), Failure> {
        let store = self.intake.store();
        let members = offer.description.all_members();
        let needs = members.fold(Needs::default(), |sum, member| Needs {
            private_bytes: sum.private_bytes.saturating_add(member.needs.private_bytes),
            shared_bytes: sum.shared_bytes.saturating_add(member.needs.shared_bytes),
            ..sum
        });
        let (ledger, verify) = (&self.node.memory, offer.policy.verify);
        let promise = block_in_place(|| ledger.promise(&needs, verify, store.counter()))?;
        let promise = Arc::new(promise);
        let asked = Arc::downgrade(&promise);
        let growth = Growth::new(move |held| match asked.upgrade() {
            Some(promise) => promise.grow(held),
            None => Err(cut_off()),
        });
        store.admit(promise.pages(), growth);
        self.promise = Some(promise);
        Ok(())
    }

    /// Restores the workload and holds it before its first instruction: all its members at the same
    /// time. What fails of one is the failure of all.
    pub async fn restore(&mut self) -> Result<DriverState, Failure> {
        let images = self.images();
        let planning = self.timeline.begin(names::PLAN);
        for folder in images.clone() {
            detached::done("lengths", move || lengths::check(&folder)).await??;
        }
        let store = self.intake.store();
        let plans = block_in_place(|| {
            let seats = self.seats.iter().zip(&images);
            let from = (&**store, self.intake.feed());
            let plans = seats.map(|(seat, folder)| seat.plan(folder, from));
            plans.collect::<Result<Vec<_>, Failure>>()
        })?;
        block_in_place(|| self.check_connections(&images))?;
        drop(planning);
        let putting = self.timeline.begin(names::PUT);
        block_in_place(|| self.intake.folders().put())?;
        drop(putting);
        let namespaces = request::criu_namespaces(&self.namespaces)?;
        let inside: &request::CriuNamespaces<'_> = &namespaces;
        for seat in &self.seats {
            // The restore itself may touch pages that have not come.
            self.intake.feed().attach(seat.member, seat.client()?);
        }
        let node = &self.node;
        let seats = self.seats.iter_mut().zip(plans);
        let restored = try_join_all(seats.map(|(seat, plan)| seat.restore(node, plan, inside)));
        let restored = restored.await?;
        self.keep_course(&restored);
        let settling = self.timeline.begin(names::SETTLE);
        block_in_place(|| self.intake.folders().check_restored())?;
        let mut is_made_anew = false;
        for (seat, restored) in self.seats.iter_mut().zip(&restored) {
            is_made_anew |= seat.is_made_anew(restored)?;
        }
        if is_made_anew {
            // It has made another network, too. Its loopback was not shut: that restore would have
            // failed if it had to be.
            self.join_engine_network().await?;
            self.await_frames().await;
        }
        self.restore_time = restored.iter().map(seat::took).max();
        for seat in &self.seats {
            seat.limit_restored(&self.node)?;
        }
        block_in_place(|| self.settle_pod())?;
        self.check_bridges().await?;
        drop(settling);
        tracing::info!(migration = %self.id, root = self.root_pid(), members = self.seats.len(),
            took = ?self.restore_time, "restored and held");
        self.state()
    }

    fn namespace(&self, kind: NamespaceKind) -> Option<&OwnedFd> {
        self.namespaces
            .iter()
            .find(|(found, _)| *found == kind)
            .map(|(_, fd)| fd)
    }

    fn state(&self) -> Result<DriverState, Failure> {
        let mut states = self.seats.iter().map(Seat::state);
        let first = states.next().ok_or_else(no_pager)?;
        let state = SiteState {
            first,
            network: self.network.as_ref().map(Network::state),
            boot: identity::boot().map_err(|error| internal(&error))?,
            members: states.collect(),
        };
        let bytes = serde_json::to_vec(&state).map_err(|error| internal(&error))?;
        DriverState::new(bytes).map_err(|error| internal(&error))
    }
}

fn version_text(version: u32) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

fn no_pager() -> Failure {
    Failure::new(ErrorCode::FillLost, "the pager of the workload is gone")
}

fn pager_failed(error: ClientError) -> Failure {
    match error {
        ClientError::Failed { failure, .. } => failure,
        other => Failure::new(ErrorCode::FillLost, chain(&other)),
    }
}
