//! The workload at the source, and what is done to it: tracked, copied, frozen, dumped, given away
//! or given back.
//!
//! A `Site` is owned by one operation at a time; the driver hands it out and gets it back with the
//! event that came of it. It holds everything that must be undone, so that [`Site::thaw`] can undo
//! it from any point, and [`Site::recover`] can make one from the journal that thaws or releases
//! what a dead daemon has left.
//!
//! Invariants: ports are closed before the cgroup is frozen and opened after it is thawed; the
//! cgroup is frozen again after CRIU's dump and read back; nothing here decides.

mod locked;
mod lookout;
mod readiness;
mod survey;
mod undo;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::{Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_pages::send::Sender;
use pageferry_pages::track::tree::{Tree, TreeError};
use pageferry_pages::track::{Eager, Space, Support, TrackError, TrackOptions};
use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::policy::{EAGER_BYTES_PER_SECOND, Policy};
use pageferry_proto::migration::source::{SourceEvent, Wait};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::MountDescription;
use pageferry_sys::namespace::{self, NamespaceKind};
use pageferry_sys::task::has_ended;
use tokio::task::{JoinHandle, block_in_place};

use super::delivered::Delivered;
use super::dump::{Dump, DumpError, DumpPlan};
use super::failure::{failed_to_track, freeze_failed};
use super::rounds::Sums;
use super::sent::Sent;
use super::storage::Kept;
use super::unread::Unreadable;
use super::waits::Waits;
use crate::link::port::Port;
use crate::migration::text::{chain, internal};
use crate::net::stream::DataSender;
use crate::runtime::identity::Anchor;
use crate::runtime::locks::Locks;
use crate::runtime::loopback::Connections;
use crate::runtime::mounts::Mounts;
use crate::runtime::passing::Observer;
pub use lookout::Lookout;
use lookout::check_trackable;
pub use survey::{Asked, Survey};

/// What every source of this node shares.
#[derive(Debug, Clone)]
pub struct SourceNode {
    /// The `criu` program.
    pub criu: PathBuf,
    /// The preload library for dumps.
    pub view_library: PathBuf,
    /// Whether a process that outlives CRIU traces for it.
    pub tracer: bool,
    /// CRIU's version as the wire carries it.
    pub criu_version: u32,
    /// A tmpfs folder in which each migration has one of its own.
    pub migrations: PathBuf,
    /// Where freezer cgroups are made.
    pub freezers: FreezerRoot,
    /// Where a workload that came here has its other cgroups.
    pub hierarchies: Hierarchies,
    /// What the kernel offers for tracking.
    pub support: Support,
    /// Threads that read and encode.
    pub workers: usize,
    /// Bytes of one workload that may be copied in the freeze, unless forced.
    pub eager_memory_max: u64,
}

/// CRIU's dump, which is prepared while rounds are sent.
#[derive(Debug, Default)]
enum Dumping {
    #[default]
    No,
    Preparing(JoinHandle<Result<Dump, DumpError>>),
    Prepared(Box<Dump>),
}

/// A workload at its source.
#[derive(Debug)]
pub struct Site {
    pub(super) node: SourceNode,
    pub(super) policy: Policy,
    pub(super) root: i32,
    /// The process that `root` means, if it was there when this was made.
    anchor: Option<Anchor>,
    pub(super) own: Vec<NamespaceKind>,
    /// As surveyed, if it has a mount namespace of its own.
    mounts: Option<Mounts>,
    /// Those that are the node's, as the target was told.
    described_mounts: Vec<MountDescription>,
    pub(super) freezer: Freezer,
    /// Tells which locks it holds that cannot move.
    locks: Locks,
    origin: Option<PathBuf>,
    pub(super) ports: Vec<Port>,
    directory: PathBuf,
    pub(super) spaces: BTreeMap<SpaceId, Space>,
    /// Pages found dirty that the next round sends.
    pub(super) pending: BTreeMap<SpaceId, PageSet>,
    /// What the target has of the spaces.
    pub(super) delivered: Delivered,
    /// When the last scan was, for the rate of dirtying.
    pub(super) scanned: Instant,
    dumping: Dumping,
    /// CRIU was let in: what is prepared is used up.
    pub(super) let_in: bool,
    /// Looks for states that pass, from when the tree is tracked.
    pub(super) observer: Option<Observer>,
    /// Those of the tree's network namespace, if that is its own; from the same moment.
    pub(super) connections: Option<Connections>,
    /// Freezes that were given up because of one.
    pub(super) tries: u32,
    /// How often CRIU was started in the place of one that had ended.
    restarts: u32,
    /// Compares the smaps CRIU was shown with the true ones.
    comparing: Option<JoinHandle<Result<(), Failure>>>,
    /// Bytes of memory, for progress.
    pub(super) memory_bytes: u64,
    /// Bytes only CRIU can copy, as of the last scan.
    pub(super) eager_bytes: u64,
    /// Bytes of CRIU's images.
    pub(super) image_bytes: u64,
    pub(super) sender: Arc<Sender>,
    /// How long CRIU held the tasks, from being let in to post-dump.
    pub(super) frozen_in_criu: Option<Duration>,
    /// Opens data streams of the present session.
    pub(super) data: Option<DataSender>,
    /// What is waited for, and whether that should end early.
    pub(super) waits: Waits,
    /// What no final round could read.
    pub(super) unread: Unreadable,
    /// What the round under way has sent.
    pub(super) sent: Arc<Sent>,
    /// CRIU reads the true smaps, for 11 ms per GiB of the freeze.
    true_smaps: bool,
    /// Storage that both nodes share.
    pub(super) kept: Kept,
    /// How long syncing it took in the last freeze, if anything is shared.
    pub(super) synced: Option<Duration>,
}

impl Site {
    /// Puts the tree into its cgroup, attaches to every space, and lets CRIU get ready.
    pub async fn track(&mut self) -> Result<(), Failure> {
        block_in_place(|| {
            self.kept.offer_is_answered();
            self.freezer.make().map_err(|error| freeze_failed(&error))?;
            let root = self.root;
            let adopted = self.freezer.adopt(|| {
                let tree = Tree::read(root).map_err(std::io::Error::other)?;
                self.check_root().map_err(std::io::Error::other)?;
                Ok(tree.pids())
            });
            adopted.map_err(|error| match self.check_root() {
                Ok(()) => freeze_failed(&error),
                Err(gone) => gone,
            })?;
            self.open_observers()?;
            self.attach_new()?;
            self.scan()
        })?;
        self.prepare_dump()
    }

