//! Both machines when the workload has file locks on shared storage, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use expect_test::{Expect, expect};
use pageferry_proto::migration::handoff::{RETRY, Side};
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::{
    FinalReport, SourceAction, SourceEvent, UNLOCK_TRIES_MAX,
};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::{LOCK_TRIES_MAX, TargetAction, TargetEvent};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{
    ControlError, FINAL_LOCKS_MAX, Final, Message, SourceMessage, TargetMessage,
};
use pageferry_proto::wire::frame;
use rig::*;

const GO: SourceMessage = SourceMessage::Go {
    generation: GENERATION,
};
const QUERY: SourceMessage = SourceMessage::Query {
    generation: GENERATION,
};
const STARTED: TargetMessage = TargetMessage::Started {
    generation: GENERATION,
    root_pid: None,
};

fn say(message: SourceMessage) -> [SourceAction; 1] {
    [SourceAction::Send(message)]
}

fn taken() -> Failure {
    Failure::new(ErrorCode::LockTaken, "process 9 has it")
}

fn refused_for(failure: Failure) -> TargetMessage {
    TargetMessage::Refused {
        generation: GENERATION,
        failure: Some(failure),
    }
}

/// The commit is durable, and the locks are being let go.
fn unlocking() -> Source {
    let mut source = Source::finishing();
    let report = FinalReport {
        locks: 2,
        ..final_report()
    };
    let said = Final {
        locks: 2,
        ..last(2)
    };
    let actions = source.feed(SourceEvent::Finished(report));
    assert_eq!(actions[0], SourceAction::Send(SourceMessage::Final(said)));
    source.hear(ready());
    assert_eq!(source.feed(SourceEvent::SmapsEqual), [journal(commit())]);
    assert_eq!(source.journalled(commit()), [SourceAction::Unlock]);
    source
}

fn target_ready() -> Target {
    let mut target = Target::receiving();
    let said = Final {
        locks: 2,
        ..last(1)
    };
    target.hear(SourceMessage::Final(said));
    target.feed(TargetEvent::FinalStored);
    target.feed(TargetEvent::Restored { state: state() });
    target.journalled(ready_entry());
    target
}

/// Told to go, and taking the locks.
fn locking() -> Target {
    let mut target = target_ready();
    assert_eq!(target.hear(GO), [TargetAction::Lock]);
    target
}

// clause: H-22
#[test]
fn locks_are_let_go_when_the_commit_is_on_disk_and_before_go() {
    let mut source = unlocking();
    assert_eq!(source.status().phase, Phase::Committed);
    assert_eq!(source.wait(RETRY * 100), []);
    assert_eq!(source.feed(SourceEvent::Unlocked), say(GO));
    // Without a commit on disk nothing is let go.
    let mut source = Source::finishing();
    source.feed(SourceEvent::Finished(FinalReport {
        locks: 1,
        ..final_report()
    }));
    source.hear(ready());
    source.feed(SourceEvent::SmapsEqual);
    assert_eq!(source.journal_failed(commit()), say(QUERY));
    // After a restart nobody knows whether there are any.
    let mut source = Source::recovered(&[offered(), commit()]);
    source.actions();
    assert_eq!(source.journalled(commit()), [SourceAction::Unlock]);
    assert_eq!(source.feed(SourceEvent::Unlocked), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), say(GO));
}

// clause: H-22
#[test]
fn locks_that_cannot_be_let_go_bring_the_workload_back() {
    let mut source = unlocking();
    for _ in 1..UNLOCK_TRIES_MAX {
        assert_eq!(source.feed(SourceEvent::Failure(failure())), []);
        assert_eq!(source.wait(RETRY), [SourceAction::Unlock]);
    }
    assert_eq!(source.feed(SourceEvent::Failure(failure())), say(QUERY));
    assert_eq!(source.status().failure, Some(failure()));
    let mut source = unlocking();
    assert_eq!(source.feed(SourceEvent::AbortRequested), say(QUERY));
    assert_eq!(source.feed(SourceEvent::Unlocked), []);
    assert_eq!(source.status().failure, None);
    let refused = source.hear(refused_for(failure()));
    assert!(matches!(refused[..], [SourceAction::Journal(_)]));
}

// clause: H-22
#[test]
fn a_copy_of_which_a_process_has_ended_is_asked_back_by_the_operator_alone() {
    let gone = Failure::new(ErrorCode::WorkloadGone, "process 7 has ended");
    let mut source = unlocking();
    for _ in 0..10 * UNLOCK_TRIES_MAX {
        assert_eq!(source.feed(SourceEvent::Failure(gone.clone())), []);
        assert_eq!(source.status().failure, Some(gone.clone()));
        assert_eq!(source.wait(RETRY), [SourceAction::Unlock]);
    }
    assert_eq!(source.feed(SourceEvent::AbortRequested), say(QUERY));
    // It is whole, and somebody waits for what would be let go.
    let awaited = Failure::new(ErrorCode::SharedLock, "process 9 waits");
    let mut source = unlocking();
    assert_eq!(
        source.feed(SourceEvent::Failure(awaited.clone())),
        say(QUERY)
    );
    assert_eq!(source.status().failure, Some(awaited));
}

