//! Moves that do not happen: to a node that is cordoned, full, without the image or without what
//! pods need to come; and those that somebody gives up, in every phase. Each time the pod serves
//! on where it is, and the Migration says why.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::annotated::wait_ready;
use super::drain::watch_lightly;
use super::pods::{POD_TIME_MAX, Placed, Watched, pod, server, successor};
use super::report::Report;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::{Movers, built};
use crate::cluster::wait::until;
use crate::cluster::watching::{Event, Watching};
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::workload::redis;

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 2)?;
    wait_ready(lab, kubectl, &mut movers)?;
    let [from, to] = [&lab.nodes[0], &lab.nodes[1]];
    kubectl.apply(&server(NAME, &worker::name(from)).to_string())?;
    let watched = watch_lightly(lab, kubectl, NAME)?;
    laps.lap("controllers and agents are up, and a pod has clients");
    let case = Case {
        kubectl,
        watched: &watched,
        to,
    };
    case.cordoned()?;
    case.full()?;
    case.without_wrapper()?;
    case.without_image()?;
    laps.lap("four nodes that do not take it are refused");
    wait_ready(lab, kubectl, &mut movers)?;
    case.cancelled_waiting()?;
    case.cancelled_copying()?;
    case.cancelled_placing()?;
    laps.lap("it was cancelled while it waited, copied, and was placed");
    let moved = case.cancelled_moving()?;
    report.figure("cancelled at the hand-over: it moved", moved);
    let pod = watched.finish(report)?;
    let name = if moved {
        successor(&pod.name)
    } else {
        pod.name
    };
    kubectl.run(&["delete", "pod", &name, "--timeout=60s"])?;
    laps.lap("it was cancelled at the hand-over, and ran once");
    movers.check()
}

struct Case<'a> {
    kubectl: &'a Kubectl,
    watched: &'a Watched,
    to: &'a Node,
}