    /// Attaches to the spaces that are not yet tracked and forgets those that are gone.
    pub(super) fn attach_new(&mut self) -> Result<(), Failure> {
        let tree = Tree::read(self.root).map_err(|error| unreadable(&error))?;
        self.check_root()?;
        let pids = tree.pids();
        self.spaces.retain(|id, space| {
            tree.spaces
                .iter()
                .any(|found| found.id == *id && found.leader == space.pid())
        });
        self.pending.retain(|id, _| self.spaces.contains_key(id));
        for found in tree.spaces {
            if self.spaces.contains_key(&found.id) {
                continue;
            }
            check_trackable(found.leader, self.root, &self.node.support)?;
            let options = TrackOptions {
                support: self.node.support.clone(),
                tree: pids.clone(),
                stop_max: pageferry_pages::track::STOP_MAX,
                attempts: pageferry_pages::track::ATTEMPTS,
            };
            match Space::attach(found.leader, &options) {
                Ok(space) => {
                    tracing::debug!(pid = found.leader, stopped = ?space.attached().stopped,
                        threads = space.attached().threads, "attached");
                    self.spaces.insert(found.id, space);
                    self.delivered.begin(found.id);
                }
                // It has ended since the tree was read; whoever is left is in the next round.
                Err(error) if error.tells_of_end() && found.leader != self.root => {}
                Err(_) if found.leader != self.root && has_ended(found.leader) => {}
                // A program that has just replaced itself is a new space with the same name.
                Err(TrackError::Exec { .. }) => {}
                Err(error) => return Err(failed_to_track(&error)),
            }
        }
        Ok(())
    }

    /// Fails if the root has ended, after which its pid may mean another process. What was read by
    /// its number before was read of it.
    fn check_root(&self) -> Result<(), Failure> {
        if self.is_root() {
            Ok(())
        } else {
            Err(ended(self.root))
        }
    }

    fn is_root(&self) -> bool {
        self.anchor.as_ref().is_some_and(Anchor::is_alive)
    }

