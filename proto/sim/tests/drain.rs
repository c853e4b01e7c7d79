//! Random schedules of workloads that start with pages missing, judged by the oracles of
//! `pageferry_sim`; and each rule broken once on purpose, to see that its oracle catches it.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::*;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::{Mode, OnTimeout, Policy};
use pageferry_proto::migration::status::Phase;
use pageferry_sim::{Op, Sabotage, Setup, Survivor, Violation, World};
use proptest::prelude::*;
use std::time::Duration;

/// No downtime is short enough for a rest to be sent in the freeze.
const fn setup(mode: Mode) -> Setup {
    Setup {
        policy: Policy {
            mode,
            verify: false,
            downtime_max: Duration::ZERO,
            ..SETUP.policy
        },
        ..SETUP
    }
}

const POSTCOPY: Setup = setup(Mode::Postcopy);

const SMALL_POSTCOPY: Setup = Setup {
    spaces: 1,
    pages: 4,
    ..POSTCOPY
};

const SMALL_HYBRID: Setup = Setup {
    spaces: 1,
    pages: 4,
    policy: Policy {
        rounds_max: 2,
        ..setup(Mode::Hybrid).policy
    },
    ..POSTCOPY
};

/// Modes in which pages follow, and one in which they would if the target took it.
fn setups() -> [Setup; 3] {
    [
        POSTCOPY,
        Setup {
            locks: 1,
            ..setup(Mode::Hybrid)
        },
        Setup {
            drains: false,
            ..setup(Mode::Auto)
        },
    ]
}

/// Steps, and all that may happen to a workload while pages follow it.
fn follows() -> impl Strategy<Value = Op> {
    prop_oneof![
        60 => any::<u8>().prop_map(Op::Step),
        12 => any::<u8>().prop_map(Op::Touch),
        4 => Just(Op::Break),
        2 => Just(Op::DropCopy),
        3 => (side(), any::<u8>()).prop_map(|(side, found)| Op::Crash(side, found)),
        3 => side().prop_map(Op::Fail),
        1 => side().prop_map(Op::Fence),
        1 => side().prop_map(Op::Abort),
        2 => side().prop_map(Op::Expire),
        1 => (side(), any::<u8>()).prop_map(|(side, found)| Op::PowerLoss(side, found)),
        8 => side().prop_map(Op::Restart),
        2 => (0..32u8).prop_map(Op::Pass),
        2 => Just(Op::Tick),
    ]
}

/// Long enough for most to come to the hand-off, and then the storm.
fn late(
    op: impl Strategy<Value = Op>,
    calm: std::ops::Range<usize>,
) -> impl Strategy<Value = Vec<Op>> {
    let step = any::<u8>().prop_map(Op::Step);
    let write = any::<u8>().prop_map(Op::Write);
    let calm = prop::collection::vec(prop_oneof![8 => step, 1 => write], calm);
    let later = prop::collection::vec(op, 0..120);
    (calm, later).prop_map(|(calm, later)| [calm, later].concat())
}

// clause: P-2
#[test]
fn no_schedule_with_faults_breaks_an_oracle_of_pages_that_follow() {
    for setup in setups() {
        let counts = simulate(setup, prop::collection::vec(op(), 0..500), |_| Ok(()));
        assert_reached(&counts, Side::Source, &[Phase::Freezing, Phase::Aborted]);
        assert_reached(&counts, Side::Target, &[Phase::Restoring, Phase::Aborted]);
    }
}

// clause: P-6
// clause: P-9
#[test]
fn no_storm_in_a_drain_breaks_an_oracle() {
    for setup in [SMALL_POSTCOPY, SMALL_HYBRID] {
        let counts = simulate(setup, late(follows(), 50..110), |_| Ok(()));
        let phases = [
            Phase::Committed,
            Phase::Draining,
            Phase::Reclaiming,
            Phase::Aborted,
            Phase::Done,
        ];
        assert_reached(&counts, Side::Source, &phases);
        let phases = [
            Phase::Ready,
            Phase::Running,
            Phase::Aborting,
            Phase::Aborted,
            Phase::Done,
        ];
        assert_reached(&counts, Side::Target, &phases);
    }
}

