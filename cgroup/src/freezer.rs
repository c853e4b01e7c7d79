//! The freezer cgroup that holds a workload: the one thing that decides whether it runs.
//!
//! CRIU thaws a cgroup during its dump and holds the tasks by ptrace alone, so at its end the tasks
//! would run if CRIU or this daemon died. Therefore the cgroup is ours, it is frozen again at
//! post-dump, and a `Frozen` read back from the kernel is what a commit rests on.
//!
//! Invariants: a cgroup made here holds tasks of one workload only; it is removed when empty.
//! Both kernels' interfaces are known: the freezer hierarchy of cgroup v1, and `cgroup.freeze` of
//! cgroup v2. In v1 a workload keeps the limits of its other hierarchies while it is in a freezer
//! cgroup; in v2, where there is one hierarchy, its freezer cgroup is made below the one it is in.
//! Absent: resource limits.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_proto::id::MigrationId;
use pageferry_sys::task;
use thiserror::Error;

use crate::hierarchies::{FOLDER, Hierarchies};
use crate::identity::FolderId;

/// How long a freeze may take before it is given up: tasks in uninterruptible sleep do not freeze.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the kernel is asked whether a freeze is complete; a freeze takes 0.1–2 ms.
const FREEZE_POLL: Duration = Duration::from_micros(100);

/// How often the kernel is asked to freeze, until it has: a task on its way into a stop of job
/// control does not notice the v1 freezer, and once it is stopped it is frozen only when it is
/// asked for anew.
const FREEZE_AGAIN: Duration = Duration::from_millis(3);

/// How often it is looked whether tasks have died.
const KILL_POLL: Duration = Duration::from_millis(1);

/// How long a cgroup that lists nobody may stay busy: whoever has ended leaves it only when it was
/// switched away from for the last time.
const GONE_MAX: Duration = Duration::from_secs(1);

/// State of a cgroup of the v1 hierarchy: `THAWED`, `FREEZING` or `FROZEN`.
const STATE_V1: &str = "freezer.state";

/// Whether a cgroup of the unified hierarchy should be frozen: 0 or 1.
const FREEZE_V2: &str = "cgroup.freeze";

/// How the name of a cgroup begins that is made below another of the unified hierarchy.
const BELOW: &str = "pageferry-";

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
    /// In v2 the tree would lose limits.
    #[error(
        "process {pid} is in the cgroup {path}, not in {root} as the root of its tree: its limits \
         would be lost"
    )]
    Scattered {
        /// The process.
        pid: i32,
        /// Its cgroup.
        path: PathBuf,
        /// The cgroup of the root.
        root: PathBuf,
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
    /// Where the hierarchy is mounted.
    hierarchy: PathBuf,
    directory: PathBuf,
    version: FreezerVersion,
}

impl FreezerRoot {
    /// Finds the freezer this node offers: the v1 hierarchy if it is mounted, else cgroup v2.
    pub fn detect() -> Result<Self, CgroupError> {
        Self::among(&Hierarchies::detect()?).ok_or(CgroupError::NoFreezer)
    }

    fn among(hierarchies: &Hierarchies) -> Option<Self> {
        let (found, version) = match hierarchies.with("freezer") {
            Some(found) => (found, FreezerVersion::V1),
            None => (hierarchies.unified()?, FreezerVersion::V2),
        };
        Some(Self {
            hierarchy: found.point.clone(),
            directory: found.ours(),
            version,
        })
    }

    /// A folder of its own within this one, for a daemon that shares a hierarchy with others.
    #[must_use]
    pub fn within(&self, name: &str) -> Self {
        Self {
            hierarchy: self.hierarchy.clone(),
            directory: self.directory.join(name),
            version: self.version,
        }
    }

    /// The cgroup `name`, which need not exist yet.
    pub fn plan(&self, name: &str) -> Freezer {
        self.found(self.directory.join(name))
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
        visible.then(|| self.hierarchy.join(inside))
    }

