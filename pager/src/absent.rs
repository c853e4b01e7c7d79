//! Pages of a store that have not come yet, and who waits for them.
//!
//! A page of a store is *held*, *zero* (a hole known to be one), or *absent*: its contents are
//! still elsewhere. Until it is said to have arrived, an absent page is neither copied nor taken
//! for zero. Where pages of a process have moved to says [`crate::space`]; here all is by the place
//! in the store, so nothing that a workload does to its memory changes what is absent.
//!
//! Invariants: a page that has arrived is never absent again; whoever waits for an absent page is
//! told when it arrives, and by every look anew that an event asks for; each absent page is asked
//! for once, however many wait, until somebody wants to hear all of it again.
//!
//! Absent: system calls, threads, and who brings the pages.

use std::collections::BTreeMap;
use std::time::Instant;

use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;

use crate::space::{MemberId, Piece};

/// What of one store has not come yet.
#[derive(Debug, Default)]
pub struct Absent {
    pages: PageSet,
    /// By the page of the store.
    waiting: BTreeMap<PageIndex, Vec<Waiter>>,
}

/// A thread that waits for an absent page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// In whose memory,
    pub member: MemberId,
    /// and where there.
    pub page: PageIndex,
    /// When its fault was first looked at.
    pub since: Instant,
}

impl Absent {
    /// These pages of the store have not come.
    pub fn new(pages: PageSet) -> Self {
        Self {
            pages,
            waiting: BTreeMap::new(),
        }
    }

    /// Whether all have come.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// How many have not.
    pub fn len(&self) -> PageCount {
        self.pages.len()
    }

    /// Which have not.
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// The first part of a piece whose contents are in the store.
    pub fn held_part(&self, piece: Piece) -> Option<Piece> {
        if self.pages.is_empty() {
            return Some(piece);
        }
        let (first, count) = (piece.store.0, piece.run.count().0);
        let mut start = first;
        let runs = self.pages.runs();
        let mut next = runs.partition_point(|run| run.end().0 <= first);
        if let Some(run) = runs.get(next)
            && run.start().0 <= start
        {
            start = run.end().0;
            next += 1;
        }
        let end = runs.get(next).map_or(u64::MAX, |run| run.start().0);
        let end = end.min(first + count);
        let at = PageIndex(piece.run.start().0 + (start.min(end) - first));
        let run = PageRun::between(at, PageIndex(piece.run.start().0 + (end - first)));
        run.ok().map(|run| Piece {
            run,
            store: PageIndex(start),
        })
    }

    /// Somebody waits for this page of the store; whether nobody did before, so that it must be
    /// asked for.
    pub fn wait(&mut self, store: PageIndex, waiter: Waiter) -> bool {
        let waiting = self.waiting.entry(store).or_default();
        waiting.push(waiter);
        waiting.len() == 1
    }

    /// These pages of the store are there now. Answers how many had not been, and who waited.
    pub fn arrive(&mut self, pages: &PageSet) -> (PageCount, Vec<Waiter>) {
        let before = self.pages.len();
        self.pages.difference_with(pages);
        let mut woken = Vec::new();
        for run in pages.runs() {
            while let Some((store, _)) = self.waiting.range(run.start()..run.end()).next() {
                let store = *store;
                woken.extend(self.waiting.remove(&store).into_iter().flatten());
            }
        }
        (PageCount(before.0 - self.pages.len().0), woken)
    }

    /// Something happened to the memory of `member`: where its threads wait is looked up anew.
    pub fn look_again(&mut self, member: MemberId) -> Vec<Waiter> {
        let mut found = Vec::new();
        self.waiting.retain(|_, waiting| {
            found.extend(waiting.extract_if(.., |waiter| waiter.member == member));
            !waiting.is_empty()
        });
        found
    }

    /// The pages of the store that somebody waits for.
    pub fn wanted(&self) -> impl Iterator<Item = PageIndex> {
        self.waiting.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, end: u64) -> PageRun {
        PageRun::between(PageIndex(start), PageIndex(end)).unwrap()
    }

    fn waiter(member: u64, page: u64) -> Waiter {
        Waiter {
            member: MemberId(member),
            page: PageIndex(page),
            since: Instant::now(),
        }
    }

    #[test]
    fn the_held_part_of_a_piece_is_the_first_without_an_absent_page() {
        let absent = Absent::new(PageSet::from_runs([run(10, 20), run(30, 31), run(31, 40)]));
        let part = |start: u64, end: u64| {
            let piece = Piece {
                run: run(1000 + start, 1000 + end),
                store: PageIndex(start),
            };
            let part = absent.held_part(piece)?;
            assert_eq!(part.run.start().0, 1000 + part.store.0);
            Some((part.store.0, part.store.0 + part.run.count().0))
        };
        assert_eq!(part(0, 5), Some((0, 5)));
        assert_eq!(part(0, 12), Some((0, 10)));
        assert_eq!(part(0, 100), Some((0, 10)));
        assert_eq!(part(10, 100), Some((20, 30)));
        assert_eq!(part(15, 25), Some((20, 25)));
        assert_eq!(part(15, 20), None);
        assert_eq!(part(12, 13), None);
        assert_eq!(part(30, 41), Some((40, 41)));
        assert_eq!(part(30, 40), None);
        assert_eq!(part(40, 50), Some((40, 50)));
    }

    #[test]
    fn who_waits_is_told_once_and_a_page_is_asked_for_once() {
        let mut absent = Absent::new(PageSet::from_runs([run(10, 20)]));
        assert!(absent.wait(PageIndex(12), waiter(0, 112)));
        assert!(!absent.wait(PageIndex(12), waiter(1, 212)));
        assert!(absent.wait(PageIndex(15), waiter(0, 115)));
        assert_eq!(
            absent.wanted().map(|page| page.0).collect::<Vec<_>>(),
            [12, 15]
        );
        let (came, woken) = absent.arrive(&PageSet::from_runs([run(5, 13)]));
        assert_eq!((came.0, absent.len().0), (3, 7));
        let woken: Vec<u64> = woken.iter().map(|waiter| waiter.page.0).collect();
        assert_eq!(woken, [112, 212]);
        assert_eq!(absent.pages(), &PageSet::from_runs([run(13, 20)]));
        // Twice is as good as once.
        let (came, woken) = absent.arrive(&PageSet::from_runs([run(5, 13)]));
        assert_eq!((came, woken.len()), (PageCount::ZERO, 0));
        assert_eq!(absent.look_again(MemberId(1)).len(), 0);
        assert_eq!(absent.look_again(MemberId(0)).len(), 1);
        assert_eq!(absent.wanted().count(), 0);
    }
}
