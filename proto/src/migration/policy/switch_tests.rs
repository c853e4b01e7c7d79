//! When rounds are given up for a switch, by tables: what each round of 1 s has sent and left, in
//! thousands of pages, and what follows it.

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MEMORY: PageCount = PageCount(100_000);

use Decision::Round as GoOn;

const CONVERGED: Decision = Decision::Freeze(FreezeReason::Converged);
const SMALLEST: Decision = Decision::Switch(FreezeReason::Smallest);

fn policy(mode: Mode) -> Policy {
    Policy {
        mode,
        ..Policy::DEFAULT
    }
}

/// 100 pages in a millisecond.
fn report(round: u32, sent: u64, left: u64) -> RoundReport {
    let bytes = PageCount(sent).bytes();
    RoundReport {
        round: Round::new(round).unwrap(),
        parcels: 1,
        pages_sent: PageCount(sent),
        pages_dirtied_estimate: PageCount(left),
        raw_bytes: bytes,
        wire_bytes: bytes,
        duration: Duration::from_micros(sent * 10),
        eager_bytes: 0,
        anew: false,
        files: FilesReport::default(),
    }
}

/// Each round sends what the one before it has left.
fn check(policy: &Policy, rounds: &[(u64, Decision)]) -> Convergence {
    let mut convergence = Convergence::default();
    let mut sent = MEMORY.0;
    for (round, &(left, expected)) in (1..).zip(rounds) {
        let found = convergence.after(policy, &report(round, sent, left), MEMORY);
        assert_eq!(found, expected, "round {round} of {rounds:?}");
        sent = left;
    }
    convergence
}

// clause: R-10
#[test]
fn rounds_that_stall_end_near_the_smallest_rest() {
    // It works in turns, of which one writes less than the others.
    let turns = [95_000, 80_000, 100_000, 95_000, 100_000].map(|left| (left, GoOn));
    for mode in [Mode::Hybrid, Mode::Auto] {
        // Within 4 % of 80 thousand, and not above.
        let met = [turns.as_slice(), &[(83_201, GoOn), (83_200, SMALLEST)]].concat();
        check(&policy(mode), &met);
        // Smaller than all before.
        check(
            &policy(mode),
            &[turns.as_slice(), &[(70_000, SMALLEST)]].concat(),
        );
    }
}

// clause: R-10
#[test]
fn the_smallest_rest_is_not_waited_for_for_ever() {
    let least = usize::try_from(WATCHED_ROUNDS_MAX).unwrap();
    let mut rounds = vec![(100_000, GoOn); least];
    rounds[0].0 = 90_000;
    rounds[least - 1].1 = SMALLEST;
    check(&policy(Mode::Auto), &rounds);
    let last = Policy {
        rounds_max: 2,
        ..policy(Mode::Auto)
    };
    let reason = FreezeReason::RoundsMax;
    check(&last, &[(95_000, GoOn), (99_000, Decision::Switch(reason))]);
}

// clause: R-10
#[test]
fn a_steady_writer_is_switched_after_the_rounds_that_are_watched() {
    let rounds = [(100_000, GoOn), (100_000, GoOn), (100_000, SMALLEST)];
    let convergence = check(&policy(Mode::Auto), &rounds);
    // What is left is not sent in the freeze.
    assert_eq!(convergence.predicted_downtime(), Some(FIXED_COST));
    assert_eq!(convergence.predicted_freeze(), Some(FIXED_COST));
}

// clause: R-10
#[test]
fn what_converges_is_moved_whole_in_every_mode_with_rounds() {
    for mode in [Mode::Precopy, Mode::Hybrid, Mode::Auto] {
        check(
            &policy(mode),
            &[
                (30_000, GoOn),
                (9_000, GoOn),
                (4_000, GoOn),
                (900, CONVERGED),
            ],
        );
    }
    // At 60 % of each before it hybrid has seen enough, and auto goes on.
    let slow = [(60_000, GoOn), (36_000, GoOn)];
    check(
        &policy(Mode::Hybrid),
        &[slow.as_slice(), &[(34_000, SMALLEST)]].concat(),
    );
    let auto = [(34_000, GoOn), (22_000, CONVERGED)];
    check(&policy(Mode::Auto), &[slow.as_slice(), &auto].concat());
}

