//! The target's machine, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use pageferry_proto::id::Round;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::{LET_GO_TRIES_MAX, TargetAction, TargetEvent};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use rig::*;

const GO: SourceMessage = SourceMessage::Go {
    generation: GENERATION,
};
const QUERY: SourceMessage = SourceMessage::Query {
    generation: GENERATION,
};
const LET_GO: TargetAction = TargetAction::LetGo {
    generation: GENERATION,
};

fn send(message: TargetMessage) -> TargetAction {
    TargetAction::Send(message)
}

fn started() -> TargetAction {
    send(TargetMessage::Started {
        generation: GENERATION,
        root_pid: None,
    })
}

fn say_refused() -> TargetAction {
    say_refused_for(Failure::new(
        ErrorCode::Refused,
        "the source asked for the workload back",
    ))
}

fn say_refused_for(failure: Failure) -> TargetAction {
    send(TargetMessage::Refused {
        generation: GENERATION,
        failure: Some(failure),
    })
}

fn say_unknown() -> TargetAction {
    send(TargetMessage::Unknown {
        generation: GENERATION,
    })
}

fn abort() -> SourceMessage {
    SourceMessage::Abort {
        generation: GENERATION,
        failure: failure(),
    }
}

fn failed_with(actions: &[TargetAction], code: ErrorCode) {
    let [
        TargetAction::Send(TargetMessage::Failed(failure)),
        TargetAction::Discard,
    ] = actions
    else {
        panic!("{actions:?}")
    };
    assert_eq!(failure.code(), code);
}

// clause: C-6
#[test]
fn an_offer_is_accepted_when_everything_is_prepared_and_that_is_on_disk() {
    let mut target = Target::new();
    let prepare = TargetAction::Prepare(Box::new(offer()));
    assert_eq!(
        target.hear(SourceMessage::Offer(Box::new(offer()))),
        [prepare]
    );
    let prepared = TargetEvent::Prepared { state: state() };
    assert_eq!(target.feed(prepared), [target_journal(accepted())]);
    let accept = TargetMessage::Accepted {
        incarnation: INCARNATION,
        kept: Vec::new(),
        parks: false,
        drains: false,
    };
    assert_eq!(target.journalled(accepted()), [send(accept)]);
    let mut target = Target::new();
    target.hear(SourceMessage::Offer(Box::new(offer())));
    let actions = target.feed(TargetEvent::Failure(failure()));
    assert_eq!(
        actions,
        [
            send(TargetMessage::Declined(failure())),
            TargetAction::Discard
        ]
    );
}

// clause: R-1
#[test]
fn rounds_come_one_after_the_other() {
    let mut target = Target::receiving();
    let (end, round) = (round_end(1, 3, 1000), Round::FIRST);
    assert_eq!(
        target.hear(SourceMessage::RoundEnd(end)),
        [TargetAction::AwaitRound(end)]
    );
    let held = send(TargetMessage::RoundHeld { round });
    assert_eq!(target.feed(TargetEvent::RoundStored { round }), [held]);
    let actions = target.hear(SourceMessage::RoundEnd(end));
    failed_with(&actions, ErrorCode::Unexpected);
    let mut target = Target::receiving();
    let actions = target.hear(SourceMessage::RoundEnd(round_end(2, 0, 0)));
    failed_with(&actions, ErrorCode::Unexpected);
    let mut target = Target::receiving();
    target.hear(SourceMessage::RoundEnd(end));
    let actions = target.hear(SourceMessage::Final(last(2)));
    failed_with(&actions, ErrorCode::Unexpected);
}

// clause: F-4
#[test]
fn a_complete_final_round_is_said_and_restored() {
    let mut target = Target::receiving();
    let actions = target.hear(SourceMessage::Final(last(1)));
    assert_eq!(actions, [TargetAction::AwaitFinal(last(1))]);
    let generation = GENERATION;
    assert_eq!(
        target.feed(TargetEvent::FinalStored),
        [
            send(TargetMessage::FinalHeld { generation }),
            TargetAction::Restore { generation },
        ]
    );
    let restored = TargetEvent::Restored { state: state() };
    assert_eq!(target.feed(restored), [target_journal(ready_entry())]);
    assert_eq!(target.journalled(ready_entry()), [send(ready())]);
}

