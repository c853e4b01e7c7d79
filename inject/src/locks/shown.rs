//! Locks as the kernel shows them: in `/proc/locks`, and with a descriptor in its `fdinfo`.
//!
//! Invariant: a line that is not understood is an error, never no lock.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use super::LockKind;

/// How often the kernel is asked for two answers that agree.
const ASKED_MAX: usize = 4;

/// A lock as the kernel shows it, of any process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shown {
    /// Its kind.
    pub kind: ShownKind,
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

/// What the kernel calls a lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShownKind {
    /// A lock that a process could take again, or waits for. File systems with a server have a
    /// record lock checked (`ACCESS`) before they ask for it: who waits then waits for one.
    Lock(LockKind),
    /// A lease, or what is not known: its name and access.
    Other(String),
}

impl Shown {
    /// All of them that this process can see, each once. The kernel shows them in pieces of a page,
    /// between which others take locks and let go: one that stays may be seen twice then, or never.
    /// So it is asked until two answers agree, and where locks change all the time, all that was
    /// seen is told: rather one too many.
    pub fn all() -> io::Result<Vec<Self>> {
        let mut all = BTreeSet::new();
        let mut last = None;
        for _ in 0..ASKED_MAX {
            let text = fs::read_to_string("/proc/locks")?;
            let now: BTreeSet<_> = Self::parse_all(&text)?.into_iter().collect();
            if last.as_ref() == Some(&now) {
                return Ok(now.into_iter().collect());
            }
            all.extend(now.iter().cloned());
            last = Some(now);
        }
        Ok(all.into_iter().collect())
    }

    fn parse_all(text: &str) -> io::Result<Vec<Self>> {
        let parsed = text.lines().map(|line| {
            Self::parse(line).ok_or_else(|| unreadable(&format!("line {line:?} of /proc/locks")))
        });
        parsed.collect()
    }

    /// Those that are held by way of a descriptor, by its `fdinfo`.
    pub fn of_descriptor(fdinfo: &str) -> io::Result<Vec<Self>> {
        let lines = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
        let parsed = lines
            .map(|line| Self::parse(line).ok_or_else(|| unreadable(&format!("lock {line:?}"))));
        parsed.collect()
    }

    /// One line, of `/proc/locks` or behind `lock:` in the `fdinfo` of a descriptor. None if it is
    /// not understood.
    fn parse(line: &str) -> Option<Self> {
        // "1: POSIX  ADVISORY  WRITE 4711 00:1f:42 0 99": number, kind, strictness, access, whose,
        // where, from and to. Behind the number of who waits stands an arrow.
        let mut words = line.split_ascii_whitespace().skip(1).peekable();
        let waits = words.next_if_eq(&"->").is_some();
        let (kind, _strictness, access) = (words.next()?, words.next()?, words.next()?);
        let (pid, file, start, last) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let kind = match kind {
            "POSIX" | "ACCESS" => ShownKind::Lock(LockKind::Posix),
            "OFDLCK" => ShownKind::Lock(LockKind::Ofd),
            "FLOCK" => ShownKind::Lock(LockKind::Flock),
            _ => ShownKind::Other(format!("{kind} {access}")),
        };
        Some(Self {
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
        })
    }
}

fn unreadable(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what} is not understood"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_as_the_kernel_shows_them() {
        let parse = |line| Shown::parse(line);
        let posix = Shown {
            kind: ShownKind::Lock(LockKind::Posix),
            waits: false,
            exclusive: true,
            pid: 4711,
            file: "00:1f:42".to_owned(),
            start: 0,
            last: Some(99),
        };
        let line = "1: POSIX  ADVISORY  WRITE 4711 00:1f:42 0 99";
        assert_eq!(parse(line), Some(posix.clone()));
        let line = "1: -> OFDLCK ADVISORY  READ -1 00:1f:42 200 EOF";
        let waits = Shown {
            kind: ShownKind::Lock(LockKind::Ofd),
            waits: true,
            exclusive: false,
            pid: -1,
            start: 200,
            last: None,
            ..posix.clone()
        };
        assert_eq!(parse(line), Some(waits));
        // Who waits for a record lock on NFS.
        let line = "1: -> ACCESS ADVISORY  WRITE 4711 00:1f:42 0 99";
        let waits = Shown {
            waits: true,
            ..posix
        };
        assert_eq!(parse(line), Some(waits));
        let other = |line, name: &str| {
            assert_eq!(parse(line).unwrap().kind, ShownKind::Other(name.to_owned()));
        };
        other(
            "3: LEASE  ACTIVE    WRITE 4711 00:1f:42 0 EOF",
            "LEASE WRITE",
        );
        other("3: DELEG  ACTIVE    READ 4711 00:1f:42 0 EOF", "DELEG READ");
        other(
            "3: UNKNOWN UNKNOWN  READ 4711 00:1f:42 0 EOF",
            "UNKNOWN READ",
        );
    }

    #[test]
    fn a_lock_that_is_not_understood_is_an_error() {
        let fdinfo = "pos:\t0\nflags:\t02\nlock:\t1: FLOCK  ADVISORY  WRITE 7 00:1f:42 0 EOF\n";
        assert_eq!(Shown::of_descriptor(fdinfo).unwrap().len(), 1);
        assert!(Shown::of_descriptor("pos:\t0\n").unwrap().is_empty());
        for odd in [
            "lock:\t1: FLOCK",
            "lock:\t1: FLOCK ADVISORY WRITE 7 f x EOF",
        ] {
            let error = Shown::of_descriptor(odd).unwrap_err();
            assert!(error.to_string().contains("is not understood"), "{error}");
        }
        Shown::all().unwrap();
    }
}
