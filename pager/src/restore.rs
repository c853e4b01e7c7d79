//! One restored tree, from CRIU's start to the last page.
//!
//! ```text
//! prepare: loopback is shut ─► lazy-pages socket ─► criu swrk ─► userfaultfds arrive, faults are
//!          served
//!          └► post-restore is notified: nobody has run ─► every space is there ─► held
//! held:    lock ──► every process has its file locks again ──► held
//!          go ──► the watcher knows ─► loopback opens ─► the notification is answered ─► CRIU
//!                 finishes ─► resumed
//!                 └► "finished" on the socket: the fill begins ─► every page is in ─► filled
//!          discard, or CRIU fails ─► answer false, kill what is left, see that it is gone
//! ```
//!
//! Invariants: until `Go` the notification is unanswered, so nothing runs, and a failure ends in an
//! empty cgroup before it is told. From the answer on there is no way back: a failure is told as
//! one after `Go`, and what is there goes on being served. While sockets are made one after the
//! other, nothing passes the loopback of their network. Userfaultfds are closed when their
//! space is complete or the cgroup is empty, never else.
//! Nobody needs to listen: without a daemon the tree is held, or filled to the end.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criu_glue::lazy::{LazyMessage, LazySocket, Session};
use criu_glue::options::{Directories, Request, RestoreOptions};
use criu_glue::rpc::{Conversation, Ending, Event, NotifyScript, TalkError};
use pageferry_cgroup::freezer::{CgroupError, Freezer};
use pageferry_proto::id::SpaceId;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_sys::gate::Gate;
use pageferry_sys::uffd::Uffd;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::ahead::Ready;
use crate::failure::RestoreError;
use crate::locks::Locks;
use crate::message::{Fault, FillReport, RestoreRequest, Restored};
use crate::plan::Plan;
use crate::runtime::Runtime;
use crate::serve::{Counters, Homes, Server, Space};
use crate::start::{At, LOG, make_ready, open, options};
pub use crate::waits::Decision;
use crate::waits::{discarded, locked};
use crate::watcher::Watcher;

/// How long a runtime may take to write down that its container runs: milliseconds. Whoever said
/// "go" waits for it, and for 30 s at most.
const RUNTIME_ANSWER_MAX: Duration = Duration::from_secs(5);

/// How long a CRIU that was told to give up may take before it is killed.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a container runtime may take to undo a restore that failed, before what is left of the
/// tree is killed.
const UNDO_TIMEOUT: Duration = Duration::from_secs(1);

/// How long killed tasks may take to be gone before it is said that they are not, and again.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after CRIU has said that every task is ready their userfaultfds may take to arrive.
/// They were sent before, so they wait in the socket.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What is to be restored.
#[derive(Debug)]
pub struct Job {
    /// How.
    pub request: RestoreRequest,
    /// Namespaces CRIU is started in.
    pub namespaces: At,
    /// Descriptors CRIU gets, in the order of `request.inherit`.
    pub inherited: Vec<OwnedFd>,
    /// What is missing where.
    pub plan: Plan,
    /// Where pages that are absent are waited for.
    pub homes: Arc<Homes>,
    /// Of the loopback that the tree uses, if it has been handed over.
    pub lo_gate: Option<Gate>,
    /// Holds the descriptors, too.
    pub watcher: Arc<Watcher>,
    /// What was started before, by [`make_ready`] with the same request.
    pub criu: Option<Ready>,
    /// What [`pageferry_sys::priority`] was before this process was urgent.
    pub nice: i32,
}

/// What has happened to a tree.
#[derive(Debug)]
pub enum Progress {
    /// It is there and held.
    Held(Restored),
    /// It is held, and has its file locks, or not all of them.
    Locked(Result<(), Fault>),
    /// It runs.
    Resumed,
    /// Its memory is complete, or it has ended.
    Filled(FillReport),
    /// It has failed, and what is there is being undone.
    Failing,
    /// Nothing of it is left, as was decided.
    Discarded,
    /// It failed. Before `Go` nothing of it is left.
    Failed(Fault),
}

/// What CRIU said.
enum Heard {
    /// It is about to restore.
    Connected,
    /// Something about the memory of a task.
    Lazy(LazyMessage),
    /// A notification, or its last word.
    Event(Event),
}

