//! File locks of another process: taken by itself, and let go.
//!
//! A record lock (`F_SETLK`) belongs to the process, so only one of its threads can take it or let
//! go of it. The other two kinds belong to the open file, of which anybody may have a descriptor:
//! they are let go of from outside. They are taken by the process all the same, as the kernel shows
//! who has taken a lock, and forgets who has ended.
//!
//! Of several locks a process tree has all, or none: what a try has taken before it met one that
//! another has is let go of again, as that other may wait for it.
//!
//! Lists name processes by number. Whose a number is is asked before each use: who has ended has
//! let go, and a stranger is left alone (`whose`).
//!
//! Absent: which locks a process has; leases.

mod list;
mod shown;
mod whose;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use pageferry_cgroup::freezer::Freezer;
use pageferry_sys::ptrace;
use serde::{Deserialize, Serialize};

use crate::call::Borrowed;
use crate::{InjectError, frozen, with_thread};
pub use list::{LOCKS_MAX, read, write};
pub use shown::{Shown, ShownKind};

/// A lock that a process has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    /// The process, in the pid namespace of whoever is told.
    pub pid: i32,
    /// A descriptor of it for the open file.
    pub fd: i32,
    /// Which kind it is.
    pub kind: LockKind,
    /// Nobody else may have one.
    pub exclusive: bool,
    /// The first byte.
    pub start: u64,
    /// How many; none if it goes to the end of the file, wherever that will be.
    pub bytes: Option<u64>,
    /// The file, for whoever reads of it.
    pub path: String,
    /// The file, for the kernel of the process: device and inode, as it writes them. None if it was
    /// not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// When the process started: with the pid, its identity. None if that was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
}

/// The kinds of file locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockKind {
    /// `flock`: of the open file, on all of it.
    Flock,
    /// `F_OFD_SETLK`: of the open file.
    Ofd,
    /// `F_SETLK`: of the process.
    Posix,
}

impl FileLock {
    /// Takes it with a thread of its process, without waiting. False if another has it.
    pub fn take(&self, thread: &mut Borrowed<'_>) -> Result<bool, InjectError> {
        let fd = self.fd.cast_unsigned().into();
        let done = match self.kind {
            LockKind::Flock => {
                let how = if self.exclusive {
                    libc::LOCK_EX
                } else {
                    libc::LOCK_SH
                };
                let how = (how | libc::LOCK_NB).cast_unsigned().into();
                thread.call("flock", libc::SYS_flock, [fd, how, 0])
            }
            LockKind::Ofd => self.set(thread, libc::F_OFD_SETLK, self.access()),
            LockKind::Posix => self.set(thread, libc::F_SETLK, self.access()),
        };
        match done {
            Ok(_) => Ok(true),
            Err(InjectError::Call { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets go of it with a thread of its process. Does nothing if the process has it no more.
    pub fn let_go(&self, thread: &mut Borrowed<'_>) -> Result<(), InjectError> {
        let fd = self.fd.cast_unsigned().into();
        let free = libc::F_UNLCK;
        match self.kind {
            LockKind::Flock => {
                let how = libc::LOCK_UN.cast_unsigned().into();
                thread.call("flock", libc::SYS_flock, [fd, how, 0])
            }
            LockKind::Ofd => self.set(thread, libc::F_OFD_SETLK, free),
            LockKind::Posix => self.set(thread, libc::F_SETLK, free),
        }
        .map(drop)
    }

    /// Lets go of one that belongs to the open file, of which `pidfd`'s process has a descriptor.
    pub fn let_go_outside(&self, pidfd: BorrowedFd<'_>) -> Result<(), InjectError> {
        let failed = |source| InjectError::Take {
            pid: self.pid,
            number: self.fd,
            source,
        };
        let file = ptrace::pidfd_getfd(pidfd, self.fd).map_err(failed)?;
        let file = File::from(file);
        match self.kind {
            LockKind::Flock => file.unlock().map_err(failed),
            LockKind::Ofd => {
                let all = self.record(libc::F_UNLCK);
                let free = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&all));
                free.map(drop).map_err(|errno| failed(errno.into()))
            }
            LockKind::Posix => Err(failed(io::Error::other("it belongs to the process"))),
        }
    }

    fn set(&self, thread: &mut Borrowed<'_>, how: i32, what: i32) -> Result<u64, InjectError> {
        let first = [self.fd.cast_unsigned().into(), how.cast_unsigned().into()];
        let record = self.record(what);
        let mut bytes = [0; size_of::<libc::flock>()];
        // struct flock of x86-64: two u16, four bytes of nothing, two i64, an i32, nothing again.
        bytes[..2].copy_from_slice(&record.l_type.to_ne_bytes());
        bytes[2..4].copy_from_slice(&record.l_whence.to_ne_bytes());
        bytes[8..16].copy_from_slice(&record.l_start.to_ne_bytes());
        bytes[16..24].copy_from_slice(&record.l_len.to_ne_bytes());
        thread.call_with("fcntl", libc::SYS_fcntl, first, &bytes)
    }

    fn record(&self, what: i32) -> libc::flock {
        libc::flock {
            l_type: i16::try_from(what).unwrap_or_default(),
            l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
            l_start: i64::try_from(self.start).unwrap_or(i64::MAX),
            // 0 is to the end of the file.
            l_len: self
                .bytes
                .map_or(0, |bytes| i64::try_from(bytes).unwrap_or(0)),
            l_pid: 0,
        }
    }

    const fn access(&self) -> i32 {
        if self.exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        }
    }

    /// Who has one that keeps the process from having this, as far as this node knows: of what
    /// another node has it may know nothing. May ask the storage.
    pub fn holder(&self) -> Option<i32> {
        let file = self.file.clone().or_else(|| self.named_by_kernel())?;
        let others = Shown::all().ok()?.into_iter().filter(|shown| {
            let is_own = shown.pid == self.pid && self.kind == LockKind::Posix;
            let is_lock = matches!(shown.kind, ShownKind::Lock(_));
            !shown.waits && is_lock && !is_own && shown.file == file
        });
        let in_the_way = |shown: &Shown| self.excludes(shown);
        let found = others.into_iter().find(in_the_way);
        found.map(|shown| shown.pid).filter(|pid| 0 < *pid)
    }

    /// The file as the kernel names it beside a lock.
    fn named_by_kernel(&self) -> Option<String> {
        let file = fs::metadata(format!("/proc/{}/fd/{}", self.pid, self.fd)).ok()?;
        let (device, inode) = (file.dev(), file.ino());
        Some(format!(
            "{:02x}:{:02x}:{inode}",
            libc::major(device),
            libc::minor(device)
        ))
    }

    /// Whether both cannot be had at once, by different owners, on the same file. What is no lock
    /// that is known is taken for one that excludes all.
    pub fn excludes(&self, other: &Shown) -> bool {
        let ShownKind::Lock(kind) = other.kind else {
            return true;
        };
        let last = self.bytes.map(|bytes| self.start.saturating_add(bytes - 1));
        (self.kind == LockKind::Flock) == (kind == LockKind::Flock)
            && (self.exclusive || other.exclusive)
            && other.last.is_none_or(|last| self.start <= last)
            && last.is_none_or(|last| other.start <= last)
    }
}

impl fmt::Display for FileLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.exclusive { "write" } else { "read" };
        let kind = match self.kind {
            LockKind::Flock => "flock",
            LockKind::Ofd => "OFD",
            LockKind::Posix => "POSIX",
        };
        write!(f, "{kind} {access} lock on ")?;
        match self.bytes {
            None if self.start == 0 => f.write_str("all")?,
            None => write!(f, "bytes {} to the end", self.start)?,
            Some(bytes) => write!(f, "bytes {} to {}", self.start, self.start + bytes - 1)?,
        }
        write!(f, " of {}", self.path)
    }
}

