//! A pod with Redis of 512 MiB moves twenty times by annotation, there and back, under the load of
//! its clients: what each of them waits for, and what a move takes until the new pod is ready.
//!
//! Nothing asks the API server while a pod moves: two watches hear what happens.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::annotated;
use super::pods::{Watched, successor};
use super::report::{Report, percentile};
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::watching::{Event, Watching};
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::mover::outcome::{millis, round};

/// How often it moves, unless it is said.
pub const MOVES: usize = 20;

/// The part of the scenario `kubernetes`.
pub fn run(
    lab: &Lab,
    cluster: &Cluster,
    laps: &mut Laps,
    report: &mut Report,
    moves: usize,
) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 2)?;
    annotated::wait_ready(lab, kubectl, &mut movers)?;
    laps.lap("controllers and agents are up");
    let mut course = Course {
        watched: Watched::start_with(lab, kubectl, &lab.nodes[0], SERVER, BYTES)?,
        migrations: Watching::start(kubectl, &["migrations"])?,
        pods: Watching::start(kubectl, &["pods"])?,
        parts: Vec::new(),
    };
    laps.lap("the pod of Redis is ready, and has clients");
    for index in 0..moves {
        let to = &lab.nodes[(index + 1) % lab.nodes.len()];
        course.move_pod(lab, cluster, to, report)?;
        movers.check()?;
    }
    laps.lap("it has moved by annotation, there and back");
    annotated::say(kubectl)?;
    let violations = movers.violations(lab)?;
    report.figure("rules seen broken", violations);
    if 0 < violations {
        report.fail(format!("{violations} rules were seen broken"));
    }
    let Course { watched, parts, .. } = course;
    let pod = watched.finish(report)?;
    laps.lap("all that was written is there");
    let moved = report.moves.clone();
    report.figure_downtimes("by annotation", &moved);
    let blackouts: Vec<f64> = moved.iter().filter_map(|one| one.blackout_ms).collect();
    report.figure("by annotation: blackout p50 ms", percentile(&blackouts, 50));
    for (index, (name, _)) in PARTS.iter().enumerate() {
        let taken: Vec<f64> = parts.iter().map(|all| all[index]).collect();
        for percent in [50, 99] {
            let named = format!("{} {name}, p{percent} s", index + 1);
            report.figure(&named, percentile(&taken, percent));
        }
    }
    let ready: Vec<f64> = parts.iter().map(|all| all[..READY].iter().sum()).collect();
    for percent in [50, 99] {
        let named = format!("from the annotation to Ready, p{percent} s");
        report.figure(&named, round(percentile(&ready, percent)));
    }
    kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    Ok(())
}

/// What is heard of one pod that moves again and again.
struct Course {
    watched: Watched,
    migrations: Watching,
    pods: Watching,
    /// By move: how long each of [`PARTS`] took, in seconds.
    parts: Vec<[f64; PARTS.len()]>,
}

impl Course {
    fn move_pod(
        &mut self,
        lab: &Lab,
        cluster: &Cluster,
        to: &Node,
        report: &mut Report,
    ) -> Result<()> {
        let (name, uid) = (self.watched.pod.name.clone(), self.watched.pod.uid.clone());
        let new = successor(&name);
        let from = lab.nodes.iter();
        let mut from = from.filter(|node| worker::name(node) == self.watched.pod.node);
        let from = from.next().context("the pod is at a node of the lab")?;
        let wish = format!("pageferry.dev/migrate-to={}", worker::name(to));
        let begun = Instant::now();
        cluster.kubectl.run(&["annotate", "pod", &name, &wish])?;
        let ended = annotated::end_of(&self.migrations, &uid)?;
        let ready = self.pods.wait("the new pod is ready", TIME_MAX, |event| {
            let is_it = event.object["metadata"]["name"] == *new && is_ready(&event.object);
            Ok(is_it.then_some(event.at))
        })?;
        let blackout = self.watched.clients.blackout_since(begun)?;
        let mut moved = annotated::moved(from, &ended)?;
        moved.blackout_ms = Some(millis(blackout));
        report.push(moved);
        let parts = self.parts_of(&uid, (begun, ready))?;
        println!("  {}", said(&parts));
        self.parts.push(parts);
        self.watched.check_moved(lab, &cluster.kubectl, to)
    }

    /// How long each part took, by when it was first heard that it was over.
    fn parts_of(
        &self,
        uid: &str,
        (begun, ready): (Instant, Instant),
    ) -> Result<[f64; PARTS.len()]> {
        let all = self.migrations.all();
        let mut last = begun;
        let mut parts = [0.0; PARTS.len()];
        for (part, (name, is_over)) in parts.iter_mut().zip(PARTS) {
            let mut of_pod = all.iter();
            let heard = of_pod
                .find(|event| event.object["spec"]["pod"]["uid"] == *uid && is_over(event))
                .map(|event| event.at);
            let at = match name {
                READY_PART => Some(ready),
                _ => heard,
            };
            let at = at.with_context(|| format!("nothing was heard of {name:?}"))?;
            *part = round(at.saturating_duration_since(last).as_secs_f64());
            last = last.max(at);
        }
        Ok(parts)
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let mut ready = conditions.filter(|one| one["type"] == "Ready");
    ready.any(|one| one["status"] == "True")
}

fn at_step(event: &Event, step: &str) -> bool {
    event.object["status"]["course"]["step"] == step
}

fn said(parts: &[f64]) -> String {
    let named = PARTS.iter().zip(parts);
    let parts: Vec<String> = named
        .map(|((name, _), took)| format!("{name} {took:.2} s"))
        .collect();
    parts.join(", ")
}

type IsOver = fn(&Event) -> bool;

/// From the annotation to the end, one after the other; each with what tells that it is over.
const PARTS: [(&str, IsOver); 8] = [
    ("until there is a Migration", |_| true),
    ("until it begins", |event| at_step(event, "Copying")),
    ("copying", |event| at_step(event, "Placing")),
    ("until the new pod is made", |event| {
        event.object["status"]["course"]["newUid"].is_string()
    }),
    ("until its container waits, and that is known", |event| {
        at_step(event, "Moving")
    }),
    ("last round and hand-off", |event| {
        at_step(event, "Switching")
    }),
    (READY_PART, |_| false),
    ("until the old pod is gone and all is filled", |event| {
        at_step(event, "Ended")
    }),
];
const READY_PART: &str = "until the new pod is ready";
/// So many parts are over when it is.
const READY: usize = 7;
const SERVER: &str = "redis";
/// Values alone.
const BYTES: u64 = 512 << 20; // 512 MiB
const TIME_MAX: Duration = Duration::from_secs(180);
