//! One CRIU dump at the source: started before the freeze, held at its first notification, and held
//! again at its last one until the hand-off is decided.
//!
//! ```text
//! prepare ── CRIU starts, probes, opens its images ──► pre-dump (held: the workload runs)
//! run ────── cgroup frozen by us, view published ────► post-dump (held: everything is in images)
//! commit ─── answered true: CRIU kills the tree        rollback ─ answered false: CRIU lets go
//! ```
//!
//! Invariants: between `pre-dump` and `post-dump` CRIU alone touches the tasks; at `post-dump` they
//! are held by ptrace *and*, once the caller has frozen the cgroup again, by the cgroup; dropping a
//! `Dump` closes CRIU's socket, which CRIU takes as a failed dump. A CRIU that ends by itself is
//! heard of when the tracer in its view library has put the tasks back.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criu_glue::options::{
    AfterDump, Directories, DumpOptions, Log, LogLevel, ManageCgroups, NetworkLock,
};
use criu_glue::report;
use criu_glue::rpc::{Conversation, Ending, NotifyScript, SwrkConfig, TalkError, ViewFds};
use criu_glue::view::{Blind, Feed, FeedError};
use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::wire::description::MountDescription;
use thiserror::Error;

use crate::runtime::files::DELETED_FILE_MAX;
use crate::runtime::kind::{AskError, Asker, Kind};
use crate::runtime::mounts::external_at_dump;

/// CRIU's start-up, with its kernel probing cached, takes tens of milliseconds.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(20);

/// A dump that nobody else limits: memory that only CRIU copies takes 4 s per GiB.
const RUN_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long CRIU waits for a task that does not stop for it, in seconds. The tree is frozen before
/// CRIU is let in, so that a task stops within a millisecond; one that sleeps uninterruptibly in a
/// place where the freezer leaves it never does.
const SEIZE_SECONDS: u32 = 3;

/// After the last answer CRIU kills the tasks and ends, unhurried by anybody; and its tracer, when
/// CRIU was killed, puts back what it can in seconds.
const END_TIMEOUT: Duration = Duration::from_secs(30);

const LOG_FILE: &str = "dump.log";

/// The lowest but for never (-1000): whoever has this is the last to be killed for memory.
const OOM_SCORE_ADJ: i16 = -999;

