//! How a site begins: a workload surveyed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_cgroup::freezer::Freezer;
use pageferry_pages::track::shared_bytes;
use pageferry_pages::track::tree::Tree;
use pageferry_proto::id::{MemberIndex, MigrationId, NetworkName, SpaceId};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::begin::Found;
use super::{Site, SourceNode};
use crate::link::describe::describe as describe_network;
use crate::link::port::Port;
use crate::migration::ports::PortState;
use crate::migration::source::folders::Folders;
use crate::migration::source::member;
use crate::migration::source::network::Network;
use crate::migration::source::state::{MemberState, SiteState, encode_state};
use crate::migration::source::storage::Kept;
use crate::migration::source::tracking::check_trackable;
use crate::migration::source::workload::{Workload, ended, unreadable};
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::copied::check_paths;
use crate::runtime::cpu;
use crate::runtime::detached;
use crate::runtime::identity::Anchor;
use crate::runtime::ipc::Ipc;
use crate::runtime::kind::{Kind, Named, Party};
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

/// Whether such a workload may be let go with pages missing, if it may come to that.
fn check_mode(policy: &Policy, members: &[Kind], is_allowed: bool) -> Result<(), Failure> {
    policy.check().map_err(|error| {
        let text = error.to_string();
        Failure::new(ErrorCode::PostcopyForbidden, text)
    })?;
    if !policy.may_switch() {
        return Ok(());
    }
    let forbidden = |text: &str| Err(Failure::new(ErrorCode::PostcopyForbidden, text));
    if !is_allowed {
        return forbidden(
            "this node's configuration does not allow that a workload runs before all its memory \
             is there (postcopy = true): move it with --mode precopy",
        );
    }
    match members {
        [Kind::Process(_)] => Ok(()),
        _ => forbidden(
            "only a bare tree of processes runs before all its memory is there; containers and \
             pods do not: move it with --mode precopy",
        ),
    }
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

/// The folders that travel, those of each tree in the order of the trees.
async fn add_folders(
    surveyed: &mut [Surveyed],
    node: &SourceNode,
    id: MigrationId,
) -> Result<Folders, Failure> {
    let keep = node.keep.clone();
    let root = surveyed[0].description.root_pid;
    let pids: Vec<i32> = surveyed.iter().flat_map(|one| one.pids.clone()).collect();
    let own = surveyed
        .iter()
        .map(|one| (one.copied.clone(), one.root_files.clone()));
    let own: Vec<_> = own.collect();
    let opening = move || Folders::open(keep, id, &own, &pids);
    let (folders, copied) = looking(root, opening).await?;
    for (one, copied) in surveyed.iter_mut().zip(copied) {
        one.description.copied = copied;
    }
    Ok(folders)
}

/// A folder that travels, and with which member.
type Travelling = (MemberIndex, PathBuf);

/// Folders that travel: those that were named, with the first member, and what its engine has for
/// each alone, which knows so from now on.
fn travelling(members: &mut [Kind], asked: &Asked) -> Result<Vec<Travelling>, Failure> {
    let named = asked.copied.iter().chain(&asked.shared);
    let is_named = |path: &PathBuf| named.clone().any(|named| path.starts_with(named));
    let first = asked.copied.iter().cloned();
    let mut all: Vec<Travelling> = first.map(|path| (MemberIndex::FIRST, path)).collect();
    for (member, kind) in MemberIndex::all(members.len()).zip(&*members) {
        let own = kind.folders().into_iter().filter(|path| !is_named(path));
        all.extend(own.map(|path| (member, path)));
    }
    let paths: Vec<PathBuf> = all.iter().map(|(_, path)| path.clone()).collect();
    check_paths(&paths, &asked.shared)?;
    members
        .iter_mut()
        .for_each(|kind| kind.keep_folders(&paths));
    Ok(all)
}

/// What its processes share by way of the kernel, if all of that can move.
fn look_at_ipc(
    root: i32,
    node: &SourceNode,
    (force, is_shared): (bool, bool),
) -> Result<Ipc, Failure> {
    let mut ipc = Ipc::of(root, force)?;
    if is_shared {
        ipc = ipc.shared();
    }
    let members = || Ok(Tree::read(root).map_err(io::Error::other)?.pids());
    ipc.look(members, |pid| node.support.undoes(pid))?;
    Ok(ipc)
}

impl Site {
    /// Looks at a workload, each of its trees, and says what the target must know, or why it cannot
    /// move.
    pub async fn survey(
        node: SourceNode,
        id: MigrationId,
        named: Named,
        policy: Policy,
        asked: &Asked,
        cancelled: watch::Receiver<bool>,
    ) -> Result<Survey, Failure> {
        let Named { party, mut members } = named;
        check_mode(&policy, &members, node.postcopy)?;
        let (mut storage, mut begun) = (None, Vec::new());
        for (member, kind) in MemberIndex::all(members.len()).zip(&members) {
            let (one, found) = Begun::of(member, kind, party.as_ref(), &node, asked).await?;
            storage.get_or_insert(found);
            begun.push(one);
        }
        let storage = storage.unwrap_or_default();
        let copied = travelling(&mut members, asked)?;
        let mut surveyed = Vec::new();
        for (one, kind) in begun.into_iter().zip(members) {
            surveyed.push(
                one.survey(kind, (&node, id), (&storage, &copied), asked)
                    .await?,
            );
        }
        let root = surveyed[0].description.root_pid;
        let (kept, shared) = looking(root, move || Kept::open(storage)).await?;
        for one in &mut surveyed {
            one.description.shared.clone_from(&shared);
        }
        let folders = add_folders(&mut surveyed, &node, id).await?;
        let ports = if surveyed[0].workload.own.contains(&NamespaceKind::Net) {
            add_network(&mut surveyed[0].description, root).await?
        } else {
            Vec::new()
        };
        let directory = node.migrations.join(id.to_string());
        for one in &mut surveyed {
            one.export(&node, &directory).await?;
        }
        for one in &mut surveyed {
            one.place(&node, id)?;
        }
        let state = state_of(&surveyed, (&ports, &kept), (party.as_ref(), asked));
        let (descriptions, trees): (Vec<_>, Vec<_>) =
            surveyed.into_iter().map(Surveyed::split).unzip();
        let description = block_in_place(|| together(descriptions, party.as_ref()))?;
        let spaces = description.all_members().flat_map(|member| &member.spaces);
        let memory_bytes = spaces.map(|space| space.memory_bytes).sum();
        let found = Found {
            party,
            trees,
            network: Network::new(ports),
            memory_bytes,
            true_smaps: asked.instead_of.is_some(),
            kept,
            folders,
        };
        Ok(Survey {
            description,
            state: encode_state(&state?)?,
            site: Self::untouched(node, id, policy, found, cancelled),
        })
    }
}

/// A tree of which it is known that it is there, and that nothing of what only the kernel knows
/// keeps it here.
struct Begun {
    member: MemberIndex,
    anchor: Anchor,
    pids: Vec<i32>,
    locks: Locks,
    ipc: Ipc,
}

/// A tree that has been looked at.
struct Surveyed {
    description: WorkloadDescription,
    workload: Workload,
    pids: Vec<i32>,
    locks: Locks,
    copied: Vec<PathBuf>,
    root_files: Option<RootFiles>,
}

impl Begun {
    /// With it comes the storage that both nodes share.
    async fn of(
        member: MemberIndex,
        kind: &Kind,
        party: Option<&Party>,
        node: &SourceNode,
        asked: &Asked,
    ) -> Result<(Self, Storage), Failure> {
        let root = kind.root();
        // Everything below is read by its number.
        let anchor = Anchor::new(root).map_err(|_| ended(root))?;
        let tree = block_in_place(|| Tree::read(root)).map_err(|error| unreadable(&error))?;
        let pids = tree.pids();
        let (storage, locks) = find_storage(root, asked).await?;
        // Before files are opened: that would break the lease of one that is leased, and a message
        // queue would be taken for one.
        let shares = party.is_some_and(|party| party.shares(NamespaceKind::Ipc));
        let ipc = block_in_place(|| look_at_ipc(root, node, (asked.force_ipc, shares)))?;
        check_locks(&locks, &pids).await?;
        let begun = Self {
            member,
            anchor,
            pids,
            locks,
            ipc,
        };
        Ok((begun, storage))
    }

    /// `copied` are all folders that travel.
    async fn survey(
        self,
        kind: Kind,
        (node, id): (&SourceNode, MigrationId),
        (storage, copied): (&Storage, &[Travelling]),
        asked: &Asked,
    ) -> Result<Surveyed, Failure> {
        let Self {
            member,
            anchor,
            pids,
            locks,
            ipc,
        } = self;
        let all: Vec<PathBuf> = copied.iter().map(|(_, path)| path.clone()).collect();
        let described = describe(&kind, &pids, storage, &all).await?;
        let trackable = |pid: &i32| check_trackable(*pid, kind.root(), &node.support);
        block_in_place(|| pids.iter().try_for_each(trackable))?;
        let mut description = described.description;
        block_in_place(|| add_needs(&mut description, node, id, (&pids, &ipc)))?;
        let is_first = member == MemberIndex::FIRST;
        description.cpu = (is_first && !asked.force_cpu).then(cpu::read);
        description.boot_id = shared::boot_id().map_err(|error| internal(&error))?;
        for space in &mut description.spaces {
            let numbered = SpaceId::of(member, space.vpid.0);
            space.vpid = numbered.map_err(|error| internal(&error))?;
        }
        let own = copied.iter().filter(|(of, _)| *of == member);
        Ok(Surveyed {
            copied: own.map(|(_, path)| path.clone()).collect(),
            root_files: described.root_files,
            workload: Workload {
                member,
                kind,
                anchor: Some(anchor),
                own: described.own,
                ipc,
                mounts: described.mounts,
                described_mounts: description.mounts.clone(),
                // Until it is known where it is held.
                freezer: Freezer::at(PathBuf::new()),
                outer: None,
                standing: Vec::new(),
                support: node.support.clone(),
            },
            description,
            pids,
            locks,
        })
    }
}

impl Surveyed {
    async fn export(&mut self, node: &SourceNode, directory: &Path) -> Result<(), Failure> {
        let workload = &self.workload;
        let directory = member::folder(directory, workload.member);
        let (description, programs) = (&mut self.description, node.programs());
        workload
            .kind
            .export(description, programs, &directory)
            .await?;
        workload.check_root()
    }

    /// The cgroup that is to hold it.
    fn place(&mut self, node: &SourceNode, id: MigrationId) -> Result<(), Failure> {
        self.workload.freezer = place(&mut self.workload.kind, node, &self.pids, id)?;
        Ok(())
    }

    fn split(self) -> (WorkloadDescription, (Workload, Locks)) {
        (self.description, (self.workload, self.locks))
    }
}

/// What is to be known of all of it after a restart of the daemon.
fn state_of(
    surveyed: &[Surveyed],
    (ports, kept): (&[Port], &Kept),
    (party, asked): (Option<&Party>, &Asked),
) -> Result<SiteState, Failure> {
    let mut boot = String::new();
    let mut members = Vec::new();
    for one in surveyed {
        let workload = &one.workload;
        let gone = || ended(workload.root());
        let identity = workload.anchor.as_ref().ok_or_else(gone)?.identity();
        boot.clone_from(&identity.boot);
        members.push(MemberState {
            kind: workload.kind.clone(),
            started: identity.started,
            freezer: workload.freezer.path().to_owned(),
            freezer_id: workload.freezer.id(),
        });
    }
    let others = members.split_off(1);
    let first = members.remove(0);
    Ok(SiteState {
        kind: first.kind,
        started: first.started,
        boot,
        freezer: first.freezer,
        freezer_id: first.freezer_id,
        ports: ports.iter().map(PortState::of).collect(),
        markers: kept.markers(),
        asked: asked.clone(),
        members: others,
        party: party.cloned(),
    })
}

/// One description of all members, and of what they are together.
fn together(
    mut members: Vec<WorkloadDescription>,
    party: Option<&Party>,
) -> Result<WorkloadDescription, Failure> {
    if let Some(party) = party {
        party.describe(&mut members)?;
        // What they share the first one says, if it is the party's own.
        let shared = [NamespaceKind::Net, NamespaceKind::Uts, NamespaceKind::Ipc];
        let shared = shared.into_iter().filter(|kind| party.shares(*kind));
        let shared = shared.fold(Namespaces::NONE, |all, kind| all.with(wire_of(kind)));
        for member in members.iter_mut().skip(1) {
            let bits = member.own_namespaces.bits() & !shared.bits();
            member.own_namespaces = Namespaces::from_bits(bits).unwrap_or_default();
        }
    }
    let others = members.split_off(1);
    let mut first = members.remove(0);
    first.members = others;
    Ok(first)
}

const fn wire_of(kind: NamespaceKind) -> Namespaces {
    match kind {
        NamespaceKind::Ipc => Namespaces::IPC,
        NamespaceKind::Uts => Namespaces::UTS,
        NamespaceKind::Net => Namespaces::NET,
        NamespaceKind::Pid => Namespaces::PID,
        NamespaceKind::Mount => Namespaces::MNT,
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
