//! A pod of podman, named as podman names it: containers that share namespaces, which the pod's
//! infra container holds.
//!
//! Its containers are the members of a party, each as one of podman's is ([`super`]). The infra
//! container runs nothing of the workload: it stays, and is removed with the pod when the members
//! run elsewhere; the target makes a pod of its own.
//!
//! Invariants: of a pod that stays nothing is changed but the policies of its containers, which are
//! put back; the pod is removed only when nothing is left in it but its infra container.
//!
//! Absent, and refused by name: pods without an infra container or without a network namespace of
//! their own, a shared pid namespace, files in the pod's `/dev/shm`, limits of the pod itself,
//! containers in it that do not run, pods that a unit of systemd owns.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use pageferry_proto::id::{ContainerId, MEMBERS_MAX};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{LinkAddress, WorkloadDescription};
use pageferry_proto::wire::podman_pod::{
    PodmanAddress, PodmanNetwork, PodmanPodDescription, PublishedPort,
};
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::command::{CommandError, podman_at_once, told};
use super::inspect::{Endpoint, Inspected, UNIT};
use super::network::Networked;
use super::{ContainerName, Podman, folders_of_infra};

/// Namespaces that containers of a pod may share here, as `--share` has them.
const SHARED: [(&str, NamespaceKind); 3] = [
    ("net", NamespaceKind::Net),
    ("ipc", NamespaceKind::Ipc),
    ("uts", NamespaceKind::Uts),
];

/// The one that they must share.
const NET: &str = "net";

/// Limits of the pod itself, as its inspection has them.
const LIMITS: [&str; 11] = [
    "blkio_weight",
    "cpu_period",
    "cpu_quota",
    "cpu_shares",
    "cpuset_cpus",
    "cpuset_mems",
    "device_read_bps",
    "devices",
    "memory_limit",
    "memory_swap",
    "volumes_from",
];

/// A pod at its source, as the journal keeps it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodmanPod {
    name: ContainerName,
    id: ContainerName,
    infra: ContainerName,
    /// What podman calls the members, in their order.
    members: Vec<String>,
    /// Namespaces that they share, as `--share` has them.
    shared: Vec<String>,
    /// If it is in a network of podman's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network: Option<Networked>,
    /// The pod's `/dev/shm`.
    shm: PathBuf,
}

/// What one of its containers has of its pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InPod {
    infra: ContainerName,
    shared: Vec<String>,
}

/// What `podman pod inspect` says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedPod {
    id: String,
    name: String,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    exit_policy: String,
    #[serde(default)]
    restart_policy: String,
    #[serde(default, rename = "InfraContainerID")]
    infra: String,
    #[serde(default)]
    infra_config: Option<InfraConfig>,
    #[serde(default)]
    shared_namespaces: Option<Vec<String>>,
    #[serde(default)]
    containers: Option<Vec<Listed>>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A container of a pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    id: String,
    name: String,
    state: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct InfraConfig {
    host_network: bool,
    #[serde(rename = "DNSServer")]
    dns_servers: Option<Vec<String>>,
    #[serde(rename = "DNSSearch")]
    dns_searches: Option<Vec<String>>,
    #[serde(rename = "DNSOption")]
    dns_options: Option<Vec<String>>,
    no_manage_hosts: bool,
    host_add: Option<Vec<String>>,
}

/// One, or a list of one: podman has printed both.
#[derive(Deserialize)]
#[serde(untagged)]
enum Printed {
    Many(Vec<InspectedPod>),
    One(Box<InspectedPod>),
}

impl PodmanPod {
    /// The pod of this name with its members, if it runs here and can move. Blocks, while podman
    /// answers.
    pub fn find(name: &ContainerId) -> Result<(Self, Vec<Podman>), Failure> {
        let pod = InspectedPod::of(name)?;
        pod.check(name)?;
        let infra_id = pod.named(&pod.infra)?;
        let infra = Inspected::of(&infra_id)?;
        let shared = pod.shared_namespaces.clone().unwrap_or_default();
        let in_pod = InPod {
            infra: ContainerName(infra_id),
            shared: shared.clone(),
        };
        let listed: Vec<&Listed> = pod.members().collect();
        let ids: Vec<&str> = listed.iter().map(|one| &*one.id).collect();
        let mut members: Vec<Podman> = Vec::new();
        for one in &listed {
            let mut member = Podman::find_in(&pod.named(&one.id)?, Some((&in_pod, &ids)))?;
            // A volume that several have travels with the first of them.
            let has = |path: &Path| members.iter().any(|before| before.has_volume_at(path));
            member.volumes.retain(|volume| !has(volume.path()));
            members.push(member);
        }
        let found = Self {
            name: ContainerName(pod.named(&pod.name)?),
            id: ContainerName(pod.named(&pod.id)?),
            members: listed.iter().map(|one| one.name.clone()).collect(),
            shared,
            network: infra.networked()?,
            shm: shm(&in_pod, &members),
            infra: in_pod.infra,
        };
        found.check_frozen()?;
        Ok((found, members))
    }

