//! Random schedules with random faults, judged by the oracles of `pageferry_sim`.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::source::RETRIES_MAX;
use pageferry_proto::migration::status::Phase;
use pageferry_sim::{Op, Setup, Strayed, Survivor, Violation, World};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Schedules per test. At about 1 ms each this is a few seconds on one slow core; set
/// PROPTEST_CASES for more, and SIMULATE_SEED for others.
const CASES: u32 = 3000;

const SETUP: Setup = Setup {
    spaces: 2,
    pages: 6,
    policy: Policy {
        downtime_max: Duration::from_millis(60),
        rounds_max: 4,
        verify: true,
        ..Policy::DEFAULT
    },
    locks: 0,
    hold: false,
};

/// As few steps to the hand-off as there can be.
const SMALL: Setup = Setup {
    spaces: 1,
    pages: 1,
    ..SETUP
};

/// The same for a workload with a file lock that others want, too.
const LOCKED: Setup = Setup { locks: 1, ..SMALL };

/// One that is held before its freeze.
const HELD: Setup = Setup {
    hold: true,
    ..SETUP
};

/// With two, of which others want both before they give one back.
const LOCKED_TWICE: Setup = Setup { locks: 2, ..SMALL };

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Source), Just(Side::Target)]
}

/// All of a migration, with a fault now and then.
fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        300 => any::<u8>().prop_map(Op::Step),
        20 => any::<u8>().prop_map(Op::Write),
        1 => side().prop_map(Op::Abort),
        1 => Just(Op::Break),
        1 => Just(Op::DropHeld),
        1 => side().prop_map(Op::Expire),
        2 => (side(), any::<u8>()).prop_map(|(side, found)| Op::Crash(side, found)),
        2 => side().prop_map(Op::Fail),
        1 => side().prop_map(Op::Fence),
        2 => side().prop_map(Op::Hang),
        1 => (side(), any::<u8>()).prop_map(|(side, found)| Op::PowerLoss(side, found)),
        6 => side().prop_map(Op::Restart),
        4 => (0..32u8).prop_map(Op::Pass),
        4 => (0..16u8).prop_map(Op::Retry),
        2 => Just(Op::RetryLate),
        2 => Just(Op::Tick),
    ]
}

/// No fault, but a source that gives up freezes, up to as often as it may.
fn passing() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        300 => any::<u8>().prop_map(Op::Step),
        20 => any::<u8>().prop_map(Op::Write),
        16 => (0..16u8).prop_map(Op::Retry),
    ];
    prop::collection::vec(op, 0..800).prop_map(|mut ops| {
        let mut left = RETRIES_MAX;
        ops.retain(|op| {
            let retry = matches!(op, Op::Retry(_));
            left = left.saturating_sub(u32::from(retry));
            !retry || 0 < left
        });
        ops
    })
}

/// The same, and one stream that no source sends. In half of the schedules data streams come late,
/// after the message that counts them.
fn straying() -> impl Strategy<Value = Vec<Op>> {
    let ops = (passing(), 20..160usize, any::<u8>(), any::<bool>());
    ops.prop_map(|(mut ops, place, kind, late)| {
        for op in &mut ops {
            if let Op::Step(choice) = op
                && late
            {
                *choice %= 2;
            }
        }
        ops.insert(place.min(ops.len()), Op::Stray(kind));
        ops
    })
}

/// Many faults at once.
fn storm() -> impl Strategy<Value = Op> {
    prop_oneof![
        60 => any::<u8>().prop_map(Op::Step),
        2 => side().prop_map(Op::Abort),
        4 => Just(Op::Break),
        4 => Just(Op::DropHeld),
        8 => side().prop_map(Op::Expire),
        6 => (side(), any::<u8>()).prop_map(|(side, found)| Op::Crash(side, found)),
        6 => side().prop_map(Op::Fail),
        1 => side().prop_map(Op::Fence),
        2 => side().prop_map(Op::Hang),
        1 => (side(), any::<u8>()).prop_map(|(side, found)| Op::PowerLoss(side, found)),
        12 => side().prop_map(Op::Restart),
        4 => (0..32u8).prop_map(Op::Pass),
        4 => Just(Op::RetryLate),
        4 => Just(Op::Tick),
    ]
}

