//! A crash of each side at every step of a migration, one after the other, and who then runs
//! the workload. Which side that must be follows from the hand-off alone: the target, if the
//! source's journal has a commit, and the source in every other case.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::{Mode, Policy};
use pageferry_proto::migration::source::UNLOCK_TRIES_MAX;
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_sim::{Op, Setup, Step, Survivor, World};

const SETUP: Setup = Setup {
    spaces: 2,
    pages: 4,
    policy: Policy {
        downtime_max: Duration::from_millis(60),
        rounds_max: 3,
        verify: true,
        ..Policy::DEFAULT
    },
    locks: 0,
    hold: false,
    drains: true,
    sabotage: None,
};

/// The same for a workload without locks, for one with, and for two that start with pages missing.
const SETUPS: [Setup; 4] = [
    SETUP,
    Setup { locks: 1, ..SETUP },
    follows(Mode::Postcopy),
    follows(Mode::Hybrid),
];

const fn follows(mode: Mode) -> Setup {
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

/// Far more steps than any of these runs has.
const STEPS_MAX: usize = 1000;

/// Every record that was not durable is found after the crash, or none is.
const FOUND: [u8; 2] = [0xff, 0];

/// How a run goes without faults.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// Nobody interferes.
    Success,
    /// The operator aborts at the source in this phase.
    Abort(Phase),
    /// The operator aborts at the target in this phase.
    AbortAtTarget(Phase),
}

/// A world on its way, and whether the plan's operator has interfered.
struct Run {
    world: World,
    interfered: bool,
}

impl Run {
    /// The first `steps` steps of a plan. None if it ends before.
    fn new(setup: Setup, plan: Plan, steps: usize) -> Option<Self> {
        let mut run = Self {
            world: World::new(setup),
            interfered: false,
        };
        for _ in 0..steps {
            run.step(plan)?;
        }
        Some(run)
    }

    /// Does the first possible step.
    fn step(&mut self, plan: Plan) -> Option<()> {
        let (side, phase) = match plan {
            Plan::Success => (Side::Source, None),
            Plan::Abort(phase) => (Side::Source, Some(phase)),
            Plan::AbortAtTarget(phase) => (Side::Target, Some(phase)),
        };
        let reached = phase.is_some() && self.phase(side) == phase;
        if reached && !std::mem::replace(&mut self.interfered, true) {
            self.world.apply(Op::Abort(side)).unwrap();
        }
        let next = *self.world.steps().first()?;
        // The workload goes on writing for as long as it runs.
        self.world.apply(Op::Write(5)).unwrap();
        self.world.take(next).unwrap();
        Some(())
    }

    fn phase(&self, side: Side) -> Option<Phase> {
        self.world.status(side).map(|status| status.phase)
    }

    /// Who must run the workload in the end if the connection breaks now, or the target crashes.
    fn survivor_of_a_break(&self) -> Survivor {
        match self.phase(Side::Source).unwrap() {
            // There is nothing to break yet: the target is back when it is dialled.
            Phase::Offered if !self.world.connected() && !self.interfered => Survivor::Target,
            // Before the commit the source breaks off.
            Phase::Offered
            | Phase::Copying
            | Phase::Freezing
            | Phase::Finishing
            | Phase::Reclaiming
            | Phase::Aborting
            | Phase::Aborted => Survivor::Source,
            // Afterwards it asks until the target answers.
            Phase::Prepared | Phase::Committed | Phase::Draining | Phase::Done => Survivor::Target,
            Phase::Accepted
            | Phase::Receiving
            | Phase::Restoring
            | Phase::Ready
            | Phase::Running
            | Phase::Refusing => unreachable!("phases of the target"),
        }
    }
}

/// Crashes `crashed` after every step of the plan; says how many steps it has at least.
fn check_every_crash(plan: Plan, crashed: Side) -> usize {
    let steps = SETUPS.map(|setup| check_every_crash_of(setup, plan, crashed));
    steps.into_iter().min().unwrap()
}

