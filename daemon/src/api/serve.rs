//! The server: requests parsed at the edge, handed to the registry, answered with statuses.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use pageferry_api as schema;
use pageferry_api::control_server::{Control, ControlServer};
use pageferry_proto::id::{IdError, MigrationId, NodeName, WorkloadName};
use pageferry_proto::migration::policy::{Policy, ROUNDS_LIMIT};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::convert::{named_side, refusal, refused, status};
use crate::migration::progress::Progress;
use crate::migration::registry::{MigrateRequest, Registry};
use crate::migration::source::site::Asked;

/// How long calls under way may take when the daemon stops; watches are cut.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest request, in bytes: a few thousand paths.
const REQUEST_BYTES_MAX: usize = 1 << 20; // 1 MiB

/// Why the API is not there.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Another daemon answers on the socket.
    #[error("another daemon listens on {path}")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("{action} {path}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The calls of the API, answered by the registry of this node.
#[derive(Debug)]
pub struct LocalControl {
    node: NodeName,
    registry: Registry,
    /// What a request leaves open.
    defaults: Policy,
}

/// A running server.
#[derive(Debug)]
pub struct Served {
    path: PathBuf,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Opens the socket at `path` and serves `control` on it. Must be called inside a tokio runtime.
pub fn serve(path: &Path, control: LocalControl) -> Result<Served, ServeError> {
    let failed = |action| {
        let path = path.to_owned();
        move |source| ServeError::Socket {
            action,
            path,
            source,
        }
    };
    // A socket nobody listens on is what a killed daemon leaves.
    match UnixStream::connect(path) {
        Ok(_) => {
            return Err(ServeError::InUse {
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("removing the stale socket"))?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("binding"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("protecting"))?;
    let (stop, stopped) = oneshot::channel();
    let service = ControlServer::new(control).max_decoding_message_size(REQUEST_BYTES_MAX);
    let service = tonic::service::interceptor::InterceptedService::new(service, allowed);
    let task = tokio::spawn(async move {
        let served = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                // A dropped sender stops the server too.
                drop(stopped.await);
            });
        if let Err(error) = served.await {
            tracing::error!("the control socket failed: {error}");
        }
    });
    Ok(Served {
        path: path.to_owned(),
        stop,
        task,
    })
}

impl Served {
    /// Stops taking calls and removes the socket.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        drop(tokio::time::timeout(STOP_TIMEOUT, self.task).await);
        drop(fs::remove_file(&self.path));
    }
}

/// Lets only root and the daemon's own user through, whoever the socket's mode may admit.
fn allowed(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred);
    let own = nix::unistd::geteuid().as_raw();
    match peer {
        Some(peer) if peer.uid() == 0 || peer.uid() == own => Ok(request),
        Some(peer) => Err(Status::permission_denied(format!(
            "uid {} may not use this socket: only root and uid {own} may",
            peer.uid()
        ))),
        None => Err(Status::permission_denied("the caller has no credentials")),
    }
}

impl LocalControl {
    /// The API of `node`'s `registry`.
    pub fn new(node: NodeName, registry: Registry, defaults: Policy) -> Self {
        Self {
            node,
            registry,
            defaults,
        }
    }

    fn watcher(&self, id: &str) -> Result<watch::Receiver<Arc<Progress>>, Status> {
        self.registry
            .watch(parse_id(id)?)
            .map_err(|failure| refusal(&failure))
    }
}

#[tonic::async_trait]
impl Control for LocalControl {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<schema::Status, Status>> + Send>>;

    async fn migrate(
        &self,
        request: Request<schema::MigrateRequest>,
    ) -> Result<Response<schema::MigrateReply>, Status> {
        let request = parse_migrate(request.into_inner(), self.defaults)?;
        if request.target == self.node {
            return Err(Status::invalid_argument(format!(
                "node {} is this node, where {} is already: name another one",
                self.node, request.workload
            )));
        }
        // The survey blocks its thread for milliseconds: it gets a task, not the server's.
        let registry = self.registry.clone();
        let migrated = tokio::spawn(async move { registry.migrate(request).await }).await;
        let id = migrated
            .map_err(|error| Status::internal(format!("the survey ended early: {error}")))?
            .map_err(|failure| refusal(&failure))?;
        Ok(Response::new(schema::MigrateReply { id: id.to_string() }))
    }

