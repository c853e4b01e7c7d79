//! A container of a pod at its target: Kubernetes makes the pod, with a sandbox, a network and
//! volumes, and the runtime of the container waits until somebody says what that is restored from.
//!
//! The kubelet has one container after the other started, and goes on only when one runs. So of
//! several each but the last is *ahead*: the engine is told that it runs once its runtime waits
//! ([`Arriving::pass`]), though it is restored when all of them are here.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_containerd::{
    Client, ClientError, PodArrival, PodError, PodOrder, PodRuntime, SOCKET,
};
use pageferry_oci::{Came, INSTALLED, Orders, Place, Places};
use pageferry_proto::id::{MigrationId, PodUid};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::{ContainerDescription, PodDescription};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::time::timeout;

use super::volumes::{is_own, volume_name};
use super::{CONTAINER_NAME, KIND, NAMESPACE, POD_UID, ROOT, ask, engine_of};
use crate::runtime::containerd::arrive::{asked, check_programs};
use crate::runtime::oci::arrive::{Leaves, Restore, check_node, check_spec, prepare_with};
use crate::runtime::oci::binds::Binds;
use crate::runtime::oci::habits::Runtime;
use crate::runtime::oci::read_config;
use crate::runtime::oci::spec::Spec;
use crate::runtime::oci::version;
use crate::runtime::oci::volumes::Named;
use crate::runtime::rootfs::RootPlace;

/// How long containerd may take to say what runs, while it is waited for what waits.
const LIST_MAX: Duration = Duration::from_secs(2);

/// A container of a pod that comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    /// The source's.
    uid: PodUid,
    described: ContainerDescription,
    pod: PodDescription,
    /// Others of its pod come along.
    is_party: bool,
    /// Others of its pod are yet to come here.
    is_ahead: bool,
    /// The runtime of its container here, once that waits.
    came: Option<(Place, Came)>,
}

/// What a pod has that waits for its container's contents.
#[derive(Debug)]
pub struct Waits {
    /// The network that its sandbox has.
    pub net: OwnedFd,
    /// The UTS namespace of that, whose names CRIU overwrites.
    pub uts: OwnedFd,
    /// How soon the kernel is to kill it for memory.
    pub oom_score_adj: Option<i32>,
}

impl Arriving {
    /// Takes in hand what is offered.
    pub fn begin(uid: &PodUid, description: &WorkloadDescription) -> Result<Self, Failure> {
        let described = description.container.clone();
        let pod = described.as_ref().and_then(|has| has.pod.clone());
        let (Some(described), Some(pod)) = (described, pod) else {
            let text = format!("the offer does not say what the container of pod {uid} is");
            return Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        };
        Ok(Self {
            uid: uid.clone(),
            described,
            pod,
            is_party: false,
            is_ahead: false,
            came: None,
        })
    }

    /// The same of all containers of a pod, which share what is their sandbox's.
    pub fn begin_all(
        uid: &PodUid,
        description: &WorkloadDescription,
    ) -> Result<Vec<Self>, Failure> {
        let is_party = !description.members.is_empty();
        let begin = |member| {
            let begun = Self::begin(uid, member)?;
            Ok(Self { is_party, ..begun })
        };
        description.all_members().map(begin).collect()
    }

    /// What the pod calls it.
    pub fn name(&self) -> &str {
        self.pod.container.as_str()
    }

