//! A container of containerd, named by its namespace and id: containerd keeps what it is, and its
//! shim has runc run it.
//!
//! At the source the runtime is asked as for a container of its own ([`super::oci`]), in the folder
//! where containerd has it keep them: containerd sees the process end as if it were killed, and its
//! entries are deleted after that. At the target containerd makes all anew ([`arrive`]).
//!
//! Invariants: from before the freeze on until the container runs somewhere, containerd's restart
//! monitor does not know it; the source's entry goes when it runs at the target, and not before.
//!
//! Absent, and refused by name: what [`super::oci`] refuses; containers that somebody else has in
//! containerd, who would start them again; images that the target does not have.

pub mod arrive;

use std::path::{Path, PathBuf};
use std::time::Duration;

use criu_glue::options::DumpOptions;
use criu_glue::rpc::{Conversation, SwrkConfig};
use pageferry_cgroup::freezer::{CgroupError, Freezer};
use pageferry_containerd::{Client, ClientError, Container, RUNTIME, SOCKET, labels, leave};
use pageferry_oci::INSTALLED;
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::{ContainerDescription, ContainerdDescription};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::layer;
use super::oci::Container as OfRuntime;
use super::oci::checkpoint::{Checkpoint, CheckpointError};
use super::oci::habits::Runtime;
use super::oci::spec::{Engine, Spec};
use super::process::describe::Described;

/// Where containerd has runc keep the containers of a namespace, by its name.
const ROOT: &str = "/run/containerd/runc";

/// Where its shims have the bundles of a namespace, by its name.
const TASKS: &str = "/run/containerd/io.containerd.runtime.v2.task";

/// Namespaces of those who start their containers again, and what they are.
const OTHERS: [(&str, &str); 2] = [
    ("moby", "Docker, who would start them again"),
    (
        "k8s.io",
        "pods of Kubernetes: move the whole pod, as pod/UID",
    ),
];

/// How long containerd may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long it may take to delete what has moved away.
const REMOVE_MAX: Duration = Duration::from_secs(20);

/// A container at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Containerd {
    namespace: String,
    id: String,
    container: OfRuntime,
}

