//! The freezer cgroup of the restored tree: its tasks are killed when the restore is undone, and
//! frozen when the pager dies.
//!
//! The daemon makes the cgroup, and has a fuller type for it; this one is what two small
//! processes need that must work when the daemon is gone. Both interfaces are known, the freezer
//! hierarchy of cgroup v1 and cgroup v2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often the cgroup is looked at while its tasks die.
const POLL: Duration = Duration::from_millis(1);

/// A freezer cgroup that holds one tree.
#[derive(Debug, Clone)]
pub struct Cgroup {
    directory: PathBuf,
}

/// Why a cgroup could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Not a cgroup with a freezer.
    #[error("{0} is not a cgroup with a freezer")]
    NoFreezer(PathBuf),
    /// The pager itself is in it.
    #[error("the pager is itself in {0}")]
    Own(PathBuf),
    /// A file of it could not be used.
    #[error("cannot use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Tasks were still there after they were killed.
    #[error("{path} still holds {left} processes after they were killed")]
    NotEmpty {
        /// The cgroup.
        path: PathBuf,
        /// How many.
        left: usize,
    },
}

impl Cgroup {
    /// The cgroup at `directory`.
    pub fn open(directory: &Path) -> Result<Self, CgroupError> {
        let cgroup = Self {
            directory: directory.to_owned(),
        };
        if !directory.join(V1).exists() && !directory.join(V2).exists() {
            return Err(CgroupError::NoFreezer(cgroup.directory));
        }
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        if cgroup.processes()?.contains(&own) {
            return Err(CgroupError::Own(cgroup.directory));
        }
        Ok(cgroup)
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether no process is in it, also because it is not there any more.
    pub fn is_empty(&self) -> bool {
        match self.processes() {
            Ok(processes) => processes.is_empty(),
            Err(_) => !self.directory.exists(),
        }
    }

    /// Asks the kernel to freeze all its tasks and not to let new ones run. Does not wait: a task
    /// that is in the kernel freezes on its way out.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.set(("FROZEN", "1"))
    }

    /// Kills every process, lets frozen ones run so that they can die, and waits until none is
    /// left. Blocks for `timeout` at most.
    pub fn kill(&self, timeout: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + timeout;
        loop {
            let processes = self.processes()?;
            if processes.is_empty() {
                return Ok(());
            }
            for pid in &processes {
                // A process of another pid namespace reads as 0, which would mean ourselves.
                if 0 < *pid {
                    // One that has gone meanwhile is what is wanted.
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                }
            }
            self.set(("THAWED", "0"))?;
            if deadline < Instant::now() {
                let (path, left) = (self.directory.clone(), processes.len());
                return Err(CgroupError::NotEmpty { path, left });
            }
            std::thread::sleep(POLL);
        }
    }

    fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let path = self.directory.join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(source) => Err(CgroupError::File { path, source }),
        }
    }

    fn set(&self, (v1, v2): (&str, &str)) -> Result<(), CgroupError> {
        let old = self.directory.join(V1);
        let (path, value) = match old.exists() {
            true => (old, v1),
            false => (self.directory.join(V2), v2),
        };
        fs::write(&path, value).map_err(|source| CgroupError::File { path, source })
    }
}

const V1: &str = "freezer.state";
const V2: &str = "cgroup.freeze";
