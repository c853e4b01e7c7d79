//! `containers --only RUNTIME-faults`: whoever takes part in the move of a container is killed, at
//! each of the gates at which the runtime waits.
//!
//! Afterwards exactly one container runs, at one of the nodes, as its runtime's own; at the other
//! nothing of it is left, its root file system is whole, and no client has noticed but by waiting.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::faults::{Stopped, Struck, signal_one, wait_for_phase};
use super::podman_pod::PodSession;
use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::lab::containerd::Engine;
use crate::mover::MoveOptions;
use crate::mover::outcome::Outcome;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, wait_settled};
use crate::workload::bridged;
use crate::workload::container::Runtime;
use crate::workload::containerd::{TRAPPED, trap_wrapper, untrap_wrapper};
use crate::workload::whose::Whose;

/// Where a runtime waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    /// Both do: `checkpoint` for the freeze, `restore` for the images.
    Rounds,
    /// The source's CRIU has dumped, and the target does not answer.
    PostDump,
    /// The target's CRIU has restored, and the source does not answer.
    PostRestore,
    /// The commit is durable, and the target does not answer.
    Committed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// Whom `kill -9` hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Daemon,
    /// The container's.
    Runtime,
    /// By its command.
    Process(&'static str),
    /// The same of several: the one of this number, in the order of their pids.
    Of(&'static str, usize),
    /// containerd, which is started again.
    Engine,
    /// What containerd's shim starts as the runtime, once, when it is to do this. It lives for
    /// milliseconds, so another program stands in its place and dies as it would.
    Wrapper(&'static str),
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    gate: Gate,
    side: Side,
    who: Who,
}

const fn fault(gate: Gate, side: Side, who: Who) -> Fault {
    Fault { gate, side, who }
}

/// What is to become CRIU has its name.
const CRIU: Who = Who::Process("criu");
const PODMAN: Who = Who::Process("podman");
/// podman's: it keeps the log of a container, and starts its runtime.
const MONITOR: Who = Who::Process("conmon");
const PAGER: Who = Who::Process("pageferry-pager");
/// What asks containerd for the container: the kernel keeps 15 bytes of a name.
const ASKER: Who = Who::Process("pageferry-conta");
const SHIM: Who = Who::Process("containerd-shim");

const FAULTS: [Fault; 17] = [
    fault(Gate::Rounds, Side::Source, Who::Daemon),
    fault(Gate::Rounds, Side::Source, Who::Runtime),
    fault(Gate::Rounds, Side::Source, CRIU),
    fault(Gate::Rounds, Side::Target, Who::Daemon),
    fault(Gate::Rounds, Side::Target, Who::Runtime),
    fault(Gate::Rounds, Side::Target, CRIU),
    fault(Gate::PostDump, Side::Source, Who::Daemon),
    fault(Gate::PostDump, Side::Source, Who::Runtime),
    fault(Gate::PostDump, Side::Source, CRIU),
    fault(Gate::PostRestore, Side::Target, Who::Daemon),
    fault(Gate::PostRestore, Side::Target, Who::Runtime),
    fault(Gate::PostRestore, Side::Target, CRIU),
    fault(Gate::PostRestore, Side::Target, PAGER),
    fault(Gate::Committed, Side::Source, Who::Daemon),
    fault(Gate::Committed, Side::Source, Who::Runtime),
    fault(Gate::Committed, Side::Target, Who::Daemon),
    fault(Gate::Committed, Side::Target, Who::Runtime),
];

/// And whoever takes part in that of an engine.
const ENGINE_FAULTS: [Fault; 3] = [
    fault(Gate::Rounds, Side::Target, PODMAN),
    fault(Gate::Rounds, Side::Target, MONITOR),
    fault(Gate::PostRestore, Side::Target, MONITOR),
];

/// Also in that of containerd. A shim that dies takes its container with it, so only one is killed
/// whose container does not run yet.
const CONTAINERD_FAULTS: [Fault; 15] = [
    fault(Gate::Rounds, Side::Target, Who::Wrapper("create")),
    fault(Gate::Rounds, Side::Target, Who::Wrapper("start")),
    fault(Gate::Rounds, Side::Target, ASKER),
    fault(Gate::PostRestore, Side::Target, ASKER),
    fault(Gate::Committed, Side::Target, ASKER),
    fault(Gate::Rounds, Side::Target, SHIM),
    fault(Gate::PostRestore, Side::Target, SHIM),
    fault(Gate::Rounds, Side::Source, Who::Engine),
    fault(Gate::Rounds, Side::Target, Who::Engine),
    fault(Gate::PostDump, Side::Source, Who::Engine),
    fault(Gate::PostDump, Side::Target, Who::Engine),
    fault(Gate::PostRestore, Side::Source, Who::Engine),
    fault(Gate::PostRestore, Side::Target, Who::Engine),
    fault(Gate::Committed, Side::Source, Who::Engine),
    fault(Gate::Committed, Side::Target, Who::Engine),
];

/// Those that meet a network of podman's own.
const BRIDGE_FAULTS: [Fault; 8] = [
    fault(Gate::Rounds, Side::Target, Who::Daemon),
    fault(Gate::Rounds, Side::Target, PODMAN),
    fault(Gate::Rounds, Side::Target, MONITOR),
    fault(Gate::PostDump, Side::Source, Who::Daemon),
    fault(Gate::PostRestore, Side::Target, Who::Daemon),
    fault(Gate::PostRestore, Side::Target, PAGER),
    fault(Gate::Committed, Side::Source, Who::Daemon),
    fault(Gate::Committed, Side::Target, Who::Daemon),
];

/// Those that meet one of several containers that move as one.
const POD_FAULTS: [Fault; 21] = [
    fault(Gate::Rounds, Side::Source, Who::Daemon),
    fault(Gate::Rounds, Side::Source, CRIU),
    fault(Gate::Rounds, Side::Target, Who::Daemon),
    fault(Gate::Rounds, Side::Target, CRIU),
    fault(Gate::Rounds, Side::Target, Who::Of("criu", 2)),
    fault(Gate::Rounds, Side::Target, PODMAN),
    fault(Gate::Rounds, Side::Target, Who::Of("podman", 2)),
    fault(Gate::PostDump, Side::Source, Who::Daemon),
    fault(Gate::PostDump, Side::Source, CRIU),
    fault(Gate::PostDump, Side::Source, Who::Of("criu", 2)),
    fault(Gate::PostRestore, Side::Target, Who::Daemon),
    fault(Gate::PostRestore, Side::Target, CRIU),
    fault(Gate::PostRestore, Side::Target, Who::Of("criu", 2)),
    fault(Gate::PostRestore, Side::Target, PAGER),
    fault(
        Gate::PostRestore,
        Side::Target,
        Who::Of("pageferry-pager", 1),
    ),
    fault(
        Gate::PostRestore,
        Side::Target,
        Who::Of("pageferry-pager", 2),
    ),
    fault(Gate::PostRestore, Side::Target, Who::Of("podman", 1)),
    fault(Gate::Committed, Side::Source, Who::Daemon),
    fault(Gate::Committed, Side::Target, Who::Daemon),
    fault(Gate::Committed, Side::Target, Who::Of("criu", 1)),
    fault(Gate::Committed, Side::Target, Who::Of("pageferry-pager", 2)),
];

/// Kills while a pod of podman moves: all of it runs at one node, and nothing of it is at the
/// other. Only those in whose name `which` is.
pub fn run_pod(settings: &Settings, which: &str, report: &mut Report) -> Result<()> {
    let whose = Whose::Runtime(Runtime::Podman);
    let faults = POD_FAULTS
        .iter()
        .filter(|fault| fault.name().contains(which));
    let faults: Vec<&Fault> = faults.collect();
    ensure!(
        !faults.is_empty(),
        "none of these kills is called {which:?}"
    );
    let mut lab = settings.lab_with(whose.layer(), 2)?;
    let mut engines = whose.start_engines(&lab)?;
    bridged::join_segment(&lab)?;
    let mut pod = PodSession::start(&mut lab, settings)?;
    for fault in faults {
        let what = || format!("podman-pod {}", fault.name());
        let came = fault.come(&mut lab, (whose, &mut engines), &mut pod.session);
        let came = came.with_context(what)?;
        pod.check(&lab).with_context(what)?;
        println!("{}: {came}", what());
    }
    ensure!(pod.session.move_on(&lab, report)?, "it has not moved");
    wait_settled(&lab, SETTLE_TIME_MAX)?;
    pod.check(&lab)?;
    pod.end(&lab, report)
}

/// Kills while a container of podman's bridge moves: nothing of its network is left where it is
/// not.
pub fn run_bridged(settings: &Settings, report: &mut Report) -> Result<()> {
    let whose = Whose::Runtime(Runtime::Podman);
    let mut lab = settings.lab_with(whose.layer(), 2)?;
    let mut engines = whose.start_engines(&lab)?;
    bridged::join_segment(&lab)?;
    let held = bridged::start(&mut lab, "a", &[])?;
    let (dataset, load) = (Dataset::first_row(BYTES), LoadPlan::first_row());
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for fault in &BRIDGE_FAULTS {
        let what = || format!("podman-bridge {}", fault.name());
        let came = fault.come(&mut lab, (whose, &mut engines), &mut session);
        let came = came.with_context(what)?;
        let gone = lab.node(other(&session.at))?;
        bridged::check_here(lab.node(&session.at)?, &session.workload).with_context(what)?;
        bridged::check_gone(gone, &session.workload).with_context(what)?;
        println!("{}: {came}", what());
    }
    ensure!(session.move_on(&lab, report)?, "it has not moved");
    wait_settled(&lab, SETTLE_TIME_MAX)?;
    session.finish(report)?.kill(&lab)
}

/// All of them, of one container under load.
pub fn run(settings: &Settings, whose: Whose, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(whose.layer(), 2)?;
    let mut engines = whose.start_engines(&lab)?;
    let held = whose.start_redis(&mut lab, "a")?;
    let dataset = Dataset::first_row(BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    let of_engine: &[Fault] = match whose {
        Whose::Runtime(Runtime::Podman) => &ENGINE_FAULTS,
        Whose::Runtime(Runtime::Crun | Runtime::Runc) => &[],
        Whose::Containerd => &CONTAINERD_FAULTS,
    };
    for fault in FAULTS.iter().chain(of_engine) {
        let came = fault.come(&mut lab, (whose, &mut engines), &mut session);
        match came {
            Ok(came) => {
                println!("{} {}: {came}", whose.name(), fault.name());
            }
            Err(error) => {
                report.fail(format!("{} {fault:?}: {error:#}", whose.name()));
                break;
            }
        }
    }
    // And whole afterwards.
    let to = other(&session.at);
    session.move_to(&lab, to, &MoveOptions::default(), report)?;
    session.wait_for_writes(WRITES_AROUND)?;
    wait_settled(&lab, SETTLE_TIME_MAX)?;
    session.finish(report)?.kill(&lab)
}

impl Fault {
    /// As it is printed, and chosen.
    fn name(&self) -> String {
        let Self { gate, side, who } = self;
        format!("{gate:?} {side:?} {who:?}")
    }

    /// Tries until its gate was met; where the container runs then, and how the move ended.
    fn come(&self, lab: &mut Lab, who: Owner<'_>, session: &mut Session) -> Result<String> {
        let (whose, engines) = who;
        for _ in 0..TRIES {
            let struck = match self.who {
                Who::Wrapper(verb) => strike_wrapper(lab, verb, session)?,
                _ => self.strike(lab, (whose, engines), session)?,
            };
            let where_it_runs = judge(lab, session)?;
            if let Some(ended) = struck {
                return Ok(format!("{where_it_runs}; {ended}"));
            }
        }
        bail!("its gate passed unseen {TRIES} times")
    }

    /// Begins a move and kills; how the move ended, if it came to the gate.
    fn strike(
        &self,
        lab: &mut Lab,
        (whose, engines): Owner<'_>,
        session: &mut Session,
    ) -> Result<Option<String>> {
        let (from, to) = (session.at.clone(), other(&session.at));
        let name = session.workload.name();
        let migration = Migration::start(lab.node(&from)?, &name, to, &flags())?;
        let mut stopped = Stopped::default();
        if !self.come_to_gate(lab, &name, (&from, to), &mut stopped)? {
            drop(stopped);
            migration.finish()?;
            wait_settled(lab, SETTLE_TIME_MAX)?;
            return Ok(None);
        }
        let node = match self.side {
            Side::Source => from.as_str(),
            Side::Target => to,
        };
        let command = match self.who {
            Who::Daemon => {
                lab.daemon(node)?.kill()?;
                drop(stopped);
                lab.restart_daemon(node)?;
                None
            }
            Who::Engine => {
                let all = lab.nodes.iter().zip(engines.iter_mut());
                let (node, engine) = all
                    .into_iter()
                    .find(|(known, _)| known.name() == node)
                    .context("its node has an engine")?;
                engine.kill()?;
                std::thread::sleep(NOTICE);
                drop(stopped);
                // Whoever needs it now does not find it.
                std::thread::sleep(NOTICE);
                engine.restart(node)?;
                None
            }
            Who::Runtime => Some(((whose.program(), 0), stopped)),
            Who::Process(command) => Some(((command, 0), stopped)),
            Who::Of(command, number) => Some(((command, number), stopped)),
            Who::Wrapper(_) => bail!("it is not killed at a gate"),
        };
        if let Some((command, stopped)) = command {
            let struck = kill_one(lab, node, command)?;
            std::thread::sleep(NOTICE);
            drop(stopped);
            if let Struck::Missed = struck {
                migration.finish()?;
                wait_settled(lab, SETTLE_TIME_MAX)?;
                return Ok(None);
            }
        }
        let outcome = migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        Ok(Some(ended(outcome)))
    }

    /// Has it come to the gate, and stay there; false when that passed unseen.
    fn come_to_gate(
        &self,
        lab: &mut Lab,
        name: &str,
        (from, to): (&str, &str),
        stopped: &mut Stopped,
    ) -> Result<bool> {
        let reach = |lab: &Lab, at: (&str, &str)| -> Result<bool> {
            wait_for_phase(lab, name, at).map(|reached| reached.is_some())
        };
        let first = match self.gate {
            Gate::Rounds => (from, "copying"),
            Gate::PostDump | Gate::PostRestore | Gate::Committed => (to, "restoring"),
        };
        if !reach(lab, first)? {
            return Ok(false);
        }
        match self.gate {
            Gate::Rounds => Ok(true),
            Gate::PostDump => stopped.stop(lab, to).map(|()| true),
            Gate::PostRestore => {
                stopped.stop(lab, from)?;
                reach(lab, (to, "ready"))
            }
            Gate::Committed => {
                stopped.stop(lab, from)?;
                if !reach(lab, (to, "ready"))? {
                    return Ok(false);
                }
                let source = std::mem::take(stopped);
                stopped.stop(lab, to)?;
                drop(source);
                reach(lab, (from, "committed"))
            }
        }
    }
}

/// Whose container it is, and the engines of all nodes.
type Owner<'a> = (Whose, &'a mut [Engine]);

fn flags() -> MoveOptions {
    MoveOptions {
        timeout: Some("60s".to_owned()),
        ..MoveOptions::default()
    }
}

fn ended(outcome: Outcome) -> String {
    match outcome.error {
        Some((code, text)) => format!("{code}: {text}"),
        None => "moved".to_owned(),
    }
}

/// Moves while the target's wrapper dies when it is first to do this; how the move ended, if it
/// did die.
fn strike_wrapper(lab: &mut Lab, verb: &str, session: &mut Session) -> Result<Option<String>> {
    let (from, to) = (session.at.clone(), other(&session.at));
    trap_wrapper(lab.node(to)?, verb)?;
    let name = session.workload.name();
    let outcome = Migration::start(lab.node(&from)?, &name, to, &flags())?.finish()?;
    wait_settled(lab, SETTLE_TIME_MAX)?;
    let has_died = lab.node(to)?.path(TRAPPED).exists();
    untrap_wrapper(lab.node(to)?)?;
    Ok(has_died.then(|| ended(outcome)))
}

/// Kills the process of this name and number when it is there: what is to become CRIU is started
/// while the first round is sent.
fn kill_one(lab: &Lab, node: &str, (command, number): (&str, usize)) -> Result<Struck> {
    let deadline = Instant::now() + NOTICE;
    loop {
        match signal_one(lab, node, (command, number), Signal::SIGKILL)? {
            Struck::Missed if Instant::now() < deadline => std::thread::sleep(POLL),
            struck => return Ok(struck),
        }
    }
}

/// Where it runs, at one node and no other.
fn judge(lab: &Lab, session: &mut Session) -> Result<String> {
    session.wait_for_writes(WRITES_AROUND)?;
    let mut here = Vec::new();
    for node in &lab.nodes {
        let servers = node.processes_named("redis-server");
        ensure!(servers.len() <= 1, "node {} has {servers:?}", node.name());
        here.extend(servers.first().map(|pid| (node, *pid)));
    }
    let [(node, pid)] = here[..] else {
        bail!("it runs at {} nodes", here.len());
    };
    node.name().clone_into(&mut session.at);
    session.workload.pid = pid;
    // An engine that was away hears of it when it is back.
    let deadline = Instant::now() + TOLD_MAX;
    while let Err(error) = is_right(lab, session) {
        if deadline < Instant::now() {
            return Err(error);
        }
        std::thread::sleep(NOTICE);
    }
    Ok(format!("runs at {}", session.at))
}

/// Whether it is its owner's own where it runs, and nothing of it is at the other node.
fn is_right(lab: &Lab, session: &Session) -> Result<()> {
    for node in &lab.nodes {
        session.workload.is_whole(node)?;
        if node.name() == session.at {
            session.workload.is_here(node)?;
            continue;
        }
        session.workload.is_gone(node)?;
        let name = node.name();
        ensure!(!node.has_frozen_cgroup(), "node {name} has a frozen cgroup");
    }
    Ok(())
}

const BYTES: u64 = 64 << 20; // 64 MiB
/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
/// A gate is met by polling, and may last for milliseconds.
const TRIES: usize = 12;
const POLL: Duration = Duration::from_millis(1);
/// What was killed is missed, what was stopped is waited for, and what is begun is there.
const NOTICE: Duration = Duration::from_millis(300);
/// How long it may take until an engine that was away has been told.
const TOLD_MAX: Duration = Duration::from_secs(15);