    async fn list(
        &self,
        request: Request<schema::ListRequest>,
    ) -> Result<Response<schema::ListReply>, Status> {
        let mut known = self.registry.list();
        if request.into_inner().all {
            known.extend(self.registry.list_answers());
        }
        let migrations = known
            .iter()
            .map(|progress| status(&self.node, progress))
            .collect();
        Ok(Response::new(schema::ListReply {
            migrations,
            refusals: self.registry.list_refusals().iter().map(refused).collect(),
            answers_kept: self.registry.answers_kept() as u64,
            node: self.node.to_string(),
        }))
    }

    async fn show(
        &self,
        request: Request<schema::ShowRequest>,
    ) -> Result<Response<schema::Status>, Status> {
        let watcher = self.watcher(&request.into_inner().id)?;
        let progress = Arc::clone(&watcher.borrow());
        Ok(Response::new(status(&self.node, &progress)))
    }

    async fn watch(
        &self,
        request: Request<schema::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let watcher = self.watcher(&request.into_inner().id)?;
        let node = self.node.clone();
        let mut over = false;
        let changes = WatchStream::new(watcher).take_while(move |progress| {
            let wanted = !over;
            over |= progress.status.phase.is_final();
            wanted
        });
        Ok(Response::new(Box::pin(
            changes.map(move |progress| Ok(status(&node, &progress))),
        )))
    }

    async fn proceed(
        &self,
        request: Request<schema::ProceedRequest>,
    ) -> Result<Response<schema::ProceedReply>, Status> {
        let id = parse_id(&request.into_inner().id)?;
        self.registry
            .proceed(id)
            .await
            .map_err(|failure| refusal(&failure))?;
        Ok(Response::new(schema::ProceedReply {}))
    }

    async fn expect(
        &self,
        request: Request<schema::ExpectRequest>,
    ) -> Result<Response<schema::ExpectReply>, Status> {
        let request = request.into_inner();
        let pod = request.pod_uid.parse();
        let pod = pod.map_err(|error: IdError| Status::invalid_argument(error.to_string()))?;
        self.registry
            .expect(parse_id(&request.id)?, pod)
            .await
            .map_err(|failure| refusal(&failure))?;
        Ok(Response::new(schema::ExpectReply {}))
    }

    async fn abort(
        &self,
        request: Request<schema::AbortRequest>,
    ) -> Result<Response<schema::AbortReply>, Status> {
        let id = parse_id(&request.into_inner().id)?;
        self.registry
            .abort(id)
            .await
            .map_err(|failure| refusal(&failure))?;
        Ok(Response::new(schema::AbortReply {}))
    }

    async fn resolve(
        &self,
        request: Request<schema::ResolveRequest>,
    ) -> Result<Response<schema::ResolveReply>, Status> {
        let request = request.into_inner();
        let id = parse_id(&request.id)?;
        let side = named_side(request.fenced)
            .ok_or_else(|| Status::invalid_argument("say which side is fenced"))?;
        self.registry
            .resolve(id, side)
            .await
            .map_err(|failure| refusal(&failure))?;
        Ok(Response::new(schema::ResolveReply {}))
    }

    async fn forget(
        &self,
        request: Request<schema::ForgetRequest>,
    ) -> Result<Response<schema::ForgetReply>, Status> {
        let request = request.into_inner();
        self.registry
            .forget(parse_id(&request.id)?, request.sure)
            .await
            .map_err(|failure| refusal(&failure))?;
        Ok(Response::new(schema::ForgetReply {}))
    }
}

fn parse_id(text: &str) -> Result<MigrationId, Status> {
    text.parse()
        .map_err(|error| Status::invalid_argument(format!("migration {text:?}: {error}")))
}

/// What a text names, or the default if there is none.
fn named<T: FromStr<Err: std::fmt::Display>>(text: Option<&str>, default: T) -> Result<T, Status> {
    let parse = |text: &str| {
        let parsed = text.parse();
        parsed.map_err(|error: T::Err| Status::invalid_argument(error.to_string()))
    };
    text.map_or(Ok(default), parse)
}

