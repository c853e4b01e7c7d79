//! A container of containerd at its target: its names are free, its image is here, and containerd
//! makes it, as `pageferry-containerd` asks.

use std::env;
use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_containerd::{Arrival, Container, Fate, LOG, SOCKET};
use pageferry_oci::{INSTALLED, Orders};
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::{ContainerDescription, ContainerdDescription};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};

use super::{ask, check, kept_in, mounted, owed, refuse_others};
use crate::runtime::oci::arrive::{Leaves, Restore, check_node, check_spec, prepare};
use crate::runtime::oci::binds::Binds;
use crate::runtime::oci::habits::Runtime;
use crate::runtime::oci::spec::Spec;
use crate::runtime::oci::version;
use crate::runtime::oci::volumes::Named;
use crate::runtime::rootfs::RootPlace;

/// What stands for the runtime here: it asks containerd, and ends when the container runs.
const PROGRAM: &str = "pageferry-containerd";

/// How long it may take to settle an arrival.
const SETTLE_MAX: Duration = Duration::from_secs(30);

/// A container that comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    namespace: String,
    id: ContainerId,
    described: ContainerDescription,
    containerd: ContainerdDescription,
    container: Container,
}

impl Arriving {
    /// Takes in hand what is offered.
    pub fn begin(
        (namespace, id): (&ContainerId, &ContainerId),
        description: &WorkloadDescription,
    ) -> Result<Self, Failure> {
        let refused = |text: String| Failure::new(ErrorCode::UnsupportedWorkload, text);
        let namespace = namespace.to_string();
        refuse_others(&namespace)?;
        let described = description.container.clone();
        let containerd = described.as_ref().and_then(|has| has.containerd.clone());
        let (Some(described), Some(containerd)) = (described, containerd) else {
            return Err(refused(format!(
                "the offer does not say what the container {id} is to containerd"
            )));
        };
        let (record, spec_type) = (&containerd.record, &containerd.spec_type);
        let container = Container::join(record, spec_type, described.config.clone())
            .map_err(|error| refused(format!("the record of {id} cannot be read: {error}")))?;
        if container.id() != id.to_string() {
            return Err(refused(format!("the record of {id} is that of another")));
        }
        check(&container, id)?;
        Ok(Self {
            namespace,
            id: id.clone(),
            described,
            containerd,
            container,
        })
    }

    /// Compares what it needs with this node. Blocks, for as long as containerd takes to answer.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        check_node(description, Namespaces::NONE)?;
        version::check(Runtime::Runc, &self.described.runtime_version)?;
        check_spec(&self.described, None, &Named::of(description))?;
        check_programs()?;
        settle_left();
        self.check_names()
    }

    /// Nothing here has its names, and its image is here.
    fn check_names(&self) -> Result<(), Failure> {
        let id = self.id.to_string();
        let state = kept_in(&self.namespace).join(&id);
        let taken = |what: String| {
            let text = format!(
                "the target has {what} already: remove it there first, or have the container moved \
                 under another name"
            );
            Err(Failure::new(ErrorCode::NameTaken, text))
        };
        if state.exists() {
            return taken(format!(
                "what is left of a container {id} ({})",
                state.display()
            ));
        }
        if Orders::of_node().has(&self.namespace, &id) {
            return taken(format!("a container {id} that is coming from elsewhere"));
        }
        let (snapshotter, key) = self.container.snapshot();
        let parent = &self.containerd.snapshot_parent;
        let (container, snapshot, digest, layers) = ask(&self.namespace, async |client| {
            Ok((
                client.container(&id).await?,
                client.snapshot((snapshotter, key)).await?,
                client.image(self.container.image()).await?,
                client.snapshot((snapshotter, parent)).await?,
            ))
        })
        .map_err(|failure| {
            let text = format!("at the target: {}", failure.text());
            Failure::new(failure.code(), text)
        })?;
        if container.is_some() {
            return taken(format!(
                "a container {id} in containerd's namespace {}",
                self.namespace
            ));
        }
        if snapshot.is_some() {
            return taken(format!("a snapshot {key} of {snapshotter}"));
        }
        self.check_image(digest, layers.is_some())
    }

    fn check_image(&self, digest: Option<String>, has_layers: bool) -> Result<(), Failure> {
        let (image, wanted) = (self.container.image(), &self.containerd.image_digest);
        let missing = |why: String| {
            let text = format!("the target's containerd {why}: bring the image there first");
            Err(Failure::new(ErrorCode::FileDiffers, text))
        };
        match digest {
            None => missing(format!("has no image {image} ({wanted})")),
            Some(digest) if digest != *wanted => missing(format!(
                "has another image {image}: {digest}, and not {wanted}"
            )),
            Some(_) if !has_layers => missing(format!(
                "has the image {image} and has not unpacked it for {}",
                self.container.snapshot().0
            )),
            Some(_) => Ok(()),
        }
    }

    /// Where what it has written comes to, if it writes.
    pub fn root_place(&self) -> Result<Option<RootPlace>, Failure> {
        let spec = Spec::parse(&self.described.config)?;
        Ok(spec.is_writable().then_some(RootPlace::Overlay))
    }

    /// Where its shim has mounted its root file system.
    pub fn overlay(&self) -> PathBuf {
        mounted(&self.namespace, self.id.as_str())
    }

    /// How containerd is asked for it. Makes what that needs in `directory`, which is the
    /// migration's.
    pub fn restore(&self, directory: &Path) -> io::Result<Restore> {
        let state = kept_in(&self.namespace).join(self.id.to_string());
        let spec = Spec::parse(&self.described.config).map_err(io::Error::other)?;
        let leaves = Leaves {
            folder: state.clone(),
            bound_in: state.clone(),
            state: state.join("state.json"),
            paths: Vec::new(),
            volumes: Binds::look(&spec, Path::new(&self.described.bundle))?,
        };
        let images = prepare(directory, &leaves)?;
        let migration = directory.file_name().unwrap_or_default();
        let arrival = Arrival {
            socket: SOCKET.into(),
            namespace: self.namespace.clone(),
            migration: migration.to_string_lossy().into_owned(),
            wrapper: INSTALLED.into(),
            container: self.container.encode(),
            parent: self.containerd.snapshot_parent.clone(),
            gate: directory.join("gate"),
            images,
            work: directory.to_owned(),
            state,
        };
        arrival.write(directory)?;
        Ok(asked(directory, leaves))
    }
}

