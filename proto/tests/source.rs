//! The source's machine, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use pageferry_proto::id::{Generation, Incarnation, Round};
use pageferry_proto::migration::handoff::{REDIAL, RESEND, RETRY, Side, TELL_MAX};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::{SILENCE_MAX, SourceAction, SourceEvent};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use rig::*;

const GO: SourceAction = SourceAction::Send(SourceMessage::Go {
    generation: GENERATION,
});
const QUERY: SourceAction = SourceAction::Send(SourceMessage::Query {
    generation: GENERATION,
});
fn fenced() -> Entry {
    Entry::Fenced {
        generation: GENERATION,
    }
}

fn refusal() -> Entry {
    aborted(ErrorCode::Refused, "the target refused to run the workload")
}

// clause: J-2
#[test]
fn nothing_is_dialled_before_the_offer_is_on_disk() {
    let mut source = Source::new();
    assert_eq!(source.actions(), [journal(offered())]);
    assert_eq!(source.journalled(offered()), [SourceAction::Connect]);
}

// clause: R-2
#[test]
fn a_round_is_counted_when_it_is_sent() {
    let mut source = Source::copying();
    let end = SourceMessage::RoundEnd(round_end(1, 3, 1000));
    let report = round_report(1, 1000, 900_000);
    assert_eq!(
        source.feed(SourceEvent::RoundSent(report)),
        [SourceAction::Send(end)]
    );
}

// clause: R-5
#[test]
fn the_next_round_starts_when_this_one_is_held() {
    let mut source = Source::copying();
    let report = round_report(1, 100_000, 80_000);
    source.feed(SourceEvent::RoundSent(report));
    let round = Round::FIRST;
    let next = SourceAction::SendRound {
        folders: true,
        pages: true,
        round: round.next(),
    };
    assert_eq!(source.hear(TargetMessage::RoundHeld { round }), [next]);
}

// clause: F-1
#[test]
fn the_final_message_counts_what_was_sent() {
    let mut source = Source::finishing();
    let actions = source.feed(SourceEvent::Finished(final_report()));
    let last = SourceAction::Send(SourceMessage::Final(last(2)));
    assert_eq!(actions, [last, SourceAction::CompareSmaps]);
}

// clause: F-5
#[test]
fn a_target_that_lost_its_memory_is_not_ready() {
    let mut source = Source::finishing();
    source.feed(SourceEvent::Finished(final_report()));
    let incarnation = Incarnation(43);
    let actions = source.hear(TargetMessage::Ready {
        generation: GENERATION,
        incarnation,
    });
    assert_aborts(&actions, &source, ErrorCode::Unexpected);
}

// clause: H-1
#[test]
fn the_commit_needs_a_ready_target_and_equal_smaps_and_go_needs_the_commit() {
    let mut source = Source::ready();
    assert_eq!(source.feed(SourceEvent::SmapsEqual), [journal(commit())]);
    assert_eq!(source.status().phase, Phase::Prepared);
    assert_eq!(source.journalled(commit()), [GO]);
    let mut source = Source::finishing();
    source.feed(SourceEvent::Finished(final_report()));
    assert_eq!(source.feed(SourceEvent::SmapsEqual), []);
    assert_eq!(source.hear(ready()), [journal(commit())]);
}

// clause: H-2
#[test]
fn go_is_repeated_until_it_is_answered() {
    let mut source = Source::committed();
    assert_eq!(source.wait(2 * RESEND), [GO, GO]);
    source.hear(TargetMessage::Started {
        generation: GENERATION,
        root_pid: None,
    });
    assert_eq!(source.wait(2 * RESEND), []);
}

// clause: C-5
#[test]
fn a_committed_source_dials_until_the_target_is_back() {
    let mut source = Source::committed();
    assert_eq!(source.feed(SourceEvent::PeerLost), []);
    assert_eq!(source.wait(REDIAL), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerLost), []);
    assert_eq!(source.wait(REDIAL), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [GO]);
    assert!(!source.status().fence_wanted);
    source.feed(SourceEvent::PeerLost);
    source.wait(SILENCE_MAX);
    assert!(source.status().fence_wanted);
    assert_eq!(source.status().phase, Phase::Committed);
}

