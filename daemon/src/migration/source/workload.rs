//! The workload itself, at its source: its processes, and the cgroup that holds them.
//!
//! Invariants: what is read by the number of the root counts only if [`Workload::check_root`] holds
//! afterwards; from [`Workload::enter_cgroup`] on, the tree is in a cgroup that nobody else is in;
//! SIGKILL is pending on every task before a copy that is given away is thawed. A pod that may be
//! given away is marked first, durably, so that this node does not start it anew.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use criu_glue::repair;
use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot, FreezerVersion};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_ipam::{Folders, Left};
use pageferry_pages::track::Support;
use pageferry_pages::track::frozen::{Frozen, Stops};
use pageferry_pages::track::tree::{Tree, TreeError};
use pageferry_proto::id::MemberIndex;
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::MountDescription;
use pageferry_sys::namespace::NamespaceKind;
use pageferry_sys::task::{threads, tracer};
use tokio::task::block_in_place;

use super::failure::{failed_to_track, freeze_failed};
use super::waits::Waits;
use crate::migration::text::chain;
use crate::runtime::identity::Anchor;
use crate::runtime::ipc::Ipc;
use crate::runtime::kind::Kind;
use crate::runtime::mounts::Mounts;
use crate::runtime::passing::{Passing, State};

/// How long killed tasks may take to end: freeing 4 GiB takes 0.3 s.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// A tree of processes that moves as one.
#[derive(Debug)]
pub(super) struct Workload {
    /// Which of its party it is.
    pub(super) member: MemberIndex,
    pub(super) kind: Kind,
    /// The process that is its root, if it was there when this was made.
    pub(super) anchor: Option<Anchor>,
    /// Kinds of namespaces that are its own.
    pub(super) own: Vec<NamespaceKind>,
    /// What its processes share by way of the kernel.
    pub(super) ipc: Ipc,
    /// As surveyed, if it has a mount namespace of its own.
    pub(super) mounts: Option<Mounts>,
    /// Those that are the node's, as the target was told.
    pub(super) described_mounts: Vec<MountDescription>,
    /// Holds the tree.
    pub(super) freezer: Freezer,
    /// The cgroup that this is in, if that was made for the freeze because others may thaw their
    /// own.
    pub(super) outer: Option<Freezer>,
    /// The threads of the tree that the last scan found.
    pub(super) standing: Vec<i32>,
    /// What the kernel tells of its threads.
    pub(super) support: Support,
}

impl Workload {
    /// The pid of its root in this node's pid namespace.
    pub(super) fn root(&self) -> i32 {
        self.kind.root()
    }

    /// Sees to it that the tree is in its cgroup.
    pub(super) fn enter_cgroup(&self) -> Result<(), Failure> {
        let entered = self.kind.enter(&self.freezer, || {
            let tree = Tree::read(self.root()).map_err(io::Error::other)?;
            self.check_root().map_err(io::Error::other)?;
            Ok(tree.pids())
        });
        entered.map_err(|error| match self.check_root() {
            Ok(()) => freeze_failed(&error),
            Err(gone) => gone,
        })
    }

    /// Who is in the tree, by its root.
    pub(super) fn tree(&self) -> Result<Tree, Failure> {
        let tree = Tree::read(self.root()).and_then(|tree| tree.of_member(self.member));
        let tree = tree.map_err(|error| unreadable(&error))?;
        self.check_root()?;
        Ok(tree)
    }

    /// Its processes, by its cgroup: all are in it.
    pub(super) fn pids(&self) -> Result<Vec<i32>, Failure> {
        self.freezer
            .processes()
            .map_err(|error| freeze_failed(&error))
    }

    /// How many threads it has, as far as that can be told.
    pub(super) fn threads(&self) -> usize {
        let pids = self.freezer.processes().unwrap_or_default();
        let threads = |pid: &i32| threads(*pid).map_or(0, |threads| threads.len());
        pids.iter().map(threads).sum()
    }

