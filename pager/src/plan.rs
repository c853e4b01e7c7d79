//! The plan of a fill: which pages of which space are missing, and where their contents are.
//!
//! Pending runs come in a memfd: pairs of little-endian `u64`, first page and count, ascending and
//! neither overlapping nor touching being usual but not needed. A page that is not listed is zero,
//! or is restored by CRIU itself. Listing a page that is zero costs its copy.
//! Some of them may be absent: their contents come to the store later. That list has the same form.
//! Guard pages (`MADV_GUARD_INSTALL`) must not be listed: filling one takes its guard away.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_pages::store::MemoryFile;
use pageferry_proto::id::SpaceId;
use pageferry_proto::page::{PageCount, PageIndex, PageRun, PageRunError};
use pageferry_proto::set::{PageSet, RUNS_MAX};

use crate::message::SPACES_MAX;

/// What is known of each space before a restore.
#[derive(Debug, Default)]
pub struct Plan {
    spaces: BTreeMap<SpaceId, Planned>,
}

/// One space.
#[derive(Debug)]
pub struct Planned {
    /// Where the contents of its pages are.
    pub store: MemoryFile,
    /// Which pages are missing; absent until told.
    pub pending: Option<PageSet>,
    /// Those of them whose contents are not in the store yet.
    pub absent: PageSet,
}

