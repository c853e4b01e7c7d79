//! A pod of podman at its target: its names are free, its network is here, and podman makes it
//! anew, with an infra container of its own, before the containers come into it.
//!
//! Invariants: what is made is written down before, so that whoever finds the note removes this pod
//! and none that somebody else has called so since; one whose containers may have run is removed by
//! nobody here. Its network is attached to nothing until then, as that of a container
//! ([`super::network`]).
//!
//! Absent: the shared `/dev/shm`. podman's import gives each container one of its own.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_proto::wire::podman_pod::{PodmanNetwork, PodmanPodDescription, PublishedPort};
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};

use super::super::command::{let_out, podman_at_once, podman_with, told};
use super::super::members::{Given, Prefix};
use super::super::network::{self, Attachment, Published};
use super::{Arriving as Container, has, none};

/// Where its names are, in the migration's folder, from before podman is asked.
const NOTE: &str = "podman-pod";

/// What that is called when its containers run, or have run: it is podman's then.
const RAN: &str = "podman-pod-ran";

/// Where podman writes down the id of the pod that it makes.
const ID: &str = "podman-pod-id";

/// How podman calls an infra container by itself, after the id of its pod.
const INFRA: &str = "-infra";

/// Digits of an id in such a name.
const SHORT: usize = 12;

/// What may be shared, as `--share` calls it, and as the kernel does.
const SHARED: [(&str, Namespaces, NamespaceKind); 3] = [
    ("net", Namespaces::NET, NamespaceKind::Net),
    ("ipc", Namespaces::IPC, NamespaceKind::Ipc),
    ("uts", Namespaces::UTS, NamespaceKind::Uts),
];

/// A pod that comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    pod: PodmanPodDescription,
    network: Option<Attachment>,
}

/// A pod that is made.
#[derive(Debug)]
pub struct Made {
    /// Its id here.
    pub(super) id: String,
    /// The cgroup that its containers' are in, from the root of each hierarchy.
    pub(super) cgroup: String,
    /// The namespaces that its containers share.
    pub namespaces: Vec<(NamespaceKind, OwnedFd)>,
}

/// By which a pod is known to be the one that was made.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    infra: String,
}

/// Of `podman pod inspect`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    #[serde(default)]
    cgroup_path: String,
    #[serde(rename = "InfraContainerID")]
    infra: String,
}

impl Arriving {
    /// Takes in hand what is offered; and its containers.
    pub fn begin(
        name: &ContainerId,
        description: &WorkloadDescription,
    ) -> Result<(Self, Vec<Container>), Failure> {
        let refused = |text: String| Failure::new(ErrorCode::UnsupportedWorkload, text);
        let container = description.container.as_ref();
        let pod = container.and_then(|container| container.podman_pod.clone());
        let pod =
            pod.ok_or_else(|| refused(format!("the offer does not say what pod {name} is")))?;
        if pod.name != *name {
            return Err(refused(format!(
                "the offer of the pod {name} describes another, {}",
                pod.name
            )));
        }
        let known = |share: &&String| SHARED.iter().any(|(name, ..)| name == share);
        if let Some(other) = pod.shared.iter().find(|share| !known(share)) {
            return Err(refused(format!(
                "the containers of the pod {name} share {other}, which is not moved yet"
            )));
        }
        if !pod.shared.iter().any(|share| share == SHARED[0].0) {
            return Err(refused(format!(
                "the containers of the pod {name} have networks of their own, which is not moved \
                 yet"
            )));
        }
        let volumes: Vec<String> = description
            .all_members()
            .filter_map(|member| member.container.as_ref()?.podman.as_ref())
            .flat_map(|podman| podman.volumes.iter().map(|volume| volume.name.clone()))
            .collect();
        let member = |description| Container::begin_in((&pod, &volumes), description);
        let members = description.all_members().map(member);
        let members = members.collect::<Result<_, _>>()?;
        let network = pod.network.as_ref().map(attachment);
        Ok((Self { pod, network }, members))
    }

