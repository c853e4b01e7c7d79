use std::time::{Duration, Instant};

use pageferry_pages::digest::of_page;
use pageferry_pages::encode::Encoder;
use pageferry_pages::store::StoreLimits;
use pageferry_proto::page::{PAGE_SIZE, PageIndex, PageRun};
use pageferry_proto::wire::stream::{ImageFileHeader, ImageName, seal};

use super::*;
use crate::net::tests::{Cluster, within};

const SPACE: SpaceId = SpaceId(1);
const BASE: u64 = 0x7_ffff_0000;
const FIRST: Generation = Generation::FIRST;

fn pages(start: u64, count: u64) -> PageSet {
    PageSet::from(PageRun::new(PageIndex(BASE + start), PageCount(count)).unwrap())
}

fn store() -> Arc<Store> {
    let store = Store::new(StoreLimits {
        data_pages_max: PageCount(1000),
        spaces_max: 4,
    });
    store.keep_digests();
    Arc::new(store)
}

/// A parcel of these pages; each has what [`page`] says of its number and `salt`.
fn parcel(round: u32, start: u64, count: u64, salt: u64) -> Bytes {
    let mut bytes: Vec<u8> = (start..start + count)
        .flat_map(|number| page(number + salt))
        .collect();
    let mut parcel = Vec::new();
    let (round, pages) = (Round::new(round).unwrap(), pages(start, count));
    Encoder::new().encode(SPACE, round, &pages, &mut bytes, &mut parcel);
    parcel.into()
}

/// The pages 2 and 3 are zero.
fn page(number: u64) -> [u8; PAGE_SIZE] {
    let byte = u8::try_from(number).unwrap();
    [if matches!(number, 2 | 3) { 0 } else { byte + 1 }; PAGE_SIZE]
}

/// A live set, or with something after it, digests.
fn set_stream(generation: Generation, pages: &PageSet, rest: &[u8]) -> Vec<u8> {
    let set = pages.to_wire();
    let header = SetHeader {
        generation,
        space: SPACE,
        length: u32::try_from(set.len()).unwrap(),
    };
    let mut body = [&header.encode()[..], &set, rest].concat();
    seal(&mut body);
    body
}

/// An intake that verifies, has pages 0 to 9, and they are live.
async fn intake() -> Intake {
    let intake = Intake::detached(store(), no_folders());
    take(&intake, parcel(1, 0, 10, 0)).await.unwrap();
    live(&intake, FIRST, 0, 10).unwrap();
    intake
}

async fn take(intake: &Intake, parcel: Bytes) -> Result<(), Failure> {
    intake.shared.take_parcel(parcel).await
}

fn live(intake: &Intake, generation: Generation, start: u64, count: u64) -> Result<(), Failure> {
    let stream = set_stream(generation, &pages(start, count), &[]);
    intake.shared.take_live(&stream)
}

/// What the source says of some pages.
fn say(intake: &Intake, start: u64, digests: impl IntoIterator<Item = u64>) {
    let digests: Vec<u64> = digests.into_iter().collect();
    let pages = pages(start, digests.len() as u64);
    let bytes: Vec<u8> = digests.iter().flat_map(|one| one.to_le_bytes()).collect();
    let stream = set_stream(FIRST, &pages, &bytes);
    intake.shared.take_digests(&stream).unwrap();
}

fn digests(pages: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
    pages.map(|number| of_page(&page(number)))
}

/// The final message of a migration of one parcel with ten pages.
fn last(digests: u32) -> Final {
    Final {
        generation: FIRST,
        round: Round::FIRST,
        parcels: 1,
        pages: PageCount(10),
        live_sets: 1,
        images: 0,
        digests,
        verify: 0 < digests,
        locks: 0,
        files: 0,
        absent_sets: 0,
        absent_pages: PageCount::ZERO,
    }
}

fn no_folders() -> Folders {
    Folders::new(
        crate::migration::target::folders::Shelf::new(PathBuf::new()),
        pageferry_proto::id::MigrationId::new([1; 16]),
    )
}

fn end(round: u32, parcels: u32, pages: u64) -> RoundEnd {
    RoundEnd {
        round: Round::new(round).unwrap(),
        parcels,
        pages: PageCount(pages),
        files: 0,
    }
}

async fn check(intake: &Intake, digests: u32) -> Result<(), Failure> {
    within(intake.complete(last(digests))).await
}

#[tokio::test]
async fn pages_that_are_equal_are_let_through() {
    let intake = intake().await;
    say(&intake, 4, digests(4..10));
    say(&intake, 0, digests(0..4));
    check(&intake, 2).await.unwrap();
}

