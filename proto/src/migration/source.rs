//! The source's machine: copies while the workload runs, freezes it, and gives it away or back.
//!
//! Before the commit is handed to the journal, everything that goes wrong ends in
//! `Aborting → Aborted` with the workload running here. From then on the only ways are
//! `Started` from the target, or evidence that the target will never run it
//! ([`crate::migration::handoff`]).
//!
//! An event that has no place in the present state aborts before the commit, and is recorded in
//! the status after it; the few that are ignored are what an undone action or an old question
//! may still produce. Nothing is retried forever that keeps the workload frozen, except asking
//! the target, which only the operator can make unnecessary.

mod connection;
mod decision;
mod drain;
mod hold;
mod message;
mod outcome;
mod output;
mod recovery;
mod retry;
mod settle;
mod state;
mod unlock;
mod wait;

use std::collections::VecDeque;
use std::time::Duration;

use crate::id::{Generation, Incarnation, MigrationId, NetworkName, NodeName, Round, WorkloadName};
use crate::migration::handoff::{Side, Undecided};
use crate::migration::policy::{Convergence, Mode, Policy, RoundReport};
use crate::migration::record::{DriverState, Entry, OfferedEntry, Record};
use crate::migration::status::{Counters, Edges, Status};
use crate::migration::timer::{Time, Timers};
use crate::page::PageCount;
use crate::wire::code::Failure;
use crate::wire::control::{Final, Offer, RoundEnd, SourceMessage, TargetMessage};
use crate::wire::description::WorkloadDescription;
use crate::wire::version::Version;
pub use hold::HOLD_PACE;
use hold::Hold;
use state::{Copying, Finishing, Link, State, Step, Timer};
pub use unlock::UNLOCK_TRIES_MAX;
pub use wait::{Wait, Waiting};

/// How long the first connection may take. Longer than QUIC's own handshake timeout, whose
/// error says more.
pub const DIAL_MAX: Duration = Duration::from_secs(30);

/// How long the target may take to prepare: comparing files and making a network.
pub const ACCEPT_MAX: Duration = Duration::from_secs(60);

/// How long attaching the tracker to every space may take: 20 ms for each of a few thousand.
pub const TRACK_MAX: Duration = Duration::from_secs(120);

/// How often a freeze may be given up for another round. Each one stops the workload for some
/// tens of milliseconds, and what needs more than this is no passing state, or changes faster
/// than rounds are sent.
pub const RETRIES_MAX: u32 = 10;

/// How long a committed source waits for an answer before it says that a fence is wanted.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);

/// What a migration begins with.
#[derive(Clone, Debug)]
pub struct SourceOffer {
    /// The migration.
    pub id: MigrationId,
    /// What moves.
    pub workload: WorkloadName,
    /// The target's node.
    pub peer: NodeName,
    /// How it moves.
    pub policy: Policy,
    /// What the target is told.
    pub description: WorkloadDescription,
    /// The network namespace at the target that it is to join; none: one is made for it.
    pub network: Option<NetworkName>,
    /// It is not frozen before somebody says that it may be ([`SourceEvent::Proceed`]).
    pub hold: bool,
    /// What the driver needs to find the workload again after a restart.
    pub state: DriverState,
}

