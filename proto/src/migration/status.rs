//! What a machine says of itself: for the API, the command line and metrics.
//!
//! A status is a value. Its generation grows by one with every report, so a watcher asks for
//! "newer than N" and misses nothing that matters.

use std::fmt;
use std::time::Duration;

use crate::id::{MigrationId, NodeName, Round, WorkloadName};
use crate::migration::handoff::Side;
use crate::migration::timer::Time;
use crate::page::PageCount;
use crate::wire::code::Failure;

/// A migration as one of its two nodes sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Grows by one with every report of this machine, from 1.
    pub generation: u64,
    /// The migration.
    pub id: MigrationId,
    /// What moves. Unknown at a target that has had no offer.
    pub workload: Option<WorkloadName>,
    /// Which of the two nodes this is.
    pub role: Side,
    /// Where it stands.
    pub phase: Phase,
    /// The other node.
    pub peer: NodeName,
    /// The round that is or was being sent.
    pub round: Option<Round>,
    /// Freezes that were given up so far.
    pub retries: u32,
    /// The workload's memory, in bytes.
    pub memory_bytes: u64,
    /// Bytes of pages sent so far, before compression.
    pub sent_bytes: u64,
    /// Bytes on the wire so far.
    pub wire_bytes: u64,
    /// Pages the workload dirtied per second in the last round.
    pub dirty_pages_per_second: Option<u64>,
    /// The downtime if the workload were frozen now.
    pub predicted_downtime: Option<Duration>,
    /// How long the workload may stand still before the commit: of the present freeze or the last
    /// one, or what was asked for. Unknown at a target.
    pub frozen_max: Option<Duration>,
    /// The downtime, cut into consecutive parts.
    pub parts: Parts,
    /// From the first event to the end, or to now.
    pub elapsed: Duration,
    /// Why the migration failed, or the last thing that went wrong in one that goes on.
    pub failure: Option<Failure>,
    /// The operator must say which side is dead, or bring the peer back: nothing else can
    /// decide any more.
    pub fence_wanted: bool,
    /// Target: the source may still ask how this ended, so the answer is kept.
    pub unsettled: bool,
    /// Source: another round would not help, and only somebody's word is waited for.
    pub holding: bool,
    /// The workload runs at the target, and pages of it are at the source alone: the loss of either
    /// node loses it.
    pub drains: bool,
}

impl Status {
    /// This status as the next report, unless it says nothing that the last one did not.
    pub(crate) fn news(mut self, reported: &mut Option<Self>) -> Option<Self> {
        if let Some(last) = reported {
            // That time passes is no news.
            let elapsed = std::mem::replace(&mut self.elapsed, last.elapsed);
            if self == *last {
                return None;
            }
            self.elapsed = elapsed;
        }
        self.generation += 1;
        *reported = Some(self.clone());
        Some(self)
    }
}

/// Where a migration stands. Names are the same in code, logs, metrics and the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Source: dialling, offering, attaching the tracker.
    Offered,
    /// Source: sending rounds, the workload runs.
    Copying,
    /// Source: stopping the workload.
    Freezing,
    /// Source: the final round, and waiting for the target to be ready.
    Finishing,
    /// Source: the decision is being written.
    Prepared,
    /// Source: the target may run the workload; waiting for it to say so.
    Committed,
    /// Source: the target runs it, and fetches the pages that it lacks.
    Draining,
    /// Source: the target will never run it; getting it back.
    Reclaiming,
    /// Target: preparing for an offer.
    Accepted,
    /// Target: taking in rounds.
    Receiving,
    /// Target: restoring.
    Restoring,
    /// Target: restored and held.
    Ready,
    /// Target: the workload runs, or is about to; its memory is being filled.
    Running,
    /// Target: refusing, and killing what was restored.
    Refusing,
    /// Both: undoing.
    Aborting,
    /// Both: failed. The workload runs on at the source, unless the failure says otherwise.
    Aborted,
    /// Both: the workload has moved.
    Done,
}

/// The downtime in consecutive intervals of the source's clock. They add up to
/// [`Parts::downtime`]; work that goes on at the same time is shown inside its interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// From the freeze being requested to all tasks being frozen.
    pub freeze: Option<Duration>,
    /// To the last parcel and image being acknowledged.
    pub final_round: Option<Duration>,
    /// To the target being ready.
    pub restore: Option<Duration>,
    /// To the commit being durable.
    pub commit: Option<Duration>,
    /// To the workload running at the target.
    pub handoff: Option<Duration>,
}

/// When the edges between the parts were.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Edges {
    pub(crate) requested: Option<Time>,
    pub(crate) frozen: Option<Time>,
    /// Everything of the final round is sent. No edge: the target's answer is.
    pub(crate) sent: Option<Time>,
    pub(crate) held: Option<Time>,
    pub(crate) ready: Option<Time>,
    pub(crate) committed: Option<Time>,
    pub(crate) started: Option<Time>,
}

/// What a machine counts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) memory: PageCount,
    pub(crate) sent_bytes: u64,
    pub(crate) wire_bytes: u64,
}

impl Phase {
    /// Its name, kebab-case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::Copying => "copying",
            Self::Freezing => "freezing",
            Self::Finishing => "finishing",
            Self::Prepared => "prepared",
            Self::Committed => "committed",
            Self::Draining => "draining",
            Self::Reclaiming => "reclaiming",
            Self::Accepted => "accepted",
            Self::Receiving => "receiving",
            Self::Restoring => "restoring",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Refusing => "refusing",
            Self::Aborting => "aborting",
            Self::Aborted => "aborted",
            Self::Done => "done",
        }
    }

    /// Whether the outcome is known and final. A machine may still have something to tell its
    /// peer.
    pub const fn is_final(self) -> bool {
        match self {
            Self::Aborted | Self::Done => true,
            Self::Offered
            | Self::Copying
            | Self::Freezing
            | Self::Finishing
            | Self::Prepared
            | Self::Committed
            | Self::Draining
            | Self::Reclaiming
            | Self::Accepted
            | Self::Receiving
            | Self::Restoring
            | Self::Ready
            | Self::Running
            | Self::Refusing
            | Self::Aborting => false,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Parts {
    /// From the freeze being requested to the workload running at the target; none unless it
    /// does.
    pub fn downtime(&self) -> Option<Duration> {
        [
            self.freeze,
            self.final_round,
            self.restore,
            self.commit,
            self.handoff,
        ]
        .into_iter()
        .sum::<Option<Duration>>()
    }
}

impl Edges {
    pub(crate) fn parts(&self) -> Parts {
        let between = |from: Option<Time>, to: Option<Time>| Some(to?.since(from?));
        Parts {
            freeze: between(self.requested, self.frozen),
            final_round: between(self.frozen, self.held),
            restore: between(self.held, self.ready),
            commit: between(self.ready, self.committed),
            handoff: between(self.committed, self.started),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_add_up_to_the_downtime() {
        let at = |millis| Some(Time(Duration::from_millis(millis)));
        let mut edges = Edges {
            requested: at(100),
            frozen: at(103),
            sent: at(105),
            held: at(110),
            ready: at(130),
            committed: at(131),
            started: None,
        };
        assert_eq!(edges.parts().downtime(), None);
        edges.started = at(140);
        assert_eq!(edges.parts().restore, Some(Duration::from_millis(20)));
        assert_eq!(edges.parts().downtime(), Some(Duration::from_millis(40)));
    }
}
