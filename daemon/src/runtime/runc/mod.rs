//! A container of runc, named by its id: the runtime makes it and ends it, and we are in between.
//!
//! At the source `runc checkpoint` writes the request for CRIU, and deletes the container when CRIU
//! says that it is dumped; at the target `runc restore` makes the container, and CRIU's request for
//! it. Neither knows that it is two nodes. What stands between them and CRIU is
//! [`criu_glue::rpc::Gate`].
//!
//! Invariants: whatever fails before the commit, the runtime hears that its command has failed, and
//! its container runs on as it was; no folder of the runtime is deleted while a root file system is
//! bound in it.
//!
//! Absent, and refused by name ([`spec`]): a root file system that is written to, volumes,
//! terminals, pipes as standard streams, hooks, namespaces that are shared.

pub mod arrive;
pub mod checkpoint;
pub mod spec;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot};
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::{CONFIG_BYTES_MAX, ContainerDescription};
use pageferry_sys::bound;
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::process::describe::{self, Described};
use spec::{Spec, State};

/// The runtime; looked up in `PATH`.
const PROGRAM: &str = "runc";

/// Where it keeps its containers, unless its caller has another place.
const ROOT: &str = "/run/runc";

/// Where it binds the root file system of a container, in its folder, while it restores.
pub const BOUND: &str = "criu-root";

/// What it says when something goes wrong, in the migration's folder.
const OUTPUT: &str = "runtime.log";

/// How long `runc checkpoint` may take to delete its container, if it lives: it has ended, unless
/// the daemon that started it has.
const GONE_MAX: Duration = Duration::from_millis(500);

/// How long the runtime may take to delete a container whose processes are gone.
const DELETE_MAX: Duration = Duration::from_secs(10);

/// How often it is looked whether it has.
const DELETE_POLL: Duration = Duration::from_millis(5);

/// A container at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runc {
    id: String,
    root: i32,
    bundle: PathBuf,
    /// Where the runtime keeps it.
    #[serde(default = "usual_root", skip_serializing_if = "is_usual_root")]
    kept_in: PathBuf,
}

impl Runc {
    /// The container of this name, if it runs here and can move.
    pub fn find(id: &ContainerId) -> Result<Self, Failure> {
        Self::find_in(ROOT.into(), id)
    }

    /// The container of this name among those that the runtime keeps in a folder.
    pub fn find_in(kept_in: PathBuf, id: &ContainerId) -> Result<Self, Failure> {
        let id = id.to_string();
        let path = kept_in.join(&id).join("state.json");
        let text = fs::read(&path).map_err(|error| {
            let text = format!("runc has no container {id}: {}: {error}", path.display());
            Failure::new(ErrorCode::WorkloadGone, text)
        })?;
        let state = State::parse(&text, &id)?;
        let root = state.init_process_pid;
        let now = Identity::of(root)
            .ok()
            .filter(|now| now.started == state.init_process_start);
        if now.is_none() {
            let text = format!("the container {id} has ended: runc has its remains");
            return Err(Failure::new(ErrorCode::WorkloadGone, text));
        }
        state.check()?;
        let bundle = state.bundle().ok_or_else(|| {
            let text = format!("runc does not say where the bundle of {id} is");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })?;
        Ok(Self {
            id,
            root,
            bundle,
            kept_in,
        })
    }

    /// The folder that the runtime has for it.
    pub fn folder(&self) -> PathBuf {
        self.kept_in.join(&self.id)
    }

    /// The pid of its root in this node's pid namespace.
    pub const fn root(&self) -> i32 {
        self.root
    }

