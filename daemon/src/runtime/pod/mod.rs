//! A pod of Kubernetes, named by its UID: the kubelet makes its containers, has them started again
//! when they end, and ends them; containerd has them for it.
//!
//! What moves are the containers of the pod that run: one, or the members of a party
//! ([`together`]). The pod they come as is another one, which Kubernetes makes at the target: with
//! its sandbox, its network, and its volumes ([`arrive`]). At the source the pod's cgroup, which is
//! above those of the containers, is frozen before the hand-off is decided, and never thawed again
//! unless they stay: the kubelet may kill what is in it, and start something, and nothing of that
//! runs ([`evacuate`]).
//!
//! Invariants: from before the commit on nothing of the pod runs at the source; nothing of it is
//! thawed in its cgroup afterwards; what is left is ended until the pod's cgroup is gone, whoever
//! is restarted meanwhile.
//!
//! Volumes that are the pod's own (emptyDir) travel: each into the folder that the kubelet at the
//! target has made for the volume of its name ([`volumes`]), with the first container that has it.
//!
//! Absent, and refused by name: host namespaces, processes that containers share, volumes of other
//! kinds than these and those that the kubelet fills, devices, terminals, an open input. Containers
//! that have ended are not seen here, and do not move.

pub mod arrive;
pub mod evacuate;
pub mod together;
mod volumes;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use criu_glue::options::DumpOptions;
use criu_glue::rpc::{Conversation, SwrkConfig};
use pageferry_cgroup::freezer::{CgroupError, Freezer, FreezerRoot};
use pageferry_containerd::{Client, ClientError, Container, RUNTIME, SOCKET};
use pageferry_oci::INSTALLED;
use pageferry_proto::id::{ContainerId, MEMBERS_MAX, PodUid};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::PodDescription;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::layer;
use super::oci::Container as OfRuntime;
use super::oci::checkpoint::{Checkpoint, CheckpointError};
use super::oci::habits::Runtime;
use super::oci::read_config;
use super::oci::spec::{Engine, Spec};
use super::process::describe::Described;
use evacuate::Evacuation;
pub use volumes::volume_name;
use volumes::{is_made, is_own, unmoved};

/// The name space in which the kubelet has containerd keep them.
const NAMESPACE: &str = "k8s.io";

/// Where containerd has runc keep those.
const ROOT: &str = "/run/containerd/runc/k8s.io";

/// Labels that containerd puts on them.
const POD_UID: &str = "io.kubernetes.pod.uid";
const KIND: &str = "io.cri-containerd.kind";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// How long the killed tasks of its container may take to be out of its cgroup.
const END_MAX: Duration = Duration::from_secs(20);

/// How often that is looked for.
const END_POLL: Duration = Duration::from_millis(5);

/// How long containerd may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A container of a pod at its source, with what it has of its pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    uid: String,
    /// What the pod calls its container.
    name: String,
    container: OfRuntime,
    /// The container's standard streams.
    streams: Vec<String>,
    /// The process that keeps its sandbox, and when that was started.
    keeper: Option<(i32, u64)>,
    /// Other containers of the pod move along.
    #[serde(default)]
    is_party: bool,
    /// Volumes that it has, and that travel with another one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    travel_apart: Vec<PathBuf>,
}

impl Pod {
    /// The containers of the pod of this UID, if it runs here and they can move; in the order of
    /// their names. Blocks, while containerd answers.
    pub fn find(uid: &PodUid) -> Result<Vec<Self>, Failure> {
        let wanted = uid.as_str();
        let (mut running, keeper) = ask(async |client| {
            let (mut running, mut keeper) = (Vec::new(), None);
            for container in client.containers().await? {
                let has = |label, value| container.labels().get(label).is_some_and(|l| l == value);
                if !has(POD_UID, wanted) {
                    continue;
                }
                let task = client.task(container.id()).await?;
                let Some(task) = task.filter(|task| !task.is_stopped) else {
                    continue;
                };
                if has(KIND, "sandbox") {
                    keeper = i32::try_from(task.pid).ok();
                } else {
                    running.push(container);
                }
            }
            Ok((running, keeper))
        })?;
        match running.len() {
            0 => {
                let text = format!("no container of pod {wanted} runs here");
                return Err(Failure::new(ErrorCode::WorkloadGone, text));
            }
            count if MEMBERS_MAX < count => {
                let text = format!("has {count} containers: 1 to {MEMBERS_MAX} are moved");
                return Err(refused(uid, &text));
            }
            _ => {}
        }
        running.sort_by_key(|container| container.labels().get(CONTAINER_NAME).cloned());
        let keeper = keeper.and_then(|pid| Some((pid, Identity::of(pid).ok()?.started)));
        let is_party = 1 < running.len();
        let mut found: Vec<Self> = Vec::new();
        for container in &running {
            let mut one = Self::of(uid, container, keeper)?;
            one.is_party = is_party;
            let theirs: Vec<PathBuf> = found.iter().flat_map(Self::folders).collect();
            let has = one.folders().into_iter();
            one.travel_apart = has.filter(|folder| theirs.contains(folder)).collect();
            found.push(one);
        }
        Ok(found)
    }

