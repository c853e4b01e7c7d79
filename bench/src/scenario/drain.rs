//! `kubectl drain` of a node with the pods of a Deployment that want to move when they are evicted:
//! it ends as any drain does, and nobody notices.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::annotated::{say, wait_ready};
use super::clients::Clients;
use super::pods::{POD_TIME_MAX, Placed, Watched, pod, successor};
use super::report::Report;
use super::served;
use crate::client::load::{Dataset, LoadPlan};
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::{Movers, wait_asked};
use crate::cluster::wait::until;
use crate::cluster::watching::{Event, Watching};
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::mover::outcome::{millis, round};
use crate::workload::redis;

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 2)?;
    wait_ready(lab, kubectl, &mut movers)?;
    wait_asked(kubectl)?;
    laps.lap("controllers and agents are up, and the API server asks them");
    let [from, to] = [&lab.nodes[0], &lab.nodes[1]];
    let (here, there) = (worker::name(from), worker::name(to));
    kubectl.run(&["cordon", &there])?;
    for object in [deployment(), budget(), service()] {
        kubectl.apply(&object.to_string())?;
    }
    let mut watched = start_clients(lab, kubectl)?;
    kubectl.run(&["uncordon", &there])?;
    laps.lap("three pods of a Deployment are ready at one node, and have clients");
    let seen = Seen::start(kubectl)?;
    let before: Vec<Placed> = watched.iter().map(|one| one.pod.clone()).collect();
    dry_run(kubectl, &here)?;
    laps.lap("a dry run has ended, and nothing has moved");
    let begun = Instant::now();
    drain(kubectl, &here, report)?;
    report.figure("drain, s", round(begun.elapsed().as_secs_f64()));
    laps.lap("kubectl drain has ended with 0");
    for one in &mut watched {
        one.check_moved(lab, kubectl, to)?;
        let blackout = one.clients.blackout_since(begun)?;
        report.figure_series("blackout, ms", millis(blackout));
    }
    movers.check()?;
    judge(kubectl, &seen, &before, report)?;
    for one in watched {
        one.finish(report)?;
    }
    laps.lap("all pods are at the other node, and all that was written is there");
    say(kubectl)?;
    kubectl.run(&["rollout", "status", "deployment", NAME, "--timeout=20s"])?;
    evict_as_ever(kubectl, &there)?;
    laps.lap("what does not want to move was evicted as ever");
    let objects = ["delete", "deployment,service,poddisruptionbudget", NAME];
    kubectl.run(&[&objects[..], &["--cascade=foreground", "--timeout=60s"]].concat())?;
    movers.check()
}

/// What is watched meanwhile.
struct Seen {
    pods: Watching,
    slices: Watching,
    migrations: Watching,
}

impl Seen {
    fn start(kubectl: &Kubectl) -> Result<Self> {
        let of_service = format!("--selector=kubernetes.io/service-name={NAME}");
        Ok(Self {
            pods: Watching::start(kubectl, &["pods", &selector()])?,
            slices: Watching::start(kubectl, &["endpointslices", &of_service])?,
            migrations: Watching::start(kubectl, &["migrations"])?,
        })
    }
}

fn start_clients(lab: &Lab, kubectl: &Kubectl) -> Result<Vec<Watched>> {
    let pods = until("three pods are ready", POD_TIME_MAX, || {
        let listed = kubectl.json(&["get", "pods", &selector()])?;
        let pods = listed["items"].as_array().cloned().unwrap_or_default();
        ensure!(pods.len() == REPLICAS, "there are {}", pods.len());
        let names = pods.iter().map(|pod| pod["metadata"]["name"].as_str());
        let names = names
            .collect::<Option<Vec<_>>>()
            .context("pods have names")?;
        let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        Ok(names)
    })?;
    let start = |name: &String| watch_lightly(lab, kubectl, name);
    pods.iter().map(start).collect()
}

/// Waits for a pod with Redis, and starts clients that leave room for others beside it.
pub fn watch_lightly(lab: &Lab, kubectl: &Kubectl, name: &str) -> Result<Watched> {
    let pod = Placed::wait(kubectl, name)?;
    let logs = lab.folder.logs().join(format!("load-{name}"));
    let plan = LoadPlan {
        values_per_second: Some(WRITES_PER_SECOND),
        ..LoadPlan::first_row()
    };
    let load = (Dataset::first_row(BYTES), plan);
    let clients = Clients::start(&lab.client.net, pod.address, load, &logs)?;
    Ok(Watched { pod, clients })
}

/// Nothing is begun by a drain that is not meant, and it ends.
fn dry_run(kubectl: &Kubectl, node: &str) -> Result<()> {
    let said = command(kubectl, node, &["--dry-run=server"])?;
    ensure!(
        said.contains("DryRun"),
        "it does not say that the pods would move: {said}"
    );
    let listed = kubectl.json(&["get", "migrations"])?;
    let count = listed["items"].as_array().map_or(0, Vec::len);
    ensure!(count == 0, "{count} Migrations were made by a dry run");
    // A dry run of the server cordons nothing.
    Ok(())
}

fn drain(kubectl: &Kubectl, node: &str, report: &mut Report) -> Result<()> {
    let said = command(kubectl, node, &[])?;
    let answers = said.matches("Eviction triggered evacuation").count();
    ensure!(answers != 0, "the drain was not told to ask again: {said}");
    for line in said
        .lines()
        .filter(|line| line.contains("evacuation"))
        .take(3)
    {
        println!("{line}");
    }
    report.figure("drain was told to ask again, times", answers);
    Ok(())
}