fn check_every_crash_of(setup: Setup, plan: Plan, crashed: Side) -> usize {
    for steps in 0..STEPS_MAX {
        for found in FOUND {
            let Some(mut run) = Run::new(setup, plan, steps) else {
                return steps;
            };
            let named = match crashed {
                Side::Target => run.survivor_of_a_break(),
                Side::Source => Survivor::Nobody,
            };
            run.world.apply(Op::Crash(crashed, found)).unwrap();
            let named = match crashed {
                Side::Target => named,
                // What its journal says is all there is.
                Side::Source if run.world.commit_found() => Survivor::Target,
                Side::Source => Survivor::Source,
            };
            let survivor = run.world.settle().unwrap();
            if run.interfered && named == Survivor::Target {
                // An abort that came too late to be certain: one of the two, by refusal.
                assert_ne!(survivor, Survivor::Nobody, "{plan:?}, step {steps}");
            } else {
                assert_eq!(survivor, named, "{plan:?}, step {steps}, found {found:#x}");
            }
        }
    }
    panic!("the run does not end");
}

// clause: J-3
#[test]
fn a_crashed_source_is_survived_by_whom_its_journal_names() {
    assert!(60 < check_every_crash(Plan::Success, Side::Source));
}

#[test]
fn a_crashed_target_is_survived_by_whom_the_source_names() {
    assert!(60 < check_every_crash(Plan::Success, Side::Target));
}

// clause: H-8
#[test]
fn an_abort_before_the_commit_survives_every_crash() {
    for phase in [
        Phase::Offered,
        Phase::Copying,
        Phase::Freezing,
        Phase::Finishing,
    ] {
        for crashed in [Side::Source, Side::Target] {
            check_every_crash(Plan::Abort(phase), crashed);
        }
    }
}

#[test]
fn an_abort_that_comes_with_the_commit_survives_every_crash() {
    for phase in [Phase::Prepared, Phase::Committed] {
        for crashed in [Side::Source, Side::Target] {
            check_every_crash(Plan::Abort(phase), crashed);
        }
    }
}

// clause: H-9
#[test]
fn an_abort_at_the_target_survives_every_crash() {
    for phase in [Phase::Receiving, Phase::Restoring, Phase::Ready] {
        for crashed in [Side::Source, Side::Target] {
            check_every_crash(Plan::AbortAtTarget(phase), crashed);
        }
    }
}

// clause: H-18
#[test]
fn what_the_target_lost_before_it_ran_is_survived_by_the_source() {
    let sides = [None, Some(Side::Source), Some(Side::Target)];
    for (setup, crashed) in SETUPS.into_iter().flat_map(|s| sides.map(|side| (s, side))) {
        let (mut dropped, mut decided) = (0, 0);
        for steps in 0..STEPS_MAX {
            let Some(mut run) = Run::new(setup, Plan::Success, steps) else {
                break;
            };
            decided += u32::from(run.phase(Side::Target) == Some(Phase::Running));
            run.world.apply(Op::DropHeld).unwrap();
            if !run.world.held_dropped() {
                continue;
            }
            dropped += 1;
            if let Some(side) = crashed {
                run.world.apply(Op::Crash(side, 0)).unwrap();
            }
            let survivor = run.world.settle();
            assert_eq!(survivor, Ok(Survivor::Source), "step {steps}");
        }
        // It is lost before and after `Go` was heard.
        assert!(6 < dropped && 1 < decided, "{dropped} {decided}");
    }
}

// clause: H-20
#[test]
fn a_target_that_lost_its_power_comes_to_its_end_wherever_that_was() {
    SETUPS.into_iter().for_each(a_target_loses_its_power);
}

