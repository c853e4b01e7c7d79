//! A pod that its kubelet asks by HTTP each second, and ends when one answer is late, moves all
//! the same: by itself; with the API server gone from the commit on; and with a target that says
//! nothing for a minute after the commit, so that a fence is waited for.
//!
//! Each time the kubelet at the source ends and begins what stands still there. What a container
//! says when it begins is counted in the pod's log: nothing begins a second time, anywhere.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::annotated;
use super::faults::{Stopped, wait_for_phase};
use super::pods::{POD_TIME_MAX, Placed, check_gone, pod, successor};
use super::report::Report;
use crate::client::http::Requests;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::wait::until;
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::containerd::import;
use crate::lab::node::Node;
use crate::mover::outcome::millis;
use crate::workload::containerd::make_image;
use crate::workload::nginx;

/// The part of the scenario `kubernetes`.
pub fn run(
    lab: &mut Lab,
    cluster: &mut Cluster,
    laps: &mut Laps,
    report: &mut Report,
) -> Result<()> {
    let mut movers = Movers::start(lab, &cluster.kubectl, 2)?;
    annotated::wait_ready(lab, &cluster.kubectl, &mut movers)?;
    bring_image(lab)?;
    laps.lap("controllers and agents are up, and the image is there");
    let served = server(&worker::name(&lab.nodes[0]));
    cluster.kubectl.apply(&served.to_string())?;
    let pod = Placed::wait(&cluster.kubectl, SERVER)?;
    let mut course = Course {
        requests: Some(requests(lab, &pod)?),
        pod,
        movers,
    };
    laps.lap("a pod with eager probes is ready, and has clients");
    course.plainly(lab, cluster, report)?;
    laps.lap("it has moved");
    course.without_server(lab, cluster, report)?;
    laps.lap("it has moved, with the API server gone from the commit on");
    // They do not wait for a minute.
    course.end_clients(report)?;
    course.without_target(lab, cluster, report)?;
    laps.lap("it has moved, after a fence was waited for");
    let violations = course.movers.wait_revived(lab)?;
    let written = course.movers.violations_written(lab)?;
    report.figure("rules seen broken", violations);
    ensure!(
        violations == 0 && written == 0,
        "rules were seen broken: {violations} by those that go on, {written} as logs say"
    );
    annotated::say(&cluster.kubectl)?;
    course.end_clients(report)?;
    let name = &course.pod.name;
    let delete = ["delete", "pod", name, "--timeout=60s"];
    cluster.kubectl.run(&delete)?;
    Ok(())
}

/// A pod that moves, and its clients.
struct Course {
    pod: Placed,
    requests: Option<Requests>,
    movers: Movers,
}

/// A move that is under way.
struct Going<'a> {
    from: &'a Node,
    to: &'a Node,
    /// How many moves of the pod there were before.
    known: usize,
}

impl Course {
    /// As any pod.
    fn plainly(&mut self, lab: &Lab, cluster: &Cluster, report: &mut Report) -> Result<()> {
        self.clients()?.mark();
        let going = self.ask(lab, &cluster.kubectl)?;
        self.end(lab, &cluster.kubectl, &going, report)?;
        let silence = millis(self.clients()?.silence());
        report.figure("longest silence of all clients, ms", silence);
        Ok(())
    }

    /// The API server goes when it is committed, and is away for [`AWAY`]: nobody can delete the
    /// pod that it was, and its kubelet has it to run.
    fn without_server(
        &mut self,
        lab: &mut Lab,
        cluster: &mut Cluster,
        report: &mut Report,
    ) -> Result<()> {
        let (held, known) = self.commit(lab, cluster)?;
        let going = self.going(lab, known)?;
        let (pod, begun) = (self.pod.clone(), Instant::now());
        cluster.without_server(lab, || {
            drop(held);
            let mut is_over = false;
            while begun.elapsed() < AWAY {
                self.check_begun(going.from, &pod)?;
                is_over |= count(going.from) == 0 && count(going.to) == PROCESSES;
                sleep(LOOK);
            }
            ensure!(
                is_over && self.clients()?.wait_for_answers(ANSWERS),
                "it does not run at the target with the API server away: {} processes at the \
                 source, {} there",
                count(going.from),
                count(going.to)
            );
            Ok(())
        })?;
        self.end(lab, &cluster.kubectl, &going, report)
    }