    /// Compares what it needs with this node. Blocks, while podman answers.
    pub fn check(&self) -> Result<(), Failure> {
        let taken = |what: &str, name: &str| {
            let text = format!("podman has a {what} {name} at the target already: remove it first");
            Err(Failure::new(ErrorCode::NameTaken, text))
        };
        let name = self.pod.name.as_str();
        if has(["pod", "exists", name])? {
            return taken("pod", name);
        }
        // podman has one space of names for both.
        for name in [name, self.pod.infra_name.as_str()] {
            if has(["container", "exists", name])? {
                return taken("container", name);
            }
        }
        match &self.network {
            Some(network) => {
                network.check(self.pod.network.as_ref().is_some_and(|has| has.leads_out))
            }
            None => Ok(()),
        }
    }

    /// As that of a container.
    pub fn hold_network(&self, directory: &Path, hold: &str) -> Result<Option<String>, Failure> {
        let network = self.network.as_ref();
        network
            .map(|network| network.hold(directory, hold))
            .transpose()
    }

    /// Has podman make it, and start its infra container, which runs nothing of it. Blocks.
    pub fn make(&self, directory: &Path) -> Result<Made, Failure> {
        let infra = self.infra_name(directory);
        let note = serde_json::to_vec(&Note {
            infra: infra.clone(),
        });
        let noted = note
            .map_err(io::Error::from)
            .and_then(|note| fs::write(directory.join(NOTE), note));
        noted.map_err(|error| {
            let text = format!("writing {}: {error}", directory.join(NOTE).display());
            Failure::new(ErrorCode::Internal, text)
        })?;
        let asked = |words: Vec<String>| {
            podman_with(words).map_err(|error| {
                let text = format!("the pod {}: {}", self.pod.name, told(&error));
                Failure::new(ErrorCode::RuntimeFailed, text)
            })
        };
        let shown = self.shown(directory);
        let create = shown.iter().cloned().chain(self.create(&infra, directory));
        let id = asked(create.collect())?.trim().to_owned();
        let start = ["pod", "start", &id].map(str::to_owned);
        asked(shown.into_iter().chain(start).collect())?;
        self.made(id)
    }

    /// What it is made of, once its infra container runs.
    fn made(&self, id: String) -> Result<Made, Failure> {
        let unfit = |why: String| {
            let text = format!("the pod {} that podman has made: {why}", self.pod.name);
            Failure::new(ErrorCode::RuntimeFailed, text)
        };
        let asked = |words: &[&str]| {
            let words = words.iter().copied().map(str::to_owned).collect();
            podman_with(words).map_err(|error| unfit(told(&error)))
        };
        let printed = asked(&["pod", "inspect", &id])?;
        let pod = one::<Inspected>(&printed).map_err(unfit)?;
        let format = "{{.State.Pid}} {{.State.ConmonPid}}";
        let told = asked(&["container", "inspect", "--format", format, &pod.infra])?;
        let mut pids = told.split_whitespace().map(str::parse::<i32>);
        let (Some(Ok(pid)), Some(Ok(monitor))) = (pids.next(), pids.next()) else {
            return Err(unfit(format!("its infra container has no process: {told}")));
        };
        let_out(monitor);
        let shared = SHARED.iter().filter(|(name, ..)| self.shares(name));
        let namespaces = shared.map(|(name, _, kind)| {
            let opened = namespace::open(pid, *kind);
            let opened = opened.map_err(|error| unfit(format!("its {name} namespace: {error}")))?;
            Ok((*kind, opened))
        });
        Ok(Made {
            namespaces: namespaces.collect::<Result<_, Failure>>()?,
            cgroup: match pod.cgroup_path.is_empty() {
                false => pod.cgroup_path,
                true => return Err(unfit("it has no cgroup".to_owned())),
            },
            id,
        })
    }

    fn shares(&self, name: &str) -> bool {
        self.pod.shared.iter().any(|share| share == name)
    }

