//! The pager's process: how it shields itself, and how it answers the daemon.
//!
//! Everything that matters happens in [`crate::restore`] and the serving threads; this is the desk.
//! It keeps the state that the daemon asks for, hands decisions on, and remembers who waits for
//! which answer. A daemon that goes away takes nothing along but its questions.
//!
//! Invariants: one daemon is listened to at a time; a tree that is restored is never given up
//! because of what happens here; the process ends only when nothing is left to hold.

mod memory;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_sys::fdpass::watched_for_reading;
use pageferry_sys::gate::Gate;
use pageferry_sys::priority;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::ahead::{Ahead, Ready};
use crate::channel::{Channel, ChannelError, Listener, next_question};
use crate::error::PagerError;
use crate::failure::{no_gate, no_network, unexpected};
use crate::marks::{self, FILLED, READY, SOCKET};
use crate::message::{
    Ask, Fault, FillReport, Namespace, Reply, Request, RestoreRequest, Restored, State, Told,
};
use crate::plan::Plan;
use crate::restore::{self, Decision, Job, Progress};
use crate::serve::{Counters, Homes, Wanted};
pub use crate::shield::CgroupFiles;
use crate::shield::{join, shield};
use crate::signals::Signals;
use crate::start::{At, make_ready};
use crate::watcher::Watcher;

/// How long a pager that holds nothing waits for its daemon to come back.
const IDLE_MAX: Duration = Duration::from_secs(600);

/// How often a pager that nobody talks to looks whether it is still needed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Absent pages of one message.
const WANTED_MAX: usize = 512;

/// Runs a pager with its files in `directory`. To be called while the process has one thread.
pub fn run(directory: &Path, cgroups: &CgroupFiles) -> Result<(), PagerError> {
    join(&cgroups.pager)?;
    let network = Arc::new(shield()?);
    let watcher = Watcher::start(directory, &cgroups.watcher).map_err(PagerError::Watcher)?;
    // Until the workload runs every millisecond is one that its clients wait for.
    let nice = priority::make_urgent();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(PagerError::Runtime)?;
    runtime.block_on(serve(directory, Arc::new(watcher), network, nice))
}

async fn serve(
    directory: &Path,
    watcher: Arc<Watcher>,
    network: Arc<OwnedFd>,
    nice: i32,
) -> Result<(), PagerError> {
    let listener = Listener::bind(&directory.join(SOCKET)).map_err(PagerError::Channel)?;
    println!("{READY}");
    let mut signals = Signals::new().map_err(PagerError::Runtime)?;
    let pidfd = watcher
        .pidfd()
        .try_clone_to_owned()
        .and_then(watched_for_reading);
    let pidfd = pidfd.map_err(PagerError::Runtime)?;
    let mut look = tokio::time::interval(LOOK_EVERY);
    let (told, mut progress) = mpsc::unbounded_channel();
    let (want, mut wanted) = mpsc::unbounded_channel();
    let mut wants = Vec::new();
    let mut desk = Desk::new(directory, watcher, network, nice, (told, want));
    let mut watched = true;
    while !desk.is_over() {
        tokio::select! {
            accepted = listener.accept() => desk.connected(accepted).await,
            received = next_question(desk.connection.as_ref()) => match received {
                Some((ask, fds)) => desk.asked(ask, fds).await,
                None => desk.disconnected(),
            },
            Some(what) = progress.recv() => desk.progressed(what).await,
            _ = wanted.recv_many(&mut wants, WANTED_MAX) => desk.want(&mut wants).await,
            name = signals.next() => desk.signalled(name),
            _ = look.tick() => desk.look(),
            _ = pidfd.readable(), if watched => {
                watched = false;
                warn!("the watcher has died: if the pager died, too, threads would read zeros");
            }
        }
    }
    Ok(())
}