// clause: H-3
#[test]
fn the_workload_is_let_go_when_running_is_on_disk() {
    let mut target = Target::ready();
    assert_eq!(target.hear(GO), [target_journal(running())]);
    assert_eq!(target.hear(GO), []);
    assert_eq!(target.journal_failed(running()), []);
    assert_eq!(target.wait(), [target_journal(running())]);
    assert_eq!(target.journalled(running()), [LET_GO]);
    assert_eq!(target.hear(GO), []);
    assert_eq!(target.feed(TargetEvent::Resumed), [started()]);
    assert_eq!(
        target.feed(TargetEvent::Filled),
        [target_journal(Entry::Done)]
    );
    target.journalled(Entry::Done);
    assert!(target.machine.is_finished());
    assert_eq!(target.status().phase, Phase::Done);
}

// clause: H-4
#[test]
fn go_and_query_are_answered_as_often_as_they_come() {
    let mut target = Target::running();
    assert_eq!(target.hear(GO), [started()]);
    assert_eq!(target.hear(QUERY), [started()]);
    target.feed(TargetEvent::Filled);
    target.journalled(Entry::Done);
    assert_eq!(target.hear(GO), [started()]);
    assert_eq!(target.hear(QUERY), [started()]);
}

// clause: H-5
#[test]
fn a_queried_workload_is_refused_for_good() {
    let mut target = Target::ready();
    assert_eq!(target.hear(QUERY), [target_journal(refused())]);
    assert_eq!(target.hear(GO), []);
    assert_eq!(target.journal_failed(refused()), []);
    assert_eq!(target.feed(TargetEvent::Fenced(Side::Source)), []);
    assert_eq!(target.wait(), [target_journal(refused())]);
    assert_eq!(target.journalled(refused()), [TargetAction::Discard]);
    assert_eq!(target.hear(GO), []);
    let asked = aborted(ErrorCode::Refused, "the source asked for the workload back");
    let actions = target.feed(TargetEvent::Discarded);
    assert_eq!(actions, [say_refused(), target_journal(asked.clone())]);
    assert_eq!(target.hear(GO), [say_refused()]);
    target.journalled(asked);
    assert_eq!(target.hear(GO), [say_refused()]);
    assert_eq!(target.hear(QUERY), [say_refused()]);
    let settles = target_journal(settled());
    assert_eq!(target.hear(abort()), [say_refused(), settles]);
}

#[test]
fn another_generation_is_neither_run_nor_refused() {
    let generation = GENERATION.next();
    let unknown = || [send(TargetMessage::Unknown { generation })];
    for mut target in [Target::ready(), Target::running()] {
        assert_eq!(target.hear(SourceMessage::Go { generation }), unknown());
        assert_eq!(target.hear(SourceMessage::Query { generation }), unknown());
    }
}

#[test]
fn a_target_without_a_journal_knows_nothing() {
    for message in [GO, QUERY, abort()] {
        assert_eq!(Target::new().hear(message), [say_unknown()]);
    }
    for message in [GO, QUERY] {
        assert_eq!(Target::receiving().hear(message), [say_unknown()]);
    }
}

#[test]
fn a_ready_target_refuses_when_its_source_aborts() {
    // Nobody asks again, so that is written too.
    let both = [target_journal(refused()), target_journal(settled())];
    let mut target = Target::ready();
    assert_eq!(target.hear(abort()), both);
    let mut target = Target::readying();
    assert_eq!(target.hear(abort()), []);
    assert_eq!(target.journalled(ready_entry()), both);
}

#[test]
fn an_abort_of_a_generation_before_this_one_changes_nothing() {
    let generation = GENERATION.next();
    let entry = |entry| match entry {
        Entry::Ready(ready) => Entry::Ready(pageferry_proto::migration::record::ReadyEntry {
            generation,
            ..ready
        }),
        entry => entry,
    };
    let mut target = Target::recovered(&[accepted(), entry(ready_entry())]);
    target.actions();
    target.journalled(entry(ready_entry()));
    assert_eq!(target.hear(abort()), []);
    assert_eq!(target.status().phase, Phase::Ready);
}

