//! Walking page maps: which pages of a range are live, and which of them were written.
//!
//! A page is *live* when the process would lose something without it: in memory or in swap. Not live
//! are pages that were never touched or were given up, the shared zero page (absence reads the same),
//! and guard regions (no memory; CRIU carries them in its own images). Guard regions look like swapped
//! pages to a scan that does not name their category, hence the demand for kernels that know it.

use std::io;
use std::ops::Range;

use pageferry_proto::page::{PageCount, PageRun};
use pageferry_proto::set::PageSet;

use crate::sys::pagemap::{Categories, PageRegion, Pagemap, Protect, ScanRequest};

/// A buffer for walks.
#[derive(Debug)]
pub(super) struct Walker {
    regions: Vec<PageRegion>,
    not_live: Categories,
}

/// Which pages of a range count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Live ones and written ones; the written ones are protected. Fails in untracked mappings.
    Protect,
    /// Live ones and written ones. Fails in untracked mappings.
    Tracked,
    /// Live ones, in any mapping; all count as written.
    Any,
    /// Own copies of a file's pages.
    Copies,
}

/// What walks have found. Runs in the order of the walks.
#[derive(Debug, Default)]
pub(super) struct Found {
    live: Vec<PageRun>,
    written: Vec<PageRun>,
}

/// A walk that ended early. What was found before it is in [`Found`], but pages beyond may be
/// protected already without having been found.
#[derive(Debug)]
pub(super) struct Broken {
    /// What is left of the range.
    pub(super) rest: Range<u64>,
    /// Why.
    pub(super) source: io::Error,
}

impl Found {
    /// The live pages and those of them that were written.
    pub(super) fn into_sets(self) -> (PageSet, PageSet) {
        (
            PageSet::from_runs(self.live),
            PageSet::from_runs(self.written),
        )
    }

    /// How many live pages were found.
    pub(super) fn live_pages(&self) -> PageCount {
        self.live.iter().map(PageRun::count).sum()
    }
}

impl Walker {
    /// `guard` tells whether the kernel has a category for guard regions, and so may have any.
    pub(super) fn new(guard: bool) -> Self {
        let guard = if guard {
            Categories::GUARD
        } else {
            Categories::NONE
        };
        Self {
            regions: vec![PageRegion::default(); REGIONS],
            not_live: Categories::PFNZERO.with(guard),
        }
    }

    /// Walks `range`, adding to `found`.
    pub(super) fn walk(
        &mut self,
        pagemap: &Pagemap,
        range: Range<u64>,
        look: Look,
        found: &mut Found,
    ) -> Result<(), Broken> {
        let request = self.request(&range, look);
        let mut at = range.start;
        while at < range.end {
            let broken = |source| Broken {
                rest: at..range.end,
                source,
            };
            let request = ScanRequest {
                start: at,
                ..request
            };
            let scanned = pagemap.scan(&request, &mut self.regions).map_err(broken)?;
            if scanned.walk_end <= at {
                return Err(broken(io::Error::other("the scan makes no progress")));
            }
            at = scanned.walk_end;
            found.add(&self.regions[..scanned.regions], look);
        }
        Ok(())
    }

    fn request(&self, range: &Range<u64>, look: Look) -> ScanRequest {
        let none_of = match look {
            Look::Protect | Look::Tracked | Look::Any => self.not_live,
            Look::Copies => self.not_live.with(Categories::FILE),
        };
        ScanRequest {
            start: range.start,
            end: range.end,
            protect: match look {
                Look::Protect => Protect::Written,
                Look::Tracked | Look::Any | Look::Copies => Protect::Nothing,
            },
            tracked_only: matches!(look, Look::Protect | Look::Tracked),
            all_of: Categories::NONE,
            none_of,
            any_of: Categories::PRESENT.with(Categories::SWAPPED),
            report: Categories::WRITTEN,
        }
    }
}

impl Found {
    fn add(&mut self, regions: &[PageRegion], look: Look) {
        for region in regions {
            // The kernel reports runs of whole pages of user memory, none of them empty.
            let Ok(run) = PageRun::touching(&(region.start..region.end)) else {
                continue;
            };
            self.live.push(run);
            let all = matches!(look, Look::Any | Look::Copies);
            if all || region.categories().has(Categories::WRITTEN) {
                self.written.push(run);
            }
        }
    }
}

/// How many regions one call may return: 192 KiB of them. The kernel collects 512 at a time and lets
/// go of the process's memory lock in between, so that more would save nothing but system calls.
const REGIONS: usize = 8192;
