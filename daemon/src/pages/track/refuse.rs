//! What a process may have that makes tracking it wrong, found before anything is touched.
//!
//! Write tracking sees what goes through the page tables. Devices and direct I/O write memory
//! behind them: with those a page counts as clean whose contents have changed (an `O_DIRECT` read
//! of 128 KiB in flight over a scan left 32 of 32 pages different at the target). There is no
//! telling whether a process will use such a descriptor, so having one is enough.
//!
//! Absent: everything that only CRIU or the network minds.

use std::fs;
use std::io;

use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::maps::{self, Flags, Mapping};
use super::{TrackError, task};
use crate::sys::ptrace::{self, Shared};

/// The first thing that forbids tracking process `pid`; `None` when there is none. To be asked of
/// every process of the workload. Reads smaps (11 ms per GiB) and all descriptors.
pub fn find(pid: i32) -> Result<Option<Failure>, TrackError> {
    let inspecting = |what| move |source| TrackError::Inspect { pid, what, source };
    let threads = task::threads(pid).map_err(inspecting("the threads"))?;
    if let Some(failure) = threads.iter().find_map(|&tid| find_tracer(pid, tid)) {
        return Ok(Some(failure));
    }
    let mappings = maps::read_smaps(pid).map_err(inspecting("smaps"))?;
    let refused = |(mapping, flags): &(Mapping, Flags)| refuse_mapping(pid, mapping, *flags);
    if let Some(failure) = mappings.iter().find_map(refused) {
        return Ok(Some(failure));
    }
    // A thread may have a descriptor table of its own.
    let own_table = |tid| ptrace::compare(pid, tid, Shared::Files).is_ok_and(|order| order.is_ne());
    for tid in threads
        .into_iter()
        .filter(|&tid| tid == pid || own_table(tid))
    {
        let found = find_descriptor(pid, tid).map_err(inspecting("descriptors"))?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn find_tracer(pid: i32, tid: i32) -> Option<Failure> {
    let tracer = task::Status::read(tid).ok()?.tracer;
    let text = format!("thread {tid} of process {pid} is traced by process {tracer}");
    (tracer != 0).then(|| Failure::new(ErrorCode::Traced, text))
}

fn refuse_mapping(pid: i32, mapping: &Mapping, flags: Flags) -> Option<Failure> {
    let name = mapping.name.as_str();
    let (code, what) = if flags.any(Flags::HUGETLB) {
        (ErrorCode::Hugetlb, "huge pages of hugetlbfs")
    } else if name.starts_with("/[aio]") {
        (ErrorCode::DirectIo, AIO_RING)
    } else if name.starts_with("anon_inode:[io_uring]") {
        (ErrorCode::IoUring, "an io_uring")
    } else if name == "/secretmem" || name.starts_with("/secretmem (deleted)") {
        (ErrorCode::Secretmem, "secret memory")
    } else if flags.any(Flags::IO.with(Flags::PFNMAP)) && !mapping.is_kernel_made() {
        (ErrorCode::Untrackable, "memory of a device")
    } else {
        return None;
    };
    let (start, end) = (mapping.range.start, mapping.range.end);
    let text = format!("process {pid} maps {what} at {start:x}-{end:x} {name}");
    let text = format!("{}{}", text.trim_end(), advice(code, what));
    Some(Failure::new(code, text))
}

/// What helps, in the cases that people meet.
fn advice(code: ErrorCode, what: &str) -> &'static str {
    match code {
        ErrorCode::DirectIo if what == AIO_RING => {
            "; start the program without native AIO (MariaDB and MySQL: innodb_use_native_aio=0)"
        }
        ErrorCode::DirectIo if what == DIRECT_FILE => {
            "; start the program without O_DIRECT (MariaDB and MySQL: innodb_flush_method=fsync)"
        }
        ErrorCode::IoUring => {
            "; switch it off in the program (MariaDB: innodb_use_native_aio=0; Node.js: \
             UV_USE_IO_URING=0), or start it under a seccomp profile that denies io_uring_setup, \
             as those of container runtimes do"
        }
        _ => "",
    }
}

const AIO_RING: &str = "a ring of asynchronous I/O";
const DIRECT_FILE: &str = "a file open for direct I/O";

fn find_descriptor(pid: i32, tid: i32) -> io::Result<Option<Failure>> {
    for entry in fs::read_dir(format!("/proc/{tid}/fd"))? {
        let entry = entry?;
        // A descriptor that was closed meanwhile is no objection.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let (number, target) = (entry.file_name(), target.to_string_lossy().into_owned());
        let number = number.to_string_lossy();
        if let Some((code, what)) = refuse_descriptor(tid, &number, &target) {
            let advice = advice(code, what);
            let text = format!("process {pid} has {what} as descriptor {number}: {target}{advice}");
            return Ok(Some(Failure::new(code, text)));
        }
    }
    Ok(None)
}

fn refuse_descriptor(tid: i32, number: &str, target: &str) -> Option<(ErrorCode, &'static str)> {
    match target {
        "anon_inode:[io_uring]" => Some((ErrorCode::IoUring, "an io_uring")),
        "anon_inode:[userfaultfd]" => Some((ErrorCode::Untrackable, "a userfaultfd")),
        _ if target.starts_with("/dev/vfio/") || target.starts_with("/dev/infiniband/") => {
            Some((ErrorCode::DirectIo, "a device that writes its memory"))
        }
        // On a pipe the flag means packets, not direct I/O; only files have paths.
        _ if target.starts_with('/') && is_direct(tid, number) => {
            Some((ErrorCode::DirectIo, DIRECT_FILE))
        }
        _ => None,
    }
}

fn is_direct(tid: i32, number: &str) -> bool {
    let info = fs::read_to_string(format!("/proc/{tid}/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
}