#[tokio::test]
async fn a_page_that_differs_ends_the_migration_and_is_named() {
    for differs in 0..10 {
        let intake = intake().await;
        let other = |number| of_page(&page(number)) ^ u64::from(number == differs);
        say(&intake, 0, (0..10).map(other));
        let failure = check(&intake, 1).await.unwrap_err();
        assert_eq!(failure.code(), ErrorCode::VerifyMismatch);
        let address = PageIndex(BASE + differs).address();
        let text = format!("space 1: the page at {address:#x} differs");
        assert_eq!(failure.text(), text);
    }
}

#[tokio::test]
async fn every_live_page_needs_one_digest() {
    for ranges in [&[(0, 9)][..], &[(0, 5), (4, 10)], &[(0, 5), (0, 5)]] {
        let intake = intake().await;
        for (start, end) in ranges {
            say(&intake, *start, digests(*start..*end));
        }
        let count = u32::try_from(ranges.len()).unwrap();
        let failure = check(&intake, count).await.unwrap_err();
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
    let failure = check(&intake, 1).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::VerifyMismatch);
}

#[tokio::test]
async fn a_parcel_of_another_round_is_refused_before_a_page_of_it_is_stored() {
    let intake = Intake::detached(store(), no_folders());
    take(&intake, parcel(1, 0, 10, 0)).await.unwrap();
    let refuse = async |round, text: &str| {
        let failure = take(&intake, parcel(round, 0, 10, 20)).await.unwrap_err();
        assert_eq!(failure.code(), ErrorCode::Unexpected);
        assert!(failure.text().ends_with(text), "{failure}");
        let space = intake.store().space(SPACE).unwrap();
        let theirs: Vec<u64> = digests(0..10).collect();
        assert_eq!(space.first_difference(&pages(0, 10), &theirs), None);
    };
    refuse(2, "round 2 is not the open round 1").await;
    within(intake.round(end(1, 1, 10))).await.unwrap();
    refuse(1, "round 1 is not the open round 2").await;
    live(&intake, FIRST, 0, 10).unwrap();
    let last = Final {
        round: Round::new(2).unwrap(),
        parcels: 0,
        pages: PageCount::ZERO,
        ..last(0)
    };
    within(intake.complete(last)).await.unwrap();
    refuse(3, "round 3 comes after the final round 2").await;
}

#[tokio::test]
async fn more_of_a_round_than_its_end_says_ends_the_migration() {
    let intake = Intake::detached(store(), no_folders());
    take(&intake, parcel(1, 0, 4, 0)).await.unwrap();
    take(&intake, parcel(1, 4, 4, 0)).await.unwrap();
    let failure = within(intake.round(end(1, 1, 8))).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::Unexpected);
    assert_eq!(failure.text(), "2 parcels have arrived, the source sent 1");
    let intake = Intake::detached(store(), no_folders());
    take(&intake, parcel(1, 0, 4, 0)).await.unwrap();
    let failure = within(intake.round(end(1, 1, 5))).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::LedgerIncomplete);
    assert_eq!(failure.text(), "round 1 has 4 pages, the source sent 5");
}

#[tokio::test]
async fn a_second_live_set_of_a_space_ends_the_migration() {
    let intake = intake().await;
    let failure = live(&intake, FIRST, 0, 10).unwrap_err();
    assert_eq!(failure.code(), ErrorCode::Unexpected);
    assert_eq!(failure.text(), "space 1 has two live sets");
}

#[tokio::test]
async fn a_live_page_that_never_came_ends_the_migration_with_what_came_by_which_path() {
    let intake = Intake::detached(store(), no_folders());
    take(&intake, parcel(1, 0, 10, 0)).await.unwrap();
    live(&intake, FIRST, 1, 10).unwrap();
    let failure = check(&intake, 0).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::LedgerIncomplete);
    let address = PageIndex(BASE + 10).address();
    let text = format!(
        "space 1 lacks 1 of 10 live pages, the first at {address:#x}: 7 came as data, 2 as zero"
    );
    assert_eq!(failure.text(), text);
}

