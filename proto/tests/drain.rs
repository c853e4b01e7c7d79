//! A source that keeps its copy while pages of it follow the workload, clause by clause.

#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::migration::handoff::{REDIAL, RESEND, RETRY, Side};
use pageferry_proto::migration::policy::{Mode, OnTimeout, Policy};
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::{
    FinalReport, SILENCE_MAX, SourceAction, SourceEvent, UNLOCK_TRIES_MAX,
};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::migration::target::TargetEvent;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Fetch, Final, SourceMessage, TargetMessage};
use rig::drain::*;
use rig::*;

// clause: P-1
#[test]
fn pages_are_missing_only_if_policy_and_target_allow_it() {
    for mode in [Mode::Hybrid, Mode::Postcopy] {
        let (source, actions) = offered_to(policy(mode), false);
        assert!(actions.iter().any(is_abort), "{actions:?}");
        let failure = source.status().failure.unwrap();
        assert_eq!(failure.code(), ErrorCode::PostcopyForbidden);
    }
    let (source, actions) = offered_to(
        Policy {
            on_timeout: OnTimeout::Postcopy,
            ..Policy::DEFAULT
        },
        false,
    );
    assert!(actions.iter().any(is_abort), "{actions:?}");
    assert_eq!(source.status().phase, Phase::Aborting);
    // A writer that no round catches up with is frozen at once then, as without a mode.
    let (mut source, actions) = offered_to(policy(Mode::Auto), false);
    assert_eq!(actions, [SourceAction::Track]);
    source.feed(SourceEvent::TrackingReady {
        memory: PageCount(1000),
    });
    let round = Round::FIRST.next();
    let actions = after_a_round(&mut source, 100_000, 100_000);
    assert_eq!(actions, [SourceAction::Freeze { round }]);
    let finish = SourceAction::Finish {
        generation: GENERATION,
        round,
        absent: false,
    };
    assert_eq!(source.feed(SourceEvent::Frozen), [finish]);
    // Nobody leaves pages behind who was not told to.
    let actions = source.feed(SourceEvent::Finished(report_with_absent(1)));
    assert!(actions.iter().any(is_abort), "{actions:?}");
}

// clause: R-10
#[test]
fn postcopy_sends_no_page_before_it_freezes_and_none_in_the_freeze() {
    let (mut source, _) = offered_to(policy(Mode::Postcopy), true);
    let memory = PageCount(1000);
    let round = Round::FIRST;
    let look = SourceAction::SendRound {
        round,
        folders: true,
        pages: false,
    };
    assert_eq!(source.feed(SourceEvent::TrackingReady { memory }), [look]);
    let round = round.next();
    let actions = after_a_round(&mut source, 0, 1000);
    assert_eq!(actions, [SourceAction::Freeze { round }]);
    let finish = SourceAction::Finish {
        generation: GENERATION,
        round,
        absent: true,
    };
    assert_eq!(source.feed(SourceEvent::Frozen), [finish]);
    let actions = source.feed(SourceEvent::Finished(report_with_absent(7)));
    let said = Final {
        absent_sets: 1,
        absent_pages: PageCount(7),
        ..last(2)
    };
    assert_eq!(actions[0], say(SourceMessage::Final(said)));
}

// clause: R-11
#[test]
fn the_end_of_time_cancels_or_freezes_at_the_end_of_the_round() {
    let timeout = Policy::TIMEOUT;
    for (on_timeout, absent) in [(OnTimeout::Force, false), (OnTimeout::Postcopy, true)] {
        let mut source = Source::with(Policy {
            on_timeout,
            ..Policy::DEFAULT
        });
        assert_eq!(source.wait(timeout), []);
        let round = Round::FIRST.next();
        let actions = after_a_round(&mut source, 100_000, 80_000);
        assert_eq!(actions, [SourceAction::Freeze { round }], "{on_timeout}");
        let finish = SourceAction::Finish {
            generation: GENERATION,
            round,
            absent,
        };
        assert_eq!(source.feed(SourceEvent::Frozen), [finish]);
    }
    let mut source = Source::copying();
    let actions = source.wait(timeout);
    assert_aborts(&actions, &source, ErrorCode::Timeout);
}

// clause: P-6
// clause: H-7
#[test]
fn the_copy_is_kept_until_the_target_has_all_pages_on_disk() {
    let mut source = draining();
    let status = source.status();
    assert_eq!((status.phase, status.drains), (Phase::Draining, true));
    assert!(status.parts.downtime().is_some());
    // It says so again, and on new connections too.
    assert_eq!(source.wait(RESEND), [say(DRAINING)]);
    assert_eq!(source.hear(STARTED), []);
    source.feed(SourceEvent::PeerLost);
    assert_eq!(source.wait(REDIAL), [SourceAction::Connect]);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [say(DRAINING)]);
    assert_eq!(source.hear(FILLED), [journal(FILLED_ENTRY)]);
    let kill = [SourceAction::Release, say_settled()];
    assert_eq!(source.journalled(FILLED_ENTRY), kill);
    assert_eq!(source.feed(SourceEvent::Released), [say_settled()]);
    let status = source.status();
    assert_eq!((status.phase, status.drains), (Phase::Done, false));
    assert_eq!(status.failure, None);
}