/// Why nobody asks for the dump.
#[derive(Debug, Error)]
pub enum AskError {
    /// It would be started again when it has moved away.
    #[error("the container would be restarted at the source")]
    Restart(#[from] ClientError),
    /// Its runtime does not.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl Containerd {
    /// The container of this name, if it runs here and can move.
    pub fn find(namespace: &ContainerId, id: &ContainerId) -> Result<Self, Failure> {
        let space = namespace.to_string();
        refuse_others(&space)?;
        let (container, task) = ask(&space, async |client| {
            let id = id.to_string();
            Ok((client.container(&id).await?, client.task(&id).await?))
        })?;
        let gone = |text: String| Failure::new(ErrorCode::WorkloadGone, text);
        let container = container.ok_or_else(|| {
            gone(format!(
                "containerd has no container {id} in its namespace {space}"
            ))
        })?;
        let task = task.filter(|task| !task.is_stopped).ok_or_else(|| {
            gone(format!(
                "the container {id} of containerd has no task that runs"
            ))
        })?;
        check(&container, id)?;
        let runc = OfRuntime::find_in((Runtime::Runc, Some(kept_in(&space))), id)?;
        if !task.is_running || i32::try_from(task.pid) != Ok(runc.root()) {
            return Err(gone(format!(
                "the task of {id} is paused, or containerd and runc do not agree on it"
            )));
        }
        Ok(Self {
            namespace: space,
            id: id.to_string(),
            container: runc,
        })
    }

    /// What its runtime has of it.
    pub const fn container(&self) -> &OfRuntime {
        &self.container
    }

    /// What it is made of; as [`OfRuntime::describe_with`].
    pub fn describe(&self, pids: &[i32], named: &[PathBuf]) -> Result<Described, Failure> {
        // What is not bound is the image's, which has the same digest; and it is nowhere yet.
        let engine = Engine {
            has_image: true,
            ..Engine::default()
        };
        let layer = |spec: &Spec| layer::find(&spec.root(self.container.bundle()), None);
        let described = self
            .container
            .describe_with((pids, named), Some(&engine), layer);
        let mut described = described?;
        if let Some(container) = &mut described.description.container {
            self.add(container)?;
        }
        Ok(described)
    }

    fn add(&self, described: &mut ContainerDescription) -> Result<(), Failure> {
        let id = &self.id;
        let unfit = |text: String| Failure::new(ErrorCode::UnsupportedWorkload, text);
        let (container, digest, snapshot) = ask(&self.namespace, async |client| {
            let Some(container) = client.container(id).await? else {
                return Ok((None, None, None));
            };
            let digest = client.image(container.image()).await?;
            let snapshot = client.snapshot(container.snapshot()).await?;
            Ok((Some(container), digest, snapshot))
        })?;
        let container = container
            .ok_or_else(|| unfit(format!("the container {id} was deleted from containerd")))?;
        let image_digest = digest.ok_or_else(|| {
            unfit(format!(
                "the image {:?} of the container {id} is not in containerd any more, so that the \
                 target cannot look for the same",
                container.image()
            ))
        })?;
        let snapshot = snapshot.filter(|snapshot| !snapshot.parent.is_empty());
        let snapshot = snapshot.ok_or_else(|| {
            unfit(format!(
                "the root file system of {id} is not a snapshot of an image"
            ))
        })?;
        let (record, spec_type, spec) = container.divide();
        if spec != described.config {
            return Err(unfit(format!(
                "the specification of {id} has changed in containerd since it was started"
            )));
        }
        described.containerd = Some(ContainerdDescription {
            record,
            spec_type,
            image_digest,
            snapshot_parent: snapshot.parent,
        });
        Ok(())
    }

    /// Has its runtime ask for a dump; as [`Checkpoint::start`]. containerd does not start it again
    /// from here on.
    pub async fn ask(
        &self,
        how: (SwrkConfig, DumpOptions),
        stand_in: &Path,
        directory: &Path,
    ) -> Result<(Conversation, Checkpoint), AskError> {
        let client = Client::connect(SOCKET.as_ref(), &self.namespace).await?;
        labels::put_aside(&client, &self.id).await?;
        Ok(Checkpoint::start(&self.container, how, stand_in, directory).await?)
    }

    /// It stays here, and runs.
    pub fn give_back(&self) {
        let back = self.call(ANSWER_MAX, async |client| {
            labels::put_back(&client, &self.id).await
        });
        if let Err(error) = back {
            tracing::error!(container = self.id, namespace = self.namespace, %error,
                "containerd does not restart it as before");
        }
    }

    /// It runs elsewhere, and its tasks here are dead: containerd forgets it.
    pub fn release(&self, freezer: &Freezer) -> Result<(), CgroupError> {
        // Its shim has the runtime delete what a checkpoint that died has left.
        self.container.is_deleted();
        let removed = self.call(REMOVE_MAX, async |client| {
            leave::remove(&client, &self.id).await
        });
        if let Err(error) = removed {
            tracing::error!(container = self.id, namespace = self.namespace, %error,
                "containerd still lists a container that has moved away");
        }
        // Nobody is in it, or this says so.
        freezer.remove()
    }

    fn call<T: Send>(
        &self,
        limit: Duration,
        work: impl AsyncFnOnce(Client) -> Result<T, ClientError> + Send,
    ) -> Result<T, ClientError> {
        pageferry_containerd::with((SOCKET.as_ref(), &self.namespace), limit, work)
    }
}

/// Where the shim of a container has its root file system mounted.
fn mounted(namespace: &str, id: &str) -> PathBuf {
    Path::new(TASKS).join(namespace).join(id).join("rootfs")
}

/// The folder in which containerd has runc keep the containers of a namespace.
fn kept_in(namespace: &str) -> PathBuf {
    Path::new(ROOT).join(namespace)
}

fn ask<T: Send>(
    namespace: &str,
    work: impl AsyncFnOnce(Client) -> Result<T, ClientError> + Send,
) -> Result<T, Failure> {
    let asked = pageferry_containerd::with((SOCKET.as_ref(), namespace), ANSWER_MAX, work);
    asked.map_err(|error| Failure::new(ErrorCode::RuntimeFailed, error.to_string()))
}

/// Refuses containers of which somebody else decides whether they run.
fn refuse_others(namespace: &str) -> Result<(), Failure> {
    match OTHERS.iter().find(|(name, _)| *name == namespace) {
        Some((name, whose)) => Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            format!(
                "containers in containerd's namespace {name} are not moved by themselves, being \
                 those of {whose}"
            ),
        )),
        None => Ok(()),
    }
}

/// Refuses what is not moved yet, by its name.
fn check(container: &Container, id: &ContainerId) -> Result<(), Failure> {
    let refused = |text: String| {
        let text = format!("the container {id} of containerd {text}");
        Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
    };
    if container.runtime() != RUNTIME {
        return refused(format!(
            "has the runtime {}, and only those of {RUNTIME} are moved",
            container.runtime()
        ));
    }
    let program = container.program();
    let is_runc = program.is_empty() || Path::new(&program).ends_with("runc");
    if !is_runc && program != INSTALLED {
        return refused(format!("is run by {program}, and not by runc"));
    }
    if !container.root().is_empty() {
        return refused(format!(
            "is kept by its runtime in {}, which is not looked at yet",
            container.root()
        ));
    }
    if !container.sandbox().is_empty() {
        return refused("is one of a sandbox, which is not moved yet".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_of_others_are_refused_by_their_names() {
        let web: ContainerId = "web".parse().unwrap();
        for (namespace, whose) in [("moby", "Docker"), ("k8s.io", "pod/UID")] {
            let refused = Containerd::find(&namespace.parse().unwrap(), &web).unwrap_err();
            assert_eq!(refused.code(), ErrorCode::UnsupportedWorkload);
            assert!(refused.text().contains(whose), "{refused}");
        }
        refuse_others("default").unwrap();
    }
}
