use expect_test::expect;
use pageferry_api::Status;

use super::*;

fn span(node: Side, name: &str, detail: &str, (begin_us, took_us): (i64, u64)) -> Span {
    Span {
        node: node.into(),
        name: name.to_owned(),
        detail: detail.to_owned(),
        begin_ns: begin_us * 1000,
        duration_ns: took_us * 1000,
    }
}

fn moved() -> TimelineReply {
    use Side::{Source, Target};
    let status = Status {
        id: "0123456789abcdef0123456789abcdef".to_owned(),
        workload: "process/7".to_owned(),
        phase: "done".to_owned(),
        role: Source.into(),
        node: "a".to_owned(),
        peer: "b".to_owned(),
        downtime_us: Some(20_000),
        ..Status::default()
    };
    TimelineReply {
        status: Some(status),
        spans: vec![
            span(Source, "round", "1", (-2_000_000, 1_500_000)),
            span(Source, "round", "2", (-500_000, 490_000)),
            span(Source, "freeze", "", (0, 2_000)),
            span(Source, "ports", "", (100, 900)),
            span(Source, "dump", "", (2_100, 4_000)),
            span(Source, "pages", "", (2_100, 1_000)),
            span(Source, "final_round", "", (2_000, 8_000)),
            span(Source, "restore", "", (10_000, 7_000)),
            span(Source, "commit", "", (17_000, 1_000)),
            span(Source, "handoff", "", (18_000, 2_000)),
            span(Target, "restore", "", (10_100, 6_500)),
            span(Target, "criu_tree", "", (11_000, 5_000)),
            span(Target, "fill", "", (20_000, 400_000)),
        ],
        clock_ahead_ns: Some(-1_250_000),
        clock_uncertainty_ns: Some(80_000),
        one_clock: false,
        dropped: 0,
        whole: true,
    }
}

#[test]
fn a_move_is_drawn_on_three_scales() {
    expect![[r#"
        process/7 from a to b, done, downtime 20.0 ms
        the clock of b is -1.250 ms ahead, ± 0.080 ms

        before the freeze
                           at ms     took ms  |-2000.0                                      -10.0|
          a  round 1    -2000.00     1500.00  ███████████████████████████████████████
          a  round 2     -500.00      490.00                                         █████████████

        in the downtime
                               at ms     took ms  |0.0                                       20.0|
          a  freeze             0.00        2.00  █████
          a    ports            0.10        0.90  ██
          a  final_round        2.00        8.00      ████████████████████
          a    dump             2.10        4.00       ██████████
          a      pages          2.10        1.00       ██
          a  restore           10.00        7.00                          █████████████████
          b  restore           10.10        6.50                          ████████████████
          b    criu_tree       11.00        5.00                            ████████████
          a  commit            17.00        1.00                                          ███
          a  handoff           18.00        2.00                                             █████

        after it
                        at ms     took ms  |20.0                                            420.0|
          b  fill       20.00      400.00  ███████████████████████████████████████████████████████

        longest in the downtime: b criu_tree 5.0 ms, a dump 4.0 ms, a pages 1.0 ms"#]]
    .assert_eq(&draw(&moved(), 90));
}

#[test]
fn every_line_fits_and_every_span_is_there() {
    let reply = moved();
    for columns in [60, 80, 132] {
        let text = draw(&reply, columns);
        for line in text.lines().filter(|line| line.starts_with("  ")) {
            assert!(line.chars().count() <= columns.max(66), "{line}");
        }
        for span in &reply.spans {
            assert!(text.contains(&span.name), "{}", span.name);
        }
    }
}

#[test]
fn what_is_missing_is_said() {
    let mut reply = moved();
    reply.whole = false;
    reply.dropped = 3;
    let text = draw(&reply, COLUMNS);
    assert!(text.contains("b has not told of its fill"), "{text}");
    assert!(text.contains("3 older spans were not kept"), "{text}");
    reply.clock_ahead_ns = None;
    reply.clock_uncertainty_ns = None;
    assert!(draw(&reply, COLUMNS).contains("b has not told of its spans"));
    reply.one_clock = true;
    assert!(draw(&reply, COLUMNS).contains("both nodes have one clock"));
    // No freeze: everything is on one scale.
    reply.spans.truncate(2);
    let text = draw(&reply, COLUMNS);
    assert!(
        text.contains("all that is known") && !text.contains("downtime:"),
        "{text}"
    );
    reply.spans.clear();
    assert!(draw(&reply, COLUMNS).starts_with("nothing is known"));
}

#[test]
fn the_json_of_a_timeline_keeps_its_names() {
    let mut reply = moved();
    reply.spans.drain(1..12);
    let json = serde_json::to_string(&Timeline::of(&reply)).expect("plain structs");
    expect![[r#"{"id":"0123456789abcdef0123456789abcdef","workload":"process/7","source":"a","target":"b","downtime_ms":20.0,"one_clock":false,"clock_ahead_ms":-1.25,"clock_uncertainty_ms":0.08,"dropped":0,"whole":true,"spans":[{"role":"source","node":"a","name":"round","detail":"1","begin_ms":-2000.0,"took_ms":1500.0},{"role":"target","node":"b","name":"fill","detail":"","begin_ms":20.0,"took_ms":400.0}]}"#]].assert_eq(&json);
}

#[test]
fn a_trace_has_each_span_once_and_on_a_thread_they_nest() {
    let reply = moved();
    let trace = serde_json::to_value(chrome::Trace::of(&reply)).expect("plain structs");
    let events = trace["traceEvents"].as_array().expect("a list");
    let number = |event: &serde_json::Value, key: &str| event[key].as_f64().expect("a number");
    let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(spans.len(), reply.spans.len());
    assert_eq!(events.len(), spans.len() + 2);
    for (index, one) in spans.iter().enumerate() {
        assert!(0.0 <= number(one, "ts") && 0.0 <= number(one, "dur"));
        for other in &spans[..index] {
            if (&one["pid"], &one["tid"]) != (&other["pid"], &other["tid"]) {
                continue;
            }
            let between = |event| {
                let begin = number(event, "ts");
                (begin, begin + number(event, "dur"))
            };
            let ((a, b), (c, d)) = (between(other), between(one));
            assert!(b <= c || (a <= c && d <= b), "{other} and {one}");
        }
    }
    // Beside the dump, and not within it.
    let thread = |name: &str| {
        let found = spans.iter().find(|event| event["name"] == name);
        found.expect("a span")["tid"].clone()
    };
    assert_eq!(thread("freeze"), thread("ports"));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.json");
    chrome::Trace::of(&reply)
        .write(&path)
        .expect("it is written");
    let read = std::fs::read(&path).expect("it is there");
    let read: serde_json::Value = serde_json::from_slice(&read).expect("JSON");
    assert_eq!(read, trace);
}