    /// What the target makes the pod of, and which member is called what. `members` are the
    /// descriptions of the members in their order, the first of which has the network's. Blocks,
    /// while podman answers.
    pub fn describe(&self, members: &mut [WorkloadDescription]) -> Result<(), Failure> {
        for (member, name) in members.iter_mut().zip(&self.members) {
            member.member_name.clone_from(name);
        }
        let pod = InspectedPod::of(&self.id.0)?;
        let infra = Inspected::of(&self.infra.0)?;
        let config = pod.infra_config.as_ref();
        let list = |list: fn(&InfraConfig) -> &Option<Vec<String>>| {
            let list = config.and_then(|config| list(config).clone());
            list.unwrap_or_default()
        };
        let first = members
            .first_mut()
            .ok_or_else(|| refused(&self.name.0, "is empty"))?;
        let described = PodmanPodDescription {
            name: self.name.0.clone(),
            id: self.id.0.clone(),
            infra_id: self.infra.0.clone(),
            infra_name: pod.named(infra.name())?,
            hostname: pod.hostname.clone(),
            labels: pod.labels.clone().unwrap_or_default(),
            shared: self.shared.clone(),
            restart: pod.restart_policy.clone(),
            exit_policy: pod.exit_policy.clone(),
            network: self.describe_network(&infra, first)?,
            hosts: list(|config| &config.host_add),
            no_hosts: config.is_some_and(|config| config.no_manage_hosts),
            dns_servers: list(|config| &config.dns_servers),
            dns_searches: list(|config| &config.dns_searches),
            dns_options: list(|config| &config.dns_options),
            shm_bytes: infra.shm_bytes(),
        };
        if let Some(container) = &mut first.container {
            container.podman_pod = Some(described);
        }
        Ok(())
    }

    fn describe_network(
        &self,
        infra: &Inspected,
        first: &WorkloadDescription,
    ) -> Result<Option<PodmanNetwork>, Failure> {
        let (Some(network), Some((name, endpoint))) = (&self.network, infra.endpoint()?) else {
            return Ok(None);
        };
        let unfit = |what: &str| {
            refused(
                &self.name.0,
                &format!("is in podman's network {name} {what}"),
            )
        };
        let mac = endpoint
            .mac()
            .ok_or_else(|| unfit("by a link without an address"))?;
        let link = first.links.iter().find(|link| link.mac == mac);
        let link = link.ok_or_else(|| unfit("and has no link with the address that it gave"))?;
        let published = infra.published().into_iter();
        let published = published.map(|(host_ip, host_port, port)| {
            let (number, protocol) = port.split_once('/').unwrap_or((&port, "tcp"));
            Some(PublishedPort {
                host_ip,
                host_port: host_port.parse().ok()?,
                container_port: number.parse().ok()?,
                range: 1,
                protocol: protocol.to_owned(),
            })
        });
        let published = published.collect::<Option<Vec<_>>>();
        Ok(Some(PodmanNetwork {
            interface: link.name.clone(),
            mac,
            addresses: addresses(&endpoint),
            published: published.ok_or_else(|| unfit("and publishes what is no port"))?,
            leads_out: network.leads_out(),
            name,
        }))
    }

    /// What they share that CRIU is not to dump of any member.
    pub fn shares(&self, kind: NamespaceKind) -> bool {
        shares(&self.shared, kind)
    }

    /// Refuses files in the pod's `/dev/shm`: no member has that for its own.
    pub fn check_frozen(&self) -> Result<(), Failure> {
        if !self.shares(NamespaceKind::Ipc) {
            return Ok(());
        }
        let file = fs::read_dir(&self.shm)
            .into_iter()
            .flatten()
            .flatten()
            .next();
        match file {
            None => Ok(()),
            Some(file) => Err(refused(
                &self.name.0,
                &format!(
                    "has files in /dev/shm, which its containers share ({}): that is not moved yet",
                    file.file_name().display()
                ),
            )),
        }
    }

    /// What a move takes from its clients.
    pub fn notes(&self) -> Vec<String> {
        let network = self.network.as_ref();
        network.map(Networked::notes).unwrap_or_default()
    }

    /// Whether podman deletes its links when it has ended, and what hangs on them.
    pub const fn has_network(&self) -> bool {
        self.network.is_some()
    }

