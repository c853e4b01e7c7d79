//! Scenarios with Redis: `demo`, `chain`, `cross`.

use std::time::Instant;

use anyhow::{Context, Result};

use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::measure::Meter;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, wait_settled};
use crate::mover::{MoveOptions, Mover};
use crate::workload::redis;

/// One move under the first row of the load, of a bare tree or of a container.
pub fn demo(settings: &Settings, report: &mut Report) -> Result<()> {
    let (lab, workload) = match settings.container {
        None => {
            let mut lab = settings.lab(2)?;
            let tree = redis::start(&mut lab, "a", &redis::plan())?;
            (lab, tree)
        }
        Some(whose) => {
            settings.need_pageferry("stock CRIU moves no containers here")?;
            let mut lab = settings.lab_with(whose.layer(), 2)?;
            // They stay with the lab.
            drop(whose.start_engines(&lab)?);
            let held = whose.start_redis(&mut lab, "a")?;
            (lab, held)
        }
    };
    let meter = Meter::start(&lab)?;
    let dataset = Dataset::first_row(DEMO_BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", workload, dataset, load)?;
    session.wait_for_writes(WRITES_AROUND)?;
    if session.move_to(&lab, "b", &MoveOptions::default(), report)? {
        session.wait_for_writes(WRITES_AROUND)?;
        if settings.container.is_some() {
            session.workload.is_here(lab.node("b")?)?;
            session.workload.is_gone(lab.node("a")?)?;
            report.figure("container", session.workload.name());
        }
    }
    session.finish(report)?;
    report.figure_usage(&meter.finish());
    Ok(())
}

/// Twenty moves there and back under the first row, some with every page compared; then the second
/// row.
pub fn chain(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab(2)?;
    run_chain(&mut lab, settings.mover, Row::First, report)?;
    run_chain(&mut lab, settings.mover, Row::Second, report)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Row {
    First,
    Second,
}

fn run_chain(
    lab: &mut Lab,
    mover: &'static dyn Mover,
    row: Row,
    report: &mut Report,
) -> Result<()> {
    let (name, moves, dataset, plan) = match row {
        Row::First => (
            "first row",
            CHAIN_MOVES,
            Dataset::first_row(CHAIN_BYTES),
            LoadPlan::first_row(),
        ),
        Row::Second => (
            "second row",
            SECOND_ROW_MOVES,
            Dataset::second_row(CHAIN_BYTES),
            LoadPlan::second_row(),
        ),
    };
    let earlier = report.moves.len();
    let meter = Meter::start(lab)?;
    let mut session = Session::start(lab, mover, "a", dataset, plan)?;
    for number in 0..moves {
        let to = other(&session.at);
        let verify = row == Row::First && number % VERIFY_EVERY == VERIFY_EVERY - 1;
        let flags = MoveOptions {
            verify,
            ..MoveOptions::default()
        };
        if !session.move_to(lab, to, &flags, report)? {
            break;
        }
        session.wait_for_writes(WRITES_AROUND)?;
    }
    let workload = session.finish(report).with_context(|| name.to_owned())?;
    report.figure_usage(&meter.finish());
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes(name, &moved);
    // The figures of one row: the next one has its own.
    report.print_figures(name);
    workload.kill(lab)
}

/// Two workloads move in opposite directions at the same time.
pub fn cross(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("cross is about what stock CRIU does not have")?;
    let mut lab = settings.lab(2)?;
    let dataset = Dataset::first_row(CROSS_BYTES);
    let mut sessions = Vec::new();
    for at in ["a", "b"] {
        // Half of the first row each: the machine has the same work in all.
        let plan = LoadPlan {
            values_per_second: Some(25_000_000 / 4096),
            ..LoadPlan::first_row()
        };
        sessions.push(Session::start(&mut lab, settings.mover, at, dataset, plan)?);
    }
    for _ in 0..CROSSINGS {
        let begun = Instant::now();
        let mut migrations = Vec::new();
        for session in &sessions {
            let to = other(&session.at);
            let source = lab.node(&session.at)?;
            let flags = MoveOptions::default();
            let migration = Migration::start(source, &session.workload.name(), to, &flags)?;
            migrations.push((to, migration));
        }
        for (session, (to, migration)) in sessions.iter_mut().zip(migrations) {
            session.note(migration.finish()?, begun, to, report);
        }
        wait_settled(&lab, SETTLE_TIME_MAX)?;
    }
    for session in sessions {
        session.wait_for_writes(WRITES_AROUND)?;
        session.finish(report)?;
    }
    Ok(())
}

/// Values alone; Redis needs a quarter more for them.
const DEMO_BYTES: u64 = 512 << 20; // 512 MiB
const CHAIN_BYTES: u64 = 1 << 30; // 1 GiB
const CROSS_BYTES: u64 = 256 << 20; // 256 MiB
const CHAIN_MOVES: usize = 20;
/// 5 of 20.
const VERIFY_EVERY: usize = 4;
const SECOND_ROW_MOVES: usize = 4;
const CROSSINGS: usize = 2;
/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
