//! The target's machine: takes in pages, restores, and then runs the workload or refuses to.
//!
//! Until `Ready` is durable the target may give up at any time: the source cannot have
//! committed. From then on the workload is held, neither run nor dropped, until the source says
//! `Go`, or the source or an operator says what permits to refuse. `Running` is durable before
//! the workload is let go and `Refused` before it is said. `Refused` excludes `Running` for good;
//! `Running` excludes `Refused` unless it is proven that nothing ran and nothing ever will.
//!
//! A target never dials. Whoever broke a connection off, it is the source that comes back.

mod drain;
mod handoff;
mod lock;
mod message;
mod output;
mod recovery;
mod state;

use std::collections::VecDeque;

use crate::id::{Generation, Incarnation, MigrationId, NodeName, Round, WorkloadName};
use crate::migration::handoff::Side;
use crate::migration::record::{AcceptedEntry, DriverState, Entry, ReadyEntry, Record};
use crate::migration::status::{Parts, Status};
use crate::migration::timer::{Time, Timers};
use crate::page::PageCount;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::{Final, Offer, RoundEnd, SourceMessage, TargetMessage};
pub use handoff::LET_GO_TRIES_MAX;
pub use lock::LOCK_TRIES_MAX;
pub use recovery::{ANSWER_STATE_BYTES_MAX, answer};
use state::{Absent, Held, State, Step, Timer, Verdict};

/// What an incoming migration begins with.
#[derive(Clone, Debug)]
pub struct TargetOrigin {
    /// The migration, from the greeting.
    pub id: MigrationId,
    /// The source's node, from its certificate.
    pub peer: NodeName,
    /// Drawn at random for this life of the target.
    pub incarnation: Incarnation,
}

/// What happened at the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// [`TargetAction::Abandon`] is done: nothing of the workload is left that could run.
    Abandoned,
    /// The operator wants the workload not to come here.
    AbortRequested,
    /// [`TargetAction::Discard`] could not be done: something of the workload may be left here,
    /// that will not be let go.
    DiscardFailed(Failure),
    /// [`TargetAction::Discard`] is done: nothing of the workload is left here.
    Discarded,
    /// Pages that were to follow the workload never come: the source cannot read them, or what
    /// holds its memory here is gone.
    DrainLost(Failure),
    /// An action failed, or the held workload is gone.
    Failure(Failure),
    /// The operator declared a side dead. The source's death lets a held workload run; the
    /// target's own makes it refuse.
    Fenced(Side),
    /// All memory of the running workload is in place, also what was to follow it.
    Filled,
    /// [`TargetAction::LetGo`] fails however often it is tried, and whether the workload has run is
    /// not known. Something of it may be left, that somebody must end.
    GaveUp(Failure),
    /// [`TargetAction::LetGo`] can never be done any more, and nothing of the workload is left that
    /// could run; but it may have run.
    Lost(Failure),
    /// The final round has arrived ([`TargetAction::AwaitFinal`]), live pages are complete and,
    /// if asked for, equal.
    FinalStored,
    /// The record could not be made durable; it may or may not be found after a restart.
    JournalFailed(Record),
    /// The record is durable.
    Journalled(Record),
    /// [`TargetAction::Lock`] is done: the held workload has all its locks.
    Locked,
    /// The source said something on the present connection.
    Message(SourceMessage),
    /// The source has a connection. `PeerLost` comes before the next one.
    PeerConnected,
    /// [`TargetAction::LetGo`] can never be done any more: nothing of the workload has run here,
    /// and nothing of it is left that could. A driver that is not certain says `Failure`.
    NeverRan(Failure),
    /// [`TargetAction::Lock`] has not got all locks, and may if it is tried again: another has one.
    NotLocked(Failure),
    /// The connection is gone.
    PeerLost,
    /// [`TargetAction::Prepare`] is done.
    Prepared {
        /// What the driver needs to find what it prepared after a restart.
        state: DriverState,
    },
    /// [`TargetAction::Restore`] is done: the workload is restored and held.
    Restored {
        /// What the driver needs to find the held workload after a restart.
        state: DriverState,
    },
    /// [`TargetAction::LetGo`] is done: the workload runs, and the pager holds every descriptor
    /// that its memory needs.
    Resumed,
    /// Everything of the round has arrived ([`TargetAction::AwaitRound`]).
    RoundStored {
        /// The round.
        round: Round,
    },
}

