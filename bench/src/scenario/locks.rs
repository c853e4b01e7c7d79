//! `locks`: a workload with file locks on storage that the nodes share. It moves with them;
//! somebody else wants one of them, gets it between the nodes, and keeps it for a while; daemons
//! are killed and aborts asked for while he has it. The workload must run on at exactly one node,
//! never without its locks, and not before he gives it back.
//!
//! The rival is a process of the machine that asks for the lock again and again, as one at a third
//! node would. One that waits for it in the kernel is seen, and the move is refused.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;

use super::faults::{Struck, Survivor, judge, signal_first};
use super::report::Report;
use super::settings::Settings;
use super::writing::WriterSession;
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::mover::MoveOptions;
use crate::mover::outcome::Outcome;
use crate::mover::pageferry::{
    Migration, Pageferry, SETTLE_TIME_MAX, abort, show, under_way, wait_settled,
};
use crate::writer::case::LOCKS;
use crate::writer::case::locks::database;
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("locks are about what stock CRIU cannot do while both copies live")?;
    let mut lab = settings.lab(2)?;
    for case in &CASES {
        let only = settings.only.as_deref();
        if only.is_some_and(|only| !case.name.contains(only)) {
            continue;
        }
        match case.run(&mut lab, report) {
            Ok(said) => {
                println!("{}: {said}", case.name);
                report.note_contents(true);
            }
            Err(error) => report.fail(format!("{}: {error:#}", case.name)),
        }
    }
    Ok(())
}

/// What happens, and who runs the workload in the end.
struct Case {
    name: &'static str,
    rival: Rival,
    act: Act,
    ends: Ends,
}

/// Who else wants the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rival {
    Nobody,
    /// Waits for it in the kernel.
    Waits,
    /// Takes it when nobody has it, and gives it back so long after the act.
    Takes(Duration),
}

