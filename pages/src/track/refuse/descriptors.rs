//! Descriptors that forbid tracking, those of direct I/O, and the sockets among the rest.
//!
//! The flags of a descriptor can change at any time (`fcntl(F_SETFL)`), so every look takes all of
//! them anew: nothing that was harmless once is believed to be so still.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::ptrace::{self, Shared};
use pageferry_sys::task;

use crate::track::probe::files::{Files, OpenFile};

/// What the descriptors of a process are.
#[derive(Debug, Default)]
pub struct Found {
    /// The first that forbids tracking it.
    pub forbidden: Option<Failure>,
    /// A file open for direct I/O.
    pub direct: Option<String>,
    /// Inodes of its sockets; not all of them if something forbids tracking.
    pub sockets: BTreeSet<u64>,
}

/// Looks at every descriptor of process `pid`.
pub fn find(pid: i32, probe: Option<&Files>) -> io::Result<Found> {
    let told = probe.and_then(|probe| {
        let told = probe.of(pid);
        told.inspect_err(|error| tracing::debug!(pid, %error, "no files of the iterator"))
            .ok()
    });
    let mut found = Found::default();
    if let Some(told) = &told {
        found.take_told(pid, &told.files);
        if found.forbidden.is_some() || !told.own_tables {
            return Ok(found);
        }
    }
    // A thread may have a descriptor table of its own.
    let own_table = |tid| ptrace::compare(pid, tid, Shared::Files).is_ok_and(|order| order.is_ne());
    for tid in task::threads(pid)? {
        let wanted = if tid == pid {
            told.is_none()
        } else {
            own_table(tid)
        };
        if !wanted {
            continue;
        }
        match found.take_listed(pid, tid) {
            // A thread that has ended has none any more.
            Err(error) if tid != pid && task::tells_of_end(&error) => {}
            listed => listed?,
        }
        if found.forbidden.is_some() {
            break;
        }
    }
    Ok(found)
}

impl Found {
    /// Those that the kernel's iterator told of. Names are read once for each kind.
    fn take_told(&mut self, pid: i32, files: &[OpenFile]) {
        let mut named = BTreeSet::new();
        for file in files {
            let kind = file.mode & libc::S_IFMT;
            let name = || fs::read_link(format!("/proc/{pid}/fd/{}", file.number));
            let name = || Some(name().ok()?.to_string_lossy().into_owned());
            if kind == libc::S_IFSOCK {
                self.sockets.insert(file.inode);
                continue;
            }
            // On a pipe the flag means packets, not direct I/O.
            let is_data = kind == libc::S_IFREG || kind == libc::S_IFBLK;
            if is_data && file.flags & libc::O_DIRECT != 0 && self.direct.is_none() {
                // Also if it was closed since.
                self.direct = Some(has(
                    pid,
                    file.number,
                    DIRECT_FILE,
                    &name().unwrap_or_default(),
                ));
            }
            // Device files of one driver may go by several names, of which some are known; what has
            // no name in a folder is one kind for each driver.
            let key = match kind {
                libc::S_IFCHR => file.entry,
                _ => file.operations,
            };
            if named.contains(&(kind, key)) {
                continue;
            }
            // One that was closed meanwhile does not speak for its kind.
            let Some(name) = name() else { continue };
            named.insert((kind, key));
            if let Some(why) = named_kind(&name) {
                self.forbidden = Some(refused(pid, file.number, why, &name));
                return;
            }
        }
    }

    /// Those in the folder of thread `tid`.
    fn take_listed(&mut self, pid: i32, tid: i32) -> io::Result<()> {
        for entry in fs::read_dir(format!("/proc/{tid}/fd"))? {
            let entry = entry?;
            // A descriptor that was closed meanwhile is no objection.
            let Ok(name) = fs::read_link(entry.path()) else {
                continue;
            };
            let (number, name) = (entry.file_name(), name.to_string_lossy().into_owned());
            let Some(number) = number.to_str().and_then(|number| number.parse().ok()) else {
                continue;
            };
            let socket = name.strip_prefix("socket:[");
            if let Some(inode) = socket.and_then(|rest| rest.strip_suffix(']')?.parse().ok()) {
                self.sockets.insert(inode);
                continue;
            }
            if let Some(why) = named_kind(&name) {
                self.forbidden = Some(refused(pid, number, why, &name));
                return Ok(());
            }
            // Only files have paths.
            if self.direct.is_none() && name.starts_with('/') && is_direct(tid, number) {
                self.direct = Some(has(pid, number, DIRECT_FILE, &name));
            }
        }
        Ok(())
    }
}

type Why = (ErrorCode, &'static str);

const DIRECT_FILE: &str = "a file open for direct I/O";

fn named_kind(name: &str) -> Option<Why> {
    let device = (ErrorCode::DirectIo, "a device that writes its memory");
    match name {
        "anon_inode:[io_uring]" => Some((ErrorCode::IoUring, "an io_uring")),
        "anon_inode:[userfaultfd]" => Some((ErrorCode::Untrackable, "a userfaultfd")),
        "anon_inode:[vfio-device]" | "/dev/iommu" => Some(device),
        _ if name.starts_with("/dev/vfio/") || name.starts_with("/dev/infiniband/") => Some(device),
        _ => None,
    }
}

fn refused(pid: i32, number: i32, (code, what): Why, name: &str) -> Failure {
    let text = has(pid, number, what, name);
    Failure::new(code, format!("{text}{}", super::advice(code, what)))
}

fn has(pid: i32, number: i32, what: &str, name: &str) -> String {
    let text = format!("process {pid} has {what} as descriptor {number}: {name}");
    text.trim_end_matches(": ").to_owned()
}

fn is_direct(tid: i32, number: i32) -> bool {
    flags(tid, number).is_some_and(|flags| flags & libc::O_DIRECT != 0)
}

/// Whether a thread has something open by this number, and that is not for direct I/O.
pub fn is_other_than_direct(tid: i32, number: i32) -> bool {
    flags(tid, number).is_some_and(|flags| flags & libc::O_DIRECT == 0)
}

fn flags(tid: i32, number: i32) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/{tid}/fdinfo/{number}")).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    i32::from_str_radix(flags.trim(), 8).ok()
}
