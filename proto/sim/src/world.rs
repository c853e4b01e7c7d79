//! The world: both nodes, the link, and what has been done to them.

use std::collections::VecDeque;
use std::time::Duration;

use super::course::{Sent, Taken};
use super::journal::Journal;
use super::lock::Holder;
use super::memory::{Memory, TrackedMemory};
use super::node::{
    Attempt, Images, SourceJob, SourceNode, SourceWorkload, Stream, TargetNode, TargetWorkload,
};
use super::offer::offer;
use super::oracle::Violation;
use super::sabotage::Sabotage;
use super::step::{Op, Step};
use pageferry_proto::id::{Incarnation, MigrationId, SpaceId};
use pageferry_proto::migration::absent::Absent;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::{FROZEN_MAX_LEAST, Policy};
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::{SourceEvent, SourceMachine};
use pageferry_proto::migration::status::Status;
use pageferry_proto::migration::target::{TargetEvent, TargetMachine, TargetOrigin};
use pageferry_proto::migration::timer::Time;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Message, TargetMessage};
use pageferry_proto::wire::frame;

/// What a world begins with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Address spaces of the workload: 1 or 2.
    pub spaces: u32,
    /// Pages of each of them: 1 to 8.
    pub pages: u64,
    /// How the workload is to move; with `verify`.
    pub policy: Policy,
    /// File locks that the workload has on shared storage: 0 to 2.
    pub locks: u32,
    /// Whether it is held before its freeze.
    pub hold: bool,
    /// Whether the target takes a workload with pages missing.
    pub drains: bool,
    /// A rule that is broken on purpose.
    pub sabotage: Option<Sabotage>,
}

/// Where the workload runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivor {
    /// Nowhere: it is frozen, held or lost.
    Nobody,
    /// At the source.
    Source,
    /// At the target.
    Target,
}

/// Both nodes and what is between them.
#[derive(Debug)]
pub struct World {
    pub(super) source: SourceNode,
    pub(super) target: TargetNode,
    pub(super) link: Link,
    pub(super) streams: Vec<Stream>,
    pub(super) now: Time,
    pub(super) sent: Sent,
    /// The kind of a stray stream that comes when the target hears `Final`.
    pub(super) stray_next: Option<u8>,
    /// How often the workload was started at the target.
    pub(super) starts: u32,
    /// The target was told to go.
    pub(super) go_said: bool,
    /// The memory in the last freeze, and the images of its attempt.
    pub(super) frozen: Option<(Memory, Images)>,
    /// The generation of the last status of each side's present machine.
    pub(super) reported: [u64; 2],
    /// How long the workload may stand still.
    pub(super) frozen_max: Duration,
    /// It is not held, or was told to proceed.
    pub(super) may_freeze: bool,
    /// Who has each of the locks that the workload cannot run without.
    pub(super) locks: Vec<Holder>,
    /// The target takes a workload with pages missing.
    pub(super) takes_missing: bool,
    /// Pages are compared before the workload runs.
    pub(super) verifies: bool,
    /// A page of the frozen copy could not be read, and the target does not have it.
    pub(super) unread: bool,
    pub(super) sabotage: Option<Sabotage>,
    pub(super) trace: Vec<String>,
}

/// The control stream of the present connection, if there is one.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) up: bool,
    pub(super) to_source: VecDeque<Vec<u8>>,
    pub(super) to_target: VecDeque<Vec<u8>>,
    /// The side has a connection, as far as it knows.
    pub(super) source_thinks: bool,
    pub(super) target_thinks: bool,
}

pub(super) const MIGRATION: MigrationId = MigrationId::new([0x5a; MigrationId::BYTES]);

/// Most steps from the end of all faults to the end of the migration. A whole migration of two
/// spaces takes about 150; what is asked again every half second for the ten minutes that an
/// unreachable target is told adds some thousands.
const SETTLE_STEPS_MAX: usize = 20_000;

