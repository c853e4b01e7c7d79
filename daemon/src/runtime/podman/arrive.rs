//! A container of podman at its target: its name is free, its image is here, and podman's import
//! makes it. One of a pod comes into the pod that was made before it ([`pod`]).

pub mod pod;

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::{
    ContainerDescription, PodmanDescription, VolumeDescription,
};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_proto::wire::podman_pod::PodmanPodDescription;
use pageferry_sys::namespace::NamespaceKind;

use super::command::{podman_at_once, podman_has, told};
use super::network::{self, Attachment};
use super::{MANAGER, NEVER, PROGRAM, archive, folders, volume};
use crate::runtime::oci::arrive::{self, Restore};
use crate::runtime::oci::habits::Runtime;
use crate::runtime::oci::spec::{Around, Bind, Engine, Spec};
use crate::runtime::oci::volumes::Named;
use crate::runtime::oci::{read_config, version};
use crate::runtime::rootfs::RootPlace;

/// Who restores it.
const RUNTIME: Runtime = Runtime::Crun;

/// Where its id is, in the migration's folder, from before podman is asked.
const NOTE: &str = "podman";

/// What that is called when it runs, or has run: it is podman's then.
const RAN: &str = "podman-ran";

/// What podman imports, in the migration's folder.
const ARCHIVE: &str = "container.tar";

/// A container that comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    name: ContainerId,
    container: ContainerDescription,
    podman: PodmanDescription,
    /// What it has of a network of podman's, if it is in one.
    network: Option<Attachment>,
    /// What it has of a pod, if it is in one.
    pod: Option<InPod>,
}

/// What a container has of its pod.
#[derive(Clone, Debug)]
struct InPod {
    /// Namespaces that are the pod's.
    shared: Namespaces,
    /// The infra container's id, at the source.
    infra: ContainerId,
    /// Volumes that come with all containers of the pod.
    volumes: Vec<String>,
    /// The pod's id here, and its cgroup, once it is made.
    made: Option<(String, String)>,
}

impl Arriving {
    /// Takes in hand what is offered.
    pub fn begin(name: &ContainerId, description: &WorkloadDescription) -> Result<Self, Failure> {
        let mut arriving = Self::read(name, description)?;
        let network = Attachment::exported(&arriving.podman.archive);
        arriving.network = network.map_err(|why| unreadable(name, &why))?;
        Ok(arriving)
    }

    /// The same of one in a pod, with which these volumes come.
    fn begin_in(
        (pod, volumes): (&PodmanPodDescription, &[String]),
        description: &WorkloadDescription,
    ) -> Result<Self, Failure> {
        let name = description.member_name.parse().map_err(|error| {
            let text = format!("a container of the pod {}: {error}", pod.name);
            Failure::new(ErrorCode::Malformed, text)
        })?;
        let mut arriving = Self::read(&name, description)?;
        arriving.pod = Some(InPod {
            shared: pod::shared_of(pod),
            infra: pod.infra_id.clone(),
            volumes: volumes.to_vec(),
            made: None,
        });
        Ok(arriving)
    }

    /// It is to come into this pod.
    pub fn join(&mut self, made: &pod::Made) {
        if let Some(pod) = &mut self.pod {
            pod.made = Some((made.id.clone(), made.cgroup.clone()));
        }
    }

    fn read(name: &ContainerId, description: &WorkloadDescription) -> Result<Self, Failure> {
        let container = description.container.clone();
        let podman = container.as_ref().and_then(|has| has.podman.clone());
        let (Some(container), Some(podman)) = (container, podman) else {
            let text = format!("the offer does not say what podman has of the container {name}");
            return Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        };
        Ok(Self {
            name: name.clone(),
            container,
            podman,
            network: None,
            pod: None,
        })
    }

