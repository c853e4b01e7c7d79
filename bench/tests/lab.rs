//! The lab tests: each runs one scenario through the `lab` binary and reads its report.
//!
//! They need root, and one lab at a time: the lab's own lock makes sure, and the tests take turns.
//! Durations are never asserted.

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pageferry_bench::scenario::report::Report;

static TURN: Mutex<()> = Mutex::new(());

/// One test at a time; a test that failed says nothing about the next one's turn.
fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a scenario; its report, and what it printed.
fn run(scenario: &str) -> (Report, String) {
    let _turn = turn();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["run", scenario, "--json"])
        .arg(&json)
        .output()
        .expect("running lab");
    let printed = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = std::fs::read_to_string(&json).unwrap_or_else(|_| panic!("no report: {printed}"));
    (serde_json::from_str(&text).expect("a report"), printed)
}

/// Nothing lost, nothing broken, nothing changed.
fn check(scenario: &str, moves: usize) {
    let (report, printed) = run(scenario);
    assert!(report.ok, "{printed}");
    assert_eq!(report.failures, Vec::<String>::new(), "{printed}");
    assert_eq!(report.moves.len(), moves, "{printed}");
    assert_eq!(
        (report.lost_acks, report.broken_connections),
        (0, 0),
        "{printed}"
    );
    assert_ne!(report.digest_equal, Some(false), "{printed}");
}

#[test]
fn clients_survive_a_move_by_stock_criu() {
    check("stop_and_copy", 1);
}