/// Why a dump did not come to its end.
#[derive(Debug, Error)]
pub enum DumpError {
    /// A folder or a log could not be made.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// CRIU could not be started, or nobody asks it.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// CRIU could not be spoken to.
    #[error("talking to criu")]
    Talk(#[source] TalkError),
    /// The view of memory could not be made or published.
    #[error("making criu's view of memory")]
    View(#[from] FeedError),
    /// CRIU would see all memory, and copy it in the freeze.
    #[error("criu would not see through {}", library.display())]
    Unseeing {
        /// The view library.
        library: PathBuf,
        /// Why.
        #[source]
        source: Blind,
    },
    /// CRIU gave up; `cause` is the first error in its log.
    #[error("criu could not dump the workload: {cause} (log: {log})")]
    Failed {
        /// The first error CRIU logged, or what its answer said.
        cause: String,
        /// Its log.
        log: PathBuf,
    },
    /// CRIU did not come to the next point in time.
    #[error("criu did not reach {point} within {limit:?} (log: {log})")]
    Timeout {
        /// What was waited for.
        point: String,
        /// For how long.
        limit: Duration,
        /// Its log.
        log: PathBuf,
    },
}

impl DumpError {
    /// What to tell of a failure that passes by itself: the next dump may find the workload in
    /// another state.
    pub fn passing(&self) -> Option<&str> {
        match self {
            Self::Failed { cause, .. } if report::passes(cause) => Some(cause),
            Self::Failed { .. }
            | Self::Io { .. }
            | Self::Ask(_)
            | Self::Talk(_)
            | Self::View(_)
            | Self::Unseeing { .. }
            | Self::Timeout { .. } => None,
        }
    }
}

/// What a dump is made of.
#[derive(Debug)]
pub struct DumpPlan {
    /// The `criu` program.
    pub criu: PathBuf,
    /// The preload library through which CRIU sees memory.
    pub view_library: PathBuf,
    /// What a container runtime is to find as CRIU.
    pub stand_in: PathBuf,
    /// Whether a process that outlives CRIU traces for it.
    pub tracer: bool,
    /// What is dumped, and who starts CRIU for that.
    pub kind: Kind,
    /// Namespaces CRIU is started in.
    pub namespaces: Vec<OwnedFd>,
    /// The migration's folder on a tmpfs; images go to `images` in it, the log stays in it.
    pub directory: PathBuf,
    /// The cgroup that holds the tree.
    pub freezer: Freezer,
    /// Mounts of the node that the tree sees in a mount namespace of its own; the root first.
    pub mounts: Vec<MountDescription>,
}

/// A dump under way.
#[derive(Debug)]
pub struct Dump {
    criu: Conversation,
    asker: Asker,
    feed: Feed,
    images: PathBuf,
    log: PathBuf,
}

impl Dump {
    /// Starts CRIU and brings it to `pre-dump`; the workload is not touched.
    pub async fn prepare(plan: DumpPlan) -> Result<Self, DumpError> {
        let images = plan.directory.join("images");
        let log = plan.directory.join(LOG_FILE);
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| DumpError::Io {
                action,
                path,
                source,
            }
        };
        // A round that was retried has left its images.
        match fs::remove_dir_all(&images) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io("removing", &images)(error));
            }
            _ => {}
        }
        fs::create_dir_all(&images).map_err(io("creating", &images))?;
        let feed = Feed::create()?;
        let library = plan.view_library;
        let config = SwrkConfig {
            namespaces: plan.namespaces,
            view: Some(ViewFds {
                freezer: Some(plan.freezer.path().to_owned()),
                tracer: plan.tracer,
                ..feed.share(library.clone())?
            }),
            urgent: true,
            ..SwrkConfig::new(plan.criu, plan.directory.join("dump.out"))
        };
        let open = |path: &Path| -> Result<OwnedFd, DumpError> {
            Ok(fs::File::open(path).map_err(io("opening", path))?.into())
        };
        let directories = Directories {
            images: open(&images)?,
            work: Some(open(&plan.directory)?),
        };
        let options = DumpOptions {
            pid: plan.kind.root(),
            freeze_cgroup: Some(plan.freezer.path().to_string_lossy().into_owned()),
            external: external_at_dump(&plan.mounts),
            ..options(directories)
        };
        let asked = plan
            .kind
            .ask(config, options, &plan.stand_in, &plan.directory);
        let (criu, asker) = asked.await?;
        // Killed in the middle of the dump it fails the migration; its tracer, which takes this
        // over from it, would take the workload with it.
        if let Err(error) = criu.set_oom_score_adj(OOM_SCORE_ADJ) {
            tracing::debug!(%error, "criu is killed for memory like any other");
        }
        let mut dump = Self {
            criu,
            asker,
            feed,
            images,
            log,
        };
        dump.advance(&NotifyScript::PreDump, PREPARE_TIMEOUT)
            .await?;
        if let Err(source) = dump.feed.check_seen_by(&dump.criu) {
            dump.rollback(END_TIMEOUT).await?;
            return Err(DumpError::Unseeing { library, source });
        }
        Ok(dump)
    }

    /// What CRIU is to see of memory; fill and publish it before [`Dump::run`].
    pub fn feed(&mut self) -> &mut Feed {
        &mut self.feed
    }

    /// Lets CRIU dump the frozen tree and brings it to `post-dump`. Without page contents that
    /// takes milliseconds, with shared memory forced in, seconds; how long it may take the caller
    /// says, by dropping the future and calling [`Dump::rollback`].
    pub async fn run(&mut self) -> Result<(), DumpError> {
        self.advance(&NotifyScript::PostDump, RUN_TIMEOUT).await
    }

    /// Whether CRIU is still there, and waits where it was brought to: at `pre-dump`, or since
    /// [`Dump::run`] returned with the tasks held, to be asked when something else holds them, too.
    pub fn holds(&self) -> Result<(), DumpError> {
        if self.criu.is_open() {
            Ok(())
        } else {
            Err(self.failed(TalkError::Closed))
        }
    }

    /// The folder of images, complete once [`Dump::run`] has returned.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Answers `post-dump` with success: SIGKILL is now pending on every task. Thaw the cgroup,
    /// then call [`Dump::end`].
    pub async fn commit(&mut self) -> Result<(), DumpError> {
        let answered = self.criu.answer(true).await;
        answered.map_err(|error| self.failed(error))
    }

    /// Answers the held notification with failure, or lets CRIU find nobody at the next one: it
    /// lets go of the tasks, which then are held by the cgroup alone. One that has not done so
    /// within `patience` is killed, and its tracer puts the tasks back. Waits until both have
    /// ended.
    pub async fn rollback(mut self, patience: Duration) -> Result<(), DumpError> {
        let ended = self.criu.give_up(patience, END_TIMEOUT).await;
        // The workload, which is to run on, does not wait for it.
        let mut asker = std::mem::replace(&mut self.asker, Asker::Us);
        tokio::spawn(async move { asker.ended().await });
        match ended {
            Ok(Ending::ByItself) => Ok(()),
            Ok(Ending::Killed) => {
                tracing::warn!("criu did not let go within {patience:?}, and was killed");
                Ok(())
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Waits until CRIU has ended, by force after a while.
    pub async fn end(mut self) -> Result<(), DumpError> {
        let ended = self.criu.end(END_TIMEOUT).await;
        self.asker.ended().await;
        if ended.is_err() {
            // What it says then does not matter any more: the first error does.
            drop(self.criu.kill());
        }
        ended.map_err(|error| self.failed(error))
    }

    async fn advance(&mut self, point: &NotifyScript, limit: Duration) -> Result<(), DumpError> {
        let advanced = self.criu.until(point, limit).await;
        advanced.map(drop).map_err(|error| self.failed(error))
    }

    /// What an error of the conversation means, and what CRIU's log has to say about it.
    fn failed(&self, error: TalkError) -> DumpError {
        let message = match error {
            TalkError::Early { failed, .. } => failed.and_then(|failed| failed.message),
            TalkError::Closed => None,
            TalkError::Late { point, limit } => {
                let log = self.log.clone();
                return DumpError::Timeout { point, limit, log };
            }
            error => return DumpError::Talk(error),
        };
        let logged = report::first_error(&self.log)
            .ok()
            .flatten()
            .map(|error| error.text);
        let cause = logged.or(message);
        let cause = cause.unwrap_or_else(|| "it ended without a word".to_owned());
        DumpError::Failed {
            cause,
            log: self.log.clone(),
        }
    }
}

/// What is the same for every dump.
fn options(directories: Directories) -> DumpOptions {
    DumpOptions {
        pid: 0,
        directories,
        log: Log {
            file: LOG_FILE.to_owned(),
            level: LogLevel::Warning,
        },
        freeze_cgroup: None,
        freeze_timeout: Some(SEIZE_SECONDS),
        after: AfterDump::Kill,
        tcp_established: true,
        file_locks: true,
        ext_unix_sk: false,
        shell_job: false,
        link_remap: true,
        ghost_limit: Some(u32::try_from(DELETED_FILE_MAX).unwrap_or(u32::MAX)),
        network_lock: NetworkLock::Skip,
        manage_cgroups: ManageCgroups::Ignore,
        external: Vec::new(),
        root: None,
        notify: true,
        page_server: None,
    }
}
