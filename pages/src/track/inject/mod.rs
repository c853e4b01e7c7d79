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
//!
//! What a stop must not change:
//! - **A blocked system call** goes on: the thread is stopped on its way back to user mode with the
//!   call's result in its registers. Our calls are made with `orig_rax = -1`, so that the kernel
//!   does not take their results for the interrupted call's; at the end the thread is stopped once
//!   more
//!   *on the way back to user mode* and given its old registers, from which the kernel restarts the
//!   call as after any stop. A few calls (`epoll_wait`) answer `EINTR` even so; see [`restart`].
//! - **Signals** stay pending: the mask is full during our calls, so that none but SIGKILL and
//!   SIGSTOP arrive, and a thread found on its way to a handler is sent on with its signal.
//! - **A group stop** (SIGSTOP) holds again when the thread is let go.
//! - **Seccomp** is suspended for the calls, by the stopped thread's own option, which ends with
//!   the trace.
//! - **A restartable sequence** is aborted as by any preemption.
//!
//! `ptrace` knows threads of the tracer too, so every attempt has an OS thread of its own; when it
//! ends, in whatever way, the kernel lets go of everything it held.
//!
//! Absent: 32-bit tasks, other architectures than x86-64.

mod call;
mod gadget;
pub(super) mod restart;
mod stop;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use pageferry_sys::ptrace::{self, Shared};
use pageferry_sys::track::USERFAULTFD_FLAGS;
use thiserror::Error;

use super::task;
use call::Borrowed;
use stop::{Held, Stopped};

/// What was borrowed, and at what cost.
#[derive(Debug)]
pub(super) struct Injected {
    /// The context, fresh: its features are not negotiated.
    pub(super) userfaultfd: OwnedFd,
    /// From the first thread asked to stop to the last one let go.
    pub(super) stopped: Duration,
    /// How many threads were stopped.
    pub(super) threads: usize,
}

/// Why no userfaultfd could be borrowed. The workload runs on as before, except after
/// [`InjectError::Leaked`].
#[derive(Debug, Error)]
pub enum InjectError {
    /// Built for another architecture.
    #[error("making another process call the kernel is not supported on this architecture")]
    Architecture,
    /// The OS thread of the attempt could not be started.
    #[error("cannot start a thread to trace from")]
    Thread(#[source] io::Error),
    /// A fact about the task could not be read.
    #[error("cannot read {what} of task {tid}")]
    Inspect {
        /// The task.
        tid: i32,
        /// Which fact.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another program traces it.
    #[error("task {tid} is traced by process {tracer}")]
    Traced {
        /// The task.
        tid: i32,
        /// Who traces it.
        tracer: i32,
    },
    /// The kernel does not let us trace it.
    #[error("cannot trace task {tid}")]
    Seize {
        /// The task.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Threads appear faster than they can be stopped, or there are too many.
    #[error("process {pid} makes threads faster than they can be stopped")]
    TooManyThreads {
        /// The process.
        pid: i32,
    },
    /// A thread did not stop in time.
    #[error("task {tid} did not stop within {} ms", limit.as_millis())]
    NotStopped {
        /// The task.
        tid: i32,
        /// The time it had.
        limit: Duration,
    },
    /// A thread that was stopped and sent on to a call did not come back.
    #[error("task {tid} did not come back from a call in time")]
    Stuck {
        /// The task.
        tid: i32,
    },
    /// A `ptrace` request failed.
    #[error("cannot {what} task {tid}")]
    Trace {
        /// The task.
        tid: i32,
        /// What the request does.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread ended while it was used.
    #[error("task {tid} ended while it was used")]
    Ended {
        /// The task.
        tid: i32,
    },
    /// A 32-bit task, or one that handles its own system calls.
    #[error("task {tid} {why}")]
    Unfit {
        /// The task.
        tid: i32,
        /// What it is that cannot be used.
        why: &'static str,
    },
    /// There is no system call instruction in its memory.
    #[error("process {pid} has no system call instruction")]
    NoInstruction {
        /// The process.
        pid: i32,
    },
    /// The thread got a signal of its own making while it was used.
    #[error("task {tid} got signal {signal} while it was used")]
    Interfered {
        /// The task.
        tid: i32,
        /// The signal.
        signal: i32,
    },
    /// The workload's call failed.
    #[error("{call} failed in task {tid}")]
    Call {
        /// The task.
        tid: i32,
        /// Which call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The descriptor could not be duplicated into this process.
    #[error("cannot take descriptor {number} of process {pid}")]
    Take {
        /// The process.
        pid: i32,
        /// The descriptor in that process.
        number: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is still open in the workload: a dump will fail until it is closed.
    #[error("descriptor {number} is left open in process {pid}")]
    Leaked {
        /// The process.
        pid: i32,
        /// The descriptor in that process.
        number: i32,
        /// Why it could not be closed.
        #[source]
        source: Box<InjectError>,
    },
    /// No thread of the process can be used.
    #[error("no thread of process {pid} can be used")]
    NoThread {
        /// The process.
        pid: i32,
    },
}

/// Makes process `pid` create a userfaultfd and takes it. `tree` are the other processes of the
/// workload; those that share `pid`'s descriptor table are stopped with it. All must stand still
/// within `stop_max`, or they are let go again. From then on it takes as long as one of them needs
/// to get its turn on a processor four times: some microseconds on a machine that has one to spare.
pub(super) fn borrow_userfaultfd(
    pid: i32,
    tree: &[i32],
    stop_max: Duration,
) -> Result<Injected, InjectError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(InjectError::Architecture);
    }
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
    let attempt = || attempt(pid, &tasks, gadget, &pidfd, stop_max);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("inject".to_owned());
        let thread = thread
            .spawn_scoped(scope, attempt)
            .map_err(InjectError::Thread)?;
        thread.join().expect("the tracing thread does not panic")
    })
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
    let made = thread.call("userfaultfd", libc::SYS_userfaultfd, USERFAULTFD_FLAGS);
    let result = made.and_then(|number| {
        let number = i32::try_from(number).expect("descriptors are ints");
        let taken = take(pid, number, pidfd);
        // What was made must not be left, whether it could be taken or not.
        let closed = thread.call("close", libc::SYS_close, number.cast_unsigned().into());
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Borrows a userfaultfd from one thread, whatever it is doing.
    pub(in crate::track) fn borrow_from_thread(pid: i32, tid: i32) {
        let gadget = gadget::find(pid).unwrap();
        let pidfd = ptrace::pidfd_open(pid).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let attempt = || {
            let mut stopped = Stopped::stop(&[pid], deadline, Duration::from_secs(5)).unwrap();
            let held = stopped.iter_mut().find(|held| held.tid == tid).unwrap();
            borrow_from(pid, held, gadget, &pidfd).unwrap();
        };
        // The thread that traces must end: that is when the kernel lets go of the rest.
        std::thread::scope(|scope| scope.spawn(attempt).join().unwrap());
    }
}
