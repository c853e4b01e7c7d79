use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MEMORY: PageCount = PageCount(100_000);

fn report(round: u32, sent: u64, dirtied: u64, duration: Duration) -> RoundReport {
    RoundReport {
        round: Round::new(round).unwrap(),
        parcels: 1,
        pages_sent: PageCount(sent),
        pages_dirtied_estimate: PageCount(dirtied),
        raw_bytes: PageCount(sent).bytes(),
        wire_bytes: PageCount(sent).bytes(),
        duration,
        eager_bytes: 0,
        anew: false,
        files: FilesReport::default(),
    }
}

fn check(reports: &[RoundReport], expected: &[Decision]) {
    let mut convergence = Convergence::default();
    let decisions: Vec<Decision> = reports
        .iter()
        .map(|round| convergence.after(&Policy::DEFAULT, round, MEMORY))
        .collect();
    assert_eq!(decisions, expected);
}

// clause: R-6
#[test]
fn the_freeze_comes_when_the_rest_fits_the_downtime() {
    // 100000 pages/s: 260 ms are 26000 pages.
    check(
        &[
            report(1, 100_000, 40_000, SECOND),
            report(2, 40_000, 26_000, SECOND * 2 / 5),
        ],
        &[Decision::Round, Decision::Freeze(FreezeReason::Converged)],
    );
}

#[test]
fn rounds_go_on_while_each_is_much_smaller_than_the_last() {
    check(
        &[
            report(1, 100_000, 20_000, SECOND),
            report(2, 20_000, 4_000, SECOND / 5),
            report(3, 4_000, 1_000, SECOND / 25),
        ],
        &[
            Decision::Round,
            Decision::Round,
            Decision::Freeze(FreezeReason::Converged),
        ],
    );
}

#[test]
fn a_round_that_leaves_nine_tenths_has_stalled() {
    check(
        &[report(1, 100_000, 90_000, SECOND)],
        &[Decision::Freeze(FreezeReason::Stalled)],
    );
    check(&[report(1, 100_000, 89_999, SECOND)], &[Decision::Round]);
}

#[test]
fn the_last_round_allowed_is_followed_by_the_freeze() {
    let round = |number| report(number, 100_000, 80_000, SECOND);
    check(
        &[round(29), round(30)],
        &[Decision::Round, Decision::Freeze(FreezeReason::RoundsMax)],
    );
}

// clause: R-8
#[test]
fn a_round_after_which_all_begins_anew_is_followed_by_another_and_counts_no_more() {
    let policy = Policy {
        rounds_max: 2,
        ..Policy::DEFAULT
    };
    let mut convergence = Convergence::default();
    let mut after = |number, sent, anew| {
        let left = if anew { 100_000 } else { sent * 4 / 5 };
        let round = RoundReport {
            anew,
            ..report(number, sent, left, SECOND)
        };
        convergence.after(&policy, &round, MEMORY)
    };
    // It would have stalled, and be the last one allowed.
    assert_eq!(after(1, 100_000, false), Decision::Round);
    assert_eq!(after(2, 80_000, true), Decision::Round);
    assert_eq!(after(3, 100_000, false), Decision::Round);
    let last = Decision::Freeze(FreezeReason::RoundsMax);
    assert_eq!(after(4, 80_000, false), last);
}

#[test]
fn a_short_round_does_not_change_the_rate() {
    let mut convergence = Convergence::default();
    convergence.after(&Policy::DEFAULT, &report(1, 100_000, 1000, SECOND), MEMORY);
    // Ten pages in a second would be a rate of 40 KiB/s.
    convergence.after(&Policy::DEFAULT, &report(2, 10, 1000, SECOND), MEMORY);
    assert_eq!(
        convergence.predicted_downtime(),
        Some(Duration::from_millis(50))
    );
    assert_eq!(convergence.dirtied_per_second(), Some(1000));
}

#[test]
fn memory_that_only_criu_copies_counts() {
    let mut convergence = Convergence::default();
    let mut round = report(1, 100_000, 0, SECOND);
    round.eager_bytes = PageCount(100_000).bytes();
    convergence.after(&Policy::DEFAULT, &round, MEMORY);
    assert_eq!(convergence.predicted_downtime(), Some(SECOND + FIXED_COST));
}

#[test]
fn nothing_measured_and_something_left_is_no_prediction_that_fits() {
    check(
        &[report(1, 0, 10, Duration::ZERO)],
        &[Decision::Freeze(FreezeReason::Stalled)],
    );
    check(
        &[report(1, 0, 0, Duration::ZERO)],
        &[Decision::Freeze(FreezeReason::Converged)],
    );
}

