//! The bound of a freeze, and what a source says when it is reached.

#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use pageferry_proto::id::Round;
use pageferry_proto::migration::policy::{FROZEN_MAX_LEAST, Policy};
use pageferry_proto::migration::source::{SourceAction, SourceEvent, Wait, Waiting};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::TargetMessage;
use rig::*;

/// Aborted for having stood still for too long, and why, of the text's last words.
fn assert_frozen_too_long(actions: &[SourceAction], source: &Source, why: &str) {
    assert_aborts(actions, source, ErrorCode::FrozenTooLong);
    let failure = source.status().failure.unwrap();
    let expected = format!("the freeze was given up after 5.0 s{why}");
    assert_eq!(failure.text(), expected);
}

// clause: F-7
#[test]
fn a_freeze_ends_within_its_bound_and_says_what_it_waited_for() {
    let waiting = |waits: &[(Wait, u64)]| {
        let waiting = waits.iter().map(|&(what, millis)| Waiting {
            what,
            duration: Duration::from_millis(millis),
        });
        SourceEvent::Waiting(waiting.collect())
    };
    let almost = FROZEN_MAX_LEAST - Duration::from_secs(1);
    let rest = Duration::from_secs(1);
    let mut source = Source::freezing();
    assert_eq!(source.status().frozen_max, Some(FROZEN_MAX_LEAST));
    assert_eq!(source.wait(almost), []);
    source.feed(waiting(&[(Wait::Cgroup, 4900)]));
    let actions = source.wait(rest);
    let why = ", waiting for its cgroup to freeze (4.9 s)";
    assert_frozen_too_long(&actions, &source, why);

    // The bound is that of the whole freeze, not of its steps.
    let mut source = Source::freezing();
    assert_eq!(source.wait(almost), []);
    assert_eq!(source.feed(SourceEvent::Frozen).len(), 1);
    source.feed(waiting(&[(Wait::Pages, 400), (Wait::Dump, 900)]));
    let actions = source.wait(rest);
    let why = ", waiting for CRIU's dump (0.9 s) and the target to take the last pages (0.4 s)";
    assert_frozen_too_long(&actions, &source, why);

    let mut source = Source::finishing();
    source.feed(SourceEvent::Finished(final_report()));
    source.feed(SourceEvent::SmapsEqual);
    assert_eq!(source.wait(almost), []);
    source.feed(waiting(&[]));
    let actions = source.wait(rest);
    let why = ", waiting for the target to acknowledge the final round (5.0 s)";
    assert_frozen_too_long(&actions, &source, why);

    let mut source = Source::finishing();
    source.feed(SourceEvent::Finished(final_report()));
    assert_eq!(source.wait(almost), []);
    let generation = GENERATION;
    source.hear(TargetMessage::FinalHeld { generation });
    source.feed(waiting(&[(Wait::Smaps, 5000)]));
    let actions = source.wait(rest);
    let why =
        ", waiting for the comparison of the mappings (5.0 s) and the target's restore (1.0 s)";
    assert_frozen_too_long(&actions, &source, why);
}

// clause: F-7
#[test]
fn a_freeze_that_is_tried_again_has_its_whole_bound_again() {
    let mut source = Source::finishing();
    assert_eq!(source.wait(FROZEN_MAX_LEAST * 9 / 10), []);
    source.feed(SourceEvent::Retry(retry(Duration::ZERO)));
    source.feed(SourceEvent::Thawed { untrack: false });
    let round = Round::FIRST.next();
    source.hear(TargetMessage::RoundHeld { round });
    assert_eq!(source.wait(FROZEN_MAX_LEAST * 2), []);
    source.feed(SourceEvent::RoundSent(round_report(3, 1000, 0)));
    let round = round.next();
    source.hear(TargetMessage::RoundHeld { round });
    assert_eq!(source.status().phase, Phase::Freezing);
    assert_eq!(source.wait(FROZEN_MAX_LEAST * 9 / 10), []);
    let actions = source.wait(FROZEN_MAX_LEAST / 10);
    assert_frozen_too_long(&actions, &source, "");
}

// clause: F-7
#[test]
fn a_freeze_that_is_predicted_to_take_too_long_is_not_begun() {
    let policy = Policy {
        frozen_max: Some(Duration::from_millis(39)),
        ..Policy::DEFAULT
    };
    let mut source = Source::with(policy);
    source.feed(SourceEvent::RoundSent(round_report(1, 1000, 0)));
    let round = Round::FIRST;
    let actions = source.hear(TargetMessage::RoundHeld { round });
    assert_aborts(&actions, &source, ErrorCode::FrozenTooLong);
    let text = "a freeze is predicted to take 40.0ms, and 39.0ms are allowed";
    assert_eq!(source.status().failure.unwrap().text(), text);
}
