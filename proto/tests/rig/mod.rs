//! Machines in a vice: feed an event, look at the actions.

#![allow(dead_code, unused_imports)]

pub mod drain;

use std::time::Duration;

use pageferry_proto::id::{Generation, Incarnation, MigrationId, Round, WorkloadName};
use pageferry_proto::migration::policy::{FilesReport, Policy, RoundReport};
use pageferry_proto::migration::record::{
    AcceptedEntry, DriverState, Entry, OfferedEntry, ReadyEntry, Record,
};
use pageferry_proto::migration::source::{
    FinalReport, RetryReport, SourceAction, SourceEvent, SourceMachine, SourceOffer,
};
use pageferry_proto::migration::status::{Phase, Status};
use pageferry_proto::migration::target::{TargetAction, TargetEvent, TargetMachine, TargetOrigin};
use pageferry_proto::migration::timer::Time;
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Final, Offer, RoundEnd, SourceMessage, TargetMessage};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_proto::wire::needs::Needs;
use pageferry_proto::wire::version::Version;

pub const ID: MigrationId = MigrationId::new([1; 16]);
pub const INCARNATION: Incarnation = Incarnation(42);
pub const GENERATION: Generation = Generation::FIRST;

/// A source and its clock.
pub struct Source {
    pub machine: SourceMachine,
    pub now: Time,
}

/// A target and its clock.
pub struct Target {
    pub machine: TargetMachine,
    pub now: Time,
}

impl Source {
    pub fn new() -> Self {
        let now = Time::default();
        let machine = SourceMachine::new(source_offer(), now);
        Self { machine, now }
    }

    pub fn recovered(entries: &[Entry]) -> Self {
        let now = Time::default();
        let machine = SourceMachine::recover(&records(entries), now).unwrap();
        Self { machine, now }
    }

    /// What the machine wants done now, without reports.
    pub fn actions(&mut self) -> Vec<SourceAction> {
        let machine = &mut self.machine;
        std::iter::from_fn(|| machine.poll_action())
            .filter(|action| !matches!(action, SourceAction::Report(_)))
            .collect()
    }

    pub fn feed(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        self.machine.handle(self.now, event);
        self.actions()
    }

    pub fn hear(&mut self, message: TargetMessage) -> Vec<SourceAction> {
        self.feed(SourceEvent::Message(message))
    }

    pub fn journalled(&mut self, entry: Entry) -> Vec<SourceAction> {
        self.feed(SourceEvent::Journalled(record(entry)))
    }

    pub fn journal_failed(&mut self, entry: Entry) -> Vec<SourceAction> {
        self.feed(SourceEvent::JournalFailed(record(entry)))
    }

    /// Lets time pass, timer by timer.
    pub fn wait(&mut self, duration: Duration) -> Vec<SourceAction> {
        let end = self.now.after(duration);
        let mut actions = Vec::new();
        while let Some(next) = self.machine.poll_timeout().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            self.machine.handle_timeout(self.now);
            actions.extend(self.actions());
        }
        self.now = end;
        actions
    }

    pub fn status(&self) -> Status {
        self.machine.status(self.now)
    }

    pub fn copying() -> Self {
        Self::with(Policy::DEFAULT)
    }

    /// In its first round, with this policy.
    pub fn with(policy: Policy) -> Self {
        Self::offering(SourceOffer {
            policy,
            ..source_offer()
        })
    }

    /// In its first round, of this offer.
    pub fn offering(offer: SourceOffer) -> Self {
        let now = Time::default();
        let machine = SourceMachine::new(offer, now);
        let mut source = Self { machine, now };
        source.actions();
        source.journalled(offered());
        source.feed(SourceEvent::PeerConnected);
        source.hear(TargetMessage::Accepted {
            incarnation: INCARNATION,
            kept: Vec::new(),
            parks: false,
            drains: true,
        });
        source.feed(SourceEvent::TrackingReady {
            memory: PageCount(1000),
        });
        source
    }

    pub fn freezing() -> Self {
        let mut source = Self::copying();
        source.feed(SourceEvent::RoundSent(round_report(1, 1000, 0)));
        source.hear(TargetMessage::RoundHeld {
            round: Round::FIRST,
        });
        source
    }

    pub fn finishing() -> Self {
        let mut source = Self::freezing();
        source.feed(SourceEvent::Frozen);
        source
    }

    /// Everything but the comparison of smaps is there.
    pub fn ready() -> Self {
        let mut source = Self::finishing();
        source.feed(SourceEvent::Finished(final_report()));
        source.hear(TargetMessage::FinalHeld {
            generation: GENERATION,
        });
        source.hear(ready());
        source
    }

    pub fn prepared() -> Self {
        let mut source = Self::ready();
        source.feed(SourceEvent::SmapsEqual);
        source
    }

    pub fn committed() -> Self {
        let mut source = Self::prepared();
        source.journalled(commit());
        source
    }
}

