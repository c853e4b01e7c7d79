//! The place a workload comes to: its namespaces, network, cgroup, pager, and what it is restored
//! from.
//!
//! Invariants: until [`Site::let_go`] nothing here can be reached from outside and nothing of the
//! workload has run; [`Site::discard`] leaves nothing behind from any point before; a [`Site`] that
//! was recovered can let go or discard what a dead daemon has prepared, since the pager that holds
//! the workload has outlived it.

mod files;
mod loopback;
mod network;
mod pod;
mod request;
mod run;
mod undo;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pageferry_cgroup::freezer::{Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::{Group, Groups, Hierarchies};
use pageferry_cgroup::identity::FolderId;
use pageferry_pager::client::{ClientError, Notice, PagerClient, Spawn};
use pageferry_pager::message::RestoreRequest;
use pageferry_pages::store::{Growth, Store, StoreLimits};
use pageferry_proto::id::{MigrationId, SpaceId};
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Offer;
use pageferry_proto::wire::description::MountDescription;
use pageferry_proto::wire::needs::ResourceLimits;
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, block_in_place};

use super::admission::{Ledger, Promise};
use super::cut_off;
use super::folders::{Folders, Shelf};
use super::images::{Images, make_images_lazy};
use super::intake::Intake;
use super::locked;
use super::network::{Network, NetworkState};
use crate::link::hold::Holds;
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::kind::Arriving;
use crate::runtime::limits::{self, Stage};
use crate::runtime::oci::arrive::{Restore, made_for, note_again};
use crate::runtime::rootfs::RootPlace;
use crate::runtime::shared::lengths;
use crate::runtime::{detached, identity};
use network::EngineNetwork;
use pod::Pod;
pub use run::LetGoError;

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
}

/// What a restarted daemon needs to find: kept in the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SiteState {
    freezer: PathBuf,
    /// What that is known by, if others may make one of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    freezer_id: Option<FolderId>,
    /// If it has one of its own.
    network: Option<NetworkState>,
    root_pid: Option<i32>,
    /// The boot in which it was written: nothing of a workload outlives it.
    boot: String,
}

/// The process that holds the workload, and what it says unasked.
#[derive(Debug)]
struct Pager {
    client: PagerClient,
    notices: mpsc::UnboundedReceiver<Notice>,
}

impl From<(PagerClient, mpsc::UnboundedReceiver<Notice>)> for Pager {
    fn from((client, notices): (PagerClient, mpsc::UnboundedReceiver<Notice>)) -> Self {
        Self { client, notices }
    }
}

/// A workload's place at its target.
#[derive(Debug)]
pub struct Site {
    node: TargetNode,
    id: MigrationId,
    directory: PathBuf,
    freezer: Freezer,
    /// The tree's is the freezer's cgroup too.
    groups: Groups,
    namespaces: Vec<(NamespaceKind, OwnedFd)>,
    /// If it has one of its own.
    network: Option<Network>,
    /// If its engine makes that.
    engine_network: Option<EngineNetwork>,
    /// Why what passes its loopback cannot be held back here, if so.
    ungated: Option<String>,
    /// What CRIU binds into a mount namespace of the workload's own; the root first.
    mounts: Vec<MountDescription>,
    /// What is offered, once it is.
    arriving: Option<Arriving>,
    /// What a pod is joined to, until it has the names and the rank that it is to have here.
    pod: Option<Pod>,
    /// Who makes it and its cgroups, if that is not us.
    made_by: Option<Restore>,
    /// What its cgroups allowed it at the source, if they are ours.
    limits: ResourceLimits,
    /// The workload's root at this node, once it is restored.
    root_pid: Option<i32>,
    pager: Option<Pager>,
    intake: Arc<Intake>,
    /// Whoever makes its folders its own.
    settling: Option<JoinHandle<()>>,
    /// It was tried to let it go, and it is not known that nothing ran.
    may_have_run: bool,
    /// It was made in a boot before this one: no process of it is left.
    is_of_another_boot: bool,
    /// Until it has all its memory, or is gone. What a recovered one needs is taken already.
    promise: Option<Arc<Promise>>,
    /// From the request to CRIU's post-restore.
    pub(super) restore_time: Option<Duration>,
}