/// What the pager knows and who wants to know it.
struct Desk {
    directory: PathBuf,
    watcher: Arc<Watcher>,
    network: Arc<OwnedFd>,
    progress: mpsc::UnboundedSender<Progress>,
    /// Hears of absent pages that threads wait for.
    wanted: mpsc::UnboundedSender<Wanted>,
    connection: Option<Channel>,
    /// Questions that are answered later.
    waiting: Vec<(u64, Awaited)>,
    state: State,
    plan: Plan,
    decisions: Option<mpsc::UnboundedSender<Decision>>,
    counters: Option<oneshot::Receiver<Arc<Counters>>>,
    counted: Option<Arc<Counters>>,
    /// Where pages that were absent are waited for.
    homes: Arc<Homes>,
    cgroup: Option<Freezer>,
    /// Of the loopback, until the restore has it.
    lo_gate: Option<Gate>,
    /// Started, and waiting.
    criu: Option<Ahead>,
    /// How nice this process was.
    nice: i32,
    restored: Option<Restored>,
    /// The tree has file locks to take before it may be let go.
    lacks_locks: bool,
    fault: Option<Fault>,
    report: Option<FillReport>,
    /// The daemon knows how it ended.
    reported: bool,
    /// Nothing is left to be held or told.
    over: bool,
    /// How long nobody has been connected.
    alone: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Restored,
    Locked,
    Resumed,
    Discarded,
}

impl Desk {
    fn new(
        directory: &Path,
        watcher: Arc<Watcher>,
        network: Arc<OwnedFd>,
        nice: i32,
        (progress, wanted): (
            mpsc::UnboundedSender<Progress>,
            mpsc::UnboundedSender<Wanted>,
        ),
    ) -> Self {
        Self {
            directory: directory.to_owned(),
            watcher,
            network,
            progress,
            wanted,
            connection: None,
            waiting: Vec::new(),
            state: State::Idle,
            plan: Plan::default(),
            decisions: None,
            counters: None,
            counted: None,
            homes: Arc::default(),
            cgroup: None,
            lo_gate: None,
            criu: None,
            nice,
            restored: None,
            lacks_locks: false,
            fault: None,
            report: None,
            reported: false,
            over: false,
            alone: Duration::ZERO,
        }
    }

    fn is_over(&self) -> bool {
        self.over || (self.report.is_some() && self.reported)
    }

    async fn connected(&mut self, accepted: Result<Channel, ChannelError>) {
        match accepted {
            Ok(_) if self.connection.as_ref().is_some_and(|held| !held.is_over()) => {
                warn!("a second daemon was turned away");
            }
            Ok(channel) => {
                // The one that was there may not have been seen to be gone.
                self.disconnected();
                self.connection = Some(channel);
                self.alone = Duration::ZERO;
                if let Some(report) = self.report {
                    self.reported |= self.tell(&Told::Filled(report)).await;
                }
            }
            Err(error) => warn!(%error, "a connection was not taken"),
        }
    }

    fn disconnected(&mut self) {
        self.waiting.clear();
        if self.connection.take().is_some() {
            info!(state = ?self.state, "the daemon is gone");
        }
    }

    /// Nobody is waited for for ever.
    fn look(&mut self) {
        if self.connection.is_some() {
            return;
        }
        self.alone += LOOK_EVERY;
        let is_dead = self.fault.as_ref().is_some_and(|fault| !fault.after_go);
        if (self.state == State::Idle || is_dead) && IDLE_MAX < self.alone {
            info!("nothing is held and nobody comes back");
            self.over = true;
        }
        let is_gone = || self.cgroup.as_ref().is_some_and(Freezer::is_empty);
        if self.report.is_some() && is_gone() {
            info!("the workload has ended");
            self.over = true;
        }
    }

    fn signalled(&mut self, name: &str) {
        let holds_nothing = match self.state {
            State::Idle | State::Filled => true,
            State::Failed => self.report.is_some() || self.decisions.is_none(),
            State::Restoring
            | State::Held
            | State::Resuming
            | State::Running
            | State::Discarding => false,
        };
        if holds_nothing {
            info!(signal = name, "ending");
            self.over = true;
        } else {
            warn!(signal = name, state = ?self.state, "ignored: a tree depends on this process");
        }
    }

