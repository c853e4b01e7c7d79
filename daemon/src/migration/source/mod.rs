//! The source's half of a migration, performed: a loop around the machine of `proto`.
//!
//! The machine decides; the loop carries out its actions and reports what came of them. At most one
//! operation works on the [`Site`] at a time; a thaw that is asked for meanwhile cuts it short and
//! follows it. Control messages of a connection are sent in order by a task of their own, so that a
//! slow peer cannot hold up a thaw.
//!
//! Invariant: every action that asks for an answer is answered by exactly one event, whatever
//! happens; the machine's timers bound how long that may take.

mod calm;
mod delivered;
mod drain;
pub mod dump;
mod dumping;
mod failure;
pub mod folders;
mod images;
mod lo;
mod locked;
mod member;
mod network;
mod operation;
mod parking;
mod sending;
pub mod sent;
pub mod site;
mod state;
mod storage;
mod tracking;
mod unread;
mod verify;
mod waits;
mod workload;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::id::{MigrationId, NodeName};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::Mode;
use pageferry_proto::migration::record::Record;
use pageferry_proto::migration::source::{SourceAction, SourceEvent, SourceMachine};
use pageferry_proto::migration::status::{Phase, Status};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Fetch, SourceMessage, TargetMessage};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::clock::Clock;
use super::journal::Journal;
use super::log::Log;
use super::progress::Progress;
use super::session::{self, Session};
use crate::net::endpoint::Endpoint;
use crate::net::lanes::{self, SourceSession};
use crate::net::stream::DataSender;
use drain::Drain;
use operation::{Performed, ends_others, operation};
use sent::Sent;
use site::Site;
use tracking::Paused;
use waits::Waits;

/// Events that may wait to be handled; each producer has at most a few under way.
const EVENTS_MAX: usize = 64;

/// How often progress is told within a round.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);

/// What an operator asks of a migration under way.
#[derive(Debug, Clone, Copy)]
pub enum SourceRequest {
    /// Keep the workload here, if that is still possible.
    Abort,
    /// One that is held may go on to its freeze.
    Proceed,
    /// A side is dead for certain.
    Fence(Side),
}

/// Everything a source driver is made of.
#[derive(Debug)]
pub struct SourceDriver {
    machine: SourceMachine,
    clock: Clock,
    /// `None` while an operation has it.
    site: Option<Box<Site>>,
    operation: Option<JoinHandle<Performed>>,
    /// Operations asked for while another has the site.
    waiting: VecDeque<SourceAction>,
    cancel: watch::Sender<bool>,
    connection: Option<Connection>,
    /// Counts connections, so that a message of an old one is not taken for one of the new.
    connections: u64,
    measured: Measured,
    /// What the round under way has sent.
    sent: Arc<Sent>,
    /// Answers a target that fetches pages.
    drain: Drain,
    /// One of the connections is for pages that are waited for.
    may_drain: bool,
    /// The target was said to run the workload.
    is_drained: bool,
    /// Bytes of pages that it has fetched since, and on the wire.
    fetched: (u64, u64),
    /// How often the workload stood still for scans.
    paused: Paused,
    /// What the operation under way waits for.
    waits: Waits,
    /// Whether a difference in smaps is a reason to start again.
    repeatable: bool,
    /// The migration that was started in place of this one, before a restart.
    successor: Option<MigrationId>,
    recovered: bool,
    /// What the move takes from the workload's clients.
    notes: Vec<String>,
    /// The last status, if it is not to be seen before there is a successor.
    held_back: Option<Progress>,
    /// What the target said it is called there.
    pid_at_target: Option<i32>,
    events: mpsc::Sender<Incoming>,
    incoming: mpsc::Receiver<Incoming>,
    requests: mpsc::Receiver<SourceRequest>,
    status: watch::Sender<Arc<Progress>>,
    log: Log,
    endpoint: Arc<Endpoint>,
    peer: NodeName,
    lanes: u8,
}

/// What a freeze came to.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    /// How long CRIU held the tasks.
    frozen: Option<Duration>,
    /// How long shared storage was synced.
    synced: Option<Duration>,
    /// Pages of the final round, and those that were to follow it.
    final_pages: Option<u64>,
    followed: Option<PageCount>,
}

impl Measured {
    /// How the memory has moved, of which the machine says what rounds have sent.
    fn mode(&self, status: &Status) -> Option<Mode> {
        Some(match (self.followed?, status.sent_bytes) {
            (PageCount::ZERO, _) => Mode::Precopy,
            (_, 0) => Mode::Postcopy,
            _ => Mode::Hybrid,
        })
    }
}

