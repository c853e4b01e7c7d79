//! `containers --only RUNTIME-faults`: whoever takes part in the move of a container is killed, at
//! each of the gates at which the runtime waits.
//!
//! Afterwards exactly one container runs, at one of the nodes, as its runtime's own; at the other
//! nothing of it is left, its root file system is whole, and no client has noticed but by waiting.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::faults::{Stopped, Struck, signal_first, wait_for_phase};
use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, wait_settled};
use crate::workload::bridged;
use crate::workload::container::{self, Runtime};

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

/// Kills while a container of podman's bridge moves: nothing of its network is left where it is
/// not.
pub fn run_bridged(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    bridged::join_segment(&lab)?;
    let held = bridged::start(&mut lab, "a", &[])?;
    let (dataset, load) = (Dataset::first_row(BYTES), LoadPlan::first_row());
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for fault in &BRIDGE_FAULTS {
        let Fault { gate, side, who } = fault;
        let what = || format!("podman-bridge {gate:?} {side:?} {who:?}");
        let came = fault.come(&mut lab, &mut session).with_context(what)?;
        let gone = lab.node(other(&session.at))?;
        bridged::check_here(lab.node(&session.at)?, &session.workload).with_context(what)?;
        bridged::check_gone(gone, &session.workload).with_context(what)?;
        println!("{}: {came}", what());
    }
    ensure!(session.move_on(&lab, report)?, "it has not moved");
    wait_settled(&lab, SETTLE_TIME_MAX)?;
    session.finish(report)?.kill(&lab)
}

/// All of them, of one container of `runtime` under load.
pub fn run(settings: &Settings, runtime: Runtime, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    let held = container::start(&mut lab, runtime, "a")?;
    let dataset = Dataset::first_row(BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    let of_engine: &[Fault] = match runtime {
        Runtime::Podman => &ENGINE_FAULTS,
        Runtime::Crun | Runtime::Runc => &[],
    };
    for fault in FAULTS.iter().chain(of_engine) {
        let came = fault.come(&mut lab, &mut session);
        match came {
            Ok(came) => {
                let Fault { gate, side, who } = fault;
                println!("{} {gate:?} {side:?} {who:?}: {came}", runtime.name());
            }
            Err(error) => {
                report.fail(format!("{} {fault:?}: {error:#}", runtime.name()));
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
    /// Tries until its gate was met; where the container runs then, and how the move ended.
    fn come(&self, lab: &mut Lab, session: &mut Session) -> Result<String> {
        for _ in 0..TRIES {
            let struck = self.strike(lab, session)?;
            let where_it_runs = judge(lab, session)?;
            if let Some(ended) = struck {
                return Ok(format!("{where_it_runs}; {ended}"));
            }
        }
        bail!("its gate passed unseen {TRIES} times")
    }

    /// Begins a move and kills; how the move ended, if it came to the gate.
    fn strike(&self, lab: &mut Lab, session: &mut Session) -> Result<Option<String>> {
        let (from, to) = (session.at.clone(), other(&session.at));
        let name = session.workload.name();
        let flags = MoveOptions {
            timeout: Some("60s".to_owned()),
            ..MoveOptions::default()
        };
        let migration = Migration::start(lab.node(&from)?, &name, to, &flags)?;
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
        match self.who {
            Who::Daemon => {
                lab.daemon(node)?.kill()?;
                drop(stopped);
                lab.restart_daemon(node)?;
            }
            Who::Runtime | Who::Process(_) => {
                let command = self.command(session)?;
                let struck = kill_first(lab, node, command)?;
                std::thread::sleep(NOTICE);
                drop(stopped);
                if let Struck::Missed = struck {
                    migration.finish()?;
                    wait_settled(lab, SETTLE_TIME_MAX)?;
                    return Ok(None);
                }
            }
        }
        let outcome = migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        Ok(Some(match outcome.error {
            Some((code, text)) => format!("{code}: {text}"),
            None => "moved".to_owned(),
        }))
    }

    /// The command of the process that is killed.
    fn command(&self, session: &Session) -> Result<&'static str> {
        match self.who {
            Who::Runtime => {
                let container = session.workload.container.as_ref();
                let container = container.context("it was started as a container")?;
                Ok(container.runtime.program())
            }
            Who::Process(command) => Ok(command),
            Who::Daemon => bail!("daemons are not killed by their command"),
        }
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

/// Kills the first process of this name when it is there: what is to become CRIU is started while
/// the first round is sent.
fn kill_first(lab: &Lab, node: &str, command: &str) -> Result<Struck> {
    let deadline = Instant::now() + NOTICE;
    loop {
        match signal_first(lab, node, command, Signal::SIGKILL)? {
            Struck::Missed if Instant::now() < deadline => std::thread::sleep(POLL),
            struck => return Ok(struck),
        }
    }
}

/// Where it runs, at one node and no other.
fn judge(lab: &Lab, session: &mut Session) -> Result<String> {
    let container = session.workload.container.clone();
    let container = container.context("it was started as a container")?;
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
    container::check_here(node, &container, pid)?;
    container::check_whole(node, &container)?;
    let rest = lab.nodes.iter().filter(|other| other.name() != node.name());
    for gone in rest {
        container::check_gone(gone, &container)?;
        container::check_whole(gone, &container)?;
        ensure!(
            !gone.has_frozen_cgroup(),
            "node {} has a frozen cgroup",
            gone.name()
        );
    }
    node.name().clone_into(&mut session.at);
    session.workload.pid = pid;
    Ok(format!("runs at {}", session.at))
}

const BYTES: u64 = 64 << 20; // 64 MiB
/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
/// A gate is met by polling, and may last for milliseconds.
const TRIES: usize = 5;
const POLL: Duration = Duration::from_millis(1);
/// What was killed is missed, what was stopped is waited for, and what is begun is there.
const NOTICE: Duration = Duration::from_millis(300);
