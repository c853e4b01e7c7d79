//! The cases of `memory`, moved by stock CRIU: shows that each case is right, and what CRIU itself
//! cannot move. A refusal here is a fact about CRIU, so it is a figure, not a failure; wrong memory
//! is a failure.

use anyhow::{Context, Result};

use super::direct;
use super::report::Report;
use super::settings::Settings;
use crate::client::writer;
use crate::lab::Lab;
use crate::mover::stock_criu::StockCriu;
use crate::mover::{MoveOptions, Mover, Order};
use crate::writer::case::{ALL, TRACED};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_for(&StockCriu, 2)?;
    for kind in ALL.iter().chain([&TRACED]) {
        if settings
            .only
            .as_deref()
            .is_some_and(|only| only != kind.name)
        {
            continue;
        }
        let mut options = Options::new(16 << 20);
        kind.name.clone_into(&mut options.case);
        let outcome = run_case(&mut lab, &options, report);
        match outcome {
            Ok(outcome) => report.figure(kind.name, outcome),
            Err(error) => report.fail(format!("{}: {error:#}", kind.name)),
        }
    }
    Ok(())
}

fn run_case(lab: &mut Lab, options: &Options, report: &mut Report) -> Result<String> {
    let _storage = direct::Storage::of_case(&options.case, lab)?;
    let (workload, mut client) = writer::start(lab, "a", options, |_| {})?;
    client.verify().context("before the move")?;
    let order = Order {
        workload: &workload,
        from: "a",
        to: "b",
        options: &MoveOptions::default(),
    };
    let outcome = StockCriu.move_workload(lab, &order);
    let outcome = match outcome.map(|outcome| (outcome.moved, outcome.error.unwrap_or_default())) {
        Ok((Some(one), _)) => {
            client.verify().context("after the move")?;
            report.push(one);
            "moved".to_owned()
        }
        Ok((None, (_, text))) => format!("not moved: {text}"),
        Err(error) => format!("not moved: {error:#}"),
    };
    workload.kill(lab)?;
    Ok(outcome)
}
