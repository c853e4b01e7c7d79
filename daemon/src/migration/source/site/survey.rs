//! How a site begins: a workload surveyed, or found again from the journal.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_cgroup::freezer::Freezer;
use pageferry_pages::track::shared_bytes;
use pageferry_pages::track::tree::Tree;
use pageferry_proto::id::{MigrationId, NetworkName};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::{Site, SourceNode};
use crate::link::describe::describe as describe_network;
use crate::link::port::Port;
use crate::migration::ports::PortState;
use crate::migration::source::calm::{Glance, Tries};
use crate::migration::source::dumping::Dumping;
use crate::migration::source::folders::Folders;
use crate::migration::source::locked::FileLocks;
use crate::migration::source::network::Network;
use crate::migration::source::sending::Sending;
use crate::migration::source::state::{SiteState, encode_state};
use crate::migration::source::storage::Kept;
use crate::migration::source::tracking::{Budget, Tracking, check_trackable};
use crate::migration::source::waits::Waits;
use crate::migration::source::workload::{Workload, ended, unreadable};
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::copied::check_paths;
use crate::runtime::cpu;
use crate::runtime::detached;
use crate::runtime::identity::{Anchor, Identity};
use crate::runtime::ipc::Ipc;
use crate::runtime::kind::Kind;
use crate::runtime::limits;
use crate::runtime::locks::Locks;
use crate::runtime::process::describe::{Described, mounts};
use crate::runtime::rootfs::RootFiles;
use crate::runtime::shared::{self, Storage};

/// How often it is looked for locks, and how long between two looks.
const LOOKS: usize = 5;
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// How long one look at the files of a workload may take: smaps take 11 ms per GiB, and thousands
/// of files as many questions to their storage.
const SURVEY_MAX: Duration = Duration::from_secs(60);

/// A surveyed workload: nothing of it has been touched.
#[derive(Debug)]
pub struct Survey {
    /// For the target.
    pub description: WorkloadDescription,
    /// For the journal.
    pub state: DriverState,
    /// For the driver.
    pub site: Site,
}

/// What a survey, or a journal, says of a workload.
#[derive(Debug)]
struct Found {
    workload: Workload,
    network: Network,
    memory_bytes: u64,
    true_smaps: bool,
    kept: Kept,
    folders: Folders,
    locks: Locks,
}

/// What was asked for, besides the policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Paths that both nodes share.
    pub shared: Vec<PathBuf>,
    /// Folders that travel along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copied: Vec<PathBuf>,
    /// The target is not to compare its processor with this node's.
    pub force_cpu: bool,
    /// What CRIU does not carry of System V objects may be lost.
    pub force_ipc: bool,
    /// The network namespace at the target that it is to join; none: one is made for it.
    #[serde(with = "as_text")]
    pub network: Option<NetworkName>,
    /// The migration of which CRIU was shown outdated smaps, if this is begun in its place: so CRIU
    /// is to read the true one in the freeze, not what was recorded before it.
    #[serde(with = "as_text")]
    pub instead_of: Option<MigrationId>,
}

impl Asked {
    /// What a driver's state in a journal says of it.
    pub fn of(state: &DriverState) -> serde_json::Result<Self> {
        serde_json::from_slice(state.as_bytes()).map(|state: SiteState| state.asked)
    }
}

/// A name in the journal.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<T: Display, S: Serializer>(
        name: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        name.as_ref().map(T::to_string).serialize(serializer)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let name = text.map(|text| text.parse()).transpose();
        name.map_err(D::Error::custom)
    }
}

/// The cgroup that is to hold it, where it can be held.
fn place(
    kind: &mut Kind,
    node: &SourceNode,
    pids: &[i32],
    id: MigrationId,
) -> Result<Freezer, Failure> {
    let freezer = kind.place(&node.freezers, pids, id)?;
    match kind.around(&freezer) {
        Ok(_) => Ok(freezer),
        Err(error) => {
            let text = format!("the workload could not be held: {}", chain(&error));
            Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
        }
    }
}

/// What the workload needs of a node, its CRIU too, and the limits it has here.
fn add_needs(
    description: &mut WorkloadDescription,
    node: &SourceNode,
    id: MigrationId,
    (pids, ipc): (&[i32], &Ipc),
) -> Result<(), Failure> {
    description.criu_version = node.criu_version;
    let limited = limits::read(description.root_pid, &node.hierarchies);
    description.needs.shared_bytes = shared_bytes(pids) + ipc.unmapped_bytes()?;
    description.needs.limits = limited.limits;
    for path in limited.left_behind {
        tracing::warn!(migration = %id, path = %path.display(),
            "what its cgroup says here is not carried to the target");
    }
    Ok(())
}

