//! A container of podman: started, looked at and ended by podman's own commands.
//!
//! Its image is made at the first node and loaded at the others, so that it has one id. The network
//! is a veth of the lab's, and podman keeps the log.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::contained::{CLIENT, Container, Plan, Runtime, make_rootfs};
use crate::lab::Lab;
use crate::lab::node::Node;

/// Of containers.conf: podman as its containers are moved. Without systemd there is no journal.
pub const SETTINGS: (&str, &str) = (
    "/etc/containers/containers.conf.d/lab.conf",
    "[containers]\nlog_driver = \"k8s-file\"\npids_limit = 0\n\
     [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n",
);

/// Starts it at a node.
pub fn start(lab: &Lab, plan: &Plan, name: &str, at: &str) -> Result<(Container, i32)> {
    prepare(lab, plan, at)?;
    run(lab, plan, (name, at), &[])
}

/// Sees to it that podman of every node has its image, which is made at one.
pub fn prepare(lab: &Lab, plan: &Plan, at: &str) -> Result<()> {
    for node in &lab.nodes {
        // An overlay on the overlay of the node's own root cannot be mounted.
        let script = format!(
            "mkdir -p {STORE} && if ! mountpoint -q {STORE}; then mount -t tmpfs tmpfs {STORE}; fi"
        );
        node.command("sh")?.args(["-ec", &script]).run()?;
    }
    bring_image(lab, plan, at)
}

/// Starts it of its image, with more options.
pub fn run(
    lab: &Lab,
    plan: &Plan,
    (name, at): (&str, &str),
    options: &[&str],
) -> Result<(Container, i32)> {
    run_in(lab, plan, (name, at), ("none", options))
}

/// The same in a network of podman's.
pub fn run_in(
    lab: &Lab,
    plan: &Plan,
    (name, at): (&str, &str),
    (network, options): (&str, &[&str]),
) -> Result<(Container, i32)> {
    let node = lab.node(at)?;
    let run = ["run", "--detach", "--name", name, "--network", network];
    let read_only = format!("--read-only={}", !plan.writes);
    let image = image(plan);
    let run = run
        .into_iter()
        .chain([&read_only, "--restart", POLICY_NAME])
        .chain(options.iter().copied())
        .chain([&*image]);
    let started = podman(node)?.args(run).args(&plan.arguments).run();
    started.with_context(|| format!("starting the container {name} at node {at}"))?;
    let container = Container {
        runtime: Runtime::Podman,
        id: name.to_owned(),
    };
    let state = inspect(node, &container)?;
    let pid = state["State"]["Pid"].as_i64();
    let pid = pid.and_then(|pid| i32::try_from(pid).ok());
    Ok((container, pid.context("podman has no pid for it")?))
}

/// Whether podman of this node has the container for its own: it runs, a command can be started in
/// it, what it prints is logged, and it would be started again.
pub fn check_here(node: &Node, container: &Container, pid: i32) -> Result<()> {
    check_here_as(node, container, pid, &Plan::redis())?;
    let name = &container.id;
    let mark = format!("mark-of-{pid}");
    let log = ["redis.log(redis.LOG_WARNING, ARGV[1])", "0", &mark];
    let exec = ["exec", name, CLIENT, "EVAL"].into_iter().chain(log);
    podman(node)?.args(exec).run()?;
    wait_until(|| {
        let logs = podman(node)?.args(["logs", name]).output()?;
        let logs = [logs.stdout, logs.stderr].concat();
        Ok(String::from_utf8_lossy(&logs).contains(&mark))
    })
    .with_context(|| format!("podman has no {mark} in the log of {name}"))
}

/// The same of one with something else in it, but for its log.
pub fn check_here_as(node: &Node, container: &Container, pid: i32, plan: &Plan) -> Result<()> {
    let name = &container.id;
    let told = inspect(node, container)?;
    let is_running = told["State"]["Status"] == "running" && told["State"]["Pid"] == pid;
    ensure!(
        is_running,
        "podman says of {name}, whose process is {pid}: {}",
        told["State"]
    );
    let policy = &told["HostConfig"]["RestartPolicy"]["Name"];
    ensure!(policy == POLICY_NAME, "the policy of {name} is {policy}");
    let exec = ["exec", name]
        .into_iter()
        .chain(plan.greets.iter().copied());
    let said = podman(node)?.args(exec).run()?;
    ensure!(
        said.trim() == plan.greeting,
        "{:?} in {name} says {said:?}",
        plan.greets
    );
    let id = told["Id"].as_str().unwrap_or_default();
    let cgroups = node
        .command("cat")?
        .arg(format!("/proc/{pid}/cgroup"))
        .run()?;
    ensure!(
        cgroups.contains(&format!("/libpod-{id}\n")),
        "{name} is in other cgroups than its own: {cgroups}"
    );
    Ok(())
}