/// What is done when the rival has the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Nothing,
    Abort,
    KillDaemon(&'static str),
    /// When the source has the workload back and waits for its lock.
    KillDaemonLate,
    KillCriu,
    KillPager,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// It has moved.
    Moved,
    /// It is where it was, for the reason of this code.
    Stays(&'static str),
}

impl Case {
    fn run(&self, lab: &mut Lab, report: &mut Report) -> Result<String> {
        let mut options = Options::new(CASE_BYTES);
        LOCKS.name.clone_into(&mut options.case);
        let mut session = WriterSession::start(lab, &Pageferry, "a", &options, |_| {})?;
        let path = lab.folder.shared().join(database(session.workload.pid));
        let said = match self.rival {
            Rival::Nobody => self.move_there_and_back(lab, &mut session, report),
            Rival::Waits => self.move_in_vain(lab, &mut session, &path),
            Rival::Takes(keeps) => self.move_beside(lab, &mut session, (&path, keeps)),
        };
        if said.is_err() {
            // Whatever state it is in.
            session.workload.signal(lab)?;
            lab.node("a")?.thaw();
            lab.node("b")?.thaw();
        }
        let killed = session.workload.kill(lab);
        let said = said?;
        killed?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        Ok(said)
    }

    fn move_there_and_back(
        &self,
        lab: &Lab,
        session: &mut WriterSession,
        report: &mut Report,
    ) -> Result<String> {
        for to in ["b", "a", "b", "a"] {
            match session.move_to(lab, to, &flags())? {
                Ok(one) => report.push(one),
                Err((code, text)) => bail!("{code}: {text}"),
            }
            wait_settled(lab, SETTLE_TIME_MAX)?;
        }
        Ok("moved there and back twice".to_owned())
    }

    fn move_in_vain(&self, lab: &Lab, session: &mut WriterSession, path: &Path) -> Result<String> {
        let waiting = Waiting::begin(path)?;
        let refused = session.move_to(lab, "b", &flags())?.err();
        let (code, text) = refused.context("it moved")?;
        ensure!(
            Ends::Stays("shared-lock") == self.ends && code == "shared-lock",
            "{code}: {text}"
        );
        ensure!(!waiting.has_it(), "he has got the lock");
        Ok(format!("{code}: {text}"))
    }

    fn move_beside(
        &self,
        lab: &mut Lab,
        session: &mut WriterSession,
        (path, keeps): (&Path, Duration),
    ) -> Result<String> {
        let name = session.workload.name();
        let begun = Instant::now();
        let (mut taking, migration) = begin_beside(lab, session, path)?;
        let taken = Instant::now();
        let id = self.act(lab, &name)?;
        std::thread::sleep(keeps);
        // Nobody runs without its locks.
        let answers = session.prober.wait_for_answer_after(taken + SETTLES, PROBE);
        ensure!(!answers, "it runs while another has its lock");
        let said = match self.ends {
            Ends::Moved => String::new(),
            Ends::Stays(_) => wait_until_held_up(lab, &id)?,
        };
        taking.give();
        let given = Instant::now();
        let answers = session.prober.wait_for_answer_after(given, ANSWER_WITHIN);
        ensure!(answers, "it does not go on when the lock is given back");
        let again = session.prober.longest_silence_since(begun);
        let outcome = migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let survivor = judge(lab, session)?;
        self.check(survivor, &outcome)?;
        Ok(format!(
            "{survivor:?} runs on, {again:.1?} without an answer {said}"
        ))
    }

    /// Does what is to be done; the id of the migration.
    fn act(&self, lab: &mut Lab, name: &str) -> Result<String> {
        let (id, _) = under_way(lab.node("a")?, name).context("it is over")?;
        match self.act {
            Act::Nothing => {}
            Act::Abort => {
                abort(lab.node("a")?, &id)?
                    .wait()
                    .context("pageferry abort")?;
            }
            Act::KillDaemon(node) => {
                lab.daemon(node)?.kill()?;
                lab.restart_daemon(node)?;
            }
            Act::KillDaemonLate => {
                wait_for_phase(lab, &id, "reclaiming")?;
                lab.daemon("a")?.kill()?;
                lab.restart_daemon("a")?;
            }
            Act::KillCriu => strike(lab, "criu")?,
            Act::KillPager => strike(lab, "pageferry-pager")?,
        }
        Ok(id)
    }

    fn check(&self, survivor: Survivor, outcome: &Outcome) -> Result<()> {
        let right = match self.ends {
            Ends::Moved => Survivor::Target,
            Ends::Stays(_) => Survivor::Source,
        };
        ensure!(survivor == right, "{survivor:?} runs on");
        // Whoever asks a daemon that is killed hears nothing of the end.
        if matches!(self.act, Act::KillDaemon("a") | Act::KillDaemonLate) {
            return Ok(());
        }
        match (self.ends, &outcome.error) {
            (Ends::Moved, None) => Ok(()),
            (Ends::Stays(code), Some((found, _))) if code == found => Ok(()),
            (_, error) => bail!("it ended with {error:?}"),
        }
    }
}

/// Begins to move until the rival has the lock, which he may miss: it is free for a millisecond.
fn begin_beside(
    lab: &Lab,
    session: &mut WriterSession,
    path: &Path,
) -> Result<(Taking, Migration)> {
    for _ in 0..ATTEMPTS_MAX {
        let taking = Taking::begin(path.to_owned());
        let begun = Instant::now();
        let name = session.workload.name();
        let mut migration = Migration::start(lab.node("a")?, &name, "b", &flags())?;
        if taking.is_taken(&mut migration)? {
            return Ok((taking, migration));
        }
        drop(taking);
        if let Err((code, text)) = session.note(migration.finish()?, begun, "b")? {
            bail!("{code}: {text}");
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
        if let Err((code, text)) = session.move_to(lab, "a", &flags())? {
            bail!("{code}: {text}");
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
    }
    bail!("the rival has missed the lock in {ATTEMPTS_MAX} moves")
}

fn flags() -> MoveOptions {
    MoveOptions {
        shared: vec![SHARED.to_owned()],
        verify: true,
        ..MoveOptions::default()
    }
}

fn strike(lab: &Lab, program: &str) -> Result<()> {
    match signal_first(lab, "b", program, Signal::SIGKILL)? {
        Struck::Done => Ok(()),
        Struck::Missed | Struck::Asked(_) => bail!("there is no {program}"),
    }
}

/// Waits until the source has the workload back and says that it waits for its lock; what it says.
fn wait_until_held_up(lab: &Lab, id: &str) -> Result<String> {
    let deadline = Instant::now() + PHASE_TIME_MAX;
    loop {
        let shown = show(lab.node("a")?, id)?;
        let said = shown["error"]["code"].as_str().unwrap_or_default();
        if said == LOCK_TAKEN && shown["phase"] == "reclaiming" {
            let text = shown["error"]["text"].as_str().unwrap_or_default();
            return Ok(format!("({text})"));
        }
        ensure!(Instant::now() < deadline, "the source says {shown}");
        std::thread::sleep(POLL);
    }
}

fn wait_for_phase(lab: &Lab, id: &str, phase: &str) -> Result<()> {
    let deadline = Instant::now() + PHASE_TIME_MAX;
    loop {
        let shown = show(lab.node("a")?, id)?;
        if shown["phase"] == phase {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the source says {shown}");
        std::thread::sleep(POLL);
    }
}

/// One who takes the lock whenever nobody has it, and keeps it until told.
struct Taking {
    has_it: Arc<AtomicBool>,
    gives: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Taking {
    fn begin(path: PathBuf) -> Self {
        let (has_it, gives) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (has, give) = (Arc::clone(&has_it), Arc::clone(&gives));
        let thread = std::thread::spawn(move || {
            let Ok(file) = File::options().read(true).write(true).open(path) else {
                return;
            };
            while !give.load(Ordering::Acquire) {
                let taken = fcntl(&file, FcntlArg::F_OFD_SETLK(&wanted()));
                has.store(taken.is_ok(), Ordering::Release);
                if taken.is_ok() {
                    std::thread::sleep(POLL);
                }
            }
        });
        Self {
            has_it,
            gives,
            thread: Some(thread),
        }
    }

    /// Waits until he has it; false if the migration was over before.
    fn is_taken(&self, migration: &mut Migration) -> Result<bool> {
        loop {
            if self.has_it.load(Ordering::Acquire) {
                return Ok(true);
            }
            if migration.has_ended()? {
                return Ok(self.has_it.load(Ordering::Acquire));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Gives it back.
    fn give(&mut self) {
        self.gives.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.give();
    }
}

/// One who waits for the lock in the kernel: a process of its own, so that it can be ended.
struct Waiting(std::process::Child, PathBuf);

impl Waiting {
    fn begin(path: &Path) -> Result<Self> {
        let marker = path.with_extension("taken");
        let script = "use Fcntl; open my $f, '+<', $ARGV[0] or die; \
            my $lock = pack('s s x4 q q l x4', F_WRLCK, 0, 0, 1, 0); \
            fcntl($f, F_SETLKW, $lock) or die; \
            open my $taken, '>', $ARGV[1]; sleep 1000";
        let mut command = std::process::Command::new("perl");
        command.arg("-e").arg(script).arg(path).arg(&marker);
        let child = command.spawn().context("starting perl")?;
        let waits = || {
            let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
            let pid = format!(" {} ", child.id());
            locks
                .lines()
                .any(|line| line.contains("->") && line.contains(&pid))
        };
        let deadline = Instant::now() + PHASE_TIME_MAX;
        while !waits() {
            ensure!(Instant::now() < deadline, "he does not wait");
            std::thread::sleep(POLL);
        }
        Ok(Self(child, marker))
    }

    fn has_it(&self) -> bool {
        self.1.exists()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the rival wants: a byte of what the writer has for itself.
fn wanted() -> libc::flock {
    libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: 50,
        l_len: 1,
        l_pid: 0,
    }
}

const fn case(name: &'static str, rival: Rival, act: Act, ends: Ends) -> Case {
    Case {
        name,
        rival,
        act,
        ends,
    }
}

const LOCK_TAKEN: &str = "lock-taken";
const TAKEN: Ends = Ends::Stays(LOCK_TAKEN);

const CASES: [Case; 10] = [
    case("moves", Rival::Nobody, Act::Nothing, Ends::Moved),
    case(
        "waits",
        Rival::Waits,
        Act::Nothing,
        Ends::Stays("shared-lock"),
    ),
    case("given-back", Rival::Takes(SHORT), Act::Nothing, Ends::Moved),
    case("kept", Rival::Takes(LONG), Act::Nothing, TAKEN),
    case(
        "kill-source",
        Rival::Takes(SHORT),
        Act::KillDaemon("a"),
        Ends::Moved,
    ),
    case(
        "kill-target",
        Rival::Takes(SHORT),
        Act::KillDaemon("b"),
        Ends::Moved,
    ),
    case(
        "kill-source-late",
        Rival::Takes(SHORT),
        Act::KillDaemonLate,
        TAKEN,
    ),
    case(
        "kill-criu",
        Rival::Takes(SHORT),
        Act::KillCriu,
        Ends::Stays("criu-failed"),
    ),
    case(
        "kill-pager",
        Rival::Takes(SHORT),
        Act::KillPager,
        Ends::Stays("fill-lost"),
    ),
    case(
        "abort",
        Rival::Takes(SHORT),
        Act::Abort,
        Ends::Stays("refused"),
    ),
];

const CASE_BYTES: usize = 16 << 20; // 16 MiB
/// Shorter than the target tries, and longer.
const SHORT: Duration = Duration::from_millis(1500);
const LONG: Duration = Duration::from_secs(8);
/// An answer that was on its way when the workload was frozen.
const SETTLES: Duration = Duration::from_millis(300);
const PROBE: Duration = Duration::from_millis(200);
const PHASE_TIME_MAX: Duration = Duration::from_secs(20);
const ATTEMPTS_MAX: u32 = 20;
/// A client asks again after twice the time it has waited already (TCP's backoff).
const ANSWER_WITHIN: Duration = Duration::from_secs(40);
const POLL: Duration = Duration::from_millis(2);
