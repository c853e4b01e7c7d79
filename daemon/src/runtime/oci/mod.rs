//! A container of an OCI runtime, named by its id: the runtime makes it and ends it, and we are in
//! between. Which runtimes there are and in what they differ is [`habits`].
//!
//! At the source `checkpoint` writes the request for CRIU, and deletes the container when CRIU says
//! that it is dumped; at the target `restore` makes the container, and CRIU's request for it. The
//! runtime does not know that it is two nodes. What stands between it and CRIU is
//! [`criu_glue::rpc::Gate`].
//!
//! Invariants: whatever fails before the commit, the runtime hears that its command has failed, and
//! its container runs on as it was; no folder of the runtime is deleted while a root file system is
//! bound in it.
//!
//! A root file system that is written to travels with its bundle ([`rootfs`](super::rootfs)).
//! Absent, and refused by name ([`spec`], [`state`]): volumes that are not named, terminals, pipes
//! as standard streams, hooks, namespaces that are shared.

mod alone;
pub mod arrive;
pub mod binds;
pub mod checkpoint;
mod crun;
pub mod habits;
mod runc;
pub mod spec;
pub mod state;
pub mod version;
pub mod volumes;

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

use super::identity::{self, Identity};
use super::passing::Passing;
use super::process::describe::{self, Described};
use super::rootfs::RootFiles;
use habits::{BoundIn, Runtime};
use spec::{Around, Engine, Spec};
use state::State;

/// What a runtime calls the place to which it binds the root file system while it restores.
pub const BOUND: &str = "criu-root";

/// What it says when something goes wrong, in the migration's folder.
const OUTPUT: &str = "runtime.log";

/// How long `checkpoint` may take to delete its container, if it lives: it has ended, unless
/// the daemon that started it has.
const GONE_MAX: Duration = Duration::from_millis(500);

/// How long the runtime may take to delete a container whose processes are gone.
const DELETE_MAX: Duration = Duration::from_secs(10);

/// How often it is looked whether it has.
const DELETE_POLL: Duration = Duration::from_millis(5);

/// A container at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    runtime: Runtime,
    id: String,
    root: i32,
    /// When that started, in clock ticks since the boot.
    started: u64,
    /// Which boot that was.
    boot: String,
    bundle: PathBuf,
    /// Where its runtime keeps it, if that is not the usual place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kept_in: Option<PathBuf>,
}

impl Container {
    /// The container of this name, if it runs here and can move.
    pub fn find(runtime: Runtime, id: &ContainerId) -> Result<Self, Failure> {
        Self::find_in((runtime, None), id)
    }

    /// The same, of those that the runtime keeps in another folder.
    pub fn find_in(
        (runtime, kept_in): (Runtime, Option<PathBuf>),
        id: &ContainerId,
    ) -> Result<Self, Failure> {
        let (container, state) = Self::read_in((runtime, kept_in), id)?;
        state.check()?;
        let config = read_config(&container.bundle)?;
        state.check_against(&Spec::parse(&config)?, &container.bundle)?;
        if let Some(copy) = runtime.habits().copy
            && fs::read(container.folder().join(copy)).ok() != Some(config)
        {
            let text = format!("the config.json of {id} was changed since it was started");
            return Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        }
        Ok(container)
    }

    /// The container of this name, and what its runtime has of it, if it runs here.
    pub fn read(runtime: Runtime, id: &ContainerId) -> Result<(Self, State), Failure> {
        Self::read_in((runtime, None), id)
    }

    /// The same of one that its runtime keeps elsewhere.
    pub fn read_in(
        (runtime, kept_in): (Runtime, Option<PathBuf>),
        id: &ContainerId,
    ) -> Result<(Self, State), Failure> {
        let (id, program) = (id.to_string(), runtime.program());
        let root = kept_in.as_deref().unwrap_or(Path::new(runtime.root()));
        let folder = root.join(&id);
        let path = folder.join(runtime.habits().state);
        let text = fs::read(&path).map_err(|error| {
            let text = format!(
                "{program} has no container {id}: {}: {error}",
                path.display()
            );
            Failure::new(ErrorCode::WorkloadGone, text)
        })?;
        let state = (runtime.habits().read)(&text, &id)?;
        let root = state.root;
        let now = Identity::of(root)
            .ok()
            .filter(|now| now.started == state.started);
        let Some(Identity { started, boot, .. }) = now else {
            let text = format!("the container {id} has ended: {program} has its remains");
            return Err(Failure::new(ErrorCode::WorkloadGone, text));
        };
        let bundle = state.bundle.clone().ok_or_else(|| {
            let text = format!("{program} does not say where the bundle of {id} is");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })?;
        let container = Self {
            runtime,
            id,
            root,
            started,
            boot,
            bundle,
            kept_in,
        };
        Ok((container, state))
    }

    /// Where its runtime keeps its containers.
    fn kept_in(&self) -> &Path {
        let usual = Path::new(self.runtime.root());
        self.kept_in.as_deref().unwrap_or(usual)
    }

