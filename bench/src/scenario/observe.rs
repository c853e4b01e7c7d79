//! What the daemons tell of a move: their metrics, asked for again and again while it goes on, and
//! the timeline of both nodes. Whether all of it fits what the move itself says, and each other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::lab::daemon::DaemonPlan;
use crate::measure::scrape::Scrape;
use crate::mover::MoveOptions;
use crate::mover::outcome::{Move, millis, round};
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, timeline, wait_settled};

/// What `--only` takes, and what that is.
pub const CASES: [(&str, &str); 3] = [
    ("small", "Redis with 128 MiB"),
    ("1g", "Redis with 1 GiB: what is run without --only"),
    ("4g", "Redis with 4 GiB"),
];

/// One move of Redis under the first row of the load.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("stock CRIU counts nothing")?;
    let bytes = match settings.only.as_deref() {
        Some("small") => 128 << 20,
        None | Some("1g") => 1 << 30,
        Some("4g") => 4 << 30,
        Some(other) => bail!("there is no case {other}: small, 1g, 4g"),
    };
    let mut lab = settings.lab(2)?;
    lab.restart_daemons(&DaemonPlan {
        metrics: true,
        ..DaemonPlan::default()
    })?;
    let dataset = Dataset::first_row(bytes);
    let load = LoadPlan::first_row();
    let mut session = Session::start(&mut lab, settings.mover, "a", dataset, load)?;
    session.wait_for_writes(WRITES_AROUND)?;
    let mut watch = Watch::begin(&lab)?;
    let begun = Instant::now();
    let flags = MoveOptions::default();
    let name = session.workload.name();
    let mut migration = Migration::start(lab.node("a")?, &name, "b", &flags)?;
    while !migration.has_ended()? {
        watch.look(&lab, report)?;
    }
    let outcome = migration.finish()?;
    let id = outcome.id.clone();
    if session.note(outcome, begun, "b", report) {
        session.wait_for_writes(WRITES_AROUND)?;
        wait_settled(&lab, SETTLE_TIME_MAX)?;
        watch.look(&lab, report)?;
        let moved = report.moves.last().context("it has moved")?.clone();
        watch.judge(&moved, report)?;
        let id = id.context("a move has an id")?;
        judge_timeline(&lab, &id, &moved, report)?;
    }
    session.finish(report)?;
    Ok(())
}

/// What both daemons have said so far: the source's first.
#[derive(Debug)]
struct Watch {
    last: [Scrape; 2],
    looks: u32,
    slowest: Duration,
    /// The source has said that a migration is under way.
    saw_it: bool,
}

impl Watch {
    fn begin(lab: &Lab) -> Result<Self> {
        Ok(Self {
            last: scrape(lab)?,
            looks: 0,
            slowest: Duration::ZERO,
            saw_it: false,
        })
    }

    /// Asks both once more: no counter may shrink, and no series come or go.
    fn look(&mut self, lab: &Lab, report: &mut Report) -> Result<()> {
        let now = scrape(lab)?;
        for (now, before) in now.iter().zip(&self.last) {
            if let Some(why) = now.step_back_from(before) {
                report.fail(format!("metrics: {why}"));
            }
            self.slowest = self.slowest.max(now.took);
        }
        self.saw_it |= now[0].sum("migrations") > 0.0;
        self.looks += 1;
        self.last = now;
        Ok(())
    }

    /// Whether what is counted is what the move says, and the same at both nodes.
    fn judge(&self, moved: &Move, report: &mut Report) -> Result<()> {
        let [source, target] = &self.last;
        let mut same = |what: &str, counted: f64, expected: f64, within: f64| {
            if within < (counted - expected).abs() {
                report.fail(format!("metrics: {what} is {counted}, and not {expected}"));
            }
        };
        let milliseconds = |name: &str| Ok::<_, anyhow::Error>(source.get(name)? * 1e3);
        let ended = |role| format!("migrations_ended_total{{role=\"{role}\",result=\"moved\"}}");
        same("moved away", source.get(&ended("source"))?, 1.0, 0.0);
        same("moved here", target.get(&ended("target"))?, 1.0, 0.0);
        same("failures", source.sum("migration_failures_total"), 0.0, 0.0);
        same("downtimes", source.get("downtime_seconds_count")?, 1.0, 0.0);
        let downtime = milliseconds("downtime_seconds_sum")?;
        same("downtime in ms", downtime, moved.downtime_ms, 0.01);
        let parts = source.sum("downtime_part_seconds_sum") * 1e3;
        same("the sum of its parts in ms", parts, moved.downtime_ms, 0.01);
        let rounds = source.get("rounds_total")?;
        same("rounds", rounds, moved.rounds.into(), 0.0);
        let wire = source.get("sent_wire_bytes_total")?;
        same("bytes on the wire", wire, moved.wire_bytes as f64, 0.0);
        for path in ["zero", "raw", "lz4"] {
            let sent = source.get(&format!("sent_pages_total{{path=\"{path}\"}}"))?;
            let come = target.get(&format!("received_pages_total{{path=\"{path}\"}}"))?;
            same(&format!("{path} pages that have come"), come, sent, 0.0);
        }
        same("fills", target.get("fill_seconds_count")?, 1.0, 0.0);
        let faults = target.get("filled_pages_total{path=\"fault\"}")?;
        let measured = target.get("fault_seconds_count")?;
        same("faults with a time", measured, faults, 0.0);
        for (node, scrape) in [("a", source), ("b", target)] {
            for level in ["migrations", "send_queue_bytes", "receiving_streams"] {
                same(&format!("{level} of {node}"), scrape.sum(level), 0.0, 0.0);
            }
            let promised = scrape.get("promised_bytes")?;
            same(&format!("memory promised at {node}"), promised, 0.0, 0.0);
        }
        if !self.saw_it {
            report.fail("metrics: no look has seen the migration under way");
        }
        if target.sum("filled_pages_total") < 1.0 {
            report.fail("metrics: nothing was filled");
        }
        let blackout = source.get("blackout_seconds_sum")? * 1e3;
        report.figure("metrics: looks at both daemons", self.looks);
        report.figure("metrics: slowest answer ms", millis(self.slowest));
        report.figure("metrics: blackout by spans ms", round(blackout));
        report.figure("metrics: faults", faults);
        Ok(())
    }
}