#[test]
fn a_source_that_aborts_before_ready_is_answered_when_nothing_is_left() {
    let mut target = Target::restoring();
    assert_eq!(target.hear(abort()), [TargetAction::Discard]);
    assert_eq!(target.feed(TargetEvent::Restored { state: state() }), []);
    let ended = Entry::Aborted(failure());
    assert_eq!(
        target.feed(TargetEvent::Discarded),
        [target_journal(ended.clone())]
    );
    assert_eq!(target.journalled(ended), [say_unknown()]);
}

#[test]
fn what_fails_while_it_is_undone_does_not_end_the_discard() {
    let mut target = Target::restoring();
    assert_eq!(target.hear(abort()), [TargetAction::Discard]);
    // The streams that the source has cut.
    assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
    assert_eq!(target.status().phase, Phase::Aborting);
    let ended = Entry::Aborted(failure());
    let actions = target.feed(TargetEvent::DiscardFailed(failure()));
    assert_eq!(actions, [target_journal(ended)]);
    let mut target = Target::ready();
    target.hear(QUERY);
    assert_eq!(target.journalled(refused()), [TargetAction::Discard]);
    assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
    let actions = target.feed(TargetEvent::DiscardFailed(failure()));
    assert_eq!(actions[0], say_refused());
    // What may have run is not lost before nothing of it is left.
    let mut target = stuck();
    target.feed(TargetEvent::Fenced(Side::Target));
    assert_eq!(target.feed(TargetEvent::DiscardFailed(failure())), []);
    assert_eq!(target.status().phase, Phase::Running);
    let fence = TargetEvent::Fenced(Side::Target);
    assert_eq!(target.feed(fence), [TargetAction::Discard]);
}

#[test]
fn a_connection_lost_before_ready_discards() {
    for mut target in [Target::receiving(), Target::restoring()] {
        assert_eq!(target.feed(TargetEvent::PeerLost), [TargetAction::Discard]);
    }
    // It was never said, so nobody can have committed to it.
    let mut target = Target::readying();
    assert_eq!(target.feed(TargetEvent::PeerLost), []);
    assert_eq!(
        target.journalled(ready_entry()),
        [target_journal(refused())]
    );
    let mut target = Target::readying();
    let ended = target.journal_failed(ready_entry());
    failed_with(&ended, ErrorCode::JournalFailed);
}

// clause: H-17
#[test]
fn a_ready_target_is_held_without_a_connection() {
    let mut target = Target::ready();
    assert_eq!(target.feed(TargetEvent::PeerLost), []);
    assert_eq!(target.machine.poll_timeout(), None);
    assert!(target.status().fence_wanted);
    assert_eq!(target.feed(TargetEvent::PeerConnected), []);
    assert_eq!(target.hear(GO), [target_journal(running())]);
}

#[test]
fn a_restarted_target_that_had_said_ready_is_held_without_a_connection() {
    let mut target = Target::recovered(&[accepted(), ready_entry()]);
    target.actions();
    target.feed(TargetEvent::PeerConnected);
    assert_eq!(target.feed(TargetEvent::PeerLost), []);
    // The source may have committed before this restart: only it can say.
    assert_eq!(target.journalled(ready_entry()), []);
    assert_eq!(target.status().phase, Phase::Ready);
    target.feed(TargetEvent::PeerConnected);
    assert_eq!(target.hear(GO), [TargetAction::Lock]);
    assert_eq!(
        target.feed(TargetEvent::Locked),
        [target_journal(running())]
    );
}

// clause: H-9
#[test]
fn a_restarted_target_that_holds_nothing_any_more_refuses() {
    let mut target = Target::recovered(&[accepted(), ready_entry()]);
    target.actions();
    assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
    assert_eq!(target.hear(GO), []);
    assert_eq!(
        target.journalled(ready_entry()),
        [target_journal(refused())]
    );
}