    /// What is waited for.
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// Counts what is sent.
    pub fn sent(&self) -> Arc<Sent> {
        Arc::clone(&self.sent)
    }

    /// Finds what the next round has to send.
    pub(super) fn scan(&mut self) -> Result<(), Failure> {
        // Before the first look, so that little time is between that and the scan.
        let mut recorded = BTreeMap::new();
        if !self.true_smaps {
            let record = |(id, space): (&SpaceId, &mut Space)| (*id, space.record_smaps());
            recorded.extend(self.spaces.iter_mut().map(record));
        }
        let eager = Lookout::of(self).around(|| self.scan_spaces(recorded))?;
        self.scanned = Instant::now();
        self.eager_bytes = eager.bytes();
        self.check_budget(&eager)
    }

    /// Scans every space whose smaps could be recorded, if that was tried.
    fn scan_spaces(
        &mut self,
        mut recorded: BTreeMap<SpaceId, Result<(), TrackError>>,
    ) -> Result<Eager, Failure> {
        let mut eager = Eager::default();
        let mut gone = Vec::new();
        for (id, space) in &mut self.spaces {
            let recorded = recorded.remove(id).unwrap_or(Ok(()));
            let scan = match recorded.and_then(|()| space.scan()) {
                Ok(scan) => scan,
                Err(error)
                    if space.pid() != self.root
                        && (error.tells_of_end() || has_ended(space.pid())) =>
                {
                    gone.push(*id);
                    continue;
                }
                // A program that replaced itself is a new space with the same name.
                Err(TrackError::Exec { .. }) => {
                    gone.push(*id);
                    continue;
                }
                Err(error) => return Err(failed_to_track(&error)),
            };
            self.delivered.written(*id, &scan.dirty);
            self.pending.entry(*id).or_default().union_with(&scan.dirty);
            eager.merge(scan.eager);
        }
        for id in gone {
            self.spaces.remove(&id);
            self.pending.remove(&id);
        }
        Ok(eager)
    }

    /// What CRIU copies in the downtime allowed is accepted.
    fn check_budget(&self, eager: &Eager) -> Result<(), Failure> {
        let budget = self.policy.downtime_max.as_millis() as u64 * EAGER_BYTES_PER_SECOND / 1000;
        let budget = budget.min(self.node.eager_memory_max);
        if eager.bytes() <= budget || self.policy.force_eager {
            return Ok(());
        }
        let largest = eager.shared.iter().max_by_key(|object| object.bytes);
        let which = largest.map_or(String::new(), |object| {
            format!(", the largest {} of {} bytes", object.name, object.bytes)
        });
        let advice = if budget == self.node.eager_memory_max {
            "more than limits.eager_memory_max, whatever the downtime: raise it".to_owned()
        } else {
            format!(
                "more than fits into {:?} of downtime: allow more downtime",
                self.policy.downtime_max
            )
        };
        Err(Failure::new(
            ErrorCode::SharedMemoryBudget,
            format!(
                "{} bytes of shared, locked or executable memory can only be copied in the \
                 freeze{which}; {budget} bytes may be, and that is {advice}, or use --force-eager",
                eager.bytes()
            ),
        ))
    }

    /// Starts CRIU and brings it to its first notification, in the background.
    pub(super) fn prepare_dump(&mut self) -> Result<(), Failure> {
        let mut namespaces = Vec::new();
        for kind in [NamespaceKind::Ipc, NamespaceKind::Uts, NamespaceKind::Net] {
            if self.own.contains(&kind) {
                namespaces.push(namespace::open(self.root, kind).map_err(|error| {
                    Failure::new(
                        ErrorCode::WorkloadGone,
                        format!(
                            "the {} namespace of process {}: {error}",
                            kind.file(),
                            self.root
                        ),
                    )
                })?);
            }
        }
        self.check_root()?;
        let plan = DumpPlan {
            criu: self.node.criu.clone(),
            view_library: self.node.view_library.clone(),
            tracer: self.node.tracer,
            namespaces,
            root_pid: self.root,
            directory: self.directory.clone(),
            freezer: self.freezer.clone(),
            mounts: self.described_mounts.clone(),
        };
        self.let_in = false;
        self.dumping = Dumping::Preparing(tokio::spawn(Dump::prepare(plan)));
        Ok(())
    }