/// Fails unless this node has what asks containerd, and what that starts as a runtime.
pub fn check_programs() -> Result<(), Failure> {
    for (program, how) in [
        (&*beside(PROGRAM), "install it with the daemon"),
        (
            Path::new(INSTALLED),
            "run `pageferry setup containerd` there",
        ),
    ] {
        if !program.is_file() {
            let text = format!("the target has no {}: {how}", program.display());
            return Err(Failure::new(ErrorCode::NodeUnfit, text));
        }
    }
    Ok(())
}

/// How containerd is asked for what an arrival in `directory`, the migration's, says.
pub fn asked(directory: &Path, leaves: Leaves) -> Restore {
    Restore {
        program: beside(PROGRAM),
        is_engine: false,
        arguments: vec![directory.to_string_lossy().into_owned()],
        log: directory.join(LOG),
        leaves,
        // runc puts there what is to become CRIU.
        cgroup_procs: Vec::new(),
        cgroup: None,
        undo: Vec::new(),
        then: Vec::new(),
    }
}

/// What has come is about to run: containerd still makes it, and whoever has it do so does not
/// remove it from here on.
pub fn about_to_run(directory: &Path) -> Result<(), Failure> {
    Arrival::mark(directory, Fate::MayHaveRun).map_err(|error| {
        let text = format!(
            "{} cannot say that a container is about to run: {error}",
            directory.display()
        );
        Failure::new(ErrorCode::Internal, text)
    })
}

/// It has not run, and never will: nothing of it is worth to be kept.
pub fn never_ran(directory: &Path) {
    if let Err(error) = Arrival::never_ran(directory) {
        tracing::error!(%error, "{} says that a container may have run, which has not, and stays",
            directory.display());
    }
}

/// What has come runs: from here on nobody removes it.
pub fn runs(directory: &Path) {
    mark(directory, Fate::Ran);
}

/// Brings to an end what has come, may have run, and does not run: it stays, with what it has
/// written, and is not started.
pub fn leave(directory: &Path) {
    mark(directory, Fate::MayHaveRun);
    settle(directory);
}

fn mark(directory: &Path, fate: Fate) {
    if let Err(error) = Arrival::mark(directory, fate) {
        tracing::error!(%error, "{} says that a container has not run, which has, or may have",
            directory.display());
    }
}

/// Brings to an end what has come into a migration's folder and not to one: a container that runs
/// is containerd's, and of one that does not nothing is left. What containerd does not do now is
/// tried again by [`settle_left`].
pub fn settle(directory: &Path) {
    let settled = Arrival::hold(directory).and_then(|held| match held {
        None => Ok(()),
        Some(held) => pageferry_containerd::block_on(SETTLE_MAX, async || held.settle().await),
    });
    let Err(error) = settled else { return };
    let name = directory.file_name().unwrap_or_default();
    let kept = left().join(name);
    if directory == kept {
        tracing::debug!(folder = %directory.display(), error = chain(&error), "not yet");
        return;
    }
    tracing::warn!(folder = %directory.display(), error = chain(&error),
        "containerd is asked later about a container that came, or did not");
    if let Err(error) = Arrival::keep(directory, &kept) {
        tracing::error!(%error, "what came cannot be kept in {}", kept.display());
    }
}

/// Tries again what [`settle`] has left, and what containerd was not told of those that have left.
pub fn settle_left() {
    owed::settle_left();
    for entry in fs::read_dir(left()).into_iter().flatten().flatten() {
        settle(&entry.path());
        // Unless it is still needed.
        drop(fs::remove_dir(entry.path()));
    }
}

/// Where what containerd has yet to hear of outlives its migration.
fn left() -> PathBuf {
    Orders::of_node().folder().join("left")
}

/// An error and its sources.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// A program of ours, which is where this one is.
fn beside(program: &str) -> PathBuf {
    let own = env::current_exe().ok();
    let folder = own.as_deref().and_then(Path::parent);
    folder.unwrap_or(Path::new("/usr/bin")).join(program)
}