impl Case<'_> {
    fn cordoned(&self) -> Result<()> {
        let node = worker::name(self.to);
        self.kubectl.run(&["cordon", &node])?;
        let refused = self.refused("TargetCordoned");
        self.kubectl.run(&["uncordon", &node])?;
        refused
    }

    fn full(&self) -> Result<()> {
        let node = worker::name(self.to);
        let object = self.kubectl.json(&["get", "node", &node])?;
        let memory = object["status"]["allocatable"]["memory"].as_str();
        let memory = memory.and_then(|text| text.strip_suffix("Ki"));
        let memory: u64 = memory.context("a node has memory, in KiB")?.parse()?;
        let mut filler = pod(FILLER, &node, &redis::plan().arguments);
        let most = format!("{}Ki", memory - LEFT_KIB);
        filler["spec"]["containers"][0]["resources"]["requests"]["memory"] = json!(most);
        self.kubectl.apply(&filler.to_string())?;
        Placed::wait(self.kubectl, FILLER)?;
        let refused = self.refused("TargetFull");
        let gone = ["delete", "pod", FILLER, "--timeout=60s"];
        self.kubectl.run(&gone)?;
        refused
    }

    fn without_wrapper(&self) -> Result<()> {
        let (there, away) = (self.to.path(WRAPPER), self.to.path("/srv/wrapper"));
        fs::rename(&there, &away).context("taking the wrapper away")?;
        let node = worker::name(self.to);
        let refused = until("the node says that it takes none", POD_TIME_MAX, || {
            let node = self.kubectl.json(&["get", "node", &node])?;
            let ready = &node["metadata"]["labels"]["pageferry.dev/ready"];
            ensure!(ready == "false", "it says {ready}");
            Ok(())
        });
        let refused = refused.and_then(|()| self.refused("TargetUnprepared"));
        fs::rename(&away, &there).context("giving the wrapper back")?;
        refused?;
        until("the node takes pods again", POD_TIME_MAX, || {
            let node = self.kubectl.json(&["get", "node", &node])?;
            let ready = &node["metadata"]["labels"]["pageferry.dev/ready"];
            ensure!(ready == "true", "it says {ready}");
            Ok(())
        })
    }

    fn without_image(&self) -> Result<()> {
        let images = |arguments: &[&str]| {
            let all = [&["--namespace", worker::NAMESPACE, "images"], arguments].concat();
            self.to.command("ctr")?.args(all).run().map(drop)
        };
        images(&["tag", IMAGE, KEPT])?;
        images(&["rm", "--sync", IMAGE])?;
        let refused = self.refused("ErrImageNeverPull");
        images(&["tag", KEPT, IMAGE])?;
        images(&["rm", KEPT])?;
        refused
    }

    /// A move that ends by itself, for this reason.
    fn refused(&self, reason: &str) -> Result<()> {
        self.ask()?;
        let ended = self.ended()?;
        let why = (&ended["result"], &ended["reason"]);
        ensure!(
            *why.0 == "Failed" && *why.1 == *reason,
            "it is not {reason}: {ended}"
        );
        println!(
            "{reason}: {}",
            ended["message"].as_str().unwrap_or_default()
        );
        self.serves_on()
    }

    /// It waits for a budget that is not kept.
    fn cancelled_waiting(&self) -> Result<()> {
        let budget = json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": BUDGET},
            "spec": {"minAvailable": 5, "selector": {"matchLabels": {"app": NAME}}},
        });
        self.kubectl.apply(&budget.to_string())?;
        until("the budget is known", POD_TIME_MAX, || {
            let budget = self.kubectl.json(&["get", "poddisruptionbudget", BUDGET])?;
            ensure!(budget["status"]["desiredHealthy"] == 5, "it is {budget}");
            Ok(())
        })?;
        let migrations = self.watch()?;
        self.ask()?;
        let blocked = |event: &Event| {
            let status = &event.object["status"];
            Ok((status["reason"] == "DisruptionBudget").then_some(()))
        };
        migrations.wait("it waits for the budget", POD_TIME_MAX, blocked)?;
        self.cancel(true)?;
        self.cancelled("Waiting")?;
        self.kubectl
            .run(&["delete", "poddisruptionbudget", BUDGET])?;
        Ok(())
    }

    /// The target's daemon says nothing.
    fn cancelled_copying(&self) -> Result<()> {
        let migrations = self.watch()?;
        let stopped = Stopped::new(self.to, "pageferryd")?;
        self.ask()?;
        migrations.wait("it copies", POD_TIME_MAX, at("Copying"))?;
        self.cancel(true)?;
        drop(stopped);
        self.cancelled("Copying")
    }

    /// The target's kubelet does nothing.
    fn cancelled_placing(&self) -> Result<()> {
        let migrations = self.watch()?;
        let stopped = Stopped::new(self.to, "kubelet")?;
        self.ask()?;
        migrations.wait("it is placed", MOVE_TIME_MAX, at("Placing"))?;
        let new = successor(NAME);
        until("the new pod is there", POD_TIME_MAX, || {
            self.kubectl.run(&["get", "pod", &new])
        })?;
        self.cancel(false)?;
        migrations.wait("it is given up", POD_TIME_MAX, at("Aborting"))?;
        drop(stopped);
        self.cancelled("Placing")?;
        self.kubectl
            .run(&["wait", "--for=delete", "pod", &new, "--timeout=60s"])?;
        Ok(())
    }

    /// Whether it moved: the daemons may have been faster.
    fn cancelled_moving(&self) -> Result<bool> {
        let migrations = self.watch()?;
        self.ask()?;
        migrations.wait("it is handed over", MOVE_TIME_MAX, at("Moving"))?;
        let listed = self.kubectl.json(&["get", "migrations"])?;
        let name = listed["items"][0]["metadata"]["name"].as_str();
        let name = name.context("there is a Migration")?;
        let cancel = json!({"spec": {"cancel": true}}).to_string();
        let patch = [
            "patch",
            "migration",
            name,
            "--type=merge",
            "--patch",
            &cancel,
        ];
        self.kubectl.run(&patch)?;
        let ended = self.ended()?;
        match ended["result"].as_str() {
            Some("Cancelled") => self.serves_on().map(|()| false),
            Some("Succeeded") => {
                Placed::wait(self.kubectl, &successor(NAME))?;
                self.watched.clients.wait_for_writes(WRITES_AFTER)?;
                Ok(true)
            }
            _ => bail!("it ended as {ended}"),
        }
    }

    fn watch(&self) -> Result<Watching> {
        Watching::start(self.kubectl, &["migrations"])
    }

    fn ask(&self) -> Result<()> {
        let wish = format!("pageferry.dev/migrate-to={}", worker::name(self.to));
        self.kubectl.run(&["annotate", "pod", NAME, &wish])?;
        Ok(())
    }

    fn cancel(&self, wait: bool) -> Result<()> {
        let command = self.kubectl.plugin(&built("kubectl-migrate")?)?;
        let wait = if wait { &[][..] } else { &["--no-wait"] };
        let command = command.args([NAME, "--cancel"]).args(wait);
        command.run().context("kubectl migrate --cancel")?;
        Ok(())
    }

    /// It has ended so, and nothing of it is left.
    fn cancelled(&self, when: &str) -> Result<()> {
        let ended = self.ended()?;
        ensure!(
            ended["result"] == "Cancelled",
            "{when}: it ended as {ended}"
        );
        println!("cancelled while {when}: {}", ended["message"]);
        self.serves_on()
    }

    /// How the only Migration ended, which is forgotten then.
    fn ended(&self) -> Result<Value> {
        let ended = until("the move has ended", MOVE_TIME_MAX, || {
            let listed = self.kubectl.json(&["get", "migrations"])?;
            let status = &listed["items"][0]["status"];
            ensure!(status["phase"] == "Done", "it is {listed}");
            Ok(status.clone())
        })?;
        let all = ["delete", "migrations", "--all", "--timeout=60s"];
        self.kubectl.run(&all)?;
        Ok(ended)
    }

    /// The pod is the one that it was, ready, never started anew, and answers.
    fn serves_on(&self) -> Result<()> {
        let pod = self.kubectl.json(&["get", "pod", NAME])?;
        let before = &self.watched.pod;
        ensure!(pod["metadata"]["uid"] == *before.uid, "it is another pod");
        let containers = &pod["status"]["containerStatuses"];
        ensure!(
            containers[0]["ready"] == true && containers[0]["restartCount"] == 0,
            "it is {containers}"
        );
        self.watched.clients.wait_for_writes(WRITES_AFTER)
    }
}