// clause: H-7
#[test]
fn the_frozen_copy_is_killed_when_the_target_runs_the_workload() {
    let mut source = Source::committed();
    let started = Entry::Started {
        generation: GENERATION,
    };
    let message = TargetMessage::Started {
        generation: GENERATION,
        root_pid: None,
    };
    assert_eq!(source.hear(message), [journal(started.clone())]);
    assert_eq!(
        source.journalled(started),
        [SourceAction::Release, say_settled()]
    );
    source.hear(TargetMessage::Forgotten {
        generation: GENERATION,
    });
    assert_eq!(source.feed(SourceEvent::Released), [journal(Entry::Done)]);
    source.journalled(Entry::Done);
    assert!(source.machine.is_finished());
    assert!(source.status().parts.downtime().is_some());
}

// clause: C-4
#[test]
fn a_connection_lost_before_the_commit_aborts() {
    for mut source in [Source::copying(), Source::freezing(), Source::finishing()] {
        assert_eq!(source.feed(SourceEvent::PeerLost), [THAW]);
        assert_eq!(source.status().failure.unwrap().code(), ErrorCode::PeerLost);
    }
    let mut source = Source::prepared();
    assert_eq!(source.feed(SourceEvent::PeerLost), []);
    assert_eq!(source.status().phase, Phase::Prepared);
}

#[test]
fn a_connection_that_is_refused_says_why() {
    let busy = || Failure::new(ErrorCode::TargetBusy, "four migrations come to it");
    let refused = || SourceEvent::PeerRefused(busy());
    let mut source = Source::new();
    source.actions();
    source.journalled(offered());
    assert_eq!(source.feed(refused()), [journal(Entry::Aborted(busy()))]);
    let mut source = Source::copying();
    assert_eq!(source.feed(refused()), [THAW]);
    assert_eq!(source.status().failure, Some(busy()));
    // After the commit it is asked again all the same.
    let mut source = Source::committed();
    assert_eq!(source.feed(refused()), []);
    assert_eq!(source.status().failure, Some(busy()));
    assert_eq!(source.wait(REDIAL), [SourceAction::Connect]);
}

// clause: F-8
#[test]
fn a_sync_that_fails_in_the_freeze_thaws_and_says_no_final() {
    let mut source = Source::finishing();
    let failure = Failure::new(ErrorCode::SyncFailed, "what was written to /data");
    let actions = source.feed(SourceEvent::Failure(failure));
    assert_aborts(&actions, &source, ErrorCode::SyncFailed);
    assert_eq!(source.feed(SourceEvent::Finished(final_report())), []);
}

// clause: N-5
#[test]
fn what_has_no_place_aborts_before_the_commit_and_is_noted_after_it() {
    let mut source = Source::copying();
    let actions = source.hear(ready());
    assert_aborts(&actions, &source, ErrorCode::Unexpected);
    let mut source = Source::committed();
    assert_eq!(source.hear(ready()), []);
    let status = source.status();
    assert_eq!(status.phase, Phase::Committed);
    assert_eq!(status.failure.unwrap().code(), ErrorCode::Unexpected);
}

// clause: N-3
#[test]
fn nothing_is_kept_for_a_later_connection() {
    let mut source = Source::committed();
    source.feed(SourceEvent::PeerLost);
    assert_eq!(
        source.feed(SourceEvent::AbortRequested),
        [SourceAction::Connect]
    );
    assert_eq!(source.feed(SourceEvent::PeerConnected), [QUERY]);
}

#[test]
fn copying_that_never_ends_is_ended() {
    let mut source = Source::copying();
    let actions = source.wait(Policy::TIMEOUT);
    assert_aborts(&actions, &source, ErrorCode::Timeout);
}

#[test]
fn a_commit_is_never_timed_out() {
    let mut source = Source::prepared();
    assert_eq!(source.wait(Duration::from_secs(1_000_000)), []);
    assert_eq!(source.status().phase, Phase::Prepared);
}

#[test]
fn a_target_that_gives_up_before_the_commit_is_not_told_again() {
    let mut source = Source::finishing();
    assert_eq!(source.hear(TargetMessage::Failed(failure())), [THAW]);
    assert_eq!(
        source.feed(SourceEvent::Thawed { untrack: true }),
        [journal(Entry::Aborted(failure()))]
    );
    assert_eq!(
        source.journalled(Entry::Aborted(failure())),
        [journal(Entry::Done)]
    );
}

// clause: H-16
#[test]
fn an_aborted_target_is_told_until_it_answers() {
    let mut source = Source::finishing();
    source.feed(SourceEvent::PeerLost);
    source.feed(SourceEvent::Thawed { untrack: true });
    let gone = aborted(ErrorCode::PeerLost, "the connection to the target is gone");
    assert_eq!(source.journalled(gone), [SourceAction::Connect]);
    assert_eq!(source.status().phase, Phase::Aborted);
    source.feed(SourceEvent::PeerLost);
    assert_eq!(source.wait(REDIAL), [SourceAction::Connect]);
    let actions = source.feed(SourceEvent::PeerConnected);
    assert!(is_abort(&actions[0]) && actions.len() == 1, "{actions:?}");
    let answer = TargetMessage::Refused {
        generation: GENERATION,
        failure: None,
    };
    assert_eq!(source.hear(answer), [journal(Entry::Done)]);
}

