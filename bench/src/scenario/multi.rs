//! A pod of three containers moves by annotation, to and fro: Redis; a client of it, which asks it
//! over the pod's loopback on one connection, and prints every answer; and the self-checking
//! writer, into an emptyDir that Redis has, too. Then what holds the containers that have come is
//! killed, and the target's daemon, while others of the pod are yet to come: each time the pod is
//! whole, at one node.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::annotated;
use super::clients::Clients;
use super::container_files::{Entries, compare, describe_but};
use super::empty_dir::volume;
use super::pods::{POD_TIME_MAX, Placed, Watched, server};
use super::report::Report;

use crate::client::load::{Dataset, LoadPlan};
use crate::client::writer::WriterClient;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::wait::until;
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::containerd::import;
use crate::lab::node::Node;
use crate::mover::outcome::{millis, round};
use crate::workload::contained::{CLIENT, Plan};
use crate::workload::containerd::make_image;
use crate::writer::case::FILES;
use crate::writer::case::files::FOLDER;
use crate::writer::options::Options;

/// How often it moves, unless it is said, before anybody is killed.
pub const MOVES: usize = 4;

/// The part of the scenario `kubernetes`.
pub fn run(
    lab: &mut Lab,
    cluster: &Cluster,
    laps: &mut Laps,
    report: &mut Report,
    moves: usize,
) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 1)?;
    annotated::wait_ready(lab, kubectl, &mut movers)?;
    let mut course = Course::start(lab, kubectl)?;
    laps.lap("the pod of three is ready, and has clients");
    for number in 1..=moves {
        let to = course.other(lab)?;
        let said = course.move_pod((lab, kubectl), &mut movers, to, report);
        let said = said.with_context(|| format!("move {number}"))?;
        println!("move {number}: {said}");
        movers.check()?;
    }
    laps.lap("it has moved, whole");
    for blow in [Blow::Holder, Blow::Daemon] {
        let said = course.suffer(lab, kubectl, &mut movers, blow, report);
        let said = said.with_context(|| format!("{blow:?} is killed"))?;
        println!("{blow:?} is killed: {said}");
    }
    laps.lap("it is whole, whoever was killed");
    let violations = movers.violations(lab)?;
    report.figure("rules seen broken", violations);
    if 0 < violations {
        report.fail(format!("{violations} rules were seen broken"));
    }
    annotated::say(kubectl)?;
    let pod = course.watched.finish(report)?;
    report.note_contents(true);
    kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    worker::release(lab, pod.address)?;
    until("nothing is left of the pods", POD_TIME_MAX, || {
        lab.nodes.iter().try_for_each(worker::check_no_pods)
    })
}

/// Who is killed at the target while a part of the pod has come.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// The process that stands for a container that has come.
    Holder,
    Daemon,
}

/// A pod that moves, and whoever watches it.
struct Course {
    watched: Watched,
    writer: WriterClient,
    /// What Redis calls the connection over the pod's loopback.
    inner: u64,
}

impl Course {
    /// Starts it at the first node.
    fn start(lab: &Lab, kubectl: &Kubectl) -> Result<Self> {
        let mut options = Options::new(MEMORY);
        FILES.name.clone_into(&mut options.case);
        let plan = Plan::writer(&options);
        let first = lab.nodes.first().context("a lab has nodes")?;
        make_image(first, IMAGE, IMAGE_FILE, &plan.programs)?;
        for node in &lab.nodes {
            import(node, worker::NAMESPACE, IMAGE_FILE)?;
        }
        let pod = shop(&worker::name(first), &plan.arguments);
        kubectl.apply(&pod.to_string())?;
        let pod = Placed::wait(kubectl, NAME)?;
        let logs = lab.folder.logs().join(format!("load-{NAME}"));
        let load = (Dataset::first_row(BYTES), LoadPlan::first_row());
        let net = &lab.client.net;
        Ok(Self {
            writer: WriterClient::connect_to(net, pod.address, POD_TIME_MAX)?,
            inner: inner_connection(kubectl, &pod.name)?,
            watched: Watched {
                clients: Clients::start(net, pod.address, load, &logs)?,
                pod,
            },
        })
    }