    /// Compares what it needs with this node. Blocks.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        let shared = [Namespaces::NET, Namespaces::IPC, Namespaces::UTS].into_iter();
        let shared = shared.filter(|_| self.is_party);
        check_node(description, shared.fold(Namespaces::NONE, Namespaces::with))?;
        version::check(Runtime::Runc, &self.described.runtime_version)?;
        let spec = Spec::parse(&self.described.config)?;
        let (bundle, streams) = (Path::new(&self.described.bundle), &self.pod.streams);
        let engine = engine_of(&spec, bundle, (self.uid.as_str(), self.is_party), streams);
        check_spec(&self.described, Some(&engine), &Named::of(description))?;
        check_programs()
    }

    /// Where what it has written comes to, if it writes.
    pub fn root_place(&self) -> Result<Option<RootPlace>, Failure> {
        let spec = Spec::parse(&self.described.config)?;
        Ok(spec.is_writable().then_some(RootPlace::Overlay))
    }

    /// Where containerd has its root file system mounted, once its runtime waits.
    pub fn overlay(&self) -> Option<PathBuf> {
        let (_, came) = self.came.as_ref()?;
        Some(came.bundle.join("rootfs"))
    }

    /// Where the kubelet here has the volume `name` of the pod's own, once the runtime of its
    /// container waits.
    pub fn volume(&self, name: &str) -> Result<PathBuf, Failure> {
        let (place, came) = self.came()?;
        let spec = Spec::parse(&read_config(&came.bundle)?)?;
        let is_it =
            |source: &&Path| is_own(source, &place.pod) && volume_name(source) == Some(name);
        let found = spec.bound().map(|(source, _)| source).find(is_it);
        found.map(Path::to_owned).ok_or_else(|| {
            let Place { pod, container } = place;
            let text = format!(
                "the container {container} of pod {pod} has no emptyDir {name}, and that of its \
                 source travels"
            );
            Failure::new(ErrorCode::FileDiffers, text)
        })
    }

    /// Says in `directory`, the migration's, that it comes as pod `uid`: what is refused from now
    /// on is refused there. Fails if something has come there before: a pod comes once.
    pub fn expect(&self, uid: &PodUid, directory: &Path) -> Result<(), Failure> {
        let (places, place) = (Places::of_node(), self.place(uid));
        let before = match places.mark(&place).map_err(|error| unfit(&error))? {
            Some(_) => Some("a migration has come as it before".to_owned()),
            None => places.refusal(&place),
        };
        if let Some(why) = before {
            let text = format!("nothing is restored as pod {uid}: {why}: make another pod");
            return Err(Failure::new(ErrorCode::Unexpected, text));
        }
        let arrival = PodArrival {
            socket: SOCKET.into(),
            place,
            runtime: None,
        };
        arrival.write(directory).map_err(|error| unfit(&error))
    }

    fn place(&self, uid: &PodUid) -> Place {
        Place {
            pod: uid.to_string(),
            container: self.pod.container.to_string(),
        }
    }

    /// Whether the runtime of its container in pod `uid` waits.
    pub fn look(&mut self, uid: &PodUid) -> Result<bool, Failure> {
        let place = self.place(uid);
        let came = Places::of_node().came(&place);
        self.came = came
            .map_err(|error| unfit(&error))?
            .map(|came| (place, came));
        Ok(self.came.is_some())
    }

    /// Fails if its container runs in pod `uid` though nothing has come to us: then containerd does
    /// not start what waits, and the pod has begun anew beside its source. What containerd does not
    /// say soon is looked at the next time.
    pub async fn check_not_cold(&self, uid: &PodUid) -> Result<(), Failure> {
        let place = self.place(uid);
        let cold = match timeout(LIST_MAX, running(&place)).await {
            Ok(Ok(None)) => return Ok(()),
            Ok(Ok(Some(id))) => id,
            Ok(Err(error)) => {
                tracing::warn!(pod = %uid, %error, "whether a pod has begun anew is not known");
                return Ok(());
            }
            Err(_) => {
                tracing::warn!(pod = %uid, "containerd does not list its containers within \
                    {LIST_MAX:?}: whether a pod has begun anew is not known");
                return Ok(());
            }
        };
        let Place { pod, container } = place;
        Err(Failure::new(
            ErrorCode::NodeUnfit,
            format!(
                "the container {container} of pod {pod} runs here as {cold} and has begun anew: \
                 containerd has not started it by {INSTALLED}, or has not told that of the \
                 annotation pageferry.dev/migration. Delete this pod, have containerd's runtime \
                 handler pageferry as deploy/containerd.toml has it, start containerd again, and \
                 move the source once more: it goes on"
            ),
        ))
    }

    /// The engine is to be told that it runs before it does: others are yet to come.
    pub const fn come_ahead(&mut self) {
        self.is_ahead = true;
    }

    /// Has the engine be told so now. Its runtime waits in the cgroups of `within`, a process: what
    /// stands for the container meanwhile is to be in the same ones.
    pub fn pass(&self, within: i32) -> Result<(), Failure> {
        let (_, came) = self.came()?;
        let passed = Orders::of_node().pass(&came.space, &came.id, within);
        passed.map_err(|error| unfit(&error))
    }

    /// Fails if containerd has not started a container that is ahead, as it does before it creates
    /// the next one: it would not know what stands for it, and nobody would end what is restored
    /// there. It cannot be asked: while it creates another one of the pod it does not answer.
    pub fn check_passed(&self) -> Result<(), Failure> {
        let (place, came) = self.came()?;
        if !self.is_ahead || Orders::of_node().is_started(&came.space, &came.id) {
            return Ok(());
        }
        Err(Failure::new(
            ErrorCode::RuntimeFailed,
            format!(
                "the container {} of pod {} was to wait for others of its pod, and containerd has \
                 not started it: see the pod's events",
                place.container, place.pod
            ),
        ))
    }

    /// Compares what waits with what comes. Blocks, while containerd answers.
    pub fn check_waiting(&self) -> Result<Waits, Failure> {
        let (place, came) = self.came()?;
        let here = Spec::parse(&read_config(&came.bundle)?)?;
        let there = Spec::parse(&self.described.config)?;
        let differs = |what: String| {
            let text = format!(
                "the container {} of pod {} {what}",
                place.container, place.pod
            );
            Failure::new(ErrorCode::FileDiffers, text)
        };
        let mut wanted = there.bound().map(|(_, destination)| destination);
        let has = |destination: &Path| here.bound().any(|(_, has)| has == destination);
        if let Some(missing) = wanted.find(|destination| !has(destination)) {
            let missing = missing.display();
            return Err(differs(format!(
                "has nothing mounted at {missing}, where its source has"
            )));
        }
        if here.is_writable() != there.is_writable() {
            return Err(differs(
                "has another readOnlyRootFilesystem than its source".to_owned(),
            ));
        }
        self.check_image(came, &differs)?;
        let open = |name: &str, kind| {
            let path = here.joins(name).ok_or_else(|| {
                differs(format!(
                    "has a {name} namespace of its own, and none of a sandbox"
                ))
            })?;
            let opened = namespace::open_bound(path, kind);
            opened.map_err(|error| unfit(&format!("{}: {error}", path.display())))
        };
        Ok(Waits {
            net: open("network", NamespaceKind::Net)?,
            uts: open("uts", NamespaceKind::Uts)?,
            oom_score_adj: here.oom_score_adj(),
        })
    }

    fn check_image(&self, came: &Came, differs: &dyn Fn(String) -> Failure) -> Result<(), Failure> {
        let id = came.id.clone();
        let snapshot = ask(async |client| {
            let Some(container) = client.container(&id).await? else {
                return Ok(None);
            };
            client.snapshot(container.snapshot()).await
        })?;
        let (has, wanted) = (snapshot.map(|one| one.parent), &self.pod.snapshot_parent);
        match has.as_ref() == Some(wanted) {
            true => Ok(()),
            false => Err(differs(format!(
                "has another image than its source, which has {}: its layers are {} here, and \
                 {wanted} there",
                self.pod.image_digest,
                has.unwrap_or_default()
            ))),
        }
    }

    fn came(&self) -> Result<&(Place, Came), Failure> {
        self.came.as_ref().ok_or_else(|| {
            Failure::new(
                ErrorCode::RuntimeFailed,
                "the container is not there that the pod is to go on in: nobody has said which pod \
                 it comes as, or its runtime does not wait",
            )
        })
    }

    /// How the runtime is told. Makes what that needs in `directory`, which is the member's own of
    /// the `migration`.
    pub fn restore(&self, directory: &Path, migration: MigrationId) -> io::Result<Restore> {
        let (place, came) = self.came().map_err(io::Error::other)?;
        let state = Path::new(ROOT).join(&came.id);
        let config = fs::read(came.bundle.join("config.json"))?;
        let spec = Spec::parse(&config).map_err(io::Error::other)?;
        let leaves = Leaves {
            folder: state.clone(),
            bound_in: state.clone(),
            state: state.join("state.json"),
            paths: Vec::new(),
            volumes: Binds::look(&spec, &came.bundle)?,
        };
        let images = prepare_with(directory, &leaves, &self.pod.streams)?;
        let arrival = PodArrival {
            socket: SOCKET.into(),
            place: place.clone(),
            runtime: Some(PodRuntime {
                namespace: came.space.clone(),
                id: came.id.clone(),
                pid: came.pid,
                state,
                order: PodOrder {
                    migration: migration.to_string(),
                    gate: directory.join("gate"),
                    images,
                    work: directory.to_owned(),
                    is_ahead: self.is_ahead,
                },
            }),
        };
        arrival.write(directory)?;
        Ok(asked(directory, leaves))
    }
}

