//! A container of podman, named as podman names it: the engine keeps what the container is to be,
//! has its runtime start it, and starts it again as its policy says.
//!
//! At the source podman exports the container without its memory, while it runs: that is what its
//! import makes a container of at the target. The dump then is the runtime's, as of any container
//! ([`super::oci`]), behind podman's back; the import's restore is held at our gate, and gets our
//! pages. What the container writes goes on to a log of podman's at the target.
//!
//! Invariants: podman starts nothing again that may run elsewhere: its policy is switched off
//! before the dump, durably, is back when the container stays, and is the target's only when that
//! lets it run. What was exported is on a tmpfs, in a folder that only root reads, and goes with
//! that.
//!
//! A container in a network of podman's comes to the same network at the target ([`network`]).
//!
//! A container of a pod moves with its pod alone ([`pod`]).
//!
//! Absent, and refused by name ([`inspect`]): health checks, units of systemd, rootless podman.

mod archive;
pub mod arrive;
mod command;
mod export;
mod inspect;
mod members;
mod network;
pub mod pod;
pub mod volume;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use criu_glue::options::DumpOptions;
use criu_glue::rpc::{Conversation, SwrkConfig};
use pageferry_cgroup::freezer::{CgroupError, Freezer};
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::PodmanDescription;
use pageferry_sys::namespace::{self, NamespaceKind};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::oci::Container;
use super::oci::checkpoint::{Checkpoint, CheckpointError};
use super::oci::spec::{Engine, Spec};
use super::process::describe::Described;
use command::{CommandError, podman, podman_at_once, told};
use export::ExportError;
use inspect::Inspected;
use network::Networked;
use pod::InPod;
use volume::Volume;

/// The engine; looked up in `PATH`.
const PROGRAM: &str = "podman";

/// How it calls itself in a container's annotations.
const MANAGER: &str = "libpod";

/// The policy by which nothing is started again.
const NEVER: &str = "no";

/// A container at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Podman {
    container: Container,
    id: ContainerName,
    image: ContainerName,
    /// Its policy, as `--restart` has it; it is [`NEVER`] in podman's books while we dump.
    restart: String,
    /// Its named volumes, which travel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    volumes: Vec<Volume>,
    /// If it is in a network of podman's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network: Option<Networked>,
    /// If it is one of a pod's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<InPod>,
}

/// A name in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct ContainerName(ContainerId);

