//! What a tracer that outlives CRIU costs a tree of many threads: the case `threads` of `memory`,
//! moved by daemons that have one and by daemons that have none, in turns.

use anyhow::{Result, bail};

use super::report::{Report, percentile};
use super::settings::other;
use super::writing::WriterSession;
use crate::lab::Lab;
use crate::lab::daemon::DaemonPlan;
use crate::mover::MoveOptions;
use crate::mover::outcome::round;
use crate::mover::pageferry::{Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::writer::case::tree::THREADS;
use crate::writer::options::Options;

/// Moves the writer of `options` and tells the time inside CRIU. The daemons are as they were then.
pub fn compare(lab: &mut Lab, options: &Options, report: &mut Report) -> Result<()> {
    let mut session = WriterSession::start(lab, &Pageferry, "a", options, |_| {})?;
    let (mut alone, mut traced) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let has_tracer = turn % 2 == 1;
        lab.restart_daemons(&DaemonPlan {
            tracer: has_tracer,
            ..DaemonPlan::default()
        })?;
        let times = if has_tracer { &mut traced } else { &mut alone };
        for _ in 0..MOVES_PER_TURN {
            let to = other(&session.at);
            match session.move_to(lab, to, &MoveOptions::default())? {
                Ok(one) => {
                    times.extend(one.frozen_ms);
                    report.push(one);
                }
                Err((code, text)) => bail!("moving {THREADS} threads: {code}: {text}"),
            }
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
    }
    for percent in [25, 50] {
        let [alone, traced] = [&alone, &traced].map(|times| percentile(times, percent));
        let per_thread = (traced - alone) * 1e3 / THREADS as f64;
        report.figure(
            &format!("without a tracer: inside CRIU p{percent} ms"),
            round(alone),
        );
        report.figure(
            &format!("with a tracer: inside CRIU p{percent} ms"),
            round(traced),
        );
        report.figure(
            &format!("a tracer costs p{percent} us/thread"),
            round(per_thread),
        );
    }
    report.print_figures("the tracer, with many threads");
    session.finish(lab, report)
}

/// The last one is with a tracer, as a daemon is by itself.
const TURNS: usize = 4;
const MOVES_PER_TURN: usize = 6;
