//! A workload at its source, and what is done to it: tracked, copied, frozen, dumped, given away or
//! given back.
//!
//! A `Site` is owned by one operation at a time; the driver hands it out and gets it back with the
//! event that came of it. It is made of parts that each keep what is theirs; here is what a phase
//! has them do, in its order. It holds everything that must be undone, so that [`Site::thaw`] can
//! undo it from any point, and [`Site::recover`] can make one from the journal that thaws or
//! releases what a dead daemon has left.
//!
//! | part | of it |
//! |---|---|
//! | [`Workload`] | its processes, and the cgroup that holds them |
//! | [`Network`] | the ports it is reached through, its sockets, and its [`Loopback`] |
//! | [`Tracking`] | its memory: spaces, what of them is dirty, and what the target has |
//! | [`Dumping`] | the CRIU that stands ready, dumps, and holds |
//! | [`Kept`] | storage that both nodes share |
//! | [`Folders`] | folders that travel with it |
//! | [`FileLocks`] | its locks on that storage, of which only one node can have one |
//! | [`Sending`] | the connection of the present session, and what goes over it |
//!
//! Invariants: ports are closed before the cgroup is frozen and opened after it is thawed; loopback
//! is shut from the freeze to the thaw, or to the end of the copy that is given away; the cgroup is
//! frozen again after CRIU's dump and read back; nothing here decides.

mod last_round;
mod survey;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_files::Keep;
use pageferry_pages::read::Misses;
use pageferry_pages::track::Support;
use pageferry_proto::id::Round;
use pageferry_proto::migration::policy::{FilesReport, Policy, RoundReport};
use pageferry_proto::migration::source::{SourceEvent, Wait};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::Failure;
use tokio::task::block_in_place;

use super::calm::{self, Glance, Tries};
use super::dumping::Dumping;
use super::folders::Folders;
use super::lo::Loopback;
use super::locked::FileLocks;
use super::network::Network;
use super::sending::{Sending, Sums};
use super::sent::Sent;
use super::storage::Kept;
use super::tracking::{Paused, Tracking};
use super::waits::Waits;
use super::workload::Workload;
use crate::migration::text::internal;
use crate::net::stream::DataSender;
pub use survey::{Asked, Survey};

/// How long a target that takes a stream no more has to say why. It follows at once.
const WHY_MAX: Duration = Duration::from_millis(500);

/// What every source of this node shares.
#[derive(Debug, Clone)]
pub struct SourceNode {
    /// The `criu` program.
    pub criu: PathBuf,
    /// The preload library for dumps.
    pub view_library: PathBuf,
    /// What container runtimes are to find as CRIU.
    pub stand_in: PathBuf,
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
    /// Where folders go that have left with their workload.
    pub keep: Keep,
}

impl SourceNode {
    /// CRIU, and what is started in its place.
    fn programs(&self) -> (&Path, &Path) {
        (&self.criu, &self.stand_in)
    }
}

/// A workload at its source.
#[derive(Debug)]
pub struct Site {
    node: SourceNode,
    policy: Policy,
    directory: PathBuf,
    /// Bytes of memory when it was surveyed, for progress.
    memory_bytes: u64,
    workload: Workload,
    network: Network,
    /// Where its target is met.
    peer: Option<IpAddr>,
    pub(super) tracking: Tracking,
    dumping: Dumping,
    kept: Kept,
    folders: Folders,
    locks: FileLocks,
    sending: Sending,
    /// What is waited for, and whether that should end early.
    waits: Waits,
    tries: Tries,
    /// At the end of the last round, if that was a moment ago.
    glance: Glance,
}

impl Site {
    /// What is waited for.
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// Counts what is sent.
    pub fn sent(&self) -> Arc<Sent> {
        self.sending.sent()
    }

    /// Its target is met at this address.
    #[must_use]
    pub fn to(mut self, peer: Option<IpAddr>) -> Self {
        self.peer = peer;
        self
    }

    /// The root of the tree, in this node's pid namespace.
    pub fn root(&self) -> i32 {
        self.workload.root()
    }

