//! What a container is to be, as the `config.json` of its bundle says it, and what of that is not
//! moved yet. It is read as it is, and only what is asked for here.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::Deserialize;
use serde_json::Value;

/// `config.json` of a bundle.
#[derive(Debug, Deserialize)]
pub struct Spec {
    #[serde(default)]
    process: Process,
    root: Root,
    #[serde(default)]
    mounts: Vec<Mount>,
    #[serde(default)]
    hooks: BTreeMap<String, Value>,
    #[serde(default)]
    linux: Linux,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Process {
    terminal: bool,
    oom_score_adj: Option<i32>,
    apparmor_profile: String,
    selinux_label: String,
}

#[derive(Debug, Deserialize)]
struct Root {
    path: PathBuf,
    #[serde(default)]
    readonly: bool,
}

/// What an engine over the runtime has made of a container, and makes again at the target.
#[derive(Debug, Default)]
pub struct Engine {
    /// As it calls itself in [`MANAGER`].
    pub manager: &'static str,
    /// Folders of the container's own, in which it has files that are mounted into it.
    pub folders: Vec<PathBuf>,
    /// Pipes that it holds the other ends of.
    pub pipes: Vec<u64>,
    /// The root file system is of an image, and at a path of the engine's.
    pub has_image: bool,
    /// It is in the network, IPC and UTS namespaces of a sandbox that the engine makes.
    pub is_sandboxed: bool,
    /// Others of that sandbox move along.
    pub is_party: bool,
    /// It makes the container's network.
    pub has_network: bool,
}

/// What is known of a container beside its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// The folder of its bundle.
    pub bundle: &'a Path,
    /// Who has it, if that is not its runtime alone.
    pub engine: Option<&'a Engine>,
    /// Paths that travel along, or that both nodes share: what is below them may be bound.
    pub named: &'a [PathBuf],
}

/// A path of the node that is bound into a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// What.
    pub source: PathBuf,
    /// Where the container has it.
    pub destination: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Mount {
    destination: String,
    #[serde(default)]
    source: PathBuf,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Linux {
    namespaces: Vec<Namespace>,
    cgroups_path: String,
    rootfs_propagation: String,
    devices: Vec<Value>,
    resources: Resources,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

/// Limits in `config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    memory: Memory,
    cpu: Cpu,
    pids: Pids,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    limit: i64,
    swap: i64,
    reservation: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    quota: i64,
    period: i64,
    shares: i64,
    cpus: String,
    mems: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Pids {
    limit: Option<i64>,
}

/// Limits of a container, as its configuration or its runtime has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub memory: i64,
    pub memory_swap: i64,
    pub memory_reservation: i64,
    pub cpu_quota: i64,
    pub cpu_period: i64,
    pub cpu_shares: i64,
    pub cpus: String,
    pub mems: String,
    pub pids: i64,
}

/// Under which annotation an engine says that the container is its own.
const MANAGER: &str = "io.container.manager";

/// What every container has to itself here, as the specification calls it.
const OWN: [&str; 5] = ["ipc", "mount", "network", "pid", "uts"];

const NETWORK: &str = "network";

/// What a container of a pod may share with others of the pod.
const SANDBOX: [&str; 3] = ["ipc", "network", "uts"];

/// File systems that a container mounts, and whose contents go along or are made by the kernel.
const MOUNTED: [&str; 6] = ["cgroup", "devpts", "mqueue", "proc", "sysfs", "tmpfs"];

impl Limits {
    /// The first that is another than in `wanted`, as `config.json` calls it.
    pub fn other_than(&self, wanted: &Self) -> Option<&'static str> {
        let numbers = [
            ("memory.limit", self.memory, wanted.memory),
            ("memory.swap", self.memory_swap, wanted.memory_swap),
            (
                "memory.reservation",
                self.memory_reservation,
                wanted.memory_reservation,
            ),
            ("cpu.quota", self.cpu_quota, wanted.cpu_quota),
            ("cpu.period", self.cpu_period, wanted.cpu_period),
            ("cpu.shares", self.cpu_shares, wanted.cpu_shares),
            ("pids.limit", self.pids, wanted.pids),
        ];
        let names = [
            ("cpu.cpus", &self.cpus, &wanted.cpus),
            ("cpu.mems", &self.mems, &wanted.mems),
        ];
        let number = numbers.iter().find(|(_, has, wanted)| has != wanted);
        let name = names.iter().find(|(_, has, wanted)| has != wanted);
        number.map(|one| one.0).or(name.map(|one| one.0))
    }
}

