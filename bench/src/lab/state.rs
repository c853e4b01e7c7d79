//! The lab's run folder: its lock, what is up (for other processes and for clean-up), its logs.
//!
//! There is one lab per machine, so its folder has a fixed name. The state is written before
//! anything is made, and is removed last.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::cgroup::{self, Hierarchy};
use super::node::NodeRecord;

/// What is up.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// True when the lab is to stay after the process that made it ends.
    pub kept: bool,
    pub link: String,
    /// Whether each node has a pageferryd.
    pub daemons: bool,
    /// Whose ports the links of workloads are.
    #[serde(default)]
    pub bridge: String,
    /// What lies over the nodes' image and layer.
    #[serde(default)]
    pub programs: Option<PathBuf>,
    pub hierarchies: Vec<Hierarchy>,
    pub nodes: Vec<NodeRecord>,
    /// Holders of the switch's and the client's network namespaces.
    pub switch_pid: Option<i32>,
    pub client_pid: Option<i32>,
    /// How many workloads were started: their numbers are never used twice.
    pub workloads: usize,
}

/// The lab's folder on the host.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    pub fn new() -> Self {
        Self {
            path: PathBuf::from(RUN_FOLDER),
        }
    }

    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The layer of the nodes' root with the binaries under test.
    pub fn layer(&self) -> PathBuf {
        self.path.join("layer")
    }

    /// Empty folders that nodes mount on, inside their own namespaces.
    pub fn scratch(&self) -> PathBuf {
        self.path.join("scratch")
    }

    /// Storage that the nodes share.
    pub fn shared(&self) -> PathBuf {
        self.path.join("shared")
    }

    /// What a cluster of Kubernetes has.
    pub fn kubernetes(&self) -> PathBuf {
        self.path.join("kubernetes")
    }

    /// Takes the lock that makes labs exclusive. It lasts as long as the returned value.
    pub fn lock(&self) -> Result<Flock<File>> {
        fs::create_dir_all(&self.path)
            .with_context(|| format!("creating {}", self.path.display()))?;
        let path = self.path.join("lock");
        let mut options = File::options();
        let file = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path);
        let mut file = file.with_context(|| format!("opening {}", path.display()))?;
        let deadline = Instant::now() + HEIR_TIME_MAX;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut lock) => {
                    lock.set_len(0)?;
                    write!(lock, "{}", std::process::id())?;
                    return Ok(lock);
                }
                Err((unlocked, _)) => file = unlocked,
            }
            // What a killed lab was about to start has its descriptors until it becomes another
            // program.
            let owner = fs::read_to_string(&path).unwrap_or_default();
            if Path::new("/proc").join(&owner).exists() || deadline < Instant::now() {
                bail!(
                    "another lab is at work on this machine (process {owner}), and there can be \
                     one at a time: wait for its end, or end that process"
                )
            }
            std::thread::sleep(HEIR_POLL);
        }
    }

    /// What is up, if anything.
    pub fn load(&self) -> Result<Option<State>> {
        let path = self.state_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(format!("reading {}", path.display())),
        };
        let state = serde_json::from_str(&text);
        Ok(Some(
            state.with_context(|| format!("parsing {}", path.display()))?,
        ))
    }

    pub fn store(&self, state: &State) -> Result<()> {
        let path = self.state_path();
        let partial = path.with_extension("partial");
        fs::write(&partial, serde_json::to_string_pretty(state)?)
            .with_context(|| format!("writing {}", partial.display()))?;
        fs::rename(&partial, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// Takes everything down, whoever made it. Only logs stay. Safe to call at any time, and again.
    pub fn clean(&self) -> Result<()> {
        let hierarchies = cgroup::hierarchies()?;
        cgroup::remove_all(&hierarchies)?;
        // Mounts, links and namespaces went with the last process that was in them.
        for folder in [
            self.layer(),
            self.scratch(),
            self.shared(),
            self.kubernetes(),
        ] {
            remove_if_there(&folder)?;
        }
        match fs::remove_file(self.state_path()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("removing the lab's state")
            }
            _ => Ok(()),
        }
    }

    /// Starts a new set of logs.
    pub fn clear_logs(&self) -> Result<()> {
        remove_if_there(&self.logs())?;
        fs::create_dir_all(self.logs()).context("creating the folder of logs")
    }

    fn state_path(&self) -> PathBuf {
        self.path.join("state.json")
    }
}

impl Default for RunFolder {
    fn default() -> Self {
        Self::new()
    }
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

const RUN_FOLDER: &str = "/run/pageferry-lab";
/// Far more than lies between a fork and its exec.
const HEIR_TIME_MAX: Duration = Duration::from_secs(10);
const HEIR_POLL: Duration = Duration::from_millis(20);
