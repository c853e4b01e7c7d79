//! Encoding and decoding together.

use std::cell::RefCell;
use std::collections::BTreeMap;

use pageferry_proto::page::PageRun;
use proptest::prelude::*;

use super::*;
use crate::encode::{Encoded, Encoder};

/// A sink that is a map; zero pages are in it, with their bytes.
#[derive(Default)]
struct Memory(RefCell<BTreeMap<u64, Vec<u8>>>);

impl PageSink for Memory {
    fn write(&self, start: PageIndex, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        for (page, bytes) in (start.0..).zip(bytes.chunks(PAGE_SIZE)) {
            assert!(
                self.0.borrow_mut().insert(page, bytes.to_vec()).is_none(),
                "written twice"
            );
        }
        Ok(())
    }

    fn clear(&self, run: PageRun) -> io::Result<()> {
        for page in run.start().0..run.end().0 {
            let zero = vec![0; PAGE_SIZE];
            assert!(
                self.0.borrow_mut().insert(page, zero).is_none(),
                "written twice"
            );
        }
        Ok(())
    }
}

/// A sink that keeps no bytes: a header that lies may have terabytes of zero pages.
#[derive(Default)]
struct Touched(RefCell<Vec<PageRun>>);

impl PageSink for Touched {
    fn write(&self, start: PageIndex, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let pages = parts.iter().map(|part| part.len()).sum::<usize>() / PAGE_SIZE;
        let run = PageRun::new(start, PageCount(pages as u64)).map_err(io::Error::other)?;
        self.clear(run)
    }

