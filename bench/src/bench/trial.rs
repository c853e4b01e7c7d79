//! One move of one cell, from a fresh workload to the comparison of its contents.
//!
//! ```text
//!   start ─ fill ─ clients ─ warm ─┤ calm │ order ── copying ──┤ gap ├── filling ── settled
//!                                                                  │ after ├─ compare
//! ```
//! An error or a refusal is a failure of the run, never of the benchmark: what was seen until there
//! is kept.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use super::journal::{Gap, HOLD, Journal, WINDOW};
use super::kinds::System;
use super::series::{Load, Run};
use super::spans;
use super::subject::{Kind, SETTLE_TIME_MAX, Subject};
use crate::lab::Lab;
use crate::measure::node::Counters;
use crate::measure::{memory_peak, reset_memory_peak};
use crate::mover::outcome::{Outcome, round};
use crate::mover::pageferry::timeline;
use crate::mover::{MoveOptions, Order, images};

/// How long the stretches of a run are.
#[derive(Clone, Copy, Debug)]
pub struct Stretches {
    /// Until caches and connections are warm; not measured.
    pub warm: Duration,
    pub calm: Duration,
    /// At least so long after all was settled.
    pub after: Duration,
}

/// Moments on the clients' clock.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    calm: u64,
    order: u64,
    /// When the mover said that it is over.
    ended: u64,
    /// When nothing of it was under way any more.
    settled: u64,
    end: u64,
}

/// What nodes used until one of those moments.
struct Readings {
    calm: Vec<Counters>,
    order: Vec<Counters>,
    settled: Vec<Counters>,
    peaks: Vec<Option<u64>>,
}

/// Moves one fresh workload from node a to node b. An error means that the lab itself is of no use
/// any more.
pub fn run(lab: &mut Lab, kind: &Kind, system: &System, stretches: Stretches) -> Result<Run> {
    let subject = match kind.start(lab, FROM, system.packing) {
        Ok(subject) => subject,
        Err(error) => return Ok(failed(format!("starting {}: {error:#}", kind.name))),
    };
    watch(lab, subject, system, stretches)
}

/// The same of a workload that runs already.
pub fn watch(
    lab: &mut Lab,
    mut subject: Subject,
    system: &System,
    stretches: Stretches,
) -> Result<Run> {
    // Those of an earlier move count as memory that is taken.
    lab.nodes.iter().try_for_each(images::clear)?;
    std::thread::sleep(stretches.warm);
    let mut moments = Moments {
        calm: subject.crowd.now(),
        ..Moments::default()
    };
    let calm = read(lab)?;
    std::thread::sleep(stretches.calm);
    lab.nodes.iter().for_each(reset_memory_peak);
    let before = subject.workload.memory_bytes(lab.node(FROM)?).ok();
    let order = read(lab)?;
    moments.order = subject.crowd.now();
    let outcome = system.mover.move_workload(
        lab,
        &Order {
            workload: &subject.workload,
            from: FROM,
            to: TO,
            options: &MoveOptions::default(),
        },
    );
    moments.ended = subject.crowd.now();
    let mut failure = None;
    let outcome = outcome.unwrap_or_else(|error| {
        failure = Some(format!("{error:#}"));
        Outcome::default()
    });
    if let Some((code, text)) = &outcome.error {
        failure = Some(format!("{code}: {text}"));
    }
    if let Some(pid) = outcome.pid_at_target() {
        subject.workload.pid = pid;
    }
    if let Err(error) = settle(lab, &subject, system) {
        failure.get_or_insert(format!("{error:#}"));
    }
    moments.settled = subject.crowd.now();
    let readings = Readings {
        calm,
        order,
        settled: read(lab)?,
        peaks: lab.nodes.iter().map(memory_peak).collect(),
    };
    std::thread::sleep(stretches.after);
    moments.end = subject.crowd.now();
    let mut run = Run {
        failure,
        memory_bytes: before,
        ..Run::default()
    };
    note_outcome(&mut run, &outcome);
    note_spans(&mut run, lab, &outcome, system);
    conclude(&mut run, lab, subject, moments);
    note_usage(&mut run, lab, &readings, moments);
    if system.only_redis {
        // What Redis sends is not the nodes' own: only it knows.
        let told = outcome.moved.as_ref().map(|moved| moved.wire_bytes);
        run.wire_bytes = told.filter(|bytes| *bytes > 0);
    }
    Ok(run)
}

/// Waits until every client is answered, and nothing of the move is under way.
fn settle(lab: &Lab, subject: &Subject, system: &System) -> Result<()> {
    subject.crowd.wait_for_answers(2)?;
    system.mover.wait_settled(lab, SETTLE_TIME_MAX)
}

/// Ends the clients, and notes what they saw.
fn conclude(run: &mut Run, lab: &Lab, subject: Subject, moments: Moments) {
    let seen = match subject.finish(lab) {
        Ok(seen) => seen,
        Err(error) => {
            run.failure.get_or_insert(format!("{error:#}"));
            return;
        }
    };
    run.reconnects = seen.reconnects;
    run.verified = seen.wrong.is_empty();
    if let Some(wrong) = seen.wrong.first() {
        run.failure
            .get_or_insert(format!("contents are wrong: {wrong}"));
    }
    note_journal(run, &seen.journal, moments);
}

