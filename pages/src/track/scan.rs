//! The scans of a [`Space`].

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pageferry_proto::page::PageRun;
use pageferry_proto::set::PageSet;
use pageferry_sys::pagemap::Pagemap;

use super::eager::Eager;
use super::maps::{self, Flags, Mapping};
use super::walk::{Broken, Found, Look, Walker, walk_all, walk_until};
use super::{FinalScan, LATE_BIRTH_BYTES_MAX, Scan, Space, TrackError, refuse, task};

/// A scan under way. What it has found so far is dirty, also if it is given up.
#[derive(Debug)]
pub struct Scanning<'a> {
    space: &'a mut Space,
    began: Instant,
    /// As they were last looked at.
    maps: Vec<Mapping>,
    /// What is to be walked still, sorted.
    todo: Vec<Range<u64>>,
    /// What was found to be another mapping than the one that was registered.
    replaced: PageSet,
    /// How often such were registered and walked again.
    again: u32,
    found: Found,
}

impl Space {
    /// Returns what is dirty and protects it, so that only what is written from now on is dirty in
    /// the next scan. Finds and registers new mappings. The process runs meanwhile.
    pub fn scan(&mut self) -> Result<Scan, TrackError> {
        let mut scanning = self.begin_scan()?;
        while !scanning.is_walked() {
            scanning.walk(None)?;
            scanning.register_replaced()?;
        }
        scanning.end()
    }

