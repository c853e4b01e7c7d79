//! A target that runs a workload while pages of it are at the source, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::migration::handoff::{REDIAL, RESEND, RETRY, Side};
use pageferry_proto::migration::policy::{Mode, OnTimeout, Policy};
use pageferry_proto::migration::record::{Entry, ReadyEntry};
use pageferry_proto::migration::source::{
    FinalReport, SILENCE_MAX, SourceAction, SourceEvent, SourceMachine, SourceOffer,
};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::{TargetAction, TargetEvent, answer};
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Fetch, Final, SourceMessage, TargetMessage};
use rig::*;

const DRAINING: SourceMessage = SourceMessage::Draining {
    generation: GENERATION,
};
const STARTED: TargetMessage = TargetMessage::Started {
    generation: GENERATION,
    root_pid: None,
};
const FILLED: TargetMessage = TargetMessage::Filled {
    generation: GENERATION,
};
const FILLED_ENTRY: Entry = Entry::Filled {
    generation: GENERATION,
};
const STARTED_ENTRY: Entry = Entry::Started {
    generation: GENERATION,
};
const GO: SourceMessage = SourceMessage::Go {
    generation: GENERATION,
};
const COMMIT: Entry = Entry::Commit {
    generation: GENERATION,
    drains: true,
};

fn policy(mode: Mode) -> Policy {
    Policy {
        mode,
        ..Policy::DEFAULT
    }
}

fn gone() -> Failure {
    Failure::new(ErrorCode::WorkloadGone, "the copy is gone")
}

/// What is said and written of it.
fn lost(why: &Failure) -> Failure {
    let text = format!("pages of the workload, which ran at the target, are lost: {why}");
    Failure::new(ErrorCode::LostInDrain, text)
}

fn fence() -> Failure {
    Failure::new(ErrorCode::Fenced, "the operator declared the source dead")
}

fn drain_lost(failure: Failure) -> SourceMessage {
    SourceMessage::DrainLost {
        generation: GENERATION,
        failure,
    }
}

fn target_lost(failure: Failure) -> TargetMessage {
    TargetMessage::DrainLost {
        generation: GENERATION,
        failure,
    }
}

fn say(message: SourceMessage) -> SourceAction {
    SourceAction::Send(message)
}

fn answers(message: TargetMessage) -> TargetAction {
    TargetAction::Send(message)
}