impl Site {
    /// A place with nothing in it but a folder.
    pub fn new(node: TargetNode, id: MigrationId) -> Result<Self, Failure> {
        let directory = node.migrations.join(id.to_string());
        let store = Arc::new(Store::new(UNPROMISED));
        let folders = Folders::new(node.shelf.clone(), id);
        let intake = Intake::new(store, directory.join("images"), folders, node.workers)?;
        let freezer = node.freezers.plan(&id.to_string());
        Ok(Self {
            groups: groups(&node, id, &freezer),
            freezer,
            node,
            id,
            directory,
            namespaces: Vec::new(),
            network: None,
            engine_network: None,
            ungated: None,
            mounts: Vec::new(),
            arriving: None,
            pod: None,
            made_by: None,
            limits: ResourceLimits::default(),
            root_pid: None,
            pager: None,
            intake: Arc::new(intake),
            settling: None,
            may_have_run: false,
            is_of_another_boot: false,
            promise: None,
            restore_time: None,
        })
    }

    /// The place a dead daemon has left.
    pub async fn recover(
        node: TargetNode,
        id: MigrationId,
        state: &DriverState,
    ) -> Result<Self, Failure> {
        let store = Arc::new(Store::new(UNPROMISED));
        let folders = Folders::new(node.shelf.clone(), id);
        let freezer = node.freezers.plan(&id.to_string());
        let mut site = Self {
            groups: groups(&node, id, &freezer),
            freezer,
            directory: node.migrations.join(id.to_string()),
            intake: Arc::new(Intake::detached(store, folders)),
            node,
            id,
            namespaces: Vec::new(),
            network: None,
            engine_network: None,
            ungated: None,
            mounts: Vec::new(),
            arriving: None,
            pod: None,
            made_by: None,
            limits: ResourceLimits::default(),
            root_pid: None,
            pager: None,
            settling: None,
            may_have_run: false,
            is_of_another_boot: false,
            promise: None,
            restore_time: None,
        };
        if state.as_bytes().is_empty() {
            return Ok(site);
        }
        let state: SiteState = serde_json::from_slice(state.as_bytes()).map_err(|error| {
            Failure::new(
                ErrorCode::Internal,
                format!("the journal of {id} is not readable: {error}"),
            )
        })?;
        site.root_pid = state.root_pid;
        let boot = identity::boot().map_err(|error| internal(&error))?;
        site.is_of_another_boot = state.boot != boot;
        let known = match site.is_of_another_boot {
            false => state.freezer_id,
            true => state.freezer_id.map(|_| FolderId::NEVER),
        };
        site.freezer = Freezer::again(state.freezer, known);
        // After another boot nothing is left of it.
        if let Some(network) = state.network.filter(|_| !site.is_of_another_boot) {
            let network = Network::recover(id, network).await;
            site.network = Some(network.map_err(|error| network_unfit(&error))?);
        }
        // A pager that is gone has taken its workload with it, or has filled it and ended.
        match PagerClient::connect(&site.directory) {
            Ok(pager) => site.pager = Some(Pager::from(pager)),
            Err(error) => tracing::info!(migration = %id, "no pager: {}", chain(&error)),
        }
        Ok(site)
    }

    /// Why what was held when a daemon died is not held any more, if so.
    pub fn is_dropped(&self) -> Option<Failure> {
        let is_gone = self.pager.is_none();
        is_gone.then(|| match self.is_of_another_boot {
            true => Failure::new(
                ErrorCode::FillLost,
                "this node was restarted: the workload that it held, and never ran, is gone",
            ),
            false => no_pager(),
        })
    }

    /// The workload's root in this node's pid namespace, once it is restored.
    pub const fn root_pid(&self) -> Option<i32> {
        self.root_pid
    }

    /// Where streams of pages and images go.
    pub fn intake(&self) -> Arc<Intake> {
        Arc::clone(&self.intake)
    }

