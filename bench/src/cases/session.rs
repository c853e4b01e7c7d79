//! What daemons leave behind: a process whose session's leader is dead, one whose group's leader is
//! dead, a zombie in a dead session, adopted by a process that adopts orphans.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getpgid, getpid, getsid, setpgid, setsid};

use super::Case;
use super::tree::{child, end, parent_of, state_of, wait_until};
use crate::sys::memory::shared_words;
use crate::sys::process::exit_now;

/// Where each process says who it is.
const SESSION: usize = 0;
const IN_SESSION: usize = 1;
const ZOMBIE: usize = 2;
const GROUP: usize = 3;
const IN_GROUP: usize = 4;
const ORPHAN: usize = 5;
const BEATS: usize = 6;
const WORDS: usize = 7;

/// How the zombie ended.
const ZOMBIE_CODE: i32 = 9;

/// The case.
#[derive(Debug)]
pub struct Orphans {
    words: &'static [AtomicU64],
    waiting: Option<Pid>,
}

impl Orphans {
    pub fn start() -> Result<Box<dyn Case>> {
        set_child_subreaper(true).context("adopting orphans")?;
        let words = shared_words(WORDS).context("shared memory")?;
        Ok(Box::new(Self {
            words,
            waiting: None,
        }))
    }

    fn is(&self, who: usize) -> Pid {
        Pid::from_raw(i32::try_from(self.words[who].load(Ordering::Acquire)).unwrap_or_default())
    }

    fn made(&self, who: usize) -> bool {
        wait_until(|| self.is(who).as_raw() != 0)
    }

    /// A session whose leader leaves two processes behind.
    fn leave_session(&self) {
        let Ok(session) = setsid() else { return };
        self.words[SESSION].store(session.as_raw().unsigned_abs().into(), Ordering::Release);
        let words = self.words;
        let beat = move || {
            says(words, IN_SESSION);
            loop {
                words[BEATS].fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(BEAT);
            }
        };
        let leader = getpid();
        let become_zombie = move || {
            says(words, ZOMBIE);
            // It must be its adopter's child when it ends.
            wait_until(|| parent_of(getpid()) != Some(leader));
            exit_now(ZOMBIE_CODE);
        };
        if child(beat).is_ok() && child(become_zombie).is_ok() {
            self.made(IN_SESSION);
            self.made(ZOMBIE);
        }
    }

    /// A group whose leader leaves one.
    fn leave_group(&self) {
        let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
        says(self.words, GROUP);
        let words = self.words;
        let stay = move || {
            says(words, IN_GROUP);
            sleep_on();
        };
        if child(stay).is_ok() {
            self.made(IN_GROUP);
        }
    }
}

impl Case for Orphans {
    fn arrange(&mut self) -> Result<()> {
        self.words
            .iter()
            .for_each(|word| word.store(0, Ordering::Release));
        let leader = child(|| self.leave_session()).context("forking")?;
        waitpid(leader, None).context("waiting for the session's leader")?;
        let leader = child(|| self.leave_group()).context("forking")?;
        waitpid(leader, None).context("waiting for the group's leader")?;
        let waiting = child(|| {
            // Blocked, it would stay pending.
            let _ = SigSet::from(Signal::SIGUSR2).thread_block();
            let _ = set_pdeathsig(Signal::SIGUSR2);
            sleep_on();
        });
        self.waiting = Some(waiting.context("forking")?);
        ensure!(
            wait_until(|| state_of(self.is(ZOMBIE)) == Some('Z')),
            "there is no zombie"
        );
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let mut same = |what: &str, found: Option<Pid>, expected: Pid| {
            if found != Some(expected) {
                wrong.push(format!("{what} is {found:?}, not {expected}"));
            }
        };
        let (session, group) = (self.is(SESSION), self.is(GROUP));
        let all = [IN_SESSION, IN_GROUP, ZOMBIE].map(|who| self.is(who));
        same(
            "the session of the orphan",
            getsid(Some(all[0])).ok(),
            session,
        );
        same(
            "the group of the orphan",
            getpgid(Some(all[0])).ok(),
            session,
        );
        same(
            "the group of the other orphan",
            getpgid(Some(all[1])).ok(),
            group,
        );
        same(
            "the session of the other orphan",
            getsid(Some(all[1])).ok(),
            getpid(),
        );
        for pid in all {
            same("the parent of an orphan", parent_of(pid), getpid());
        }
        let before = self.words[BEATS].load(Ordering::Relaxed);
        if !wait_until(|| self.words[BEATS].load(Ordering::Relaxed) != before) {
            wrong.push("the orphan does not run".to_owned());
        }
        if let Some(waiting) = self.waiting.take() {
            let pending = pending(waiting);
            if pending != [Some(0), Some(0)] {
                wrong.push(format!(
                    "a child was told that its parent died: {pending:?}"
                ));
            }
            end(waiting);
        }
        // It still adopts.
        let words = self.words;
        let parent = child(move || {
            let orphan = child(move || {
                says(words, ORPHAN);
                sleep_on();
            });
            if orphan.is_ok() {
                wait_until(|| words[ORPHAN].load(Ordering::Acquire) != 0);
            }
        });
        waitpid(parent.context("forking")?, None).context("waiting for a parent")?;
        let orphan = self.is(ORPHAN);
        let adopter = parent_of(orphan);
        if adopter != Some(getpid()) {
            wrong.push(format!("the parent of a new orphan is {adopter:?}"));
        }
        let zombie = waitid(
            Id::Pid(self.is(ZOMBIE)),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        );
        if zombie != Ok(WaitStatus::Exited(self.is(ZOMBIE), ZOMBIE_CODE)) {
            wrong.push(format!("the zombie is {zombie:?}"));
        }
        [orphan, all[0], all[1]].into_iter().for_each(end);
        Ok(wrong)
    }
}

/// Masks of the signals that wait for a thread, and for its process.
fn pending(pid: Pid) -> [Option<u64>; 2] {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    let status = status.unwrap_or_default();
    ["SigPnd:", "ShdPnd:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
    })
}

fn says(words: &[AtomicU64], who: usize) {
    words[who].store(getpid().as_raw().unsigned_abs().into(), Ordering::Release);
}

fn sleep_on() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

const BEAT: Duration = Duration::from_millis(2);