/// What the driver needs besides machine and site.
#[derive(Debug)]
pub struct SourceParts {
    /// The machine, new or recovered.
    pub machine: SourceMachine,
    /// The clock the machine was made with.
    pub clock: Clock,
    /// The workload.
    pub site: Site,
    /// Turns true to cut an operation short; the site holds the other end.
    pub cancel: watch::Sender<bool>,
    /// What operators ask.
    pub requests: mpsc::Receiver<SourceRequest>,
    /// Where the status goes.
    pub status: watch::Sender<Arc<Progress>>,
    /// The migration's journal.
    pub journal: Journal,
    /// Dials.
    pub endpoint: Arc<Endpoint>,
    /// The target.
    pub peer: NodeName,
    /// Connections per migration.
    pub lanes: u8,
    /// Whether [`Ended::Repeat`] is a possible end.
    pub repeatable: bool,
    /// The migration that was started in place of this one, if it failed before a restart.
    pub successor: Option<MigrationId>,
    /// Made from a journal.
    pub recovered: bool,
}

/// How a driver ended.
#[derive(Debug)]
pub enum Ended {
    /// For good; the last status has been published.
    Finally,
    /// The smaps CRIU was shown was outdated, and the workload runs on untouched. Another migration
    /// that shows the true one would succeed. The status is the last one, and not yet published.
    Repeat(Box<Progress>, watch::Sender<Arc<Progress>>),
}

#[derive(Debug)]
enum Incoming {
    Event(SourceEvent),
    /// Dialling ended.
    Dialled(u64, Result<Box<SourceSession>, Failure>),
    /// From the connection of this number.
    Of(u64, SourceEvent),
    /// The connection of this number is gone, and the peer may have said why.
    Lost(u64, ErrorCode),
}

/// A connection to the target.
#[derive(Debug)]
struct Connection {
    session: Session<SourceMessage>,
    data: DataSender,
}

impl SourceDriver {
    /// A driver for `parts`; nothing happens before [`SourceDriver::run`].
    pub fn new(parts: SourceParts) -> Self {
        let (events, incoming) = mpsc::channel(EVENTS_MAX);
        let log = {
            let events = events.clone();
            Log::start(parts.journal, move |record, written| {
                let event = match written {
                    Ok(()) => SourceEvent::Journalled(record),
                    Err(()) => SourceEvent::JournalFailed(record),
                };
                // The driver outlives its journal; a closed channel means it is ending.
                drop(events.blocking_send(Incoming::Event(event)));
            })
        };
        Self {
            machine: parts.machine,
            clock: parts.clock,
            sent: parts.site.sent(),
            drain: parts.site.drain(),
            may_drain: parts.site.may_drain(),
            is_drained: false,
            fetched: (0, 0),
            notes: parts.site.notes(),
            paused: parts.site.paused(),
            waits: parts.site.waits(),
            site: Some(Box::new(parts.site)),
            operation: None,
            waiting: VecDeque::new(),
            cancel: parts.cancel,
            connection: None,
            connections: 0,
            measured: Measured::default(),
            repeatable: parts.repeatable,
            successor: parts.successor,
            recovered: parts.recovered,
            held_back: None,
            pid_at_target: None,
            events,
            incoming,
            requests: parts.requests,
            status: parts.status,
            log,
            endpoint: parts.endpoint,
            peer: parts.peer,
            lanes: parts.lanes,
        }
    }

    /// Runs the migration to its end.
    pub async fn run(mut self) -> Ended {
        let mut ticks = tokio::time::interval(PROGRESS_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            while let Some(action) = self.machine.poll_action() {
                self.perform(action).await;
            }
            if self.machine.is_finished() && self.operation.is_none() {
                break;
            }
            tokio::select! {
                Some(incoming) = self.incoming.recv() => self.take_in(incoming),
                Some(request) = self.requests.recv() => self.requested(request),
                ended = session::ended(&mut self.operation) => self.operation_ended(ended),
                _ = ticks.tick() => self.tell_progress(),
                () = self.clock.until(self.machine.poll_timeout()) => self.timed_out(),
            }
        }
        // Over the connection that is there yet.
        if let Some(site) = &mut self.site {
            site.relayed().await;
        }
        if let Some(connection) = self.connection.take() {
            connection.session.close().await;
        }
        match self.held_back {
            Some(last) => Ended::Repeat(Box::new(last), self.status),
            None => Ended::Finally,
        }
    }

