//! The same for a workload that runs at the target while pages of it are at the source.

use pageferry_proto::id::Round;
use pageferry_proto::migration::policy::{Mode, Policy};
use pageferry_proto::migration::record::{Entry, ReadyEntry};
use pageferry_proto::migration::source::{
    FinalReport, SourceAction, SourceEvent, SourceMachine, SourceOffer,
};
use pageferry_proto::migration::target::{TargetAction, TargetEvent};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Final, SourceMessage, TargetMessage};

use super::*;

pub const DRAINING: SourceMessage = SourceMessage::Draining {
    generation: GENERATION,
};
pub const STARTED: TargetMessage = TargetMessage::Started {
    generation: GENERATION,
    root_pid: None,
};
pub const FILLED: TargetMessage = TargetMessage::Filled {
    generation: GENERATION,
};
pub const FILLED_ENTRY: Entry = Entry::Filled {
    generation: GENERATION,
};
pub const STARTED_ENTRY: Entry = Entry::Started {
    generation: GENERATION,
};
pub const GO: SourceMessage = SourceMessage::Go {
    generation: GENERATION,
};
pub const COMMIT: Entry = Entry::Commit {
    generation: GENERATION,
    drains: true,
};

pub fn policy(mode: Mode) -> Policy {
    Policy {
        mode,
        ..Policy::DEFAULT
    }
}

pub fn gone() -> Failure {
    Failure::new(ErrorCode::WorkloadGone, "the copy is gone")
}

/// What is said and written of it.
pub fn lost(why: &Failure) -> Failure {
    let text = format!("pages of the workload, which ran at the target, are lost: {why}");
    Failure::new(ErrorCode::LostInDrain, text)
}

pub fn fence() -> Failure {
    Failure::new(ErrorCode::Fenced, "the operator declared the source dead")
}

pub fn drain_lost(failure: Failure) -> SourceMessage {
    SourceMessage::DrainLost {
        generation: GENERATION,
        failure,
    }
}

pub fn target_lost(failure: Failure) -> TargetMessage {
    TargetMessage::DrainLost {
        generation: GENERATION,
        failure,
    }
}

pub fn say(message: SourceMessage) -> SourceAction {
    SourceAction::Send(message)
}

pub fn answers(message: TargetMessage) -> TargetAction {
    TargetAction::Send(message)
}

/// Offered to a target that takes, or does not take, a workload with pages missing.
pub fn offered_to(policy: Policy, drains: bool) -> (Source, Vec<SourceAction>) {
    let now = Default::default();
    let offer = SourceOffer {
        policy,
        ..source_offer()
    };
    let machine = SourceMachine::new(offer, now);
    let mut source = Source { machine, now };
    source.actions();
    source.feed(SourceEvent::Journalled(record(match offered() {
        Entry::Offered(entry) => {
            Entry::Offered(pageferry_proto::migration::record::OfferedEntry { policy, ..entry })
        }
        entry => entry,
    })));
    source.feed(SourceEvent::PeerConnected);
    let actions = source.hear(TargetMessage::Accepted {
        incarnation: INCARNATION,
        kept: Vec::new(),
        parks: false,
        drains,
    });
    (source, actions)
}

/// The first round is held, and what follows.
pub fn after_a_round(source: &mut Source, sent: u64, left: u64) -> Vec<SourceAction> {
    source.feed(SourceEvent::RoundSent(round_report(1, sent, left)));
    source.hear(TargetMessage::RoundHeld {
        round: Round::FIRST,
    })
}

pub fn report_with_absent(absent: u64) -> FinalReport {
    FinalReport {
        absent_sets: u32::from(0 < absent),
        absent_pages: PageCount(absent),
        ..final_report()
    }
}

/// Committed, with pages missing.
pub fn committed() -> Source {
    let mut source = Source::with(policy(Mode::Postcopy));
    assert_eq!(
        after_a_round(&mut source, 0, 1000),
        [SourceAction::Freeze {
            round: Round::FIRST.next()
        }]
    );
    source.feed(SourceEvent::Frozen);
    source.feed(SourceEvent::Finished(report_with_absent(1000)));
    source.hear(TargetMessage::FinalHeld {
        generation: GENERATION,
    });
    source.hear(ready());
    assert_eq!(source.feed(SourceEvent::SmapsEqual), [journal(COMMIT)]);
    source.journalled(COMMIT);
    source
}

pub fn draining() -> Source {
    let mut source = committed();
    let actions = source.hear(STARTED);
    let expected = [journal(STARTED_ENTRY), SourceAction::Drain, say(DRAINING)];
    assert_eq!(actions, expected);
    assert_eq!(source.journalled(STARTED_ENTRY), []);
    source
}

pub fn ready_with_absent() -> Entry {
    let Entry::Ready(ready) = ready_entry() else {
        unreachable!("a readiness")
    };
    Entry::Ready(ReadyEntry {
        drains: true,
        ..ready
    })
}

pub fn last_with_absent() -> Final {
    Final {
        absent_sets: 1,
        absent_pages: PageCount(1000),
        ..last(1)
    }
}

pub fn held_with_absent() -> Target {
    let mut target = Target::receiving();
    target.hear(SourceMessage::Final(last_with_absent()));
    target.feed(TargetEvent::FinalStored);
    let restored = TargetEvent::Restored { state: state() };
    assert_eq!(target.feed(restored), [target_journal(ready_with_absent())]);
    target.journalled(ready_with_absent());
    target
}

pub fn filling() -> Target {
    let mut target = held_with_absent();
    target.hear(GO);
    target.feed(TargetEvent::Locked);
    target.journalled(running());
    assert_eq!(target.feed(TargetEvent::Resumed), [answers(STARTED)]);
    target
}