// clause: H-24
#[test]
fn a_copy_that_comes_back_in_part_says_what_is_lost() {
    let gone = Failure::new(ErrorCode::WorkloadGone, "process 7 has ended");
    let mut source = unlocking();
    source.feed(SourceEvent::Unlocked);
    source.hear(refused_for(failure()));
    let text = format!(
        "the target refused to run the workload: {}",
        failure().text()
    );
    source.journalled(aborted(failure().code(), &text));
    let actions = source.feed(SourceEvent::ThawedInPart {
        untrack: true,
        lost: gone.clone(),
    });
    assert_eq!(actions, [say_settled()]);
    let status = source.status();
    assert_eq!((status.phase, status.failure), (Phase::Aborted, Some(gone)));
}

// clause: H-24
#[test]
fn that_another_had_a_lock_meanwhile_stays_in_the_status() {
    let mut source = unlocking();
    source.feed(SourceEvent::Unlocked);
    source.feed(SourceEvent::Fenced(Side::Target));
    source.journalled(Entry::Fenced {
        generation: GENERATION,
    });
    source.feed(SourceEvent::Failure(taken()));
    source.wait(RETRY);
    source.feed(SourceEvent::Thawed { untrack: true });
    let failure = source.status().failure.unwrap();
    assert_eq!(failure.code(), ErrorCode::LockTaken);
    let text = failure.text();
    assert!(
        text.starts_with("fenced: ") && text.ends_with(taken().text()),
        "{text}"
    );
    // At the target, too: also when it runs.
    let mut target = locking();
    target.feed(TargetEvent::NotLocked(taken()));
    target.wait();
    target.feed(TargetEvent::Locked);
    target.journalled(running());
    assert_eq!(target.status().failure, Some(taken()));
    target.feed(TargetEvent::Resumed);
    assert_eq!(target.status().failure, Some(taken()));
}

#[test]
fn what_the_target_says_counts_while_locks_are_let_go() {
    let started = Entry::Started {
        generation: GENERATION,
    };
    assert_eq!(unlocking().hear(STARTED), [journal(started)]);
    let mut source = unlocking();
    let text = "the target refused to run the workload: process 9 has it";
    let refusal = aborted(ErrorCode::LockTaken, text);
    assert_eq!(
        source.hear(refused_for(taken())),
        [journal(refusal.clone())]
    );
    assert_eq!(source.journalled(refusal), [THAW]);
    assert_eq!(source.feed(SourceEvent::Unlocked), []);
    let fenced = Entry::Fenced {
        generation: GENERATION,
    };
    let mut source = unlocking();
    let fence = SourceEvent::Fenced(Side::Target);
    assert_eq!(source.feed(fence), [journal(fenced)]);
    let mut source = unlocking();
    source.feed(SourceEvent::PeerLost);
    assert_eq!(source.feed(SourceEvent::Unlocked), [SourceAction::Connect]);
}

// clause: H-24
#[test]
fn a_copy_whose_lock_another_has_stays_frozen_until_it_is_given_back() {
    let mut source = unlocking();
    source.feed(SourceEvent::Unlocked);
    source.hear(refused_for(taken()));
    let text = "the target refused to run the workload: process 9 has it";
    assert_eq!(
        source.journalled(aborted(ErrorCode::LockTaken, text)),
        [THAW]
    );
    for _ in 0..100 {
        assert_eq!(source.feed(SourceEvent::Failure(taken())), []);
        assert_eq!(source.status().phase, Phase::Reclaiming);
        assert_eq!(source.status().failure, Some(taken()));
        assert_eq!(source.wait(RETRY), [THAW]);
    }
    let thawed = SourceEvent::Thawed { untrack: true };
    assert_eq!(source.feed(thawed), [say_settled()]);
    // That is over, and why it came back is not.
    assert_eq!(source.status().failure.unwrap().text(), text);
}

#[test]
fn a_reason_that_was_recorded_is_the_evidence_after_a_restart() {
    let refusal = aborted(ErrorCode::LockTaken, "the target refused: process 9 has it");
    let mut source = Source::recovered(&[offered(), commit(), refusal.clone()]);
    assert_eq!(source.actions(), [journal(refusal.clone())]);
    assert_eq!(source.journalled(refusal), [THAW]);
}