    /// Compares the offer with this node and makes what the workload needs.
    pub async fn prepare(&mut self, offer: &Offer) -> Result<DriverState, Failure> {
        let description = &offer.description;
        if description.criu_version > self.node.criu_version {
            return Err(Failure::new(
                ErrorCode::NodeUnfit,
                format!(
                    "the source's criu {} is newer than the target's {}: images may not be \
                     readable",
                    version_text(description.criu_version),
                    version_text(self.node.criu_version)
                ),
            ));
        }
        // Before threads begin.
        let arriving = Arriving::begin(&offer.workload, description)?;
        let (kind, described) = (arriving.clone(), description.clone());
        // Files may be on storage that does not answer.
        detached::done("check", move || kind.check(&described)).await??;
        self.admit(offer)?;
        let root = arriving.root_place()?;
        block_in_place(|| self.make_places(&arriving, (&description.copied, root.as_ref())))?;
        if offer.policy.verify {
            // No page comes before the offer is accepted.
            self.intake.store().keep_digests();
        }
        let mut kinds = arriving.namespaces(description);
        // One that is joined is there already.
        kinds.retain(|kind| *kind != NamespaceKind::Net || offer.network.is_none());
        self.mounts.clone_from(&description.mounts);
        let made = block_in_place(|| namespace::create(&kinds)).map_err(|error| {
            Failure::new(
                ErrorCode::NodeUnfit,
                format!("cannot make namespaces: {error}"),
            )
        })?;
        self.namespaces = kinds.into_iter().zip(made).collect();
        if let Some(uts) = self.namespace(NamespaceKind::Uts) {
            let named = namespace::set_names(uts, &description.hostname, &description.domainname);
            named.map_err(|error| {
                Failure::new(
                    ErrorCode::NodeUnfit,
                    format!("cannot set the host name: {error}"),
                )
            })?;
        }
        if arriving.is_pod() {
            self.pod = Some(Pod::of(&description.links)?);
            self.arriving = Some(arriving);
            return self.state();
        }
        self.prepare_network(offer, &arriving).await?;
        let made_by = arriving.made_by(&self.directory, &self.node.hierarchies);
        self.made_by = made_by.map_err(|error| internal(&error))?;
        self.arriving = Some(arriving);
        if self.made_by.is_none() {
            self.limits = description.needs.limits;
        } else {
            self.groups.tree = Group::default();
        }
        self.make_groups()?;
        self.start_pager().await?;
        if let Some(net) = self.join_engine_network().await? {
            self.hand_over_loopback_of(&net).await?;
        }
        if root == Some(RootPlace::Overlay) {
            block_in_place(|| self.find_overlay())?;
        }
        self.state()
    }

    /// Sets limits of the workload, of which those of processes and processor time hold only when
    /// it is restored. Returns the cgroups that they are set on.
    fn limit(&self, stage: Stage) -> Result<Vec<PathBuf>, Failure> {
        let (name, hierarchies) = (self.id.to_string(), &self.node.hierarchies);
        limits::set(&self.limits, &name, hierarchies, stage).map_err(|error| {
            let text = format!("the limits of the workload: {}", chain(&error));
            Failure::new(ErrorCode::NodeUnfit, text)
        })
    }

    /// Makes the cgroups of workload, pager and watcher; the workload's with its limits.
    fn make_groups(&mut self) -> Result<(), Failure> {
        let limited = self.limit(Stage::Making)?;
        let tree = std::mem::take(&mut self.groups.tree);
        self.groups.tree = limited.into_iter().fold(tree, Group::and);
        let Groups {
            tree,
            pager,
            watcher,
        } = &self.groups;
        for group in [tree, pager, watcher] {
            group
                .make()
                .map_err(|error| Failure::new(ErrorCode::NodeUnfit, chain(&error)))?;
        }
        Ok(())
    }

    /// Starts the pager, and in it a CRIU that waits.
    async fn start_pager(&mut self) -> Result<(), Failure> {
        let spawn = Spawn {
            program: self.node.pager.clone(),
            directory: self.directory.clone(),
            id: self.id,
            cgroup_procs: self.groups.pager.procs_files(),
            watcher_cgroup_procs: self.groups.watcher.procs_files(),
        };
        let pager = PagerClient::spawn(&spawn).await.map_err(pager_failed)?;
        // From here on a discard finds it, wherever this is cut off.
        self.pager = Some(Pager::from(pager));
        self.hand_over_loopback().await?;
        let client = &self.pager.as_ref().ok_or_else(no_pager)?.client;
        let namespaces = self.pager_namespaces()?;
        let prepared = client.prepare(self.restore_request(), &namespaces);
        let criu = prepared.await.map_err(pager_failed)?;
        if let Some(restore) = &self.made_by {
            let made_by = (restore.program.as_path(), criu);
            let roots = (&self.node.freezers, &self.node.hierarchies);
            self.freezer = block_in_place(|| made_for(made_by, roots, &self.directory))?;
        }
        Ok(())
    }