    /// The pid of its root in this node's pid namespace.
    pub const fn root(&self) -> i32 {
        self.root
    }

    /// What its runtime calls it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Who runs it.
    pub const fn runtime(&self) -> Runtime {
        self.runtime
    }

    fn folder(&self) -> PathBuf {
        self.runtime.folder(&self.id)
    }

    /// The folder of its bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// What it is made of: the tree of `pids`, the root first; `named` are paths that travel along,
    /// or that both nodes share. Blocks, for a few milliseconds if its storage answers.
    pub fn describe(&self, pids: &[i32], named: &[PathBuf]) -> Result<Described, Failure> {
        self.describe_with((pids, named), None, |spec| {
            RootFiles::in_bundle(&self.bundle, spec.named_root())
        })
    }

    /// As [`Container::describe`], of one that is an engine's; `root` finds its root file system,
    /// if it writes to that.
    pub fn describe_with(
        &self,
        (pids, named): (&[i32], &[PathBuf]),
        engine: Option<&Engine>,
        root: impl FnOnce(&Spec) -> Result<RootFiles, Failure>,
    ) -> Result<Described, Failure> {
        let config = read_config(&self.bundle)?;
        let spec = Spec::parse(&config)?;
        let around = Around {
            bundle: &self.bundle,
            engine,
            named,
        };
        spec.check(&around)?;
        let root = spec.is_writable().then(|| root(&spec)).transpose()?;
        let pipes = engine.map_or(&[][..], |engine| &engine.pipes);
        // Where the node has it.
        let mounts = describe::mounts(self.root, named)?;
        let here = mounts.and_then(|mounts| mounts.node_path(Path::new("/")));
        let here: Vec<PathBuf> = here.into_iter().filter(|_| root.is_some()).collect();
        let travels: Vec<PathBuf> = named.iter().chain(&here).cloned().collect();
        let is_party = engine.is_some_and(|engine| engine.is_party);
        let tree = (pids, pipes, is_party);
        let mut described = describe::describe(self.root, tree, &travels)?;
        described.root_files = root;
        if let Some(mounts) = &described.mounts {
            volumes::check_seen((self.root, mounts), &spec, &around)?;
        }
        let comes = |path: &str| here.iter().any(|here| Path::new(path).starts_with(here));
        let description = &mut described.description;
        if engine.is_some_and(|engine| engine.has_image) {
            // All others are of its image, which has the same id at the target or is not there.
            volumes::retain_bound(description, &spec.binds(&around));
        }
        // The runtime mounts them, by the same configuration.
        description.mounts.clear();
        description.files.retain(|file| !comes(&file.path));
        description.container = Some(ContainerDescription {
            bundle: self.bundle.to_string_lossy().into_owned(),
            config,
            runtime_version: version::of(self.runtime, "the source")?,
            containerd: None,
            podman: None,
            pod: None,
            podman_pod: None,
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
        let freezer = Freezer::open(&path).and_then(Freezer::known);
        let freezer = freezer.map_err(unusable)?;
        if freezer.is_frozen().map_err(unusable)? {
            return Err(refused(format!(
                "the container {} is paused: resume it first",
                self.id
            )));
        }
        let alone = alone::check_running(&freezer, self.root, pids);
        alone.map_err(refused)?;
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
        let alone = alone::check_running(freezer, self.root, &pids);
        alone.map_err(|text| failed(io::Error::other(text)))
    }

    /// Who is in its frozen cgroup, and none of the `threads` of its tree.
    pub fn stranger(&self, freezer: &Freezer, threads: &[i32]) -> Result<Option<Passing>, Failure> {
        let found = alone::check_frozen(freezer, threads);
        found.map_err(|text| Failure::new(ErrorCode::UnsupportedWorkload, text))
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
    /// that died over it is asked again. A container that was begun anew under its name is another,
    /// and nothing is done to it.
    pub fn release(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        if !self.is_deleted() {
            self.delete();
        }
        // Nobody is in it, or this says so.
        freezer.remove()
    }

    /// Waits until its runtime has deleted it, for a while; whether it has.
    pub fn is_deleted(&self) -> bool {
        gone_within(|| self.is_listed(), GONE_MAX)
    }

    fn delete(&self) {
        let (runtime, program) = (self.runtime, self.runtime.program());
        // Before anybody deletes what is in there.
        let bound_in = bound_in((runtime, &self.id), &self.bundle);
        if let Err(error) = bound::release(&bound_in, BOUND) {
            tracing::error!(container = self.id, %error, "{} has something mounted in it, and is \
                not deleted", bound_in.display());
            return;
        }
        // Not by force: its processes are dead, and those of another container of its name, should
        // one begin now, are to live.
        let mut delete = Command::new(program);
        delete.arg("--root").arg(self.kept_in());
        match delete.args(["delete", &self.id]).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => tracing::warn!(container = self.id, status = %output.status,
                said = %String::from_utf8_lossy(&output.stderr).trim_end(),
                "{program} does not delete what has moved away"),
            Err(error) => tracing::warn!(container = self.id, %error, "{program} cannot be asked"),
        }
        if !gone_within(|| self.is_listed(), DELETE_MAX) {
            tracing::warn!(
                container = self.id,
                "{program} lists a container that has moved away"
            );
        }
    }

    /// Whether what the runtime has by its name is this very container.
    fn is_listed(&self) -> bool {
        let folder = self.kept_in().join(&self.id);
        let text = fs::read(folder.join(self.runtime.habits().state)).ok();
        text.is_some_and(|text| self.is_in(&text))
    }

    /// Whether this is what the runtime has written of it.
    fn is_in(&self, written: &[u8]) -> bool {
        let state = (self.runtime.habits().read)(written, &self.id);
        let same = |state: State| (state.root, state.started) == (self.root, self.started);
        state.is_ok_and(same) && identity::boot().is_ok_and(|boot| boot == self.boot)
    }
}

/// The container that process `pid` is in, as it is named, if its runtime has made it in its usual
/// place.
pub fn holding(pid: i32) -> Option<String> {
    let above = identity::ancestors(pid);
    Runtime::ALL.into_iter().find_map(|runtime| {
        let entries = fs::read_dir(runtime.root()).ok()?;
        let mut ids = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .take(CONTAINERS_MAX);
        let id = ids.find(|id| {
            let state = fs::read(runtime.state(id)).ok();
            let state = state.and_then(|text| (runtime.habits().read)(&text, id).ok());
            let root = state.map(|state| state.root);
            root.is_some_and(|root| root == pid || above.contains(&root))
        })?;
        Some(format!("{}/{id}", runtime.program()))
    })
}

/// Who keeps process `pid` for an engine, if somebody does: the engine may start it again.
pub fn keeper(pid: i32) -> Option<String> {
    let above = identity::ancestors(pid).into_iter();
    let names = above.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
    let mut names = names.map(|name| name.trim_end().to_owned());
    names.find(|name| KEEPERS.iter().any(|keeper| name.starts_with(keeper)))
}

/// What containerd and Docker, podman and CRI-O have above a container. The kernel keeps 15 bytes.
const KEEPERS: [&str; 2] = ["containerd-shim", "conmon"];

/// Containers that are looked through, of each runtime.
const CONTAINERS_MAX: usize = 4096;

/// Where the root file system of a container is bound while it is restored.
fn bound_in((runtime, id): (Runtime, &str), bundle: &Path) -> PathBuf {
    match runtime.habits().bound_in {
        BoundIn::Folder => runtime.folder(id),
        BoundIn::Bundle => bundle.to_owned(),
    }
}

/// The `config.json` of a bundle.
pub fn read_config(bundle: &Path) -> Result<Vec<u8>, Failure> {
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

/// Waits until something is not there any more; whether that is so.
fn gone_within(is_there: impl Fn() -> bool, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while is_there() {
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
    fn a_journal_keeps_a_container_by_its_runtime_name_root_and_bundle() {
        let text = concat!(
            r#"{"container":{"runtime":"crun","id":"web","root":7,"started":5,"boot":"b","#,
            r#""bundle":"/srv/web"}}"#
        );
        let kind: crate::runtime::kind::Kind = serde_json::from_str(text).unwrap();
        assert_eq!(kind.root(), 7);
        assert_eq!(serde_json::to_string(&kind).unwrap(), text);
    }

    #[test]
    fn a_container_begun_anew_under_the_same_name_is_another() {
        let ours = Container {
            runtime: Runtime::Runc,
            id: "web".to_owned(),
            root: 7,
            started: 5,
            boot: identity::boot().unwrap(),
            bundle: "/srv/web".into(),
            kept_in: None,
        };
        let is_in = |ours: &Container, root: i32, started: u64| {
            let text = format!(
                r#"{{"init_process_pid":{root},"init_process_start":{started},"config":{{}}}}"#
            );
            ours.is_in(text.as_bytes())
        };
        assert!(is_in(&ours, 7, 5));
        assert!(!is_in(&ours, 7, 6) && !is_in(&ours, 8, 5));
        let before = Container {
            boot: "another".to_owned(),
            ..ours
        };
        assert!(!is_in(&before, 7, 5));
    }

    #[test]
    fn a_container_that_is_not_there_is_said_to_be_gone() {
        for runtime in Runtime::ALL {
            let id = "no-such-container".parse().unwrap();
            let gone = Container::find(runtime, &id).unwrap_err();
            assert_eq!(gone.code(), ErrorCode::WorkloadGone);
            let text = format!("{} has no container no-such-container", runtime.program());
            assert!(gone.text().contains(&text), "{gone}");
        }
        assert_eq!(holding(i32::MAX), None);
    }
}
