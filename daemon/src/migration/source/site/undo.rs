//! How a site is undone: down to a workload that runs here, or down to nothing when it runs
//! elsewhere.
//!
//! Invariants: ports are opened after the cgroup is thawed, and deleted before the frozen copy
//! dies; SIGKILL is pending on every task before a copy that is given away is thawed.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use criu_glue::repair;
use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::wire::code::Failure;
use pageferry_sys::namespace::{self, NamespaceKind};
use pageferry_sys::task::{is_seizing, threads, tracer};
use tokio::task::block_in_place;

use super::{Dumping, Site};
use crate::link::announce::announce;
use crate::link::describe::describe;
use crate::link::netlink::Netlink;
use crate::link::port::Port;
use crate::migration::source::dump::DumpError;
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
        let mut let_go_within = LET_GO_TIMEOUT;
        match std::mem::take(&mut self.dumping) {
            Dumping::No => {}
            // It has not touched anything, and can wait for the next freeze.
            waiting if !untrack && !self.let_in => self.dumping = waiting,
            Dumping::Preparing(task) => task.abort(),
            Dumping::Prepared(dump) => {
                // A CRIU that fails here has let go of the tasks all the same, by its end.
                if let Err(error) = dump.rollback(self.release_patience()).await {
                    tracing::warn!("criu did not end well: {}", chain(&error));
                    if matches!(error, DumpError::Timeout { .. }) {
                        let_go_within = Duration::ZERO;
                    }
                }
            }
        }
        self.wait_let_go(let_go_within).await;
        if self.freezer.exists() {
            block_in_place(|| self.end_repair());
            self.freezer.thaw().map_err(|error| freeze_failed(&error))?;
        }
        if !self.ports.is_empty() {
            let netlink = Netlink::open(None).map_err(|error| network_unfit(&error))?;
            let opened = Port::open_all(&self.ports, &netlink).await;
            opened.map_err(|error| network_unfit(&error))?;
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
            drop(fs::remove_dir_all(&self.directory));
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
        if let Err(error) = self.freezer.empty_into(&Freezer::at(origin.clone())) {
            // It runs, thawed, in a cgroup of ours; the next migration finds it there.
            tracing::warn!("the workload stays in its cgroup: {}", chain(&error));
        }
    }

    /// A CRIU that lost its daemon lets go by itself; a thaw before that would do nothing. But one
    /// that was killed while its tracer waited for a task to trap, which is stopped and frozen, has
    /// left it waiting for the thaw. Nobody else who traces is waited for: a debugger may stay for
    /// days. What comes of a CRIU that does not end is said, and the rest of the tree goes on.
    async fn wait_let_go(&self, limit: Duration) {
        let criu = &self.node.criu;
        let of_criu = |tracer: &i32| is_criu(*tracer, criu);
        // Who traces another process of that number is nothing to us.
        let held_by = || tracer(self.root).filter(of_criu).filter(|_| self.is_root());
        let seizing = |tracer| {
            if is_seizing(tracer)
                && self.freezer.exists()
                && let Err(error) = self.freezer.thaw()
            {
                tracing::warn!("what criu waits for stays frozen: {}", chain(&error));
            }
        };
        if let Some(tracer) = let_go(held_by, seizing, limit).await {
            tracing::warn!(
                root = self.root,
                tracer,
                "criu was told to end and still holds tasks: it may wait for a file system that \
                 does not answer; the workload is thawed, and they go on when criu ends"
            );
        }
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
        drop(fs::remove_dir_all(&self.directory));
        Ok(())
    }
}

/// Waits until nobody holds the tree any more, for at most `limit`; who still does then. `seizing`
/// is called with whoever does, again and again.
async fn let_go(
    held_by: impl Fn() -> Option<i32>,
    seizing: impl Fn(i32),
    limit: Duration,
) -> Option<i32> {
    let deadline = Instant::now() + limit;
    while let Some(tracer) = held_by() {
        seizing(tracer);
        if Instant::now() > deadline {
            return Some(tracer);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    None
}

/// Whether task `tracer` is CRIU, by the program it runs or its name, or traces for CRIU.
fn is_criu(tracer: i32, criu: &Path) -> bool {
    let runs = fs::read_link(format!("/proc/{tracer}/exe")).unwrap_or_default();
    let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
    name.starts_with("criu")
        || runs
            .file_name()
            .is_some_and(|name| Some(name) == criu.file_name())
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::JoinHandle;

    use super::*;
    use pageferry_sys::ptrace;
    use pageferry_trial::Trial;

    /// The other process of these tests.
    #[test]
    fn workload() {
        pageferry_trial::obey();
    }

    /// A thread that traces process `pid` until this is dropped.
    struct Tracing(Option<mpsc::Sender<()>>, Option<JoinHandle<()>>);

    impl Tracing {
        fn begin(pid: i32, name: &str) -> Self {
            let (seized, ready) = mpsc::channel();
            let (done, finish) = mpsc::channel::<()>();
            let thread = std::thread::Builder::new().name(name.to_owned());
            let thread = thread.spawn(move || {
                ptrace::seize(pid).unwrap();
                seized.send(()).unwrap();
                let _ = finish.recv();
            });
            ready.recv().unwrap();
            Self(Some(done), Some(thread.unwrap()))
        }
    }

    impl Drop for Tracing {
        fn drop(&mut self) {
            drop(self.0.take());
            let _ = self.1.take().unwrap().join();
        }
    }

    #[tokio::test]
    async fn only_criu_is_waited_for_and_not_for_ever() {
        let trial = Trial::start("migration::source::site::undo::tests::workload");
        let pid = trial.pid();
        let criu = Path::new("/usr/sbin/criu");
        let held_by = || tracer(pid).filter(|tracer| is_criu(*tracer, criu));
        let debugger = Tracing::begin(pid, "gdb");
        assert!(tracer(pid).is_some());
        let long = Duration::from_secs(60);
        assert_eq!(let_go(held_by, |_| (), long).await, None);
        drop(debugger);
        let criu_tracer = Tracing::begin(pid, "criu-tracer");
        let short = Duration::from_millis(20);
        assert_eq!(let_go(held_by, |_| (), short).await, tracer(pid));
        let ends = async {
            tokio::task::yield_now().await;
            drop(criu_tracer);
        };
        let (left, ()) = tokio::join!(let_go(held_by, |_| (), long), ends);
        assert_eq!(left, None);
    }
}
