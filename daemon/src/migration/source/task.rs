//! Facts about single tasks of the workload, and their sockets.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use crate::sys::{ptrace, tcp};

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

/// Takes the sockets of `pid` out of repair mode, and says how many were in it.
pub(super) fn repaired_sockets(pid: i32) -> io::Result<usize> {
    let pidfd = ptrace::pidfd_open(pid)?;
    let mut repaired = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (is_socket, number) {
            let socket = ptrace::pidfd_getfd(pidfd.as_fd(), number)?;
            repaired += usize::from(tcp::repair_off(socket.as_fd())?);
        }
    }
    Ok(repaired)
}

/// Who traces `pid`.
pub(super) fn tracer(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|tracer| *tracer != 0)
}
