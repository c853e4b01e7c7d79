//! Making a thread of another process call the kernel, and giving it back as it was.
//!
//! Some things only a task itself can have the kernel do: make a write tracker for its memory
//! ([`userfaultfd`]), take a file lock or let go of one ([`locks`]). So one of its threads is
//! stopped, lent other registers for a few calls, and put back:
//!
//! - a running process stops as far as the call would be seen by its other threads;
//! - one whose cgroup is frozen stays frozen: the thread alone is taken out for the calls, held by
//!   its trace ([`frozen`]).
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

#![forbid(unsafe_code)]

mod call;
pub mod frozen;
mod gadget;
pub mod locks;
pub mod restart;
mod stop;
pub mod userfaultfd;

use std::io;
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::CgroupError;
use thiserror::Error;

pub use call::Borrowed;
use stop::Stopped;

/// Why a call could not be made. The thread goes on as before, except after
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
    /// Its memory could not be used for what the call is given.
    #[error("cannot use the stack of task {tid}")]
    Memory {
        /// The task.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not where a list says it is.
    #[error("process {pid} is not in its frozen cgroup any more: somebody has moved it")]
    Elsewhere {
        /// The process.
        pid: i32,
    },
    /// It was killed, and does not come to its end.
    #[error("process {pid} was killed, and has not ended within {} s", limit.as_secs())]
    NotEnded {
        /// The process.
        pid: i32,
        /// The time it had.
        limit: Duration,
    },
    /// Its cgroup could not be used.
    #[error("cannot take task {tid} out of its frozen cgroup, or put it back")]
    Cgroup {
        /// The task.
        tid: i32,
        /// Why.
        #[source]
        source: CgroupError,
    },
}

impl InjectError {
    /// Whether another attempt a moment later may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NotStopped { .. }
            | Self::Stuck { .. }
            | Self::TooManyThreads { .. }
            | Self::NotEnded { .. }
            | Self::Ended { .. }
            | Self::Trace { .. }
            | Self::Interfered { .. }
            // It is replacing its program, or ending: there is nothing executable for a moment.
            | Self::NoInstruction { .. }
            | Self::NoThread { .. } => true,
            Self::Architecture
            | Self::Thread(_)
            | Self::Inspect { .. }
            | Self::Traced { .. }
            | Self::Seize { .. }
            | Self::Unfit { .. }
            | Self::Call { .. }
            | Self::Take { .. }
            | Self::Leaked { .. }
            | Self::Memory { .. }
            | Self::Elsewhere { .. }
            | Self::Cgroup { .. } => false,
        }
    }
}

/// Stops thread `tid` of process `pid`, within `stop_max`, and makes `calls` with it. Its other
/// threads go on, and may see what the calls do.
pub fn with_thread<T: Send>(
    pid: i32,
    tid: i32,
    stop_max: Duration,
    calls: impl FnOnce(&mut Borrowed<'_>) -> Result<T, InjectError> + Send,
) -> Result<T, InjectError> {
    let gadget = gadget::find(pid)?;
    on_own_thread(move || {
        let mut stopped = Stopped::stop_one(pid, tid, Instant::now() + stop_max, stop_max)?;
        let held = stopped.iter_mut().find(|held| held.usable);
        let mut thread = Borrowed::take(held.ok_or(InjectError::NoThread { pid })?, gadget)?;
        let done = calls(&mut thread);
        thread.give_back()?;
        done
    })
}

/// The kernel ties what is traced to the OS thread that traces, and lets go of it when that ends.
fn on_own_thread<T: Send>(
    attempt: impl FnOnce() -> Result<T, InjectError> + Send,
) -> Result<T, InjectError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(InjectError::Architecture);
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("inject".to_owned());
        let thread = thread
            .spawn_scoped(scope, attempt)
            .map_err(InjectError::Thread)?;
        thread.join().expect("the tracing thread does not panic")
    })
}

#[cfg(test)]
mod tests;