/// Offered to a target that takes, or does not take, a workload with pages missing.
fn offered_to(policy: Policy, drains: bool) -> (Source, Vec<SourceAction>) {
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
fn after_a_round(source: &mut Source, sent: u64, left: u64) -> Vec<SourceAction> {
    source.feed(SourceEvent::RoundSent(round_report(1, sent, left)));
    source.hear(TargetMessage::RoundHeld {
        round: Round::FIRST,
    })
}

fn report_with_absent(absent: u64) -> FinalReport {
    FinalReport {
        absent_sets: u32::from(0 < absent),
        absent_pages: PageCount(absent),
        ..final_report()
    }
}

/// Committed, with pages missing.
fn committed() -> Source {
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

fn draining() -> Source {
    let mut source = committed();
    let actions = source.hear(STARTED);
    let expected = [journal(STARTED_ENTRY), SourceAction::Drain, say(DRAINING)];
    assert_eq!(actions, expected);
    assert_eq!(source.journalled(STARTED_ENTRY), []);
    source
}

fn ready_with_absent() -> Entry {
    let Entry::Ready(ready) = ready_entry() else {
        unreachable!("a readiness")
    };
    Entry::Ready(ReadyEntry {
        drains: true,
        ..ready
    })
}

fn last_with_absent() -> Final {
    Final {
        absent_sets: 1,
        absent_pages: PageCount(1000),
        ..last(1)
    }
}

fn held_with_absent() -> Target {
    let mut target = Target::receiving();
    target.hear(SourceMessage::Final(last_with_absent()));
    target.feed(TargetEvent::FinalStored);
    let restored = TargetEvent::Restored { state: state() };
    assert_eq!(target.feed(restored), [target_journal(ready_with_absent())]);
    target.journalled(ready_with_absent());
    target
}

fn filling() -> Target {
    let mut target = held_with_absent();
    target.hear(GO);
    target.feed(TargetEvent::Locked);
    target.journalled(running());
    assert_eq!(target.feed(TargetEvent::Resumed), [answers(STARTED)]);
    target
}

// clause: P-7
#[test]
fn the_target_says_filled_when_that_is_on_disk_and_whenever_it_is_asked() {
    let mut target = filling();
    let status = target.status();
    assert_eq!((status.phase, status.drains), (Phase::Running, true));
    assert_eq!(target.hear(DRAINING), []);
    let filled = target_journal(FILLED_ENTRY);
    assert_eq!(target.feed(TargetEvent::Filled), [filled.clone()]);
    assert_eq!(target.hear(DRAINING), []);
    assert_eq!(target.journal_failed(FILLED_ENTRY), []);
    assert_eq!(target.wait(), [filled]);
    let said = [answers(FILLED), target_journal(Entry::Done)];
    assert_eq!(target.journalled(FILLED_ENTRY), said);
    assert_eq!(target.hear(DRAINING), [answers(FILLED)]);
    target.journalled(Entry::Done);
    assert_eq!(target.hear(DRAINING), [answers(FILLED)]);
    assert_eq!(target.hear(drain_lost(gone())), [answers(FILLED)]);
    let status = target.status();
    assert_eq!((status.phase, status.drains), (Phase::Done, false));
    // The answer outlives the journal.
    let entries = [
        accepted(),
        ready_with_absent(),
        running(),
        FILLED_ENTRY,
        Entry::Done,
    ];
    let kept = answer(&records(&entries)).unwrap().unwrap();
    let kept: Vec<Entry> = kept.into_iter().map(|record| record.entry).collect();
    let mut target = Target::recovered(&kept);
    assert_eq!(target.hear(DRAINING), [answers(FILLED)]);
}

// clause: P-9
#[test]
fn what_lacks_pages_for_good_is_abandoned_once_that_is_on_disk() {
    let entry = Entry::Aborted(lost(&gone()));
    for event in [
        TargetEvent::Message(drain_lost(gone())),
        TargetEvent::DrainLost(gone()),
    ] {
        let mut target = filling();
        assert_eq!(target.feed(event), [target_journal(entry.clone())]);
        assert_eq!(target.hear(DRAINING), []);
        assert_eq!(target.journal_failed(entry.clone()), []);
        assert_eq!(target.wait(), [target_journal(entry.clone())]);
        let said = answers(target_lost(lost(&gone())));
        let expected = [TargetAction::Abandon, said.clone()];
        assert_eq!(target.journalled(entry.clone()), expected);
        assert_eq!(target.hear(DRAINING), [said.clone()]);
        // It has run: nobody is to think otherwise.
        assert_eq!(target.hear(GO), [answers(STARTED)]);
        assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
        assert_eq!(target.wait(), [TargetAction::Abandon]);
        let done = target_journal(Entry::Done);
        assert_eq!(target.feed(TargetEvent::Abandoned), [done]);
        target.journalled(Entry::Done);
        assert_eq!(target.hear(drain_lost(gone())), [said]);
        let status = target.status();
        assert_eq!(status.phase, Phase::Aborted);
        assert_eq!(status.failure, Some(lost(&gone())));
    }
}

// clause: P-9
#[test]
fn what_is_lost_before_it_is_known_to_run_is_abandoned_then() {
    let mut target = held_with_absent();
    target.hear(GO);
    target.feed(TargetEvent::Locked);
    assert_eq!(target.feed(TargetEvent::DrainLost(gone())), []);
    target.journalled(running());
    let expected = [
        answers(STARTED),
        target_journal(Entry::Aborted(lost(&gone()))),
    ];
    assert_eq!(target.feed(TargetEvent::Resumed), expected);
    // Before that is written it need not run at all.
    let mut target = held_with_absent();
    let actions = target.feed(TargetEvent::DrainLost(gone()));
    assert_eq!(actions, [target_journal(refused())]);
}

// clause: P-11
#[test]
fn a_restarted_target_goes_on_abandoning() {
    let entry = Entry::Aborted(lost(&gone()));
    let mut records = vec![accepted(), ready_with_absent(), running(), entry.clone()];
    let mut target = Target::recovered(&records);
    assert_eq!(target.actions(), [target_journal(entry.clone())]);
    let said = answers(target_lost(lost(&gone())));
    let expected = [TargetAction::Abandon, said.clone()];
    assert_eq!(target.journalled(entry), expected);
    records.push(Entry::Done);
    let kept = answer(&self::rig::records(&records)).unwrap().unwrap();
    let kept: Vec<Entry> = kept.into_iter().map(|record| record.entry).collect();
    for entries in [&records, &kept] {
        let mut target = Target::recovered(entries);
        assert!(target.machine.is_finished());
        assert_eq!(target.hear(DRAINING), [said.clone()]);
        assert_eq!(target.hear(GO), [answers(STARTED)]);
    }
}

// clause: P-10
#[test]
fn a_fence_of_the_source_ends_what_lacks_pages() {
    let mut target = filling();
    let entry = Entry::Aborted(lost(&fence()));
    let actions = target.feed(TargetEvent::Fenced(Side::Source));
    assert_eq!(actions, [target_journal(entry)]);
    // What is only held is not begun for nothing.
    let mut target = held_with_absent();
    let actions = target.feed(TargetEvent::Fenced(Side::Source));
    assert_eq!(actions, [target_journal(refused())]);
    let failure = target.status().failure.unwrap();
    assert_eq!(failure.code(), ErrorCode::LostInDrain);
    // What has all is not ended by it.
    let mut target = filling();
    target.feed(TargetEvent::Filled);
    assert_eq!(target.feed(TargetEvent::Fenced(Side::Source)), []);
    assert_eq!(target.status().phase, Phase::Running);
}

// clause: P-12
#[test]
fn a_target_that_lost_what_ran_says_so_to_a_source_that_drains() {
    let mut target = Target::recovered(&[accepted(), ready_with_absent(), running()]);
    target.actions();
    target.journalled(running());
    let [TargetAction::Journal(record)] = &target.feed(TargetEvent::Lost(gone()))[..] else {
        panic!("no record");
    };
    let entry = record.entry.clone();
    assert_eq!(entry, Entry::Aborted(gone()));
    assert_eq!(target.hear(DRAINING), []);
    target.journalled(entry);
    assert_eq!(target.hear(DRAINING), [answers(target_lost(lost(&gone())))]);
    // A source that does not know that it ran is not told so: its operator decides.
    let unknown = TargetMessage::Unknown {
        generation: GENERATION,
    };
    assert_eq!(target.hear(GO), [answers(unknown)]);
}