/// What happened at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The operator wants the workload to stay. After the commit the target is asked whether
    /// it may still refuse.
    AbortRequested,
    /// What of the frozen copy the target has not fetched may be lost: it is gone, or a page of it
    /// cannot be read. Only after [`SourceAction::Drain`]; before that it is a failure.
    DrainLost(Failure),
    /// An action failed, or the workload is gone.
    Failure(Failure),
    /// The operator declared a side dead. The source only acts on the target's death.
    Fenced(Side),
    /// [`SourceAction::Finish`] is done: everything is sent, and the cgroup was read back
    /// frozen after CRIU's dump.
    Finished(FinalReport),
    /// [`SourceAction::Freeze`] is done: every task is frozen.
    Frozen,
    /// The record could not be made durable; it may or may not be found after a restart.
    JournalFailed(Record),
    /// The record is durable.
    Journalled(Record),
    /// The target said something on the present connection.
    Message(TargetMessage),
    /// [`SourceAction::Connect`] succeeded.
    PeerConnected,
    /// [`SourceAction::Connect`] failed, or the connection is gone. Comes before the next
    /// `PeerConnected`.
    PeerLost,
    /// Instead of `PeerLost`: the connection is gone, or there is none, because one of the two
    /// nodes does not want it.
    PeerRefused(Failure),
    /// A migration that is held may go on to its freeze. May come again.
    Proceed,
    /// [`SourceAction::Release`] is done: the frozen copy is gone.
    Released,
    /// Instead of `Frozen` or `Finished`: another round must come first. Whatever of this attempt
    /// is sent already is of its generation, and the target drops it.
    Retry(RetryReport),
    /// [`SourceAction::SendRound`] is done: all parcels are handed to the lanes.
    RoundSent(RoundReport),
    /// [`SourceAction::CompareSmaps`] found no difference.
    SmapsEqual,
    /// [`SourceAction::Thaw`] is done.
    Thawed {
        /// As the action said.
        untrack: bool,
    },
    /// Instead of `Thawed`: processes of the frozen copy have ended after the commit. What is left
    /// of it runs, if anything is.
    ThawedInPart {
        /// As the action said.
        untrack: bool,
        /// What is lost.
        lost: Failure,
    },
    /// [`SourceAction::Track`] is done.
    TrackingReady {
        /// The workload's memory, in pages.
        memory: PageCount,
    },
    /// [`SourceAction::Unlock`] is done, and the copy is frozen still.
    Unlocked,
    /// What an action of the freeze waits for at the moment. Changes nothing; to be said before
    /// [`SourceMachine::handle_timeout`], which may be the end of the freeze.
    Waiting(Vec<Waiting>),
}

/// What the source's driver has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Compare the smaps that CRIU was given with the true ones, and look once more whether the
    /// file locks can be given away, while the target restores.
    CompareSmaps,
    /// Dial lane 0, and the other lanes the first time.
    Connect,
    /// The workload runs at the target, and fetches what it lacks: give up its network, and answer
    /// it on every connection there will be, until [`SourceAction::Release`]. Not answered. Asked
    /// for again after a restart.
    Drain,
    /// Final scan, dump, live sets, images, digests. The machine sends the `Final` message.
    Finish {
        /// The generation being attempted.
        generation: Generation,
        /// The number that the final parcels carry.
        round: Round,
        /// Pages need not be sent: those that are not are named by absent sets, and the target may
        /// fetch them from when `Final` is said.
        absent: bool,
    },
    /// Stop the workload by its cgroup.
    Freeze {
        /// The number of the final round.
        round: Round,
    },
    /// Write the record, fsync, answer `Journalled` or `JournalFailed`.
    Journal(Record),
    /// The workload runs elsewhere: let CRIU end with success and kill the frozen copy. May be
    /// asked for again after a restart.
    Release,
    /// Publish the status.
    Report(Status),
    /// Send on the control stream.
    Send(SourceMessage),
    /// Scan, read and send all dirty pages. The machine sends the `RoundEnd` message.
    SendRound {
        /// The number that the parcels carry.
        round: Round,
        /// Folders that travel are in it, too: not while the migration is held.
        folders: bool,
        /// Without them it only looks what there is, and makes ready for the freeze.
        pages: bool,
    },
    /// End what is under way at once, whatever it waits for; let CRIU end with failure, take back
    /// what [`SourceAction::Unlock`] let go, thaw the cgroup, open the network. Succeeds on a
    /// workload that runs. While another has one of its locks it fails, and nothing is thawed.
    Thaw {
        /// Whether tracking ends too.
        untrack: bool,
    },
    /// Attach the tracker to every space.
    Track,
    /// Let go of the workload's file locks on shared storage. It stays frozen. May be asked for
    /// again, and after a restart; succeeds when there are none. A process that has ended has let
    /// go. What fails with `workload-gone` fails for a copy of which a process has ended; with
    /// `shared-lock`, for a lock that somebody waits for, and none is let go.
    Unlock,
}

