//! The seat of one member of what comes: its cgroups, its pager, and what it is restored from. What
//! is no party has one.
//!
//! Invariants: the first member's is where that of a workload alone is, in names and folders; no
//! seat knows of another, so that what is undone of one is undone of none else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pageferry_cgroup::freezer::Freezer;
use pageferry_cgroup::hierarchies::{Group, Groups};
use pageferry_cgroup::identity::FolderId;
use pageferry_pager::client::{Notice, PagerClient, Spawn};
use pageferry_pager::message::{FillReport, RestoreRequest, Restored};
use pageferry_pages::store::{SpaceStore, Store};
use pageferry_proto::id::{MemberIndex, MigrationId, SpaceId};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::MountDescription;
use pageferry_proto::wire::needs::ResourceLimits;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use super::request::CriuNamespaces;
use super::{TargetNode, no_pager, pager_failed};
use crate::link::loopback::LoGate;
use crate::migration::progress::Waited;
use crate::migration::target::feed::Feed;
use crate::migration::target::images::{Images, make_images_lazy};
use crate::migration::target::locked;
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::kind::Arriving;
use crate::runtime::limits::{self, Stage};
use crate::runtime::oci::arrive::{Restore, made_for, note_again};

/// The process that holds a member, and what it says unasked.
#[derive(Debug)]
pub(super) struct Pager {
    pub(super) client: Arc<PagerClient>,
    pub(super) notices: mpsc::UnboundedReceiver<Notice>,
}

impl From<(PagerClient, mpsc::UnboundedReceiver<Notice>)> for Pager {
    fn from((client, notices): (PagerClient, mpsc::UnboundedReceiver<Notice>)) -> Self {
        let client = Arc::new(client);
        Self { client, notices }
    }
}

/// The place of one member.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) member: MemberIndex,
    pub(super) id: MigrationId,
    /// Of its files: of the first member the migration's own.
    pub(super) directory: PathBuf,
    /// What its cgroups are called, where they are ours.
    pub(super) name: String,
    pub(super) freezer: Freezer,
    /// The tree's is the freezer's cgroup too.
    pub(super) groups: Groups,
    /// What CRIU binds into a mount namespace of the workload's own; the root first.
    pub(super) mounts: Vec<MountDescription>,
    /// What is offered, once it is.
    pub(super) arriving: Option<Arriving>,
    /// Who makes it and its cgroups, if that is not us.
    pub(super) made_by: Option<Restore>,
    /// What its cgroups allowed it at the source, if they are ours.
    pub(super) limits: ResourceLimits,
    /// Its root at this node, once it is restored.
    pub(super) root_pid: Option<i32>,
    pub(super) pager: Option<Pager>,
    /// It has all its memory.
    pub(super) is_filled: bool,
    /// How long threads of it waited for what had not come.
    pub(super) waited: Option<Waited>,
    /// When its pager told so, in nanoseconds since the boot, and what.
    pub(super) fill: Option<(u64, FillReport)>,
    /// It may have run, and never will again.
    pub(super) is_lost: bool,
}

/// What a restarted daemon needs to find of a member: kept in the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SeatState {
    freezer: PathBuf,
    /// What that is known by, if others may make one of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    freezer_id: Option<FolderId>,
    root_pid: Option<i32>,
}

/// What a member's images say it will be.
#[derive(Debug)]
pub(super) struct Planned {
    folder: PathBuf,
    plan: Vec<(SpaceId, SpaceFile)>,
    adopts: bool,
    locks: bool,
}

/// A space of the store, its pages that are to be filled, and those of them that have not come.
type SpaceFile = (Arc<SpaceStore>, PageSet, PageSet);

impl Seat {
    /// One with nothing in it.
    pub(super) fn new(node: &TargetNode, id: MigrationId, member: MemberIndex) -> Self {
        let directory = node.migrations.join(id.to_string());
        let (name, directory) = match member.number() {
            0 => (id.to_string(), directory),
            number => (format!("{id}.{number}"), directory.join(number.to_string())),
        };
        let freezer = node.freezers.plan(&name);
        let groups = node.hierarchies.groups(&name);
        Self {
            groups: Groups {
                tree: groups.tree.and(freezer.path().to_owned()),
                ..groups
            },
            freezer,
            member,
            id,
            directory,
            name,
            mounts: Vec::new(),
            arriving: None,
            made_by: None,
            limits: ResourceLimits::default(),
            root_pid: None,
            pager: None,
            is_filled: false,
            waited: None,
            fill: None,
            is_lost: false,
        }
    }

