//! A pod of podman in the network that podman gives: Redis; a client of it, which asks it over the
//! pod's loopback, on one connection, and prints every answer; and the self-checking writer.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::contained::{CLIENT, Plan};
use super::podman::{self, podman};
use super::{Workload, bridged, redis};
use crate::lab::Lab;
use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;
use crate::writer::options::Options;

/// Starts one, and waits until Redis listens.
pub fn start(lab: &mut Lab, at: &str, writer: &Options) -> Result<Workload> {
    let number = lab.next_workload()?;
    let (redis, writer) = (Plan::redis(), Plan::writer(writer));
    for plan in [&redis, &writer] {
        podman::prepare(lab, plan, at)?;
    }
    let name = format!("shop-{number}");
    let node = lab.node(at)?;
    let published = format!("{PORT}:{}", redis::PORT);
    let create = ["pod", "create", "--name", &name, "--network", "podman"];
    let create = create
        .into_iter()
        .chain(["--publish", &published, "--label", LABEL]);
    podman(node)?
        .args(create)
        .run()
        .with_context(|| format!("making the pod {name} at node {at}"))?;
    let asks = [CLIENT, "-r", "-1", "-i", "0.002", "INCR", "inner"].map(str::to_owned);
    let asks = Plan {
        arguments: asks.to_vec(),
        ..redis.clone()
    };
    let db = member(&name, DB);
    run(node, &name, (&db, &redis))?;
    wait_until_it_listens(node, &db)?;
    run(node, &name, (&member(&name, ASKS), &asks))?;
    run(node, &name, (&member(&name, WRITER), &writer))?;
    let address = bridged::address(node, &infra(node, &name)?)?;
    let workload = Workload {
        number,
        pid: pid(node, &db)?,
        link: WorkloadLink {
            port: String::new(),
            address,
        },
        container: None,
        containerd: None,
        pod: Some(name),
    };
    workload.wait_until_it_listens(lab, redis::PORT)?;
    Ok(workload)
}

fn run(node: &Node, pod: &str, (name, plan): (&str, &Plan)) -> Result<()> {
    let read_only = format!("--read-only={}", !plan.writes);
    let image = podman::image(plan);
    let run = ["run", "--detach", "--pod", pod, "--name", name, &read_only];
    let run = run.into_iter().chain(["--restart", "always", &image]);
    let started = podman(node)?.args(run).args(&plan.arguments).run();
    started
        .map(drop)
        .with_context(|| format!("starting {name} of the pod {pod}"))
}

/// Redis is asked in its container: the client of the pod gives up where nobody listens.
fn wait_until_it_listens(node: &Node, db: &str) -> Result<()> {
    podman::wait_until(|| {
        let said = podman(node)?.args(["exec", db, CLIENT, "ping"]).output()?;
        Ok(said.stdout.starts_with(b"PONG"))
    })
    .with_context(|| format!("the Redis of {db} does not answer"))
}

/// Whether podman of this node has the pod for its own: it and its containers run, commands can be
/// started in them, what they print is logged, and they would be started again. Its network is the
/// one that it had.
pub fn check_here(node: &Node, workload: &Workload) -> Result<()> {
    let name = name_of(workload)?;
    let told = inspect(node, name)?;
    ensure!(
        told["State"] == "Running" && told["NumContainers"] == 4,
        "podman says of the pod {name}: {} of {} containers",
        told["State"],
        told["NumContainers"]
    );
    ensure!(
        told["Labels"]["lab"] == "pod",
        "labels of {name}: {}",
        told["Labels"]
    );
    let filter = format!("pod={name}");
    let format = "{{.Names}} {{.State}} {{.PodName}}";
    let listed = podman(node)?.args(["ps", "--pod", "--filter", &filter, "--format", format]);
    let listed = listed.run()?;
    for container in [DB, ASKS, WRITER].map(|part| member(name, part)) {
        let wanted = format!("{container} running {name}");
        ensure!(
            listed.lines().any(|line| line.trim() == wanted),
            "podman ps --pod has no {wanted:?}: {listed}"
        );
        let format = "{{.HostConfig.RestartPolicy.Name}}";
        let policy = container_inspect(node, &container, format)?;
        ensure!(policy == "always", "the policy of {container} is {policy}");
    }
    for (container, words) in [
        (member(name, DB), &[CLIENT, "ping"][..]),
        (member(name, WRITER), &["/bin/sh", "-c", "echo PONG"][..]),
    ] {
        let exec = ["exec", &container]
            .into_iter()
            .chain(words.iter().copied());
        let said = podman(node)?.args(exec).run()?;
        ensure!(
            said.trim() == "PONG",
            "{words:?} in {container} says {said:?}"
        );
    }
    check_answers(node, name)?;
    let (has, wanted) = (
        bridged::address(node, &infra(node, name)?)?,
        workload.link.address,
    );
    ensure!(has == wanted, "podman says it has {has}, and not {wanted}");
    bridged::check_ports(node, 2)
}

/// Every answer that the client in the pod has printed here is one more than the one before.
fn check_answers(node: &Node, pod: &str) -> Result<()> {
    let asks = member(pod, ASKS);
    // What has come since the move, too.
    podman::wait_until(|| Ok(answers(node, &asks)?.len() > ANSWERS_MIN))
        .with_context(|| format!("{asks} prints no answers"))?;
    let answers = answers(node, &asks)?;
    let jump = answers.windows(2).find(|pair| pair[0] + 1 != pair[1]);
    ensure!(jump.is_none(), "{asks} has printed {jump:?}");
    Ok(())
}

