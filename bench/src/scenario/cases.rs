//! `cases`: workloads after public reports, with state that made other tools hang or fail. Each is
//! moved there and back, or is refused by a name of its own, and never stands still for long.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::report::Report;
use super::settings::{Settings, other};
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, wait_settled};
use crate::workload::case::CaseWorkload;

/// What must come of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Demand {
    /// It moves, whatever has to be waited for.
    Moves,
    /// It moves if what is lost of System V objects may be.
    MovesByForce,
    /// It stays, with this code.
    Refused(&'static str),
}

/// A case of `lab-cases` and what must come of it.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    demand: Demand,
    /// How often it is moved.
    times: usize,
}

const fn moves(name: &'static str) -> Case {
    moves_often(name, MOVES)
}

/// What goes wrong in it does so now and then.
const fn moves_often(name: &'static str, times: usize) -> Case {
    Case {
        name,
        demand: Demand::Moves,
        times,
    }
}

const fn moves_by_force(name: &'static str) -> Case {
    Case {
        name,
        demand: Demand::MovesByForce,
        times: MOVES,
    }
}

const fn refused(name: &'static str, code: &'static str) -> Case {
    Case {
        name,
        demand: Demand::Refused(code),
        times: MOVES,
    }
}

const ALL: [Case; 22] = [
    moves("stopped-children"),
    moves("orphan-session"),
    moves("posix-lock"),
    moves("flock-lock"),
    moves("ofd-lock"),
    refused("lease-lock", "shared-lock"),
    moves("momentary-lock"),
    moves("tcp-backlog"),
    refused("tcp-backlog-stays", "passing-state"),
    moves("tcp-connecting"),
    refused("tcp-connecting-stays", "passing-state"),
    moves_often("loopback", 12),
    moves_often("loopback-corked", 4),
    moves("netlink-queue"),
    refused("netlink-queue-stays", "passing-state"),
    moves("vfork"),
    refused("vfork-stays", "passing-state"),
    moves("ipc"),
    refused("ipc-undo", "ipc-lost"),
    moves_by_force("ipc-undo"),
    refused("ipc-removed", "ipc-lost"),
    refused("posix-queue", "ipc-unfit"),
];

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("cases are about what stock CRIU cannot do")?;
    // Several may be run, with commas between them.
    let only: Option<Vec<&str>> = settings
        .only
        .as_deref()
        .map(|only| only.split(',').collect());
    let wanted = |case: &&Case| only.as_ref().is_none_or(|only| only.contains(&case.name));
    let wanted: Vec<Case> = ALL.iter().filter(wanted).copied().collect();
    ensure!(!wanted.is_empty(), "there is no such case");
    let mut lab = settings.lab(2)?;
    for case in wanted {
        if let Err(error) = case.run(&mut lab, report) {
            report.fail(format!("{}: {error:#}", case.name));
        }
        wait_settled(&lab, SETTLE_TIME_MAX)?;
    }
    Ok(())
}

impl Case {
    fn run(self, lab: &mut Lab, report: &mut Report) -> Result<()> {
        let mut running = CaseWorkload::start(lab, "a", self.name)?;
        let result = self.there_and_back(lab, &mut running, report);
        let ended = running.workload.kill(lab);
        result.and(ended)
    }

    fn there_and_back(
        self,
        lab: &Lab,
        running: &mut CaseWorkload,
        report: &mut Report,
    ) -> Result<()> {
        let mut at = "a".to_owned();
        for _ in 0..self.times {
            let to = other(&at).to_owned();
            let flags = MoveOptions {
                shared: vec![SHARED.to_owned()],
                force_ipc: self.demand == Demand::MovesByForce,
                ..MoveOptions::default()
            };
            let name = running.workload.name();
            let before = given_up(lab);
            let outcome = Migration::start(lab.node(&at)?, &name, &to, &flags)?.finish()?;
            let verdict = running.verdict().context("after the move")?;
            let fate = match &outcome.error {
                None => format!("moved {at} -> {to}"),
                Some((code, text)) => format!("refused {code} ({text})"),
            };
            let retries = given_up(lab) - before;
            let stood_still = verdict.stood_still;
            println!(
                "{}: {fate}, {retries} retries, stood still for {stood_still:.1?}",
                self.name
            );
            for wrong in &verdict.wrong {
                report.fail(format!("{}: {fate}: {wrong}", self.name));
            }
            if stood_still >= STAND_STILL_MAX {
                report.fail(format!(
                    "{}: {fate}: stood still for {stood_still:?}",
                    self.name
                ));
            }
            let code = outcome.error.as_ref().map(|(code, _)| code.as_str());
            match (self.demand, code) {
                (Demand::Moves | Demand::MovesByForce, None) => {}
                (Demand::Refused(demanded), Some(code)) if demanded == code => return Ok(()),
                _ => {
                    report.fail(format!(
                        "{}: {fate}, but {:?} is right",
                        self.name, self.demand
                    ));
                    return Ok(());
                }
            }
            running.workload.pid = outcome.pid_at_target().unwrap_or(running.workload.pid);
            at = to;
            if let Some(one) = outcome.moved {
                report.push(one);
            }
        }
        Ok(())
    }
}

/// How often a freeze was given up and tried again, as the daemons' logs say.
fn given_up(lab: &Lab) -> usize {
    let logs = lab.nodes.iter().map(|node| {
        let log = lab.folder.logs().join(node.name()).join("pageferryd.log");
        std::fs::read_to_string(log).unwrap_or_default()
    });
    logs.map(|log| log.matches(GIVEN_UP).count()).sum()
}

/// What a daemon writes to its log then.
const GIVEN_UP: &str = "the freeze is given up";

const MOVES: usize = 2;
const STAND_STILL_MAX: Duration = Duration::from_secs(5);
