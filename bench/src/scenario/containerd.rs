//! `containers --only containerd`: Redis in a container of containerd, moved to and fro under load.
//!
//! At each node it must be containerd's own, and where it was nothing may be left of it.

use anyhow::{Context, Result};

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use crate::client::load::{Dataset, LoadPlan};
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::workload::containerd::{self, LAYER};

/// The moves.
pub fn moves(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&LAYER, 2)?;
    let _engines = containerd::start_engines(&lab)?;
    let held = containerd::start(&mut lab, "a", &containerd::RESTARTED)?;
    let id = held.containerd.clone().context("it is in a container")?;
    // What is looked at after each move is so before the first.
    containerd::check_here(lab.node("a")?, &id, held.pid)?;
    let (dataset, load) = (Dataset::first_row(BYTES), LoadPlan::first_row());
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for _ in 0..MOVES {
        let from = session.at.clone();
        if !session.move_on(&lab, report)? {
            break;
        }
        settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
        let here = containerd::check_here(lab.node(&session.at)?, &id, session.workload.pid);
        let restarted = containerd::check_restarted(lab.node(&session.at)?, &id);
        let gone = containerd::check_gone(lab.node(&from)?, &id);
        for wrong in [here, restarted, gone].into_iter().filter_map(Result::err) {
            report.fail(format!("{wrong:#}"));
        }
    }
    let at = session.at.clone();
    let workload = session.finish(report)?;
    let moved = report.moves.clone();
    report.figure_downtimes("containerd", &moved);
    report.print_figures("containerd");
    settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
    if let Err(error) = containerd::end(lab.node(&at)?, &id) {
        report.fail(format!("{error:#}"));
    }
    for node in &lab.nodes {
        containerd::check_whole(node)?;
    }
    workload.kill(&lab)
}

const MOVES: usize = 4;
const BYTES: u64 = 64 << 20; // 64 MiB