    /// Its members run elsewhere, and podman has them no more: the pod goes, with its address.
    /// Blocks, while podman answers.
    pub fn release(&self) {
        let pod = match InspectedPod::of(&self.id.0) {
            Ok(pod) => pod,
            Err(failure) if failure.code() == ErrorCode::WorkloadGone => return,
            Err(failure) => {
                tracing::warn!(pod = self.name.as_str(), %failure,
                    "podman has a pod that has moved away");
                return;
            }
        };
        if let Some(other) = pod.members().next() {
            tracing::warn!(
                pod = self.name.as_str(),
                container = other.name,
                "a pod that has moved away has another container here, and stays"
            );
            return;
        }
        // Its infra container runs, and waits for nothing.
        let removed = podman_at_once(["pod", "rm", "--force", "--time", "0", self.id.as_str()]);
        if let Err(error) = removed {
            tracing::warn!(pod = self.name.as_str(), %error,
                "podman has a pod that has moved away");
        }
    }
}

impl InPod {
    /// Its infra container.
    pub(super) fn infra(&self) -> &str {
        self.infra.as_str()
    }

    /// Where podman has files of the pod's that are mounted into its containers; `bundle` is that
    /// of one of them.
    pub(super) fn folders(&self, bundle: &Path) -> Vec<PathBuf> {
        folders_of_infra(&self.infra.0, bundle)
    }

    /// Namespaces that are the pod's.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = NamespaceKind> {
        let kinds = SHARED.map(|(_, kind)| kind).into_iter();
        kinds.filter(|kind| shares(&self.shared, *kind))
    }
}

fn shares(shared: &[String], kind: NamespaceKind) -> bool {
    let mut known = SHARED.iter();
    known.any(|(name, has)| *has == kind && shared.iter().any(|shared| shared == name))
}

impl InspectedPod {
    /// Asks podman.
    fn of(name: &ContainerId) -> Result<Self, Failure> {
        let printed = podman_at_once(["pod", "inspect", name.as_str()]);
        let printed = printed.map_err(|error| match error {
            CommandError::Failed { said, .. } => Failure::new(
                ErrorCode::WorkloadGone,
                format!("podman has no pod {name}: {said}"),
            ),
            other => Failure::new(ErrorCode::UnsupportedWorkload, told(&other)),
        })?;
        Self::parse(&printed).map_err(|why| {
            refused(
                name,
                &format!("is described by podman as cannot be read: {why}"),
            )
        })
    }

    fn parse(printed: &str) -> Result<Self, String> {
        match serde_json::from_str(printed).map_err(|error| error.to_string())? {
            Printed::One(one) => Ok(*one),
            Printed::Many(many) => many
                .into_iter()
                .next()
                .ok_or_else(|| "it is none".to_owned()),
        }
    }

    /// Its containers without the infra container.
    fn members(&self) -> impl Iterator<Item = &Listed> {
        let all = self.containers.iter().flatten();
        all.filter(|one| one.id != self.infra)
    }

    fn named(&self, text: &str) -> Result<ContainerId, Failure> {
        text.parse().map_err(|error| {
            let text = format!("the pod {}: {error}", self.name);
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })
    }

    /// Refuses what is not moved yet, by its name.
    fn check(&self, name: &ContainerId) -> Result<(), Failure> {
        let refused = |what: String| Err(refused(name, &what));
        if self.name != name.as_str() {
            return refused(format!(
                "is called {} by podman: move it by its name, which it keeps",
                self.name
            ));
        }
        if let Some(unit) = self.labels.iter().find_map(|all| all.get(UNIT)) {
            return refused(format!(
                "is run by the unit {unit} of systemd, which would start it again"
            ));
        }
        let shared = self.shared_namespaces.as_deref().unwrap_or_default();
        if self.infra.is_empty() || !shared.iter().any(|kind| kind == NET) {
            return refused(
                "has no infra container with a network for all of its containers, and is not moved \
                 yet"
                    .to_owned(),
            );
        }
        let known = |kind: &&String| SHARED.iter().any(|(known, _)| known == *kind);
        if let Some(kind) = shared.iter().find(|kind| !known(kind)) {
            return refused(format!(
                "has one {kind} namespace for all of its containers (--share), which is not moved \
                 yet"
            ));
        }
        if self
            .infra_config
            .as_ref()
            .is_some_and(|config| config.host_network)
        {
            return refused("has the node's network, which is not moved yet".to_owned());
        }
        let is_set = |limit: &&&str| {
            let value = self.rest.get(**limit);
            value.is_some_and(|value| match value {
                Value::Null => false,
                Value::Number(number) => number.as_i64() != Some(0),
                Value::String(text) => !text.is_empty(),
                Value::Array(list) => !list.is_empty(),
                Value::Bool(_) | Value::Object(_) => true,
            })
        };
        if let Some(limit) = LIMITS.iter().find(is_set) {
            return refused(format!(
                "has a limit for all of its containers together ({limit}), which is not moved yet"
            ));
        }
        let count = self.members().count();
        if count == 0 || MEMBERS_MAX < count {
            return refused(format!(
                "has {count} containers: 1 to {MEMBERS_MAX} are moved"
            ));
        }
        match self.members().find(|one| one.state != "running") {
            Some(one) => refused(format!(
                "has the container {}, which does not run (it is {}): start or remove it first",
                one.name, one.state
            )),
            None => Ok(()),
        }
    }
}

