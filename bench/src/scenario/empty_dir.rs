//! Pods with volumes of their own move by annotation, there and back: a writer that knows every
//! file of its own by heart, and has some open and mapped; and entries of all kinds that nobody
//! writes meanwhile, compared one by one. One pod has the files on disk and the entries in memory,
//! the other one the other way round.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::annotated;
use super::container_files::{Entries, compare, describe_but};
use super::pods::{POD_TIME_MAX, Placed, check_gone, pod, successor};
use super::report::Report;
use crate::client::writer::WriterClient;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::movers::Movers;
use crate::cluster::wait::until;
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::containerd::import;
use crate::lab::node::Node;
use crate::workload::contained::Plan;
use crate::workload::containerd::make_image;
use crate::writer::case::FILES;
use crate::writer::case::files::FOLDER;
use crate::writer::options::Options;

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut movers = Movers::start(lab, kubectl, 1)?;
    annotated::wait_ready(lab, kubectl, &mut movers)?;
    let mut options = Options::new(MEMORY);
    FILES.name.clone_into(&mut options.case);
    let plan = Plan::writer(&options);
    let first = lab.nodes.first().context("a lab has nodes")?;
    make_image(first, IMAGE, IMAGE_FILE, &plan.programs)?;
    for node in &lab.nodes {
        import(node, worker::NAMESPACE, IMAGE_FILE)?;
    }
    laps.lap("controllers and agents are up, and the image is there");
    for (name, media) in PODS {
        let pod = writer(name, &worker::name(first), media, &plan.arguments);
        kubectl.apply(&pod.to_string())?;
        let pod = Placed::wait(kubectl, name)?;
        let client = WriterClient::connect_to(&lab.client.net, pod.address, POD_TIME_MAX)?;
        let mut course = Course { pod, client };
        for (number, change) in CHANGES.iter().enumerate() {
            let to = &lab.nodes[(number + 1) % lab.nodes.len()];
            let said = course.move_pod(lab, kubectl, (change, to), report);
            let said = said.with_context(|| format!("move {} of {name}", number + 1))?;
            println!("{} -> {}: {said}", course.pod.name, course.pod.node);
            movers.check()?;
        }
        report.note_contents(true);
        kubectl.run(&["delete", "pod", &course.pod.name, "--timeout=60s"])?;
        worker::release(lab, course.pod.address)?;
        laps.lap("a pod has moved with its volumes, there and back");
    }
    until("nothing is left of the pods", POD_TIME_MAX, || {
        lab.nodes.iter().try_for_each(worker::check_no_pods)
    })
}

/// A pod that moves, and its client.
struct Course {
    pod: Placed,
    client: WriterClient,
}

impl Course {
    /// Changes what the writer does not write, moves it, and compares.
    fn move_pod(
        &mut self,
        lab: &Lab,
        kubectl: &Kubectl,
        (change, to): (&str, &Node),
        report: &mut Report,
    ) -> Result<String> {
        let (name, uid) = (self.pod.name.clone(), self.pod.uid.clone());
        let shell = ["exec", &name, "--", "/bin/sh", "-ec", change];
        kubectl.run(&shell)?;
        let mut nodes = lab.nodes.iter();
        let from = nodes.find(|node| worker::name(node) == self.pod.node);
        let from = from.context("it is at a node of the lab")?;
        let (before, sizes) = (entries(from, &uid)?, sizes(from, &uid)?);
        let ended = annotated::annotate(kubectl, (&name, &uid), to)?;
        report.push(annotated::moved(from, &ended)?);
        let new = successor(&name);
        let pod = Placed::wait(kubectl, &new)?;
        ensure!(pod.node == worker::name(to), "{new} is at {}", pod.node);
        let listed = kubectl.json(&["get", "pod", &new])?;
        let restarts = listed["status"]["containerStatuses"][0]["restartCount"].as_i64();
        ensure!(restarts == Some(0), "{new} was started anew: {restarts:?}");
        let pages = self.client.verify().context("its files, and its memory")?;
        compare(&before, &entries(to, &pod.uid)?).context("what it does not write")?;
        let now = self::sizes(to, &pod.uid)?;
        ensure!(now == sizes, "its volumes had {sizes}, and have {now}");
        until(
            "nothing is left of the pod that it was",
            POD_TIME_MAX,
            || check_gone(from, &uid),
        )?;
        self.pod = pod;
        Ok(format!(
            "stood still for {} ms, {pages} pages of memory and files right, {} entries the same",
            ended["status"]["downtimeMs"],
            before.len()
        ))
    }
}

/// Where a node has a volume of a pod.
pub(super) fn volume(node: &Node, uid: &str, name: &str) -> PathBuf {
    node.path(format!(
        "/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/{name}"
    ))
}

/// What is in both volumes of a pod, but for what the writer writes.
fn entries(node: &Node, uid: &str) -> Result<Entries> {
    let written = FOLDER.rsplit('/').next().unwrap_or_default();
    let mut all = describe_but(&volume(node, uid, "files"), &[written])?;
    let others = describe_but(&volume(node, uid, "entries"), &[])?;
    all.extend(
        others
            .into_iter()
            .map(|(path, entry)| (PathBuf::from("entries").join(path), entry)),
    );
    Ok(all)
}

/// How large file systems in memory are.
fn sizes(node: &Node, uid: &str) -> Result<String> {
    let script = format!(
        "grep kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir /proc/mounts | \
         grep -o 'empty-dir/[a-z]* \\|size=[0-9a-z]*'"
    );
    node.command("sh")?.args(["-ec", &script]).run()
}

fn writer(name: &str, node: &str, media: [&str; 2], arguments: &[String]) -> Value {
    let mut pod = pod(name, node, arguments);
    let spec = &mut pod["spec"];
    spec["containers"][0]["image"] = json!(IMAGE);
    spec["containers"][0]["name"] = json!("writer");
    let disk = FOLDER.rsplit_once('/').unwrap_or_default().0;
    spec["containers"][0]["volumeMounts"] = json!([
        {"name": "files", "mountPath": disk},
        {"name": "entries", "mountPath": ENTRIES},
    ]);
    let volume = |name: &str, medium: &str| {
        let empty = json!({"medium": medium, "sizeLimit": "96Mi"});
        json!({"name": name, "emptyDir": empty})
    };
    spec["volumes"] = json!([volume("files", media[0]), volume("entries", media[1])]);
    pod
}

/// Each with the media of its files, and of what it does not write.
const PODS: [(&str, [&str; 2]); 2] = [("disk", ["", "Memory"]), ("memory", ["Memory", ""])];
/// Where the other volume is.
const ENTRIES: &str = "/entries";
/// What is done in it before a move, one after the other.
const CHANGES: [&str; 2] = [
    "cd /entries; PATH=/bin; mkdir -p a/b c; echo one >a/one; echo two >a/b/two; ln a/one hard; \
     ln -s a/b/two soft; chmod 4751 a/one; chmod 2775 c; touch -d @5 a/b; echo three >c/three",
    "cd /entries; PATH=/bin; rm -r c; mv a/b/two a/moved; ln -s nowhere soft2; \
     echo more >>a/one; mkdir c; touch -d @77 c; echo file >a/b/new; chmod 700 .",
];
const IMAGE: &str = "localhost/writer:1";
const IMAGE_FILE: &str = "/srv/shared/writer.oci.tar";
const MEMORY: usize = 8 << 20; // 8 MiB
