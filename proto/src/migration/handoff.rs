//! The point of no return, as types and as what a journal proves.
//!
//! One side runs the workload, never both. The rule that gives this is short: **a workload may
//! be thawed at the source only with a `ThawPermit`**, and a permit comes from one of three
//! proofs:
//!
//! - `Undecided`: no `Commit` was ever given to the journal, so the target was never told to
//!   go and never will be. Writing the commit consumes this value.
//! - a refusal by the target, durable there before it was sent, and recorded here;
//! - a fence: the operator's word that the target is dead, recorded here.
//!
//! Of a workload that starts with pages missing the copy is frozen for good once the target has
//! said that it runs, until all of them are there or lost: after that neither proof counts any
//! more.
//!
//! The target's rule mirrors it: `Running` is durable before the workload is let go, `Refused`
//! before it is sent, and after `Refused` there is no `Running`. The other order needs proof that
//! nothing ran: the restore has died, and its pager or the pager's watcher has seen to it that
//! nothing is left of it.
//!
//! **Why a recovered machine writes its last decisive record again.** A record that is read
//! after a restart need not be durable: it may sit in the page cache of a kernel whose fsync
//! failed or never came. Acting on it and losing it afterwards is how two copies come to run.
//! So nobody acts on what was read, only on what was then written.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::id::Generation;
use crate::migration::record::{AcceptedEntry, Entry, OfferedEntry, ReadyEntry, Record};
use crate::wire::code::{ErrorCode, Failure};

/// How long the source waits for an answer before it asks again. Several round trips of any
/// link that a migration makes sense on; the control stream is reliable, so this only matters
/// to a target that could not answer yet.
pub const RESEND: Duration = Duration::from_millis(500);

/// How long the source waits before it dials again. The workload is frozen meanwhile, so this
/// is short; one dial in half a second is no load.
pub const REDIAL: Duration = Duration::from_millis(500);

/// How long either side waits before it tries again what must succeed: a record, a thaw, a
/// release, a start.
pub const RETRY: Duration = Duration::from_secs(1);

/// How long the source tries to tell the target that a migration is aborted, or settled. Long
/// enough for a node to boot; after that the operator frees what the target may still hold.
pub const TELL_MAX: Duration = Duration::from_secs(600);

/// One of the two nodes of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Where the workload comes from.
    Source,
    /// Where it goes.
    Target,
}

/// A text that names no side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither source nor target")]
pub struct UnknownSide(pub String);

/// Proof that no commit was ever written. Exists once per migration; not copyable.
#[derive(Debug)]
pub(crate) struct Undecided(());

/// Why a committed workload may come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// The operator declared the target dead.
    Fenced(Generation),
    /// The target refused durably, for this reason.
    Refused(Generation, Failure),
}

/// Permission to let the workload run at the source.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThawPermit(());

/// What a source asks a target about a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Run it.
    Go,
    /// Say whether you do; if not, never do.
    Query,
}

/// Why records do not make a machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// There is no record that a migration begins with. Whatever there is was written without
    /// it being durable, hence before anything that counts: the migration never was.
    #[error("journal has no beginning of this migration")]
    NoBeginning,
    /// Two records that no machine writes.
    #[error("journal has both {0} and {1}")]
    Contradiction(&'static str, &'static str),
    /// A record of the other role.
    #[error("journal of the {role} has the record {entry}")]
    Role {
        /// The role that was to be recovered.
        role: Side,
        /// The record's name.
        entry: &'static str,
    },
}

/// What the journal of a source proves.
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceFacts {
    pub(crate) offered: Option<OfferedEntry>,
    pub(crate) commit: Option<Generation>,
    /// Pages of what was committed are in the frozen copy alone.
    pub(crate) drains: bool,
    pub(crate) started: bool,
    pub(crate) filled: bool,
    pub(crate) fenced: bool,
    pub(crate) aborted: Option<Failure>,
    pub(crate) done: bool,
}

/// What the journal of a target proves.
#[derive(Clone, Debug, Default)]
pub(crate) struct TargetFacts {
    pub(crate) accepted: Option<AcceptedEntry>,
    pub(crate) ready: Option<ReadyEntry>,
    pub(crate) running: Option<Generation>,
    pub(crate) filled: bool,
    pub(crate) refused: Option<Generation>,
    pub(crate) settled: Option<Generation>,
    pub(crate) aborted: Option<Failure>,
    pub(crate) done: bool,
}

impl Side {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Side {
    type Err = UnknownSide;

    fn from_str(text: &str) -> Result<Self, UnknownSide> {
        match text {
            "source" => Ok(Self::Source),
            "target" => Ok(Self::Target),
            _ => Err(UnknownSide(text.to_owned())),
        }
    }
}

impl Undecided {
    /// For a migration that begins, or one whose journal has no commit.
    pub(crate) const fn without_commit() -> Self {
        Self(())
    }

    /// The record after which only evidence gives a permit.
    pub(crate) fn commit(self, generation: Generation, drains: bool) -> Entry {
        Entry::Commit { generation, drains }
    }