#[test]
fn a_target_that_cannot_be_told_is_given_up() {
    let mut source = Source::copying();
    source.feed(SourceEvent::AbortRequested);
    source.feed(SourceEvent::Thawed { untrack: true });
    source.journalled(aborted(
        ErrorCode::Aborted,
        "the operator ended the migration",
    ));
    let actions = source.wait(TELL_MAX);
    assert!(actions[..actions.len() - 1].iter().all(is_abort));
    assert_eq!(actions.last(), Some(&journal(Entry::Done)));
}

// clause: H-10
#[test]
fn a_commit_in_doubt_is_asked_back_and_never_thawed_unasked() {
    let mut source = Source::prepared();
    assert_eq!(source.journal_failed(commit()), [QUERY]);
    assert_eq!(source.status().phase, Phase::Committed);
    assert_eq!(source.feed(SourceEvent::Failure(failure())), []);
    assert_eq!(source.hear(TargetMessage::Failed(failure())), []);
    let refused = TargetMessage::Refused {
        generation: GENERATION,
        failure: None,
    };
    assert_eq!(source.hear(refused), [journal(refusal())]);
}

// clause: H-11
#[test]
fn an_abort_after_the_commit_asks_the_target() {
    let mut source = Source::committed();
    assert_eq!(source.feed(SourceEvent::AbortRequested), [QUERY]);
    assert_eq!(source.wait(RESEND), [QUERY]);
    let mut source = Source::prepared();
    assert_eq!(source.feed(SourceEvent::AbortRequested), []);
    assert_eq!(source.journalled(commit()), [QUERY]);
}

// clause: H-14
#[test]
fn a_refused_workload_is_thawed_when_that_is_on_disk() {
    let mut source = Source::committed();
    let refused = TargetMessage::Refused {
        generation: GENERATION,
        failure: None,
    };
    assert_eq!(source.hear(refused), [journal(refusal())]);
    assert_eq!(source.status().phase, Phase::Reclaiming);
    assert_eq!(source.journal_failed(refusal()), []);
    assert_eq!(source.wait(RETRY), [journal(refusal())]);
    assert_eq!(source.journalled(refusal()), [THAW]);
    assert_eq!(source.feed(SourceEvent::Failure(failure())), []);
    assert_eq!(source.wait(RETRY), [THAW]);
    assert_eq!(
        source.feed(SourceEvent::Thawed { untrack: true }),
        [say_settled()]
    );
    assert_eq!(source.status().phase, Phase::Aborted);
}

// clause: H-15
#[test]
fn a_refusal_that_comes_before_the_commit_is_on_disk_is_kept() {
    let mut source = Source::prepared();
    assert_eq!(
        source.hear(TargetMessage::Refused {
            generation: GENERATION,
            failure: None,
        }),
        []
    );
    assert_eq!(source.journalled(commit()), [journal(refusal())]);
}

// clause: H-6
#[test]
fn a_target_that_knows_nothing_has_not_refused() {
    let mut source = Source::committed();
    assert_eq!(
        source.hear(TargetMessage::Unknown {
            generation: GENERATION
        }),
        []
    );
    assert_eq!(source.status().phase, Phase::Committed);
    assert!(source.status().fence_wanted);
}

// clause: H-12
#[test]
fn a_fence_of_the_target_thaws_when_it_is_on_disk() {
    let mut source = Source::committed();
    let fence = SourceEvent::Fenced(Side::Target);
    assert_eq!(source.feed(fence.clone()), [journal(fenced())]);
    assert_eq!(source.journal_failed(fenced()), []);
    assert_eq!(source.wait(RETRY), [journal(fenced())]);
    assert_eq!(source.journalled(fenced()), [THAW]);
    let dead = aborted(ErrorCode::Fenced, "the operator declared the target dead");
    assert_eq!(
        source.feed(SourceEvent::Thawed { untrack: true }),
        [journal(dead)]
    );
    let mut source = Source::prepared();
    assert_eq!(source.feed(fence), []);
    assert_eq!(source.journalled(commit()), [journal(fenced())]);
}

