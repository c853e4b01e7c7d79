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
        self.check_namespaces(engine.is_some_and(|engine| engine.is_sandboxed))?;
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

    fn check_namespaces(&self, is_sandboxed: bool) -> Result<(), Failure> {
        let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        let namespaces = &self.linux.namespaces;
        for namespace in namespaces {
            let kind = &*namespace.kind;
            if !OWN.contains(&kind) {
                return refused(format!(
                    "the container has a {kind} namespace of its own, which is not moved yet"
                ));
            }
            let is_sandboxes = is_sandboxed && SANDBOX.contains(&kind);
            if !namespace.path.is_empty() && !is_sandboxes {
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
mod tests {
    use super::*;
    use serde_json::json;

    fn around<'a>(engine: Option<&'a Engine>, named: &'a [PathBuf]) -> Around<'a> {
        Around {
            bundle: Path::new("/srv/web"),
            engine,
            named,
        }
    }

    fn spec() -> Value {
        json!({
            "process": {"terminal": false},
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "hooks": {"prestart": []},
            "linux": {
                "cgroupsPath": "/web",
                "namespaces": OWN.map(|kind| json!({"type": kind})),
            },
        })
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut spec = spec();
        change(&mut spec);
        let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let checked = parsed.check(&around(None, &[]));
        checked.expect_err("refused").to_string()
    }

    #[test]
    fn what_is_not_moved_yet_is_refused_by_its_name() {
        Spec::parse(spec().to_string().as_bytes())
            .unwrap()
            .check(&around(None, &[]))
            .unwrap();
        let terminal = refused(|spec| spec["process"]["terminal"] = true.into());
        assert!(terminal.starts_with("stdio-unfit") && terminal.contains("terminal"));
        for mount in [
            json!({"destination": "/data", "type": "none", "options": ["rbind", "rw"]}),
            json!({"destination": "/data", "type": "tmpfs", "options": ["bind"]}),
            json!({"destination": "/data", "type": "nfs"}),
        ] {
            let volume = refused(|spec| spec["mounts"].as_array_mut().unwrap().push(mount));
            assert!(volume.contains("/data mounted"), "{volume}");
        }
        let hooks = refused(|spec| spec["hooks"]["poststop"] = json!([{"path": "/bin/true"}]));
        assert!(hooks.contains("poststop hooks"), "{hooks}");
        let profile = refused(|spec| spec["process"]["apparmorProfile"] = "docker".into());
        assert!(profile.contains("AppArmor"), "{profile}");
        let cgroup = refused(|spec| spec["linux"]["cgroupsPath"] = "web".into());
        assert!(cgroup.contains("linux.cgroupsPath"), "{cgroup}");
        let managed = refused(|spec| spec["annotations"] = json!({MANAGER: "libpod"}));
        assert!(managed.contains("one of libpod"), "{managed}");
        let shared = refused(|spec| spec["linux"]["rootfsPropagation"] = "rshared".into());
        assert!(shared.contains("rootfsPropagation"), "{shared}");
    }

    #[test]
    fn what_is_bound_is_below_a_path_that_is_named() {
        let check = |source: &str, named: &str| {
            let mut spec = spec();
            let data = json!({"destination": "/data", "type": "none", "source": source,
                "options": ["rbind", "rw"]});
            spec["mounts"].as_array_mut().unwrap().push(data);
            let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
            let named = [PathBuf::from(named)];
            let checked = parsed.check(&around(None, &named));
            checked.map_err(|refused| refused.to_string())
        };
        check("/srv/data", "/srv/data").unwrap();
        check("/srv/data/sub", "/srv/data").unwrap();
        check("data", "/srv/web/data").unwrap();
        let other = check("/srv/data2", "/srv/data").unwrap_err();
        assert!(
            other.contains("--copy") && other.contains("/srv/data2"),
            "{other}"
        );
        let up = check("/srv/data/../x", "/srv/data").unwrap_err();
        assert!(up.contains("no plain path"), "{up}");
        let within = refused(|spec| {
            let all = spec["mounts"].as_array_mut().unwrap();
            let bind = ["bind"];
            all.push(json!({"destination": "/dev/x", "source": "/s", "options": bind}));
        });
        assert!(within.contains("/dev/x mounted"), "{within}");
    }

    #[test]
    fn nothing_is_mounted_within_a_volume() {
        let mut spec = spec();
        let all = spec["mounts"].as_array_mut().unwrap();
        all.push(json!({"destination": "/data", "source": "/s", "options": ["bind"]}));
        all.push(json!({"destination": "/data/tmp", "type": "tmpfs"}));
        let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let named = [PathBuf::from("/s")];
        let within = parsed.check(&around(None, &named)).unwrap_err();
        assert!(
            within.text().contains("/data/tmp mounted within /data"),
            "{within}"
        );
    }

    #[test]
    fn a_root_file_system_is_writable_unless_it_says_otherwise() {
        let is_writable = |root: Value| {
            let mut spec = spec();
            spec["root"] = root;
            let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
            parsed.is_writable()
        };
        assert!(!is_writable(json!({"path": "rootfs", "readonly": true})));
        assert!(is_writable(json!({"path": "rootfs", "readonly": false})));
        assert!(is_writable(json!({"path": "rootfs"})));
    }

    #[test]
    fn namespaces_are_those_that_can_be_made_again() {
        let add = |kind: &'static str| {
            refused(move |spec| {
                let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
                all.push(json!({"type": kind}));
            })
        };
        for kind in ["user", "cgroup", "time"] {
            let text = add(kind);
            assert!(
                text.contains(&format!("a {kind} namespace of its own")),
                "{text}"
            );
        }
        let joined = refused(|spec| spec["linux"]["namespaces"][2]["path"] = "/run/netns/x".into());
        assert!(
            joined.contains("network namespace /run/netns/x"),
            "{joined}"
        );
        let none = refused(|spec| {
            drop(
                spec["linux"]["namespaces"]
                    .as_array_mut()
                    .unwrap()
                    .remove(3),
            );
        });
        assert!(none.contains("no pid namespace"), "{none}");
    }

    #[test]
    fn what_its_engine_has_made_is_no_volume() {
        let engine = Engine {
            manager: "libpod",
            folders: vec!["/store/web".into()],
            ..Engine::default()
        };
        let check = |source: &str, manager: &str| {
            let mut spec = spec();
            spec["annotations"] = json!({MANAGER: manager});
            let hosts = json!({"destination": "/etc/hosts", "type": "bind", "source": source});
            spec["mounts"].as_array_mut().unwrap().push(hosts);
            let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
            parsed
                .check(&around(Some(&engine), &[]))
                .map_err(|refused| refused.to_string())
        };
        check("/store/web/hosts", "libpod").unwrap();
        let volume = check("/store/webb/hosts", "libpod").unwrap_err();
        assert!(volume.contains("/etc/hosts mounted"), "{volume}");
        let other = check("/store/web/hosts", "other").unwrap_err();
        assert!(other.contains("one of other"), "{other}");
    }
}