    /// Compares what it needs with this node. Blocks, while podman answers.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        let shared = self.pod.as_ref().map_or(Namespaces::NONE, |pod| pod.shared);
        arrive::check_node(description, shared)?;
        version::check(RUNTIME, &self.container.runtime_version)?;
        arrive::check_free(RUNTIME, self.podman.id.as_str())?;
        let bundle = Path::new(&self.container.bundle);
        let engine = self.engine(bundle);
        arrive::check_spec(&self.container, Some(&engine), &Named::of(description))?;
        let spec = Spec::parse(&self.container.config)?;
        let checked = archive::check(&self.podman.archive, self.podman.id.as_str());
        let volumes = checked.map_err(|why| unreadable(&self.name, &why))?;
        self.check_podman(bundle)?;
        check_runtime(RUNTIME.program())?;
        for name in [self.name.as_str(), self.podman.id.as_str()] {
            if has(["container", "exists", name])? {
                return Err(Failure::new(
                    ErrorCode::NameTaken,
                    format!("podman has a container {name} at the target already: remove it first"),
                ));
            }
        }
        let around = Around {
            bundle,
            engine: Some(&engine),
            named: &[],
        };
        self.check_volumes(&volumes, &spec.binds(&around), description)?;
        let image = self.podman.image.as_str();
        if !has(["image", "exists", image])? {
            return Err(Failure::new(
                ErrorCode::FileDiffers,
                format!(
                    "the target's podman has no image with the id {image}: bring it there with \
                     podman save and podman load, or pull it, by its digest"
                ),
            ));
        }
        match &self.network {
            Some(network) => network.check(self.podman.leads_out),
            None => Ok(()),
        }
    }

    /// Checks that each of `volumes`, which are those that podman's import looks for, comes or is
    /// here: it would make one that is not, and make what it finds there its own.
    fn check_volumes(
        &self,
        volumes: &[String],
        binds: &[Bind],
        description: &WorkloadDescription,
    ) -> Result<(), Failure> {
        let copied = description.copied.iter();
        let copied: Vec<&str> = copied.map(|copied| copied.path.as_str()).collect();
        for coming in &self.podman.volumes {
            volume::check_offered(coming, volumes, &copied)?;
            volume::check_free(coming)?;
        }
        let beside = self.pod.as_ref().map_or(&[][..], |pod| &pod.volumes);
        let own = self.podman.volumes.iter().map(|has| &has.name);
        let coming: Vec<&String> = own.chain(beside).collect();
        let is_coming = |name: &String| coming.contains(&name);
        let here = volumes.iter().filter(|name| !is_coming(name));
        let sources: Vec<&Path> = binds.iter().map(|bind| &*bind.source).collect();
        here.into_iter()
            .try_for_each(|name| volume::check_shared(name, &sources))
    }

    /// What podman makes of it, as its specification has that at the source.
    fn engine(&self, bundle: &Path) -> Engine {
        let mut made = folders(&self.podman.id, bundle);
        if let Some(pod) = &self.pod {
            made.extend(super::folders_of_infra(&pod.infra, bundle));
        }
        Engine {
            manager: MANAGER,
            folders: made,
            has_network: self.network.is_some(),
            is_sandboxed: self.pod.is_some(),
            ..Engine::default()
        }
    }

    fn check_podman(&self, bundle: &Path) -> Result<(), Failure> {
        let unfit = |text: String| Err(Failure::new(ErrorCode::NodeUnfit, text));
        let format = "{{.Host.CgroupManager}}\n{{.Store.GraphRoot}}";
        let told = match podman_at_once(["info", "--format", format]) {
            Ok(printed) => printed,
            Err(error) => return unfit(told(&error)),
        };
        let mut lines = told.lines();
        let (manager, store) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
        if manager != "cgroupfs" {
            return unfit(format!(
                "the target's podman has cgroups from {manager}: containers come with \
                 cgroup_manager = \"cgroupfs\" in containers.conf"
            ));
        }
        if !is_kept_in(store, self.podman.id.as_str(), bundle) {
            return unfit(format!(
                "the target's podman has its containers in {store}, and the source's in {}",
                bundle.display()
            ));
        }
        Ok(())
    }

    /// Volumes that are made for it.
    pub fn volumes(&self) -> &[VolumeDescription] {
        &self.podman.volumes
    }

    /// Where what it has written comes to, if it writes.
    pub fn root_place(&self) -> Result<Option<RootPlace>, Failure> {
        let spec = Spec::parse(&self.container.config)?;
        Ok(spec.is_writable().then_some(RootPlace::Overlay))
    }

    /// Where podman has mounted its root file system: in what it has written for its runtime.
    pub fn overlay(&self) -> Result<PathBuf, Failure> {
        let here = read_config(Path::new(&self.container.bundle))?;
        Ok(Spec::parse(&here)?.named_root().to_owned())
    }

    /// Namespaces that are made for it before it is restored.
    pub fn namespaces(&self) -> Vec<NamespaceKind> {
        match (&self.network, &self.pod) {
            (None, None) => vec![NamespaceKind::Net],
            // podman's.
            _ => Vec::new(),
        }
    }

    /// Has podman attach its link to the bridge `hold` when it is restored; answers with the bridge
    /// of its network, if it is in one of podman's. What that needs is made in `directory`, the
    /// migration's. Blocks, while podman answers.
    pub fn hold_network(&self, directory: &Path, hold: &str) -> Result<Option<String>, Failure> {
        let network = self.network.as_ref();
        network
            .map(|network| network.hold(directory, hold))
            .transpose()
    }

    /// The network namespace that podman has made for it alone, when its runtime waits.
    pub fn network_path(&self) -> Result<Option<PathBuf>, Failure> {
        if self.network.is_none() {
            return Ok(None);
        }
        let spec = Spec::parse(&read_config(Path::new(&self.container.bundle))?)?;
        let joined = spec.joins("network").map(Path::to_owned);
        joined.map(Some).ok_or_else(|| {
            let text = format!("podman has made no network for the container {}", self.name);
            Failure::new(ErrorCode::NetworkUnfit, text)
        })
    }

    /// How podman is started to restore it. Makes what that needs in `directory`, which is the
    /// migration's.
    pub fn restore(&self, directory: &Path, hierarchies: &Hierarchies) -> io::Result<Restore> {
        let archive = directory.join(ARCHIVE);
        let mut private = OpenOptions::new();
        private.write(true).create(true).truncate(true).mode(0o600);
        private.open(&archive)?.write_all(&self.podman.archive)?;
        let id = self.podman.id.as_str();
        private
            .open(directory.join(NOTE))?
            .write_all(id.as_bytes())?;
        let container = (RUNTIME, id);
        let joined = self.pod.as_ref().map(|pod| pod.made.as_ref());
        let (pod, cgroup) = match joined {
            None => (None, None),
            Some(Some((pod, above))) => (Some(pod), Some(format!("{above}/{CGROUP}{id}"))),
            Some(None) => return Err(io::Error::other("its pod is not made")),
        };
        let made = (&self.container, cgroup);
        let made = arrive::made(container, made, hierarchies, directory)?;
        let archive = archive.to_string_lossy().into_owned();
        let networks = network::held_in(directory);
        let networks = networks.to_string_lossy();
        let networks = ["--network-config-dir", &*networks];
        let networks = networks.into_iter().filter(|_| self.network.is_some());
        let import = networks.chain(["container", "restore", "--import", &archive]);
        let import = import.chain(["--ignore-rootfs", "--ignore-volumes"]);
        let into = pod.map(|pod| ["--pod", pod]);
        let import = import.chain(into.into_iter().flatten());
        let words = |words: &[&str]| words.iter().copied().map(str::to_owned).collect();
        let restart = &*self.podman.restart;
        let again = !restart.is_empty() && restart != NEVER;
        Ok(Restore {
            program: PROGRAM.into(),
            is_engine: true,
            arguments: import.map(str::to_owned).collect(),
            // One that has begun to run is not removed by it.
            undo: words(&["rm", "--ignore", id]),
            then: match again {
                true => words(&["update", "--restart", restart, id]),
                false => Vec::new(),
            },
            ..made
        })
    }
}

