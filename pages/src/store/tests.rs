use std::collections::BTreeMap;

use pageferry_proto::id::Round;
use pageferry_proto::page::{PAGE_SIZE, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::parcel::{BlockHeader, ParcelHeader, ParcelRun};
use proptest::prelude::*;

use super::*;
use crate::digest;
use crate::encode::Encoder;

const LIMITS: StoreLimits = StoreLimits {
    data_pages_max: PageCount(1 << 20),
    spaces_max: 4,
};

/// High up, where mmap puts things.
const BASE: u64 = 0x7_ffff_0000;

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let run = |page| PageRun::new(PageIndex(BASE + page), PageCount(1)).unwrap();
    pages.into_iter().map(run).collect()
}

/// A parcel of pages that are full of one byte each.
fn parcel(space: u32, pages: &BTreeMap<u64, u8>) -> Vec<u8> {
    let mut bytes: Vec<u8> = pages
        .values()
        .flat_map(|byte| vec![*byte; PAGE_SIZE])
        .collect();
    let mut parcel = Vec::new();
    let wanted = set(pages.keys().copied());
    Encoder::new().encode(
        SpaceId(space),
        Round::FIRST,
        &wanted,
        &mut bytes,
        &mut parcel,
    );
    parcel
}

fn take(store: &Store, space: u32, pages: &BTreeMap<u64, u8>) -> Result<(), StoreError> {
    let parcel = parcel(space, pages);
    store.take(&mut Decoder::new(), &Parcel::parse(&parcel).unwrap())
}

