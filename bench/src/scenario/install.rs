//! A cluster is prepared for moves, and is as it was again, by the commands of deploy/README.md: at
//! each node `pageferry setup kubernetes`, in the cluster `kubectl apply -k`, with the programs in
//! pods of their own. A pod moves in between; and nothing is taken away while that needs it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::annotated;
use super::pods::{POD_TIME_MAX, Watched};
use super::report::Report;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::wait::until;
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::containerd::import;
use crate::lab::node::Node;
use crate::workload::containerd::make_image;

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &mut Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    // The lab has prepared its nodes when it came up.
    let before = remove(lab, cluster)?;
    lab.nodes.iter().try_for_each(worker::check_untouched)?;
    laps.lap("the nodes are as if nothing had been installed");
    for (node, engine) in lab.nodes.iter().zip(&mut cluster.engines) {
        println!(
            "{}:\n{}",
            worker::name(node),
            worker::set_up(node, &[])?.trim_end()
        );
        let unread = worker::set_up(node, &["--check"]);
        ensure!(
            unread.is_err(),
            "containerd has read what it cannot have: {unread:?}"
        );
        engine.restart(node)?;
        worker::set_up(node, &["--check"])?;
        // Done twice it changes nothing, and asks for nothing.
        let again = worker::set_up(node, &[])?;
        ensure!(!again.contains("anew"), "{again}");
    }
    laps.lap("the nodes are prepared");
    let kubectl = &cluster.kubectl;
    let applied = install(lab, kubectl)?;
    laps.lap("controllers and agents run in pods");
    let mut watched = Watched::start(lab, kubectl, &lab.nodes[0], SERVER)?;
    let (name, uid) = (watched.pod.name.clone(), watched.pod.uid.clone());
    let moved = annotated::annotate(kubectl, (&name, &uid), &lab.nodes[1])?;
    watched.check_moved(lab, kubectl, &lab.nodes[1])?;
    println!(
        "{name} has moved, and stood still for {} ms",
        moved["status"]["downtimeMs"]
    );
    let pod = watched.finish(report)?;
    let refused = worker::set_up(&lab.nodes[1], &["--remove"]);
    let refused = format!("{:#}", refused.err().context("it was removed under a pod")?);
    let named = format!("pod default/{}", pod.name);
    ensure!(refused.contains(&named), "{refused}");
    println!("refused: {refused}");
    laps.lap("a pod has moved, and nothing is taken away under it");
    kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    uninstall(kubectl, &applied)?;
    lab.nodes[0]
        .command(worker::ADDRESSES)?
        .args(["release", &pod.address.to_string()])
        .run()?;
    until("nothing is left of the pods", POD_TIME_MAX, || {
        lab.nodes.iter().try_for_each(worker::check_no_pods)
    })?;
    let after = remove(lab, cluster)?;
    lab.nodes.iter().try_for_each(worker::check_untouched)?;
    for (name, before) in &before {
        let after = after.get(name).context("the nodes are the same")?;
        let changed: Vec<_> = before.symmetric_difference(after).collect();
        ensure!(changed.is_empty(), "{name} is another one: {changed:?}");
        report.figure(
            &format!("{name}: entries that are as they were"),
            before.len(),
        );
    }
    laps.lap("the nodes and the cluster are as they were");
    Ok(())
}

/// What a node has, line by line.
type State = std::collections::BTreeSet<String>;

/// Undoes it at all nodes, and looks what is there then. containerd may have records of a pod for
/// a minute after it has ended.
fn remove(lab: &Lab, cluster: &mut Cluster) -> Result<BTreeMap<String, State>> {
    let mut all = BTreeMap::new();
    for (node, engine) in lab.nodes.iter().zip(&mut cluster.engines) {
        let removed = until("nothing needs it any more", RECORDS_TIME_MAX, || {
            worker::set_up(node, &["--remove"])
        })?;
        println!("{}:\n{}", worker::name(node), removed.trim_end());
        engine.restart(node)?;
        all.insert(worker::name(node), state(node)?);
    }
    Ok(all)
}

