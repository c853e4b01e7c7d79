//! The states of the source, each with the data that only it has.

use std::time::Duration;

use crate::id::Round;
use crate::migration::handoff::{Evidence, Question, ThawPermit};
use crate::migration::policy::RoundReport;
use crate::migration::status::Phase;

#[derive(Debug)]
pub(super) enum State {
    /// The offer is being written to the journal.
    Journalling,
    /// The first connection is being made.
    Dialling,
    /// The target is preparing.
    Offered,
    /// The tracker is being attached.
    Tracking,
    /// A round is being sent.
    Copying(Copying),
    /// A freeze was given up: thawing, and waiting for what is on its way.
    Retrying(Retrying),
    /// The workload is being frozen for the final round.
    Freezing { round: Round },
    /// The final round, and waiting for the target.
    Finishing(Finishing),
    /// The commit is being written. What happens meanwhile is kept for when its fate is known.
    Prepared {
        evidence: Option<Evidence>,
        question: Question,
    },
    /// The target may run the workload.
    Committed { question: Question },
    /// The target runs it: the copy here goes.
    Releasing(Release),
    /// The target will never run it: the copy here comes back.
    Reclaiming { evidence: Evidence, step: Reclaim },
    /// No commit was written: the copy here comes back.
    Aborting(Undo),
    /// Failed, the workload runs here; the target has still to be told.
    Telling,
    /// The last record is being written.
    Closing { outcome: Outcome },
    /// Nothing is left to do.
    Closed { outcome: Outcome },
}

/// The round being sent, and what it was once it is sent.
#[derive(Debug)]
pub(super) struct Copying {
    pub(super) round: Round,
    pub(super) report: Option<RoundReport>,
}

/// What is still awaited before the round after `round` may start.
#[derive(Debug)]
pub(super) struct Retrying {
    pub(super) round: Round,
    /// How long the workload is to run before that.
    pub(super) pause: Duration,
    pub(super) thawed: bool,
    /// The pause, which begins with the thaw, is over.
    pub(super) rested: bool,
    pub(super) held: bool,
}

/// What is still awaited before the commit.
#[derive(Debug)]
pub(super) struct Finishing {
    pub(super) round: Round,
    pub(super) sent: bool,
    pub(super) ready: bool,
    pub(super) smaps_equal: bool,
}

#[derive(Debug)]
pub(super) enum Release {
    /// That the target runs the workload is being written.
    Recording,
    /// The frozen copy is being killed.
    Killing,
}

#[derive(Debug)]
pub(super) enum Reclaim {
    /// The evidence is being written.
    Recording,
    Thawing(ThawPermit),
    /// That the migration is aborted is being written.
    Concluding,
}

#[derive(Debug)]
pub(super) enum Undo {
    Thawing(ThawPermit),
    /// That the migration is aborted is being written.
    Recording,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Aborted,
    Moved,
}

/// What the source knows of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Down,
    Dialling,
    Up,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// The workload is not frozen in the time the policy allows.
    Overall,
    /// The present step takes too long.
    Step,
    /// The workload has stood still for as long as it may.
    Frozen,
    /// The pause after a freeze that was given up is over.
    Pause,
    /// Ask or tell again.
    Resend,
    /// Dial again.
    Redial,
    /// Try again what must succeed.
    Retry,
    /// The target has not answered for long.
    Silence,
    /// The target could not be told for long.
    Tell,
}

impl Finishing {
    pub(super) const fn new(round: Round) -> Self {
        Self {
            round,
            sent: false,
            ready: false,
            smaps_equal: false,
        }
    }
}

impl State {
    pub(super) const fn phase(&self) -> Phase {
        match self {
            Self::Journalling | Self::Dialling | Self::Offered | Self::Tracking => Phase::Offered,
            Self::Copying(_) | Self::Retrying(_) => Phase::Copying,
            Self::Freezing { .. } => Phase::Freezing,
            Self::Finishing(_) => Phase::Finishing,
            Self::Prepared { .. } => Phase::Prepared,
            Self::Committed { .. } | Self::Releasing(_) => Phase::Committed,
            Self::Reclaiming { .. } => Phase::Reclaiming,
            Self::Aborting(_) => Phase::Aborting,
            Self::Telling => Phase::Aborted,
            Self::Closing { outcome } | Self::Closed { outcome } => match outcome {
                Outcome::Aborted => Phase::Aborted,
                Outcome::Moved => Phase::Done,
            },
        }
    }

    pub(super) const fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// What an event means that has no place in this state.
    pub(super) const fn place(&self) -> Place {
        match self {
            Self::Journalling
            | Self::Dialling
            | Self::Offered
            | Self::Tracking
            | Self::Copying(_)
            | Self::Retrying(_)
            | Self::Freezing { .. }
            | Self::Finishing(_) => Place::Undecided,
            Self::Prepared { .. }
            | Self::Committed { .. }
            | Self::Releasing(_)
            | Self::Reclaiming { .. } => Place::Decided,
            Self::Aborting(_) | Self::Telling | Self::Closing { .. } | Self::Closed { .. } => {
                Place::Undone
            }
        }
    }
}

/// Where a state lies in the life of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Whatever is out of place breaks the migration off.
    Undecided,
    /// Whatever is out of place is noted, and changes nothing.
    Decided,
    /// What was begun has been undone, and may still report.
    Undone,
}
