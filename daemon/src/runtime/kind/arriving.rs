//! What comes, by its kind: what is compared, and made ready for it, and who is told what became of
//! it.

use std::io;
use std::path::{Path, PathBuf};

use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::id::{MigrationId, WorkloadName};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;

use crate::runtime::containerd;
use crate::runtime::containerd::arrive::Arriving as ArrivingContainerd;
use crate::runtime::oci;
use crate::runtime::oci::arrive::{Arriving as ArrivingContainer, Restore};
use crate::runtime::oci::habits::Runtime;
use crate::runtime::pod;
pub use crate::runtime::pod::arrive::Arriving as ArrivingPod;
pub use crate::runtime::pod::arrive::Waits as PodWaits;
use crate::runtime::podman;
use crate::runtime::podman::arrive::Arriving as ArrivingPodman;
pub use crate::runtime::podman::volume::Made as MadeVolume;
use crate::runtime::process::arrive::Arriving as ArrivingProcess;
use crate::runtime::rootfs::RootPlace;

/// A workload that comes.
#[derive(Clone, Debug)]
pub enum Arriving {
    /// A bare process tree.
    Process(ArrivingProcess),
    /// A container of an OCI runtime.
    Container(Box<ArrivingContainer>),
    /// A container of containerd.
    Containerd(Box<ArrivingContainerd>),
    /// A container of a pod of Kubernetes.
    Pod(Box<ArrivingPod>),
    /// A container of podman.
    Podman(Box<ArrivingPodman>),
}

impl Arriving {
    /// Takes in hand what is offered under this name, if it is of a kind that can come here.
    pub fn begin(name: &WorkloadName, description: &WorkloadDescription) -> Result<Self, Failure> {
        match name {
            WorkloadName::Process(_) => Ok(Self::Process(ArrivingProcess::begin(description))),
            WorkloadName::Crun(id) => {
                let begun = ArrivingContainer::begin(Runtime::Crun, id, description);
                begun.map(Box::new).map(Self::Container)
            }
            WorkloadName::Runc(id) => {
                let begun = ArrivingContainer::begin(Runtime::Runc, id, description);
                begun.map(Box::new).map(Self::Container)
            }
            WorkloadName::Containerd { namespace, id } => {
                let arriving = ArrivingContainerd::begin((namespace, id), description)?;
                Ok(Self::Containerd(Box::new(arriving)))
            }
            WorkloadName::Podman(name) => {
                let arriving = ArrivingPodman::begin(name, description)?;
                Ok(Self::Podman(Box::new(arriving)))
            }
            WorkloadName::Pod(_) | WorkloadName::PodmanPod(_) => Err(Failure::new(
                ErrorCode::Internal,
                format!("{name} may have several members"),
            )),
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
            Self::Podman(container) => container.network_path(),
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

    /// Whether it is of a pod of Kubernetes.
    pub const fn is_pod(&self) -> bool {
        matches!(self, Self::Pod(_))
    }

    /// The same, if somebody else makes a place for it, and says later which that is.
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
    /// in `directory`, the member's own of the `migration`.
    pub fn made_by(
        &self,
        (directory, migration): (&Path, MigrationId),
        hierarchies: &Hierarchies,
    ) -> io::Result<Option<Restore>> {
        match self {
            Self::Process(_) => Ok(None),
            Self::Container(container) => container.restore(directory, hierarchies).map(Some),
            Self::Containerd(container) => container.restore(directory).map(Some),
            Self::Pod(pod) => pod.restore(directory, migration).map(Some),
            Self::Podman(container) => container.restore(directory, hierarchies).map(Some),
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