// clause: H-13
#[test]
fn a_fence_of_the_source_lets_a_ready_workload_run() {
    let mut target = Target::ready();
    let fence = TargetEvent::Fenced(Side::Source);
    assert_eq!(target.feed(fence.clone()), [target_journal(running())]);
    let mut target = Target::recovered(&[accepted(), ready_entry()]);
    target.actions();
    assert_eq!(target.feed(fence.clone()), []);
    assert_eq!(target.journalled(ready_entry()), [TargetAction::Lock]);
    assert_eq!(
        target.feed(TargetEvent::Locked),
        [target_journal(running())]
    );
    // A source that aborted has run on before it died.
    let mut target = Target::readying();
    target.hear(abort());
    target.feed(fence);
    assert_eq!(
        target.journalled(ready_entry()),
        [target_journal(refused()), target_journal(settled())]
    );
}

#[test]
fn a_held_workload_that_dies_is_refused() {
    let mut target = Target::ready();
    let actions = target.feed(TargetEvent::Failure(failure()));
    assert_eq!(actions, [target_journal(refused())]);
    assert_eq!(target.status().failure, Some(failure()));
}

#[test]
fn a_failure_while_running_is_being_written_refuses_nothing() {
    let mut target = Target::ready();
    assert_eq!(target.hear(GO), [target_journal(running())]);
    // Whether the record is on disk is not known: a refusal could contradict it.
    assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
    assert_eq!(target.status().failure, Some(failure()));
    assert_eq!(target.journalled(running()), [LET_GO]);
}

/// One that was let go as often as it may be, in vain.
fn stuck() -> Target {
    let mut target = Target::ready();
    target.hear(GO);
    target.journalled(running());
    for _ in 1..LET_GO_TRIES_MAX {
        assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
        assert_eq!(target.wait(), [LET_GO]);
    }
    assert_eq!(target.feed(TargetEvent::Failure(failure())), []);
    target
}

#[test]
fn a_workload_that_must_run_is_let_go_a_bounded_number_of_times() {
    let mut target = stuck();
    assert_eq!(target.machine.poll_timeout(), None);
    assert_eq!(target.hear(QUERY), []);
    assert_eq!(target.hear(abort()), [target_journal(settled())]);
    assert_eq!(target.status().phase, Phase::Running);
}

// clause: H-21
#[test]
fn an_operator_ends_what_could_not_be_let_go() {
    let fence = TargetEvent::Fenced(Side::Target);
    // Nobody kills what is being let go, or runs.
    let mut target = Target::ready();
    target.hear(GO);
    assert_eq!(target.feed(fence.clone()), []);
    target.journalled(running());
    assert_eq!(target.feed(fence.clone()), []);
    target.feed(TargetEvent::Resumed);
    assert_eq!(target.feed(fence.clone()), []);
    let mut target = stuck();
    assert_eq!(target.feed(TargetEvent::AbortRequested), []);
    assert_eq!(target.feed(fence), [TargetAction::Discard]);
    assert_eq!(target.hear(GO), []);
    let ended = aborted(ErrorCode::Fenced, "the operator declared the target dead");
    let actions = target.feed(TargetEvent::Discarded);
    assert_eq!(actions, [target_journal(ended.clone())]);
    assert_eq!(target.journalled(ended), []);
    assert!(target.machine.is_finished());
    assert_eq!(target.hear(GO), [say_unknown()]);
}

// clause: H-20
#[test]
fn what_was_to_run_and_is_lost_is_neither_started_nor_refused() {
    let mut target = Target::recovered(&[accepted(), ready_entry(), running()]);
    target.actions();
    // Nothing is said of it before the record is as durable as what follows from it.
    assert_eq!(target.feed(TargetEvent::Lost(failure())), []);
    assert_eq!(target.journalled(running()), [LET_GO]);
    let ended = Entry::Aborted(failure());
    let actions = target.feed(TargetEvent::Lost(failure()));
    assert_eq!(actions, [target_journal(ended.clone())]);
    assert_eq!(target.journalled(ended.clone()), []);
    assert!(target.machine.is_finished());
    assert_eq!(target.status().phase, Phase::Aborted);
    for message in [GO, QUERY] {
        assert_eq!(target.hear(message), [say_unknown()]);
    }
    let settles = target_journal(settled());
    assert_eq!(target.hear(abort()), [say_unknown(), settles]);
    // And so it is after another restart.
    let mut target = Target::recovered(&[accepted(), ready_entry(), running(), ended]);
    assert_eq!(target.actions(), []);
    assert!(target.machine.is_finished());
    assert_eq!(target.hear(GO), [say_unknown()]);
}

