//! Cases of several tasks: forks, execs, threads, a process tree, shared memory, a tracer.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};

use super::{Case, EXEC_CHILD};
use crate::content::Content;
use crate::sys::Cloned;
use crate::sys::memory::Backing;
use crate::sys::process::{exit_now, fork, trace};
use crate::writer::pages::Checked;

/// Children are forked all the time; each checks the memory of its moment and ends.
#[derive(Debug)]
pub struct Forks {
    region: Checked,
    children: Vec<i32>,
    forks: u64,
}

impl Forks {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 8 << 20, Content::Random)?;
        region.write_all();
        Ok(Box::new(Self {
            region,
            children: Vec::new(),
            forks: 0,
        }))
    }

    fn fork(&mut self) -> Result<()> {
        match fork().context("forking")? {
            Cloned::Parent(pid) => self.children.push(pid),
            Cloned::Child => {
                // Long enough for the parent to write to the pages they share.
                std::thread::sleep(CHILD_LIFE);
                exit_now(i32::from(self.region.check_all().is_err()));
            }
        }
        self.forks += 1;
        Ok(())
    }

    fn reap(&mut self, block: bool) -> Result<()> {
        let flag = if block {
            None
        } else {
            Some(WaitPidFlag::WNOHANG)
        };
        let mut left = Vec::new();
        for pid in self.children.drain(..) {
            match waitpid(Pid::from_raw(pid), flag).context("waiting for a child")? {
                WaitStatus::StillAlive => left.push(pid),
                WaitStatus::Exited(_, 0) => {}
                other => bail!("a forked child found its memory wrong: {other:?}"),
            }
        }
        self.children = left;
        Ok(())
    }
}

impl Case for Forks {
    fn step(&mut self, tick: u64) -> Result<()> {
        let page = tick as usize % self.region.pages();
        self.region.write(page);
        if tick.is_multiple_of(FORK_EVERY) {
            self.reap(false)?;
            self.fork()?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.reap(true)?;
        self.region.check_all()
    }

    fn progress(&self) -> String {
        format!("forks:{}", self.forks)
    }
}

/// A task that answers whether its own memory is right, over a pair of pipes.
#[derive(Debug)]
struct Respondent {
    ask: File,
    answer: File,
}

impl Respondent {
    fn check(&mut self, who: &str) -> Result<()> {
        self.ask
            .write_all(b"?")
            .with_context(|| format!("asking {who}"))?;
        wait_readable(&self.answer, ANSWER_TIME_MAX)
            .then_some(())
            .with_context(|| format!("{who} does not answer"))?;
        let mut answer = [0; 1];
        self.answer
            .read_exact(&mut answer)
            .with_context(|| format!("hearing {who}"))?;
        ensure!(answer == *FINE, "{who} found its memory wrong");
        Ok(())
    }
}

/// Answers questions for as long as there is somebody to ask; `idle` runs between them.
fn respond(ask: &mut File, answer: &mut File, checked: &mut Checked, until: Option<Instant>) {
    let mut page = 0;
    let mut right = true;
    while until.is_none_or(|until| Instant::now() < until) {
        if wait_readable(&*ask, CHILD_TICK) {
            let mut question = [0; 1];
            if ask.read_exact(&mut question).is_err() {
                exit_now(0);
            }
            right = right && checked.check_all().is_ok();
            if answer.write_all(if right { FINE } else { b"x" }).is_err() {
                exit_now(0);
            }
        }
        page = (page + 1) % checked.pages();
        right = right && checked.check(page).is_ok();
        checked.write(page);
    }
}

fn wait_readable(file: impl AsFd, time: Duration) -> bool {
    let mut input = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    matches!(poll(&mut input, time), Ok(ready) if ready > 0)
}

/// A child that replaces its program again and again.
#[derive(Debug)]
pub struct Execs {
    child: Respondent,
    asked: u64,
}

impl Execs {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut command = Command::new(PROGRAM);
        command
            .arg(EXEC_CHILD)
            .arg("0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("starting a child")?;
        let ask: OwnedFd = child.stdin.take().context("a pipe was asked for")?.into();
        let answer: OwnedFd = child.stdout.take().context("a pipe was asked for")?.into();
        Ok(Box::new(Self {
            child: Respondent {
                ask: ask.into(),
                answer: answer.into(),
            },
            asked: 0,
        }))
    }
}

impl Case for Execs {
    fn step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.asked += 1;
        self.child.check("the child that execs")?;
        Ok(EXEC_BYTES / crate::sys::memory::PAGE)
    }

