//! A pod moves because it is annotated: controller and agents do the rest. There and back, with
//! clients that stay connected.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::pods::{POD_TIME_MAX, Watched, successor};
use super::replicas;
use super::report::Report;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::wait::until;
use crate::cluster::watching::Watching;
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::mover::outcome::{Move, millis, round};
use crate::mover::pageferry::show;

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 2)?;
    wait_ready(lab, kubectl, &mut movers)?;
    laps.lap("controllers and agents are up");
    let mut watched = Watched::start(lab, kubectl, &lab.nodes[0], SERVER)?;
    laps.lap("the pod of Redis is ready, and has clients");
    for index in 0..MOVES {
        let to = &lab.nodes[(index + 1) % lab.nodes.len()];
        move_pod(lab, kubectl, &mut watched, to, report)?;
        movers.check()?;
    }
    laps.lap("it has moved by annotation, there and back");
    say(kubectl)?;
    let pod = watched.finish(report)?;
    laps.lap("all that was written is there");
    kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    replicas::move_one(lab, kubectl)?;
    laps.lap("a pod of a Deployment has moved, and it has made no third");
    movers.check()
}

/// Waits until pods may come to all nodes, as agents say.
pub fn wait_ready(lab: &Lab, kubectl: &Kubectl, movers: &mut Movers) -> Result<()> {
    until("controllers and agents go on", POD_TIME_MAX, || {
        movers.check()
    })?;
    wait_labels(lab, kubectl)
}

/// The same, whoever runs the agents.
pub fn wait_labels(lab: &Lab, kubectl: &Kubectl) -> Result<()> {
    until("pods may come to all nodes", POD_TIME_MAX, || {
        let ready = ["get", "nodes", "--selector=pageferry.dev/ready=true"];
        let nodes = kubectl.json(&ready)?;
        let count = nodes["items"].as_array().map_or(0, Vec::len);
        ensure!(count == lab.nodes.len(), "they may come to {count}");
        Ok(())
    })
}

/// Has a pod move, and waits for the end of that; the Migration as it is then.
pub fn annotate(kubectl: &Kubectl, (name, uid): (&str, &str), to: &Node) -> Result<Value> {
    // Nobody asks the API server while it moves.
    let migrations = Watching::start(kubectl, &["migrations"])?;
    let wish = format!("pageferry.dev/migrate-to={}", worker::name(to));
    kubectl.run(&["annotate", "pod", name, &wish])?;
    end_of(&migrations, uid).with_context(|| format!("moving the pod {name}"))
}

/// The Migration of the pod of this UID, when it has ended well.
pub fn end_of(migrations: &Watching, uid: &str) -> Result<Value> {
    migrations.wait("it has moved", MOVE_TIME_MAX, |event| {
        let object = &event.object;
        if object["spec"]["pod"]["uid"] != *uid {
            return Ok(None);
        }
        match object["status"]["result"].as_str() {
            Some("Succeeded") => Ok(Some(object.clone())),
            Some(_) => bail!("it ended otherwise: {}", object["status"]),
            None => Ok(None),
        }
    })
}

/// What daemons call the move of a Migration.
fn daemon_id(migration: &Value) -> String {
    let uid = migration["metadata"]["uid"].as_str().unwrap_or_default();
    uid.replace('-', "")
}

/// What a Migration that has moved a pod away from a node was, as the node says.
pub fn moved(from: &Node, migration: &Value) -> Result<Move> {
    read_move(&show(from, &daemon_id(migration))?)
}

/// What a node says of a migration that has moved something.
fn read_move(shown: &Value) -> Result<Move> {
    ensure!(shown["moved"] == true, "the source says {shown}");
    let mut object = shown.clone();
    object["mode"] = Value::from("precopy");
    object["from"] = shown["node"].clone();
    object["to"] = shown["peer"].clone();
    object["rounds"] = shown["round"].clone();
    object["restore_ms"] = shown["parts_ms"]["restore"].clone();
    serde_json::from_value(object).with_context(|| format!("the source says {shown}"))
}

fn move_pod(
    lab: &Lab,
    kubectl: &Kubectl,
    watched: &mut Watched,
    to: &Node,
    report: &mut Report,
) -> Result<()> {
    let (name, uid) = (watched.pod.name.clone(), watched.pod.uid.clone());
    let from = lab.nodes.iter();
    let mut from = from.filter(|node| worker::name(node) == watched.pod.node);
    let from = from.next().context("the pod is at a node of the lab")?;
    let begun = Instant::now();
    let migration = annotate(kubectl, (&name, &uid), to)?;
    let ended = &migration["status"];
    let took = begun.elapsed();
    watched.check_moved(lab, kubectl, to)?;
    let blackout = watched.clients.blackout_since(begun)?;
    let mut moved = moved(from, &migration)?;
    moved.blackout_ms = Some(millis(blackout));
    report.push(moved);
    let new = ended["newPod"]["name"].as_str().unwrap_or_default();
    ensure!(new == successor(&name), "{name} came as {new}");
    let seconds = round(took.as_secs_f64());
    let downtime = ended["downtimeMs"].as_i64();
    println!(
        "{name} -> {new} at {}: {seconds} s, stood still for {} ms, blackout {} ms",
        worker::name(to),
        downtime.unwrap_or_default(),
        millis(blackout)
    );
    report.figure_series("from the annotation to the end, s", seconds);
    report.figure_series("downtime, ms", downtime.map_or(Value::Null, Value::from));
    report.figure_series("blackout, ms", millis(blackout));
    Ok(())
}

/// What a person sees of it.
pub fn say(kubectl: &Kubectl) -> Result<()> {
    println!("{}", kubectl.run(&["get", "migrations", "--output=wide"])?);
    let columns = "--output=custom-columns=\
        TYPE:.type,REASON:.reason,OBJECT:.involvedObject.name,NOTE:.message";
    let events = ["get", "events", "--field-selector=reason!=Pulled", columns];
    let events = kubectl.run(&events)?;
    let ours = [
        "Copying",
        "Placing",
        "Moving",
        "Moved",
        "Cleaning",
        "Succeeded",
    ];
    for line in events.lines() {
        let reason = line.split_whitespace().nth(1).unwrap_or_default();
        if reason == "REASON" || ours.contains(&reason) {
            println!("{line}");
        }
    }
    Ok(())
}

const SERVER: &str = "redis";
/// There and back.
const MOVES: usize = 2;
const MOVE_TIME_MAX: Duration = Duration::from_secs(180);