#[test]
fn what_has_run_and_is_lost_has_run() {
    let mut target = Target::running();
    assert_eq!(target.feed(TargetEvent::Lost(failure())), []);
    assert_eq!(target.hear(QUERY), [started()]);
}

// clause: H-18
#[test]
fn what_was_to_run_and_provably_never_did_is_refused() {
    let mut target = Target::ready();
    target.hear(GO);
    assert_eq!(target.journalled(running()), [LET_GO]);
    let actions = target.feed(TargetEvent::NeverRan(failure()));
    assert_eq!(actions, [target_journal(refused())]);
    assert_eq!(target.journalled(refused()), [TargetAction::Discard]);
    // Proven twice, but not yet discarded.
    assert_eq!(target.feed(TargetEvent::NeverRan(failure())), []);
    let actions = target.feed(TargetEvent::Discarded);
    assert_eq!(actions[0], say_refused_for(failure()));
    assert_eq!(target.hear(GO), [say_refused_for(failure())]);
}

#[test]
fn proof_that_comes_before_the_record_is_asked_for_again() {
    let mut target = Target::ready();
    target.hear(GO);
    assert_eq!(target.feed(TargetEvent::NeverRan(failure())), []);
    assert_eq!(target.journalled(running()), [LET_GO]);
}

#[test]
fn what_runs_is_never_refused() {
    let mut target = Target::running();
    assert_eq!(target.feed(TargetEvent::NeverRan(failure())), []);
    assert_eq!(target.hear(QUERY), [started()]);
}

#[test]
fn an_operator_frees_a_ready_target() {
    let mut target = Target::ready();
    assert_eq!(
        target.feed(TargetEvent::AbortRequested),
        [target_journal(refused())]
    );
    let mut target = Target::receiving();
    let actions = target.feed(TargetEvent::AbortRequested);
    failed_with(&actions, ErrorCode::Aborted);
    let mut target = Target::running();
    assert_eq!(target.feed(TargetEvent::AbortRequested), []);
}

// clause: J-5
#[test]
fn a_restarted_target_writes_its_decision_again_before_it_acts() {
    let check = |entries: &[Entry], decision: Entry, then: &[TargetAction]| {
        let mut target = Target::recovered(entries);
        assert_eq!(target.actions(), [target_journal(decision.clone())]);
        assert_eq!(target.hear(GO), []);
        assert_eq!(target.journalled(decision), then);
    };
    let (accepted, ready) = (accepted(), ready_entry());
    check(&[accepted.clone(), ready.clone()], ready.clone(), &[]);
    check(
        &[accepted.clone(), ready.clone(), running()],
        running(),
        &[LET_GO],
    );
    check(
        &[accepted.clone(), ready.clone(), refused()],
        refused(),
        &[TargetAction::Discard],
    );
    check(
        &[accepted, ready, running(), refused()],
        refused(),
        &[TargetAction::Discard],
    );
}

// clause: J-6
#[test]
fn a_restarted_target_that_is_done_still_answers() {
    let check = |entries: &[Entry], answer: TargetAction| {
        let mut target = Target::recovered(entries);
        assert_eq!(target.actions(), []);
        assert!(target.machine.is_finished());
        for message in [GO, QUERY] {
            assert_eq!(target.hear(message), std::slice::from_ref(&answer));
        }
        assert_eq!(target.hear(abort())[0], answer);
    };
    let (accepted, ready) = (accepted(), ready_entry());
    let ended = Entry::Aborted(failure());
    check(
        &[accepted.clone(), ready.clone(), running(), Entry::Done],
        started(),
    );
    check(
        &[accepted.clone(), ready, refused(), ended.clone()],
        say_refused_for(failure()),
    );
    check(&[accepted, ended], say_unknown());
}

#[test]
fn a_restarted_target_that_was_not_ready_discards() {
    let mut target = Target::recovered(&[accepted()]);
    assert_eq!(target.actions(), [TargetAction::Discard]);
    let text = "the daemon was restarted before the target was ready";
    let restarted = Entry::Aborted(Failure::new(ErrorCode::Restarted, text));
    assert_eq!(
        target.feed(TargetEvent::Discarded),
        [target_journal(restarted)]
    );
}