/// The network of a namespace of its own; this node's ends of it.
async fn add_network(
    description: &mut WorkloadDescription,
    root: i32,
) -> Result<Vec<Port>, Failure> {
    let net = namespace::open(root, NamespaceKind::Net).map_err(|error| {
        Failure::new(ErrorCode::WorkloadGone, format!("process {root}: {error}"))
    })?;
    let network = describe_network(&net).await;
    let network = network.map_err(|error| network_unfit(&error))?;
    description.links = network.links;
    description.routes = network.routes;
    Ok(network.ports)
}

/// The folders that travel with the tree of `pids`.
async fn add_folders(
    description: &mut WorkloadDescription,
    node: &SourceNode,
    id: MigrationId,
    (paths, root, pids): (Vec<PathBuf>, Option<RootFiles>, &[i32]),
) -> Result<Folders, Failure> {
    let keep = node.keep.clone();
    let members = pids.to_vec();
    let opening = move || Folders::open(keep, id, (&paths, root.as_ref()), &members);
    let (folders, copied) = looking(description.root_pid, opening).await?;
    description.copied = copied;
    Ok(folders)
}

/// Folders that travel: those that were named, and what its engine has for it alone, which knows so
/// from now on.
fn travelling(kind: &mut Kind, asked: &Asked) -> Result<Vec<PathBuf>, Failure> {
    let named = asked.copied.iter().chain(&asked.shared);
    let is_named = |path: &PathBuf| named.clone().any(|named| path.starts_with(named));
    let mut all = asked.copied.clone();
    all.extend(kind.folders().into_iter().filter(|path| !is_named(path)));
    check_paths(&all, &asked.shared)?;
    kind.keep_folders(&all);
    Ok(all)
}

/// What its processes share by way of the kernel, if all of that can move.
fn look_at_ipc(root: i32, node: &SourceNode, force: bool) -> Result<Ipc, Failure> {
    let ipc = Ipc::of(root, force)?;
    let members = || Ok(Tree::read(root).map_err(io::Error::other)?.pids());
    ipc.look(members, |pid| node.support.undoes(pid))?;
    Ok(ipc)
}

