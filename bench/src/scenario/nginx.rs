//! `nginx`: a web server under 500 new connections per second, moved to and fro.
//!
//! At nearly every moment a connection waits to be accepted, is being made or is being closed: what
//! CRIU cannot dump, and what would be lost without a word. A request fails only if it was refused,
//! reset, answered wrongly or not at all; a late answer is right.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::report::Report;
use super::settings::{Settings, other};
use crate::client::http::Requests;
use crate::lab::init::SHARED;
use crate::mover::outcome::millis;
use crate::mover::{MoveOptions, Order};
use crate::workload::nginx;

/// The scenario; its one case is a short one.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("nginx is about what stock CRIU does not have")?;
    let moves = match settings.only.as_deref() {
        None => MOVES,
        Some(FEW) => MOVES_FEW,
        Some(other) => anyhow::bail!("nginx has no case {other:?}, only {FEW:?}"),
    };
    let mut lab = settings.lab(2)?;
    let mut workload = nginx::start(&mut lab, "a")?;
    let target = SocketAddr::from((workload.link.address, nginx::PORT));
    let requests = Requests::start(&lab.client.net, target, CONNECTIONS_PER_SECOND)?;
    ensure!(
        requests.wait_for_answers(ANSWERS_AROUND),
        "nginx does not answer"
    );
    let options = MoveOptions {
        shared: vec![SHARED.to_owned()],
        ..MoveOptions::default()
    };
    let mut at = "a";
    let mut moved = 0;
    for number in 1..=moves {
        let to = other(at);
        requests.mark();
        let order = Order {
            workload: &workload,
            from: at,
            to,
            options: &options,
        };
        let outcome = settings.mover.move_workload(&lab, &order)?;
        workload.pid = outcome.pid_at_target().unwrap_or(workload.pid);
        let answered = requests.wait_for_answers(ANSWERS_AROUND);
        let blackout = requests.silence();
        if !answered {
            report.fail(format!("move {number} to {to}: nginx answers no more"));
        }
        let retries = outcome.object["retries"].as_u64();
        let Some(mut one) = outcome.moved else {
            let (code, text) = outcome.error.unwrap_or_default();
            report.fail(format!("move {number}, {at} -> {to}: {code}: {text}"));
            continue;
        };
        one.blackout_ms = Some(millis(blackout));
        report.push(one);
        println!("  tries: {}", retries.unwrap_or_default() + 1);
        report.figure_series("freezes given up", retries);
        at = to;
        moved += 1;
    }
    let seen = requests.finish()?;
    println!("moved: {moved} of {moves}");
    report.figure("connections", seen.answers + seen.failed);
    report.figure("answers after more than 500 ms", seen.late);
    report.figure("requests failed", seen.failed);
    let all = report.moves.clone();
    report.figure_downtimes("nginx", &all);
    report.broken_connections += seen.failed;
    for failure in seen.failures {
        report.fail(format!("request: {failure}"));
    }
    ensure!(
        u64::from(CONNECTIONS_PER_SECOND) < seen.answers,
        "{} answers are no load",
        seen.answers
    );
    workload.kill(&lab)
}

/// The case that a test runs.
const FEW: &str = "few";
const MOVES: usize = 20;
const MOVES_FEW: usize = 4;
const CONNECTIONS_PER_SECOND: u32 = 500;
/// Three fifths of a second.
const ANSWERS_AROUND: u64 = 300;
