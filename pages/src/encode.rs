//! Pages to parcel: zero pages become runs without bytes, the rest blocks, compressed where it
//! pays.
//!
//! Pure: bytes in, bytes out. The form is that of `pageferry_proto::wire::parcel`.

use std::time::{Duration, Instant};

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::page::{PAGE_SIZE, PageCount, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::parcel::{
    BLOCK_RAW_BYTES_MAX, BlockHeader, Codec, DATA_PAGES_MAX, ParcelHeader, ParcelRun, RunKind,
};
use pageferry_proto::wire::stream;

/// Most pages of one parcel. All of them may be data.
pub const PAGES_MAX: PageCount = PageCount(DATA_PAGES_MAX as u64);

/// What holds a round up, and so what compressing must save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bottleneck {
    /// The link: every byte that is not sent is time saved.
    Link,
    /// The processors: a byte saved is worth what sending it costs them.
    Processor,
}

/// Makes parcels; keeps its working memory (150 KiB) between them.
pub struct Encoder {
    table: CompressTable,
    compressed: Vec<u8>,
    sample: Vec<u8>,
    /// What to assume of the next parcel.
    pub bottleneck: Bottleneck,
}

/// What became of the pages of a parcel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Pages with bytes.
    pub data_pages: PageCount,
    /// Pages that are all zero.
    pub zero_pages: PageCount,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Encoder {
    /// An encoder with its working memory.
    pub fn new() -> Self {
        Self {
            table: CompressTable::large(),
            compressed: vec![0; get_maximum_output_size(BLOCK_BYTES)],
            sample: vec![0; SAMPLE_BYTES],
            bottleneck: Bottleneck::Link,
        }
    }

    /// Makes a parcel of `pages`, whose bytes are in `bytes` one after another, into `parcel`,
    /// which is cleared before. Everything of the stream after its prefix. `bytes` is used as
    /// scratch.
    ///
    /// # Panics
    /// When there is no page or more than [`PAGES_MAX`], or `bytes` is not as long as they are.
    pub fn encode(
        &mut self,
        space: SpaceId,
        round: Round,
        pages: &PageSet,
        bytes: &mut [u8],
        parcel: &mut Vec<u8>,
    ) -> Encoded {
        let count = pages.len();
        assert!(
            PageCount::ZERO < count && count <= PAGES_MAX,
            "a batch has 1 to 1024 pages"
        );
        assert_eq!(
            count.bytes(),
            bytes.len() as u64,
            "bytes of all pages, and no others"
        );
        let (runs, data_bytes) = split(pages, bytes);
        parcel.clear();
        let body_start = ParcelHeader::FIXED_BYTES + runs.len() * ParcelRun::BYTES;
        parcel.resize(body_start, 0);
        for block in bytes[..data_bytes].chunks(BLOCK_BYTES) {
            self.append_block(block, parcel);
        }
        let body_bytes = u32::try_from(parcel.len() - body_start).expect("below BODY_BYTES_MAX");
        let header = ParcelHeader::new(space, round, runs, body_bytes)
            .expect("runs come from a set of at most PAGES_MAX pages");
        let data_pages = PageCount(header.data_pages().into());
        parcel[..body_start].copy_from_slice(&header.encode());
        stream::seal(parcel);
        Encoded {
            data_pages,
            zero_pages: PageCount(count.0 - data_pages.0),
        }
    }

    fn append_block(&mut self, block: &[u8], parcel: &mut Vec<u8>) {
        let raw_bytes = u32::try_from(block.len()).expect("at most BLOCK_RAW_BYTES_MAX");
        let stored = if self.pays(block) {
            self.compress(block)
        } else {
            None
        };
        let (codec, stored) = match stored {
            Some(length) => (Codec::Lz4, &self.compressed[..length]),
            None => (Codec::Raw, block),
        };
        let length = u32::try_from(stored.len()).expect("at most BLOCK_RAW_BYTES_MAX");
        let header = BlockHeader::new(codec, raw_bytes, length)
            .expect("whole pages, and compressed only when that is shorter");
        parcel.extend_from_slice(&header.encode());
        parcel.extend_from_slice(stored);
    }

    /// Whether compressing the block is worth its time: a sample of it shrinks by an eighth, and,
    /// where time is that of processors, took less of it than sending what it saves.
    fn pays(&mut self, block: &[u8]) -> bool {
        let stride = block.len() / SAMPLE_PARTS;
        for (part, sample) in self.sample.chunks_mut(SAMPLE_PART_BYTES).enumerate() {
            // Another quarter of a page each time: what begins like noise may end in zeros.
            let start = part * stride / PAGE_SIZE * PAGE_SIZE + part * SAMPLE_PART_BYTES;
            sample.copy_from_slice(&block[start..start + SAMPLE_PART_BYTES]);
        }
        let sample = &self.sample;
        let began = Instant::now();
        let compressed = compress_into_with_table(sample, &mut self.compressed, &mut self.table);
        let took = began.elapsed();
        let saved = SAMPLE_BYTES.saturating_sub(compressed.unwrap_or(SAMPLE_BYTES));
        let worth = match self.bottleneck {
            Bottleneck::Link => Duration::MAX,
            Bottleneck::Processor => Duration::from_nanos(saved as u64 * WIRE_NS_PER_BYTE),
        };
        SAMPLE_BYTES / 8 < saved && took < worth
    }

    /// The block's length in `self.compressed`; `None` when it is not shorter there.
    fn compress(&mut self, block: &[u8]) -> Option<usize> {
        compress_into_with_table(block, &mut self.compressed, &mut self.table)
            .ok()
            .filter(|&length| length < block.len())
    }
}

