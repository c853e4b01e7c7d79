//! The target's half of a migration, performed: a loop around the machine of `proto`.
//!
//! As at the source, at most one operation works on the [`Site`] at a time. Waiting for rounds goes
//! on beside it, since streams arrive while control messages do. A discard does not wait for what
//! it undoes: a preparation or a restore under way is cut off, and what came of it counts no more.
//!
//! A target never dials: a session is handed to it whenever the source comes, and takes the place
//! of an older one.

pub mod admission;
mod feed;
pub mod folders;
mod images;
pub mod intake;
mod locked;
mod network;
mod operation;
pub mod orphans;
pub mod own;
pub mod parking;
pub mod site;
mod stage;
mod volumes;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::id::{PodUid, WorkloadName};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::{TargetAction, TargetEvent, TargetMachine};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::TargetMessage;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::clock::Clock;
use super::journal::Journal;
use super::log::Log;
use super::progress::{Progress, Waited};
use super::session::{self, Session};
use crate::net::lanes::TargetSession;
use intake::Intake;
use operation::{CutBy, Operation, Performed, operation};
use site::Site;

/// How often it is told what is still to come.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);

/// Events that may wait to be handled.
const EVENTS_MAX: usize = 64;

/// What others ask of a migration under way.
#[derive(Debug)]
pub enum TargetRequest {
    /// Keep the workload from coming here, if that is still possible.
    Abort,
    /// A side is dead for certain.
    Fence(Side),
    /// It is this pod that comes, if one does.
    Expect {
        /// Its UID here.
        pod: PodUid,
        /// Whether that is taken.
        answer: oneshot::Sender<Result<(), Failure>>,
    },
    /// The source has connected.
    Connected(Box<TargetSession>),
}

/// Everything a target driver is made of.
#[derive(Debug)]
pub struct TargetDriver {
    machine: TargetMachine,
    clock: Clock,
    site: Option<Box<Site>>,
    intake: Arc<Intake>,
    operation: Option<JoinHandle<Performed>>,
    /// Cuts the operation off.
    cut: Option<(CutBy, oneshot::Sender<()>)>,
    /// The operation under way has been cut off.
    is_cut: bool,
    waiting: VecDeque<Operation>,
    session: Option<Session<TargetMessage>>,
    connections: u64,
    /// Waits for rounds of the present connection.
    awaiting: Vec<JoinHandle<()>>,
    events: mpsc::Sender<Incoming>,
    incoming: mpsc::Receiver<Incoming>,
    requests: mpsc::Receiver<TargetRequest>,
    status: watch::Sender<Arc<Progress>>,
    /// The workload's root, once it is restored.
    root_pid: Option<i32>,
    /// How long its threads have waited for what had not come.
    waited: Option<Waited>,
    /// The pod that it is to come as.
    expected: Option<PodUid>,
    /// That waits.
    pod_waits: bool,
    recovered: bool,
    /// Workloads may come here with pages missing.
    drains: bool,
    /// How it ended may not be on disk: what proves it must be found by the next daemon.
    end_unwritten: bool,
    log: Log,
}

/// How a driver ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// There was an offer; how it ended is remembered.
    Begun,
    /// Somebody connected, and was gone before there was an offer.
    NeverBegun,
}

/// What the driver needs besides machine and site.
#[derive(Debug)]
pub struct TargetParts {
    /// The machine, new or recovered.
    pub machine: TargetMachine,
    /// The clock the machine was made with.
    pub clock: Clock,
    /// The workload's place.
    pub site: Site,
    /// What others ask.
    pub requests: mpsc::Receiver<TargetRequest>,
    /// Where the status goes.
    pub status: watch::Sender<Arc<Progress>>,
    /// The migration's journal.
    pub journal: Journal,
    /// Made from a journal.
    pub recovered: bool,
}

#[derive(Debug)]
enum Incoming {
    Event(TargetEvent),
    Of(u64, TargetEvent),
}

