//! `runc checkpoint`, which asks CRIU for the dump of its container.
//!
//! What it asks is held until CRIU may come, and changed where our dump is another than its own.
//! It is not told of notifications, which could only end in its no; when CRIU responds it deletes
//! the container, or leaves it as it is.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use criu_glue::options::DumpOptions;
use criu_glue::rpc::{Asked, Conversation, Gate, GateError, Patch, SwrkConfig};
use thiserror::Error;
use tokio::process::{Child, Command};

use super::{OUTPUT, PROGRAM, ROOT, Runc};

/// Where its gate is, in the migration's folder.
const GATE: &str = "gate";

/// How long it may take from its start to its request.
const ASK_MAX: Duration = Duration::from_secs(20);

/// How long it may take to end that has CRIU's response: it deletes cgroups and a folder.
const END_MAX: Duration = Duration::from_secs(20);

/// Why nobody asks for the dump.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A folder or a log could not be made.
    #[error("creating {path}")]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The runtime could not be started.
    #[error("starting {PROGRAM}")]
    Start(#[source] io::Error),
    /// It has ended before it asked.
    #[error("{PROGRAM} checkpoint has ended before it asked for a dump ({status}): {said}")]
    Ended {
        /// How it ended.
        status: String,
        /// The last line it has printed.
        said: String,
    },
    /// What it asks for cannot be had.
    #[error("serving {PROGRAM} checkpoint")]
    Gate(#[from] GateError),
    /// It has asked for something else.
    #[error("{PROGRAM} has asked for a dump of process {asked:?} and not of {root}")]
    Other {
        /// Of which.
        asked: Option<i32>,
        /// Of which it should have.
        root: i32,
    },
}

/// One that is under way.
#[derive(Debug)]
pub struct Checkpoint {
    child: Child,
}

impl Checkpoint {
    /// Has the runtime ask for a dump of `container`, and CRIU work on it as `criu` and `options`
    /// say. `directory` is the migration's, `stand_in` what the runtime is to find as CRIU.
    pub async fn start(
        container: &Runc,
        (criu, options): (SwrkConfig, DumpOptions),
        stand_in: &Path,
        directory: &Path,
    ) -> Result<(Conversation, Self), CheckpointError> {
        let folder = directory.join(GATE);
        // One that was started before has ended.
        drop(fs::remove_dir_all(&folder));
        let gate = Gate::bind(&folder, stand_in)?;
        let images = folder.join("images");
        let log = directory.join(OUTPUT);
        let made = |path: &Path| {
            let path = path.to_owned();
            move |source| CheckpointError::Make { path, source }
        };
        fs::create_dir(&images).map_err(made(&images))?;
        let child = spawn(container, &gate, &images, &log);
        let mut checkpoint = Self {
            child: child.map_err(CheckpointError::Start)?,
        };
        let asked = tokio::select! {
            asked = gate.asked(&criu.criu, ASK_MAX) => asked?,
            ended = checkpoint.child.wait() => {
                let (status, said) = (outcome(ended), last_line(&log));
                return Err(CheckpointError::Ended { status, said });
            }
        };
        check(&asked, container.root)?;
        let criu = asked.start(patch(options), criu).await?;
        Ok((criu, checkpoint))
    }

    /// Waits until it has ended; it knows how the dump went.
    pub async fn ended(&mut self) {
        match tokio::time::timeout(END_MAX, self.child.wait()).await {
            Ok(Ok(status)) => tracing::debug!(%status, "{PROGRAM} checkpoint has ended"),
            Ok(Err(error)) => tracing::warn!(%error, "{PROGRAM} cannot be waited for"),
            Err(_) => {
                tracing::warn!(
                    "{PROGRAM} checkpoint does not end within {END_MAX:?}: it is killed"
                );
                drop(self.child.kill().await);
            }
        }
    }
}

fn check(asked: &Asked, root: i32) -> Result<(), CheckpointError> {
    let pid = asked.request().options().and_then(|options| options.pid);
    match pid == Some(root) {
        true => Ok(()),
        false => Err(CheckpointError::Other { asked: pid, root }),
    }
}

/// Our dump, in the words of another's request.
fn patch(options: DumpOptions) -> Patch {
    Patch {
        images: Some(options.directories.images),
        work: options.directories.work,
        network_lock: Some(options.network_lock),
        manage_cgroups: Some(options.manage_cgroups),
        freeze_cgroup: options.freeze_cgroup,
        tcp_established: Some(options.tcp_established),
        file_locks: Some(options.file_locks),
        link_remap: Some(options.link_remap),
        log_level: Some(options.log.level),
        ghost_limit: options.ghost_limit,
        freeze_timeout: options.freeze_timeout,
        ..Patch::default()
    }
}

fn spawn(container: &Runc, gate: &Gate, images: &Path, log: &Path) -> io::Result<Child> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(gate.folder().to_owned()).chain(std::env::split_paths(&path));
    let path: OsString = std::env::join_paths(folders).map_err(io::Error::other)?;
    let work = images.parent().unwrap_or(images);
    Command::new(PROGRAM)
        .args(["--root", ROOT, "--log"])
        .arg(log)
        .args(["checkpoint", "--image-path"])
        .arg(images)
        .arg("--work-path")
        .arg(work)
        .args(["--manage-cgroups-mode", "ignore"])
        .arg(&container.id)
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        // Without us it fails, and leaves the container as it is.
        .kill_on_drop(false)
        .spawn()
}

/// How it ended, in words.
fn outcome(ended: io::Result<ExitStatus>) -> String {
    ended.map_or_else(|error| error.to_string(), |status| status.to_string())
}

fn last_line(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    last.unwrap_or_default().trim().to_owned()
}
