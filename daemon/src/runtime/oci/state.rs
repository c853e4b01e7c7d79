//! What has become of a container, as its runtime has written it down: the same of each runtime.

use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::de::DeserializeOwned;

/// A container that a runtime has started.
#[derive(Debug, Default)]
pub struct State {
    /// The root of the tree, in the pid namespace of the node.
    pub root: i32,
    /// When that started, in clock ticks since the boot.
    pub started: u64,
    /// The folder of its bundle.
    pub bundle: Option<PathBuf>,
    /// Its standard streams, when it was started.
    pub streams: Vec<String>,
    /// Not root has started it.
    pub is_rootless: bool,
    /// systemd has made its cgroup.
    pub is_systemds: bool,
}

impl State {
    /// Refuses what is not moved yet, by its name.
    pub fn check(&self) -> Result<(), Failure> {
        let refused = |text: &str| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        if self.is_rootless {
            return refused("the container is a rootless one, which is not moved");
        }
        if self.is_systemds {
            return refused("the container's cgroup is made by systemd, which is not moved yet");
        }
        let other = self.streams.iter().enumerate();
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

/// What runtime `program` has written of the container `id`, as it has written it.
pub(super) fn read<T: DeserializeOwned>(
    text: &[u8],
    (program, id): (&str, &str),
) -> Result<T, Failure> {
    serde_json::from_slice(text).map_err(|error| {
        let text = format!("what {program} has written of {id} cannot be read: {error}");
        Failure::new(ErrorCode::UnsupportedWorkload, text)
    })
}