impl Spec {
    /// Reads `config.json`.
    pub fn parse(text: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(text).map_err(|error| {
            let text = format!("the config.json of the container cannot be read: {error}");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })
    }

    /// Its cgroup, from the root of each hierarchy.
    pub fn cgroup(&self) -> &str {
        &self.linux.cgroups_path
    }

    /// Its root file system; `bundle` is the folder of its bundle.
    pub fn root(&self, bundle: &Path) -> PathBuf {
        bundle.join(&self.root.path)
    }

    /// What that is called in the configuration.
    pub fn named_root(&self) -> &Path {
        &self.root.path
    }

    /// Whether it may write to that.
    pub const fn is_writable(&self) -> bool {
        !self.root.readonly
    }

    /// The namespace of a kind that it joins, if it does.
    pub fn joins(&self, kind: &str) -> Option<&Path> {
        let mut all = self.linux.namespaces.iter();
        let found = all.find(|namespace| namespace.kind == kind)?;
        (!found.path.is_empty()).then(|| Path::new(&found.path))
    }

    /// All that is bound into it, as it is written: what, and where the container has it.
    pub fn bound(&self) -> impl Iterator<Item = (&Path, &Path)> {
        let binds = self.mounts.iter().filter(|mount| mount.is_bind());
        binds.map(|mount| (&*mount.source, Path::new(&mount.destination)))
    }

    /// Whether it has devices of the node, beside those that every container has.
    pub const fn has_devices(&self) -> bool {
        !self.linux.devices.is_empty()
    }

    /// How soon the kernel is to kill it for memory, if that is said.
    pub const fn oom_score_adj(&self) -> Option<i32> {
        self.process.oom_score_adj
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        let Resources { memory, cpu, pids } = &self.linux.resources;
        Limits {
            memory: memory.limit,
            memory_swap: memory.swap,
            memory_reservation: memory.reservation,
            cpu_quota: cpu.quota,
            cpu_period: cpu.period,
            cpu_shares: cpu.shares,
            cpus: cpu.cpus.clone(),
            mems: cpu.mems.clone(),
            pids: pids.limit.unwrap_or_default(),
        }
    }

    /// What of the node is bound into it, but for what its engine makes again.
    pub fn binds(&self, around: &Around<'_>) -> Vec<Bind> {
        let folders = around.engine.map_or(&[][..], |engine| &engine.folders);
        let is_made = |mount: &&Mount| folders.iter().any(|made| mount.source.starts_with(made));
        let binds = self.mounts.iter().filter(|mount| mount.is_bind());
        let bind = |mount: &Mount| Bind {
            source: around.bundle.join(&mount.source),
            destination: Path::new("/").join(&mount.destination),
        };
        binds.filter(|mount| !is_made(mount)).map(bind).collect()
    }

    /// Its root file system; and what is bound, with where in that it is.
    pub fn places(&self, bundle: &Path) -> (PathBuf, Vec<(PathBuf, PathBuf)>) {
        let root = self.root(bundle);
        let around = Around {
            bundle,
            engine: None,
            named: &[],
        };
        let binds = self.binds(&around).into_iter();
        let place = |bind: Bind| {
            let below = bind.destination.strip_prefix("/").map(Path::to_owned);
            (bind.source, root.join(below.unwrap_or(bind.destination)))
        };
        let places = binds.map(place).collect();
        (root, places)
    }

