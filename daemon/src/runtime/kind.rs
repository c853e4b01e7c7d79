//! What a workload is to its node. Each kind is a module of its own, which owns what differs:
//!
//! | | |
//! |---|---|
//! | describe | what it is made of, and what of that cannot move |
//! | cgroup | where it is held, how it gets there, and how it comes back |
//! | ask | who asks CRIU to dump it, and who starts that |
//! | release | what becomes of what is left of it when it runs elsewhere |
//! | arrive | what is compared, and made ready for it, where it comes |
//!
//! Nothing else asks what a workload is. A kind that has a name and no module is refused by it.

mod arriving;
mod coming;
mod party;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use criu_glue::options::{DumpOptions, Request};
use criu_glue::rpc::{Conversation, StartError, SwrkConfig, TalkError};
use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::id::{MigrationId, WorkloadName};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use arriving::{
    Arriving, ArrivingPod, MadeVolume, PodWaits, about_to_run, go_on_ending, leave, lose,
    make_volume, never_ran, remove_volume, runs, settle, settle_left, sweep,
};
pub use coming::{Around, Coming, MadeAround, leave_around, runs_around, sweep_around};
pub use party::{Named, Party};

use super::containerd::{self, Containerd};
use super::mounts::Mounts;
use super::oci::checkpoint::{Checkpoint, CheckpointError};
use super::oci::habits::Runtime;
use super::oci::{self, Container};
use super::passing::Passing;
use super::pod::Pod;
use super::podman::{Podman, PodmanError};
use super::process::Process;
use super::process::describe::{self, Described};

/// A workload at its source, as the journal keeps it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A bare process tree.
    Process(Process),
    /// A container of an OCI runtime.
    Container(Container),
    /// A container of containerd.
    Containerd(Containerd),
    /// A container of a pod of Kubernetes, and what it has of that.
    Pod(Pod),
    /// A container of podman.
    Podman(Podman),
}

/// What asks CRIU for a dump, if that is not us.
#[derive(Debug)]
pub enum Asker {
    /// It is.
    Us,
    /// The container's runtime.
    Container(Box<Checkpoint>),
}

