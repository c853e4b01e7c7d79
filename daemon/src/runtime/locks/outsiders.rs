//! Who outside a workload has an open file by which it holds a lock.
//!
//! `flock` and OFD locks belong to the open file, which descriptors of several processes may mean:
//! inherited from a parent, or sent. Letting go for the target would let go for all of them, and
//! those who stay would go on as if they had it.
//!
//! Absent: processes that the kernel does not let this one look at, as they may more than it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use pageferry_inject::locks::{FileLock, LockKind};
use pageferry_sys::ptrace;

use super::{Unfit, there};

/// One of `held` whose open file is also of a process that is none of `pids`. All of these stand
/// still. Looks at every descriptor of the node: 2 us for each.
pub(super) fn find(held: &[FileLock], pids: &[i32]) -> io::Result<Option<Unfit>> {
    let mut open: BTreeMap<PathBuf, Vec<&FileLock>> = BTreeMap::new();
    for lock in held.iter().filter(|lock| lock.kind != LockKind::Posix) {
        // Whoever has the same open file sees the same name.
        if let Some(name) = there(fs::read_link(link(lock.pid, lock.fd)))? {
            open.entry(name).or_default().push(lock);
        }
    }
    if open.is_empty() {
        return Ok(None);
    }
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    for process in fs::read_dir("/proc")? {
        let Some(pid) = number(&process?) else {
            continue;
        };
        if pid == own || pids.contains(&pid) {
            continue;
        }
        match of_process(pid, &open) {
            Ok(Some(lock)) => {
                let (lock, with) = (lock.clone(), pid);
                return Ok(Some(Unfit::Outside { lock, with }));
            }
            Ok(None) => {}
            // Every node has some that may more than a daemon: its init, or a supervisor.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::debug!(pid, %error, "a process cannot be looked at");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn of_process<'a>(
    pid: i32,
    open: &BTreeMap<PathBuf, Vec<&'a FileLock>>,
) -> io::Result<Option<&'a FileLock>> {
    let Some(descriptors) = there(fs::read_dir(format!("/proc/{pid}/fd")))? else {
        return Ok(None);
    };
    for descriptor in descriptors {
        let Some(fd) = there(descriptor)?.as_ref().and_then(number) else {
            continue;
        };
        let Some(name) = there(fs::read_link(link(pid, fd)))? else {
            continue;
        };
        for lock in open.get(&name).into_iter().flatten() {
            let same = ptrace::is_same_file((lock.pid, lock.fd), (pid, fd));
            match same {
                Ok(true) => return Ok(Some(lock)),
                Ok(false) => {}
                // Closed meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
                Err(error) => {
                    there::<()>(Err(error))?;
                }
            }
        }
    }
    Ok(None)
}

fn link(pid: i32, fd: i32) -> String {
    format!("/proc/{pid}/fd/{fd}")
}

fn number(entry: &fs::DirEntry) -> Option<i32> {
    entry.file_name().to_str()?.parse().ok()
}
