//! Sets of pages: what is dirty, live, held and missing.
//!
//! Progress, retry and resume are one operation on these sets: `send(missing(wanted, held))`.
//! A [`PageSet`] is a sorted list of runs that neither overlap nor touch; every operation is
//! linear in the runs of its operands and independent of the number of pages in them.

use std::cmp::Ordering;

use crate::page::{PageCount, PageIndex, PageRun, PageRunError};

/// A set of page numbers.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct PageSet {
    /// Sorted; between two neighbours there is at least one page that is not in the set.
    runs: Vec<PageRun>,
}

/// Most runs in the wire form of one set. The set in memory is 16 bytes per run, hence at most
/// 64 MiB; a space of 32 GiB of which every other page is missing has this many.
pub const RUNS_MAX: usize = 1 << 22;

/// Longest wire form of one set, in bytes (32 MiB). A run takes two bytes when set and gap are
/// fragmented and never more than [`RUN_BYTES_MAX`], so this does not cut below [`RUNS_MAX`] for
/// any set that is fragmented into pieces of less than 2 MiB.
pub const WIRE_BYTES_MAX: usize = 1 << 25;

/// Longest wire form of one run, in bytes: two varints of page numbers below 2^53.
pub const RUN_BYTES_MAX: usize = 16;

/// Why bytes are not the wire form of a [`PageSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageSetError {
    /// The bytes end within a number.
    #[error("page set ends within run {run}")]
    Truncated {
        /// Index of the run, from 0.
        run: usize,
    },
    /// A number is longer than it need be, or does not fit 64 bits.
    #[error("page set has an overlong number in run {run}")]
    Number {
        /// Index of the run, from 0.
        run: usize,
    },
    /// Two runs overlap or touch.
    #[error("run {run} of the page set touches the one before it")]
    Touching {
        /// Index of the second of the two, from 0.
        run: usize,
    },
    /// A run is empty or too long.
    #[error("run {run} of the page set is not a run")]
    Run {
        /// Index of the run, from 0.
        run: usize,
        /// What is wrong with it.
        #[source]
        source: PageRunError,
    },
    /// More than [`RUNS_MAX`] runs.
    #[error("page set has more than {RUNS_MAX} runs")]
    TooManyRuns,
    /// More than [`WIRE_BYTES_MAX`] bytes.
    #[error("page set has {0} bytes, more than {WIRE_BYTES_MAX}")]
    TooLong(usize),
}

