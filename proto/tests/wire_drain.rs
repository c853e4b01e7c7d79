//! The bytes of what is said of pages that follow. A change here is a change of the protocol.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::time::Duration;

use expect_test::{Expect, expect};
use pageferry_proto::id::{Generation, SpaceId};
use pageferry_proto::migration::policy::{Mode, OnTimeout, Policy};
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{
    ControlError, FETCH_PAGES_MAX, FETCH_RUNS_MAX, Fetch, Final, Message, SourceMessage,
    TargetMessage,
};
use pageferry_proto::wire::frame;

mod rig;

fn generation() -> Generation {
    Generation::new(3).unwrap()
}

fn failure() -> Failure {
    Failure::new(ErrorCode::LostInDrain, "gone")
}

fn set(runs: &[(u64, u64)]) -> PageSet {
    let run = |(start, count): &(u64, u64)| PageRun::new(PageIndex(*start), PageCount(*count));
    runs.iter().map(|pair| run(pair).unwrap()).collect()
}

fn fetch(pages: PageSet) -> TargetMessage {
    TargetMessage::Fetch(Fetch {
        generation: generation(),
        space: SpaceId(7),
        pages,
        urgent: true,
    })
}

fn check(message: impl Into<Message>, golden: &Expect) {
    let message = message.into();
    let bytes = message.encode().unwrap();
    let mut text = String::new();
    for byte in &bytes {
        write!(text, "{byte:02x}").unwrap();
    }
    golden.assert_eq(&text);
    assert_eq!(Message::decode(&bytes[frame::HEADER_BYTES..]), Ok(message));
}

fn decoded(message: impl Into<Message>) -> Result<Message, ControlError> {
    Message::decode(&message.into().encode().unwrap()[frame::HEADER_BYTES..])
}

// clause: N-1
#[test]
fn what_the_source_says_of_a_drain_keeps_its_bytes() {
    let generation = generation();
    check(
        SourceMessage::Draining { generation },
        &expect!["05000000ba01020803"],
    );
    let failure = failure();
    check(
        SourceMessage::DrainLost {
            generation,
            failure,
        },
        &expect!["0f000000c2010c0803120808531204676f6e65"],
    );
    let last = Final {
        generation,
        absent_sets: 1,
        absent_pages: PageCount(300),
        ..rig::last(9)
    };
    check(
        SourceMessage::Final(last),
        &expect!["14000000920111080310091801200528013009580160ac02"],
    );
}

// clause: N-1
#[test]
fn what_the_target_says_of_a_drain_keeps_its_bytes() {
    let generation = generation();
    check(
        fetch(set(&[(16, 4), (300, 1)])),
        &expect!["10000000d2030d080310071a0510049802012001"],
    );
    check(
        TargetMessage::Filled { generation },
        &expect!["05000000da03020803"],
    );
    let failure = failure();
    check(
        TargetMessage::DrainLost {
            generation,
            failure,
        },
        &expect!["0f000000e2030c0803120808531204676f6e65"],
    );
}

// clause: P-3
#[test]
fn a_request_has_few_pages_in_few_runs() {
    let run = |pages| set(&[(0, pages)]);
    let sieve = |runs: usize| -> PageSet {
        let page = |run: usize| (2 * run as u64, 1);
        set(&(0..runs).map(page).collect::<Vec<_>>())
    };
    for pages in [run(FETCH_PAGES_MAX), sieve(FETCH_RUNS_MAX)] {
        assert!(decoded(fetch(pages)).is_ok());
    }
    let too_much = [
        PageSet::new(),
        run(FETCH_PAGES_MAX + 1),
        sieve(FETCH_RUNS_MAX + 1),
    ];
    for pages in too_much {
        let error = decoded(fetch(pages)).unwrap_err();
        let field = "fetch.pages";
        assert!(matches!(error, ControlError::Invalid { field: f, .. } if f == field));
    }
}

// clause: P-2
#[test]
fn a_final_message_has_absent_pages_in_absent_sets_of_live_ones() {
    let last = |absent_sets, pages, verify| {
        SourceMessage::Final(Final {
            absent_sets,
            absent_pages: PageCount(pages),
            verify,
            ..rig::last(9)
        })
    };
    assert!(decoded(last(1, 1, false)).is_ok());
    for (sets, pages, verify) in [(1, 0, false), (0, 1, false), (2, 2, false), (1, 1, true)] {
        let decoded = decoded(last(sets, pages, verify));
        let field = "final.absent_sets";
        assert!(
            matches!(decoded, Err(ControlError::Invalid { field: f, .. }) if f == field),
            "{sets} {pages} {verify}: {decoded:?}"
        );
    }
}

// clause: P-1
#[test]
fn an_offer_says_whether_pages_may_follow_and_not_if_they_are_compared() {
    let offer = |policy| {
        SourceMessage::Offer(Box::new(pageferry_proto::wire::control::Offer {
            policy,
            ..rig::offer()
        }))
    };
    for mode in Mode::ALL {
        for on_timeout in OnTimeout::ALL {
            let policy = Policy {
                mode,
                on_timeout,
                downtime_bound: Some(Duration::from_millis(9)),
                ..Policy::DEFAULT
            };
            let message = Message::from(offer(policy));
            assert_eq!(decoded(offer(policy)), Ok(message));
            let verify = Policy {
                verify: true,
                ..policy
            };
            let plain = mode == Mode::Precopy && on_timeout != OnTimeout::Postcopy;
            assert_eq!(decoded(offer(verify)).is_ok(), plain);
        }
    }
}
