//! File locks of another process: taken by itself, and let go.
//!
//! A record lock (`F_SETLK`) belongs to the process, so only one of its threads can take it or let
//! go of it. The other two kinds belong to the open file, of which anybody may have a descriptor:
//! they are let go of from outside. They are taken by the process all the same, as the kernel shows
//! who has taken a lock, and forgets who has ended.
//!
//! Absent: which locks a process has; leases.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use pageferry_cgroup::freezer::Freezer;
use pageferry_sys::ptrace;
use serde::{Deserialize, Serialize};

use crate::call::Borrowed;
use crate::{InjectError, frozen, with_thread};

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
}

/// The kinds of file locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// another node has it may know nothing.
    pub fn holder(&self) -> Option<i32> {
        let file = fs::metadata(format!("/proc/{}/fd/{}", self.pid, self.fd)).ok()?;
        let (device, inode) = (file.dev(), file.ino());
        let name = format!(
            "{:02x}:{:02x}:{inode}",
            libc::major(device),
            libc::minor(device)
        );
        let others = Shown::all().into_iter().filter(|shown| {
            let is_own = shown.pid == self.pid && self.kind == LockKind::Posix;
            !shown.waits && !is_own && shown.file == name
        });
        let in_the_way = |shown: &Shown| self.excludes(shown);
        let found = others.into_iter().find(in_the_way);
        found.map(|shown| shown.pid).filter(|pid| 0 < *pid)
    }

    /// Whether both cannot be had at once, by different owners, on the same file.
    pub fn excludes(&self, other: &Shown) -> bool {
        let last = self.bytes.map(|bytes| self.start.saturating_add(bytes - 1));
        (self.kind == LockKind::Flock) == (other.kind == LockKind::Flock)
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

/// A lock as the kernel shows it, of any process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its kind.
    pub kind: LockKind,
    /// It is waited for.
    pub waits: bool,
    /// It keeps all others out.
    pub exclusive: bool,
    /// Who has taken it, or waits; -1 where the kernel does not tell.
    pub pid: i32,
    /// The file: device and inode, as the kernel writes them.
    pub file: String,
    /// The first byte.
    pub start: u64,
    /// The last; none if it goes to the end.
    pub last: Option<u64>,
}

/// What the kernel shows as a lock, and is none that a process could take again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other(pub String);

impl Shown {
    /// All of them that this process can see. Empty if the kernel does not tell.
    pub fn all() -> Vec<Self> {
        let text = fs::read_to_string("/proc/locks").unwrap_or_default();
        text.lines()
            .filter_map(|line| Self::parse(line)?.ok())
            .collect()
    }

    /// One line, of `/proc/locks` or behind `lock:` in the `fdinfo` of a descriptor. None if it is
    /// no line of a lock.
    pub fn parse(line: &str) -> Option<Result<Self, Other>> {
        // "1: POSIX  ADVISORY  WRITE 4711 00:1f:42 0 99": number, kind, strictness, access, whose,
        // where, from and to. Behind the number of who waits stands an arrow.
        let mut words = line.split_ascii_whitespace().skip(1).peekable();
        let waits = words.next_if_eq(&"->").is_some();
        let (kind, strictness, access) = (words.next()?, words.next()?, words.next()?);
        let (pid, file, start, last) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let kind = match (kind, strictness) {
            ("POSIX", "ADVISORY") => LockKind::Posix,
            ("OFDLCK", "ADVISORY") => LockKind::Ofd,
            ("FLOCK", "ADVISORY") => LockKind::Flock,
            _ => return Some(Err(Other(format!("{kind} {access}")))),
        };
        Some(Ok(Self {
            kind,
            waits,
            exclusive: access == "WRITE",
            pid: pid.parse().ok()?,
            file: file.to_owned(),
            start: start.parse().ok()?,
            last: if last == "EOF" {
                None
            } else {
                Some(last.parse().ok()?)
            },
        }))
    }
}

/// Most locks of one workload.
pub const LOCKS_MAX: usize = 1 << 16;

/// Longest list of them, in bytes: a path of some hundred bytes in each.
const LIST_BYTES_MAX: u64 = 32 << 20; // 32 MiB

/// Writes a list of locks to a file, in the place of what was there.
pub fn write(path: &Path, locks: &[FileLock]) -> io::Result<()> {
    let bytes = serde_json::to_vec(locks)?;
    if LOCKS_MAX < locks.len() || LIST_BYTES_MAX < bytes.len() as u64 {
        return Err(io::Error::other(format!(
            "{} locks are too many",
            locks.len()
        )));
    }
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, bytes)?;
    fs::rename(unfinished, path)
}

/// Reads a list of locks.
pub fn read(path: &Path) -> io::Result<Vec<FileLock>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(LIST_BYTES_MAX + 1)
        .read_to_end(&mut bytes)?;
    if LIST_BYTES_MAX < bytes.len() as u64 {
        return Err(io::Error::other("the list is too long"));
    }
    let locks: Vec<FileLock> = serde_json::from_slice(&bytes)?;
    // Where an empty range is none, and the kernel counts to i64::MAX.
    let is_odd = |lock: &FileLock| {
        let last = lock
            .start
            .checked_add(lock.bytes.unwrap_or(1))
            .map(i64::try_from);
        lock.bytes == Some(0) || !matches!(last, Some(Ok(_)))
    };
    if LOCKS_MAX < locks.len() || locks.iter().any(is_odd) {
        return Err(io::Error::other(
            "it has a lock that cannot be, or too many",
        ));
    }
    Ok(locks)
}

