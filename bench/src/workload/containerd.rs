//! A container of containerd: started, looked at and ended by `ctr`, containerd's own client.
//!
//! Each node has a containerd of its own, and the image of Redis from the layer of the nodes, so
//! that both have it by the same digest. Others are made at the first node, and imported at each.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::contained::{CLIENT, Plan, SERVER};
use super::{Workload, redis};
use crate::lab::Lab;
use crate::lab::containerd::{Engine, SNAPSHOTTER, ctr, import};
use crate::lab::layer::LayerPlan;
use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;

/// The layer of the nodes with containerd, plugins for networks of pods, and the image.
pub const LAYER: LayerPlan = LayerPlan {
    name: "containerd",
    packages: &["containerd", "containernetworking-plugins"],
    files: &[(CONFIG, CONFIG_TEXT)],
    script: IMAGE_SCRIPT,
};

/// Starts the containerd of each node, with the image and with what moves need.
pub fn start_engines(lab: &Lab) -> Result<Vec<Engine>> {
    let start = |node| -> Result<Engine> {
        let engine = Engine::start(node, CONFIG, &lab.folder.logs())?;
        import(node, NAMESPACE, IMAGE_FILE)?;
        node.command("pageferry")?
            .args(["setup", "containerd"])
            .run()?;
        Ok(engine)
    };
    lab.nodes.iter().map(start).collect()
}

/// Starts Redis in a container at a node, and waits until it listens.
pub fn start(lab: &mut Lab, at: &str, more: &[&str]) -> Result<Workload> {
    let workload = start_with(lab, at, more, &Plan::redis())?;
    workload.wait_until_it_listens(lab, redis::PORT)?;
    Ok(workload)
}

/// Makes the image of a plan at the first node, and imports it at all.
pub fn bring_image(lab: &Lab, plan: &Plan) -> Result<()> {
    let file = format!("/srv/shared/{}.oci.tar", plan.name);
    let first = lab.nodes.first().context("a lab has nodes")?;
    make_image(first, &image(plan), &file, &plan.programs)?;
    for node in &lab.nodes {
        import(node, NAMESPACE, &file)?;
    }
    Ok(())
}

/// Makes an image of programs that a node has, and the libraries that they are linked to, into a
/// file there. The first one is what it runs.
pub fn make_image(node: &Node, name: &str, file: &str, programs: &[String]) -> Result<()> {
    node.command("sh")?
        .args(["-ec", IMAGE_SCRIPT])
        .env("IMAGE", name)
        .env("FILE", file)
        .env("PROGRAMS", &programs.join(" "))
        .run()
        .with_context(|| format!("making the image {name}"))?;
    Ok(())
}

/// What the image of a plan is called.
fn image(plan: &Plan) -> String {
    format!("localhost/{}:1", plan.name)
}

/// Starts a container at a node, with a link.
pub fn start_with(lab: &mut Lab, at: &str, more: &[&str], plan: &Plan) -> Result<Workload> {
    let number = lab.next_workload()?;
    let id = format!("{}-{number}", plan.name);
    let node = lab.node(at)?;
    let image = image(plan);
    let mut run = vec!["run", "--detach", "--null-io"];
    run.extend((!plan.writes).then_some("--read-only"));
    run.extend(["--snapshotter", SNAPSHOTTER]);
    run.extend(more);
    run.extend([image.as_str(), &id]);
    run.extend(plan.arguments.iter().map(String::as_str));
    ctr(node, &run).with_context(|| format!("starting the container {id} at node {at}"))?;
    let workload = Workload {
        number,
        pid: task(node, &id)?.context("containerd has no task of it")?.0,
        link: WorkloadLink::new(number),
        container: None,
        containerd: Some(id),
        pod: None,
    };
    let inner = node.network_of(workload.pid)?;
    workload.link.create(node, &inner)?;
    workload.link.open(node)?;
    Ok(workload)
}