    async fn asked(&mut self, ask: Ask, fds: Vec<OwnedFd>) {
        let id = ask.id;
        let reply = match ask.request {
            Request::Space { space } => Some(self.store(space, fds)),
            Request::Plan { spaces } => Some(self.planned(&spaces, fds, Plan::pending)),
            Request::Absent { spaces } => Some(self.planned(&spaces, fds, Plan::absent)),
            Request::Arrived { runs } => Some(self.arrived(&runs)),
            Request::Missing { after } => return self.missing(id, after).await,
            Request::LoGate => Some(self.lo_gate(fds)),
            Request::Prepare(request) => Some(self.prepare(*request, fds).await),
            Request::Restore(request) => self.restore(id, *request, fds).await,
            Request::Lock => self.lock(id),
            Request::Go => self.go(id),
            Request::Discard => self.discard(id).await,
            Request::Status => Some(Reply::Status(self.status())),
        };
        if let Some(reply) = reply {
            self.tell(&Told::Reply { id, reply }).await;
        }
    }

    fn lo_gate(&mut self, fds: Vec<OwnedFd>) -> Reply {
        if self.state != State::Idle {
            return self.out_of_order("a gate");
        }
        let Ok(fds) = <[OwnedFd; 2]>::try_from(fds) else {
            return unexpected("a gate needs two descriptors");
        };
        match Gate::from_descriptors(fds) {
            Ok(gate) => {
                self.lo_gate = Some(gate);
                Reply::Ok
            }
            Err(error) => no_gate(&error),
        }
    }

    async fn restore(
        &mut self,
        id: u64,
        request: RestoreRequest,
        fds: Vec<OwnedFd>,
    ) -> Option<Reply> {
        match (self.state, self.restored, &self.fault) {
            (State::Idle, _, _) => {
                if fds.len() != request.namespaces.len() + request.inherit.len() {
                    return Some(unexpected("a restore needs each descriptor it names"));
                }
                if let Err(error) = self.start(request, fds).await {
                    return Some(no_network(&error));
                }
                self.state = State::Restoring;
                self.waiting.push((id, Awaited::Restored));
                None
            }
            (State::Restoring, _, _) => {
                self.waiting.push((id, Awaited::Restored));
                None
            }
            (State::Failed, _, Some(fault)) => Some(Reply::Failed(fault.clone())),
            (_, Some(restored), _) => Some(Reply::Restored(restored)),
            _ => Some(self.out_of_order("a restore")),
        }
    }

    async fn prepare(&mut self, request: RestoreRequest, fds: Vec<OwnedFd>) -> Reply {
        if self.state != State::Idle {
            return self.out_of_order("a preparation");
        }
        if fds.len() != request.namespaces.len() + request.inherit.len() {
            return unexpected("a preparation needs each descriptor it names");
        }
        let (namespaces, inherited) = match self.divide(&request, fds) {
            Ok(divided) => divided,
            Err(error) => return no_network(&error),
        };
        match make_ready(&request, namespaces, inherited).await {
            Ok(ready) => {
                let criu_pid = ready.criu_pid();
                self.criu = Some(Ahead::new(request, ready));
                Reply::Prepared { criu_pid }
            }
            Err(error) => Reply::Failed(error.fault(None)),
        }
    }

    /// Namespaces and inherited descriptors of a request. Without a network namespace among them
    /// CRIU is started in the one that this process was.
    fn divide(
        &self,
        request: &RestoreRequest,
        mut fds: Vec<OwnedFd>,
    ) -> io::Result<(At, Vec<OwnedFd>)> {
        let inherited = fds.split_off(request.namespaces.len());
        if !request.namespaces.contains(&Namespace::Net) {
            fds.insert(0, self.network.try_clone()?);
        }
        Ok(((fds, Arc::clone(&self.network)), inherited))
    }

