//! The cases of `memory`, moved by stock CRIU: shows that each case is right, and what CRIU itself
//! cannot move. A refusal here is a fact about CRIU, so it is a figure, not a failure; wrong memory
//! is a failure.

use anyhow::{Context, Result};

use super::report::Report;
use super::{Settings, stop_and_copy};
use crate::lab::Lab;
use crate::workload::writer;
use crate::writer::case::{ALL, TRACED};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_without_daemons(2)?;
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
    let (workload, mut client) = writer::start(lab, "a", options, |_| {})?;
    client.verify().context("before the move")?;
    let outcome = match stop_and_copy::move_workload(lab, &workload, "a", "b") {
        Ok(one) => {
            client.verify().context("after the move")?;
            report.push(one);
            "moved".to_owned()
        }
        Err(error) => format!("not moved: {error:#}"),
    };
    workload.kill(lab)?;
    Ok(outcome)
}
