//! A pod moves to and fro while whoever takes part is killed: the controller that leads, an agent,
//! a daemon, containerd, a kubelet, each at a random moment of a move; in the middle the API server
//! is away for half a minute; at last all agents are replaced while a pod is being filled.
//!
//! Who and when comes from a seed, which is printed, and which `KILLS_SEED` says. After each move
//! the pod runs once, at one node, and its clients are still connected; no rule was seen broken.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::annotated;
use super::faults::wait_for_phase;
use super::pods::{POD_TIME_MAX, Placed, Watched};
use super::report::Report;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::wait::until;
use crate::cluster::{Cluster, worker};
use crate::content::Generator;
use crate::lab::Lab;

/// How often it moves, unless it is said.
pub const MOVES: usize = 30;

/// The part of the scenario `kubernetes`.
pub fn run(
    lab: &mut Lab,
    cluster: &mut Cluster,
    laps: &mut Laps,
    report: &mut Report,
    moves: usize,
) -> Result<()> {
    let seed = std::env::var("KILLS_SEED").ok();
    let seed = seed.map_or(Ok(1), |seed| seed.parse());
    let seed: u64 = seed.context("KILLS_SEED is a number")?;
    println!("seed {seed}");
    let movers = Movers::start(lab, &cluster.kubectl, 2)?;
    let mut course = Course {
        watched: Watched::start_with(lab, &cluster.kubectl, &lab.nodes[0], SERVER, BYTES)?,
        generator: Generator(seed),
        movers,
        filled: false,
        results: BTreeMap::new(),
    };
    annotated::wait_ready(lab, &cluster.kubectl, &mut course.movers)?;
    laps.lap("controllers and agents are up, and the pod of Redis has clients");
    for number in 1..=moves {
        let what = match number {
            _ if number == moves => Blow::Update,
            _ if number == moves.div_ceil(2) => Blow::Away,
            _ => Blow::Kill(course.choose(lab.nodes.len())),
        };
        let said = course.suffer(lab, cluster, what, report);
        let said = said.with_context(|| format!("move {number} of seed {seed}, {what:?}"))?;
        println!("move {number}: {said}");
    }
    for _ in 0..UPDATES_MAX {
        if course.filled {
            break;
        }
        let said = course.suffer(lab, cluster, Blow::Update, report)?;
        println!("the fill was over before it was met, so once more: {said}");
    }
    report.figure("agents were replaced during a fill", course.filled);
    if !course.filled {
        report.fail("no fill was met");
    }
    for (result, count) in &course.results {
        report.figure(&format!("moves that ended as {result}"), *count);
    }
    laps.lap("it has moved while others were killed");
    let violations = course.movers.wait_revived(lab)?;
    let written = course.movers.violations_written(lab)?;
    report.figure("rules seen broken", violations);
    if 0 < violations || 0 < written {
        report.fail(format!(
            "rules were seen broken: {violations} by those that go on, {written} as logs say"
        ));
    }
    let pod = course.watched.finish(report)?;
    laps.lap("all that was written is there");
    let kubectl = &cluster.kubectl;
    kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    Ok(())
}

/// What comes between in a move.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// Somebody is killed, so many milliseconds after the annotation, and started again.
    Kill((Victim, u64)),
    /// The API server is not there for a while.
    Away,
    /// All agents end, and others come, while the pod is filled.
    Update,
}

/// Who is killed: of those that each node has, of the node of this index.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// The controller that leads.
    Leader,
    Agent(usize),
    Daemon(usize),
    Engine(usize),
    Kubelet(usize),
}

struct Course {
    watched: Watched,
    generator: Generator,
    movers: Movers,
    /// Agents were replaced while a pod was filled.
    filled: bool,
    /// How often a move ended so.
    results: BTreeMap<String, u64>,
}

impl Course {
    fn choose(&mut self, nodes: usize) -> (Victim, u64) {
        let node = self.generator.below(nodes as u64) as usize;
        let victim = match self.generator.below(5) {
            0 => Victim::Leader,
            1 => Victim::Agent(node),
            2 => Victim::Daemon(node),
            3 => Victim::Engine(node),
            _ => Victim::Kubelet(node),
        };
        (victim, self.generator.below(MOMENTS_MS))
    }

    /// Has the pod move, with something between; what became of that.
    fn suffer(
        &mut self,
        lab: &mut Lab,
        cluster: &mut Cluster,
        blow: Blow,
        report: &mut Report,
    ) -> Result<String> {
        let pod = self.watched.pod.clone();
        let mut others = lab.nodes.iter().map(worker::name);
        let to = others.find(|name| *name != pod.node);
        let to = to.context("there is another node")?;
        let known = migrations(&cluster.kubectl, &pod.uid)?.len();
        let begun = Instant::now();
        let wish = format!("pageferry.dev/migrate-to={to}");
        let annotate = ["annotate", "--overwrite", "pod", &pod.name, &wish];
        cluster.kubectl.run(&annotate)?;
        self.strike(lab, cluster, blow, (&pod, &to))?;
        let status = until("the move ends", END_TIME_MAX, || {
            self.movers.revive(lab)?;
            let status = status(&cluster.kubectl, &pod.uid, known)?;
            match status["result"].is_string() {
                true => Ok(status),
                false => bail!("it is at {status}"),
            }
        })?;
        let took = begun.elapsed().as_secs_f64();
        let result = status["result"].as_str().unwrap_or_default();
        let name = match result.starts_with("Succeeded") {
            true => status["newPod"]["name"].as_str().unwrap_or_default(),
            false => &pod.name,
        };
        self.watched.pod = Placed::wait(&cluster.kubectl, name)?;
        self.check_once(lab, &cluster.kubectl)?;
        self.watched.clients.wait_for_writes(WRITES_AFTER)?;
        self.movers.wait_revived(lab)?;
        annotated::wait_labels(lab, &cluster.kubectl)?;
        *self.results.entry(result.to_owned()).or_default() += 1;
        let reason = status["reason"].as_str().unwrap_or_default();
        if result == "SucceededWithoutRestore" {
            report.fail(format!("{blow:?}: the pod began anew: {reason}"));
        }
        Ok(format!(
            "{blow:?}: {result} {reason} after {took:.1} s, it runs at {}",
            self.watched.pod.node
        ))
    }