    /// Between the reports of the machine: what a long round has sent so far, and how often the
    /// workload was paused for its scan.
    fn tell_progress(&mut self) {
        let (raw_bytes, wire_bytes) = self.sent.take();
        if self.is_drained {
            self.fetched.0 += raw_bytes;
            self.fetched.1 += wire_bytes;
        }
        let (pauses, longest_pause) = self.paused.told();
        self.status.send_if_modified(|progress| {
            if raw_bytes == 0 && progress.pauses == pauses {
                return false;
            }
            let progress = Arc::make_mut(progress);
            progress.status.sent_bytes += raw_bytes;
            progress.status.wire_bytes += wire_bytes;
            progress.pauses = pauses;
            progress.longest_pause = longest_pause;
            true
        });
    }

    fn publish(&mut self, status: Status) {
        // The machine counts whole rounds: its sums replace those of the pieces. What was fetched
        // is of none.
        let (raw_bytes, wire_bytes) = self.sent.take();
        if self.is_drained {
            self.fetched.0 += raw_bytes;
            self.fetched.1 += wire_bytes;
        }
        let mode = self.measured.mode(&status);
        let mut status = status;
        status.sent_bytes += self.fetched.0;
        status.wire_bytes += self.fetched.1;
        let Measured {
            frozen,
            synced,
            final_pages,
            followed,
        } = self.measured;
        let (pauses, longest_pause) = self.paused.told();
        let outdated = |failure: &Failure| failure.code() == ErrorCode::SmapsDiffer;
        let repeat = self.repeatable
            && status.phase == Phase::Aborted
            && status.failure.as_ref().is_some_and(outdated);
        let progress = Progress {
            status,
            frozen,
            synced,
            pauses,
            longest_pause,
            final_pages,
            followed,
            mode,
            successor: self.successor,
            pid_at_target: self.pid_at_target,
            waiting: false,
            missing: None,
            waited: None,
            notes: self.notes.clone(),
            recovered: self.recovered,
        };
        if repeat {
            self.held_back = Some(progress);
        } else {
            self.status.send_replace(Arc::new(progress));
        }
    }

    fn handle(&mut self, event: SourceEvent) {
        if let SourceEvent::Failure(failure) = &event {
            tracing::warn!(migration = %self.machine.id(), %failure, "failed");
        }
        self.machine.handle(self.clock.now(), event);
    }

    /// A timer of the machine has expired. If it was that of the freeze, the failure is to say what
    /// was waited for.
    fn timed_out(&mut self) {
        let now = self.clock.now();
        let waiting = SourceEvent::Waiting(self.waits.list());
        self.machine.handle(now, waiting);
        self.machine.handle_timeout(now);
    }

    fn requested(&mut self, request: SourceRequest) {
        self.handle(match request {
            SourceRequest::Abort => SourceEvent::AbortRequested,
            SourceRequest::Proceed => SourceEvent::Proceed,
            SourceRequest::Fence(side) => SourceEvent::Fenced(side),
        });
    }

