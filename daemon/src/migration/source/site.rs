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
//! | [`Member`] | a tree of processes; a [`Party`] has several: |
//! | `Workload` | its processes, and the cgroup that holds them |
//! | `Tracking` | its memory: spaces, what of them is dirty, and what the target has |
//! | `Dumping` | the CRIU that stands ready, dumps, and holds |
//! | `FileLocks` | its locks on shared storage, of which only one node can have one |
//! | | and of all trees together: |
//! | [`Network`] | the ports it is reached through, its sockets, and its [`Loopback`] |
//! | [`Kept`] | storage that both nodes share |
//! | [`Folders`] | folders that travel with it |
//! | [`Sending`] | the connection of the present session, and what goes over it |
//! | [`Drain`] | pages that follow a workload which was let go without them |
//!
//! Invariants: all trees are frozen before one is dumped, and what fails for one fails for all;
//! ports are closed before the cgroups are frozen and opened after they are thawed; loopback is
//! shut from the freeze to the thaw, or to the end of the copy that is given away; the cgroups are
//! frozen again after CRIU's dump and read back; nothing here decides.

mod begin;
mod last_round;
mod survey;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_files::Keep;
use pageferry_pages::read::Misses;
use pageferry_pages::track::{Eager, Support};
use pageferry_proto::id::Round;
use pageferry_proto::migration::policy::{FilesReport, Policy, RoundReport};
use pageferry_proto::migration::source::{SourceEvent, Wait};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::Failure;
use tokio::task::block_in_place;

use super::calm::{self, Glance, Tries};
use super::drain::{Drain, Readers, open_readers};
use super::folders::Folders;
use super::lo::Loopback;
use super::member::{Member, Trees};
use super::network::Network;
use super::sending::{Sending, Sums};
use super::sent::Sent;
use super::storage::Kept;
use super::tracking::{Budget, Paused};
use super::waits::Waits;
use crate::link::park::Means;
use crate::migration::text::internal;
use crate::net::stream::DataSender;
use crate::runtime::kind::{Kind, Party};
pub use survey::{Asked, Survey};

/// How long a target that takes a stream no more has to say why. It follows at once.
const WHY_MAX: Duration = Duration::from_millis(500);

