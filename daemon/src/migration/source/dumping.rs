//! CRIU at the source, from before the freeze to the hand-off or the thaw: one stands ready while
//! rounds are sent, dumps the frozen tree, and holds it until it is told what comes next.
//!
//! Invariants: a CRIU that was not let in has not touched anything, and may be replaced; what it
//! was shown is compared with the truth before the commit; whoever thaws has waited until CRIU and
//! its tracer have let go.

mod hold;
mod readiness;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criu_glue::view::Feed;
use pageferry_pages::track::ShownSmaps;
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::JoinHandle;

use super::dump::{Dump, DumpError, DumpPlan};
use super::failure::{criu_failed, failed_to_track};
use super::site::SourceNode;
use super::waits::Waits;
use super::workload::Workload;
use crate::migration::text::{chain, internal};

/// How long CRIU may take to let go of tasks that it is told to let go of, before it is killed and
/// its tracer puts them back. The workload stands still meanwhile. It takes milliseconds, and a
/// quarter of one per thread.
const PATIENCE: Duration = Duration::from_millis(300);

const PATIENCE_PER_THREAD: Duration = Duration::from_millis(1);

/// How long a dead daemon's CRIU may take to let go of the tasks.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(30);

/// The dump of one workload.
#[derive(Debug)]
pub(super) struct Dumping {
    /// The `criu` program.
    criu: PathBuf,
    /// The preload library through which CRIU sees memory.
    view_library: PathBuf,
    /// What a container runtime is to find as CRIU.
    stand_in: PathBuf,
    /// Whether a process that outlives CRIU traces for it.
    tracer: bool,
    /// The migration's folder.
    directory: PathBuf,
    stage: Stage,
    /// CRIU was let in: what is prepared is used up.
    let_in: bool,
    /// How often CRIU was started in the place of one that had ended.
    restarts: u32,
    /// How long the last dump held the tasks, from when CRIU was let in to its post-dump.
    held: Option<Duration>,
    /// Compares the smaps CRIU was shown with the true ones.
    comparing: Option<JoinHandle<Result<(), Failure>>>,
}

/// How far CRIU is, which is prepared while rounds are sent.
#[derive(Debug, Default)]
enum Stage {
    #[default]
    No,
    Preparing(JoinHandle<Result<Dump, DumpError>>),
    Prepared(Box<Dump>),
}

impl Dumping {
    /// No CRIU is started yet.
    pub(super) fn new(node: &SourceNode, directory: PathBuf) -> Self {
        Self {
            criu: node.criu.clone(),
            view_library: node.view_library.clone(),
            stand_in: node.stand_in.clone(),
            tracer: node.tracer,
            directory,
            stage: Stage::No,
            let_in: false,
            restarts: 0,
            held: None,
            comparing: None,
        }
    }

    /// Starts CRIU and brings it to its first notification, in the background.
    fn prepare(&mut self, workload: &Workload) -> Result<(), Failure> {
        let plan = DumpPlan {
            criu: self.criu.clone(),
            view_library: self.view_library.clone(),
            stand_in: self.stand_in.clone(),
            tracer: self.tracer,
            kind: workload.kind.clone(),
            namespaces: workload.open_namespaces()?,
            directory: self.directory.clone(),
            freezer: workload.freezer.clone(),
            mounts: workload.described_mounts.clone(),
        };
        self.let_in = false;
        self.stage = Stage::Preparing(tokio::spawn(Dump::prepare(plan)));
        Ok(())
    }

    /// What CRIU is to see of memory; there is one from the freeze to the thaw.
    pub(super) fn feed(&mut self) -> Result<&mut Feed, Failure> {
        Ok(self.prepared()?.feed())
    }

    /// Lets CRIU dump the tree. Answers with how long it had the tasks. One that is cut is let go
    /// by the thaw.
    pub(super) async fn run(
        &mut self,
        waits: &Waits,
    ) -> Result<Result<Duration, DumpError>, Failure> {
        self.let_in = true;
        let in_criu = Instant::now();
        let dumped = waits.on(Wait::Dump, self.prepared()?.run()).await?;
        let dumped = dumped.map(|()| in_criu.elapsed());
        if let Ok(held) = &dumped {
            self.held = Some(*held);
        }
        Ok(dumped)
    }

    /// How long the last dump held the tasks.
    pub(super) fn held(&self) -> Option<Duration> {
        self.held
    }

    /// Whether CRIU still holds the tasks. One that was killed before something else held them has
    /// let them run after their dump.
    pub(super) fn check_held(&mut self) -> Result<(), Failure> {
        let held = self.prepared()?.holds();
        held.map_err(|error| criu_failed(&error))
    }