/// What containerd calls the container at a place, if one runs there.
async fn running(place: &Place) -> Result<Option<String>, ClientError> {
    let client = Client::connect(SOCKET.as_ref(), NAMESPACE).await?;
    for container in client.containers().await? {
        if !is_at(container.labels(), place) {
            continue;
        }
        let task = client.task(container.id()).await?;
        if task.is_some_and(|task| task.is_running) {
            return Ok(Some(container.id().to_owned()));
        }
    }
    Ok(None)
}

/// Whether a container with these labels is at a place.
fn is_at(labels: &HashMap<String, String>, place: &Place) -> bool {
    let wanted = [
        (POD_UID, &*place.pod),
        (KIND, "container"),
        (CONTAINER_NAME, &*place.container),
    ];
    let has = |(label, value)| labels.get(label).is_some_and(|has| has == value);
    wanted.into_iter().all(has)
}

/// What has come into a migration's folder is about to run: until it is known that it has, nothing
/// is created at its place. Durable when this returns.
pub fn mark_going(directory: &Path) -> Result<(), Failure> {
    let arrival = PodArrival::read(directory).map_err(|error| unfit(&error))?;
    arrival.map_or(Ok(()), |arrival| {
        arrival.mark_going().map_err(|error| unfit(&error))
    })
}