    fn progress(&self) -> String {
        format!("execs:{}", self.asked)
    }
}

/// The program of [`Execs`]' child: checks memory of its own for a moment, then starts itself anew.
pub fn exec_child(arguments: &[String]) -> Result<()> {
    let count: u64 = arguments
        .first()
        .context("a count")?
        .parse()
        .context("a count")?;
    let mut checked = Checked::new(Backing::Private, EXEC_BYTES, Content::Random)?;
    checked.write_all();
    let mut ask = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut answer = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    respond(
        &mut ask,
        &mut answer,
        &mut checked,
        Some(Instant::now() + EXEC_EVERY),
    );
    let error = Command::new(PROGRAM)
        .arg(EXEC_CHILD)
        .arg((count + 1).to_string())
        .exec();
    Err(error).context("starting anew")
}

/// Many forked processes, each with memory of its own and some it shares copy-on-write.
#[derive(Debug)]
pub struct Processes {
    inherited: Checked,
    children: Vec<Respondent>,
}

impl Processes {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut inherited = Checked::new(Backing::Private, 1 << 20, Content::Random)?;
        inherited.write_all();
        let mut children = Vec::new();
        for _ in 0..PROCESSES {
            children.push(
                fork_respondent(|ask, answer| {
                    // Its own copy, page by page as it writes.
                    respond(ask, answer, &mut inherited, None);
                })?
                .1,
            );
        }
        Ok(Box::new(Self {
            inherited,
            children,
        }))
    }
}

/// Forks a child that runs `work` with its ends of the pipes, then ends.
fn fork_respondent(work: impl FnOnce(&mut File, &mut File)) -> Result<(i32, Respondent)> {
    let (ask_read, ask_write) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    let (answer_read, answer_write) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    match fork().context("forking")? {
        Cloned::Parent(pid) => {
            let (ask, answer) = (ask_write.into(), answer_read.into());
            Ok((pid, Respondent { ask, answer }))
        }
        Cloned::Child => {
            drop((ask_write, answer_read));
            work(&mut ask_read.into(), &mut answer_write.into());
            exit_now(0);
        }
    }
}

impl Case for Processes {
    fn step(&mut self, tick: u64) -> Result<()> {
        let page = tick as usize % self.inherited.pages();
        self.inherited.write(page);
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        for (number, child) in self.children.iter_mut().enumerate() {
            child.check(&format!("child {number}"))?;
        }
        Ok(self.inherited.check_all()? * (1 + self.children.len()))
    }

    fn progress(&self) -> String {
        format!("processes:{}", self.children.len())
    }
}

/// Anonymous memory shared with a child: what one writes the other sees.
#[derive(Debug)]
pub struct SharedMemory {
    region: Checked,
    child: Respondent,
    writes: u64,
}

impl SharedMemory {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Shared, 8 << 20, Content::Random)?;
        region.write_all();
        // The child knows the versions of page 0 alone, which the parent never writes again.
        let (_, child) = fork_respondent(|ask, answer| {
            let mut question = [0; 1];
            while ask.read_exact(&mut question).is_ok() {
                let right = region.check(0).is_ok();
                region.write(1);
                if answer.write_all(if right { FINE } else { b"x" }).is_err() {
                    break;
                }
            }
        })?;
        Ok(Box::new(Self {
            region,
            child,
            writes: 0,
        }))
    }
}

impl Case for SharedMemory {
    fn step(&mut self, tick: u64) -> Result<()> {
        let page = 2 + tick as usize % (self.region.pages() - 2);
        self.region.check(page)?;
        self.region.write(page);
        self.writes += 1;
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        // The child writes page 1, so its next version is the one to find there.
        let before = self.region.mapping.bytes()[crate::sys::memory::PAGE + 8];
        self.child.check("the child with the shared memory")?;
        let after = self.region.mapping.bytes()[crate::sys::memory::PAGE + 8];
        ensure!(
            after == before.wrapping_add(1),
            "a write of the child is not seen"
        );
        let pages = self.region.pages();
        for page in (0..pages).filter(|page| *page != 1) {
            self.region.check(page)?;
        }
        Ok(pages - 1)
    }

