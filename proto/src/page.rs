//! Pages: their size, their numbers, and runs of them.
//!
//! A page is named by its address divided by [`PAGE_SIZE`]. All page numbers of a run lie below
//! [`PageIndex::LIMIT`], so that addresses and lengths in bytes never overflow a `u64`.

use std::fmt;
use std::ops::Range;

/// Size of a page, in bytes. Only kernels with this page size are supported.
pub const PAGE_SIZE: usize = 4096;

/// Base-2 logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// The number of a page: its address shifted right by [`PAGE_SHIFT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(pub u64);

/// Consecutive pages: at least one, none at or above [`PageIndex::LIMIT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    start: PageIndex,
    count: PageCount,
}

/// Why a start and a count are not a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageRunError {
    /// A run of no pages.
    #[error("run at page {start:#x} is empty")]
    Empty {
        /// First page of the run.
        start: u64,
    },
    /// A run that reaches beyond the last page a 64-bit address can name.
    #[error("run of {count:#x} pages at page {start:#x} ends beyond the address space")]
    Overflow {
        /// First page of the run.
        start: u64,
        /// Number of pages.
        count: u64,
    },
}

impl PageIndex {
    /// One more than the number of the last page that a 64-bit address can name.
    pub const LIMIT: u64 = 1 << (u64::BITS - PAGE_SHIFT);

    /// The page that holds the byte at `address`.
    pub const fn containing(address: u64) -> Self {
        Self(address >> PAGE_SHIFT)
    }

    /// The address of the page's first byte. The page must lie below [`PageIndex::LIMIT`].
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl PageCount {
    /// No pages.
    pub const ZERO: Self = Self(0);

    /// The count in bytes, saturating.
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE as u64)
    }

    /// The number of pages that `bytes` touch when they start at a page.
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE as u64))
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::iter::Sum for PageCount {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        Self(counts.fold(0, |sum, count| sum.saturating_add(count.0)))
    }
}

impl PageRun {
    /// `count` pages from `start` on.
    pub const fn new(start: PageIndex, count: PageCount) -> Result<Self, PageRunError> {
        if count.0 == 0 {
            return Err(PageRunError::Empty { start: start.0 });
        }
        match start.0.checked_add(count.0) {
            Some(end) if end <= PageIndex::LIMIT => Ok(Self { start, count }),
            Some(_) | None => Err(PageRunError::Overflow {
                start: start.0,
                count: count.0,
            }),
        }
    }

    /// The pages from `start` up to and without `end`.
    pub const fn between(start: PageIndex, end: PageIndex) -> Result<Self, PageRunError> {
        Self::new(start, PageCount(end.0.saturating_sub(start.0)))
    }

    /// All pages that the bytes `start..end` touch.
    pub const fn touching(bytes: &Range<u64>) -> Result<Self, PageRunError> {
        let start = PageIndex::containing(bytes.start);
        if bytes.end <= bytes.start {
            return Err(PageRunError::Empty { start: start.0 });
        }
        Self::between(start, PageIndex(PageIndex::containing(bytes.end - 1).0 + 1))
    }

    /// Its first page.
    pub const fn start(&self) -> PageIndex {
        self.start
    }

    /// How many pages it has: at least 1.
    pub const fn count(&self) -> PageCount {
        self.count
    }

    /// The page after its last one, at most [`PageIndex::LIMIT`].
    pub const fn end(&self) -> PageIndex {
        PageIndex(self.start.0 + self.count.0)
    }

    /// The address of its first byte.
    pub const fn address(&self) -> u64 {
        self.start.address()
    }

    /// Its length in bytes, saturating for a run over the whole address space.
    pub const fn bytes(&self) -> u64 {
        self.count.bytes()
    }

    /// Whether `page` is one of its pages.
    pub const fn contains(&self, page: PageIndex) -> bool {
        self.start.0 <= page.0 && page.0 < self.end().0
    }

    /// The pages that both runs have.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end().min(other.end())).ok()
    }

    /// The run from `start` to `end`, of which the caller knows that `start < end` and that
    /// `end` is the end of another run.
    pub(crate) const fn known(start: PageIndex, end: PageIndex) -> Self {
        debug_assert!(start.0 < end.0 && end.0 <= PageIndex::LIMIT);
        Self {
            start,
            count: PageCount(end.0 - start.0),
        }
    }
}

impl fmt::Debug for PageRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start.0, self.count.0)
    }
}

impl fmt::Display for PageRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_pages_and_ends_within_the_address_space() {
        let run = PageRun::new(PageIndex(2), PageCount(3)).unwrap();
        assert_eq!(
            (run.end(), run.address(), run.bytes()),
            (PageIndex(5), 0x2000, 0x3000)
        );
        assert_eq!(
            PageRun::new(PageIndex(2), PageCount(0)),
            Err(PageRunError::Empty { start: 2 })
        );
        assert!(PageRun::new(PageIndex(PageIndex::LIMIT - 1), PageCount(1)).is_ok());
        assert!(PageRun::new(PageIndex(PageIndex::LIMIT - 1), PageCount(2)).is_err());
        assert!(PageRun::new(PageIndex(u64::MAX), PageCount(2)).is_err());
    }

    #[test]
    fn a_byte_range_touches_the_pages_at_both_its_ends() {
        assert_eq!(
            PageRun::touching(&(0xfff..0x2001)),
            PageRun::new(PageIndex(0), PageCount(3))
        );
        assert!(PageRun::touching(&(0x1000..0x1000)).is_err());
        assert!(PageRun::touching(&(0..u64::MAX)).is_ok());
    }

    #[test]
    fn runs_intersect_where_they_overlap() {
        let run = |start, count| PageRun::new(PageIndex(start), PageCount(count)).unwrap();
        assert_eq!(run(0, 4).intersection(&run(2, 9)), Some(run(2, 2)));
        assert_eq!(run(0, 4).intersection(&run(4, 1)), None);
    }
}
