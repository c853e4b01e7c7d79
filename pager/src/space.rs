//! What is still missing in the memory of a process and of the children it forks, as a pure model.
//!
//! A [`Family`] is the spaces that are filled from one store: the restored process and, while the
//! fill lasts, every child it forks. Each member waits for some pages ([`Piece`]): where they are
//! in its memory now, and where their contents lie in the store. The two differ once the process
//! moves memory about.
//!
//! Invariants: a store page is needed as long as any member waits for it, and nobody is ever told
//! to punch a needed one; a page that no member waits for at an address reads as zero there;
//! no operation takes time by the page, only by the run.
//!
//! Absent: system calls, threads, and the order in which events are to be believed.

use std::collections::BTreeMap;

use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;

/// One member of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u64);

/// Pages that a member waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where they are in the member's memory.
    pub run: PageRun,
    /// The store page with the contents of the first; those of the others follow.
    pub store: PageIndex,
}

/// The spaces that are filled from one store.
#[derive(Debug)]
pub struct Family {
    members: BTreeMap<MemberId, Pending>,
    usage: Usage,
    born: u64,
}

impl Family {
    /// A family of one member, which waits for `pending`, each page of which lies in the store at
    /// its own address.
    pub fn new(pending: &PageSet) -> (Self, MemberId) {
        let founder = MemberId(0);
        let mut family = Self {
            members: BTreeMap::new(),
            usage: Usage::default(),
            born: 1,
        };
        let mut pieces = Pending::default();
        for run in pending.runs() {
            family.usage.share(*run);
            pieces.insert(Piece {
                run: *run,
                store: run.start(),
            });
        }
        family.members.insert(founder, pieces);
        (family, founder)
    }

    /// The pages `parent` waits for are waited for by a new member, too.
    pub fn fork(&mut self, parent: MemberId) -> MemberId {
        let child = MemberId(self.born);
        self.born += 1;
        let pieces = self.members.get(&parent).cloned().unwrap_or_default();
        for piece in pieces.iter() {
            self.usage.share(piece.store_run());
        }
        self.members.insert(child, pieces);
        child
    }

    /// What `member` waits for from `page` on to the end of its run, if it waits for `page`.
    pub fn at(&self, member: MemberId, page: PageIndex) -> Option<Piece> {
        self.members
            .get(&member)?
            .from(page)
            .filter(|piece| piece.run.start() == page)
    }

    /// The first thing that `member` waits for at `page` or above.
    pub fn next(&self, member: MemberId, page: PageIndex) -> Option<Piece> {
        self.members.get(&member)?.from(page)
    }

    /// What `member` waits for first of these pages of the store.
    pub fn waiting_for(&self, member: MemberId, store: PageRun) -> Option<Piece> {
        self.members.get(&member)?.of_store(store)
    }

    /// The parts of a run of the store that no member waits for.
    pub fn unneeded(&self, store: PageRun) -> Vec<PageRun> {
        self.usage.unneeded(store)
    }

    /// Everything that `member` waits for, upwards.
    pub fn pieces(&self, member: MemberId) -> impl Iterator<Item = Piece> {
        self.members
            .get(&member)
            .into_iter()
            .flat_map(Pending::iter)
    }

    /// `member` does not wait for the pages of `run` any more: they were filled, given up or
    /// unmapped. Answers how many it had waited for.
    pub fn settle(&mut self, member: MemberId, run: PageRun) -> PageCount {
        let taken = match self.members.get_mut(&member) {
            Some(pending) => pending.take(run),
            None => Vec::new(),
        };
        for piece in &taken {
            self.usage.release(piece.store_run());
        }
        taken.iter().map(|piece| piece.run.count()).sum()
    }

    /// What `member` waits for in `from` it waits for at `to` from now on. Answers how many pages
    /// it does not wait for any more because they were moved out of the address space.
    pub fn relocate(&mut self, member: MemberId, from: PageRun, to: PageIndex) -> PageCount {
        let Some(pending) = self.members.get_mut(&member) else {
            return PageCount::ZERO;
        };
        let moved = pending.take(from);
        let lost = match PageRun::new(to, from.count()) {
            Ok(target) => self.settle(member, target).0,
            Err(_) => 0,
        };
        let mut beyond = 0;
        for piece in moved {
            let offset = piece.run.start().0 - from.start().0;
            let start = PageIndex(to.0.saturating_add(offset));
            match (
                PageRun::new(start, piece.run.count()),
                self.members.get_mut(&member),
            ) {
                (Ok(run), Some(pending)) => pending.insert(Piece { run, ..piece }),
                (Ok(_) | Err(_), _) => {
                    self.usage.release(piece.store_run());
                    beyond += piece.run.count().0;
                }
            }
        }
        PageCount(lost + beyond)
    }