    /// The target says nothing for [`SILENT`] after the commit, and the source cannot know who
    /// runs.
    fn without_target(
        &mut self,
        lab: &mut Lab,
        cluster: &mut Cluster,
        report: &mut Report,
    ) -> Result<()> {
        let (held, known) = self.commit(lab, cluster)?;
        let going = self.going(lab, known)?;
        let (pod, begun) = (self.pod.clone(), Instant::now());
        while begun.elapsed() < SILENT {
            self.check_begun(going.from, &pod)?;
            sleep(LOOK);
        }
        let status = self.status(&cluster.kubectl, &going)?;
        println!(
            "after {} s the Migration says {}: {}",
            begun.elapsed().as_secs(),
            status["reason"],
            status["message"]
        );
        ensure!(
            status["result"].is_null(),
            "it ended with a target that said nothing: {status}"
        );
        self.say_kubelet(&cluster.kubectl)?;
        drop(held);
        self.end(lab, &cluster.kubectl, &going, report)?;
        self.requests = Some(requests(lab, &self.pod)?);
        Ok(())
    }

    fn clients(&self) -> Result<&Requests> {
        self.requests.as_ref().context("it has clients")
    }

    /// Ends the clients, who must all have been answered.
    fn end_clients(&mut self, report: &mut Report) -> Result<()> {
        let seen = self.requests.take().context("it has clients")?.finish()?;
        report.figure_series("connections answered", seen.answers);
        report.broken_connections += seen.failed;
        for failure in seen.failures {
            report.fail(format!("request: {failure}"));
        }
        Ok(())
    }