    pub(crate) const fn permit(&self) -> ThawPermit {
        ThawPermit(())
    }
}

impl Evidence {
    /// A refusal, with what the target says of its reason.
    pub(crate) fn refused(generation: Generation, reason: Option<Failure>) -> Self {
        let text = "the target refused to run the workload";
        let failure = match reason {
            // Its own record of that means that the workload has run, and is never thawed.
            Some(reason) if is_lost_in_drain(&reason) => {
                Failure::new(ErrorCode::Refused, format!("{text}: {}", reason.text()))
            }
            Some(reason) => Failure::new(reason.code(), format!("{text}: {}", reason.text())),
            None => Failure::new(ErrorCode::Refused, text),
        };
        Self::Refused(generation, failure)
    }

    /// The record that must be durable before the evidence counts.
    pub(crate) fn entry(&self) -> Entry {
        match self {
            Self::Fenced(generation) => Entry::Fenced {
                generation: *generation,
            },
            Self::Refused(..) => Entry::Aborted(self.failure()),
        }
    }

    /// What to tell the operator.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Fenced(_) => {
                Failure::new(ErrorCode::Fenced, "the operator declared the target dead")
            }
            Self::Refused(_, failure) => failure.clone(),
        }
    }

    /// A permit, if `journalled` is the record of this evidence.
    pub(crate) fn permit(&self, journalled: &Entry) -> Option<ThawPermit> {
        (self.entry() == *journalled).then_some(ThawPermit(()))
    }
}

impl SourceFacts {
    /// Whether the target has run the workload. That need not be on record by itself: what came of
    /// it says as much.
    pub(crate) fn has_started(&self) -> bool {
        let is_lost = self.aborted.as_ref().is_some_and(is_lost_in_drain);
        self.started || (self.drains && (self.filled || is_lost))
    }

    pub(crate) fn from_records(records: &[Record]) -> Result<Self, RecoverError> {
        let mut facts = Self::default();
        for record in records {
            match &record.entry {
                Entry::Offered(offered) => facts.offered = Some(offered.clone()),
                Entry::Commit { generation, drains } => {
                    facts.commit = Some(*generation);
                    facts.drains = *drains;
                }
                Entry::Started { .. } => facts.started = true,
                Entry::Filled { .. } => facts.filled = true,
                Entry::Fenced { .. } => facts.fenced = true,
                Entry::Aborted(failure) => facts.aborted = Some(failure.clone()),
                Entry::Done => facts.done = true,
                entry @ (Entry::Accepted(_)
                | Entry::Ready(_)
                | Entry::Running { .. }
                | Entry::Refused { .. }
                | Entry::Settled { .. }) => {
                    return Err(RecoverError::Role {
                        role: Side::Source,
                        entry: entry.name(),
                    });
                }
            }
        }
        match (&facts.started, &facts.aborted, facts.fenced) {
            (true, _, true) => Err(RecoverError::Contradiction("started", "fenced")),
            (true, Some(_), _) if facts.filled => {
                Err(RecoverError::Contradiction("filled", "aborted"))
            }
            // What had started was lost before all of it was there.
            (true, Some(failure), false) if facts.drains && is_lost_in_drain(failure) => Ok(facts),
            (true, Some(_), _) => Err(RecoverError::Contradiction("started", "aborted")),
            (true, None, false) | (false, _, _) => Ok(facts),
        }
    }
}

/// Whether this is why a workload ended that ran with pages missing.
pub(crate) fn is_lost_in_drain(failure: &Failure) -> bool {
    failure.code() == ErrorCode::LostInDrain
}

/// The reason of such an end, from what was lost.
pub(crate) fn lost_in_drain(lost: &Failure) -> Failure {
    if is_lost_in_drain(lost) {
        return lost.clone();
    }
    let text = format!("pages of the workload, which ran at the target, are lost: {lost}");
    Failure::new(ErrorCode::LostInDrain, text)
}

impl TargetFacts {
    pub(crate) fn from_records(records: &[Record]) -> Result<Self, RecoverError> {
        let mut facts = Self::default();
        for record in records {
            match &record.entry {
                Entry::Accepted(accepted) => facts.accepted = Some(accepted.clone()),
                Entry::Ready(ready) => facts.ready = Some(ready.clone()),
                Entry::Running { .. } if facts.refused.is_some() => {
                    return Err(RecoverError::Contradiction("refused", "running"));
                }
                Entry::Running { generation } => facts.running = Some(*generation),
                Entry::Filled { .. } => facts.filled = true,
                // After `Running`: what was to run never did (H-18).
                Entry::Refused { generation } => {
                    facts.running = None;
                    facts.refused = Some(*generation);
                }
                Entry::Settled { generation } => facts.settled = Some(*generation),
                Entry::Aborted(failure) => facts.aborted = Some(failure.clone()),
                Entry::Done => facts.done = true,
                entry @ (Entry::Offered(_)
                | Entry::Commit { .. }
                | Entry::Started { .. }
                | Entry::Fenced { .. }) => {
                    return Err(RecoverError::Role {
                        role: Side::Target,
                        entry: entry.name(),
                    });
                }
            }
        }
        Ok(facts)
    }
}
