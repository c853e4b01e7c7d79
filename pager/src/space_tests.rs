//! The model against one that knows every page by itself.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// Pages of the address space in the random tests: small, so that everything overlaps.
const PAGES: u64 = 48;

impl Family {
    /// How many pages `member` waits for.
    fn pending(&self, member: MemberId) -> PageCount {
        PageCount(self.members.get(&member).map_or(0, |pending| pending.pages))
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Settle {
        member: usize,
        start: u64,
        count: u64,
    },
    Relocate {
        member: usize,
        start: u64,
        count: u64,
        to: u64,
    },
    Fork {
        parent: usize,
    },
    Forget {
        member: usize,
    },
    Punch {
        near: u64,
        min: u64,
    },
    PunchAll,
}

fn operation() -> impl Strategy<Value = Operation> {
    let member = 0..8_usize;
    let start = 0..PAGES;
    let count = 1..PAGES / 3;
    prop_oneof![
        6 => (member.clone(), start.clone(), count.clone())
            .prop_map(|(member, start, count)| Operation::Settle { member, start, count }),
        3 => (member.clone(), start.clone(), count, start.clone())
            .prop_map(|(member, start, count, to)| {
                Operation::Relocate { member, start, count, to }
            }),
        2 => member.clone().prop_map(|parent| Operation::Fork { parent }),
        1 => member.prop_map(|member| Operation::Forget { member }),
        2 => (start, 1..8_u64).prop_map(|(near, min)| Operation::Punch { near, min }),
        1 => Just(Operation::PunchAll),
    ]
}

/// Per member: page in memory → page in the store.
#[derive(Default)]
struct Naive {
    members: BTreeMap<MemberId, BTreeMap<u64, u64>>,
    /// Store pages that were needed once and have not been punched since.
    stored: BTreeSet<u64>,
}

impl Naive {
    fn needed(&self, page: u64) -> bool {
        self.members
            .values()
            .any(|pages| pages.values().any(|store| *store == page))
    }

    fn punch(&mut self, run: PageRun) {
        for page in run.start().0..run.end().0 {
            assert!(!self.needed(page), "a needed page {page:#x} was punched");
            self.stored.remove(&page);
        }
    }
}

fn piece_run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), PageCount(count)).unwrap()
}

fn apply(family: &mut Family, naive: &mut Naive, operation: &Operation) {
    let ids: Vec<MemberId> = naive.members.keys().copied().collect();
    let pick = |index: usize| ids.get(index % ids.len().max(1)).copied();
    match *operation {
        Operation::Settle {
            member,
            start,
            count,
        } => {
            let Some(id) = pick(member) else { return };
            let settled = family.settle(id, piece_run(start, count));
            let pages = naive.members.get_mut(&id).unwrap();
            let before = pages.len();
            pages.retain(|page, _| !(start..start + count).contains(page));
            assert_eq!(settled.0, (before - pages.len()) as u64);
        }
        Operation::Relocate {
            member,
            start,
            count,
            to,
        } => {
            let Some(id) = pick(member) else { return };
            family.relocate(id, piece_run(start, count), PageIndex(to));
            let pages = naive.members.get_mut(&id).unwrap();
            let source = start..start + count;
            let moved: Vec<(u64, u64)> = pages
                .iter()
                .filter(|(page, _)| source.contains(page))
                .map(|(page, store)| (page - start + to, *store))
                .collect();
            pages.retain(|page, _| !source.contains(page) && !(to..to + count).contains(page));
            pages.extend(moved);
        }
        Operation::Fork { parent } => {
            let Some(id) = pick(parent).filter(|_| ids.len() < 8) else {
                return;
            };
            let child = family.fork(id);
            let pages = naive.members[&id].clone();
            naive.members.insert(child, pages);
        }
        Operation::Forget { member } => {
            let Some(id) = pick(member) else { return };
            let forgotten = family.forget(id);
            let pages = naive.members.remove(&id).unwrap();
            assert_eq!(forgotten.0, pages.len() as u64);
        }
        Operation::Punch { near, min } => {
            let punched = family.take_punchable(PageIndex(near), PageCount(min));
            punched.into_iter().for_each(|run| naive.punch(run));
        }
        Operation::PunchAll => {
            family
                .take_unpunched()
                .into_iter()
                .for_each(|run| naive.punch(run));
        }
    }
}

fn compare(family: &Family, naive: &Naive) {
    assert_eq!(family.members.len(), naive.members.len());
    for (id, pages) in &naive.members {
        assert_eq!(family.pending(*id).0, pages.len() as u64);
        for page in 0..2 * PAGES {
            let piece = family.at(*id, PageIndex(page));
            assert_eq!(piece.map(|piece| piece.store.0), pages.get(&page).copied());
            if let Some(piece) = piece {
                for offset in 0..piece.run.count().0 {
                    let store = pages.get(&(page + offset)).copied();
                    assert_eq!(store, Some(piece.store.0 + offset));
                }
            }
            let next = family.next(*id, PageIndex(page));
            let first = pages.range(page..).next();
            assert_eq!(
                next.map(|piece| (piece.run.start().0, piece.store.0)),
                first.map(|(page, store)| (*page, *store))
            );
        }
    }
    compare_by_store(family, naive);
    let idle = naive
        .stored
        .iter()
        .filter(|page| !naive.needed(**page))
        .count();
    assert_eq!(family.unpunched().0, idle as u64);
}

