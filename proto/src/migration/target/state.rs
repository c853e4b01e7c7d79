//! The states of the target, in four groups, each state with the data that only it has.
//!
//! The group decides what an event means that has no place in a state, what a source is answered,
//! and most of what means the same in several states: a match names the few that it is about, and
//! groups for the rest.

use crate::id::{Generation, Round, WorkloadName};
use crate::migration::record::ReadyEntry;
use crate::migration::status::Phase;
use crate::wire::code::Failure;
use crate::wire::control::Final;

#[derive(Debug)]
pub(super) enum State {
    /// The source cannot have committed. Whatever goes wrong or is out of place ends the
    /// migration.
    Unready(Step),
    /// The workload is held, and the source says what becomes of it. Whatever is out of place is
    /// noted, and changes nothing.
    Held(Held),
    /// It is decided what becomes of this generation, and its source may ask.
    Decided(Generation, Fate),
    /// Nothing of a workload is to be here, and `Unknown` is the answer.
    Absent(Absent),
}

/// On the way to `Ready`.
#[derive(Debug)]
pub(super) enum Step {
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
}

/// The round whose parcels may arrive, and its number again once it has ended.
#[derive(Debug)]
pub(super) struct Receiving {
    pub(super) open: Round,
    pub(super) ended: Option<Round>,
}

/// Restored.
#[derive(Debug)]
pub(super) enum Held {
    /// That the workload is held is being written: for the first time, or again after a restart
    /// (`said`: then the source may know of it). What happens meanwhile is kept as a verdict.
    Readying {
        entry: ReadyEntry,
        said: bool,
        verdict: Verdict,
    },
    /// The workload is held.
    Ready { generation: Generation },
    /// It is to run, and its file locks on shared storage are being taken, for the so-manieth time.
    Locking {
        generation: Generation,
        tries: u32,
        why: Told,
    },
}

/// Why a held workload is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// The source has committed, and can have it back.
    Go,
    /// The source is dead: there is nobody to have it back.
    Fenced,
}

/// What follows when `Ready` is durable.
#[derive(Debug)]
pub(super) enum Verdict {
    Hold,
    Refuse(Failure),
    Run,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The workload runs, or is about to.
    Running(Run),
    /// The workload will never run here.
    Refusing(Refusal),
    /// The workload may have run, and is given up.
    Lost(Loss),
    /// The workload has run, and pages of it that were to follow are lost.
    Abandoned(Abandon),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    /// That the workload runs is being written.
    Recording {
        /// The memory is in place already.
        filled: bool,
    },
    /// The workload is being let go, for the so-manieth time.
    LettingGo { tries: u32, filled: bool },
    /// The workload runs.
    Filling,
    /// That what was at the source alone is here is being written: the source waits for it.
    Filled,
    /// That the memory is in place is being written.
    Closing,
    /// The workload runs here, and all its memory is in place.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abandon {
    /// That pages are lost is being written. What runs waits for them.
    Recording,
    /// It is being frozen for good, and then ended.
    Freezing,
    /// That nothing of it is left is being written.
    Closing,
    /// Nothing of it is left.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The refusal is being written.
    Recording,
    /// What was restored is being killed.
    Discarding,
    /// That nothing is left is being written.
    Closing,
    /// Nothing is left here.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// Letting go is given up: whether it runs is not known here.
    Stuck,
    /// The operator has given it up: what there may be of it is being killed.
    Burying,
    /// That it may have run and nothing of it is left is being written.
    Closing,
    /// It may have run, and nothing of it is left; `Unknown` is the answer.
    Closed,
}

/// Nothing came, or what came before `Ready` goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absent {
    /// Nothing is known of the migration.
    Idle,
    /// What came is being dropped. A source that `asked` is answered when nothing is left.
    Discarding { asked: Option<Generation> },
    /// That nothing is left is being written.
    Closing { asked: Option<Generation> },
    /// Nothing is left here.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// Try again what must succeed.
    Retry,
}

impl State {
    pub(super) const fn phase(&self) -> Phase {
        match self {
            Self::Unready(step) => step.phase(),
            Self::Held(Held::Readying { said: false, .. }) => Phase::Restoring,
            Self::Held(
                Held::Readying { said: true, .. } | Held::Ready { .. } | Held::Locking { .. },
            ) => Phase::Ready,
            Self::Decided(_, fate) => fate.phase(),
            Self::Absent(absent) => absent.phase(),
        }
    }

