//! Facts about single tasks of the workload.

use std::fs;

/// Whether `pid` is there and has not ended.
pub(super) fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            stat.rsplit_once(") ")
                .map(|(_, rest)| !rest.starts_with(['Z', 'X']))
        })
        .unwrap_or(false)
}

/// Whether `tracer` waits in the call that makes it one (`PTRACE_SEIZE`).
pub(super) fn is_seizing(tracer: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{tracer}/syscall")).unwrap_or_default();
    call.starts_with(&format!("{} {:#x} ", libc::SYS_ptrace, libc::PTRACE_SEIZE))
}

/// Who traces `pid`.
pub(super) fn tracer(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|tracer| *tracer != 0)
}