/// Why something cannot be part of a plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Runs cannot be read or written.
    #[error("cannot use the list of pending pages")]
    Runs(#[source] io::Error),
    /// Not pairs of numbers, or too many.
    #[error("list of pending pages has {0} bytes, not pairs of numbers or more than {RUNS_MAX}")]
    Length(u64),
    /// A pair that is not a run.
    #[error("list of pending pages is not one of runs")]
    Run(#[source] PageRunError),
    /// A store that cannot be used.
    #[error("cannot use the store of space {}", space.0)]
    Store {
        /// Which space.
        space: SpaceId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Pages of a space whose store was never told.
    #[error("space {} is planned but has no store", .0.0)]
    Storeless(SpaceId),
    /// Pages are to come that are not planned.
    #[error("pages of space {} are absent, and not planned", .0.0)]
    Unplanned(SpaceId),
    /// A store whose pages were never told.
    #[error("space {} has a store but is not planned", .0.0)]
    Planless(SpaceId),
    /// Not as many spaces as the restore is to have.
    #[error("{planned} spaces are planned, but {expected} are to be restored")]
    Count {
        /// How many there are.
        planned: usize,
        /// How many there should be.
        expected: u32,
    },
    /// More than [`SPACES_MAX`].
    #[error("more than {SPACES_MAX} spaces")]
    TooMany,
}

impl Plan {
    /// The store of a space; another one for the same space takes its place.
    pub fn store(&mut self, space: SpaceId, fd: OwnedFd) -> Result<(), PlanError> {
        if self.spaces.len() == SPACES_MAX && !self.spaces.contains_key(&space) {
            return Err(PlanError::TooMany);
        }
        let store = MemoryFile::new(fd).map_err(|source| PlanError::Store { space, source })?;
        self.spaces.insert(
            space,
            Planned {
                store,
                pending: None,
                absent: PageSet::new(),
            },
        );
        Ok(())
    }

    /// The missing pages of a space.
    pub fn pending(&mut self, space: SpaceId, runs: OwnedFd) -> Result<(), PlanError> {
        let planned = self
            .spaces
            .get_mut(&space)
            .ok_or(PlanError::Storeless(space))?;
        planned.pending = Some(read_runs(&File::from(runs))?);
        Ok(())
    }

    /// Which of the missing pages of a space have not come to its store.
    pub fn absent(&mut self, space: SpaceId, runs: OwnedFd) -> Result<(), PlanError> {
        let planned = self.spaces.get_mut(&space);
        let planned = planned.ok_or(PlanError::Storeless(space))?;
        let pending = planned.pending.as_ref().ok_or(PlanError::Planless(space))?;
        let absent = read_runs(&File::from(runs))?;
        if !pending.is_superset(&absent) {
            return Err(PlanError::Unplanned(space));
        }
        planned.absent = absent;
        Ok(())
    }

    /// What is absent of all spaces.
    pub fn take_absent(&mut self) -> BTreeMap<SpaceId, PageSet> {
        let spaces = self.spaces.iter_mut();
        spaces
            .map(|(space, planned)| (*space, std::mem::take(&mut planned.absent)))
            .collect()
    }

    /// The spaces, if the plan is whole: `expected` of them, each with its store and its pages.
    pub fn complete(&self, expected: u32) -> Result<(), PlanError> {
        if let Some((space, _)) = self.spaces.iter().find(|(_, each)| each.pending.is_none()) {
            return Err(PlanError::Planless(*space));
        }
        let planned = self.spaces.len();
        if u32::try_from(planned) != Ok(expected) {
            return Err(PlanError::Count { planned, expected });
        }
        Ok(())
    }

    /// Takes a space out, to be served.
    pub fn take(&mut self, space: SpaceId) -> Option<(MemoryFile, PageSet)> {
        let planned = self.spaces.remove(&space)?;
        Some((planned.store, planned.pending.unwrap_or_default()))
    }

    /// A space that has not been taken.
    pub fn first(&self) -> Option<SpaceId> {
        self.spaces.keys().next().copied()
    }

    /// Pages planned in the spaces that have not been taken.
    pub fn pages(&self) -> PageCount {
        let sets = self
            .spaces
            .values()
            .filter_map(|planned| planned.pending.as_ref());
        sets.map(PageSet::len).sum()
    }
}

/// Writes pending runs into a memfd.
pub fn write_runs(set: &PageSet) -> Result<OwnedFd, PlanError> {
    let mut bytes = Vec::with_capacity(RUN_BYTES * set.runs().len());
    for run in set.runs() {
        bytes.extend_from_slice(&run.start().0.to_le_bytes());
        bytes.extend_from_slice(&run.count().0.to_le_bytes());
    }
    let fd = memfd_create("pending", MFdFlags::MFD_CLOEXEC);
    let file = File::from(fd.map_err(|errno| PlanError::Runs(errno.into()))?);
    file.write_all_at(&bytes, 0).map_err(PlanError::Runs)?;
    Ok(file.into())
}

/// The pages that a list has.
pub fn read_runs(file: &File) -> Result<PageSet, PlanError> {
    let length = file.metadata().map_err(PlanError::Runs)?.len();
    if (RUN_BYTES * RUNS_MAX) as u64 <= length || length % RUN_BYTES as u64 != 0 {
        return Err(PlanError::Length(length));
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| PlanError::Length(length))?];
    file.read_exact_at(&mut bytes, 0).map_err(PlanError::Runs)?;
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes of 16"));
    bytes
        .chunks_exact(RUN_BYTES)
        .map(|pair| {
            let (start, count) = pair.split_at(8);
            PageRun::new(PageIndex(word(start)), PageCount(word(count))).map_err(PlanError::Run)
        })
        .collect()
}

/// Bytes of one run in a list.
const RUN_BYTES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> OwnedFd {
        memfd_create("store", MFdFlags::MFD_CLOEXEC).unwrap()
    }

    fn set(start: u64, count: u64) -> PageSet {
        PageSet::from(PageRun::new(PageIndex(start), PageCount(count)).unwrap())
    }

    #[test]
    fn a_plan_is_complete_when_every_space_has_store_and_pages() {
        let mut plan = Plan::default();
        let runs = || write_runs(&set(5, 6)).unwrap();
        assert!(matches!(
            plan.pending(SpaceId(1), runs()),
            Err(PlanError::Storeless(SpaceId(1)))
        ));
        plan.store(SpaceId(1), store()).unwrap();
        assert!(matches!(
            plan.complete(1),
            Err(PlanError::Planless(SpaceId(1)))
        ));
        plan.pending(SpaceId(1), runs()).unwrap();
        assert!(matches!(plan.complete(2), Err(PlanError::Count { .. })));
        plan.complete(1).unwrap();
        let unplanned = plan.absent(SpaceId(1), write_runs(&set(5, 7)).unwrap());
        assert!(matches!(unplanned, Err(PlanError::Unplanned(SpaceId(1)))));
        plan.absent(SpaceId(1), write_runs(&set(7, 2)).unwrap())
            .unwrap();
        assert_eq!(
            plan.take_absent(),
            BTreeMap::from([(SpaceId(1), set(7, 2))])
        );
        assert_eq!(plan.pages(), PageCount(6));
        assert_eq!(plan.take(SpaceId(1)).unwrap().1, set(5, 6));
        assert!(plan.take(SpaceId(1)).is_none());
    }

    #[test]
    fn lists_that_are_not_runs_are_refused() {
        let list = |bytes: &[u8]| {
            let file = File::from(store());
            file.write_all_at(bytes, 0).unwrap();
            read_runs(&file)
        };
        assert_eq!(list(&[]).unwrap(), PageSet::new());
        assert!(matches!(list(&[0; 15]), Err(PlanError::Length(15))));
        assert!(matches!(list(&[0; 16]), Err(PlanError::Run(_))));
    }
}
