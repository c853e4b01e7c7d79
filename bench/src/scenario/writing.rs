//! A self-checking writer with everything that watches it, and scenarios about sizes and rates.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::report::{Report, percentile};
use super::settings::{Settings, other};
use crate::client::probe::Prober;
use crate::client::resp::ANSWER_TIME_MAX;
use crate::client::writer::{self, WriterClient};
use crate::content::Content;
use crate::lab::network::{BRIDGE, Link};
use crate::lab::{Lab, LabOptions};
use crate::measure::{Meter, memory_peak, reset_memory_peak};
use crate::mover::outcome::{Move, Outcome, millis, round};
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::mover::{MoveOptions, Mover, Order};
use crate::workload::{Workload, WorkloadPlan};
use crate::writer::options::Options;

/// A writer of the lab, its client and its prober.
#[derive(Debug)]
pub struct WriterSession {
    mover: &'static dyn Mover,
    pub workload: Workload,
    /// The node it is at.
    pub at: String,
    pub client: WriterClient,
    pub prober: Prober,
}

impl WriterSession {
    pub fn start(
        lab: &mut Lab,
        mover: &'static dyn Mover,
        at: &str,
        options: &Options,
        change: impl FnOnce(&mut WorkloadPlan),
    ) -> Result<Self> {
        let (workload, client) = writer::start(lab, at, options, change)?;
        Self::watch(lab, mover, at, (workload, client))
    }

    /// Of one that runs already.
    pub fn watch(
        lab: &Lab,
        mover: &'static dyn Mover,
        at: &str,
        (workload, mut client): (Workload, WriterClient),
    ) -> Result<Self> {
        client.verify().context("before any move")?;
        let prober = Prober::writer(&lab.client.net, workload.link.address)?;
        Ok(Self {
            mover,
            workload,
            at: at.to_owned(),
            client,
            prober,
        })
    }

    /// Moves it and has everything checked. The error's code and text when it did not move; an
    /// error when its memory is wrong or it does not answer.
    pub fn move_to(
        &mut self,
        lab: &Lab,
        to: &str,
        flags: &MoveOptions,
    ) -> Result<std::result::Result<Move, (String, String)>> {
        let begun = Instant::now();
        let order = Order {
            workload: &self.workload,
            from: &self.at,
            to,
            options: flags,
        };
        let outcome = self.mover.move_workload(lab, &order)?;
        self.note(outcome, begun, to)
    }

    /// As [`WriterSession::move_to`], for a migration that has ended already.
    pub fn note(
        &mut self,
        outcome: Outcome,
        begun: Instant,
        to: &str,
    ) -> Result<std::result::Result<Move, (String, String)>> {
        let pid = outcome.pid_at_target();
        let moved = match outcome.moved {
            Some(mut one) => {
                self.workload.pid = pid.unwrap_or(self.workload.pid);
                to.clone_into(&mut self.at);
                if !self
                    .prober
                    .wait_for_answer_after(Instant::now(), ANSWER_TIME_MAX)
                {
                    bail!("the writer does not answer after the move to {to}");
                }
                one.blackout_ms = Some(millis(self.prober.longest_silence_since(begun)));
                Ok(one)
            }
            None => Err(outcome.error.unwrap_or_default()),
        };
        self.client.verify().with_context(|| match &moved {
            Ok(_) => format!("after the move to {to}"),
            Err((code, _)) => format!("after a move to {to} failed ({code})"),
        })?;
        Ok(moved)
    }

    /// Moves it and takes what happened into the report; false when there is no use going on.
    pub fn move_and_note(
        &mut self,
        lab: &Lab,
        flags: &MoveOptions,
        what: &str,
        report: &mut Report,
    ) -> bool {
        let to = other(&self.at);
        match self.move_to(lab, to, flags) {
            Ok(Ok(one)) => {
                report.push(one);
                report.note_contents(true);
                true
            }
            Ok(Err((code, text))) => {
                report.fail(format!("{what}: {code}: {text}"));
                false
            }
            Err(error) => {
                report.note_contents(false);
                report.fail(format!("{what}: {error:#}"));
                false
            }
        }
    }

    /// Ends it.
    pub fn finish(self, lab: &Lab, report: &mut Report) -> Result<()> {
        if let Some(reason) = self.prober.finish() {
            report.broken_connections += 1;
            report.fail(format!("broken: {reason}"));
        }
        self.workload.kill(lab)
    }
}

/// Does the downtime depend on the size?
pub fn sizes(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab(2)?;
    let mover = settings.mover;
    let [small, large @ ..] = SIZES;
    let mut medians = vec![run_size(&mut lab, mover, small, false, report)?];
    // Next to what it is compared with, so that both meet the same machine.
    let own = ("64 MiB, own pid and mount namespaces", small.1);
    let own = run_size(&mut lab, mover, own, true, report)?;
    report.figure(
        "own pid and mount namespaces, ms more",
        round(own - medians[0]),
    );
    report.print_figures("own pid and mount namespaces");
    for size in large {
        medians.push(run_size(&mut lab, mover, size, false, report)?);
    }
    let (small, large) = (medians[0], medians[2]);
    let gibibytes = (SIZES[2].1 - SIZES[0].1) as f64 / f64::from(1 << 30);
    report.figure(
        "slope, ms of downtime per GiB",
        round((large - small) / gibibytes),
    );
    report.figure("downtime at 4 GiB / at 64 MiB", round(large / small));
    Ok(())
}