/// Nothing but a link that is lost, daemons that die, and time.
fn interruptions() -> impl Strategy<Value = Op> {
    prop_oneof![
        40 => any::<u8>().prop_map(Op::Step),
        8 => any::<u8>().prop_map(Op::Touch),
        4 => Just(Op::Break),
        2 => (side(), any::<u8>()).prop_map(|(side, found)| Op::Crash(side, found)),
        4 => side().prop_map(Op::Restart),
        2 => (0..32u8).prop_map(Op::Pass),
        2 => Just(Op::Tick),
    ]
}

// clause: P-8
// clause: P-5
#[test]
fn a_lost_link_and_dead_daemons_lose_no_workload() {
    for setup in [SMALL_POSTCOPY, SMALL_HYBRID] {
        let counts = simulate(setup, late(interruptions(), 50..110), |ran| {
            let drained = ran.seen.contains(&(Side::Source, Phase::Draining));
            match ran.survivor {
                Survivor::Target => Ok(()),
                Survivor::Source if !drained => Ok(()),
                Survivor::Source => Err("what has drained runs at the source"),
                Survivor::Nobody => Err("a lost link has lost the workload"),
            }
        });
        assert_reached(&counts, Side::Source, &[Phase::Draining, Phase::Done]);
    }
}

// clause: R-11
#[test]
fn without_a_fault_what_is_overdue_moves_as_its_policy_says() {
    let calm = || prop::collection::vec(any::<u8>().prop_map(Op::Step), 0..200);
    for (on_timeout, survivor) in [
        (OnTimeout::Cancel, Survivor::Source),
        (OnTimeout::Force, Survivor::Target),
        (OnTimeout::Postcopy, Survivor::Target),
    ] {
        let setup = Setup {
            policy: Policy {
                on_timeout,
                downtime_bound: Some(Duration::from_millis(1)),
                ..setup(Mode::Precopy).policy
            },
            ..POSTCOPY
        };
        simulate(setup, calm(), |ran| match ran.survivor == survivor {
            true => Ok(()),
            false => Err("it is not where the end of time has it"),
        });
    }
}

/// A workload that uses its memory while it follows.
fn touches() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => any::<u8>().prop_map(Op::Step),
        8 => any::<u8>().prop_map(Op::Touch),
        1 => Just(Op::Break),
    ]
}

/// How a schedule broke a rule: the first seed that shows it, and what the oracle said.
fn first_violation(setup: Setup) -> Option<(u64, Violation)> {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    for seed in 0..5000u64 {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let ops = match seed % 2 {
            0 => late(follows(), 50..110).boxed(),
            _ => late(touches(), 50..110).boxed(),
        };
        let ops = ops.new_tree(&mut runner).unwrap().current();
        if let Err(violation) = run(setup, &ops).map(drop) {
            return Some((seed, violation));
        }
    }
    None
}

#[test]
fn each_rule_that_is_broken_on_purpose_is_caught() {
    for (sabotage, said) in Sabotage::ALL {
        let base = match sabotage {
            // There is nothing outdated without rounds.
            Sabotage::KeepsOutdated => SMALL_HYBRID,
            // More of it is on its way at a time.
            Sabotage::OverwritesWritten => Setup {
                pages: 8,
                ..SMALL_POSTCOPY
            },
            _ => SMALL_POSTCOPY,
        };
        let broken = Setup {
            sabotage: Some(sabotage),
            ..base
        };
        let (seed, violation) = first_violation(broken).expect("a violation");
        println!("{sabotage:?}: seed {seed}: {}", violation.what);
        assert_eq!(
            violation.what, said,
            "{sabotage:?}, seed {seed}: {violation}"
        );
        // The same seeds break nothing that keeps its rules.
        let mut world = World::new(base);
        assert_eq!(world.settle(), Ok(Survivor::Target));
    }
}
