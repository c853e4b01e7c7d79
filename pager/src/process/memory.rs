//! What the desk is told of stores, plans, and pages that come later, and what it tells of those.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use pageferry_proto::id::SpaceId;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_sys::fdpass::FDS_MAX;

use super::Desk;
use crate::failure::{planned, unexpected};
use crate::message::{Reply, State, Status, Told, Waited};
use crate::plan::{self, Plan};
use crate::serve::{Counters, Wanted};

impl Desk {
    pub(super) fn store(&mut self, space: u32, mut fds: Vec<OwnedFd>) -> Reply {
        match (self.state, fds.pop(), fds.pop()) {
            (State::Idle, Some(fd), None) => planned(self.plan.store(SpaceId(space), fd)),
            (State::Idle, _, _) => unexpected("a space needs one descriptor"),
            _ => self.out_of_order("a space"),
        }
    }

    pub(super) fn planned(
        &mut self,
        spaces: &[u32],
        fds: Vec<OwnedFd>,
        enter: impl Fn(&mut Plan, SpaceId, OwnedFd) -> Result<(), plan::PlanError>,
    ) -> Reply {
        if self.state != State::Idle {
            return self.out_of_order("a plan");
        }
        if spaces.len() != fds.len() {
            return unexpected("a plan needs a descriptor for each space");
        }
        let mut pairs = spaces.iter().zip(fds);
        planned(pairs.try_for_each(|(space, fd)| enter(&mut self.plan, SpaceId(*space), fd)))
    }

    pub(super) fn arrived(&self, runs: &[(u32, u64, u64)]) -> Reply {
        let one = |&(space, start, count): &(u32, u64, u64)| {
            let run = PageRun::new(PageIndex(start), PageCount(count));
            run.map(|run| (SpaceId(space), run))
        };
        let Ok(runs) = runs.iter().map(one).collect::<Result<Vec<_>, _>>() else {
            return unexpected("pages that are none have arrived");
        };
        for of_one in runs.chunk_by(|one, next| one.0 == next.0) {
            let pages = PageSet::from_runs(of_one.iter().map(|(_, run)| *run));
            if let Err(error) = self.homes.arrived(of_one[0].0, pages) {
                return unexpected(&error.to_string());
            }
        }
        Reply::Ok
    }

    /// Hands out the stores that lack pages, and which: as many as go into a message.
    pub(super) async fn missing(&mut self, id: u64, after: Option<u32>) {
        let missing = match self.homes.missing().await {
            Ok(missing) => missing,
            Err(error) => {
                let reply = unexpected(&error.to_string());
                self.tell(&Told::Reply { id, reply }).await;
                return;
            }
        };
        let rest = missing.into_iter();
        let rest = rest.filter(|it| after.is_none_or(|after| after < it.space.0));
        let part: Vec<_> = rest.take(FDS_MAX / 2).collect();
        let runs = part.iter().map(|it| plan::write_runs(&it.pages));
        let runs: Vec<OwnedFd> = match runs.collect() {
            Ok(runs) => runs,
            Err(error) => {
                let reply = planned(Err(error));
                self.tell(&Told::Reply { id, reply }).await;
                return;
            }
        };
        let reply = Reply::Missing(part.iter().map(|it| it.space.0).collect());
        let pairs = part.iter().zip(&runs);
        let fds: Vec<BorrowedFd<'_>> = pairs
            .flat_map(|(it, runs)| [it.store.as_fd(), runs.as_fd()])
            .collect();
        self.tell_with(&Told::Reply { id, reply }, &fds).await;
    }

    /// Tells the daemon what threads wait for. One that is not there asks when it comes.
    pub(super) async fn want(&mut self, wants: &mut Vec<Wanted>) {
        let wanted = wants.drain(..).map(|(space, page)| (space.0, page.0));
        self.tell(&Told::Wanted(wanted.collect())).await;
    }

    /// How things stand.
    pub(super) fn status(&mut self) -> Status {
        if let Some(counters) = &mut self.counters
            && let Ok(counters) = counters.try_recv()
        {
            self.counted = Some(counters);
        }
        let counters = self.counted.as_deref();
        let load = |count: fn(&Counters) -> &std::sync::atomic::AtomicU64| {
            counters.map_or(0, |counters| count(counters).load(Ordering::Relaxed))
        };
        Status {
            state: self.state,
            root_pid: self.restored.map(|restored| restored.root_pid),
            filled_pages: load(|counters| &counters.settled),
            pending_pages: load(|counters| &counters.pending) + self.plan.pages().0,
            absent_pages: load(|counters| &counters.absent),
            waited: counters.map_or_else(Waited::default, |counters| counters.waited.sum_up()),
            faults: load(|counters| &counters.faults),
            errors: load(|counters| &counters.errors),
            watched: self.watcher.is_alive(),
            failure: self.fault.clone(),
        }
    }
}