/// What the final round was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FinalReport {
    /// Parcels sent in it.
    pub parcels: u32,
    /// Pages in those parcels, zero pages too.
    pub pages: PageCount,
    /// Live sets sent: one per space.
    pub live_sets: u32,
    /// Image files sent.
    pub images: u32,
    /// Digest streams sent: 0 unless the policy says verify.
    pub digests: u32,
    /// File locks that it has on shared storage.
    pub locks: u32,
    /// Differences of folders that travel: one of each.
    pub files: u32,
    /// Streams that name pages which are not sent.
    pub absent_sets: u32,
    /// Pages in those.
    pub absent_pages: PageCount,
    /// Bytes of the pages sent, before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire, images too.
    pub wire_bytes: u64,
}

/// Why a freeze was given up, and what of the final round is already on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryReport {
    /// Parcels of the final round that were sent.
    pub parcels: u32,
    /// Pages in those parcels, zero pages too.
    pub pages: PageCount,
    /// Bytes of those pages, before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire, of live sets, images and digests too.
    pub wire_bytes: u64,
    /// How long the workload runs before the next round begins: chosen at random, so as not to
    /// meet it in step.
    pub pause: Duration,
    /// What ends the migration if it happens too often.
    pub reason: Failure,
}

/// The machine.
#[derive(Debug)]
pub struct SourceMachine {
    id: MigrationId,
    workload: WorkloadName,
    peer: NodeName,
    policy: Policy,
    driver_state: DriverState,
    /// Taken when the offer is sent.
    description: Option<Box<WorkloadDescription>>,
    /// What it is to join at the target.
    network: Option<NetworkName>,
    state: State,
    generation: Generation,
    retries: u32,
    /// Why the last freeze was given up.
    given_up: Option<Failure>,
    link: Link,
    /// An offer was sent, so the target may hold something.
    offered: bool,
    /// The workload may be tracked or frozen.
    touched: bool,
    /// The target holds nothing, or was not to be reached for so long that it is given up.
    told: bool,
    /// The target has said how it ended, and keeps that until it hears that nobody asks again.
    answered: bool,
    incarnation: Option<Incarnation>,
    /// The workload has file locks that must be let go before the target may go, or may have.
    locks: bool,
    /// The target takes it with pages missing.
    may_drain: bool,
    /// The freeze under way sends no pages.
    switching: bool,
    /// Pages of what was frozen last are in the frozen copy alone.
    drains: bool,
    /// The policy's time is over, and it is to be frozen all the same.
    time_is_over: bool,
    failure: Option<Failure>,
    /// What has failed, and must be done before anything else is: it is tried again.
    held_up: Option<Failure>,
    fence_wanted: bool,
    convergence: Convergence,
    hold: Hold,
    round: Option<Round>,
    /// How long the present freeze, or the last one, may last before the commit.
    frozen_max: Option<Duration>,
    /// What the driver waits for.
    waiting: Vec<Waiting>,
    counters: Counters,
    edges: Edges,
    started_at: Time,
    timers: Timers<Timer>,
    actions: VecDeque<SourceAction>,
    reported: Option<Status>,
}

