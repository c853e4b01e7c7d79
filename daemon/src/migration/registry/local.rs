//! Which process of this node a migration is about. The name of a workload is the source's: here a
//! process of that number may be another one.

use pageferry_proto::id::WorkloadName;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::{Departing, Registry};
use crate::migration::progress::Progress;
use crate::runtime::identity;

/// The root of the workload in this node's pid namespace, if it is or was one of its processes:
/// that of one that leaves is known from the beginning.
pub(super) fn root(departing: Option<&Departing>, progress: &Progress) -> Option<i32> {
    // Nothing of one that comes is here before it is restored.
    departing.map_or(progress.pid_at_target, |departing| Some(departing.root))
}

/// Whether the trees below two processes have something in common.
pub(super) fn overlap(one: i32, other: i32) -> bool {
    one == other
        || identity::ancestors(one).contains(&other)
        || identity::ancestors(other).contains(&one)
}

impl Registry {
    /// Of a workload that is not here: where it has gone, as far as this node remembers.
    pub(super) fn say_where(&self, workload: &WorkloadName, failure: Failure) -> Failure {
        if failure.code() != ErrorCode::WorkloadGone {
            return failure;
        }
        let moved = self.list().into_iter().find(|known| {
            known.status.role == Side::Source
                && known.status.phase == Phase::Done
                && known.status.workload.as_ref() == Some(workload)
        });
        let Some(moved) = moved else { return failure };
        let (peer, id) = (&moved.status.peer, moved.status.id);
        let name = match (workload, moved.pid_at_target) {
            (WorkloadName::Process(_), Some(pid)) => format!("process/{pid}"),
            // Kubernetes has made another one there.
            (WorkloadName::Pod(_), Some(_)) => format!("another pod (migration {id})"),
            // A container keeps its name.
            (_, Some(_)) => workload.to_string(),
            (_, None) => format!("listed by `pageferry list` (migration {id})"),
        };
        Failure::new(
            failure.code(),
            format!("{workload} has moved to node {peer}: there it is {name}"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::clock::Clock;
    use pageferry_proto::id::{Incarnation, MigrationId};
    use pageferry_proto::migration::target::{TargetMachine, TargetOrigin};

    #[test]
    fn what_comes_here_is_named_by_its_pid_here_and_not_by_the_one_it_had() {
        let now = Clock::start().now();
        let origin = TargetOrigin {
            id: MigrationId::new([1; 16]),
            peer: "a".parse().unwrap(),
            incarnation: Incarnation(1),
        };
        let mut progress = Progress::of(TargetMachine::new(origin, now).status(now));
        progress.status.workload = Some(WorkloadName::Process(4711));
        assert_eq!(root(None, &progress), None);
        progress.pid_at_target = Some(12);
        assert_eq!(root(None, &progress), Some(12));
    }

    #[test]
    fn a_tree_overlaps_with_what_it_is_a_part_of() {
        let own = i32::try_from(std::process::id()).unwrap();
        let parent = identity::ancestors(own)[0];
        assert!(overlap(own, own) && overlap(own, parent) && overlap(parent, own));
        assert!(!overlap(own, i32::MAX));
    }
}