/// Has a shell in the container do something.
pub fn shell(node: &Node, id: &str, script: &str) -> Result<()> {
    let script = format!("PATH=/bin; {script}");
    let exec = [
        "tasks",
        "exec",
        "--exec-id",
        "shell",
        id,
        "/bin/sh",
        "-ec",
        &script,
    ];
    ctr(node, &exec).map(drop)
}

/// Where a node has the root file system of a container.
pub fn root_at(node: &Node, id: &str) -> PathBuf {
    node.path(format!(
        "/run/containerd/io.containerd.runtime.v2.task/default/{id}/rootfs"
    ))
}

/// The pid and the state of a task, if containerd has one.
fn task(node: &Node, id: &str) -> Result<Option<(i32, String)>> {
    let listed = ctr(node, &["tasks", "list"])?;
    let line = listed
        .lines()
        .find(|line| line.split_whitespace().next() == Some(id));
    let Some(line) = line else { return Ok(None) };
    let mut words = line.split_whitespace().skip(1);
    let pid = words.next().and_then(|pid| pid.parse().ok());
    let state = words.next().unwrap_or_default().to_owned();
    Ok(Some((
        pid.with_context(|| format!("no pid in {line:?}"))?,
        state,
    )))
}

/// Whether the containerd of this node has the container for its own: it lists it as running, and
/// starts a command in it, and its shim is the parent.
pub fn check_here(node: &Node, id: &str, pid: i32) -> Result<()> {
    check_here_as(node, id, pid, &Plan::redis())
}