#[test]
fn a_fence_of_the_source_means_nothing_to_the_source() {
    let mut source = Source::committed();
    assert_eq!(source.feed(SourceEvent::Fenced(Side::Source)), []);
    assert_eq!(source.status().phase, Phase::Committed);
}

#[test]
fn only_what_was_committed_can_be_started() {
    let mut source = Source::committed();
    let generation = GENERATION.next();
    assert_eq!(
        source.hear(TargetMessage::Started {
            generation,
            root_pid: None
        }),
        []
    );
    assert_eq!(source.status().phase, Phase::Committed);
    let older = TargetMessage::Refused {
        generation: GENERATION,
        failure: None,
    };
    let commit = Entry::Commit {
        generation,
        drains: false,
    };
    let mut source = Source::recovered(&[offered(), commit.clone()]);
    source.journalled(commit);
    assert_eq!(source.hear(older), []);
    assert_eq!(source.status().phase, Phase::Committed);
}

#[test]
fn what_an_undone_action_reports_is_ignored() {
    let mut source = Source::copying();
    source.feed(SourceEvent::AbortRequested);
    let late = [
        SourceEvent::RoundSent(round_report(1, 10, 10)),
        SourceEvent::Frozen,
        SourceEvent::Finished(final_report()),
        SourceEvent::SmapsEqual,
        SourceEvent::Message(TargetMessage::RoundHeld {
            round: Round::FIRST,
        }),
        SourceEvent::Message(ready()),
    ];
    for event in late {
        assert_eq!(source.feed(event), []);
        assert_eq!(source.status().failure.unwrap().code(), ErrorCode::Aborted);
    }
}

// clause: J-4
#[test]
fn a_restarted_source_without_a_commit_thaws_and_ends_every_generation() {
    let mut source = Source::recovered(&[offered()]);
    assert_eq!(source.actions(), [THAW]);
    let restarted = aborted(
        ErrorCode::Restarted,
        "the daemon was restarted before the hand-off was decided",
    );
    assert_eq!(
        source.feed(SourceEvent::Thawed { untrack: true }),
        [journal(restarted.clone())]
    );
    assert_eq!(source.journalled(restarted), [SourceAction::Connect]);
    let actions = source.feed(SourceEvent::PeerConnected);
    let [SourceAction::Send(SourceMessage::Abort { generation, .. })] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(*generation, Generation::LAST);
}

#[test]
fn a_restarted_source_with_a_commit_writes_it_again_before_go() {
    let mut source = Source::recovered(&[offered(), commit()]);
    assert_eq!(source.actions(), [journal(commit())]);
    assert_eq!(source.journalled(commit()), [SourceAction::Unlock]);
    assert_eq!(source.feed(SourceEvent::Unlocked), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [GO]);
    let mut source = Source::recovered(&[offered(), commit()]);
    source.actions();
    assert_eq!(source.journal_failed(commit()), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [QUERY]);
}

#[test]
fn a_restarted_source_goes_on_where_it_was() {
    let check = |entries: &[Entry], actions: &[SourceAction], phase| {
        let mut source = Source::recovered(entries);
        assert_eq!(source.actions(), actions);
        assert_eq!(source.status().phase, phase);
    };
    let started = Entry::Started {
        generation: GENERATION,
    };
    let moved = [offered(), commit(), started.clone()];
    check(&moved, &[journal(started)], Phase::Committed);
    check(
        &[offered(), commit(), fenced()],
        &[journal(fenced())],
        Phase::Reclaiming,
    );
    check(
        &[offered(), commit(), refusal()],
        &[journal(refusal())],
        Phase::Reclaiming,
    );
    let failed = Entry::Aborted(failure());
    check(&[offered(), failed.clone()], &[THAW], Phase::Aborting);
    check(&[offered(), failed, Entry::Done], &[], Phase::Aborted);
    check(
        &[offered(), commit(), refusal(), Entry::Done],
        &[],
        Phase::Aborted,
    );
    check(&[offered(), commit(), Entry::Done], &[], Phase::Done);
}

#[test]
fn an_offer_that_cannot_be_written_is_not_made() {
    let mut source = Source::new();
    source.actions();
    let failed = aborted(
        ErrorCode::JournalFailed,
        "record offered could not be written",
    );
    assert_eq!(source.journal_failed(offered()), [journal(failed.clone())]);
    assert_eq!(source.journal_failed(failed), [journal(Entry::Done)]);
    source.journal_failed(Entry::Done);
    assert!(source.machine.is_finished());
    let expected = Failure::new(
        ErrorCode::JournalFailed,
        "record offered could not be written",
    );
    assert_eq!(source.status().failure, Some(expected));
}
