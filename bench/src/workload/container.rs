//! A container of an OCI runtime: started, looked at and ended by the runtime's own commands.
//!
//! Its bundle is made of the node image: the programs, and the libraries that they are linked to.
//! If the root file system is read-only, it is at every node by the same path.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::contained::make_rootfs;
pub use super::contained::{CLIENT, Container, Plan, Runtime, SERVER};
use super::{Workload, podman, redis};
use crate::lab::Lab;
use crate::lab::layer::LayerPlan;
use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;

/// What nodes with containers have besides the image.
pub const LAYER: LayerPlan = LayerPlan {
    name: "containers",
    packages: &[
        "catatonit", // What holds the namespaces of a pod.
        "conmon",    // Without it crun can neither checkpoint nor restore.
        "libcriu2",
        "netavark",
        "podman",
    ],
    files: &[podman::SETTINGS],
    script: "",
};

/// A path of the node, as a mount of a container.
pub fn bind(source: &str, destination: &str) -> Value {
    let options = ["rbind", "rprivate", "rw"];
    json!({"destination": destination, "source": source, "type": "bind", "options": options})
}

/// Starts Redis in a container at a node, and waits until it listens.
pub fn start(lab: &mut Lab, runtime: Runtime, at: &str) -> Result<Workload> {
    let workload = start_with(lab, runtime, at, &Plan::redis())?;
    workload.wait_until_it_listens(lab, redis::PORT)?;
    Ok(workload)
}

/// Starts a container at a node, with a link.
pub fn start_with(lab: &mut Lab, runtime: Runtime, at: &str, plan: &Plan) -> Result<Workload> {
    let number = lab.next_workload()?;
    let id = format!("{}-{number}", plan.name);
    let (container, pid) = match runtime {
        Runtime::Podman => podman::start(lab, plan, &id, at)?,
        Runtime::Crun | Runtime::Runc => start_bundle(lab, (runtime, plan), &id, at)?,
    };
    linked(lab, number, (container, pid), at)
}

/// A container that was started at a node with this root, with its link open.
pub fn linked(
    lab: &Lab,
    number: usize,
    (container, pid): (Container, i32),
    at: &str,
) -> Result<Workload> {
    let workload = Workload {
        number,
        pid,
        link: WorkloadLink::new(number),
        container: Some(container),
        containerd: None,
        pod: None,
    };
    let node = lab.node(at)?;
    let inner = node.network_of(workload.pid)?;
    workload.link.create(node, &inner)?;
    workload.link.open(node)?;
    Ok(workload)
}

fn start_bundle(
    lab: &Lab,
    (runtime, plan): (Runtime, &Plan),
    id: &str,
    at: &str,
) -> Result<(Container, i32)> {
    let bundle = bundle(id);
    // One that is written to comes along.
    let nodes = lab
        .nodes
        .iter()
        .filter(|node| !plan.writes || node.name() == at);
    for node in nodes {
        make_bundle(node, (id, plan), &bundle)
            .with_context(|| format!("making a bundle at node {}", node.name()))?;
    }
    let node = lab.node(at)?;
    let program = runtime.name();
    let console = match plan.has_terminal() {
        true => format!("--console-socket {CONSOLE}"),
        false => String::new(),
    };
    let script = format!(
        "exec {program} run --detach {console} --bundle {bundle} {id} <&- >/dev/null 2>&1 \
         0</dev/null"
    );
    node.command("sh")?
        .args(["-c", &script])
        .run()
        .with_context(|| format!("starting the container {id} at node {at}"))?;
    let id = id.to_owned();
    let container = Container { runtime, id };
    let state = state(node, &container)?;
    let pid = state["pid"].as_i64();
    let pid = pid.and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.with_context(|| format!("{} has no pid: {state}", container.name()))?;
    Ok((container, pid))
}

/// What the runtime of a node says of a container.
fn state(node: &Node, container: &Container) -> Result<Value> {
    let printed = ask(node, container, &["state", &container.id])?;
    serde_json::from_str(&printed)
        .with_context(|| format!("reading the state of {}", container.name()))
}

/// Whether the runtime of this node has the container for its own: it lists it as running, and
/// starts a command in it.
pub fn check_here(node: &Node, container: &Container, pid: i32) -> Result<()> {
    if container.runtime == Runtime::Podman {
        return podman::check_here(node, container, pid);
    }
    check_here_as(node, container, pid, &Plan::redis())
}

/// As [`check_here`], of one with something else in it.
pub fn check_here_as(node: &Node, container: &Container, pid: i32, plan: &Plan) -> Result<()> {
    if container.runtime == Runtime::Podman {
        return podman::check_here_as(node, container, pid, plan);
    }
    check_listed(node, container, pid)?;
    let exec = [&["exec", &*container.id][..], plan.greets].concat();
    let (said, name) = (ask(node, container, &exec)?, container.name());
    ensure!(
        said.trim() == plan.greeting,
        "{:?} in {name} says {said:?}",
        plan.greets
    );
    Ok(())
}

