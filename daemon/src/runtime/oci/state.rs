//! What has become of a container, as its runtime has written it down: the same of each runtime.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::de::DeserializeOwned;

use super::spec::{Limits, Spec};

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
    /// Its root file system; may be a path in the bundle.
    pub root_files: PathBuf,
    /// Whether it may write to that, if its runtime says so.
    pub is_writable: Option<bool>,
    /// Its limits, if its runtime has written them down.
    pub limits: Option<Limits>,
}

impl State {
    /// Refuses what is not moved yet, by its name.
    pub fn check(&self) -> Result<(), Failure> {
        self.check_maker()?;
        self.check_streams()
    }

    /// Refuses a container that was made as none is moved.
    pub fn check_maker(&self) -> Result<(), Failure> {
        let refused = |text: &str| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        if self.is_rootless {
            return refused("the container is a rootless one, which is not moved");
        }
        if self.is_systemds {
            return refused("the container's cgroup is made by systemd, which is not moved yet");
        }
        Ok(())
    }

    /// Its standard streams that are pipes, by their inodes.
    pub fn pipes(&self) -> Vec<u64> {
        let names = self.streams.iter();
        let pipes = names.filter_map(|name| name.strip_prefix("pipe:[")?.strip_suffix(']'));
        pipes.filter_map(|inode| inode.parse().ok()).collect()
    }

    fn check_streams(&self) -> Result<(), Failure> {
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

    /// Refuses a container that is another than `spec`, in the folder `bundle`, says: the target
    /// makes it as that says.
    pub fn check_against(&self, spec: &Spec, bundle: &Path) -> Result<(), Failure> {
        let refused = |text: String| Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        let root = fs::canonicalize(spec.root(bundle));
        if root.ok() != fs::canonicalize(bundle.join(&self.root_files)).ok() {
            return refused(format!(
                "the container has the root file system {}, and its config.json names another: \
                 that was changed since it was started",
                self.root_files.display()
            ));
        }
        if self
            .is_writable
            .is_some_and(|writes| writes != spec.is_writable())
        {
            return refused(
                "whether the container may write to its root file system was changed in its \
                 config.json (root.readonly) since it was started"
                    .to_owned(),
            );
        }
        let limits = self.limits.as_ref();
        match limits.and_then(|limits| limits.other_than(&spec.limits())) {
            Some(limit) => refused(format!(
                "the container's {limit} is another than its config.json says (update): the \
                 target would set what that says. Write it there, at both nodes, first"
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_has_become_of_a_container_is_what_its_configuration_says() {
        let bundle = tempfile::tempdir().unwrap();
        for folder in ["rootfs", "other"] {
            fs::create_dir(bundle.path().join(folder)).unwrap();
        }
        let spec = json!({
            "root": {"path": "rootfs"},
            "linux": {"resources": {
                "memory": {"limit": 5}, "pids": {"limit": 9}, "cpu": {"cpus": "0"},
            }},
        });
        let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let check = |root_files: PathBuf, limits: Option<Limits>| {
            let state = State {
                root_files,
                limits,
                ..State::default()
            };
            state.check_against(&spec, bundle.path())
        };
        check("rootfs".into(), None).unwrap();
        for (writes, is_same) in [(true, true), (false, false)] {
            let state = State {
                root_files: "rootfs".into(),
                is_writable: Some(writes),
                ..State::default()
            };
            let checked = state.check_against(&spec, bundle.path());
            assert_eq!(checked.is_ok(), is_same, "{checked:?}");
        }
        let set = Limits {
            memory: 5,
            pids: 9,
            cpus: "0".to_owned(),
            ..Limits::default()
        };
        check(bundle.path().join("rootfs"), Some(set.clone())).unwrap();
        let other = check("other".into(), None).unwrap_err();
        assert!(
            other.text().contains("config.json names another"),
            "{other}"
        );
        let changed = [
            Limits {
                memory: 6,
                ..set.clone()
            },
            Limits {
                pids: 8,
                ..set.clone()
            },
            Limits {
                cpus: "1".to_owned(),
                ..set.clone()
            },
            Limits {
                cpu_quota: 1000,
                ..set
            },
        ];
        for limits in changed {
            let refused = check("rootfs".into(), Some(limits)).unwrap_err();
            assert!(refused.text().contains("(update)"), "{refused}");
        }
    }
}
