//! Looks at the whole tree for what can begin at any time and forbids moving it: rings of
//! asynchronous I/O, a tracer, a connection over loopback to somebody who stays, System V objects
//! that would be lost. And for direct I/O, with which it is scanned otherwise.
//!
//! A survey finds what is there when it is made. From then on the tree is looked at before and
//! after every scan, and once more when it is frozen. What two looks can miss is said where the
//! kinds are: [`refuse`], [`loopback`] and [`crate::runtime::ipc`].

use std::collections::BTreeSet;
use std::io;

use pageferry_cgroup::freezer::Freezer;
use pageferry_pages::track::{Support, refuse};
use pageferry_proto::id::MemberIndex;
use pageferry_proto::wire::code::Failure;
use pageferry_sys::task;

use crate::migration::source::failure::{failed_to_track, freeze_failed};
use crate::migration::source::network::Sockets;
use crate::migration::source::workload::Workload;
use crate::migration::text::internal;
use crate::runtime::ipc::Ipc;
use crate::runtime::loopback::{self, Connections};

/// What a look has seen that forbids nothing.
#[derive(Debug, Default)]
pub struct Seen {
    /// A file open for direct I/O, in words.
    pub direct: Option<String>,
}

/// What a look needs: it may be taken beside an operation on the site.
#[derive(Debug, Clone)]
pub struct Lookout {
    root: i32,
    support: Support,
    /// Holds the tree.
    freezer: Freezer,
    /// Those of its network namespace, if that is its own; of a party the first looks for all.
    connections: Option<Connections>,
    /// The cgroups of other trees that are in that and move, too.
    others: Vec<Freezer>,
    ipc: Ipc,
}

impl Lookout {
    /// That of a workload whose tree is in its cgroup, with the connections of its own network.
    pub fn new(workload: &Workload, support: Support, sockets: &Sockets) -> Self {
        let is_first = workload.member == MemberIndex::FIRST;
        let connections = sockets.connections().filter(|_| is_first);
        let mut others = sockets.freezers();
        others.retain(|other| connections.is_some() && other.path() != workload.freezer.path());
        Self {
            root: workload.root(),
            support,
            freezer: workload.freezer.clone(),
            connections,
            others,
            ipc: workload.ipc.clone(),
        }
    }

    /// Looks at every process. Blocks; a millisecond for some processes with a thousand
    /// descriptors each, and 0.2 ms for a network namespace.
    pub fn look(&self) -> Result<Seen, Failure> {
        let pids = self.freezer.processes();
        let pids = pids.map_err(|error| freeze_failed(&error))?;
        let mut seen = Seen::default();
        let mut sockets = BTreeSet::new();
        // One of another pid namespace reads as 0.
        for pid in pids.iter().copied().filter(|pid| 0 < *pid) {
            match refuse::look(pid, &self.support) {
                Ok(looked) => {
                    if let Some(failure) = looked.forbidden {
                        return Err(failure);
                    }
                    seen.direct = seen.direct.or(looked.direct);
                    sockets.extend(looked.sockets);
                }
                // It has ended since the cgroup was read.
                Err(error) if error.tells_of_end() || task::has_ended(pid) => {}
                Err(error) => return Err(failed_to_track(&error)),
            }
        }
        if let Some(connections) = &self.connections {
            let mut all = pids;
            for other in &self.others {
                let others = other.processes().map_err(|error| freeze_failed(&error))?;
                for pid in others.into_iter().filter(|pid| 0 < *pid) {
                    // What else is to be said of it says the look at its own tree.
                    if let Ok(looked) = refuse::look(pid, &self.support) {
                        sockets.extend(looked.sockets);
                    }
                    all.push(pid);
                }
            }
            let holds = |inode| sockets.contains(&inode);
            loopback::check(connections, self.root, &all, holds)?;
        }
        let members = || {
            let mut pids = self.freezer.processes().map_err(io::Error::other)?;
            pids.retain(|pid| 0 < *pid);
            Ok(pids)
        };
        self.ipc.look(members, |pid| self.support.undoes(pid))?;
        Ok(seen)
    }

    /// Begins a look on a thread of its own, for [`Looking::end`] to wait for.
    pub fn begin(self) -> Looking {
        Looking(tokio::task::spawn_blocking(move || self.look()))
    }
}

/// A look under way.
#[derive(Debug)]
pub struct Looking(tokio::task::JoinHandle<Result<Seen, Failure>>);

impl Looking {
    /// What it found.
    pub async fn end(self) -> Result<Seen, Failure> {
        self.0.await.map_err(|error| internal(&error))?
    }
}

/// Refuses what cannot be tracked, before it is: everything, also what shows in smaps alone.
pub fn check_trackable(pid: i32, root: i32, support: &Support) -> Result<(), Failure> {
    match refuse::find(pid, support) {
        Ok(None) => Ok(()),
        Ok(Some(failure)) => Err(failure),
        // It has ended since the tree was read.
        Err(error) if pid != root && (error.tells_of_end() || task::has_ended(pid)) => Ok(()),
        Err(error) => Err(failed_to_track(&error)),
    }
}
