//! What arrives of pages that were absent, and what is told of those that are.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pageferry_proto::id::SpaceId;
use pageferry_proto::page::PageIndex;
use pageferry_proto::set::PageSet;
use tracing::error;

use super::{LOOK_MS, Worker, warn_unpunched};
use crate::absent::Waiter;
use crate::serve::Missing;

impl Worker {
    /// Pages that were absent are in the store: whoever waits for them is served, and the fill has
    /// them. What nobody needs any more is given back at once.
    pub(super) fn arrived(&mut self, space: SpaceId, pages: &PageSet) {
        let Some(house) = self.families.get_mut(&space) else {
            return;
        };
        let (came, woken) = house.absent.arrive(pages);
        self.shared
            .counters
            .absent
            .fetch_sub(came.0, Ordering::Relaxed);
        for Waiter {
            member,
            page,
            since,
        } in woken
        {
            if let Some(state) = house.members.get_mut(&member) {
                state.waiting.push((page, Some(since)));
            }
        }
        for state in house.members.values_mut().filter(|_| self.filling) {
            state.cursor.arrive(pages.runs());
        }
        for run in pages.runs() {
            for unneeded in house.family.unneeded(*run) {
                warn_unpunched(house.store.punch(unneeded));
            }
        }
    }

    /// Forgets processes that have ended while they waited for what is absent.
    pub(super) fn look(&mut self) {
        if !self.filling || self.looked.elapsed().as_millis() < u128::from(LOOK_MS) {
            return;
        }
        self.looked = Instant::now();
        let mut gone = Vec::new();
        for (space, house) in &self.families {
            let members = house.members.iter();
            let starved = members.filter(|(_, state)| !house.is_fillable(state));
            let starved = starved.filter(|(_, state)| state.uffd.is_gone());
            gone.extend(starved.map(|(member, _)| (*space, *member)));
        }
        for (space, member) in gone {
            self.forget(space, member);
        }
    }

    /// What is absent, of spaces of which anything is; what threads wait for is told once more.
    pub(super) fn missing(&self) -> Vec<Missing> {
        let mut all = Vec::new();
        for (space, house) in &self.families {
            let needed = |run: &_| house.family.unneeded(*run);
            let unneeded = house.absent.pages().runs().iter().flat_map(needed);
            let pages = house.absent.pages();
            let pages = pages.difference(&PageSet::from_runs(unneeded));
            if pages.is_empty() {
                continue;
            }
            let store = match house.store.as_fd().try_clone_to_owned() {
                Ok(store) => store,
                Err(error) => {
                    error!(%error, space = space.0, "cannot hand out a store");
                    continue;
                }
            };
            let space = *space;
            all.push(Missing {
                space,
                store,
                pages,
            });
            house
                .absent
                .wanted()
                .for_each(|page| self.want(space, page));
        }
        all
    }

    /// Tells that a thread waits for a page of the store that is absent.
    pub(super) fn want(&self, space: SpaceId, page: PageIndex) {
        if let Some(wanted) = &self.shared.wanted {
            // Nobody listens any more when the process is about to end.
            let _ = wanted.send((space, page));
        }
    }
}
