//! The freezer cgroup that holds a workload: the one thing that decides whether it runs.
//!
//! CRIU thaws a cgroup during its dump and holds the tasks by ptrace alone, so at its end the tasks
//! would run if CRIU or this daemon died. Therefore the cgroup is ours, it is frozen again at
//! post-dump, and a `Frozen` read back from the kernel is what a commit rests on.
//!
//! Invariants: a cgroup made here holds tasks of one workload only; it is removed when empty.
//! Both kernels' interfaces are known: the freezer hierarchy of cgroup v1, and `cgroup.freeze` of
//! cgroup v2. Absent: resource limits; the workload keeps those of its other hierarchies.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;

use crate::sys::task;

/// How long a freeze may take before it is given up: tasks in uninterruptible sleep do not freeze.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the kernel is asked whether a freeze is complete; a freeze takes 0.1–2 ms.
const FREEZE_POLL: Duration = Duration::from_micros(100);

/// How often it is looked whether tasks have died.
const KILL_POLL: Duration = Duration::from_millis(1);

/// State of a cgroup of the v1 hierarchy: `THAWED`, `FREEZING` or `FROZEN`.
const STATE_V1: &str = "freezer.state";

/// Whether a cgroup of the unified hierarchy should be frozen: 0 or 1.
const FREEZE_V2: &str = "cgroup.freeze";

/// How long tasks are moved before giving up on a tree that forks faster than it is moved, or has a
/// process that does not come to its end.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a freezer cgroup could not do its work.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// No freezer hierarchy is mounted.
    #[error("no cgroup freezer is mounted: mount the v1 freezer hierarchy or cgroup2")]
    NoFreezer,
    /// A directory that should be a cgroup with a freezer is none.
    #[error("{path} is not a cgroup with a freezer")]
    NotFreezer {
        /// The directory.
        path: PathBuf,
    },
    /// This process itself is in a cgroup that it must be able to freeze and kill.
    #[error("this process is itself in {path}")]
    Own {
        /// The cgroup.
        path: PathBuf,
    },
    /// A file of a cgroup could not be used.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The tasks did not freeze in time.
    #[error(
        "{path} did not freeze within {FREEZE_TIMEOUT:?}: a task may be in uninterruptible sleep"
    )]
    FreezeTimeout {
        /// The cgroup.
        path: PathBuf,
    },
    /// The tree kept forking while it was moved into the cgroup.
    #[error("the tree forks faster than its tasks can be moved into {path}")]
    Restless {
        /// The cgroup.
        path: PathBuf,
    },
    /// Tasks were still there when the cgroup had to be empty.
    #[error("{path} still holds {left} tasks after they were killed")]
    NotEmpty {
        /// The cgroup.
        path: PathBuf,
        /// How many tasks were left.
        left: usize,
    },
}

/// Which interface the kernel offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezerVersion {
    /// `freezer.state` of the v1 freezer hierarchy.
    V1,
    /// `cgroup.freeze` of the unified hierarchy.
    V2,
}

/// Where freezer cgroups are made on this node.
#[derive(Debug, Clone)]
pub struct FreezerRoot {
    directory: PathBuf,
    version: FreezerVersion,
}

impl FreezerRoot {
    /// Finds the freezer this node offers: the v1 hierarchy if it is mounted, else cgroup v2.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = PathBuf::from("/proc/self/mountinfo");
        let mounts = fs::read_to_string(&path).map_err(|source| CgroupError::Io {
            action: "reading",
            path,
            source,
        })?;
        Self::from_mountinfo(&mounts).ok_or(CgroupError::NoFreezer)
    }

    fn from_mountinfo(mounts: &str) -> Option<Self> {
        let mut unified = None;
        for line in mounts.lines() {
            let (left, right) = line.split_once(" - ")?;
            let point = PathBuf::from(left.split(' ').nth(4)?);
            let mut right = right.split(' ');
            let (kind, options) = (right.next()?, right.nth(1)?);
            if kind == "cgroup" && options.split(',').any(|option| option == "freezer") {
                let directory = point.join("pageferry");
                return Some(Self {
                    directory,
                    version: FreezerVersion::V1,
                });
            }
            if kind == "cgroup2" {
                unified.get_or_insert(point.join("pageferry"));
            }
        }
        unified.map(|directory| Self {
            directory,
            version: FreezerVersion::V2,
        })
    }

    /// The cgroup `name`, which need not exist yet.
    pub fn plan(&self, name: &str) -> Freezer {
        Freezer {
            path: self.directory.join(name),
            version: self.version,
        }
    }

    /// The cgroup that `pid` is in now, if this node can see it.
    pub fn current_of(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers) = (fields.next()?, fields.next()?);
            let ours = match self.version {
                FreezerVersion::V1 => controllers.split(',').any(|name| name == "freezer"),
                FreezerVersion::V2 => number == "0",
            };
            ours.then(|| fields.next()).flatten()
        })?;
        let inside = path.trim_start_matches('/');
        // A path that leaves the cgroup namespace names nothing that can be written here.
        let visible = !inside.split('/').any(|part| part == "..");
        visible
            .then(|| self.directory.parent().map(|root| root.join(inside)))
            .flatten()
    }

    /// The cgroup that holds all of `pids` and nothing else, if it is one of ours.
    pub fn holding(&self, pids: &[i32]) -> Option<Freezer> {
        let mut pids = pids.to_vec();
        pids.sort_unstable();
        for entry in fs::read_dir(&self.directory).ok()?.flatten() {
            let freezer = Freezer {
                path: entry.path(),
                version: self.version,
            };
            let Ok(held) = freezer.processes() else {
                continue;
            };
            if !held.is_empty() && held == pids {
                return Some(freezer);
            }
        }
        None
    }

    /// The interface in use.
    pub fn version(&self) -> FreezerVersion {
        self.version
    }
}

