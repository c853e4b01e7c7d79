//! A bare process tree, named by the pid of its root: nobody runs it but itself.
//!
//! So everything is ours to do. At the source it is moved into a freezer cgroup of its own, CRIU is
//! started for it by us, and nobody has to be told that it is gone; at the target its namespaces,
//! its cgroups and its pids are made by us, and CRIU is started by its pager.

pub mod arrive;
pub mod describe;

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use criu_glue::rpc::{Conversation, StartError, SwrkConfig};
use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};

/// A tree at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    root: i32,
    /// The freezer cgroup the tree came from, if it was moved.
    origin: Option<PathBuf>,
}

impl Process {
    /// The tree below process `root`.
    pub const fn new(root: i32) -> Self {
        Self { root, origin: None }
    }

    /// The pid of its root in this node's pid namespace.
    pub const fn root(&self) -> i32 {
        self.root
    }

    /// Where the tree of `pids` is to be held by migration `id`: where it is, if that is a cgroup
    /// of ours that nobody else is in, or in one of its own. Nothing is made yet.
    pub fn place(
        &mut self,
        freezers: &FreezerRoot,
        pids: &[i32],
        id: &str,
    ) -> Result<Freezer, Failure> {
        if let Some(freezer) = freezers.holding(pids) {
            return Ok(freezer);
        }
        let (freezer, origin) = freezers
            .place(self.root, pids, id)
            .map_err(|error| Failure::new(ErrorCode::UnsupportedWorkload, error.to_string()))?;
        self.origin = origin;
        Ok(freezer)
    }

    /// Puts the tree into its cgroup; `tree` tells who is in it, again and again.
    pub fn enter(
        &self,
        freezer: &Freezer,
        tree: impl FnMut() -> io::Result<Vec<i32>>,
    ) -> Result<(), CgroupError> {
        freezer.make()?;
        freezer.adopt(tree)
    }

    /// Namespaces that CRIU is started in to dump it: of those that are its `own`, and that CRIU
    /// neither dumps nor makes.
    pub fn open_namespaces(&self, own: &[NamespaceKind]) -> Result<Vec<OwnedFd>, Failure> {
        let entered = [NamespaceKind::Uts, NamespaceKind::Net];
        let entered = entered.into_iter().filter(|kind| own.contains(kind));
        let open = |kind: NamespaceKind| {
            namespace::open(self.root, kind).map_err(|error| {
                let kind = kind.file();
                let text = format!("the {kind} namespace of process {}: {error}", self.root);
                Failure::new(ErrorCode::WorkloadGone, text)
            })
        };
        entered.map(open).collect()
    }

    /// Begins to speak with a CRIU that dumps it: one that is started for that, by us.
    pub fn converse(&self, criu: SwrkConfig) -> Result<Conversation, StartError> {
        Conversation::start(criu)
    }

    /// The tree stays here, and runs: it goes back to the cgroup it came from, as far as that still
    /// exists.
    pub fn give_back(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        match &self.origin {
            Some(origin) if freezer.exists() => freezer.empty_into(&Freezer::at(origin.clone())),
            Some(_) | None => Ok(()),
        }
    }

    /// The tree runs elsewhere, and nothing of it is left here: its cgroups go. One that had come
    /// here before had some in all hierarchies.
    pub fn release(&self, freezer: &Freezer, hierarchies: &Hierarchies) -> Result<(), CgroupError> {
        if freezer.exists() {
            freezer.remove()?;
        }
        let Some(name) = freezer.name() else {
            return Ok(());
        };
        if let Err(error) = hierarchies.everywhere(name).remove(Duration::ZERO) {
            let error: &dyn Error = &error;
            tracing::warn!(error, "a cgroup of the workload is left");
        }
        Ok(())
    }
}