impl World {
    /// A workload that runs at the source, and a migration that begins.
    pub fn new(setup: Setup) -> Self {
        let now = Time::default();
        let memory = TrackedMemory::new(setup.spaces, setup.pages);
        let machine = SourceMachine::new(offer(&setup), now);
        let mut world = Self {
            source: SourceNode {
                machine: Some(machine),
                journal: Journal::default(),
                workload: SourceWorkload::Running,
                memory,
                actions: VecDeque::new(),
                jobs: Vec::new(),
                fail_next: false,
                hang_next: false,
                untracked: false,
                frozen_at: None,
                retry_after: None,
                let_go: false,
                knows_maimed: false,
                abort_asked: false,
                back_in_part: false,
                drain_asked: false,
                dead: false,
            },
            target: TargetNode {
                machine: None,
                journal: Journal::default(),
                workload: TargetWorkload::Nothing,
                store: Memory::default(),
                ledger: None,
                taken: Taken::default(),
                attempt: Attempt::default(),
                restored: Default::default(),
                absent: Absent::default(),
                written: Memory::default(),
                actions: VecDeque::new(),
                jobs: Vec::new(),
                fail_next: false,
                hang_next: false,
                dead: false,
                incarnations: 0,
                let_go_failures: 0,
            },
            link: Link::default(),
            streams: Vec::new(),
            now,
            sent: Sent::default(),
            stray_next: None,
            starts: 0,
            go_said: false,
            frozen: None,
            reported: [0; 2],
            frozen_max: setup.policy.frozen_max.unwrap_or(FROZEN_MAX_LEAST),
            may_freeze: !setup.hold,
            locks: (0..setup.locks)
                .map(|_| Holder::Side(Side::Source))
                .collect(),
            takes_missing: setup.drains,
            verifies: setup.policy.verify,
            unread: false,
            sabotage: setup.sabotage,
            trace: Vec::new(),
        };
        world.restart_target();
        world.drain();
        world
    }

    /// Does one of the possible steps.
    pub fn take(&mut self, step: Step) -> Result<(), Violation> {
        self.trace.push(format!("{step:?}"));
        match step {
            Step::Begin(Side::Source) => self.begin_at_source()?,
            Step::Begin(Side::Target) => self.begin_at_target()?,
            Step::Advance(Side::Source, place) => self.advance_at_source(place),
            Step::Advance(Side::Target, place) => self.advance_at_target(place),
            Step::Deliver(side) => self.deliver(side),
            Step::Notice(Side::Source) => {
                self.link.source_thinks = false;
                self.at_source(SourceEvent::PeerLost);
            }
            Step::Notice(Side::Target) => {
                self.link.target_thinks = false;
                self.forget_asked();
                self.at_target(TargetEvent::PeerLost);
            }
            Step::Ask => self.ask(),
            Step::Stream(place) => self.stream(place),
        }
        self.check()
    }

