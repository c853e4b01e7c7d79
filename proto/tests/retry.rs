//! The source's machine when it gives up a freeze.

#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use pageferry_proto::id::Round;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::{RETRIES_MAX, SourceAction, SourceEvent};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::timer::Time;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{Final, SourceMessage, TargetMessage};
use rig::*;

// clause: R-7
#[test]
fn a_freeze_that_is_given_up_thaws_and_waits_for_what_is_on_its_way() {
    let mut source = Source::finishing();
    let before = source.status();
    let round = Round::FIRST.next();
    let actions = source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    assert_eq!(
        actions,
        [
            SourceAction::Thaw { untrack: false },
            SourceAction::Send(SourceMessage::RoundEnd(round_end(2, 2, 7))),
        ]
    );
    let status = source.status();
    assert_eq!(status.phase, Phase::Copying);
    assert_eq!(status.sent_bytes, before.sent_bytes + 7 * 4096);
    assert_eq!(status.wire_bytes, before.wire_bytes + 9000);
    assert_eq!(source.feed(SourceEvent::Thawed { untrack: false }), []);
    let next = SourceAction::SendRound {
        folders: true,
        pages: true,
        round: round.next(),
    };
    assert_eq!(source.hear(TargetMessage::RoundHeld { round }), [next]);
}

// clause: R-7
#[test]
fn the_workload_runs_for_a_while_between_a_thaw_and_the_next_round() {
    let pause = Duration::from_millis(70);
    let round = Round::FIRST.next();
    let next = SourceAction::SendRound {
        folders: true,
        pages: true,
        round: round.next(),
    };
    let mut source = Source::finishing();
    source.feed(SourceEvent::Retry(retry(pause)));
    assert_eq!(source.hear(TargetMessage::RoundHeld { round }), []);
    // The pause begins with the thaw, not with the report.
    assert_eq!(source.wait(2 * pause), []);
    assert_eq!(source.feed(SourceEvent::Thawed { untrack: false }), []);
    assert_eq!(source.wait(pause / 2), []);
    assert_eq!(source.wait(pause / 2), std::slice::from_ref(&next));
    let mut source = Source::finishing();
    source.feed(SourceEvent::Retry(retry(pause)));
    source.feed(SourceEvent::Thawed { untrack: false });
    assert_eq!(source.wait(2 * pause), []);
    assert_eq!(source.hear(TargetMessage::RoundHeld { round }), [next]);
}

// clause: R-7
#[test]
fn a_freeze_is_not_given_up_any_more_once_its_final_message_is_sent() {
    let mut source = Source::finishing();
    source.feed(SourceEvent::Finished(final_report()));
    let actions = source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    assert_aborts(&actions, &source, ErrorCode::Unexpected);
}

/// Gives up the freeze, and comes to the next one.
fn give_up(source: &mut Source, round: &mut Round) {
    source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    source.feed(SourceEvent::Thawed { untrack: false });
    source.hear(TargetMessage::RoundHeld { round: *round });
    *round = round.next();
    source.feed(SourceEvent::RoundSent(round_report(
        round.number(),
        1000,
        0,
    )));
    source.hear(TargetMessage::RoundHeld { round: *round });
    *round = round.next();
    assert_eq!(source.status().phase, Phase::Freezing);
}

// clause: R-7
#[test]
fn a_freeze_is_given_up_a_bounded_number_of_times_and_the_last_reason_is_told() {
    let mut source = Source::freezing();
    let mut round = Round::FIRST.next();
    for _ in 0..RETRIES_MAX {
        give_up(&mut source, &mut round);
        source.feed(SourceEvent::Frozen);
    }
    let actions = source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    assert_aborts(&actions, &source, ErrorCode::PassingState);
    let failure = source.status().failure.unwrap();
    assert_eq!(failure.text(), "a socket is being opened");
}

// clause: R-7
#[test]
fn freezes_are_given_up_only_within_the_time_of_the_migration() {
    let mut source = Source::freezing();
    give_up(&mut source, &mut Round::FIRST.next());
    source.feed(SourceEvent::Frozen);
    source.now = Time(Policy::DEFAULT.timeout);
    source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    let actions = source.wait(Duration::ZERO);
    assert_aborts(&actions, &source, ErrorCode::Timeout);
    let failure = source.status().failure.unwrap();
    let told = "2 freezes were given up, the last because: passing-state: a socket is being opened";
    assert!(failure.text().ends_with(told), "{failure}");
}

// clause: F-6
#[test]
fn each_attempt_at_the_final_round_has_a_generation_of_its_own() {
    let mut source = Source::freezing();
    let mut round = Round::FIRST.next();
    give_up(&mut source, &mut round);
    let generation = GENERATION.next();
    let actions = source.feed(SourceEvent::Frozen);
    let finish = SourceAction::Finish {
        generation,
        round,
        absent: false,
    };
    assert_eq!(actions, [finish]);
    let actions = source.feed(SourceEvent::Finished(final_report()));
    let last = Final {
        generation,
        ..last(round.number())
    };
    let send = SourceAction::Send(SourceMessage::Final(last));
    assert_eq!(actions, [send, SourceAction::CompareSmaps]);
    // A target that is ready with an older attempt is ready for something else.
    let actions = source.hear(ready());
    assert_aborts(&actions, &source, ErrorCode::Unexpected);
}

#[test]
fn the_thaw_of_a_freeze_that_was_given_up_is_not_taken_for_that_of_an_abort() {
    let mut source = Source::finishing();
    source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    let actions = source.feed(SourceEvent::AbortRequested);
    assert!(actions.contains(&THAW), "{actions:?}");
    assert_eq!(source.feed(SourceEvent::Thawed { untrack: false }), []);
    assert_eq!(source.status().phase, Phase::Aborting);
    let actions = source.feed(SourceEvent::Thawed { untrack: true });
    assert!(
        matches!(&actions[..], [SourceAction::Journal(record)]
            if matches!(record.entry, Entry::Aborted(_))),
        "{actions:?}"
    );
}
