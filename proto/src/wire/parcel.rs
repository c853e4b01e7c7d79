//! The header of a parcel: which pages it has, and how long the rest of it is.
//!
//! ```text
//! space u32 | round u32 | data_pages u32 | run_count u32 | body_len u32      all little endian
//! run_count times: start u64 | count u32 | kind u8                           sorted, disjoint
//! body: blocks of codec u8 | raw_len u32 | len u32 | bytes                   body_len in all
//! crc32 u32 over all of the above
//! ```
//!
//! The blocks hold the pages of the data runs in order; a zero run has no bytes. This module
//! neither compresses nor reads pages: it is the codec of the header and of the block headers,
//! and whoever decodes with it may trust every number it returned.

use crate::id::{IdError, Round, SpaceId};
use crate::page::{PAGE_SIZE, PageCount, PageIndex, PageRun, PageRunError};
use crate::set::PageSet;
use crate::wire::stream::CHECKSUM_BYTES;

/// Most data pages in a parcel: 4 MiB, which bounds what a receiver holds per stream.
pub const DATA_PAGES_MAX: u32 = 1024;

/// Most runs in a parcel. Data runs are bounded by the pages; this bounds the zero runs.
pub const RUNS_MAX: u32 = 4096;

/// Most bytes in a block before compression (64 KiB): large enough for LZ4 to find its matches,
/// small enough to stay in a core's cache.
pub const BLOCK_RAW_BYTES_MAX: u32 = 64 << 10;

/// Longest body, in bytes: every data page stored raw in a block of its own.
pub const BODY_BYTES_MAX: u32 = DATA_PAGES_MAX * (PAGE_SIZE + BlockHeader::BYTES) as u32;

/// Longest parcel, in bytes, without the stream's prefix.
pub const PARCEL_BYTES_MAX: usize = ParcelHeader::FIXED_BYTES
    + RUNS_MAX as usize * ParcelRun::BYTES
    + BODY_BYTES_MAX as usize
    + CHECKSUM_BYTES;

/// What a parcel holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParcelHeader {
    space: SpaceId,
    round: Round,
    runs: Vec<ParcelRun>,
    data_pages: u32,
    body_bytes: u32,
}

/// Consecutive pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParcelRun {
    /// The pages.
    pub pages: PageRun,
    /// What is known of them.
    pub kind: RunKind,
}

/// What is known of the pages of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RunKind {
    /// All their bytes are zero.
    Zero = 1,
    /// Their bytes are in the body.
    Data = 2,
}

/// What precedes the bytes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    codec: Codec,
    raw_bytes: u32,
    bytes: u32,
}

/// How a block's bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 1,
    /// An LZ4 block, without a length before it.
    Lz4 = 2,
}

/// Why bytes are not a parcel's header, or a list of runs cannot become one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParcelError {
    /// The bytes end early.
    #[error("parcel has {length} bytes where {needed} are needed")]
    Truncated {
        /// Bytes there are.
        length: usize,
        /// Bytes there must be.
        needed: usize,
    },
    /// Round 0.
    #[error("parcel has no round")]
    Round(#[source] IdError),
    /// No runs, or more than [`RUNS_MAX`].
    #[error("parcel has {0} runs, not 1 to {RUNS_MAX}")]
    RunCount(usize),
    /// A run that is not one.
    #[error("run {index} of the parcel is not a run")]
    Run {
        /// Index of the run, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: PageRunError,
    },
    /// A run longer than its 32-bit count can say.
    #[error("run {index} of the parcel has {count} pages, more than a u32")]
    RunTooLong {
        /// Index of the run, from 0.
        index: usize,
        /// Its pages.
        count: u64,
    },
    /// No kind has this number.
    #[error("run {index} of the parcel has the unknown kind {kind}")]
    RunKind {
        /// Index of the run, from 0.
        index: usize,
        /// The number.
        kind: u8,
    },
    /// A run that starts before the end of the one before it.
    #[error("run {index} of the parcel starts before the end of the one before it")]
    Order {
        /// Index of the second of the two, from 0.
        index: usize,
    },
    /// The data runs have more than [`DATA_PAGES_MAX`] pages.
    #[error("parcel has {0} data pages, more than {DATA_PAGES_MAX}")]
    DataPages(u64),
    /// The header's count differs from its runs.
    #[error("parcel has {found} data pages, its header says {claimed}")]
    DataPagesDiffer {
        /// What the header says.
        claimed: u32,
        /// What the runs add up to.
        found: u32,
    },
    /// A body longer than its data pages can fill, or a missing or superfluous one.
    #[error("parcel of {data_pages} data pages has a body of {bytes} bytes")]
    BodyLength {
        /// The body's length.
        bytes: u32,
        /// Data pages of the parcel.
        data_pages: u32,
    },
    /// A codec that is not known.
    #[error("block has the unknown codec {0}")]
    Codec(u8),
    /// A block that is empty, longer than [`BLOCK_RAW_BYTES_MAX`] or no whole pages.
    #[error("block of {0} raw bytes is not 1 to 16 whole pages")]
    BlockRawLength(u32),
    /// A block with more bytes than its raw form has, or a raw block with another length.
    #[error("block of {raw_bytes} raw bytes has {bytes} bytes with codec {codec:?}")]
    BlockLength {
        /// How it is stored.
        codec: Codec,
        /// Its length before compression.
        raw_bytes: u32,
        /// Its length in the body.
        bytes: u32,
    },
}