    /// One of its containers, alone.
    fn of(
        uid: &PodUid,
        container: &Container,
        keeper: Option<(i32, u64)>,
    ) -> Result<Self, Failure> {
        check(container, uid)?;
        let id: ContainerId = container.id().parse().map_err(|error| {
            refused(
                uid,
                &format!("has a container that cannot be named: {error}"),
            )
        })?;
        let (of_runtime, state) = OfRuntime::read_in((Runtime::Runc, Some(ROOT.into())), &id)?;
        state.check_maker()?;
        check_streams(&state.streams, uid)?;
        let label = container.labels().get(CONTAINER_NAME).cloned();
        Ok(Self {
            uid: uid.as_str().to_owned(),
            name: label.unwrap_or_default(),
            container: of_runtime,
            streams: state.streams,
            keeper,
            is_party: false,
            travel_apart: Vec::new(),
        })
    }

    /// What Kubernetes knows it by.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// What its runtime has of its container.
    pub const fn container(&self) -> &OfRuntime {
        &self.container
    }

    /// What it is made of: the tree of `pids`, the root first. Blocks, for a few milliseconds if
    /// its storage answers.
    pub fn describe(&self, pids: &[i32], named: &[PathBuf]) -> Result<Described, Failure> {
        let bundle = self.container.bundle();
        let spec = Spec::parse(&read_config(bundle)?)?;
        self.check_spec(&spec)?;
        let (uid, party) = (self.uid.as_str(), self.is_party);
        let mut engine = engine_of(&spec, bundle, (uid, party), &self.streams);
        // They are the container's own, and looked at as others that travel.
        engine.folders.retain(|made| !is_own(made, &self.uid));
        let layer = |spec: &Spec| layer::find(&spec.root(bundle), None);
        let described = self
            .container
            .describe_with((pids, named), Some(&engine), layer);
        let mut described = described?;
        if let Some(container) = &mut described.description.container {
            container.pod = Some(self.describe_image()?);
        }
        Ok(described)
    }

    fn describe_image(&self) -> Result<PodDescription, Failure> {
        let id = self.container.id().to_owned();
        let unfit = |text: String| Failure::new(ErrorCode::UnsupportedWorkload, text);
        let (image, digest, snapshot) = ask(async |client| {
            let Some(container) = client.container(&id).await? else {
                return Ok((String::new(), None, None));
            };
            Ok((
                container.image().to_owned(),
                client.image(container.image()).await?,
                client.snapshot(container.snapshot()).await?,
            ))
        })?;
        let image_digest = digest.ok_or_else(|| {
            unfit(format!(
                "the image {image:?} of the container {} is not in containerd any more, so that \
                 the target's cannot be compared with it",
                self.name
            ))
        })?;
        let snapshot = snapshot.filter(|snapshot| !snapshot.parent.is_empty());
        let snapshot = snapshot.ok_or_else(|| {
            unfit(format!(
                "the root file system of {} is not a snapshot of an image",
                self.name
            ))
        })?;
        let container = self.name.parse();
        Ok(PodDescription {
            container: container
                .map_err(|_| unfit(format!("a container named {:?}", self.name)))?,
            image_digest,
            snapshot_parent: snapshot.parent,
            streams: self.streams.clone(),
        })
    }

