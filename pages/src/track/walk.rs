//! Walking page maps: which pages of a range are live, and which of them were written.
//!
//! A page is *live* when the process would lose something without it: in memory or in swap. Not
//! live are pages that were never touched or were given up, the shared zero page (absence reads the
//! same), and guard regions (no memory; CRIU carries them in its own images). Guard regions look
//! like swapped pages to a scan that does not name their category, hence the demand for kernels
//! that know it.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pageferry_proto::page::{PageCount, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_sys::pagemap::{Categories, PageRegion, Pagemap, Protect, ScanRequest};

/// A buffer for walks.
#[derive(Debug)]
pub(super) struct Walker {
    regions: Vec<PageRegion>,
    /// The category of guard regions; none on a kernel without them.
    guard: Categories,
}

/// Which pages of a range count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Live ones and written ones; the written ones are protected. Fails in untracked mappings.
    Protect,
    /// Live ones and written ones, and guard regions. Fails in untracked mappings.
    Tracked,
    /// Live ones, in any mapping; all count as written. And guard regions.
    Any,
    /// Own copies of a file's pages.
    Copies,
}

/// What walks have found. Runs in the order of the walks.
#[derive(Debug, Default)]
pub(super) struct Found {
    live: Vec<PageRun>,
    written: Vec<PageRun>,
    guards: Vec<PageRun>,
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

/// What became of one walk.
#[derive(Debug, Default)]
struct Walk {
    found: Found,
    broken: Option<Broken>,
    /// What there was no time for.
    left: Option<Range<u64>>,
}

/// What became of several walks.
#[derive(Debug, Default)]
pub(super) struct Walked {
    /// What was found, in the order of addresses.
    pub(super) found: Found,
    /// The walks that ended early.
    pub(super) broken: Vec<Broken>,
    /// What there was no time for, sorted.
    pub(super) left: Vec<Range<u64>>,
}

impl Walk {
    /// One that was not begun.
    fn left(range: Range<u64>) -> Self {
        Self {
            left: Some(range),
            ..Self::default()
        }
    }
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

    /// The guard regions, which are not among the pages.
    pub(super) fn guards(&self) -> PageSet {
        PageSet::from_runs(self.guards.iter().copied())
    }