// clause: F-7
#[test]
fn a_freeze_is_bounded_by_five_seconds_or_twice_what_is_predicted() {
    let gib = PageCount(1 << 18);
    let verified = Policy {
        verify: true,
        ..Policy::DEFAULT
    };
    let said = Policy {
        frozen_max: Some(SECOND / 2),
        ..verified
    };
    let fixed = FIXED_COST * 2;
    // 100000 pages/s are sent; what CRIU copies is copied first, and sent after.
    let eager_gib = 2 * (1024 * SECOND / 240 + gib.bytes() as u32 / 40960 * SECOND / 10_000);
    for (policy, dirtied, eager, memory, expected) in [
        (Policy::DEFAULT, 0, 0, gib, SECOND * 5),
        (Policy::DEFAULT, 245_000, 0, gib, SECOND * 5),
        (Policy::DEFAULT, 300_000, 0, gib, SECOND * 6 + fixed),
        (Policy::DEFAULT, 0, gib.bytes(), gib, eager_gib + fixed),
        (
            Policy::DEFAULT,
            300_000,
            0,
            PageCount(64 * gib.0),
            SECOND * 6 + fixed,
        ),
        (verified, 0, 0, gib, SECOND * 5),
        (verified, 0, 0, PageCount(50 * gib.0), SECOND * 20 + fixed),
        (said, 300_000, gib.bytes(), gib, SECOND / 2),
    ] {
        let mut convergence = Convergence::default();
        let mut round = report(1, 100_000, dirtied, SECOND);
        round.eager_bytes = eager;
        convergence.after(&policy, &round, memory);
        let difference = convergence.frozen_max(&policy).abs_diff(expected);
        assert!(
            difference < SECOND / 1000,
            "{dirtied} dirty, {eager} eager: {difference:?} from {expected:?}"
        );
    }
}

// clause: F-7
#[test]
fn a_first_round_that_is_short_forbids_no_freeze() {
    // 300 KiB in 30 ms: at that rate 64 MiB of shared memory would take 7 s.
    let mut convergence = Convergence::default();
    let mut round = report(1, 75, 0, SECOND * 3 / 100);
    round.eager_bytes = 64 << 20;
    convergence.after(&Policy::DEFAULT, &round, MEMORY);
    assert_eq!(convergence.predicted_freeze(), None);
    // It may well be so, and then there is time for it.
    assert!(FROZEN_MAX_LEAST < convergence.frozen_max(&Policy::DEFAULT));
    convergence.after(&Policy::DEFAULT, &report(2, 25_600, 0, SECOND), MEMORY);
    assert!(convergence.predicted_freeze().is_some());
}

#[test]
fn a_link_of_which_nothing_is_known_gives_no_freeze_without_a_bound() {
    let mut convergence = Convergence::default();
    let policy = Policy::DEFAULT;
    assert_eq!(convergence.frozen_max(&policy), FROZEN_MAX_LEAST);
    convergence.after(&policy, &report(1, 0, 10, Duration::ZERO), MEMORY);
    assert_eq!(convergence.predicted_downtime(), Some(Duration::MAX));
    assert_eq!(convergence.predicted_freeze(), None);
    assert_eq!(convergence.frozen_max(&policy), FROZEN_MAX_LEAST);
}

// clause: R-6
#[test]
fn folders_that_travel_count_like_memory_and_so_does_looking_for_differences() {
    let round = |number, files: FilesReport| RoundReport {
        files,
        raw_bytes: PageCount(100).bytes(),
        ..report(number, 100, 0, SECOND)
    };
    let mib = |sent: u64, left: u64| FilesReport {
        streams: 1,
        sent_bytes: sent << 20,
        left_bytes: left << 20,
        look: SECOND / 50,
        first: false,
    };
    let first = FilesReport {
        first: true,
        ..mib(1024, 0)
    };
    let mut convergence = Convergence::default();
    let mut after = |round| {
        let decision = convergence.after(&Policy::DEFAULT, &round, MEMORY);
        (decision, convergence.predicted_downtime().unwrap())
    };
    // It says nothing of the next, whatever it left.
    let (decision, predicted) = after(round(1, first));
    assert_eq!(
        (decision, predicted),
        (Decision::Round, FIXED_COST + SECOND / 50)
    );
    let (decision, predicted) = after(round(2, mib(1024, 512)));
    assert_eq!(decision, Decision::Round);
    assert!(
        SECOND / 2 < predicted && predicted < SECOND * 6 / 10,
        "{predicted:?}"
    );
    let (decision, _) = after(round(3, mib(512, 500)));
    assert_eq!(decision, Decision::Freeze(FreezeReason::Stalled));
    let (decision, _) = after(round(3, mib(512, 1)));
    assert_eq!(decision, Decision::Freeze(FreezeReason::Converged));
}
