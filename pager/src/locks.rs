//! File locks that the held tree gets before it runs.
//!
//! The processes wait in CRIU's code, at its `post-restore`, with all their descriptors; each is
//! lent a call for each of its locks, and waits on. What another has is told, and who that is.
//!
//! Invariant: all of them are taken, or none; what was taken stays with the tree, and goes with it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use pageferry_cgroup::freezer::Freezer;
use pageferry_inject::InjectError;
use pageferry_inject::locks::{self, FileLock, Missing};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::shared::LOCKS_FILE;
use pageferry_sys::task;
use tokio::task::JoinHandle;

use crate::failure::RestoreError;
use crate::message::{Fault, RestoreRequest};

/// How long a process may take to stop for its calls: it needs its turn on a processor.
const STOP_MAX: Duration = Duration::from_secs(5);

/// The locks of a tree, with pids of its own pid namespace.
#[derive(Debug)]
pub struct Locks(Vec<FileLock>);

impl Locks {
    /// Those that a request names.
    pub fn of(request: &RestoreRequest) -> Result<Self, RestoreError> {
        if !request.locks {
            return Ok(Self(Vec::new()));
        }
        let path = request.images_dir.join(LOCKS_FILE);
        let read = locks::read(&path);
        read.map(Self)
            .map_err(|source| RestoreError::Locks { path, source })
    }

    /// Has the held tree in `cgroup`, whose root is process `root`, take all of them.
    pub fn take(self: Arc<Self>, cgroup: Freezer, root: i32) -> JoinHandle<Result<(), Fault>> {
        tokio::task::spawn_blocking(move || self.take_blocking(&cgroup, root))
    }

    fn take_blocking(&self, cgroup: &Freezer, root: i32) -> Result<(), Fault> {
        let processes = processes(cgroup, root)
            .map_err(|error| fault(ErrorCode::Internal, "finding the processes", &error))?;
        let here = |lock: &FileLock| match processes.get(&lock.pid) {
            Some(&pid) => Ok(FileLock {
                pid,
                ..lock.clone()
            }),
            None => Err(Fault::new(
                ErrorCode::Malformed,
                format!(
                    "process {} is to have a {lock}, and there is none",
                    lock.pid
                ),
            )),
        };
        let here: Vec<FileLock> = self.0.iter().map(here).collect::<Result<_, _>>()?;
        match locks::take_held(&here, STOP_MAX) {
            Ok(None) => Ok(()),
            Ok(Some(missing)) => Err(taken(&missing)),
            Err(error) => Err(cannot(&error)),
        }
    }
}

/// The processes of the tree by their pids in its own pid namespace.
fn processes(cgroup: &Freezer, root: i32) -> io::Result<HashMap<i32, i32>> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid"));
    let own = namespace(root)?;
    let pids = cgroup.processes().map_err(io::Error::other)?;
    // CRIU is in the cgroup, too, and may have the number of one of them.
    let inside = pids
        .into_iter()
        .filter(|pid| namespace(*pid).is_ok_and(|found| found == own));
    let named = inside.filter_map(|pid| {
        let ids = task::Status::read(pid).ok()?.ids;
        Some((*ids.last()?, pid))
    });
    Ok(named.collect())
}

/// Another has it.
fn taken(missing: &Missing) -> Fault {
    let lock = &missing.lock;
    let holder = missing
        .holder
        .map(|pid| format!(" (process {pid} of this node)"));
    let holder = holder.unwrap_or_default();
    Fault::new(
        ErrorCode::LockTaken,
        format!("another{holder} has taken what the workload had, a {lock}"),
    )
}

fn cannot(error: &InjectError) -> Fault {
    fault(ErrorCode::Internal, "taking file locks", error)
}

fn fault(code: ErrorCode, what: &str, error: &dyn std::error::Error) -> Fault {
    let mut text = format!("{what}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Fault::new(code, text)
}
