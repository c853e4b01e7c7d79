//! How a workload's place goes away again: discarded, or no longer needed.
//!
//! Invariants: everything here is bounded, whoever hangs; what is left in spite of that is said,
//! and found again by the migration's id, which is in the name of all that is made for it.

use std::fs;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pageferry_cgroup::freezer::CgroupError;
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::block_in_place;

use super::Site;
use super::seat::Seat;
use crate::migration::text::{chain, internal, network_unfit};
use crate::runtime::detached;
use crate::runtime::kind::{leave, leave_around, sweep, sweep_around};

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
        join_all(self.seats.iter_mut().map(Seat::discard_pager)).await;
        let may_have_run = self.may_have_run;
        let killed = block_in_place(|| {
            // Each, whatever becomes of another.
            let killed = self.seats.iter().map(|seat| seat.kill(may_have_run));
            killed.fold(Ok(()), Result::and)
        });
        // Whoever is left: what is bound is bound in the node's namespace, and dangerous there.
        block_in_place(|| self.sweep());
        let is_left = self.seats.iter().any(|seat| !seat.freezer.is_empty());
        let why = match killed.is_err() && is_left {
            true => Some("of a workload that could not be killed"),
            false => may_have_run.then_some(MAY_HAVE_RUN),
        };
        let taken = self.take_back(why).await;
        let killed = killed.map_err(|error| internal(&error));
        if is_left {
            return killed.and(taken);
        }
        self.end_groups(|_| true);
        if let Some(network) = self.network.take() {
            network
                .give_up()
                .await
                .map_err(|error| network_unfit(&error))?;
        }
        self.end_hold().await;
        self.clear();
        // With an error it is tried again, and what says how is in there.
        killed.inspect(|()| self.tidy()).and(taken)
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

    /// Waits until nothing is left of members whose memory was lost in the fill, which are frozen
    /// for good: somebody must kill them. The others get all of theirs meanwhile.
    pub async fn emptied(&mut self) {
        let boot = self.is_of_another_boot;
        join_all(self.seats.iter_mut().map(|seat| seat.emptied(boot))).await;
        block_in_place(|| {
            let lost = self.seats.iter().filter(|seat| seat.is_lost);
            lost.for_each(|seat| leave(&seat.directory));
            if self.seats.iter().all(|seat| seat.is_lost) {
                leave_around(&self.directory);
            }
            self.intake.folders().stay(MAY_HAVE_RUN);
        });
        self.settle_folders();
        self.folders_settled().await;
        self.end_groups(|seat| seat.is_lost);
        self.end_hold().await;
        self.clear();
    }

    /// Removes what was made for a workload that never ran. Of one that may have run nothing may go
    /// that it has written.
    fn sweep(&self) {
        let seats = self.seats.iter();
        seats.for_each(|seat| seat.sweep(self.may_have_run));
        match self.may_have_run {
            true => leave_around(&self.directory),
            // An engine takes nothing away that has somebody in it.
            false => sweep_around(&self.directory),
        }
    }

    /// The workload has all its memory, or nothing of it is left. What proves that stays: the
    /// journal does not say so yet.
    pub(super) fn clear(&mut self) {
        self.promise = None;
        self.intake.feed().end();
        self.namespaces.clear();
        block_in_place(|| {
            self.seats.iter_mut().for_each(Seat::clear);
            drop(fs::remove_dir_all(self.directory.join("images")));
        });
    }

    /// Removes the cgroups of members that are `gone`, in which nobody is any more.
    fn end_groups(&self, gone: impl Fn(&Seat) -> bool) {
        let hierarchies = &self.node.hierarchies;
        let seats = self.seats.iter().filter(|seat| gone(seat));
        block_in_place(|| seats.for_each(|seat| seat.end_groups(hierarchies)));
    }

    /// Removes the folder of a migration that is over, and whose end the journal knows; or of which
    /// there never was anything.
    pub fn tidy(&self) {
        block_in_place(|| drop(fs::remove_dir_all(&self.directory)));
    }
}

impl Seat {
    async fn discard_pager(&mut self) {
        let Some(pager) = self.pager.take() else {
            return;
        };
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

    /// Kills whoever is left of it, also a CRIU that waits to be asked, and a pager that does not
    /// answer.
    fn kill(&self, may_have_run: bool) -> Result<(), CgroupError> {
        self.groups.pager.kill();
        self.groups.tree.kill();
        if !self.freezer.exists() {
            return Ok(());
        }
        self.freezer.kill(KILL_TIMEOUT)?;
        self.remove_freezer(may_have_run)
    }

    /// Removes the tree's cgroup, and what a runtime has left below it: a process of its own may
    /// be there yet, which ends with it.
    fn remove_freezer(&self, may_have_run: bool) -> Result<(), CgroupError> {
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            self.sweep(may_have_run);
            if !self.freezer.exists() {
                return Ok(());
            }
            match self.freezer.remove() {
                Err(_) if Instant::now() < deadline => std::thread::sleep(REMOVE_POLL),
                removed => return removed,
            }
        }
    }

    fn sweep(&self, may_have_run: bool) {
        match may_have_run {
            true => leave(&self.directory),
            false => sweep(&self.directory),
        }
    }

    /// Waits until it has all its memory; or until nothing is left of it, if it never will.
    async fn emptied(&mut self, is_of_another_boot: bool) {
        if !self.is_lost && self.filled(is_of_another_boot).await.is_ok() {
            return;
        }
        while !self.freezer.is_empty() {
            tokio::time::sleep(EMPTY_POLL).await;
        }
        if let Err(error) = self.freezer.remove() {
            tracing::warn!(migration = %self.id, "its cgroup is left: {}", chain(&error));
        }
    }

    fn clear(&mut self) {
        self.pager = None;
        for group in [&self.groups.pager, &self.groups.watcher] {
            if let Err(error) = group.remove(END_TIMEOUT) {
                tracing::warn!(migration = %self.id, "a cgroup is left: {}", chain(&error));
            }
        }
    }

    fn end_groups(&self, hierarchies: &Hierarchies) {
        // Also what a daemon before this one has made for a limit.
        let group = hierarchies.everywhere(&self.name);
        let group = match self.freezer.exists() {
            true => group.and(self.freezer.path().to_owned()),
            false => group,
        };
        if let Err(error) = group.remove(END_TIMEOUT) {
            tracing::warn!(migration = %self.id, "a cgroup is left: {}", chain(&error));
        }
    }
}
