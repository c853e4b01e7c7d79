//! One tree of a workload with all that is done to it alone, and the trees together.
//!
//! A workload that is no party has one. Of a party each is a container, with a pid namespace, a
//! cgroup, a CRIU and a folder of its own; all have one network.
//!
//! Invariant: members are in the order of their numbers, and there is a first one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::id::MemberIndex;
use pageferry_proto::wire::code::Failure;

use super::dumping::Dumping;
use super::failure::freeze_failed;
use super::folders::Members as Pids;
use super::locked::FileLocks;
use super::tracking::Tracking;
use super::workload::Workload;

/// A tree, and what is done to it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) workload: Workload,
    pub(super) tracking: Tracking,
    pub(super) dumping: Dumping,
    pub(super) locks: FileLocks,
}

/// All trees of a workload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trees<'a>(&'a [Member]);

impl<'a> Trees<'a> {
    /// Those of these members.
    pub(super) fn of(members: &'a [Member]) -> Self {
        Self(members)
    }

    /// Each of them.
    pub(super) fn iter(self) -> impl Iterator<Item = &'a Workload> {
        self.0.iter().map(|member| &member.workload)
    }

    /// The first, which stands for all where they have the same.
    pub(super) fn first(self) -> &'a Workload {
        &self.0[0].workload
    }

    /// The pid of the root of the first.
    pub(super) fn root(self) -> i32 {
        self.first().root()
    }

    /// The cgroups that hold them.
    pub(super) fn freezers(self) -> Vec<Freezer> {
        self.iter().map(|tree| tree.freezer.clone()).collect()
    }

    /// The processes of all of them.
    pub(super) fn pids(self) -> Result<Vec<i32>, Failure> {
        let mut all = Vec::new();
        for tree in self.iter() {
            all.extend(tree.pids()?);
        }
        Ok(all)
    }

    /// Says the same at any time, to whoever looks elsewhere.
    pub(super) fn members(self) -> Pids {
        let freezers = self.freezers();
        Arc::new(move || {
            let mut all = Vec::new();
            for freezer in &freezers {
                let processes = freezer.processes();
                all.extend(processes.map_err(|error| freeze_failed(&error))?);
            }
            Ok(all)
        })
    }

    /// Fails if the root of one has ended.
    pub(super) fn check_roots(self) -> Result<(), Failure> {
        self.iter().try_for_each(Workload::check_root)
    }

    /// Thaws those whose cgroup may be frozen; all are tried.
    pub(super) fn let_run(self) -> Result<(), Failure> {
        self.iter().map(Workload::let_run).fold(Ok(()), Result::and)
    }
}

/// The folder of a member in that of its migration, which is the first one's own.
pub(super) fn folder(migration: &Path, member: MemberIndex) -> PathBuf {
    match member.number() {
        0 => migration.to_owned(),
        number => migration.join(number.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_member_has_the_folder_of_the_migration() {
        let migration = Path::new("/run/pageferry/m");
        let of = |number| folder(migration, MemberIndex::new(number).unwrap());
        assert_eq!(of(0), migration);
        assert_eq!(of(2), migration.join("2"));
    }
}