impl ParcelHeader {
    /// Length of the part before the runs, in bytes.
    pub const FIXED_BYTES: usize = 20;

    /// The header of a parcel with these runs, sorted and disjoint, whose body has
    /// `body_bytes` bytes, block headers included.
    pub fn new(
        space: SpaceId,
        round: Round,
        runs: Vec<ParcelRun>,
        body_bytes: u32,
    ) -> Result<Self, ParcelError> {
        if runs.is_empty() || (RUNS_MAX as usize) < runs.len() {
            return Err(ParcelError::RunCount(runs.len()));
        }
        let mut end = PageIndex(0);
        let mut data_pages = 0_u64;
        for (index, run) in runs.iter().enumerate() {
            let count = run.pages.count().0;
            if run.pages.start() < end {
                return Err(ParcelError::Order { index });
            }
            if u32::try_from(count).is_err() {
                return Err(ParcelError::RunTooLong { index, count });
            }
            end = run.pages.end();
            match run.kind {
                RunKind::Zero => {}
                // At most 4096 runs of at most 2^32 pages: no overflow.
                RunKind::Data => data_pages += count,
            }
        }
        let data_pages = u32::try_from(data_pages)
            .ok()
            .filter(|&pages| pages <= DATA_PAGES_MAX)
            .ok_or(ParcelError::DataPages(data_pages))?;
        let body_bytes_max = data_pages * (BODY_BYTES_MAX / DATA_PAGES_MAX);
        if body_bytes_max < body_bytes || (data_pages == 0) != (body_bytes == 0) {
            return Err(ParcelError::BodyLength {
                bytes: body_bytes,
                data_pages,
            });
        }
        Ok(Self {
            space,
            round,
            runs,
            data_pages,
            body_bytes,
        })
    }

    /// The space that the pages are of.
    pub const fn space(&self) -> SpaceId {
        self.space
    }

    /// The round that the pages are of.
    pub const fn round(&self) -> Round {
        self.round
    }

    /// The runs: sorted, disjoint, 1 to [`RUNS_MAX`].
    pub fn runs(&self) -> &[ParcelRun] {
        &self.runs
    }

    /// Pages in the body: at most [`DATA_PAGES_MAX`].
    pub const fn data_pages(&self) -> u32 {
        self.data_pages
    }

    /// Length of the body in bytes, block headers included.
    pub const fn body_bytes(&self) -> u32 {
        self.body_bytes
    }

    /// All pages of the parcel, zero pages too.
    pub fn pages(&self) -> PageCount {
        self.runs.iter().map(|run| run.pages.count()).sum()
    }

    /// The pages of one kind.
    pub fn page_set(&self, kind: RunKind) -> PageSet {
        self.runs
            .iter()
            .filter(|run| run.kind == kind)
            .map(|run| run.pages)
            .collect()
    }