fn read(space: &SpaceStore, page: u64) -> u8 {
    let mut bytes = [0xee; PAGE_SIZE];
    let offset = i64::try_from((BASE + page) << 12).unwrap();
    nix::sys::uio::pread(space.descriptor(), &mut bytes, offset).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

#[derive(Clone, Debug)]
enum Step {
    Take(BTreeMap<u64, u8>),
    Punch(Vec<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop::collection::vec(0_u64..40, 0..12);
    prop_oneof![
        prop::collection::btree_map(0_u64..40, 0_u8..4, 1..16).prop_map(Step::Take),
        pages().prop_map(Step::Punch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_store_is_a_map(steps in prop::collection::vec(step(), 1..12)) {
        let (store, space) = with_digests();
        let mut model: BTreeMap<u64, u8> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Take(pages) => {
                    take(&store, 1, &pages).unwrap();
                    model.extend(pages);
                }
                Step::Punch(pages) => {
                    space.punch(&set(pages.iter().copied())).unwrap();
                    model.retain(|page, _| !pages.contains(page));
                }
            }
            let held = space.held();
            let with = |zero: bool| model.iter().filter(move |(_, byte)| (**byte == 0) == zero);
            prop_assert_eq!(&held.data, &set(with(false).map(|(page, _)| *page)));
            prop_assert_eq!(&held.zero, &set(with(true).map(|(page, _)| *page)));
            prop_assert_eq!(store.data_pages(), held.data.len());
            prop_assert_eq!(space.resident_bytes().unwrap(), held.data.len().bytes());
            prop_assert_eq!(first_difference(&space, &model), None);
            for page in 0..40 {
                if !model.contains_key(&page) {
                    prop_assert_eq!(first_difference(&space, &[(page, 0)].into()), Some(page));
                }
                prop_assert_eq!(read(&space, page), model.get(&page).copied().unwrap_or(0));
            }
        }
    }
}

/// A parcel of one run of 20 pages, whose second block is none.
fn broken_parcel(pages: &BTreeMap<u64, u8>) -> Vec<u8> {
    let mut broken = parcel(1, pages);
    broken.truncate(broken.len() - 4);
    // One run, so the blocks begin after one; the second of the two gets an unknown codec.
    let blocks = ParcelHeader::FIXED_BYTES + ParcelRun::BYTES;
    let first = BlockHeader::decode(&broken[blocks..]).unwrap().0;
    broken[blocks + BlockHeader::BYTES + first.bytes() as usize] = 9;
    pageferry_proto::wire::stream::seal(&mut broken);
    broken
}

fn take_broken(store: &Store, broken: &[u8]) {
    let taken = store.take(&mut Decoder::new(), &Parcel::parse(broken).unwrap());
    assert!(matches!(taken, Err(StoreError::Decode { .. })), "{taken:?}");
}

#[test]
fn a_parcel_that_breaks_half_way_holds_nothing() {
    let store = Store::new(LIMITS);
    let pages: BTreeMap<u64, u8> = (0..20).map(|page| (page, 3)).collect();
    take(&store, 1, &pages).unwrap();
    take_broken(&store, &broken_parcel(&pages));
    let space = store.space(SpaceId(1)).unwrap();
    assert_eq!(space.held(), HeldPages::default());
    assert_eq!(store.data_pages(), PageCount::ZERO);
}

#[test]
fn a_store_takes_no_more_than_was_promised() {
    let limits = StoreLimits {
        data_pages_max: PageCount(10),
        spaces_max: 2,
    };
    let store = Store::new(limits);
    take(&store, 1, &(0..10).map(|page| (page, 1)).collect()).unwrap();
    take(&store, 2, &(0..10).map(|page| (page, 0)).collect()).unwrap();
    let taken = take(&store, 1, &[(10, 1)].into());
    assert!(matches!(taken, Err(StoreError::Full { .. })));
    assert!(matches!(
        take(&store, 3, &[(0, 0)].into()),
        Err(StoreError::TooManySpaces { .. })
    ));
}

#[test]
fn a_store_asks_for_more_when_it_must_hold_more() {
    let store = Store::new(LIMITS);
    let more = |held: PageCount| {
        if held <= PageCount(20) {
            Ok(PageCount(20))
        } else {
            Err(Failure::new(ErrorCode::MemoryShort, "no more"))
        }
    };
    store.admit(PageCount(10), Growth::new(more));
    take(&store, 1, &(0..15).map(|page| (page, 1)).collect()).unwrap();
    // Five pages of images.
    store.take_besides(4 * PAGE_SIZE as u64 + 1).unwrap();
    let error = take(&store, 1, &[(15, 1)].into()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::MemoryShort);
    assert!(error.to_string().ends_with(": no more"), "{error}");
    let error = store.take_besides(1).unwrap_err();
    assert_eq!(error.code(), ErrorCode::MemoryShort);
}

#[test]
fn a_page_beyond_user_memory_is_refused() {
    let mut bytes = vec![1; PAGE_SIZE];
    let mut parcel = Vec::new();
    let pages = PageSet::from(PageRun::new(PageIndex(ADDRESS_MAX >> 12), PageCount(1)).unwrap());
    Encoder::new().encode(SpaceId(1), Round::FIRST, &pages, &mut bytes, &mut parcel);
    let store = Store::new(LIMITS);
    let taken = store.take(&mut Decoder::new(), &Parcel::parse(&parcel).unwrap());
    assert!(matches!(taken, Err(StoreError::Address { .. })));
}

#[test]
fn whoever_is_sent_the_file_of_a_space_reads_and_punches_what_was_stored() {
    let store = Store::new(LIMITS);
    take(&store, 1, &[(0, 1), (1, 0), (5, 2)].into()).unwrap();
    let space = store.space(SpaceId(1)).unwrap();
    let sent = space.descriptor().try_clone_to_owned().unwrap();
    let sent = MemoryFile::new(sent).unwrap();
    let first = |page| {
        let mut bytes = [0xee; PAGE_SIZE];
        sent.read(PageIndex(BASE + page), &mut bytes).unwrap();
        bytes[0]
    };
    assert_eq!((first(0), first(1), first(5)), (1, 0, 2));
    let data = |page| sent.data_from(PageIndex(BASE + page)).unwrap();
    assert_eq!(data(1), Some(PageIndex(BASE + 5)));
    sent.punch(set([5]).runs()[0]).unwrap();
    assert_eq!((read(&space, 0), read(&space, 5)), (1, 0));
    assert_eq!(data(1), None);
}

/// Digests of pages that are full of one byte each.
fn digests(pages: &BTreeMap<u64, u8>) -> Vec<u64> {
    let digest = |byte: &u8| digest::of_page(&[*byte; PAGE_SIZE]);
    pages.values().map(digest).collect()
}

fn first_difference(space: &SpaceStore, pages: &BTreeMap<u64, u8>) -> Option<u64> {
    let found = space.first_difference(&set(pages.keys().copied()), &digests(pages));
    found.map(|page| page.0 - BASE)
}

fn with_digests() -> (Store, Arc<SpaceStore>) {
    let store = Store::new(LIMITS);
    store.keep_digests();
    let space = store.space(SpaceId(1)).unwrap();
    (store, space)
}

#[test]
fn the_first_page_that_differs_is_named() {
    let (store, space) = with_digests();
    let pages: BTreeMap<u64, u8> = [(0, 1), (1, 0), (5, 2), (200, 3), (201, 0)].into();
    take(&store, 1, &pages).unwrap();
    assert_eq!(first_difference(&space, &pages), None);
    for (page, byte) in &pages {
        let mut others = pages.clone();
        others.insert(*page, byte + 1);
        assert_eq!(first_difference(&space, &others), Some(*page));
    }
    let absent = [(0, 1), (2, 0)].into();
    assert_eq!(first_difference(&space, &absent), Some(2));
    let all = set(pages.keys().copied());
    let short = &digests(&pages)[..2];
    let found = space.first_difference(&all, short);
    assert_eq!(found, Some(PageIndex(BASE + 5)));
}

#[test]
fn contents_of_a_page_that_should_be_zero_are_a_difference() {
    let (store, space) = with_digests();
    let offset = i64::try_from((BASE + 70) << 12).unwrap();
    nix::sys::uio::pwrite(space.descriptor(), &[7], offset).unwrap();
    let pages: BTreeMap<u64, u8> = (0..200).map(|page| (page, 0)).collect();
    take(&store, 1, &pages).unwrap();
    assert_eq!(first_difference(&space, &pages), Some(70));
    // Cleared memory that the kernel has kept is none.
    nix::sys::uio::pwrite(space.descriptor(), &[0], offset).unwrap();
    take(&store, 1, &pages).unwrap();
    assert_eq!(first_difference(&space, &pages), None);
}

#[test]
fn pages_of_a_parcel_that_breaks_have_no_digests() {
    let (store, space) = with_digests();
    let pages: BTreeMap<u64, u8> = (0..20).map(|page| (page, 3)).collect();
    take(&store, 1, &pages).unwrap();
    let broken = broken_parcel(&pages);
    take_broken(&store, &broken);
    assert_eq!(first_difference(&space, &pages), Some(0));
}

#[test]
fn without_digests_everything_differs() {
    let store = Store::new(LIMITS);
    let pages = [(3, 1)].into();
    take(&store, 1, &pages).unwrap();
    let space = store.space(SpaceId(1)).unwrap();
    assert_eq!(first_difference(&space, &pages), Some(3));
    assert_eq!(space.first_difference(&PageSet::new(), &[]), None);
}