    /// What it is made of: the tree of `pids`, the root first. Blocks, for a few milliseconds if
    /// its storage answers.
    pub fn describe(&self, pids: &[i32], shared: &[PathBuf]) -> Result<Described, Failure> {
        if let Some(path) = shared.first() {
            return Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!(
                    "{} cannot be shared with the container {}: what is mounted into containers \
                     is not moved yet",
                    path.display(),
                    self.id
                ),
            ));
        }
        let config = read_config(&self.bundle)?;
        Spec::parse(&config)?.check()?;
        let mut described = describe::describe(self.root, pids, shared)?;
        let description = &mut described.description;
        // The runtime mounts them, by the same configuration.
        description.mounts.clear();
        description.container = Some(ContainerDescription {
            bundle: self.bundle.to_string_lossy().into_owned(),
            config,
            containerd: None,
        });
        Ok(described)
    }

    /// The cgroup that holds the tree of `pids`, and nothing else: the runtime has made it.
    pub fn place(&self, freezers: &FreezerRoot, pids: &[i32]) -> Result<Freezer, Failure> {
        let refused = |text: String| Failure::new(ErrorCode::UnsupportedWorkload, text);
        let path = freezers.current_of(self.root).ok_or_else(|| {
            refused(format!(
                "the cgroup of the container {} cannot be seen",
                self.id
            ))
        })?;
        let unusable = |error: CgroupError| refused(format!("the container {}: {error}", self.id));
        let freezer = Freezer::open(&path).map_err(unusable)?;
        if freezer.is_frozen().map_err(unusable)? {
            return Err(refused(format!(
                "the container {} is paused: resume it first",
                self.id
            )));
        }
        if has_cgroups(&path) {
            return Err(refused(format!(
                "the container {} has cgroups below its own ({}), which are not moved yet",
                self.id,
                path.display()
            )));
        }
        self.only(&freezer, pids).map_err(refused)?;
        Ok(freezer)
    }

    /// Sees to it that the tree is in its cgroup, and nobody else; `tree` tells who is in it.
    pub fn enter(
        &self,
        freezer: &Freezer,
        mut tree: impl FnMut() -> io::Result<Vec<i32>>,
    ) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Io {
            action: "looking who is in",
            path: freezer.path().to_owned(),
            source,
        };
        let pids = tree().map_err(failed)?;
        let only = self.only(freezer, &pids);
        only.map_err(|text| failed(io::Error::other(text)))
    }

    /// Whoever else is in its cgroup came by `runc exec`, and is nobody's child there.
    fn only(&self, freezer: &Freezer, pids: &[i32]) -> Result<(), String> {
        let held = freezer.processes().map_err(|error| error.to_string())?;
        let Some(other) = held.iter().find(|pid| !pids.contains(pid)) else {
            return Ok(());
        };
        // A child that was born after the tree was read.
        if super::identity::ancestors(*other).contains(&self.root) {
            return Ok(());
        }
        Err(format!(
            "process {other} was started in the container {} from outside (runc exec), and is \
             not moved with it: end it first",
            self.id
        ))
    }

    /// Namespaces that CRIU is started in to dump it: the network is ours to make again.
    pub fn open_namespaces(&self) -> Result<Vec<OwnedFd>, Failure> {
        let net = namespace::open(self.root, NamespaceKind::Net).map_err(|error| {
            let text = format!("the network namespace of process {}: {error}", self.root);
            Failure::new(ErrorCode::WorkloadGone, text)
        })?;
        Ok(vec![net])
    }

    /// It runs elsewhere, and its tasks here are dead. The runtime deletes what it has of it; one
    /// that died over it is asked again.
    pub fn release(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        let folder = self.folder();
        if !gone_within(&folder.join("state.json"), GONE_MAX) {
            self.delete(&folder);
        }
        // Nobody is in it, or this says so.
        freezer.remove()
    }

    /// Waits until the runtime has deleted it, for a while; whether it has.
    pub fn is_deleted(&self) -> bool {
        gone_within(&self.folder().join("state.json"), GONE_MAX)
    }

    fn delete(&self, folder: &Path) {
        // Before anybody deletes what is in there.
        if let Err(error) = bound::release(folder, BOUND) {
            tracing::error!(container = self.id, %error, "{} has something mounted in it, and is \
                not deleted", folder.display());
            return;
        }
        let mut delete = Command::new(PROGRAM);
        delete.arg("--root").arg(&self.kept_in);
        delete.args(["delete", "--force", &self.id]);
        match delete.output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => tracing::warn!(container = self.id, status = %output.status,
                said = %String::from_utf8_lossy(&output.stderr).trim_end(),
                "runc does not delete what has moved away"),
            Err(error) => tracing::warn!(container = self.id, %error, "runc cannot be asked"),
        }
        if !gone_within(&folder.join("state.json"), DELETE_MAX) {
            tracing::warn!(
                container = self.id,
                "runc lists a container that has moved away"
            );
        }
    }
}

/// The container that process `pid` is in, if runc has made it in its usual place.
pub fn holding(pid: i32) -> Option<String> {
    let entries = fs::read_dir(ROOT).ok()?;
    let ids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let above = super::identity::ancestors(pid);
    ids.take(CONTAINERS_MAX).find(|id| {
        let state = fs::read(folder(id).join("state.json")).ok();
        let state = state.and_then(|text| State::parse(&text, id).ok());
        let root = state.map(|state| state.init_process_pid);
        root.is_some_and(|root| root == pid || above.contains(&root))
    })
}

/// Containers that are looked through.
const CONTAINERS_MAX: usize = 4096;

fn usual_root() -> PathBuf {
    ROOT.into()
}

fn is_usual_root(root: &Path) -> bool {
    root == Path::new(ROOT)
}

/// The folder that runc has for a container of its own.
fn folder(id: &str) -> PathBuf {
    Path::new(ROOT).join(id)
}

fn read_config(bundle: &Path) -> Result<Vec<u8>, Failure> {
    let path = bundle.join("config.json");
    let failed = |text: String| {
        let text = format!("{}: {text}", path.display());
        Failure::new(ErrorCode::UnsupportedWorkload, text)
    };
    let text = fs::read(&path).map_err(|error| failed(error.to_string()))?;
    if text.len() > CONFIG_BYTES_MAX {
        return Err(failed(format!("it has more than {CONFIG_BYTES_MAX} bytes")));
    }
    Ok(text)
}

fn has_cgroups(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.path().is_dir())
}

/// Waits until a file is not there any more; whether that is so.
fn gone_within(path: &Path, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while path.exists() {
        if deadline < Instant::now() {
            return false;
        }
        std::thread::sleep(DELETE_POLL);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_keeps_a_container_by_its_name_root_and_bundle() {
        let text = r#"{"runc":{"id":"web","root":7,"bundle":"/srv/web"}}"#;
        let kind: crate::runtime::kind::Kind = serde_json::from_str(text).unwrap();
        assert_eq!(kind.root(), 7);
        assert_eq!(serde_json::to_string(&kind).unwrap(), text);
    }

    #[test]
    fn a_container_that_is_not_there_is_said_to_be_gone() {
        let gone = Runc::find(&"no-such-container".parse().unwrap()).unwrap_err();
        assert_eq!(gone.code(), ErrorCode::WorkloadGone);
        assert!(gone.text().contains("no-such-container"), "{gone}");
        assert_eq!(holding(i32::MAX), None);
    }
}