/// What whoever has chosen a mode is told before it is too late.
const FOLLOWS: &str = "memory may follow the workload: from then until all is there it is lost if \
    either node dies, or if its frozen copy is killed or cannot be read; a lost connection does \
    not lose it";

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
    /// How what comes for a frozen workload is kept.
    pub parking: Means,
    /// Whether workloads may leave with pages missing.
    pub postcopy: bool,
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
    /// What it is, if it has several members.
    party: Option<Party>,
    /// Its trees, in the order of their numbers: at least one.
    pub(super) members: Vec<Member>,
    /// Of what CRIU copies by itself, of all trees.
    budget: Budget,
    network: Network,
    /// Where its target is met.
    peer: Option<IpAddr>,
    kept: Kept,
    folders: Folders,
    sending: Sending,
    drain: Drain,
    /// Its network was given up.
    has_left: bool,
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

    /// Answers a target that asks for pages.
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// Whether it may be let go with pages missing.
    pub fn may_drain(&self) -> bool {
        self.policy.may_switch()
    }

    /// Its target is met at this address.
    #[must_use]
    pub fn to(mut self, peer: Option<IpAddr>) -> Self {
        self.peer = peer;
        self
    }

    /// The root of the first tree, in this node's pid namespace.
    pub fn root(&self) -> i32 {
        self.trees().root()
    }

    fn trees(&self) -> Trees<'_> {
        Trees::of(&self.members)
    }

    /// The memory it had when it was surveyed.
    pub fn memory(&self) -> PageCount {
        PageCount::covering(self.memory_bytes)
    }

    /// How long CRIU held the tasks in the last dump, and how long shared storage was synced.
    pub fn measured(&self) -> (Option<Duration>, Option<Duration>) {
        let held = self
            .members
            .iter()
            .filter_map(|member| member.dumping.held());
        (held.max(), self.kept.synced())
    }

    /// What the move takes from the workload's clients, for people.
    pub fn notes(&self) -> Vec<String> {
        let party = self.party.iter().flat_map(Party::notes);
        let members = self.trees().iter().flat_map(|tree| tree.kind.notes());
        let follows = self.may_drain().then(|| FOLLOWS.to_owned());
        party.chain(members).chain(follows).collect()
    }

    /// Tells how often it stood still for scans, and how long.
    pub fn paused(&self) -> Paused {
        // All trees count the same.
        self.members[0].tracking.paused()
    }

    /// The target has, of folders that travel, these as they were when they left it, and takes what
    /// comes for the frozen workload if it parks.
    pub fn accepted(&mut self, kept: &[u32], parks: bool) {
        self.folders.accepted(kept);
        self.network.parking.accepted(parks);
    }

    /// The workload runs at the target.
    pub fn started(&self) {
        self.network.parking.mark();
    }

    /// Sends over this connection from now on.
    pub fn connect(&mut self, data: Option<DataSender>) {
        self.sending.connect(data);
    }

    /// Waits a moment for what the target has to say, after a stream that it takes no more. One
    /// that gives up stops its streams and says why, and the streams may be faster. Once it is
    /// heard, or that the connection is lost, the wait is cut by what follows.
    pub(super) async fn hear_why(&self) {
        drop(self.waits.on(Wait::Held, tokio::time::sleep(WHY_MAX)).await);
    }

    /// Puts each tree into its cgroup, attaches to every space, and lets CRIU get ready.
    pub async fn track(&mut self) -> Result<(), Failure> {
        block_in_place(|| {
            self.kept.offer_is_answered();
            let trees = Trees::of(&self.members);
            trees.iter().try_for_each(|tree| tree.enter_cgroup())?;
            self.network.sockets.observe(trees)?;
            self.network.lo = Loopback::of(trees.first(), &mut self.network.sockets)?;
            // Nothing was sent that could be void.
            self.scan().map(drop)
        })?;
        let tree = Trees::of(&self.members).first();
        self.network.park(self.node.parking, tree).await?;
        self.begin_dumping()
    }

    fn begin_dumping(&mut self) -> Result<(), Failure> {
        let mut members = self.members.iter_mut();
        members.try_for_each(|member| member.dumping.begin(&member.workload))
    }

    /// Sends what is pending, of folders that travel too if they are to, and finds what became
    /// dirty meanwhile. Without `pages` it is only found what there is.
    pub async fn round(
        &mut self,
        round: Round,
        (folders, pages): (bool, bool),
    ) -> Result<RoundReport, Failure> {
        let began = Instant::now();
        if !self
            .members
            .iter()
            .any(|member| member.tracking.is_pending())
        {
            // Whatever it is, this round sends it.
            block_in_place(|| self.scan())?;
        }
        let last_scan = self.members[0].tracking.scanned();
        let pids = self.trees().pids()?;
        let syncing = self.kept.sync_beside(&pids);
        let data = self.sending.data()?;
        let pids_now = self.trees().members();
        let (own, waits) = (&mut self.folders, &self.waits);
        let folders = async {
            match folders {
                true => own.round(&data, round, &pids_now, waits).await,
                false => Ok(FilesReport::default()),
            }
        };
        let (members, sending) = (&mut self.members, &self.sending);
        let sending_pages = async {
            let mut sums = Sums::default();
            for Member { tracking, .. } in members.iter_mut().filter(|_| pages) {
                let pending = tracking.take_pending();
                // What was not sent is dirty again, or gone.
                let how = (round, Misses::GiveUp);
                let (sent, _) = sending.pages(tracking, &pending, how, waits).await?;
                sums.merge(&sent);
            }
            Ok(sums)
        };
        let (sums, files) = tokio::try_join!(sending_pages, folders)?;
        let sent = began.elapsed();
        syncing.ended(&self.waits).await?;
        let waited = began.elapsed().saturating_sub(sent);
        let anew = block_in_place(|| self.scan())?;
        for member in &mut self.members {
            member.dumping.tend(&member.workload, &self.waits).await?;
        }
        self.glance = Glance::now(Trees::of(&self.members), &mut self.network.sockets);
        let dirtied = self
            .members
            .iter()
            .map(|member| member.tracking.pages_pending())
            .sum();
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
            eager_bytes: self.eager().bytes(),
            anew,
            files,
        })
    }

    /// Whether what was found is everything once more, of one tree or several.
    fn scan(&mut self) -> Result<bool, Failure> {
        let mut anew = false;
        for member in &mut self.members {
            let (workload, sockets) = (&member.workload, &self.network.sockets);
            anew |= member.tracking.scan(workload, sockets, &self.waits)?;
        }
        self.budget.check(&self.eager())?;
        Ok(anew)
    }

    /// What only CRIU can copy, as of the last scan.
    fn eager(&self) -> Eager {
        let mut all = Eager::default();
        for member in &self.members {
            all.merge(member.tracking.eager().clone());
        }
        all
    }

    /// Closes the ports and freezes the trees, or gives that up. CRIU stands ready before either,
    /// one for each.
    pub async fn freeze(&mut self) -> Result<SourceEvent, Failure> {
        let glance = std::mem::take(&mut self.glance);
        let waits = &self.waits;
        for member in &mut self.members {
            member.dumping.stand_ready(&member.workload, waits).await?;
        }
        for member in &mut self.members {
            member.tracking.put_pending_back();
        }
        let trees = Trees::of(&self.members);
        if let Some(passing) = calm::freeze(trees, &mut self.network, glance, waits).await? {
            return self.tries.give_up(&passing.to_string(), &Sums::default());
        }
        // From here on they cannot end by themselves.
        trees.check_roots()?;
        trees.iter().try_for_each(|tree| tree.check_mounts())?;
        if let Some(party) = &self.party {
            block_in_place(|| party.check_frozen())?;
        }
        for Member {
            workload, locks, ..
        } in &mut self.members
        {
            if let Some(locked) = locks.freeze(&workload.pids()?, waits).await? {
                return Ok(locked);
            }
        }
        let (kept, trees) = (&mut self.kept, Trees::of(&self.members));
        block_in_place(|| kept.freeze(trees))?;
        Ok(SourceEvent::Frozen)
    }

    /// Whether CRIU was told the truth, and whether file locks can still be given away. After
    /// [`Site::finish`] in the same freeze, beside the restore at the target; so there is time to
    /// see that nobody else can thaw the trees.
    pub async fn compare_smaps(&mut self) -> Result<(), Failure> {
        for member in &mut self.members {
            member.dumping.compared(&self.waits).await?;
            let pids = member.workload.pids()?;
            block_in_place(|| member.locks.check_again(&pids))?;
        }
        let mut members = self.members.iter_mut();
        members.try_for_each(|member| member.workload.hold_alone())?;
        self.network.parking.commit();
        Ok(())
    }

    /// Lets go of file locks that the target must have, when the commit is durable. The trees stay
    /// frozen, by their cgroups alone if CRIU has to step back for that.
    pub async fn unlock(&mut self) -> Result<(), Failure> {
        let mut all = Vec::new();
        // Nobody may wait for one of any of them.
        for member in &mut self.members {
            let locks = member.locks.begin_letting_go()?;
            all.push((locks, &member.workload, &mut member.dumping));
        }
        for (locks, workload, dumping) in all {
            if locks.is_empty() {
                continue;
            }
            let stepped_back = if locks.needs_calls() {
                dumping.step_back(workload).await
            } else {
                Ok(())
            };
            locks.let_go(&workload.freezer, stepped_back).await?;
        }
        Ok(())
    }

    /// Undoes everything down to a running workload; with `untrack`, tracking too. Answers with
    /// what is lost, if processes of a copy that was given away have ended, or are about to.
    pub async fn thaw(&mut self, untrack: bool) -> Result<Option<Failure>, Failure> {
        self.drain.end();
        self.kept.thawed();
        self.network.parking.let_speak();
        self.network.lo.open();
        let letting_go = self.members.iter_mut().map(|member| {
            let Member {
                workload, dumping, ..
            } = member;
            dumping.let_go(workload, !untrack)
        });
        join_all(letting_go).await;
        let mut lost = None;
        // All of them, before anything runs.
        for Member {
            workload, locks, ..
        } in &mut self.members
        {
            let of_this = locks.take_back(&workload.freezer).await?;
            lost = lost.or(of_this);
        }
        let mut thawed = Ok(());
        for member in &mut self.members {
            match member.workload.thaw() {
                Ok(told) => lost = lost.or(told),
                Err(failure) => thawed = thawed.and(Err(failure)),
            }
        }
        thawed?;
        self.network.reopen(untrack).await?;
        if !untrack {
            self.begin_dumping()?;
            return Ok(lost);
        }
        if let Err(error) = self.network.ports.announce(self.trees().first()).await {
            // Its next frame says the same.
            tracing::warn!("the workload's addresses are not announced: {error}");
        }
        self.network.lo = Loopback::default();
        block_in_place(|| {
            self.members
                .iter_mut()
                .for_each(|member| member.tracking.end());
            self.folders.stay();
            self.kept.offer_is_answered();
        });
        self.trees().iter().for_each(|tree| tree.give_back());
        drop(fs::remove_dir_all(&self.directory));
        Ok(lost)
    }

    /// Ends the frozen copy: it runs elsewhere now.
    pub async fn release(&mut self) -> Result<(), Failure> {
        self.folders.close();
        // First the links: whatever the dying sockets say reaches nobody.
        self.leave().await?;
        self.drain.end();
        let mut endings = Vec::new();
        for member in &mut self.members {
            endings.extend(member.dumping.commit().await);
        }
        for member in &mut self.members {
            member.workload.kill(&self.node.freezers)?;
        }
        for ending in endings {
            ending.ended().await;
        }
        // Not before: whatever the dying sockets say is no news to each other.
        self.network.lo = Loopback::default();
        self.members
            .iter_mut()
            .for_each(|member| member.tracking.end());
        block_in_place(|| self.folders.set_aside());
        for tree in self.trees().iter() {
            tree.release(&self.node.hierarchies)?;
        }
        if let Some(party) = &self.party {
            block_in_place(|| party.release());
        }
        drop(fs::remove_dir_all(&self.directory));
        Ok(())
    }

    /// It runs elsewhere: its network here goes, if it has not gone.
    async fn leave(&mut self) -> Result<(), Failure> {
        if self.has_left {
            return Ok(());
        }
        self.network
            .lead_away(self.trees().first(), self.peer)
            .await;
        let (engines, tree) = (self.has_engine_network(), Trees::of(&self.members).first());
        self.network.leave(tree, engines).await?;
        self.has_left = true;
        Ok(())
    }

    /// It runs elsewhere, and lacks pages: they are read here from now on, also by a daemon that
    /// has only found the frozen trees.
    pub async fn begin_draining(&mut self) -> Result<(), Failure> {
        if let Err(failure) = self.leave().await {
            // It is tried again when the copy is released, and nothing of it runs.
            tracing::warn!(root = self.root(), %failure, "the frozen copy keeps its links");
        }
        if self.drain.has_begun() {
            return Ok(());
        }
        let mut readers = Readers::new();
        for tree in self.trees().iter() {
            let opened = block_in_place(|| open_readers(tree))?;
            readers.extend(opened);
        }
        self.drain.begin(readers);
        Ok(())
    }

    /// What still comes for a workload that is released need not be sent on any more.
    pub async fn relayed(&mut self) {
        let (engines, tree) = (self.has_engine_network(), Trees::of(&self.members).first());
        self.network.relayed(tree, engines).await;
    }

    fn has_engine_network(&self) -> bool {
        match &self.party {
            Some(party) => party.has_engine_network(),
            None => self
                .trees()
                .iter()
                .map(|tree| &tree.kind)
                .any(Kind::has_engine_network),
        }
    }
}