fn a_target_loses_its_power(setup: Setup) {
    let (mut kept, mut lost) = (0, 0);
    for steps in 0..STEPS_MAX {
        for found in FOUND {
            let Some(mut run) = Run::new(setup, Plan::Success, steps) else {
                assert!(60 < kept && 2 < lost, "{kept} {lost}");
                return;
            };
            run.world.apply(Op::PowerLoss(Side::Target, found)).unwrap();
            match run.world.settle().unwrap() {
                Survivor::Source => kept += 1,
                Survivor::Nobody => lost += 1,
                // It had no power yet to lose.
                Survivor::Target => assert!(!run.world.held_dropped()),
            }
        }
    }
    panic!("the run does not end");
}

/// Lets the target alone come to its end, and then removes what it need not keep.
fn expire_target(world: &mut World) {
    let is_target = |step: &Step| {
        matches!(
            step,
            Step::Begin(Side::Target) | Step::Advance(Side::Target, _) | Step::Notice(Side::Target)
        )
    };
    while let Some(step) = world.steps().into_iter().find(is_target) {
        world.take(step).unwrap();
    }
    world.apply(Op::Expire(Side::Target)).unwrap();
}

// clause: J-7
#[test]
fn an_answer_that_was_lost_is_given_again_after_the_journal_is_removed() {
    let plans = [
        (Plan::Success, Survivor::Target),
        (Plan::AbortAtTarget(Phase::Ready), Survivor::Source),
        (Plan::Abort(Phase::Prepared), Survivor::Source),
    ];
    for (plan, named) in plans {
        let mut lost = 0;
        for steps in 0..STEPS_MAX {
            let Some(mut run) = Run::new(SETUPS[1], plan, steps) else {
                break;
            };
            run.world.apply(Op::Break).unwrap();
            expire_target(&mut run.world);
            let ended = run.phase(Side::Target).is_some_and(Phase::is_final);
            if run.phase(Side::Source) != Some(Phase::Committed) || !ended {
                continue;
            }
            lost += 1;
            assert_eq!(run.world.settle(), Ok(named), "{plan:?}, step {steps}");
        }
        assert!(0 < lost, "{plan:?}");
    }
}

#[test]
fn a_break_is_survived_by_whom_a_crash_of_the_target_is() {
    for setup in SETUPS {
        for steps in 0..STEPS_MAX {
            let Some(mut run) = Run::new(setup, Plan::Success, steps) else {
                break;
            };
            let named = run.survivor_of_a_break();
            run.world.apply(Op::Break).unwrap();
            assert_eq!(run.world.settle(), Ok(named), "step {steps}");
        }
    }
}

/// Lets another take the lock after every step, where nobody has it, and says in how many runs the
/// workload came back to the source, and in how many it moved.
fn check_every_taking(crashed: Option<Side>, given_back: bool) -> [u32; 2] {
    let mut survived = [0, 0];
    for steps in 0..STEPS_MAX {
        let Some(mut run) = Run::new(SETUPS[1], Plan::Success, steps) else {
            return survived;
        };
        run.world.apply(Op::TakeLock).unwrap();
        if !run.world.lock_is_taken() {
            continue;
        }
        if let Some(side) = crashed {
            run.world.apply(Op::Crash(side, 0)).unwrap();
            run.world.apply(Op::Restart(side)).unwrap();
        }
        if given_back {
            run.world.apply(Op::GiveLock).unwrap();
        }
        // As long as the target tries.
        let mut turns = 0;
        let is_open = |phase| matches!(phase, Phase::Prepared | Phase::Committed);
        while run.phase(Side::Source).is_some_and(is_open) && turns < STEPS_MAX {
            turns += 1;
            if run.step(Plan::Success).is_none() {
                run.world.apply(Op::Tick).unwrap();
            }
        }
        if run.world.lock_is_taken() {
            // The source waits for it, and nothing runs without.
            run.world.apply(Op::Tick).unwrap();
            assert_eq!(run.world.survivor(), Survivor::Nobody, "step {steps}");
            let failure = run.world.status(Side::Source).unwrap().failure.unwrap();
            assert_eq!(failure.code(), ErrorCode::LockTaken, "step {steps}");
        }
        match run.world.settle().unwrap() {
            Survivor::Source => survived[0] += 1,
            Survivor::Target => survived[1] += 1,
            Survivor::Nobody => panic!("it runs nowhere, step {steps}"),
        }
    }
    panic!("the run does not end");
}