/// Why `held` came back.
enum Held {
    Decided(Decision),
    Failed(RestoreError),
}

/// A restore on its way.
#[derive(Debug)]
struct Restore {
    server: Server,
    filled: mpsc::UnboundedReceiver<()>,
    plan: Plan,
    locks: Arc<Locks>,
    /// Of the loopback: shut until the tree is let go.
    lo_gate: Option<Gate>,
    watcher: Arc<Watcher>,
    cgroup: Freezer,
    work_dir: PathBuf,
    socket: LazySocket,
    session: Option<Session>,
    criu: Conversation,
    /// Who asks CRIU, if it is not us.
    runtime: Option<Runtime>,
    /// What CRIU is asked for by us, until it is.
    options: Option<RestoreOptions>,
    /// CRIU has said "finished" on the lazy-pages socket.
    finished: bool,
}

/// Runs a restore to its end. Decisions come in, what happens goes out; `counters` is given the
/// numbers that change meanwhile.
pub async fn run(
    job: Job,
    mut decisions: mpsc::UnboundedReceiver<Decision>,
    progress: mpsc::UnboundedSender<Progress>,
    counters: tokio::sync::oneshot::Sender<Arc<Counters>>,
) {
    let tell = |what| {
        // Only a pager that is ending does not listen.
        let _ = progress.send(what);
    };
    let start = Instant::now();
    let mut restore = match Restore::start(job).await {
        Ok(restore) => restore,
        Err(error) => return tell(Progress::Failed(error.fault(None))),
    };
    let _ = counters.send(restore.server.counters());
    let prepared = tokio::select! {
        prepared = restore.prepare() => prepared,
        () = discarded(&mut decisions) => return tell(restore.discard().await),
    };
    let root_pid = match prepared {
        Ok(root_pid) => root_pid,
        Err(error) => {
            tell(Progress::Failing);
            return tell(restore.fail(error).await);
        }
    };
    let restore_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    info!(root_pid, restore_ms, "restored, held");
    tell(Progress::Held(Restored {
        root_pid,
        restore_ms,
        freezer_id: restore.cgroup.id(),
    }));
    match restore.held(&mut decisions, root_pid, &tell).await {
        Held::Decided(Decision::Go | Decision::Lock) => {}
        Held::Decided(Decision::Discard) => return tell(restore.discard().await),
        Held::Failed(error) => {
            tell(Progress::Failing);
            return tell(restore.fail(error).await);
        }
    }
    let start = Instant::now();
    match restore.go().await {
        Ok(()) => tell(Progress::Resumed),
        Err((error, false)) => return tell(restore.fail(error).await),
        Err((error, true)) => {
            let after_go = true;
            // Before it hears of it.
            if let Some(mut runtime) = restore.runtime.take() {
                runtime.abandon(&mut restore.criu, root_pid).await;
            }
            let fault = restore.fault(&error);
            tell(Progress::Failed(Fault { after_go, ..fault }));
        }
    }
    let report = restore.fill(start).await;
    tell(Progress::Filled(report));
}

/// Has the watcher hold the cgroup of the tree. One that a runtime makes is there when that waits;
/// a runtime that was started in the place of another has made `another`.
fn hold(
    request: &RestoreRequest,
    another: bool,
    watcher: &Watcher,
) -> Result<Freezer, RestoreError> {
    let cgroup = match another {
        true => Freezer::at(request.freezer.clone()).known(),
        false => Ok(request.cgroup()),
    };
    let cgroup = cgroup.and_then(Freezer::opened);
    let cgroup = cgroup.map_err(RestoreError::Cgroup)?;
    watcher.hold(&cgroup).map_err(RestoreError::Watcher)?;
    Ok(cgroup)
}

