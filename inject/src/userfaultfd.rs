//! Borrowing a userfaultfd from another process: it makes one, we take it, it forgets it.
//!
//! A write tracker must belong to the memory it tracks, and only a task with that memory can make
//! one. So one thread of the workload is made to call `userfaultfd` and, once we hold a duplicate,
//! `close`, while everybody who could see the descriptor stands still:
//!
//! ```text
//!   all threads of all tasks with the same descriptor table      ── stopped ──────────┐
//!   one of them: userfaultfd() ─► pidfd_getfd (ours) ─► close() ─► registers restored │ short
//!   all                                                          ── let go ───────────┘
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use pageferry_sys::ptrace::{self, Shared};
use pageferry_sys::task;
use pageferry_sys::track::USERFAULTFD_FLAGS;

use crate::call::Borrowed;
use crate::stop::{Held, Stopped};
use crate::{InjectError, gadget, on_own_thread};

/// What was borrowed, and at what cost.
#[derive(Debug)]
pub struct Injected {
    /// The context, fresh: its features are not negotiated.
    pub userfaultfd: OwnedFd,
    /// From the first thread asked to stop to the last one let go.
    pub stopped: Duration,
    /// How many threads were stopped.
    pub threads: usize,
}

/// Makes process `pid` create a userfaultfd and takes it. `tree` are the other processes of the
/// workload; those that share `pid`'s descriptor table are stopped with it. All must stand still
/// within `stop_max`, or they are let go again. From then on it takes as long as one of them needs
/// to get its turn on a processor four times: some microseconds on a machine that has one to spare.
pub fn borrow(pid: i32, tree: &[i32], stop_max: Duration) -> Result<Injected, InjectError> {
    let mut tasks = vec![pid];
    // A task that ended meanwhile (ESRCH) shares nothing any more.
    let shares =
        |other| ptrace::compare(pid, other, Shared::Files).is_ok_and(|order| order.is_eq());
    tasks.extend(
        tree.iter()
            .copied()
            .filter(|&other| other != pid && shares(other)),
    );
    let gadget = gadget::find(pid)?;
    let pidfd = ptrace::pidfd_open(pid).map_err(|source| InjectError::Inspect {
        tid: pid,
        what: "the process",
        source,
    })?;
    on_own_thread(|| attempt(pid, &tasks, gadget, &pidfd, stop_max))
}

fn attempt(
    pid: i32,
    tasks: &[i32],
    gadget: u64,
    pidfd: &OwnedFd,
    stop_max: Duration,
) -> Result<Injected, InjectError> {
    let began = Instant::now();
    let mut stopped = Stopped::stop(tasks, began + stop_max, stop_max)?;
    let userfaultfd = borrow_from_any(pid, &mut stopped, gadget, pidfd);
    let threads = stopped.len();
    drop(stopped);
    Ok(Injected {
        userfaultfd: userfaultfd?,
        stopped: began.elapsed(),
        threads,
    })
}

/// Tries the threads one after another, the leader first, until one has done it.
fn borrow_from_any(
    pid: i32,
    stopped: &mut Stopped,
    gadget: u64,
    pidfd: &OwnedFd,
) -> Result<OwnedFd, InjectError> {
    let mut last = InjectError::NoThread { pid };
    let fit = |held: &&mut Held| held.process == pid && held.usable && has_files_of(pid, held.tid);
    for held in stopped.iter_mut().filter(fit).take(THREADS_TRIED_MAX) {
        match borrow_from(pid, held, gadget, pidfd) {
            Err(error @ (InjectError::Leaked { .. } | InjectError::Stuck { .. })) => {
                return Err(error);
            }
            Err(error) => last = error,
            Ok(userfaultfd) => return Ok(userfaultfd),
        }
    }
    Err(last)
}

fn has_files_of(pid: i32, tid: i32) -> bool {
    pid == tid || ptrace::compare(pid, tid, Shared::Files).is_ok_and(|order| order.is_eq())
}

fn borrow_from(
    pid: i32,
    held: &mut Held,
    gadget: u64,
    pidfd: &OwnedFd,
) -> Result<OwnedFd, InjectError> {
    let mut thread = Borrowed::take(held, gadget)?;
    let made = thread.call(
        "userfaultfd",
        libc::SYS_userfaultfd,
        [USERFAULTFD_FLAGS, 0, 0],
    );
    let result = made.and_then(|number| {
        let number = i32::try_from(number).expect("descriptors are ints");
        let taken = take(pid, number, pidfd);
        // What was made must not be left, whether it could be taken or not.
        let closed = thread.call(
            "close",
            libc::SYS_close,
            [number.cast_unsigned().into(), 0, 0],
        );
        match closed {
            Ok(_) => taken,
            Err(source) => Err(InjectError::Leaked {
                pid,
                number,
                source: Box::new(source),
            }),
        }
    });
    thread.give_back()?;
    result
}

fn take(pid: i32, number: i32, pidfd: &OwnedFd) -> Result<OwnedFd, InjectError> {
    let failed = |source| InjectError::Take {
        pid,
        number,
        source,
    };
    let taken = ptrace::pidfd_getfd(pidfd.as_fd(), number).map_err(failed)?;
    let what = task::descriptor_target(&taken).map_err(failed)?;
    if what != "anon_inode:[userfaultfd]" {
        return Err(failed(io::Error::other(format!("it is {what}"))));
    }
    Ok(taken)
}

/// How many threads are tried before the attempt is given up: what fails in so many will fail in
/// all of them.
const THREADS_TRIED_MAX: usize = 4;