    /// Folders of the kubelet's that its container has for its own, and that travel with it.
    pub fn folders(&self) -> Vec<PathBuf> {
        let spec = read_config(self.container.bundle());
        let Ok(spec) = spec.and_then(|config| Spec::parse(&config)) else {
            // Whoever describes it says why.
            return Vec::new();
        };
        let sources = spec.bound().map(|(source, _)| source.to_owned());
        let own = sources.filter(|source| is_own(source, &self.uid));
        // A container may have one at several places.
        let own: BTreeSet<_> = own.collect();
        let own = own.into_iter();
        own.filter(|own| !self.travel_apart.contains(own)).collect()
    }

    /// Refuses what of its container is not moved yet, beside what no container may have.
    fn check_spec(&self, spec: &Spec) -> Result<(), Failure> {
        let text = |text: &str| {
            let text = format!("the container {} of pod {} {text}", self.name, self.uid);
            Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
        };
        if spec.has_devices() {
            return text("has devices of the node, which are not moved");
        }
        for (source, destination) in spec.bound() {
            let place = destination.display();
            if let Some(what) = unmoved(source, &self.uid) {
                return text(&format!("has {what} at {place}, which is not moved yet"));
            }
        }
        self.check_shm(spec)
    }

    /// Checks once more what may have changed since it was described. Of a frozen tree.
    pub fn check_frozen(&self) -> Result<(), Failure> {
        self.check_shm(&Spec::parse(&read_config(self.container.bundle())?)?)
    }

    /// Refuses files in /dev/shm: the sandbox has that, and it does not travel.
    fn check_shm(&self, spec: &Spec) -> Result<(), Failure> {
        let shm = |destination: &Path| destination == Path::new("/dev/shm");
        let mut bound = spec.bound();
        match bound.find(|(source, destination)| shm(destination) && !is_empty(source)) {
            None => Ok(()),
            Some(_) => Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!(
                    "the container {} of pod {} has files in /dev/shm, which are its sandbox's and \
                     are not moved yet",
                    self.name, self.uid
                ),
            )),
        }
    }

    /// Has its runtime ask for a dump; as [`Checkpoint::start`].
    pub async fn ask(
        &self,
        how: (SwrkConfig, DumpOptions),
        stand_in: &Path,
        directory: &Path,
    ) -> Result<(Conversation, Checkpoint), CheckpointError> {
        Checkpoint::start(&self.container, how, stand_in, directory).await
    }

    /// The pod's own cgroup, which is above `held`, the container's; it may be gone. Fails if what
    /// is above is not known to be that: it could not be held there.
    pub fn cgroup(&self, held: &Freezer) -> Result<Freezer, CgroupError> {
        let above = pods_folder(held.path(), &self.uid);
        above
            .map(|above| Freezer::at(above.to_owned()))
            .ok_or_else(|| CgroupError::Io {
                action: "finding the cgroup of the pod above",
                path: held.path().to_owned(),
                source: io::Error::other(format!(
                    "the folder there has not the UID {} in its name: is the kubelet run with \
                     --cgroups-per-qos=false?",
                    self.uid
                )),
            })
    }

    /// It runs elsewhere, and `held` holds its container: that is killed, and all else of the pod
    /// ended in the background, until the kubelet has removed it.
    pub fn end(&self, held: &Freezer, freezers: &FreezerRoot) -> Result<(), CgroupError> {
        let cgroup = self.cgroup(held)?;
        if !cgroup.exists() {
            // The kubelet has removed it.
            return Ok(());
        }
        let failed = |source| CgroupError::Io {
            action: "ending who is in",
            path: cgroup.path().to_owned(),
            source,
        };
        let ending = Evacuation::of((&self.uid, self.keeper), &cgroup, freezers).map_err(failed)?;
        ending.note().map_err(failed)?;
        let deadline = Instant::now() + END_MAX;
        loop {
            ending.once().map_err(failed)?;
            if held.is_empty() {
                break;
            }
            if deadline < Instant::now() {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            thread::sleep(END_POLL);
        }
        ending.go_on();
        Ok(())
    }
}

