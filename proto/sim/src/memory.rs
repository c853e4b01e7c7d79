//! Memory as versions of pages: enough to tell whether the target has the right ones.

use std::collections::BTreeMap;

use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::ledger::HeldPages;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;

/// The version of every page that is live, per space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    spaces: BTreeMap<SpaceId, BTreeMap<u64, u32>>,
}

/// Memory, and what of it was written since the last scan.
#[derive(Clone, Debug, Default)]
pub(super) struct TrackedMemory {
    pub(super) memory: Memory,
    dirty: BTreeMap<SpaceId, PageSet>,
    version: u32,
}

impl Memory {
    pub(super) fn insert(&mut self, space: SpaceId, page: u64, version: u32) {
        self.spaces.entry(space).or_default().insert(page, version);
    }

    pub(super) fn remove(&mut self, space: SpaceId, pages: &PageSet) {
        if let Some(held) = self.spaces.get_mut(&space) {
            held.retain(|page, _| !pages.contains(PageIndex(*page)));
        }
        self.spaces.retain(|_, held| !held.is_empty());
    }

    pub(super) fn live(&self) -> BTreeMap<SpaceId, PageSet> {
        let set = |pages: &BTreeMap<u64, u32>| pages.keys().map(|page| one(*page)).collect();
        self.spaces
            .iter()
            .map(|(space, pages)| (*space, set(pages)))
            .collect()
    }

    /// The same as a store would say it: pages of an even version are zero.
    pub(super) fn held(&self) -> BTreeMap<SpaceId, HeldPages> {
        let held = |pages: &BTreeMap<u64, u32>| {
            let of = |zero| {
                let pages = pages
                    .iter()
                    .filter(move |(_, version)| (*version % 2 == 0) == zero);
                pages.map(|(page, _)| one(*page)).collect()
            };
            HeldPages {
                data: of(false),
                zero: of(true),
            }
        };
        self.spaces
            .iter()
            .map(|(space, pages)| (*space, held(pages)))
            .collect()
    }

    /// The versions of those of `pages` that are live.
    pub(super) fn read(&self, space: SpaceId, pages: &PageSet) -> Vec<(u64, u32)> {
        let held = self.spaces.get(&space).into_iter().flatten();
        held.filter(|(page, _)| pages.contains(PageIndex(**page)))
            .map(|(page, version)| (*page, *version))
            .collect()
    }

    /// What is left without those pages.
    pub(super) fn without(&self, gone: impl Fn(SpaceId, PageIndex) -> bool) -> Self {
        let mut left = self.clone();
        for (space, pages) in &mut left.spaces {
            pages.retain(|page, _| !gone(*space, PageIndex(*page)));
        }
        left.spaces.retain(|_, pages| !pages.is_empty());
        left
    }

    pub(super) fn version(&self, space: SpaceId, page: u64) -> Option<u32> {
        self.spaces.get(&space)?.get(&page).copied()
    }

    pub(super) fn pages(&self) -> PageCount {
        PageCount(self.spaces.values().map(|pages| pages.len() as u64).sum())
    }
}

impl TrackedMemory {
    /// `spaces` spaces of `pages` pages each, all of them dirty.
    pub(super) fn new(spaces: u32, pages: u64) -> Self {
        let mut memory = Self::default();
        for space in 1..=spaces {
            for page in 0..pages {
                memory.write(SpaceId(space), page);
            }
        }
        memory
    }

    pub(super) fn write(&mut self, space: SpaceId, page: u64) {
        self.version += 1;
        self.memory.insert(space, page, self.version);
        self.dirty.entry(space).or_default().insert(one(page));
    }

    /// The workload gives a page back. That is no write: a tracker does not see it.
    pub(super) fn drop_page(&mut self, space: SpaceId, page: u64) {
        self.memory.remove(space, &PageSet::from(one(page)));
    }

    /// Scan and protect: what was written since the last scan and is still live.
    pub(super) fn scan(&mut self) -> BTreeMap<SpaceId, PageSet> {
        let live = self.memory.live();
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.retain(|space, pages| {
            *pages = live
                .get(space)
                .map_or_else(PageSet::new, |live| pages.intersection(live));
            !pages.is_empty()
        });
        dirty
    }

    /// What was scanned and then not sent is dirty again.
    pub(super) fn put_back(&mut self, space: SpaceId, pages: &PageSet) {
        self.dirty.entry(space).or_default().union_with(pages);
    }

    pub(super) fn dirty_pages(&self) -> PageCount {
        self.dirty.values().map(PageSet::len).sum()
    }

    /// A new tracker: everything is dirty.
    pub(super) fn restart(&mut self) {
        self.dirty = self.memory.live();
    }
}

fn one(page: u64) -> PageRun {
    PageRun::new(PageIndex(page), PageCount(1)).expect("the simulated pages have small numbers")
}