impl Target {
    pub fn new() -> Self {
        let now = Time::default();
        let origin = TargetOrigin {
            id: ID,
            peer: "a".parse().unwrap(),
            incarnation: INCARNATION,
        };
        let mut target = Self {
            machine: TargetMachine::new(origin, now),
            now,
        };
        target.feed(TargetEvent::PeerConnected);
        target
    }

    /// Restarted, and dialled by the source.
    pub fn recovered(entries: &[Entry]) -> Self {
        let now = Time::default();
        let machine = TargetMachine::recover(&records(entries), now).unwrap();
        let mut target = Self { machine, now };
        target.machine.handle(now, TargetEvent::PeerConnected);
        target
    }

    /// What the machine wants done now, without reports.
    pub fn actions(&mut self) -> Vec<TargetAction> {
        let machine = &mut self.machine;
        std::iter::from_fn(|| machine.poll_action())
            .filter(|action| !matches!(action, TargetAction::Report(_)))
            .collect()
    }

    pub fn feed(&mut self, event: TargetEvent) -> Vec<TargetAction> {
        self.machine.handle(self.now, event);
        self.actions()
    }

    pub fn hear(&mut self, message: SourceMessage) -> Vec<TargetAction> {
        self.feed(TargetEvent::Message(message))
    }

    pub fn journalled(&mut self, entry: Entry) -> Vec<TargetAction> {
        self.feed(TargetEvent::Journalled(record(entry)))
    }

    pub fn journal_failed(&mut self, entry: Entry) -> Vec<TargetAction> {
        self.feed(TargetEvent::JournalFailed(record(entry)))
    }

    /// Lets time pass until the next timer.
    pub fn wait(&mut self) -> Vec<TargetAction> {
        self.now = self.machine.poll_timeout().unwrap();
        self.machine.handle_timeout(self.now);
        self.actions()
    }

    pub fn status(&self) -> Status {
        self.machine.status(self.now)
    }

    pub fn receiving() -> Self {
        let mut target = Self::new();
        target.hear(SourceMessage::Offer(Box::new(offer())));
        target.feed(TargetEvent::Prepared { state: state() });
        target.journalled(accepted());
        target
    }

    pub fn restoring() -> Self {
        let mut target = Self::receiving();
        target.hear(SourceMessage::Final(last(1)));
        target.feed(TargetEvent::FinalStored);
        target
    }

    /// Restored, and that is being written.
    pub fn readying() -> Self {
        let mut target = Self::restoring();
        target.feed(TargetEvent::Restored { state: state() });
        target
    }

    pub fn ready() -> Self {
        let mut target = Self::readying();
        target.journalled(ready_entry());
        target
    }

    pub fn running() -> Self {
        let mut target = Self::ready();
        target.hear(SourceMessage::Go {
            generation: GENERATION,
        });
        target.journalled(running());
        target.feed(TargetEvent::Resumed);
        target
    }
}

pub fn record(entry: Entry) -> Record {
    Record {
        migration: ID,
        entry,
    }
}

pub fn records(entries: &[Entry]) -> Vec<Record> {
    entries.iter().cloned().map(record).collect()
}

pub fn journal(entry: Entry) -> SourceAction {
    SourceAction::Journal(record(entry))
}

pub fn target_journal(entry: Entry) -> TargetAction {
    TargetAction::Journal(record(entry))
}

pub fn offered() -> Entry {
    Entry::Offered(OfferedEntry {
        workload: WorkloadName::Process(7),
        peer: "b".parse().unwrap(),
        policy: Policy::DEFAULT,
        hold: false,
        state: state(),
    })
}

pub fn commit() -> Entry {
    Entry::Commit {
        generation: GENERATION,
        drains: false,
    }
}

pub fn accepted() -> Entry {
    Entry::Accepted(AcceptedEntry {
        workload: WorkloadName::Process(7),
        peer: "a".parse().unwrap(),
        incarnation: INCARNATION,
        state: state(),
    })
}

pub fn ready_entry() -> Entry {
    Entry::Ready(ReadyEntry {
        generation: GENERATION,
        incarnation: INCARNATION,
        drains: false,
        state: state(),
    })
}

pub fn running() -> Entry {
    Entry::Running {
        generation: GENERATION,
    }
}

pub fn settled() -> Entry {
    Entry::Settled {
        generation: GENERATION,
    }
}