/// Somebody else who wants the workload's lock.
fn rival() -> impl Strategy<Value = Op> {
    prop_oneof![3 => Just(Op::TakeLock), 1 => Just(Op::GiveLock), 1 => Just(Op::DropCopy)]
}

/// No fault for long enough to come to the hand-off, then a storm.
fn late_storm() -> impl Strategy<Value = Vec<Op>> {
    after_calm(storm())
}

/// The same, with a rival in the storm.
fn late_storm_of_rivals() -> impl Strategy<Value = Vec<Op>> {
    after_calm(prop_oneof![8 => storm(), 1 => rival()])
}

/// No fault at all but a rival, who takes the lock whenever nobody has it, and time that passes.
fn rivals() -> impl Strategy<Value = Vec<Op>> {
    let calm = prop::collection::vec(any::<u8>().prop_map(Op::Step), 60..90);
    let later = prop::collection::vec(
        prop_oneof![
            40 => any::<u8>().prop_map(Op::Step),
            10 => Just(Op::TakeLock),
            2 => Just(Op::Tick),
            1 => Just(Op::GiveLock),
        ],
        0..400,
    );
    (calm, later).prop_map(|(calm, later)| [calm, later].concat())
}

fn after_calm(op: impl Strategy<Value = Op>) -> impl Strategy<Value = Vec<Op>> {
    let calm = prop::collection::vec(any::<u8>().prop_map(Op::Step), 30..90);
    let later = prop::collection::vec(op, 0..80);
    (calm, later).prop_map(|(calm, later)| [calm, later].concat())
}

/// How a schedule ended.
struct Ran {
    survivor: Survivor,
    seen: Seen,
    strayed: Option<Strayed>,
}

fn run(setup: Setup, ops: &[Op]) -> Result<Ran, Violation> {
    let mut world = World::new(setup);
    let mut seen = Seen::new();
    for op in ops {
        world.apply(*op)?;
        for side in [Side::Source, Side::Target] {
            seen.extend(world.status(side).map(|status| (side, status.phase)));
        }
    }
    let survivor = world.settle()?;
    Ok(Ran {
        survivor,
        seen,
        strayed: world.strayed(),
    })
}

/// The phases that each side was in.
type Seen = BTreeSet<(Side, Phase)>;

