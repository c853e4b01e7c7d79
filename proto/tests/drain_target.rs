//! A target that runs a workload while pages of it are at the source, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::{TargetAction, TargetEvent, answer};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::TargetMessage;
use rig::drain::*;
use rig::*;

// clause: P-7
#[test]
fn the_target_says_filled_when_that_is_on_disk_and_whenever_it_is_asked() {
    let mut target = filling();
    let status = target.status();
    assert_eq!((status.phase, status.drains), (Phase::Running, true));
    assert_eq!(target.hear(DRAINING), []);
    let filled = target_journal(FILLED_ENTRY);
    let written = target.feed(TargetEvent::Filled);
    assert_eq!(written, std::slice::from_ref(&filled));
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
        let heard = target.hear(DRAINING);
        assert_eq!(heard, std::slice::from_ref(&said));
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
    let kept = answer(&rig::records(&records)).unwrap().unwrap();
    let kept: Vec<Entry> = kept.into_iter().map(|record| record.entry).collect();
    for entries in [&records, &kept] {
        let mut target = Target::recovered(entries);
        assert!(target.machine.is_finished());
        let heard = target.hear(DRAINING);
        assert_eq!(heard, std::slice::from_ref(&said));
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