// clause: P-6
#[test]
fn nothing_thaws_a_copy_that_drains() {
    let text = |code| Failure::new(code, "x");
    let refused = TargetMessage::Refused {
        generation: GENERATION,
        failure: None,
    };
    let unknown = TargetMessage::Unknown {
        generation: GENERATION,
    };
    for event in [
        SourceEvent::AbortRequested,
        SourceEvent::Failure(text(ErrorCode::Internal)),
        SourceEvent::Fenced(Side::Source),
        SourceEvent::Message(refused),
        SourceEvent::Message(unknown),
        SourceEvent::Message(TargetMessage::Failed(text(ErrorCode::Aborted))),
        SourceEvent::Unlocked,
        SourceEvent::PeerRefused(text(ErrorCode::PeerUntrusted)),
    ] {
        let mut source = draining();
        assert_eq!(source.feed(event.clone()), [], "{event:?}");
        assert_eq!(source.status().phase, Phase::Draining, "{event:?}");
    }
}

// clause: P-6
#[test]
fn a_start_that_cannot_be_written_is_written_again_and_served_meanwhile() {
    let mut source = committed();
    source.hear(STARTED);
    assert_eq!(source.journal_failed(STARTED_ENTRY), []);
    assert_eq!(source.status().phase, Phase::Draining);
    let again = source.wait(RETRY);
    assert!(again.contains(&journal(STARTED_ENTRY)), "{again:?}");
    source.journalled(STARTED_ENTRY);
    assert_eq!(source.status().failure, None);
}

// clause: P-11
// clause: J-3
#[test]
fn a_restarted_source_goes_on_draining() {
    let mut source = Source::recovered(&[offered(), COMMIT, STARTED_ENTRY]);
    let expected = [
        journal(STARTED_ENTRY),
        SourceAction::Drain,
        SourceAction::Connect,
    ];
    assert_eq!(source.actions(), expected);
    assert_eq!(source.feed(SourceEvent::PeerConnected), [say(DRAINING)]);
    // The commit says it: whether the start was heard need not be on disk.
    let mut source = Source::recovered(&[offered(), COMMIT]);
    assert_eq!(source.actions(), [journal(COMMIT)]);
    source.journalled(COMMIT);
    source.feed(SourceEvent::Unlocked);
    source.feed(SourceEvent::PeerConnected);
    let actions = source.hear(STARTED);
    assert!(actions.contains(&SourceAction::Drain), "{actions:?}");
    // It has heard all it needs.
    let mut source = Source::recovered(&[offered(), COMMIT, STARTED_ENTRY, FILLED_ENTRY]);
    assert_eq!(source.actions(), [journal(FILLED_ENTRY)]);
    assert_eq!(source.journalled(FILLED_ENTRY), [SourceAction::Release]);
}

// clause: P-8
#[test]
fn a_lost_connection_changes_nothing_but_what_is_said_of_it() {
    let mut target = filling();
    assert_eq!(target.feed(TargetEvent::PeerLost), []);
    let status = target.status();
    assert_eq!((status.phase, status.fence_wanted), (Phase::Running, true));
    assert_eq!(target.feed(TargetEvent::PeerConnected), []);
    assert!(!target.status().fence_wanted);
    let mut source = draining();
    source.feed(SourceEvent::PeerLost);
    source.wait(SILENCE_MAX);
    let status = source.status();
    assert_eq!((status.phase, status.fence_wanted), (Phase::Draining, true));
    source.feed(SourceEvent::PeerConnected);
    source.hear(TargetMessage::Fetch(Fetch {
        generation: GENERATION,
        space: SpaceId(1),
        pages: PageSet::from(PageRun::new(PageIndex(1), PageCount(1)).unwrap()),
        urgent: true,
    }));
    assert!(!source.status().fence_wanted);
}

