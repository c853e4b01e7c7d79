//! What a workload that runs at the target lacks, and what is asked for next.
//!
//! The target drives: it asks for pages, the source answers, and has no state of that. A page is
//! *missing* until it has arrived, and *open* as long as it is missing and has not been asked for
//! on the present connection. So a lost connection costs what was asked for and has not arrived,
//! and nothing else: that is open again.
//!
//! Order: what a thread waits for goes first, with its neighbours. Then what follows the last such
//! page, since memory is mostly walked through; then what was sent once and written again, which
//! the workload uses; then the rest, by address.
//!
//! Invariant: a page counts as newly arrived once. Whoever writes pages to memory writes those, and
//! no others: one that came before may have been changed by the workload since.

use std::collections::{BTreeMap, VecDeque};

use crate::id::SpaceId;
use crate::page::{PageCount, PageIndex, PageRun};
use crate::set::PageSet;
use crate::wire::control::{FETCH_PAGES_MAX, FETCH_RUNS_MAX};

/// Pages of the aligned block (64 KiB) that is asked for with a page that a thread waits for, as
/// far as they are missing: what it touches next is most often there, and a block takes hardly
/// longer than a page.
pub const NEIGHBOURS: u64 = 16;

/// Places after which the fill goes on, the latest first. As many threads may walk at once.
const PLACES_MAX: usize = 16;

/// What is missing, by space.
#[derive(Clone, Debug, Default)]
pub struct Absent {
    spaces: BTreeMap<SpaceId, Space>,
    /// Where threads have waited, the latest first: the fill goes on there.
    places: VecDeque<(SpaceId, PageIndex)>,
}

#[derive(Clone, Debug, Default)]
struct Space {
    /// All that was missing in the beginning.
    expected: PageSet,
    missing: PageSet,
    /// Missing, and not asked for.
    open: PageSet,
    /// Of the open ones, those that go before the others.
    first: PageSet,
    /// Asked for as urgent.
    urgent: PageSet,
}

/// Pages to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The space that they are of.
    pub space: SpaceId,
    /// As many as a request may have.
    pub pages: PageSet,
    /// A thread waits for one of them.
    pub urgent: bool,
}

/// Pages that came and cannot have been asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages came of space {space} that were never missing, the first at {:#x}",
    first.address())]
pub struct NeverMissing {
    /// The space.
    pub space: SpaceId,
    /// How many.
    pub pages: PageCount,
    /// The first of them.
    pub first: PageIndex,
}

impl Absent {
    /// All of these are missing. Those of `first` among them go before the others.
    pub fn new(missing: BTreeMap<SpaceId, PageSet>, first: &BTreeMap<SpaceId, PageSet>) -> Self {
        let space = |(space, missing): (SpaceId, PageSet)| {
            let first = first.get(&space).map(|first| first.intersection(&missing));
            let state = Space {
                expected: missing.clone(),
                open: missing.clone(),
                missing,
                first: first.unwrap_or_default(),
                urgent: PageSet::new(),
            };
            (space, state)
        };
        Self {
            spaces: missing.into_iter().map(space).collect(),
            places: VecDeque::new(),
        }
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.spaces.values().all(|space| space.missing.is_empty())
    }

    /// Whether all that is missing has been asked for.
    pub fn is_asked(&self) -> bool {
        self.spaces.values().all(|space| space.open.is_empty())
    }

    /// Pages that are missing. Linear in their runs.
    pub fn left(&self) -> PageCount {
        self.spaces.values().map(|space| space.missing.len()).sum()
    }

    /// What is missing of a space.
    pub fn missing(&self, space: SpaceId) -> Option<&PageSet> {
        self.spaces.get(&space).map(|space| &space.missing)
    }

    /// A thread waits for this page. None if it is not missing, or asked for as urgent already.
    /// What was asked for as part of the fill is asked for again: it may come much later.
    pub fn fault(&mut self, space: SpaceId, page: PageIndex) -> Option<Ask> {
        let state = self.spaces.get_mut(&space)?;
        if !state.missing.contains(page) || state.urgent.contains(page) {
            return None;
        }
        let start = PageIndex(page.0 - page.0 % NEIGHBOURS);
        let block = PageRun::new(start, PageCount(NEIGHBOURS)).ok()?;
        let mut pages: PageSet = state.open.parts_of(block).collect();
        pages.insert(PageRun::new(page, PageCount(1)).ok()?);
        state.urgent.union_with(&pages);
        state.asked(&pages);
        self.places.retain(|place| *place != (space, start));
        self.places.push_front((space, block.end()));
        self.places.truncate(PLACES_MAX);
        Some(Ask {
            space,
            pages,
            urgent: true,
        })
    }

