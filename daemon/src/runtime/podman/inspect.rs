//! What podman says of a container, and what of that is not moved yet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::Deserialize;
use serde_json::Value;

use super::command::{CommandError, podman_at_once, told};
use super::network::Networked;
use super::pod::InPod;
use super::volume::Volume;
use crate::runtime::layer;
use crate::runtime::oci::habits::Runtime;
use crate::runtime::rootfs::RootFiles;

/// The label by which a unit of systemd that runs a container names itself.
pub(super) const UNIT: &str = "PODMAN_SYSTEMD_UNIT";

/// How podman calls it when a container is in networks of its own.
const BRIDGE: &str = "bridge";

/// The kind of a mount that is a named volume.
const VOLUME: &str = "volume";

/// One of `podman container inspect`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspected {
    id: String,
    #[serde(default)]
    name: String,
    state: State,
    /// The id of the image.
    image: String,
    #[serde(default)]
    pod: String,
    #[serde(default, rename = "OCIRuntime")]
    runtime: String,
    #[serde(default)]
    mounts: Option<Vec<Mount>>,
    #[serde(default)]
    dependencies: Option<Vec<String>>,
    host_config: HostConfig,
    config: Config,
    #[serde(default)]
    network_settings: NetworkSettings,
    #[serde(default)]
    graph_driver: GraphDriver,
    /// The same, read.
    #[serde(skip)]
    container: Option<ContainerId>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    status: String,
}

/// What is mounted into it, but for what podman makes itself.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(default)]
    name: String,
    destination: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    #[serde(default)]
    cgroup_manager: String,
    #[serde(default)]
    network_mode: String,
    restart_policy: Restart,
    #[serde(default)]
    shm_size: u64,
}

/// Networks of podman's.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct NetworkSettings {
    networks: Option<BTreeMap<String, Endpoint>>,
    /// By port and protocol of the container.
    ports: Option<BTreeMap<String, Option<Vec<HostPort>>>>,
}

/// What it has of one of them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Endpoint {
    mac_address: String,
    #[serde(rename = "IPAddress")]
    ip: String,
    #[serde(rename = "IPPrefixLen")]
    prefix: u8,
    gateway: String,
    #[serde(rename = "GlobalIPv6Address")]
    ip6: String,
    #[serde(rename = "GlobalIPv6PrefixLen")]
    prefix6: u8,
    #[serde(rename = "IPv6Gateway")]
    gateway6: String,
}

/// A port of the node.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HostPort {
    host_ip: String,
    host_port: String,
}

/// Where its root file system is.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct GraphDriver {
    name: String,
    data: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Restart {
    #[serde(default)]
    name: String,
    #[serde(default)]
    maximum_retry_count: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    healthcheck: Option<Value>,
    #[serde(default)]
    open_stdin: bool,
}

impl Inspected {
    /// Asks podman of the container that is called so.
    pub fn of(name: &ContainerId) -> Result<Self, Failure> {
        let printed = podman_at_once(["container", "inspect", name.as_str()]);
        let printed = printed.map_err(|error| match error {
            CommandError::Failed { said, .. } => Failure::new(
                ErrorCode::WorkloadGone,
                format!("podman has no container {name}: {said}"),
            ),
            other => Failure::new(ErrorCode::UnsupportedWorkload, told(&other)),
        })?;
        Self::parse(&printed, name)
    }

    fn parse(printed: &str, name: &ContainerId) -> Result<Self, Failure> {
        let unreadable = |why: String| {
            let text = format!("what podman says of {name} cannot be read: {why}");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        };
        let all: Vec<Self> =
            serde_json::from_str(printed).map_err(|e| unreadable(e.to_string()))?;
        let one = all.into_iter().next();
        let mut one = one.ok_or_else(|| unreadable("it is none".to_owned()))?;
        let id: Result<ContainerId, _> = one.id.parse();
        one.container = Some(id.map_err(|error| unreadable(error.to_string()))?);
        Ok(one)
    }

    /// What its runtime calls it.
    pub fn id(&self) -> &ContainerId {
        self.container.as_ref().expect("parsed")
    }

