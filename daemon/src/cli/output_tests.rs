use expect_test::expect;

use super::*;
use pageferry_api::Failure;

fn moved() -> Status {
    Status {
        id: "0123456789abcdef0123456789abcdef".to_owned(),
        workload: "process/4711".to_owned(),
        role: Side::Source.into(),
        phase: "done".to_owned(),
        r#final: true,
        moved: true,
        peer: "b".to_owned(),
        node: "a".to_owned(),
        round: 3,
        memory_bytes: Some(512 << 20),
        sent_bytes: Some(600 << 20),
        wire_bytes: Some(300 << 20),
        dirty_pages_per_second: Some(12_000),
        downtime_us: Some(40_500),
        parts: Some(Parts {
            freeze_us: Some(800),
            final_round_us: Some(15_000),
            restore_us: Some(20_000),
            commit_us: Some(200),
            handoff_us: Some(4_500),
        }),
        frozen_us: Some(5_100),
        synced_us: Some(1_500),
        pauses: Some(7),
        longest_pause_us: Some(4_900),
        elapsed_us: Some(2_340_000),
        final_pages: Some(812),
        pid_at_target: Some(15_002),
        notes: vec!["a port is lost".to_owned()],
        ..Status::default()
    }
}

#[test]
fn a_move_is_summed_up() {
    expect![[r"
        process/4711 moved from a to b in 2.34 s
          3 rounds, 512 MiB of memory, 300 MiB on the wire, 812 pages in the final round
          downtime 40.5 ms: freeze 0.8, final_round 15.0, restore 20.0, commit 0.2, handoff 4.5
          frozen inside CRIU 5.1 ms
          shared storage synced in 1.5 ms
          paused for scans: 7, longest 4.9 ms
          a port is lost
          at b it is process/15002"]]
    .assert_eq(&summary(&moved()));
}

#[test]
fn the_json_of_a_move_keeps_its_names() {
    let json = serde_json::to_string(&Moved::of(&moved())).unwrap();
    expect![[r#"{"id":"0123456789abcdef0123456789abcdef","workload":"process/4711","mode":"precopy","from":"a","to":"b","rounds":3,"memory_bytes":536870912,"wire_bytes":314572800,"downtime_ms":40.5,"parts_ms":{"freeze":0.8,"final_round":15.0,"restore":20.0,"commit":0.2,"handoff":4.5},"frozen_ms":5.1,"sync_ms":1.5,"restore_ms":20.0,"blackout_ms":null,"total_ms":2340.0,"final_pages":812,"dirty_pages_per_second":12000,"pid_at_target":15002,"retries":0,"pauses":7,"longest_pause_ms":4.9,"notes":["a port is lost"],"ok":true,"error":null}"#]]
    .assert_eq(&json);
}

#[test]
fn a_refused_move_says_where_the_workload_is() {
    let failure = Failure {
        code: "pid-taken".to_owned(),
        text: "pid 7 is in use".to_owned(),
    };
    let status = Status {
        moved: false,
        failure: Some(failure),
        ..moved()
    };
    expect![[r"
        process/4711 runs on at a, it has not moved to b
          pid-taken: pid 7 is in use"]]
    .assert_eq(&summary(&status));
}

#[test]
fn the_table_lines_up() {
    expect![[r"
        ID                                WORKLOAD      ROLE    PEER  PHASE  ROUND  ON WIRE  DOWNTIME
        0123456789abcdef0123456789abcdef  process/4711  source  b     done   3      300 MiB  40.5 ms"]]
    .assert_eq(&table(&[moved()]));
}

/// After a restart, or at the target.
fn uncounted() -> Status {
    Status {
        round: 0,
        memory_bytes: None,
        sent_bytes: None,
        wire_bytes: None,
        elapsed_us: None,
        downtime_us: None,
        ..moved()
    }
}

#[test]
fn what_is_not_known_is_null_and_no_zero() {
    let json = serde_json::to_string(&Known::of(&uncounted())).unwrap();
    for field in [
        "round",
        "memory_bytes",
        "sent_bytes",
        "wire_bytes",
        "total_ms",
    ] {
        assert!(
            json.contains(&format!("\"{field}\":null")),
            "{field}: {json}"
        );
    }
    let row = row(&uncounted());
    assert_eq!(row[5..], ["-", "-", "-"]);
}

#[test]
fn a_list_tells_of_refused_attempts_and_of_what_is_not_listed() {
    let reply = ListReply {
        migrations: vec![],
        refusals: vec![Refusal {
            at_unix_ms: 1_700_000_000_000,
            workload: "process/7".to_owned(),
            to: "b".to_owned(),
            failure: Some(Failure {
                code: "stdio-unfit".to_owned(),
                text: "a terminal".to_owned(),
            }),
        }],
        answers_kept: 2,
        node: "a".to_owned(),
    };
    expect![[r"
        ID  WORKLOAD  ROLE  PEER  PHASE  ROUND  ON WIRE  DOWNTIME

        Refused before they began, newest first:
          2023-11-14 22:13:20 UTC  process/7 to b  stdio-unfit: a terminal

        Of 2 old ones a source may still ask how they ended: `pageferry list --all`"]]
    .assert_eq(&list(&reply));
}