    /// What a dead daemon has left of it.
    pub(super) fn recover(&mut self, state: SeatState, is_of_another_boot: bool) {
        self.root_pid = state.root_pid;
        let known = match is_of_another_boot {
            false => state.freezer_id,
            true => state.freezer_id.map(|_| FolderId::NEVER),
        };
        self.freezer = Freezer::again(state.freezer, known);
        // A pager that is gone has taken its tree with it, or has filled it and ended.
        match PagerClient::connect(&self.directory) {
            Ok(pager) => self.pager = Some(Pager::from(pager)),
            Err(error) => tracing::info!(migration = %self.id, member = %self.member,
                "no pager: {}", chain(&error)),
        }
    }

    pub(super) fn state(&self) -> SeatState {
        SeatState {
            freezer: self.freezer.path().to_owned(),
            freezer_id: self.freezer.id(),
            root_pid: self.root_pid,
        }
    }

    pub(super) fn client(&self) -> Result<&Arc<PagerClient>, Failure> {
        let pager = self.pager.as_ref().ok_or_else(no_pager)?;
        Ok(&pager.client)
    }

    /// Takes in hand what is to sit here; `limits` are its own if its cgroups are ours.
    pub(super) fn take(
        &mut self,
        node: &TargetNode,
        arriving: Arriving,
        limits: ResourceLimits,
    ) -> Result<(), Failure> {
        let made_by = arriving.made_by((&self.directory, self.id), &node.hierarchies);
        self.made_by = made_by.map_err(|error| internal(&error))?;
        self.arriving = Some(arriving);
        if self.made_by.is_none() {
            self.limits = limits;
        } else {
            self.groups.tree = Group::default();
        }
        self.make_groups(node)
    }

    /// Sets limits of the workload, of which those of processes and processor time hold only when
    /// it is restored. Returns the cgroups that they are set on.
    fn limit(&self, node: &TargetNode, stage: Stage) -> Result<Vec<PathBuf>, Failure> {
        limits::set(&self.limits, &self.name, &node.hierarchies, stage).map_err(|error| {
            let text = format!("the limits of the workload: {}", chain(&error));
            Failure::new(ErrorCode::NodeUnfit, text)
        })
    }