/// Whether the runtime of this node lists it as running, in its own cgroups.
pub fn check_listed(node: &Node, container: &Container, pid: i32) -> Result<()> {
    let (id, name) = (&container.id, container.name());
    let state = state(node, container)?;
    let is_running = state["status"] == "running" && state["pid"] == pid;
    ensure!(
        is_running,
        "the runtime says of {name}, whose process is {pid}: {state}"
    );
    let listed = ask(node, container, &["list", "--quiet"])?;
    ensure!(
        listed.lines().any(|line| line == id),
        "{name} is not listed"
    );
    let cgroups = node
        .command("cat")?
        .arg(format!("/proc/{pid}/cgroup"))
        .run()?;
    ensure!(
        cgroups.contains(&format!(":/{id}\n")),
        "{name} is in other cgroups than its own: {cgroups}"
    );
    Ok(())
}

/// Has a shell in the container do something.
pub fn shell(node: &Node, container: &Container, script: &str) -> Result<()> {
    let exec = ["exec", &container.id, "/bin/sh", "-ec", script];
    ask(node, container, &exec).map(drop)
}

/// Where a node has the root file system of a container.
pub fn root_at(node: &Node, container: &Container) -> Result<PathBuf> {
    Ok(match container.runtime {
        Runtime::Podman => node.path(podman::root_of(node, container)?),
        Runtime::Crun | Runtime::Runc => node.path(format!("{}/rootfs", bundle(&container.id))),
    })
}

/// Has the runtime of a node do something.
pub fn ask(node: &Node, container: &Container, arguments: &[&str]) -> Result<String> {
    node.command(container.runtime.name())?
        .args(arguments)
        .run()
}

/// Whether nothing of the container is left at this node: no state of the runtime, no cgroup, no
/// mount.
pub fn check_gone(node: &Node, container: &Container) -> Result<()> {
    if container.runtime == Runtime::Podman {
        return podman::check_gone(node, container);
    }
    let (id, runtime) = (&container.id, container.runtime.name());
    let script = format!(
        "ls -d /run/{runtime}/{id} {BUNDLES}/{id}/criu-root; \
         find /sys/fs/cgroup -type d -name {id}; grep {id} /proc/mounts; true"
    );
    let left = node.command("sh")?.args(["-c", &script]).output()?;
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    ensure!(left.is_empty(), "node {} still has {left}", node.name());
    Ok(())
}

/// Whether the root file system of the bundle has all that was put there.
pub fn check_whole(node: &Node, container: &Container) -> Result<()> {
    if container.runtime == Runtime::Podman {
        // Its root file system is made of an image, and unmade.
        return Ok(());
    }
    for program in Plan::redis().programs {
        let path = node.path(format!("{BUNDLES}/{}/rootfs{program}", container.id));
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
pub fn end(node: &Node, container: &Container) -> Result<()> {
    if container.runtime == Runtime::Podman {
        return podman::end(node, container);
    }
    ask(node, container, &["kill", &container.id, "KILL"])?;
    for _ in 0..POLLS {
        if state(node, container)?["status"] == "stopped" {
            ask(node, container, &["delete", &container.id])?;
            return check_gone(node, container);
        }
        std::thread::sleep(super::END_POLL);
    }
    anyhow::bail!("{} was killed and does not stop", container.name())
}

/// Deletes it, wherever it is.
pub fn delete(lab: &Lab, container: &Container) -> Result<()> {
    let (id, runtime) = (&container.id, container.runtime);
    for node in &lab.nodes {
        if runtime == Runtime::Podman {
            podman::delete(node, container)?;
            continue;
        }
        let state = format!("/run/{}/{id}/{}", runtime.name(), runtime.state());
        if node.path(state).exists() {
            ask(node, container, &["delete", "--force", id])?;
        }
    }
    Ok(())
}

/// Where the bundle of a container is.
pub fn bundle(id: &str) -> String {
    format!("{BUNDLES}/{id}")
}

fn make_bundle(node: &Node, (id, plan): (&str, &Plan), bundle: &str) -> Result<()> {
    make_rootfs(node, bundle, &plan.programs)?;
    node.command("sh")?
        .args([
            "-ec",
            &format!("cd {bundle} && rm -f config.json && runc spec"),
        ])
        .run()?;
    let spec = std::fs::read_to_string(node.path(format!("{bundle}/config.json")));
    let mut spec: Value = serde_json::from_str(&spec.context("reading what runc spec made")?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = plan.arguments.clone().into();
    spec["root"]["readonly"] = (!plan.writes).into();
    spec["hostname"] = id.into();
    spec["linux"]["cgroupsPath"] = format!("/{id}").into();
    let own = ["pid", "network", "ipc", "uts", "mount"];
    spec["linux"]["namespaces"] = own.map(|kind| json!({ "type": kind })).to_vec().into();
    plan.apply(&mut spec)?;
    for mount in &plan.mounts {
        let place = mount["destination"].as_str().unwrap_or_default();
        let place = node.path(format!("{bundle}/rootfs{place}"));
        std::fs::create_dir_all(place).context("making a place for a mount")?;
    }
    let path = node.path(format!("{bundle}/config.json"));
    std::fs::write(path, serde_json::to_vec_pretty(&spec)?).context("writing config.json")
}

/// Where a runtime hands on the terminal of a container that has one.
pub const CONSOLE: &str = "/run/console.sock";
/// Where bundles are.
pub const BUNDLES: &str = "/srv/bundles";
/// Ten seconds.
const POLLS: usize = 2_000;