    /// Fails if the root has ended, after which its pid may mean another process. What was read by
    /// its number before was read of it.
    pub(super) fn check_root(&self) -> Result<(), Failure> {
        if self.is_root() {
            Ok(())
        } else {
            Err(ended(self.root()))
        }
    }

    fn is_root(&self) -> bool {
        self.anchor.as_ref().is_some_and(Anchor::is_alive)
    }

    /// A process of it that somebody traces, and who that is.
    pub(super) fn traced(&self) -> Option<(i32, i32)> {
        let pids = self.freezer.processes().unwrap_or_default();
        pids.into_iter().find_map(|pid| Some((pid, tracer(pid)?)))
    }

    /// Who traces its root. Who traces another process of that number is nothing to us.
    pub(super) fn tracer(&self) -> Option<i32> {
        tracer(self.root()).filter(|_| self.is_root())
    }

    /// Notes the threads of a tree that is frozen. Who is in its cgroup and none of it stands
    /// against a dump.
    pub(super) fn note_standing(&mut self, tree: &Tree) -> Result<Option<Passing>, Failure> {
        let alive = tree.tasks.iter().filter(|task| !task.zombie);
        self.standing = alive.flat_map(|task| task.threads.clone()).collect();
        self.stranger()
    }

    /// Who is in its frozen cgroup, and was not in the tree when that was noted.
    pub(super) fn stranger(&self) -> Result<Option<Passing>, Failure> {
        block_in_place(|| self.kind.stranger(&self.freezer, &self.standing))
    }

    /// Sees to it that nobody but us can thaw the tree, which is dumped, or start it anew.
    pub(super) fn hold_alone(&mut self) -> Result<(), Failure> {
        self.leave()?;
        let around = self.kind.around(&self.freezer);
        if let Some(around) = around.map_err(|error| freeze_failed(&error))? {
            let frozen = block_in_place(|| around.freeze());
            return frozen.map_err(|error| freeze_failed(&error));
        }
        if !self.kind.is_shared() || self.outer.is_some() {
            return Ok(());
        }
        let began = Instant::now();
        let outer = self.freezer.clone();
        let held = block_in_place(|| outer.hold_within(&self.standing));
        let held = held.map_err(|error| {
            let text = format!("the frozen container cannot be held: {}", chain(&error));
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })?;
        tracing::debug!(took = ?began.elapsed(), "held where only we thaw");
        self.freezer = held;
        self.outer = Some(outer);
        Ok(())
    }

    /// A pod is not to be started here again, whatever becomes of this node: a kubelet that comes
    /// up anew may not have heard yet that it runs elsewhere.
    fn leave(&self) -> Result<(), Failure> {
        let Kind::Pod(pod) = &self.kind else {
            return Ok(());
        };
        let noted = block_in_place(|| Folders::of_node().leave(pod.uid(), &Left::default()));
        noted.map_err(|error| {
            let text = format!(
                "pod {} cannot be marked as gone: {}",
                pod.uid(),
                chain(&error)
            );
            Failure::new(ErrorCode::NodeUnfit, text)
        })
    }

    /// A pod may be started here again.
    fn stay(&self) {
        let Kind::Pod(pod) = &self.kind else { return };
        if let Err(error) = block_in_place(|| Folders::of_node().stay(pod.uid())) {
            tracing::warn!(
                pod = pod.uid(),
                "it stays, and would get no other sandbox here: {}",
                chain(&error)
            );
        }
    }

    /// The tree goes back to where others may thaw it, and so does what was left half-way.
    fn take_back(&mut self) -> Result<(), Failure> {
        let Some(outer) = self.outer.take().or_else(|| self.half_held()) else {
            return Ok(());
        };
        let taken = block_in_place(|| outer.take_back());
        let thawed = match &taken {
            Ok(()) => Ok(()),
            // Who is left there is to run, too.
            Err(_) => outer.thaw(),
        };
        self.freezer = outer.held_within().unwrap_or(outer);
        taken.and(thawed).map_err(|error| freeze_failed(&error))
    }