/// The same, asked by the pages of the store.
fn compare_by_store(family: &Family, naive: &Naive) {
    let part = piece_run(PAGES / 4, PAGES / 2);
    let pages = part.start().0..part.end().0;
    for (id, all) in &naive.members {
        let wanted = all.values().filter(|store| pages.contains(store)).min();
        let found = family.waiting_for(*id, part);
        assert_eq!(found.map(|piece| piece.store.0), wanted.copied());
        for offset in 0..found.map_or(0, |piece| piece.run.count().0) {
            let piece = found.unwrap();
            let store = all.get(&(piece.run.start().0 + offset)).copied();
            assert_eq!(store, Some(piece.store.0 + offset));
            assert!(pages.contains(&(piece.store.0 + offset)));
        }
    }
    let unneeded: Vec<u64> = family
        .unneeded(part)
        .iter()
        .flat_map(|run| run.start().0..run.end().0)
        .collect();
    let expected: Vec<u64> = pages.filter(|page| !naive.needed(*page)).collect();
    assert_eq!(unneeded, expected);
}

proptest! {
    #[test]
    fn every_page_is_where_the_model_of_single_pages_has_it(
        runs in prop::collection::vec((0..PAGES, 1..12_u64), 0..8),
        operations in prop::collection::vec(operation(), 0..60),
    ) {
        let runs = runs.iter().map(|(start, count)| piece_run(*start, *count));
        let pending = PageSet::from_runs(runs);
        let (mut family, founder) = Family::new(&pending);
        let mut naive = Naive::default();
        let pages: BTreeMap<u64, u64> = pending
            .runs()
            .iter()
            .flat_map(|run| run.start().0..run.end().0)
            .map(|page| (page, page))
            .collect();
        naive.stored.extend(pages.keys());
        naive.members.insert(founder, pages);
        for operation in &operations {
            apply(&mut family, &mut naive, operation);
            compare(&family, &naive);
        }
        // When everybody is gone, all that was ever stored can be punched.
        let ids: Vec<MemberId> = naive.members.keys().copied().collect();
        for id in ids {
            family.forget(id);
            naive.members.remove(&id);
        }
        family.take_unpunched().into_iter().for_each(|run| naive.punch(run));
        prop_assert!(naive.stored.is_empty() && family.members.is_empty());
    }
}

fn family(start: u64, count: u64) -> (Family, MemberId) {
    Family::new(&PageSet::from(piece_run(start, count)))
}

#[test]
fn a_moved_page_is_found_at_its_new_address_with_its_old_contents() {
    let (mut family, founder) = family(100, 10);
    family.relocate(founder, piece_run(104, 4), PageIndex(500));
    assert_eq!(family.at(founder, PageIndex(104)), None);
    let piece = family.at(founder, PageIndex(501)).unwrap();
    assert_eq!(
        (piece.store, piece.run),
        (PageIndex(105), piece_run(501, 3))
    );
    assert_eq!(family.pending(founder), PageCount(10));
}

#[test]
fn a_page_that_a_child_still_needs_is_not_punched() {
    let (mut family, founder) = family(0, 1024);
    let child = family.fork(founder);
    family.settle(founder, piece_run(0, 512));
    assert_eq!(family.take_punchable(PageIndex(0), PageCount(1)), None);
    family.settle(child, piece_run(0, 300));
    assert_eq!(
        family.take_punchable(PageIndex(299), PageCount(256)),
        Some(piece_run(0, 300))
    );
    family.forget(child);
    assert_eq!(
        family.take_punchable(PageIndex(400), PageCount(1)),
        Some(piece_run(300, 212))
    );
}

#[test]
fn pages_that_were_never_needed_do_not_keep_a_punch_small() {
    let runs = [piece_run(0, 2), piece_run(10, 2), piece_run(20, 2)];
    let (mut family, founder) = Family::new(&PageSet::from_runs(runs));
    family.settle(founder, piece_run(0, 2));
    family.settle(founder, piece_run(10, 2));
    assert_eq!(family.take_punchable(PageIndex(10), PageCount(5)), None);
    assert_eq!(
        family.take_punchable(PageIndex(10), PageCount(4)),
        Some(piece_run(0, 12))
    );
}

#[test]
fn memory_moved_beyond_the_address_space_is_waited_for_no_more() {
    let (mut family, founder) = family(10, 4);
    let lost = family.relocate(founder, piece_run(10, 4), PageIndex(PageIndex::LIMIT - 2));
    assert_eq!(
        (lost, family.pending(founder)),
        (PageCount(4), PageCount(0))
    );
}