impl PageSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { runs: Vec::new() }
    }

    /// The set of all pages of `runs`, which may come in any order and overlap.
    pub fn from_runs(runs: impl IntoIterator<Item = PageRun>) -> Self {
        let mut runs: Vec<PageRun> = runs.into_iter().collect();
        if !runs.is_sorted_by_key(PageRun::start) {
            runs.sort_unstable_by_key(PageRun::start);
        }
        let mut set = Self {
            runs: Vec::with_capacity(runs.len()),
        };
        for run in runs {
            set.append(run);
        }
        set
    }

    /// Adds the pages of `run`. Constant time at the end of the set, else linear.
    pub fn insert(&mut self, run: PageRun) {
        // Everything from `first` up to and without `last` overlaps or touches the run.
        let first = self.runs.partition_point(|held| held.end() < run.start());
        let touching = self.runs[first..].partition_point(|held| held.start() <= run.end());
        let last = first + touching;
        let merged = match (
            self.runs[first..last].first(),
            self.runs[first..last].last(),
        ) {
            (Some(head), Some(tail)) => {
                PageRun::known(run.start().min(head.start()), run.end().max(tail.end()))
            }
            (None, _) | (_, None) => run,
        };
        self.runs.splice(first..last, [merged]);
    }

    /// Removes the pages of `run`.
    pub fn remove(&mut self, run: PageRun) {
        let first = self.runs.partition_point(|held| held.end() <= run.start());
        let overlapping = self.runs[first..].partition_point(|held| held.start() < run.end());
        let last = first + overlapping;
        let Some((head, tail)) = self.runs[first..last]
            .first()
            .zip(self.runs[first..last].last())
        else {
            return;
        };
        let before = PageRun::between(head.start(), run.start()).ok();
        let after = PageRun::between(run.end(), tail.end()).ok();
        self.runs
            .splice(first..last, before.into_iter().chain(after));
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        let after = self.runs.partition_point(|run| run.start() <= page);
        after
            .checked_sub(1)
            .is_some_and(|index| self.runs[index].contains(page))
    }

    /// Whether every page of `run` is in the set.
    pub fn covers(&self, run: &PageRun) -> bool {
        let after = self
            .runs
            .partition_point(|held| held.start() <= run.start());
        after
            .checked_sub(1)
            .is_some_and(|index| run.end() <= self.runs[index].end())
    }

    /// Whether every page of `other` is in the set.
    pub fn is_superset(&self, other: &Self) -> bool {
        other.difference(self).is_empty()
    }

    /// Its runs: sorted, neither overlapping nor touching.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// How many pages are in the set. Linear in its runs.
    pub fn len(&self) -> PageCount {
        self.runs.iter().map(PageRun::count).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Removes all pages, keeps the memory.
    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// The pages of either set.
    pub fn union(&self, other: &Self) -> Self {
        let mut union = Self {
            runs: Vec::with_capacity(self.runs.len() + other.runs.len()),
        };
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start() <= b.start() => left.next(),
                (Some(_), None) => left.next(),
                (Some(_) | None, Some(_)) => right.next(),
                (None, None) => return union,
            };
            union.runs_extend(next);
        }
    }

    /// Adds the pages of `other`. Linear in the runs of `other` and in those of this set that lie
    /// between its first and last page.
    pub fn union_with(&mut self, other: &Self) {
        match (self.runs.last(), other.runs.first()) {
            (_, None) => {}
            (None, Some(_)) => self.runs.clone_from(&other.runs),
            // A scan walks upwards: its next batch most often begins after the last page held.
            (Some(last), Some(first)) if last.end() <= first.start() => {
                self.runs.reserve(other.runs.len());
                other.runs.iter().for_each(|run| self.append(*run));
            }
            (Some(_), Some(first)) => {
                // Only the runs between the ends of `other` are merged, the rest moves whole.
                let end = other.runs[other.runs.len() - 1].end();
                let from = self.runs.partition_point(|run| run.end() < first.start());
                let to = from + self.runs[from..].partition_point(|run| run.start() <= end);
                let window = Self {
                    runs: self.runs[from..to].to_vec(),
                };
                self.runs.splice(from..to, window.union(other).runs);
            }
        }
    }

    /// Removes the pages of `other`. Linear in the runs of `other` and in those of this set that
    /// lie between its first and last page.
    pub fn difference_with(&mut self, other: &Self) {
        let Some((first, last)) = other.runs.first().zip(other.runs.last()) else {
            return;
        };
        let from = self.runs.partition_point(|run| run.end() <= first.start());
        let to = from + self.runs[from..].partition_point(|run| run.start() < last.end());
        let window = Self {
            runs: self.runs[from..to].to_vec(),
        };
        self.runs.splice(from..to, window.difference(other).runs);
    }

    /// How many pages of `run` are in the set. Linear in the runs that have any.
    pub fn count_of(&self, run: &PageRun) -> PageCount {
        self.parts_of(*run).map(|part| part.count()).sum()
    }

    /// The pages of `run` that are in the set, in order.
    pub fn parts_of(&self, run: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let first = self.runs.partition_point(|held| held.end() <= run.start());
        let held = self.runs[first..].iter();
        held.map_while(move |held| held.intersection(&run))
    }

    /// The pages of this set that are not in `other`.
    pub fn difference(&self, other: &Self) -> Self {
        let mut runs = Vec::new();
        let mut holes = other.runs.iter().peekable();
        for run in &self.runs {
            let mut start = run.start();
            while let Some(hole) = holes.peek() {
                if run.end() <= hole.start() {
                    break;
                }
                runs.extend(PageRun::between(start, hole.start()).ok());
                start = start.max(hole.end());
                if run.end() < hole.end() {
                    break;
                }
                holes.next();
            }
            runs.extend(PageRun::between(start, run.end()).ok());
        }
        Self { runs }
    }

    /// The pages that are in both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        let mut runs = Vec::new();
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        while let Some((a, b)) = left.peek().zip(right.peek()) {
            runs.extend(a.intersection(b));
            match a.end().cmp(&b.end()) {
                Ordering::Less => left.next(),
                Ordering::Greater | Ordering::Equal => right.next(),
            };
        }
        Self { runs }
    }

    /// Cuts the set, in order, into sets of `pages_max` pages each; the last may have fewer.
    /// `pages_max` is at least 1.
    pub fn partition(&self, pages_max: PageCount) -> Vec<Self> {
        assert!(PageCount::ZERO < pages_max, "a part of no pages never ends");
        let mut parts = Vec::new();
        let mut part = Self::new();
        let mut room = pages_max.0;
        for run in &self.runs {
            let mut start = run.start();
            while start < run.end() {
                let end = PageIndex(run.end().0.min(start.0.saturating_add(room)));
                part.runs.push(PageRun::known(start, end));
                room -= end.0 - start.0;
                start = end;
                if room == 0 {
                    parts.push(std::mem::take(&mut part));
                    room = pages_max.0;
                }
            }
        }
        if !part.is_empty() {
            parts.push(part);
        }
        parts
    }

    /// The wire form: per run the gap to the run before it (from page 0 for the first) and its
    /// count, each as a little-endian base-128 varint. The empty set is no bytes at all.
    pub fn to_wire(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 * self.runs.len());
        let mut end = 0;
        for run in &self.runs {
            write_varint(&mut bytes, run.start().0 - end);
            write_varint(&mut bytes, run.count().0);
            end = run.end().0;
        }
        bytes
    }

    /// Reads the wire form. The bytes must be exactly what [`PageSet::to_wire`] makes of the set.
    pub fn from_wire(bytes: &[u8]) -> Result<Self, PageSetError> {
        if WIRE_BYTES_MAX < bytes.len() {
            return Err(PageSetError::TooLong(bytes.len()));
        }
        let mut runs = Vec::new();
        let mut rest = bytes;
        let mut end = 0_u64;
        while !rest.is_empty() {
            let run = runs.len();
            if run == RUNS_MAX {
                return Err(PageSetError::TooManyRuns);
            }
            let gap = read_varint(&mut rest, run)?;
            let count = read_varint(&mut rest, run)?;
            if gap == 0 && 0 < run {
                return Err(PageSetError::Touching { run });
            }
            let start = PageIndex(end.saturating_add(gap));
            let page_run = PageRun::new(start, PageCount(count))
                .map_err(|source| PageSetError::Run { run, source })?;
            end = page_run.end().0;
            runs.push(page_run);
        }
        Ok(Self { runs })
    }

    /// Adds a run that starts nowhere before the last run's start.
    fn append(&mut self, run: PageRun) {
        match self.runs.last_mut() {
            Some(last) if run.start() <= last.end() => {
                *last = PageRun::known(last.start(), last.end().max(run.end()));
            }
            Some(_) | None => self.runs.push(run),
        }
    }

    fn runs_extend(&mut self, run: Option<&PageRun>) {
        if let Some(run) = run {
            self.append(*run);
        }
    }
}

