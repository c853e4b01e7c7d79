//! Which process a pid means: a number is given to another process once its own has ended.
//!
//! Invariant: as long as the process behind a pidfd has not ended, its pid names it and nothing
//! else. So what was read by number was read of that process, if it has not ended *afterwards*.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use pageferry_sys::ptrace::{is_alive, pidfd_open};
use procfs::process::Process;

/// Names this boot of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Generations of processes that are looked through for an ancestor.
const ANCESTORS_MAX: usize = 4096;

/// What tells a process from every other that ever had its pid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its pid in this node's pid namespace.
    pub pid: i32,
    /// When it started, in clock ticks since the boot.
    pub started: u64,
    /// Which boot that was.
    pub boot: String,
}

/// A process that is held on to.
#[derive(Debug)]
pub struct Anchor {
    identity: Identity,
    pidfd: OwnedFd,
}

impl Identity {
    /// Of the process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = Process::new(pid).and_then(|process| process.stat());
        Ok(Self {
            pid,
            started: stat.map_err(io::Error::other)?.starttime,
            boot: boot()?,
        })
    }

    /// Whether this is the boot that the process belongs to.
    pub fn is_this_boot(&self) -> bool {
        boot().is_ok_and(|boot| boot == self.boot)
    }
}

impl Anchor {
    /// Holds on to the process that has this pid now.
    pub fn new(pid: i32) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        let identity = Identity::of(pid)?;
        let anchor = Self { identity, pidfd };
        if anchor.is_alive() {
            Ok(anchor)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }

    /// Holds on to a process that was known before; none if its pid is free or means another.
    pub fn again(identity: &Identity) -> Option<Self> {
        let anchor = Self::new(identity.pid).ok()?;
        (anchor.identity == *identity).then_some(anchor)
    }

    /// What it is known by.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether its pid still means it, and so did until now.
    pub fn is_alive(&self) -> bool {
        is_alive(self.pidfd.as_fd())
    }
}

/// The parent of a process, its parent, and so on to the first process of this pid namespace.
pub fn ancestors(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = pid;
    while found.len() < ANCESTORS_MAX {
        let stat = Process::new(next).and_then(|process| process.stat());
        match stat {
            Ok(stat) if 0 < stat.ppid => {
                found.push(stat.ppid);
                next = stat.ppid;
            }
            Ok(_) | Err(_) => break,
        }
    }
    found
}

/// What names this boot of the machine.
pub fn boot() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Reaped(Child);

    impl Drop for Reaped {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn sleeper() -> Reaped {
        Reaped(Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn pid(child: &Reaped) -> i32 {
        i32::try_from(child.0.id()).unwrap()
    }

    #[test]
    fn a_process_that_has_ended_is_not_found_again() {
        let mut child = sleeper();
        let anchor = Anchor::new(pid(&child)).unwrap();
        assert!(anchor.is_alive());
        assert!(Anchor::again(anchor.identity()).is_some());
        child.0.kill().unwrap();
        child.0.wait().unwrap();
        assert!(!anchor.is_alive());
        assert!(Anchor::again(anchor.identity()).is_none());
    }

    #[test]
    fn another_process_under_the_same_pid_is_another() {
        let child = sleeper();
        let identity = Identity::of(pid(&child)).unwrap();
        let before = Identity {
            started: identity.started - 1,
            ..identity.clone()
        };
        assert!(Anchor::again(&before).is_none());
        let elsewhen = Identity {
            boot: "another".to_owned(),
            ..identity
        };
        assert!(Anchor::again(&elsewhen).is_none());
    }

    #[test]
    fn the_parent_is_an_ancestor() {
        let child = sleeper();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(ancestors(pid(&child)).contains(&own));
        assert!(!ancestors(own).contains(&pid(&child)));
    }
}