/// Drains a node; all that kubectl said.
fn command(kubectl: &Kubectl, node: &str, more: &[&str]) -> Result<String> {
    let arguments = [
        "drain",
        node,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        DRAIN_TIME_MAX,
    ];
    let command = kubectl.command()?.args(arguments).args(more);
    let output = command.output().context("kubectl drain")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout) + &text(&output.stderr);
    ensure!(
        output.status.success(),
        "kubectl drain: {}: {said}",
        output.status
    );
    Ok(said)
}

fn judge(kubectl: &Kubectl, seen: &Seen, before: &[Placed], report: &mut Report) -> Result<()> {
    let wanted: BTreeSet<String> = before.iter().map(|pod| successor(&pod.name)).collect();
    seen.pods
        .wait("the old pods are gone", POD_TIME_MAX, gone(before))?;
    // The Service's controller follows.
    let slice = until("the Service leads to the new pods", POD_TIME_MAX, || {
        let (pods, slices) = (seen.pods.all(), seen.slices.all());
        let routes = served::routes(&pods, &slices, REPLICAS)?;
        ensure!(
            routes.last.len() == REPLICAS,
            "it leads to {:?}",
            routes.last
        );
        Ok(routes)
    })?;
    let story = served::story(&seen.pods.all(), REPLICAS)?;
    let (most, blocked) = served::moves(&seen.migrations.all());
    report.figure("fewest ready at a time", story.ready_min);
    report.figure("most copies of one", story.copies_max);
    report.figure("fewest addresses of the Service", slice.least);
    report.figure(
        "an address was ready without a ready pod, ms at most",
        millis(slice.stale_max),
    );
    report.figure("most moves at a time", most);
    ensure!(2 <= story.ready_min, "only {} were ready", story.ready_min);
    ensure!(
        story.copies_max <= 2,
        "there were {} copies",
        story.copies_max
    );
    ensure!(
        2 <= slice.least,
        "the Service led to {} addresses",
        slice.least
    );
    ensure!(
        most == 1,
        "{most} moved at a time, and the budget spares one"
    );
    ensure!(
        blocked.contains("DisruptionBudget"),
        "none waited for the budget, but for {blocked:?}"
    );
    let mut known: BTreeSet<String> = before.iter().map(|pod| pod.name.clone()).collect();
    known.extend(wanted.iter().cloned());
    ensure!(story.names == known, "there were {:?}", story.names);
    for name in &wanted {
        let pod = kubectl.json(&["get", "pod", name])?;
        let annotations = &pod["metadata"]["annotations"];
        let only = &annotations["descheduler.alpha.kubernetes.io/request-evict-only"];
        ensure!(only.is_string(), "{name} does not say that it moves");
        let going = &annotations["descheduler.alpha.kubernetes.io/eviction-in-progress"];
        ensure!(going.is_null(), "{name} says that it is evicted: {going}");
    }
    Ok(())
}

/// Looks for the end of pods, one after the other.
fn gone(pods: &[Placed]) -> impl FnMut(&Event) -> Result<Option<()>> {
    let mut left: BTreeSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
    move |event| {
        if event.deleted {
            left.remove(event.object["metadata"]["uid"].as_str().unwrap_or_default());
        }
        Ok(left.is_empty().then_some(()))
    }
}

/// A pod that was not asked, and one that was and cannot move.
fn evict_as_ever(kubectl: &Kubectl, node: &str) -> Result<()> {
    let mut stuck = pod("stuck", node, &redis::plan().arguments);
    stuck["metadata"]["annotations"] = json!({"pageferry.dev/on-eviction": "migrate"});
    stuck["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    let plain = pod("plain", node, &redis::plan().arguments);
    for object in [&stuck, &plain] {
        kubectl.apply(&object.to_string())?;
    }
    for name in ["stuck", "plain"] {
        Placed::wait(kubectl, name)?;
        let eviction = json!({
            "apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": {"name": name, "namespace": "default"},
        });
        let path = format!("/api/v1/namespaces/default/pods/{name}/eviction");
        let create = ["create", "--raw", &path, "--filename", "-"];
        let command = kubectl.command()?.args(create);
        command.run_with_input(&eviction.to_string())?;
        kubectl.run(&["wait", "--for=delete", "pod", name, "--timeout=60s"])?;
    }
    let events = ["get", "events", "--field-selector=reason=EvictedUnmoved"];
    until("an event says why one was evicted", POD_TIME_MAX, || {
        let events = kubectl.run(&events)?;
        ensure!(events.contains("BoundToNode"), "they are {events}");
        Ok(())
    })
}

fn selector() -> String {
    format!("--selector=app={NAME}")
}

fn deployment() -> Value {
    let mut template = pod(NAME, "", &redis::plan().arguments);
    if let Some(spec) = template["spec"].as_object_mut() {
        spec.remove("nodeName");
    }
    template["spec"]["containers"][0]["readinessProbe"] =
        json!({"tcpSocket": {"port": redis::PORT}, "periodSeconds": 1});
    let labels = json!({"app": NAME});
    let annotations = json!({"pageferry.dev/on-eviction": "migrate"});
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {
            "replicas": REPLICAS,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": template["spec"],
            },
        },
    })
}

fn budget() -> Value {
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": NAME},
        "spec": {"minAvailable": 2, "selector": {"matchLabels": {"app": NAME}}},
    })
}

fn service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME},
        "spec": {"selector": {"app": NAME}, "ports": [{"port": redis::PORT}]},
    })
}

const NAME: &str = "store";
const REPLICAS: usize = 3;
/// Values alone, of each pod.
const BYTES: u64 = 16 << 20; // 16 MiB
const WRITES_PER_SECOND: u32 = 2000;
const DRAIN_TIME_MAX: &str = "--timeout=240s";
