//! The states of the target, each with the data that only it has.

use crate::id::{Generation, Round, WorkloadName};
use crate::migration::record::ReadyEntry;
use crate::migration::status::Phase;
use crate::wire::code::Failure;
use crate::wire::control::Final;

#[derive(Debug)]
pub(super) enum State {
    /// Nothing is known of the migration.
    Idle,
    /// An offer is being compared and prepared for.
    Preparing { workload: WorkloadName },
    /// The acceptance is being written.
    Accepting,
    /// Rounds arrive.
    Receiving(Receiving),
    /// The final round arrives.
    Storing(Final),
    /// CRIU restores.
    Restoring { generation: Generation },
    /// That the workload is held is being written: for the first time, or again after a restart
    /// (`said`: then the source may know of it). What happens meanwhile is kept as a verdict.
    Readying {
        entry: ReadyEntry,
        said: bool,
        verdict: Verdict,
    },
    /// The workload is held.
    Ready { generation: Generation },
    /// The workload runs, or is about to.
    Running(Running),
    /// The workload will never run here.
    Refusing(Refusing),
    /// Nothing is left here, and `Refused` is the answer.
    Refused { generation: Generation },
    /// Before `Ready`: undoing.
    Aborting(Aborting),
    /// Nothing is left here, and `Unknown` is the answer.
    Aborted,
    /// The workload runs here, and all its memory is in place.
    Done { generation: Generation },
}

/// The round whose parcels may arrive, and its number again once it has ended.
#[derive(Debug)]
pub(super) struct Receiving {
    pub(super) open: Round,
    pub(super) ended: Option<Round>,
}

/// What follows when `Ready` is durable.
#[derive(Debug)]
pub(super) enum Verdict {
    Hold,
    Refuse(Failure),
    Run,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) generation: Generation,
    pub(super) step: Start,
    /// The memory is in place, as far as reported before the workload was.
    pub(super) filled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// That the workload runs is being written.
    Recording,
    /// The workload is being let go, for the so-manieth time.
    LettingGo { tries: u32 },
    /// The workload runs.
    Filling,
    /// That the memory is in place is being written.
    Closing,
    /// Letting go is given up: whether it runs is not known here.
    Stuck,
    /// The operator has given it up: what there may be of it is being killed.
    Burying,
    /// That it may have run and nothing of it is left is being written.
    Losing,
    /// It may have run, and nothing of it is left; `Unknown` is the answer.
    Lost,
}

#[derive(Debug)]
pub(super) struct Refusing {
    pub(super) generation: Generation,
    pub(super) step: Refusal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The refusal is being written.
    Recording,
    /// What was restored is being killed.
    Discarding,
    /// That nothing is left is being written.
    Closing,
}

#[derive(Debug)]
pub(super) struct Aborting {
    /// The source asked, and is answered when nothing is left.
    pub(super) asked: Option<Generation>,
    /// That nothing is left is being written.
    pub(super) discarded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// Try again what must succeed.
    Retry,
}

impl State {
    pub(super) const fn phase(&self) -> Phase {
        match self {
            Self::Idle | Self::Preparing { .. } | Self::Accepting => Phase::Accepted,
            Self::Receiving(_) | Self::Storing(_) => Phase::Receiving,
            Self::Restoring { .. } | Self::Readying { said: false, .. } => Phase::Restoring,
            Self::Readying { said: true, .. } | Self::Ready { .. } => Phase::Ready,
            Self::Running(running) => match running.step {
                Start::Recording | Start::LettingGo { .. } | Start::Filling | Start::Stuck => {
                    Phase::Running
                }
                Start::Closing => Phase::Done,
                Start::Burying => Phase::Aborting,
                Start::Losing | Start::Lost => Phase::Aborted,
            },
            Self::Refusing(refusing) => match refusing.step {
                Refusal::Recording | Refusal::Discarding => Phase::Refusing,
                Refusal::Closing => Phase::Aborted,
            },
            Self::Refused { .. } | Self::Aborted => Phase::Aborted,
            Self::Aborting(_) => Phase::Aborting,
            Self::Done { .. } => Phase::Done,
        }
    }

    /// Whether the workload is held, and only the source can say what becomes of it.
    pub(super) const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready { .. })
    }

    pub(super) const fn is_idle(&self) -> bool {
        matches!(self, Self::Idle)
    }

    pub(super) const fn is_closed(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Aborted | Self::Done { .. } => true,
            Self::Running(running) => matches!(running.step, Start::Lost),
            Self::Idle
            | Self::Preparing { .. }
            | Self::Accepting
            | Self::Receiving(_)
            | Self::Storing(_)
            | Self::Restoring { .. }
            | Self::Readying { .. }
            | Self::Ready { .. }
            | Self::Refusing(_)
            | Self::Aborting(_) => false,
        }
    }

    /// The generation that is decided here, to run or never to.
    pub(super) const fn decided(&self) -> Option<Generation> {
        match self {
            Self::Running(running) => Some(running.generation),
            Self::Refusing(refusing) => Some(refusing.generation),
            Self::Refused { generation } | Self::Done { generation } => Some(*generation),
            Self::Idle
            | Self::Preparing { .. }
            | Self::Accepting
            | Self::Receiving(_)
            | Self::Storing(_)
            | Self::Restoring { .. }
            | Self::Readying { .. }
            | Self::Ready { .. }
            | Self::Aborting(_)
            | Self::Aborted => None,
        }
    }

    pub(super) const fn place(&self) -> Place {
        match self {
            Self::Idle => Place::Nowhere,
            Self::Preparing { .. }
            | Self::Accepting
            | Self::Receiving(_)
            | Self::Storing(_)
            | Self::Restoring { .. } => Place::Unready,
            Self::Running(Running {
                step: Start::Losing | Start::Lost,
                ..
            }) => Place::Over,
            Self::Readying { .. } | Self::Ready { .. } | Self::Running(_) => Place::Decisive,
            Self::Refusing(_)
            | Self::Refused { .. }
            | Self::Aborting(_)
            | Self::Aborted
            | Self::Done { .. } => Place::Over,
        }
    }
}

/// Where a state lies in the life of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is no migration.
    Nowhere,
    /// Whatever is out of place ends the migration: the source cannot have committed.
    Unready,
    /// Whatever is out of place is noted, and changes nothing.
    Decisive,
    /// What was begun has been undone or is complete, and may still report.
    Over,
}