fn note_outcome(run: &mut Run, outcome: &Outcome) {
    let Some(moved) = &outcome.moved else { return };
    run.downtime_ms = Some(moved.downtime_ms);
    run.total_ms = Some(moved.total_ms);
    run.rounds = Some(moved.rounds);
    let parts = &moved.parts_ms;
    run.downtime_parts_ms = [
        ("1 freeze", parts.freeze),
        ("2 final round", parts.final_round),
        ("3 restore", parts.restore),
        ("4 commit", parts.commit),
        ("5 hand-off", parts.handoff),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
}

/// What took how long, if the mover notes that. A move without it is as good a move.
fn note_spans(run: &mut Run, lab: &Lab, outcome: &Outcome, system: &System) {
    let (Some(id), true) = (&outcome.id, system.mover.needs_daemons()) else {
        return;
    };
    let known = lab
        .node(FROM)
        .and_then(|source| timeline(source, id, SPANS_TIME_MAX));
    match known {
        Ok(known) => run.spans = spans::of(&known),
        Err(error) => eprintln!("no timeline: {error:#}"),
    }
}

fn note_usage(run: &mut Run, lab: &Lab, readings: &Readings, moments: Moments) {
    let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
    let calm_seconds = seconds(moments.calm, moments.order);
    let mut calm_rate = 0.0;
    let mut wire = 0;
    let mut cpu = BTreeMap::new();
    for (index, node) in lab.nodes.iter().enumerate() {
        let [calm, order, settled] =
            [&readings.calm, &readings.order, &readings.settled].map(|all| all[index]);
        calm_rate += (order.cpu_seconds - calm.cpu_seconds) / calm_seconds;
        wire += settled.sent_bytes.saturating_sub(order.sent_bytes);
        cpu.insert(
            node.name().to_owned(),
            settled.cpu_seconds - order.cpu_seconds,
        );
        let peak = readings.peaks[index].zip(order.memory_bytes);
        if let Some((peak, before)) = peak {
            let more = peak.saturating_sub(before);
            run.memory_peak_bytes.insert(node.name().to_owned(), more);
        }
    }
    run.wire_bytes = Some(wire);
    // What the workload would have used anyway, but for the gap, and at which node is not known:
    // taken from both by their shares.
    let gap = run.gap_ms.unwrap_or_default() / 1e3;
    let served = (seconds(moments.order, moments.settled) - gap).max(0.0);
    let own = calm_rate * served;
    let all: f64 = cpu.values().sum();
    for (name, used) in cpu {
        let beyond = (used - own * used / all.max(f64::MIN_POSITIVE)).max(0.0);
        run.cpu_seconds.insert(name, round(beyond));
    }
}

fn note_journal(run: &mut Run, journal: &Journal, moments: Moments) {
    let Moments {
        calm,
        order,
        ended,
        settled,
        end,
    } = moments;
    let since = |moment: u64| (moment as f64 - order as f64) / 1e6;
    run.calm = load(journal, calm, order);
    run.timeline_from_ms = round(since(calm));
    run.timeline = journal.windows(calm, end, WINDOW);
    let from = order.saturating_sub(HOLD);
    let mut gaps = journal.gaps(from, end, GAP_MIN);
    // A load that asks seldom has many: the longest count.
    gaps.sort_by_key(|gap| std::cmp::Reverse(gap.length()));
    gaps.truncate(GAPS_MAX);
    gaps.sort_by_key(|gap| gap.from);
    run.gaps_ms = gaps
        .into_iter()
        .map(|gap| (round(since(gap.from)), round(gap.length() as f64 / 1e6)))
        .collect();
    let Some(gap) = journal.longest_gap(order, settled.max(ended)) else {
        return;
    };
    run.gap_ms = Some(round(gap.length() as f64 / 1e6));
    run.before_gap = load(journal, order, gap.from);
    run.after_gap = load(journal, gap.to, settled);
    run.ttr90_ms = recovery(journal, gap, end);
}

/// The final rate is that of the last two seconds.
fn recovery(journal: &Journal, gap: Gap, end: u64) -> Option<f64> {
    let last = journal.stretch(end.saturating_sub(FINAL), end)?;
    let back = journal.recovery(gap.from, end, last.rate)?;
    Some(round(back as f64 / 1e6))
}

fn load(journal: &Journal, from: u64, until: u64) -> Option<Load> {
    let stretch = journal.stretch(from, until)?;
    Some(Load {
        seconds: round((until - from) as f64 / 1e9),
        per_second: round(stretch.rate),
        p50_ms: round(stretch.p50_ms),
        p99_ms: round(stretch.p99_ms),
    })
}

fn read(lab: &Lab) -> Result<Vec<Counters>> {
    let read = lab.nodes.iter().map(Counters::read);
    read.collect::<Result<_>>()
        .context("reading what the nodes have used")
}

pub fn failed(failure: String) -> Run {
    Run {
        failure: Some(failure),
        ..Run::default()
    }
}

const FROM: &str = "a";
const TO: &str = "b";
/// Longer than a source hears of the fill after it has ended.
const SPANS_TIME_MAX: Duration = Duration::from_secs(5);
/// Shorter ones are the scheduler's.
const GAP_MIN: u64 = 5_000_000;
const GAPS_MAX: usize = 64;
const FINAL: u64 = 2_000_000_000;