    fn at<'a>(&self, lab: &'a Lab, here: bool) -> Result<&'a Node> {
        let mut nodes = lab.nodes.iter();
        let found = nodes.find(|node| (worker::name(node) == self.watched.pod.node) == here);
        found.context("a node of the lab")
    }

    fn other<'a>(&self, lab: &'a Lab) -> Result<&'a Node> {
        self.at(lab, false)
    }

    /// Moves it, and sees that all of it is as it was.
    fn move_pod(
        &mut self,
        (lab, kubectl): (&Lab, &Kubectl),
        movers: &mut Movers,
        to: &Node,
        report: &mut Report,
    ) -> Result<String> {
        let (name, uid) = (self.watched.pod.name.clone(), self.watched.pod.uid.clone());
        let change = "PATH=/bin; mkdir -p /srv/disk/kept; echo one >>/srv/disk/kept/one";
        let shell = [
            "exec", &name, "-c", "writer", "--", "/bin/sh", "-ec", change,
        ];
        kubectl.run(&shell)?;
        let from = self.at(lab, true)?;
        let before = entries(from, &uid)?;
        let begun = Instant::now();
        annotate(kubectl, &name, &worker::name(to))?;
        let ended = ended(lab, kubectl, movers, &uid)?;
        let result = ended["status"]["result"].as_str();
        ensure!(result == Some("Succeeded"), "it ended otherwise: {ended}");
        let took = round(begun.elapsed().as_secs_f64());
        let mut moved = annotated::moved(from, &ended)?;
        self.watched.check_moved(lab, kubectl, to)?;
        let blackout = millis(self.watched.clients.blackout_since(begun)?);
        moved.blackout_ms = Some(blackout);
        let downtime = moved.downtime_ms;
        report.push(moved);
        report.figure_series("from the annotation to the end, s", took);
        report.figure_series("blackout, ms", blackout);
        let status = &ended["status"];
        let containers = status["containers"].as_array().map_or(0, Vec::len);
        ensure!(
            containers == 3,
            "the status tells of {containers}: {status}"
        );
        compare(&before, &entries(to, &self.watched.pod.uid)?)
            .context("what the writer does not write")?;
        self.check_inside(kubectl)?;
        Ok(format!(
            "at {}, {took} s, stood still for {downtime:?} ms, blackout {blackout} ms",
            worker::name(to)
        ))
    }

    /// Its containers are what they were to each other.
    fn check_inside(&mut self, kubectl: &Kubectl) -> Result<()> {
        let name = self.watched.pod.name.clone();
        let inner = inner_connection(kubectl, &name)?;
        ensure!(
            inner == self.inner,
            "the connection over loopback was {}, and is {inner}",
            self.inner
        );
        until("the inner client is answered", POD_TIME_MAX, || {
            let answers = answers(kubectl, &name)?;
            ensure!(ANSWERS_MIN < answers, "it has printed {answers}");
            Ok(())
        })?;
        let pages = self.writer.verify().context("its memory, and its files")?;
        ensure!(0 < pages, "the writer has no memory");
        Ok(())
    }

    /// Has it move, and kills somebody when the first of its containers has come.
    fn suffer(
        &mut self,
        lab: &mut Lab,
        kubectl: &Kubectl,
        movers: &mut Movers,
        blow: Blow,
        report: &mut Report,
    ) -> Result<String> {
        let pod = self.watched.pod.clone();
        let (to, to_name) = {
            let node = self.other(lab)?;
            (node.name().to_owned(), worker::name(node))
        };
        annotate(kubectl, &pod.name, &to_name)?;
        let held = until("a container has come, and is held", POD_TIME_MAX, || {
            holders(lab.node(&to)?)?
                .first()
                .copied()
                .context("none is held")
        })?;
        match blow {
            Blow::Holder => {
                let kill = format!("kill -KILL {held}");
                lab.node(&to)?.command("sh")?.args(["-c", &kill]).run()?;
            }
            Blow::Daemon => {
                lab.daemon(&to)?.kill()?;
                lab.restart_daemon(&to)?;
            }
        }
        let status = ended(lab, kubectl, movers, &pod.uid)?["status"].take();
        let result = status["result"].as_str().unwrap_or_default().to_owned();
        let name = match result.starts_with("Succeeded") {
            true => status["newPod"]["name"].as_str().unwrap_or_default(),
            false => &pod.name,
        };
        self.watched.pod = Placed::wait(kubectl, name)?;
        check_once(lab, kubectl)?;
        self.watched.clients.wait_for_writes(WRITES_AFTER)?;
        self.check_inside(kubectl)?;
        annotated::wait_ready(lab, kubectl, movers)?;
        report.figure_series("results", &*result);
        if result == "SucceededWithoutRestore" {
            report.fail(format!("{blow:?}: the pod began anew"));
        }
        let reason = status["reason"].as_str().unwrap_or_default();
        Ok(format!(
            "{result} {reason}, it is at {}",
            self.watched.pod.node
        ))
    }
}

/// Whether each of its processes runs once, at all nodes together, of one pod.
fn check_once(lab: &Lab, kubectl: &Kubectl) -> Result<()> {
    until("the pod is there once", POD_TIME_MAX, || {
        let listed = kubectl.json(&["get", "pods", &format!("--selector=app={NAME}")])?;
        let pods = listed["items"].as_array().map_or(0, Vec::len);
        ensure!(pods == 1, "there are {pods} pods");
        for process in PROCESSES {
            let pids = lab.nodes.iter();
            let pids: Vec<_> = pids.map(|node| node.processes_named(process)).collect();
            let running: usize = pids.iter().map(Vec::len).sum();
            ensure!(running == 1, "{process} runs as {pids:?}");
        }
        Ok(())
    })
}

/// The processes that stand for containers at a node.
fn holders(node: &Node) -> Result<Vec<i32>> {
    let Ok(entries) = fs::read_dir(node.path(HELD)) else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for entry in entries.flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let holder: Option<i32> = text.split(' ').next().and_then(|pid| pid.parse().ok());
        all.extend(holder);
    }
    Ok(all)
}

