//! The threads of a workload that a freezer holds: whether each is where it should be, and how to
//! let them go without failing the system calls they are in.
//!
//! A thread is *at rest* when it is within no system call that writes memory behind the page
//! tables. The freezer of cgroup v2 stops threads on their way to user mode alone, so all that it
//! has frozen are at rest. That of v1 also freezes some waits within system calls where they are
//! (`TASK_FREEZABLE`), among them those for an answer of an NFS or SMB server, which may come in
//! the middle of a direct read; and kernels from 6.7 on without a fix of July 2025 may let a thread
//! run on that they count as frozen. So of v1 each thread is looked at.
//!
//! Both freezers wake threads that sleep in a system call. Most calls are restarted by the kernel
//! when the thread is let go, but `epoll_wait`, `semop` and their like end with `EINTR`, though
//! nobody has sent a signal. [`Frozen::thaw`] has them restarted too.

use std::fs;
use std::io;

use pageferry_inject::restart;
use pageferry_sys::task;

use super::probe::calls::Place;
use super::refuse;
use super::{Support, TrackError};

/// Where a freezer stops threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stops {
    /// On their way to user mode: the freezer of cgroup v2.
    AtReturn,
    /// There, and in some waits within system calls: that of cgroup v1.
    InPlace,
}

/// What a look at all threads of a frozen workload found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// A thread that is not at rest.
    busy: Option<i32>,
    /// Threads whose call would fail.
    interrupted: Vec<i32>,
}

impl Frozen {
    /// Looks at all threads of these processes: 0.15 ms for 200 where the kernel's iterator can be
    /// used, else 15 us for each.
    pub fn look(pids: &[i32], support: &Support, stops: Stops) -> Result<Self, TrackError> {
        let mut frozen = Self::default();
        for &pid in pids {
            let looked = match frozen.look_at(pid, support, stops) {
                // It has ended since it was listed.
                Err(error) if task::tells_of_end(&error) || task::has_ended(pid) => continue,
                looked => looked,
            };
            looked.map_err(|source| TrackError::Inspect {
                pid,
                what: "the threads",
                source,
            })?;
        }
        Ok(frozen)
    }