/// Whether nothing of the container is left at this node.
pub fn check_gone(node: &Node, container: &Container) -> Result<()> {
    let listed = podman(node)?.args(["ps", "--all", "--format", "{{.Names}} {{.Status}}"]);
    let listed = listed.run()?;
    ensure!(
        !listed.lines().any(|line| line.starts_with(&container.id)),
        "podman of node {} still has {listed}",
        node.name()
    );
    check_nothing_left(node)
}

/// Whether nothing is left of any container of podman here. The folder of a move that is over goes
/// when its source has sent on what still came, which takes some seconds.
pub fn check_nothing_left(node: &Node) -> Result<()> {
    let deadline = Instant::now() + LEFT_MAX;
    loop {
        let left = left_of_any(node)?;
        if left.is_empty() {
            return Ok(());
        }
        let name = node.name();
        ensure!(
            Instant::now() < deadline,
            "node {name} still has, after {LEFT_MAX:?}, {left}"
        );
        std::thread::sleep(POLL);
    }
}

fn left_of_any(node: &Node) -> Result<String> {
    let script = "ls -A /run/crun | grep -v '^\\.'; \
                  find /sys/fs/cgroup -type d -name 'libpod-*' | grep -v conmon; \
                  grep -e criu-root -e overlay-containers /proc/mounts; \
                  ls -d /run/pageferry/migrations/*/container.tar; true";
    let left = node.command("sh")?.args(["-c", script]).output()?;
    Ok(String::from_utf8_lossy(&left.stdout).into_owned())
}

/// How long something of a move that is over may be left.
const LEFT_MAX: Duration = Duration::from_secs(15);

/// Ends it as an operator would, and sees that nothing is left.
pub fn end(node: &Node, container: &Container) -> Result<()> {
    delete(node, container)?;
    check_gone(node, container)
}

/// Deletes it, if it is there.
pub fn delete(node: &Node, container: &Container) -> Result<()> {
    let delete = ["rm", "--force", "--ignore", "--time", "0", &container.id];
    podman(node)?.args(delete).run().map(drop)
}

fn inspect(node: &Node, container: &Container) -> Result<Value> {
    let printed = podman(node)?
        .args(["container", "inspect", &container.id])
        .run()?;
    let mut all: Value = serde_json::from_str(&printed)
        .with_context(|| format!("reading what podman has of {}", container.id))?;
    Ok(all[0].take())
}

/// Where podman of a node has the root file system of a container mounted.
pub fn root_of(node: &Node, container: &Container) -> Result<String> {
    let told = inspect(node, container)?;
    let data = &told["GraphDriver"]["Data"];
    let merged = data["MergedDir"].as_str().map(str::to_owned);
    merged.with_context(|| format!("podman has no overlay for {}: {data}", container.id))
}

/// What the image of a plan is called.
pub fn image(plan: &Plan) -> String {
    format!("localhost/{}:lab", plan.name)
}

/// The image at every node, with one id.
fn bring_image(lab: &Lab, plan: &Plan, first: &str) -> Result<()> {
    let node = lab.node(first)?;
    let (image, archive) = (image(plan), format!("/srv/shared/{}.tar", plan.name));
    let exists = podman(node)?.args(["image", "exists", &image]).output()?;
    if exists.status.success() {
        return Ok(());
    }
    let files = format!("/srv/image-{}", plan.name);
    make_rootfs(node, &files, &plan.programs)?;
    let script = format!(
        "tar -C {files}/rootfs -c . | podman import --quiet - {image} && \
         podman save --quiet --output {archive} {image}"
    );
    node.command("sh")?
        .args(["-ec", &script])
        .env(QUIET.0, QUIET.1)
        .run()
        .with_context(|| format!("making an image at node {first}"))?;
    for other in lab.nodes.iter().filter(|node| node.name() != first) {
        let load = ["load", "--quiet", "--input", &archive];
        podman(other)?
            .args(load)
            .run()
            .with_context(|| format!("loading an image at node {}", other.name()))?;
    }
    Ok(())
}

/// A command of podman of a node.
pub fn podman(node: &Node) -> Result<crate::lab::inside::Inside> {
    Ok(node.command("podman")?.env(QUIET.0, QUIET.1))
}

pub fn wait_until(mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    for _ in 0..POLLS {
        if is_so()? {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
    anyhow::bail!("not within {:?}", POLL * POLLS)
}

/// Else it warns of cgroups of version 1 each time.
const QUIET: (&str, &str) = ("PODMAN_IGNORE_CGROUPSV1_WARNING", "1");
const STORE: &str = "/var/lib/containers";
/// When podman starts it again: whenever it ends.
const POLICY_NAME: &str = "always";
const POLLS: u32 = 50;
const POLL: Duration = Duration::from_millis(100);