    /// Does something to the world. What is not possible now changes nothing.
    pub fn apply(&mut self, op: Op) -> Result<(), Violation> {
        if let Op::Step(choice) = op {
            let steps = self.steps();
            return match steps.len() {
                0 => Ok(()),
                count => self.take(steps[usize::from(choice) % count]),
            };
        }
        self.trace.push(format!("{op:?}"));
        match op {
            Op::Step(_) => {}
            Op::Write(bits) => self.write(bits),
            Op::Abort(Side::Source) => {
                self.source.abort_asked = true;
                self.at_source(SourceEvent::AbortRequested);
            }
            Op::Abort(Side::Target) => self.at_target(TargetEvent::AbortRequested),
            Op::Break => self.break_link(),
            Op::Crash(side, found) => self.crash(side, found),
            Op::DropCopy => self.drop_copy(),
            Op::DropHeld => self.drop_held(),
            Op::Expire(Side::Source) => self.expire_source(),
            Op::Expire(Side::Target) => self.expire_target(),
            Op::Fail(Side::Source) => self.source.fail_next = self.source.machine.is_some(),
            Op::Fail(Side::Target) => self.target.fail_next = self.target.machine.is_some(),
            Op::Fence(side) => self.fence(side)?,
            Op::GiveLock => {
                self.give_lock();
            }
            Op::Hang(Side::Source) => self.source.hang_next = self.source.machine.is_some(),
            Op::Hang(Side::Target) => self.target.hang_next = self.target.machine.is_some(),
            Op::Proceed => self.proceed(),
            Op::Pass(eighths) => self.pass(eighths),
            Op::PowerLoss(side, found) => self.lose_power(side, found),
            Op::Restart(side) => self.restart(side),
            Op::Retry(after) => {
                if self.source.machine.is_some() {
                    self.source.retry_after.get_or_insert(after);
                }
            }
            Op::RetryLate => self.retry_late(),
            Op::Stray(kind) => self.stray(kind),
            Op::TakeLock => self.take_lock(),
            Op::Touch(bits) => self.touch(bits),
            Op::Tick => self.tick(),
        }
        self.check()
    }

    /// Where the workload runs.
    pub fn survivor(&self) -> Survivor {
        if self.source.workload == SourceWorkload::Running {
            Survivor::Source
        } else if self.target.workload == TargetWorkload::Running {
            Survivor::Target
        } else {
            Survivor::Nobody
        }
    }

    /// Whether the source's journal has a commit, as far as a restart would find it now.
    pub fn commit_found(&self) -> bool {
        let records = self.source.journal.records();
        records
            .iter()
            .any(|record| matches!(record.entry, Entry::Commit { .. }))
    }

    /// Whether what the target held has died, which is known there.
    pub fn held_dropped(&self) -> bool {
        self.target.workload == TargetWorkload::Dropped
    }

    /// Whether there is a connection between the two.
    pub const fn connected(&self) -> bool {
        self.link.up
    }

    /// What the machine of a side says of itself, if its daemon runs.
    pub fn status(&self, side: Side) -> Option<Status> {
        match side {
            Side::Source => self
                .source
                .machine
                .as_ref()
                .map(|machine| machine.status(self.now)),
            Side::Target => self
                .target
                .machine
                .as_ref()
                .map(|machine| machine.status(self.now)),
        }
    }

    /// Ends all faults, and lets the migration come to its end. The operator restarts daemons,
    /// fences what has no power or has lost its workload, and frees a target that was never
    /// told.
    pub fn settle(&mut self) -> Result<Survivor, Violation> {
        self.source.fail_next = false;
        self.source.hang_next = false;
        self.target.fail_next = false;
        self.target.hang_next = false;
        self.source.retry_after = None;
        self.stray_next = None;
        self.give_lock();
        self.restart(Side::Source);
        self.restart(Side::Target);
        for turn in 0..SETTLE_STEPS_MAX {
            let steps = self.steps();
            if !steps.is_empty() {
                self.take(steps[turn % steps.len()])?;
            } else if !self.give_lock() && !self.operate() {
                if self.next_timer().is_none() {
                    return self.check_end();
                }
                self.tick();
            }
        }
        Err(self.violation("the migration does not come to an end"))
    }

    pub(super) fn proceed(&mut self) {
        self.may_freeze = true;
        self.at_source(SourceEvent::Proceed);
    }

    fn write(&mut self, bits: u8) {
        if self.source.workload != SourceWorkload::Running {
            return;
        }
        let (space, page) = (SpaceId(1 + u32::from(bits >> 3 & 1)), u64::from(bits & 7));
        if bits & 16 == 0 {
            self.source.memory.write(space, page);
        } else {
            self.source.memory.drop_page(space, page);
        }
    }