/// Where the `/dev/shm` is that all members have.
fn shm(in_pod: &InPod, members: &[Podman]) -> PathBuf {
    let bundle = members.first().map(|member| member.container.bundle());
    let folders = bundle.map(|bundle| in_pod.folders(bundle));
    let own = folders.into_iter().flatten().next();
    own.unwrap_or_default().join("shm")
}

/// The addresses that podman has given out for it.
fn addresses(endpoint: &Endpoint) -> Vec<PodmanAddress> {
    let given = |(ip, prefix, gateway): (IpAddr, u8, Option<IpAddr>)| PodmanAddress {
        address: LinkAddress { ip, prefix },
        gateway,
    };
    endpoint.addresses().into_iter().map(given).collect()
}

fn refused(name: &ContainerId, what: &str) -> Failure {
    let text = format!("the pod {name} {what}");
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(change: impl FnOnce(&mut Value)) -> InspectedPod {
        let mut one = json!({
            "Id": "0c", "Name": "shop", "ExitPolicy": "continue", "State": "Running",
            "Hostname": "shop", "Labels": {"app": "shop"}, "CreateInfra": true,
            "InfraContainerID": "0a", "SharedNamespaces": ["ipc", "net", "uts"],
            "InfraConfig": {"HostNetwork": false, "DNSServer": null, "Networks": ["podman"]},
            "Containers": [
                {"Id": "0a", "Name": "0c-infra", "State": "running"},
                {"Id": "0b", "Name": "db", "State": "running"},
                {"Id": "0d", "Name": "web", "State": "running"},
            ],
            "cpu_quota": 0, "memory_limit": 0,
        });
        change(&mut one);
        InspectedPod::parse(&json!([one]).to_string()).unwrap()
    }

    #[test]
    fn a_pod_has_its_containers_without_the_one_that_holds_it() {
        let found = pod(|_| ());
        let names = found.members().map(|one| &*one.name);
        assert!(names.eq(["db", "web"]));
        found.check(&"shop".parse().unwrap()).unwrap();
        // An older podman prints no list.
        let printed = json!({"Id": "0c", "Name": "shop"}).to_string();
        assert_eq!(InspectedPod::parse(&printed).unwrap().name, "shop");
    }

    #[test]
    fn what_is_not_moved_yet_is_refused_by_its_name() {
        let refused = |change: fn(&mut Value)| {
            let refused = pod(change).check(&"shop".parse().unwrap());
            refused.unwrap_err().to_string()
        };
        let pid = refused(|one| one["SharedNamespaces"] = json!(["net", "pid"]));
        assert!(pid.contains("one pid namespace"), "{pid}");
        let none = refused(|one| one["SharedNamespaces"] = Value::Null);
        assert!(none.contains("infra"), "{none}");
        let bare = refused(|one| one["InfraContainerID"] = "".into());
        assert!(bare.contains("infra"), "{bare}");
        let host = refused(|one| one["InfraConfig"]["HostNetwork"] = true.into());
        assert!(host.contains("node's network"), "{host}");
        let limit = refused(|one| one["memory_limit"] = 5.into());
        assert!(limit.contains("memory_limit"), "{limit}");
        let ended = refused(|one| one["Containers"][2]["State"] = "exited".into());
        assert!(ended.contains("web") && ended.contains("exited"), "{ended}");
        let empty = refused(|one| one["Containers"] = Value::Null);
        assert!(empty.contains("0 containers"), "{empty}");
        let other = refused(|one| one["Name"] = "store".into());
        assert!(other.contains("called store"), "{other}");
        let unit = refused(|one| one["Labels"] = json!({UNIT: "shop.service"}));
        assert!(unit.contains("shop.service"), "{unit}");
    }

    #[test]
    fn a_member_is_in_what_the_pod_shares() {
        let in_pod = InPod {
            infra: ContainerName("0a".parse().unwrap()),
            shared: ["uts", "net"].map(str::to_owned).to_vec(),
        };
        let kinds = in_pod.namespaces();
        assert!(kinds.eq([NamespaceKind::Net, NamespaceKind::Uts]));
        let bundle = Path::new("/store/overlay-containers/0b/userdata");
        let all = in_pod.folders(bundle);
        assert_eq!(all[0], Path::new("/store/overlay-containers/0a/userdata"));
        assert!(all[1].ends_with("0a/userdata"));
    }
}
