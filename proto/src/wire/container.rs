//! What a workload is to the container runtime that runs it.

use crate::wire::control::{ControlError, missing, short};
use crate::wire::description::PATH_BYTES_MAX;
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
    /// What containerd has of it, if it is containerd's.
    pub containerd: Option<ContainerdDescription>,
}

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

impl From<&ContainerDescription> for schema::Container {
    fn from(container: &ContainerDescription) -> Self {
        Self {
            bundle: container.bundle.clone(),
            config: container.config.clone(),
            containerd: container.containerd.as_ref().map(Into::into),
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

impl TryFrom<schema::Container> for ContainerDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Container) -> Result<Self, ControlError> {
        if !wire.bundle.starts_with('/') {
            return Err(missing("container.bundle"));
        }
        short("container.bundle", wire.bundle.len(), PATH_BYTES_MAX)?;
        short("container.config", wire.config.len(), CONFIG_BYTES_MAX)?;
        Ok(Self {
            bundle: wire.bundle,
            config: wire.config,
            containerd: wire.containerd.map(TryInto::try_into).transpose()?,
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
            containerd: None,
        };
        let read = |wire: schema::Container| ContainerDescription::try_from(wire).is_ok();
        assert!(read(wire("/b", CONFIG_BYTES_MAX)));
        assert!(!read(wire("/b", CONFIG_BYTES_MAX + 1)));
        assert!(!read(wire("b", 2)) && !read(wire("", 2)));
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
}