    /// The folder of images of a tree that is dumped.
    pub(super) fn images(&mut self) -> Result<&Path, Failure> {
        Ok(self.prepared()?.images())
    }

    fn prepared(&mut self) -> Result<&mut Dump, Failure> {
        match &mut self.stage {
            Stage::Prepared(dump) => Ok(dump),
            Stage::No | Stage::Preparing(_) => Err(Failure::new(
                ErrorCode::Internal,
                "there is no prepared dump",
            )),
        }
    }

    /// Begins to compare what CRIU was shown with the truth, in the background: the tree is frozen
    /// for good or until a thaw.
    pub(super) fn begin_comparing(&mut self, shown: Vec<ShownSmaps>) {
        self.comparing = Some(tokio::task::spawn_blocking(move || {
            shown.iter().try_for_each(|shown| {
                let compared = shown.compare();
                compared.map_err(|error| failed_to_track(&error))
            })
        }));
    }

    /// Whether CRIU was told the truth, by what was begun in the same freeze.
    pub(super) async fn compared(&mut self, waits: &Waits) -> Result<(), Failure> {
        match &mut self.comparing {
            Some(comparing) => {
                let compared = waits.on(Wait::Smaps, comparing).await?;
                self.comparing = None;
                compared.map_err(|error| internal(&error))?
            }
            None => Err(Failure::new(
                ErrorCode::Internal,
                "nothing was dumped that could be compared",
            )),
        }
    }

    /// Has CRIU let go of the tree, and waits until nobody of its kind holds it, so that a thaw
    /// does something. With `keep` a CRIU that was not let in goes on waiting for the next freeze.
    pub(super) async fn let_go(&mut self, workload: &Workload, keep: bool) {
        self.comparing = None;
        let mut within = LET_GO_TIMEOUT;
        match std::mem::take(&mut self.stage) {
            Stage::No => {}
            waiting if keep && !self.let_in => self.stage = waiting,
            Stage::Preparing(task) => task.abort(),
            Stage::Prepared(dump) => {
                let threads = u32::try_from(workload.threads()).unwrap_or(u32::MAX);
                let patience = PATIENCE + PATIENCE_PER_THREAD * threads;
                // A CRIU that fails here has let go of the tasks all the same, by its end.
                if let Err(error) = dump.rollback(patience).await {
                    tracing::warn!("criu did not end well: {}", chain(&error));
                    if matches!(error, DumpError::Timeout { .. }) {
                        within = Duration::ZERO;
                    }
                }
            }
        }
        hold::end(workload, &self.criu, within).await;
    }

    /// Has CRIU let go of a tree that is given away and frozen: its cgroup alone holds it then.
    /// Never thaws.
    pub(super) async fn step_back(&mut self, workload: &Workload) -> Result<(), Failure> {
        if let Stage::Prepared(dump) = std::mem::take(&mut self.stage) {
            let threads = u32::try_from(workload.threads()).unwrap_or(u32::MAX);
            // One that fails here has let go of the tasks all the same, by its end.
            if let Err(error) = dump
                .rollback(PATIENCE + PATIENCE_PER_THREAD * threads)
                .await
            {
                tracing::warn!("criu did not end well: {}", chain(&error));
            }
        }
        // Also that of a daemon before this one, which its end tells to let go.
        let deadline = Instant::now() + LET_GO_TIMEOUT;
        while let Some((pid, tracer)) = workload.traced() {
            if deadline < Instant::now() {
                let text = format!("process {tracer} still traces process {pid} of the workload");
                return Err(Failure::new(ErrorCode::Traced, text));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Begins to prepare the next dump, unless a CRIU waits for it already, or will.
    pub(super) fn begin(&mut self, workload: &Workload) -> Result<(), Failure> {
        match self.stage {
            Stage::No => self.prepare(workload),
            Stage::Preparing(_) | Stage::Prepared(_) => Ok(()),
        }
    }

    /// Has CRIU kill the tree when it is thawed: it runs elsewhere now. What then waits for its
    /// end, unless it is gone before.
    pub(super) async fn commit(&mut self) -> Option<Ending> {
        let Stage::Prepared(mut dump) = std::mem::take(&mut self.stage) else {
            return None;
        };
        match dump.commit().await {
            Ok(()) => Some(Ending(dump)),
            Err(error) => {
                tracing::warn!("criu is gone before its end: {}", chain(&error));
                None
            }
        }
    }
}

/// A CRIU that ends when the tree has been thawed, and is dead.
#[derive(Debug)]
pub(super) struct Ending(Box<Dump>);

impl Ending {
    /// Waits for it.
    pub(super) async fn ended(self) {
        if let Err(error) = self.0.end().await {
            tracing::warn!("criu did not end well: {}", chain(&error));
        }
    }
}
