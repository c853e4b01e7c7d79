//! A migration that is held before its freeze.

#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use pageferry_proto::id::Round;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::source::{HOLD_PACE, SourceAction, SourceEvent, SourceOffer};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::TargetMessage;
use rig::*;

fn held() -> Source {
    Source::offering(SourceOffer {
        hold: true,
        policy: Policy {
            rounds_max: 2,
            ..Policy::DEFAULT
        },
        ..source_offer()
    })
}

/// The round was sent, and is at the target.
fn round(source: &mut Source, number: u32, dirtied: u64) -> Vec<SourceAction> {
    source.feed(SourceEvent::RoundSent(round_report(number, 1000, dirtied)));
    let round = Round::new(number).unwrap();
    source.hear(TargetMessage::RoundHeld { round })
}

fn sends(number: u32, folders: bool) -> SourceAction {
    let round = Round::new(number).unwrap();
    SourceAction::SendRound {
        round,
        folders,
        pages: true,
    }
}

fn freezes(number: u32) -> SourceAction {
    let round = Round::new(number).unwrap();
    SourceAction::Freeze { round }
}

// clause: R-9
#[test]
fn a_migration_that_is_held_copies_on_slowly_until_it_is_told_to_proceed() {
    let mut source = held();
    assert!(!source.status().holding);
    assert_eq!(round(&mut source, 1, 0), []);
    assert!(source.status().holding);
    assert_eq!(source.status().phase, Phase::Copying);
    assert_eq!(source.wait(HOLD_PACE * 9 / 10), []);
    assert_eq!(source.wait(HOLD_PACE / 10), [sends(2, false)]);
    // More rounds than a migration may have that is not held.
    for number in 2..7 {
        assert_eq!(round(&mut source, number, 900), []);
        assert_eq!(source.wait(HOLD_PACE), [sends(number + 1, false)]);
    }
    assert_eq!(round(&mut source, 7, 0), []);
    assert_eq!(source.feed(SourceEvent::Proceed), [sends(8, true)]);
    assert!(!source.status().holding);
    assert_eq!(source.feed(SourceEvent::Proceed), []);
    assert_eq!(round(&mut source, 8, 0), [freezes(9)]);
    assert_eq!(source.wait(Duration::from_millis(1)), []);
}

// clause: R-9
#[test]
fn a_whole_round_with_folders_comes_before_the_freeze() {
    let mut source = held();
    round(&mut source, 1, 0);
    source.wait(HOLD_PACE);
    // In the midst of a round without.
    assert_eq!(source.feed(SourceEvent::Proceed), []);
    assert_eq!(round(&mut source, 2, 0), [sends(3, true)]);
    assert_eq!(round(&mut source, 3, 0), [freezes(4)]);
}

#[test]
fn the_word_may_come_before_it_is_waited_for_and_means_nothing_to_others() {
    let mut source = held();
    assert_eq!(source.feed(SourceEvent::Proceed), []);
    assert_eq!(round(&mut source, 1, 0), [sends(2, true)]);
    assert_eq!(round(&mut source, 2, 0), [freezes(3)]);

    let mut source = Source::copying();
    assert_eq!(source.feed(SourceEvent::Proceed), []);
    assert_eq!(round(&mut source, 1, 0), [freezes(2)]);
}

#[test]
fn what_is_held_can_be_given_up() {
    let mut source = held();
    round(&mut source, 1, 0);
    let actions = source.feed(SourceEvent::AbortRequested);
    assert_aborts(&actions, &source, ErrorCode::Aborted);
    assert!(!source.status().holding);
    assert_eq!(source.wait(HOLD_PACE), []);

    let mut source = held();
    round(&mut source, 1, 0);
    source.wait(Policy::TIMEOUT);
    assert_eq!(source.status().failure.unwrap().code(), ErrorCode::Timeout);
}