    /// Its bytes: what precedes the body.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::FIXED_BYTES + self.runs.len() * ParcelRun::BYTES);
        self.encode_into(&mut bytes);
        bytes
    }

    /// Appends its bytes.
    pub fn encode_into(&self, bytes: &mut Vec<u8>) {
        let run_count = u32::try_from(self.runs.len()).expect("at most RUNS_MAX runs");
        for number in [
            self.space.0,
            self.round.number(),
            self.data_pages,
            run_count,
            self.body_bytes,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for run in &self.runs {
            let count = u32::try_from(run.pages.count().0).expect("checked by the constructor");
            bytes.extend_from_slice(&run.pages.start().0.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.push(run.kind as u8);
        }
    }

    /// Length of the whole header in bytes, runs included, from its first bytes.
    pub fn encoded_bytes(fixed: &[u8; Self::FIXED_BYTES]) -> Result<usize, ParcelError> {
        let mut rest = &fixed[12..];
        run_count(&mut rest).map(|runs| Self::FIXED_BYTES + runs * ParcelRun::BYTES)
    }

    /// The header at the start of these bytes, and what follows it.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), ParcelError> {
        let mut rest = bytes;
        let space = SpaceId(u32::from_le_bytes(take(&mut rest)?));
        let round = u32::from_le_bytes(take(&mut rest)?);
        let round = Round::new(round).map_err(ParcelError::Round)?;
        let claimed = u32::from_le_bytes(take(&mut rest)?);
        let run_count = run_count(&mut rest)?;
        let body_bytes = u32::from_le_bytes(take(&mut rest)?);
        let needed = run_count * ParcelRun::BYTES;
        if rest.len() < needed {
            return Err(ParcelError::Truncated {
                length: rest.len(),
                needed,
            });
        }
        let mut runs = Vec::with_capacity(run_count);
        for index in 0..run_count {
            runs.push(ParcelRun::decode(&mut rest, index)?);
        }
        let header = Self::new(space, round, runs, body_bytes)?;
        let found = header.data_pages;
        if found != claimed {
            return Err(ParcelError::DataPagesDiffer { claimed, found });
        }
        Ok((header, rest))
    }
}

impl ParcelRun {
    /// Length of a run's wire form, in bytes.
    pub const BYTES: usize = 13;

    fn decode(rest: &mut &[u8], index: usize) -> Result<Self, ParcelError> {
        let start = PageIndex(u64::from_le_bytes(take(rest)?));
        let count = PageCount(u32::from_le_bytes(take(rest)?).into());
        let [kind] = take(rest)?;
        let kind = match kind {
            1 => RunKind::Zero,
            2 => RunKind::Data,
            0 | 3..=u8::MAX => return Err(ParcelError::RunKind { index, kind }),
        };
        let pages =
            PageRun::new(start, count).map_err(|source| ParcelError::Run { index, source })?;
        Ok(Self { pages, kind })
    }
}

impl BlockHeader {
    /// Length of a block's header, in bytes.
    pub const BYTES: usize = 9;

    /// The header of a block of `raw_bytes` bytes that takes `bytes` bytes in the body.
    /// An LZ4 block must be shorter than its pages; what does not shrink is stored raw.
    pub const fn new(codec: Codec, raw_bytes: u32, bytes: u32) -> Result<Self, ParcelError> {
        let whole = raw_bytes.is_multiple_of(PAGE_SIZE as u32);
        if raw_bytes == 0 || BLOCK_RAW_BYTES_MAX < raw_bytes || !whole {
            return Err(ParcelError::BlockRawLength(raw_bytes));
        }
        let fits = match codec {
            Codec::Raw => bytes == raw_bytes,
            Codec::Lz4 => 0 < bytes && bytes < raw_bytes,
        };
        if !fits {
            return Err(ParcelError::BlockLength {
                codec,
                raw_bytes,
                bytes,
            });
        }
        Ok(Self {
            codec,
            raw_bytes,
            bytes,
        })
    }

    /// How the block is stored.
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// Its length before compression, in bytes: 1 to 16 whole pages.
    pub const fn raw_bytes(&self) -> u32 {
        self.raw_bytes
    }

    /// Its length in the body, in bytes, without this header.
    pub const fn bytes(&self) -> u32 {
        self.bytes
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.codec as u8;
        bytes[1..5].copy_from_slice(&self.raw_bytes.to_le_bytes());
        bytes[5..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// The header at the start of these bytes, and what follows it.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), ParcelError> {
        let mut rest = bytes;
        let codec = match take(&mut rest)? {
            [1] => Codec::Raw,
            [2] => Codec::Lz4,
            [codec] => return Err(ParcelError::Codec(codec)),
        };
        let raw_bytes = u32::from_le_bytes(take(&mut rest)?);
        let length = u32::from_le_bytes(take(&mut rest)?);
        Ok((Self::new(codec, raw_bytes, length)?, rest))
    }
}

fn run_count(rest: &mut &[u8]) -> Result<usize, ParcelError> {
    let count = u32::from_le_bytes(take(rest)?);
    if count == 0 || RUNS_MAX < count {
        return Err(ParcelError::RunCount(count as usize));
    }
    Ok(count as usize)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], ParcelError> {
    let truncated = ParcelError::Truncated {
        length: rest.len(),
        needed: N,
    };
    let (taken, tail) = rest.split_first_chunk::<N>().ok_or(truncated)?;
    *rest = tail;
    Ok(*taken)
}

#[cfg(test)]
#[path = "parcel_tests.rs"]
mod tests;
