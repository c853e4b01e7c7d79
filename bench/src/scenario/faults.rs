//! `faults`: something dies or is called off in every state of the hand-off; the workload must run
//! on at exactly one node, with its memory right.
//!
//! A state is observed from outside (`pageferry list`), so the links are shaped and the final round
//! is large: states last long enough to be hit. Those between `Ready` and `Started` are made to
//! last by stopping (SIGSTOP) whoever would end them. What happened is judged by what is alive
//! afterwards, not by whether the fault hit the very state it was meant for; a state never seen is
//! a failure.
//!
//! Some are stopped instead of killed: then nothing ends by itself, and the source must give the
//! workload back within the time that it may stand still, and say whom it waited for.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::report::Report;
use super::settings::Settings;
use super::writing::WriterSession;
use crate::lab::network::{BRIDGE, Link};
use crate::lab::{Lab, LabOptions};
use crate::mover::MoveOptions;
use crate::mover::pageferry::{
    self, Migration, Pageferry, SETTLE_TIME_MAX, under_way, wait_settled,
};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("faults is about what stock CRIU does not have")?;
    let link = settings
        .link
        .clone()
        .unwrap_or(Link::Shaped("1gbit".to_owned()));
    let options = LabOptions {
        nodes: 2,
        link,
        daemons: true,
        bridge: BRIDGE,
        layer: None,
        programs: None,
        keep: settings.keep,
    };
    let mut lab = Lab::up(&options)?;
    for fault in &FAULTS {
        let name = fault.name();
        if settings
            .only
            .as_deref()
            .is_some_and(|only| !name.contains(only))
        {
            continue;
        }
        match fault.run(&mut lab) {
            Ok((Survivor::NobodyFrozen, _)) if fault.expected.contains(&Survivor::NobodyFrozen) => {
                println!("{name}: frozen for good, and the migration ended with its workload");
            }
            Ok((survivor, silence)) if fault.expected.contains(&survivor) => {
                println!("{name}: {survivor:?} runs on, memory right, silence {silence:.1?}");
                report.note_contents(true);
            }
            Ok((survivor, _)) => {
                report.fail(format!(
                    "{name}: {survivor:?} runs on, not {:?}",
                    fault.expected
                ));
            }
            Err(error) => report.fail(format!("{name}: {error:#}")),
        }
    }
    Ok(())
}

