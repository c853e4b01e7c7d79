//! Objects of System V in a namespace of the workload's own, and POSIX message queues.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use super::Case;
use super::tree::{child, end, wait_until};
use crate::sys::ipc;
use crate::sys::memory::shared_words;

/// One of each kind, with something in it.
#[derive(Debug)]
pub struct Objects {
    /// Mapped by a child, too.
    mapped: ipc::Mapped,
    mapped_id: i32,
    /// Nobody maps it.
    unmapped_id: i32,
    semaphores: i32,
    queue: i32,
    /// Waits for a semaphore, and counts how often it got it.
    waiter: Pid,
    got: &'static AtomicU64,
    /// Counts what was arranged.
    turn: u64,
}

impl Objects {
    pub fn start() -> Result<Box<dyn Case>> {
        let mapped_id = ipc::make_segment(MAPPED_KEY, WORDS * 8).context("a segment")?;
        let mapped = ipc::Mapped::new(mapped_id, WORDS).context("mapping a segment")?;
        let unmapped_id = ipc::make_segment(UNMAPPED_KEY, WORDS * 8).context("a segment")?;
        let semaphores = ipc::make_semaphores(SEMAPHORES_KEY, SEMAPHORES);
        let semaphores = semaphores.context("semaphores")?;
        let queue = ipc::make_queue(QUEUE_KEY).context("a message queue")?;
        let got = &shared_words(1).context("shared memory")?[0];
        let waiter = child(|| {
            loop {
                // A wait for a semaphore may be interrupted.
                if ipc::change_semaphore(semaphores, WAITED, -1, false).is_ok() {
                    mapped.words()[0].fetch_add(1, Ordering::AcqRel);
                    got.fetch_add(1, Ordering::AcqRel);
                }
            }
        });
        Ok(Box::new(Self {
            waiter: waiter.context("forking")?,
            mapped,
            mapped_id,
            unmapped_id,
            semaphores,
            queue,
            got,
            turn: 0,
        }))
    }

    /// Whatever is wrong with the contents of a segment.
    fn check(&self, what: &str, words: &[AtomicU64], wrong: &mut Vec<String>) {
        let expected = |index: usize| content(self.turn, index);
        let differs = |index: &usize| words[*index].load(Ordering::Acquire) != expected(*index);
        if let Some(index) = (FIRST..WORDS).find(differs) {
            wrong.push(format!("word {index} of the {what} segment is another one"));
        }
    }

    fn check_semaphores(&self, wrong: &mut Vec<String>) -> Result<()> {
        for (number, expected) in (0..).zip(VALUES) {
            let value = ipc::semaphore(self.semaphores, number).context("a semaphore")?;
            if value != expected {
                wrong.push(format!("semaphore {number} is {value}, not {expected}"));
            }
        }
        let before = self.got.load(Ordering::Acquire);
        ipc::change_semaphore(self.semaphores, WAITED, 1, false).context("a semaphore")?;
        if !wait_until(|| self.got.load(Ordering::Acquire) == before + 1) {
            wrong.push("nobody gets the semaphore that was waited for".to_owned());
        }
        let counted = self.mapped.words()[0].load(Ordering::Acquire);
        if counted != before + 1 {
            wrong.push(format!("the segment says {counted}, not {}", before + 1));
        }
        Ok(())
    }

    fn check_queue(&self, wrong: &mut Vec<String>) {
        for number in 0..MESSAGES {
            let expected = (1 + number, message(self.turn, number));
            match ipc::receive(self.queue) {
                Ok(found) if found == expected => {}
                found => wrong.push(format!("message {number} is {found:?}")),
            }
        }
        if let Ok(more) = ipc::receive(self.queue) {
            wrong.push(format!("there is another message: {more:?}"));
        }
    }
}