    /// podman calls it by the id of its pod, which is another here: so it gets one of this
    /// migration, by which it is known. One that somebody has chosen stays.
    fn infra_name(&self, directory: &Path) -> String {
        let (name, id) = (self.pod.infra_name.as_str(), self.pod.id.as_str());
        let own = name.strip_suffix(INFRA).filter(|own| {
            let is_hex = own.bytes().all(|byte| byte.is_ascii_hexdigit());
            own.len() == SHORT && is_hex
        });
        match (own, directory.file_name()) {
            (Some(_), Some(migration)) => {
                let migration = migration.to_string_lossy();
                let short = migration.get(..SHORT).unwrap_or(&migration);
                format!("{short}{INFRA}")
            }
            _ => {
                tracing::debug!(pod = id, infra = name, "its infra container has a name");
                name.to_owned()
            }
        }
    }

    /// Has podman see networks as they are to be for now.
    fn shown(&self, directory: &Path) -> Vec<String> {
        let networks = network::held_in(directory);
        match self.network {
            Some(_) => vec![
                "--network-config-dir".to_owned(),
                networks.to_string_lossy().into_owned(),
            ],
            None => Vec::new(),
        }
    }

    fn create(&self, infra: &str, directory: &Path) -> Vec<String> {
        let pod = &self.pod;
        let id = directory.join(ID).to_string_lossy().into_owned();
        let mut words = ["pod", "create", "--name", pod.name.as_str()]
            .map(str::to_owned)
            .to_vec();
        let mut say = |name: &str, value: &str| words.push(format!("--{name}={value}"));
        say("infra-name", infra);
        say("pod-id-file", &id);
        say("share", &pod.shared.join(","));
        let said = [
            ("hostname", &pod.hostname),
            ("restart", &pod.restart),
            ("exit-policy", &pod.exit_policy),
        ];
        for (name, value) in said.into_iter().filter(|(_, value)| !value.is_empty()) {
            say(name, value);
        }
        for (key, value) in &pod.labels {
            say("label", &format!("{key}={value}"));
        }
        let lists = [
            ("add-host", &pod.hosts),
            ("dns", &pod.dns_servers),
            ("dns-search", &pod.dns_searches),
            ("dns-option", &pod.dns_options),
        ];
        for (name, list) in lists {
            list.iter().for_each(|value| say(name, value));
        }
        if pod.no_hosts {
            say("no-hosts", "true");
        }
        if 0 < pod.shm_bytes {
            say("shm-size", &format!("{}b", pod.shm_bytes));
        }
        match &pod.network {
            Some(network) => {
                say("network", &networked(network));
                let published = network.published.iter().map(publish);
                published.for_each(|port| say("publish", &port));
            }
            None => say("network", "none"),
        }
        words
    }
}

/// What it has of podman's network, as `--network` has it.
fn networked(network: &PodmanNetwork) -> String {
    let [a, b, c, d, e, f] = network.mac;
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let addresses = network.addresses.iter();
    let ips: String = addresses
        .map(|given| format!(",ip={}", given.address.ip))
        .collect();
    let (name, interface) = (&network.name, &network.interface);
    format!("{name}:interface_name={interface},mac={mac}{ips}")
}

/// As `--publish` has it.
fn publish(port: &PublishedPort) -> String {
    let more = port.range.saturating_sub(1);
    let range = |first: u16| match more {
        0 => first.to_string(),
        more => format!("{first}-{}", first.saturating_add(more)),
    };
    let host = match port.host_ip.contains(':') {
        true => format!("[{}]", port.host_ip),
        false => port.host_ip.clone(),
    };
    let host = if host.is_empty() { host } else { host + ":" };
    let protocol = match &*port.protocol {
        "" => String::new(),
        protocol => format!("/{protocol}"),
    };
    let (at_node, inside) = (range(port.host_port), range(port.container_port));
    format!("{host}{at_node}:{inside}{protocol}")
}

fn attachment(network: &PodmanNetwork) -> Attachment {
    let given = network.addresses.iter().map(|given| Given {
        ipnet: Prefix {
            ip: given.address.ip,
            length: given.address.prefix,
        },
        gateway: given.gateway,
    });
    let published = network.published.iter().map(|port| Published {
        host_ip: port.host_ip.clone(),
        host_port: port.host_port,
        container_port: port.container_port,
        range: port.range,
        protocol: port.protocol.clone(),
    });
    Attachment {
        network: network.name.clone(),
        subnets: given.collect(),
        published: published.collect(),
    }
}