/// Files by their contents, and what containerd makes of its own.
fn state(node: &Node) -> Result<State> {
    let script = format!(
        "containerd --config {} config dump; \
         for folder in {FOLDERS}; do [ -e $folder ] || continue; \
         find $folder -printf '%p %y %m %U:%G\\n'; \
         find $folder -type f -exec sha256sum {{}} +; done",
        worker::ENGINE_CONFIG
    );
    let said = node.command("sh")?.args(["-c", &script]).run()?;
    Ok(said.lines().map(str::to_owned).collect())
}

/// Applies deploy/kubernetes, with images that are made here. Answers with the folder.
fn install(lab: &Lab, kubectl: &Kubectl) -> Result<String> {
    let first = lab.nodes.first().context("a lab has nodes")?;
    for program in PROGRAMS {
        let file = format!("/srv/shared/{program}.oci.tar");
        let programs = [format!("/usr/local/bin/{program}")];
        make_image(first, &format!("localhost/{program}:1"), &file, &programs)?;
        for node in &lab.nodes {
            import(node, worker::NAMESPACE, &file)?;
        }
    }
    let folder = lab.folder.kubernetes();
    copy(Path::new(SOURCES), &folder.join("deploy"))?;
    let images = PROGRAMS.map(|program| {
        json!({"name": program, "newName": format!("localhost/{program}"), "newTag": "1"})
    });
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../deploy"],
        "images": images,
    });
    let overlay = folder.join("overlay");
    fs::create_dir_all(&overlay).context("making the overlay")?;
    fs::write(
        overlay.join("kustomization.yaml"),
        kustomization.to_string(),
    )
    .context("writing the overlay")?;
    let overlay = overlay.display().to_string();
    kubectl.run(&["apply", "-k", &overlay])?;
    for what in [
        "deployment/pageferry-controller",
        "daemonset/pageferry-agent",
    ] {
        kubectl.run(&["rollout", "status", SPACE, what, "--timeout=90s"])?;
    }
    annotated::wait_labels(lab, kubectl)?;
    Ok(overlay)
}

/// Takes all of it out of the cluster again.
fn uninstall(kubectl: &Kubectl, applied: &str) -> Result<()> {
    kubectl.run(&[
        "delete",
        "migrations",
        "--all",
        "--all-namespaces",
        "--timeout=60s",
    ])?;
    kubectl.run(&["delete", "-k", applied, "--timeout=120s"])?;
    kubectl.run(&["label", "nodes", "--all", "pageferry.dev/ready-"])?;
    kubectl.run(&["annotate", "nodes", "--all", "pageferry.dev/daemon-"])?;
    let kinds = "namespaces,clusterroles,clusterrolebindings,crds,runtimeclasses,\
                 validatingwebhookconfigurations";
    let left = kubectl.run(&["get", kinds, "--output=name"])?;
    let left: Vec<&str> = left
        .lines()
        .filter(|name| name.contains("pageferry"))
        .collect();
    ensure!(left.is_empty(), "the cluster still has {left:?}");
    let nodes = kubectl.run(&["get", "nodes", "--output=yaml"])?;
    ensure!(!nodes.contains("pageferry.dev"), "nodes still say {nodes}");
    Ok(())
}

/// Copies a folder of plain files.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let failed = || format!("copying {} to {}", from.display(), to.display());
    fs::create_dir_all(to).with_context(failed)?;
    for entry in fs::read_dir(from).with_context(failed)? {
        let path = entry?.path();
        let name = path.file_name().with_context(failed)?;
        fs::copy(&path, to.join(name)).with_context(failed)?;
    }
    Ok(())
}

const RECORDS_TIME_MAX: Duration = Duration::from_secs(120);
const SERVER: &str = "redis";
const SPACE: &str = "--namespace=pageferry-system";
const PROGRAMS: [&str; 2] = ["pageferry-controller", "pageferry-agent"];
/// Of this repository.
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes");
/// Where the set-up writes, and where it might.
const FOLDERS: &str = "/etc/containerd /etc/cni /usr/lib/cni /usr/local/lib /opt \
    /var/lib/pageferry/setup /var/lib/pageferry/ipam";