/// One workload's freezer cgroup.
#[derive(Debug, Clone)]
pub struct Freezer {
    path: PathBuf,
    version: FreezerVersion,
}

impl Freezer {
    /// A cgroup known by its path, as written in a journal.
    pub fn at(path: PathBuf) -> Self {
        let version = if path.join(STATE_V1).exists() {
            FreezerVersion::V1
        } else {
            FreezerVersion::V2
        };
        Self { path, version }
    }

    /// The cgroup at `path`, which must be there and not hold this process.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let path = path.to_owned();
        if !path.join(STATE_V1).exists() && !path.join(FREEZE_V2).exists() {
            return Err(CgroupError::NotFreezer { path });
        }
        let freezer = Self::at(path);
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        if freezer.processes()?.contains(&own) {
            return Err(CgroupError::Own { path: freezer.path });
        }
        Ok(freezer)
    }

    /// Makes it, empty and thawed, if it does not exist.
    pub fn make(&self) -> Result<(), CgroupError> {
        fs::create_dir_all(&self.path).map_err(|source| self.io("creating", source))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file into which a task writes its pid to join.
    pub fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Moves whole processes into the cgroup until `tree` finds none outside it.
    ///
    /// `tree` lists the pids of the workload afresh at each call; children of a moved process are
    /// born inside.
    pub fn adopt(&self, mut tree: impl FnMut() -> io::Result<Vec<i32>>) -> Result<(), CgroupError> {
        let deadline = Instant::now() + ADOPT_TIMEOUT;
        while Instant::now() < deadline {
            let pids = tree().map_err(|source| self.io("listing the tree for", source))?;
            let held: BTreeSet<i32> = self.processes()?.into_iter().collect();
            let outside = pids.into_iter().filter(|pid| !held.contains(pid));
            let outside: Vec<i32> = outside.filter(|pid| !task::has_ended(*pid)).collect();
            if outside.is_empty() {
                return Ok(());
            }
            let mut ending = false;
            for pid in outside {
                match fs::write(self.procs_file(), pid.to_string()) {
                    // It has ended meanwhile, or is ending, which takes as long as its memory is
                    // large.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => ending = true,
                    result => result.map_err(|source| self.io("moving a task into", source))?,
                }
            }
            if ending {
                std::thread::sleep(KILL_POLL);
            }
        }
        Err(CgroupError::Restless {
            path: self.path.clone(),
        })
    }

    /// The processes in it, ascending.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let text = fs::read_to_string(self.procs_file())
            .map_err(|source| self.io("reading the tasks of", source))?;
        let mut pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Whether no process is in it, also because it is not there any more.
    pub fn is_empty(&self) -> bool {
        match self.processes() {
            Ok(processes) => processes.is_empty(),
            Err(_) => !self.exists(),
        }
    }

    /// Asks the kernel to freeze all its tasks and not to let new ones run. Does not wait: a task
    /// that is in the kernel freezes on its way out.
    pub fn begin_freeze(&self) -> Result<(), CgroupError> {
        self.write_state(true)
    }

    /// Freezes and waits until the kernel says that every task is frozen. Blocks, at most
    /// [`FREEZE_TIMEOUT`]; on a time-out the cgroup is thawed again.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        self.begin_freeze()?;
        while !self.is_frozen()? {
            if Instant::now() > deadline {
                self.write_state(false)?;
                return Err(CgroupError::FreezeTimeout {
                    path: self.path.clone(),
                });
            }
            std::thread::sleep(FREEZE_POLL);
        }
        Ok(())
    }

    /// Thaws. A task with a pending SIGKILL dies now.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write_state(false)
    }

    /// What the kernel says of all its tasks together.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let (file, frozen) = match self.version {
            FreezerVersion::V1 => (STATE_V1, "FROZEN"),
            FreezerVersion::V2 => ("cgroup.events", "frozen 1"),
        };
        let text = fs::read_to_string(self.path.join(file))
            .map_err(|source| self.io("reading the state of", source))?;
        Ok(text.lines().any(|line| line == frozen))
    }

    /// True when the directory is there.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Kills every task, thaws so that they can die, and waits until they have. Blocks, at most
    /// `timeout`.
    pub fn kill(&self, timeout: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + timeout;
        loop {
            let pids = self.processes()?;
            if pids.is_empty() {
                return Ok(());
            }
            // A process of another pid namespace reads as 0, which would mean ourselves.
            for pid in pids.iter().filter(|pid| 0 < **pid) {
                // A task that is gone already is what is wanted.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            self.thaw()?;
            if Instant::now() > deadline {
                return Err(CgroupError::NotEmpty {
                    path: self.path.clone(),
                    left: pids.len(),
                });
            }
            std::thread::sleep(KILL_POLL);
        }
    }

    /// Removes the empty cgroup; one that still has tasks stays.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.io("removing", error))
            }
            _ => Ok(()),
        }
    }

    fn write_state(&self, frozen: bool) -> Result<(), CgroupError> {
        let (file, value) = match (self.version, frozen) {
            (FreezerVersion::V1, true) => (STATE_V1, "FROZEN"),
            (FreezerVersion::V1, false) => (STATE_V1, "THAWED"),
            (FreezerVersion::V2, true) => (FREEZE_V2, "1"),
            (FreezerVersion::V2, false) => (FREEZE_V2, "0"),
        };
        let action = if frozen { "freezing" } else { "thawing" };
        fs::write(self.path.join(file), value).map_err(|source| self.io(action, source))
    }

    fn io(&self, action: &'static str, source: io::Error) -> CgroupError {
        CgroupError::Io {
            action,
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Reaped(Child);

    impl Drop for Reaped {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn made(root: &FreezerRoot, name: &str) -> Freezer {
        let freezer = root.plan(&format!("{name}-{}", std::process::id()));
        freezer.make().expect("make");
        freezer
    }

    fn sleeper() -> Reaped {
        Reaped(
            Command::new("sleep")
                .arg("1000")
                .spawn()
                .expect("sleep starts"),
        )
    }

    #[test]
    fn a_frozen_cgroup_reads_back_frozen_and_thaws() {
        let root = FreezerRoot::detect().expect("a freezer");
        let freezer = made(&root, "test-freeze");
        let child = sleeper();
        let pid = i32::try_from(child.0.id()).expect("pid");
        freezer.adopt(|| Ok(vec![pid])).expect("adopt");
        assert_eq!(freezer.processes().expect("list"), vec![pid]);
        freezer.freeze().expect("freeze");
        assert!(freezer.is_frozen().expect("state"));
        freezer.thaw().expect("thaw");
        assert!(!freezer.is_frozen().expect("state"));
        assert_eq!(root.holding(&[pid]).expect("ours").path(), freezer.path());
        drop(child);
        freezer.remove().expect("remove");
    }

    #[test]
    fn killing_a_frozen_cgroup_empties_it() {
        let root = FreezerRoot::detect().expect("a freezer");
        let freezer = made(&root, "test-kill");
        let mut child = sleeper();
        let pid = i32::try_from(child.0.id()).expect("pid");
        freezer.adopt(|| Ok(vec![pid])).expect("adopt");
        freezer.freeze().expect("freeze");
        let reaper = std::thread::spawn(move || child.0.wait());
        freezer.kill(Duration::from_secs(5)).expect("kill");
        assert!(!reaper.join().expect("join").expect("wait").success());
        freezer.remove().expect("remove");
    }

    #[test]
    fn the_v1_hierarchy_is_preferred_and_v2_is_the_fallback() {
        let v2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let both = format!("{v2}31 24 0:27 / /cg/freezer rw - cgroup cgroup rw,freezer\n");
        let root = FreezerRoot::from_mountinfo(v2).expect("v2");
        assert_eq!(root.version(), FreezerVersion::V2);
        let root = FreezerRoot::from_mountinfo(&both).expect("v1");
        assert_eq!(root.version(), FreezerVersion::V1);
        assert_eq!(root.directory, Path::new("/cg/freezer/pageferry"));
        assert!(FreezerRoot::from_mountinfo("").is_none());
    }
}