    fn half_held(&self) -> Option<Freezer> {
        let may = self.kind.is_shared() && self.freezer.held_within().is_some();
        may.then(|| self.freezer.clone())
    }

    /// Namespaces that CRIU is to be in.
    pub(super) fn open_namespaces(&self) -> Result<Vec<OwnedFd>, Failure> {
        let namespaces = self.kind.open_namespaces(&self.own)?;
        self.check_root()?;
        Ok(namespaces)
    }

    /// Freezes its cgroup, unless that is cut.
    pub(super) fn freeze(&self, waits: &Waits) -> Result<(), Failure> {
        let freezing = waits.begin(Wait::Cgroup);
        let frozen = block_in_place(|| self.freezer.freeze_unless(|| freezing.is_cut()));
        frozen.map_err(|error| freeze_failed(&error))?;
        freezing.check()
    }

    /// Looks at all its threads, which the cgroup has frozen.
    pub(super) fn look(&self) -> Result<Frozen, Failure> {
        let stops = match self.freezer.version() {
            FreezerVersion::V1 => Stops::InPlace,
            FreezerVersion::V2 => Stops::AtReturn,
        };
        let mut pids = self.pids()?;
        // One of another pid namespace reads as 0.
        pids.retain(|pid| 0 < *pid);
        let looked = Frozen::look(&pids, &self.support, stops);
        looked.map_err(|error| failed_to_track(&error))
    }

    /// A thread that is not at rest though the cgroup is frozen: a scan made meanwhile may have
    /// missed what it writes. Under version 2 there is none.
    pub(super) fn busy(&self) -> Result<Option<Passing>, Failure> {
        if self.freezer.version() == FreezerVersion::V2 {
            return Ok(None);
        }
        let busy = self.look()?.busy();
        Ok(busy.map(|thread| Passing {
            state: State::Uninterruptible,
            holder: format!("thread {thread}"),
        }))
    }

    /// Thaws its cgroup, which may be frozen, and has system calls restarted that a freeze has
    /// interrupted.
    pub(super) fn let_run(&self) -> Result<(), Failure> {
        let frozen = self.look().unwrap_or_else(|failure| {
            tracing::warn!(root = self.root(), %failure, "interrupted calls are not restarted");
            Frozen::default()
        });
        let thawed = block_in_place(|| frozen.thaw(|| self.freezer.thaw()));
        thawed.map_err(|error| freeze_failed(&error))
    }

