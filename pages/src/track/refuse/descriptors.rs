//! Descriptors that forbid tracking, and the sockets among the rest.
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

/// The first descriptor of process `pid` that forbids tracking it. Inodes of its sockets are added
/// to `sockets`.
pub fn find(
    pid: i32,
    probe: Option<&Files>,
    sockets: &mut BTreeSet<u64>,
) -> io::Result<Option<Failure>> {
    let told = probe.and_then(|probe| {
        let told = probe.of(pid);
        told.inspect_err(|error| tracing::debug!(pid, %error, "no files of the iterator"))
            .ok()
    });
    if let Some(told) = &told {
        let found = find_told(pid, &told.files, sockets);
        if found.is_some() || !told.own_tables {
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
        let found = match find_listed(pid, tid, sockets) {
            // A thread that has ended has none any more.
            Err(error) if tid != pid && task::tells_of_end(&error) => None,
            found => found?,
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Of those that the kernel's iterator told of. Names are read once for each kind.
fn find_told(pid: i32, files: &[OpenFile], sockets: &mut BTreeSet<u64>) -> Option<Failure> {
    let mut named = BTreeSet::new();
    for file in files {
        let kind = file.mode & libc::S_IFMT;
        let name = || fs::read_link(format!("/proc/{pid}/fd/{}", file.number));
        let name = || Some(name().ok()?.to_string_lossy().into_owned());
        if kind == libc::S_IFSOCK {
            sockets.insert(file.inode);
            continue;
        }
        // On a pipe the flag means packets, not direct I/O.
        let is_data = kind == libc::S_IFREG || kind == libc::S_IFBLK;
        if is_data && file.flags & libc::O_DIRECT != 0 {
            // Also if it was closed since.
            let name = name().unwrap_or_default();
            return Some(refused(pid, file.number, DIRECT, &name));
        }
        // Device files of one driver may go by several names, of which some are known; what has no
        // name in a folder is one kind for each driver.
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
            return Some(refused(pid, file.number, why, &name));
        }
    }
    None
}

/// Of those in the folder of thread `tid`.
fn find_listed(pid: i32, tid: i32, sockets: &mut BTreeSet<u64>) -> io::Result<Option<Failure>> {
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
            sockets.insert(inode);
            continue;
        }
        let mut why = named_kind(&name);
        // Only files have paths.
        if why.is_none() && name.starts_with('/') && is_direct(tid, number) {
            why = Some(DIRECT);
        }
        if let Some(why) = why {
            return Ok(Some(refused(pid, number, why, &name)));
        }
    }
    Ok(None)
}

type Why = (ErrorCode, &'static str);

pub(super) const DIRECT_FILE: &str = "a file open for direct I/O";
const DIRECT: Why = (ErrorCode::DirectIo, DIRECT_FILE);

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
    let text = format!("process {pid} has {what} as descriptor {number}: {name}");
    let advice = super::advice(code, what);
    Failure::new(code, format!("{}{advice}", text.trim_end_matches(": ")))
}

fn is_direct(tid: i32, number: i32) -> bool {
    let info = fs::read_to_string(format!("/proc/{tid}/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
}
