//! The states of the source, in three groups, each state with the data that only it has.
//!
//! The group decides what an event means that has no place in a state, and most of what means the
//! same in several: a match names the few states that it is about, and groups for the rest.

use std::time::Duration;

use crate::id::Round;
use crate::migration::handoff::{Evidence, Question, ThawPermit, Undecided};
use crate::migration::policy::RoundReport;
use crate::migration::status::Phase;
use crate::wire::code::Failure;

#[derive(Debug)]
pub(super) enum State {
    /// No commit was handed to the journal, of which this is the proof. Whatever goes wrong or is
    /// out of place breaks the migration off.
    Undecided(Undecided, Step),
    /// The target may run the workload, or it is known who does. Whatever is out of place is
    /// noted, and changes nothing.
    Decided(Decided),
    /// The migration was broken off, or the workload is where it belongs. What was undone may
    /// still report.
    Over(Over),
}

/// On the way to the commit.
#[derive(Debug)]
pub(super) enum Step {
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
    /// Another round would not help, and it is not to freeze yet; this one is next.
    Holding { next: Round },
    /// A freeze was given up: thawing, and waiting for what is on its way.
    Retrying(Retrying),
    /// The workload is being frozen for the final round.
    Freezing { round: Round },
    /// The final round, and waiting for the target.
    Finishing(Finishing),
}

/// From the commit on, until one copy is left and that is known.
#[derive(Debug)]
pub(super) enum Decided {
    /// The commit is being written. What happens meanwhile is kept for when its fate is known.
    Prepared {
        evidence: Option<Evidence>,
        question: Question,
    },
    /// The commit is durable: file locks on shared storage are being let go, for the so-manieth
    /// time, so that the target can take them. It has not been told to go.
    Unlocking { tries: u32 },
    /// The target may run the workload.
    Committed { question: Question },
    /// The target runs it, and lacks pages that only the copy here has.
    Draining(Drain),
    /// The target runs it, or nobody does any more: the copy here goes.
    Releasing { outcome: Outcome, step: Release },
    /// The target will never run it: the copy here comes back.
    Reclaiming { evidence: Evidence, step: Reclaim },
}

/// What remains to be done when nothing remains to be decided.
#[derive(Debug)]
pub(super) enum Over {
    /// No commit was written: the copy here comes back.
    Aborting(Undo),
    /// Failed, the workload runs here; the target has still to be told.
    Telling,
    /// How it ended is on disk; the target has still to be told that it may forget.
    Settling { outcome: Outcome },
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

/// A copy that is kept for what the target lacks.
#[derive(Debug)]
pub(super) struct Drain {
    /// A restart would find that the target runs the workload.
    pub(super) recorded: bool,
    /// What of the copy may be lost.
    pub(super) lost: Option<Failure>,
}

#[derive(Debug)]
pub(super) enum Release {
    /// That the target runs the workload, or has all pages, or that it is lost, is being written.
    Recording,
    /// The frozen copy is being killed.
    Killing {
        /// A restart would find that.
        recorded: bool,
    },
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
    /// The pause before the next round is over: after a freeze that was given up, or of one that is
    /// held.
    Pause,
    /// Ask or tell again.
    Resend,
    /// Dial again.
    Redial,
    /// Try again what must succeed.
    Retry,
    /// The target has not answered for long.
    Silence,
    /// The target could not be told, or did not answer, for long.
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

    /// Whether the target is ready, and CRIU was told the truth about the mappings.
    pub(super) const fn is_complete(&self) -> bool {
        self.ready && self.smaps_equal
    }
}

impl State {
    pub(super) const fn phase(&self) -> Phase {
        match self {
            Self::Undecided(_, step) => step.phase(),
            Self::Decided(decided) => decided.phase(),
            Self::Over(over) => over.phase(),
        }
    }

    pub(super) const fn is_draining(&self) -> bool {
        matches!(self, Self::Decided(Decided::Draining(_)))
    }

    pub(super) const fn is_closed(&self) -> bool {
        matches!(self, Self::Over(Over::Closed { .. }))
    }

    /// Where it is on the way to the commit, if that was not handed to the journal.
    pub(super) const fn step(&mut self) -> Option<&mut Step> {
        match self {
            Self::Undecided(_, step) => Some(step),
            Self::Decided(_) | Self::Over(_) => None,
        }
    }
}

impl Step {
    const fn phase(&self) -> Phase {
        match self {
            Self::Journalling | Self::Dialling | Self::Offered | Self::Tracking => Phase::Offered,
            Self::Copying(_) | Self::Holding { .. } | Self::Retrying(_) => Phase::Copying,
            Self::Freezing { .. } => Phase::Freezing,
            Self::Finishing(_) => Phase::Finishing,
        }
    }
}

impl Decided {
    /// The commit is being written, for the first time or once more.
    pub(super) const fn prepared() -> Self {
        Self::Prepared {
            evidence: None,
            question: Question::Go,
        }
    }

    const fn phase(&self) -> Phase {
        match self {
            Self::Prepared { .. } => Phase::Prepared,
            Self::Unlocking { .. } | Self::Committed { .. } => Phase::Committed,
            Self::Draining(_) => Phase::Draining,
            Self::Releasing {
                outcome: Outcome::Moved,
                ..
            } => Phase::Committed,
            Self::Releasing {
                outcome: Outcome::Aborted,
                ..
            } => Phase::Aborting,
            Self::Reclaiming { .. } => Phase::Reclaiming,
        }
    }
}

impl Over {
    const fn phase(&self) -> Phase {
        match self {
            Self::Aborting(_) => Phase::Aborting,
            Self::Telling => Phase::Aborted,
            Self::Settling { outcome } | Self::Closing { outcome } | Self::Closed { outcome } => {
                match outcome {
                    Outcome::Aborted => Phase::Aborted,
                    Outcome::Moved => Phase::Done,
                }
            }
        }
    }
}
