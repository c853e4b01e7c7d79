use pageferry_proto::page::{PAGE_SIZE, PageIndex, PageRun};

use super::*;
use crate::pages::digest::of_page;
use crate::pages::encode::Encoder;
use crate::pages::store::StoreLimits;

const SPACE: SpaceId = SpaceId(1);
const BASE: u64 = 0x7_ffff_0000;

fn pages(start: u64, count: u64) -> PageSet {
    PageSet::from(PageRun::new(PageIndex(BASE + start), PageCount(count)).unwrap())
}

/// An intake that verifies, has pages 0 to 9, all of them live, and 2 and 3 are zero.
async fn intake() -> Intake {
    let store = Store::new(StoreLimits {
        data_pages_max: PageCount(1000),
        spaces_max: 4,
    });
    store.keep_digests();
    let intake = Intake::detached(Arc::new(store));
    let mut bytes: Vec<u8> = (0..10).flat_map(page).collect();
    let mut parcel = Vec::new();
    let all = pages(0, 10);
    Encoder::new().encode(SPACE, Round::FIRST, &all, &mut bytes, &mut parcel);
    let received = intake.shared.receiver.receive(parcel.into()).await;
    received.unwrap();
    intake.shared.lock().live.insert(SPACE, all);
    intake
}

fn page(number: u64) -> [u8; PAGE_SIZE] {
    let byte = u8::try_from(number).unwrap();
    [if matches!(number, 2 | 3) { 0 } else { byte + 1 }; PAGE_SIZE]
}

/// What the source says of some pages.
fn say(intake: &Intake, start: u64, digests: impl IntoIterator<Item = u64>) {
    let digests: Vec<u64> = digests.into_iter().collect();
    let pages = pages(start, digests.len() as u64);
    let mut sets = intake.shared.lock();
    sets.digests.push((SPACE, pages, digests));
}

fn digests(pages: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
    pages.map(|number| of_page(&page(number)))
}

fn check(intake: &Intake) -> Result<(), Failure> {
    intake.shared.settle().unwrap();
    intake.shared.verify()
}

#[tokio::test]
async fn pages_that_are_equal_are_let_through() {
    let intake = intake().await;
    say(&intake, 4, digests(4..10));
    say(&intake, 0, digests(0..4));
    check(&intake).unwrap();
}

#[tokio::test]
async fn a_page_that_differs_ends_the_migration_and_is_named() {
    for differs in 0..10 {
        let intake = intake().await;
        let other = |number| of_page(&page(number)) ^ u64::from(number == differs);
        say(&intake, 0, (0..10).map(other));
        let failure = check(&intake).unwrap_err();
        assert_eq!(failure.code(), ErrorCode::VerifyMismatch);
        let address = PageIndex(BASE + differs).address();
        let text = format!("space 1: the page at {address:#x} differs");
        assert_eq!(failure.text(), text);
    }
}

#[tokio::test]
async fn every_live_page_needs_one_digest() {
    for ranges in [&[(0, 9)][..], &[(0, 5), (4, 10)], &[(0, 5), (0, 5)], &[]] {
        let intake = intake().await;
        for (start, end) in ranges {
            say(&intake, *start, digests(*start..*end));
        }
        let failure = check(&intake).unwrap_err();
        assert_eq!(failure.code(), ErrorCode::VerifyMismatch);
    }
}

#[tokio::test]
async fn a_page_that_the_store_has_lost_ends_the_migration() {
    let intake = intake().await;
    say(&intake, 0, digests(0..10));
    let space = intake.store().space(SPACE).unwrap();
    // Behind the back of the store, which goes on to hold it.
    let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = i64::try_from(PageIndex(BASE + 5).address()).unwrap();
    nix::fcntl::fallocate(space.descriptor(), mode, offset, 4096).unwrap();
    let failure = check(&intake).unwrap_err();
    assert_eq!(failure.code(), ErrorCode::VerifyMismatch);
}