impl TargetDriver {
    /// A driver for `parts`; nothing happens before [`TargetDriver::run`].
    pub fn new(parts: TargetParts) -> Self {
        let (events, incoming) = mpsc::channel(EVENTS_MAX);
        let log = {
            let events = events.clone();
            Log::start(parts.journal, move |record, written| {
                let event = match written {
                    Ok(()) => TargetEvent::Journalled(record),
                    Err(()) => TargetEvent::JournalFailed(record),
                };
                drop(events.blocking_send(Incoming::Event(event)));
            })
        };
        Self {
            machine: parts.machine,
            clock: parts.clock,
            intake: parts.site.intake(),
            root_pid: parts.site.root_pid(),
            waited: None,
            expected: None,
            pod_waits: false,
            recovered: parts.recovered,
            drains: parts.site.drains(),
            end_unwritten: false,
            site: Some(Box::new(parts.site)),
            operation: None,
            cut: None,
            is_cut: false,
            waiting: VecDeque::new(),
            session: None,
            connections: 0,
            awaiting: Vec::new(),
            events,
            incoming,
            requests: parts.requests,
            status: parts.status,
            log,
        }
    }

    /// Runs the migration to its end, and until the source has gone: it may ask once more, or send
    /// what still comes there for the workload. For that nothing is needed but the intake.
    ///
    /// `session` is the one that began it; a recovered migration has none.
    pub async fn run(mut self, session: Option<Box<TargetSession>>) -> Over {
        if let Some(failure) = self.dropped() {
            self.handle(TargetEvent::Failure(failure));
        }
        if let Some(session) = session {
            self.connected(*session);
        }
        let mut ticks = tokio::time::interval(PROGRESS_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            while let Some(action) = self.machine.poll_action() {
                self.perform(action).await;
            }
            if self.machine.is_finished() && self.operation.is_none() {
                if self.session.is_none() {
                    break;
                }
                // Of one that has given up, streams may still come that are written there.
                if self.machine.status(self.clock.now()).phase == Phase::Done {
                    self.tidy();
                }
            }
            tokio::select! {
                Some(incoming) = self.incoming.recv() => self.take_in(incoming),
                Some(request) = self.requests.recv() => self.requested(request),
                ended = session::ended(&mut self.operation) => self.operation_ended(ended),
                _ = ticks.tick(), if self.intake.feed().is_needed() => self.tell_progress(),
                failure = trouble(&mut self.site) => self.handle(TargetEvent::Failure(failure)),
                () = self.clock.until(self.machine.poll_timeout()) => {
                    self.machine.handle_timeout(self.clock.now());
                }
            }
        }
        self.tidy();
        if self.machine.is_begun() {
            Over::Begun
        } else {
            Over::NeverBegun
        }
    }

    /// Removes the folder of what is over, unless the journal may not know that.
    fn tidy(&mut self) {
        if let Some(site) = self.site.take().filter(|_| !self.end_unwritten) {
            site.tidy();
        }
    }

    /// Why what the journal says is held is not: a restart of the node, or whatever took the pager,
    /// came between. The source hears so before it can say `Go`.
    fn dropped(&self) -> Option<Failure> {
        let phase = self.machine.status(self.clock.now()).phase;
        let site = self.site.as_ref().filter(|_| phase == Phase::Ready)?;
        site.is_dropped()
    }

    fn handle(&mut self, event: TargetEvent) {
        if let TargetEvent::Failure(failure)
        | TargetEvent::DrainLost(failure)
        | TargetEvent::DiscardFailed(failure)
        | TargetEvent::GaveUp(failure)
        | TargetEvent::Lost(failure)
        | TargetEvent::NotLocked(failure) = &event
        {
            tracing::warn!(migration = %self.machine.id(), %failure, "failed");
        }
        if let TargetEvent::JournalFailed(record) = &event {
            self.end_unwritten |= matches!(record.entry, Entry::Aborted(_) | Entry::Done);
        }
        self.machine.handle(self.clock.now(), event);
    }

    fn requested(&mut self, request: TargetRequest) {
        match request {
            TargetRequest::Abort => self.handle(TargetEvent::AbortRequested),
            TargetRequest::Fence(side) => self.handle(TargetEvent::Fenced(side)),
            TargetRequest::Expect { pod, answer } => {
                // Who has asked may have gone away.
                drop(answer.send(self.expect(pod)));
            }
            TargetRequest::Connected(session) => self.connected(*session),
        }
    }

