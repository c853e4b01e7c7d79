//! `postcopy`: a workload that runs before its memory is there. A writer of twice the link's rate
//! moves with all of it to follow, or with what rounds do not bring; then once more while somebody
//! is killed, or the link is cut, in the middle of what follows. Every page is checked each time.
//!
//! Reported: downtime and the gap that a client sees, how long threads waited for pages, and how
//! long until all was there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::faults::{Survivor, judge, wait_for_phase};
use super::report::Report;
use super::settings::Settings;
use super::writing::WriterSession;
use crate::lab::network::{BRIDGE, Link, ip};
use crate::lab::{Lab, LabOptions};
use crate::mover::MoveOptions;
use crate::mover::outcome::{millis, round};
use crate::mover::pageferry::{Migration, Pageferry, show, wait_settled};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("postcopy is about what stock CRIU does otherwise")?;
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
    for case in &CASES {
        let only = settings.only.as_deref();
        if only.is_some_and(|only| only != case.name) {
            continue;
        }
        let done = case.run(&mut lab, report);
        if let Err(error) = done {
            report.note_contents(false);
            report.fail(format!("{}: {error:#}", case.name));
        }
    }
    Ok(())
}

/// Names of the cases, and what they are.
pub const NAMES: [(&str, &str); 7] = [
    ("postcopy", "all of the memory follows"),
    ("hybrid", "what rounds do not bring follows"),
    ("cut", "the link is cut for 5 s while it follows"),
    ("source", "the source's daemon is killed while it follows"),
    ("target", "the target's daemon is killed while it follows"),
    (
        "lost",
        "the source dies while it follows, and that is declared",
    ),
    ("pager", "the pager is killed while it follows"),
];

/// What happens while memory follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Nothing,
    Cut,
    KillDaemon(&'static str),
    FenceSource,
    KillPager,
}

struct Case {
    name: &'static str,
    mode: &'static str,
    act: Act,
}

const fn case(name: &'static str, mode: &'static str, act: Act) -> Case {
    Case { name, mode, act }
}

const CASES: [Case; 7] = [
    case("postcopy", "postcopy", Act::Nothing),
    case("hybrid", "hybrid", Act::Nothing),
    case("cut", "postcopy", Act::Cut),
    case("source", "postcopy", Act::KillDaemon("a")),
    case("target", "postcopy", Act::KillDaemon("b")),
    case("lost", "postcopy", Act::FenceSource),
    case("pager", "postcopy", Act::KillPager),
];

impl Case {
    fn run(&self, lab: &mut Lab, report: &mut Report) -> Result<()> {
        let options = Options {
            hot: HOT_BYTES,
            rate: HOT_RATE,
            ..Options::new(MEMORY_BYTES)
        };
        let mut session = WriterSession::start(lab, &Pageferry, "a", &options, |_| {})?;
        let flags = MoveOptions {
            mode: Some(self.mode.to_owned()),
            // One round of all of it takes 17 s, and on a busy machine a minute.
            timeout: Some("300s".to_owned()),
            ..MoveOptions::default()
        };
        let name = session.workload.name();
        let begun = Instant::now();
        let migration = Migration::start(lab.node("a")?, &name, "b", &flags)?;
        let mut id = None;
        if self.act != Act::Nothing {
            let seen = wait_for_phase(lab, &name, ("a", "draining"))?;
            let seen = seen.context("memory was not seen to follow")?;
            self.act(lab, &seen)?;
            id = Some(seen);
        }
        let outcome = migration.finish()?;
        // The command ends with the daemon that it asked.
        wait_settled_but(lab, self.act.loses(), &name)?;
        let id = outcome.id.clone().or(id).context("it has an id")?;
        let took = begun.elapsed();
        if self.act.loses() {
            return self.lost(lab, session, &id);
        }
        let survivor = judge(lab, &mut session)?;
        ensure!(survivor == Survivor::Target, "{survivor:?} runs on");
        session.client.verify()?;
        report.note_contents(true);
        let silence = session.prober.longest_silence_since(begun);
        println!(
            "{}: memory right, all there after {:.1} s, longest silence {:.1} ms",
            self.name,
            took.as_secs_f64(),
            millis(silence)
        );
        if let Some(mut one) = outcome.moved {
            ensure!(
                one.mode == self.mode,
                "it moved by {}, not by {}",
                one.mode,
                self.mode
            );
            one.blackout_ms = Some(millis(silence));
            report.push(one);
        }
        self.figures(lab, &id, report)?;
        report.figure("longest silence, ms", millis(silence));
        report.figure("all there after, s", round(took.as_secs_f64()));
        report.print_figures(self.name);
        session.finish(lab, report)?;
        wait_settled(lab, SETTLE_TIME_MAX)
    }