// clause: H-23
#[test]
fn locks_are_taken_before_running_is_written() {
    let mut target = locking();
    assert_eq!(target.hear(GO), []);
    assert_eq!(target.status().phase, Phase::Ready);
    assert_eq!(
        target.feed(TargetEvent::Locked),
        [target_journal(running())]
    );
    // A workload without locks needs none.
    let mut target = Target::ready();
    assert_eq!(target.hear(GO), [target_journal(running())]);
    // After a restart nobody knows.
    let mut target = Target::recovered(&[accepted(), ready_entry()]);
    target.actions();
    target.journalled(ready_entry());
    assert_eq!(target.hear(GO), [TargetAction::Lock]);
    // That it runs is on disk, so it has them.
    let mut target = Target::recovered(&[accepted(), ready_entry(), running()]);
    target.actions();
    let let_go = TargetAction::LetGo {
        generation: GENERATION,
    };
    assert_eq!(target.journalled(running()), [let_go]);
}

// clause: H-23
#[test]
fn a_lock_that_another_has_taken_is_waited_for_and_then_refused() {
    let mut target = locking();
    for _ in 1..LOCK_TRIES_MAX {
        assert_eq!(target.feed(TargetEvent::NotLocked(taken())), []);
        assert_eq!(target.hear(GO), []);
        assert_eq!(target.wait(), [TargetAction::Lock]);
    }
    let actions = target.feed(TargetEvent::NotLocked(taken()));
    assert_eq!(actions, [target_journal(refused())]);
    target.journalled(refused());
    let actions = target.feed(TargetEvent::Discarded);
    assert_eq!(actions[0], TargetAction::Send(refused_for(taken())));
}

// clause: H-23
#[test]
fn without_a_source_that_could_have_it_back_a_lock_is_waited_for_without_limit() {
    let fence = TargetEvent::Fenced(Side::Source);
    let mut fenced = target_ready();
    assert_eq!(fenced.feed(fence.clone()), [TargetAction::Lock]);
    let mut told = locking();
    assert_eq!(told.feed(fence), []);
    let mut alone = locking();
    assert_eq!(alone.feed(TargetEvent::PeerLost), []);
    for mut target in [fenced, told, alone] {
        for _ in 0..10 * LOCK_TRIES_MAX {
            assert_eq!(target.feed(TargetEvent::NotLocked(taken())), []);
            assert_eq!(target.status().failure, Some(taken()));
            assert_eq!(target.wait(), [TargetAction::Lock]);
        }
        assert_eq!(
            target.feed(TargetEvent::Locked),
            [target_journal(running())]
        );
        assert_eq!(target.status().failure, Some(taken()));
    }
}

// clause: H-23
#[test]
fn what_ends_a_held_workload_ends_one_that_waits_for_its_locks() {
    let abort = SourceMessage::Abort {
        generation: GENERATION,
        failure: failure(),
    };
    let ends = [
        TargetEvent::Message(QUERY),
        TargetEvent::Message(abort),
        TargetEvent::AbortRequested,
        TargetEvent::Failure(failure()),
        TargetEvent::Fenced(Side::Target),
    ];
    for end in ends {
        let mut target = locking();
        assert_eq!(target.feed(end)[0], target_journal(refused()));
        // What was under way may still report.
        assert_eq!(target.feed(TargetEvent::Locked), []);
        assert_eq!(target.feed(TargetEvent::NotLocked(taken())), []);
        assert_eq!(target.journalled(refused()), [TargetAction::Discard]);
    }
    // A try that was to come does not.
    let mut target = locking();
    target.feed(TargetEvent::NotLocked(taken()));
    target.hear(QUERY);
    assert_eq!(target.machine.poll_timeout(), None);
}

// clause: F-10
#[test]
fn what_is_said_of_locks_keeps_its_bytes() {
    let check = |message: Message, golden: &Expect| {
        let bytes = message.encode().unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        golden.assert_eq(&hex);
        assert_eq!(Message::decode(&bytes[frame::HEADER_BYTES..]), Ok(message));
    };
    let said = |locks| SourceMessage::Final(Final { locks, ..last(9) });
    check(
        said(300).into(),
        &expect!["1200000092010f08011009180120052801300948ac02"],
    );
    check(
        refused_for(taken()).into(),
        &expect!["1b000000b2031808011214084d121070726f63657373203920686173206974"],
    );
    let bytes = Message::from(said(FINAL_LOCKS_MAX + 1)).encode().unwrap();
    let refused = Message::decode(&bytes[frame::HEADER_BYTES..]).unwrap_err();
    let expected = ControlError::Invalid {
        field: "final.locks",
        value: (FINAL_LOCKS_MAX + 1).into(),
    };
    assert_eq!(refused.to_string(), expected.to_string());
}