/// Looks for a step of a Migration.
fn at(step: &str) -> impl FnMut(&Event) -> Result<Option<()>> {
    let wanted = step.to_owned();
    move |event| {
        let step = &event.object["status"]["course"]["step"];
        ensure!(
            *step != "Ended" || event.deleted,
            "it ended: {}",
            event.object
        );
        Ok((*step == *wanted && !event.deleted).then_some(()))
    }
}

/// A program of a node that stands still until this is dropped.
struct Stopped<'a> {
    node: &'a Node,
    pids: Vec<i32>,
}

impl<'a> Stopped<'a> {
    fn new(node: &'a Node, program: &str) -> Result<Self> {
        let pids = node.processes_named(program);
        ensure!(!pids.is_empty(), "{} has no {program}", node.name());
        let stopped = Self { node, pids };
        for pid in &stopped.pids {
            node.signal(*pid, "STOP")?;
        }
        Ok(stopped)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        for pid in &self.pids {
            // It may have ended.
            let _ = self.node.signal(*pid, "CONT");
        }
    }
}

const NAME: &str = "steady";
const FILLER: &str = "filler";
const BUDGET: &str = "never-kept";
const WRAPPER: &str = "/usr/local/lib/pageferry/pageferry-oci";
const IMAGE: &str = "localhost/redis:1";
const KEPT: &str = "localhost/kept:1";
/// Less than the pod requests.
const LEFT_KIB: u64 = 32 * 1024;
const WRITES_AFTER: u64 = 500;
const MOVE_TIME_MAX: Duration = Duration::from_secs(150);