pub fn say_settled() -> SourceAction {
    SourceAction::Send(SourceMessage::Settled {
        generation: GENERATION,
    })
}

pub fn refused() -> Entry {
    Entry::Refused {
        generation: GENERATION,
    }
}

pub fn ready() -> TargetMessage {
    TargetMessage::Ready {
        generation: GENERATION,
        incarnation: INCARNATION,
    }
}

pub fn failure() -> Failure {
    Failure::new(ErrorCode::CriuFailed, "criu failed")
}

pub fn aborted(code: ErrorCode, text: &str) -> Entry {
    Entry::Aborted(Failure::new(code, text))
}

pub fn round_report(round: u32, sent: u64, dirtied: u64) -> RoundReport {
    RoundReport {
        round: Round::new(round).unwrap(),
        parcels: 3,
        pages_sent: PageCount(sent),
        pages_dirtied_estimate: PageCount(dirtied),
        raw_bytes: PageCount(sent).bytes(),
        wire_bytes: PageCount(sent).bytes() / 2,
        duration: Duration::from_secs(1),
        eager_bytes: 0,
        anew: false,
        files: FilesReport::default(),
    }
}

pub fn round_end(round: u32, parcels: u32, pages: u64) -> RoundEnd {
    RoundEnd {
        round: Round::new(round).unwrap(),
        parcels,
        pages: PageCount(pages),
        files: 0,
    }
}

pub fn final_report() -> FinalReport {
    FinalReport {
        parcels: 1,
        pages: PageCount(5),
        live_sets: 1,
        images: 9,
        digests: 0,
        locks: 0,
        files: 0,
        absent_sets: 0,
        absent_pages: PageCount::ZERO,
        raw_bytes: 20480,
        wire_bytes: 1000,
    }
}

pub fn last(round: u32) -> Final {
    Final {
        generation: GENERATION,
        round: Round::new(round).unwrap(),
        parcels: 1,
        pages: PageCount(5),
        live_sets: 1,
        images: 9,
        digests: 0,
        verify: false,
        locks: 0,
        files: 0,
        absent_sets: 0,
        absent_pages: PageCount::ZERO,
    }
}

pub fn offer() -> Offer {
    Offer {
        version: Version::CURRENT,
        workload: WorkloadName::Process(7),
        generation: GENERATION,
        policy: Policy::DEFAULT,
        description: description(),
        network: None,
    }
}

pub fn source_offer() -> SourceOffer {
    SourceOffer {
        id: ID,
        workload: WorkloadName::Process(7),
        peer: "b".parse().unwrap(),
        policy: Policy::DEFAULT,
        description: description(),
        network: None,
        hold: false,
        state: state(),
    }
}

pub fn state() -> DriverState {
    DriverState::new(vec![1]).unwrap()
}

fn description() -> WorkloadDescription {
    WorkloadDescription {
        root_pid: 7,
        spaces: Vec::new(),
        pids: vec![7],
        own_namespaces: Namespaces::NONE,
        hostname: String::new(),
        domainname: String::new(),
        links: Vec::new(),
        routes: Vec::new(),
        files: Vec::new(),
        shared: Vec::new(),
        copied: Vec::new(),
        boot_id: [7; 16],
        cpu: None,
        criu_version: 40201,
        page_size: 4096,
        kernel_release: String::new(),
        cwd: "/".to_owned(),
        root: "/".to_owned(),
        mounts: Vec::new(),
        needs: Needs::default(),
        container: None,
        members: Vec::new(),
        member_name: String::new(),
    }
}

pub const THAW: SourceAction = SourceAction::Thaw { untrack: true };

pub fn is_abort(action: &SourceAction) -> bool {
    matches!(action, SourceAction::Send(SourceMessage::Abort { .. }))
}

/// Aborted, thawed and untracked with this code, and the target told.
pub fn assert_aborts(actions: &[SourceAction], source: &Source, code: ErrorCode) {
    let [abort, thaw] = actions else {
        panic!("{actions:?}")
    };
    assert!(is_abort(abort), "{actions:?}");
    assert_eq!(*thaw, THAW);
    let status = source.status();
    assert_eq!(status.phase, Phase::Aborting);
    assert_eq!(status.failure.unwrap().code(), code);
}

/// What a source says that gives up a freeze.
pub fn retry(pause: Duration) -> RetryReport {
    RetryReport {
        parcels: 2,
        pages: PageCount(7),
        raw_bytes: PageCount(7).bytes(),
        wire_bytes: 9000,
        pause,
        reason: Failure::new(ErrorCode::PassingState, "a socket is being opened"),
    }
}
