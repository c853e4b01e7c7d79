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

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use criu_glue::options::{LogLevel, ManageCgroups, NetworkLock};
use criu_glue::rpc::{self, Asked, Conversation, Gate, Patch, Summoned, SwrkConfig};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_cgroup::identity::FolderId;
use pageferry_sys::bound;
use pageferry_sys::namespace::{NamespaceKind, run_inside};
use tokio::process::Command;
use tokio::time::timeout;
use tracing::warn;

use crate::failure::RestoreError;
use crate::message::{RestoreRequest, RuntimeRequest};
use crate::start::{At, open};

/// How long a runtime may take from its start to its request.
const ASK_MAX: Duration = Duration::from_secs(20);

/// How long one is waited for whose container runs.
const DONE_MAX: Duration = Duration::from_secs(60);

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
    wanted: RuntimeRequest,
    /// The folder it has made for the container, once it has asked.
    made: Option<FolderId>,
    /// Who asks is another than whom we started, and lives on when that is killed.
    is_asked_by_another: bool,
    /// The node's network namespace, which the pager is not in: an engine makes networks there.
    network: Arc<OwnedFd>,
}

impl Waiting {
    /// Starts the runtime, waits until it asks for a restore, and has CRIU come, in `namespaces`:
    /// its start takes some milliseconds that nobody waits for yet.
    pub async fn start(
        request: &RestoreRequest,
        wanted: &RuntimeRequest,
        (namespaces, network): At,
    ) -> Result<Self, RestoreError> {
        // One that was started before, and has died, has left its own.
        drop(fs::remove_dir_all(&wanted.gate));
        let gate = Gate::bind(&wanted.gate, &wanted.stand_in).map_err(RestoreError::Gate)?;
        let (arguments, log) = (&wanted.arguments, wanted.log.clone());
        let process = match wanted.is_engine {
            true => at_node(&network, || {
                rpc::Runtime::start_engine(&gate, &wanted.program, arguments, log)
            })
            .map_err(RestoreError::Network)?,
            false => rpc::Runtime::start(&gate, &wanted.program, arguments, log),
        };
        let mut runtime = Runtime {
            process: process.map_err(RestoreError::Runtime)?,
            wanted: wanted.clone(),
            made: None,
            is_asked_by_another: false,
            network,
        };
        let asked = match runtime.process.asks(&gate, &request.criu, ASK_MAX).await {
            Ok(asked) => asked,
            Err(error) => {
                drop(gate);
                runtime.ended().await;
                return Err(RestoreError::Runtime(error));
            }
        };
        runtime.made = FolderId::of(&wanted.folder).ok();
        runtime.is_asked_by_another = runtime.process.pid() != Some(asked.client_pid());
        let placed = check_cgroup(&asked, wanted)
            .and_then(|()| join(asked.criu_pid(), &wanted.cgroup_procs));
        if let Err(error) = placed {
            // What becomes of it is in the runtime's log.
            drop(asked.call_off("it cannot be restored here").await);
            runtime.ended().await;
            return Err(error);
        }
        let network = network_of(&asked).map_err(RestoreError::Network);
        let namespaces = match network {
            // Whichever comes last is the one that CRIU is in.
            Ok(network) => namespaces.into_iter().chain(network).collect(),
            Err(error) => {
                drop(asked.call_off("its network cannot be entered").await);
                runtime.ended().await;
                return Err(error);
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

    /// Waits until it ends, by itself, before it should; for ever, if there is none.
    pub async fn gone(runtime: &mut Option<Self>) -> RestoreError {
        match runtime {
            Some(runtime) => runtime.process.gone().await,
            None => std::future::pending().await,
        }
        RestoreError::RuntimeRefused
    }

    /// Whether it ends by itself soon.
    pub async fn ends_within(&mut self, limit: Duration) -> bool {
        self.process.ends_within(limit).await
    }

    /// A runtime must not hear that its restore went wrong: the tree of `root` was let go, and may
    /// run, and the runtime would kill it. So it is ended, or told that all is well if it is none
    /// of ours.
    pub async fn abandon(&mut self, criu: &mut Conversation, root: i32) {
        if self.is_asked_by_another {
            if let Err(error) = criu.vouch(root).await {
                warn!(%error, "the container runtime");
            }
            return self.done().await;
        }
        if let Err(error) = self.process.kill().await {
            warn!(%error, "the container runtime");
        }
        self.release();
    }

    /// Waits until a runtime has ended that has restored nothing, or nothing that is left, and sees
    /// that nothing is left of its own either.
    pub async fn ended(&mut self) {
        if self.has_ended().await {
            return;
        }
        // Not before what is bound is gone: an engine deletes the folder.
        self.once_more(&self.wanted.undo).await;
        // What it met before it began may be somebody else's.
        if self.made.is_some() && !self.is_anothers() {
            bound::remove_unless(&self.wanted.state, &self.wanted.leaves);
        }
    }

    /// Waits until a runtime has ended whose container runs. It is not killed: an engine whose call
    /// breaks off takes back what it has made.
    pub async fn done(&mut self) {
        if !self.process.ends_within(DONE_MAX).await {
            warn!("the container runtime does not end, whose container runs");
        }
        self.release();
        if self.wanted.is_engine {
            let_out();
        }
        self.once_more(&self.wanted.then).await;
    }

    /// Waits until one that knows how its restore went has ended, and sees that the root file
    /// system is bound nowhere. Whether it had success.
    async fn has_ended(&mut self) -> bool {
        let ended = self.process.ended(END_MAX).await;
        self.release();
        match ended {
            Ok(status) if status.success() => return true,
            Ok(status) => warn!(%status, "the container runtime has failed"),
            Err(error) => warn!(%error, "the container runtime"),
        }
        false
    }

    fn release(&self) {
        let wanted = &self.wanted;
        if self.is_anothers() {
            return;
        }
        if let Err(error) = bound::release(&wanted.bound_in, &wanted.bound) {
            warn!(%error, folder = %wanted.bound_in.display(),
                "the root file system of a container stays bound");
        }
    }

    /// Whether somebody has begun another container of this name since.
    fn is_anothers(&self) -> bool {
        let folder = &self.wanted.folder;
        let is_another = |made: FolderId| folder.exists() && !made.is_at(folder);
        self.made.is_some_and(is_another)
    }

    /// Starts the program again, with other arguments, if there are any.
    async fn once_more(&self, arguments: &[String]) {
        if arguments.is_empty() {
            return;
        }
        let mut command = Command::new(&self.wanted.program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let why = match at_node(&self.network, || command.spawn()).flatten() {
            Ok(child) => match timeout(END_MAX, child.wait_with_output()).await {
                Ok(Ok(output)) if output.status.success() => return,
                Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).into_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("it has not ended within {END_MAX:?}"),
            },
            Err(error) => error.to_string(),
        };
        warn!(command = arguments.join(" "), program = %self.wanted.program.display(),
            why = why.trim_end(), "the container runtime");
    }
}

/// Starts something in the node's network namespace.
fn at_node<T: Send>(network: &OwnedFd, start: impl FnOnce() -> T + Send) -> io::Result<T> {
    let runtime = tokio::runtime::Handle::current();
    run_inside(&[(NamespaceKind::Net, network.as_fd())], || {
        // What is started is waited for by the runtime, which a plain thread does not have.
        let _entered = runtime.enter();
        start()
    })
}

/// Has whoever an engine has left running, to keep the container's log, leave the cgroups of the
/// pager: he outlives it. Until the container ran he was to be killed with it.
fn let_out() {
    let own = std::process::id().cast_signed();
    let hierarchies = match Hierarchies::detect() {
        Ok(hierarchies) => hierarchies,
        Err(error) => return warn!(%error, "cgroups of this node"),
    };
    for hierarchy in hierarchies.iter() {
        let Some(here) = hierarchy.current(own) else {
            continue;
        };
        let inside = fs::read_to_string(here.join(PROCS)).unwrap_or_default();
        let inside = inside.lines().filter_map(|line| line.parse::<i32>().ok());
        for pid in inside.filter(|pid| *pid != own && parent(*pid) != Some(own)) {
            let moved = fs::write(hierarchy.point.join(PROCS), pid.to_string());
            if let Err(error) = moved {
                warn!(pid, %error, "who keeps the container's log stays in {}", here.display());
            }
        }
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

/// The file by which a process joins a cgroup, and in which they are.
const PROCS: &str = "cgroup.procs";

/// Whether the runtime has found the cgroup that it has made for the container.
fn check_cgroup(asked: &Asked, wanted: &RuntimeRequest) -> Result<(), RestoreError> {
    let Some(wanted) = &wanted.cgroup else {
        return Ok(());
    };
    let options = asked.request().options();
    let named = options.and_then(|options| options.cg_root.last());
    let named = named.map(|root| root.path.clone());
    // It may say where the hierarchy is mounted, too.
    match named
        .as_ref()
        .is_some_and(|named| named.ends_with(&**wanted))
    {
        true => Ok(()),
        false => Err(RestoreError::OtherCgroup {
            named,
            wanted: wanted.clone(),
        }),
    }
}

/// The network namespace that the runtime has for the container, if it was given one: it is open in
/// what is to become CRIU.
fn network_of(asked: &Asked) -> io::Result<Option<OwnedFd>> {
    let options = asked.request().options();
    let mut inherited = options.into_iter().flat_map(|options| &options.inherit_fd);
    let network = inherited.find(|inherited| inherited.key == NETWORK);
    network
        .map(|network| {
            let path = format!("/proc/{}/fd/{}", asked.criu_pid(), network.fd);
            File::open(path).map(OwnedFd::from)
        })
        .transpose()
}

/// How runtimes call a network namespace that is there already.
const NETWORK: &str = "extRootNetNS";

/// Has a process be where its runtime has made a place for the container.
fn join(pid: i32, cgroup_procs: &[PathBuf]) -> Result<(), RestoreError> {
    // Not every runtime makes one in every hierarchy.
    let made = cgroup_procs.iter().filter(|path| path.exists());
    for path in made {
        fs::write(path, pid.to_string()).map_err(|source| RestoreError::Join {
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}
