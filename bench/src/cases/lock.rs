//! Locks on a file that both nodes have, where the one who holds it at the source keeps it from the
//! one who is restored at the target.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::unistd::Pid;

use super::Case;
use super::tree::{child, end, wait_until};
use crate::sys::memory::shared_words;
use crate::sys::process::{give_lease, take_lease};

/// How a file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Posix,
    /// Never for longer than some milliseconds, as a database does for each write.
    Momentary,
    Flock,
    OpenFile,
    Lease,
}

/// The case.
#[derive(Debug)]
pub struct HeldLock {
    kind: Kind,
    path: PathBuf,
    file: File,
    flock: Option<Flock<File>>,
    /// Nonzero when the waiter has it.
    waiter_has: &'static AtomicU64,
    waiter: Option<Pid>,
}

impl HeldLock {
    pub fn start(kind: &str, folder: &Path) -> Result<Box<dyn Case>> {
        let kind = match kind {
            "posix" => Kind::Posix,
            "momentary" => Kind::Momentary,
            "flock" => Kind::Flock,
            "ofd" => Kind::OpenFile,
            "lease" => Kind::Lease,
            _ => bail!("there is no {kind} lock"),
        };
        let path = folder.join("database");
        let words = shared_words(1).context("shared memory")?;
        Ok(Box::new(Self {
            kind,
            file: opened(&path)?,
            path,
            flock: None,
            waiter_has: &words[0],
            waiter: None,
        }))
    }

    fn take(&mut self) -> Result<()> {
        match self.kind {
            Kind::Posix | Kind::Momentary => {
                fcntl(&self.file, FcntlArg::F_SETLK(&record(libc::F_WRLCK))).context("locking")?;
            }
            Kind::OpenFile => {
                let lock = record(libc::F_WRLCK);
                fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).context("locking")?;
            }
            Kind::Flock => {
                let file = opened(&self.path)?;
                let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
                self.flock = Some(locked.map_err(|(_, error)| error).context("locking")?);
            }
            Kind::Lease => take_lease(&self.file).context("taking a lease")?,
        }
        Ok(())
    }

    fn give(&mut self) -> Result<()> {
        match self.kind {
            Kind::Posix | Kind::Momentary => {
                fcntl(&self.file, FcntlArg::F_SETLK(&record(libc::F_UNLCK)))
                    .context("unlocking")?;
            }
            Kind::OpenFile => {
                let lock = record(libc::F_UNLCK);
                fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).context("unlocking")?;
            }
            Kind::Flock => self.flock = None,
            Kind::Lease => give_lease(&self.file).context("giving the lease up")?,
        }
        Ok(())
    }

    /// Whether somebody else finds the file locked.
    fn is_locked(&self) -> Result<bool> {
        let words = shared_words(1).context("shared memory")?;
        let asker = child(|| {
            let locked = match opened(&self.path) {
                Ok(file) => !take_as_other(self.kind, file, false),
                Err(_) => false,
            };
            words[0].store(1 + u64::from(locked), Ordering::Release);
        });
        let asker = asker.context("forking")?;
        let answered = wait_until(|| words[0].load(Ordering::Acquire) != 0);
        end(asker);
        ensure!(answered, "nobody says whether the file is locked");
        Ok(words[0].load(Ordering::Acquire) == 2)
    }
}

impl Case for HeldLock {
    fn arrange(&mut self) -> Result<()> {
        if self.kind == Kind::Momentary {
            return Ok(());
        }
        self.take()?;
        // Whoever opened the file would break a lease.
        if self.kind == Kind::Lease {
            return Ok(());
        }
        self.waiter_has.store(0, Ordering::Release);
        let (kind, path, has) = (self.kind, self.path.clone(), self.waiter_has);
        let waiter = child(move || {
            if let Ok(file) = opened(&path)
                && take_as_other(kind, file, true)
            {
                has.store(1, Ordering::Release);
            }
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        self.waiter = Some(waiter.context("forking")?);
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        if self.kind == Kind::Momentary {
            // Half of the time locked, half of it not.
            self.take()?;
            std::thread::sleep(Duration::from_millis(2));
            self.give()?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        if self.kind == Kind::Momentary {
            return Ok(wrong);
        }
        if self.kind != Kind::Lease {
            if !self.is_locked()? {
                wrong.push("the lock is not held any more".to_owned());
            }
            if self.waiter_has.load(Ordering::Acquire) != 0 {
                wrong.push("the waiter got the lock while it was held".to_owned());
            }
        }
        if let Err(error) = self.give() {
            wrong.push(format!("{error:#}"));
        }
        if let Some(waiter) = self.waiter.take() {
            if !wait_until(|| self.waiter_has.load(Ordering::Acquire) != 0) {
                wrong.push("the waiter does not get the lock".to_owned());
            }
            end(waiter);
        }
        Ok(wrong)
    }
}

/// Tries to take the lock of `file`; keeps it if it could.
fn take_as_other(kind: Kind, file: File, wait: bool) -> bool {
    let lock = record(libc::F_WRLCK);
    let taken = match (kind, wait) {
        (Kind::Flock, _) => {
            let how = if wait {
                FlockArg::LockExclusive
            } else {
                FlockArg::LockExclusiveNonblock
            };
            let taken = Flock::lock(file, how);
            return match taken {
                Ok(lock) => {
                    // Held until this process ends.
                    std::mem::forget(lock);
                    true
                }
                Err(_) => false,
            };
        }
        (Kind::OpenFile, true) => again(|| fcntl(&file, FcntlArg::F_OFD_SETLKW(&lock))),
        (Kind::OpenFile, false) => fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)),
        (_, true) => again(|| fcntl(&file, FcntlArg::F_SETLKW(&lock))),
        (_, false) => fcntl(&file, FcntlArg::F_SETLK(&lock)),
    };
    std::mem::forget(file);
    taken.is_ok()
}

/// A wait for a lock may be interrupted.
fn again(mut call: impl FnMut() -> nix::Result<i32>) -> nix::Result<i32> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

fn record(kind: i32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: 0,
        l_len: 100,
        l_pid: 0,
    }
}

fn opened(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}