// clause: P-9
#[test]
fn what_the_source_has_lost_the_target_may_have() {
    let mut source = draining();
    let lost_here = say(drain_lost(gone()));
    let said = source.feed(SourceEvent::DrainLost(gone()));
    assert_eq!(said, std::slice::from_ref(&lost_here));
    assert_eq!(source.wait(RESEND), [lost_here]);
    // It has all of it: nothing is lost.
    assert_eq!(source.hear(FILLED), [journal(FILLED_ENTRY)]);
    source.journalled(FILLED_ENTRY);
    source.feed(SourceEvent::Released);
    assert_eq!(source.status().failure, None);
    // It lacks something, and has that on disk.
    let mut source = draining();
    source.feed(SourceEvent::DrainLost(gone()));
    let entry = Entry::Aborted(lost(&gone()));
    assert_eq!(
        source.hear(target_lost(lost(&gone()))),
        [journal(entry.clone())]
    );
    let kill = [SourceAction::Release, say_settled()];
    assert_eq!(source.journalled(entry), kill);
    source.feed(SourceEvent::Released);
    let status = source.status();
    assert_eq!(status.phase, Phase::Aborted);
    assert_eq!(status.failure, Some(lost(&gone())));
}

// clause: P-10
#[test]
fn a_fence_of_the_target_kills_what_drains_and_thaws_nothing() {
    let mut source = draining();
    let fenced = Failure::new(
        ErrorCode::Fenced,
        "the operator declared the target dead, which ran it",
    );
    let entry = Entry::Aborted(lost(&fenced));
    assert_eq!(
        source.feed(SourceEvent::Fenced(Side::Target)),
        [journal(entry.clone())]
    );
    assert_eq!(source.journalled(entry.clone()), [SourceAction::Release]);
    // Nobody is left to be told.
    assert_eq!(source.feed(SourceEvent::Released), [journal(Entry::Done)]);
    assert_eq!(source.status().phase, Phase::Aborted);
    let records = [offered(), COMMIT, STARTED_ENTRY, entry.clone()];
    let mut source = Source::recovered(&records);
    assert_eq!(source.actions(), [journal(entry.clone())]);
    let actions = source.journalled(entry.clone());
    assert_eq!(actions, [SourceAction::Release]);
    // That it has started need not be on disk for that.
    let mut source = Source::recovered(&[offered(), COMMIT, entry.clone()]);
    assert_eq!(source.actions(), [journal(entry.clone())]);
    assert_eq!(source.journalled(entry.clone()), [SourceAction::Release]);
    // A refusal for the same reason is none of that: it did not start.
    let mut source = committed();
    let actions = source.hear(TargetMessage::Refused {
        generation: GENERATION,
        failure: Some(lost(&fenced)),
    });
    let [SourceAction::Journal(record)] = &actions[..] else {
        panic!("{actions:?}");
    };
    let refused = record.entry.clone();
    let mut source = Source::recovered(&[offered(), COMMIT, refused.clone()]);
    source.actions();
    assert_eq!(source.journalled(refused), [THAW]);
    // Before it is known to have started, it comes back.
    let mut source = committed();
    let fenced = Entry::Fenced {
        generation: GENERATION,
    };
    assert_eq!(
        source.feed(SourceEvent::Fenced(Side::Target)),
        [journal(fenced.clone())]
    );
    assert_eq!(source.journalled(fenced), [THAW]);
}

#[test]
fn a_maimed_copy_that_the_target_would_need_is_asked_back() {
    let mut source = Source::with(policy(Mode::Postcopy));
    after_a_round(&mut source, 0, 1000);
    source.feed(SourceEvent::Frozen);
    source.feed(SourceEvent::Finished(FinalReport {
        locks: 1,
        ..report_with_absent(1000)
    }));
    source.hear(TargetMessage::FinalHeld {
        generation: GENERATION,
    });
    source.hear(ready());
    source.feed(SourceEvent::SmapsEqual);
    assert_eq!(source.journalled(COMMIT), [SourceAction::Unlock]);
    for _ in 1..UNLOCK_TRIES_MAX {
        source.feed(SourceEvent::Failure(gone()));
        assert_eq!(source.wait(Duration::from_secs(1)), [SourceAction::Unlock]);
    }
    let query = SourceMessage::Query {
        generation: GENERATION,
    };
    assert_eq!(source.feed(SourceEvent::Failure(gone())), [say(query)]);
}

#[test]
fn a_final_round_that_could_leave_pages_and_left_none_is_a_whole_move() {
    let mut source = Source::with(policy(Mode::Postcopy));
    after_a_round(&mut source, 0, 1000);
    source.feed(SourceEvent::Frozen);
    source.feed(SourceEvent::Finished(report_with_absent(0)));
    source.hear(TargetMessage::FinalHeld {
        generation: GENERATION,
    });
    source.hear(ready());
    assert_eq!(source.feed(SourceEvent::SmapsEqual), [journal(commit())]);
    source.journalled(commit());
    assert_eq!(source.hear(STARTED), [journal(STARTED_ENTRY)]);
    let kill = [SourceAction::Release, say_settled()];
    assert_eq!(source.journalled(STARTED_ENTRY), kill);
}