impl Restore {
    async fn start(job: Job) -> Result<Self, RestoreError> {
        job.plan
            .complete(job.request.spaces)
            .map_err(RestoreError::Plan)?;
        if let Some(gate) = &job.lo_gate {
            let shut = gate.shut();
            shut.map_err(|error| RestoreError::Loopback("shut", error))?;
        }
        let work_dir = job.request.work_dir.clone();
        let directories = Directories {
            images: open(&job.request.images_dir)?,
            work: Some(open(&work_dir)?),
        };
        let (filled_tell, filled) = mpsc::unbounded_channel();
        let server =
            Server::start(&filled_tell, job.nice, job.homes).map_err(RestoreError::Serve)?;
        let socket = LazySocket::bind(&work_dir).map_err(RestoreError::Lazy)?;
        let options = options(&job.request, directories, &job.inherited);
        let locks = Arc::new(Locks::of(&job.request)?);
        let (ready, is_anew) = match job.criu {
            Some(ready) => (ready, false),
            None => {
                let made = make_ready(&job.request, job.namespaces, job.inherited).await?;
                (made, true)
            }
        };
        let held = hold(&job.request, is_anew && ready.is_runtime(), &job.watcher);
        let cgroup = match held {
            Ok(cgroup) => cgroup,
            Err(error) => {
                ready.call_off().await;
                return Err(error);
            }
        };
        let (criu, runtime, options) = match ready {
            Ready::Criu(criu) => (*criu, None, Some(options)),
            Ready::Runtime(waiting) => {
                let (criu, runtime) = waiting.pass(&job.request).await?;
                (criu, Some(runtime), None)
            }
        };
        Ok(Self {
            server,
            filled,
            plan: job.plan,
            locks,
            lo_gate: job.lo_gate,
            watcher: job.watcher,
            cgroup,
            work_dir,
            socket,
            session: None,
            criu,
            runtime,
            options,
            finished: false,
        })
    }

    /// Up to the point where every task is there, none has run, and every space is served.
    async fn prepare(&mut self) -> Result<i32, RestoreError> {
        if let Some(options) = self.options.take() {
            let requested = self.criu.request(Request::restore(options)).await;
            requested.map_err(RestoreError::Talk)?;
        }
        let root_pid = loop {
            match self.next().await? {
                Heard::Connected => {}
                Heard::Lazy(message) => self.take_over(message)?,
                Heard::Event(Event::Notify {
                    script: NotifyScript::PostRestore,
                    pid,
                }) => {
                    break pid.unwrap_or_default();
                }
                Heard::Event(Event::Notify { .. }) => {}
                Heard::Event(Event::Response(response)) => {
                    let failed = response.into_result().map_err(RestoreError::Criu);
                    return Err(failed.err().unwrap_or(RestoreError::Early));
                }
            }
        };
        let deadline = tokio::time::sleep(ARRIVAL_TIMEOUT);
        tokio::pin!(deadline);
        while let Some(space) = self.plan.first() {
            let Some(session) = self.session.as_mut() else {
                return Err(RestoreError::LazyClosed);
            };
            tokio::select! {
                message = session.next() => {
                    let message = message.map_err(RestoreError::Lazy)?;
                    self.take_over(message.ok_or(RestoreError::LazyClosed)?)?;
                }
                () = &mut deadline => return Err(RestoreError::Missing(space.0)),
            }
        }
        self.server.probe().await.map_err(RestoreError::Serve)?;
        Ok(root_pid)
    }

    /// What CRIU says next, on either of its sockets.
    async fn next(&mut self) -> Result<Heard, RestoreError> {
        let Self {
            session,
            socket,
            criu,
            ..
        } = self;
        let lazy = async {
            match session.as_mut() {
                Some(session) => Ok(session.next().await?.map(Heard::Lazy)),
                None => {
                    *session = Some(socket.accept().await?);
                    Ok(Some(Heard::Connected))
                }
            }
        };
        let heard = tokio::select! {
            // What is on the socket was sent before what is notified.
            biased;
            heard = lazy => heard.map_err(RestoreError::Lazy)?,
            event = criu.advance() => {
                return Ok(Heard::Event(event.map_err(RestoreError::Talk)?));
            }
        };
        match heard {
            Some(heard) => Ok(heard),
            // CRIU closes this socket when it fails; why, it tells on the other.
            None => match tokio::time::timeout(GIVE_UP_TIMEOUT, criu.next()).await {
                Ok(Ok(event @ Event::Response(_))) => Ok(Heard::Event(event)),
                Ok(Ok(Event::Notify { .. }) | Err(_)) | Err(_) => Err(RestoreError::LazyClosed),
            },
        }
    }