#[tokio::test]
async fn only_the_last_version_of_a_page_counts_and_what_was_given_back_is_dropped() {
    let intake = Intake::detached(store(), no_folders());
    take(&intake, parcel(1, 0, 10, 0)).await.unwrap();
    within(intake.round(end(1, 1, 10))).await.unwrap();
    // What was zero has contents now, and the other way round.
    take(&intake, parcel(2, 0, 4, 2)).await.unwrap();
    live(&intake, FIRST, 0, 8).unwrap();
    let last = Final {
        round: Round::new(2).unwrap(),
        pages: PageCount(4),
        ..last(0)
    };
    within(intake.complete(last)).await.unwrap();
    let books = intake.shared.lock();
    let accounts = books.ledger.settle(&intake.store().held()).unwrap();
    let account = &accounts[0];
    assert_eq!(account.live, PageCount(8));
    assert_eq!((account.data, account.zero), (PageCount(6), PageCount(2)));
    assert_eq!(account.received, PageCount(14));
    assert_eq!(account.surplus, PageSet::new());
}

fn image(generation: Generation, name: &str, content: &[u8]) -> Vec<u8> {
    let name = ImageName::new(name).unwrap();
    let header = ImageFileHeader::new(generation, name, content.len() as u64).unwrap();
    let mut body = [&header.encode()[..], content].concat();
    seal(&mut body);
    body
}

fn names(folder: &Path) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(name).collect();
    names.sort();
    names
}

#[tokio::test]
async fn images_of_a_given_up_attempt_are_dropped_though_they_come_late() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(2).await;
    let folder = tempfile::tempdir().unwrap();
    let intake = Intake::new(store(), folder.path().join("images"), no_folders(), 1).unwrap();
    let second = FIRST.next();
    let streams = [
        [
            image(FIRST, "core-1.img", b"old"),
            image(FIRST, "core-9.img", b"old"),
        ]
        .concat(),
        image(second, "core-1.img", b"new"),
        image(FIRST, "core-1.img", b"later than the new one"),
        image(second, "core-2.img", b"new"),
    ];
    for stream in streams {
        let sent = source
            .data
            .send_stream(StreamKind::ImageFile, stream.into());
        sent.await.unwrap();
        let stream = within(target.data.next()).await.unwrap();
        within(intake.shared.take(stream)).await.unwrap();
    }
    assert_eq!(
        names(&intake.images(MemberIndex::FIRST)),
        ["core-1.img", "core-2.img"]
    );
    let content = fs::read(intake.images(MemberIndex::FIRST).join("core-1.img")).unwrap();
    assert_eq!(content, b"new");
    assert_eq!(names(&folder.path().join("images")), ["2"]);
    // They do not count either.
    take(&intake, parcel(1, 0, 10, 0)).await.unwrap();
    live(&intake, second, 0, 10).unwrap();
    live(&intake, FIRST, 0, 9).unwrap();
    let last = Final {
        generation: second,
        images: 2,
        ..last(0)
    };
    within(intake.complete(last)).await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_being_written_is_dropped_when_its_attempt_is_given_up() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let folder = tempfile::tempdir().unwrap();
    let intake = Intake::new(store(), folder.path().join("images"), no_folders(), 1).unwrap();
    let old = intake.images(MemberIndex::FIRST);
    let mut body = Bytes::from(image(FIRST, "pages-1.img", &[7; 300_000]));
    let mut writer = source.data.open(StreamKind::ImageFile).await.unwrap();
    writer.write(body.split_to(100_000)).await.unwrap();
    let stream = within(target.data.next()).await.unwrap();
    let shared = Arc::clone(&intake.shared);
    let taking = tokio::spawn(async move { shared.take(stream).await });
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::metadata(old.join("pages-1.img")).map_or(0, |file| file.len()) == 0 {
        assert!(Instant::now() < deadline, "the image is not begun");
        tokio::task::yield_now().await;
    }
    assert_eq!(intake.store().data_pages(), PageCount::covering(300_000));
    live(&intake, FIRST.next(), 0, 10).unwrap();
    assert!(!old.exists());
    assert_eq!(intake.store().data_pages(), PageCount::ZERO);
    writer.write(body).await.unwrap();
    writer.finish();
    within(taking).await.unwrap().unwrap();
    assert!(!old.exists());
}

#[tokio::test]
async fn an_image_that_comes_twice_ends_the_migration() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let folder = tempfile::tempdir().unwrap();
    let intake = Intake::new(store(), folder.path().join("images"), no_folders(), 1).unwrap();
    let twice = [
        image(FIRST, "mm-1.img", b"a"),
        image(FIRST, "mm-1.img", b"b"),
    ]
    .concat();
    let sent = source.data.send_stream(StreamKind::ImageFile, twice.into());
    sent.await.unwrap();
    let stream = within(target.data.next()).await.unwrap();
    let failure = within(intake.shared.take(stream)).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::Unexpected);
    assert_eq!(failure.text(), "image mm-1.img came twice");
}