    /// What to ask for next of what nobody waits for: at most so many pages. None if all that is
    /// missing has been asked for.
    pub fn next(&mut self, pages_max: PageCount) -> Option<Ask> {
        let pages_max = pages_max.0.clamp(1, FETCH_PAGES_MAX);
        while let Some((space, from)) = self.places.pop_front() {
            if let Some(ask) = self.ask_from(space, from, pages_max) {
                let end = ask.pages.runs().last().map_or(from, PageRun::end);
                self.places.push_back((space, end));
                return Some(ask);
            }
        }
        for by_first in [true, false] {
            for (&space, state) in &mut self.spaces {
                let set = if by_first { &state.first } else { &state.open };
                let pages = take(set, PageIndex(0), pages_max);
                if !pages.is_empty() {
                    state.asked(&pages);
                    return Some(Ask {
                        space,
                        pages,
                        urgent: false,
                    });
                }
            }
        }
        None
    }

    /// What follows a place, if it is near: the next pages within the length of one request.
    fn ask_from(&mut self, space: SpaceId, from: PageIndex, pages_max: u64) -> Option<Ask> {
        let state = self.spaces.get_mut(&space)?;
        let window = PageRun::new(from, PageCount(pages_max)).ok()?;
        let near: PageSet = state.open.parts_of(window).collect();
        let pages = take(&near, from, pages_max);
        if pages.is_empty() {
            return None;
        }
        state.asked(&pages);
        Some(Ask {
            space,
            pages,
            urgent: false,
        })
    }

    /// Whether all of these pages were missing in the beginning: no others are to be stored.
    pub fn was_missing(&self, space: SpaceId, pages: &PageSet) -> bool {
        let state = self.spaces.get(&space);
        state.is_some_and(|state| pages.runs().iter().all(|run| state.expected.covers(run)))
    }

    /// These pages have come. Answers those that were missing: they are to be written to memory.
    pub fn arrived(&mut self, space: SpaceId, pages: &PageSet) -> Result<PageSet, NeverMissing> {
        let never = |strange: &PageSet| NeverMissing {
            space,
            pages: strange.len(),
            first: strange.runs().first().map_or(PageIndex(0), PageRun::start),
        };
        let state = self.spaces.get_mut(&space).ok_or_else(|| never(pages))?;
        let known = Space::parts(&state.expected, pages);
        let strange = pages.difference(&known);
        if !strange.is_empty() {
            return Err(never(&strange));
        }
        let newly = Space::parts(&state.missing, pages);
        state.missing.difference_with(pages);
        state.asked(pages);
        state.urgent.difference_with(pages);
        Ok(newly)
    }

    /// The workload has given these pages back, or unmapped them: they need not come.
    pub fn given_back(&mut self, space: SpaceId, pages: &PageSet) {
        if let Some(state) = self.spaces.get_mut(&space) {
            state.missing.difference_with(pages);
            state.asked(pages);
            state.urgent.difference_with(pages);
        }
    }

    /// The connection is gone, and with it what was asked for and has not come.
    pub fn disconnected(&mut self) {
        for space in self.spaces.values_mut() {
            space.open = space.missing.clone();
            space.urgent.clear();
        }
    }
}

impl Space {
    fn asked(&mut self, pages: &PageSet) {
        self.open.difference_with(pages);
        self.first.difference_with(pages);
    }

    fn parts(set: &PageSet, pages: &PageSet) -> PageSet {
        let parts = pages.runs().iter().flat_map(|run| set.parts_of(*run));
        parts.collect()
    }
}

/// The first pages of `set` from a place on, as many as one request may have.
fn take(set: &PageSet, from: PageIndex, pages_max: u64) -> PageSet {
    let begin = set.runs().partition_point(|run| run.end() <= from);
    let mut room = pages_max;
    let mut runs = Vec::new();
    for run in set.runs()[begin..].iter().take(FETCH_RUNS_MAX) {
        let start = run.start().max(from);
        let end = PageIndex(run.end().0.min(start.0.saturating_add(room)));
        if let Ok(part) = PageRun::between(start, end) {
            room -= part.count().0;
            runs.push(part);
        }
        if room == 0 {
            break;
        }
    }
    PageSet::from_runs(runs)
}

#[cfg(test)]
#[path = "absent_tests.rs"]
mod tests;