    /// The memory it had when it was surveyed.
    pub fn memory(&self) -> PageCount {
        PageCount::covering(self.memory_bytes)
    }

    /// How long CRIU held the tasks in the last dump, and how long shared storage was synced.
    pub fn measured(&self) -> (Option<Duration>, Option<Duration>) {
        (self.dumping.held(), self.kept.synced())
    }

    /// What the move takes from the workload's clients, for people.
    pub fn notes(&self) -> Vec<String> {
        self.workload.kind.notes()
    }

    /// Tells how often it stood still for scans, and how long.
    pub fn paused(&self) -> Paused {
        self.tracking.paused()
    }

    /// The target has, of folders that travel, these as they were when they left it.
    pub fn accepted(&mut self, kept: &[u32]) {
        self.folders.accepted(kept);
    }

    /// Sends over this connection from now on.
    pub fn connect(&mut self, data: Option<DataSender>) {
        self.sending.connect(data);
    }

    /// Waits a moment for what the target has to say, after a stream that it takes no more. A target
    /// that gives up stops its streams and says why, and the streams may be faster. Once it is
    /// heard, or that the connection is lost, the wait is cut by what follows.
    pub(super) async fn hear_why(&self) {
        drop(self.waits.on(Wait::Held, tokio::time::sleep(WHY_MAX)).await);
    }

    /// Puts the tree into its cgroup, attaches to every space, and lets CRIU get ready.
    pub async fn track(&mut self) -> Result<(), Failure> {
        block_in_place(|| {
            self.kept.offer_is_answered();
            self.workload.enter_cgroup()?;
            self.network.sockets.observe(&self.workload)?;
            self.network.lo = Loopback::of(&self.workload, &mut self.network.sockets)?;
            // Nothing was sent that could be void.
            self.scan().map(drop)
        })?;
        self.dumping.begin(&self.workload)
    }

    /// Sends what is pending, of folders that travel too if they are to, and finds what became
    /// dirty meanwhile.
    pub async fn round(&mut self, round: Round, folders: bool) -> Result<RoundReport, Failure> {
        let began = Instant::now();
        if !self.tracking.is_pending() {
            // Whatever it is, this round sends it.
            block_in_place(|| self.scan())?;
        }
        let last_scan = self.tracking.scanned();
        let pending = self.tracking.take_pending();
        let pids = self.workload.pids()?;
        let syncing = self.kept.sync_beside(&pids);
        // What was not sent is dirty again, or gone.
        let how = (round, Misses::GiveUp);
        let sending = self
            .sending
            .pages(&mut self.tracking, &pending, how, &self.waits);
        let data = self.sending.data()?;
        let members = self.workload.members();
        let (own, waits) = (&mut self.folders, &self.waits);
        let folders = async {
            match folders {
                true => own.round(&data, round, &members, waits).await,
                false => Ok(FilesReport::default()),
            }
        };
        let ((sums, _), files) = tokio::try_join!(sending, folders)?;
        let sent = began.elapsed();
        syncing.ended(&self.waits).await?;
        let waited = began.elapsed().saturating_sub(sent);
        let anew = block_in_place(|| self.scan())?;
        self.dumping.tend(&self.workload, &self.waits).await?;
        self.glance = Glance::now(&self.workload, &mut self.network.sockets);
        let dirtied = self.tracking.pages_pending();
        tracing::debug!(%round, pages = sums.pages, dirtied, wire_bytes = sums.wire_bytes,
            took = ?began.elapsed(), since_scan = ?last_scan.elapsed(), "round sent");
        Ok(RoundReport {
            round,
            parcels: u32::try_from(sums.parcels).map_err(|error| internal(&error))?,
            pages_sent: PageCount(sums.pages),
            pages_dirtied_estimate: PageCount(dirtied),
            raw_bytes: sums.raw_bytes,
            wire_bytes: sums.wire_bytes,
            // Without the wait for storage, which says nothing of the link.
            duration: began.elapsed().saturating_sub(waited),
            eager_bytes: self.tracking.eager_bytes(),
            anew,
            files,
        })
    }

    /// Whether what was found is everything once more.
    fn scan(&mut self) -> Result<bool, Failure> {
        let (workload, sockets) = (&self.workload, &self.network.sockets);
        self.tracking.scan(workload, sockets, &self.waits)
    }

