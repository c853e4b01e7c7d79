//! A bare tree at its target: what it needs is there, and nothing of its names is taken.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::Path;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_sys::namespace::NamespaceKind;

use super::describe::wire_kind;
use crate::runtime::{cpu, files, mounts, shared};

/// A tree that comes.
#[derive(Clone, Copy, Debug)]
pub struct Arriving {
    /// Its pids are the node's.
    shares_pids: bool,
}

impl Arriving {
    /// Lets this node's pids begin above its own: where a workload has left this node, its numbers
    /// are the next ones. To be called before threads are started for it.
    pub fn begin(description: &WorkloadDescription) -> Self {
        begin_pids_above(&description.pids);
        Self {
            shares_pids: !description.own_namespaces.contains(Namespaces::PID),
        }
    }

    /// Compares what it needs with this node. Blocks; asks about files, whose storage may not
    /// answer.
    pub fn check(self, description: &WorkloadDescription) -> Result<(), Failure> {
        let own_mounts = description.own_namespaces.contains(Namespaces::MNT);
        if own_mounts == description.mounts.is_empty() {
            return Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                "the offer does not say which mounts the workload has",
            ));
        }
        if let Some(source) = &description.cpu {
            cpu::read().check(source)?;
        }
        mounts::check(&description.mounts)?;
        shared::check_all(description)?;
        files::check_all(description)?;
        check_folder(description)?;
        // Empty with a pid namespace of its own.
        check_pids(&description.pids)
    }

    /// Namespaces that are made for it before it is restored. CRIU makes the others with the tree:
    /// a pid namespace lives by its process 1, and the objects of an IPC namespace are in the
    /// images.
    pub fn namespaces(self, description: &WorkloadDescription) -> Vec<NamespaceKind> {
        let mut kinds = kinds(description.own_namespaces);
        kinds.retain(|kind| matches!(kind, NamespaceKind::Uts | NamespaceKind::Net));
        kinds
    }

    /// Checks once more, when its tasks are known for good: it may have forked since it was
    /// offered.
    pub fn check_tasks(self, tasks: &[i32]) -> Result<(), Failure> {
        if self.shares_pids {
            check_pids(tasks)?;
            begin_pids_above(tasks);
        }
        Ok(())
    }
}

/// CRIU opens the working directory of the root again, in the freeze.
fn check_folder(description: &WorkloadDescription) -> Result<(), Failure> {
    let mut copied = description.copied.iter();
    if copied.any(|copied| Path::new(&description.cwd).starts_with(&copied.path)) {
        return Ok(());
    }
    // Among mounts of its own it is where those say.
    if description.own_namespaces.contains(Namespaces::MNT) || Path::new(&description.cwd).is_dir()
    {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::FileDiffers,
        format!(
            "the working directory {} is missing at the target",
            description.cwd
        ),
    ))
}

/// Refuses a tree whose pids or thread ids are in use at this node.
fn check_pids(pids: &[i32]) -> Result<(), Failure> {
    for pid in pids {
        // Threads have a directory too, though it is not listed.
        if Path::new(&format!("/proc/{pid}")).exists() {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return Err(Failure::new(
                ErrorCode::PidTaken,
                format!(
                    "pid {pid} is taken at the target by {}: give the workload its own pid \
                     namespace, or free the pid",
                    name.trim_end()
                ),
            ));
        }
    }
    Ok(())
}

/// Lets pids of processes that are born at this node from now on begin well above those of the
/// tree.
///
/// CRIU restores what processes share from the one with the least pid. For an epoll descriptor that
/// must be the process that made it: a child may have given its numbers to other files since (Redis
/// does so while it saves), and its restore fails. At a node whose pids are still below those of a
/// workload that came, all later children would be such.
///
/// Well above, because the tree goes on forking at the source: a thread that this node starts
/// meanwhile must not take the number of a child that is still to come.
fn begin_pids_above(pids: &[i32]) {
    if let Err(error) = try_begin_pids_above(pids) {
        tracing::warn!(%error, "new pids may be below the workload's");
    }
}

fn try_begin_pids_above(pids: &[i32]) -> io::Result<()> {
    let Some(highest) = pids.iter().max() else {
        return Ok(());
    };
    let read = |path| -> io::Result<i32> {
        let text = fs::read_to_string(path)?;
        text.trim().parse().map_err(io::Error::other)
    };
    let (last, pid_max) = (read(LAST_PID)?, read(PID_MAX)?);
    // Seeded anew each time.
    let chance = RandomState::new().build_hasher().finish();
    match next_pid(*highest, last, pid_max, chance) {
        Some(next) => fs::write(LAST_PID, next.to_string()),
        None => Ok(()),
    }
}

/// Where pids are to go on that have come to `last`, if that is not far enough above `highest`. Not
/// at the same distance each time: two nodes between which a tree goes there and back would hand
/// out the same numbers from then on, and whoever is born at one would be in the way at the other.
fn next_pid(highest: i32, last: i32, pid_max: i32, chance: u64) -> Option<i32> {
    let room = pid_max / PID_ROOM_SHARE;
    let half = room / 2;
    let spread = chance % u64::from(half.max(1).unsigned_abs());
    let next = highest + room + i32::try_from(spread).unwrap_or_default();
    // Near the end the numbers begin anew, and whatever is chosen is soon below.
    (last < highest + half && next < pid_max).then_some(next)
}

/// Which part of all pids is left free above those of a tree: 65 536 of the 4 194 304 that systemd
/// allows, 512 of the kernel's 32 768.
const PID_ROOM_SHARE: i32 = 64;

/// One more than the highest pid of this pid namespace.
const PID_MAX: &str = "/proc/sys/kernel/pid_max";

/// The pid of the newest process of this pid namespace; the next one gets the next free one.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// The kinds in the wire's set, in the order in which they are entered.
fn kinds(own: Namespaces) -> Vec<NamespaceKind> {
    NamespaceKind::ALL
        .into_iter()
        .filter(|kind| own.contains(wire_kind(*kind)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_go_on_above_a_tree_and_elsewhere_at_each_node() {
        let pid_max = 4 << 20;
        let next = |highest, last, chance| next_pid(highest, last, pid_max, chance);
        assert_eq!(next(10_000, 200_000, 7), None);
        // Both nodes of a tree that came back.
        let (there, back) = (next(100_141, 300, 7), next(100_141, 300, 31_999));
        assert_eq!((there, back), (Some(165_684), Some(197_676)));
        // The spread is less than half of the room, whatever the chance.
        assert_eq!(
            next(100_141, 300, u64::MAX),
            Some(100_141 + 65_536 + 32_767)
        );
        assert_eq!(next(pid_max - 65_537, 300, 1), None);
        assert_eq!(next_pid(500, 400, 32_768, u64::MAX), Some(500 + 512 + 255));
    }
}
