//! How a `criu swrk` process is started, and its end.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use super::packet::Peer;
use crate::sys::{self, ChildSetup, FailedStep};
use crate::view::{ALONE_VARIABLE, FEED_VARIABLE, FREEZER_VARIABLE, REAPER_VARIABLE};

/// How a worker is started.
#[derive(Debug)]
pub struct SwrkConfig {
    /// The binary; looked up in `PATH` when it has no slash.
    pub criu: PathBuf,
    /// Namespaces entered before `exec`, in this order. Not pid: setns moves only children.
    pub namespaces: Vec<OwnedFd>,
    /// `cgroup.procs` files (`tasks` for v1) the worker joins first, taken verbatim.
    pub cgroup_procs: Vec<PathBuf>,
    /// The view through which the worker sees memory; for dumps only.
    pub view: Option<ViewFds>,
    /// The view library, as above, for a restore whose root is no init and has to adopt orphans
    /// from the beginning: processes of sessions whose leaders are dead.
    pub reaper: Option<PathBuf>,
    /// Where stdout and stderr go (appended): what CRIU says before its log is open.
    pub output: PathBuf,
    /// Environment besides `PATH`; nothing else of ours is passed on.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors the worker keeps, at the numbers they have here.
    pub inherited: Vec<OwnedFd>,
    /// Off for lazy restores, see [`crate::image::pagemap`]: the worker and the tasks it makes run
    /// without huge pages until CRIU gives each task its own setting back.
    pub huge_pages: bool,
    /// Whether CRIU may stop tasks by hardware breakpoints. They are perf events, and the kernel
    /// waits for all CPUs when the first one on the machine comes into being: 10 to 20 ms, in the
    /// freeze of a dump and between `post-restore` and the first instruction of a restored task.
    /// Without them CRIU stops tasks at system calls, as it does on machines that have none.
    pub breakpoints: bool,
    /// Whether it goes before everything that is not real-time, if the kernel permits (needs
    /// CAP_SYS_NICE): a workload stands still while it works. CRIU gives each task it restores
    /// the nice value the task had.
    pub urgent: bool,
}

/// The preload library and the memory it is fed through.
#[derive(Debug)]
pub struct ViewFds {
    /// `libcriu_view.so`, as seen in the mount namespace the worker is started in.
    pub library: PathBuf,
    /// The freezer cgroup that holds the tree, if the dump is told of one: without it CRIU waits
    /// for ever for a task that job control has stopped and the v1 freezer has frozen.
    pub freezer: Option<PathBuf>,
    /// Whether a process that outlives CRIU traces for it. Without one a CRIU that dies in a dump
    /// may take the tasks with it.
    pub tracer: bool,
    pub feed: OwnedFd,
}