/// What the target's driver has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// The workload has run, and pages of it are lost: freeze for good what there is, at once.
    /// Answer `Abandoned` when that has ended, or `Failure`; then it is asked for again. So it is
    /// after a restart, also when nothing is left.
    Abandon,
    /// Answer `FinalStored` when the streams that the message counts are stored.
    AwaitFinal(Final),
    /// Answer `RoundStored` when the parcels that the message counts are stored.
    AwaitRound(RoundEnd),
    /// End what is under way; kill what was restored; drop pages, images and network. Succeeds
    /// when there is nothing.
    Discard,
    /// Write the record, fsync, answer `Journalled` or `JournalFailed`.
    Journal(Record),
    /// Let the held workload run. Succeeds when it runs already: it may be asked for again
    /// after a restart.
    LetGo {
        /// The generation that runs.
        generation: Generation,
    },
    /// Take the held workload's file locks on shared storage, which the source has let go, for it.
    /// Succeeds when it has them. May be asked for again, and after a restart.
    Lock,
    /// Compare what the offer describes with this node, and make what it needs.
    Prepare(Box<Offer>),
    /// Publish the status.
    Report(Status),
    /// Restore from the images and hold the workload before its first instruction.
    Restore {
        /// The generation being restored.
        generation: Generation,
    },
    /// Send on the control stream.
    Send(TargetMessage),
}

/// The machine.
#[derive(Debug)]
pub struct TargetMachine {
    id: MigrationId,
    peer: NodeName,
    incarnation: Incarnation,
    workload: Option<WorkloadName>,
    driver_state: DriverState,
    state: State,
    connected: bool,
    /// A record says that the offer is accepted, so one must say how that ended.
    recorded: bool,
    /// The workload has file locks to take before it runs, or may have.
    locks: bool,
    /// Pages of it were not sent, and are to follow it.
    drains: bool,
    /// Why they never come, before it is known that it runs.
    pages_lost: Option<Failure>,
    /// The source has said that it never asks about a generation up to this one.
    over_at_source: Option<Generation>,
    /// That is in the journal, or on its way there.
    settled: bool,
    failure: Option<Failure>,
    /// Another has had one of its locks between the nodes: what that protects may have changed, so
    /// it stays in the status.
    broken: Option<Failure>,
    round: Option<Round>,
    memory: PageCount,
    started_at: Time,
    timers: Timers<Timer>,
    actions: VecDeque<TargetAction>,
    reported: Option<Status>,
}

