use pageferry_proto::migration::timeline::{
    COMMIT, CRIU_TREE, FILL, FINAL_ROUND, HANDOFF, PAGES, RESTORE, ROUND, SCAN, SPANS_MAX,
};

use super::*;

fn names(timeline: &Timeline) -> Vec<String> {
    let spans = timeline.view("boot").own.into_iter();
    spans.map(|span| span.name).collect()
}

#[test]
fn parts_follow_each_other_and_touch() {
    let timeline = Timeline::default();
    // Out of order: nothing has been frozen.
    timeline.part(RESTORE);
    timeline.end_part();
    assert!(names(&timeline).is_empty());
    timeline.part(FREEZE);
    timeline.end_part();
    // Another freeze, and this one is seen through.
    for part in PARTS {
        timeline.part(part);
    }
    timeline.part(FREEZE);
    timeline.end_part();
    let expected = [FREEZE, FREEZE, FINAL_ROUND, RESTORE, COMMIT, HANDOFF];
    assert_eq!(names(&timeline), expected);
    let view = timeline.view("boot");
    for pair in view.own[1..].windows(2) {
        assert_eq!(pair[0].end, pair[1].begin);
    }
    assert_eq!(view.zero, view.own[1].begin);
}

#[test]
fn what_may_come_for_each_space_is_kept_in_a_freeze_alone_and_is_one() {
    let timeline = Timeline::default();
    assert!(timeline.begin_in_freeze(PAGES).is_none());
    timeline.part(FREEZE);
    for _ in 0..2 * SPANS_MAX {
        drop(timeline.begin_in_freeze(PAGES));
    }
    drop(timeline.begin_in_freeze(SCAN));
    timeline.end_part();
    let pages = names(&timeline)
        .iter()
        .filter(|name| *name == PAGES)
        .count();
    // A machine that is busy may have taken its time between two of them.
    assert!((1..SPANS_MAX / 2).contains(&pages), "{pages}");
    assert_eq!(timeline.view("boot").dropped, 0);
}

#[test]
fn spans_are_bounded_and_the_oldest_go() {
    let timeline = Timeline::default();
    for round in 0..SPANS_MAX + 3 {
        drop(timeline.begin_of(ROUND, round.to_string()));
    }
    let view = timeline.view("boot");
    assert_eq!((view.own.len(), view.dropped), (SPANS_MAX, 3));
    assert_eq!(view.own[0].detail, "3");
}

#[test]
fn records_end_in_the_order_in_which_they_are_written() {
    let timeline = Timeline::default();
    timeline.writes("commit");
    timeline.writes("started");
    timeline.written();
    timeline.written();
    timeline.written();
    let details: Vec<String> = timeline
        .view("b")
        .own
        .into_iter()
        .map(|one| one.detail)
        .collect();
    assert_eq!(details, ["commit", "started"]);
}

#[test]
fn a_measure_that_is_missing_is_no_span() {
    let timeline = Timeline::default();
    timeline.keep(CRIU_TREE, String::new(), (0, 7));
    timeline.keep(CRIU_TREE, String::new(), (8, 7));
    assert!(names(&timeline).is_empty());
    timeline.ended(FILL, String::new(), Duration::from_millis(3));
    let view = timeline.view("boot");
    assert_eq!(view.own[0].end - view.own[0].begin, 3_000_000);
}

/// What a target tells whose clock is `ahead`, of an answer to `asked`.
fn target(asked: Asked, ahead: u64) -> Spans {
    let timeline = Timeline::default();
    timeline.heard(Some(asked));
    drop(timeline.begin(RESTORE));
    timeline.said(Some(asked));
    let mut told = timeline.told("other".to_owned(), true);
    for exchange in &mut told.exchanges {
        exchange.heard += ahead;
        exchange.said += ahead;
    }
    for span in &mut told.spans {
        span.begin += ahead;
        span.end += ahead;
    }
    told
}

#[test]
fn the_other_nodes_spans_are_put_on_this_nodes_clock() {
    const AHEAD: u64 = 3_600_000_000_000;
    let source = Timeline::default();
    source.part(FREEZE);
    let asked = Asked::Final(1);
    source.said(Some(asked));
    let told = target(asked, AHEAD);
    let waited = source.heard(Some(asked));
    assert!(waited.is_some_and(|(said, heard)| said <= heard));
    source.end_part();
    let before = source.view("own");
    assert!(before.others.is_empty() && before.offset.is_none() && !before.is_whole);
    assert!(source.hear(told));
    let view = source.view("own");
    let offset = view.offset.expect("there was an exchange");
    assert!(offset.ahead.abs_diff(3_600_000_000_000) <= offset.uncertainty);
    let (freeze, restore) = (&view.own[0], &view.others[0]);
    let within = offset.uncertainty;
    assert!(freeze.begin <= restore.begin + within && restore.end <= freeze.end + within);
    assert!(view.is_whole && !view.is_one_clock);
    // One kernel, one clock: nothing is shifted, whatever the messages say.
    let view = source.view("other");
    assert_eq!((view.is_one_clock, view.offset), (true, Some(Offset::NONE)));
    assert!(view.others[0].begin > AHEAD);
}

#[test]
fn of_a_message_that_is_said_again_the_first_time_counts_and_of_an_answer_the_last() {
    let timeline = Timeline::default();
    let asked = Asked::Go(1);
    timeline.said(Some(asked));
    timeline.heard(Some(asked));
    let first = timeline.told(String::new(), false).exchanges;
    timeline.said(Some(asked));
    timeline.heard(Some(asked));
    let again = timeline.told(String::new(), false).exchanges;
    assert_eq!(again[0].said, first[0].said);
    assert!(first[0].heard <= again[0].heard);
    for round in 0..2 * EXCHANGES_MAX {
        let asked = Some(Asked::Round(u32::try_from(round).expect("a few")));
        timeline.said(asked);
        timeline.heard(asked);
    }
    assert_eq!(
        timeline.told(String::new(), false).exchanges.len(),
        EXCHANGES_MAX
    );
}