/// How podman calls the cgroup of a container, before its id.
const CGROUP: &str = "libpod-";

/// Whether the runtime that podman starts is there, and can restore.
fn check_runtime(program: &str) -> Result<(), Failure> {
    let unfit = |why: String| {
        let text = format!("the target's {program} cannot restore the container: {why}");
        Err(Failure::new(ErrorCode::NodeUnfit, text))
    };
    match version::ask(program) {
        Ok(said) => match restores(&said) {
            Ok(()) => Ok(()),
            Err(why) => unfit(why),
        },
        Err(error) => unfit(error.to_string()),
    }
}

/// Whether a crun that says this of its version restores, as we know it.
fn restores(said: &str) -> Result<(), String> {
    let first = said.lines().next().unwrap_or_default();
    let version = first.split(' ').next_back().unwrap_or_default();
    let major = version
        .split('.')
        .next()
        .and_then(|text| text.parse::<u32>().ok());
    let has_criu = said.split_whitespace().any(|word| word == "+CRIU");
    match major {
        Some(MAJOR) if has_criu => Ok(()),
        Some(MAJOR) => Err(format!("{first} was built without CRIU")),
        _ => Err(format!("{first:?} is no version {MAJOR} of it")),
    }
}

/// The version of crun that is known to restore as we expect.
const MAJOR: u32 = 1;