impl TargetMachine {
    /// A migration of which there is no record: somebody connected and named it.
    pub fn new(origin: TargetOrigin, now: Time) -> Self {
        Self {
            id: origin.id,
            peer: origin.peer,
            incarnation: origin.incarnation,
            workload: None,
            driver_state: DriverState::default(),
            state: State::Absent(Absent::Idle),
            connected: false,
            recorded: false,
            locks: true,
            drains: false,
            pages_lost: None,
            over_at_source: None,
            settled: false,
            failure: None,
            broken: None,
            round: None,
            memory: PageCount::ZERO,
            started_at: now,
            timers: Timers::new(),
            actions: VecDeque::new(),
            reported: None,
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, event: TargetEvent) {
        match event {
            TargetEvent::Abandoned => self.abandoned(),
            TargetEvent::AbortRequested => self.abort_requested(),
            TargetEvent::DiscardFailed(failure) => self.discard_failed(failure),
            TargetEvent::Discarded => self.discarded(),
            TargetEvent::DrainLost(failure) => self.drain_lost(now, failure),
            TargetEvent::Failure(failure) => self.failed(now, failure),
            TargetEvent::Fenced(side) => self.fenced(side),
            TargetEvent::Filled => self.filled(),
            TargetEvent::GaveUp(failure) => self.gave_up(now, failure),
            TargetEvent::Lost(failure) => self.lost(now, failure),
            TargetEvent::FinalStored => self.final_stored(),
            TargetEvent::JournalFailed(record) => self.journal_failed(now, &record),
            TargetEvent::Journalled(record) => self.journalled(&record),
            TargetEvent::Locked => self.locked(),
            TargetEvent::Message(message) => self.message(now, message),
            TargetEvent::NeverRan(failure) => self.never_ran(now, failure),
            TargetEvent::NotLocked(failure) => self.not_locked(now, failure),
            TargetEvent::PeerConnected => self.connected = true,
            TargetEvent::PeerLost => self.peer_lost(),
            TargetEvent::Prepared { state } => self.prepared(state),
            TargetEvent::Restored { state } => self.restored(state),
            TargetEvent::Resumed => self.resumed(),
            TargetEvent::RoundStored { round } => self.round_stored(round),
        }
        self.report(now);
    }

    /// Takes in that time has passed. To be called when [`TargetMachine::poll_timeout`] says so.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(timer) = self.timers.expired(now) {
            match timer {
                Timer::Retry => self.again(),
            }
        }
        self.report(now);
    }

    /// The next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// When [`TargetMachine::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.next()
    }

    /// Whether nothing is left to do but to answer a source that asks again. The machine may be
    /// dropped then, and made again, from its records if it has any, when somebody connects.
    pub const fn is_finished(&self) -> bool {
        self.state.is_closed() || (self.state.is_idle() && !self.connected)
    }

    /// Whether there ever was an offer, or a record of one.
    pub const fn is_begun(&self) -> bool {
        !self.state.is_idle()
    }

    /// The migration.
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// Whether the source may still ask how it ended: what is kept for it is [`answer`].
    pub const fn is_unsettled(&self) -> bool {
        self.state.decided().is_some() && !self.settled
    }

    /// What the driver stored last: when it was prepared, and again when it was restored.
    pub const fn driver_state(&self) -> &DriverState {
        &self.driver_state
    }

    /// How things stand now, with the generation of the last report.
    pub fn status(&self, now: Time) -> Status {
        Status {
            generation: self.reported.as_ref().map_or(0, |status| status.generation),
            id: self.id,
            workload: self.workload.clone(),
            role: Side::Target,
            phase: self.state.phase(),
            peer: self.peer.clone(),
            round: self.round,
            retries: 0,
            memory_bytes: self.memory.bytes(),
            sent_bytes: 0,
            wire_bytes: 0,
            dirty_pages_per_second: None,
            predicted_downtime: None,
            parts: Parts::default(),
            elapsed: now.since(self.started_at),
            failure: self.failure.clone(),
            frozen_max: None,
            fence_wanted: (self.state.is_ready() || self.is_draining()) && !self.connected,
            unsettled: self.is_unsettled(),
            holding: false,
            drains: self.is_draining(),
        }
    }

    fn peer_lost(&mut self) {
        self.connected = false;
        match &mut self.state {
            // The source breaks off too: it never comes back to a migration before a commit.
            State::Unready(_) => {
                self.give_up(Failure::new(
                    ErrorCode::PeerLost,
                    "the connection to the source is gone",
                ));
            }
            // `Ready` was never said, so nobody can have committed to it.
            State::Held(Held::Readying {
                verdict: verdict @ Verdict::Hold,
                said: false,
                ..
            }) => {
                *verdict = Verdict::Refuse(Failure::new(
                    ErrorCode::PeerLost,
                    "the connection to the source was gone before the target was ready",
                ));
            }
            State::Held(_) | State::Decided(..) | State::Absent(_) => {}
        }
    }

    fn prepared(&mut self, driver_state: DriverState) {
        let State::Unready(Step::Preparing { workload }) = &self.state else {
            return self.out_of_place("a preparation");
        };
        let workload = workload.clone();
        self.driver_state = driver_state;
        self.recorded = true;
        self.state = State::Unready(Step::Accepting);
        self.journal(Entry::Accepted(AcceptedEntry {
            workload,
            peer: self.peer.clone(),
            incarnation: self.incarnation,
            state: self.driver_state.clone(),
        }));
    }

    fn round_stored(&mut self, round: Round) {
        let State::Unready(Step::Receiving(receiving)) = &mut self.state else {
            return self.out_of_place("a stored round");
        };
        if receiving.ended != Some(round) {
            return self.out_of_place("a stored round that has not ended");
        }
        receiving.ended = None;
        receiving.open = round.next();
        self.send(TargetMessage::RoundHeld { round });
    }

    fn final_stored(&mut self) {
        let State::Unready(Step::Storing(last)) = &self.state else {
            return self.out_of_place("a stored final round");
        };
        let generation = last.generation;
        self.state = State::Unready(Step::Restoring { generation });
        self.send(TargetMessage::FinalHeld { generation });
        self.actions.push_back(TargetAction::Restore { generation });
    }

    fn restored(&mut self, driver_state: DriverState) {
        let State::Unready(Step::Restoring { generation }) = self.state else {
            return self.out_of_place("a restored workload");
        };
        self.driver_state = driver_state;
        let entry = ReadyEntry {
            generation,
            incarnation: self.incarnation,
            drains: self.drains,
            state: self.driver_state.clone(),
        };
        self.state = State::Held(Held::Readying {
            entry: entry.clone(),
            said: false,
            verdict: Verdict::Hold,
        });
        self.journal(Entry::Ready(entry));
    }
}
