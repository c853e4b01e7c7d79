//! `memory`: everything odd that programs do with memory, moved back and forth with every page
//! compared.

use std::time::Instant;

use anyhow::{Context, Result};

use super::direct;
use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use super::traced;
use super::writing::WriterSession;
use crate::client::load::{Dataset, LoadPlan};
use crate::client::resp::Connection;
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::sys::process::Verdict;
use crate::workload::{WorkloadPlan, redis};
use crate::writer::case::{ALL, Demand, LOST_PAGES, TRACED};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("memory is about what stock CRIU does not have")?;
    let mut lab = settings.lab(2)?;
    let wanted = |name: &str| settings.only.as_deref().is_none_or(|only| only == name);
    for kind in ALL.iter().chain([&TRACED]).filter(|kind| wanted(kind.name)) {
        let mut options = Options::new(CASE_BYTES);
        kind.name.clone_into(&mut options.case);
        let case = Case {
            name: kind.name,
            options,
            demand: kind.demand,
            change: |_| {},
        };
        case.run(&mut lab, report)?;
    }
    for case in variants().iter().filter(|case| wanted(case.name)) {
        case.run(&mut lab, report)?;
    }
    if wanted(LOST_PAGES.name) {
        lost_pages(&mut lab, report)?;
    }
    if wanted("threads") {
        let mut options = Options::new(CASE_BYTES);
        "threads".clone_into(&mut options.case);
        traced::compare(&mut lab, &options, report)?;
    }
    if wanted("again-while-filling") {
        again_while_filling(&mut lab, report)?;
    }
    if wanted("bgsave") {
        bgsave(&mut lab, report)?;
    }
    Ok(())
}

/// A writer and how often it is moved.
struct Case {
    name: &'static str,
    options: Options,
    demand: Demand,
    change: fn(&mut WorkloadPlan),
}

/// Cases that are not about what the writer does but about who it is.
fn variants() -> Vec<Case> {
    let case = |name, options, change| Case {
        name,
        options,
        demand: Demand::MustMove,
        change,
    };
    let plain = || Options::new(CASE_BYTES);
    let filtered = |verdict| Options {
        seccomp: Some(verdict),
        ..plain()
    };
    vec![
        case("uid", plain(), |plan| plan.uid = Some(65_534)),
        case("seccomp-errno", filtered(Verdict::Refuse), |_| {}),
        case("seccomp-kill", filtered(Verdict::Kill), |_| {}),
        case("own-pid-mnt", plain(), |plan| plan.own_pid_mnt = true),
    ]
}

impl Case {
    fn run(&self, lab: &mut Lab, report: &mut Report) -> Result<()> {
        let earlier = report.moves.len();
        let storage = direct::Storage::of_case(self.name, lab)?;
        let mut session =
            match WriterSession::start(lab, &Pageferry, "a", &self.options, self.change) {
                Ok(session) => session,
                Err(error) => {
                    // Secret memory and io_uring can be switched off, guard pages can be too new.
                    if !matches!(self.demand, Demand::MayBeRefused(_)) {
                        report.fail(format!("{}: {error:#}", self.name));
                    } else {
                        println!("{}: not possible on this machine: {error:#}", self.name);
                    }
                    return Ok(());
                }
            };
        for _ in 0..MOVES_PER_CASE {
            storage.slow_down(lab)?;
            if !self.move_once(lab, &mut session, report) {
                break;
            }
        }
        let moves = report.moves[earlier..].to_vec();
        for one in &moves {
            let paused = one.longest_pause_ms.map(|longest| {
                let pauses = one.pauses.unwrap_or(0);
                format!(", {pauses} pauses for scans, longest {longest:.1} ms")
            });
            println!(
                "{}: downtime {:.1} ms, {} rounds{}",
                self.name,
                one.downtime_ms,
                one.rounds,
                paused.unwrap_or_default()
            );
        }
        // What the case did meanwhile, to see that it did something.
        if let Ok(status) = session.client.status() {
            println!("{}: {status:?}", self.name);
        }
        session.finish(lab, report)?;
        wait_settled(lab, SETTLE_TIME_MAX)
    }

    /// False when there is no use going on.
    fn move_once(&self, lab: &Lab, session: &mut WriterSession, report: &mut Report) -> bool {
        let flags = MoveOptions {
            verify: true,
            ..MoveOptions::default()
        };
        let to = other(&session.at);
        let frozen = Instant::now();
        match (session.move_to(lab, to, &flags), self.demand) {
            (Ok(Ok(one)), _) => {
                report.push(one);
                report.note_contents(true);
                true
            }
            (Ok(Err((code, text))), Demand::MayBeRefused(codes))
                if codes.contains(&code.as_str()) =>
            {
                // Before any freeze: nobody noticed.
                let silence = session.prober.longest_silence_since(frozen);
                println!(
                    "{}: refused: {code}: {text} (silence {silence:.1?})",
                    self.name
                );
                false
            }
            (Ok(Err((code, text))), _) => {
                report.fail(format!("{}: {code}: {text}", self.name));
                false
            }
            (Err(error), _) => {
                report.note_contents(false);
                report.fail(format!("{}: {error:#}", self.name));
                false
            }
        }
    }
}

