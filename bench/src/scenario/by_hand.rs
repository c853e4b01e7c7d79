//! A pod moves by hand: each step that is a controller's or an agent's is taken here, by the
//! command line of the nodes' daemons, by kubectl and by files.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::pods::{self, Placed, RESTORED, Watched};
use super::report::Report;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::laps::Laps;
use crate::cluster::wait::{Hopeless, until};
use crate::cluster::{Cluster, worker};
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::outcome::{Move, millis};
use crate::mover::pageferry::{Migration, show};

/// The part of the scenario `kubernetes`.
pub fn run(lab: &Lab, cluster: &Cluster, laps: &mut Laps, report: &mut Report) -> Result<()> {
    let [from, to] = [&lab.nodes[0], &lab.nodes[1]];
    let kubectl = &cluster.kubectl;
    let mut watched = Watched::start(lab, kubectl, from, SERVER)?;
    let address = watched.pod.address;
    laps.lap("the pod of Redis is ready, and has clients");
    let begun = Instant::now();
    let mut moved = move_pod(kubectl, &watched.pod, (from, to), laps)?;
    watched.check_moved(lab, kubectl, to)?;
    let blackout = watched.clients.blackout_since(begun)?;
    moved.blackout_ms = Some(millis(blackout));
    report.push(moved);
    laps.lap("it is at the other node, and nothing of it is left here");
    check_reserved(from, address)?;
    let pod = watched.finish(report)?;
    laps.lap("all that was written is there");
    end(lab, kubectl, (&pod, from))?;
    laps.lap("the pod is deleted, and nothing of it is left");
    Ok(())
}

/// Every step of a move; the pod that it was is deleted then.
fn move_pod(
    kubectl: &Kubectl,
    pod: &Placed,
    (from, to): (&Node, &Node),
    laps: &mut Laps,
) -> Result<Move> {
    // A UID that nobody else has; a migration's own is one too.
    let id = pod.uid.replace('-', "");
    let options = MoveOptions {
        id: Some(id.clone()),
        hold: true,
        ..MoveOptions::default()
    };
    let workload = format!("pod/{}", pod.uid);
    let mut migration = Migration::start(from, &workload, to.name(), &options)?;
    let made = make_destination(kubectl, pod, (from, to), &id, &mut migration, laps);
    if let Err(error) = made {
        if !migration.has_ended()? {
            from.command("pageferry")?.args(["abort", &id]).output()?;
        }
        let (code, text) = migration.finish()?.error.unwrap_or_default();
        bail!("{error:#}; the migration says {code}: {text}");
    }
    let outcome = migration.finish()?;
    let Some(moved) = outcome.moved else {
        let (code, text) = outcome.error.unwrap_or_default();
        bail!("{workload} -> {}: {code}: {text}", to.name());
    };
    laps.lap("the source says that it has moved");
    let name = pods::successor(&pod.name);
    let condition = json!({"type": RESTORED, "status": "True"});
    let patch = json!({"status": {"conditions": [condition]}}).to_string();
    kubectl.run(&["patch", "pod", &name, "--subresource=status", "-p", &patch])?;
    kubectl.delete_pod(&pod.name, &pod.uid)?;
    fs::remove_file(from.path(left(&pod.uid))).context("no pod of its UID begins anew")?;
    fs::remove_file(to.path(expected(&name))).context("the pod is expected no more")?;
    Ok(moved)
}

/// From the first round to the leave to freeze.
fn make_destination(
    kubectl: &Kubectl,
    pod: &Placed,
    (from, to): (&Node, &Node),
    id: &str,
    migration: &mut Migration,
    laps: &mut Laps,
) -> Result<()> {
    wait_for(from, (id, "holding"), migration)?;
    laps.lap("the source holds: another round would not help");
    let name = pods::successor(&pod.name);
    let mut comes = json!({"address": format!("{}/32", pod.address), "migration": id});
    // Until its UID is known, none of its name is given an address.
    write(to, &expected(&name), &comes)?;
    let destination = pods::destination(kubectl, pod, &worker::name(to), id)?;
    kubectl.apply(&destination.to_string())?;
    let made = kubectl.json(&["get", "pod", &name])?;
    let uid = made["metadata"]["uid"]
        .as_str()
        .context("a pod has a UID")?;
    comes["uid"] = json!(uid);
    write(to, &expected(&name), &comes)?;
    to.command("pageferry")?
        .args(["expect", id, "--pod", uid])
        .run()?;
    wait_for(to, (id, "waiting"), migration)?;
    laps.lap("the container waits at the target");
    write(from, &away(pod.address), &json!({"migration": id}))?;
    from.command("pageferry")?.args(["proceed", id]).run()?;
    Ok(())
}

/// Waits until a node says of a migration that it holds, or waits.
fn wait_for(node: &Node, (id, what): (&str, &str), migration: &mut Migration) -> Result<()> {
    let named = format!("node {} says that it is {what}", node.name());
    until(&named, STEP_TIME_MAX, || {
        if migration.has_ended()? {
            return Err(Hopeless("the migration has ended".to_owned()).into());
        }
        let status = show(node, id)?;
        ensure!(status[what] == true, "it says {status}");
        Ok(())
    })
}

/// The address is still in the range of its node, with nobody there.
fn check_reserved(node: &Node, address: Ipv4Addr) -> Result<()> {
    let reserved = node.path(format!("/var/lib/cni/networks/lab/{address}"));
    ensure!(
        reserved.exists(),
        "{address} may be given to another pod at {}",
        worker::name(node)
    );
    Ok(())
}

/// Deletes the pod, and gives its address back where it is from.
fn end(lab: &Lab, kubectl: &Kubectl, (pod, from): (&Placed, &Node)) -> Result<()> {
    kubectl.run(&["delete", "pod", &pod.name, "--timeout=60s"])?;
    from.command(worker::ADDRESSES)?
        .args(["release", &pod.address.to_string()])
        .run()?;
    until("nothing is left of the pods", pods::POD_TIME_MAX, || {
        lab.nodes.iter().try_for_each(worker::check_no_pods)
    })
}

fn write(node: &Node, path: &str, object: &Value) -> Result<()> {
    let path = node.path(path);
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    // Whoever reads it meanwhile reads it as it was.
    let part = path.with_extension("part");
    let written = fs::write(&part, object.to_string()).and_then(|()| fs::rename(&part, &path));
    written.with_context(|| format!("writing {}", path.display()))
}

/// Where a node's program for addresses looks for a pod that comes.
fn expected(name: &str) -> String {
    format!("/run/pageferry/ipam/expected/default_{name}")
}

/// Where it looks for a pod that is not to begin anew.
fn left(uid: &str) -> String {
    format!("/var/lib/pageferry/ipam/left/{uid}")
}

/// Where it looks for an address that is elsewhere.
fn away(address: Ipv4Addr) -> String {
    format!("/var/lib/pageferry/ipam/away/{address}")
}

const SERVER: &str = "redis";
const STEP_TIME_MAX: Duration = Duration::from_secs(60);