/// All locks of each process.
fn by_process(locks: &[FileLock]) -> BTreeMap<i32, Vec<&FileLock>> {
    let mut all: BTreeMap<i32, Vec<&FileLock>> = BTreeMap::new();
    for lock in locks {
        all.entry(lock.pid).or_default().push(lock);
    }
    all
}

/// Lets go of `locks` of processes in a frozen cgroup, which stays frozen.
pub fn let_go_frozen(locks: &[FileLock], freezer: &Freezer) -> Result<(), InjectError> {
    for (pid, locks) in by_process(locks) {
        let pidfd = opened(pid)?;
        let of_process = |lock: &&FileLock| lock.kind == LockKind::Posix;
        let (own, open): (Vec<_>, Vec<_>) = locks.into_iter().partition(of_process);
        for lock in open {
            lock.let_go_outside(pidfd.as_fd())?;
        }
        if !own.is_empty() {
            frozen::with_thread(pid, freezer, |thread| {
                own.iter().try_for_each(|lock| lock.let_go(thread))
            })?;
        }
    }
    Ok(())
}

/// Takes `locks` for processes in a frozen cgroup, which stays frozen. One that another has, if so:
/// the others may be taken.
pub fn take_frozen(locks: &[FileLock], freezer: &Freezer) -> Result<Option<FileLock>, InjectError> {
    for (pid, locks) in by_process(locks) {
        let missing = frozen::with_thread(pid, freezer, |thread| take_each(&locks, thread))?;
        if missing.is_some() {
            return Ok(missing);
        }
    }
    Ok(None)
}

/// The same for processes that wait for something, and go on waiting.
pub fn take_held(locks: &[FileLock], stop_max: Duration) -> Result<Option<FileLock>, InjectError> {
    for (pid, locks) in by_process(locks) {
        let missing = with_thread(pid, pid, stop_max, |thread| take_each(&locks, thread))?;
        if missing.is_some() {
            return Ok(missing);
        }
    }
    Ok(None)
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
    fn locks_are_read_as_the_kernel_shows_them() {
        let parse = |line| Shown::parse(line);
        let posix = Shown {
            kind: LockKind::Posix,
            waits: false,
            exclusive: true,
            pid: 4711,
            file: "00:1f:42".to_owned(),
            start: 0,
            last: Some(99),
        };
        let line = "1: POSIX  ADVISORY  WRITE 4711 00:1f:42 0 99";
        assert_eq!(parse(line), Some(Ok(posix.clone())));
        let line = "1: -> OFDLCK ADVISORY  READ -1 00:1f:42 200 EOF";
        let waits = Shown {
            kind: LockKind::Ofd,
            waits: true,
            exclusive: false,
            pid: -1,
            start: 200,
            last: None,
            ..posix
        };
        assert_eq!(parse(line), Some(Ok(waits)));
        let lease = "3: LEASE  ACTIVE    WRITE 4711 00:1f:42 0 EOF";
        assert_eq!(parse(lease), Some(Err(Other("LEASE WRITE".to_owned()))));
        let deleg = "3: DELEG  ACTIVE    READ 4711 00:1f:42 0 EOF";
        assert_eq!(parse(deleg), Some(Err(Other("DELEG READ".to_owned()))));
        assert_eq!(parse("pos:\t0"), None);
    }

    #[test]
    fn a_list_reads_back_and_one_that_cannot_be_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list");
        let lock = |start, bytes| FileLock {
            pid: 7,
            fd: 3,
            kind: LockKind::Flock,
            exclusive: true,
            start,
            bytes,
            path: "/srv/db".to_owned(),
        };
        write(&path, &[lock(0, None), lock(5, Some(7))]).unwrap();
        assert_eq!(read(&path).unwrap(), [lock(0, None), lock(5, Some(7))]);
        let text = fs::read_to_string(&path).unwrap();
        let first = r#"[{"pid":7,"fd":3,"kind":"flock","exclusive":true,"start":0,"bytes":null,"#;
        assert!(text.starts_with(first), "{text}");
        for odd in [
            lock(0, Some(0)),
            lock(1 << 63, None),
            lock(1, Some(u64::MAX)),
        ] {
            write(&path, &[odd]).unwrap();
            assert!(read(&path).is_err());
        }
        fs::write(&path, "[{}]").unwrap();
        assert!(read(&path).is_err());
        let many = vec![lock(0, None); LOCKS_MAX + 1];
        assert!(write(&path, &many).is_err());
    }

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
        };
        let shown = |line| Shown::parse(line).unwrap().unwrap();
        let read = shown("1: POSIX ADVISORY READ 9 00:1f:42 100 199");
        let excludes = |lock: FileLock| lock.excludes(&read);
        assert!(excludes(ours(LockKind::Posix, true, 0, Some(101))));
        assert!(!excludes(ours(LockKind::Posix, true, 0, Some(100))));
        assert!(excludes(ours(LockKind::Ofd, true, 199, None)));
        assert!(!excludes(ours(LockKind::Ofd, true, 200, None)));
        assert!(!excludes(ours(LockKind::Posix, false, 0, None)));
        assert!(!excludes(ours(LockKind::Flock, true, 0, None)));
        let all = ours(LockKind::Posix, true, 0, None).to_string();
        assert_eq!(all, "POSIX write lock on all of /f");
        let some = ours(LockKind::Ofd, false, 5, Some(2)).to_string();
        assert_eq!(some, "OFD read lock on bytes 5 to 6 of /f");
    }
}