impl SourceMachine {
    /// A migration that begins now.
    pub fn new(offer: SourceOffer, now: Time) -> Self {
        let entry = Entry::Offered(OfferedEntry {
            workload: offer.workload.clone(),
            peer: offer.peer.clone(),
            policy: offer.policy,
            hold: offer.hold,
            state: offer.state.clone(),
        });
        let mut machine = Self {
            id: offer.id,
            workload: offer.workload,
            peer: offer.peer,
            policy: offer.policy,
            driver_state: offer.state,
            description: Some(Box::new(offer.description)),
            network: offer.network,
            state: State::Undecided(Undecided::without_commit(), Step::Journalling),
            generation: Generation::FIRST,
            retries: 0,
            given_up: None,
            link: Link::Down,
            offered: false,
            touched: false,
            told: false,
            answered: false,
            incarnation: None,
            locks: true,
            may_drain: false,
            switching: false,
            drains: false,
            time_is_over: false,
            failure: None,
            held_up: None,
            fence_wanted: false,
            convergence: Convergence::default(),
            hold: Hold::new(offer.hold),
            round: None,
            frozen_max: None,
            waiting: Vec::new(),
            counters: Counters::default(),
            edges: Edges::default(),
            started_at: now,
            timers: Timers::new(),
            actions: VecDeque::new(),
            reported: None,
        };
        machine
            .timers
            .set(Timer::Overall, now.after(machine.policy.timeout));
        machine.journal(entry);
        machine.report(now);
        machine
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, event: SourceEvent) {
        match event {
            SourceEvent::AbortRequested => self.abort_requested(now),
            SourceEvent::DrainLost(failure) => self.drain_lost(now, failure),
            SourceEvent::Failure(failure) => self.failed(now, failure),
            SourceEvent::Fenced(side) => self.fenced(side),
            SourceEvent::Finished(report) => self.finished(now, report),
            SourceEvent::Frozen => self.frozen(now),
            SourceEvent::JournalFailed(record) => self.journal_failed(now, &record),
            SourceEvent::Journalled(record) => self.journalled(now, &record),
            SourceEvent::Message(message) => self.message(now, message),
            SourceEvent::PeerConnected => self.peer_connected(now),
            SourceEvent::PeerLost => self.peer_lost(now),
            SourceEvent::PeerRefused(failure) => self.peer_refused(now, failure),
            SourceEvent::Proceed => self.proceed(),
            SourceEvent::Released => self.released(now),
            SourceEvent::Retry(report) => self.retry(report),
            SourceEvent::RoundSent(report) => self.round_sent(&report),
            SourceEvent::SmapsEqual => self.smaps_equal(),
            SourceEvent::Thawed { untrack } => self.thawed(now, untrack),
            SourceEvent::ThawedInPart { untrack, lost } => {
                self.thawed_in_part(now, untrack, lost);
            }
            SourceEvent::TrackingReady { memory } => self.tracking_ready(memory),
            SourceEvent::Unlocked => self.unlocked(now),
            SourceEvent::Waiting(waiting) => self.waiting = waiting,
        }
        self.report(now);
    }

