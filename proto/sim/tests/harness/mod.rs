//! Schedules, and how they are run and judged.

#![allow(dead_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::status::Phase;
use pageferry_sim::{Op, Setup, Strayed, Survivor, Violation, World};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Schedules per test. At about 1 ms each this is a few seconds on one slow core; set
/// PROPTEST_CASES for more, and SIMULATE_SEED for others.
pub const CASES: u32 = 3000;

pub const SETUP: Setup = Setup {
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
    drains: true,
    sabotage: None,
};

/// As few steps to the hand-off as there can be.
pub const SMALL: Setup = Setup {
    spaces: 1,
    pages: 1,
    ..SETUP
};

pub fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Source), Just(Side::Target)]
}

/// All of a migration, with a fault now and then.
pub fn op() -> impl Strategy<Value = Op> {
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
        10 => any::<u8>().prop_map(Op::Touch),
    ]
}

/// Many faults at once.
pub fn storm() -> impl Strategy<Value = Op> {
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
        8 => any::<u8>().prop_map(Op::Touch),
    ]
}

pub fn after_calm(op: impl Strategy<Value = Op>) -> impl Strategy<Value = Vec<Op>> {
    let calm = prop::collection::vec(any::<u8>().prop_map(Op::Step), 30..90);
    let later = prop::collection::vec(op, 0..80);
    (calm, later).prop_map(|(calm, later)| [calm, later].concat())
}

/// How a schedule ended.
pub struct Ran {
    pub survivor: Survivor,
    pub seen: Seen,
    pub strayed: Option<Strayed>,
}

pub fn run(setup: Setup, ops: &[Op]) -> Result<Ran, Violation> {
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
pub type Seen = BTreeSet<(Side, Phase)>;

/// Runs the schedules, and says in how many of them each phase was seen. Each must end as `judge`
/// wants it.
pub fn simulate(
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
pub fn assert_reached(counts: &BTreeMap<(Side, Phase), u32>, side: Side, phases: &[Phase]) {
    for &phase in phases {
        let count = counts.get(&(side, phase)).copied().unwrap_or_default();
        assert!(
            CASES / 100 <= count,
            "{side} was {phase} in {count} runs of {counts:?}"
        );
    }
}