    /// Begins the same for a caller who decides when the memory is walked. The process runs.
    pub fn begin_scan(&mut self) -> Result<Scanning<'_>, TrackError> {
        let began = Instant::now();
        let maps = self.read_maps()?;
        self.check_mappings(&maps)?;
        self.adopt(&maps)?;
        self.check_registered()?;
        Ok(Scanning {
            todo: self.scannable(&maps),
            space: self,
            began,
            maps,
            replaced: PageSet::new(),
            again: 0,
            found: Found::default(),
        })
    }

    /// After walks that broke: what they may have protected without telling is not registered any
    /// more, so that it will be unprotected and found dirty. Returns those pages; any error but
    /// that of an untracked mapping is returned instead.
    pub(super) fn disown(&mut self, broken: Vec<Broken>) -> Result<PageSet, TrackError> {
        let runs = broken
            .iter()
            .filter_map(|broken| PageRun::touching(&broken.rest).ok());
        let pages = PageSet::from_runs(runs);
        self.registered = self.registered.difference(&pages);
        match broken
            .into_iter()
            .find(|broken| !is_untracked(&broken.source))
        {
            Some(broken) => Err(self.scanning(broken)),
            None => Ok(pages),
        }
    }

    /// Returns what the frozen process has, and what of it is dirty. Protects nothing.
    ///
    /// Mappings no round has seen are taken in too, up to [`LATE_BIRTH_BYTES_MAX`]; with more, the
    /// freeze must be given up for another round ([`TrackError::LateBirth`]).
    pub fn final_scan(&mut self) -> Result<FinalScan, TrackError> {
        let began = Instant::now();
        let (smaps, smaps_rendered) = self.render_smaps()?;
        let mappings = maps::parse_smaps(&smaps).ok_or_else(maps::unknown_form);
        let mappings = mappings.map_err(|source| self.inspecting("maps", source))?;
        let forbidden =
            |(mapping, flags): &(Mapping, Flags)| refuse::mapping(self.pid, mapping, *flags);
        if let Some(failure) = mappings.iter().find_map(forbidden) {
            return Err(failure.into());
        }
        let pagemap = self.open_pagemap()?;
        let mut walker = Walker::new(self.support.guard);
        let mut eager = Eager::default();
        let mut hidden: Vec<(u64, u64)> = Vec::new();
        let (mut tracked, mut untracked) = (Vec::new(), Vec::new());
        for (mapping, flags) in &mappings {
            if !mapping.is_lazy(*flags) {
                eager.add(self.pid, mapping, *flags, &pagemap, &mut walker);
                continue;
            }
            extend(&mut hidden, &mapping.range);
            let ranges = if self.is_registered(mapping) {
                &mut tracked
            } else {
                &mut untracked
            };
            ranges.push(mapping.range.clone());
        }
        let (found, late) = self.walk_frozen(&pagemap, &tracked, untracked)?;
        self.check_alive()?;
        let late_bytes = late.live_pages().bytes();
        if LATE_BIRTH_BYTES_MAX < late_bytes {
            return Err(TrackError::LateBirth {
                pid: self.pid,
                bytes: late_bytes,
            });
        }
        let guards = found.guards().union(&late.guards());
        let (mut live, mut dirty) = found.into_sets();
        let (late, _) = late.into_sets();
        live.union_with(&late);
        dirty.union_with(&late);
        dirty.union_with(&self.owed.intersection(&live));
        self.shown = smaps_rendered.then(|| Arc::from(smaps.as_slice()));
        Ok(FinalScan {
            dirty,
            live,
            hidden,
            guards: addresses(&guards),
            smaps,
            smaps_rendered,
            eager,
            duration: began.elapsed(),
        })
    }

    /// Nothing that was returned so far counts: everything is dirty.
    pub fn begin_anew(&mut self) {
        self.owed.union_with(&self.registered);
    }

    /// What is found in the tracked ranges, and what in those no round has seen.
    fn walk_frozen(
        &self,
        pagemap: &Pagemap,
        tracked: &[Range<u64>],
        mut untracked: Vec<Range<u64>>,
    ) -> Result<(Found, Found), TrackError> {
        let walked = walk_all(pagemap, self.support.guard, tracked, Look::Tracked);
        for broken in walked.broken {
            // Replaced since the last round. Nothing was protected by this walk, so what it has
            // found up to there is right; only the rest is unknown.
            if !is_untracked(&broken.source) {
                return Err(self.scanning(broken));
            }
            untracked.push(broken.rest);
        }
        untracked.sort_by_key(|range| range.start);
        let late = walk_all(pagemap, self.support.guard, &untracked, Look::Any);
        match late.broken.into_iter().next() {
            Some(broken) => Err(self.scanning(broken)),
            None => Ok((walked.found, late.found)),
        }
    }

    /// The smaps for CRIU, and whether it is rendered.
    fn render_smaps(&self) -> Result<(Vec<u8>, bool), TrackError> {
        self.check_identity()?;
        if let Some(record) = &self.recorded {
            let maps = maps::read_text(self.pid);
            let maps = maps.map_err(|source| self.inspecting("maps", source))?;
            match record.smaps.render(&maps) {
                Ok(text) => return Ok((text, true)),
                Err(error) => tracing::debug!(pid = self.pid, %error, "reading the true smaps"),
            }
        }
        let text = maps::read_smaps_text(self.pid);
        Ok((
            text.map_err(|source| self.inspecting("smaps", source))?,
            false,
        ))
    }

    /// Registers the mappings that are not registered yet, and forgets those that are gone.
    pub(super) fn adopt(&mut self, maps: &[Mapping]) -> Result<(), TrackError> {
        let followed = || maps.iter().filter(|mapping| mapping.is_private_anonymous());
        self.registered = self.registered.intersection(&pages(followed()));
        for mapping in followed() {
            let Some(pages) = mapping.pages() else {
                continue;
            };
            if !self.is_registered(mapping) {
                self.register(mapping, pages)?;
            }
        }
        Ok(())
    }

    fn register(&mut self, mapping: &Mapping, pages: PageRun) -> Result<(), TrackError> {
        let Range { start, end } = mapping.range;
        if let Err(source) = self.tracker.register(start, end) {
            let pid = self.pid;
            return match source.raw_os_error() {
                // Gone or changed since maps was read, or of a kind that cannot be tracked
                // (droppable): it stays untracked, and eager unless a later round can register it.
                Some(libc::ENOMEM | libc::EINVAL | libc::ENOENT | libc::EPERM) => Ok(()),
                Some(libc::EBUSY) => Err(TrackError::Foreign { pid, start, end }),
                Some(libc::ESRCH) => Err(self.lost()),
                Some(_) | None => {
                    let what = "register";
                    Err(TrackError::Register {
                        pid,
                        what,
                        start,
                        end,
                        source,
                    })
                }
            };
        }
        let missing = PageSet::from(pages).difference(&self.registered);
        missing
            .runs()
            .iter()
            .try_for_each(|run| self.unprotect(*run))
    }

    /// Pages of a mapping new to us may be protected: by a walk that broke before it could tell,
    /// or, on kernels before 6.13, since before they were moved here. Those would pass for
    /// unwritten, and the moved ones would even be writable. Takes their protection off; then the
    /// run is registered.
    ///
    /// To look for them first costs 3 ms per GiB, to unprotect everything 26 ms.
    fn unprotect(&mut self, run: PageRun) -> Result<(), TrackError> {
        let range = run.address()..run.address() + run.bytes();
        let pagemap = self.open_pagemap()?;
        let walked = walk_all(&pagemap, self.support.guard, &[range], Look::Tracked);
        if let Some(broken) = walked.broken.into_iter().next() {
            // Replaced or unmapped in between: not registered, so it is met again.
            let untracked = is_untracked(&broken.source);
            return if untracked {
                Ok(())
            } else {
                Err(self.scanning(broken))
            };
        }
        let (live, written) = walked.found.into_sets();
        let protected = live.difference(&written);
        // Off a page that is lost the kernel takes no protection (`change_pte_range` passes over
        // poison markers), so that a scan would not find it.
        self.owed.union_with(&protected);
        for run in protected.runs() {
            let (start, end) = (run.address(), run.address() + run.bytes());
            let Err(source) = self.tracker.unprotect(start, end) else {
                continue;
            };
            return match source.raw_os_error() {
                Some(libc::ENOENT) => Ok(()),
                Some(libc::ESRCH) => Err(self.lost()),
                Some(_) | None => {
                    let (pid, what) = (self.pid, "unprotect");
                    Err(TrackError::Register {
                        pid,
                        what,
                        start,
                        end,
                        source,
                    })
                }
            };
        }
        self.registered.insert(run);
        Ok(())
    }

    /// What is not lazy, by the flags of the last record.
    fn forecast_eager(&self, maps: &[Mapping]) -> Result<Eager, TrackError> {
        let pagemap = self.open_pagemap()?;
        let mut walker = Walker::new(self.support.guard);
        let mut eager = Eager::default();
        for mapping in maps {
            let flags = self.recorded_flags(mapping);
            if !mapping.is_lazy(flags) || !self.is_registered(mapping) {
                eager.add(self.pid, mapping, flags, &pagemap, &mut walker);
            }
        }
        Ok(eager)
    }

    /// What shows in `maps`, or in the flags of the last record.
    fn check_mappings(&self, maps: &[Mapping]) -> Result<(), TrackError> {
        let forbidden =
            |mapping: &Mapping| refuse::mapping(self.pid, mapping, self.recorded_flags(mapping));
        match maps.iter().find_map(forbidden) {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }

    fn recorded_flags(&self, mapping: &Mapping) -> Flags {
        let special = self.recorded.iter().flat_map(|record| &record.special);
        let touches = |other: &&(Mapping, Flags)| {
            other.0.range.start < mapping.range.end && mapping.range.start < other.0.range.end
        };
        special
            .filter(touches)
            .fold(Flags::default(), |flags, (_, more)| flags.with(*more))
    }

    fn scannable(&self, maps: &[Mapping]) -> Vec<Range<u64>> {
        let scanned = maps.iter().filter(|mapping| is_scanned(mapping));
        let registered = scanned.filter(|mapping| self.is_registered(mapping));
        registered.map(|mapping| mapping.range.clone()).collect()
    }

    fn is_registered(&self, mapping: &Mapping) -> bool {
        mapping
            .pages()
            .is_some_and(|run| self.registered.covers(&run))
    }

    pub(super) fn read_maps(&self) -> Result<Vec<Mapping>, TrackError> {
        self.check_identity()?;
        maps::read(self.pid).map_err(|source| self.inspecting("maps", source))
    }

    /// Opened anew for every scan: an old one would show the memory before an exec.
    fn open_pagemap(&self) -> Result<Pagemap, TrackError> {
        Pagemap::open(self.pid).map_err(|source| self.inspecting("pagemap", source))
    }

    fn check_identity(&self) -> Result<(), TrackError> {
        let same = task::start_time(self.pid).is_ok_and(|time| time == self.start_time);
        if same && super::is_alive(self.reader.pidfd()) {
            return Ok(());
        }
        Err(TrackError::Gone { pid: self.pid })
    }

    /// If nothing at all is tracked, the process has other memory now than our descriptor, which
    /// somebody else keeps alive.
    fn check_registered(&self) -> Result<(), TrackError> {
        if self.registered.is_empty() {
            return Err(TrackError::Exec { pid: self.pid });
        }
        Ok(())
    }

    /// Whether the memory our descriptor belongs to is still there. A scan cannot tell: without it
    /// it finds nothing, and succeeds.
    pub(super) fn check_alive(&self) -> Result<(), TrackError> {
        // Any call that looks at the memory will do. This one takes protection off a page that is
        // never mapped, or if so, is part of the stack; there it makes one page dirty.
        let probe = self
            .tracker
            .unprotect(LAST_USER_PAGE, LAST_USER_PAGE + 4096);
        match probe {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(self.lost()),
            Ok(()) | Err(_) => self.check_identity(),
        }
    }

    /// The memory of our descriptor is gone: with the process, or by an exec.
    fn lost(&self) -> TrackError {
        let pid = self.pid;
        if self.check_identity().is_err() || task::has_ended(pid) {
            return TrackError::Gone { pid };
        }
        TrackError::Exec { pid }
    }

    pub(super) fn scanning(&self, Broken { rest, source }: Broken) -> TrackError {
        // A process that ends loses its memory before anything else says so.
        if source.raw_os_error() == Some(libc::ESRCH) {
            return self.lost();
        }
        TrackError::Scan {
            pid: self.pid,
            start: rest.start,
            end: rest.end,
            source,
        }
    }

    fn inspecting(&self, what: &'static str, source: std::io::Error) -> TrackError {
        if self.check_identity().is_err() {
            return TrackError::Gone { pid: self.pid };
        }
        TrackError::Inspect {
            pid: self.pid,
            what,
            source,
        }
    }
}

