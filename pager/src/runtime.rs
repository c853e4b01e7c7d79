//! A restore that a container runtime asks CRIU for.
//!
//! The runtime is started by us, and finds our gate where it looks for CRIU; what it asks is held
//! until the images are there, and then changed where our restore is another than its own. It
//! hears of everything from `post-restore` on, which is when it writes down that its container
//! runs; before, it is told that it failed, and undoes what it has made.
//!
//! Invariants: a runtime that is restoring is not killed while it may still end by itself: it has
//! bound the container's root file system to a place of its own, and whoever deletes that place
//! afterwards deletes the files. What it leaves there is unmounted, and folders are removed only
//! if they are empty.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use criu_glue::options::{LogLevel, ManageCgroups, NetworkLock};
use criu_glue::rpc::{self, Conversation, Gate, Patch, Summoned, SwrkConfig};
use pageferry_sys::bound;
use tracing::warn;

use crate::failure::RestoreError;
use crate::message::{RestoreRequest, RuntimeRequest};
use crate::start::open;

/// How long a runtime may take from its start to its request.
const ASK_MAX: Duration = Duration::from_secs(20);

/// How long a runtime may take to end that has heard how its restore went. It removes cgroups then,
/// or runs hooks.
const END_MAX: Duration = Duration::from_secs(10);

/// A runtime that has asked, and waits; and a CRIU that will hear of it.
#[derive(Debug)]
pub struct Waiting {
    asked: Summoned,
    runtime: Runtime,
}

/// A runtime that restores.
#[derive(Debug)]
pub struct Runtime {
    process: rpc::Runtime,
    state: PathBuf,
    bound: String,
}

impl Waiting {
    /// Starts the runtime, waits until it asks for a restore, and has CRIU come, in `namespaces`:
    /// its start takes some milliseconds that nobody waits for yet.
    pub async fn start(
        request: &RestoreRequest,
        wanted: &RuntimeRequest,
        namespaces: Vec<OwnedFd>,
    ) -> Result<Self, RestoreError> {
        // One that was started before, and has died, has left its own.
        drop(fs::remove_dir_all(&wanted.gate));
        let gate = Gate::bind(&wanted.gate, &wanted.stand_in).map_err(RestoreError::Gate)?;
        let (arguments, log) = (&wanted.arguments, wanted.log.clone());
        let process = rpc::Runtime::start(&gate, &wanted.program, arguments, log);
        let mut runtime = Runtime {
            process: process.map_err(RestoreError::Runtime)?,
            state: wanted.state.clone(),
            bound: wanted.bound.clone(),
        };
        let asked = match runtime.process.asks(&gate, &request.criu, ASK_MAX).await {
            Ok(asked) => asked,
            Err(error) => {
                drop(gate);
                runtime.ended().await;
                return Err(RestoreError::Runtime(error));
            }
        };
        let config = SwrkConfig {
            namespaces,
            // A huge page would be put where pages are missing.
            huge_pages: false,
            urgent: true,
            ..SwrkConfig::new(request.criu.clone(), PathBuf::new())
        };
        match asked.summon(config).await {
            Ok(asked) => Ok(Self { asked, runtime }),
            Err(error) => {
                runtime.ended().await;
                Err(RestoreError::Gate(error))
            }
        }
    }

    /// Whether both still wait.
    pub fn is_open(&mut self) -> bool {
        self.runtime.is_running() && self.asked.conversation().is_open()
    }

    /// The process that is CRIU, or becomes it: it is in the cgroups of the container.
    pub fn criu_pid(&self) -> i32 {
        self.asked.conversation().pid()
    }

    /// Lets CRIU begin.
    pub async fn pass(
        self,
        request: &RestoreRequest,
    ) -> Result<(Conversation, Runtime), RestoreError> {
        let patch = Patch {
            images: Some(open(&request.images_dir)?),
            work: Some(open(&request.work_dir)?),
            network_lock: Some(NetworkLock::Skip),
            manage_cgroups: Some(ManageCgroups::Ignore),
            lazy_pages: Some(true),
            tcp_established: Some(request.tcp_established),
            file_locks: Some(request.file_locks),
            link_remap: Some(request.link_remap),
            log_level: Some(LogLevel::Warning),
            ..Patch::default()
        };
        let (asked, mut runtime) = (self.asked, self.runtime);
        match asked.pass(patch).await {
            Ok(criu) => {
                // The workload would be spared like the pager, at the cost of everybody else.
                if let Err(error) = criu.set_oom_score_adj(0) {
                    warn!(%error, "the workload inherits the pager's oom_score_adj");
                }
                Ok((criu, runtime))
            }
            Err(error) => {
                runtime.ended().await;
                Err(RestoreError::Gate(error))
            }
        }
    }

    /// Tells the runtime that it failed, and waits until it has undone what it made.
    pub async fn call_off(mut self) {
        if let Err(error) = self.asked.call_off("called off before the restore").await {
            warn!(%error, "the container runtime does not hear that it failed");
        }
        self.runtime.ended().await;
    }
}

impl Runtime {
    /// Whether it has not ended. Who asks may be another than whom we started.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits until it ends, by itself.
    pub async fn gone(&mut self) {
        self.process.gone().await;
    }

    /// Whether it ends by itself soon.
    pub async fn ends_within(&mut self, limit: Duration) -> bool {
        self.process.ends_within(limit).await
    }

    /// Waits until a runtime that knows how its restore went has ended, and sees that the root file
    /// system is bound nowhere.
    pub async fn ended(&mut self) {
        match self.process.ended(END_MAX).await {
            Ok(status) if status.success() => {}
            Ok(status) => warn!(%status, "the container runtime has failed"),
            Err(error) => warn!(%error, "the container runtime"),
        }
        if let Err(error) = bound::release(&self.state, &self.bound) {
            warn!(%error, state = %self.state.display(),
                "the root file system of a container stays bound");
        }
    }
}
