//! A connection to containerd, in one of its namespaces.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::{DecodeError, Message};
use prost_types::{Any, FieldMask};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};
use tower::service_fn;

use crate::api::containers::containers_client::ContainersClient;
use crate::api::images::images_client::ImagesClient;
use crate::api::namespaces::namespaces_client::NamespacesClient;
use crate::api::snapshots::snapshots_client::SnapshotsClient;
use crate::api::tasks::tasks_client::TasksClient;
use crate::api::{self, Options, containers, images, namespaces, snapshots, tasks};

/// Talks to containerd.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
}

/// Why containerd does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    #[error("cannot reach containerd at {socket}: {why}: is it running?")]
    Unreachable { socket: PathBuf, why: String },
    #[error("{0:?} is no namespace of containerd")]
    Namespace(String),
    #[error("containerd, {what}: {}", status.message())]
    Refused {
        what: String,
        /// Its text is in that of this error.
        status: Box<Status>,
    },
    #[error("containerd does not answer within {limit:?}")]
    Late { limit: Duration },
    #[error("cannot wait for containerd")]
    Runtime(#[source] io::Error),
}

/// What is to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Container(pub(crate) containers::Container);

/// What runs, or has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its root.
    pub pid: u32,
    /// Whether it is there and has not been started.
    pub is_created: bool,
    /// Whether it runs, and is not paused.
    pub is_running: bool,
    /// Whether it has ended.
    pub is_stopped: bool,
}

/// The root file system of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The image that it is of, as a chain of layers.
    pub parent: String,
}

impl ClientError {
    /// The code with which containerd has refused.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Whether there is already what was to be made.
    pub fn is_taken(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }
}

impl Container {
    /// As bytes for another node.
    pub fn encode(&self) -> Vec<u8> {
        self.0.encode_to_vec()
    }

    /// Its record without the specification, the type of that, and itself.
    pub fn divide(mut self) -> (Vec<u8>, String, Vec<u8>) {
        let spec = self.0.spec.take().unwrap_or_default();
        (self.encode(), spec.type_url, spec.value)
    }

    /// What [`Container::divide`] has divided.
    ///
    /// # Errors
    /// When the record is none.
    pub fn join(record: &[u8], spec_type: &str, spec: Vec<u8>) -> Result<Self, DecodeError> {
        let mut container = Self::decode(record)?;
        container.0.spec = Some(Any {
            type_url: spec_type.to_owned(),
            value: spec,
        });
        Ok(container)
    }

    /// What [`Container::encode`] has written.
    ///
    /// # Errors
    /// When it is none.
    pub fn decode(record: &[u8]) -> Result<Self, DecodeError> {
        containers::Container::decode(record).map(Self)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// The name of its image; empty if it has none.
    pub fn image(&self) -> &str {
        &self.0.image
    }

    /// Its labels.
    pub fn labels(&self) -> &HashMap<String, String> {
        &self.0.labels
    }

    /// The snapshotter and the key of its snapshot.
    pub fn snapshot(&self) -> (&str, &str) {
        (&self.0.snapshotter, &self.0.snapshot_key)
    }

    /// The sandbox that it is in; empty if it is in none.
    pub fn sandbox(&self) -> &str {
        &self.0.sandbox
    }

    /// The runtime specification: `config.json` of its bundle.
    pub fn spec(&self) -> &[u8] {
        self.0.spec.as_ref().map_or(&[], |spec| &spec.value)
    }

    /// The name of its shim.
    pub fn runtime(&self) -> &str {
        self.0.runtime.as_ref().map_or("", |runtime| &runtime.name)
    }

    /// The program that its shim starts; empty for the usual one.
    pub fn program(&self) -> String {
        self.options().binary_name
    }

    /// Where its runtime keeps it, but for the namespace; empty for the usual place.
    pub fn root(&self) -> String {
        self.options().root
    }

    fn options(&self) -> Options {
        let options = self.0.runtime.as_ref().and_then(|runtime| {
            let options = runtime.options.as_ref()?;
            Options::decode(&*options.value).ok()
        });
        options.unwrap_or_default()
    }

    /// The same, whose shim starts `program`.
    #[must_use]
    pub fn with_program(mut self, program: &Path) -> Self {
        let options = Options {
            binary_name: program.to_string_lossy().into_owned(),
            ..self.options()
        };
        let runtime = self.0.runtime.get_or_insert_default();
        runtime.options = Some(Any {
            type_url: OPTIONS_TYPE.to_owned(),
            value: options.encode_to_vec(),
        });
        self
    }
}

/// What containerd calls the options of a shim for runc.
const OPTIONS_TYPE: &str = "containerd.runc.v1.Options";

impl Client {
    /// Connects to the containerd at `socket`.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`], [`ClientError::Namespace`].
    pub async fn connect(socket: &Path, namespace: &str) -> Result<Self, ClientError> {
        let named = namespace.parse();
        let named = named.map_err(|_| ClientError::Namespace(namespace.to_owned()))?;
        let unreachable = |why: String| ClientError::Unreachable {
            socket: socket.to_owned(),
            why,
        };
        // Its own error would be hidden behind others.
        let probe = UnixStream::connect(socket).await;
        drop(probe.map_err(|error| unreachable(error.to_string()))?);
        let path = socket.to_owned();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is nobody's: the connector knows the way.
        let endpoint = Endpoint::from_static("http://containerd");
        let channel = endpoint.connect_with_connector(connector).await;
        Ok(Self {
            channel: channel.map_err(|error| unreachable(error.to_string()))?,
            namespace: named,
        })
    }

