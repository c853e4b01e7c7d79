//! What a workload is to its node. Each kind is a module of its own, which owns what differs:
//!
//! | | |
//! |---|---|
//! | describe | what it is made of, and what of that cannot move |
//! | cgroup | where it is held, how it gets there, and how it comes back |
//! | conversation | who starts the CRIU that dumps it |
//! | release | what becomes of what is left of it when it runs elsewhere |
//! | arrive | what is compared, and made ready for it, where it comes |
//!
//! Nothing else asks what a workload is. A kind that has a name and no module is refused by it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use criu_glue::rpc::{Conversation, StartError, SwrkConfig};
use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::id::{MigrationId, WorkloadName};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};

use super::process::Process;
use super::process::arrive::Arriving as ArrivingProcess;
use super::process::describe::{self, Described};

/// A workload at its source, as the journal keeps it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A bare process tree.
    Process(Process),
}

/// A workload that comes.
#[derive(Clone, Copy, Debug)]
pub enum Arriving {
    /// A bare process tree.
    Process(ArrivingProcess),
}

impl Kind {
    /// The workload of this name, if it is of a kind that can move away from here.
    pub fn of(name: &WorkloadName) -> Result<Self, Failure> {
        match name {
            WorkloadName::Process(root) => Ok(Self::Process(Process::new(*root))),
            WorkloadName::Containerd { .. }
            | WorkloadName::Crun(_)
            | WorkloadName::Podman(_)
            | WorkloadName::Runc(_) => Err(unsupported(name, "cannot be moved by this build")),
        }
    }

    /// The pid of its root in this node's pid namespace.
    pub const fn root(&self) -> i32 {
        let Self::Process(process) = self;
        process.root()
    }

    /// What it is made of: the tree of `pids`, the root first. Blocks, for a few milliseconds if
    /// its storage answers.
    pub fn describe(&self, pids: &[i32], shared: &[PathBuf]) -> Result<Described, Failure> {
        let Self::Process(process) = self;
        describe::describe(process.root(), pids, shared)
    }

    /// The cgroup that is to hold the tree of `pids`. Nothing is made yet.
    pub fn place(
        &mut self,
        freezers: &FreezerRoot,
        pids: &[i32],
        id: MigrationId,
    ) -> Result<Freezer, Failure> {
        let Self::Process(process) = self;
        process.place(freezers, pids, &id.to_string())
    }

    /// Sees to it that the tree is in that cgroup, and nobody else; `tree` tells who is in it.
    pub fn enter(
        &self,
        freezer: &Freezer,
        tree: impl FnMut() -> io::Result<Vec<i32>>,
    ) -> Result<(), CgroupError> {
        let Self::Process(process) = self;
        process.enter(freezer, tree)
    }

    /// Namespaces that CRIU is started in to dump it, of those that are its `own`.
    pub fn open_namespaces(&self, own: &[NamespaceKind]) -> Result<Vec<OwnedFd>, Failure> {
        let Self::Process(process) = self;
        process.open_namespaces(own)
    }

    /// Begins to speak with the CRIU that dumps it.
    pub fn converse(&self, criu: SwrkConfig) -> Result<Conversation, StartError> {
        let Self::Process(process) = self;
        process.converse(criu)
    }

    /// It stays here, and runs.
    pub fn give_back(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        let Self::Process(process) = self;
        process.give_back(freezer)
    }

    /// It runs elsewhere, and its tasks here are dead: nothing else of it is to be left.
    pub fn release(&self, freezer: &Freezer, hierarchies: &Hierarchies) -> Result<(), CgroupError> {
        let Self::Process(process) = self;
        process.release(freezer, hierarchies)
    }
}

impl Arriving {
    /// Takes in hand what is offered under this name, if it is of a kind that can come here.
    pub fn begin(name: &WorkloadName, description: &WorkloadDescription) -> Result<Self, Failure> {
        match name {
            WorkloadName::Process(_) => Ok(Self::Process(ArrivingProcess::begin(description))),
            WorkloadName::Containerd { .. }
            | WorkloadName::Crun(_)
            | WorkloadName::Podman(_)
            | WorkloadName::Runc(_) => Err(unsupported(name, "cannot be taken in by the target")),
        }
    }

    /// Compares what it needs with this node. Blocks; asks about files, whose storage may not
    /// answer.
    pub fn check(self, description: &WorkloadDescription) -> Result<(), Failure> {
        let Self::Process(process) = self;
        process.check(description)
    }

    /// Namespaces that are made for it, in the order in which they are entered.
    pub fn namespaces(self, description: &WorkloadDescription) -> Vec<NamespaceKind> {
        let Self::Process(process) = self;
        process.namespaces(description)
    }

    /// Checks once more, when its tasks are known for good.
    pub fn check_tasks(self, tasks: &[i32]) -> Result<(), Failure> {
        let Self::Process(process) = self;
        process.check_tasks(tasks)
    }
}

fn unsupported(name: &WorkloadName, what: &str) -> Failure {
    Failure::new(
        ErrorCode::UnsupportedWorkload,
        format!("{name} {what}: kind {} is not supported yet", name.kind()),
    )
}
