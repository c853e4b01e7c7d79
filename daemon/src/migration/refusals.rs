//! Attempts that were refused before they began: nothing is on disk of them, and nothing was
//! touched.
//!
//! Kept in memory, the last few of them, so that whoever looks later sees that there was one.

use std::collections::VecDeque;
use std::time::SystemTime;

use pageferry_proto::id::{NodeName, WorkloadName};
use pageferry_proto::wire::code::Failure;

/// Refused attempts that are remembered.
pub const REFUSALS_MAX: usize = 20;

/// An attempt that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// When.
    pub at: SystemTime,
    /// What was to move.
    pub workload: WorkloadName,
    /// Where to.
    pub target: NodeName,
    /// Why it does not.
    pub failure: Failure,
}

/// The last refused attempts.
#[derive(Debug, Default)]
pub struct Refusals {
    newest_first: VecDeque<Refusal>,
}

impl Refusals {
    /// Remembers one, and forgets the oldest if there are too many.
    pub fn add(&mut self, refusal: Refusal) {
        self.newest_first.truncate(REFUSALS_MAX - 1);
        self.newest_first.push_front(refusal);
    }

    /// All of them, the newest first.
    pub fn list(&self) -> Vec<Refusal> {
        self.newest_first.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_proto::wire::code::ErrorCode;

    #[test]
    fn the_last_refusals_are_remembered_newest_first() {
        let mut refusals = Refusals::default();
        let pids = 1..=25;
        for pid in pids {
            refusals.add(Refusal {
                at: SystemTime::UNIX_EPOCH,
                workload: WorkloadName::Process(pid),
                target: "b".parse().unwrap(),
                failure: Failure::new(ErrorCode::StdioUnfit, "a terminal"),
            });
        }
        let kept = refusals.list();
        assert_eq!(kept.len(), REFUSALS_MAX);
        assert_eq!(kept[0].workload, WorkloadName::Process(25));
    }
}