    fn clear(&self, run: PageRun) -> io::Result<()> {
        self.0.borrow_mut().push(run);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Contents {
    Zero,
    Text,
    Random(u64),
    /// Zero but for one byte.
    Almost(u16),
}

fn page(contents: Contents) -> Vec<u8> {
    match contents {
        Contents::Zero => vec![0; PAGE_SIZE],
        Contents::Text => b"the quick brown fox jumps over the lazy dog; "
            .iter()
            .copied()
            .cycle()
            .take(PAGE_SIZE)
            .collect(),
        Contents::Random(seed) => {
            let mut state = seed | 1;
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            };
            (0..PAGE_SIZE / 8).flat_map(|_| next()).collect()
        }
        Contents::Almost(place) => {
            let mut page = vec![0; PAGE_SIZE];
            page[usize::from(place) % PAGE_SIZE] = 1;
            page
        }
    }
}

fn contents() -> impl Strategy<Value = Contents> {
    prop_oneof![
        Just(Contents::Zero),
        Just(Contents::Text),
        any::<u64>().prop_map(Contents::Random),
        any::<u16>().prop_map(Contents::Almost),
    ]
}

/// Runs of pages with gaps between them, and what each page holds.
fn batch() -> impl Strategy<Value = BTreeMap<u64, Contents>> {
    let run = (0_u64..4, prop::collection::vec(contents(), 1..24));
    prop::collection::vec(run, 1..12).prop_map(|runs| {
        let mut pages = BTreeMap::new();
        let mut at = 0x7f00_0000;
        for (gap, contents) in runs {
            at += gap;
            for content in contents {
                pages.insert(at, content);
                at += 1;
            }
        }
        pages
    })
}

fn one_page_runs(pages: impl Iterator<Item = u64>) -> PageSet {
    pages
        .map(|page| PageRun::new(PageIndex(page), PageCount(1)).unwrap())
        .collect()
}

fn encode(pages: &BTreeMap<u64, Vec<u8>>) -> (Vec<u8>, Encoded) {
    let set = one_page_runs(pages.keys().copied());
    let mut bytes = pages.values().flatten().copied().collect::<Vec<u8>>();
    let mut parcel = Vec::new();
    let encoded = Encoder::new().encode(SpaceId(7), Round::FIRST, &set, &mut bytes, &mut parcel);
    (parcel, encoded)
}

fn decode(bytes: &[u8]) -> Result<BTreeMap<u64, Vec<u8>>, DecodeError> {
    let memory = Memory::default();
    let parcel = Parcel::parse(bytes)?;
    assert_eq!((parcel.space(), parcel.round()), (SpaceId(7), Round::FIRST));
    Decoder::new().decode(&parcel, &memory)?;
    Ok(memory.0.into_inner())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_was_encoded_is_decoded(batch in batch()) {
        let pages: BTreeMap<u64, Vec<u8>> =
            batch.iter().map(|(at, contents)| (*at, page(*contents))).collect();
        let (parcel, encoded) = encode(&pages);
        let zero = batch.values().filter(|contents| matches!(contents, Contents::Zero)).count();
        prop_assert_eq!(encoded.zero_pages.0, zero as u64);
        prop_assert_eq!(encoded.data_pages.0, (batch.len() - zero) as u64);
        prop_assert_eq!(decode(&parcel).unwrap(), pages);
    }

    #[test]
    fn a_changed_byte_is_never_decoded(batch in batch(), place: prop::sample::Index, bit in 0..8) {
        let pages = batch.iter().map(|(at, contents)| (*at, page(*contents))).collect();
        let (mut parcel, _) = encode(&pages);
        let place = place.index(parcel.len());
        parcel[place] ^= 1_u8 << bit;
        prop_assert!(decode(&parcel).is_err());
    }

    #[test]
    fn a_body_that_lies_under_a_right_checksum_is_an_error_or_pages(
        batch in batch(),
        place: prop::sample::Index,
        value: u8,
    ) {
        let pages: BTreeMap<u64, Vec<u8>> =
            batch.iter().map(|(at, contents)| (*at, page(*contents))).collect();
        let (mut parcel, _) = encode(&pages);
        parcel.truncate(parcel.len() - 4);
        let place = place.index(parcel.len());
        parcel[place] = value;
        stream::seal(&mut parcel);
        let Ok(parcel) = Parcel::parse(&parcel) else {
            return Ok(());
        };
        // Whatever it is, it does not panic, and writes no page that the header does not have.
        let touched = Touched::default();
        let _ = Decoder::new().decode(&parcel, &touched);
        let all = parcel.data().union(&parcel.zero());
        for run in touched.0.into_inner() {
            prop_assert!(all.covers(&run));
        }
    }
}

#[test]
fn compressible_pages_shrink_and_random_ones_hardly_grow() {
    let pages = |contents: fn(u64) -> Contents| {
        (0..1024)
            .map(|at| (at, page(contents(at))))
            .collect::<BTreeMap<_, _>>()
    };
    let (text, _) = encode(&pages(|_| Contents::Text));
    assert!(text.len() < 1024 * PAGE_SIZE / 20, "{}", text.len());
    let (random, _) = encode(&pages(|at| {
        Contents::Random(at.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }));
    assert!(random.len() < 1024 * PAGE_SIZE + 4096, "{}", random.len());
    let (zero, encoded) = encode(&pages(|_| Contents::Zero));
    assert!(
        zero.len() < 64 && encoded.data_pages == PageCount(0),
        "{}",
        zero.len()
    );
}

#[test]
fn pages_that_are_noise_only_in_part_shrink_wherever_it_is() {
    for noise in [0..2048, 2048..4096, 1024..3072] {
        for count in [1, 2, 3, 16, 100] {
            let half = |at: u64| {
                let mut page = page(Contents::Random(at + 1));
                page[..noise.start].fill(0);
                page[noise.end..].fill(0);
                page
            };
            let pages = (0..count).map(|at| (at, half(at))).collect();
            let (parcel, _) = encode(&pages);
            let raw_bytes = pages.len() * PAGE_SIZE;
            assert!(
                parcel.len() < raw_bytes * 5 / 8,
                "{noise:?} {count} {}",
                parcel.len()
            );
            assert_eq!(decode(&parcel).unwrap(), pages);
        }
    }
}

#[test]
fn a_parcel_cut_short_is_damaged() {
    let pages = (0..4)
        .map(|at| (at, page(Contents::Random(at + 1))))
        .collect();
    let (parcel, _) = encode(&pages);
    for length in (0..parcel.len()).step_by(97) {
        assert!(matches!(
            decode(&parcel[..length]),
            Err(DecodeError::Stream(_))
        ));
    }
}