    /// CRIU and the target were told of the mounts before the rounds. Of a frozen tree.
    pub(super) fn check_mounts(&self) -> Result<(), Failure> {
        block_in_place(|| self.kind.check_frozen())?;
        let Some(surveyed) = &self.mounts else {
            return Ok(());
        };
        let now = block_in_place(|| surveyed.read_again(self.root()))?;
        if now == *surveyed {
            // What is in them may be more by now.
            return block_in_place(|| surveyed.check_contents(self.root()));
        }
        Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            "the workload's mounts have changed since the move began: move it again",
        ))
    }

    /// Thaws what is around it, where others start things. What they have done meanwhile takes
    /// effect now: answers with that, if it does not go on as it was.
    fn thaw_around(&self) -> Result<Option<Failure>, Failure> {
        // Of what is not known nothing was frozen.
        let around = self.kind.around(&self.freezer).ok().flatten();
        let Some(around) = around.filter(Freezer::exists) else {
            return Ok(None);
        };
        let told = block_in_place(|| ending(&self.pids().unwrap_or_default())).map(|pid| {
            let text = format!(
                "process {pid} was told to end while it stood still, by its kubelet if its probes \
                 failed: it does not go on as it was"
            );
            tracing::warn!(root = self.root(), "{text}");
            Failure::new(ErrorCode::WorkloadGone, text)
        });
        block_in_place(|| around.thaw()).map_err(|error| freeze_failed(&error))?;
        Ok(told)
    }

    /// Lets the tree run, of which CRIU has let go. Answers with why it does not go on as it was.
    pub(super) fn thaw(&mut self) -> Result<Option<Failure>, Failure> {
        self.stay();
        let told = self.thaw_around()?;
        if let Err(failure) = self.take_back() {
            // It runs, thawed, in a cgroup of ours.
            tracing::warn!(root = self.root(), %failure, "the container is not where it was");
        }
        if !self.freezer.exists() {
            return Ok(told);
        }
        block_in_place(|| self.end_repair());
        self.let_run()?;
        Ok(told)
    }

    /// Takes sockets out of repair mode that a killed CRIU and a killed tracer have left in it. The
    /// tree is still frozen.
    fn end_repair(&self) {
        for pid in self.freezer.processes().unwrap_or_default() {
            match repair::end(pid) {
                Ok(0) => {}
                Ok(count) => tracing::warn!(pid, count, "sockets were left in repair mode"),
                Err(error) => tracing::warn!(pid, %error, "sockets cannot be looked at"),
            }
        }
    }

    /// It stays here, and runs.
    pub(super) fn give_back(&self) {
        if let Err(error) = self.kind.give_back(&self.freezer) {
            // It runs, thawed, in a cgroup of ours; the next migration finds it there.
            tracing::warn!("the workload stays in its cgroup: {}", chain(&error));
        }
    }

    /// Ends every task. SIGKILL comes before the thaw, whatever CRIU did: a task that is thawed
    /// with it pending runs no instruction of its own.
    pub(super) fn kill(&mut self, freezers: &FreezerRoot) -> Result<(), Failure> {
        let ended = block_in_place(|| self.kind.end(&self.freezer, freezers));
        if ended.map_err(|error| freeze_failed(&error))? {
            return Ok(());
        }
        let killed = block_in_place(|| {
            if let Some(outer) = self.outer.clone() {
                self.kill_within(&outer)?;
                self.freezer = outer;
                self.outer = None;
            }
            match self.freezer.exists() {
                true => self.freezer.kill(KILL_TIMEOUT),
                false => Ok(()),
            }
        });
        killed.map_err(|error| freeze_failed(&error))
    }

    /// The same within the cgroup of somebody else. Whoever came there since dies of the end of the
    /// root, which waits for him: so both are thawed.
    fn kill_within(&self, outer: &Freezer) -> Result<(), CgroupError> {
        if self.freezer.exists() {
            // SIGKILL only: under the outer one they are frozen still.
            drop(self.freezer.kill(Duration::ZERO));
        }
        if outer.exists() {
            outer.kill(KILL_TIMEOUT)?;
            outer.thaw()?;
        }
        if self.freezer.exists() {
            self.freezer.kill(KILL_TIMEOUT)?;
            self.freezer.remove()?;
        }
        Ok(())
    }

    /// It runs elsewhere, and its tasks here are dead: nothing else of it is to be left.
    pub(super) fn release(&self, hierarchies: &Hierarchies) -> Result<(), Failure> {
        let released = block_in_place(|| self.kind.release(&self.freezer, hierarchies));
        released.map_err(|error| freeze_failed(&error))
    }
}

/// One of these processes that has been told to end, and has not heard of it.
fn ending(pids: &[i32]) -> Option<i32> {
    let told = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let pending = status.lines().filter_map(|line| {
            let set = line
                .strip_prefix("SigPnd:")
                .or(line.strip_prefix("ShdPnd:"))?;
            u64::from_str_radix(set.trim(), 16).ok()
        });
        let set = pending.fold(0, |all, set| all | set);
        let bit = |signal: i32| 1 << (signal - 1);
        set & (bit(libc::SIGTERM) | bit(libc::SIGKILL)) != 0
    };
    pids.iter().copied().find(told)
}

/// The root of a workload has ended by itself.
pub(super) fn ended(root: i32) -> Failure {
    Failure::new(
        ErrorCode::WorkloadGone,
        format!("there is no process {root}, or it has ended"),
    )
}

/// The tree cannot be read.
pub(super) fn unreadable(error: &TreeError) -> Failure {
    Failure::new(error.code(), chain(error))
}