impl Scanning<'_> {
    /// Whether there is nothing left to walk, nor to register.
    pub fn is_walked(&self) -> bool {
        self.todo.is_empty() && self.replaced.is_empty()
    }

    /// Walks and protects what is left, until then; without a time, all of it. However late it is,
    /// some of it is walked.
    pub fn walk(&mut self, until: Option<Instant>) -> Result<(), TrackError> {
        let pagemap = self.space.open_pagemap()?;
        let guard = self.space.support.guard;
        let walked = walk_until(&pagemap, guard, &self.todo, Look::Protect, until);
        self.found.append(walked.found);
        self.todo = walked.left;
        let replaced = self.space.disown(walked.broken)?;
        self.replaced.union_with(&replaced);
        self.space.check_registered()
    }

    /// What is left to be walked: for [`Scanning::walk_again`].
    pub fn todo(&self) -> Vec<Range<u64>> {
        self.todo.clone()
    }

    /// What was walked since `todo` was asked for is to be walked once more.
    pub fn walk_again(&mut self, todo: Vec<Range<u64>>) {
        self.todo = todo;
    }

    /// Registers the mappings that walks found in the place of others, to be walked too. The
    /// process may run.
    pub fn register_replaced(&mut self) -> Result<(), TrackError> {
        let replaced = std::mem::take(&mut self.replaced);
        if replaced.is_empty() {
            return Ok(());
        }
        self.again += 1;
        if REPLACED_MAX <= self.again {
            // It maps faster than we look: the rest is not registered, and is found in the next
            // round.
            return Ok(());
        }
        self.maps = self.space.read_maps()?;
        self.space.adopt(&self.maps)?;
        let mut more = self.space.scannable(&self.maps);
        more.retain(|range| overlaps(&replaced, range));
        self.todo.append(&mut more);
        self.todo.sort_unstable_by_key(|range| range.start);
        Ok(())
    }

    /// What it has found. The process runs.
    pub fn end(mut self) -> Result<Scan, TrackError> {
        let live = self.keep_found();
        let space = &mut *self.space;
        space.check_mappings(&space.read_maps()?)?;
        let eager = space.forecast_eager(&self.maps)?;
        space.check_alive()?;
        let dirty = space.owed.intersection(&live);
        // What is owed in a mapping that is executable now stays owed until it is scanned again.
        let unscanned = pages(self.maps.iter().filter(|mapping| !is_scanned(mapping)));
        space.owed = space.owed.intersection(&unscanned);
        Ok(Scan {
            dirty,
            live_pages: live.len(),
            eager,
            duration: self.began.elapsed(),
        })
    }

    /// Has what was found written owed, before anything can fail: these pages are protected and
    /// would not be found again. Returns the live ones.
    fn keep_found(&mut self) -> PageSet {
        let (live, written) = std::mem::take(&mut self.found).into_sets();
        self.space.owed.union_with(&written);
        live
    }
}