    /// The id of its image.
    pub fn image(&self) -> Result<ContainerId, Failure> {
        let id = self.image.trim_start_matches("sha256:").parse();
        id.map_err(|_| {
            let text = "the container has no image, which the target could have, too";
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })
    }

    /// Its policy, as `--restart` has it.
    pub fn restart(&self) -> String {
        let Restart {
            name,
            maximum_retry_count,
        } = &self.host_config.restart_policy;
        match maximum_retry_count {
            0 => name.clone(),
            count => format!("{name}:{count}"),
        }
    }

    /// Whose checkpoints we take part in.
    pub fn runtime(&self) -> Result<Runtime, Failure> {
        match Path::new(&self.runtime).file_name() {
            Some(name) if name == Runtime::Crun.program() => Ok(Runtime::Crun),
            _ => Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!(
                    "podman runs the container with {:?}: only containers of crun are moved",
                    self.runtime
                ),
            )),
        }
    }

    /// What it has written over its image.
    pub fn layer(&self) -> Result<RootFiles, Failure> {
        let driver = &self.graph_driver;
        let data = |name: &str| driver.data.as_ref()?.get(name).map(Path::new);
        match (&*driver.name, data("MergedDir"), data("UpperDir")) {
            ("overlay", Some(merged), Some(upper)) => layer::find(merged, Some(upper)),
            (other, ..) => Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!(
                    "podman keeps what the container writes by its driver {other:?}: only by \
                     \"overlay\" it is moved"
                ),
            )),
        }
    }

    /// As podman calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How large that may become, in bytes.
    pub const fn shm_bytes(&self) -> u64 {
        self.host_config.shm_size
    }

    /// Refuses what is not moved yet, by its name. `in_pod` is the pod that it moves with.
    pub fn check(&self, name: &ContainerId, in_pod: Option<&InPod>) -> Result<(), Failure> {
        let refused = |text: String| {
            let text = format!("the container {name} {text}");
            Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
        };
        self.check_runs(name)?;
        if let Some(unit) = self.config.labels.iter().find_map(|all| all.get(UNIT)) {
            return refused(format!(
                "is run by the unit {unit} of systemd, which would start it again"
            ));
        }
        if in_pod.is_none() && !self.pod.is_empty() {
            return refused(format!(
                "is part of the pod {}, and moves with that, as podman-pod/NAME: `podman pod ps` \
                 tells which",
                self.pod
            ));
        }
        let infra = in_pod.map(InPod::infra);
        let mut others = self.dependencies.iter().flatten();
        if let Some(other) = others.find(|other| Some(&***other) != infra) {
            return refused(format!(
                "shares namespaces with another container ({other})"
            ));
        }
        // What is bound stands in the specification, and must be named.
        let moved = |mount: &&Mount| ["bind", VOLUME].contains(&&*mount.kind);
        if let Some(mount) = self.mounts.iter().flatten().find(|mount| !moved(mount)) {
            return refused(format!(
                "has {} mounted, which is a mount of the kind {}: that is not moved yet",
                mount.destination, mount.kind
            ));
        }
        if self.host_config.cgroup_manager != "cgroupfs" {
            return refused(
                "has its cgroup from systemd: only with cgroup_manager = \"cgroupfs\" in \
                 containers.conf containers are moved"
                    .to_owned(),
            );
        }
        let of_pod = infra.map(|infra| format!("container:{infra}"));
        let mode = &*self.host_config.network_mode;
        if !["none", BRIDGE].contains(&mode) && of_pod.as_deref() != Some(mode) {
            return refused(format!(
                "has a network by podman's {:?}, which is not moved yet: only one of a bridge, or \
                 none",
                self.host_config.network_mode
            ));
        }
        let networks = self.networks();
        if 1 < networks.len() {
            return refused(format!(
                "is in {} networks of podman ({}): only one is moved",
                networks.len(),
                networks.join(", ")
            ));
        }
        if self
            .config
            .healthcheck
            .as_ref()
            .is_some_and(|check| !check.is_null())
        {
            return refused("has a health check, which podman runs in it".to_owned());
        }
        Ok(())
    }

    fn check_runs(&self, name: &ContainerId) -> Result<(), Failure> {
        let (code, what) = match &*self.state.status {
            "running" => return Ok(()),
            "paused" => (
                ErrorCode::UnsupportedWorkload,
                "is paused: resume it first".to_owned(),
            ),
            other => (
                ErrorCode::WorkloadGone,
                format!("does not run: it is {other}"),
            ),
        };
        Err(Failure::new(code, format!("the container {name} {what}")))
    }

    fn networks(&self) -> Vec<&str> {
        let has = self.host_config.network_mode == BRIDGE;
        let networks = self.network_settings.networks.iter().filter(|_| has);
        networks.flatten().map(|(name, _)| &**name).collect()
    }

    /// What it has of podman's networks, if that can move.
    pub fn networked(&self) -> Result<Option<Networked>, Failure> {
        let Some(name) = self.networks().into_iter().next() else {
            return Ok(None);
        };
        let published = self.published().into_iter();
        let published = published.map(|(ip, host, port)| format!("{ip}:{host}->{port}"));
        Networked::of(name, published.collect()).map(Some)
    }

    /// Ports of the node that lead to it: address and port of the node, and port and protocol.
    pub fn published(&self) -> Vec<(String, String, String)> {
        let ports = self.network_settings.ports.iter().flatten();
        let published = ports.flat_map(|(port, hosts)| {
            let hosts = hosts.iter().flatten();
            hosts.map(|host| (host.host_ip.clone(), host.host_port.clone(), port.clone()))
        });
        published.collect()
    }

    /// The one network of podman's that it is in, and what it has of that.
    pub fn endpoint(&self) -> Result<Option<(String, Endpoint)>, Failure> {
        let networks = self.networks();
        if let [_, _, ..] = networks[..] {
            return Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!(
                    "the container {} is in {} networks of podman ({}): only one is moved",
                    self.name,
                    networks.len(),
                    networks.join(", ")
                ),
            ));
        }
        let name = networks.into_iter().next();
        let all = self.network_settings.networks.as_ref();
        Ok(name.and_then(|name| Some((name.to_owned(), all?.get(name)?.clone()))))
    }

    /// Its named volumes, if all of them can move. `others` are containers that move with it.
    pub fn volumes(&self, others: &[&str]) -> Result<Vec<Volume>, Failure> {
        let mounts = self.mounts.iter().flatten();
        let names: BTreeSet<&str> = mounts
            .filter(|mount| mount.kind == VOLUME)
            .map(|mount| &*mount.name)
            .collect();
        let all: Vec<&str> = others.iter().copied().chain([self.id().as_str()]).collect();
        let volume = |name: &str| Volume::of(name, &all);
        names.into_iter().map(volume).collect()
    }

    /// Refuses standard streams that podman does not make again: they are pipes to its monitor, or
    /// nothing.
    pub fn check_streams(&self, streams: &[String]) -> Result<(), Failure> {
        let unfit = |text: String| Err(Failure::new(ErrorCode::StdioUnfit, text));
        if self.config.open_stdin {
            return unfit("the container's input is held open (--interactive)".to_owned());
        }
        let known = |name: &&String| *name == "/dev/null" || name.starts_with("pipe:[");
        match streams.iter().find(|name| !known(name)) {
            Some(other) => unfit(format!(
                "the container was started with {other} for a standard stream, which is not moved \
                 yet: let podman have its log"
            )),
            None => Ok(()),
        }
    }
}