/// What the kubelet and containerd have made of a pod's container, by `spec` in `bundle`.
fn engine_of(
    spec: &Spec,
    bundle: &Path,
    (uid, is_party): (&str, bool),
    streams: &[String],
) -> Engine {
    let inodes = streams.iter();
    let inodes = inodes.filter_map(|name| name.strip_prefix("pipe:[")?.strip_suffix(']'));
    let sources = spec.bound().map(|(source, _)| bundle.join(source));
    Engine {
        manager: "",
        folders: sources.filter(|source| is_made(source, uid)).collect(),
        pipes: inodes.filter_map(|inode| inode.parse().ok()).collect(),
        has_image: true,
        is_sandboxed: true,
        is_party,
        ..Engine::default()
    }
}

/// The folder above a container's cgroup, if it is that of pod `uid`.
fn pods_folder<'a>(held: &'a Path, uid: &str) -> Option<&'a Path> {
    let above = held.parent()?;
    let name = above.file_name()?.to_str()?;
    // The kubelet has its UID in the name; systemd's slices have another spelling.
    let is_pods = name.contains(uid) || name.contains(&uid.replace('-', "_"));
    is_pods.then_some(above)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Refuses a container of a pod that is run as none is moved.
fn check(container: &Container, uid: &PodUid) -> Result<(), Failure> {
    if container.runtime() != RUNTIME {
        let runtime = container.runtime();
        let text = format!("has the runtime {runtime}, and only those of {RUNTIME} are moved");
        return Err(refused(uid, &text));
    }
    let program = container.program();
    let is_runc = program.is_empty() || Path::new(&program).ends_with("runc");
    if !is_runc && program != INSTALLED {
        return Err(refused(
            uid,
            &format!("is run by {program}, and not by runc"),
        ));
    }
    match container.root().is_empty() {
        true => Ok(()),
        false => Err(refused(
            uid,
            &format!("is kept by its runtime in {}", container.root()),
        )),
    }
}

/// Refuses standard streams that containerd does not make again.
fn check_streams(streams: &[String], uid: &PodUid) -> Result<(), Failure> {
    let unfit = |text: &str| {
        let text = format!("the container of pod {uid} {text}");
        Err(Failure::new(ErrorCode::StdioUnfit, text))
    };
    if streams.first().is_some_and(|input| input != "/dev/null") {
        return unfit("has its input held open (stdin), which is not moved yet");
    }
    let known = |name: &&String| *name == "/dev/null" || name.starts_with("pipe:[");
    match streams.iter().find(|name| !known(name)) {
        Some(other) => unfit(&format!("was started with {other} for a standard stream")),
        None => Ok(()),
    }
}

fn refused(uid: &PodUid, text: &str) -> Failure {
    let text = format!("pod {uid} {text}");
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}

fn ask<T: Send>(
    work: impl AsyncFnOnce(Client) -> Result<T, ClientError> + Send,
) -> Result<T, Failure> {
    let asked = pageferry_containerd::with((SOCKET.as_ref(), NAMESPACE), ANSWER_MAX, work);
    asked.map_err(|error| Failure::new(ErrorCode::RuntimeFailed, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2e";

    #[test]
    fn the_cgroup_of_a_pod_is_known_by_its_uid_in_either_spelling() {
        let slice = format!("/kubepods-pod{}.slice", UID.replace('-', "_"));
        for above in [format!("/kubepods/burstable/pod{UID}"), slice] {
            let held = format!("{above}/cri-containerd-0a.scope");
            assert_eq!(pods_folder(Path::new(&held), UID), Some(Path::new(&above)));
        }
        for other in ["/k8s.io/0a", "/kubepods/podother/0a", "/"] {
            assert_eq!(pods_folder(Path::new(other), UID), None, "{other}");
        }
    }

    #[test]
    fn an_input_that_is_held_open_is_refused() {
        let uid: PodUid = UID.parse().unwrap();
        let check = |streams: [&str; 3]| check_streams(&streams.map(str::to_owned), &uid);
        check(["/dev/null", "pipe:[7]", "pipe:[8]"]).unwrap();
        let input = check(["pipe:[6]", "pipe:[7]", "pipe:[8]"]).unwrap_err();
        assert!(input.text().contains("stdin"), "{input}");
        assert!(check(["/dev/null", "/tmp/log", "pipe:[8]"]).is_err());
    }
}