    /// Makes the cgroups of workload, pager and watcher; the workload's with its limits.
    pub(super) fn make_groups(&mut self, node: &TargetNode) -> Result<(), Failure> {
        let limited = self.limit(node, Stage::Making)?;
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

    /// Starts the pager, and in it a CRIU that waits, in these namespaces. `images` are the
    /// folder of the member's; `gate` is that of the loopback, if it is known. Answers with the
    /// process that is CRIU, or becomes it.
    pub(super) async fn start_pager(
        &mut self,
        node: &TargetNode,
        images: PathBuf,
        (namespaces, gate): (&CriuNamespaces<'_>, Option<&LoGate>),
    ) -> Result<i32, Failure> {
        let spawn = Spawn {
            program: node.pager.clone(),
            directory: self.directory.clone(),
            id: self.id,
            cgroup_procs: self.groups.pager.procs_files(),
            watcher_cgroup_procs: self.groups.watcher.procs_files(),
        };
        let pager = PagerClient::spawn(&spawn).await.map_err(pager_failed)?;
        // From here on a discard finds it, wherever this is cut off.
        self.pager = Some(Pager::from(pager));
        if let Some(gate) = gate {
            self.hand_over(gate).await?;
        }
        let request = self.restore_request(node, images);
        let prepared = self.client()?.prepare(request, namespaces);
        let criu = prepared.await.map_err(pager_failed)?;
        if let Some(restore) = &self.made_by {
            let made_by = (restore.program.as_path(), criu);
            let roots = (&node.freezers, &node.hierarchies);
            self.freezer = block_in_place(|| made_for(made_by, roots, &self.directory))?;
        }
        Ok(criu)
    }

    /// Gives the pager the gate of the loopback that the tree uses.
    pub(super) async fn hand_over(&self, gate: &LoGate) -> Result<(), Failure> {
        let descriptors = gate.descriptors().map_err(|error| network_unfit(&error))?;
        let handed = self.client()?.lo_gate(&descriptors);
        handed.await.map_err(pager_failed)
    }

    /// Makes ready the images in `folder`, and says what they will be. Blocks.
    pub(super) fn plan(
        &self,
        folder: &Path,
        (store, feed): (&Store, &Feed),
    ) -> Result<Planned, Failure> {
        let Images {
            spaces,
            tasks,
            adopts,
        } = make_images_lazy(folder, self.member)?;
        if let Some(arriving) = &self.arriving {
            arriving.check_tasks(&tasks)?;
        }
        let has = |pid| SpaceId::of(self.member, pid).is_ok_and(|id| spaces.contains(&id));
        let locks = locked::take_out(folder, has)?;
        // Late births are only known from the images; they have no pages to be filled.
        let file = |id: SpaceId| {
            let space = store.space(id).map_err(|error| internal(&error))?;
            let absent = feed.missing_of(id);
            let pages = space.held().data.union(&absent);
            Ok((id, (space, pages, absent)))
        };
        let plan = spaces
            .into_iter()
            .map(file)
            .collect::<Result<_, Failure>>()?;
        Ok(Planned {
            folder: folder.to_owned(),
            plan,
            adopts,
            locks,
        })
    }

    /// Restores the member and holds it before its first instruction.
    pub(super) async fn restore(
        &mut self,
        node: &TargetNode,
        planned: Planned,
        namespaces: &CriuNamespaces<'_>,
    ) -> Result<Restored, Failure> {
        let pager = self.client()?;
        // The pager has one tree, and knows its spaces by their pids.
        let own = |id: &SpaceId| SpaceId(id.vpid());
        for (id, (space, ..)) in &planned.plan {
            let given = pager.space(own(id), space.descriptor());
            given.await.map_err(pager_failed)?;
        }
        let pending = planned.plan.iter();
        let pending: Vec<_> = pending
            .map(|(id, (_, pages, _))| (own(id), pages))
            .collect();
        pager.plan(&pending).await.map_err(pager_failed)?;
        let absent = planned
            .plan
            .iter()
            .map(|(id, (.., absent))| (own(id), absent));
        let absent: Vec<_> = absent.filter(|(_, absent)| !absent.is_empty()).collect();
        if !absent.is_empty() {
            pager.absent(&absent).await.map_err(pager_failed)?;
        }
        let request = RestoreRequest {
            spaces: u32::try_from(pending.len()).map_err(|error| internal(&error))?,
            reaper: planned.adopts.then(|| node.view_library.clone()),
            locks: planned.locks,
            ..self.restore_request(node, planned.folder.clone())
        };
        let restored = pager
            .restore(request, namespaces, &[])
            .await
            .map_err(pager_failed)?;
        self.root_pid = Some(restored.root_pid);
        Ok(restored)
    }

    /// Takes note of a cgroup that a runtime has made anew; whether it has. One that had died was
    /// started again.
    pub(super) fn is_made_anew(&mut self, restored: &Restored) -> Result<bool, Failure> {
        if restored.freezer_id == self.freezer.id() {
            return Ok(false);
        }
        let path = self.freezer.path().to_owned();
        self.freezer = Freezer::again(path, restored.freezer_id);
        let noted = block_in_place(|| note_again(&self.directory));
        noted.map_err(|error| internal(&error))?;
        Ok(true)
    }

    /// Sets the limits that hold from now on.
    pub(super) fn limit_restored(&self, node: &TargetNode) -> Result<(), Failure> {
        self.limit(node, Stage::Restored).map(drop)
    }
}

/// The time that a restore took.
pub(super) const fn took(restored: &Restored) -> Duration {
    Duration::from_millis(restored.restore_ms)
}