/// Why nobody asks for the dump.
#[derive(Debug, Error)]
pub enum PodmanError {
    /// The policy stays as it is.
    #[error("{PROGRAM} may start the container again")]
    Policy(#[source] CommandError),
    /// The runtime does not ask.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl Podman {
    /// The container of this name, if it runs here and can move. Blocks, while podman answers.
    pub fn find(name: &ContainerId) -> Result<Self, Failure> {
        Self::find_in(name, None)
    }

    /// The same of one that moves with its pod, and all that are in it.
    fn find_in(name: &ContainerId, pod: Option<(&InPod, &[&str])>) -> Result<Self, Failure> {
        let (pod, others) = pod.unzip();
        let inspected = Inspected::of(name)?;
        inspected.check(name, pod)?;
        let runtime = inspected.runtime()?;
        let (container, state) = Container::read(runtime, inspected.id())?;
        state.check_maker()?;
        inspected.check_streams(&state.streams)?;
        Ok(Self {
            container,
            id: ContainerName(inspected.id().clone()),
            image: ContainerName(inspected.image()?),
            restart: inspected.restart(),
            volumes: inspected.volumes(others.unwrap_or_default())?,
            network: inspected.networked()?,
            pod: pod.cloned(),
        })
    }

    /// Of its volumes those leave with it that are of `copied`: the others are on storage that the
    /// nodes share, or nobody's.
    pub fn keep_volumes(&mut self, copied: &[PathBuf]) {
        volume::retain(&mut self.volumes, copied);
    }

    /// Where what is in its volumes is.
    pub fn folders(&self) -> Vec<PathBuf> {
        let paths = self.volumes.iter().map(Volume::path);
        paths.map(Path::to_owned).collect()
    }

    /// Whether it has a volume there.
    fn has_volume_at(&self, path: &Path) -> bool {
        self.volumes.iter().any(|volume| volume.path() == path)
    }

    /// Namespaces that are its pod's: CRIU is started in them, and dumps none of them.
    pub fn open_namespaces(&self) -> Result<Vec<OwnedFd>, Failure> {
        let Some(pod) = &self.pod else {
            return self.container.open_namespaces();
        };
        let root = self.container.root();
        let open = |kind: NamespaceKind| {
            namespace::open(root, kind).map_err(|error| {
                let text = format!("the {} namespace of process {root}: {error}", kind.file());
                Failure::new(ErrorCode::WorkloadGone, text)
            })
        };
        pod.namespaces().map(open).collect()
    }

    /// Whether podman deletes its links when it has ended, and what hangs on them.
    pub const fn has_network(&self) -> bool {
        self.network.is_some()
    }

    /// What a move takes from its clients.
    pub fn notes(&self) -> Vec<String> {
        self.network
            .as_ref()
            .map(Networked::notes)
            .unwrap_or_default()
    }

    /// What its runtime has of it.
    pub const fn container(&self) -> &Container {
        &self.container
    }

    /// What it is made of: the tree of `pids`, the root first. Blocks, for a few milliseconds if
    /// its storage answers.
    pub fn describe(&self, pids: &[i32], named: &[PathBuf]) -> Result<Described, Failure> {
        let (_, state) = Container::read(self.container.runtime(), &self.id.0)?;
        let bundle = self.container.bundle();
        let mut folders = folders(&self.id.0, bundle);
        folders.extend(self.pod.iter().flat_map(|pod| pod.folders(bundle)));
        let engine = Engine {
            manager: MANAGER,
            folders,
            pipes: state.pipes(),
            has_image: true,
            is_sandboxed: self.pod.is_some(),
            is_party: self.pod.is_some(),
            has_network: self.network.is_some(),
        };
        let layer = |_: &Spec| Inspected::of(&self.id.0)?.layer();
        self.container
            .describe_with((pids, named), Some(&engine), layer)
    }

    /// What podman is to import at the target. `directory` is the migration's, `stand_in` what the
    /// runtime is to find as CRIU.
    pub async fn export(
        &self,
        (criu, stand_in): (&Path, &Path),
        directory: &Path,
    ) -> Result<PodmanDescription, Failure> {
        let folder = directory.join("export");
        let exported = export::export(self, (criu, stand_in), &folder).await;
        drop(fs::remove_dir_all(&folder));
        // It is made again when there is more for it.
        drop(fs::remove_dir(directory));
        let archive = exported.map_err(|error| match error {
            ExportError::SharedFiles | ExportError::TooLong(_) => {
                Failure::new(ErrorCode::UnsupportedWorkload, error.to_string())
            }
            other => Failure::new(ErrorCode::RuntimeFailed, told(&other)),
        })?;
        Ok(PodmanDescription {
            id: self.id.0.clone(),
            image: self.image.0.clone(),
            restart: self.restart.clone(),
            archive,
            volumes: self.volumes.iter().map(Volume::describe).collect(),
            leads_out: self.network.as_ref().is_some_and(Networked::leads_out),
        })
    }

    /// Has the runtime ask for a dump, and podman start nothing again meanwhile.
    pub async fn ask(
        &self,
        dump: (SwrkConfig, DumpOptions),
        stand_in: &Path,
        directory: &Path,
    ) -> Result<(Conversation, Checkpoint), PodmanError> {
        if self.starts_again() {
            let off = ["update", "--restart", NEVER, self.id.as_str()].map(str::to_owned);
            let off = podman(off.to_vec()).await;
            off.map_err(PodmanError::Policy)?;
        }
        let started = Checkpoint::start(&self.container, dump, stand_in, directory).await?;
        Ok(started)
    }

    /// It stays here, and runs. Blocks, while podman answers.
    pub fn give_back(&self) {
        if !self.starts_again() {
            return;
        }
        let on = podman_at_once(["update", "--restart", &self.restart, self.id.as_str()]);
        if let Err(error) = on {
            tracing::warn!(container = self.id.as_str(), policy = self.restart, %error,
                "podman does not take the policy of the container back");
        }
    }

    /// It runs elsewhere, and its tasks here are dead. Blocks, while podman answers.
    pub fn release(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        let released = self.container.release(freezer);
        // One that was started with --rm is gone already.
        if let Err(error) = podman_at_once(["rm", "--ignore", self.id.as_str()]) {
            tracing::warn!(container = self.id.as_str(), %error,
                "podman lists a container that has moved away");
        }
        self.volumes.iter().for_each(Volume::release);
        released
    }

    fn starts_again(&self) -> bool {
        !self.restart.is_empty() && self.restart != NEVER
    }
}

/// Where podman has files of a container's own: its folder, and one on a tmpfs.
fn folders(id: &ContainerId, bundle: &Path) -> Vec<PathBuf> {
    let volatile = Path::new(VOLATILE).join(id.as_str()).join("userdata");
    vec![bundle.to_owned(), volatile]
}

/// Where it has those of the infra container of a pod, of which `bundle` is that of another
/// container: what it makes for all of the pod is bound into each from there.
fn folders_of_infra(id: &ContainerId, bundle: &Path) -> Vec<PathBuf> {
    let all = bundle.parent().and_then(Path::parent);
    let all = all.unwrap_or(bundle);
    folders(id, &all.join(id.as_str()).join("userdata"))
}

/// Where podman has what needs not outlive the node.
const VOLATILE: &str = "/run/containers/storage/overlay-containers";

impl ContainerName {
    fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl TryFrom<String> for ContainerName {
    type Error = pageferry_proto::id::IdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<ContainerName> for String {
    fn from(name: ContainerName) -> Self {
        name.0.to_string()
    }
}