/// Splits the pages into runs of zero pages and runs of data, and moves the bytes of the data pages
/// together. Returns the runs and the length of the data.
fn split(pages: &PageSet, bytes: &mut [u8]) -> (Vec<ParcelRun>, usize) {
    let mut runs: Vec<ParcelRun> = Vec::new();
    let (mut at, mut data_end) = (0, 0);
    for run in pages.runs() {
        for page in run.start().0..run.end().0 {
            let place = at..at + PAGE_SIZE;
            at += PAGE_SIZE;
            let kind = if is_zero(&bytes[place.clone()]) {
                RunKind::Zero
            } else {
                RunKind::Data
            };
            if kind == RunKind::Data {
                if data_end != place.start {
                    bytes.copy_within(place, data_end);
                }
                data_end += PAGE_SIZE;
            }
            append(&mut runs, page, kind);
        }
    }
    (runs, data_end)
}

fn append(runs: &mut Vec<ParcelRun>, page: u64, kind: RunKind) {
    use pageferry_proto::page::PageIndex;
    let between = |start, end| PageRun::between(start, PageIndex(end)).expect("pages of a run");
    if let Some(last) = runs.last_mut()
        && last.kind == kind
        && last.pages.end().0 == page
    {
        last.pages = between(last.pages.start(), page + 1);
        return;
    }
    let pages = between(PageIndex(page), page + 1);
    runs.push(ParcelRun { pages, kind });
}

/// Whether all bytes of a page are zero. The inner fold has no exit, so it becomes vector code; the
/// outer one stops at the first chunk that is not zero, which for most pages is the first.
fn is_zero(page: &[u8]) -> bool {
    let mut chunks = page.chunks_exact(ZERO_CHUNK_BYTES);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

const BLOCK_BYTES: usize = BLOCK_RAW_BYTES_MAX as usize;

/// How many places of a block are looked at, and how much of each, in bytes. Together one page: a
/// sixteenth of the work of compressing a whole block.
const SAMPLE_PARTS: usize = 4;
const SAMPLE_PART_BYTES: usize = PAGE_SIZE / SAMPLE_PARTS;
const SAMPLE_BYTES: usize = SAMPLE_PARTS * SAMPLE_PART_BYTES;

/// What a byte on the wire costs processors on both sides, in nanoseconds: copying, sealing,
/// sending, receiving. Of 2.8 s per GiB (see `net::tuning`) what decompressing costs is taken off.
const WIRE_NS_PER_BYTE: u64 = 2;

/// Two cache lines.
const ZERO_CHUNK_BYTES: usize = 128;
