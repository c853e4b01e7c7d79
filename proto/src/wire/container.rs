//! What a workload is to the container runtime that runs it.

use std::collections::BTreeMap;

use crate::id::ContainerId;
use crate::wire::control::{ControlError, missing, short};
use crate::wire::copied::COPIED_PATHS_MAX;
use crate::wire::description::PATH_BYTES_MAX;
use crate::wire::podman_pod::PodmanPodDescription;
use crate::wire::schema;

/// Longest configuration of a container, in bytes. Engines write some 20 KiB, most of it the
/// filter of system calls.
pub const CONFIG_BYTES_MAX: usize = 256 << 10; // 256 KiB

/// A container of an OCI runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerDescription {
    /// The folder of its bundle, at the source and at the target alike; absolute.
    pub bundle: String,
    /// The `config.json` in it.
    pub config: Vec<u8>,
    /// The version of its runtime at the source, as that says it: `1.3.3`. Empty if it is not said.
    pub runtime_version: String,
    /// What containerd has of it, if it is containerd's.
    pub containerd: Option<ContainerdDescription>,
    /// What podman has of it, if it is podman's.
    pub podman: Option<PodmanDescription>,
    /// What it is in a pod, if it is one of a pod's.
    pub pod: Option<PodDescription>,
    /// The pod of podman that it is the first member of.
    pub podman_pod: Option<PodmanPodDescription>,
}

/// Longest version of a runtime, in bytes.
pub const VERSION_BYTES_MAX: usize = 64;

/// The container of a pod that moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDescription {
    /// What the pod calls it.
    pub container: ContainerId,
    /// The digest of its image.
    pub image_digest: String,
    /// What its snapshot is on: the name of a chain of layers.
    pub snapshot_parent: String,
    /// Its standard streams, as the kernel calls them.
    pub streams: Vec<String>,
}

/// Streams of a container, and the longest name of one, in bytes.
const STREAMS: usize = 3;
const STREAM_BYTES_MAX: usize = 64;

/// A container of containerd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerdDescription {
    /// Its record in containerd's own encoding, without the configuration.
    pub record: Vec<u8>,
    /// What containerd calls the type of the configuration.
    pub spec_type: String,
    /// The digest of its image.
    pub image_digest: String,
    /// What its snapshot is on: the name of a chain of layers.
    pub snapshot_parent: String,
}

/// Longest record, in bytes: labels and what clients add.
pub const RECORD_BYTES_MAX: usize = 128 << 10; // 128 KiB
/// Longest name of a type, a digest or a chain of layers, in bytes.
const REFERENCE_BYTES_MAX: usize = 256;

/// A container of podman.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodmanDescription {
    /// What its runtime calls it.
    pub id: ContainerId,
    /// The id of its image.
    pub image: ContainerId,
    /// When podman starts it again, as `--restart` has it; empty for never.
    pub restart: String,
    /// What `podman container restore --import` reads, without pages.
    pub archive: Vec<u8>,
    /// Its named volumes, which the target makes.
    pub volumes: Vec<VolumeDescription>,
    /// It is in a network of podman's, whose bridge has a port that leads out of the source.
    pub leads_out: bool,
}

/// A named volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeDescription {
    /// As the engine calls it.
    pub name: String,
    /// Where its contents are, at both nodes; absolute.
    pub path: String,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
    /// How its driver was told to make it.
    pub options: BTreeMap<String, String>,
}

/// Longest name of a volume, in bytes: it is that of a folder.
pub const VOLUME_NAME_BYTES_MAX: usize = 255;
/// Most bytes of all labels and options of a volume.
pub const VOLUME_BYTES_MAX: usize = 16 << 10; // 16 KiB

/// Longest archive, in bytes: two configurations, and what tar adds.
pub const ARCHIVE_BYTES_MAX: usize = 512 << 10; // 512 KiB
/// Longest policy, in bytes: `on-failure` and a number.
const RESTART_BYTES_MAX: usize = 64;

impl From<&ContainerDescription> for schema::Container {
    fn from(container: &ContainerDescription) -> Self {
        Self {
            bundle: container.bundle.clone(),
            config: container.config.clone(),
            runtime_version: container.runtime_version.clone(),
            containerd: container.containerd.as_ref().map(Into::into),
            podman: container.podman.as_ref().map(Into::into),
            pod: container.pod.as_ref().map(Into::into),
            podman_pod: container.podman_pod.as_ref().map(Into::into),
        }
    }
}