/// Why CRIU was not asked for a dump.
#[derive(Debug, Error)]
pub enum AskError {
    /// It could not be started.
    #[error("starting criu")]
    Start(#[from] StartError),
    /// It could not be spoken to.
    #[error("talking to criu")]
    Talk(#[from] TalkError),
    /// The container's runtime does not ask for it.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The container's runtime does not ask for it, or containerd does not let it.
    #[error(transparent)]
    Containerd(#[from] containerd::AskError),
    /// Its engine does not have it asked for.
    #[error(transparent)]
    Podman(#[from] PodmanError),
}

impl Kind {
    /// The workload of this name, if it is of a kind that can move away from here, and no party
    /// ([`Named`]).
    pub fn of(name: &WorkloadName) -> Result<Self, Failure> {
        match name {
            WorkloadName::Process(root) => match oci::holding(*root) {
                None => match oci::keeper(*root) {
                    None => Ok(Self::Process(Process::new(*root))),
                    Some(keeper) => Err(Failure::new(
                        ErrorCode::UnsupportedWorkload,
                        format!(
                            "process {root} is in a container of an engine, kept by {keeper}: move \
                             that by its own name"
                        ),
                    )),
                },
                Some(name) => Err(Failure::new(
                    ErrorCode::UnsupportedWorkload,
                    format!("process {root} is in a container: move that, as {name}"),
                )),
            },
            WorkloadName::Crun(id) => Container::find(Runtime::Crun, id).map(Self::Container),
            WorkloadName::Runc(id) => Container::find(Runtime::Runc, id).map(Self::Container),
            WorkloadName::Containerd { namespace, id } => {
                Containerd::find(namespace, id).map(Self::Containerd)
            }
            WorkloadName::Podman(name) => Podman::find(name).map(Self::Podman),
            WorkloadName::Pod(_) | WorkloadName::PodmanPod(_) => Err(Failure::new(
                ErrorCode::Internal,
                format!("{name} may be more than one workload"),
            )),
        }
    }

    /// The pid of its root in this node's pid namespace.
    pub const fn root(&self) -> i32 {
        match self {
            Self::Process(process) => process.root(),
            Self::Container(container) => container.root(),
            Self::Containerd(engine) => engine.container().root(),
            Self::Pod(pod) => pod.container().root(),
            Self::Podman(engine) => engine.container().root(),
        }
    }

    /// What it is made of: the tree of `pids`, the root first. Blocks, for a few milliseconds if
    /// its storage answers.
    pub fn describe(&self, pids: &[i32], shared: &[PathBuf]) -> Result<Described, Failure> {
        match self {
            Self::Process(process) => {
                let described = describe::describe(process.root(), (pids, &[], false), shared)?;
                let mounts = described.mounts.as_ref();
                mounts.map_or(Ok(()), Mounts::check_receives_nothing)?;
                Ok(described)
            }
            Self::Container(container) => container.describe(pids, shared),
            Self::Containerd(container) => container.describe(pids, shared),
            Self::Pod(pod) => pod.describe(pids, shared),
            Self::Podman(container) => container.describe(pids, shared),
        }
    }

    /// Checks once more what its engine has for it, and may have changed since it was described. Of
    /// a frozen tree. Blocks, for less than a millisecond.
    pub fn check_frozen(&self) -> Result<(), Failure> {
        match self {
            Self::Pod(pod) => pod.check_frozen(),
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Podman(_) => Ok(()),
        }
    }

    /// Folders of its engine that it has for its own, and that travel with it.
    pub fn folders(&self) -> Vec<PathBuf> {
        match self {
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) => Vec::new(),
            Self::Pod(pod) => pod.folders(),
            Self::Podman(container) => container.folders(),
        }
    }

    /// Of its engine's folders only those are its own from now on that are of `copied`.
    pub fn keep_folders(&mut self, copied: &[PathBuf]) {
        match self {
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Pod(_) => {}
            Self::Podman(container) => container.keep_volumes(copied),
        }
    }

    /// What its engine has of it, for the target: nothing of it stops for that. `directory` is the
    /// migration's.
    pub async fn export(
        &self,
        description: &mut WorkloadDescription,
        programs: (&Path, &Path),
        directory: &Path,
    ) -> Result<(), Failure> {
        if let (Self::Podman(podman), Some(container)) = (self, &mut description.container) {
            let exported = podman.export(programs, directory).await?;
            container.podman = Some(exported);
        }
        Ok(())
    }

    /// The cgroup that is to hold the tree of `pids`. Nothing is made yet.
    pub fn place(
        &mut self,
        freezers: &FreezerRoot,
        pids: &[i32],
        id: MigrationId,
    ) -> Result<Freezer, Failure> {
        match self {
            Self::Process(process) => process.place(freezers, pids, &id.to_string()),
            Self::Container(container) => container.place(freezers, pids),
            Self::Containerd(engine) => engine.container().place(freezers, pids),
            Self::Pod(pod) => pod.container().place(freezers, pids),
            Self::Podman(engine) => engine.container().place(freezers, pids),
        }
    }

    /// Sees to it that the tree is in that cgroup, and nobody else; `tree` tells who is in it.
    pub fn enter(
        &self,
        freezer: &Freezer,
        tree: impl FnMut() -> io::Result<Vec<i32>>,
    ) -> Result<(), CgroupError> {
        match self {
            Self::Process(process) => process.enter(freezer, tree),
            Self::Container(container) => container.enter(freezer, tree),
            Self::Containerd(engine) => engine.container().enter(freezer, tree),
            Self::Pod(pod) => pod.container().enter(freezer, tree),
            Self::Podman(engine) => engine.container().enter(freezer, tree),
        }
    }

    /// Who is in its frozen cgroup, and none of the `threads` of its tree; fails if one of those is
    /// elsewhere. Cheap.
    pub fn stranger(&self, freezer: &Freezer, threads: &[i32]) -> Result<Option<Passing>, Failure> {
        match self {
            // Nobody has a reason to be in a cgroup of ours.
            Self::Process(_) => Ok(None),
            Self::Container(container) => container.stranger(freezer, threads),
            Self::Containerd(engine) => engine.container().stranger(freezer, threads),
            Self::Pod(pod) => pod.container().stranger(freezer, threads),
            Self::Podman(engine) => engine.container().stranger(freezer, threads),
        }
    }

    /// Whether others may thaw the cgroup that holds it.
    pub const fn is_shared(&self) -> bool {
        match self {
            // Its pod's is frozen above it.
            Self::Process(_) | Self::Pod(_) => false,
            Self::Container(_) | Self::Containerd(_) | Self::Podman(_) => true,
        }
    }

    /// The cgroup above `held`, its own, that others start things in: it is frozen for good when
    /// the workload is given away. Fails if there must be one, and it is not known.
    pub fn around(&self, held: &Freezer) -> Result<Option<Freezer>, CgroupError> {
        match self {
            Self::Pod(pod) => pod.cgroup(held).map(Some),
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Podman(_) => {
                Ok(None)
            }
        }
    }

    /// It runs elsewhere: ends the frozen copy where nobody may thaw it, if it is of such a kind.
    /// Whether it is.
    pub fn end(&self, held: &Freezer, freezers: &FreezerRoot) -> Result<bool, CgroupError> {
        match self {
            Self::Pod(pod) => pod.end(held, freezers).map(|()| true),
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Podman(_) => {
                Ok(false)
            }
        }
    }

    /// Namespaces that CRIU is started in to dump it, of those that are its `own`.
    pub fn open_namespaces(&self, own: &[NamespaceKind]) -> Result<Vec<OwnedFd>, Failure> {
        match self {
            Self::Process(process) => process.open_namespaces(own),
            Self::Container(container) => container.open_namespaces(),
            Self::Containerd(engine) => engine.container().open_namespaces(),
            Self::Pod(pod) => pod.container().open_namespaces(),
            Self::Podman(engine) => engine.open_namespaces(),
        }
    }

    /// Has CRIU be asked to dump it, by us or by whoever runs it, and CRIU begin. `directory` is
    /// the migration's; `stand_in` is what a container runtime is to find as CRIU.
    pub async fn ask(
        &self,
        criu: SwrkConfig,
        options: DumpOptions,
        stand_in: &Path,
        directory: &Path,
    ) -> Result<(Conversation, Asker), AskError> {
        match self {
            Self::Process(process) => {
                let mut criu = process.converse(criu)?;
                criu.request(Request::dump(options)).await?;
                Ok((criu, Asker::Us))
            }
            Self::Container(container) => {
                let started = Checkpoint::start(container, (criu, options), stand_in, directory);
                let (criu, checkpoint) = started.await?;
                Ok((criu, Asker::Container(Box::new(checkpoint))))
            }
            Self::Containerd(container) => {
                let asked = container.ask((criu, options), stand_in, directory).await;
                let (criu, checkpoint) = asked?;
                Ok((criu, Asker::Container(Box::new(checkpoint))))
            }
            Self::Pod(pod) => {
                let asked = pod.ask((criu, options), stand_in, directory).await;
                let (criu, checkpoint) = asked?;
                Ok((criu, Asker::Container(Box::new(checkpoint))))
            }
            Self::Podman(container) => {
                let asked = container.ask((criu, options), stand_in, directory);
                let (criu, checkpoint) = asked.await?;
                Ok((criu, Asker::Container(Box::new(checkpoint))))
            }
        }
    }

    /// It stays here, and runs.
    pub fn give_back(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        match self {
            Self::Process(process) => process.give_back(freezer),
            // It is where its runtime has put it.
            Self::Container(_) | Self::Pod(_) => Ok(()),
            Self::Containerd(container) => {
                container.give_back();
                Ok(())
            }
            Self::Podman(container) => {
                container.give_back();
                Ok(())
            }
        }
    }

    /// Whether its engine deletes its links when it has ended.
    pub const fn has_engine_network(&self) -> bool {
        matches!(self, Self::Podman(container) if container.has_network())
    }

    /// What a move takes from its clients, for people.
    pub fn notes(&self) -> Vec<String> {
        match self {
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Pod(_) => {
                Vec::new()
            }
            Self::Podman(container) => container.notes(),
        }
    }

    /// It runs elsewhere, and its tasks here are dead: nothing else of it is to be left.
    pub fn release(&self, freezer: &Freezer, hierarchies: &Hierarchies) -> Result<(), CgroupError> {
        match self {
            Self::Process(process) => process.release(freezer, hierarchies),
            Self::Container(container) => container.release(freezer),
            Self::Containerd(container) => container.release(freezer),
            // Its runtime and the kubelet remove the cgroups.
            Self::Pod(pod) => {
                pod.container().is_deleted();
                Ok(())
            }
            Self::Podman(container) => container.release(freezer),
        }
    }
}

impl Asker {
    /// Waits until it has ended, which has CRIU's response.
    pub async fn ended(&mut self) {
        match self {
            Self::Us => {}
            Self::Container(checkpoint) => checkpoint.ended().await,
        }
    }
}
