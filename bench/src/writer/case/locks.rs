//! File locks on storage that nodes share: held from the start on, and missed by nobody. Wherever
//! the writer runs, each of its processes has its own.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::Case;
use crate::sys::Cloned;
use crate::sys::memory::shared_words;
use crate::sys::process::{exit_now, fork};

/// The folder of the files, which nodes share. Each is named by what it is locked with and by the
/// writer's pid.
pub const FOLDER: &str = "/srv/shared";

/// The file that is locked by `fcntl`, of the writer with this pid.
pub fn database(pid: i32) -> String {
    format!("locks-{pid}-database")
}

/// How a child says what it found.
const BEATS: usize = 0;
const WRONG: usize = 1;

/// A file, and what the kernel says of its lock.
#[derive(Debug)]
struct Locked {
    file: OwnedFd,
    path: PathBuf,
    /// Kind, access, and range, as they stand in `fdinfo`.
    shown: Vec<&'static str>,
}

/// The case: record locks of two processes, an open file's, and a `flock` that both inherit.
#[derive(Debug)]
pub struct Locks {
    own: Vec<Locked>,
    child: Locked,
    words: &'static [AtomicU64],
    beats: u64,
}

impl Locks {
    pub fn start() -> Result<Box<dyn Case>> {
        let pid = std::process::id();
        let path = |name: &str| Path::new(FOLDER).join(format!("locks-{pid}-{name}"));
        let database = path("database");
        let file = opened(&database)?;
        record(&file, libc::F_WRLCK, 0, 100).context("locking to write")?;
        record(&file, libc::F_RDLCK, 200, 50).context("locking to read")?;
        let database = Locked {
            file: file.into(),
            path: database,
            shown: vec!["POSIX WRITE 0 99", "POSIX READ 200 249"],
        };
        let open = path("open");
        let file = opened(&open)?;
        fcntl(&file, FcntlArg::F_OFD_SETLK(&flock(libc::F_WRLCK, 10, 0)))
            .context("locking an open file")?;
        let open = Locked {
            file: file.into(),
            path: open,
            shown: vec!["OFDLCK WRITE 10 EOF"],
        };
        let whole = path("whole");
        let lock = Flock::lock(opened(&whole)?, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, error)| error).context("locking all")?;
        let whole = Locked {
            // Held for ever: nobody unlocks what is forgotten.
            file: lock.try_clone().context("a second descriptor")?.into(),
            path: whole,
            shown: vec!["FLOCK WRITE 0 EOF"],
        };
        std::mem::forget(lock);
        let words = shared_words(2).context("shared memory")?;
        let child = path("child");
        let child = Locked {
            file: opened(&child)?.into(),
            path: child,
            shown: vec!["POSIX WRITE 0 EOF"],
        };
        let own = vec![database, open, whole];
        if let Cloned::Child = fork().context("forking")? {
            be_child(&own[2], &child, words);
        }
        while words[BEATS].load(Ordering::Acquire) == 0 {
            ensure!(words[WRONG].load(Ordering::Acquire) == 0, "it cannot lock");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Box::new(Self {
            own,
            child,
            words,
            beats: 0,
        }))
    }
}

/// The other process: it has a lock of its own, and the one it was born with.
fn be_child(inherited: &Locked, own: &Locked, words: &[AtomicU64]) -> ! {
    let locked = fcntl(&own.file, FcntlArg::F_SETLK(&flock(libc::F_WRLCK, 0, 0)));
    loop {
        let has_all = locked.is_ok() && [inherited, own].iter().all(|lock| lock.is_held().is_ok());
        if !has_all {
            words[WRONG].store(1, Ordering::Release);
        }
        words[BEATS].fetch_add(1, Ordering::Release);
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Case for Locks {
    fn step(&mut self, _: u64) -> Result<()> {
        self.own.iter().try_for_each(Locked::is_held)?;
        let wrong = self.words[WRONG].load(Ordering::Acquire);
        ensure!(wrong == 0, "the child has not all of its locks");
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        let beats = self.words[BEATS].load(Ordering::Acquire);
        ensure!(beats > self.beats, "the child does nothing any more");
        self.beats = beats;
        for lock in self.own.iter().chain([&self.child]) {
            ensure!(
                lock.is_refused()?,
                "another can lock {}",
                lock.path.display()
            );
        }
        Ok(0)
    }

    fn progress(&self) -> String {
        format!("beats:{}", self.words[BEATS].load(Ordering::Relaxed))
    }
}

impl Locked {
    /// Fails if this process has it no more.
    fn is_held(&self) -> Result<()> {
        let info = format!("/proc/self/fdinfo/{}", self.file.as_raw_fd());
        let info = fs::read_to_string(info).context("what the kernel says")?;
        let mut held: Vec<String> = Vec::new();
        for line in info.lines().filter_map(|line| line.strip_prefix("lock:")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [_, kind, _, access, _, _, from, to] = words[..] {
                held.push(format!("{kind} {access} {from} {to}"));
            }
        }
        held.sort_unstable();
        let mut shown = self.shown.clone();
        shown.sort_unstable();
        ensure!(held == shown, "{} has {held:?}", self.path.display());
        Ok(())
    }

    /// Whether another process, which opens the file anew, cannot have what excludes this lock.
    fn is_refused(&self) -> Result<bool> {
        let words = shared_words(1).context("shared memory")?;
        let asker = fork().context("forking")?;
        if let Cloned::Child = asker {
            let free = opened(&self.path).is_ok_and(|file| {
                if self.shown[0].starts_with("FLOCK") {
                    Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok()
                } else {
                    record(&file, libc::F_WRLCK, 0, 0).is_ok()
                }
            });
            words[0].store(1 + u64::from(free), Ordering::Release);
            exit_now(0);
        }
        if let Cloned::Parent(pid) = asker {
            while waitpid(Pid::from_raw(pid), None) == Err(Errno::EINTR) {}
        }
        Ok(words[0].load(Ordering::Acquire) == 1)
    }
}

fn record(file: &File, kind: i32, start: i64, bytes: i64) -> nix::Result<i32> {
    fcntl(file, FcntlArg::F_SETLK(&flock(kind, start, bytes)))
}

fn flock(kind: i32, start: i64, bytes: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: start,
        l_len: bytes,
        l_pid: 0,
    }
}

fn opened(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file: io::Result<File> = options.open(path);
    file.with_context(|| format!("opening {}", path.display()))
}