fn scrape(lab: &Lab) -> Result<[Scrape; 2]> {
    Ok([Scrape::of(lab.node("a")?)?, Scrape::of(lab.node("b")?)?])
}

/// Whether the source knows the timeline of both nodes, and it fits what the move says.
fn judge_timeline(lab: &Lab, id: &str, moved: &Move, report: &mut Report) -> Result<()> {
    let source = lab.node("a")?;
    let known = timeline(source, id, SETTLE_TIME_MAX)?;
    let spans = known["spans"].as_array().context("spans")?;
    if known["one_clock"] != true {
        report.fail("timeline: two nodes of one kernel have two clocks");
    }
    for (role, names) in [("source", &SOURCE[..]), ("target", &TARGET[..])] {
        for name in names {
            if find(spans, role, name).is_none() {
                report.fail(format!("timeline: {name} of the {role} is missing"));
            }
        }
    }
    let parts = PARTS.iter().filter_map(|part| find(spans, "source", part));
    let sum: f64 = parts.map(|(begin, end)| end - begin).sum();
    if CLOCKS_MS < (sum - moved.downtime_ms).abs() {
        let downtime = moved.downtime_ms;
        report.fail(format!(
            "timeline: its parts are {sum} ms, and not {downtime}"
        ));
    }
    let within = |inner: (&str, &str), outer: (&str, &str)| {
        let (inner, outer) = (find(spans, inner.0, inner.1), find(spans, outer.0, outer.1));
        inner.zip(outer).is_some_and(|(inner, outer)| {
            outer.0 - CLOCKS_MS <= inner.0 && inner.1 <= outer.1 + CLOCKS_MS
        })
    };
    for (inner, outer) in [
        (("target", "restore"), ("source", "restore")),
        (("target", "let_go"), ("source", "handoff")),
        (("target", "criu_tree"), ("target", "restore")),
        (("source", "dump"), ("source", "final_round")),
        (("source", "ports"), ("source", "freeze")),
    ] {
        if !within(inner, outer) {
            report.fail(format!("timeline: {inner:?} is not within {outer:?}"));
        }
    }
    let drawn = source
        .command("pageferry")?
        .args(["show", id, "--timeline"])
        .env("COLUMNS", "110")
        .run()?;
    println!("{drawn}");
    report.figure("timeline: spans", spans.len());
    Ok(())
}

/// From when to when the last span of a name was, in milliseconds.
fn find(spans: &[Value], role: &str, name: &str) -> Option<(f64, f64)> {
    let mut all = spans.iter().rev();
    let span = all.find(|span| span["role"] == role && span["name"] == name)?;
    let begin = span["begin_ms"].as_f64()?;
    Some((begin, begin + span["took_ms"].as_f64()?))
}

/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
/// How far what is read from a clock twice may lie apart.
const CLOCKS_MS: f64 = 1.0;
const PARTS: [&str; 5] = ["freeze", "final_round", "restore", "commit", "handoff"];
const SOURCE: [&str; 19] = [
    "survey",
    "offer",
    "track",
    "round",
    "round_held",
    "freeze",
    "ports",
    "cgroup",
    "look",
    "final_round",
    "scan",
    "dump",
    "images",
    "final_held",
    "restore",
    "commit",
    "journal",
    "handoff",
    "release",
];
const TARGET: [&str; 13] = [
    "prepare",
    "check",
    "restore",
    "plan",
    "criu_begin",
    "criu_tree",
    "criu_rest",
    "journal",
    "let_go",
    "network",
    "go",
    "parking",
    "fill",
];