/// The process that is CRIU.
#[derive(Debug)]
pub(super) enum Process {
    /// A child of ours.
    Ours {
        /// Its id as long as it has one, and afterwards.
        pid: i32,
        child: Child,
    },
    /// Somebody else's child.
    Theirs { pid: i32, pidfd: AsyncFd<OwnedFd> },
}

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    #[error("cannot create the socket to criu")]
    Socket(#[source] io::Error),
    #[error("cannot open {path} for criu's output")]
    Output {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("path {path} contains a zero byte")]
    ZeroByte { path: PathBuf },
    #[error("cannot put criu into the cgroup of {path}")]
    Cgroup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot enter namespace number {index} for criu")]
    Namespace {
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error("cannot pass descriptor number {index} to criu")]
    Inherit {
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error("cannot turn huge pages off for criu")]
    HugePages(#[source] io::Error),
    #[error("cannot start {criu}")]
    Exec {
        criu: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl SwrkConfig {
    /// A worker in our own namespaces and cgroups that sees everything as it is.
    #[must_use]
    pub fn new(criu: PathBuf, output: PathBuf) -> Self {
        Self {
            criu,
            output,
            namespaces: Vec::new(),
            cgroup_procs: Vec::new(),
            view: None,
            reaper: None,
            env: Vec::new(),
            inherited: Vec::new(),
            huge_pages: true,
            breakpoints: false,
            urgent: false,
        }
    }

    /// Environment besides `PATH` and the number of the view's feed.
    pub(super) fn variables(&self) -> Vec<(OsString, OsString)> {
        let mut variables = self.env.clone();
        let mut set = |name: &str, value: &OsStr| variables.push((name.into(), value.into()));
        if !self.breakpoints {
            set("CRIU_FAULT", OsStr::new(NO_BREAKPOINTS));
        }
        if let Some(view) = &self.view {
            set("LD_PRELOAD", view.library.as_os_str());
            if let Some(freezer) = &view.freezer {
                set(FREEZER_VARIABLE, freezer.as_os_str());
            }
            if !view.tracer {
                set(ALONE_VARIABLE, OsStr::new(""));
            }
        } else if let Some(library) = &self.reaper {
            set("LD_PRELOAD", library.as_os_str());
            set(REAPER_VARIABLE, OsStr::new(""));
        }
        variables
    }
}

impl Process {
    pub fn theirs(peer: Peer) -> io::Result<Self> {
        let pid = peer.pid();
        let pidfd = sys::register(peer.into_pidfd())?;
        Ok(Self::Theirs { pid, pidfd })
    }

    pub fn pid(&self) -> i32 {
        match self {
            Self::Ours { pid, .. } | Self::Theirs { pid, .. } => *pid,
        }
    }

    /// Waits for its end; how it ended, if it is our child.
    pub async fn wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match self {
            Self::Ours { child, .. } => child.wait().await.map(Some),
            // It becomes readable when the process has ended, and stays so.
            Self::Theirs { pidfd, .. } => pidfd.readable().await.map(|_| None),
        }
    }

    /// Kills it; one that has ended is no error.
    pub fn kill(&mut self) -> io::Result<()> {
        let killed = match self {
            // A child that was waited for has no id any more: its number may belong to another.
            Self::Ours { child, .. } if child.id().is_none() => return Ok(()),
            Self::Ours { pid, .. } => kill(Pid::from_raw(*pid), Signal::SIGKILL),
            Self::Theirs { pidfd, .. } => sys::kill(pidfd.as_fd()),
        };
        match killed {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn command(config: &SwrkConfig, socket: i32) -> Result<Command, StartError> {
    let output = File::options()
        .create(true)
        .append(true)
        .open(&config.output);
    let output = output
        .and_then(|file| Ok((file.try_clone()?, file)))
        .map_err(|source| StartError::Output {
            path: config.output.clone(),
            source,
        })?;
    let mut command = Command::new(&config.criu);
    command
        .args(["--no-default-config", "swrk", &socket.to_string()])
        .env_clear()
        .env("PATH", search_path())
        .envs(config.variables())
        .stdin(Stdio::null())
        .stdout(output.0)
        .stderr(output.1);
    if let Some(view) = &config.view {
        command.env(FEED_VARIABLE, view.feed.as_raw_fd().to_string());
    }
    Ok(command)
}

/// Where programs are looked for: our `PATH`.
pub(super) fn search_path() -> OsString {
    std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into())
}

/// Starts the worker of `config`; `socket` is its end of the conversation.
pub(super) fn start(config: SwrkConfig, socket: OwnedFd) -> Result<Process, StartError> {
    let command = command(&config, socket.as_raw_fd())?;
    let mut inherited = config.inherited;
    inherited.push(socket);
    inherited.extend(config.view.map(|view| view.feed));
    let setup = ChildSetup {
        cgroup_procs: config
            .cgroup_procs
            .iter()
            .map(|path| c_path(path))
            .collect::<Result<_, _>>()?,
        namespaces: config.namespaces,
        inherited,
        huge_pages: config.huge_pages,
        urgent: config.urgent,
    };
    let started = sys::spawn(command, setup);
    let child = started.map_err(|(step, source)| match step {
        FailedStep::Cgroup(index) => StartError::Cgroup {
            path: config.cgroup_procs[index].clone(),
            source,
        },
        FailedStep::Namespace(index) => StartError::Namespace { index, source },
        FailedStep::Inherit(index) => StartError::Inherit { index, source },
        FailedStep::HugePages => StartError::HugePages(source),
        FailedStep::Exec => StartError::Exec {
            criu: config.criu.clone(),
            source,
        },
    })?;
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    let pid = pid.unwrap_or_default();
    Ok(Process::Ours { pid, child })
}

fn c_path(path: &Path) -> Result<CString, StartError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| StartError::ZeroByte {
        path: path.to_owned(),
    })
}

/// The "fault" of CRIU that there are no breakpoints: `FI_NO_BREAKPOINTS`, the same number since
/// CRIU 3.
const NO_BREAKPOINTS: &str = "130";

/// For a daemon started without `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
