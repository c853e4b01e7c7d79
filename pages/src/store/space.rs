//! The pages of one address space.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::ledger::HeldPages;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;

use super::StoreError;
use super::digests::Digests;
use super::file::MemoryFile;
use crate::decode::{Decoder, PageSink, Parcel};

/// The pages of one address space.
#[derive(Debug)]
pub struct SpaceStore {
    id: SpaceId,
    memory: MemoryFile,
    /// Held while pages are written. The kernel lets one writer into a file at a time; the others
    /// spin for it, and take the processor from whoever could bring more.
    turn: Mutex<()>,
    /// What is in the file. Both sets have no page in common.
    held: Mutex<HeldPages>,
    /// Of what is in the file, if it is to be compared. Locked before the others.
    digests: Option<Mutex<Digests>>,
    /// Data pages of all spaces of the store.
    used: Arc<AtomicU64>,
}

/// How many pages with contents have come and gone.
struct Change {
    came: PageCount,
    gone: PageCount,
}

fn hold(held: &mut HeldPages, data: &PageSet, zero: &PageSet) -> Change {
    let came = add(data, &mut held.data);
    take_out(data, &mut held.zero);
    let gone = take_out(zero, &mut held.data);
    add(zero, &mut held.zero);
    Change { came, gone }
}

fn forget(held: &mut HeldPages, pages: &PageSet) -> Change {
    let gone = take_out(pages, &mut held.data);
    take_out(pages, &mut held.zero);
    let came = PageCount::ZERO;
    Change { came, gone }
}

/// Adds pages to a set; how many were not in it. A parcel of a later round brings few, far apart:
/// the runs that are there already are left out of the merge, which costs as much as there are runs
/// between the first and the last.
fn add(pages: &PageSet, to: &mut PageSet) -> PageCount {
    let uncovered = pages.runs().iter().filter(|run| !to.covers(run));
    let new = PageSet::from_runs(uncovered.copied());
    let there: PageCount = new.runs().iter().map(|run| to.count_of(run)).sum();
    to.union_with(&new);
    PageCount(new.len().0 - there.0)
}

/// Takes pages out of a set; how many were in it.
fn take_out(pages: &PageSet, from: &mut PageSet) -> PageCount {
    let there = pages.runs().iter().map(|run| (run, from.count_of(run)));
    let there = there.filter(|(_, count)| *count != PageCount::ZERO);
    let (runs, counts): (Vec<PageRun>, Vec<PageCount>) =
        there.map(|(run, count)| (*run, count)).unzip();
    from.difference_with(&PageSet::from_runs(runs));
    counts.into_iter().sum()
}

/// The runs of `set` that have pages of `run`.
fn overlapping<'a>(set: &'a PageSet, run: &PageRun) -> &'a [PageRun] {
    let runs = set.runs();
    let first = runs.partition_point(|held| held.end() <= run.start());
    let last = runs.partition_point(|held| held.start() < run.end());
    &runs[first..last.max(first)]
}

impl SpaceStore {
    /// An empty store, with digests or without.
    pub(super) fn create(
        id: SpaceId,
        used: Arc<AtomicU64>,
        digests: bool,
    ) -> Result<Self, StoreError> {
        let memory = MemoryFile::create(&format!("pageferry-{id}"));
        let memory = memory.map_err(|source| StoreError::Create { space: id, source })?;
        Ok(Self::over(id, memory, used, digests))
    }

    /// One of whose file nothing is known to be held.
    pub(super) fn over(
        id: SpaceId,
        memory: MemoryFile,
        used: Arc<AtomicU64>,
        digests: bool,
    ) -> Self {
        Self {
            id,
            memory,
            turn: Mutex::default(),
            held: Mutex::default(),
            digests: digests.then(Mutex::default),
            used,
        }
    }

    /// Which space it is.
    pub fn id(&self) -> SpaceId {
        self.id
    }

    /// The memory file, which [`MemoryFile::new`] takes.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// A copy of what is held.
    pub fn held(&self) -> HeldPages {
        self.lock().clone()
    }

    /// Pages that are held: with contents, and zero.
    pub fn held_pages(&self) -> (PageCount, PageCount) {
        let held = self.lock();
        (held.data.len(), held.zero.len())
    }

    /// Memory the file takes, in bytes.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.memory.resident_bytes()
    }

    pub(super) fn take(
        &self,
        decoder: &mut Decoder,
        parcel: &Parcel<'_>,
    ) -> Result<(), StoreError> {
        let (data, zero) = (parcel.data(), parcel.zero());
        match decoder.decode(parcel, self) {
            Ok(()) => {
                self.change(|held| hold(held, &data, &zero));
                Ok(())
            }
            Err(source) => {
                // Some of the pages may be overwritten: none of them is what it was held for.
                self.forget(&data.union(&zero));
                Err(StoreError::Decode {
                    space: self.id,
                    source,
                })
            }
        }
    }

    /// Gives up pages, held or not, and their memory.
    pub fn punch(&self, pages: &PageSet) -> Result<(), StoreError> {
        let _digests = self.forget(pages);
        for run in pages.runs() {
            self.memory
                .punch(*run)
                .map_err(|source| StoreError::Punch {
                    space: self.id,
                    page: run.start(),
                    source,
                })?;
        }
        Ok(())
    }

    /// The first page of `pages` that is not held, or whose digest is not the one of `theirs`,
    /// which has one for each of `pages`, in order. Without digests, that is the first of all.
    pub fn first_difference(&self, pages: &PageSet, theirs: &[u64]) -> Option<PageIndex> {
        match self.digests() {
            Some(digests) => digests.first_difference(&self.lock(), pages, theirs),
            None => pages.runs().first().map(PageRun::start),
        }
    }

    /// Takes pages out of what is held. The guard keeps others from putting digests of them in.
    fn forget(&self, pages: &PageSet) -> Option<MutexGuard<'_, Digests>> {
        let mut digests = self.digests();
        if let Some(digests) = &mut digests {
            pages.runs().iter().for_each(|run| digests.forget(*run));
        }
        self.change(|held| forget(held, pages));
        digests
    }

    fn digests(&self) -> Option<MutexGuard<'_, Digests>> {
        let digests = self.digests.as_ref()?;
        Some(digests.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut HeldPages) -> Change) {
        let mut held = self.lock();
        let Change { came, gone } = change(&mut held);
        // Under the lock: nobody else changes this space's share of the sum.
        self.used
            .fetch_add(came.0.wrapping_sub(gone.0), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, HeldPages> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, start: PageIndex, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.memory.write(start, parts)
    }

    fn empty(&self, run: PageRun) -> io::Result<()> {
        // Most zero pages were never anything else; only what has contents must be punched.
        let occupied = overlapping(&self.lock().data, &run).to_vec();
        occupied
            .iter()
            .filter_map(|held| held.intersection(&run))
            .try_for_each(|part| self.memory.punch(part))
    }
}

impl PageSink for SpaceStore {
    fn write(&self, start: PageIndex, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let Some(mut digests) = self.digests() else {
            return self.put(start, parts);
        };
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let run = PageRun::new(start, PageCount::covering(bytes)).map_err(io::Error::other)?;
        digests.forget(run);
        self.put(start, parts)?;
        digests.record(&self.memory, run)
    }

    fn clear(&self, run: PageRun) -> io::Result<()> {
        let Some(mut digests) = self.digests() else {
            return self.empty(run);
        };
        digests.forget(run);
        self.empty(run)?;
        digests.record_contents(&self.memory, run)
    }
}