impl From<&ContainerdDescription> for schema::Containerd {
    fn from(container: &ContainerdDescription) -> Self {
        Self {
            record: container.record.clone(),
            spec_type: container.spec_type.clone(),
            image_digest: container.image_digest.clone(),
            snapshot_parent: container.snapshot_parent.clone(),
        }
    }
}

impl From<&PodDescription> for schema::Pod {
    fn from(pod: &PodDescription) -> Self {
        Self {
            container: pod.container.to_string(),
            image_digest: pod.image_digest.clone(),
            snapshot_parent: pod.snapshot_parent.clone(),
            streams: pod.streams.clone(),
        }
    }
}

impl From<&PodmanDescription> for schema::Podman {
    fn from(podman: &PodmanDescription) -> Self {
        Self {
            id: podman.id.to_string(),
            image: podman.image.to_string(),
            restart: podman.restart.clone(),
            archive: podman.archive.clone(),
            volumes: podman.volumes.iter().map(Into::into).collect(),
            leads_out: podman.leads_out,
        }
    }
}

impl From<&VolumeDescription> for schema::Volume {
    fn from(volume: &VolumeDescription) -> Self {
        let map = |map: &BTreeMap<String, String>| map.clone().into_iter().collect();
        Self {
            name: volume.name.clone(),
            path: volume.path.clone(),
            labels: map(&volume.labels),
            options: map(&volume.options),
        }
    }
}

impl TryFrom<schema::Volume> for VolumeDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Volume) -> Result<Self, ControlError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let first = wire.name.as_bytes().first();
        let is_named = first.is_some_and(u8::is_ascii_alphanumeric);
        if !is_named || !wire.name.bytes().all(plain) {
            return Err(missing("volume.name"));
        }
        if !wire.path.starts_with('/') {
            return Err(missing("volume.path"));
        }
        short("volume.name", wire.name.len(), VOLUME_NAME_BYTES_MAX)?;
        short("volume.path", wire.path.len(), PATH_BYTES_MAX)?;
        let all = wire.labels.iter().chain(&wire.options);
        let bytes = all.map(|(key, value)| key.len() + value.len()).sum();
        short("volume.labels", bytes, VOLUME_BYTES_MAX)?;
        Ok(Self {
            name: wire.name,
            path: wire.path,
            labels: wire.labels.into_iter().collect(),
            options: wire.options.into_iter().collect(),
        })
    }
}

impl TryFrom<schema::Containerd> for ContainerdDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Containerd) -> Result<Self, ControlError> {
        short("containerd.record", wire.record.len(), RECORD_BYTES_MAX)?;
        for (name, text) in [
            ("containerd.spec_type", &wire.spec_type),
            ("containerd.image_digest", &wire.image_digest),
            ("containerd.snapshot_parent", &wire.snapshot_parent),
        ] {
            short(name, text.len(), REFERENCE_BYTES_MAX)?;
        }
        Ok(Self {
            record: wire.record,
            spec_type: wire.spec_type,
            image_digest: wire.image_digest,
            snapshot_parent: wire.snapshot_parent,
        })
    }
}

impl TryFrom<schema::Pod> for PodDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Pod) -> Result<Self, ControlError> {
        for (name, text) in [
            ("pod.image_digest", &wire.image_digest),
            ("pod.snapshot_parent", &wire.snapshot_parent),
        ] {
            short(name, text.len(), REFERENCE_BYTES_MAX)?;
        }
        if wire.streams.len() != STREAMS {
            return Err(missing("pod.streams"));
        }
        for stream in &wire.streams {
            short("pod.streams", stream.len(), STREAM_BYTES_MAX)?;
        }
        let container = wire.container.parse();
        Ok(Self {
            container: container.map_err(|_| missing("pod.container"))?,
            image_digest: wire.image_digest,
            snapshot_parent: wire.snapshot_parent,
            streams: wire.streams,
        })
    }
}

impl TryFrom<schema::Podman> for PodmanDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Podman) -> Result<Self, ControlError> {
        let id = |name: &'static str, text: String| -> Result<ContainerId, ControlError> {
            text.parse().map_err(|_| missing(name))
        };
        short(
            "container.podman.restart",
            wire.restart.len(),
            RESTART_BYTES_MAX,
        )?;
        short(
            "container.podman.volumes",
            wire.volumes.len(),
            COPIED_PATHS_MAX,
        )?;
        let volumes = wire.volumes.into_iter().map(TryInto::try_into);
        let volumes = volumes.collect::<Result<_, _>>()?;
        short(
            "container.podman.archive",
            wire.archive.len(),
            ARCHIVE_BYTES_MAX,
        )?;
        Ok(Self {
            id: id("container.podman.id", wire.id)?,
            image: id("container.podman.image", wire.image)?,
            restart: wire.restart,
            archive: wire.archive,
            volumes,
            leads_out: wire.leads_out,
        })
    }
}