impl Drop for Scanning<'_> {
    fn drop(&mut self) {
        self.keep_found();
    }
}

/// Whether a walk met a mapping that is not tracked.
fn is_untracked(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

/// Executable memory is registered, but its writes are left to wait: it is eager while it is so.
fn is_scanned(mapping: &Mapping) -> bool {
    mapping.is_private_anonymous() && !mapping.executable
}

fn pages<'a>(mappings: impl Iterator<Item = &'a Mapping>) -> PageSet {
    PageSet::from_runs(mappings.filter_map(Mapping::pages))
}

/// Start and end of each run, in bytes.
fn addresses(set: &PageSet) -> Vec<(u64, u64)> {
    let runs = set.runs().iter();
    runs.map(|run| (run.address(), run.address() + run.bytes()))
        .collect()
}

fn overlaps(set: &PageSet, range: &Range<u64>) -> bool {
    PageRun::touching(range).is_ok_and(|run| !set.intersection(&PageSet::from(run)).is_empty())
}

/// Appends a range that begins at or after the end of the last one.
fn extend(ranges: &mut Vec<(u64, u64)>, range: &Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.1 == range.start => last.1 = range.end,
        Some(_) | None => ranges.push((range.start, range.end)),
    }
}

/// How often one scan looks again at mappings that were replaced while it ran.
const REPLACED_MAX: u32 = 8;

/// The last page of user memory on x86-64 with four-level page tables.
const LAST_USER_PAGE: u64 = 0x7fff_ffff_e000;