    fn progress(&self) -> String {
        format!("shared:{}", self.writes)
    }
}

/// Many threads, each with memory and (of libc) a stack with a guard of its own.
#[derive(Debug)]
pub struct Threads {
    asked: Arc<AtomicU64>,
    answers: Vec<Arc<AtomicU64>>,
    wrong: Arc<AtomicU64>,
}

impl Threads {
    pub fn start() -> Result<Box<dyn Case>> {
        let asked = Arc::new(AtomicU64::new(0));
        let wrong = Arc::new(AtomicU64::new(0));
        let mut answers = Vec::new();
        for _ in 0..THREADS {
            let answered = Arc::new(AtomicU64::new(0));
            let mut checked = Checked::new(Backing::Private, THREAD_BYTES, Content::Random)?;
            checked.write_all();
            let (asked, wrong, answer) = (asked.clone(), wrong.clone(), answered.clone());
            let thread = std::thread::Builder::new().stack_size(128 << 10);
            let run = move || thread_loop(&mut checked, &asked, &answer, &wrong);
            thread.spawn(run).context("starting a thread")?;
            answers.push(answered);
        }
        Ok(Box::new(Self {
            asked,
            answers,
            wrong,
        }))
    }
}

fn thread_loop(checked: &mut Checked, asked: &AtomicU64, answer: &AtomicU64, wrong: &AtomicU64) {
    let mut page = 0;
    loop {
        let question = asked.load(Ordering::Acquire);
        if question > answer.load(Ordering::Relaxed) {
            if checked.check_all().is_err() {
                wrong.fetch_add(1, Ordering::Relaxed);
            }
            answer.store(question, Ordering::Release);
        }
        page = (page + 1) % checked.pages();
        if checked.check(page).is_err() {
            wrong.fetch_add(1, Ordering::Relaxed);
        }
        checked.write(page);
        std::thread::sleep(CHILD_TICK);
    }
}

impl Case for Threads {
    fn step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        let question = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        for (number, answer) in self.answers.iter().enumerate() {
            while answer.load(Ordering::Acquire) < question {
                ensure!(Instant::now() < deadline, "thread {number} does not answer");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let wrong = self.wrong.load(Ordering::Relaxed);
        ensure!(wrong == 0, "threads found their memory wrong {wrong} times");
        Ok(self.answers.len() * THREAD_BYTES / crate::sys::memory::PAGE)
    }

    fn progress(&self) -> String {
        format!("threads:{}", self.answers.len())
    }
}

/// A process that traces its child: its ptrace relation cannot be moved.
#[derive(Debug)]
pub struct Traced {
    child: Respondent,
}

impl Traced {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut checked = Checked::new(Backing::Private, 1 << 20, Content::Random)?;
        checked.write_all();
        let (pid, child) = fork_respondent(|ask, answer| respond(ask, answer, &mut checked, None))?;
        trace(pid).context("tracing the child")?;
        Ok(Box::new(Self { child }))
    }
}

impl Case for Traced {
    fn step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.child.check("the traced child")?;
        Ok(1)
    }

    fn progress(&self) -> String {
        "traced".to_owned()
    }
}

const PROGRAM: &str = "/usr/local/bin/lab-writer";
const FINE: &[u8; 1] = b".";
const PROCESSES: usize = 50;
pub const THREADS: usize = 200;
const THREAD_BYTES: usize = 256 << 10; // 256 KiB
const EXEC_BYTES: usize = 4 << 20; // 4 MiB
/// Milliseconds between forks: some are always in flight, and 20 moves stay below 32768 pids.
const FORK_EVERY: u64 = 40;
const CHILD_LIFE: Duration = Duration::from_millis(60);
const CHILD_TICK: Duration = Duration::from_millis(20);
const EXEC_EVERY: Duration = Duration::from_millis(300);
/// More than any outage a move may cause.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