    /// `member` is gone, and with it its memory. Answers how many pages it had waited for.
    pub fn forget(&mut self, member: MemberId) -> PageCount {
        let Some(pending) = self.members.remove(&member) else {
            return PageCount::ZERO;
        };
        for piece in pending.iter() {
            self.usage.release(piece.store_run());
        }
        PageCount(pending.pages)
    }

    /// How many pages all members together wait for.
    pub fn missing(&self) -> PageCount {
        PageCount(self.members.values().map(|pending| pending.pages).sum())
    }

    /// Store pages that nobody needs and that have not been handed out for punching.
    pub fn unpunched(&self) -> PageCount {
        PageCount(self.usage.freed_pages)
    }

    /// A run of the store around `near` that nobody needs any more, if at least `pages_min` pages
    /// in it were needed once. It may contain pages that never were. Handed out once.
    pub fn take_punchable(&mut self, near: PageIndex, pages_min: PageCount) -> Option<PageRun> {
        self.usage.take_punchable(near, pages_min)
    }

    /// All runs of the store that are not needed any more, however short. Handed out once.
    pub fn take_unpunched(&mut self) -> Vec<PageRun> {
        self.usage.take_unpunched()
    }
}

impl Piece {
    /// Where its contents are in the store.
    pub fn store_run(&self) -> PageRun {
        run(self.store.0, self.store.0 + self.run.count().0)
    }

    /// The part of it that lies in `part`.
    fn within(&self, part: PageRun) -> Option<Self> {
        let run = self.run.intersection(&part)?;
        let store = PageIndex(self.store.0 + (run.start().0 - self.run.start().0));
        Some(Self { run, store })
    }
}

/// What one member waits for.
#[derive(Clone, Debug, Default)]
struct Pending {
    /// First page in memory → how many, and the store page of the first. Disjoint.
    pieces: BTreeMap<u64, (u64, u64)>,
    /// The store page of the first → the first page in memory, of the same pieces: a page of the
    /// store is at one place of a memory at most.
    places: BTreeMap<u64, u64>,
    pages: u64,
}

impl Pending {
    fn iter(&self) -> impl Iterator<Item = Piece> {
        self.pieces.iter().map(piece)
    }

    fn from(&self, page: PageIndex) -> Option<Piece> {
        let rest = PageRun::between(page, PageIndex(PageIndex::LIMIT)).ok()?;
        let inside = self.pieces.range(..=page.0).next_back().map(piece);
        inside
            .and_then(|piece| piece.within(rest))
            .or_else(|| self.pieces.range(page.0..).next().map(piece))
    }

    /// The first of its pieces that has pages of this run of the store, cut to that.
    fn of_store(&self, store: PageRun) -> Option<Piece> {
        let before = self.places.range(..=store.start().0).next_back();
        let above = self.places.range(store.start().0..store.end().0).next();
        before.into_iter().chain(above).find_map(|(_, start)| {
            let whole = piece(self.pieces.get_key_value(start)?);
            let part = whole.store_run().intersection(&store)?;
            let at = whole.run.start().0 + (part.start().0 - whole.store.0);
            Some(Piece {
                run: run(at, at + part.count().0),
                store: part.start(),
            })
        })
    }

    /// Its pages must not be waited for yet.
    fn insert(&mut self, piece: Piece) {
        let (start, count) = (piece.run.start().0, piece.run.count().0);
        self.pieces.insert(start, (count, piece.store.0));
        self.places.insert(piece.store.0, start);
        self.pages += count;
    }

    fn take(&mut self, part: PageRun) -> Vec<Piece> {
        let mut taken = Vec::new();
        let first = self.pieces.range(..part.start().0).next_back();
        let first = first.map_or(part.start().0, |(start, _)| *start);
        let touched: Vec<Piece> = self
            .pieces
            .range(first..part.end().0)
            .map(piece)
            .filter(|piece| part.start() < piece.run.end())
            .collect();
        for whole in touched {
            self.pieces.remove(&whole.run.start().0);
            self.places.remove(&whole.store.0);
            self.pages -= whole.run.count().0;
            taken.extend(whole.within(part));
            let before = PageRun::between(whole.run.start(), part.start());
            let after = PageRun::between(part.end(), whole.run.end());
            for kept in [before, after].into_iter().flatten() {
                whole
                    .within(kept)
                    .into_iter()
                    .for_each(|kept| self.insert(kept));
            }
        }
        taken
    }
}