    /// Refuses what is not moved yet, by its name.
    pub fn check(&self, around: &Around<'_>) -> Result<(), Failure> {
        let engine = around.engine;
        let refused = |text: &str| {
            let text = format!("the container {text}");
            Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
        };
        let manager = self.annotations.get(MANAGER);
        if let Some(manager) = manager.filter(|has| engine.is_none_or(|by| by.manager != **has)) {
            return refused(&format!(
                "is one of {manager}, which would start it again, or lose it: it cannot be moved \
                 without its manager"
            ));
        }
        if self.process.terminal {
            return Err(Failure::new(
                ErrorCode::StdioUnfit,
                "the container has a terminal (process.terminal), which is not moved yet",
            ));
        }
        self.check_mounts(around)?;
        if let Some((name, _)) = self
            .hooks
            .iter()
            .find(|(_, hooks)| hooks.as_array().is_some_and(|hooks| !hooks.is_empty()))
        {
            return refused(&format!(
                "has {name} hooks, which would be run again at the target: that is not done yet"
            ));
        }
        let process = &self.process;
        if !process.apparmor_profile.is_empty() || !process.selinux_label.is_empty() {
            return refused("has a profile of AppArmor or SELinux, which is not moved yet");
        }
        self.check_namespaces(engine)?;
        let cgroup = Path::new(&self.linux.cgroups_path);
        let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        if !cgroup.is_absolute() || !cgroup.components().all(plain) {
            return refused(
                "has no cgroup by an absolute path (linux.cgroupsPath), which could be anywhere \
                 at the target",
            );
        }
        if self.linux.rootfs_propagation.contains("shared") {
            return refused("passes its mounts on to the node (linux.rootfsPropagation)");
        }
        Ok(())
    }

    fn check_mounts(&self, around: &Around<'_>) -> Result<(), Failure> {
        let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        let others = self.mounts.iter().filter(|mount| !mount.is_bind());
        let mut unknown = others.filter(|mount| !MOUNTED.contains(&&*mount.kind));
        if let Some(mount) = unknown.next() {
            return refused(format!(
                "the container has {} mounted, which is a file system of the node ({}): that is \
                 not moved yet",
                mount.destination, mount.kind
            ));
        }
        let binds = self.binds(around);
        for Bind {
            source,
            destination,
        } in &binds
        {
            let (what, place) = (source.display(), destination.display());
            let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
            if !source.components().all(plain) {
                return refused(format!("the container has {what} bound, by no plain path"));
            }
            if !around.named.iter().any(|named| source.starts_with(named)) {
                return refused(format!(
                    "the container has {place} mounted, which is {what} of the node: name that \
                     with --copy to have it travel along, or with --shared if both nodes have the \
                     same storage there"
                ));
            }
            let is_within = |mount: &&Mount| {
                let other = Path::new(&mount.destination);
                other.starts_with(destination) && other != destination
            };
            if let Some(within) = self.mounts.iter().find(is_within) {
                return refused(format!(
                    "the container has {} mounted within {place}, which is {what} of the node: \
                     mounts within volumes are not moved yet",
                    within.destination
                ));
            }
        }
        Ok(())
    }

    fn check_namespaces(&self, engine: Option<&Engine>) -> Result<(), Failure> {
        let is_made = |kind: &str| {
            engine.is_some_and(|engine| {
                (engine.is_sandboxed && SANDBOX.contains(&kind))
                    || (engine.has_network && kind == NETWORK)
            })
        };
        let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        let namespaces = &self.linux.namespaces;
        for namespace in namespaces {
            let kind = &*namespace.kind;
            if !OWN.contains(&kind) {
                return refused(format!(
                    "the container has a {kind} namespace of its own, which is not moved yet"
                ));
            }
            if !namespace.path.is_empty() && !is_made(kind) {
                return refused(format!(
                    "the container is in the {kind} namespace {} of somebody else: that is not \
                     moved yet",
                    namespace.path
                ));
            }
        }
        let missing = OWN
            .iter()
            .find(|own| !namespaces.iter().any(|has| has.kind == **own));
        match missing {
            Some(kind) => refused(format!(
                "the container has no {kind} namespace of its own: what it shares with the node \
                 is not moved yet"
            )),
            None => Ok(()),
        }
    }
}

impl Mount {
    fn is_bind(&self) -> bool {
        let binds = |option: &String| option == "bind" || option == "rbind";
        self.kind == "bind" || self.options.iter().any(binds)
    }
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
