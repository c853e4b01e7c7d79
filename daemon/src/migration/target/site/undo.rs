//! How a workload's place goes away again: discarded, or no longer needed.
//!
//! Invariants: everything here is bounded, whoever hangs; what is left in spite of that is said,
//! and found again by the migration's id, which is in the name of all that is made for it.

use std::fs;
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::CgroupError;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::block_in_place;

use super::{Pager, Site};
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::detached;
use crate::runtime::kind::{leave, sweep};

/// How long a pager may take to undo a restore: five seconds for CRIU to give up, ten for its tasks
/// to die. One that takes longer is killed, and its watcher, and this, kill what is left.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(20);

/// How long killed tasks may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// How long pager and watcher may take to end when they have nothing to hold: the watcher looks
/// twice a second.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it is tried to remove a cgroup in which somebody is.
const REMOVE_POLL: Duration = Duration::from_millis(50);

/// How often it is looked whether a workload that is frozen for good has been killed.
const EMPTY_POLL: Duration = Duration::from_millis(500);

/// How long it may take to close or remove folders that came: as long as there are files.
const FOLDERS_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a folder is left whose storage does not answer.
const SILENT: &str = "on storage that does not answer";

/// Why something of a workload is left, which may have what it wrote last.
const MAY_HAVE_RUN: &str = "of a workload that may have run here";

impl Site {
    /// Undoes everything down to nothing, from wherever [`Site::prepare`] or [`Site::restore`] were
    /// cut off.
    pub async fn discard(&mut self) -> Result<(), Failure> {
        let folders = self.intake.folders().clone();
        let closed = self.on_folders("close", move || {
            folders.close();
            Ok(())
        });
        if let Err(failure) = closed.await {
            tracing::warn!(migration = %self.id, "an overlay stays open: {failure}");
        }
        if let Some(pager) = self.pager.take() {
            self.discard_pager(&pager).await;
        }
        let killed = block_in_place(|| {
            // Also a CRIU that waits to be asked, and a pager that does not answer.
            self.groups.pager.kill();
            self.groups.tree.kill();
            if !self.freezer.exists() {
                return Ok(());
            }
            self.freezer.kill(KILL_TIMEOUT)?;
            self.remove_freezer()
        });
        // Whoever is left: what is bound is bound in the node's namespace, and dangerous there.
        block_in_place(|| self.sweep());
        let why = match killed.is_err() && !self.freezer.is_empty() {
            true => Some("of a workload that could not be killed"),
            false => self.may_have_run.then_some(MAY_HAVE_RUN),
        };
        let taken = self.take_back(why).await;
        killed.map_err(|error| internal(&error))?;
        self.end_groups();
        if let Some(network) = self.network.take() {
            network
                .give_up()
                .await
                .map_err(|error| network_unfit(&error))?;
        }
        self.end_hold().await;
        self.clear();
        self.tidy();
        taken
    }

    /// Takes back what has come of folders, unless there is a reason why something of them may be
    /// needed.
    async fn take_back(&self, why: Option<&str>) -> Result<(), Failure> {
        let folders = self.intake.folders().clone();
        let taken = match why {
            Some(_) => Ok(()),
            None => {
                self.on_folders("take back", move || folders.take_back())
                    .await
            }
        };
        let late = taken
            .as_ref()
            .is_err_and(|failure| failure.code() == ErrorCode::Timeout);
        if let Some(why) = why.or(late.then_some(SILENT)) {
            block_in_place(|| self.intake.folders().stay(why));
        }
        taken
    }

    /// Does something with folders that came. Their storage may not answer, also whoever writes to
    /// it and is waited for.
    async fn on_folders(
        &self,
        name: &'static str,
        work: impl FnOnce() -> Result<(), Failure> + Send + 'static,
    ) -> Result<(), Failure> {
        detached::within(name, ("folders that came", FOLDERS_TIMEOUT), work).await
    }

    /// Removes the workload's cgroup, and what a runtime has left below it: a process of its own
    /// may be there yet, which ends with it.
    fn remove_freezer(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            self.sweep();
            if !self.freezer.exists() {
                return Ok(());
            }
            match self.freezer.remove() {
                Err(_) if Instant::now() < deadline => std::thread::sleep(REMOVE_POLL),
                removed => return removed,
            }
        }
    }

    async fn discard_pager(&self, pager: &Pager) {
        let discarded = tokio::time::timeout(DISCARD_TIMEOUT, pager.client.discard()).await;
        match discarded {
            Ok(Ok(())) => {}
            // A pager that is gone has closed CRIU's socket, and CRIU has killed the tree.
            Ok(Err(error)) => {
                tracing::warn!(migration = %self.id, "discarding: {}", chain(&error));
            }
            Err(_) => {
                tracing::warn!(migration = %self.id, "the pager has not discarded the workload \
                    within {DISCARD_TIMEOUT:?}: it is killed");
            }
        }
    }

    /// Waits until nothing of the workload is left: memory that was lost in the fill has frozen it
    /// for good, and somebody must kill it.
    pub async fn emptied(&mut self) {
        while !self.freezer.is_empty() {
            tokio::time::sleep(EMPTY_POLL).await;
        }
        if let Err(error) = self.freezer.remove() {
            tracing::warn!(migration = %self.id, "its cgroup is left: {}", chain(&error));
        }
        block_in_place(|| {
            leave(&self.directory);
            self.intake.folders().stay(MAY_HAVE_RUN);
        });
        self.settle_folders();
        self.folders_settled().await;
        self.end_groups();
        self.end_hold().await;
        self.clear();
    }

    /// Removes what was made for a workload that never ran. Of one that may have run nothing may go
    /// that it has written.
    fn sweep(&self) {
        match self.may_have_run {
            true => leave(&self.directory),
            false => sweep(&self.directory),
        }
    }

    /// The workload has all its memory, or nothing of it is left. What proves that stays: the
    /// journal does not say so yet.
    pub(super) fn clear(&mut self) {
        self.pager = None;
        self.promise = None;
        self.namespaces.clear();
        block_in_place(|| {
            for group in [&self.groups.pager, &self.groups.watcher] {
                if let Err(error) = group.remove(END_TIMEOUT) {
                    tracing::warn!(migration = %self.id, "a cgroup is left: {}", chain(&error));
                }
            }
            drop(fs::remove_dir_all(self.directory.join("images")));
        });
    }

    /// Removes the workload's cgroups, in which nobody is any more.
    fn end_groups(&self) {
        // Also what a daemon before this one has made for a limit.
        let group = self.node.hierarchies.everywhere(&self.id.to_string());
        let group = match self.freezer.exists() {
            true => group.and(self.freezer.path().to_owned()),
            false => group,
        };
        let removed = block_in_place(|| group.remove(END_TIMEOUT));
        if let Err(error) = removed {
            tracing::warn!(migration = %self.id, "a cgroup is left: {}", chain(&error));
        }
    }

    /// Removes the folder of a migration that is over, and whose end the journal knows; or of which
    /// there never was anything.
    pub fn tidy(&self) {
        block_in_place(|| drop(fs::remove_dir_all(&self.directory)));
    }
}