// clause: R-10
#[test]
fn auto_gives_rounds_up_when_those_that_are_left_will_not_do() {
    // 80 % of each before it: the budget of 260 ms, 26 thousand pages, is met in the seventh.
    let seven = Policy {
        rounds_max: 7,
        ..policy(Mode::Auto)
    };
    let mut convergence = Convergence::default();
    let first = report(1, 100_000, 80_000);
    assert!(!matches!(
        convergence.after(&seven, &first, MEMORY),
        Decision::Switch(_)
    ));
    assert!(!convergence.stall.has_begun());
    let six = Policy {
        rounds_max: 6,
        ..seven
    };
    let mut convergence = Convergence::default();
    convergence.after(&six, &first, MEMORY);
    assert!(convergence.stall.has_begun());
    // The seven take 1 + 0.8 + 0.64 + ... = 4 s.
    for (timeout, begun) in [(SECOND * 5, false), (SECOND * 2, true)] {
        let hasty = Policy { timeout, ..seven };
        let mut convergence = Convergence::default();
        convergence.after(&hasty, &first, MEMORY);
        assert_eq!(convergence.stall.has_begun(), begun, "{timeout:?}");
    }
}

// clause: R-10
#[test]
fn the_budget_rises_in_steps_to_its_bound_and_no_further() {
    let stall = |rounds| {
        let mut stall = Stall::default();
        (0..rounds).for_each(|_| stall.observe(1));
        stall.budget(Duration::from_millis(300), Duration::from_millis(700))
    };
    let budgets = [0, 1, 2, 3, 4, 5, 100].map(|rounds| stall(rounds).as_millis());
    assert_eq!(budgets, [300, 400, 500, 600, 700, 700, 700]);
    // 440 ms of downtime fit the second step, and 500.01 ms do not.
    let bounded = Policy {
        downtime_bound: Some(Duration::from_millis(700)),
        ..policy(Mode::Precopy)
    };
    check(&bounded, &[(100_000, GoOn), (40_000, CONVERGED)]);
    check(&bounded, &[(100_000, GoOn), (46_001, GoOn)]);
    check(
        &bounded,
        &[
            (90_000, GoOn),
            (85_000, GoOn),
            (80_000, GoOn),
            (66_000, CONVERGED),
        ],
    );
    check(
        &bounded,
        &[
            (90_000, GoOn),
            (85_000, GoOn),
            (80_000, GoOn),
            (66_001, GoOn),
        ],
    );
}

// clause: R-11
#[test]
fn a_bounded_downtime_is_not_exceeded_by_the_last_round_allowed() {
    let bounded = Policy {
        downtime_bound: Some(Duration::from_millis(700)),
        rounds_max: 3,
        ..policy(Mode::Precopy)
    };
    let rounds = [(95_000, GoOn), (95_000, GoOn), (95_000, Decision::TimeOver)];
    check(&bounded, &rounds);
}

// clause: P-1
#[test]
fn a_policy_that_compares_pages_has_none_follow() {
    let verify = Policy {
        verify: true,
        ..Policy::DEFAULT
    };
    assert_eq!(verify.check(), Ok(()));
    for mode in [Mode::Hybrid, Mode::Postcopy, Mode::Auto] {
        assert_eq!(Policy { mode, ..verify }.check(), Err(VerifySwitches));
    }
    let on_timeout = OnTimeout::Postcopy;
    assert_eq!(
        Policy {
            on_timeout,
            ..verify
        }
        .check(),
        Err(VerifySwitches)
    );
}

#[test]
fn postcopy_switches_after_the_first_round_that_counts() {
    let reason = Decision::Switch(FreezeReason::Postcopy);
    check(&policy(Mode::Postcopy), &[(100_000, reason)]);
}
