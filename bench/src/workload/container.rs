//! Redis in a container of an OCI runtime: started, looked at and ended by the runtime's own
//! commands.
//!
//! Its bundle is at every node by the same path, made of the node image: the program, and the
//! libraries that it is linked to. The root file system is read-only.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Workload, redis};
use crate::lab::Lab;
use crate::lab::layer::LayerPlan;
use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;

/// What nodes with containers have besides the image.
pub const LAYER: LayerPlan = LayerPlan {
    name: "containers",
    // Without the library crun can neither checkpoint nor restore.
    packages: &["libcriu2"],
    files: &[],
    script: "",
};

/// A container, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub runtime: Runtime,
    pub id: String,
}

/// Who runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Crun,
    Runc,
}

impl Runtime {
    pub const ALL: [Self; 2] = [Self::Runc, Self::Crun];

    /// Its program, and the kind of its containers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
        }
    }

    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|runtime| runtime.name() == name)
    }

    /// The file that it has of each of its containers, in its folder of that.
    const fn state(self) -> &'static str {
        match self {
            Self::Crun => "status",
            Self::Runc => "state.json",
        }
    }
}

impl Container {
    /// The name by which pageferry knows it.
    pub fn name(&self) -> String {
        format!("{}/{}", self.runtime.name(), self.id)
    }
}

/// Starts Redis in a container at a node, and waits until it listens.
pub fn start(lab: &mut Lab, runtime: Runtime, at: &str) -> Result<Workload> {
    let number = lab.next_workload()?;
    let id = format!("redis-{number}");
    let bundle = format!("{BUNDLES}/{id}");
    for node in &lab.nodes {
        make_bundle(node, &id, &bundle)
            .with_context(|| format!("making a bundle at node {}", node.name()))?;
    }
    let node = lab.node(at)?;
    let program = runtime.name();
    let script = format!(
        "exec {program} run --detach --bundle {bundle} {id} <&- >/dev/null 2>&1 0</dev/null"
    );
    node.command("sh")?
        .args(["-c", &script])
        .run()
        .with_context(|| format!("starting the container {id} at node {at}"))?;
    let container = Container { runtime, id };
    let state = state(node, &container)?;
    let pid = state["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok());
    let workload = Workload {
        number,
        pid: pid.with_context(|| format!("{} has no pid: {state}", container.name()))?,
        link: WorkloadLink::new(number),
        container: Some(container),
        containerd: None,
    };
    let inner = node.network_of(workload.pid)?;
    workload.link.create(node, &inner)?;
    workload.link.open(node)?;
    workload.wait_until_it_listens(lab, redis::PORT)?;
    Ok(workload)
}

/// What the runtime of a node says of a container.
pub fn state(node: &Node, container: &Container) -> Result<Value> {
    let printed = ask(node, container, &["state", &container.id])?;
    serde_json::from_str(&printed)
        .with_context(|| format!("reading the state of {}", container.name()))
}

/// Whether the runtime of this node has the container for its own: it lists it as running, and
/// starts a command in it.
pub fn check_here(node: &Node, container: &Container, pid: i32) -> Result<()> {
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
    let pong = ask(node, container, &["exec", id, CLIENT, "ping"])?;
    ensure!(pong.trim() == "PONG", "redis-cli in {name} says {pong:?}");
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

fn ask(node: &Node, container: &Container, arguments: &[&str]) -> Result<String> {
    node.command(container.runtime.name())?
        .args(arguments)
        .run()
}

/// Whether nothing of the container is left at this node: no state of the runtime, no cgroup, no
/// mount.
pub fn check_gone(node: &Node, container: &Container) -> Result<()> {
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
    for program in [SERVER, CLIENT] {
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
        let state = format!("/run/{}/{id}/{}", runtime.name(), runtime.state());
        if node.path(state).exists() {
            ask(node, container, &["delete", "--force", id])?;
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
