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
}

impl From<&ContainerDescription> for schema::Container {
    fn from(container: &ContainerDescription) -> Self {
        Self {
            bundle: container.bundle.clone(),
            config: container.config.clone(),
        }
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
        };
        let read = |wire: schema::Container| ContainerDescription::try_from(wire).is_ok();
        assert!(read(wire("/b", CONFIG_BYTES_MAX)));
        assert!(!read(wire("/b", CONFIG_BYTES_MAX + 1)));
        assert!(!read(wire("b", 2)) && !read(wire("", 2)));
    }
}