    /// Where the tree of `root` is to be frozen, and the cgroup it comes back to.
    ///
    /// In v2 that is a cgroup below the one it is in, whose limits then go on to count. One without
    /// controllers of its own may be made also below a cgroup that holds processes.
    pub fn place(
        &self,
        root: i32,
        pids: &[i32],
        name: &str,
    ) -> Result<(Freezer, Option<PathBuf>), CgroupError> {
        let origin = self.current_of(root);
        let top = self.directory.parent();
        let Some(folder) = origin
            .as_deref()
            .filter(|folder| self.version == FreezerVersion::V2 && Some(*folder) != top)
        else {
            return Ok((self.plan(name), origin));
        };
        for pid in pids {
            // One that has ended is nowhere, though a zombie still tells where it was.
            let path = self.current_of(*pid).filter(|_| !task::has_ended(*pid));
            if let Some(path) = path.filter(|path| path != folder) {
                return Err(CgroupError::Scattered {
                    pid: *pid,
                    path,
                    root: folder.to_owned(),
                });
            }
        }
        // A migration before this one could not bring it back. Names are cheap: that of a unit may
        // begin the same, and others may have come there since.
        if is_made_below(folder) {
            let left = self.found(folder.to_owned());
            if left.processes()?.iter().all(|held| pids.contains(held)) {
                return Ok((left, folder.parent().map(Path::to_owned)));
            }
        }
        let path = folder.join(format!("{BELOW}{name}"));
        Ok((self.found(path), origin))
    }

    fn found(&self, path: PathBuf) -> Freezer {
        Freezer {
            path,
            version: self.version,
            known: None,
        }
    }

    /// The cgroup that holds all of `pids` and nothing else, if it is one of ours.
    pub fn holding(&self, pids: &[i32]) -> Option<Freezer> {
        let mut pids = pids.to_vec();
        pids.sort_unstable();
        for entry in fs::read_dir(&self.directory).ok()?.flatten() {
            let freezer = self.found(entry.path());
            let Ok(held) = freezer.processes() else {
                continue;
            };
            if !held.is_empty() && held == pids {
                return Some(freezer);
            }
        }
        None
    }

    /// The cgroups there are, by name.
    pub fn made(&self) -> Vec<(String, Freezer)> {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let folders = entries.flatten().filter(|entry| entry.path().is_dir());
        let named = folders.filter_map(|entry| entry.file_name().into_string().ok());
        named.map(|name| (name.clone(), self.plan(&name))).collect()
    }

    /// The interface in use.
    pub fn version(&self) -> FreezerVersion {
        self.version
    }
}

/// Whether the last part of `folder` is a name that [`FreezerRoot::place`] gives.
fn is_made_below(folder: &Path) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str());
    let id = name.and_then(|name| name.strip_prefix(BELOW));
    id.is_some_and(|id| id.parse::<MigrationId>().is_ok())
}

/// One workload's freezer cgroup.
#[derive(Debug, Clone)]
pub struct Freezer {
    path: PathBuf,
    version: FreezerVersion,
    /// If another one by its name, which somebody else has made since, is none.
    known: Option<FolderId>,
}

impl Freezer {
    /// A cgroup known by its path, as written in a journal.
    pub fn at(path: PathBuf) -> Self {
        let version = if path.join(STATE_V1).exists() {
            FreezerVersion::V1
        } else {
            FreezerVersion::V2
        };
        Self {
            path,
            version,
            known: None,
        }
    }

    /// The same, if it is the one that was `known`: whatever else is there by its name counts as
    /// nothing.
    pub fn again(path: PathBuf, known: Option<FolderId>) -> Self {
        Self {
            known,
            ..Self::at(path)
        }
    }

    /// It, and from now on no other by its name.
    pub fn known(self) -> Result<Self, CgroupError> {
        let known = FolderId::of(&self.path).map_err(|source| self.io("looking at", source))?;
        Ok(Self {
            known: Some(known),
            ..self
        })
    }

    /// What it is known by besides its path.
    pub fn id(&self) -> Option<FolderId> {
        self.known
    }

