use super::*;
use crate::page::PageRun;
use crate::wire::code::ErrorCode;

const SPACE: SpaceId = SpaceId(1);
const FIRST: Generation = Generation::FIRST;

fn set(start: u64, count: u64) -> PageSet {
    if count == 0 {
        return PageSet::new();
    }
    PageSet::from(PageRun::new(PageIndex(start), PageCount(count)).unwrap())
}

fn end(round: Round, parcels: u32, pages: u64) -> RoundEnd {
    RoundEnd {
        round,
        parcels,
        pages: PageCount(pages),
        files: 0,
    }
}

fn last(round: Round, parcels: u32, pages: u64) -> Final {
    Final {
        generation: FIRST,
        round,
        parcels,
        pages: PageCount(pages),
        live_sets: 1,
        images: 1,
        digests: 0,
        verify: false,
        locks: 0,
        files: 0,
        absent_sets: 0,
        absent_pages: PageCount::ZERO,
    }
}

fn enter(ledger: &mut Ledger, space: SpaceId, round: Round, pages: u64) -> Result<(), LedgerError> {
    let admitted = ledger.admit(round)?;
    ledger.parcel(admitted, space, PageCount(pages))
}

fn held<const N: usize>(spaces: [(SpaceId, PageSet, PageSet); N]) -> BTreeMap<SpaceId, HeldPages> {
    let held = |(space, data, zero)| (space, HeldPages { data, zero });
    spaces.into_iter().map(held).collect()
}

