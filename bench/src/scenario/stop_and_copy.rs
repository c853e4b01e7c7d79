//! `stop_and_copy`: stock CRIU, driven by hand, without the daemons.
//!
//! It validates everything else: if clients do not survive this move, the lab is wrong, not the
//! daemon. Its figure is what a move costs without pre-copy and lazy restore.

use anyhow::Result;

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use crate::client::load::{Dataset, LoadPlan};
use crate::measure::Meter;
use crate::mover::MoveOptions;
use crate::mover::stock_criu::StockCriu;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_for(&StockCriu, 2)?;
    let meter = Meter::start(&lab)?;
    let dataset = Dataset::first_row(DATA_BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::start(&mut lab, &StockCriu, "a", dataset, load)?;
    session.wait_for_writes(WRITES_AROUND)?;
    if session.move_to(&lab, "b", &MoveOptions::default(), report)? {
        session.wait_for_writes(WRITES_AROUND)?;
    }
    session.finish(report)?;
    report.figure_usage(&meter.finish());
    Ok(())
}

/// Enough to make the copy visible, little enough to take seconds.
const DATA_BYTES: u64 = 256 << 20;
/// About half a second of the load.
const WRITES_AROUND: u64 = 5_000;