    /// What the target says of threads that had to wait.
    fn figures(&self, lab: &Lab, id: &str, report: &mut Report) -> Result<()> {
        let said = show(lab.node("b")?, id)?;
        let waited = &said["waited"];
        // A daemon that was restarted was told, too: the pager knows.
        ensure!(waited["faults"].as_u64() > Some(0), "nobody waited: {said}");
        for (key, name) in [
            ("faults", "threads waited for a page, times"),
            ("p50_ms", "for, p50 ms"),
            ("p99_ms", "for, p99 ms"),
            ("max_ms", "for, worst ms"),
        ] {
            let value: &Value = &waited[key];
            report.figure(name, value.clone());
        }
        Ok(())
    }

    fn act(&self, lab: &mut Lab, id: &str) -> Result<()> {
        match self.act {
            Act::Nothing => {}
            Act::Cut => {
                set_link(lab, "a", "down")?;
                std::thread::sleep(CUT_FOR);
                set_link(lab, "a", "up")?;
            }
            Act::KillDaemon(node) => {
                lab.daemon(node)?.kill()?;
                lab.restart_daemon(node)?;
            }
            Act::FenceSource => {
                lab.daemon("a")?.kill()?;
                let resolve = lab.node("b")?.command("pageferry")?;
                resolve.args(["resolve", id, "--fenced", "source"]).run()?;
                // Nothing of it may run when its daemon comes back in spite of that.
                lab.restart_daemon("a")?;
            }
            Act::KillPager => {
                let pids = lab.node("b")?.host_processes_named("pageferry-pager");
                ensure!(!pids.is_empty(), "there is no pager");
                // The watcher goes by the same name: it is the child.
                let pid = pids.iter().min().copied().unwrap_or_default();
                let pid = nix::unistd::Pid::from_raw(pid);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
            }
        }
        Ok(())
    }

    /// What cannot come any more is lost as was said, and never a wrong byte.
    fn lost(&self, lab: &mut Lab, mut session: WriterSession, id: &str) -> Result<()> {
        let survivor = judge(lab, &mut session)?;
        ensure!(
            survivor == Survivor::NobodyFrozen,
            "{survivor:?} runs on without its memory"
        );
        // As its operator would: it is told to die, and then thawed.
        session.workload.signal(lab)?;
        lab.node("b")?.thaw();
        session.workload.kill(lab)?;
        if self.act == Act::FenceSource {
            // It was not dead: it hears that its copy is worth nothing any more.
            lab.restart_daemon("a")?;
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
        for node in ["a", "b"] {
            let said = show(lab.node(node)?, id)?;
            let code = said["error"]["code"].as_str().unwrap_or_default();
            ensure!(code == "lost-in-drain", "node {node} says {said}");
        }
        println!("{}: frozen for good, and both nodes say so", self.name);
        Ok(())
    }
}

impl Act {
    fn loses(self) -> bool {
        matches!(self, Self::FenceSource | Self::KillPager)
    }
}

/// Waits until all has come, or the workload is frozen for good.
fn wait_settled_but(lab: &Lab, loses: bool, workload: &str) -> Result<()> {
    if !loses {
        return wait_settled(lab, SETTLE_TIME_MAX);
    }
    let deadline = Instant::now() + SETTLE_TIME_MAX;
    while !lab.node("b")?.has_frozen_cgroup() {
        if deadline < Instant::now() {
            bail!("{workload} is not frozen");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Takes a node's link to the others away, or gives it back.
fn set_link(lab: &Lab, node: &str, state: &str) -> Result<()> {
    let node = lab.node(node)?;
    let script = format!("link set node-{} {state}\n", node.name());
    ip(node, &lab.switch.net, &[], |_| script)
}

/// 2 GiB take 17 s at 1 Gbit/s.
const MEMORY_BYTES: usize = 2 << 30;
/// All of it is written, 250 MB/s: twice what 1 Gbit/s takes.
const HOT_BYTES: usize = MEMORY_BYTES;
const HOT_RATE: u32 = 61_000;
const CUT_FOR: Duration = Duration::from_secs(5);
const SETTLE_TIME_MAX: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(50);