/// A ledger whose final round is complete, with these live pages, of so many that came.
fn complete(live: PageSet, received: u64) -> Ledger {
    let mut ledger = Ledger::new();
    enter(&mut ledger, SPACE, Round::FIRST, received).unwrap();
    ledger.final_end(last(Round::FIRST, 1, received)).unwrap();
    assert_eq!(ledger.image(FIRST), Ok(Arrival::Kept));
    assert_eq!(ledger.live_set(FIRST, SPACE, live), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
    ledger
}

// clause: R-3
#[test]
fn a_round_is_held_when_its_last_parcel_is_in() {
    let (mut ledger, round) = (Ledger::new(), Round::FIRST);
    enter(&mut ledger, SPACE, round, 4).unwrap();
    ledger.round_end(end(round, 2, 6)).unwrap();
    assert_eq!(ledger.round_held(), Ok(None));
    let admitted = ledger.admit(round).unwrap();
    assert_eq!(ledger.round_held(), Ok(None));
    ledger.parcel(admitted, SPACE, PageCount(2)).unwrap();
    assert_eq!(ledger.round_held(), Ok(Some(round)));
    assert_eq!(ledger.round_held(), Ok(None));
    assert_eq!(ledger.open(), round.next());
}

// clause: R-4
#[test]
fn only_the_open_round_takes_parcels() {
    let mut ledger = Ledger::new();
    let (open, found) = (Round::FIRST, Round::FIRST.next());
    let refused = LedgerError::Round { open, found };
    assert_eq!(ledger.admit(found), Err(refused));
    assert_eq!(ledger.round_end(end(found, 0, 0)), Err(refused));
    ledger.round_end(end(open, 1, 1)).unwrap();
    assert_eq!(
        ledger.round_end(end(open, 1, 1)),
        Err(LedgerError::EndsTwice(open))
    );
    assert_eq!(refused.code(), ErrorCode::Unexpected);
}

// clause: R-4
#[test]
fn a_parcel_more_than_the_source_says_never_gets_to_the_store() {
    let many = LedgerError::TooMany {
        what: "parcels",
        found: 2,
        sent: 1,
    };
    let (mut ledger, round) = (Ledger::new(), Round::FIRST);
    ledger.round_end(end(round, 1, 3)).unwrap();
    // The first of them is still on its way into the store.
    let _first = ledger.admit(round).unwrap();
    assert_eq!(ledger.admit(round), Err(many));
    let mut ledger = Ledger::new();
    let _both = (ledger.admit(round).unwrap(), ledger.admit(round).unwrap());
    assert_eq!(ledger.round_end(end(round, 1, 3)), Err(many));
}

// clause: R-4
#[test]
fn no_parcel_comes_after_the_final_round() {
    let mut ledger = complete(set(0, 4), 4);
    let over = LedgerError::Over {
        last: Round::FIRST,
        found: Round::FIRST.next(),
    };
    assert_eq!(ledger.admit(Round::FIRST.next()), Err(over));
    assert_eq!(ledger.round_end(end(Round::FIRST.next(), 0, 0)), Err(over));
}

#[test]
fn more_or_fewer_pages_than_sent_are_an_error() {
    let mut ledger = Ledger::new();
    ledger.round_end(end(Round::FIRST, 1, 3)).unwrap();
    let many = LedgerError::TooMany {
        what: "pages",
        found: 4,
        sent: 3,
    };
    let mut more = ledger.clone();
    assert_eq!(enter(&mut more, SPACE, Round::FIRST, 4), Err(many));
    enter(&mut ledger, SPACE, Round::FIRST, 2).unwrap();
    assert!(matches!(
        ledger.round_held(),
        Err(LedgerError::Pages { .. })
    ));
}

// clause: F-3
#[test]
fn every_live_page_must_be_held_and_the_rest_is_dropped() {
    let mut ledger = Ledger::new();
    enter(&mut ledger, SPACE, Round::FIRST, 12).unwrap();
    enter(&mut ledger, SpaceId(2), Round::FIRST, 1).unwrap();
    ledger.final_end(last(Round::FIRST, 2, 13)).unwrap();
    let held = held([
        (SPACE, set(0, 7), set(7, 3)),
        (SpaceId(2), set(5, 1), set(0, 0)),
    ]);
    assert_eq!(ledger.settle(&held), Err(LedgerError::NotFinal));
    assert_eq!(ledger.image(FIRST), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(None));
    let mut lacking = ledger.clone();
    assert_eq!(lacking.live_set(FIRST, SPACE, set(4, 8)), Ok(Arrival::Kept));
    assert_eq!(lacking.round_held(), Ok(Some(Round::FIRST)));
    let incomplete = LedgerError::Incomplete {
        space: SPACE,
        live: PageCount(8),
        data: PageCount(3),
        zero: PageCount(3),
        missing: PageCount(2),
        first: PageIndex(10),
    };
    assert_eq!(lacking.settle(&held), Err(incomplete));
    assert_eq!(incomplete.code(), ErrorCode::LedgerIncomplete);
    assert_eq!(ledger.live_set(FIRST, SPACE, set(4, 5)), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
    let first = Account {
        space: SPACE,
        live: PageCount(5),
        data: PageCount(3),
        zero: PageCount(2),
        absent: set(0, 0),
        surplus: set(0, 4).union(&set(9, 1)),
        replaced: PageCount(2),
        received: PageCount(12),
    };
    let second = Account {
        space: SpaceId(2),
        live: PageCount::ZERO,
        data: PageCount::ZERO,
        zero: PageCount::ZERO,
        absent: set(0, 0),
        surplus: set(5, 1),
        replaced: PageCount::ZERO,
        received: PageCount(1),
    };
    assert_eq!(ledger.settle(&held), Ok(vec![first, second]));
}

// clause: F-3
#[test]
fn a_store_that_holds_what_never_came_or_a_page_in_two_forms_is_not_believed() {
    let ledger = complete(set(0, 4), 4);
    let refuse = |data: PageSet, zero: PageSet, both| {
        let error = LedgerError::Count {
            space: SPACE,
            data: data.len(),
            zero: zero.len(),
            both: PageCount(both),
            received: PageCount(4),
        };
        assert_eq!(ledger.settle(&held([(SPACE, data, zero)])), Err(error));
        assert_eq!(error.code(), ErrorCode::LedgerIncomplete);
    };
    refuse(set(0, 4), set(4, 1), 0);
    refuse(set(0, 3), set(2, 1), 1);
    let right = held([(SPACE, set(0, 3), set(3, 1))]);
    assert_eq!(ledger.settle(&right).unwrap()[0].live, PageCount(4));
}

// clause: F-2
#[test]
fn a_space_has_one_live_set() {
    let mut ledger = Ledger::new();
    assert_eq!(ledger.live_set(FIRST, SPACE, set(0, 1)), Ok(Arrival::Kept));
    assert_eq!(
        ledger.live_set(FIRST, SPACE, set(1, 1)),
        Err(LedgerError::LiveTwice(SPACE))
    );
}

// clause: F-2
#[test]
fn a_live_set_of_a_space_of_which_no_page_came_is_incomplete_unless_it_is_empty() {
    let mut ledger = Ledger::new();
    ledger.final_end(last(Round::FIRST, 0, 0)).unwrap();
    assert_eq!(ledger.image(FIRST), Ok(Arrival::Kept));
    let mut empty = ledger.clone();
    assert_eq!(ledger.live_set(FIRST, SPACE, set(3, 2)), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
    let settled = ledger.settle(&BTreeMap::new());
    assert!(matches!(settled, Err(LedgerError::Incomplete { .. })));
    assert_eq!(
        empty.live_set(FIRST, SPACE, PageSet::new()),
        Ok(Arrival::Kept)
    );
    assert_eq!(empty.round_held(), Ok(Some(Round::FIRST)));
    assert!(empty.settle(&BTreeMap::new()).is_ok());
}

// clause: F-4
#[test]
fn every_live_page_has_one_digest_and_no_other_page_has_any() {
    let all = &[(SPACE, set(0, 4)), (SPACE, set(4, 6))][..];
    let check = |digests: &[(SpaceId, PageSet)], complete: bool| {
        let mut ledger = Ledger::new();
        enter(&mut ledger, SPACE, Round::FIRST, 10).unwrap();
        let count = u32::try_from(digests.len()).unwrap();
        let last = Final {
            digests: count,
            verify: true,
            images: 0,
            ..last(Round::FIRST, 1, 10)
        };
        ledger.final_end(last).unwrap();
        assert_eq!(ledger.live_set(FIRST, SPACE, set(0, 10)), Ok(Arrival::Kept));
        for (space, pages) in digests {
            let kept = ledger.digests(FIRST, *space, pages.clone());
            assert_eq!(kept, Ok(Arrival::Kept));
        }
        assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
        let settled = ledger.settle(&held([(SPACE, set(0, 10), set(0, 0))]));
        match settled {
            Ok(_) => assert!(complete, "{digests:?}"),
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::VerifyMismatch);
                assert!(!complete, "{digests:?}: {error}");
            }
        }
    };
    check(all, true);
    check(&all[..1], false);
    check(&[all[0].clone(), (SPACE, set(3, 6))], false);
    check(&[all, &[(SpaceId(2), set(0, 1))]].concat(), false);
    check(&[], false);
}

// clause: F-6
#[test]
fn what_is_of_an_older_generation_is_dropped_however_late_it_comes() {
    let mut ledger = Ledger::new();
    let (second, third) = (FIRST.next(), FIRST.next().next());
    enter(&mut ledger, SPACE, Round::FIRST, 4).unwrap();
    assert_eq!(ledger.live_set(FIRST, SPACE, set(0, 9)), Ok(Arrival::Kept));
    assert_eq!(ledger.image(FIRST), Ok(Arrival::Kept));
    assert_eq!(ledger.digests(FIRST, SPACE, set(0, 9)), Ok(Arrival::Kept));
    // The source has given up twice; what it sent arrives in any order.
    assert_eq!(ledger.image(third), Ok(Arrival::Kept));
    assert_eq!(ledger.live().get(&SPACE), None);
    assert_eq!(ledger.live_set(second, SPACE, set(0, 8)), Ok(Arrival::Late));
    assert_eq!(ledger.image(FIRST), Ok(Arrival::Late));
    assert_eq!(ledger.digests(second, SPACE, set(0, 9)), Ok(Arrival::Late));
    let last = Final {
        generation: third,
        ..last(Round::FIRST, 1, 4)
    };
    ledger.final_end(last).unwrap();
    assert_eq!(ledger.round_held(), Ok(None));
    assert_eq!(ledger.live_set(FIRST, SPACE, set(0, 9)), Ok(Arrival::Late));
    assert_eq!(ledger.live_set(third, SPACE, set(0, 4)), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
    let settled = ledger.settle(&held([(SPACE, set(0, 4), set(0, 0))]));
    assert_eq!(settled.unwrap()[0].live, PageCount(4));
    assert_eq!(ledger.image(second), Ok(Arrival::Late));
}

// clause: F-6
#[test]
fn nothing_is_newer_than_the_final_message() {
    let (mut ledger, second) = (Ledger::new(), FIRST.next());
    ledger.final_end(last(Round::FIRST, 0, 0)).unwrap();
    let newer = LedgerError::Generation {
        last: FIRST,
        found: second,
    };
    assert_eq!(ledger.image(second), Err(newer));
    let mut ledger = Ledger::new();
    assert_eq!(ledger.image(second), Ok(Arrival::Kept));
    assert_eq!(ledger.final_end(last(Round::FIRST, 0, 0)), Err(newer));
}

// clause: D-9
#[test]
fn a_round_is_held_when_the_differences_of_folders_are_applied() {
    let round = Round::FIRST;
    let mut ledger = Ledger::new();
    assert_eq!(ledger.files(round), Ok(()));
    let two = RoundEnd {
        files: 2,
        ..end(round, 0, 0)
    };
    ledger.round_end(two).unwrap();
    assert_eq!(ledger.round_held(), Ok(None));
    assert_eq!(ledger.admit_files(round), Ok(()));
    ledger.files(round).unwrap();
    assert_eq!(ledger.round_held(), Ok(Some(round)));
    // One of a round that is held, and one that is too many.
    let found = round;
    let open = round.next();
    assert_eq!(
        ledger.admit_files(found),
        Err(LedgerError::Round { open, found })
    );
    ledger.files(open).unwrap();
    let too_many = ledger
        .round_end(end(open, 0, 0))
        .map_err(|error| error.code());
    assert_eq!(too_many, Err(ErrorCode::Unexpected));
}

/// A ledger whose final round is complete but for the settling, with one live and one absent set.
fn with_absent(live: PageSet, absent: PageSet, received: u64) -> Ledger {
    let mut ledger = Ledger::new();
    enter(&mut ledger, SPACE, Round::FIRST, received).unwrap();
    let last = Final {
        absent_sets: 1,
        absent_pages: absent.len(),
        ..last(Round::FIRST, 1, received)
    };
    ledger.final_end(last).unwrap();
    assert_eq!(ledger.image(FIRST), Ok(Arrival::Kept));
    assert_eq!(ledger.live_set(FIRST, SPACE, live), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(None));
    assert_eq!(ledger.absent_set(FIRST, SPACE, absent), Ok(Arrival::Kept));
    assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
    ledger
}

// clause: P-2
#[test]
fn what_is_live_is_held_or_absent_and_what_is_held_of_absent_pages_is_dropped() {
    // Of ten live pages 2 to 5 are absent, and 2 and 3 are held as they were before.
    let ledger = with_absent(set(0, 10), set(2, 4), 8);
    let settled = ledger.settle(&held([(SPACE, set(0, 4), set(6, 4))]));
    let account = Account {
        space: SPACE,
        live: PageCount(10),
        data: PageCount(2),
        zero: PageCount(4),
        absent: set(2, 4),
        surplus: set(2, 2),
        replaced: PageCount(0),
        received: PageCount(8),
    };
    assert_eq!(settled, Ok(vec![account]));
    // Page 6 is neither.
    let settled = ledger.settle(&held([(SPACE, set(0, 2), set(7, 3))]));
    let Err(LedgerError::Incomplete { missing, first, .. }) = settled else {
        panic!("{settled:?}");
    };
    assert_eq!((missing, first), (PageCount(1), PageIndex(6)));
}

// clause: P-2
#[test]
fn a_set_of_absent_pages_is_of_live_ones_and_counted() {
    let ledger = with_absent(set(0, 4), set(3, 2), 4);
    let settled = ledger.settle(&held([(SPACE, set(0, 4), set(0, 0))]));
    let strange = LedgerError::AbsentNotLive {
        space: SPACE,
        live: PageCount(4),
        absent: PageCount(2),
        strange: PageCount(1),
    };
    assert_eq!(settled, Err(strange));
    let mut ledger = complete(set(0, 4), 4);
    let more = ledger.absent_set(FIRST, SPACE, set(0, 1));
    assert!(matches!(more, Err(LedgerError::TooMany { .. })), "{more:?}");
    let mut ledger = Ledger::new();
    ledger
        .absent_set(FIRST, SPACE, set(0, 1))
        .map(drop)
        .unwrap();
    let twice = ledger.absent_set(FIRST, SPACE, set(0, 1));
    assert_eq!(twice, Err(LedgerError::AbsentTwice(SPACE)));
    // One page less than the source says.
    let mut ledger = Ledger::new();
    let last = Final {
        absent_sets: 1,
        absent_pages: PageCount(3),
        images: 0,
        live_sets: 1,
        ..last(Round::FIRST, 0, 0)
    };
    ledger.final_end(last).unwrap();
    ledger.live_set(FIRST, SPACE, set(0, 4)).map(drop).unwrap();
    ledger
        .absent_set(FIRST, SPACE, set(0, 2))
        .map(drop)
        .unwrap();
    let (found, sent) = (PageCount(2), PageCount(3));
    assert_eq!(
        ledger.round_held(),
        Err(LedgerError::AbsentPages { found, sent })
    );
}