    /// Whether the workload is held, and only the source can say what becomes of it.
    pub(super) const fn is_ready(&self) -> bool {
        matches!(self, Self::Held(Held::Ready { .. }))
    }

    pub(super) const fn is_idle(&self) -> bool {
        matches!(self, Self::Absent(Absent::Idle))
    }

    pub(super) const fn is_closed(&self) -> bool {
        matches!(
            self,
            Self::Decided(
                _,
                Fate::Running(Run::Closed)
                    | Fate::Refusing(Refusal::Closed)
                    | Fate::Lost(Loss::Closed)
                    | Fate::Abandoned(Abandon::Closed)
            ) | Self::Absent(Absent::Closed)
        )
    }

    /// Whether what is to follow the workload need not be all here.
    pub(super) const fn lacks_pages(&self) -> bool {
        match self {
            Self::Unready(_) | Self::Absent(_) => false,
            Self::Held(_) => true,
            Self::Decided(_, Fate::Running(Run::Filled | Run::Closing | Run::Closed)) => false,
            Self::Decided(_, Fate::Running(_)) => true,
            Self::Decided(..) => false,
        }
    }

    /// The generation that is decided here, to run or never to.
    pub(super) const fn decided(&self) -> Option<Generation> {
        match self {
            Self::Decided(generation, _) => Some(*generation),
            Self::Unready(_) | Self::Held(_) | Self::Absent(_) => None,
        }
    }
}

impl Step {
    const fn phase(&self) -> Phase {
        match self {
            Self::Preparing { .. } | Self::Accepting => Phase::Accepted,
            Self::Receiving(_) | Self::Storing(_) => Phase::Receiving,
            Self::Restoring { .. } => Phase::Restoring,
        }
    }
}

impl Held {
    pub(super) const fn generation(&self) -> Generation {
        match self {
            Self::Readying { entry, .. } => entry.generation,
            Self::Ready { generation } | Self::Locking { generation, .. } => *generation,
        }
    }
}

impl Fate {
    const fn phase(self) -> Phase {
        match self {
            Self::Running(Run::Closing | Run::Closed) => Phase::Done,
            Self::Running(_) => Phase::Running,
            Self::Refusing(Refusal::Closing | Refusal::Closed) => Phase::Aborted,
            Self::Refusing(_) => Phase::Refusing,
            Self::Lost(Loss::Stuck) => Phase::Running,
            Self::Lost(Loss::Burying) => Phase::Aborting,
            Self::Lost(Loss::Closing | Loss::Closed) => Phase::Aborted,
            Self::Abandoned(Abandon::Recording | Abandon::Freezing) => Phase::Aborting,
            Self::Abandoned(Abandon::Closing | Abandon::Closed) => Phase::Aborted,
        }
    }

    /// Whether it has come true, so that the source may be told: the workload runs, or nothing of
    /// it is left here.
    pub(super) const fn is_known(self) -> bool {
        match self {
            Self::Running(run) => match run {
                Run::Recording { .. } | Run::LettingGo { .. } => false,
                Run::Filling | Run::Filled | Run::Closing | Run::Closed => true,
            },
            Self::Refusing(refusal) => match refusal {
                Refusal::Recording | Refusal::Discarding => false,
                Refusal::Closing | Refusal::Closed => true,
            },
            Self::Lost(loss) => match loss {
                Loss::Stuck | Loss::Burying => false,
                Loss::Closing | Loss::Closed => true,
            },
            // It has run, which is what the source is told.
            Self::Abandoned(_) => true,
        }
    }
}

impl Run {
    /// Whether all pages are here, and that is on disk.
    pub(super) const fn is_filled(self) -> bool {
        match self {
            Self::Recording { .. } | Self::LettingGo { .. } | Self::Filling | Self::Filled => false,
            Self::Closing | Self::Closed => true,
        }
    }
}

impl Abandon {
    /// Whether that pages are lost is on disk.
    pub(super) const fn is_recorded(self) -> bool {
        match self {
            Self::Recording => false,
            Self::Freezing | Self::Closing | Self::Closed => true,
        }
    }
}

impl Absent {
    const fn phase(self) -> Phase {
        match self {
            Self::Idle => Phase::Accepted,
            Self::Discarding { .. } | Self::Closing { .. } => Phase::Aborting,
            Self::Closed => Phase::Aborted,
        }
    }
}