/// The namespaces that are the pod's, of those that a container has.
pub(super) fn shared_of(pod: &PodmanPodDescription) -> Namespaces {
    let shared = SHARED
        .iter()
        .filter(|(name, ..)| pod.shared.iter().any(|share| share == name));
    shared.fold(Namespaces::NONE, |all, (_, kind, _)| all.with(*kind))
}

/// podman prints one alone, or a list of it.
fn one<T: for<'a> Deserialize<'a>>(printed: &str) -> Result<T, String> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Printed<T> {
        List(Vec<T>),
        One(T),
    }
    let printed: Printed<T> =
        serde_json::from_str(printed).map_err(|error| format!("what podman says: {error}"))?;
    match printed {
        Printed::One(one) => Ok(one),
        Printed::List(list) => list
            .into_iter()
            .next()
            .ok_or_else(|| "it is none".to_owned()),
    }
}

/// Removes what podman has of a pod that was to come, and none of whose containers has run. Blocks.
pub fn sweep(directory: &Path) {
    let Ok(note) = fs::read(directory.join(NOTE)) else {
        return;
    };
    let Some(id) = made_here(directory, &note) else {
        return;
    };
    let remove = ["pod", "rm", "--force", "--ignore", "--time", "0", &id];
    if let Err(error) = podman_at_once(remove) {
        tracing::warn!(pod = id, %error, "podman lists a pod that has not come");
    }
}

/// The id of the pod that was made. podman may have been killed before it has written that down:
/// then its infra container is known by its name, unless somebody had chosen that.
fn made_here(directory: &Path, note: &[u8]) -> Option<String> {
    if let Ok(id) = fs::read_to_string(directory.join(ID)) {
        let id = id.trim().to_owned();
        return (!id.is_empty()).then_some(id);
    }
    let note: Note = serde_json::from_slice(note).ok()?;
    let migration = directory.file_name()?.to_str()?;
    let own = note.infra.strip_suffix(INFRA)?;
    if !migration.starts_with(own) {
        return None;
    }
    let pod = ["container", "inspect", "--format", "{{.Pod}}", &note.infra];
    let pod = podman_at_once(pod).ok()?.trim().to_owned();
    (!pod.is_empty()).then_some(pod)
}

/// Its containers run: from here on nobody has podman remove it by what is noted here.
pub fn runs(directory: &Path) {
    let renamed = fs::rename(directory.join(NOTE), directory.join(RAN));
    if let Err(error) = renamed.or_else(none) {
        tracing::error!(%error, "{} says that a pod has not run, which has",
            directory.join(NOTE).display());
    }
}