    fn look_at(&mut self, pid: i32, support: &Support, stops: Stops) -> io::Result<()> {
        if let Some(probe) = &support.calls {
            match probe.of(pid) {
                Ok(places) => {
                    places.iter().for_each(|place| self.note(place, stops));
                    return Ok(());
                }
                Err(error) => tracing::debug!(pid, %error, "no threads of the iterator"),
            }
        }
        for tid in task::threads(pid)? {
            let found = Told::read(tid).map(|told| told.map(|told| self.note_told(&told, stops)));
            match found {
                Err(error) if !task::tells_of_end(&error) => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// A thread of which the kernel's iterator tells.
    fn note(&mut self, place: &Place, stops: Stops) {
        if place.ended {
            return;
        }
        let is_frozen = place.state & FROZEN != 0;
        let within = READS.contains(&place.call) && place.frozen_in & UNINTERRUPTIBLE != 0;
        if stops == Stops::InPlace && (!is_frozen || within) {
            self.busy.get_or_insert(place.tid);
        }
        // One that was woken and has not come to its end yet has no result.
        let fails = place.result == -i64::from(libc::EINTR) || place.state == 0;
        // Whoever traces a stopped thread would wait for it, and its call fails in any case.
        if fails && restart::is_restarted(place.call) && !place.stopped {
            self.interrupted.push(place.tid);
        }
    }

    /// A thread of which `/proc` tells.
    fn note_told(&mut self, told: &Told, stops: Stops) {
        if stops == Stops::InPlace && !told.is_at_rest() {
            self.busy.get_or_insert(told.tid);
        }
        if told.call.is_none_or(restart::is_restarted) {
            self.interrupted.push(told.tid);
        }
    }

    /// A thread that is not at rest, though the freezer says that all are frozen.
    pub fn busy(&self) -> Option<i32> {
        self.busy
    }

    /// Lets the workload go by `thaw`, and has the system calls restarted that would fail. Blocks
    /// until they are, which is some 30 us for each; nobody else waits for that.
    pub fn thaw<T>(self, thaw: impl FnOnce() -> T) -> T {
        restart::thaw(&self.interrupted, thaw)
    }
}

/// What `/proc` tells of a thread.
#[derive(Debug)]
struct Told {
    tid: i32,
    /// The letter of its state.
    state: u8,
    /// The call it is in; none while it runs.
    call: Option<i64>,
    /// The first argument of that.
    descriptor: Option<i32>,
}

impl Told {
    /// None if it has ended.
    fn read(tid: i32) -> io::Result<Option<Self>> {
        let status = task::Status::read(tid)?;
        if status.has_ended() {
            return Ok(None);
        }
        let text = fs::read_to_string(format!("/proc/{tid}/syscall"))?;
        let mut words = text.split_ascii_whitespace();
        let call = words.next().and_then(|word| word.parse().ok());
        let descriptor = words.next().and_then(|word| word.strip_prefix("0x"));
        Ok(Some(Self {
            tid,
            state: status.state,
            call,
            descriptor: descriptor.and_then(|word| i32::from_str_radix(word, 16).ok()),
        }))
    }

    /// `/proc` shows frozen threads as uninterruptible.
    fn is_at_rest(&self) -> bool {
        if self.state != b'D' {
            return false;
        }
        if !self.call.is_some_and(|call| READS.contains(&call)) {
            return true;
        }
        let place = fs::read_to_string(format!("/proc/{}/wchan", self.tid));
        place.is_ok_and(|place| place.trim_end() == REFRIGERATOR)
            || self
                .descriptor
                .is_some_and(|number| refuse::is_other_than_direct(self.tid, number))
    }
}

/// Calls in which direct I/O writes memory; no other is restarted or waited in for it.
const READS: [i64; 5] = [
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_preadv2,
];

/// `TASK_FROZEN`. Should it be another bit in a later kernel, no thread is at rest there.
const FROZEN: u32 = 0x8000;
/// `TASK_UNINTERRUPTIBLE`.
const UNINTERRUPTIBLE: u32 = 2;
/// Where the freezer of v1 keeps threads that it stops on their way to user mode.
const REFRIGERATOR: &str = "__refrigerator";

#[cfg(test)]
mod tests {
    use super::*;

    fn place(state: u32, frozen_in: u32, call: i64) -> Place {
        Place {
            tid: 7,
            state,
            frozen_in,
            ended: false,
            stopped: false,
            call,
            result: -38,
        }
    }

    fn busy(place: Place, stops: Stops) -> bool {
        let mut frozen = Frozen::default();
        frozen.note(&place, stops);
        frozen.busy().is_some()
    }

    /// `TASK_KILLABLE | TASK_FREEZABLE`, and `TASK_INTERRUPTIBLE | TASK_FREEZABLE`.
    const KILLABLE: u32 = 0x2102;
    const INTERRUPTIBLE: u32 = 0x2001;

    #[test]
    fn a_thread_that_is_frozen_where_it_waits_within_a_read_is_not_at_rest() {
        for (place, expected) in [
            (place(FROZEN, KILLABLE, libc::SYS_pread64), true),
            (place(FROZEN, 0, libc::SYS_pread64), false),
            // A socket has no direct I/O, a `vfork` reads nothing.
            (place(FROZEN, INTERRUPTIBLE, libc::SYS_read), false),
            (place(FROZEN, KILLABLE, libc::SYS_vfork), false),
            // One that the freezer has forgotten.
            (place(2, 0, libc::SYS_pread64), true),
            (place(0, 0, -1), true),
        ] {
            assert_eq!(busy(place, Stops::InPlace), expected, "{place:?}");
            assert!(!busy(place, Stops::AtReturn));
        }
        let ended = Place {
            ended: true,
            ..place(0, 0, -1)
        };
        assert!(!busy(ended, Stops::InPlace));
    }
}