    /// Closes the ports and freezes the tree, or gives that up. CRIU stands ready before either.
    pub async fn freeze(&mut self) -> Result<SourceEvent, Failure> {
        self.stand_ready().await?;
        for (id, pages) in std::mem::take(&mut self.pending) {
            if let Some(space) = self.spaces.get_mut(&id) {
                space.put_back(&pages);
            }
        }
        if let Some(passing) = self.freeze_calmly().await? {
            return self.give_up(&passing.to_string(), &Sums::default());
        }
        // From here on it cannot end by itself.
        self.check_root()?;
        self.check_mounts()?;
        let pids = self.pids()?;
        if let Some(locked) = self.held_lock(&pids).await? {
            return Ok(locked);
        }
        block_in_place(|| self.kept.freeze(&pids, self.mounts.as_ref()))?;
        Ok(SourceEvent::Frozen)
    }

    /// Tells the target how long files on shared storage are.
    pub(super) async fn tell_lengths(&self, images: &Path) -> Result<(), Failure> {
        let (pids, mounts) = (self.pids()?, self.mounts.as_ref());
        self.kept
            .tell_lengths(pids, mounts, images, &self.waits)
            .await
    }

    /// Freezes the cgroup, unless that is cut.
    pub(super) fn freeze_cgroup(&self) -> Result<(), Failure> {
        let freezing = self.waits.begin(Wait::Cgroup);
        let frozen = block_in_place(|| self.freezer.freeze_unless(|| freezing.is_cut()));
        frozen.map_err(|error| freeze_failed(&error))?;
        freezing.check()
    }

    /// CRIU and the target were told of the mounts before the rounds.
    fn check_mounts(&self) -> Result<(), Failure> {
        let Some(surveyed) = &self.mounts else {
            return Ok(());
        };
        let now = block_in_place(|| Mounts::read(self.root))?;
        if now == *surveyed {
            return Ok(());
        }
        Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            "the workload's mounts have changed since the move began: move it again",
        ))
    }

    /// The prepared dump; there is one from the freeze to the thaw.
    pub(super) fn dump(&mut self) -> Result<&mut Dump, Failure> {
        match &mut self.dumping {
            Dumping::Prepared(dump) => Ok(dump),
            Dumping::No | Dumping::Preparing(_) => Err(Failure::new(
                ErrorCode::Internal,
                "there is no prepared dump",
            )),
        }
    }

    /// Takes the prepared dump out, for an operation that needs the site beside it.
    pub(super) fn take_dump(&mut self) -> Result<Box<Dump>, Failure> {
        match std::mem::take(&mut self.dumping) {
            Dumping::Prepared(dump) => Ok(dump),
            Dumping::No | Dumping::Preparing(_) => Err(Failure::new(
                ErrorCode::Internal,
                "there is no prepared dump",
            )),
        }
    }

    /// Puts it back.
    pub(super) fn return_dump(&mut self, dump: Box<Dump>) {
        self.dumping = Dumping::Prepared(dump);
    }

    /// Begins to compare what CRIU was shown with the truth, in the background: the tree is frozen
    /// for good or until a thaw.
    pub(super) fn begin_comparing(&mut self) {
        let shown: Vec<_> = self
            .spaces
            .values()
            .filter_map(Space::shown_smaps)
            .collect();
        self.comparing = Some(tokio::task::spawn_blocking(move || {
            shown.iter().try_for_each(|shown| {
                let compared = shown.compare();
                compared.map_err(|error| failed_to_track(&error))
            })
        }));
    }

    /// Whether CRIU was told the truth. After [`Site::finish`] in the same freeze.
    pub async fn compare_smaps(&mut self) -> Result<(), Failure> {
        match &mut self.comparing {
            Some(comparing) => {
                let compared = self.waits.on(Wait::Smaps, comparing).await?;
                self.comparing = None;
                compared.map_err(|error| internal(&error))?
            }
            None => Err(Failure::new(
                ErrorCode::Internal,
                "nothing was dumped that could be compared",
            )),
        }
    }
}

/// The root of the workload has ended by itself.
fn ended(root: i32) -> Failure {
    Failure::new(
        ErrorCode::WorkloadGone,
        format!("there is no process {root}, or it has ended"),
    )
}

/// The tree cannot be read.
fn unreadable(error: &TreeError) -> Failure {
    Failure::new(error.code(), chain(error))
}