/// All locks of each process.
fn by_process(locks: &[FileLock]) -> BTreeMap<i32, Vec<&FileLock>> {
    let mut all: BTreeMap<i32, Vec<&FileLock>> = BTreeMap::new();
    for lock in locks {
        all.entry(lock.pid).or_default().push(lock);
    }
    all
}

/// A lock that is not to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The lock.
    pub lock: FileLock,
    /// Who has it, as far as this node knows.
    pub holder: Option<i32>,
}

/// What came of a try to take all locks of a frozen tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// One that another has, if so: none is taken then.
    pub missing: Option<Missing>,
    /// Processes that had some, and have ended.
    pub ended: Vec<i32>,
}

/// Lets go of `locks` of processes in a frozen cgroup, which stays frozen. Who of them has ended
/// has let go, and is told; who is being killed is seen to its end.
pub fn let_go_frozen(locks: &[FileLock], freezer: &Freezer) -> Result<Vec<i32>, InjectError> {
    let mut ended = Vec::new();
    for (pid, locks) in by_process(locks) {
        let process = (pid, locks[0].started);
        let let_go = whose::unless_ended(process, freezer, |pidfd| {
            let own = let_go_open(locks, pidfd)?;
            if own.is_empty() {
                return Ok(());
            }
            frozen::with_thread((pid, pidfd), freezer, |thread| {
                own.iter().try_for_each(|lock| lock.let_go(thread))
            })
        })?;
        if let_go.is_none() {
            ended.push(pid);
        }
    }
    Ok(ended)
}

/// Which processes of `locks` have ended, or are being killed: frozen, they do not come back.
pub fn ended(locks: &[FileLock]) -> Vec<i32> {
    let ended = |(pid, locks): (i32, Vec<&FileLock>)| {
        whose::has_ended(pid, locks[0].started).then_some(pid)
    };
    by_process(locks).into_iter().filter_map(ended).collect()
}

