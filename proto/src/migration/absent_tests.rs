use super::*;

const SPACE: SpaceId = SpaceId(7);

fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), PageCount(count)).unwrap()
}

fn set(runs: &[(u64, u64)]) -> PageSet {
    runs.iter()
        .map(|(start, count)| run(*start, *count))
        .collect()
}

fn absent(missing: &[(u64, u64)], first: &[(u64, u64)]) -> Absent {
    let missing = [(SPACE, set(missing))].into();
    Absent::new(missing, &[(SPACE, set(first))].into())
}

fn next(absent: &mut Absent, pages_max: u64) -> PageSet {
    let ask = absent.next(PageCount(pages_max)).unwrap();
    assert!(!ask.urgent);
    ask.pages
}

// clause: P-4
#[test]
fn each_page_is_asked_for_once_and_again_when_the_connection_is_gone() {
    let mut absent = absent(&[(0, 10), (20, 5)], &[]);
    assert_eq!(next(&mut absent, 8), set(&[(0, 8)]));
    assert_eq!(next(&mut absent, 8), set(&[(8, 2), (20, 5)]));
    assert_eq!(absent.next(PageCount(8)), None);
    assert_eq!(absent.arrived(SPACE, &set(&[(0, 4)])), Ok(set(&[(0, 4)])));
    absent.disconnected();
    assert_eq!(next(&mut absent, 100), set(&[(4, 6), (20, 5)]));
    assert_eq!(absent.left(), PageCount(11));
}

// clause: P-4
#[test]
fn what_comes_twice_is_new_once() {
    let mut absent = absent(&[(0, 4)], &[]);
    assert_eq!(absent.arrived(SPACE, &set(&[(1, 2)])), Ok(set(&[(1, 2)])));
    assert_eq!(
        absent.arrived(SPACE, &set(&[(0, 4)])),
        Ok(set(&[(0, 1), (3, 1)]))
    );
    assert_eq!(absent.arrived(SPACE, &set(&[(0, 4)])), Ok(PageSet::new()));
    assert!(absent.is_empty());
    let strange = NeverMissing {
        space: SPACE,
        pages: PageCount(2),
        first: PageIndex(4),
    };
    assert_eq!(absent.arrived(SPACE, &set(&[(3, 3)])), Err(strange));
    assert!(absent.arrived(SpaceId(8), &set(&[(0, 1)])).is_err());
}

#[test]
fn what_a_thread_waits_for_goes_first_with_its_neighbours_and_once() {
    let mut absent = absent(&[(0, 100)], &[]);
    assert_eq!(next(&mut absent, 4), set(&[(0, 4)]));
    let ask = absent.fault(SPACE, PageIndex(20)).unwrap();
    assert!(ask.urgent);
    assert_eq!(ask.pages, set(&[(16, 16)]));
    assert_eq!(absent.fault(SPACE, PageIndex(20)), None);
    assert_eq!(absent.fault(SPACE, PageIndex(31)), None);
    // The fill has asked for it, and may take its time.
    let ask = absent.fault(SPACE, PageIndex(2)).unwrap();
    assert_eq!(ask.pages, set(&[(2, 1), (4, 12)]));
    // It goes on where threads have been, the latest first.
    assert_eq!(next(&mut absent, 4), set(&[(32, 4)]));
    absent.disconnected();
    assert!(absent.fault(SPACE, PageIndex(20)).is_some());
    assert_eq!(absent.fault(SPACE, PageIndex(100)), None);
    assert_eq!(absent.fault(SpaceId(8), PageIndex(0)), None);
}

#[test]
fn what_was_written_again_goes_before_the_rest() {
    let mut absent = absent(&[(0, 10), (50, 4)], &[(8, 2), (51, 1), (70, 1)]);
    assert_eq!(next(&mut absent, 10), set(&[(8, 2), (51, 1)]));
    assert_eq!(next(&mut absent, 100), set(&[(0, 8), (50, 1), (52, 2)]));
}

#[test]
fn what_is_given_back_need_not_come() {
    let mut absent = absent(&[(0, 4)], &[]);
    absent.given_back(SPACE, &set(&[(0, 3)]));
    assert_eq!(absent.arrived(SPACE, &set(&[(0, 3)])), Ok(PageSet::new()));
    assert_eq!(next(&mut absent, 10), set(&[(3, 1)]));
    assert_eq!(absent.arrived(SPACE, &set(&[(3, 1)])), Ok(set(&[(3, 1)])));
    assert!(absent.is_empty());
}

#[test]
fn an_ask_is_within_the_limits_of_a_request() {
    let sieve: Vec<(u64, u64)> = (0..1000).map(|page| (2 * page, 1)).collect();
    let mut absent = absent(&sieve, &[]);
    let mut asked = 0;
    while let Some(ask) = absent.next(PageCount(u64::MAX)) {
        assert!(ask.pages.runs().len() <= FETCH_RUNS_MAX);
        asked += ask.pages.len().0;
    }
    assert_eq!(asked, 1000);
    let mut absent = self::absent(&[(0, 5000)], &[]);
    assert_eq!(next(&mut absent, 5000).len(), PageCount(FETCH_PAGES_MAX));
}
