//! Several moves at a time: two that cross, and four of which a policy lets two go on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::annotated::wait_ready;
use super::drain::watch_lightly;
use super::pods::{Watched, server};
use super::report::Report;
use super::served;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::watching::{Event, Watching};
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::mover::outcome::millis;

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 2)?;
    wait_ready(lab, kubectl, &mut movers)?;
    laps.lap("controllers and agents are up");
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    let crossing = [("one", here, there), ("two", there, here)];
    let (most, _) = move_all(lab, kubectl, &crossing, "crossing", report)?;
    ensure!(
        most == 2,
        "{most} moved at a time, and nothing keeps two from it"
    );
    laps.lap("two moves have crossed");
    kubectl.apply(&policy().to_string())?;
    let four = ["first", "second", "third", "fourth"];
    let four = four.map(|name| (name, here, there));
    let (most, blocked) = move_all(lab, kubectl, &four, "four with limits", report)?;
    ensure!(most <= 2, "{most} moved at a time, and two may");
    ensure!(
        blocked.iter().any(|why| why == "ClusterLimit"),
        "none waited for its turn, but for {blocked:?}"
    );
    kubectl.run(&["delete", "migrationpolicy", POLICY])?;
    laps.lap("four have moved, two at a time");
    movers.check()
}

/// Moves pods, each from a node to another, all asked for at once; how many went on at a time, and
/// on what others waited.
fn move_all(
    lab: &Lab,
    kubectl: &Kubectl,
    ways: &[(&str, &Node, &Node)],
    what: &str,
    report: &mut Report,
) -> Result<(usize, Vec<String>)> {
    let mut watched = Vec::new();
    for (name, from, _) in ways {
        kubectl.apply(&server(name, &worker::name(from)).to_string())?;
        watched.push(watch_lightly(lab, kubectl, name)?);
    }
    let migrations = Watching::start(kubectl, &["migrations"])?;
    let begun = Instant::now();
    for (name, _, to) in ways {
        let wish = format!("pageferry.dev/migrate-to={}", worker::name(to));
        kubectl.run(&["annotate", "pod", name, &wish])?;
    }
    let ended = migrations.wait("all have moved", MOVES_TIME_MAX, all_ended(&watched))?;
    for status in ended {
        let downtime = status["downtimeMs"].clone();
        report.figure_series(&format!("{what}: downtime, ms"), downtime);
    }
    for (one, (_, _, to)) in watched.iter_mut().zip(ways) {
        one.check_moved(lab, kubectl, to)?;
        let blackout = millis(one.clients.blackout_since(begun)?);
        report.figure_series(&format!("{what}: blackout, ms"), blackout);
    }
    let (most, blocked) = served::moves(&migrations.all());
    report.figure(&format!("{what}: most moves at a time"), most);
    for one in watched {
        let pod = one.finish(report)?;
        kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    }
    kubectl.run(&["delete", "migrations", "--all", "--timeout=60s"])?;
    Ok((most, blocked.into_iter().collect()))
}

/// Looks for the good end of the moves of pods.
fn all_ended(watched: &[Watched]) -> impl FnMut(&Event) -> Result<Option<Vec<Value>>> {
    let mut left: Vec<String> = watched.iter().map(|one| one.pod.uid.clone()).collect();
    let mut ended = Vec::new();
    move |event| {
        let migration = &event.object;
        let uid = migration["spec"]["pod"]["uid"].as_str();
        let uid = uid.context("a Migration is of a pod")?;
        let status = &migration["status"];
        if let Some(result) = status["result"].as_str()
            && left.iter().any(|one| one == uid)
        {
            ensure!(result == "Succeeded", "it ended as {status}");
            left.retain(|one| one != uid);
            ended.push(status.clone());
        }
        Ok(left.is_empty().then(|| ended.clone()))
    }
}

fn policy() -> Value {
    json!({
        "apiVersion": "pageferry.dev/v1alpha1",
        "kind": "MigrationPolicy",
        "metadata": {"name": POLICY},
        "spec": {"atOnce": {"perNode": 2, "perCluster": 2}},
    })
}

const POLICY: &str = "two-at-once";
const MOVES_TIME_MAX: Duration = Duration::from_secs(180);