/// The same of one with something else in it.
pub fn check_here_as(node: &Node, id: &str, pid: i32, plan: &Plan) -> Result<()> {
    let task = task(node, id)?;
    ensure!(
        task == Some((pid, "RUNNING".to_owned())),
        "containerd says of {id}, whose process is {pid}: {task:?}"
    );
    let exec = [
        &["tasks", "exec", "--exec-id", "greet", id][..],
        plan.greets,
    ]
    .concat();
    let said = ctr(node, &exec)?;
    ensure!(
        said.trim() == plan.greeting,
        "{:?} in {id} says {said:?}",
        plan.greets
    );
    let metrics = ctr(node, &["tasks", "metrics", id])?;
    ensure!(
        metrics.contains("memory.usage"),
        "containerd has no metrics of {id}: {metrics:?}"
    );
    ctr(node, &["tasks", "pause", id])?;
    ctr(node, &["tasks", "resume", id])?;
    let info = ctr(node, &["containers", "info", id])?;
    ensure!(
        !info.contains("\"pageferry/"),
        "{id} still has labels of ours: {info}"
    );
    let status = std::fs::read_to_string(node.process(pid).join("status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent: i32 = parent.unwrap_or_default().trim().parse()?;
    let shim = std::fs::read_to_string(node.process(parent).join("comm"))?;
    ensure!(
        shim.starts_with("containerd-shim"),
        "the parent of {id} is {shim}"
    );
    Ok(())
}

/// Whether containerd is to restart it, as it was started with [`RESTARTED`].
pub fn check_restarted(node: &Node, id: &str) -> Result<()> {
    let info = ctr(node, &["containers", "info", id])?;
    let label = RESTARTED[1].replace('=', "\": \"");
    ensure!(info.contains(&label), "{id} is not to be restarted: {info}");
    Ok(())
}

/// Whether nothing of the container is left at this node: nothing in containerd, no state of the
/// runtime, no order, no cgroup, no mount, no shim.
pub fn check_gone(node: &Node, id: &str) -> Result<()> {
    let script = format!(
        "ctr containers list -q | grep -x {id}; ctr tasks list | grep -w {id}; \
         ctr snapshots --snapshotter {SNAPSHOTTER} list | grep -w {id}; \
         ls -d /run/containerd/runc/default/{id}; \
         ls -d /run/containerd/io.containerd.runtime.v2.task/*/{id}; \
         find /run/pageferry/oci -name {id}; \
         find /sys/fs/cgroup -type d -name {id}; grep -w {id} /proc/mounts; \
         grep -al -e '[-]id.{id}.' /proc/[0-9]*/cmdline; true"
    );
    let left = node.command("sh")?.args(["-c", &script]).output()?;
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    ensure!(left.is_empty(), "node {} still has {left}", node.name());
    Ok(())
}

/// Whether the image is whole: what is in it can be mounted and read.
pub fn check_whole(node: &Node) -> Result<()> {
    let script = format!(
        "mkdir -p /run/whole; ctr images mount --snapshotter {SNAPSHOTTER} {IMAGE} /run/whole; \
         ls /run/whole{SERVER} /run/whole{CLIENT}; \
         ctr images unmount --rm --snapshotter {SNAPSHOTTER} /run/whole"
    );
    node.command("sh")?.args(["-ec", &script]).run()?;
    Ok(())
}

/// Has what a node's shims start as the runtime die of a `kill -9` when it is first to do `verb`;
/// [`TRAPPED`] is there once it has.
pub fn trap_wrapper(node: &Node, verb: &str) -> Result<()> {
    let script = format!(
        "mv {INSTALLED} {INSTALLED}.real; cat >{INSTALLED} <<'END'\n#!/bin/sh\n\
         for word; do\n\
         if [ \"$word\" = {verb} ] && mkdir {TRAPPED} 2>/dev/null; then kill -9 $$; fi\n\
         done\n\
         exec {INSTALLED}.real \"$@\"\nEND\nchmod 755 {INSTALLED}"
    );
    node.command("sh")?.args(["-ec", &script]).run().map(drop)
}

/// Puts it back.
pub fn untrap_wrapper(node: &Node) -> Result<()> {
    let script = format!("mv {INSTALLED}.real {INSTALLED}; rm -rf {TRAPPED}");
    node.command("sh")?.args(["-ec", &script]).run().map(drop)
}

/// Ends it as an operator would, and sees that nothing is left.
pub fn end(node: &Node, id: &str) -> Result<()> {
    ctr(node, &["containers", "label", id, NOT_RESTARTED])?;
    ctr(node, &["tasks", "kill", "--signal", "KILL", id])?;
    for _ in 0..POLLS {
        if task(node, id)?.is_none_or(|(_, state)| state == "STOPPED") {
            ctr(node, &["tasks", "delete", id])?;
            ctr(node, &["containers", "delete", id])?;
            return check_gone(node, id);
        }
        std::thread::sleep(super::END_POLL);
    }
    anyhow::bail!("{id} was killed and does not stop")
}

/// Deletes it, wherever it is.
pub fn delete(lab: &Lab, id: &str) -> Result<()> {
    for node in &lab.nodes {
        let script = format!(
            "ctr containers label {id} {NOT_RESTARTED}; ctr tasks delete --force {id}; \
             ctr containers delete {id}; true"
        );
        node.command("sh")?.args(["-c", &script]).output()?;
    }
    Ok(())
}

/// Has containerd's restart monitor keep it running.
pub const RESTARTED: [&str; 2] = ["--label", "containerd.io/restart.status=running"];
/// The label goes away.
const NOT_RESTARTED: &str = "containerd.io/restart.status=";
/// Where `pageferry setup containerd` puts what shims start.
pub const INSTALLED: &str = "/usr/local/lib/pageferry/pageferry-oci";
pub const TRAPPED: &str = "/run/trapped";
/// What `ctr` works in when it is not told.
const NAMESPACE: &str = "default";
pub const IMAGE: &str = "localhost/redis:1";
/// Where the layer has it.
pub const IMAGE_FILE: &str = "/srv/images/redis.tar";
const CONFIG: &str = "/etc/containerd/lab.toml";
/// Without what serves Kubernetes.
const CONFIG_TEXT: &str = "\
version = 3
disabled_plugins = [\"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\",
  \"io.containerd.grpc.v1.cri\", \"io.containerd.nri.v1.nri\"]
[plugins.\"io.containerd.internal.v1.restart\"]
interval = \"200ms\"
";
/// Ten seconds.
const POLLS: usize = 2_000;

/// An image of one layer, by the OCI layout: the programs, and the libraries that they are linked
/// to, at the paths they have in the node image.
const IMAGE_SCRIPT: &str = include_str!("image.sh");