    /// The same connection, in another namespace.
    ///
    /// # Errors
    /// [`ClientError::Namespace`].
    pub fn within(&self, namespace: &str) -> Result<Self, ClientError> {
        let named = namespace.parse();
        Ok(Self {
            channel: self.channel.clone(),
            namespace: named.map_err(|_| ClientError::Namespace(namespace.to_owned()))?,
        })
    }

    /// The names of all namespaces.
    ///
    /// # Errors
    /// [`ClientError::Refused`], as of all calls.
    pub async fn namespaces(&self) -> Result<Vec<String>, ClientError> {
        let mut client = NamespacesClient::new(self.channel.clone());
        let request = self.request(namespaces::ListNamespacesRequest::default());
        let listed = client.list(request).await;
        let listed = done(listed, || "asked for its namespaces".to_owned())?;
        let names = listed.namespaces.into_iter();
        Ok(names.map(|namespace| namespace.name).collect())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = self.namespace.clone();
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        request
    }

    /// The container of this id, if there is one.
    ///
    /// # Errors
    /// [`ClientError::Refused`], as of all calls.
    pub async fn container(&self, id: &str) -> Result<Option<Container>, ClientError> {
        let mut client = ContainersClient::new(self.channel.clone());
        let request = containers::GetContainerRequest { id: id.to_owned() };
        let got = client.get(self.request(request)).await;
        let got = found(got, || format!("asked for the container {id}"))?;
        Ok(got.and_then(|got| got.container).map(Container))
    }

    /// All containers of the namespace.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn containers(&self) -> Result<Vec<Container>, ClientError> {
        let mut client = ContainersClient::new(self.channel.clone());
        let request = self.request(containers::ListContainersRequest::default());
        let listed = client.list(request).await;
        let listed = done(listed, || "asked for its containers".to_owned())?;
        Ok(listed.containers.into_iter().map(Container).collect())
    }

    /// Makes a container.
    ///
    /// # Errors
    /// [`ClientError::is_taken`] if there is one of this id.
    pub async fn create(&self, container: &Container) -> Result<(), ClientError> {
        let mut client = ContainersClient::new(self.channel.clone());
        let id = container.id();
        let container = Some(containers::Container {
            created_at: None,
            updated_at: None,
            ..container.0.clone()
        });
        let request = self.request(containers::CreateContainerRequest { container });
        let created = client.create(request).await;
        done(created, || format!("asked to create the container {id}")).map(drop)
    }