/// What has come into a migration's folder has run: its container is one like others from now on.
pub fn runs(directory: &Path) {
    let marked = PodArrival::read(directory).and_then(|arrival| match arrival {
        Some(arrival) => arrival.mark_ran().map_err(PodError::marking),
        None => Ok(()),
    });
    if let Err(error) = marked {
        tracing::error!(folder = %directory.display(), %error,
            "that the container of a pod has run is not noted: it is not started again when it \
            ends");
    }
}

/// Whether what was to run in a migration's folder has run is not known, and it never will.
pub fn lose(directory: &Path, why: &str) {
    let lost = PodArrival::read(directory).and_then(|arrival| match arrival {
        Some(arrival) => arrival.lose(why).map_err(PodError::marking),
        None => Ok(()),
    });
    if let Err(error) = lost {
        tracing::error!(folder = %directory.display(), %error,
            "whoever comes to the place of what is lost waits, and is not told why");
    }
}

/// What was to come into a migration's folder does not: whoever waits for it, or comes later, is
/// told so.
pub fn refuse(directory: &Path) {
    let refused = PodArrival::read(directory).and_then(|arrival| match arrival {
        Some(arrival) => arrival.refuse("its migration was given up, and its source goes on"),
        None => Ok(()),
    });
    if let Err(error) = refused {
        tracing::error!(folder = %directory.display(), %error,
            "whoever waits for what does not come is not told");
    }
}

fn unfit(why: &dyn std::fmt::Display) -> Failure {
    let text = format!("the container of the pod: {why}");
    Failure::new(ErrorCode::NodeUnfit, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_at_the_place_that_its_labels_say() {
        let place = Place {
            pod: "u-1".to_owned(),
            container: "web".to_owned(),
        };
        let usual = [
            (POD_UID, "u-1"),
            (KIND, "container"),
            (CONTAINER_NAME, "web"),
        ];
        let labels = |change: Option<(&str, &str)>| -> HashMap<String, String> {
            let all = usual.into_iter().chain(change);
            all.map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect()
        };
        assert!(is_at(&labels(None), &place));
        for other in [
            (POD_UID, "u-2"),
            (KIND, "sandbox"),
            (CONTAINER_NAME, "sidecar"),
        ] {
            assert!(!is_at(&labels(Some(other)), &place), "{other:?}");
        }
        assert!(!is_at(&HashMap::new(), &place));
    }
}