    /// Takes in that time has passed. To be called when [`SourceMachine::poll_timeout`] says so.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(timer) = self.timers.expired(now) {
            self.expired(now, timer);
        }
        self.report(now);
    }

    /// The next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When [`SourceMachine::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.next()
    }

    /// Whether nothing is left to do: the machine may be dropped once its actions are done.
    pub const fn is_finished(&self) -> bool {
        self.state.is_closed()
    }

    /// The migration.
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// What the driver stored with the first record.
    pub const fn driver_state(&self) -> &DriverState {
        &self.driver_state
    }

    /// How things stand now, with the generation of the last report.
    pub fn status(&self, now: Time) -> Status {
        Status {
            generation: self.reported.as_ref().map_or(0, |status| status.generation),
            id: self.id,
            workload: Some(self.workload.clone()),
            role: Side::Source,
            phase: self.state.phase(),
            peer: self.peer.clone(),
            round: self.round,
            retries: self.retries,
            memory_bytes: self.counters.memory.bytes(),
            sent_bytes: self.counters.sent_bytes,
            wire_bytes: self.counters.wire_bytes,
            dirty_pages_per_second: self.convergence.dirtied_per_second(),
            predicted_downtime: self.convergence.predicted_downtime(),
            frozen_max: self.frozen_max.or(self.policy.frozen_max),
            parts: self.edges.parts(),
            elapsed: now.since(self.started_at),
            failure: self.held_up.clone().or_else(|| self.failure.clone()),
            fence_wanted: self.fence_wanted,
            unsettled: false,
            holding: self.is_holding(),
            drains: self.state.is_draining(),
        }
    }

    fn offer(&mut self, now: Time) {
        let Some(step @ Step::Dialling) = self.state.step() else {
            return self.out_of_place("an offer");
        };
        let Some(description) = self.description.take() else {
            return self.out_of_place("a second offer");
        };
        let network = self.network.take();
        *step = Step::Offered;
        self.offered = true;
        self.timers.set(Timer::Step, now.after(ACCEPT_MAX));
        self.send(SourceMessage::Offer(Box::new(Offer {
            version: Version::CURRENT,
            workload: self.workload.clone(),
            generation: self.generation,
            policy: self.policy,
            description: *description,
            network,
        })));
    }

    fn tracking_ready(&mut self, memory: PageCount) {
        let Some(Step::Tracking) = self.state.step() else {
            return self.out_of_place("a tracker");
        };
        self.counters.memory = memory;
        self.timers.stop(Timer::Step);
        self.send_round(Round::FIRST);
    }

    fn send_round(&mut self, round: Round) {
        let Some(step) = self.state.step() else {
            return self.out_of_place("a round");
        };
        *step = Step::Copying(Copying {
            round,
            report: None,
        });
        self.round = Some(round);
        let folders = self.hold.begin_round();
        let pages = self.policy.mode != Mode::Postcopy;
        self.actions.push_back(SourceAction::SendRound {
            round,
            folders,
            pages,
        });
    }

    fn round_sent(&mut self, report: &RoundReport) {
        let Some(Step::Copying(copying)) = self.state.step() else {
            return self.out_of_place("the end of a round");
        };
        if copying.round != report.round || copying.report.is_some() {
            return self.out_of_place("the end of another round");
        }
        copying.report = Some(*report);
        self.counters.sent_bytes += report.raw_bytes + report.files.sent_bytes;
        self.counters.wire_bytes += report.wire_bytes + report.files.sent_bytes;
        let RoundReport {
            round,
            parcels,
            pages_sent: pages,
            files,
            ..
        } = *report;
        self.send(SourceMessage::RoundEnd(RoundEnd {
            round,
            parcels,
            pages,
            files: files.streams,
        }));
    }

    fn frozen(&mut self, now: Time) {
        let Some(step @ &mut Step::Freezing { round }) = self.state.step() else {
            return self.out_of_place("a freeze");
        };
        *step = Step::Finishing(Finishing::new(round));
        self.edges.frozen = Some(now);
        self.actions.push_back(SourceAction::Finish {
            generation: self.generation,
            round,
            absent: self.switching,
        });
    }

    fn finished(&mut self, now: Time, report: FinalReport) {
        let Some(Step::Finishing(finishing)) = self.state.step() else {
            return self.out_of_place("the end of the final round");
        };
        if std::mem::replace(&mut finishing.sent, true) {
            return self.out_of_place("a second end of the final round");
        }
        let round = finishing.round;
        self.edges.sent = Some(now);
        self.locks = report.locks != 0;
        self.drains = report.absent_pages != PageCount::ZERO;
        if self.drains && !self.switching {
            return self.out_of_place("a final round with pages missing");
        }
        self.counters.sent_bytes += report.raw_bytes;
        self.counters.wire_bytes += report.wire_bytes;
        self.send(SourceMessage::Final(Final {
            generation: self.generation,
            round,
            parcels: report.parcels,
            pages: report.pages,
            live_sets: report.live_sets,
            images: report.images,
            digests: report.digests,
            verify: self.policy.verify,
            locks: report.locks,
            files: report.files,
            absent_sets: report.absent_sets,
            absent_pages: report.absent_pages,
        }));
        self.actions.push_back(SourceAction::CompareSmaps);
    }

    fn smaps_equal(&mut self) {
        let Some(Step::Finishing(finishing)) = self.state.step() else {
            return self.out_of_place("a comparison of smaps");
        };
        if !finishing.sent {
            return self.out_of_place("a comparison of smaps that nobody asked for");
        }
        finishing.smaps_equal = true;
        self.prepare_if_complete();
    }
}