    /// The cgroup at `path`, which must be there and not hold this process.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        Self::at(path.to_owned()).opened()
    }

    /// It, if it is there and does not hold this process.
    pub fn opened(self) -> Result<Self, CgroupError> {
        let path = self.path.clone();
        let has = |file: &str| path.join(file).exists();
        if !self.exists() || !has(STATE_V1) && !has(FREEZE_V2) {
            return Err(CgroupError::NotFreezer { path });
        }
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        match self.processes()?.contains(&own) {
            true => Err(CgroupError::Own { path }),
            false => Ok(self),
        }
    }

    /// Makes it, empty and thawed, if it does not exist.
    pub fn make(&self) -> Result<(), CgroupError> {
        fs::create_dir_all(&self.path).map_err(|source| self.io("creating", source))
    }

    /// The interface in use.
    pub fn version(&self) -> FreezerVersion {
        self.version
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name, if it is one of our own at the root of the hierarchy.
    pub fn name(&self) -> Option<&str> {
        let folder = self.path.parent()?;
        let ours = folder.file_name()? == FOLDER;
        ours.then(|| self.path.file_name()?.to_str()).flatten()
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
                match self.write("cgroup.procs", &pid.to_string()) {
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

    /// Moves all that is in it to `origin`, and removes it. What is born meanwhile is moved, too.
    pub fn empty_into(&self, origin: &Self) -> Result<(), CgroupError> {
        origin.adopt(|| self.processes().map_err(io::Error::other))?;
        self.remove()
    }

    /// The processes in it, ascending.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        self.listed("cgroup.procs")
    }

    /// The threads in it, ascending.
    pub fn threads(&self) -> Result<Vec<i32>, CgroupError> {
        let file = match self.version {
            FreezerVersion::V1 => "tasks",
            FreezerVersion::V2 => "cgroup.threads",
        };
        self.listed(file)
    }

    fn listed(&self, file: &str) -> Result<Vec<i32>, CgroupError> {
        let text = self.read(file);
        let text = text.map_err(|source| self.io("reading the tasks of", source))?;
        let mut ids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
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
        let frozen = self.freeze_unless(|| false);
        if matches!(frozen, Err(CgroupError::FreezeTimeout { .. })) {
            self.thaw()?;
        }
        frozen.map(drop)
    }

    /// As [`Freezer::freeze`], but ends early once `cut` says so. Returns whether it is frozen. If
    /// not, and on a time-out, it is still about to be: the caller thaws it.
    pub fn freeze_unless(&self, cut: impl Fn() -> bool) -> Result<bool, CgroupError> {
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        self.begin_freeze()?;
        let mut asked = Instant::now();
        while !self.is_frozen()? {
            if cut() {
                return Ok(false);
            }
            if Instant::now() > deadline {
                return Err(CgroupError::FreezeTimeout {
                    path: self.path.clone(),
                });
            }
            std::thread::sleep(FREEZE_POLL);
            if FREEZE_AGAIN < asked.elapsed() {
                self.begin_freeze()?;
                asked = Instant::now();
            }
        }
        Ok(true)
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
        let text = self.read(file);
        let text = text.map_err(|source| self.io("reading the state of", source))?;
        Ok(text.lines().any(|line| line == frozen))
    }

    /// True when the directory is there, and is not another one.
    pub fn exists(&self) -> bool {
        let is_it = |known: FolderId| known.is_at(&self.path);
        self.known.map_or_else(|| self.path.is_dir(), is_it)
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

    /// Moves a thread into it, where threads have cgroups of their own (v1), and its process where
    /// they do not.
    pub(crate) fn take_in(&self, tid: i32) -> Result<(), CgroupError> {
        let file = match self.version {
            FreezerVersion::V1 => "tasks",
            FreezerVersion::V2 => "cgroup.procs",
        };
        self.write(file, &tid.to_string())
            .map_err(|source| self.io("moving a task into", source))
    }

    /// One of another path in the same hierarchy.
    pub(crate) fn like(&self, path: PathBuf) -> Self {
        Self {
            path,
            version: self.version,
            known: None,
        }
    }

    /// Removes the empty cgroup; one that still has tasks stays. Blocks, for [`GONE_MAX`] at most.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.remove_aside();
        self.remove_folder()
    }

    /// The same without what stands beside it.
    pub(crate) fn remove_folder(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + GONE_MAX;
        loop {
            if !self.exists() {
                return Ok(());
            }
            let error = match fs::remove_dir(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => error,
                _ => return Ok(()),
            };
            let is_empty = error.raw_os_error() == Some(libc::EBUSY)
                && self.processes().is_ok_and(|pids| pids.is_empty());
            if !is_empty || deadline < Instant::now() {
                return Err(self.io("removing", error));
            }
            std::thread::sleep(KILL_POLL);
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
        self.write(file, value)
            .map_err(|source| self.io(action, source))
    }

    pub(crate) fn io(&self, action: &'static str, source: io::Error) -> CgroupError {
        CgroupError::Io {
            action,
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
#[path = "freezer_tests.rs"]
mod tests;
