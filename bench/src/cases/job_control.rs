//! Job control: children that are stopped, by whom their parent was told of it or was not.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setpgid};

use super::Case;
use super::tree::{child, end, state_of, wait_until};
use crate::sys::memory::shared_words;

/// What happened to a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Stopped, and its parent was told.
    Heard,
    /// Stopped, and its parent has not asked.
    Unheard,
    /// Stopped as from a terminal.
    Keyboard,
    /// Stopped, and it goes on again.
    Continued,
    /// Stopped with several threads.
    Threaded,
}

const KINDS: [Kind; 5] = [
    Kind::Heard,
    Kind::Unheard,
    Kind::Keyboard,
    Kind::Continued,
    Kind::Threaded,
];

/// Threads of [`Kind::Threaded`].
const THREADS: usize = 8;

#[derive(Debug)]
struct Child {
    kind: Kind,
    pid: Pid,
    /// Each thread that runs counts in one.
    beats: &'static [AtomicU64],
    /// All of them together when it had stopped.
    stopped_at: u64,
}

/// The case.
#[derive(Debug)]
pub struct Stopped {
    /// Nobody may be told again of what he was told: CRIU stops at the target what was stopped, and
    /// the kernel tells of it.
    told_once: bool,
    words: &'static [AtomicU64],
    children: Vec<Child>,
}

impl Stopped {
    pub fn start(told_once: bool) -> Result<Box<dyn Case>> {
        let words = shared_words(KINDS.len() * THREADS).context("shared memory")?;
        Ok(Box::new(Self {
            told_once,
            words,
            children: Vec::new(),
        }))
    }
}

impl Case for Stopped {
    fn arrange(&mut self) -> Result<()> {
        for (index, kind) in KINDS.into_iter().enumerate() {
            let beats = &self.words[index * THREADS..(index + 1) * THREADS];
            let pid = child(|| count(kind, beats)).context("forking")?;
            // Both sides do it, whoever comes first.
            let _ = setpgid(pid, pid);
            self.children.push(Child {
                kind,
                pid,
                beats,
                stopped_at: 0,
            });
        }
        self.children.iter_mut().try_for_each(Child::stop)
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for child in &self.children {
            let found = child.verify(self.told_once);
            wrong.extend(
                found
                    .into_iter()
                    .map(|text| format!("{:?}: {text}", child.kind)),
            );
        }
        for child in self.children.drain(..) {
            end(child.pid);
            child
                .beats
                .iter()
                .for_each(|beat| beat.store(0, Ordering::Relaxed));
        }
        Ok(wrong)
    }
}

impl Child {
    fn threads(&self) -> usize {
        if self.kind == Kind::Threaded {
            THREADS
        } else {
            1
        }
    }

    fn sum(&self) -> u64 {
        self.beats
            .iter()
            .map(|beat| beat.load(Ordering::Relaxed))
            .sum()
    }

    /// Whether all its threads have counted since they had counted to `before`.
    fn counts(&self, before: &[u64]) -> bool {
        let beats = self.beats.iter().take(self.threads());
        beats
            .zip(before)
            .all(|(beat, before)| beat.load(Ordering::Relaxed) != *before)
    }

    fn beats(&self) -> Vec<u64> {
        self.beats
            .iter()
            .map(|beat| beat.load(Ordering::Relaxed))
            .collect()
    }

    fn stop(&mut self) -> Result<()> {
        ensure!(
            wait_until(|| self.counts(&[0; THREADS])),
            "{:?} does not begin",
            self.kind
        );
        let signal = self.signal();
        kill(self.pid, signal).context("stopping a child")?;
        ensure!(
            wait_until(|| state_of(self.pid) == Some('T')),
            "{:?} does not stop",
            self.kind
        );
        if self.kind != Kind::Unheard {
            let told = waitpid(self.pid, Some(WaitPidFlag::WUNTRACED));
            ensure!(
                told == Ok(WaitStatus::Stopped(self.pid, signal)),
                "told of {told:?}"
            );
        }
        if self.kind == Kind::Continued {
            kill(self.pid, Signal::SIGCONT).context("continuing a child")?;
            let told = waitpid(self.pid, Some(WaitPidFlag::WCONTINUED));
            ensure!(
                told == Ok(WaitStatus::Continued(self.pid)),
                "told of {told:?}"
            );
        }
        self.stopped_at = self.sum();
        Ok(())
    }

    /// The signal it was stopped by.
    fn signal(&self) -> Signal {
        match self.kind {
            Kind::Keyboard => Signal::SIGTSTP,
            _ => Signal::SIGSTOP,
        }
    }

    fn verify(&self, told_once: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        let is_stopped =
            self.kind == Kind::Continued || wait_until(|| state_of(self.pid) == Some('T'));
        let state = state_of(self.pid);
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED;
        let told = waitpid(self.pid, Some(flags));
        let expected = match self.kind {
            Kind::Unheard => WaitStatus::Stopped(self.pid, Signal::SIGSTOP),
            _ => WaitStatus::StillAlive,
        };
        let again = Ok(WaitStatus::Stopped(self.pid, self.signal()));
        let may_be = !told_once && self.kind != Kind::Continued && told == again;
        if told != Ok(expected) && !may_be {
            wrong.push(format!(
                "its parent is told of {told:?}, not of {expected:?}"
            ));
        }
        if self.kind == Kind::Continued {
            if state == Some('T') || !wait_until(|| self.sum() != self.stopped_at) {
                wrong.push("it does not run".to_owned());
            }
        } else {
            if !is_stopped {
                wrong.push(format!("its state is {state:?}, not T"));
            }
            if self.sum() != self.stopped_at {
                wrong.push("it ran while it was stopped".to_owned());
            }
        }
        let before = self.beats();
        if kill(self.pid, Signal::SIGCONT).is_err() || !wait_until(|| self.counts(&before)) {
            wrong.push("it does not go on".to_owned());
        }
        wrong
    }
}

/// What a child does, for ever.
fn count(kind: Kind, beats: &'static [AtomicU64]) -> ! {
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    if kind == Kind::Threaded {
        for beat in &beats[1..] {
            std::thread::spawn(move || beat_on(beat));
        }
    }
    beat_on(&beats[0])
}

fn beat_on(beat: &AtomicU64) -> ! {
    loop {
        beat.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(BEAT);
    }
}

const BEAT: Duration = Duration::from_millis(2);
