//! What a process may have that makes tracking it wrong.
//!
//! Write tracking sees what goes through the page tables. Devices, rings of asynchronous I/O and
//! direct I/O write memory behind them. Before they do, the kernel takes hold of the pages
//! (`get_user_pages`) as for a write, and a page under protection counts as written from then on.
//! But what was taken hold of before a scan is written to after it without another look at the page
//! tables: then a page counts as clean whose contents have changed (an `O_DIRECT` read of 128 KiB
//! in flight over a scan left 32 of 32 pages different at the target).
//!
//! So what may be under way while no thread of the process is in a system call is *forbidden*.
//! There is no telling whether a process will use it, so having it is enough.
//!
//! Direct I/O by `read` and its like is not: a thread is within the call until the last byte is
//! written, uninterruptibly. A scan made while every thread is at rest (see [`super::frozen`]) is
//! in the middle of no such call. What a call wrote that ended before is seen as what it is when
//! the pages are read, and they are dirty, since it took hold of them after the scan before this
//! one. What a call writes that begins later it takes hold of anew, and the next scan finds that.
//! Each page has its own scan in this: that others were scanned at another standstill, and direct
//! I/O came in between, changes nothing for it. So a large space may be scanned in pieces. What
//! writes through pinned pages in other ways does so within system calls too (`process_vm_writev`);
//! pages given to a pipe by `vmsplice` are only read.
//!
//! [`find`] asks for all of it before anything is touched. What was not there then can begin at any
//! moment, so it is asked for again as long as the process is tracked: [`look`] before and after
//! every scan and in the freeze, [`mapping`] of every mapping that a scan reads.
//!
//! What that can miss: something that begins after the look before a scan and is over before the
//! look after it; of direct I/O only as long as no look has seen any. What begins and is over
//! between two scans does no harm. Only what writes before *and* after the scan that protected its
//! page is lost.
//!
//! Absent: everything that only CRIU or the network minds.

mod descriptors;

pub(super) use descriptors::is_other_than_direct;

use std::collections::BTreeSet;
use std::io;

use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::maps::{self, Flags, Mapping};
use super::{Support, TrackError, task};

/// The first thing that forbids tracking process `pid`; `None` when there is none. To be asked of
/// every process of the workload. Reads smaps (11 ms per GiB).
pub fn find(pid: i32, support: &Support) -> Result<Option<Failure>, TrackError> {
    let looked = look(pid, support)?;
    if looked.forbidden.is_some() {
        return Ok(looked.forbidden);
    }
    let mappings = maps::read_smaps(pid).map_err(inspecting(pid, "smaps"))?;
    let mut forbidden = mappings
        .iter()
        .map(|(found, flags)| mapping(pid, found, *flags));
    Ok(forbidden.find_map(|failure| failure))
}

/// What a look at a process found.
#[derive(Debug, Default)]
pub struct Looked {
    /// The first thing that forbids tracking it.
    pub forbidden: Option<Failure>,
    /// A file that it has open for direct I/O, in words: it may be scanned at rest only.
    pub direct: Option<String>,
    /// Inodes of its sockets; not all of them if something forbids tracking.
    pub sockets: BTreeSet<u64>,
}

/// Whether a thread of process `pid` is traced or has registered an io_uring, or it has a
/// descriptor that forbids tracking, or one of direct I/O. 0.1 ms for a thousand threads and as
/// much for a thousand descriptors, where the kernel's iterators can be used.
pub fn look(pid: i32, support: &Support) -> Result<Looked, TrackError> {
    let forbidden = find_of_threads(pid, support)?;
    if forbidden.is_some() {
        return Ok(Looked {
            forbidden,
            ..Looked::default()
        });
    }
    let found = descriptors::find(pid, support.files.as_deref());
    let found = found.map_err(inspecting(pid, "descriptors"))?;
    Ok(Looked {
        forbidden: found.forbidden,
        direct: found.direct,
        sockets: found.sockets,
    })
}

/// Whether a mapping of process `pid` forbids tracking it.
pub fn mapping(pid: i32, mapping: &Mapping, flags: Flags) -> Option<Failure> {
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
        ErrorCode::IoUring => {
            "; switch it off in the program (MariaDB: innodb_use_native_aio=0; Node.js: \
             UV_USE_IO_URING=0), or start it under a seccomp profile that denies io_uring_setup, \
             as those of container runtimes do"
        }
        _ => "",
    }
}

fn hidden_ring(pid: i32) -> Failure {
    let what = "an io_uring";
    let text = format!(
        "a thread of process {pid} has {what}, registered with itself{}",
        advice(ErrorCode::IoUring, what)
    );
    Failure::new(ErrorCode::IoUring, text)
}

const AIO_RING: &str = "a ring of asynchronous I/O";

/// What forbids it of its threads. An io_uring that only a thread knows is in nothing that `/proc`
/// tells.
fn find_of_threads(pid: i32, support: &Support) -> Result<Option<Failure>, TrackError> {
    if let Some(probe) = &support.threads {
        match probe.of(pid) {
            Ok(found) if found.ring => return Ok(Some(hidden_ring(pid))),
            Ok(found) if !found.tracer => return Ok(None),
            Ok(_) => {}
            Err(error) => tracing::debug!(pid, %error, "no threads of the iterator"),
        }
    }
    let threads = task::threads(pid).map_err(inspecting(pid, "the threads"))?;
    let traced = threads.iter().find_map(|&tid| {
        let tracer = task::tracer(tid)?;
        let text = format!("thread {tid} of process {pid} is traced by process {tracer}");
        Some(Failure::new(ErrorCode::Traced, text))
    });
    Ok(traced)
}

fn inspecting(pid: i32, what: &'static str) -> impl Fn(io::Error) -> TrackError {
    move |source| TrackError::Inspect { pid, what, source }
}