    /// Closes the ports and freezes the tree, or gives that up. CRIU stands ready before either.
    pub async fn freeze(&mut self) -> Result<SourceEvent, Failure> {
        let glance = std::mem::take(&mut self.glance);
        let (workload, waits) = (&self.workload, &self.waits);
        self.dumping.stand_ready(workload, waits).await?;
        self.tracking.put_pending_back();
        if let Some(passing) = calm::freeze(workload, &mut self.network, glance, waits).await? {
            return self.tries.give_up(&passing.to_string(), &Sums::default());
        }
        // From here on it cannot end by itself.
        workload.check_root()?;
        workload.check_mounts()?;
        let pids = workload.pids()?;
        if let Some(locked) = self.locks.freeze(&pids, waits).await? {
            return Ok(locked);
        }
        block_in_place(|| self.kept.freeze(&pids, workload.mounts.as_ref()))?;
        Ok(SourceEvent::Frozen)
    }

    /// Whether CRIU was told the truth, and whether file locks can still be given away. After
    /// [`Site::finish`] in the same freeze, beside the restore at the target; so there is time to
    /// see that nobody else can thaw the tree.
    pub async fn compare_smaps(&mut self) -> Result<(), Failure> {
        self.dumping.compared(&self.waits).await?;
        let pids = self.workload.pids()?;
        block_in_place(|| self.locks.check_again(&pids))?;
        self.workload.hold_alone()
    }

    /// Lets go of file locks that the target must have, when the commit is durable. The tree stays
    /// frozen, by its cgroup alone if CRIU has to step back for that.
    pub async fn unlock(&mut self) -> Result<(), Failure> {
        let locks = self.locks.begin_letting_go()?;
        if locks.is_empty() {
            return Ok(());
        }
        let stepped_back = if locks.needs_calls() {
            self.dumping.step_back(&self.workload).await
        } else {
            Ok(())
        };
        locks.let_go(&self.workload.freezer, stepped_back).await
    }

    /// Undoes everything down to a running workload; with `untrack`, tracking too. Answers with
    /// what is lost, if processes of a copy that was given away have ended.
    pub async fn thaw(&mut self, untrack: bool) -> Result<Option<Failure>, Failure> {
        self.kept.thawed();
        self.network.lo.open();
        self.dumping.let_go(&self.workload, !untrack).await;
        let lost = self.locks.take_back(&self.workload.freezer).await?;
        self.workload.thaw()?;
        if let Some(gate) = self.network.ports.gate()? {
            gate.open_all().await?;
        }
        if !untrack {
            self.dumping.begin(&self.workload)?;
            return Ok(lost);
        }
        if let Err(error) = self.network.ports.announce(&self.workload).await {
            // Its next frame says the same.
            tracing::warn!("the workload's addresses are not announced: {error}");
        }
        self.network.lo = Loopback::default();
        block_in_place(|| {
            self.tracking.end();
            self.folders.stay();
            self.kept.offer_is_answered();
        });
        self.workload.give_back();
        drop(fs::remove_dir_all(&self.directory));
        Ok(lost)
    }

    /// Ends the frozen copy: it runs elsewhere now.
    pub async fn release(&mut self) -> Result<(), Failure> {
        self.folders.close();
        self.network.lead_away(&self.workload, self.peer).await;
        // First the links: whatever the dying sockets say reaches nobody.
        if let Some(gate) = self.network.ports.gate()? {
            match self.workload.kind.has_engine_network() {
                true => gate.shut().await?,
                false => gate.delete().await?,
            }
        }
        let ending = self.dumping.commit().await;
        self.workload.kill(&self.node.freezers)?;
        if let Some(ending) = ending {
            ending.ended().await;
        }
        // Not before: whatever the dying sockets say is no news to each other.
        self.network.lo = Loopback::default();
        self.tracking.end();
        block_in_place(|| self.folders.set_aside());
        self.workload.release(&self.node.hierarchies)?;
        drop(fs::remove_dir_all(&self.directory));
        Ok(())
    }
}
