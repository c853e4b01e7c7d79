//! Parcel to pages: checked whole before the first byte is written anywhere.
//!
//! Pure but for the [`PageSink`] that takes the pages. A parcel comes from a peer: every number in
//! it is checked, and what does not fit is an error, never a panic.

use std::io::{self, IoSlice};

use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::page::{PAGE_SIZE, PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::parcel::{
    BLOCK_RAW_BYTES_MAX, BlockHeader, Codec, DATA_PAGES_MAX, ParcelError, ParcelHeader, RunKind,
};
use pageferry_proto::wire::stream::{self, StreamError};
use thiserror::Error;

/// Takes the pages of one space.
pub trait PageSink {
    /// Puts the bytes of consecutive pages, from `start` on, in their place. Each part is whole
    /// pages; there are at most [`PARTS_MAX`]. The slices may be changed.
    fn write(&self, start: PageIndex, parts: &mut [IoSlice<'_>]) -> io::Result<()>;

    /// Makes the pages of `run` zero.
    fn clear(&self, run: PageRun) -> io::Result<()>;
}

/// A parcel whose checksum and header are right. Its body is not decoded yet.
#[derive(Debug)]
pub struct Parcel<'a> {
    header: ParcelHeader,
    body: &'a [u8],
}

/// Decodes bodies; keeps its working memory (64 KiB) between them.
#[derive(Debug)]
pub struct Decoder {
    scratch: Vec<u8>,
}

/// Why a parcel cannot be decoded, or not be stored.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// Its bytes do not fit their checksum.
    #[error("parcel is damaged")]
    Stream(#[source] StreamError),
    /// Its header or one of its block headers is wrong.
    #[error("parcel is malformed")]
    Header(#[source] ParcelError),
    /// Its body is not as long as the header says, or has more or fewer blocks than its pages need.
    #[error("parcel of {data_pages} data pages has {bytes} bytes of body that hold {raw_bytes}")]
    Body {
        /// Data pages of the parcel.
        data_pages: u32,
        /// Bytes of body there are.
        bytes: usize,
        /// Bytes of pages its blocks hold.
        raw_bytes: usize,
    },
    /// A block is not LZ4, or has another length than its header says.
    #[error("block at byte {offset} of the parcel's body does not decompress")]
    Block {
        /// Where in the body its header ends.
        offset: usize,
    },
    /// The sink did not take pages.
    #[error("cannot store the page {page}")]
    Store {
        /// The first of them.
        page: PageIndex,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl DecodeError {
    /// What to tell the peer and the operator.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Stream(StreamError::Checksum { .. }) => ErrorCode::Checksum,
            Self::Stream(_) | Self::Header(_) | Self::Body { .. } | Self::Block { .. } => {
                ErrorCode::Malformed
            }
            Self::Store { .. } => ErrorCode::Capacity,
        }
    }
}

impl<'a> Parcel<'a> {
    /// Checks the parcel in `bytes`: a stream without its prefix.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let sealed = stream::unseal(bytes).map_err(DecodeError::Stream)?;
        let (header, body) = ParcelHeader::decode(sealed).map_err(DecodeError::Header)?;
        if body.len() != header.body_bytes() as usize {
            return Err(DecodeError::Body {
                data_pages: header.data_pages(),
                bytes: body.len(),
                raw_bytes: 0,
            });
        }
        Ok(Self { header, body })
    }

    /// The space that the pages are of.
    pub fn space(&self) -> SpaceId {
        self.header.space()
    }

    /// The round that the pages are of.
    pub fn round(&self) -> Round {
        self.header.round()
    }

    /// Pages with bytes.
    pub fn data(&self) -> PageSet {
        self.header.page_set(RunKind::Data)
    }

    /// Pages that are all zero.
    pub fn zero(&self) -> PageSet {
        self.header.page_set(RunKind::Zero)
    }

    /// The end of its last page.
    pub fn end(&self) -> PageIndex {
        self.header
            .runs()
            .last()
            .map_or(PageIndex(0), |run| run.pages.end())
    }

    /// How many pages have bytes.
    pub fn data_pages(&self) -> PageCount {
        PageCount(self.header.data_pages().into())
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder with its working memory.
    pub fn new() -> Self {
        Self {
            scratch: vec![0; BLOCK_RAW_BYTES_MAX as usize],
        }
    }

    /// Decodes the body of `parcel` into `sink`. After an error any of its pages may be changed.
    pub fn decode(&mut self, parcel: &Parcel<'_>, sink: &impl PageSink) -> Result<(), DecodeError> {
        for run in parcel
            .header
            .runs()
            .iter()
            .filter(|run| run.kind == RunKind::Zero)
        {
            let page = run.pages.start();
            sink.clear(run.pages)
                .map_err(|source| DecodeError::Store { page, source })?;
        }
        let data = parcel
            .header
            .runs()
            .iter()
            .filter(|run| run.kind == RunKind::Data);
        let mut writer = Writer {
            runs: data.map(|run| run.pages),
            rest: None,
            sink,
            start: PageIndex(0),
            end: PageIndex(0),
            parts: Vec::with_capacity(PARTS_MAX),
        };
        let mut body = parcel.body;
        let mut raw_bytes = 0;
        while !body.is_empty() {
            let (block, rest) = BlockHeader::decode(body).map_err(DecodeError::Header)?;
            let offset = parcel.body.len() - rest.len();
            let short = DecodeError::Body {
                data_pages: parcel.header.data_pages(),
                bytes: parcel.body.len(),
                raw_bytes,
            };
            let (stored, rest) = rest.split_at_checked(block.bytes() as usize).ok_or(short)?;
            let placed = match block.codec() {
                Codec::Raw => writer.gather(stored)?,
                Codec::Lz4 => writer.write(self.decompress(stored, &block, offset)?)?,
            };
            raw_bytes += block.raw_bytes() as usize;
            if !placed {
                break;
            }
            body = rest;
        }
        writer.flush()?;
        if raw_bytes as u64 != parcel.data_pages().bytes() || !body.is_empty() {
            return Err(DecodeError::Body {
                data_pages: parcel.header.data_pages(),
                bytes: parcel.body.len(),
                raw_bytes,
            });
        }
        Ok(())
    }

    fn decompress(
        &mut self,
        stored: &[u8],
        block: &BlockHeader,
        offset: usize,
    ) -> Result<&[u8], DecodeError> {
        let raw = &mut self.scratch[..block.raw_bytes() as usize];
        match lz4_flex::block::decompress_into(stored, raw) {
            Ok(length) if length == raw.len() => Ok(raw),
            Ok(_) | Err(_) => Err(DecodeError::Block { offset }),
        }
    }
}

/// Puts the bytes of the body where they belong.
struct Writer<'a, Runs, Sink> {
    /// Where the next bytes belong: first into the rest of a run, then into these.
    runs: Runs,
    rest: Option<PageRun>,
    sink: &'a Sink,
    /// What is gathered: consecutive pages from `start` up to `end`.
    parts: Vec<IoSlice<'a>>,
    start: PageIndex,
    end: PageIndex,
}

impl<'a, Runs: Iterator<Item = PageRun>, Sink: PageSink> Writer<'a, Runs, Sink> {
    /// Takes the pages of one block, and writes them together with those of the next ones; false
    /// when there are more than the parcel has.
    fn gather(&mut self, mut pages: &'a [u8]) -> Result<bool, DecodeError> {
        while !pages.is_empty() {
            let Some((page, now, later)) = self.place(pages) else {
                return Ok(false);
            };
            if self.parts.is_empty() || page != self.end || self.parts.len() == PARTS_MAX {
                self.flush()?;
                self.start = page;
            }
            self.parts.push(IoSlice::new(now));
            self.end = PageIndex(page.0 + (now.len() / PAGE_SIZE) as u64);
            pages = later;
        }
        Ok(true)
    }

    /// Writes the pages of one block; false when there are more than the parcel has.
    fn write(&mut self, mut pages: &[u8]) -> Result<bool, DecodeError> {
        while !pages.is_empty() {
            let Some((page, now, later)) = self.place(pages) else {
                return Ok(false);
            };
            self.sink
                .write(page, &mut [IoSlice::new(now)])
                .map_err(|source| DecodeError::Store { page, source })?;
            pages = later;
        }
        Ok(true)
    }

    /// Writes what is gathered.
    fn flush(&mut self) -> Result<(), DecodeError> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let page = self.start;
        self.sink
            .write(page, &mut self.parts)
            .map_err(|source| DecodeError::Store { page, source })?;
        self.parts.clear();
        Ok(())
    }

    /// Splits `pages` where their run ends, and says where the first part belongs; `None` when the
    /// parcel has no more runs.
    fn place<'p>(&mut self, pages: &'p [u8]) -> Option<(PageIndex, &'p [u8], &'p [u8])> {
        let run = self.rest.take().or_else(|| self.runs.next())?;
        let count = run.count().min(PageCount((pages.len() / PAGE_SIZE) as u64));
        let length = usize::try_from(count.bytes()).expect("at most a block");
        let (now, later) = pages.split_at(length);
        let page = run.start();
        self.rest = PageRun::between(PageIndex(page.0 + count.0), run.end()).ok();
        Some((page, now, later))
    }
}

/// Most parts of one write: as many as a full parcel has blocks.
pub const PARTS_MAX: usize = DATA_PAGES_MAX as usize * PAGE_SIZE / BLOCK_RAW_BYTES_MAX as usize;

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
