//! What a container is, as its runtime has written it down, and what of that is not moved yet.
//!
//! The bundle's `config.json` says what the container is to be, the runtime's `state.json` what has
//! become of it. Both are read as they are, and only what is asked for here.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

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
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Process {
    terminal: bool,
    apparmor_profile: String,
    selinux_label: String,
}

#[derive(Debug, Deserialize)]
struct Root {
    path: PathBuf,
    #[serde(default)]
    readonly: bool,
}

#[derive(Debug, Deserialize)]
struct Mount {
    destination: String,
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
    resources: Resources,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

/// The `state.json` of runc.
#[derive(Debug, Deserialize)]
pub struct State {
    /// The root of the tree, in the pid namespace of the node.
    pub init_process_pid: i32,
    /// When that started, in clock ticks since the boot.
    pub init_process_start: u64,
    /// Its standard streams, when it was started.
    #[serde(default)]
    external_descriptors: Vec<String>,
    config: StateConfig,
}

#[derive(Debug, Deserialize)]
struct StateConfig {
    #[serde(default)]
    rootfs: PathBuf,
    #[serde(default)]
    readonlyfs: bool,
    #[serde(default)]
    labels: Vec<String>,
    #[serde(default)]
    rootless_euid: bool,
    #[serde(default)]
    cgroups: Option<Cgroups>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cgroups {
    #[serde(alias = "Systemd")]
    systemd: bool,
    memory: i64,
    memory_swap: i64,
    memory_reservation: i64,
    cpu_quota: i64,
    cpu_period: i64,
    cpu_shares: i64,
    cpuset_cpus: String,
    cpuset_mems: String,
    pids_limit: Option<i64>,
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

/// What every container has to itself here, as the specification calls it.
const OWN: [&str; 5] = ["ipc", "mount", "network", "pid", "uts"];

/// File systems that a container mounts, and whose contents go along or are made by the kernel.
const MOUNTED: [&str; 6] = ["cgroup", "devpts", "mqueue", "proc", "sysfs", "tmpfs"];

impl Spec {
    /// Reads `config.json`.
    pub fn parse(text: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(text).map_err(|error| {
            let text = format!("the config.json of the container cannot be read: {error}");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })
    }

    /// Refuses what is not moved yet, by its name.
    pub fn check(&self) -> Result<(), Failure> {
        let refused = |text: &str| {
            let text = format!("the container {text}");
            Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
        };
        if self.process.terminal {
            return Err(Failure::new(
                ErrorCode::StdioUnfit,
                "the container has a terminal (process.terminal), which is not moved yet",
            ));
        }
        if !self.root.readonly {
            return refused(
                "may write to its root file system, which is not moved yet: make it read-only \
                 (root.readonly) and give it a tmpfs for what it writes",
            );
        }
        for mount in &self.mounts {
            let binds = |option: &String| option == "bind" || option == "rbind";
            if mount.options.iter().any(binds) || !MOUNTED.contains(&&*mount.kind) {
                return refused(&format!(
                    "has {} mounted, which is a folder or a file system of the node: volumes are \
                     not moved yet",
                    mount.destination
                ));
            }
        }
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
        self.check_namespaces()?;
        if !self.linux.cgroups_path.starts_with('/') {
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

    fn check_namespaces(&self) -> Result<(), Failure> {
        let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        let namespaces = &self.linux.namespaces;
        for namespace in namespaces {
            let kind = &*namespace.kind;
            if !OWN.contains(&kind) {
                return refused(format!(
                    "the container has a {kind} namespace of its own, which is not moved yet"
                ));
            }
            if !namespace.path.is_empty() {
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

impl State {
    /// Reads `state.json` of the container that is called `name`.
    pub fn parse(text: &[u8], name: &str) -> Result<Self, Failure> {
        serde_json::from_slice(text).map_err(|error| {
            let text = format!("what runc has written of {name} cannot be read: {error}");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })
    }

    /// The folder of its bundle.
    pub fn bundle(&self) -> Option<PathBuf> {
        let labels = self.config.labels.iter();
        let bundle = labels
            .filter_map(|label| label.strip_prefix("bundle="))
            .next_back();
        bundle
            .map(PathBuf::from)
            .filter(|bundle| bundle.is_absolute())
    }

    /// Refuses what is not moved yet, by its name.
    pub fn check(&self) -> Result<(), Failure> {
        let refused = |text: &str| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        if !self.config.readonlyfs {
            return refused(
                "the container was started with a root file system that it may write to, which is \
                 not moved yet",
            );
        }
        if self.config.rootless_euid {
            return refused("the container is a rootless one, which is not moved");
        }
        if self
            .config
            .cgroups
            .as_ref()
            .is_some_and(|cgroups| cgroups.systemd)
        {
            return refused("the container's cgroup is made by systemd, which is not moved yet");
        }
        let other = self.external_descriptors.iter().enumerate();
        let other = other
            .into_iter()
            .find(|(_, name)| Path::new(name) != Path::new("/dev/null"));
        match other {
            Some((number, name)) => Err(Failure::new(
                ErrorCode::StdioUnfit,
                format!(
                    "descriptor {number} of the container was {name} when it was started, which is \
                     not moved yet: start it with its input and output at /dev/null"
                ),
            )),
            None => Ok(()),
        }
    }
}

impl State {
    /// Refuses a container that is another than `spec`, in the folder `bundle`, says: the target
    /// makes it as that says.
    pub fn check_against(&self, spec: &Spec, bundle: &Path) -> Result<(), Failure> {
        let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        let root = fs::canonicalize(bundle.join(&spec.root.path));
        if root.ok() != fs::canonicalize(&self.config.rootfs).ok() {
            return refused(format!(
                "the container has the root file system {}, and its config.json names another: \
                 that was changed since it was started",
                self.config.rootfs.display()
            ));
        }
        let none = Cgroups::default();
        let has = self.config.cgroups.as_ref().unwrap_or(&none);
        let Resources { memory, cpu, pids } = &spec.linux.resources;
        let limits = [
            ("memory.limit", has.memory, memory.limit),
            ("memory.swap", has.memory_swap, memory.swap),
            (
                "memory.reservation",
                has.memory_reservation,
                memory.reservation,
            ),
            ("cpu.quota", has.cpu_quota, cpu.quota),
            ("cpu.period", has.cpu_period, cpu.period),
            ("cpu.shares", has.cpu_shares, cpu.shares),
            (
                "pids.limit",
                has.pids_limit.unwrap_or_default(),
                pids.limit.unwrap_or_default(),
            ),
        ];
        let changed = limits.iter().find(|(_, has, wanted)| has != wanted);
        let names = [
            ("cpu.cpus", &has.cpuset_cpus, &cpu.cpus),
            ("cpu.mems", &has.cpuset_mems, &cpu.mems),
        ];
        let named = names.iter().find(|(_, has, wanted)| has != wanted);
        match changed.map(|one| one.0).or(named.map(|one| one.0)) {
            Some(limit) => refused(format!(
                "the container's {limit} is another than its config.json says (runc update): the \
                 target would set what that says. Write it there, at both nodes, first"
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
        parsed.check().expect_err("refused").to_string()
    }

    #[test]
    fn what_is_not_moved_yet_is_refused_by_its_name() {
        Spec::parse(spec().to_string().as_bytes())
            .unwrap()
            .check()
            .unwrap();
        let terminal = refused(|spec| spec["process"]["terminal"] = true.into());
        assert!(terminal.starts_with("stdio-unfit") && terminal.contains("terminal"));
        let root = refused(|spec| spec["root"]["readonly"] = false.into());
        assert!(root.contains("root.readonly"), "{root}");
        let root = refused(|spec| drop(spec["root"].as_object_mut().unwrap().remove("readonly")));
        assert!(root.contains("root.readonly"), "{root}");
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
        let shared = refused(|spec| spec["linux"]["rootfsPropagation"] = "rshared".into());
        assert!(shared.contains("rootfsPropagation"), "{shared}");
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
    fn the_state_names_the_bundle_and_what_was_open_at_the_start() {
        let state = |streams: [&str; 3], config: Value| {
            let text = json!({
                "init_process_pid": 7, "init_process_start": 9,
                "external_descriptors": streams, "config": config,
            });
            State::parse(text.to_string().as_bytes(), "web").unwrap()
        };
        let plain = state(
            ["/dev/null"; 3],
            json!({"labels": ["a=b", "bundle=/srv/web"], "readonlyfs": true}),
        );
        assert_eq!(plain.bundle(), Some("/srv/web".into()));
        plain.check().unwrap();
        let started = json!({"readonlyfs": true});
        let piped = state(["/dev/null", "pipe:[3]", "pipe:[4]"], started);
        let refused = piped.check().unwrap_err();
        assert!(refused.to_string().contains("descriptor 1"), "{refused}");
        assert_eq!(piped.bundle(), None);
        let refused = |config: Value| state(["/dev/null"; 3], config).check().unwrap_err();
        let rootless = refused(json!({"rootless_euid": true, "readonlyfs": true}));
        assert!(rootless.text().contains("rootless"), "{rootless}");
        let systemd = refused(json!({"cgroups": {"Systemd": true}, "readonlyfs": true}));
        assert!(systemd.text().contains("systemd"), "{systemd}");
        let writable = refused(json!({"readonlyfs": false}));
        assert!(writable.text().contains("may write"), "{writable}");
    }

    #[test]
    fn what_has_become_of_a_container_is_what_its_configuration_says() {
        let bundle = tempfile::tempdir().unwrap();
        for folder in ["rootfs", "other"] {
            fs::create_dir(bundle.path().join(folder)).unwrap();
        }
        let check = |rootfs: &str, cgroups: Value, resources: Value| {
            let text = json!({
                "init_process_pid": 7, "init_process_start": 9,
                "config": {"rootfs": bundle.path().join(rootfs), "cgroups": cgroups},
            });
            let state = State::parse(text.to_string().as_bytes(), "web").unwrap();
            let mut spec = spec();
            spec["linux"]["resources"] = resources;
            let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
            state.check_against(&spec, bundle.path())
        };
        check("rootfs", json!({}), json!({})).unwrap();
        let limits = json!({"memory": {"limit": 5}, "pids": {"limit": 9}, "cpu": {"cpus": "0"}});
        let set = json!({"memory": 5, "pids_limit": 9, "cpuset_cpus": "0"});
        check("rootfs", set.clone(), limits.clone()).unwrap();
        let other = check("other", json!({}), json!({})).unwrap_err();
        assert!(
            other.text().contains("config.json names another"),
            "{other}"
        );
        for (name, value) in [
            ("memory", json!(6)),
            ("pids_limit", json!(8)),
            ("cpuset_cpus", json!("1")),
            ("cpu_quota", json!(1000)),
        ] {
            let mut updated = set.clone();
            updated[name] = value;
            let refused = check("rootfs", updated, limits.clone()).unwrap_err();
            assert!(refused.text().contains("runc update"), "{refused}");
        }
    }
}
