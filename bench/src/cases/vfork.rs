//! A thread that starts a program by `vfork`, caught before the child becomes that program: the
//! child lives in its parent's memory, and the thread cannot be interrupted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::Case;
use super::passing::Phase;
use super::tree::wait_until;
use crate::sys::process::vfork_while;

/// What the child, its parent's thread and the case see, in one memory.
#[derive(Debug, Default)]
pub struct Flags {
    /// A child is to be there.
    pub wanted: AtomicU64,
    /// Counted by the child.
    pub beats: AtomicU64,
    /// Children that have ended.
    ended: AtomicU64,
}

/// The case.
#[derive(Debug)]
pub struct Waiting {
    phase: Phase,
    flags: Arc<Flags>,
}

impl Waiting {
    pub fn start(phase: Phase) -> Result<Box<dyn Case>> {
        let flags = Arc::new(Flags::default());
        let theirs = Arc::clone(&flags);
        let thread = std::thread::Builder::new();
        thread
            .spawn(move || {
                loop {
                    if theirs.wanted.load(Ordering::Acquire) == 0 {
                        std::thread::yield_now();
                        std::thread::sleep(super::STEP);
                        continue;
                    }
                    // Returns when the child has ended.
                    if let Ok(child) = vfork_while(&theirs.wanted, &theirs.beats) {
                        let _ = waitpid(Pid::from_raw(child), None);
                    }
                    theirs.ended.fetch_add(1, Ordering::Release);
                }
            })
            .context("starting a thread")?;
        Ok(Box::new(Self { phase, flags }))
    }

    fn begin(&self) -> Result<()> {
        let before = self.flags.beats.load(Ordering::Acquire);
        self.flags.wanted.store(1, Ordering::Release);
        ensure!(self.beats_since(before), "there is no child");
        Ok(())
    }

    fn beats_since(&self, before: u64) -> bool {
        wait_until(|| self.flags.beats.load(Ordering::Acquire) != before)
    }

    fn end(&self) -> bool {
        let before = self.flags.ended.load(Ordering::Acquire);
        self.flags.wanted.store(0, Ordering::Release);
        wait_until(|| self.flags.ended.load(Ordering::Acquire) != before)
    }
}

impl Case for Waiting {
    fn arrange(&mut self) -> Result<()> {
        self.phase.begin();
        self.begin()
    }

    fn step(&mut self) -> Result<()> {
        if !self.phase.changes() {
            return Ok(());
        }
        if self.phase.is_on() {
            return self.begin();
        }
        ensure!(
            self.end(),
            "the thread does not go on after its child's end"
        );
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        if self.flags.wanted.load(Ordering::Acquire) == 0 {
            return Ok(wrong);
        }
        let before = self.flags.beats.load(Ordering::Acquire);
        if !self.beats_since(before) {
            wrong.push("the child does not run in its parent's memory".to_owned());
        }
        if !self.end() {
            wrong.push("the thread does not go on after its child's end".to_owned());
        }
        Ok(wrong)
    }
}
