//! `containers --only podman-bridge`: Redis in the network that podman gives by default, moved to
//! and fro under load with its address.
//!
//! Before that, what cannot be had at the target is refused by its name, and costs nothing: an
//! address that another container has, a port that is published there already.

use anyhow::{Context, Result, ensure};

use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::mover::MoveOptions;
use crate::mover::outcome::Outcome;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX};
use crate::workload::contained::Plan;
use crate::workload::{Workload, bridged, container, podman, redis};

/// Refusals, then moves.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    bridged::join_segment(&lab)?;
    let published = format!("{PORT}:{}", redis::PORT);
    let held = bridged::start(&mut lab, "a", &["--publish", &published])?;
    refused(&lab, &held)?;
    let earlier = report.moves.len();
    let (dataset, load) = (Dataset::first_row(BYTES), LoadPlan::first_row());
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for _ in 0..MOVES {
        let from = session.at.clone();
        ensure!(session.move_on(&lab, report)?, "it has not moved");
        settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
        bridged::check_here(lab.node(&session.at)?, &session.workload)?;
        bridged::check_gone(lab.node(&from)?, &session.workload)?;
    }
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes("podman-bridge", &moved);
    report.print_figures("podman-bridge");
    let noted = migrate(&lab, &session.workload, &session.at)?;
    ensure!(noted.error.is_none(), "{:?}", noted.error);
    other(&session.at).clone_into(&mut session.at);
    session.workload.pid = noted.pid_at_target().context("its pid")?;
    let notes = noted.object["notes"].to_string();
    let is_noted = notes.contains(&format!("0.0.0.0:{PORT}->{}", redis::PORT));
    ensure!(is_noted, "what is lost is not said: {notes}");
    println!("podman-bridge: {notes}");
    let workload = session.finish(report)?;
    settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
    workload.kill(&lab)
}

/// What is taken at the target.
fn refused(lab: &Lab, held: &Workload) -> Result<()> {
    let address = held.link.address.to_string();
    let other_port = format!("{PORT}:80");
    let takers = [
        (
            vec!["--ip", &*address],
            format!("{address} of podman's network podman is taken"),
        ),
        (
            vec!["--ip", "10.88.0.99", "--publish", &*other_port],
            format!("{PORT}/tcp, which cannot be had"),
        ),
    ];
    let node = lab.node("b")?;
    for (options, wanted) in takers {
        let at = (TAKER, "b");
        let (taker, _) = podman::run_in(lab, &Plan::redis(), at, ("podman", &options))?;
        let outcome = migrate(lab, held, "a")?;
        podman::delete(node, &taker)?;
        let (code, text) = outcome.error.context("it has moved")?;
        ensure!(
            code == "network-unfit" && text.contains(&wanted),
            "with {options:?} taken: {code}: {text}"
        );
        bridged::check_here(lab.node("a")?, held)?;
        bridged::check_gone(node, held)?;
        println!("podman-bridge: {code}: {text}");
    }
    Ok(())
}

fn migrate(lab: &Lab, workload: &Workload, from: &str) -> Result<Outcome> {
    let flags = MoveOptions::default();
    Migration::start(lab.node(from)?, &workload.name(), other(from), &flags)?.finish()
}

const MOVES: usize = 4;
const BYTES: u64 = 256 << 20; // 256 MiB
/// Of the node.
const PORT: u16 = 8080;
/// Who has at the target what cannot be had twice.
const TAKER: &str = "taker";