/// Pages that the kernel cannot read are no pages that may be passed over: the target would restore
/// what they held before. The workload stays, untouched.
fn lost_pages(lab: &mut Lab, report: &mut Report) -> Result<()> {
    let name = LOST_PAGES.name;
    let mut options = Options::new(CASE_BYTES);
    name.clone_into(&mut options.case);
    let mut session = WriterSession::start(lab, &Pageferry, "a", &options, |_| {})?;
    for verify in [false, true] {
        let flags = MoveOptions {
            verify,
            ..MoveOptions::default()
        };
        match session.move_to(lab, "b", &flags)? {
            Err((code, text)) if code == "pages-unread" => {
                println!("{name}: refused: {code}: {text}");
            }
            Err((code, text)) => report.fail(format!("{name}: {code}: {text}")),
            Ok(_) => {
                report.fail(format!("{name}: it moved without its pages"));
                break;
            }
        }
        match session.client.verify() {
            Ok(_) => report.note_contents(true),
            Err(error) => {
                report.note_contents(false);
                report.fail(format!("{name}: {error:#}"));
            }
        }
    }
    session.finish(lab, report)?;
    wait_settled(lab, SETTLE_TIME_MAX)
}

/// The same workload moves on while the last move's fill is unfinished.
fn again_while_filling(lab: &mut Lab, report: &mut Report) -> Result<()> {
    let name = "again-while-filling";
    let options = Options {
        rate: 5_000,
        ..Options::new(FILL_BYTES)
    };
    let mut session = WriterSession::start(lab, &Pageferry, "a", &options, |_| {})?;
    for _ in 0..MOVES_PER_CASE {
        let begun = Instant::now();
        let to = other(&session.at);
        let source = lab.node(&session.at)?;
        let flags = MoveOptions {
            verify: true,
            ..MoveOptions::default()
        };
        let outcome = Migration::start(source, &session.workload.name(), to, &flags)?.finish()?;
        match outcome.moved {
            Some(one) => {
                println!(
                    "{name}: downtime {:.1} ms in {:.1?}",
                    one.downtime_ms,
                    begun.elapsed()
                );
                to.clone_into(&mut session.at);
                report.push(one);
            }
            None => {
                report.fail(format!("{name}: {:?}", outcome.error));
                break;
            }
        }
    }
    // Only now: checking touches every page, which would have finished each fill.
    match session.client.verify() {
        Ok(_) => report.note_contents(true),
        Err(error) => {
            report.note_contents(false);
            report.fail(format!("{name}: {error:#}"));
        }
    }
    session.finish(lab, report)?;
    wait_settled(lab, SETTLE_TIME_MAX)
}

/// Redis saves itself (a fork that writes a file on shared storage) while it moves.
fn bgsave(lab: &mut Lab, report: &mut Report) -> Result<()> {
    let dataset = Dataset::first_row(BGSAVE_BYTES);
    let mut plan = redis::plan();
    plan.arguments.extend(["--dir", SHARED].map(str::to_owned));
    let load = LoadPlan::first_row();
    let mut session = Session::start_plan(lab, &Pageferry, "a", &plan, dataset, load)?;
    let address = session.workload.link.address;
    let mut control = Connection::open(&lab.client.net, address)?;
    for _ in 0..MOVES_PER_CASE {
        // It may be saving still, which is as good.
        control.call(&[b"BGSAVE"]).context("asking Redis to save")?;
        let to = other(&session.at);
        let shared = vec![SHARED.to_owned()];
        let flags = MoveOptions {
            verify: true,
            shared,
            ..MoveOptions::default()
        };
        if !session.move_to(lab, to, &flags, report)? {
            break;
        }
    }
    let saves = control
        .call(&[b"LASTSAVE"])
        .context("asking Redis when it saved")?;
    println!("bgsave: LASTSAVE {saves:?}");
    let workload = session.finish(report)?;
    workload.kill(lab)?;
    wait_settled(lab, SETTLE_TIME_MAX)
}

const MOVES_PER_CASE: usize = 5;
const CASE_BYTES: usize = 16 << 20; // 16 MiB beside what the case itself has
const FILL_BYTES: usize = 1 << 30; // 1 GiB
const BGSAVE_BYTES: u64 = 128 << 20; // 128 MiB
