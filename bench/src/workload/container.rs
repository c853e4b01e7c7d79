//! Redis in a container of runc: started, looked at and ended by the runtime's own commands.
//!
//! Its bundle is at every node by the same path, made of the node image: the program, and the
//! libraries that it is linked to. The root file system is read-only.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{RUNC, Workload, redis};
use crate::lab::Lab;
use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;

/// Starts Redis in a container at a node, and waits until it listens.
pub fn start(lab: &mut Lab, at: &str) -> Result<Workload> {
    let number = lab.next_workload()?;
    let id = format!("redis-{number}");
    let bundle = format!("{BUNDLES}/{id}");
    for node in &lab.nodes {
        make_bundle(node, &id, &bundle)
            .with_context(|| format!("making a bundle at node {}", node.name()))?;
    }
    let node = lab.node(at)?;
    let script =
        format!("exec runc run --detach --bundle {bundle} {id} <&- >/dev/null 2>&1 0</dev/null");
    node.command("sh")?
        .args(["-c", &script])
        .run()
        .with_context(|| format!("starting the container {id} at node {at}"))?;
    let state = state(node, &id)?;
    let pid = state["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok());
    let workload = Workload {
        number,
        pid: pid.with_context(|| format!("runc has no pid for {id}: {state}"))?,
        link: WorkloadLink::new(number),
        container: Some(id),
        engine: RUNC,
    };
    let inner = node.network_of(workload.pid)?;
    workload.link.create(node, &inner)?;
    workload.link.open(node)?;
    workload.wait_until_it_listens(lab, redis::PORT)?;
    Ok(workload)
}

/// What the runtime of a node says of a container.
pub fn state(node: &Node, id: &str) -> Result<Value> {
    let printed = node.command("runc")?.args(["state", id]).run()?;
    serde_json::from_str(&printed).with_context(|| format!("reading the state of {id}"))
}

/// Whether the runtime of this node has the container for its own: it lists it as running, and
/// starts a command in it.
pub fn check_here(node: &Node, id: &str, pid: i32) -> Result<()> {
    let state = state(node, id)?;
    let is_running = state["status"] == "running" && state["pid"] == pid;
    ensure!(
        is_running,
        "runc says of {id}, whose process is {pid}: {state}"
    );
    let listed = node.command("runc")?.args(["list", "--quiet"]).run()?;
    ensure!(
        listed.lines().any(|line| line == id),
        "runc does not list {id}"
    );
    let pong = node
        .command("runc")?
        .args(["exec", id, CLIENT, "ping"])
        .run()?;
    ensure!(pong.trim() == "PONG", "redis-cli in {id} says {pong:?}");
    Ok(())
}

/// Whether nothing of the container is left at this node: no state of the runtime, no cgroup, no
/// mount.
pub fn check_gone(node: &Node, id: &str) -> Result<()> {
    let script = format!(
        "ls -d /run/runc/{id}; find /sys/fs/cgroup -type d -name {id}; grep {id} /proc/mounts; true"
    );
    let left = node.command("sh")?.args(["-c", &script]).output()?;
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    ensure!(left.is_empty(), "node {} still has {left}", node.name());
    Ok(())
}

/// Whether the root file system of the bundle has all that was put there.
pub fn check_whole(node: &Node, id: &str) -> Result<()> {
    for program in [SERVER, CLIENT] {
        let path = node.path(format!("{BUNDLES}/{id}/rootfs{program}"));
        ensure!(
            path.is_file(),
            "node {} has lost {}",
            node.name(),
            path.display()
        );
    }
    Ok(())
}

/// Ends it as an operator would, and sees that nothing is left.
pub fn end(node: &Node, id: &str) -> Result<()> {
    node.command("runc")?.args(["kill", id, "KILL"]).run()?;
    for _ in 0..POLLS {
        if state(node, id)?["status"] == "stopped" {
            node.command("runc")?.args(["delete", id]).run()?;
            return check_gone(node, id);
        }
        std::thread::sleep(super::END_POLL);
    }
    anyhow::bail!("{id} was killed and does not stop")
}

/// Deletes it, wherever it is.
pub fn delete(lab: &Lab, id: &str) -> Result<()> {
    for node in &lab.nodes {
        if node.path(format!("/run/runc/{id}/state.json")).exists() {
            node.command("runc")?
                .args(["delete", "--force", id])
                .run()?;
        }
    }
    Ok(())
}

fn make_bundle(node: &Node, id: &str, bundle: &str) -> Result<()> {
    let script = format!("mkdir -p {bundle}/rootfs && cd {bundle} && {MAKE}");
    node.command("sh")?
        .args(["-ec", &script, "sh", SERVER, CLIENT])
        .run()?;
    let spec = std::fs::read_to_string(node.path(format!("{bundle}/config.json")));
    let mut spec: Value = serde_json::from_str(&spec.context("reading what runc spec made")?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = redis::plan().arguments.into();
    spec["root"]["readonly"] = true.into();
    spec["hostname"] = id.into();
    spec["linux"]["cgroupsPath"] = format!("/{id}").into();
    let own = ["pid", "network", "ipc", "uts", "mount"];
    spec["linux"]["namespaces"] = own.map(|kind| json!({ "type": kind })).to_vec().into();
    let path = node.path(format!("{bundle}/config.json"));
    std::fs::write(path, serde_json::to_vec_pretty(&spec)?).context("writing config.json")
}

const BUNDLES: &str = "/srv/bundles";
const SERVER: &str = "/usr/bin/redis-server";
const CLIENT: &str = "/usr/bin/redis-cli";
/// Programs are the arguments. Files are at the paths they have in the image.
const MAKE: &str = "\
mkdir -p rootfs/proc rootfs/sys rootfs/dev rootfs/etc rootfs/tmp
for program in \"$@\"; do
  real=$(readlink -f $program)
  mkdir -p rootfs$(dirname $program)
  cp $real rootfs$program
  for library in $(ldd $real | grep -o '/[^ ]*'); do
    mkdir -p rootfs$(dirname $library)
    cp -L $library rootfs$library
  done
done
rm -f config.json
runc spec
";
/// Ten seconds.
const POLLS: usize = 2_000;
