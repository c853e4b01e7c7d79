//! The world: both nodes, the link, and what has been done to them.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::course::{Sent, Taken};
use super::journal::Journal;
use super::lock::Holder;
use super::memory::{Memory, TrackedMemory};
use super::node::{
    Attempt, Images, SourceNode, SourceWorkload, Stream, TargetNode, TargetWorkload,
};
use super::oracle::Violation;
use super::step::{Op, Step};
use pageferry_proto::id::{Incarnation, MigrationId, SpaceId, WorkloadName};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::{FROZEN_MAX_LEAST, Policy};
use pageferry_proto::migration::record::{DriverState, Entry};
use pageferry_proto::migration::source::{SourceEvent, SourceMachine, SourceOffer};
use pageferry_proto::migration::status::{Phase, Status};
use pageferry_proto::migration::target::{TargetEvent, TargetMachine, TargetOrigin};
use pageferry_proto::migration::timer::Time;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Message;
use pageferry_proto::wire::description::{
    LinkAddress, LinkDescription, Namespaces, SpaceDescription, WorkloadDescription,
};
use pageferry_proto::wire::frame;
use pageferry_proto::wire::needs::Needs;

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

const MIGRATION: MigrationId = MigrationId::new([0x5a; MigrationId::BYTES]);

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
                self.at_target(TargetEvent::PeerLost);
            }
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
            Op::Fence(side) => self.fence(side),
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

    fn proceed(&mut self) {
        self.may_freeze = true;
        self.at_source(SourceEvent::Proceed);
    }

    /// What an operator does who sees that a migration stands still. Says whether there was
    /// anything to do.
    fn operate(&mut self) -> bool {
        let phase = |status: Option<Status>| status.map(|status| status.phase);
        let source = phase(self.status(Side::Source));
        let target = phase(self.status(Side::Target));
        if self
            .status(Side::Source)
            .is_some_and(|status| status.holding)
        {
            self.trace.push("proceed".to_owned());
            self.proceed();
            return true;
        }
        let target_gone = self.target.dead || self.target.workload == TargetWorkload::Lost;
        if source == Some(Phase::Committed) && target_gone {
            let wanted = self
                .status(Side::Source)
                .is_some_and(|status| status.fence_wanted);
            if wanted {
                self.trace.push("fence target".to_owned());
                self.at_source(SourceEvent::Fenced(Side::Target));
            }
            return wanted;
        }
        if target != Some(Phase::Ready) || self.next_timer().is_some() {
            return false;
        }
        if self.source.dead {
            self.trace.push("fence source".to_owned());
            self.at_target(TargetEvent::Fenced(Side::Source));
            return true;
        }
        if source.is_none_or(Phase::is_final) {
            self.trace.push("abort at target".to_owned());
            self.at_target(TargetEvent::AbortRequested);
            return true;
        }
        false
    }

    fn check_end(&self) -> Result<Survivor, Violation> {
        let survivor = self.survivor();
        let phase = |side| self.status(side).map(|status| status.phase);
        let (source, target) = (phase(Side::Source), phase(Side::Target));
        let stayed = source.is_none_or(|phase| phase == Phase::Aborted);
        let source_lost =
            self.source.dead || (self.source.workload == SourceWorkload::Gone && stayed);
        let target_lost = self.target.dead || self.target.workload == TargetWorkload::Lost;
        if survivor == Survivor::Nobody && !source_lost && !target_lost {
            return Err(self.violation("the workload runs nowhere"));
        }
        if survivor != Survivor::Source && target_lost && self.starts == 0 && !source_lost {
            return Err(self.violation("the source does not get back what never started"));
        }
        let lost = |status: Status| {
            status.phase != Phase::Aborted
                || status.failure.map(|failure| failure.code()) == Some(ErrorCode::WorkloadGone)
        };
        if self.source.back_in_part && !self.status(Side::Source).is_none_or(lost) {
            return Err(self.violation("the source does not say that the workload is lost"));
        }
        let ended = |phase: Option<Phase>| phase.is_none_or(Phase::is_final);
        if !ended(source) {
            return Err(self.violation("the source does not come to an end"));
        }
        if !ended(target) && target != Some(Phase::Accepted) {
            return Err(self.violation("the target does not come to an end"));
        }
        match (source, survivor) {
            (Some(Phase::Done), Survivor::Source) => {
                Err(self.violation("the source says that the workload moved, and it did not"))
            }
            (Some(Phase::Aborted), Survivor::Target) if !self.source.dead => {
                Err(self.violation("the source says that the workload stayed, and it did not"))
            }
            (_, survivor) => Ok(survivor),
        }
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
            TargetWorkload::Nothing | TargetWorkload::Dropped | TargetWorkload::Lost => false,
        };
        if ready && !held {
            self.at_target(TargetEvent::Failure(workload_gone()));
        }
    }

    fn next_timer(&self) -> Option<Time> {
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

fn offer(setup: &Setup) -> SourceOffer {
    let space = |vpid| SpaceDescription {
        vpid: SpaceId(vpid),
        comm: "writer".to_owned(),
        threads: vec![1],
        memory_bytes: setup.pages * 4096,
    };
    SourceOffer {
        id: MIGRATION,
        workload: WorkloadName::Process(7),
        peer: "b".parse().expect("a name"),
        policy: setup.policy,
        network: None,
        hold: setup.hold,
        description: WorkloadDescription {
            root_pid: 7,
            spaces: (1..=setup.spaces).map(space).collect(),
            pids: vec![7],
            own_namespaces: Namespaces::NET,
            hostname: "writer".to_owned(),
            domainname: String::new(),
            links: vec![LinkDescription {
                name: "eth0".to_owned(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                addresses: vec![LinkAddress {
                    ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
                    prefix: 24,
                }],
                bridge: None,
            }],
            routes: Vec::new(),
            files: Vec::new(),
            shared: Vec::new(),
            copied: Vec::new(),
            boot_id: [7; 16],
            cpu: None,
            criu_version: 40201,
            page_size: 4096,
            kernel_release: "6.12".to_owned(),
            cwd: "/".to_owned(),
            root: "/".to_owned(),
            mounts: Vec::new(),
            needs: Needs::default(),
            container: None,
            members: Vec::new(),
            member_name: String::new(),
        },
        state: DriverState::new(b"source".to_vec()).expect("six bytes"),
    }
}

/// How long a simulated round takes for each of its pages.
pub(super) const PAGE_DURATION: Duration = Duration::from_millis(10);