    /// Adds what a later walk has found.
    pub(super) fn append(&mut self, mut later: Self) {
        self.live.append(&mut later.live);
        self.written.append(&mut later.written);
        self.guards.append(&mut later.guards);
    }
}

/// Walks all `ranges`, which are sorted; large ones on several threads. Every piece is a walk of
/// its own: one that breaks does not keep the others from being walked.
pub(super) fn walk_all(
    pagemap: &Pagemap,
    guard: bool,
    ranges: &[Range<u64>],
    look: Look,
) -> Walked {
    walk_until(pagemap, guard, ranges, look, None)
}

/// As [`walk_all`], but ends then; each thread walks a little, however late it is.
pub(super) fn walk_until(
    pagemap: &Pagemap,
    guard: bool,
    ranges: &[Range<u64>],
    look: Look,
    until: Option<Instant>,
) -> Walked {
    let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let size = (bytes / PIECES).next_power_of_two().max(PIECE_BYTES_MIN);
    let pieces: Vec<Range<u64>> = ranges.iter().flat_map(|range| cut(range, size)).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = usize::try_from(bytes / THREAD_BYTES_MIN).unwrap_or(usize::MAX);
    let threads = threads.clamp(1, cores.min(THREADS_MAX));
    let next = AtomicUsize::new(0);
    let is_over = || until.is_some_and(|until| until <= Instant::now());
    let walk = || {
        let mut walker = Walker::new(guard);
        let mut done: Vec<(usize, Walk)> = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(index) else {
                return done;
            };
            let walk = if is_over() && !done.is_empty() {
                Walk::left(piece.clone())
            } else {
                walker.walk_until(pagemap, piece.clone(), look, until)
            };
            done.push((index, walk));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(walk)).collect();
        let mut done = walk();
        for other in others {
            done.extend(other.join().expect("walking does not panic"));
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    let mut walked = Walked::default();
    for (_, walk) in done {
        walked.found.append(walk.found);
        walked.broken.extend(walk.broken);
        walked.left.extend(walk.left);
    }
    walked
}

/// Cuts a range at multiples of `size`, which is a power of two.
fn cut(range: &Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { start, end } = *range;
    let first = start - start % size;
    let starts = (0..).map(move |piece| first + piece * size);
    starts
        .take_while(move |at| *at < end)
        .map(move |at| at.max(start)..end.min(at.saturating_add(size)))
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
            guard,
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
        let walk = self.walk_until(pagemap, range, look, None);
        found.append(walk.found);
        match walk.broken {
            Some(broken) => Err(broken),
            None => Ok(()),
        }
    }

    /// Walks `range` until then, but never nothing of it.
    fn walk_until(
        &mut self,
        pagemap: &Pagemap,
        range: Range<u64>,
        look: Look,
        until: Option<Instant>,
    ) -> Walk {
        let mut walk = Walk::default();
        let mut step = match until {
            Some(_) => STEP_BYTES,
            None => u64::MAX,
        };
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at.saturating_add(step - at % step));
            let request = ScanRequest {
                pages_max: if STEP_BYTES < step && until.is_some() {
                    STEP_BYTES / PAGE_BYTES
                } else {
                    0
                },
                ..self.request(&(at..end), look)
            };
            let scanned = pagemap.scan(&request, &mut self.regions);
            let scanned = scanned.and_then(|scanned| match scanned.walk_end {
                walked if at < walked => Ok(scanned),
                _ => Err(io::Error::other("the scan makes no progress")),
            });
            let scanned = match scanned {
                Ok(scanned) => scanned,
                Err(source) => {
                    let rest = at..range.end;
                    walk.broken = Some(Broken { rest, source });
                    return walk;
                }
            };
            at = scanned.walk_end;
            walk.found.add(&self.regions[..scanned.regions], look);
            let Some(until) = until else { continue };
            step = if scanned.regions == 0 {
                (step * 2).min(STEP_BYTES_MAX)
            } else {
                STEP_BYTES
            };
            if at < range.end && until <= Instant::now() {
                walk.left = Some(at..range.end);
                return walk;
            }
        }
        walk
    }

    fn request(&self, range: &Range<u64>, look: Look) -> ScanRequest {
        let not_live = Categories::PFNZERO;
        let (none_of, report) = match look {
            // A guard region is a marker that must not be protected.
            Look::Protect => (not_live.with(self.guard), Categories::WRITTEN),
            Look::Tracked | Look::Any => (not_live, Categories::WRITTEN.with(self.guard)),
            Look::Copies => {
                let none_of = not_live.with(self.guard).with(Categories::FILE);
                (none_of, Categories::WRITTEN)
            }
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
            report,
            pages_max: 0,
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
            if region.categories().has(Categories::GUARD) {
                self.guards.push(run);
                continue;
            }
            self.live.push(run);
            let all = matches!(look, Look::Any | Look::Copies);
            if all || region.categories().has(Categories::WRITTEN) {
                self.written.push(run);
            }
        }
    }
}

/// How many regions one call may return: 192 KiB of them. The kernel collects 512 at a time and
/// lets go of the process's memory lock in between, so that more would save nothing but system
/// calls.
const REGIONS: usize = 8192;

/// Into about how many pieces everything is cut: enough to keep threads equally busy, few enough
/// for reservations of terabytes of which little is used.
const PIECES: u64 = 64;

/// Least size of a piece, in bytes: 0.05 ms of work, and no huge page lies across its ends.
const PIECE_BYTES_MIN: u64 = 16 << 20;

/// How much each thread must have to do, in bytes: starting one costs as much as walking 16 MiB.
const THREAD_BYTES_MIN: u64 = 256 << 20;

/// How much is walked between two looks at the clock, in bytes: 0.2 ms at most. No huge page lies
/// across its ends.
const STEP_BYTES: u64 = 8 << 20;

/// How much at most where nothing is found, in bytes: a reservation of a terabyte is walked in a
/// thousand steps. Should there be pages after all, such a step ends when it has found as many as
/// another may have.
const STEP_BYTES_MAX: u64 = 1 << 30;

const PAGE_BYTES: u64 = 4096;

/// Most threads of one walk: beyond it they get in each other's way at the memory lock.
const THREADS_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_range_and_meet_at_whole_multiples() {
        let size = PIECE_BYTES_MIN;
        let range = 3 * size - 4096..5 * size + 4096;
        let pieces: Vec<_> = cut(&range, size).collect();
        assert_eq!(pieces.len(), 4);
        assert_eq!((pieces[0].start, pieces[3].end), (range.start, range.end));
        assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(
            pieces[1..]
                .iter()
                .all(|piece| piece.start.is_multiple_of(size))
        );
        assert!(cut(&(4096..8192), size).eq(std::iter::once(4096..8192)));
    }
}
