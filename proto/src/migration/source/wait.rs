//! The bound of a freeze, and what a workload that stands still waits for, so that a freeze that
//! took too long names it.

use std::time::Duration;

use super::state::{State, Step, Timer};
use super::{SourceAction, SourceMachine};
use crate::id::Round;
use crate::migration::status::Edges;
use crate::migration::timer::Time;
use crate::wire::code::ErrorCode;

/// Something that the end of a freeze depends on. Several may be waited for at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// CRIU is being started; the workload still runs.
    Prepared,
    /// The ports of its network are being closed.
    Ports,
    /// Its cgroup is being frozen, before or after the dump.
    Cgroup,
    /// What is dirty is being looked for.
    Scan,
    /// CRIU dumps it.
    Dump,
    /// Pages are read, or wait until the target takes them.
    Pages,
    /// Live sets wait until the target takes them.
    LiveSets,
    /// Live pages are hashed, or their digests wait until the target takes them.
    Digests,
    /// Images wait until the target takes them.
    Images,
    /// What has changed in folders that travel is looked for, or waits until the target takes it.
    Files,
    /// What it wrote to shared storage is made durable.
    Storage,
    /// What CRIU was shown is compared with the truth.
    Smaps,
    /// The target has not yet said that it has all of the final round.
    Held,
    /// The target has not yet said that it has restored.
    Ready,
}

/// A wait, and for how long it has lasted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What is waited for.
    pub what: Wait,
    /// Since when.
    pub duration: Duration,
}

impl Wait {
    /// What is waited for, as it stands behind "waiting for".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepared => "CRIU to get ready",
            Self::Ports => "its ports to close",
            Self::Cgroup => "its cgroup to freeze",
            Self::Scan => "the final scan",
            Self::Dump => "CRIU's dump",
            Self::Pages => "the target to take the last pages",
            Self::LiveSets => "the target to take the live sets",
            Self::Digests => "digests of all pages, and the target to take them",
            Self::Images => "the target to take CRIU's images",
            Self::Files => "what has changed in its folders, and the target to take it",
            Self::Storage => "shared storage to answer",
            Self::Smaps => "the comparison of the mappings",
            Self::Held => "the target to acknowledge the final round",
            Self::Ready => "the target's restore",
        }
    }
}

impl SourceMachine {
    pub(super) fn freeze(&mut self, now: Time, round: Round) {
        let frozen_max = self.convergence.frozen_max(&self.policy);
        if let Some(predicted) = self.convergence.predicted_freeze()
            && frozen_max < predicted
        {
            let text = format!(
                "a freeze is predicted to take {predicted:.1?}, and {frozen_max:.1?} are allowed"
            );
            return self.abort_with(ErrorCode::FrozenTooLong, &text);
        }
        let Some(step) = self.state.step() else {
            return self.out_of_place("a freeze");
        };
        *step = Step::Freezing { round };
        self.frozen_max = Some(frozen_max);
        self.waiting.clear();
        self.round = Some(round);
        self.edges = Edges {
            requested: Some(now),
            ..Edges::default()
        };
        self.timers.stop(Timer::Overall);
        self.timers.set(Timer::Frozen, now.after(frozen_max));
        self.actions.push_back(SourceAction::Freeze { round });
    }

    /// The bound ends with the commit being handed to the journal: this timer was stopped then.
    pub(super) fn frozen_too_long(&mut self, now: Time) {
        let mut waiting = std::mem::take(&mut self.waiting);
        if let State::Undecided(_, Step::Finishing(finishing)) = &self.state
            && let Some(sent) = self.edges.sent
            && !finishing.ready
        {
            let (what, since) = match self.edges.held {
                None => (Wait::Held, sent),
                Some(held) => (Wait::Ready, held),
            };
            let duration = now.since(since);
            waiting.push(Waiting { what, duration });
        }
        let stood = now.since(self.edges.requested.unwrap_or(now));
        let mut text = format!("the freeze was given up after {:.1} s", stood.as_secs_f64());
        if !waiting.is_empty() {
            text += &format!(", waiting for {}", list(waiting));
        }
        self.abort_with(ErrorCode::FrozenTooLong, &text);
    }
}

/// All of it in one line, the longest first.
fn list(mut waiting: Vec<Waiting>) -> String {
    waiting.sort_by_key(|wait| (std::cmp::Reverse(wait.duration), wait.what));
    let named = waiting.iter().map(|wait| {
        let seconds = wait.duration.as_secs_f64();
        format!("{} ({seconds:.1} s)", wait.what.name())
    });
    named.collect::<Vec<_>>().join(" and ")
}