/// How many members need each page of the store.
#[derive(Debug, Default)]
struct Usage {
    /// First page → how many, and by how many members they are needed (at least one). Disjoint.
    needed: BTreeMap<u64, (u64, u32)>,
    /// First page → how many that were needed once and are not punched. Disjoint, coalesced.
    freed: BTreeMap<u64, u64>,
    freed_pages: u64,
}

impl Usage {
    /// One more member needs `part`.
    fn share(&mut self, part: PageRun) {
        let mut position = part.start().0;
        for (start, end, users) in self.split(part) {
            if position < start {
                self.needed.insert(position, (start - position, 1));
            }
            self.needed.insert(start, (end - start, users + 1));
            position = end;
        }
        if position < part.end().0 {
            self.needed.insert(position, (part.end().0 - position, 1));
        }
    }

    /// One member less needs `part`.
    fn release(&mut self, part: PageRun) {
        for (start, end, users) in self.split(part) {
            if users == 1 {
                self.free(start, end);
            } else {
                self.needed.insert(start, (end - start, users - 1));
            }
        }
    }

    /// The parts of `part` that nobody needs.
    fn unneeded(&self, part: PageRun) -> Vec<PageRun> {
        let first = self.needed.range(..part.start().0).next_back();
        let first = first.map_or(part.start().0, |(start, _)| *start);
        let mut position = part.start().0;
        let mut parts = Vec::new();
        for (start, (count, _)) in self.needed.range(first..part.end().0) {
            parts.extend(PageRun::between(PageIndex(position), PageIndex(*start)).ok());
            position = position.max(start + count);
        }
        parts.extend(PageRun::between(PageIndex(position), part.end()).ok());
        parts
    }

    /// Takes the needed runs inside `part` out and answers them; what sticks out stays.
    fn split(&mut self, part: PageRun) -> Vec<(u64, u64, u32)> {
        let first = self.needed.range(..part.start().0).next_back();
        let first = first.map_or(part.start().0, |(start, _)| *start);
        let touched: Vec<(u64, u64, u32)> = self
            .needed
            .range(first..part.end().0)
            .map(|(start, (count, users))| (*start, *start + *count, *users))
            .filter(|(_, end, _)| part.start().0 < *end)
            .collect();
        let mut inside = Vec::with_capacity(touched.len());
        for (start, end, users) in touched {
            self.needed.remove(&start);
            let (low, high) = (start.max(part.start().0), end.min(part.end().0));
            if start < low {
                self.needed.insert(start, (low - start, users));
            }
            if high < end {
                self.needed.insert(high, (end - high, users));
            }
            inside.push((low, high, users));
        }
        inside
    }

    fn free(&mut self, start: u64, end: u64) {
        self.freed_pages += end - start;
        let (mut low, mut high) = (start, end);
        if let Some((before, count)) = self.freed.range(..start).next_back()
            && before + count == start
        {
            low = *before;
        }
        if let Some(count) = self.freed.remove(&end) {
            high = end + count;
        }
        self.freed.insert(low, high - low);
    }

    fn take_punchable(&mut self, near: PageIndex, pages_min: PageCount) -> Option<PageRun> {
        let before = self.needed.range(..=near.0).next_back();
        let low = before.map_or(0, |(start, (count, _))| start + count);
        let above = self.needed.range(near.0..).next();
        let high = above.map_or(PageIndex::LIMIT, |(start, _)| *start);
        if high <= low {
            return None;
        }
        // Few: whoever asks after every release leaves less than twice `pages_min` in a gap.
        let inside = || self.freed.range(low..high);
        let pages: u64 = inside().map(|(_, count)| count).sum();
        if pages < pages_min.0 {
            return None;
        }
        let start = *inside().next()?.0;
        let end = inside().next_back().map(|(start, count)| start + count)?;
        let taken: Vec<u64> = inside().map(|(start, _)| *start).collect();
        taken.iter().for_each(|start| {
            self.freed.remove(start);
        });
        self.freed_pages -= pages;
        Some(run(start, end))
    }

    fn take_unpunched(&mut self) -> Vec<PageRun> {
        self.freed_pages = 0;
        let freed = std::mem::take(&mut self.freed);
        freed
            .into_iter()
            .map(|(start, count)| run(start, start + count))
            .collect()
    }
}

fn piece((start, (count, store)): (&u64, &(u64, u64))) -> Piece {
    Piece {
        run: run(*start, *start + *count),
        store: PageIndex(*store),
    }
}

/// A run whose ends come from runs: it is not empty and ends within the address space.
fn run(start: u64, end: u64) -> PageRun {
    PageRun::between(PageIndex(start), PageIndex(end)).expect("the ends of runs make a run")
}

#[cfg(test)]
#[path = "space_tests.rs"]
mod tests;