    /// Has the memory promised that the workload may need.
    fn admit(&mut self, offer: &Offer) -> Result<(), Failure> {
        let store = self.intake.store();
        let (needs, verify) = (&offer.description.needs, offer.policy.verify);
        let promise = block_in_place(|| self.node.memory.promise(needs, verify, store.counter()))?;
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

    /// Restores the workload and holds it before its first instruction.
    pub async fn restore(&mut self) -> Result<DriverState, Failure> {
        let images = self.intake.images();
        let told = images.clone();
        detached::done("lengths", move || lengths::check(&told)).await??;
        let Images {
            spaces,
            tasks,
            adopts,
        } = block_in_place(|| make_images_lazy(&images))?;
        if let Some(arriving) = &self.arriving {
            arriving.check_tasks(&tasks)?;
        }
        block_in_place(|| self.check_connections(&images))?;
        block_in_place(|| self.intake.folders().put())?;
        let locks =
            block_in_place(|| locked::take_out(&images, |pid| spaces.contains(&SpaceId(pid))))?;
        // Late births are only known from the images; they have no pages to be filled.
        let mut plan = Vec::with_capacity(spaces.len());
        let pager = &self.pager.as_ref().ok_or_else(no_pager)?.client;
        for id in spaces {
            let space = self
                .intake
                .store()
                .space(id)
                .map_err(|error| internal(&error))?;
            pager
                .space(id, space.descriptor())
                .await
                .map_err(pager_failed)?;
            plan.push((id, space.held().data));
        }
        let pending: Vec<_> = plan.iter().map(|(id, pages)| (*id, pages)).collect();
        pager.plan(&pending).await.map_err(pager_failed)?;
        let request = RestoreRequest {
            spaces: u32::try_from(plan.len()).map_err(|error| internal(&error))?,
            reaper: adopts.then(|| self.node.view_library.clone()),
            locks,
            ..self.restore_request()
        };
        let restored = pager
            .restore(request, &self.pager_namespaces()?, &[])
            .await
            .map_err(pager_failed)?;
        self.root_pid = Some(restored.root_pid);
        block_in_place(|| self.intake.folders().check_restored())?;
        if restored.freezer_id != self.freezer.id() {
            let path = self.freezer.path().to_owned();
            self.freezer = Freezer::again(path, restored.freezer_id);
            let noted = block_in_place(|| note_again(&self.directory));
            noted.map_err(|error| internal(&error))?;
            // It has made another network, too. Its loopback was not shut: that restore would have
            // failed if it had to be.
            self.join_engine_network().await?;
        }
        self.restore_time = Some(Duration::from_millis(restored.restore_ms));
        self.limit(Stage::Restored)?;
        block_in_place(|| self.settle_pod())?;
        self.check_bridges().await?;
        tracing::info!(migration = %self.id, root = restored.root_pid,
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
        let state = SiteState {
            freezer: self.freezer.path().to_owned(),
            freezer_id: self.freezer.id(),
            network: self.network.as_ref().map(Network::state),
            root_pid: self.root_pid,
            boot: identity::boot().map_err(|error| internal(&error))?,
        };
        let bytes = serde_json::to_vec(&state).map_err(|error| internal(&error))?;
        DriverState::new(bytes).map_err(|error| internal(&error))
    }
}

/// The cgroups of a migration: the tree's is its freezer's wherever that is.
fn groups(node: &TargetNode, id: MigrationId, freezer: &Freezer) -> Groups {
    let groups = node.hierarchies.groups(&id.to_string());
    Groups {
        tree: groups.tree.and(freezer.path().to_owned()),
        ..groups
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