impl Case for Objects {
    fn arrange(&mut self) -> Result<()> {
        self.turn += 1;
        let unmapped = ipc::Mapped::new(self.unmapped_id, WORDS).context("mapping a segment")?;
        for words in [self.mapped.words(), unmapped.words()] {
            for (index, word) in words.iter().enumerate().skip(FIRST) {
                word.store(content(self.turn, index), Ordering::Release);
            }
        }
        for (number, value) in (0..).zip(VALUES) {
            ipc::set_semaphore(self.semaphores, number, value).context("a semaphore")?;
        }
        for number in 0..MESSAGES {
            let text = message(self.turn, number);
            ipc::send(self.queue, 1 + number, &text).context("a message")?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for (key, id) in [
            (MAPPED_KEY, self.mapped_id),
            (UNMAPPED_KEY, self.unmapped_id),
        ] {
            let found = ipc::find_segment(key).context("a segment with a key")?;
            ensure!(found == id, "key {key} is of segment {found}, not {id}");
        }
        self.check("mapped", self.mapped.words(), &mut wrong);
        let unmapped = ipc::Mapped::new(self.unmapped_id, WORDS).context("mapping a segment")?;
        self.check("unmapped", unmapped.words(), &mut wrong);
        self.check_semaphores(&mut wrong)?;
        self.check_queue(&mut wrong);
        Ok(wrong)
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        end(self.waiter);
    }
}

/// A semaphore that is to be given back when this process ends.
#[derive(Debug)]
pub struct Undo {
    semaphores: i32,
}

impl Undo {
    pub fn start() -> Result<Box<dyn Case>> {
        let semaphores = ipc::make_semaphores(0, 1).context("semaphores")?;
        Ok(Box::new(Self { semaphores }))
    }
}

impl Case for Undo {
    fn arrange(&mut self) -> Result<()> {
        ipc::set_semaphore(self.semaphores, 0, 1).context("a semaphore")?;
        ipc::change_semaphore(self.semaphores, 0, -1, true).context("a semaphore")
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        // Whether a child's end gives back what it took.
        ipc::set_semaphore(self.semaphores, 0, 1).context("a semaphore")?;
        let taker = child(|| ipc::change_semaphore(self.semaphores, 0, -1, true));
        end(taker.context("forking")?);
        let value = ipc::semaphore(self.semaphores, 0).context("a semaphore")?;
        Ok(match value {
            1 => Vec::new(),
            _ => vec![format!("the semaphore is {value}")],
        })
    }
}

/// A segment that goes with its last mapping, which is ours.
#[derive(Debug)]
pub struct Removed(Option<(i32, ipc::Mapped)>);

impl Removed {
    pub fn start() -> Box<dyn Case> {
        Box::new(Self(None))
    }
}

impl Case for Removed {
    fn arrange(&mut self) -> Result<()> {
        let id = ipc::make_segment(0, WORDS * 8).context("a segment")?;
        let mapped = ipc::Mapped::new(id, WORDS).context("mapping a segment")?;
        ipc::remove_segment(id).context("removing a segment")?;
        mapped.words()[1].store(content(0, 1), Ordering::Release);
        self.0 = Some((id, mapped));
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let (id, mapped) = self.0.take().context("nothing is arranged")?;
        if mapped.words()[1].load(Ordering::Acquire) != content(0, 1) {
            wrong.push("a word of the removed segment is another one".to_owned());
        }
        drop(mapped);
        if ipc::is_segment(id) {
            wrong.push("the removed segment is there without a mapping".to_owned());
        }
        Ok(wrong)
    }
}

/// A POSIX message queue with messages.
#[derive(Debug, Default)]
pub struct PosixQueue(Option<OwnedFd>);

impl Case for PosixQueue {
    fn arrange(&mut self) -> Result<()> {
        let queue = ipc::make_posix_queue(POSIX_NAME);
        self.0 = Some(queue.context("a POSIX message queue")?);
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        self.0 = None;
        ipc::unlink_posix_queue(POSIX_NAME).context("a POSIX message queue")?;
        Ok(Vec::new())
    }
}

/// What stands at this place of a segment.
fn content(turn: u64, index: usize) -> u64 {
    (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ turn
}

fn message(turn: u64, number: i64) -> Vec<u8> {
    format!("message {number} of {turn}").into_bytes()
}

/// The first word of a segment counts how often the semaphore was got.
const FIRST: usize = 1;
/// 1 MiB.
const WORDS: usize = 1 << 17;
const SEMAPHORES: i32 = 4;
/// The last one is waited for.
const VALUES: [i32; 4] = [3, 0, 32767, 0];
const WAITED: u16 = 3;
const MESSAGES: i64 = 5;
const MAPPED_KEY: i32 = 0x7066_0001;
const UNMAPPED_KEY: i32 = 0x7066_0002;
const SEMAPHORES_KEY: i32 = 0x7066_0003;
const QUEUE_KEY: i32 = 0x7066_0004;
const POSIX_NAME: &str = "/pageferry-case";