/// What Redis calls the client that asks it over the pod's loopback: a new one has another number.
fn inner_connection(kubectl: &Kubectl, pod: &str) -> Result<u64> {
    let list = ["exec", pod, "-c", "redis", "--", CLIENT, "CLIENT", "LIST"];
    until("the inner client is connected", POD_TIME_MAX, || {
        let listed = kubectl.run(&list)?;
        let inner = listed
            .lines()
            .find(|line| line.contains(" addr=127.0.0.1:") && line.contains(" cmd=incr "));
        let inner = inner.with_context(|| format!("no client over loopback: {listed}"))?;
        let mut words = inner.split(' ');
        let id = words.find_map(|word| word.strip_prefix("id=")?.parse().ok());
        id.with_context(|| format!("a client without a number: {inner}"))
    })
}

/// How many answers the client in the pod has printed there, each one more than the one before.
fn answers(kubectl: &Kubectl, pod: &str) -> Result<usize> {
    let log = kubectl.run(&["logs", pod, "-c", "asks"])?;
    let answers = log.lines().map(|line| line.trim().parse::<u64>());
    let answers = answers.collect::<Result<Vec<_>, _>>();
    let answers = answers.with_context(|| format!("it has printed something else: {log:.200}"))?;
    let jump = answers.windows(2).find(|pair| pair[0] + 1 != pair[1]);
    ensure!(jump.is_none(), "it has printed {jump:?}");
    Ok(answers.len())
}

/// What is in the emptyDir, but for what the writer writes.
fn entries(node: &Node, uid: &str) -> Result<Entries> {
    let written = FOLDER.rsplit('/').next().unwrap_or_default();
    let path: PathBuf = volume(node, uid, "files");
    describe_but(&path, &[written])
}

fn annotate(kubectl: &Kubectl, pod: &str, to: &str) -> Result<()> {
    let wish = format!("pageferry.dev/migrate-to={to}");
    let annotate = ["annotate", "--overwrite", "pod", pod, &wish];
    kubectl.run(&annotate).map(drop)
}

/// Waits for the end of the newest move of a pod of this UID. A controller that cannot keep its
/// lease ends, and is started again.
fn ended(lab: &Lab, kubectl: &Kubectl, movers: &mut Movers, uid: &str) -> Result<Value> {
    until("the move ends", END_TIME_MAX, || {
        movers.revive(lab)?;
        let newest = newest(kubectl, uid)?;
        match newest["status"]["result"].is_string() {
            true => Ok(newest),
            false => bail!("it is at {}", newest["status"]),
        }
    })
}

/// The newest move of a pod of this UID.
fn newest(kubectl: &Kubectl, uid: &str) -> Result<Value> {
    let sorted = ["get", "migrations", "--sort-by=.metadata.creationTimestamp"];
    let listed = kubectl.json(&sorted)?;
    let all = listed["items"].as_array().context("a list")?;
    let mut of_pod = all.iter().filter(|one| one["spec"]["pod"]["uid"] == *uid);
    let newest = of_pod.next_back().context("there is no Migration yet")?;
    Ok(newest.clone())
}

fn shop(node: &str, writer: &[String]) -> Value {
    let mut pod = server(NAME, node);
    let redis = pod["spec"]["containers"][0].take();
    let container = |name: &str, image: &str, command: &[String]| {
        json!({
            "name": name,
            "image": image,
            "imagePullPolicy": "Never",
            "command": command,
            "resources": redis["resources"],
        })
    };
    let asks = [CLIENT, "-r", "-1", "-i", "0.01", "INCR", "inner"].map(str::to_owned);
    let asks = container("asks", "localhost/redis:1", &asks);
    let mut writer = container("writer", IMAGE, writer);
    let disk = FOLDER.rsplit_once('/').unwrap_or_default().0;
    writer["volumeMounts"] = json!([{"name": "files", "mountPath": disk}]);
    let mut redis = redis;
    redis["volumeMounts"] = json!([{"name": "files", "mountPath": "/mnt"}]);
    // Nobody asks Redis before it listens.
    pod["spec"]["containers"] = json!([redis, writer, asks]);
    pod["spec"]["volumes"] = json!([{"name": "files", "emptyDir": {}}]);
    pod
}

const NAME: &str = "shop";
const PROCESSES: [&str; 3] = ["redis-server", "redis-cli", "lab-writer"];
const HELD: &str = "/run/pageferry/oci/held/k8s.io";
const IMAGE: &str = "localhost/writer:1";
const IMAGE_FILE: &str = "/srv/shared/writer.oci.tar";
const BYTES: u64 = 64 << 20; // 64 MiB
const MEMORY: usize = 8 << 20; // 8 MiB
const ANSWERS_MIN: usize = 100;
/// A quarter of a second of the load.
const WRITES_AFTER: u64 = 3_000;
const END_TIME_MAX: Duration = Duration::from_secs(300);
