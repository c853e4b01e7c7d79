//! `faults`: something dies or is called off in every state of the hand-off; the workload must run
//! on at exactly one node, with its memory right.
//!
//! A state is observed from outside (`pageferry list`), so the links are shaped and the final round
//! is large: states last long enough to be hit. Those between `Ready` and `Started` are made to
//! last by stopping (SIGSTOP) the other daemon. What happened is judged by what is alive
//! afterwards, not by whether the fault hit the very state it was meant for; a state never seen is
//! a failure.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Settings;
use super::report::Report;
use super::writing::WriterSession;
use crate::lab::network::Link;
use crate::lab::{Lab, LabOptions};
use crate::pageferry::{self, MigrateFlags, Migration, under_way, wait_settled};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    ensure!(
        !settings.baseline,
        "faults is about what stock CRIU does not have"
    );
    let link = settings
        .link
        .clone()
        .unwrap_or(Link::Shaped("1gbit".to_owned()));
    let options = LabOptions {
        nodes: 2,
        link,
        daemons: true,
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
            Ok(survivor) if fault.expected.contains(&survivor) => {
                println!("{name}: {survivor:?} runs on, memory right");
                report.note_contents(true);
            }
            Ok(survivor) => {
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
    stall: Option<Stall>,
    expected: &'static [Survivor],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Abort,
    KillDaemon(&'static str),
    KillCriu(&'static str),
    KillPager,
}

/// Stops a daemon when a node is in a phase, so that the other one stays in the next.
struct Stall {
    stopped: &'static str,
    when: (&'static str, &'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Survivor {
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
        };
        let side = if self.at.0 == "a" { "source" } else { "target" };
        format!("{act} while {side} is {}", self.at.1)
    }

    fn run(&self, lab: &mut Lab) -> Result<Survivor> {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(survivor) = self.attempt(lab)? {
                return Ok(survivor);
            }
        }
        bail!("this state was not seen in {ATTEMPTS_MAX} moves")
    }

    /// One move with the fault; none when the state was not seen.
    fn attempt(&self, lab: &mut Lab) -> Result<Option<Survivor>> {
        let memory = if self.act == Act::KillPager {
            FILL_BYTES
        } else {
            CASE_BYTES
        };
        let options = Options {
            hot: HOT_BYTES,
            rate: HOT_RATE,
            ..Options::new(memory)
        };
        let mut session = WriterSession::start(lab, "a", &options, |_| {})?;
        let flags = MigrateFlags {
            timeout: Some("60s".to_owned()),
            // The final round is as large as the hot set, and takes half a second.
            downtime_max: Some("5s".to_owned()),
            ..MigrateFlags::default()
        };
        let name = session.workload.name();
        let migration = Migration::start(lab.node("a")?, &name, "b", &flags)?;
        let hit = self.strike(lab, &name)?;
        let outcome = migration.finish()?;
        let settled = wait_settled(lab, SETTLE_TIME_MAX);
        if !hit {
            settled?;
            session.finish(lab, &mut Report::new("unused"))?;
            return Ok(None);
        }
        let survivor = judge(lab, &mut session).with_context(|| match outcome.error {
            Some((code, text)) => format!("the migration ended with {code}: {text}"),
            None => "the migration succeeded".to_owned(),
        })?;
        settled?;
        session.workload.kill(lab)?;
        Ok(Some(survivor))
    }

    /// Waits for the state and does it; whether the state was seen.
    fn strike(&self, lab: &mut Lab, workload: &str) -> Result<bool> {
        let mut stopped = None;
        if let Some(stall) = &self.stall {
            if wait_for_phase(lab, workload, stall.when)?.is_none() {
                return Ok(false);
            }
            let pid = lab.daemon(stall.stopped)?.host_pid();
            let pid = Pid::from_raw(i32::try_from(pid).context("the kernel's pids are ints")?);
            kill(pid, Signal::SIGSTOP).context("stopping a daemon")?;
            stopped = Some(pid);
        }
        let seen = wait_for_phase(lab, workload, self.at)?;
        let result = match &seen {
            Some(id) => self.act(lab, id),
            None => Ok(None),
        };
        if let Some(pid) = stopped {
            kill(pid, Signal::SIGCONT).context("continuing a daemon")?;
        }
        if let Some(mut abort) = result? {
            // Refused once it is committed, which is right.
            abort.wait().context("waiting for pageferry abort")?;
        }
        if let Act::KillDaemon(node) = self.act
            && seen.is_some()
        {
            lab.restart_daemon(node)?;
        }
        Ok(seen.is_some())
    }

    /// Does it; an abort ends only when the daemon goes on.
    fn act(&self, lab: &mut Lab, id: &str) -> Result<Option<Child>> {
        match self.act {
            Act::Abort => return pageferry::abort(lab.node("a")?, id).map(Some),
            Act::KillDaemon(node) => lab.daemon(node)?.kill()?,
            Act::KillCriu(node) => kill_first(lab, node, "criu")?,
            Act::KillPager => kill_first(lab, "b", "pageferry-pager")?,
        }
        Ok(None)
    }
}

fn kill_first(lab: &Lab, node: &str, command: &str) -> Result<()> {
    let pids = lab.node(node)?.host_processes_named(command);
    let pid = pids
        .first()
        .with_context(|| format!("no {command} runs at node {node}"))?;
    kill(Pid::from_raw(*pid), Signal::SIGKILL).with_context(|| format!("killing {command}"))
}

/// Polls until a node says that its migration of the workload is in a phase; its id. None when the
/// phase passed unseen or does not come.
fn wait_for_phase(lab: &Lab, workload: &str, at: (&str, &str)) -> Result<Option<String>> {
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

/// Who runs the workload now? Exactly one node may, and its memory must be right.
fn judge(lab: &Lab, session: &mut WriterSession) -> Result<Survivor> {
    let deadline = Instant::now() + ANSWER_WITHIN;
    let mut answers = false;
    while !answers && Instant::now() < deadline {
        answers = session
            .prober
            .wait_for_answer_after(Instant::now(), ANSWER_POLL);
    }
    let (source, target) = (lab.node("a")?, lab.node("b")?);
    let at = (
        session.workload.is_at(source),
        session.workload.is_at(target),
    );
    if !answers {
        ensure!(
            at == (false, true),
            "the workload does not answer; it is at (a, b): {at:?}"
        );
        ensure!(
            target.has_frozen_cgroup(),
            "the workload is at b, not frozen, and silent"
        );
        return Ok(Survivor::NobodyFrozen);
    }
    session.client.verify()?;
    match at {
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
    stall: Option<Stall>,
    expected: &'static [Survivor],
) -> Fault {
    Fault {
        act,
        at,
        stall,
        expected,
    }
}

/// The target stops once it is ready: the source stays with its decision.
const TARGET_STOPS: Option<Stall> = Some(Stall {
    stopped: "b",
    when: ("b", "ready"),
});
/// The source stops while the target restores: the target stays ready.
const SOURCE_STOPS: Option<Stall> = Some(Stall {
    stopped: "a",
    when: ("b", "restoring"),
});

const FAULTS: [Fault; 22] = [
    fault(Act::Abort, ("a", "offered"), None, SOURCE),
    fault(Act::Abort, ("a", "copying"), None, SOURCE),
    fault(Act::Abort, ("a", "finishing"), None, SOURCE),
    fault(Act::Abort, ("b", "restoring"), None, ONE),
    fault(Act::Abort, ("b", "ready"), SOURCE_STOPS, ONE),
    fault(Act::Abort, ("a", "committed"), TARGET_STOPS, TARGET),
    fault(Act::KillDaemon("a"), ("a", "copying"), None, SOURCE),
    fault(Act::KillDaemon("a"), ("a", "finishing"), None, SOURCE),
    fault(Act::KillDaemon("a"), ("b", "restoring"), None, ONE),
    fault(
        Act::KillDaemon("a"),
        ("a", "committed"),
        TARGET_STOPS,
        TARGET,
    ),
    fault(Act::KillDaemon("b"), ("b", "receiving"), None, SOURCE),
    fault(Act::KillDaemon("b"), ("b", "restoring"), None, ONE),
    fault(Act::KillDaemon("b"), ("b", "ready"), SOURCE_STOPS, ONE),
    fault(Act::KillDaemon("b"), ("b", "running"), None, TARGET),
    fault(Act::KillCriu("a"), ("a", "finishing"), None, SOURCE),
    fault(Act::KillCriu("a"), ("a", "committed"), TARGET_STOPS, TARGET),
    fault(Act::KillCriu("b"), ("b", "restoring"), None, ONE),
    fault(Act::KillCriu("b"), ("b", "ready"), SOURCE_STOPS, SOURCE),
    fault(Act::KillPager, ("b", "receiving"), None, SOURCE),
    fault(Act::KillPager, ("b", "restoring"), None, ONE),
    fault(Act::KillPager, ("b", "ready"), SOURCE_STOPS, SOURCE),
    fault(Act::KillPager, ("b", "running"), None, FILL_LOST),
];

const ATTEMPTS_MAX: u32 = 5;
const CASE_BYTES: usize = 256 << 20; // 256 MiB
const FILL_BYTES: usize = 1 << 30; // 1 GiB: its fill lasts long enough to be hit
const HOT_BYTES: usize = 64 << 20; // 64 MiB: half a second at 1 Gbit/s
const HOT_RATE: u32 = 20_000;
const PHASE_TIME_MAX: Duration = Duration::from_secs(20);
const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_POLL: Duration = Duration::from_millis(200);