/// How it is to move, as far as that is said.
fn parse_policy(request: &schema::MigrateRequest, defaults: Policy) -> Result<Policy, Status> {
    let rounds_max = request.rounds_max.unwrap_or(defaults.rounds_max);
    if rounds_max == 0 || rounds_max > ROUNDS_LIMIT {
        return Err(Status::invalid_argument(format!(
            "rounds-max {rounds_max} is not between 1 and {ROUNDS_LIMIT}"
        )));
    }
    if request.frozen_max_us == Some(0) {
        return Err(Status::invalid_argument("frozen-max must be above zero"));
    }
    let duration = |micros: Option<u64>, default| micros.map_or(default, Duration::from_micros);
    let mode = named(request.mode.as_deref(), defaults.mode)?;
    let on_timeout = named(request.on_timeout.as_deref(), defaults.on_timeout)?;
    Ok(Policy {
        downtime_max: duration(request.downtime_max_us, defaults.downtime_max),
        rounds_max,
        timeout: duration(request.timeout_us, defaults.timeout),
        verify: request.verify,
        force_eager: request.force_eager,
        frozen_max: request
            .frozen_max_us
            .map(Duration::from_micros)
            .or(defaults.frozen_max),
        mode,
        on_timeout,
        downtime_bound: defaults.downtime_bound,
    })
}

fn parse_migrate(
    request: schema::MigrateRequest,
    defaults: Policy,
) -> Result<MigrateRequest, Status> {
    let workload: WorkloadName = request.workload.parse().map_err(|error| {
        Status::invalid_argument(format!("workload {:?}: {error}", request.workload))
    })?;
    let is_pod = matches!(workload, WorkloadName::Pod(_));
    let target = request
        .to
        .parse()
        .map_err(|error| Status::invalid_argument(format!("node {:?}: {error}", request.to)))?;
    let policy = parse_policy(&request, defaults)?;
    let shared: Vec<PathBuf> = request
        .shared_paths
        .into_iter()
        .map(PathBuf::from)
        .collect();
    if let Some(relative) = shared.iter().find(|path| !path.is_absolute()) {
        return Err(Status::invalid_argument(format!(
            "shared path {} is not absolute",
            relative.display()
        )));
    }
    let copied: Vec<PathBuf> = request
        .copied_paths
        .iter()
        .map(|path| path.trim_end_matches('/').into())
        .collect();
    if let Some(relative) = copied.iter().find(|path| !path.is_absolute()) {
        return Err(Status::invalid_argument(format!(
            "path {} of a folder is not absolute, or is the root of all",
            relative.display()
        )));
    }
    let id = request.id.as_deref().map(parse_id).transpose()?;
    let network = request.join_network.map(|name| name.parse()).transpose();
    let network = network.map_err(|error: IdError| Status::invalid_argument(error.to_string()))?;
    Ok(MigrateRequest {
        id,
        workload,
        target,
        policy,
        // What it comes as has yet to be made.
        hold: request.hold || is_pod,
        asked: Asked {
            shared,
            copied,
            force_cpu: request.force_cpu,
            force_ipc: request.force_ipc,
            network,
            instead_of: None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl FnOnce(&mut schema::MigrateRequest)) -> Result<MigrateRequest, Status> {
        let mut request = schema::MigrateRequest {
            workload: "process/7".to_owned(),
            to: "b".to_owned(),
            ..schema::MigrateRequest::default()
        };
        change(&mut request);
        parse_migrate(request, Policy::DEFAULT)
    }

    #[test]
    fn a_request_says_what_the_migration_is_called_and_what_it_joins() {
        let plain = parse(|_| ()).unwrap();
        assert_eq!((plain.id, plain.asked), (None, Asked::default()));
        let id = "0123456789abcdef0123456789abcdef";
        let named = parse(|request| {
            request.id = Some(id.to_owned());
            request.join_network = Some("web".to_owned());
        });
        let named = named.unwrap();
        assert_eq!(named.id, Some(id.parse().unwrap()));
        assert_eq!(named.asked.network, Some("web".parse().unwrap()));
        assert!(!plain.hold && parse(|request| request.hold = true).unwrap().hold);
        let uid = "0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2e";
        let pod = parse(|request| request.workload = format!("pod/{uid}")).unwrap();
        assert!(pod.hold, "a pod is always held");
        let refused = |change: fn(&mut schema::MigrateRequest), word: &str| {
            let status = parse(change).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(word), "{status}");
        };
        refused(|request| request.id = Some("7".to_owned()), "\"7\"");
        refused(
            |request| request.join_network = Some("../a".to_owned()),
            "\"../a\"",
        );
        refused(
            |request| request.workload = "vm/a".to_owned(),
            "\"vm\" is not one of",
        );
    }
}