impl Site {
    /// Looks at a workload and says what the target must know, or why it cannot move.
    pub async fn survey(
        node: SourceNode,
        id: MigrationId,
        mut kind: Kind,
        policy: Policy,
        asked: &Asked,
        cancelled: watch::Receiver<bool>,
    ) -> Result<Survey, Failure> {
        let root = kind.root();
        // Everything below is read by its number.
        let anchor = Anchor::new(root).map_err(|_| ended(root))?;
        let tree = block_in_place(|| Tree::read(root)).map_err(|error| unreadable(&error))?;
        let pids = tree.pids();
        let (storage, locks) = find_storage(root, asked).await?;
        // Before files are opened: that would break the lease of one that is leased, and a message
        // queue would be taken for one.
        let ipc = block_in_place(|| look_at_ipc(root, &node, asked.force_ipc))?;
        check_locks(&locks, &pids).await?;
        let copied = travelling(&mut kind, asked)?;
        let described = describe(&kind, &pids, &storage, &copied).await?;
        let trackable = |pid: &i32| check_trackable(*pid, root, &node.support);
        block_in_place(|| pids.iter().try_for_each(trackable))?;
        let mut description = described.description;
        block_in_place(|| add_needs(&mut description, &node, id, (&pids, &ipc)))?;
        description.cpu = (!asked.force_cpu).then(cpu::read);
        description.boot_id = shared::boot_id().map_err(|error| internal(&error))?;
        let (kept, shared) = looking(root, move || Kept::open(storage)).await?;
        description.shared = shared;
        let travels = (copied, described.root_files, &*pids);
        let folders = add_folders(&mut description, &node, id, travels).await?;
        let ports = if described.own.contains(&NamespaceKind::Net) {
            add_network(&mut description, root).await?
        } else {
            Vec::new()
        };
        let (programs, directory) = (node.programs(), node.migrations.join(id.to_string()));
        kind.export(&mut description, programs, &directory).await?;
        if !anchor.is_alive() {
            return Err(ended(root));
        }
        let freezer = place(&mut kind, &node, &pids, id)?;
        let state = SiteState {
            kind: kind.clone(),
            started: anchor.identity().started,
            boot: anchor.identity().boot.clone(),
            freezer: freezer.path().to_owned(),
            freezer_id: freezer.id(),
            ports: ports.iter().map(PortState::of).collect(),
            markers: kept.markers(),
            asked: asked.clone(),
        };
        let spaces = description.spaces.iter();
        let memory_bytes = spaces.map(|space| space.memory_bytes).sum();
        let workload = Workload {
            kind,
            anchor: Some(anchor),
            own: described.own,
            ipc,
            mounts: described.mounts,
            described_mounts: description.mounts.clone(),
            freezer,
            outer: None,
            standing: Vec::new(),
            support: node.support.clone(),
        };
        let found = Found {
            workload,
            network: Network::new(ports),
            memory_bytes,
            true_smaps: asked.instead_of.is_some(),
            kept,
            folders,
            locks,
        };
        Ok(Survey {
            description,
            state: encode_state(&state)?,
            site: Self::untouched(node, id, policy, found, cancelled),
        })
    }

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
        let identity = Identity {
            pid: state.kind.root(),
            started: state.started,
            boot: state.boot.clone(),
        };
        let is_this_boot = identity.is_this_boot();
        let freezer = state.freezer(is_this_boot);
        let (freezer, outer) = match state.kind.is_shared().then(|| freezer.held_within()) {
            Some(Some(within)) => (within, Some(freezer)),
            Some(None) | None => (freezer, None),
        };
        // After another boot the same numbers mean other links.
        let known: &[PortState] = match is_this_boot {
            true => &state.ports,
            false => &[],
        };
        let ports = PortState::again(known).await;
        let ports = ports.map_err(|error| network_unfit(&error))?;
        let workload = Workload {
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
        };
        let found = Found {
            workload,
            network: Network::new(ports),
            memory_bytes: 0,
            true_smaps: false,
            // Of one that is over nothing is left to do.
            folders: Folders::recovered(node.keep.clone(), id),
            kept: Kept::recovered(if is_over { Vec::new() } else { state.markers }),
            // No freeze will look for any; what was found is in the folder.
            locks: Locks::default(),
        };
        Ok(Self::untouched(node, id, policy, found, cancelled))
    }

    fn untouched(
        node: SourceNode,
        id: MigrationId,
        policy: Policy,
        found: Found,
        cancelled: watch::Receiver<bool>,
    ) -> Self {
        let directory = node.migrations.join(id.to_string());
        let budget = Budget::new(&policy, node.eager_memory_max);
        Self {
            workload: found.workload,
            network: found.network,
            peer: None,
            tracking: Tracking::new(node.support.clone(), budget, found.true_smaps),
            dumping: Dumping::new(&node, directory.clone()),
            kept: found.kept,
            folders: found.folders,
            locks: FileLocks::new(found.locks, directory.clone()),
            sending: Sending::new(node.workers),
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

/// Looks at files, whose storage may not answer: other workloads wait until this one is surveyed.
async fn looking<T: Send + 'static>(
    root: i32,
    look: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let what = format!("the files of process {root}");
    detached::within("survey", (&what, SURVEY_MAX), look).await
}

async fn find_storage(root: i32, asked: &Asked) -> Result<(Storage, Locks), Failure> {
    let declared = asked.shared.clone();
    looking(root, move || {
        let storage = Storage::find(&declared)?;
        let locks = Locks::on(&storage, mounts(root, storage.paths())?);
        Ok((storage, locks))
    })
    .await
}

async fn describe(
    kind: &Kind,
    pids: &[i32],
    storage: &Storage,
    copied: &[PathBuf],
) -> Result<Described, Failure> {
    let (pids, copied) = (pids.to_vec(), copied.to_vec());
    // What is written there is at the target when it is restored.
    let mut paths = storage.paths().to_vec();
    paths.extend(copied.iter().cloned());
    let (root, kind) = (kind.root(), kind.clone());
    let describing = move || kind.describe(&pids, &paths);
    let mut described = looking(root, describing).await?;
    let travels = |path: &str| {
        copied
            .iter()
            .any(|copied| Path::new(path).starts_with(copied))
    };
    // Not so before.
    described
        .description
        .files
        .retain(|file| !travels(&file.path));
    Ok(described)
}

/// Refuses a lock that cannot move and is there whenever it is looked for.
async fn check_locks(locks: &Locks, pids: &[i32]) -> Result<(), Failure> {
    let look = async || {
        let (root, locks, pids) = (pids.first().copied(), locks.clone(), pids.to_vec());
        let look = move || Ok(locks.find(&pids, false).unfit);
        looking(root.unwrap_or_default(), look).await
    };
    let mut unfit = look().await?;
    for _ in 1..LOOKS {
        if unfit.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(LOOK_PAUSE).await;
        let now = look().await?;
        unfit.retain(|lock| now.contains(lock));
    }
    unfit.first().map_or(Ok(()), |lock| Err(lock.refused()))
}
