//! A place within a frozen cgroup that is somebody else's: he may thaw his own, and who is in here
//! stays frozen.
//!
//! Invariants: whoever comes here or leaves is frozen before and after; nobody is taken along that
//! was not named. Both versions of cgroups keep a folder frozen that was told so, whatever becomes
//! of the one it is in.

use std::time::Duration;

use crate::freezer::{CgroupError, Freezer};

/// Its name.
const WITHIN: &str = "pageferry-held";

/// How long the kernel may take to say that all are frozen, who were.
const FROZEN_MAX: Duration = Duration::from_secs(2);

/// Why nobody is held in here.
#[derive(Debug, thiserror::Error)]
pub enum WithinError {
    /// The kernel did not do it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Others are in the cgroup, too.
    #[error("process {0} is in the cgroup, too")]
    Other(i32),
    /// Somebody has thawed it.
    #[error("not all are frozen who were moved")]
    Thawed,
}

impl Freezer {
    /// Takes the processes `pids`, which are all that this frozen cgroup has, into a place within
    /// it that is frozen by itself.
    pub fn hold_within(&self, pids: &[i32]) -> Result<Self, WithinError> {
        let within = self.like(self.path().join(WITHIN));
        within.make()?;
        let within = within.known()?;
        within.begin_freeze()?;
        for pid in self.processes()? {
            if !pids.contains(&pid) {
                return Err(WithinError::Other(pid));
            }
            within.take_in_whole(pid)?;
        }
        match self.processes()?.first() {
            Some(other) => Err(WithinError::Other(*other)),
            None if within.wait_frozen(FROZEN_MAX)? => Ok(within),
            None => Err(WithinError::Thawed),
        }
    }

    fn take_in_whole(&self, pid: i32) -> Result<(), CgroupError> {
        match self.write("cgroup.procs", &pid.to_string()) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(self.io("moving a task into", error))
            }
            // One that has ended is nowhere.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// The place within this one, if there is one.
    pub fn held_within(&self) -> Option<Self> {
        let within = self.like(self.path().join(WITHIN));
        let is_there = self.exists() && within.exists();
        is_there.then(|| within.known().ok()).flatten()
    }

    /// Takes back whoever is in the place within this one, and removes that. They stay frozen.
    pub fn take_back(&self) -> Result<(), CgroupError> {
        let Some(within) = self.held_within() else {
            return Ok(());
        };
        self.begin_freeze()?;
        within.empty_into(self)?;
        // Who was moved counts as frozen only when that was asked anew.
        self.wait_frozen(FROZEN_MAX).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::freezer::FreezerRoot;
    use std::fs;
    use std::process::Command;

    #[test]
    fn who_is_held_within_stays_frozen_whoever_thaws_the_outer_one() {
        let name = format!("test-within-{}", std::process::id());
        let outer = FreezerRoot::detect().expect("a freezer").plan(&name);
        outer.make().expect("make");
        let outer = outer.known().expect("known");
        let mut children: Vec<_> = (0..2)
            .map(|_| Command::new("sleep").arg("1000").spawn().expect("sleep"))
            .collect();
        let pids: Vec<i32> = children.iter().map(|one| one.id().cast_signed()).collect();
        outer.adopt(|| Ok(pids.clone())).expect("adopt");
        outer.freeze().expect("freeze");
        let other = outer.hold_within(&pids[..1]).expect_err("a stranger");
        assert!(matches!(other, WithinError::Other(pid) if pid == pids[1]));
        outer.take_back().expect("back");
        assert!(outer.is_frozen().expect("state"));
        assert!(outer.held_within().is_none());
        let within = outer.hold_within(&pids).expect("held");
        outer.thaw().expect("thaw");
        assert!(within.is_frozen().expect("state") && outer.is_empty());
        assert_eq!(within.processes().expect("list"), pids);
        // A dead daemon has left it so.
        let found = outer.held_within().expect("found again");
        assert_eq!(found.path(), within.path());
        outer.take_back().expect("back");
        assert!(outer.is_frozen().expect("state"));
        assert_eq!(outer.processes().expect("list"), pids);
        assert!(!within.exists() && fs::read_dir(outer.path()).is_ok());
        outer
            .kill(Duration::ZERO)
            .expect_err("they are to be reaped");
        for child in &mut children {
            child.wait().expect("reaped");
        }
        outer.remove().expect("remove");
    }
}
