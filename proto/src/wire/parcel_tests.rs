//! Headers read back, and every illegal one is refused by its clause.

use proptest::prelude::*;

use super::*;

fn run(start: u64, count: u64, kind: RunKind) -> ParcelRun {
    ParcelRun {
        pages: PageRun::new(PageIndex(start), PageCount(count)).unwrap(),
        kind,
    }
}

fn header(runs: Vec<ParcelRun>, body_bytes: u32) -> Result<ParcelHeader, ParcelError> {
    ParcelHeader::new(SpaceId(7), Round::FIRST, runs, body_bytes)
}

fn runs() -> impl Strategy<Value = Vec<ParcelRun>> {
    prop::collection::vec((0_u64..1000, 1_u64..60, any::<bool>()), 1..17).prop_map(|pieces| {
        let mut end = 0;
        let mut runs = Vec::new();
        for (gap, count, zero) in pieces {
            let kind = if zero { RunKind::Zero } else { RunKind::Data };
            runs.push(run(end + gap, count, kind));
            end += gap + count;
        }
        runs
    })
}

proptest! {
    #[test]
    fn a_header_reads_back(runs in runs(), tail in prop::collection::vec(any::<u8>(), 0..9)) {
        let data = |run: &&ParcelRun| run.kind == RunKind::Data;
        let pages: u64 = runs.iter().filter(data).map(|run| run.pages.count().0).sum();
        let built = header(runs, u32::try_from(pages).unwrap() * 100).unwrap();
        let bytes = [built.encode(), tail.clone()].concat();
        let fixed = bytes.first_chunk().unwrap();
        prop_assert_eq!(ParcelHeader::encoded_bytes(fixed), Ok(built.encode().len()));
        prop_assert_eq!(ParcelHeader::decode(&bytes), Ok((built, &tail[..])));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        if let Ok((header, rest)) = ParcelHeader::decode(&bytes) {
            prop_assert_eq!([header.encode(), rest.to_vec()].concat(), bytes.clone());
        }
        if let Ok((header, rest)) = BlockHeader::decode(&bytes) {
            prop_assert_eq!([&header.encode(), rest].concat(), bytes);
        }
    }
}

// clause: D-3
#[test]
fn runs_are_sorted_disjoint_and_bounded() {
    let zero = |start, count| run(start, count, RunKind::Zero);
    assert_eq!(header(vec![], 0), Err(ParcelError::RunCount(0)));
    assert_eq!(
        header(vec![zero(0, 2), zero(1, 1)], 0),
        Err(ParcelError::Order { index: 1 })
    );
    assert!(header(vec![zero(0, 2), zero(2, 1)], 0).is_ok());
    let many: Vec<ParcelRun> = (0..4097).map(|start| zero(2 * start, 1)).collect();
    assert!(header(many[..4096].to_vec(), 0).is_ok());
    assert_eq!(header(many, 0), Err(ParcelError::RunCount(4097)));
    let long = ParcelError::RunTooLong {
        index: 0,
        count: 1 << 32,
    };
    assert_eq!(header(vec![zero(0, 1 << 32)], 0), Err(long));
}

// clause: D-4
#[test]
fn a_parcel_has_at_most_1024_data_pages_and_a_body_that_fits_them() {
    let data = |count| vec![run(0, count, RunKind::Data)];
    assert!(header(data(1024), BODY_BYTES_MAX).is_ok());
    assert_eq!(header(data(1025), 1), Err(ParcelError::DataPages(1025)));
    let wrong = |bytes, data_pages| Err(ParcelError::BodyLength { bytes, data_pages });
    assert_eq!(header(data(1), 4106), wrong(4106, 1));
    assert_eq!(header(data(1), 0), wrong(0, 1));
    assert_eq!(header(vec![run(0, 1, RunKind::Zero)], 1), wrong(1, 0));
}

#[test]
fn a_claim_that_differs_from_the_runs_is_refused() {
    let mut bytes = header(vec![run(0, 2, RunKind::Data)], 100)
        .unwrap()
        .encode();
    bytes[8] = 3;
    let differ = ParcelError::DataPagesDiffer {
        claimed: 3,
        found: 2,
    };
    assert_eq!(ParcelHeader::decode(&bytes), Err(differ));
}

#[test]
fn kinds_and_codecs_are_known_and_never_zero() {
    let bytes = header(vec![run(0, 2, RunKind::Data)], 100)
        .unwrap()
        .encode();
    for kind in [0, 3] {
        let mut changed = bytes.clone();
        *changed.last_mut().unwrap() = kind;
        let unknown = ParcelError::RunKind { index: 0, kind };
        assert_eq!(ParcelHeader::decode(&changed), Err(unknown));
        assert_eq!(
            BlockHeader::decode(&[kind; 9]),
            Err(ParcelError::Codec(kind))
        );
    }
}

// clause: D-5
#[test]
fn a_block_has_whole_pages_and_never_grows() {
    assert!(BlockHeader::new(Codec::Raw, 65536, 65536).is_ok());
    assert!(BlockHeader::new(Codec::Lz4, 65536, 65535).is_ok());
    for raw_bytes in [0, 4095, 65536 + 4096] {
        let refused = Err(ParcelError::BlockRawLength(raw_bytes));
        assert_eq!(BlockHeader::new(Codec::Raw, raw_bytes, raw_bytes), refused);
    }
    for (codec, bytes) in [(Codec::Raw, 4095), (Codec::Lz4, 4096), (Codec::Lz4, 0)] {
        let refused = Err(ParcelError::BlockLength {
            codec,
            raw_bytes: 4096,
            bytes,
        });
        assert_eq!(BlockHeader::new(codec, 4096, bytes), refused);
    }
}
