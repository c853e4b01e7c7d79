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

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use criu_glue::options::{DumpOptions, Request};
use criu_glue::rpc::{Conversation, StartError, SwrkConfig, TalkError};
use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::id::{MigrationId, WorkloadName};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::containerd::arrive::Arriving as ArrivingContainerd;
use super::containerd::{self, Containerd};
use super::mounts::Mounts;
use super::oci::arrive::{Arriving as ArrivingContainer, Restore};
use super::oci::checkpoint::{Checkpoint, CheckpointError};
use super::oci::habits::Runtime;
use super::oci::{self, Container};
use super::passing::Passing;
use super::pod::arrive::Arriving as ArrivingPod;
pub use super::pod::arrive::Waits as PodWaits;
use super::pod::{self, Pod};
use super::podman::arrive::Arriving as ArrivingPodman;
pub use super::podman::volume::Made as MadeVolume;
use super::podman::{self, Podman, PodmanError};
use super::process::Process;
use super::process::arrive::Arriving as ArrivingProcess;
use super::process::describe::{self, Described};
use super::rootfs::RootPlace;

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
    /// A pod of Kubernetes.
    Pod(Pod),
    /// A container of podman.
    Podman(Podman),
}

/// A workload that comes.
#[derive(Clone, Debug)]
pub enum Arriving {
    /// A bare process tree.
    Process(ArrivingProcess),
    /// A container of an OCI runtime.
    Container(ArrivingContainer),
    /// A container of containerd.
    Containerd(Box<ArrivingContainerd>),
    /// A pod of Kubernetes.
    Pod(Box<ArrivingPod>),
    /// A container of podman.
    Podman(ArrivingPodman),
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
    /// The workload of this name, if it is of a kind that can move away from here.
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
            WorkloadName::Pod(uid) => Pod::find(uid).map(Self::Pod),
            WorkloadName::Podman(name) => Podman::find(name).map(Self::Podman),
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
                let described = describe::describe(process.root(), (pids, &[]), shared)?;
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
            Self::Podman(engine) => engine.container().open_namespaces(),
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

impl Arriving {
    /// Takes in hand what is offered under this name, if it is of a kind that can come here.
    pub fn begin(name: &WorkloadName, description: &WorkloadDescription) -> Result<Self, Failure> {
        match name {
            WorkloadName::Process(_) => Ok(Self::Process(ArrivingProcess::begin(description))),
            WorkloadName::Crun(id) => {
                let begun = ArrivingContainer::begin(Runtime::Crun, id, description);
                begun.map(Self::Container)
            }
            WorkloadName::Runc(id) => {
                let begun = ArrivingContainer::begin(Runtime::Runc, id, description);
                begun.map(Self::Container)
            }
            WorkloadName::Containerd { namespace, id } => {
                let arriving = ArrivingContainerd::begin((namespace, id), description)?;
                Ok(Self::Containerd(Box::new(arriving)))
            }
            WorkloadName::Pod(uid) => {
                let arriving = ArrivingPod::begin(uid, description)?;
                Ok(Self::Pod(Box::new(arriving)))
            }
            WorkloadName::Podman(name) => {
                ArrivingPodman::begin(name, description).map(Self::Podman)
            }
        }
    }

