//! What `/proc` says of a task: its threads, its state, its start.
//!
//! Nothing here is unsafe; it lives in `sys` because every module asks, and all must get the same
//! answer.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// SIGKILL in a set of signals.
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// The lines of `/proc/PID/status` that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// State letter: R, S, D, T, t, Z, X.
    pub state: u8,
    /// Pid of the tracer; 0 without one.
    pub tracer: i32,
    /// Runs under seccomp, in either mode.
    pub seccomp: bool,
    /// SIGKILL is pending: it runs no instruction of its own any more.
    pub killed: bool,
    /// The task's id in every pid namespace it is in, from the reader's to its own.
    pub ids: Vec<i32>,
}

impl Status {
    /// That of task `tid`, process or thread.
    pub fn read(tid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{tid}/status"))?;
        let field = |name: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
        };
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "unknown form of status");
        let pending = |name: &str| {
            let bits = field(name).and_then(|value| u64::from_str_radix(value, 16).ok());
            bits.ok_or_else(missing)
        };
        let state = field("State").and_then(|value| value.bytes().next());
        let ids = field("NSpid").unwrap_or_default().split_ascii_whitespace();
        Ok(Self {
            state: state.ok_or_else(missing)?,
            tracer: field("TracerPid")
                .and_then(|value| value.parse().ok())
                .ok_or_else(missing)?,
            // The line is there when the kernel knows seccomp.
            seccomp: field("Seccomp").is_some_and(|value| value != "0"),
            killed: (pending("SigPnd")? | pending("ShdPnd")?) & SIGKILL_BIT != 0,
            ids: ids.filter_map(|id| id.parse().ok()).collect(),
        })
    }

    /// Whether it is a zombie or about to be gone.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// Whether task `tid` is gone, or a zombie, which can neither run nor be moved. One that cannot be
/// looked at for another reason counts as there.
pub fn has_ended(tid: i32) -> bool {
    match Status::read(tid) {
        Ok(status) => status.has_ended(),
        Err(error) => tells_of_end(&error),
    }
}

/// Whether an error of reading something of a task means that there is no such task any more.
pub fn tells_of_end(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
}

/// Who traces task `tid`; none also if it has ended.
pub fn tracer(tid: i32) -> Option<i32> {
    let status = Status::read(tid).ok()?;
    (status.tracer != 0).then_some(status.tracer)
}

/// Whether task `tracer` waits in the call that makes it one (`PTRACE_SEIZE`).
pub fn is_seizing(tracer: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{tracer}/syscall")).unwrap_or_default();
    call.starts_with(&format!("{} {:#x} ", libc::SYS_ptrace, libc::PTRACE_SEIZE))
}

/// Whether task `tid` waits in a call that signals do not end.
pub fn is_uninterruptible(tid: i32) -> bool {
    Status::read(tid).is_ok_and(|status| status.state == b'D')
}

/// The threads of process `pid`.
pub fn threads(pid: i32) -> io::Result<Vec<i32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    let names = entries.map(|entry| Ok(entry?.file_name()));
    let names: io::Result<Vec<_>> = names.collect();
    Ok(names?
        .iter()
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect())
}

/// When process `pid` started, in clock ticks since boot: with the pid, its identity.
pub fn start_time(pid: i32) -> io::Result<u64> {
    stat_field(pid, 22)
}

/// Whether task `tid` is on its way to its end, by a signal that ends all of its process. From then
/// on the signal is no longer pending, and there may be milliseconds until it counts as ended, in
/// which what it has open is gone already (`PF_SIGNALED` of `include/linux/sched.h`, which
/// `get_signal` sets; field 9 of `stat`). False if it cannot be read.
pub fn is_ending(tid: i32) -> bool {
    const PF_SIGNALED: u64 = 0x400;
    stat_field(tid, 9).is_ok_and(|flags| flags & PF_SIGNALED != 0)
}

/// A number of `/proc/PID/stat`, counted from one as proc(5) does; from the third.
fn stat_field(pid: i32, number: usize) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces and parentheses.
    let rest = text.rsplit_once(") ").map(|(_, rest)| rest);
    let field = rest.and_then(|rest| rest.split(' ').nth(number - 3));
    field
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unknown form of stat"))
}

/// What a descriptor of this process refers to, as `/proc` names it.
pub fn descriptor_target(fd: &OwnedFd) -> io::Result<String> {
    let target = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(target.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_untraced_and_has_this_thread() {
        let pid = std::process::id().cast_signed();
        let status = Status::read(pid).unwrap();
        assert!(!status.has_ended() && status.tracer == 0 && !status.killed);
        assert_eq!(status.ids.first(), Some(&pid));
        assert!(threads(pid).unwrap().contains(&pid));
        assert!(0 < start_time(pid).unwrap());
        assert!(!has_ended(pid) && !is_ending(pid) && tracer(pid).is_none());
    }

    #[test]
    fn a_zombie_and_a_pid_of_nobody_have_ended() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        // Its status is not collected, so it stays a zombie.
        while !has_ended(pid) {
            assert!(std::time::Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
        assert_eq!(Status::read(pid).unwrap().state, b'Z');
        child.wait().unwrap();
        assert!(Status::read(pid).is_err() && has_ended(pid));
    }

    #[test]
    fn who_was_killed_is_told_from_who_has_ended_by_itself() {
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        let mut killed = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        killed.kill().unwrap();
        let pids = [&ended, &killed].map(|child| child.id().cast_signed());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !pids.iter().all(|pid| has_ended(*pid)) {
            assert!(std::time::Instant::now() < deadline, "they do not end");
            std::thread::yield_now();
        }
        assert_eq!(pids.map(is_ending), [false, true]);
        ended.wait().unwrap();
        killed.wait().unwrap();
    }

    #[test]
    fn a_task_that_cannot_be_looked_at_has_not_ended() {
        let refused = io::Error::from_raw_os_error(libc::EMFILE);
        assert!(!tells_of_end(&refused));
        assert!(tells_of_end(&io::Error::from_raw_os_error(libc::ESRCH)));
    }
}
