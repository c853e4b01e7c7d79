//! The pages of one address space.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::pwritev;
use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::ledger::HeldPages;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;

use super::digests::Digests;
use super::{ADDRESS_MAX, StoreError};
use crate::pages::decode::{Decoder, PageSink, Parcel};

/// The pages of one address space.
#[derive(Debug)]
pub struct SpaceStore {
    id: SpaceId,
    memory: File,
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

fn hold(held: &mut HeldPages, data: &PageSet, zero: &PageSet) {
    move_runs(data, &mut held.zero, &mut held.data);
    move_runs(zero, &mut held.data, &mut held.zero);
}

fn forget(held: &mut HeldPages, pages: &PageSet) {
    held.data = held.data.difference(pages);
    held.zero = held.zero.difference(pages);
}

/// Run by run: later rounds bring few pages that were not held before, and a merge of whole sets
/// for every parcel would cost as much as there are runs in all.
fn move_runs(pages: &PageSet, from: &mut PageSet, to: &mut PageSet) {
    for run in pages.runs() {
        if !to.covers(run) {
            to.insert(*run);
        }
        if !overlapping(from, run).is_empty() {
            from.remove(*run);
        }
    }
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
        let name = format!("pageferry-{id}");
        let create = || -> io::Result<File> {
            let file = File::from(memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC)?);
            file.set_len(ADDRESS_MAX)?;
            Ok(file)
        };
        let memory = create().map_err(|source| StoreError::Create { space: id, source })?;
        Ok(Self {
            id,
            memory,
            turn: Mutex::default(),
            held: Mutex::default(),
            digests: digests.then(Mutex::default),
            used,
        })
    }

    /// A store over a file that another process filled, of which `held` is known.
    pub fn reopen(id: SpaceId, memory: OwnedFd, held: HeldPages) -> Self {
        let used = Arc::new(AtomicU64::new(held.data.len().0));
        Self {
            id,
            memory: File::from(memory),
            turn: Mutex::default(),
            held: Mutex::new(held),
            digests: None,
            used,
        }
    }

    /// Which space it is.
    pub fn id(&self) -> SpaceId {
        self.id
    }

    /// The memory file: page `n` is at byte `n * 4096`; holes are zero pages.
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
        Ok(self.memory.metadata()?.st_blocks() * BLOCK_BYTES)
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
            self.punch_run(*run).map_err(|source| StoreError::Punch {
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

    fn change(&self, change: impl FnOnce(&mut HeldPages)) {
        let mut held = self.lock();
        let before = held.data.len().0;
        change(&mut held);
        let after = held.data.len().0;
        // Under the lock: nobody else changes this space's share of the sum.
        self.used
            .fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, HeldPages> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, start: PageIndex, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut offset = i64::try_from(start.address()).map_err(io::Error::other)?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        while !parts.is_empty() {
            match pwritev(&self.memory, parts, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += i64::try_from(written).map_err(io::Error::other)?;
                    IoSlice::advance_slices(&mut parts, written);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn empty(&self, run: PageRun) -> io::Result<()> {
        // Most zero pages were never anything else; only what has contents must be punched.
        let occupied = overlapping(&self.lock().data, &run).to_vec();
        occupied
            .iter()
            .filter_map(|held| held.intersection(&run))
            .try_for_each(|part| self.punch_run(part))
    }

    fn punch_run(&self, run: PageRun) -> io::Result<()> {
        let offset = |bytes: u64| i64::try_from(bytes).map_err(io::Error::other);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(
            &self.memory,
            mode,
            offset(run.address())?,
            offset(run.bytes())?,
        )?;
        Ok(())
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

/// Unit of `st_blocks`, in bytes.
const BLOCK_BYTES: u64 = 512;