/// What is done, when, and who may survive.
struct Fault {
    act: Act,
    /// When this node says that this is its phase.
    at: (&'static str, &'static str),
    stall: Stall,
    expected: &'static [Survivor],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Abort,
    KillDaemon(&'static str),
    KillCriu(&'static str),
    KillPager,
    /// The target's CRIU hears and does nothing any more; then the operator gives up.
    StopCriuAndAbort,
    StopDaemon(&'static str),
    StopCriu(&'static str),
    StopPager,
}

/// Who is stopped, so that a state lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stall {
    Nobody,
    /// Nobody, but the source is waited for: it has given the workload away, and the fill goes on.
    Moved,
    /// The source, while the target restores: the target stays ready.
    Source,
    /// The source until the target is ready, then the target: `Ready` is on its way to a source
    /// that goes on and decides, and whose `Go` nobody hears.
    Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Survivor {
    Source,
    Target,
    /// It is frozen at the target because part of its memory is lost for good.
    NobodyFrozen,
}

impl Fault {
    fn name(&self) -> String {
        let act = match self.act {
            Act::Abort => "abort".to_owned(),
            Act::KillDaemon("a") => "kill source daemon".to_owned(),
            Act::KillDaemon(_) => "kill target daemon".to_owned(),
            Act::KillCriu("a") => "kill source criu".to_owned(),
            Act::KillCriu(_) => "kill target criu".to_owned(),
            Act::KillPager => "kill pager".to_owned(),
            Act::StopCriuAndAbort => "stop target criu and abort".to_owned(),
            Act::StopDaemon(_) => "stop target daemon".to_owned(),
            Act::StopCriu("a") => "stop source criu".to_owned(),
            Act::StopCriu(_) => "stop target criu".to_owned(),
            Act::StopPager => "stop pager".to_owned(),
        };
        let side = if self.at.0 == "a" { "source" } else { "target" };
        format!("{act} while {side} is {}", self.at.1)
    }

    fn run(&self, lab: &mut Lab) -> Result<(Survivor, Duration)> {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(survivor) = self.attempt(lab)? {
                return Ok(survivor);
            }
        }
        bail!("this state was not seen in {ATTEMPTS_MAX} moves")
    }

    /// One move with the fault; none when the state was not seen.
    fn attempt(&self, lab: &mut Lab) -> Result<Option<(Survivor, Duration)>> {
        let memory = if self.act == Act::KillPager && self.at == RUNNING {
            FILL_BYTES
        } else {
            CASE_BYTES
        };
        let options = Options {
            hot: HOT_BYTES,
            rate: HOT_RATE,
            ..Options::new(memory)
        };
        let mut session = WriterSession::start(lab, &Pageferry, "a", &options, |_| {})?;
        let flags = MoveOptions {
            timeout: Some("60s".to_owned()),
            // The final round is as large as the hot set, and takes half a second.
            downtime_max: Some("5s".to_owned()),
            frozen_max: self.act.waited_for().map(|_| FROZEN_MAX.to_owned()),
            ..MoveOptions::default()
        };
        let name = session.workload.name();
        let begun = Instant::now();
        let migration = Migration::start(lab.node("a")?, &name, "b", &flags)?;
        let (hit, outcome) = if self.stall == Stall::Moved {
            let outcome = migration.finish()?;
            let hit = self.strike(lab, &name)?;
            if hit {
                wait_for_fill(lab, &name)?;
            }
            (hit, outcome)
        } else {
            let hit = self.strike(lab, &name)?;
            (hit, migration.finish()?)
        };
        // The stop came when nothing depended on it any more.
        let hit = hit && (self.act.waited_for().is_none() || outcome.moved.is_none());
        // Until the source has ended its copy, the workload is at both nodes, frozen at one.
        if self.stall != Stall::Moved {
            wait_settled(lab, SETTLE_TIME_MAX)?;
        }
        if !hit {
            session.finish(lab, &mut Report::new("unused"))?;
            return Ok(None);
        }
        let judged = judge(lab, &mut session).and_then(|survivor| {
            if let Some(who) = self.act.waited_for() {
                is_frozen_too_long(outcome.error.as_ref(), who)?;
                let silence = session.prober.longest_silence_since(begun);
                ensure!(silence < SILENCE_MAX, "nobody answered for {silence:.1?}");
            }
            Ok(survivor)
        });
        let survivor = judged.with_context(|| match &outcome.error {
            Some((code, text)) => format!("the migration ended with {code}: {text}"),
            None => "the migration succeeded".to_owned(),
        });
        let silence = session.prober.longest_silence_since(begun);
        if !matches!(survivor, Ok(Survivor::Source | Survivor::Target)) {
            // As its operator would: it is told to die, and then thawed.
            session.workload.signal(lab)?;
            lab.node("b")?.thaw();
        }
        let killed = session.workload.kill(lab);
        let survivor = survivor?;
        killed?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        Ok(Some((survivor, silence)))
    }

    /// Waits for the state and does it; whether the state was seen.
    fn strike(&self, lab: &mut Lab, workload: &str) -> Result<bool> {
        let mut stopped = Stopped::default();
        if !self.stall(lab, workload, &mut stopped)? {
            return Ok(false);
        }
        let Some(id) = wait_for_phase(lab, workload, self.at)? else {
            return Ok(false);
        };
        let struck = self.act(lab, (workload, &id), &mut stopped)?;
        if self.act.waited_for().is_some() {
            wait_until_given_up(lab, workload)?;
        }
        drop(stopped);
        match struck {
            Struck::Missed => return Ok(false),
            Struck::Done => {}
            // Refused once it is committed, which is right.
            Struck::Asked(mut abort) => {
                abort.wait().context("waiting for pageferry abort")?;
            }
        }
        if let Act::KillDaemon(node) = self.act {
            lab.restart_daemon(node)?;
        }
        Ok(true)
    }

    /// Makes the state last; false when it passed unseen.
    fn stall(&self, lab: &mut Lab, workload: &str, stopped: &mut Stopped) -> Result<bool> {
        if matches!(self.stall, Stall::Nobody | Stall::Moved) {
            return Ok(true);
        }
        if wait_for_phase(lab, workload, ("b", "restoring"))?.is_none() {
            return Ok(false);
        }
        stopped.stop(lab, "a")?;
        if self.stall == Stall::Target {
            if wait_for_phase(lab, workload, ("b", "ready"))?.is_none() {
                return Ok(false);
            }
            let source = std::mem::take(stopped);
            stopped.stop(lab, "b")?;
            drop(source);
        }
        Ok(true)
    }

    /// Does it; an abort ends only when the daemon goes on.
    fn act(
        &self,
        lab: &mut Lab,
        (workload, id): (&str, &str),
        stopped: &mut Stopped,
    ) -> Result<Struck> {
        match self.act {
            Act::Abort => return pageferry::abort(lab.node("a")?, id).map(Struck::Asked),
            Act::KillDaemon(node) => lab.daemon(node)?.kill()?,
            Act::KillCriu(node) => return signal_first(lab, node, "criu", Signal::SIGKILL),
            Act::KillPager => return signal_first(lab, "b", "pageferry-pager", Signal::SIGKILL),
            Act::StopCriuAndAbort => return stop_criu_and_abort(lab, workload, id),
            Act::StopDaemon(node) => stopped.stop(lab, node)?,
            Act::StopCriu(node) => return stopped.stop_first(lab, node, "criu"),
            Act::StopPager => return stopped.stop_first(lab, "b", "pageferry-pager"),
        }
        Ok(Struck::Done)
    }
}

impl Act {
    /// Whom the source says it waited for, if it is to give up by itself.
    fn waited_for(self) -> Option<&'static str> {
        match self {
            Self::StopCriu("a") => Some("CRIU's dump"),
            Self::StopCriu(_) | Self::StopPager => Some("the target's restore"),
            Self::StopDaemon(_) => Some("the target to "),
            Self::Abort
            | Self::KillDaemon(_)
            | Self::KillCriu(_)
            | Self::KillPager
            | Self::StopCriuAndAbort => None,
        }
    }
}

/// Processes that are stopped, to go on when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Stopped(Vec<Pid>);

impl Stopped {
    pub(super) fn stop(&mut self, lab: &mut Lab, node: &str) -> Result<()> {
        let pid = lab.daemon(node)?.host_pid();
        let pid = Pid::from_raw(i32::try_from(pid).context("the kernel's pids are ints")?);
        self.stop_process(pid)
    }

    pub(super) fn stop_first(&mut self, lab: &Lab, node: &str, command: &str) -> Result<Struck> {
        let pids = lab.node(node)?.host_processes_named(command);
        let Some(pid) = pids.first() else {
            return Ok(Struck::Missed);
        };
        self.stop_process(Pid::from_raw(*pid))?;
        Ok(Struck::Done)
    }

    fn stop_process(&mut self, pid: Pid) -> Result<()> {
        kill(pid, Signal::SIGSTOP).context("stopping a process")?;
        self.0.push(pid);
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            // One that was killed meanwhile is gone.
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

/// What came of a fault.
pub(super) enum Struck {
    Done,
    /// There was nothing to kill: not yet, or no more.
    Missed,
    /// `pageferry abort`, which ends when the daemon has answered.
    Asked(Child),
}

pub(super) fn signal_first(lab: &Lab, node: &str, command: &str, signal: Signal) -> Result<Struck> {
    signal_one(lab, node, (command, 0), signal)
}

/// Sends a signal to one of the processes of a name, by its number.
pub(super) fn signal_one(
    lab: &Lab,
    node: &str,
    (command, number): (&str, usize),
    signal: Signal,
) -> Result<Struck> {
    let mut pids = lab.node(node)?.host_processes_named(command);
    pids.sort_unstable();
    let Some(pid) = pids.get(number) else {
        return Ok(Struck::Missed);
    };
    kill(Pid::from_raw(*pid), signal).with_context(|| format!("{signal} to {command}"))?;
    Ok(Struck::Done)
}

/// Stops the target's CRIU for good, before it has restored, and gives up.
fn stop_criu_and_abort(lab: &Lab, workload: &str, id: &str) -> Result<Struck> {
    let target = lab.node("b")?;
    let Struck::Done = signal_first(lab, "b", "criu", Signal::SIGSTOP)? else {
        return Ok(Struck::Missed);
    };
    // One that had restored just before would be waited for by a workload that is to run.
    let stopped = Instant::now();
    while stopped.elapsed() < HANGS_FOR {
        let is_restoring =
            under_way(target, workload).is_some_and(|(_, phase)| phase == RESTORING.1);
        if !is_restoring {
            return signal_first(lab, "b", "criu", Signal::SIGCONT).map(|_| Struck::Missed);
        }
    }
    pageferry::abort(lab.node("a")?, id).map(Struck::Asked)
}

/// Waits until the source has given up what hangs, for as long as that may take and more.
fn wait_until_given_up(lab: &Lab, workload: &str) -> Result<()> {
    let source = lab.node("a")?;
    let deadline = Instant::now() + PHASE_TIME_MAX;
    while under_way(source, workload).is_some() && Instant::now() < deadline {
        std::thread::sleep(ANSWER_POLL);
    }
    Ok(())
}

fn is_frozen_too_long(error: Option<&(String, String)>, who: &str) -> Result<()> {
    let (code, text) = error.context("the migration succeeded")?;
    ensure!(code == "frozen-too-long", "it ended for another reason");
    ensure!(text.contains(who), "it did not say {who:?}");
    println!("  {code}: {text}");
    Ok(())
}

/// Polls until a node says that its migration of the workload is in a phase; its id. None when the
/// phase passed unseen or does not come.
pub(super) fn wait_for_phase(
    lab: &Lab,
    workload: &str,
    at: (&str, &str),
) -> Result<Option<String>> {
    let (node, phase) = (lab.node(at.0)?, at.1);
    let deadline = Instant::now() + PHASE_TIME_MAX;
    let mut seen_any = false;
    while Instant::now() < deadline {
        match under_way(node, workload) {
            Some((id, now)) if now == phase => return Ok(Some(id)),
            Some(_) => seen_any = true,
            // It was there and is over.
            None if seen_any => return Ok(None),
            None => {}
        }
    }
    Ok(None)
}

/// Waits until the target's fill is over, or lost and the workload frozen for it: for some
/// milliseconds after the pager's death the workload still answers.
fn wait_for_fill(lab: &Lab, workload: &str) -> Result<()> {
    let target = lab.node("b")?;
    let deadline = Instant::now() + PHASE_TIME_MAX;
    while under_way(target, workload).is_some() && !target.has_frozen_cgroup() {
        ensure!(
            Instant::now() < deadline,
            "the fill neither ended nor was the workload frozen for it"
        );
    }
    Ok(())
}

/// Who runs the workload now? Exactly one node may, and its memory must be right.
pub(super) fn judge(lab: &Lab, session: &mut WriterSession) -> Result<Survivor> {
    let (source, target) = (lab.node("a")?, lab.node("b")?);
    let (workload, client) = (&session.workload, &mut session.client);
    let at = || (workload.is_at(source), workload.is_at(target));
    let is_frozen = || target.has_frozen_cgroup() && at() == (false, true);
    let deadline = Instant::now() + ANSWER_WITHIN;
    let mut answers = false;
    while !answers && Instant::now() < deadline {
        if is_frozen() {
            return Ok(Survivor::NobodyFrozen);
        }
        answers = session
            .prober
            .wait_for_answer_after(Instant::now(), ANSWER_POLL);
    }
    if !answers {
        let why = session.prober.broken();
        let why = why.unwrap_or_else(|| "the workload does not answer".to_owned());
        bail!("{why}; it is at (a, b): {:?}", at());
    }
    match client.verify() {
        // That was its last answer before it was frozen.
        Err(_) if is_frozen() => return Ok(Survivor::NobodyFrozen),
        verified => verified?,
    };
    match at() {
        (true, false) => Ok(Survivor::Source),
        (false, true) => Ok(Survivor::Target),
        (true, true) => bail!("the workload is at both nodes"),
        (false, false) => bail!("the workload answers but is at neither node"),
    }
}

const SOURCE: &[Survivor] = &[Survivor::Source];
const TARGET: &[Survivor] = &[Survivor::Target];
/// The fault races with the decision; either is right, both or none is not.
const ONE: &[Survivor] = &[Survivor::Source, Survivor::Target];
const FILL_LOST: &[Survivor] = &[Survivor::NobodyFrozen, Survivor::Target];

const fn fault(
    act: Act,
    at: (&'static str, &'static str),
    stall: Stall,
    expected: &'static [Survivor],
) -> Fault {
    Fault {
        act,
        at,
        stall,
        expected,
    }
}

const OFFERED: (&str, &str) = ("a", "offered");
const COPYING: (&str, &str) = ("a", "copying");
const FINISHING: (&str, &str) = ("a", "finishing");
const RECEIVING: (&str, &str) = ("b", "receiving");
const RESTORING: (&str, &str) = ("b", "restoring");
const READY: (&str, &str) = ("b", "ready");
const COMMITTED: (&str, &str) = ("a", "committed");
const RUNNING: (&str, &str) = ("b", "running");

const FAULTS: [Fault; 37] = [
    fault(Act::Abort, OFFERED, Stall::Nobody, SOURCE),
    fault(Act::Abort, COPYING, Stall::Nobody, SOURCE),
    fault(Act::Abort, FINISHING, Stall::Nobody, SOURCE),
    fault(Act::Abort, RESTORING, Stall::Nobody, ONE),
    fault(Act::Abort, READY, Stall::Source, ONE),
    fault(Act::Abort, COMMITTED, Stall::Target, ONE),
    fault(Act::KillDaemon("a"), COPYING, Stall::Nobody, SOURCE),
    fault(Act::KillDaemon("a"), FINISHING, Stall::Nobody, SOURCE),
    fault(Act::KillDaemon("a"), RESTORING, Stall::Nobody, ONE),
    fault(Act::KillDaemon("a"), READY, Stall::Source, SOURCE),
    fault(Act::KillDaemon("a"), COMMITTED, Stall::Target, TARGET),
    fault(Act::KillDaemon("a"), RUNNING, Stall::Nobody, TARGET),
    fault(Act::KillDaemon("b"), RECEIVING, Stall::Nobody, SOURCE),
    fault(Act::KillDaemon("b"), FINISHING, Stall::Nobody, SOURCE),
    fault(Act::KillDaemon("b"), RESTORING, Stall::Nobody, ONE),
    fault(Act::KillDaemon("b"), READY, Stall::Source, ONE),
    fault(Act::KillDaemon("b"), COMMITTED, Stall::Target, TARGET),
    fault(Act::KillDaemon("b"), RUNNING, Stall::Nobody, TARGET),
    // It waits for its turn, and another one is started in its place.
    fault(Act::KillCriu("a"), COPYING, Stall::Nobody, TARGET),
    fault(Act::KillCriu("b"), RECEIVING, Stall::Nobody, TARGET),
    // Once it has dumped, all that is left to it is to let go.
    fault(Act::KillCriu("a"), FINISHING, Stall::Nobody, ONE),
    fault(Act::KillCriu("a"), RESTORING, Stall::Nobody, ONE),
    fault(Act::KillCriu("a"), READY, Stall::Source, ONE),
    fault(Act::KillCriu("a"), COMMITTED, Stall::Target, TARGET),
    fault(Act::KillCriu("b"), RESTORING, Stall::Nobody, ONE),
    fault(Act::KillCriu("b"), READY, Stall::Source, SOURCE),
    // Nothing has run at the target, which is known there.
    fault(Act::KillCriu("b"), COMMITTED, Stall::Target, SOURCE),
    fault(Act::KillPager, RECEIVING, Stall::Nobody, SOURCE),
    fault(Act::KillPager, RESTORING, Stall::Nobody, ONE),
    fault(Act::KillPager, READY, Stall::Source, SOURCE),
    fault(Act::KillPager, COMMITTED, Stall::Target, SOURCE),
    fault(Act::KillPager, RUNNING, Stall::Moved, FILL_LOST),
    // What was restored so far goes, and does not wait for a CRIU that never ends.
    fault(Act::StopCriuAndAbort, RESTORING, Stall::Nobody, SOURCE),
    fault(Act::StopCriu("a"), COPYING, Stall::Nobody, SOURCE),
    fault(Act::StopDaemon("b"), FINISHING, Stall::Nobody, SOURCE),
    fault(Act::StopCriu("b"), RECEIVING, Stall::Nobody, SOURCE),
    fault(Act::StopPager, RECEIVING, Stall::Nobody, SOURCE),
];

const ATTEMPTS_MAX: u32 = 5;
const CASE_BYTES: usize = 256 << 20; // 256 MiB
const FILL_BYTES: usize = 1 << 30; // 1 GiB: its fill lasts long enough to be hit
const HOT_BYTES: usize = 64 << 20; // 64 MiB: half a second at 1 Gbit/s
const HOT_RATE: u32 = 20_000;
/// How long a workload may stand still whose migration hangs, and how long a client may notice: it
/// asks again after twice the time it has waited already (TCP's backoff).
const FROZEN_MAX: &str = "2s";
const SILENCE_MAX: Duration = Duration::from_secs(5);
const PHASE_TIME_MAX: Duration = Duration::from_secs(20);
const HANGS_FOR: Duration = Duration::from_millis(300);
/// For the same backoff, after faults that take longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const ANSWER_POLL: Duration = Duration::from_millis(200);
