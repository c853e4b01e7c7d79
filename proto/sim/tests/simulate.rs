//! Random schedules with random faults, judged by the oracles of `pageferry_sim`.

#![allow(clippy::unwrap_used)]

mod harness;

use std::cell::RefCell;
use std::collections::BTreeMap;

use harness::*;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::source::RETRIES_MAX;
use pageferry_proto::migration::status::Phase;
use pageferry_sim::{Op, Setup, Strayed, Survivor};
use proptest::prelude::*;

/// The same for a workload with a file lock that others want, too.
const LOCKED: Setup = Setup { locks: 1, ..SMALL };

/// One that is held before its freeze.
const HELD: Setup = Setup {
    hold: true,
    ..SETUP
};

/// With two, of which others want both before they give one back.
const LOCKED_TWICE: Setup = Setup { locks: 2, ..SMALL };

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
