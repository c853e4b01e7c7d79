//! Children of a case, and waiting for them.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::sys::Cloned;
use crate::sys::process::{exit_now, fork};

/// Forks a child that does `what`, and ends if that comes to an end. Not to be called by a process
/// with several threads.
pub fn child<T>(what: impl FnOnce() -> T) -> io::Result<Pid> {
    match fork()? {
        Cloned::Parent(pid) => Ok(Pid::from_raw(pid)),
        Cloned::Child => {
            what();
            exit_now(0)
        }
    }
}

/// Kills a child and forgets it.
pub fn end(pid: Pid) {
    let _ = kill(pid, Signal::SIGKILL);
    while waitpid(pid, None) == Err(nix::errno::Errno::EINTR) {}
}

/// Waits for a condition; false if it does not come true.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + WAIT_MAX;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

/// A field of `/proc/PID/stat`, counted from the state on, which is 0.
pub fn stat_field(pid: Pid, index: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(index).map(str::to_owned)
}

/// The letter of a process's state.
pub fn state_of(pid: Pid) -> Option<char> {
    stat_field(pid, 0)?.chars().next()
}

/// The parent of a process.
pub fn parent_of(pid: Pid) -> Option<Pid> {
    stat_field(pid, 1)?.parse().ok().map(Pid::from_raw)
}

const WAIT_MAX: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(2);