    async fn start(&mut self, request: RestoreRequest, fds: Vec<OwnedFd>) -> io::Result<()> {
        let (namespaces, inherited) = self.divide(&request, fds)?;
        let criu: Option<Ready> = match self.criu.take() {
            Some(ahead) => ahead.take_for(&request).await,
            None => None,
        };
        // The restore itself says so if it is not one.
        self.cgroup = Some(request.cgroup());
        let mut plan = std::mem::take(&mut self.plan);
        self.homes = Arc::new(Homes::new(plan.take_absent(), self.wanted.clone()));
        let job = Job {
            request,
            namespaces,
            inherited,
            plan,
            homes: self.homes.clone(),
            lo_gate: self.lo_gate.take(),
            watcher: self.watcher.clone(),
            criu,
            nice: self.nice,
        };
        self.lacks_locks = job.request.locks;
        let (decisions, decided) = mpsc::unbounded_channel();
        let (count, counters) = oneshot::channel();
        self.decisions = Some(decisions);
        self.counters = Some(counters);
        tokio::spawn(restore::run(job, decided, self.progress.clone(), count));
        Ok(())
    }

    fn lock(&mut self, id: u64) -> Option<Reply> {
        match (self.state, &self.fault) {
            (State::Held, _) => {
                self.decide(Decision::Lock);
                self.waiting.push((id, Awaited::Locked));
                None
            }
            // It has them since before it was let go.
            (State::Resuming | State::Running | State::Filled, _) => Some(Reply::Ok),
            (State::Failed, Some(fault)) => Some(Reply::Failed(fault.clone())),
            (State::Idle | State::Restoring | State::Discarding | State::Failed, _) => {
                Some(self.out_of_order("locks"))
            }
        }
    }

    fn go(&mut self, id: u64) -> Option<Reply> {
        match (self.state, &self.fault) {
            (State::Held, _) if self.lacks_locks => {
                Some(self.out_of_order("go without its file locks"))
            }
            (State::Held, _) => {
                self.state = State::Resuming;
                self.decide(Decision::Go);
                self.waiting.push((id, Awaited::Resumed));
                None
            }
            // What is being undone ends in a failure, which is the answer.
            (State::Resuming | State::Discarding, _) => {
                self.waiting.push((id, Awaited::Resumed));
                None
            }
            (State::Running | State::Filled, _) => Some(Reply::Resumed),
            (State::Failed, Some(fault)) => Some(Reply::Failed(fault.clone())),
            (State::Idle | State::Restoring | State::Failed, _) => Some(self.out_of_order("go")),
        }
    }

    async fn discard(&mut self, id: u64) -> Option<Reply> {
        if self.state == State::Idle
            && let Some(ahead) = self.criu.take()
        {
            ahead.call_off().await;
        }
        match (self.state, &self.fault) {
            (State::Idle, _) => {
                self.over = true;
                Some(Reply::Ok)
            }
            (State::Restoring | State::Held, _) => {
                self.state = State::Discarding;
                self.decide(Decision::Discard);
                self.waiting.push((id, Awaited::Discarded));
                None
            }
            (State::Discarding, _) => {
                self.waiting.push((id, Awaited::Discarded));
                None
            }
            (
                State::Failed,
                Some(Fault {
                    after_go: false, ..
                }),
            ) => {
                self.over = true;
                Some(Reply::Ok)
            }
            (State::Resuming | State::Running | State::Filled | State::Failed, _) => {
                let fault = Fault::new(ErrorCode::Unexpected, "the tree has been let go");
                Some(Reply::Failed(Fault {
                    after_go: true,
                    ..fault
                }))
            }
        }
    }

    fn decide(&self, decision: Decision) {
        if let Some(decisions) = &self.decisions {
            // A restore that has just ended by itself tells so.
            let _ = decisions.send(decision);
        }
    }