/// Says that podman has one whose containers may have run.
pub fn leave(directory: &Path) {
    let notes = [NOTE, RAN].map(|name| directory.join(name));
    if !notes.iter().any(|note: &PathBuf| note.exists()) {
        return;
    }
    let id = fs::read_to_string(directory.join(ID)).unwrap_or_default();
    tracing::warn!(
        pod = id.trim(),
        "podman keeps a pod whose containers may have run here, with what they have written: \
         remove it when it is certain that nobody needs it"
    );
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use pageferry_proto::wire::description::LinkAddress;
    use pageferry_proto::wire::podman_pod::PodmanAddress;

    use super::*;

    fn pod() -> PodmanPodDescription {
        let port = |host_ip: &str, host_port, range| PublishedPort {
            host_ip: host_ip.to_owned(),
            host_port,
            container_port: 80,
            range,
            protocol: "tcp".to_owned(),
        };
        PodmanPodDescription {
            name: "shop".parse().unwrap(),
            id: "0a".repeat(32).parse().unwrap(),
            infra_id: "0b".repeat(32).parse().unwrap(),
            infra_name: "0a0a0a0a0a0a-infra".parse().unwrap(),
            hostname: "shop".to_owned(),
            labels: [("app".to_owned(), "--shop".to_owned())].into(),
            shared: ["net", "ipc", "uts"].map(str::to_owned).to_vec(),
            restart: "always".to_owned(),
            exit_policy: "continue".to_owned(),
            network: Some(PodmanNetwork {
                name: "podman".to_owned(),
                interface: "eth0".to_owned(),
                mac: [2, 0, 0, 0, 0, 10],
                addresses: vec![PodmanAddress {
                    address: LinkAddress {
                        ip: IpAddr::from([10, 88, 0, 2]),
                        prefix: 16,
                    },
                    gateway: Some(IpAddr::from([10, 88, 0, 1])),
                }],
                published: vec![port("", 8080, 1), port("fd00::1", 9000, 3)],
                leads_out: true,
            }),
            hosts: vec!["db:10.0.0.1".to_owned()],
            no_hosts: false,
            dns_servers: Vec::new(),
            dns_searches: Vec::new(),
            dns_options: Vec::new(),
            shm_bytes: 4096,
        }
    }

    fn arriving(pod: PodmanPodDescription) -> Arriving {
        let network = pod.network.as_ref().map(attachment);
        Arriving { pod, network }
    }

    #[test]
    fn a_pod_is_created_as_it_was_and_nothing_of_it_is_an_option_of_its_own() {
        let made = arriving(pod()).create("x-infra", Path::new("/run/m"));
        let expected = [
            "pod",
            "create",
            "--name",
            "shop",
            "--infra-name=x-infra",
            "--pod-id-file=/run/m/podman-pod-id",
            "--share=net,ipc,uts",
            "--hostname=shop",
            "--restart=always",
            "--exit-policy=continue",
            "--label=app=--shop",
            "--add-host=db:10.0.0.1",
            "--shm-size=4096b",
            "--network=podman:interface_name=eth0,mac=02:00:00:00:00:0a,ip=10.88.0.2",
            "--publish=8080:80/tcp",
            "--publish=[fd00::1]:9000-9002:80-82/tcp",
        ];
        assert_eq!(made, expected);
        let none = PodmanPodDescription {
            network: None,
            ..pod()
        };
        let none = arriving(none).create("x", Path::new("/run/m"));
        assert_eq!(none.last().map(String::as_str), Some("--network=none"));
    }

    #[test]
    fn an_infra_container_has_a_name_of_the_migration_unless_somebody_has_chosen_one() {
        let migration = Path::new("/run/0123456789abcdef0123456789abcdef");
        assert_eq!(arriving(pod()).infra_name(migration), "0123456789ab-infra");
        let named = PodmanPodDescription {
            infra_name: "shop-infra".parse().unwrap(),
            ..pod()
        };
        assert_eq!(arriving(named).infra_name(migration), "shop-infra");
    }

    #[test]
    fn a_pod_is_known_by_its_id_and_one_that_runs_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let note = br#"{"infra":"shop-infra"}"#;
        // Somebody has chosen that name, so that it says nothing.
        assert_eq!(made_here(path, note), None);
        fs::write(path.join(ID), "0a0b\n").unwrap();
        assert_eq!(made_here(path, note).as_deref(), Some("0a0b"));
        fs::write(path.join(NOTE), note).unwrap();
        runs(path);
        runs(path);
        assert!(!path.join(NOTE).exists() && path.join(RAN).exists());
        sweep(path);
        leave(path);
    }

    #[test]
    fn what_podman_prints_is_one_or_a_list_of_it() {
        let text = r#"{"CgroupPath":"/libpod_parent/0a","InfraContainerID":"0b","More":1}"#;
        for printed in [text.to_owned(), format!("[{text}]")] {
            let pod: Inspected = one(&printed).unwrap();
            assert_eq!(
                (&*pod.infra, &*pod.cgroup_path),
                ("0b", "/libpod_parent/0a")
            );
        }
        one::<Inspected>("[]").unwrap_err();
        one::<Inspected>("{}").unwrap_err();
    }
}