    /// Compares what it needs with this node. Blocks; asks about files, whose storage may not
    /// answer.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        match self {
            Self::Process(process) => process.check(description),
            Self::Container(container) => container.check(description),
            Self::Containerd(container) => container.check(description),
            Self::Pod(pod) => pod.check(description),
            Self::Podman(container) => container.check(description),
        }
    }

    /// Where its root file system comes to, if that travels.
    pub fn root_place(&self) -> Result<Option<RootPlace>, Failure> {
        match self {
            Self::Container(container) => container.root_place(),
            Self::Containerd(container) => container.root_place(),
            Self::Pod(pod) => pod.root_place(),
            Self::Podman(container) => container.root_place(),
            Self::Process(_) => Ok(None),
        }
    }

    /// The overlay that its engine has mounted for it, once its runtime waits.
    pub fn overlay(&self) -> Result<Option<PathBuf>, Failure> {
        match self {
            Self::Containerd(container) => Ok(Some(container.overlay())),
            Self::Pod(pod) => Ok(pod.overlay()),
            Self::Podman(container) => container.overlay().map(Some),
            Self::Process(_) | Self::Container(_) => Ok(None),
        }
    }

    /// Namespaces that are made for it, in the order in which they are entered.
    pub fn namespaces(&self, description: &WorkloadDescription) -> Vec<NamespaceKind> {
        match self {
            Self::Process(process) => process.namespaces(description),
            Self::Container(_) | Self::Containerd(_) => ArrivingContainer::namespaces(),
            // They are those of its sandbox.
            Self::Pod(_) => Vec::new(),
            Self::Podman(container) => container.namespaces(),
        }
    }

    /// If its engine makes its network: has it attach the links to the bridge `hold`, and answers
    /// with the bridge that they are to be on. What that needs is made in `directory`, the
    /// migration's. Blocks, while the engine answers.
    pub fn hold_network(&self, directory: &Path, hold: &str) -> Result<Option<String>, Failure> {
        match self {
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Pod(_) => Ok(None),
            Self::Podman(container) => container.hold_network(directory, hold),
        }
    }

    /// The network namespace that its engine has made for it, once its runtime waits.
    pub fn network_path(&self) -> Result<Option<PathBuf>, Failure> {
        match self {
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Pod(_) => Ok(None),
            Self::Podman(container) => container.network_path().map(Some),
        }
    }

    /// Volumes that its engine has, and that are to be made before what is in them comes.
    pub fn volumes(&self) -> &[VolumeDescription] {
        match self {
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Pod(_) => &[],
            Self::Podman(container) => container.volumes(),
        }
    }

    /// Whether folders that travel must be seen at their paths before they have come: a runtime
    /// looks at what it binds when it is started.
    pub const fn looks_for_folders(&self) -> bool {
        match self {
            Self::Process(_) => false,
            Self::Container(_) | Self::Containerd(_) | Self::Pod(_) | Self::Podman(_) => true,
        }
    }

    /// Whether it is a pod.
    pub const fn is_pod(&self) -> bool {
        matches!(self, Self::Pod(_))
    }

    /// The pod, if somebody else makes a place for it, and says later which that is.
    pub fn as_pod(&mut self) -> Option<&mut ArrivingPod> {
        match self {
            Self::Pod(pod) => Some(pod),
            Self::Process(_) | Self::Container(_) | Self::Containerd(_) | Self::Podman(_) => None,
        }
    }

    /// Checks once more, when its tasks are known for good.
    pub fn check_tasks(&self, tasks: &[i32]) -> Result<(), Failure> {
        match self {
            Self::Process(process) => process.check_tasks(tasks),
            // They are in a pid namespace of their own.
            Self::Container(_) | Self::Containerd(_) | Self::Pod(_) | Self::Podman(_) => Ok(()),
        }
    }

    /// Who makes it and its cgroups with their limits, if that is not us. What that needs is made
    /// in `directory`, the migration's.
    pub fn made_by(
        &self,
        directory: &Path,
        hierarchies: &Hierarchies,
    ) -> io::Result<Option<Restore>> {
        match self {
            Self::Process(_) => Ok(None),
            Self::Container(container) => container.restore(directory, hierarchies).map(Some),
            Self::Containerd(container) => container.restore(directory).map(Some),
            Self::Pod(pod) => pod.restore(directory).map(Some),
            Self::Podman(container) => container.restore(directory, hierarchies).map(Some),
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

/// Has an engine make a volume for what comes. Blocks.
pub fn make_volume(volume: &VolumeDescription) -> Result<MadeVolume, Failure> {
    podman::volume::make(volume)
}

/// Has it remove one again that is still the same, and empty. Blocks; says why it does not.
pub fn remove_volume(volume: &MadeVolume) -> Result<(), String> {
    podman::volume::take_back(volume)
}

/// Removes what is left of an arrival without an end. Nobody of it may be left. Blocks.
pub fn sweep(directory: &Path) {
    // First what is bound into folders that an engine deletes.
    oci::arrive::sweep(directory);
    podman::arrive::sweep(directory);
    containerd::arrive::settle(directory);
    pod::arrive::refuse(directory);
}

/// What has come is about to run. What must be on disk before that is when this returns. Blocks.
pub fn about_to_run(directory: &Path) -> Result<(), Failure> {
    pod::arrive::mark_going(directory)?;
    containerd::arrive::about_to_run(directory)
}

/// It was about to run, and has died before its first instruction. Blocks.
pub fn never_ran(directory: &Path) {
    containerd::arrive::never_ran(directory);
}

/// Goes on ending what runs elsewhere, which a daemon before this one has begun.
pub fn go_on_ending() {
    pod::evacuate::go_on();
}

/// What has come runs: whoever made it removes it from now on, and nobody else.
pub fn runs(directory: &Path) {
    podman::arrive::runs(directory);
    containerd::arrive::runs(directory);
    pod::arrive::runs(directory);
}

/// Whether what has come has run will never be known: nobody is to make it anew. Blocks.
pub fn lose(directory: &Path, why: &str) {
    pod::arrive::lose(directory, why);
}

/// Lets go of what a killed runtime has bound. What an engine has of a workload that may have run
/// stays: it may be the only one, with what that has written last. Blocks.
pub fn leave(directory: &Path) {
    oci::arrive::leave(directory);
    podman::arrive::leave(directory);
    containerd::arrive::leave(directory);
}

/// Sees to it that whoever made what has come knows that it runs.
pub fn settle(directory: &Path) {
    // It may have failed before.
    pod::arrive::runs(directory);
    containerd::arrive::settle(directory);
}

/// Tries again what could not be settled before.
pub fn settle_left() {
    containerd::arrive::settle_left();
}