    async fn progressed(&mut self, what: Progress) {
        match what {
            Progress::Held(restored) => {
                let cgroup = self.cgroup.take();
                let again =
                    |one: Freezer| Freezer::again(one.path().to_owned(), restored.freezer_id);
                self.cgroup = cgroup.map(again);
                self.restored = Some(restored);
                // A decision to discard may have crossed it.
                if self.state == State::Restoring {
                    self.state = State::Held;
                }
                self.answer(Awaited::Restored, &Reply::Restored(restored))
                    .await;
            }
            Progress::Locked(taken) => {
                self.lacks_locks &= taken.is_err();
                let reply = taken.map_or_else(Reply::Failed, |()| Reply::Ok);
                self.answer(Awaited::Locked, &reply).await;
            }
            Progress::Resumed => {
                self.state = State::Running;
                self.answer(Awaited::Resumed, &Reply::Resumed).await;
            }
            Progress::Filled(report) => self.filled(report).await,
            Progress::Failing => {
                if matches!(self.state, State::Restoring | State::Held) {
                    self.state = State::Discarding;
                }
            }
            Progress::Discarded => {
                let fault = Fault::new(ErrorCode::Aborted, "the restore was discarded");
                let reply = Reply::Failed(fault);
                for awaited in [Awaited::Restored, Awaited::Locked, Awaited::Resumed] {
                    self.answer(awaited, &reply).await;
                }
                self.answer(Awaited::Discarded, &Reply::Ok).await;
                self.over = true;
            }
            Progress::Failed(fault) => self.failed(fault).await,
        }
    }

    async fn filled(&mut self, report: FillReport) {
        info!(?report, "filled");
        if self.state != State::Failed {
            self.state = State::Filled;
        }
        self.report = Some(report);
        if let Err(error) = marks::write_filled(&self.directory, &report) {
            warn!(%error, "cannot write {FILLED}");
        }
        self.reported |= self.tell(&Told::Filled(report)).await;
    }

    async fn failed(&mut self, fault: Fault) {
        self.state = State::Failed;
        self.fault = Some(fault.clone());
        if !fault.after_go {
            self.decisions = None;
        }
        let mut answered = false;
        for awaited in [Awaited::Restored, Awaited::Locked, Awaited::Resumed] {
            answered |= self.answer(awaited, &Reply::Failed(fault.clone())).await;
        }
        // It was to be discarded, and nothing is left of it.
        if self.answer(Awaited::Discarded, &Reply::Ok).await {
            self.over = true;
        } else if !answered {
            self.tell(&Told::Failed(fault)).await;
        }
    }

    /// Answers whoever waits for this; false if nobody does.
    async fn answer(&mut self, awaited: Awaited, reply: &Reply) -> bool {
        let is_awaited = |(_, wanted): &mut (u64, Awaited)| *wanted == awaited;
        let waiting: Vec<_> = self.waiting.extract_if(.., is_awaited).collect();
        for (id, _) in &waiting {
            let reply = reply.clone();
            self.tell(&Told::Reply { id: *id, reply }).await;
        }
        !waiting.is_empty()
    }

    /// Whether it was told.
    async fn tell(&mut self, told: &Told) -> bool {
        self.tell_with(told, &[]).await
    }

    async fn tell_with(&mut self, told: &Told, fds: &[BorrowedFd<'_>]) -> bool {
        let Some(channel) = &self.connection else {
            return false;
        };
        // A daemon that does not read must not keep the pager from its work.
        match tokio::time::timeout(LOOK_EVERY, channel.send(told, fds)).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => warn!(%error, "the daemon cannot be told"),
            Err(_) => warn!("the daemon does not read"),
        }
        self.disconnected();
        false
    }

    fn out_of_order(&self, what: &str) -> Reply {
        unexpected(&format!(
            "{what} has no place in the state {:?}",
            self.state
        ))
    }
}
