//! How a site is undone: down to a workload that runs here, or down to nothing when it runs
//! elsewhere.
//!
//! Invariants: ports are opened after the cgroup is thawed, and deleted before the frozen copy
//! dies; SIGKILL is pending on every task before a copy that is given away is thawed.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use criu_glue::repair;
use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind};
use pageferry_sys::task::{is_seizing, threads, tracer};
use tokio::task::block_in_place;

use super::{Dumping, Site};
use crate::link::announce::announce;
use crate::link::describe::describe;
use crate::link::netlink::Netlink;
use crate::migration::source::failure::freeze_failed;
use crate::migration::text::{chain, internal, network_unfit};

/// How long killed tasks may take to end: freeing 4 GiB takes 0.3 s.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a dead daemon's CRIU may take to let go of the tasks.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(30);

/// How long CRIU may take to let go of tasks that it is told to let go of, before it is killed and
/// its tracer puts them back. The workload stands still meanwhile. It takes milliseconds, and a
/// quarter of one per thread.
const PATIENCE: Duration = Duration::from_millis(300);

const PATIENCE_PER_THREAD: Duration = Duration::from_millis(1);

impl Site {
    /// Undoes everything down to a running workload; with `untrack`, tracking too.
    pub async fn thaw(&mut self, untrack: bool) -> Result<(), Failure> {
        self.comparing = None;
        drop(self.kept.take_syncing());
        match std::mem::take(&mut self.dumping) {
            Dumping::No => {}
            // It has not touched anything, and can wait for the next freeze.
            waiting if !untrack && !self.let_in => self.dumping = waiting,
            Dumping::Preparing(task) => task.abort(),
            Dumping::Prepared(dump) => {
                // A CRIU that fails here has let go of the tasks all the same, by its end.
                if let Err(error) = dump.rollback(self.release_patience()).await {
                    tracing::warn!("criu did not end well: {}", chain(&error));
                }
            }
        }
        self.wait_untraced().await?;
        if self.freezer.exists() {
            block_in_place(|| self.end_repair());
            self.freezer.thaw().map_err(|error| freeze_failed(&error))?;
        }
        if !self.ports.is_empty() {
            let netlink = Netlink::open(None).map_err(|error| network_unfit(&error))?;
            for port in &self.ports {
                port.open(&netlink)
                    .await
                    .map_err(|error| network_unfit(&error))?;
            }
            if untrack && let Err(error) = self.announce().await {
                // Its next frame says the same.
                tracing::warn!("the workload's addresses are not announced: {error}");
            }
        }
        if untrack {
            block_in_place(|| self.spaces.clear());
            self.pending.clear();
            block_in_place(|| self.kept.offer_is_answered());
            self.leave_cgroup();
            drop(std::fs::remove_dir_all(&self.directory));
        } else if matches!(self.dumping, Dumping::No) {
            self.prepare_dump()?;
        }
        Ok(())
    }

    /// How long CRIU gets to let go of the tree by itself.
    fn release_patience(&self) -> Duration {
        let pids = self.freezer.processes().unwrap_or_default();
        let threads = |pid: &i32| threads(*pid).map_or(0, |threads| threads.len());
        let threads: usize = pids.iter().map(threads).sum();
        PATIENCE + PATIENCE_PER_THREAD * u32::try_from(threads).unwrap_or(u32::MAX)
    }

    /// Says where the workload's addresses are. A target that failed late has said otherwise, and
    /// bridges believe it until the workload sends something.
    async fn announce(&self) -> Result<(), Failure> {
        let net = namespace::open(self.root, NamespaceKind::Net);
        let net = net.map_err(|error| internal(&error))?;
        self.check_root()?;
        let network = describe(&net)
            .await
            .map_err(|error| network_unfit(&error))?;
        announce(net.as_fd(), &network.links).map_err(|error| network_unfit(&error))
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

    /// Moves the tree back to the cgroup it came from, as far as that still exists.
    fn leave_cgroup(&self) {
        let Some(origin) = &self.origin else { return };
        if !self.freezer.exists() {
            return;
        }
        let moved = self.freezer.processes().and_then(|pids| {
            Freezer::at(origin.clone()).adopt(|| Ok(pids.clone()))?;
            self.freezer.remove()
        });
        if let Err(error) = moved {
            // It runs, thawed, in a cgroup of ours; the next migration finds it there.
            tracing::warn!("the workload stays in its cgroup: {}", chain(&error));
        }
    }

    /// A CRIU that lost its daemon lets go by itself; a thaw before that would do nothing. But one
    /// that was killed while its tracer waited for a task to trap, which is stopped and frozen, has
    /// left it waiting for the thaw.
    async fn wait_untraced(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + LET_GO_TIMEOUT;
        // Who traces another process of that number is nothing to us.
        while let Some(tracer) = tracer(self.root).filter(|_| self.is_root()) {
            if is_seizing(tracer) && self.freezer.exists() {
                self.freezer.thaw().map_err(|error| freeze_failed(&error))?;
            }
            if Instant::now() > deadline {
                return Err(Failure::new(
                    ErrorCode::Traced,
                    format!("process {} is still held by process {tracer}", self.root),
                ));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Ends the frozen copy: it runs elsewhere now.
    pub async fn release(&mut self) -> Result<(), Failure> {
        // First the links: whatever the dying sockets say reaches nobody.
        if !self.ports.is_empty() {
            let netlink = Netlink::open(None).map_err(|error| network_unfit(&error))?;
            for port in &self.ports {
                port.delete(&netlink)
                    .await
                    .map_err(|error| network_unfit(&error))?;
            }
        }
        let dump = match std::mem::take(&mut self.dumping) {
            Dumping::Prepared(dump) => Some(dump),
            Dumping::No | Dumping::Preparing(_) => None,
        };
        let mut ending = None;
        if let Some(mut dump) = dump {
            match dump.commit().await {
                Ok(()) => ending = Some(dump),
                Err(error) => tracing::warn!("criu is gone before its end: {}", chain(&error)),
            }
        }
        // SIGKILL before the thaw, whatever CRIU did: a task that is thawed with it pending runs no
        // instruction of its own.
        if self.freezer.exists() {
            block_in_place(|| self.freezer.kill(KILL_TIMEOUT))
                .map_err(|error| freeze_failed(&error))?;
        }
        if let Some(dump) = ending
            && let Err(error) = dump.end().await
        {
            tracing::warn!("criu did not end well: {}", chain(&error));
        }
        self.spaces.clear();
        if self.freezer.exists() {
            self.freezer
                .remove()
                .map_err(|error| freeze_failed(&error))?;
        }
        self.remove_groups();
        drop(std::fs::remove_dir_all(&self.directory));
        Ok(())
    }
}

impl Site {
    /// A workload that had come here before had cgroups in all hierarchies.
    fn remove_groups(&self) {
        let Some(name) = self.freezer.name() else {
            return;
        };
        let group = self.node.hierarchies.everywhere(name);
        if let Err(error) = block_in_place(|| group.remove(Duration::ZERO)) {
            tracing::warn!("a cgroup of the workload is left: {}", chain(&error));
        }
    }
}