fn answers(node: &Node, container: &str) -> Result<Vec<u64>> {
    let logs = podman(node)?.args(["logs", container]).output()?;
    let (said, complaint) = (
        String::from_utf8_lossy(&logs.stdout),
        String::from_utf8_lossy(&logs.stderr),
    );
    ensure!(complaint.is_empty(), "{container} has said {complaint}");
    let answers = said.lines().map(|line| line.trim().parse::<u64>());
    let answers = answers.collect::<Result<Vec<_>, _>>();
    answers.with_context(|| format!("{container} has printed something else: {said:.200}"))
}

/// What Redis calls the connection over the pod's loopback: a new one has another number.
pub fn inner_connection(node: &Node, workload: &Workload) -> Result<u64> {
    let db = member(name_of(workload)?, DB);
    let list = ["exec", &db, CLIENT, "CLIENT", "LIST"];
    let listed = podman(node)?.args(list).run()?;
    let inner = listed
        .lines()
        .find(|line| line.contains(" addr=127.0.0.1:") && line.contains(" cmd=incr "));
    let inner = inner.with_context(|| format!("no client over loopback: {listed}"))?;
    let id = inner
        .split(' ')
        .find_map(|word| word.strip_prefix("id=")?.parse().ok());
    id.with_context(|| format!("a client without a number: {inner}"))
}

/// Whether nothing of it is left here.
pub fn check_gone(node: &Node, workload: &Workload) -> Result<()> {
    let name = name_of(workload)?;
    let listed = podman(node)?.args(["ps", "--all", "--format", "{{.Names}} {{.PodName}}"]);
    let listed = listed.run()?;
    ensure!(
        listed.trim().is_empty(),
        "podman of node {} still has {listed}",
        node.name()
    );
    let exists = podman(node)?.args(["pod", "exists", name]).output()?;
    ensure!(
        exists.status.code() == Some(1),
        "the pod {name} is left at node {}",
        node.name()
    );
    podman::check_nothing_left(node)?;
    // The pod's own folder podman leaves in hierarchies that it does not know, with nobody in it.
    let script = "cat /dev/null \
                  $(find /sys/fs/cgroup -path '*/libpod_parent/*' -name cgroup.procs); \
                  ls -A /run/netns 2>/dev/null; true";
    let left = node.command("sh")?.args(["-c", script]).output()?;
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    ensure!(left.is_empty(), "node {} still has {left}", node.name());
    bridged::check_ports(node, 1)
}

/// Stops it as an operator would, and removes it.
pub fn end(node: &Node, workload: &Workload) -> Result<()> {
    let name = name_of(workload)?;
    podman(node)?
        .args(["pod", "stop", "--time", "2", name])
        .run()?;
    let state = inspect(node, name)?["State"].clone();
    ensure!(
        state == "Exited",
        "podman has stopped {name}: it is {state}"
    );
    podman(node)?.args(["pod", "rm", name]).run()?;
    check_gone(node, workload)
}

/// Deletes it, wherever it is.
pub fn delete(lab: &Lab, name: &str) -> Result<()> {
    for node in &lab.nodes {
        let delete = ["pod", "rm", "--force", "--ignore", "--time", "0", name];
        podman(node)?.args(delete).run()?;
    }
    Ok(())
}

fn name_of(workload: &Workload) -> Result<&str> {
    workload.pod.as_deref().context("a pod")
}

fn member(pod: &str, part: &str) -> String {
    format!("{pod}-{part}")
}

fn infra(node: &Node, pod: &str) -> Result<String> {
    let id = inspect(node, pod)?["InfraContainerID"].clone();
    id.as_str()
        .map(str::to_owned)
        .with_context(|| format!("the pod {pod} has no infra container"))
}

fn pid(node: &Node, container: &str) -> Result<i32> {
    let pid = container_inspect(node, container, "{{.State.Pid}}")?;
    pid.parse()
        .with_context(|| format!("the process of {container} is {pid}"))
}

fn container_inspect(node: &Node, container: &str, format: &str) -> Result<String> {
    let inspect = ["container", "inspect", "--format", format, container];
    Ok(podman(node)?.args(inspect).run()?.trim().to_owned())
}

/// What podman says of a pod.
fn inspect(node: &Node, pod: &str) -> Result<Value> {
    let printed = podman(node)?.args(["pod", "inspect", pod]).run()?;
    let mut all: Value = serde_json::from_str(&printed)
        .with_context(|| format!("reading what podman has of the pod {pod}"))?;
    match &mut all {
        Value::Array(list) => list.first_mut().map(Value::take).context("no pod"),
        Value::Object(_) => Ok(all),
        other => bail!("what podman has of the pod {pod}: {other}"),
    }
}

/// Of the node.
const PORT: u16 = 8080;
const LABEL: &str = "lab=pod";
const DB: &str = "db";
const ASKS: &str = "asks";
const WRITER: &str = "writer";
/// A tenth of a second of them.
const ANSWERS_MIN: usize = 50;