    fn take_in(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Event(event) => self.handle(event),
            Incoming::Of(number, SourceEvent::Message(TargetMessage::Fetch(fetch)))
                if number == self.connections =>
            {
                self.fetch(fetch);
            }
            Incoming::Of(number, event) if number == self.connections => {
                if event == SourceEvent::PeerLost {
                    self.connection = None;
                }
                match &event {
                    SourceEvent::Message(TargetMessage::Started { root_pid, .. }) => {
                        self.pid_at_target = *root_pid;
                        // Before anything is written down: others wait for it.
                        if let Some(site) = &self.site {
                            site.started();
                        }
                    }
                    // No operation is under way before the offer is accepted.
                    SourceEvent::Message(TargetMessage::Accepted { kept, parks, .. }) => {
                        if let Some(site) = &mut self.site {
                            site.accepted(kept, *parks);
                        }
                    }
                    _ => {}
                }
                self.handle(event);
            }
            Incoming::Lost(number, code) if number == self.connections => {
                self.connection = None;
                self.handle(match failure::refused(&self.peer, code) {
                    Some(failure) => SourceEvent::PeerRefused(failure),
                    None => SourceEvent::PeerLost,
                });
            }
            // Of a connection that has been replaced.
            Incoming::Of(..) | Incoming::Lost(..) => {}
            Incoming::Dialled(number, _) if number != self.connections => {}
            Incoming::Dialled(number, Ok(session)) => {
                self.connection = Some(self.open(number, *session));
                self.handle(SourceEvent::PeerConnected);
            }
            Incoming::Dialled(_, Err(failure)) => {
                tracing::warn!(migration = %self.machine.id(), peer = %self.peer, %failure,
                    "cannot reach the target");
                self.handle(SourceEvent::PeerRefused(failure));
            }
        }
    }

    async fn perform(&mut self, action: SourceAction) {
        match action {
            SourceAction::Connect => self.connect(),
            SourceAction::Journal(record) => self.write(record).await,
            SourceAction::Report(status) => {
                tracing::debug!(migration = %status.id, phase = %status.phase.name(), "status");
                self.publish(status);
            }
            SourceAction::Send(message) => {
                // Without a session the machine hears `PeerLost`, which says it all.
                if let Some(connection) = &self.connection
                    && !connection.session.say(message)
                {
                    self.connection = None;
                    let lost = Incoming::Of(self.connections, SourceEvent::PeerLost);
                    drop(self.events.send(lost).await);
                }
            }
            SourceAction::CompareSmaps
            | SourceAction::Drain
            | SourceAction::Finish { .. }
            | SourceAction::Freeze { .. }
            | SourceAction::Release
            | SourceAction::SendRound { .. }
            | SourceAction::Thaw { .. }
            | SourceAction::Track
            | SourceAction::Unlock => self.operate(action),
        }
    }

    /// Answers the target, which knows what it lacks: the machine need not know.
    fn fetch(&self, fetch: Fetch) {
        let Some(connection) = &self.connection else {
            return;
        };
        let (events, is_drained) = (self.events.clone(), self.is_drained);
        self.drain
            .answer(fetch, connection.data.clone(), move |failure| {
                let event = match is_drained {
                    true => SourceEvent::DrainLost(failure),
                    false => SourceEvent::Failure(failure),
                };
                // Nobody needs it when the driver has ended.
                tokio::spawn(async move { drop(events.send(Incoming::Event(event)).await) });
            });
    }

    async fn write(&self, record: Record) {
        tracing::debug!(migration = %record.migration, record = record.entry.name(), "journal");
        self.log.write(record).await;
    }

    /// Begins an operation on the site, or puts it behind the one that has the site.
    fn operate(&mut self, action: SourceAction) {
        self.is_drained |= action == SourceAction::Drain;
        if ends_others(&action) {
            self.cancel.send_replace(true);
        }
        self.waiting.push_back(action);
        self.next_operation();
    }

    fn next_operation(&mut self) {
        if self.operation.is_some() {
            return;
        }
        let Some(action) = self.waiting.pop_front() else {
            return;
        };
        let Some(mut site) = self.site.take() else {
            return;
        };
        // What stands before a thaw does not hold it up.
        self.cancel
            .send_replace(self.waiting.iter().any(ends_others));
        let connection = self.connection.as_ref();
        site.connect(connection.map(|connection| connection.data.clone()));
        self.operation = Some(tokio::spawn(async move {
            let event = operation(&mut site, action).await;
            (site, event)
        }));
    }

    fn operation_ended(&mut self, ended: Result<Performed, tokio::task::JoinError>) {
        self.operation = None;
        match ended {
            Ok((site, event)) => {
                if let Some(SourceEvent::Finished(report)) = &event {
                    let (frozen, synced) = site.measured();
                    self.measured = Measured {
                        frozen,
                        synced,
                        final_pages: Some(report.pages.0),
                        followed: Some(report.absent_pages),
                    };
                }
                self.site = Some(site);
                event.into_iter().for_each(|event| self.handle(event));
            }
            // A panic has taken the site with it; what the kernel holds is found again from the
            // journal by the next daemon, which is safer than going on here.
            Err(error) => {
                tracing::error!("an operation panicked: {error}");
                std::process::abort();
            }
        }
        self.next_operation();
    }

    fn connect(&mut self) {
        self.connection = None;
        self.connections += 1;
        let (number, events) = (self.connections, self.events.clone());
        let (endpoint, peer, lanes) = (Arc::clone(&self.endpoint), self.peer.clone(), self.lanes);
        let (id, urgent) = (self.machine.id(), self.may_drain);
        tokio::spawn(async move {
            let dialled = match urgent {
                true => lanes::dial_with_urgent(&endpoint, &peer, id, lanes).await,
                false => lanes::dial(&endpoint, &peer, id, lanes).await,
            };
            let dialled = dialled.map(Box::new);
            let dialled = dialled.map_err(|error| failure::unreachable(&error));
            drop(events.send(Incoming::Dialled(number, dialled)).await);
        });
    }

    fn open(&self, number: u64, session: SourceSession) -> Connection {
        let SourceSession {
            version: _,
            sender,
            receiver,
            data,
            lanes,
        } = session;
        let events = self.events.clone();
        let session = Session::open(sender, receiver, lanes, move |said| {
            let events = events.clone();
            async move {
                let incoming = match said {
                    Ok(message) => Incoming::Of(number, SourceEvent::Message(message)),
                    Err(code) => Incoming::Lost(number, code),
                };
                events.send(incoming).await.is_ok()
            }
        });
        Connection { session, data }
    }
}