    /// Has it move to the other node.
    fn ask<'a>(&self, lab: &'a Lab, kubectl: &Kubectl) -> Result<Going<'a>> {
        let known = migrations(kubectl, &self.pod.uid)?.len();
        let going = self.going(lab, known)?;
        let wish = format!("pageferry.dev/migrate-to={}", worker::name(going.to));
        let annotate = ["annotate", "--overwrite", "pod", &self.pod.name, &wish];
        kubectl.run(&annotate)?;
        Ok(going)
    }

    fn going<'a>(&self, lab: &'a Lab, known: usize) -> Result<Going<'a>> {
        let here = |node: &&Node| worker::name(node) == self.pod.node;
        let from = lab.nodes.iter().find(here);
        let to = lab.nodes.iter().find(|node| !here(node));
        Ok(Going {
            from: from.context("the pod is at a node of the lab")?,
            to: to.context("there is another node")?,
            known,
        })
    }

    /// Has it move until the source has committed, and the target does not hear of it until what
    /// this answers with is dropped; with how many moves there were before. A phase that passes
    /// unseen is tried again.
    fn commit(&mut self, lab: &mut Lab, cluster: &Cluster) -> Result<(Stopped, usize)> {
        for _ in 0..ATTEMPTS_MAX {
            let (from, to, known) = {
                let going = self.ask(lab, &cluster.kubectl)?;
                (
                    going.from.name().to_owned(),
                    going.to.name().to_owned(),
                    going.known,
                )
            };
            let workload = format!("pod/{}", self.pod.uid);
            if let Some(held) = hold(lab, &workload, (&from, &to))? {
                return Ok((held, known));
            }
            let going = self.going(lab, known)?;
            let ended = self.ended(lab, &cluster.kubectl, &going)?;
            println!("not met at the commit: {}", ended["status"]["reason"]);
            if ended["status"]["result"] == "Succeeded" {
                self.pod = Placed::wait(&cluster.kubectl, &successor(&self.pod.name))?;
            }
        }
        bail!("the commit was not met in {ATTEMPTS_MAX} moves")
    }

    /// It has ended well, and runs once.
    fn end(
        &mut self,
        lab: &Lab,
        kubectl: &Kubectl,
        going: &Going<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let ended = self.ended(lab, kubectl, going)?;
        let status = &ended["status"];
        ensure!(status["result"] == "Succeeded", "it ended as {status}");
        report.push(annotated::moved(going.from, &ended)?);
        let frozen = status["budget"]["frozenMs"].as_i64();
        ensure!(
            frozen == Some(FROZEN_MS),
            "its probes let it stand still for {FROZEN_MS} ms, and the Migration says {frozen:?}"
        );
        let new = Placed::wait(kubectl, &successor(&self.pod.name))?;
        let object = kubectl.json(&["get", "pod", &new.name])?;
        let containers = &object["status"]["containerStatuses"];
        ensure!(containers[0]["restartCount"] == 0, "it is {containers}");
        let began = begun(going.to, &new);
        ensure!(began == 0, "{} began there {began} times", new.name);
        until(
            "nothing is left of the pod that it was",
            POD_TIME_MAX,
            || check_gone(going.from, &self.pod.uid),
        )?;
        let (left, there) = (count(going.from), count(going.to));
        ensure!(
            left == 0 && there == PROCESSES,
            "{left} processes are at the source, {there} at the target"
        );
        println!("{} runs once, at {}", new.name, new.node);
        self.pod = new;
        Ok(())
    }

    /// The newest Migration of the pod, when it has ended.
    fn ended(&mut self, lab: &Lab, kubectl: &Kubectl, going: &Going<'_>) -> Result<Value> {
        until("the move ends", END_TIME_MAX, || {
            self.movers.revive(lab)?;
            let newest = self.newest(kubectl, going)?;
            let result = &newest["status"]["result"];
            ensure!(result.is_string(), "it is at {}", newest["status"]);
            Ok(newest)
        })
    }

    fn status(&self, kubectl: &Kubectl, going: &Going<'_>) -> Result<Value> {
        Ok(self.newest(kubectl, going)?["status"].take())
    }

    fn newest(&self, kubectl: &Kubectl, going: &Going<'_>) -> Result<Value> {
        let mut all = migrations(kubectl, &self.pod.uid)?;
        ensure!(going.known < all.len(), "there is no Migration yet");
        all.pop().context("there is one")
    }

    /// Nothing has begun at the source since the pod did, if that came not from elsewhere.
    fn check_begun(&self, from: &Node, pod: &Placed) -> Result<()> {
        let most = usize::from(pod.name == SERVER);
        let began = begun(from, pod);
        ensure!(
            began <= most,
            "the pod {} that stands still began anew: {began} times in all",
            pod.name
        );
        Ok(())
    }

    /// What the kubelet made of a pod that does not answer, and did.
    fn say_kubelet(&self, kubectl: &Kubectl) -> Result<()> {
        let of_pod = format!("--field-selector=involvedObject.uid={}", self.pod.uid);
        let columns = "--output=custom-columns=REASON:.reason,COUNT:.count,NOTE:.message";
        println!("{}", kubectl.run(&["get", "events", &of_pod, columns])?);
        Ok(())
    }
}

/// Meets a move at its commit: the source is stopped while the target restores, the target when it
/// is ready, and then the source goes on. None when a phase passed unseen.
fn hold(lab: &mut Lab, workload: &str, (from, to): (&str, &str)) -> Result<Option<Stopped>> {
    if wait_for_phase(lab, workload, (to, "restoring"))?.is_none() {
        return Ok(None);
    }
    let mut source = Stopped::default();
    source.stop(lab, from)?;
    if wait_for_phase(lab, workload, (to, "ready"))?.is_none() {
        return Ok(None);
    }
    let mut target = Stopped::default();
    target.stop(lab, to)?;
    drop(source);
    let committed = wait_for_phase(lab, workload, (from, "committed"))?;
    Ok(committed.map(|_| target))
}

