//! The tasks of a workload, and which of them share an address space.
//!
//! The tree is read from `/proc/PID/task/TID/children`. While it runs, that is a moment's picture:
//! a child that is forked during the reading may be missed, and is found by the next reading. Of a
//! frozen tree it is exact.
//!
//! Threads of a process always share its memory. Processes may share memory too (`CLONE_VM`, and
//! `vfork` until the child executes): only the kernel can tell, by `kcmp`.

use std::cmp::Ordering;
use std::fs;
use std::io;

use pageferry_proto::id::{IdError, MemberIndex, SpaceId};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_sys::ptrace::{self, Shared};
use thiserror::Error;

use super::task::{self, Status};

/// A process of the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its pid, as this node's daemon sees it.
    pub pid: i32,
    /// Its parent's; 0 for the root.
    pub parent: i32,
    /// Its pid in the pid namespace of the root, which is what CRIU names it by.
    pub vpid: i32,
    /// Its threads, the first one included.
    pub threads: Vec<i32>,
    /// It has ended and waits for its parent: it has no memory.
    pub zombie: bool,
}

/// One address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceTasks {
    /// The vpid of its leader, and whose that is.
    pub id: SpaceId,
    /// Pid of the first process, in the order of the tree, that has it.
    pub leader: i32,
    /// The other processes that have it.
    pub sharers: Vec<i32>,
}

/// All processes of a workload, parents before children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The processes; the root first.
    pub tasks: Vec<Task>,
    /// Their address spaces, in the order of their leaders.
    pub spaces: Vec<SpaceTasks>,
}

/// Why a tree could not be read.
#[derive(Debug, Error)]
pub enum TreeError {
    /// The root has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The root.
        pid: i32,
    },
    /// The first thread of a process has ended before the others: CRIU cannot dump that.
    #[error("the first thread of process {pid} has ended, others run on")]
    HeadlessProcess {
        /// The process.
        pid: i32,
    },
    /// A task's place in `/proc` could not be read.
    #[error("cannot read the {what} of task {tid}")]
    Inspect {
        /// The task.
        tid: i32,
        /// Which file.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two tasks could not be compared.
    #[error("cannot tell whether processes {a} and {b} share memory")]
    Compare {
        /// One process.
        a: i32,
        /// The other.
        b: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process whose number is larger than any of a kernel's.
    #[error("the address space of process {vpid} cannot be numbered")]
    Number {
        /// The number, in the pid namespace of the root.
        vpid: u32,
        /// Why.
        #[source]
        source: IdError,
    },
    /// More processes than are moved.
    #[error("the workload has more than {TASKS_MAX} processes")]
    TooManyTasks,
}

impl TreeError {
    /// What to tell the peer and the operator.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Gone { .. } => ErrorCode::WorkloadGone,
            Self::HeadlessProcess { .. } => ErrorCode::UnsupportedWorkload,
            Self::TooManyTasks | Self::Number { .. } => ErrorCode::Limit,
            Self::Inspect { .. } | Self::Compare { .. } => ErrorCode::Untrackable,
        }
    }
}

impl Tree {
    /// Reads the tree of process `root`.
    pub fn read(root: i32) -> Result<Self, TreeError> {
        let depth = match Status::read(root) {
            Ok(status) if !status.has_ended() => status.ids.len().saturating_sub(1),
            Ok(_) | Err(_) => return Err(TreeError::Gone { pid: root }),
        };
        let mut tasks = Vec::new();
        let mut todo = vec![(root, 0)];
        while let Some((pid, parent)) = todo.pop() {
            let Some((task, children)) = read_task(pid, parent, depth)? else {
                continue;
            };
            tasks.push(task);
            // Reversed, since the last one pushed is the next one read.
            todo.extend(children.into_iter().rev().map(|child| (child, pid)));
            if TASKS_MAX < tasks.len() + todo.len() {
                return Err(TreeError::TooManyTasks);
            }
        }
        if tasks.is_empty() {
            return Err(TreeError::Gone { pid: root });
        }
        let spaces = group(&tasks)?;
        Ok(Self { tasks, spaces })
    }

    /// The same, as that of a member of a party: its spaces say so.
    pub fn of_member(mut self, member: MemberIndex) -> Result<Self, TreeError> {
        for space in &mut self.spaces {
            let vpid = space.id.0;
            let id = SpaceId::of(member, vpid);
            space.id = id.map_err(|source| TreeError::Number { vpid, source })?;
        }
        Ok(self)
    }

    /// The pids of all processes.
    pub fn pids(&self) -> Vec<i32> {
        self.tasks.iter().map(|task| task.pid).collect()
    }
}

/// One task with its children; `None` when it has ended since it was listed.
fn read_task(pid: i32, parent: i32, depth: usize) -> Result<Option<(Task, Vec<i32>)>, TreeError> {
    let Some(status) = found(pid, "status", Status::read(pid))? else {
        return Ok(None);
    };
    let Some(threads) = found(pid, "threads", task::threads(pid))? else {
        return Ok(None);
    };
    let zombie = status.has_ended();
    if zombie && 1 < threads.len() {
        return Err(TreeError::HeadlessProcess { pid });
    }
    let mut children = Vec::new();
    for &tid in &threads {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children"));
        let text = found(tid, "children", text)?.unwrap_or_default();
        children.extend(
            text.split_ascii_whitespace()
                .filter_map(|child| child.parse::<i32>().ok()),
        );
    }
    // A task below a deeper pid namespace has more ids, never fewer.
    let vpid = status.ids.get(depth).copied().unwrap_or(pid);
    Ok(Some((
        Task {
            pid,
            parent,
            vpid,
            threads,
            zombie,
        },
        children,
    )))
}

/// `None` for a task that is not there any more.
fn found<T>(tid: i32, what: &'static str, result: io::Result<T>) -> Result<Option<T>, TreeError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(source) => Err(TreeError::Inspect { tid, what, source }),
    }
}

fn group(tasks: &[Task]) -> Result<Vec<SpaceTasks>, TreeError> {
    // Sorted by the kernel's order of address spaces, each with the places of its tasks in the
    // tree.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (place, task) in tasks.iter().enumerate().filter(|(_, task)| !task.zombie) {
        let mut failed = None;
        let found = groups.binary_search_by(|group| {
            let (a, b) = (tasks[group[0]].pid, task.pid);
            ptrace::compare(a, b, Shared::Memory).unwrap_or_else(|source| {
                // A task that has ended since shares nothing; where it is put does not matter.
                if source.raw_os_error() != Some(libc::ESRCH) {
                    failed = Some(TreeError::Compare { a, b, source });
                }
                Ordering::Less
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        match found {
            Ok(group) => groups[group].push(place),
            Err(group) => groups.insert(group, vec![place]),
        }
    }
    groups.sort_unstable();
    let space = |group: &Vec<usize>| {
        let leader = &tasks[group[0]];
        SpaceTasks {
            id: SpaceId(leader.vpid.cast_unsigned()),
            leader: leader.pid,
            sharers: group[1..].iter().map(|&place| tasks[place].pid).collect(),
        }
    };
    Ok(groups.iter().map(space).collect())
}

/// Most processes of one workload: each needs a descriptor, a store and a stop of its own.
pub const TASKS_MAX: usize = 4096;