    /// It is to come as this pod: waits for that, beside the rounds.
    fn expect(&mut self, pod: PodUid) -> Result<(), Failure> {
        let status = self.machine.status(self.clock.now());
        let refused = |code, text: String| Err(Failure::new(code, text));
        match (&self.expected, &status.workload) {
            (Some(expected), _) if *expected == pod => return Ok(()),
            (Some(expected), _) => {
                let text = format!("the migration comes as pod {expected} already");
                return refused(ErrorCode::IdTaken, text);
            }
            (None, Some(WorkloadName::Pod(_))) => {}
            (None, _) => {
                let text = "the migration is none of a pod".to_owned();
                return refused(ErrorCode::UnsupportedWorkload, text);
            }
        }
        if !matches!(status.phase, Phase::Accepted | Phase::Receiving) {
            let text = format!("the migration is {}, and expects no pod", status.phase);
            return refused(ErrorCode::Unexpected, text);
        }
        self.expected = Some(pod.clone());
        self.waiting.push_back(Operation::Expect(pod));
        self.next_operation();
        Ok(())
    }

    /// Says how things stand once more: the driver knows more of it.
    fn say_again(&self) {
        let pod_waits = self.pod_waits;
        self.status.send_modify(|progress| {
            Arc::make_mut(progress).waiting = pod_waits;
        });
    }

    fn connected(&mut self, session: TargetSession) {
        if self.session.take().is_some() {
            self.lost();
        }
        self.connections += 1;
        let number = self.connections;
        let TargetSession {
            sender,
            receiver,
            data,
            lanes,
            ..
        } = session;
        let events = self.events.clone();
        let (failures, mut failed) = mpsc::channel(1);
        let serving = self.intake.serve(data, failures);
        let failing = {
            let events = events.clone();
            tokio::spawn(async move {
                while let Some(failure) = failed.recv().await {
                    let event = TargetEvent::Failure(failure);
                    drop(events.send(Incoming::Of(number, event)).await);
                }
            })
        };
        let mut session = Session::open(sender, receiver, lanes, move |said| {
            let events = events.clone();
            async move {
                let event = said.map_or(TargetEvent::PeerLost, TargetEvent::Message);
                events.send(Incoming::Of(number, event)).await.is_ok()
            }
        });
        let asking = self.intake.feed().clone().ask(session.messages());
        session.own([serving, failing, tokio::spawn(asking)]);
        self.session = Some(session);
        self.handle(TargetEvent::PeerConnected);
    }

    fn lost(&mut self) {
        self.session = None;
        for task in self.awaiting.drain(..) {
            task.abort();
        }
        self.handle(TargetEvent::PeerLost);
    }

    /// What has not come yet, if anything.
    fn missing(&self) -> Option<PageCount> {
        Some(self.intake.feed().left()).filter(|left| *left != PageCount::ZERO)
    }

    /// Between the reports of the machine: what is still to come.
    fn tell_progress(&self) {
        let missing = self.missing();
        self.status.send_if_modified(|progress| {
            let is_news = progress.missing != missing;
            if is_news {
                Arc::make_mut(progress).missing = missing;
            }
            is_news
        });
    }

    /// Whether pages are on their way to a workload that runs.
    fn is_fetching(&self) -> bool {
        let phase = self.machine.status(self.clock.now()).phase;
        phase == Phase::Running && self.intake.feed().is_needed()
    }