/// How often a container of a pod began at a node, by what it says then.
fn begun(node: &Node, pod: &Placed) -> usize {
    let folder = format!("/var/log/pods/default_{}_{}/{CONTAINER}", pod.name, pod.uid);
    let logs = std::fs::read_dir(node.path(folder));
    let logs = logs.into_iter().flatten().flatten();
    let texts = logs.filter_map(|log| std::fs::read_to_string(log.path()).ok());
    let lines = |text: String| text.lines().filter(|line| line.ends_with(BEGUN)).count();
    texts.map(lines).sum()
}

fn count(node: &Node) -> usize {
    node.processes_named(PROCESS).len()
}

/// All moves of the pod of this UID, the newest last.
fn migrations(kubectl: &Kubectl, uid: &str) -> Result<Vec<Value>> {
    let sorted = ["get", "migrations", "--sort-by=.metadata.creationTimestamp"];
    let listed = kubectl.json(&sorted)?;
    let mut all = listed["items"].as_array().cloned().unwrap_or_default();
    all.retain(|one| one["spec"]["pod"]["uid"] == *uid);
    Ok(all)
}

fn requests(lab: &Lab, pod: &Placed) -> Result<Requests> {
    let target = SocketAddr::from((pod.address, nginx::PORT));
    let requests = Requests::start(&lab.client.net, target, CONNECTIONS_PER_SECOND)?;
    ensure!(requests.wait_for_answers(ANSWERS), "nginx does not answer");
    Ok(requests)
}

fn bring_image(lab: &Lab) -> Result<()> {
    nginx::write_files(lab)?;
    let first = lab.nodes.first().context("a lab has nodes")?;
    let files = ["nginx.conf", "blob"].map(|name| format!("{}/{name}", nginx::FOLDER));
    let programs = PROGRAMS.map(str::to_owned);
    make_image(first, IMAGE, IMAGE_FILE, &[&programs[..], &files].concat())?;
    for node in &lab.nodes {
        import(node, worker::NAMESPACE, IMAGE_FILE)?;
    }
    Ok(())
}

fn server(node: &str) -> Value {
    let start = format!(
        "/bin/mkdir -p /var/lib/nginx /var/log/nginx; echo {BEGUN}; exec {} -c {}/nginx.conf",
        nginx::PROGRAM,
        nginx::FOLDER
    );
    let mut pod = pod(
        SERVER,
        node,
        &["/bin/sh".to_owned(), "-c".to_owned(), start],
    );
    let container = &mut pod["spec"]["containers"][0];
    container["name"] = json!(CONTAINER);
    container["image"] = json!(IMAGE);
    let get = json!({"path": "/echo/0", "port": nginx::PORT});
    container["readinessProbe"] = json!({"httpGet": get, "periodSeconds": 1});
    container["livenessProbe"] = json!({
        "httpGet": get, "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 1,
        "initialDelaySeconds": 2,
    });
    pod
}

const SERVER: &str = "eager";
const CONTAINER: &str = "web";
const PROCESS: &str = "nginx";
/// A master and two workers.
const PROCESSES: usize = 3;
/// What the container says when it begins.
const BEGUN: &str = "begun";
const PROGRAMS: [&str; 5] = [
    nginx::PROGRAM,
    "/bin/sh",
    "/bin/mkdir",
    "/etc/passwd",
    "/etc/group",
];
const IMAGE: &str = "localhost/eager:1";
const IMAGE_FILE: &str = "/srv/shared/eager.oci.tar";
const CONNECTIONS_PER_SECOND: u32 = 100;
/// Half a second of them.
const ANSWERS: u64 = 50;
/// Three quarters of the second that its probe leaves it.
const FROZEN_MS: i64 = 750;
const AWAY: Duration = Duration::from_secs(30);
const SILENT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);
const ATTEMPTS_MAX: usize = 6;
/// Another controller leads after 15 s, and an agent counts as silent after 30 s.
const END_TIME_MAX: Duration = Duration::from_secs(180);
