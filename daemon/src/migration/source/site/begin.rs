//! What a survey, or a journal, says of a workload, and the site that is made of it.

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::watch;

use super::{Site, SourceNode};
use crate::migration::ports::PortState;
use crate::migration::source::calm::{Glance, Tries};
use crate::migration::source::drain::Drain;
use crate::migration::source::dumping::Dumping;
use crate::migration::source::folders::Folders;
use crate::migration::source::locked::FileLocks;
use crate::migration::source::member::{self, Member};
use crate::migration::source::network::Network;
use crate::migration::source::sending::Sending;
use crate::migration::source::state::{MemberState, SiteState};
use crate::migration::source::storage::Kept;
use crate::migration::source::tracking::{Budget, Paused, Tracking};
use crate::migration::source::waits::Waits;
use crate::migration::source::workload::Workload;
use crate::migration::text::network_unfit;
use crate::runtime::identity::{Anchor, Identity};
use crate::runtime::ipc::Ipc;
use crate::runtime::kind::Party;
use crate::runtime::locks::Locks;
use pageferry_proto::id::MemberIndex;

/// What is known of a workload.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) party: Option<Party>,
    /// Its trees, and how locks of each are found.
    pub(super) trees: Vec<(Workload, Locks)>,
    pub(super) network: Network,
    pub(super) memory_bytes: u64,
    pub(super) true_smaps: bool,
    pub(super) kept: Kept,
    pub(super) folders: Folders,
}

impl Site {
    /// A site for a migration that a dead daemon has left: it can be thawed or released, unless it
    /// `is_over`. Asks nothing of shared storage: one that does not answer holds up no restart.
    pub async fn recover(
        node: SourceNode,
        id: MigrationId,
        policy: Policy,
        (state, is_over): (&DriverState, bool),
        cancelled: watch::Receiver<bool>,
    ) -> Result<Self, Failure> {
        let state: SiteState = serde_json::from_slice(state.as_bytes()).map_err(|error| {
            Failure::new(
                ErrorCode::Internal,
                format!("the journal of {id} is not readable: {error}"),
            )
        })?;
        let members = MemberIndex::all(usize::MAX).zip(state.all_members());
        let trees = members.map(|(member, one)| recovered(&node, &state.boot, (member, one)));
        // No freeze will look for locks; what was found is in the folder.
        let trees: Vec<_> = trees.map(|tree| (tree, Locks::default())).collect();
        // After another boot the same numbers mean other links.
        let known: &[PortState] = match identity_of(&state).is_this_boot() {
            true => &state.ports,
            false => &[],
        };
        let ports = PortState::again(known).await;
        let ports = ports.map_err(|error| network_unfit(&error))?;
        let found = Found {
            party: state.party,
            trees,
            network: Network::new(ports),
            memory_bytes: 0,
            true_smaps: false,
            // Of one that is over nothing is left to do.
            folders: Folders::recovered(node.keep.clone(), id),
            kept: Kept::recovered(if is_over { Vec::new() } else { state.markers }),
        };
        Ok(Self::untouched(node, id, policy, found, cancelled))
    }

    pub(super) fn untouched(
        node: SourceNode,
        id: MigrationId,
        policy: Policy,
        found: Found,
        cancelled: watch::Receiver<bool>,
    ) -> Self {
        let directory = node.migrations.join(id.to_string());
        let paused = Paused::default();
        let member = |(workload, locks): (Workload, Locks)| {
            let directory = member::folder(&directory, workload.member);
            let support = node.support.clone();
            Member {
                tracking: Tracking::new(support, found.true_smaps, paused.clone()),
                dumping: Dumping::new(&node, directory.clone()),
                locks: FileLocks::new(locks, directory),
                workload,
            }
        };
        let sending = Sending::new(node.workers);
        Self {
            drain: Drain::new(node.workers, sending.sent()),
            has_left: false,
            party: found.party,
            members: found.trees.into_iter().map(member).collect(),
            budget: Budget::new(&policy, node.eager_memory_max),
            network: found.network,
            peer: None,
            kept: found.kept,
            folders: found.folders,
            sending,
            waits: Waits::new(cancelled),
            tries: Tries::default(),
            glance: Glance::default(),
            memory_bytes: found.memory_bytes,
            directory,
            node,
            policy,
        }
    }
}

fn identity_of(state: &SiteState) -> Identity {
    Identity {
        pid: state.kind.root(),
        started: state.started,
        boot: state.boot.clone(),
    }
}

/// A tree that a dead daemon has left.
fn recovered(
    node: &SourceNode,
    boot: &str,
    (member, state): (MemberIndex, MemberState),
) -> Workload {
    let identity = Identity {
        pid: state.kind.root(),
        started: state.started,
        boot: boot.to_owned(),
    };
    let freezer = state.freezer(identity.is_this_boot());
    let (freezer, outer) = match state.kind.is_shared().then(|| freezer.held_within()) {
        Some(Some(within)) => (within, Some(freezer)),
        Some(None) | None => (freezer, None),
    };
    Workload {
        member,
        kind: state.kind,
        anchor: Anchor::again(&identity),
        own: Vec::new(),
        ipc: Ipc::default(),
        mounts: None,
        described_mounts: Vec::new(),
        freezer,
        outer,
        standing: Vec::new(),
        support: node.support.clone(),
    }
}