/// Lets go of those that belong to open files; the others.
fn let_go_open<'a>(
    locks: Vec<&'a FileLock>,
    pidfd: BorrowedFd<'_>,
) -> Result<Vec<&'a FileLock>, InjectError> {
    let of_process = |lock: &&FileLock| lock.kind == LockKind::Posix;
    let (own, open): (Vec<_>, Vec<_>) = locks.into_iter().partition(of_process);
    open.iter()
        .try_for_each(|lock| lock.let_go_outside(pidfd))?;
    Ok(own)
}

/// Takes `locks` for processes in a frozen cgroup, which stays frozen: all of them, or none.
pub fn take_frozen(locks: &[FileLock], freezer: &Freezer) -> Result<Taken, InjectError> {
    let mut ended = Vec::new();
    let missing = all_or_none(
        locks,
        |pid, locks| {
            let process = (pid, locks[0].started);
            let taken = whose::unless_ended(process, freezer, |pidfd| {
                frozen::with_thread((pid, pidfd), freezer, |thread| take_each(locks, thread))
            })?;
            taken.map_or_else(
                || {
                    ended.push(pid);
                    Ok(None)
                },
                Ok,
            )
        },
        || let_go_frozen(locks, freezer).map(drop),
    )?;
    Ok(Taken { missing, ended })
}

/// The same for processes that wait for something, and go on waiting. Answers with one that another
/// has, if so.
pub fn take_held(locks: &[FileLock], stop_max: Duration) -> Result<Option<Missing>, InjectError> {
    all_or_none(
        locks,
        |pid, locks| with_thread(pid, pid, stop_max, |thread| take_each(locks, thread)),
        || let_go_held(locks, stop_max),
    )
}

fn let_go_held(locks: &[FileLock], stop_max: Duration) -> Result<(), InjectError> {
    for (pid, locks) in by_process(locks) {
        let own = let_go_open(locks, opened(pid)?.as_fd())?;
        if !own.is_empty() {
            with_thread(pid, pid, stop_max, |thread| {
                own.iter().try_for_each(|lock| lock.let_go(thread))
            })?;
        }
    }
    Ok(())
}

/// Takes the locks of one process after the other. Where that ends before the last, all are let go
/// of: also those of a try before this one, whose program has ended in the middle.
fn all_or_none(
    locks: &[FileLock],
    mut take: impl FnMut(i32, &[&FileLock]) -> Result<Option<FileLock>, InjectError>,
    let_go: impl FnOnce() -> Result<(), InjectError>,
) -> Result<Option<Missing>, InjectError> {
    let taken =
        by_process(locks)
            .into_iter()
            .try_fold(None, |missing, (pid, locks)| match missing {
                Some(_) => Ok(missing),
                None => take(pid, &locks),
            });
    match taken {
        Ok(None) => Ok(None),
        Ok(Some(lock)) => {
            let_go()?;
            let holder = lock.holder();
            Ok(Some(Missing { lock, holder }))
        }
        Err(error) => {
            // Why it could not be taken is what is told.
            let _ = let_go();
            Err(error)
        }
    }
}

fn take_each(
    locks: &[&FileLock],
    thread: &mut Borrowed<'_>,
) -> Result<Option<FileLock>, InjectError> {
    for lock in locks {
        if !lock.take(thread)? {
            return Ok(Some((*lock).clone()));
        }
    }
    Ok(None)
}

fn opened(pid: i32) -> Result<OwnedFd, InjectError> {
    ptrace::pidfd_open(pid).map_err(|source| InjectError::Inspect {
        tid: pid,
        what: "the process",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_exclude_each_other_where_they_overlap_and_one_writes() {
        let ours = |kind, exclusive, start, bytes| FileLock {
            pid: 1,
            fd: 3,
            kind,
            exclusive,
            start,
            bytes,
            path: "/f".to_owned(),
            file: None,
            started: None,
        };
        let read = Shown {
            kind: ShownKind::Lock(LockKind::Posix),
            waits: false,
            exclusive: false,
            pid: 9,
            file: "00:1f:42".to_owned(),
            start: 100,
            last: Some(199),
        };
        let excludes = |lock: FileLock| lock.excludes(&read);
        assert!(excludes(ours(LockKind::Posix, true, 0, Some(101))));
        assert!(!excludes(ours(LockKind::Posix, true, 0, Some(100))));
        assert!(excludes(ours(LockKind::Ofd, true, 199, None)));
        assert!(!excludes(ours(LockKind::Ofd, true, 200, None)));
        assert!(!excludes(ours(LockKind::Posix, false, 0, None)));
        assert!(!excludes(ours(LockKind::Flock, true, 0, None)));
        let unknown = Shown {
            kind: ShownKind::Other("LEASE READ".to_owned()),
            ..read.clone()
        };
        assert!(ours(LockKind::Flock, false, 0, Some(1)).excludes(&unknown));
        let all = ours(LockKind::Posix, true, 0, None).to_string();
        assert_eq!(all, "POSIX write lock on all of /f");
        let some = ours(LockKind::Ofd, false, 5, Some(2)).to_string();
        assert_eq!(some, "OFD read lock on bytes 5 to 6 of /f");
    }
}