    /// Sets some labels of a container; an empty one goes away. Others are not touched.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn set_labels(
        &self,
        id: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let mut client = ContainersClient::new(self.channel.clone());
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = containers::UpdateContainerRequest {
            container: Some(containers::Container {
                id: id.to_owned(),
                labels,
                ..Default::default()
            }),
            update_mask: Some(FieldMask { paths }),
        };
        let updated = client.update(self.request(request)).await;
        done(updated, || {
            format!("asked to change labels of the container {id}")
        })
        .map(drop)
    }

    /// Deletes a container, which may be gone.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn delete(&self, id: &str) -> Result<(), ClientError> {
        let mut client = ContainersClient::new(self.channel.clone());
        let request = containers::DeleteContainerRequest { id: id.to_owned() };
        let deleted = client.delete(self.request(request)).await;
        found(deleted, || format!("asked to delete the container {id}")).map(drop)
    }

    /// The task of a container, if it has one.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn task(&self, id: &str) -> Result<Option<Task>, ClientError> {
        let mut client = TasksClient::new(self.channel.clone());
        let request = tasks::GetRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        let got = client.get(self.request(request)).await;
        let got = found(got, || format!("asked for the task of {id}"))?;
        let process = got.and_then(|got| got.process);
        Ok(process.map(|process| Task {
            pid: process.pid,
            is_created: process.status() == api::Status::Created,
            is_running: process.status() == api::Status::Running,
            is_stopped: process.status() == api::Status::Stopped,
        }))
    }

    /// Makes the task of a container, on a root file system of `snapshot`: its shim starts the
    /// runtime. Takes as long as that does.
    ///
    /// # Errors
    /// As of all calls; containerd has undone what it has begun then.
    pub async fn create_task(
        &self,
        container: &Container,
        mounts: Mounts,
    ) -> Result<u32, ClientError> {
        let mut client = TasksClient::new(self.channel.clone());
        let id = container.id();
        let request = tasks::CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: mounts.0,
            ..Default::default()
        };
        let created = client.create(self.request(request)).await;
        done(created, || format!("asked to create the task of {id}")).map(|created| created.pid)
    }

    /// Has the task of a container run.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn start_task(&self, id: &str) -> Result<(), ClientError> {
        let mut client = TasksClient::new(self.channel.clone());
        let request = tasks::StartRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        let started = client.start(self.request(request)).await;
        done(started, || format!("asked to start the task of {id}")).map(drop)
    }

    /// Deletes the task of a container, if it has one, when it has stopped, which must be within
    /// `limit`.
    ///
    /// # Errors
    /// As of all calls; also of a task that has not stopped.
    pub async fn delete_task(&self, id: &str, limit: Duration) -> Result<(), ClientError> {
        let mut client = TasksClient::new(self.channel.clone());
        let deadline = Instant::now() + limit;
        loop {
            let request = tasks::DeleteTaskRequest {
                container_id: id.to_owned(),
            };
            let deleted = client.delete(self.request(request)).await;
            let deleted = found(deleted, || format!("asked to delete the task of {id}"));
            match deleted {
                // Its shim has not heard yet that its process has ended.
                Err(error) if is_running_yet(&error) && Instant::now() < deadline => {
                    sleep(STOP_POLL).await;
                }
                deleted => return deleted.map(drop),
            }
        }
    }

    /// The digest of the image of this name, if there is one.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn image(&self, name: &str) -> Result<Option<String>, ClientError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = images::GetImageRequest {
            name: name.to_owned(),
        };
        let got = client.get(self.request(request)).await;
        let got = found(got, || format!("asked for the image {name}"))?;
        let target = got.and_then(|got| got.image?.target);
        Ok(target.map(|target| target.digest))
    }

    /// The snapshot of this key, if there is one.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn snapshot(
        &self,
        (snapshotter, key): (&str, &str),
    ) -> Result<Option<Snapshot>, ClientError> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = snapshots::StatSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        let got = client.stat(self.request(request)).await;
        let got = found(got, || format!("asked for the snapshot {key}"))?;
        let info = got.and_then(|got| got.info);
        Ok(info.map(|info| Snapshot {
            parent: info.parent,
        }))
    }

    /// Makes a snapshot on top of `parent`.
    ///
    /// # Errors
    /// [`ClientError::is_taken`] if there is one of this key.
    pub async fn prepare(
        &self,
        (snapshotter, key): (&str, &str),
        parent: &str,
    ) -> Result<Mounts, ClientError> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = snapshots::PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: HashMap::new(),
        };
        let prepared = client.prepare(self.request(request)).await;
        let prepared = done(prepared, || {
            format!("asked for a snapshot {key} on {parent}")
        });
        prepared.map(|prepared| Mounts(prepared.mounts))
    }

    /// Removes a snapshot, which may be gone.
    ///
    /// # Errors
    /// As of all calls.
    pub async fn remove_snapshot(
        &self,
        (snapshotter, key): (&str, &str),
    ) -> Result<(), ClientError> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = snapshots::RemoveSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        let removed = client.remove(self.request(request)).await;
        found(removed, || format!("asked to remove the snapshot {key}")).map(drop)
    }
}

/// How a snapshot is mounted.
#[derive(Clone, Debug)]
pub struct Mounts(Vec<api::Mount>);

fn done<T>(
    answer: Result<Response<T>, Status>,
    what: impl Fn() -> String,
) -> Result<T, ClientError> {
    answer.map(Response::into_inner).map_err(|status| {
        let (what, status) = (what(), Box::new(status));
        ClientError::Refused { what, status }
    })
}

fn found<T>(
    answer: Result<Response<T>, Status>,
    what: impl Fn() -> String,
) -> Result<Option<T>, ClientError> {
    match answer {
        Err(status) if status.code() == Code::NotFound => Ok(None),
        answer => done(answer, what).map(Some),
    }
}

/// Whether a task is not deleted because containerd has not heard yet that its process has ended:
/// containerd looks, or its shim does, whose runtime may find the process where the kernel is
/// about to end it. The shim's answer has no code of its own.
fn is_running_yet(error: &ClientError) -> bool {
    let ClientError::Refused { status, .. } = error else {
        return false;
    };
    status.code() == Code::FailedPrecondition
        || status.message().contains("cannot delete a running process")
}

/// How often it is looked whether a task has stopped.
const STOP_POLL: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_whose_end_is_not_heard_yet_is_asked_for_again() {
        let refused = |code, text: &str| ClientError::Refused {
            what: "asked to delete the task of web".to_owned(),
            status: Box::new(Status::new(code, text)),
        };
        let shim = "failed to delete task: cannot delete a running process";
        assert!(is_running_yet(&refused(Code::Unknown, shim)));
        let own = "task must be stopped before deletion: running";
        assert!(is_running_yet(&refused(Code::FailedPrecondition, own)));
        assert!(!is_running_yet(&refused(Code::Unknown, "shim is gone")));
        assert!(!is_running_yet(&ClientError::Late { limit: STOP_POLL }));
    }
}