    fn take_in(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Event(event) => self.handle(event),
            // Of a connection that has been replaced.
            Incoming::Of(number, _) if number != self.connections => {}
            Incoming::Of(_, TargetEvent::PeerLost) => {
                if self.session.is_some() {
                    self.lost();
                }
            }
            // What did not get in is asked for once more, over another connection.
            Incoming::Of(_, TargetEvent::Failure(failure)) if self.is_fetching() => {
                tracing::warn!(migration = %self.machine.id(), %failure,
                    "pages that were fetched were not taken in");
                self.lost();
            }
            Incoming::Of(_, event) => self.handle(event),
        }
    }

    async fn perform(&mut self, action: TargetAction) {
        match action {
            TargetAction::AwaitFinal(last) => {
                let intake = Arc::clone(&self.intake);
                self.await_streams(async move {
                    intake.folders().check_last(last.files)?;
                    intake.complete(last).await?;
                    locked::check(&intake.all_images(), last.locks)?;
                    Ok(TargetEvent::FinalStored)
                });
            }
            TargetAction::AwaitRound(end) => {
                let intake = Arc::clone(&self.intake);
                self.await_streams(async move {
                    let stored = intake.round(end).await;
                    stored.map(|()| TargetEvent::RoundStored { round: end.round })
                });
            }
            TargetAction::Journal(record) => {
                tracing::debug!(migration = %record.migration, record = record.entry.name(),
                    "journal");
                self.log.write(record).await;
            }
            TargetAction::Report(status) => {
                tracing::debug!(migration = %status.id, phase = %status.phase.name(), "status");
                self.status.send_replace(Arc::new(Progress {
                    pid_at_target: self.root_pid,
                    waiting: self.pod_waits && !status.phase.is_final(),
                    recovered: self.recovered,
                    missing: self.missing(),
                    waited: self.waited,
                    ..Progress::of(status)
                }));
            }
            TargetAction::Send(mut message) => {
                match &mut message {
                    TargetMessage::Started { root_pid, .. } => *root_pid = self.root_pid,
                    TargetMessage::Accepted {
                        kept,
                        parks,
                        drains,
                        ..
                    } => {
                        *kept = self.intake.folders().kept();
                        *parks = self.intake.parking().is_open();
                        *drains = self.drains;
                    }
                    _ => {}
                }
                // Without a session the source asks again when it is back.
                if let Some(session) = &self.session
                    && !session.say(message)
                {
                    self.lost();
                }
            }
            TargetAction::Abandon
            | TargetAction::Discard
            | TargetAction::LetGo { .. }
            | TargetAction::Lock
            | TargetAction::Prepare(_)
            | TargetAction::Restore { .. } => {
                if let Some((_, cut)) = self.cut.take_if(|(by, _)| by.is(&action)) {
                    self.is_cut = true;
                    // One that has just ended is not heard either.
                    let _ = cut.send(());
                }
                self.waiting.push_back(Operation::Action(Box::new(action)));
                self.next_operation();
            }
        }
    }

    fn await_streams(
        &mut self,
        waiting: impl Future<Output = Result<TargetEvent, Failure>> + Send + 'static,
    ) {
        let (events, number) = (self.events.clone(), self.connections);
        self.awaiting.retain(|task| !task.is_finished());
        self.awaiting.push(tokio::spawn(async move {
            let event = waiting.await.unwrap_or_else(TargetEvent::Failure);
            drop(events.send(Incoming::Of(number, event)).await);
        }));
    }

    fn next_operation(&mut self) {
        if self.operation.is_some() {
            return;
        }
        let Some(next) = self.waiting.pop_front() else {
            return;
        };
        let Some(mut site) = self.site.take() else {
            return;
        };
        let (cut, is_cut) = oneshot::channel();
        self.cut = Some((next.cut_by(), cut));
        self.operation = Some(tokio::spawn(async move {
            let (event, follows) = tokio::select! {
                done = operation(&mut site, next) => done,
                Ok(()) = is_cut => (Some(TargetEvent::Failure(cut_off())), None),
            };
            (site, follows, event)
        }));
    }

    fn operation_ended(&mut self, ended: Result<Performed, tokio::task::JoinError>) {
        self.operation = None;
        self.cut = None;
        match ended {
            Ok((site, follows, event)) => {
                self.root_pid = site.root_pid();
                self.waited = site.waited();
                self.site = Some(site);
                self.waiting.extend(follows);
                // The machine waits for what follows, and would take this for its end.
                if std::mem::take(&mut self.is_cut) {
                    tracing::info!(migration = %self.machine.id(), "cut off, to be given up");
                } else if let Some(event) = event {
                    self.handle(event);
                } else {
                    self.pod_waits = true;
                    self.say_again();
                }
            }
            // What the kernel and the pager hold is found again from the journal.
            Err(error) => {
                tracing::error!("an operation panicked: {error}");
                std::process::abort();
            }
        }
        self.next_operation();
    }
}

fn cut_off() -> Failure {
    Failure::new(ErrorCode::Aborted, "cut off by what ended the migration")
}

/// What goes wrong with an idle site; for ever nothing while an operation has it.
async fn trouble(site: &mut Option<Box<Site>>) -> Failure {
    match site {
        Some(site) => site.trouble().await,
        None => std::future::pending().await,
    }
}
