//! Small workloads with state that is hard to move, each of which checks itself: the program
//! `lab-cases`.
//!
//! A case arranges its state, is moved (or is not), and says what has become of it. It talks by
//! files in a folder of its own, which is never kept open, so that only the state of the case is
//! moved:
//!
//! | file | by | means |
//! |---|---|---|
//! | `ready` | the case | the state is arranged |
//! | `check` | the lab | what has become of it? |
//! | `result` | the case | the longest time it stood still since the last check, in milliseconds,
//! and a line for each thing that is wrong |
//!
//! After a check the state is arranged anew.

pub mod backlog;
pub mod echo;
pub mod ipc;
pub mod job_control;
pub mod lock;
pub mod loopback;
pub mod netlink;
pub mod passing;
pub mod session;
mod tree;
pub mod vfork;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use passing::Phase;

/// Something that is hard to move.
pub trait Case {
    /// Arranges the state, also after a check.
    ///
    /// # Errors
    /// It cannot be arranged here.
    fn arrange(&mut self) -> Result<()>;

    /// Called every few milliseconds.
    ///
    /// # Errors
    /// The state could not be kept up.
    fn step(&mut self) -> Result<()> {
        Ok(())
    }

    /// What has become of the state: whatever is wrong.
    ///
    /// # Errors
    /// It cannot even be looked at.
    fn verify(&mut self) -> Result<Vec<String>>;
}

/// The program.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [name, folder] = arguments.as_slice() {
        be(name, Path::new(folder))
    } else {
        eprintln!("usage: lab-cases NAME FOLDER");
        ExitCode::FAILURE
    }
}

/// Is the case `name` from now on; returns only if it cannot be.
pub fn be(name: &str, folder: &Path) -> ExitCode {
    let Err(error) = run(name, folder);
    eprintln!("lab-cases: {error:#}");
    // Nobody is left to tell when even this fails.
    let _ = say(folder, RESULT, &format!("0\nit has ended: {error:#}\n"));
    ExitCode::FAILURE
}

fn start(name: &str, folder: &Path) -> Result<Box<dyn Case>> {
    if let Some(kind) = name.strip_suffix("-lock") {
        return lock::HeldLock::start(kind, folder);
    }
    // The state comes and goes, or stays.
    let (state, stays) = match name.strip_suffix("-stays") {
        Some(state) => (state, true),
        None => (name, false),
    };
    let phase = Phase::new(stays);
    match state {
        "tcp-backlog" => Ok(backlog::Backlogged::start(phase, false)),
        "tcp-connecting" => Ok(backlog::Backlogged::start(phase, true)),
        "netlink-queue" => Ok(netlink::Unread::start(phase)),
        "echo" => echo::Echo::start(),
        "vfork" => vfork::Waiting::start(phase),
        "stopped-children" => job_control::Stopped::start(false),
        "stopped-children-told-once" => job_control::Stopped::start(true),
        "ipc" => ipc::Objects::start(),
        "ipc-undo" => ipc::Undo::start(),
        "ipc-removed" => Ok(ipc::Removed::start()),
        "posix-queue" => Ok(Box::new(ipc::PosixQueue::default())),
        "loopback" => loopback::Talking::start(true),
        "loopback-corked" => loopback::Talking::start(false),
        "orphan-session" => session::Orphans::start(),
        _ => bail!("no case is called {name:?}"),
    }
}

fn run(name: &str, folder: &Path) -> Result<std::convert::Infallible> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let mut case = start(name, folder)?;
    case.arrange().context("arranging the state")?;
    say(folder, READY, "")?;
    let mut watch = Watch::start();
    loop {
        std::thread::sleep(STEP);
        watch.look();
        case.step()?;
        if fs::remove_file(folder.join(CHECK)).is_err() {
            continue;
        }
        let wrong = case.verify().context("checking the state")?;
        let wrong: String = wrong.iter().map(|one| format!("{one}\n")).collect();
        say(
            folder,
            RESULT,
            &format!("{}\n{wrong}", watch.worst.as_millis()),
        )?;
        case.arrange().context("arranging the state anew")?;
        say(folder, READY, "")?;
        watch = Watch::start();
    }
}

/// For how long this process stood still, by the clock that goes on meanwhile and is the same at
/// all nodes.
struct Watch {
    last: SystemTime,
    worst: Duration,
}

impl Watch {
    fn start() -> Self {
        Self {
            last: SystemTime::now(),
            worst: Duration::ZERO,
        }
    }

    fn look(&mut self) {
        let now = SystemTime::now();
        self.worst = self
            .worst
            .max(now.duration_since(self.last).unwrap_or_default());
        self.last = now;
    }
}

fn say(folder: &Path, what: &str, text: &str) -> Result<()> {
    let draft = folder.join("draft");
    fs::write(&draft, text)
        .and_then(|()| fs::rename(&draft, folder.join(what)))
        .with_context(|| format!("telling of it in {}", folder.display()))
}

/// The lab's side: a case by its folder, as this process sees it.
#[derive(Debug)]
pub struct Watched {
    folder: PathBuf,
}

/// What a case said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The longest time it stood still since the last check.
    pub stood_still: Duration,
    /// What is wrong.
    pub wrong: Vec<String>,
}

impl Watched {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Whether its state is arranged; an error if it ended because it could not be. Once for each
    /// time.
    ///
    /// # Errors
    /// What the case said.
    pub fn is_ready(&self) -> Result<bool> {
        if let Some(verdict) = self.verdict()? {
            bail!("{}", verdict.wrong.join("; "));
        }
        Ok(fs::remove_file(self.folder.join(READY)).is_ok())
    }

    /// Asks for a verdict.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn ask(&self) -> Result<()> {
        fs::write(self.folder.join(CHECK), "").context("asking a case for its verdict")
    }

    /// The verdict, if it is there. Once for each time.
    ///
    /// # Errors
    /// It is none.
    pub fn verdict(&self) -> Result<Option<Verdict>> {
        let path = self.folder.join(RESULT);
        let Ok(text) = fs::read_to_string(&path) else {
            return Ok(None);
        };
        fs::remove_file(&path).context("taking a verdict")?;
        let mut lines = text.lines();
        let milliseconds = lines.next().and_then(|line| line.parse().ok());
        Ok(Some(Verdict {
            stood_still: Duration::from_millis(milliseconds.context("a verdict without a time")?),
            wrong: lines.map(str::to_owned).collect(),
        }))
    }
}

const READY: &str = "ready";
const CHECK: &str = "check";
const RESULT: &str = "result";
const STEP: Duration = Duration::from_millis(2);
