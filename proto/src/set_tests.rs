//! `PageSet` against a model: a `BTreeSet` of page numbers.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), PageCount(count)).unwrap()
}

fn set(runs: &[(u64, u64)]) -> PageSet {
    runs.iter()
        .map(|&(start, count)| run(start, count))
        .collect()
}

fn pages(set: &PageSet) -> BTreeSet<u64> {
    set.runs()
        .iter()
        .flat_map(|run| run.start().0..run.end().0)
        .collect()
}

/// Sorted, disjoint and coalesced.
fn assert_well_formed(set: &PageSet) {
    for pair in set.runs().windows(2) {
        assert!(pair[0].end() < pair[1].start(), "{set:?}");
    }
}

fn runs() -> impl Strategy<Value = Vec<PageRun>> {
    prop::collection::vec(
        (0_u64..64, 1_u64..12).prop_map(|(start, count)| run(start, count)),
        0..12,
    )
}

fn model(runs: &[PageRun]) -> BTreeSet<u64> {
    runs.iter()
        .flat_map(|run| run.start().0..run.end().0)
        .collect()
}

proptest! {
    #[test]
    fn a_set_holds_the_pages_of_its_runs(runs in runs()) {
        let built = PageSet::from_runs(runs.iter().copied());
        assert_well_formed(&built);
        prop_assert_eq!(pages(&built), model(&runs));
        prop_assert_eq!(built.len().0, model(&runs).len() as u64);
        let mut grown = PageSet::new();
        runs.iter().for_each(|run| grown.insert(*run));
        prop_assert_eq!(grown, built);
    }

    #[test]
    fn operations_agree_with_the_model(left in runs(), right in runs()) {
        let (a, b) = (PageSet::from_runs(left.clone()), PageSet::from_runs(right.clone()));
        let (model_a, model_b) = (model(&left), model(&right));
        let mut grown = a.clone();
        grown.union_with(&b);
        let mut shrunk = a.clone();
        right.iter().for_each(|run| shrunk.remove(*run));
        let mut cut = a.clone();
        cut.difference_with(&b);
        let results = [a.union(&b), a.difference(&b), a.intersection(&b)];
        for result in results.iter().chain([&grown, &shrunk, &cut]) {
            assert_well_formed(result);
        }
        let union: BTreeSet<u64> = &model_a | &model_b;
        let difference: BTreeSet<u64> = &model_a - &model_b;
        let intersection: BTreeSet<u64> = &model_a & &model_b;
        prop_assert_eq!(pages(&a.union(&b)), union);
        prop_assert_eq!(pages(&a.difference(&b)), difference);
        prop_assert_eq!(pages(&a.intersection(&b)), intersection);
        prop_assert_eq!(grown, a.union(&b));
        prop_assert_eq!(shrunk, missing(&a, &b));
        prop_assert_eq!(cut, missing(&a, &b));
        for run in &right {
            let both = a.intersection(&PageSet::from(*run)).len();
            prop_assert_eq!(a.count_of(run), both);
        }
        prop_assert_eq!(a.is_superset(&b), model_a.is_superset(&model_b));
    }

    #[test]
    fn membership_agrees_with_the_model(runs in runs(), page in 0_u64..80, count in 1_u64..9) {
        let built = PageSet::from_runs(runs.iter().copied());
        let model = model(&runs);
        prop_assert_eq!(built.contains(PageIndex(page)), model.contains(&page));
        let covered = (page..page + count).all(|page| model.contains(&page));
        prop_assert_eq!(built.covers(&run(page, count)), covered);
    }

    #[test]
    fn parts_are_bounded_and_make_up_the_whole(runs in runs(), pages_max in 1_u64..20) {
        let built = PageSet::from_runs(runs);
        let parts = built.partition(PageCount(pages_max));
        let mut union = PageSet::new();
        for (index, part) in parts.iter().enumerate() {
            let full = part.len().0 == pages_max;
            prop_assert!(full || (index + 1 == parts.len() && part.len().0 < pages_max));
            prop_assert!(!part.is_empty());
            assert_well_formed(part);
            union.union_with(part);
        }
        prop_assert_eq!(union, built);
    }

    #[test]
    fn the_wire_form_reads_back(
        runs in prop::collection::vec((0_u64..1 << 51, 1_u64..1 << 40), 0..40)
    ) {
        let built = set(&runs);
        prop_assert_eq!(PageSet::from_wire(&built.to_wire()), Ok(built));
    }

    #[test]
    fn bytes_that_read_as_a_set_are_its_only_wire_form(
        bytes in prop::collection::vec(prop_oneof![0_u8..4, any::<u8>()], 0..24)
    ) {
        if let Ok(read) = PageSet::from_wire(&bytes) {
            assert_well_formed(&read);
            prop_assert_eq!(read.to_wire(), bytes);
        }
    }
}

#[test]
fn runs_that_touch_become_one() {
    let mut grown = set(&[(0, 2), (4, 2)]);
    grown.insert(run(2, 2));
    assert_eq!(grown.runs(), [run(0, 6)]);
}

#[test]
fn removing_from_the_middle_leaves_both_ends() {
    let mut cut = set(&[(0, 10)]);
    cut.remove(run(3, 4));
    assert_eq!(cut.runs(), [run(0, 3), run(7, 3)]);
}

#[test]
fn a_set_reaches_the_last_page_of_the_address_space() {
    let whole = PageSet::from(run(0, PageIndex::LIMIT));
    assert_eq!(PageSet::from_wire(&whole.to_wire()), Ok(whole.clone()));
    assert_eq!(whole.partition(PageCount(PageIndex::LIMIT / 2)).len(), 2);
}

#[test]
fn the_wire_form_is_refused_where_it_is_illegal() {
    let check = |bytes: &[u8], error| assert_eq!(PageSet::from_wire(bytes), Err(error));
    check(&[0], PageSetError::Truncated { run: 0 });
    check(&[0, 1, 0x80], PageSetError::Truncated { run: 1 });
    check(&[0x80, 0, 1], PageSetError::Number { run: 0 });
    check(
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 1],
        PageSetError::Number { run: 0 },
    );
    check(&[0, 1, 0, 1], PageSetError::Touching { run: 1 });
    let empty = PageRunError::Empty { start: 3 };
    check(
        &[3, 0],
        PageSetError::Run {
            run: 0,
            source: empty,
        },
    );
    check(
        &vec![1; WIRE_BYTES_MAX + 2],
        PageSetError::TooLong(WIRE_BYTES_MAX + 2),
    );
    check(&vec![1; 2 * RUNS_MAX + 2], PageSetError::TooManyRuns);
}