    fn take_over(&mut self, message: LazyMessage) -> Result<(), RestoreError> {
        let (vpid, fd) = match message {
            LazyMessage::Uffd { vpid, fd } => (vpid, Some(fd)),
            LazyMessage::Dead { vpid } => (vpid, None),
            LazyMessage::Finished => return Err(RestoreError::Early),
            _ => return Ok(()),
        };
        let id = SpaceId(u32::try_from(vpid).map_err(|_| RestoreError::Unplanned(vpid))?);
        match (fd, self.plan.take(id)) {
            (Some(fd), Some((store, pending))) => {
                let uffd =
                    Uffd::from_fd(fd).map_err(|source| RestoreError::Uffd { vpid, source })?;
                let space = Space::new(id, uffd, pending, store);
                self.server.adopt(space).map_err(RestoreError::Serve)
            }
            (Some(_), None) => Err(RestoreError::Unplanned(vpid)),
            (None, Some((_, pending))) if !pending.is_empty() => Err(RestoreError::Dead(vpid)),
            (None, _) => Ok(()),
        }
    }

    /// Holds the tree until it is decided about, with or without a daemon. Its locks may be taken
    /// meanwhile, which storage that hangs can hold up for ever.
    async fn held(
        &mut self,
        decisions: &mut mpsc::UnboundedReceiver<Decision>,
        root: i32,
        tell: &impl Fn(Progress),
    ) -> Held {
        let mut locking = None;
        loop {
            tokio::select! {
                decision = decisions.recv() => match decision {
                    Some(Decision::Lock) if locking.is_some() => {}
                    Some(Decision::Lock) => {
                        locking = Some(self.locks.clone().take(self.cgroup.clone(), root));
                    }
                    Some(decision) => return Held::Decided(decision),
                    // The sender lives as long as the pager.
                    None => std::future::pending().await,
                },
                taken = locked(&mut locking) => {
                    locking = None;
                    tell(Progress::Locked(taken));
                }
                error = Runtime::gone(&mut self.runtime) => return Held::Failed(error),
                event = self.criu.next() => return Held::Failed(match event {
                    Ok(Event::Response(response)) => match response.into_result() {
                        Err(failed) => RestoreError::Criu(failed),
                        Ok(_) => RestoreError::Early,
                    },
                    Ok(Event::Notify { .. }) => RestoreError::Early,
                    Err(error) => RestoreError::Talk(error),
                }),
            }
        }
    }

    /// Lets the tree run. An error comes with whether it may have run.
    async fn go(&mut self) -> Result<(), (RestoreError, bool)> {
        let before = |error| (error, false);
        if !self.runtime.as_mut().is_none_or(Runtime::is_running) {
            return Err(before(RestoreError::RuntimeRefused));
        }
        self.criu.limit_client(RUNTIME_ANSWER_MAX); // It writes down now that it runs.
        let agreed = self.criu.relay().await;
        if !agreed.map_err(|error| before(RestoreError::Talk(error)))? {
            return Err(before(RestoreError::RuntimeRefused));
        }
        let watcher = |error| before(RestoreError::Watcher(error));
        self.watcher.run(&self.cgroup).map_err(watcher)?;
        // All sockets are there, and none is dumb any more when CRIU goes on.
        if let Some(gate) = &self.lo_gate {
            let opened = gate.open();
            opened.map_err(|error| before(RestoreError::Loopback("open", error)))?;
        }
        let answered = self.criu.answer(true).await;
        answered.map_err(|error| before(RestoreError::Talk(error)))?;
        let resumed = self.resume().await;
        // Not before: it takes its time.
        drop(self.lo_gate.take());
        resumed.map_err(|error| (error, true))
    }