    fn deliver(&mut self, side: Side) {
        let queue = match side {
            Side::Source => &mut self.link.to_source,
            Side::Target => &mut self.link.to_target,
        };
        let Some(bytes) = queue.pop_front() else {
            return;
        };
        let message = Message::decode(&bytes[frame::HEADER_BYTES..]);
        match message.expect("what a machine says is legal") {
            Message::Target(message) => {
                self.source_hears(&message);
                if let TargetMessage::Fetch(fetch) = &message {
                    self.source.jobs.push(SourceJob::Fetch(fetch.clone()));
                }
                self.at_source(SourceEvent::Message(message));
            }
            Message::Source(message) => self.at_target(TargetEvent::Message(message)),
            Message::Hello(_) | Message::Welcome(_) => {}
        }
    }

    pub(super) fn break_link(&mut self) {
        self.link.up = false;
        self.link.to_source.clear();
        self.link.to_target.clear();
        self.streams.clear();
    }

    pub(super) fn crash(&mut self, side: Side, found: u8) {
        match side {
            Side::Source => self.source.crash(found),
            Side::Target => self.target.crash(found),
        }
        match side {
            Side::Source => self.link.source_thinks = false,
            Side::Target => self.link.target_thinks = false,
        }
        self.break_link();
    }

    fn restart(&mut self, side: Side) {
        match side {
            Side::Source if self.source.machine.is_none() && !self.source.dead => {
                self.restart_source();
            }
            Side::Target if self.target.machine.is_none() && !self.target.dead => {
                self.restart_target();
            }
            Side::Source | Side::Target => {}
        }
        self.drain();
    }

    fn restart_source(&mut self) {
        let records = self.source.journal.records();
        // A migration of which nothing was written never began.
        self.source.machine = SourceMachine::recover(&records, self.now).ok();
        self.reported[0] = 0;
    }

    pub(super) fn restart_target(&mut self) {
        let records = self.target.journal.records();
        self.reported[1] = 0;
        // A migration without a beginning never got as far as anything that counts.
        let machine = TargetMachine::recover(&records, self.now).unwrap_or_else(|_| {
            self.target.incarnations += 1;
            let origin = TargetOrigin {
                id: MIGRATION,
                peer: "a".parse().expect("a name"),
                incarnation: Incarnation(self.target.incarnations),
            };
            TargetMachine::new(origin, self.now)
        });
        self.target.machine = Some(machine);
        let ready = records
            .iter()
            .any(|record| matches!(record.entry, Entry::Ready(_)));
        let held = match self.target.workload {
            TargetWorkload::Held | TargetWorkload::Running => true,
            TargetWorkload::Nothing
            | TargetWorkload::Dropped
            | TargetWorkload::Lost
            | TargetWorkload::Ended => false,
        };
        if ready && !held {
            self.at_target(TargetEvent::Failure(workload_gone()));
        }
    }

    pub(super) fn next_timer(&self) -> Option<Time> {
        let source = self
            .source
            .machine
            .as_ref()
            .and_then(SourceMachine::poll_timeout);
        let target = self
            .target
            .machine
            .as_ref()
            .and_then(TargetMachine::poll_timeout);
        [source, target].into_iter().flatten().min()
    }

    /// What is under way takes this long.
    fn pass(&mut self, eighths: u8) {
        let later = self.now.after(Duration::from_millis(125) * eighths.into());
        self.now = self
            .next_timer()
            .map_or(later, |next| next.min(later))
            .max(self.now);
    }

    fn tick(&mut self) {
        let Some(next) = self.next_timer() else {
            return;
        };
        self.now = self.now.max(next);
        if let Some(machine) = &mut self.source.machine {
            machine.handle_timeout(self.now);
        }
        if let Some(machine) = &mut self.target.machine {
            machine.handle_timeout(self.now);
        }
        self.drain();
    }
}

pub(super) fn workload_gone() -> Failure {
    Failure::new(ErrorCode::WorkloadGone, "the held workload is gone")
}

/// How long a simulated round takes for each of its pages.
pub(super) const PAGE_DURATION: Duration = Duration::from_millis(10);
