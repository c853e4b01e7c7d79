//! What `/proc` says of a task: its threads, its state, its start.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// The lines of `/proc/PID/status` that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// State letter: R, S, D, T, t, Z, X.
    pub state: u8,
    /// Pid of the tracer; 0 without one.
    pub tracer: i32,
    /// Runs under seccomp, in either mode.
    pub seccomp: bool,
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
        let state = field("State").and_then(|value| value.bytes().next());
        let ids = field("NSpid").unwrap_or_default().split_ascii_whitespace();
        Ok(Self {
            state: state.ok_or_else(missing)?,
            tracer: field("TracerPid")
                .and_then(|value| value.parse().ok())
                .ok_or_else(missing)?,
            // The line is there when the kernel knows seccomp.
            seccomp: field("Seccomp").is_some_and(|value| value != "0"),
            ids: ids.filter_map(|id| id.parse().ok()).collect(),
        })
    }

    /// Whether it is a zombie or about to be gone.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
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
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces and parentheses; the start is field 22.
    let rest = text.rsplit_once(") ").map(|(_, rest)| rest);
    let field = rest.and_then(|rest| rest.split(' ').nth(22 - 3));
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
        assert!(!status.has_ended() && status.tracer == 0);
        assert_eq!(status.ids.first(), Some(&pid));
        assert!(threads(pid).unwrap().contains(&pid));
        assert!(0 < start_time(pid).unwrap());
    }
}
