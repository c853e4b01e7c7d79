//! Tasks that cannot be interrupted: the parent in a `vfork`, and one in uninterruptible sleep.
//!
//! The freezer counts a parent in `vfork` as frozen, but ptrace does not stop it: CRIU would wait
//! for it until its own time-out. A task in any other uninterruptible sleep does not freeze.

use std::collections::HashMap;
use std::fs;

use super::{Passing, State, name_of};

/// A thread of one of the processes that waits for a child of its `vfork`.
pub fn vfork(pids: &[i32]) -> Option<Passing> {
    let (pid, tid) = find(pids, |place, _, _| {
        VFORK.contains(&waits_in(place).as_str())
    })?;
    Some(Passing {
        state: State::Vfork,
        holder: thread_of(pid, tid),
    })
}

/// A thread of one of the processes in uninterruptible sleep. Of tasks that are not frozen: the
/// kernel shows a frozen one the same way.
pub fn uninterruptible(pids: &[i32]) -> Option<Passing> {
    Sleepers::default().look(pids)
}

/// Threads that are in uninterruptible sleep at every look, and always in the same.
///
/// A program that reads and writes files has some thread in such a sleep at most moments, each for
/// a moment, and freezes all the same: a thread freezes as it leaves the kernel.
#[derive(Debug, Default)]
pub struct Sleepers(Option<HashMap<i32, u64>>);

impl Sleepers {
    /// One of them that was there at this look and all before; or a thread in a `vfork`, which a
    /// freeze does not wait for, so that each counts.
    pub fn look(&mut self, pids: &[i32]) -> Option<Passing> {
        let (mut vfork, mut asleep) = (None, Vec::new());
        find(pids, |place, pid, tid| {
            if sleeps_uninterruptibly(place) {
                let waits = waits_in(place);
                if VFORK.contains(&waits.as_str()) {
                    vfork = vfork.or(Some((pid, tid)));
                } else {
                    asleep.push((pid, tid, switches(place), waits));
                }
            }
            // All are looked at.
            false
        });
        asleep.retain(|(_, tid, switches, _)| match &self.0 {
            Some(before) => before.get(tid) == Some(switches),
            None => true,
        });
        let now = asleep.iter().map(|(_, tid, switches, _)| (*tid, *switches));
        self.0 = Some(now.collect());
        if let Some((pid, tid)) = vfork {
            return Some(Passing {
                state: State::Vfork,
                holder: thread_of(pid, tid),
            });
        }
        let (pid, tid, _, place) = asleep.into_iter().next()?;
        let mut holder = thread_of(pid, tid);
        if place.len() > 1 {
            holder = format!("{holder}, in {place},");
        }
        Some(Passing {
            state: State::Uninterruptible,
            holder,
        })
    }
}

/// The first process and thread whose folder in `/proc` passes.
fn find(pids: &[i32], mut passes: impl FnMut(&str, i32, i32) -> bool) -> Option<(i32, i32)> {
    pids.iter().find_map(|&pid| {
        // One that has ended since has no threads.
        let entries = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        entries.flatten().find_map(|entry| {
            let tid = entry.file_name().to_str()?.parse().ok()?;
            passes(entry.path().to_str()?, pid, tid).then_some((pid, tid))
        })
    })
}

/// The function of the kernel in which a task waits; empty or `0` where nobody says.
fn waits_in(place: &str) -> String {
    let wchan = || fs::read_to_string(format!("{place}/wchan")).unwrap_or_default();
    let waits = wchan();
    if waits != "0" || !sleeps_uninterruptibly(place) {
        return waits;
    }
    // The scheduler may leave a task that has begun to sleep in its queue (since Linux 6.12), even
    // when it is frozen (6.14), and nobody is told where such a task waits. Whoever asks for its
    // system call has it taken out of the queue (`wait_task_inactive`).
    let _ = fs::read_to_string(format!("{place}/syscall"));
    wchan()
}

fn sleeps_uninterruptibly(place: &str) -> bool {
    let stat = fs::read_to_string(format!("{place}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('D'))
}

/// How often a task has gone to sleep: another number is another sleep.
fn switches(place: &str) -> u64 {
    let status = fs::read_to_string(format!("{place}/status")).unwrap_or_default();
    let mut lines = status.lines();
    let switches = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    switches.map_or(0, |number| number.trim().parse().unwrap_or(0))
}

fn thread_of(pid: i32, tid: i32) -> String {
    if pid == tid {
        name_of(pid)
    } else {
        format!("thread {tid} of {}", name_of(pid))
    }
}

/// Where a parent waits: the second is what the first is compiled into.
const VFORK: [&str; 2] = ["wait_for_vfork_done", "kernel_clone"];