/// Whether podman has this bundle for a container `id`, if it has containers in `store`: what is
/// read there later is podman's own.
fn is_kept_in(store: &str, id: &str, bundle: &Path) -> bool {
    let within = bundle.strip_prefix(store).ok();
    let parts: Vec<_> = within.into_iter().flatten().collect();
    match parts[..] {
        [driver, name, files] => {
            let is_drivers = driver.as_bytes().ends_with(b"-containers");
            !store.is_empty() && is_drivers && name == id && files == "userdata"
        }
        _ => false,
    }
}

fn unreadable(name: &ContainerId, why: &str) -> Failure {
    let text = format!("what podman has of the container {name}: {why}");
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}

/// Whether podman says yes.
fn has<const N: usize>(question: [&str; N]) -> Result<bool, Failure> {
    podman_has(question).map_err(|error| Failure::new(ErrorCode::NodeUnfit, told(&error)))
}

/// Removes what podman has of a container that was to come, and never ran. Nobody of it may be
/// left, and no root file system bound.
pub fn sweep(directory: &Path) {
    let Ok(id) = fs::read_to_string(directory.join(NOTE)) else {
        return;
    };
    if RUNTIME.state(&id).exists() {
        return;
    }
    if let Err(error) = podman_at_once(["rm", "--ignore", &id]) {
        tracing::warn!(container = id, %error, "podman lists a container that has not come");
    }
}

/// One that has come runs: from here on nobody has podman remove it, and what it has written, by
/// what is noted here.
pub fn runs(directory: &Path) {
    let renamed = fs::rename(directory.join(NOTE), directory.join(RAN));
    if let Err(error) = renamed.or_else(none) {
        tracing::error!(%error, "{} says that a container has not run, which has",
            directory.join(NOTE).display());
    }
}

/// Says that podman has one that may have run, and has ended.
pub fn leave(directory: &Path) {
    let id = [NOTE, RAN].map(|name| fs::read_to_string(directory.join(name)));
    if let Some(id) = id.into_iter().find_map(Result::ok) {
        tracing::warn!(
            container = id,
            "podman keeps a container that may have run here, with what \
            it has written: remove it when it is certain that nobody needs it"
        );
    }
}

fn none(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_where_podman_has_that_of_this_container() {
        let is_kept = |bundle: &str| is_kept_in("/store", "0123", Path::new(bundle));
        assert!(is_kept("/store/overlay-containers/0123/userdata"));
        for other in [
            "/store",
            "/store/overlay-containers/4567/userdata",
            "/store/overlay/0123/userdata",
            "/store/overlay-containers/0123/userdata/more",
            "/store/overlay-containers/0123/../4567/userdata",
            "/other/overlay-containers/0123/userdata",
        ] {
            assert!(!is_kept(other), "{other}");
        }
        let nowhere = Path::new("/overlay-containers/0123/userdata");
        assert!(!is_kept_in("", "0123", nowhere));
    }

    #[test]
    fn a_runtime_that_does_not_restore_is_refused_by_its_version() {
        let said = |version: &str, has: &str| {
            restores(&format!(
                "crun version {version}\ncommit: 0\n+SYSTEMD {has} +YAJL\n"
            ))
        };
        said("1.28", "+CRIU").unwrap();
        assert!(said("1.28", "").unwrap_err().contains("without CRIU"));
        assert!(said("0.17", "+CRIU").unwrap_err().contains("0.17"));
        assert!(restores("").is_err());
    }

    #[test]
    fn one_that_runs_is_not_removed_by_what_was_noted_before() {
        let folder = tempfile::tempdir().unwrap();
        runs(folder.path());
        fs::write(folder.path().join(NOTE), "0123").unwrap();
        runs(folder.path());
        runs(folder.path());
        assert!(!folder.path().join(NOTE).exists());
        let kept = fs::read_to_string(folder.path().join(RAN)).unwrap();
        assert_eq!(kept, "0123");
        leave(folder.path());
        assert!(folder.path().join(RAN).exists());
    }
}