impl FromIterator<PageRun> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageRun>>(runs: I) -> Self {
        Self::from_runs(runs)
    }
}

impl From<PageRun> for PageSet {
    fn from(run: PageRun) -> Self {
        Self { runs: vec![run] }
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(&self.runs).finish()
    }
}

/// The pages of `wanted` that are not `held`: what has still to be sent.
pub fn missing(wanted: &PageSet, held: &PageSet) -> PageSet {
    wanted.difference(held)
}

fn write_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while VARINT_CONTINUES <= value {
        // The cast keeps the low bits, which is what is wanted of them.
        bytes.push(value as u8 | VARINT_CONTINUES as u8);
        value >>= VARINT_BITS;
    }
    bytes.push(value as u8);
}

fn read_varint(rest: &mut &[u8], run: usize) -> Result<u64, PageSetError> {
    let mut value = 0;
    let mut shift = 0;
    loop {
        let (&byte, tail) = rest.split_first().ok_or(PageSetError::Truncated { run })?;
        *rest = tail;
        let bits = u64::from(byte) & (VARINT_CONTINUES - 1);
        let last = u64::from(byte) < VARINT_CONTINUES;
        // One spelling per number: no trailing zero group, no bit beyond the 64th.
        if VARINT_SHIFT_MAX < shift || (shift == VARINT_SHIFT_MAX && 1 < bits) {
            return Err(PageSetError::Number { run });
        }
        if last && bits == 0 && 0 < shift {
            return Err(PageSetError::Number { run });
        }
        value |= bits << shift;
        if last {
            return Ok(value);
        }
        shift += VARINT_BITS;
    }
}

/// Value bits in each byte of a varint.
const VARINT_BITS: u32 = 7;
/// The bit that says that another byte follows.
const VARINT_CONTINUES: u64 = 1 << VARINT_BITS;
/// The shift of the tenth and last byte of a 64-bit number.
const VARINT_SHIFT_MAX: u32 = 63;

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
