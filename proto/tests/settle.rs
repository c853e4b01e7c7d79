//! How a target gets to forget, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use pageferry_proto::id::Generation;
use pageferry_proto::migration::handoff::{REDIAL, RESEND, TELL_MAX};
use pageferry_proto::migration::record::{AcceptedEntry, DriverState, Entry, ReadyEntry};
use pageferry_proto::migration::source::{SourceAction, SourceEvent};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::{
    ANSWER_STATE_BYTES_MAX, TargetAction, TargetEvent, TargetMachine, answer,
};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use rig::*;

const GO: SourceMessage = SourceMessage::Go {
    generation: GENERATION,
};
const SETTLED: SourceMessage = SourceMessage::Settled {
    generation: GENERATION,
};
const FORGOTTEN: TargetMessage = TargetMessage::Forgotten {
    generation: GENERATION,
};
const STARTED: TargetMessage = TargetMessage::Started {
    generation: GENERATION,
    root_pid: None,
};
const REFUSED: TargetMessage = TargetMessage::Refused {
    generation: GENERATION,
    failure: None,
};

fn started_entry() -> Entry {
    Entry::Started {
        generation: GENERATION,
    }
}

fn say_forgotten() -> TargetAction {
    TargetAction::Send(FORGOTTEN)
}

fn refusal() -> Entry {
    aborted(ErrorCode::Refused, "the target refused to run the workload")
}

/// The target has started the workload, and the source has that on disk.
fn released() -> Source {
    let mut source = Source::committed();
    source.hear(STARTED);
    source.journalled(started_entry());
    source
}

// clause: H-19
#[test]
fn a_source_says_settled_until_the_target_has_forgotten() {
    let mut source = released();
    assert_eq!(source.feed(SourceEvent::Released), [say_settled()]);
    // Whoever waits for the end waits no longer.
    assert_eq!(source.status().phase, Phase::Done);
    assert_eq!(source.wait(RESEND), [say_settled()]);
    source.feed(SourceEvent::PeerLost);
    assert_eq!(source.wait(REDIAL), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [say_settled()]);
    assert!(!source.machine.is_finished());
    assert_eq!(source.hear(FORGOTTEN), [journal(Entry::Done)]);
}

#[test]
fn a_target_that_cannot_be_told_to_forget_is_given_up() {
    let mut source = released();
    source.feed(SourceEvent::Released);
    let actions = source.wait(TELL_MAX);
    assert_eq!(actions.last(), Some(&journal(Entry::Done)));
    source.journalled(Entry::Done);
    assert!(source.machine.is_finished());
    assert_eq!(source.status().phase, Phase::Done);
}

#[test]
fn a_source_that_may_ask_again_after_a_restart_does_not_say_settled() {
    let mut source = Source::committed();
    source.hear(STARTED);
    assert_eq!(
        source.journal_failed(started_entry()),
        [SourceAction::Release]
    );
    assert_eq!(source.feed(SourceEvent::Released), [journal(Entry::Done)]);
}

#[test]
fn a_refusal_is_settled_when_the_abort_is_on_disk() {
    let mut source = Source::committed();
    assert_eq!(source.hear(REFUSED), [journal(refusal())]);
    let thawing = source.journalled(refusal());
    assert!(matches!(thawing[..], [SourceAction::Thaw { .. }]));
    assert_eq!(
        source.feed(SourceEvent::Thawed { untrack: true }),
        [say_settled()]
    );
    assert_eq!(source.hear(FORGOTTEN), [journal(Entry::Done)]);
}

#[test]
fn a_refusal_before_the_commit_is_settled_too() {
    let mut source = Source::finishing();
    source.hear(REFUSED);
    source.feed(SourceEvent::Thawed { untrack: true });
    assert_eq!(source.journalled(refusal()), [say_settled()]);
    assert_eq!(source.hear(FORGOTTEN), [journal(Entry::Done)]);
}

#[test]
fn a_restarted_source_goes_on_to_settle() {
    let mut source = Source::recovered(&[offered(), commit(), started_entry()]);
    source.actions();
    source.journalled(started_entry());
    assert_eq!(source.feed(SourceEvent::Released), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [say_settled()]);
}

