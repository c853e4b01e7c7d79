//! `containers`: Redis in a container, moved to and fro under load, beside the same Redis as a bare
//! tree.
//!
//! At each node the container must be the runtime's own, and where it was nothing may be left of
//! it.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use super::{container_faults, containerd};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::mover::MoveOptions;
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::workload::{container, redis};

/// The scenario; its cases are the runtimes, a short one, and kills.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("containers are about what stock CRIU does not have")?;
    let (moves, bytes) = match settings.only.as_deref() {
        None | Some(RUNC) => (MOVES, BYTES),
        Some(FEW) => (MOVES_FEW, BYTES_FEW),
        Some(FAULTS) => return container_faults::run(settings, report),
        Some(CONTAINERD_FAULTS) => return container_faults::run_containerd(settings, report),
        Some(CONTAINERD) => return containerd::moves(settings, report),
        Some(other) => {
            let known = [RUNC, FEW, FAULTS, CONTAINERD, CONTAINERD_FAULTS].join(", ");
            bail!("containers has no case {other:?}, only {known}")
        }
    };
    let dataset = Dataset::first_row(bytes);
    let mut lab = settings.lab(2)?;
    let earlier = report.moves.len();
    let tree = redis::start(&mut lab, "a", &redis::plan())?;
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", tree, dataset, load)?;
    for _ in 0..moves {
        move_on(&mut session, &lab, report)?;
    }
    session.finish(report)?.kill(&lab)?;
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes("bare tree", &moved);
    report.print_figures("bare tree");
    settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;

    let earlier = report.moves.len();
    let held = container::start(&mut lab, "a")?;
    let id = held
        .container
        .clone()
        .context("it was started as a container")?;
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for _ in 0..moves {
        let from = session.at.clone();
        if !move_on(&mut session, &lab, report)? {
            break;
        }
        let here = container::check_here(lab.node(&session.at)?, &id, session.workload.pid);
        let gone = container::check_gone(lab.node(&from)?, &id);
        for wrong in [here, gone].into_iter().filter_map(Result::err) {
            report.fail(format!("{wrong:#}"));
        }
    }
    let at = session.at.clone();
    let workload = session.finish(report)?;
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes(RUNC, &moved);
    report.print_figures(RUNC);
    settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
    if let Err(error) = container::end(lab.node(&at)?, &id) {
        report.fail(format!("{error:#}"));
    }
    workload.kill(&lab)
}

/// Moves it on, and waits until it has written more.
pub fn move_on(session: &mut Session, lab: &Lab, report: &mut Report) -> Result<bool> {
    let to = other(&session.at);
    let moved = session.move_to(lab, to, &MoveOptions::default(), report)?;
    session.wait_for_writes(WRITES_AROUND)?;
    // What is being filled cannot be moved on.
    std::thread::sleep(PAUSE);
    Ok(moved)
}

const RUNC: &str = "runc";
/// The case that a test runs.
const FEW: &str = "few";
/// Kills at the gates.
const FAULTS: &str = "faults";
/// Those of containerd.
const CONTAINERD: &str = "containerd";
const CONTAINERD_FAULTS: &str = "containerd-faults";
const MOVES: usize = 10;
const MOVES_FEW: usize = 2;
/// Values alone; Redis needs a quarter more for them.
const BYTES: u64 = 1 << 30; // 1 GiB
const BYTES_FEW: u64 = 64 << 20; // 64 MiB
/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
const PAUSE: Duration = Duration::from_millis(100);