// clause: H-23
// clause: H-24
#[test]
fn a_workload_whose_lock_another_took_comes_back_when_it_is_given_back() {
    for crashed in [None, Some(Side::Source), Some(Side::Target)] {
        let [came_back, moved] = check_every_taking(crashed, false);
        assert!(
            1 < came_back && moved == 0,
            "{crashed:?}: {came_back} {moved}"
        );
    }
    // Who only looks whether it can have it disturbs nobody.
    let [came_back, moved] = check_every_taking(None, true);
    assert!(came_back == 0 && 1 < moved, "{came_back} {moved}");
}

/// Has a process of the frozen copy die after every step, and letting go fail for long; says in how
/// many runs it did.
fn check_every_death(setup: Setup, crashed: bool) -> u32 {
    let mut died = 0;
    for steps in 0..STEPS_MAX {
        let Some(mut run) = Run::new(setup, Plan::Success, steps) else {
            return died;
        };
        run.world.apply(Op::DropCopy).unwrap();
        if !run.world.copy_is_maimed() || run.phase(Side::Source) != Some(Phase::Committed) {
            continue;
        }
        died += 1;
        if crashed {
            run.world.apply(Op::Crash(Side::Source, 0xff)).unwrap();
            run.world.apply(Op::Restart(Side::Source)).unwrap();
        }
        for _ in 0..8 * UNLOCK_TRIES_MAX {
            // Only what follows the commit.
            if run.phase(Side::Source) == Some(Phase::Committed) {
                run.world.apply(Op::Fail(Side::Source)).unwrap();
            }
            if run.step(Plan::Success).is_none() {
                run.world.apply(Op::Tick).unwrap();
            }
        }
        assert_eq!(run.world.settle(), Ok(Survivor::Target), "step {steps}");
    }
    panic!("the run does not end");
}

// clause: H-22
#[test]
fn a_copy_of_which_a_process_died_is_not_asked_back() {
    for locks in [1, 2] {
        let setup = Setup { locks, ..SETUP };
        assert!(2 < check_every_death(setup, false));
        assert!(2 < check_every_death(setup, true));
    }
}

// clause: H-24
#[test]
fn a_copy_that_comes_back_in_part_is_said_to_be_lost() {
    let mut lost = 0;
    for steps in 0..STEPS_MAX {
        let Some(mut run) = Run::new(SETUPS[1], Plan::AbortAtTarget(Phase::Ready), steps) else {
            break;
        };
        run.world.apply(Op::DropCopy).unwrap();
        if run.world.copy_is_maimed() && run.world.settle() == Ok(Survivor::Nobody) {
            let status = run.world.status(Side::Source).unwrap();
            assert_eq!(status.phase, Phase::Aborted, "step {steps}");
            assert_eq!(status.failure.unwrap().code(), ErrorCode::WorkloadGone);
            lost += 1;
        }
    }
    assert!(0 < lost);
}

#[test]
fn without_faults_the_workload_moves_and_its_memory_is_the_same() {
    for setup in SETUPS {
        let mut world = World::new(setup);
        assert_eq!(world.settle(), Ok(Survivor::Target));
        let source = world.status(Side::Source).unwrap();
        assert_eq!((source.phase, source.failure), (Phase::Done, None));
        assert!(source.parts.downtime().is_some());
        let target = world.status(Side::Target).unwrap();
        assert_eq!((target.phase, target.failure), (Phase::Done, None));
        // Nothing of it need be kept.
        assert!(!target.unsettled);
    }
}