#[test]
fn a_target_forgets_when_it_has_written_that_it_may() {
    let mut target = Target::running();
    assert!(target.status().unsettled);
    assert_eq!(target.hear(SETTLED), [target_journal(settled())]);
    assert_eq!(target.journalled(settled()), [say_forgotten()]);
    assert!(!target.status().unsettled);
    // The answer was lost.
    assert_eq!(target.hear(SETTLED), [say_forgotten()]);
    // It still runs.
    assert_eq!(
        target.feed(TargetEvent::Filled),
        [target_journal(Entry::Done)]
    );
    target.journalled(Entry::Done);
    assert!(target.machine.is_finished());
}

#[test]
fn a_record_that_cannot_be_written_only_keeps_the_answer_for_longer() {
    let mut target = Target::running();
    target.hear(SETTLED);
    assert_eq!(target.journal_failed(settled()), [say_forgotten()]);
}

#[test]
fn a_target_that_knows_nothing_has_nothing_to_forget() {
    assert_eq!(Target::new().hear(SETTLED), [say_forgotten()]);
    let ended = Entry::Aborted(failure());
    let mut target = Target::recovered(&[accepted(), ended]);
    assert_eq!(target.hear(SETTLED), [say_forgotten()]);
}

#[test]
fn what_an_older_generation_settles_is_not_forgotten() {
    let newer = Entry::Running {
        generation: GENERATION.next(),
    };
    let mut target = Target::recovered(&[accepted(), ready_entry(), newer, Entry::Done]);
    assert_eq!(target.hear(SETTLED), []);
    assert!(target.status().unsettled);
}

#[test]
fn a_held_workload_cannot_be_settled() {
    let mut target = Target::ready();
    assert_eq!(target.hear(SETTLED), []);
    assert_eq!(target.hear(GO), [target_journal(running())]);
}

/// What a target says to `Go` that is made of what is kept of `entries`.
fn answered(entries: &[Entry]) -> Vec<TargetAction> {
    let kept = answer(&records(entries)).unwrap().unwrap();
    let entries: Vec<Entry> = kept.into_iter().map(|record| record.entry).collect();
    let mut target = Target::recovered(&entries);
    assert_eq!(target.actions(), []);
    assert!(target.machine.is_finished() && target.machine.is_unsettled());
    target.hear(GO)
}

#[test]
fn what_is_kept_of_a_finished_target_gives_the_same_answers() {
    let ended = Entry::Aborted(failure());
    let ran = [accepted(), ready_entry(), running(), Entry::Done];
    assert_eq!(answered(&ran), [TargetAction::Send(STARTED)]);
    let entries = [accepted(), ready_entry(), refused(), ended.clone()];
    let refused = TargetMessage::Refused {
        generation: GENERATION,
        failure: Some(failure()),
    };
    assert_eq!(answered(&entries), [TargetAction::Send(refused)]);
    let kept = |entries: &[Entry]| answer(&records(entries)).unwrap();
    assert_eq!(kept(&[accepted(), ended]), None);
    assert_eq!(kept(&[&ran[..], &[settled()]].concat()), None);
}

#[test]
fn what_is_kept_is_small() {
    let state = |bytes| DriverState::new(vec![7; bytes]).unwrap();
    let kept = |bytes| {
        let Entry::Accepted(accepted) = accepted() else {
            unreachable!("an acceptance")
        };
        let Entry::Ready(ready) = ready_entry() else {
            unreachable!("a readiness")
        };
        let accepted = AcceptedEntry {
            state: state(DriverState::BYTES_MAX),
            ..accepted
        };
        let ready = ReadyEntry {
            state: state(bytes),
            ..ready
        };
        let entries = [
            Entry::Accepted(accepted),
            Entry::Ready(ready),
            running(),
            Entry::Done,
        ];
        let kept = answer(&records(&entries)).unwrap().unwrap();
        let machine =
            TargetMachine::recover(&kept, pageferry_proto::migration::timer::Time::default());
        machine.unwrap().driver_state().clone()
    };
    assert_eq!(kept(ANSWER_STATE_BYTES_MAX), state(ANSWER_STATE_BYTES_MAX));
    assert_eq!(kept(ANSWER_STATE_BYTES_MAX + 1), DriverState::default());
}

#[test]
fn a_generation_is_settled_with_those_before_it() {
    let mut target = Target::running();
    let newer = SourceMessage::Settled {
        generation: Generation::LAST,
    };
    assert_eq!(target.hear(newer), [target_journal(settled())]);
}