impl Endpoint {
    /// The hardware address of its link.
    pub fn mac(&self) -> Option<[u8; 6]> {
        let bytes = self.mac_address.split(':');
        let bytes: Option<Vec<u8>> = bytes
            .map(|text| u8::from_str_radix(text, 16).ok())
            .collect();
        bytes?.try_into().ok()
    }

    /// Its addresses, with the length of the prefix and the gateway of each.
    pub fn addresses(&self) -> Vec<(IpAddr, u8, Option<IpAddr>)> {
        let all = [
            (&self.ip, self.prefix, &self.gateway),
            (&self.ip6, self.prefix6, &self.gateway6),
        ];
        let parse = |(ip, prefix, gateway): (&String, u8, &String)| {
            Some((ip.parse().ok()?, prefix, gateway.parse().ok()))
        };
        all.into_iter().filter_map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn inspected(change: impl FnOnce(&mut Value)) -> Inspected {
        let mut one = json!({
            "Id": "0a", "Image": "0b", "Pod": "", "OCIRuntime": "crun",
            "State": {"Status": "running", "Pid": 7},
            "Mounts": [], "Dependencies": [],
            "HostConfig": {
                "CgroupManager": "cgroupfs", "NetworkMode": "none",
                "RestartPolicy": {"Name": "always", "MaximumRetryCount": 0},
            },
            "Config": {"Labels": null, "OpenStdin": false},
        });
        change(&mut one);
        let name = "web".parse().unwrap();
        Inspected::parse(&json!([one]).to_string(), &name).unwrap()
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let checked = inspected(change).check(&"web".parse().unwrap(), None);
        checked.expect_err("refused").to_string()
    }

    #[test]
    fn what_is_not_moved_yet_is_refused_by_its_name() {
        inspected(|_| ())
            .check(&"web".parse().unwrap(), None)
            .unwrap();
        let gone = refused(|one| one["State"]["Status"] = "exited".into());
        assert!(
            gone.starts_with("workload-gone") && gone.contains("exited"),
            "{gone}"
        );
        let unit = refused(|one| one["Config"]["Labels"] = json!({UNIT: "web.service"}));
        assert!(unit.contains("web.service"), "{unit}");
        let image = json!([{"Type": "image", "Destination": "/data"}]);
        let image = refused(|one| one["Mounts"] = image);
        assert!(image.contains("/data mounted"), "{image}");
        let manager = refused(|one| one["HostConfig"]["CgroupManager"] = "systemd".into());
        assert!(manager.contains("cgroup_manager"), "{manager}");
        let network = refused(|one| one["HostConfig"]["NetworkMode"] = "slirp4netns".into());
        assert!(network.contains("\"slirp4netns\""), "{network}");
        let networks = refused(|one| {
            one["HostConfig"]["NetworkMode"] = "bridge".into();
            one["NetworkSettings"] = json!({"Networks": {"lan": {}, "podman": {}}});
        });
        assert!(networks.contains("lan, podman"), "{networks}");
        assert!(refused(|one| one["Pod"] = "0c".into()).contains("the pod 0c"));
        let health = refused(|one| one["Config"]["Healthcheck"] = json!({"Test": ["CMD"]}));
        assert!(health.contains("health check"), "{health}");
    }

    #[test]
    fn what_it_writes_is_in_an_overlay_or_it_is_refused_by_its_driver() {
        let refused = |driver: Value| {
            let one = inspected(|one| one["GraphDriver"] = driver);
            one.layer().unwrap_err().to_string()
        };
        let vfs = refused(json!({"Name": "vfs", "Data": null}));
        assert!(vfs.contains("\"vfs\""), "{vfs}");
        let data = json!({"MergedDir": "/no/such/mount", "UpperDir": "/upper"});
        let gone = refused(json!({"Name": "overlay", "Data": data}));
        assert!(gone.contains("/no/such/mount"), "{gone}");
    }

    #[test]
    fn a_policy_is_told_as_it_is_set() {
        assert_eq!(inspected(|_| ()).restart(), "always");
        let failing = json!({"Name": "on-failure", "MaximumRetryCount": 3});
        let failing = inspected(|one| one["HostConfig"]["RestartPolicy"] = failing);
        assert_eq!(failing.restart(), "on-failure:3");
    }

    #[test]
    fn streams_are_pipes_of_podman_or_nothing() {
        let streams = |all: [&str; 2]| all.map(str::to_owned);
        let one = inspected(|_| ());
        one.check_streams(&streams(["/dev/null", "pipe:[7]"]))
            .unwrap();
        let file = one
            .check_streams(&streams(["/dev/null", "/var/log/web"]))
            .unwrap_err();
        assert_eq!(file.code(), ErrorCode::StdioUnfit);
        let open = inspected(|one| one["Config"]["OpenStdin"] = true.into());
        assert!(open.check_streams(&[]).is_err());
        assert!(
            inspected(|one| one["OCIRuntime"] = "runc".into())
                .runtime()
                .is_err()
        );
    }
}