/// Runs the schedules, and says in how many of them each phase was seen. Each must end as `judge`
/// wants it.
fn simulate(
    setup: Setup,
    ops: impl Strategy<Value = Vec<Op>>,
    judge: impl Fn(&Ran) -> Result<(), &'static str>,
) -> BTreeMap<(Side, Phase), u32> {
    let seed: u64 = std::env::var("SIMULATE_SEED").map_or(0, |seed| seed.parse().unwrap());
    let cases = std::env::var("PROPTEST_CASES").map_or(CASES, |cases| cases.parse().unwrap());
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let counts = RefCell::new(BTreeMap::new());
    let outcome = TestRunner::new_with_rng(config, rng).run(&ops, |ops| {
        let ran =
            run(setup, &ops).map_err(|violation| TestCaseError::fail(violation.to_string()))?;
        judge(&ran).map_err(TestCaseError::fail)?;
        for phase in ran.seen {
            *counts.borrow_mut().entry(phase).or_default() += 1;
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    counts.into_inner()
}

/// A simulation that does not get somewhere proves nothing about it.
fn assert_reached(counts: &BTreeMap<(Side, Phase), u32>, side: Side, phases: &[Phase]) {
    for &phase in phases {
        let count = counts.get(&(side, phase)).copied().unwrap_or_default();
        assert!(
            CASES / 100 <= count,
            "{side} was {phase} in {count} runs of {counts:?}"
        );
    }
}

#[test]
fn no_schedule_with_faults_breaks_an_oracle() {
    let counts = simulate(SETUP, prop::collection::vec(op(), 0..500), |_| Ok(()));
    assert_reached(
        &counts,
        Side::Source,
        &[Phase::Copying, Phase::Freezing, Phase::Aborted],
    );
    assert_reached(
        &counts,
        Side::Target,
        &[Phase::Receiving, Phase::Restoring, Phase::Aborted],
    );
}

#[test]
fn no_storm_in_the_hand_off_breaks_an_oracle() {
    let counts = simulate(SMALL, late_storm(), |_| Ok(()));
    let phases = [
        Phase::Prepared,
        Phase::Committed,
        Phase::Reclaiming,
        Phase::Done,
    ];
    assert_reached(&counts, Side::Source, &phases);
    let phases = [Phase::Ready, Phase::Running, Phase::Refusing, Phase::Done];
    assert_reached(&counts, Side::Target, &phases);
}

#[test]
fn no_storm_in_the_hand_off_of_a_locked_workload_breaks_an_oracle() {
    for setup in [LOCKED, LOCKED_TWICE] {
        let counts = simulate(setup, late_storm_of_rivals(), |_| Ok(()));
        assert_all_reached(&counts);
    }
}

fn assert_all_reached(counts: &BTreeMap<(Side, Phase), u32>) {
    let phases = [
        Phase::Prepared,
        Phase::Committed,
        Phase::Reclaiming,
        Phase::Done,
    ];
    assert_reached(counts, Side::Source, &phases);
    let phases = [Phase::Ready, Phase::Running, Phase::Refusing, Phase::Done];
    assert_reached(counts, Side::Target, &phases);
}

// clause: R-9
#[test]
fn no_schedule_freezes_what_is_held_before_somebody_says_so() {
    let op = prop_oneof![40 => op(), 1 => Just(Op::Proceed)];
    let counts = simulate(HELD, prop::collection::vec(op, 0..500), |_| Ok(()));
    let phases = [Phase::Copying, Phase::Freezing, Phase::Done, Phase::Aborted];
    assert_reached(&counts, Side::Source, &phases);
}

// clause: H-23
#[test]
fn a_rival_alone_never_keeps_a_workload_from_running_in_the_end() {
    for setup in [LOCKED, LOCKED_TWICE] {
        let counts = simulate(setup, rivals(), |ran| match ran.survivor {
            Survivor::Source | Survivor::Target => Ok(()),
            Survivor::Nobody => Err("without a fault it runs nowhere"),
        });
        let phases = [Phase::Committed, Phase::Reclaiming];
        assert_reached(&counts, Side::Source, &phases);
        assert_reached(&counts, Side::Target, &[Phase::Running, Phase::Refusing]);
    }
}

// clause: F-6
// clause: R-5
#[test]
fn a_source_that_gives_up_freezes_moves_in_the_end() {
    let counts = simulate(SETUP, passing(), |ran| match ran.survivor {
        Survivor::Target => Ok(()),
        Survivor::Nobody | Survivor::Source => Err("without a fault it did not move"),
    });
    let phases = [Phase::Copying, Phase::Freezing, Phase::Finishing];
    assert_reached(&counts, Side::Source, &phases);
}

// clause: F-6
#[test]
fn a_stream_that_no_source_sends_ends_the_migration_if_the_target_takes_it_in() {
    let strays = RefCell::new(BTreeMap::<_, u32>::new());
    simulate(SETUP, straying(), |ran| {
        *strays.borrow_mut().entry(ran.strayed).or_default() += 1;
        match (ran.strayed, ran.survivor) {
            (Some(_), Survivor::Source) | (None, Survivor::Target) => Ok(()),
            (Some(_), _) => Err("a stray stream was passed over"),
            (None, _) => Err("without a stray stream it did not move"),
        }
    });
    let strays = strays.into_inner();
    for when in [None, Some(Strayed::Before), Some(Strayed::After)] {
        let count = strays.get(&when).copied().unwrap_or_default();
        assert!(CASES / 100 <= count, "{when:?}: {count} of {strays:?}");
    }
}