/// The median downtime of a few moves.
fn run_size(
    lab: &mut Lab,
    mover: &'static dyn Mover,
    (name, memory): (&str, usize),
    own_pid_mnt: bool,
    report: &mut Report,
) -> Result<f64> {
    let mut options = Options::new(memory);
    options.hot = HOT_BYTES;
    options.rate = HOT_RATE;
    let change = |plan: &mut WorkloadPlan| plan.own_pid_mnt = own_pid_mnt;
    let mut session = WriterSession::start(lab, mover, "a", &options, change)?;
    let earlier = report.moves.len();
    for number in 0..SIZE_MOVES {
        let target = lab.node(other(&session.at))?;
        reset_memory_peak(target);
        let meter = Meter::start(lab)?;
        let going = session.move_and_note(lab, &MoveOptions::default(), name, report);
        mover.wait_settled(lab, SETTLE_TIME_MAX)?;
        // The first move: later ones find caches and buffers of the earlier ones.
        if number == 0 {
            report.figure_usage(&meter.finish());
            let peak = memory_peak(target).unwrap_or(0) as f64;
            let share = peak / memory as f64;
            report.figure("target's peak MiB", round(peak / f64::from(1 << 20)));
            report.figure("target's peak / workload", round(share));
        }
        if !going {
            break;
        }
    }
    let moves = report.moves[earlier..].to_vec();
    report.figure_downtimes(name, &moves);
    let criu: Vec<f64> = moves.iter().filter_map(|one| one.frozen_ms).collect();
    report.figure("frozen inside CRIU, worst ms", percentile(&criu, 100));
    let restore: Vec<f64> = moves.iter().filter_map(|one| one.restore_ms).collect();
    report.figure("restore, worst ms", percentile(&restore, 100));
    report.print_figures(name);
    session.finish(lab, report)?;
    let downtimes: Vec<f64> = moves.iter().map(|one| one.downtime_ms).collect();
    Ok(percentile(&downtimes, 50))
}

/// How fast the first round goes, by contents, on a link that is not the limit and on one that is.
pub fn rate(settings: &Settings, report: &mut Report) -> Result<()> {
    let links = match &settings.link {
        Some(link) => vec![link.clone()],
        None => vec![Link::Unshaped, Link::Shaped("1gbit".to_owned())],
    };
    for (number, link) in links.iter().enumerate() {
        let keep = settings.keep && number + 1 == links.len();
        let options = LabOptions {
            nodes: 2,
            link: link.clone(),
            daemons: settings.mover.needs_daemons(),
            bridge: BRIDGE,
            layer: None,
            programs: None,
            keep,
        };
        let mut lab = Lab::up(&options)?;
        for content in [Content::Random, Content::Text, Content::HalfZero] {
            run_rate(&mut lab, settings.mover, (link, content), report)?;
        }
    }
    Ok(())
}

fn run_rate(
    lab: &mut Lab,
    mover: &'static dyn Mover,
    (link, content): (&Link, Content),
    report: &mut Report,
) -> Result<()> {
    let mut options = Options::new(RATE_BYTES);
    options.content = content;
    // Idle: nothing written, nothing read.
    (options.rate, options.checks) = (0, 0);
    let name = format!("{} on {link}", content.name());
    let mut session = WriterSession::start(lab, mover, "a", &options, |_| {})?;
    warm(report);
    let meter = Meter::start(lab)?;
    let begun = Instant::now();
    let order = Order {
        workload: &session.workload,
        from: "a",
        to: "b",
        options: &MoveOptions::default(),
    };
    let outcome = mover.move_workload(lab, &order)?;
    let object = outcome.object.clone();
    report.figure_usage(&meter.finish());
    match session.note(outcome, begun, "b")? {
        Ok(one) => {
            // A build that prints its first round is believed; otherwise all that came before the
            // freeze counts, set-up included.
            let whole = one.total_ms - one.downtime_ms;
            let milliseconds = object["first_round_ms"].as_f64().unwrap_or(whole);
            let seconds = milliseconds / 1e3;
            let memory_rate = one.memory_bytes as f64 / 1e9 / seconds;
            let wire_rate = one.wire_bytes as f64 * 8.0 / 1e9 / seconds;
            report.figure("first round, GB/s of memory", round(memory_rate));
            report.figure("first round, Gbit/s on the wire", round(wire_rate));
            report.push(one);
            report.note_contents(true);
        }
        Err((code, text)) => report.fail(format!("{name}: {code}: {text}")),
    }
    report.print_figures(&name);
    mover.wait_settled(lab, SETTLE_TIME_MAX)?;
    session.finish(lab, report)
}

/// Has the machine's free memory touched, as much as a move will take: where the machine is virtual
/// and its host takes back what is free, the first touch of a page costs 5 to 15 us, several times
/// what moving it does, and the rate would be the host's. What the touch took is reported.
fn warm(report: &mut Report) {
    let begun = Instant::now();
    // Twice the workload: for the store at the target, and for the memory that is filled from it.
    let memory = vec![1_u8; 2 * RATE_BYTES + RATE_BYTES / 4];
    let pages = std::hint::black_box(memory).len() / 4096;
    let micros = begun.elapsed().as_secs_f64() * 1e6 / pages as f64;
    report.figure(
        "first touch of the machine's free memory, us/page",
        round(micros),
    );
}

const SIZES: [(&str, usize); 3] = [("64 MiB", 64 << 20), ("1 GiB", 1 << 30), ("4 GiB", 4 << 30)];
const HOT_BYTES: usize = 64 << 20; // 64 MiB
/// 20 MB/s of dirtied pages.
const HOT_RATE: u32 = 5_000;
const SIZE_MOVES: usize = 5;
const RATE_BYTES: usize = 1 << 30; // 1 GiB