    async fn resume(&mut self) -> Result<(), RestoreError> {
        loop {
            let event = match self.session.as_mut() {
                None => self.criu.advance().await,
                Some(session) => tokio::select! {
                    message = session.next() => {
                        match message.map_err(RestoreError::Lazy)? {
                            Some(LazyMessage::Finished) => {
                                self.finished = true;
                                self.server.fill().map_err(RestoreError::Serve)?;
                            }
                            Some(message) => self.take_over(message)?,
                            None => self.session = None,
                        }
                        continue;
                    }
                    event = self.criu.advance() => event,
                },
            };
            let event = match event {
                // The tree is let go, with or without it.
                Err(error @ TalkError::ClientClosed) => {
                    warn!(%error, "the container runtime has ended before its restore");
                    continue;
                }
                event => event.map_err(RestoreError::Talk)?,
            };
            if let Event::Response(response) = event {
                response.into_result().map_err(RestoreError::Criu)?;
                if let Err(error) = self.criu.reply().await {
                    warn!(%error, "the container runtime does not hear of its restore");
                }
                return Ok(());
            }
        }
    }

    /// Fills to the end, or until the tree is gone.
    async fn fill(&mut self, start: Instant) -> FillReport {
        // After a failure CRIU may not have said that the fill can begin. It can: the tree was
        // let go, and what is in its memory must be right whatever became of CRIU.
        if !self.finished
            && let Err(error) = self.server.fill()
        {
            warn!(%error, "cannot start the fill");
        }
        if let Some(runtime) = &mut self.runtime {
            runtime.done().await;
        }
        while !self.server.is_filled() {
            if self.filled.recv().await.is_none() {
                break;
            }
        }
        if let Err(error) = self.watcher.done() {
            warn!(%error, "the watcher cannot be told that all is filled");
        }
        // CRIU has exited by itself; this only collects its status.
        drop(self.criu.end(GIVE_UP_TIMEOUT).await);
        let counters = self.server.counters();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        FillReport {
            fill_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
            pages: load(&counters.settled),
            faults: load(&counters.faults),
            unmapped: load(&counters.unmapped),
            waited: counters.waited.sum_up(),
        }
    }

    async fn discard(&mut self) -> Progress {
        match self.undo().await {
            Ok(()) => Progress::Discarded,
            Err(error) => self.left(&error).await,
        }
    }

    async fn fail(&mut self, error: RestoreError) -> Progress {
        let fault = self.fault(&error);
        warn!(code = fault.code, text = fault.text, "restore failed");
        match self.undo().await {
            Ok(()) => Progress::Failed(fault),
            Err(error) => self.left(&error).await,
        }
    }

    /// Kills the tree and sees that it is gone.
    async fn undo(&mut self) -> Result<(), CgroupError> {
        // It is in the cgroup, too, so that it is seen there if it does not die. A killed one
        // leaves tasks behind.
        match self.criu.give_up(GIVE_UP_TIMEOUT, GIVE_UP_TIMEOUT).await {
            Ok(Ending::ByItself) => {}
            Ok(Ending::Killed) => warn!("criu did not give up, and was killed"),
            Err(error) => warn!(%error, "criu does not end"),
        }
        if let Some(mut runtime) = self.runtime.take() {
            // It waits for tasks that a killed CRIU has left.
            if !runtime.ends_within(UNDO_TIMEOUT).await {
                self.kill().await?;
            }
            runtime.ended().await;
        }
        self.kill().await?;
        self.watcher
            .done()
            .unwrap_or_else(|error| warn!(%error, "the watcher was not told"));
        Ok(())
    }

    async fn kill(&self) -> Result<(), CgroupError> {
        // A runtime has removed its own.
        if !self.cgroup.exists() {
            return Ok(());
        }
        let cgroup = self.cgroup.clone();
        let killed = tokio::task::spawn_blocking(move || cgroup.kill(KILL_TIMEOUT)).await;
        killed.expect("killing does not panic and is not cancelled")
    }

    /// Tasks that never ran do not die. Their descriptors are kept until they have.
    async fn left(&mut self, error: &CgroupError) -> Progress {
        let mut last = error.to_string();
        loop {
            warn!(
                error = last,
                "tasks that never ran do not die; trying again"
            );
            match self.kill().await {
                Ok(()) => break,
                Err(error) => last = error.to_string(),
            }
        }
        let _ = self.watcher.done();
        Progress::Failed(Fault::new(
            ErrorCode::Internal,
            format!("killed late: {error}"),
        ))
    }

    fn fault(&self, error: &RestoreError) -> Fault {
        error.fault(Some(&self.work_dir.join(LOG)))
    }
}