    /// Does it, some time after the annotation.
    fn strike(
        &mut self,
        lab: &mut Lab,
        cluster: &mut Cluster,
        blow: Blow,
        (pod, to): (&Placed, &str),
    ) -> Result<()> {
        match blow {
            Blow::Kill((victim, after)) => {
                sleep(Duration::from_millis(after));
                self.kill(lab, cluster, victim)?;
            }
            Blow::Away => {
                sleep(Duration::from_millis(self.generator.below(MOMENTS_MS)));
                cluster.without_server(lab, || {
                    sleep(AWAY);
                    Ok(())
                })?;
            }
            Blow::Update => {
                let there = lab.nodes.iter().find(|node| worker::name(node) == to);
                let there = there.context("it is a node of the lab")?.name();
                let workload = format!("pod/{}", pod.uid);
                let filled = wait_for_phase(lab, &workload, (there, "running"))?;
                self.filled |= filled.is_some();
                self.movers.replace_agents(lab)?;
            }
        }
        Ok(())
    }

    /// Whether it runs once: one pod, and one process of it at all nodes.
    fn check_once(&self, lab: &Lab, kubectl: &Kubectl) -> Result<()> {
        let name = &self.watched.pod.name;
        let pod = kubectl.json(&["get", "pod", name])?;
        let containers = &pod["status"]["containerStatuses"];
        ensure!(
            containers[0]["restartCount"] == 0,
            "{name} was started anew: {containers}"
        );
        until("the pod is there once", POD_TIME_MAX, || {
            let listed = kubectl.json(&["get", "pods", &format!("--selector=app={SERVER}")])?;
            let pods = listed["items"].as_array().map_or(0, Vec::len);
            let pids = lab.nodes.iter();
            let pids: Vec<_> = pids
                .map(|node| node.processes_named(PROCESS).len())
                .collect();
            let running: usize = pids.iter().sum();
            ensure!(pods == 1 && running == 1, "{pods} pods, processes {pids:?}");
            Ok(())
        })
    }

    fn kill(&mut self, lab: &mut Lab, cluster: &mut Cluster, victim: Victim) -> Result<()> {
        match victim {
            Victim::Leader => {
                let lease = ["get", "lease", "--namespace=pageferry-system", LEASE];
                let lease = cluster.kubectl.json(&lease)?;
                let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
                let index = holder
                    .rsplit_once('-')
                    .and_then(|(_, index)| index.parse().ok());
                let index = index.with_context(|| format!("{holder:?} leads"))?;
                // With it goes what it has counted, but for what it has written.
                self.movers.kill_controller(lab, index)
            }
            Victim::Agent(node) => self.movers.kill_agent(lab, node),
            Victim::Daemon(node) => {
                let name = lab.nodes[node].name().to_owned();
                lab.daemon(&name)?.kill()?;
                lab.restart_daemon(&name)
            }
            Victim::Engine(node) => cluster.engines[node].restart(&lab.nodes[node]),
            Victim::Kubelet(node) => {
                cluster.kubelets[node].kill()?;
                cluster.kubelets[node] = worker::run_kubelet(lab, &lab.nodes[node])?;
                Ok(())
            }
        }
    }
}

/// How the newest move of a pod of this UID stands, of more than were `known`.
fn status(kubectl: &Kubectl, uid: &str, known: usize) -> Result<Value> {
    let all = migrations(kubectl, uid)?;
    ensure!(known < all.len(), "there is no Migration yet");
    let newest = all.last().context("there is one")?;
    Ok(newest["status"].clone())
}

/// All moves of a pod of this UID, the newest last.
fn migrations(kubectl: &Kubectl, uid: &str) -> Result<Vec<Value>> {
    let sorted = ["get", "migrations", "--sort-by=.metadata.creationTimestamp"];
    let listed = kubectl.json(&sorted)?;
    let all = listed["items"].as_array().cloned().unwrap_or_default();
    let of_pod = all
        .into_iter()
        .filter(|one| one["spec"]["pod"]["uid"] == *uid);
    Ok(of_pod.collect())
}

const SERVER: &str = "redis";
const PROCESS: &str = "redis-server";
const LEASE: &str = "pageferry-controller";
/// Values alone: they are filled for long enough to be met.
const BYTES: u64 = 256 << 20; // 256 MiB
/// A move takes about so long.
const MOMENTS_MS: u64 = 6_000;
const AWAY: Duration = Duration::from_secs(30);
/// Another controller leads after 15 s, and an agent counts as silent after 30 s.
const END_TIME_MAX: Duration = Duration::from_secs(300);
const WRITES_AFTER: u64 = 3_000;
/// So often it is tried again to meet a fill.
const UPDATES_MAX: usize = 3;