impl TryFrom<schema::Container> for ContainerDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Container) -> Result<Self, ControlError> {
        if !wire.bundle.starts_with('/') || wire.bundle.split('/').any(|part| part == "..") {
            return Err(missing("container.bundle"));
        }
        short("container.bundle", wire.bundle.len(), PATH_BYTES_MAX)?;
        short("container.config", wire.config.len(), CONFIG_BYTES_MAX)?;
        short(
            "container.runtime_version",
            wire.runtime_version.len(),
            VERSION_BYTES_MAX,
        )?;
        Ok(Self {
            bundle: wire.bundle,
            config: wire.config,
            runtime_version: wire.runtime_version,
            containerd: wire.containerd.map(TryInto::try_into).transpose()?,
            podman: wire.podman.map(TryInto::try_into).transpose()?,
            pod: wire.pod.map(TryInto::try_into).transpose()?,
            podman_pod: wire.podman_pod.map(TryInto::try_into).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_an_absolute_path_and_a_configuration_is_limited() {
        let wire = |bundle: &str, length: usize| schema::Container {
            bundle: bundle.to_owned(),
            config: vec![b' '; length],
            ..schema::Container::default()
        };
        let read = |wire: schema::Container| ContainerDescription::try_from(wire).is_ok();
        assert!(read(wire("/b", CONFIG_BYTES_MAX)));
        assert!(!read(wire("/b", CONFIG_BYTES_MAX + 1)));
        let from = |version: usize| schema::Container {
            runtime_version: "1".repeat(version),
            ..wire("/b", 2)
        };
        assert!(read(from(VERSION_BYTES_MAX)) && !read(from(VERSION_BYTES_MAX + 1)));
        assert!(!read(wire("b", 2)) && !read(wire("", 2)) && !read(wire("/a/../b", 2)));
    }

    #[test]
    fn what_containerd_has_is_limited() {
        let wire = |record: usize, digest: usize| schema::Containerd {
            record: vec![0; record],
            image_digest: "d".repeat(digest),
            ..schema::Containerd::default()
        };
        let read = |wire: schema::Containerd| ContainerdDescription::try_from(wire).is_ok();
        assert!(read(wire(RECORD_BYTES_MAX, REFERENCE_BYTES_MAX)));
        assert!(!read(wire(RECORD_BYTES_MAX + 1, 1)));
        assert!(!read(wire(1, REFERENCE_BYTES_MAX + 1)));
    }

    #[test]
    fn a_container_of_a_pod_has_a_name_and_three_streams() {
        let read = |container: &str, streams: usize, bytes: usize| {
            let wire = schema::Pod {
                container: container.to_owned(),
                streams: vec!["s".repeat(bytes); streams],
                ..schema::Pod::default()
            };
            PodDescription::try_from(wire).is_ok()
        };
        assert!(read("web", STREAMS, STREAM_BYTES_MAX));
        assert!(!read("", STREAMS, 1) && !read("../web", STREAMS, 1));
        assert!(!read("web", STREAMS - 1, 1) && !read("web", STREAMS + 1, 1));
        assert!(!read("web", STREAMS, STREAM_BYTES_MAX + 1));
    }

    #[test]
    fn what_podman_has_of_a_container_is_named_and_limited() {
        let read = |change: fn(&mut schema::Podman)| {
            let mut wire = schema::Podman {
                id: "0a".to_owned(),
                image: "0b".to_owned(),
                restart: "on-failure:3".to_owned(),
                archive: vec![0; 2],
                volumes: vec![schema::Volume {
                    name: "data".to_owned(),
                    path: "/v/data/_data".to_owned(),
                    ..schema::Volume::default()
                }],
                leads_out: true,
            };
            change(&mut wire);
            PodmanDescription::try_from(wire)
        };
        assert_eq!(read(|_| ()).unwrap().restart, "on-failure:3");
        assert!(read(|wire| wire.id = "../a".to_owned()).is_err());
        assert!(read(|wire| wire.image.clear()).is_err());
        assert!(read(|wire| wire.restart = "a".repeat(65)).is_err());
        assert!(read(|wire| wire.archive = vec![0; ARCHIVE_BYTES_MAX + 1]).is_err());
    }
}
