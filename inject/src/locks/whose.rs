//! Whose a number on a list is.
//!
//! A process of a frozen copy may die, killed by whoever wants it dead, for its memory, or with the
//! daemon whose thread it was that stood aside. It has let go of its locks then, and its number may
//! be a stranger's. The v1 freezer keeps threads that are killed from their end, and what they have
//! open with them: those are taken out, and come to it. They run no instruction of their own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::{Freezer, FreezerVersion};
use pageferry_sys::{ptrace, task};

use crate::stop::pause;
use crate::{InjectError, frozen::in_cgroup};

/// How long a killed process may take to its end: freeing 4 GiB takes 0.3 s.
const END_MAX: Duration = Duration::from_secs(10);

/// A descriptor of process `pid` of the frozen cgroup `freezer`. None if it has ended: what started
/// at another time than `started` is a stranger.
fn find(pid: i32, started: Option<u64>, freezer: &Freezer) -> Result<Option<OwnedFd>, InjectError> {
    let Some(pidfd) = open(pid, started)? else {
        return Ok(None);
    };
    // As long as it has not ended, what is read by its number now is of it.
    let is_here = freezer.holds(pid).map_err(in_cgroup(pid))?;
    if !ptrace::is_alive(pidfd.as_fd()) {
        return Ok(None);
    }
    if !is_here && started.is_none() {
        // A list without the start of its processes: it can only be a stranger.
        return Ok(None);
    }
    if is_killed(pid) {
        see_off(pid, pidfd.as_fd(), freezer)?;
        return Ok(None);
    }
    if !is_here {
        return Err(InjectError::Elsewhere { pid });
    }
    Ok(Some(pidfd))
}

/// Makes `calls` with process `pid` of the frozen cgroup `freezer`. None if it has ended, also if
/// that was in the middle of them: who is killed meanwhile is seen to its end.
pub(super) fn unless_ended<T>(
    (pid, started): (i32, Option<u64>),
    freezer: &Freezer,
    calls: impl FnOnce(BorrowedFd<'_>) -> Result<T, InjectError>,
) -> Result<Option<T>, InjectError> {
    let Some(pidfd) = find(pid, started, freezer)? else {
        return Ok(None);
    };
    match calls(pidfd.as_fd()) {
        Ok(done) => Ok(Some(done)),
        // Why the calls failed is what is told if it is still there.
        Err(error) => match find(pid, started, freezer) {
            Ok(None) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Whether it has ended, or is being killed.
pub(super) fn has_ended(pid: i32, started: Option<u64>) -> bool {
    match open(pid, started) {
        Ok(Some(_)) => is_killed(pid),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// A descriptor of the process that has this number, and started then. None if there is none.
fn open(pid: i32, started: Option<u64>) -> Result<Option<OwnedFd>, InjectError> {
    let inspect = |source: io::Error| InjectError::Inspect {
        tid: pid,
        what: "the process",
        source,
    };
    let pidfd = match ptrace::pidfd_open(pid) {
        Ok(pidfd) => pidfd,
        Err(error) if task::tells_of_end(&error) => return Ok(None),
        // It is that of a thread of a stranger.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        Err(error) => return Err(inspect(error)),
    };
    let found = match task::start_time(pid) {
        Ok(found) => found,
        Err(error) if task::tells_of_end(&error) => return Ok(None),
        Err(error) => return Err(inspect(error)),
    };
    let is_it = started.is_none_or(|started| started == found);
    Ok((is_it && ptrace::is_alive(pidfd.as_fd())).then_some(pidfd))
}

/// Whether all of a process is being killed: SIGKILL is pending for each of its threads at once,
/// until they come to it.
fn is_killed(pid: i32) -> bool {
    let killed = |tid: &i32| {
        task::Status::read(*tid).is_ok_and(|status| status.killed) || task::is_ending(*tid)
    };
    let threads = task::threads(pid).unwrap_or_default();
    threads.iter().any(killed)
}

/// Sees a killed process to its end.
fn see_off(pid: i32, pidfd: BorrowedFd<'_>, freezer: &Freezer) -> Result<(), InjectError> {
    let aside = freezer.aside().map_err(in_cgroup(pid))?;
    let deadline = Instant::now() + END_MAX;
    let mut idle = 0;
    while ptrace::is_alive(pidfd) {
        if freezer.version() == FreezerVersion::V1 {
            for tid in task::threads(pid).unwrap_or_default() {
                let status = task::Status::read(tid);
                if status.is_ok_and(|status| status.killed && !status.has_ended()) {
                    // It has ended meanwhile, or is tried again.
                    let _ = aside.take_out(tid);
                }
            }
        }
        if deadline < Instant::now() {
            let limit = END_MAX;
            return Err(InjectError::NotEnded { pid, limit });
        }
        pause(&mut idle);
    }
    Ok(())
}
