//! The local daemon: gRPC over its unix socket.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use pageferry_api as schema;
use pageferry_api::control_client::ControlClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Streaming};
use tower::service_fn;

use crate::plan::Why;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The daemon has said no; it would say no again.
    #[error("{}: {}", .0.reason, .0.message)]
    Refused(Why),
    /// It has no such migration.
    #[error("the daemon has no such migration")]
    Unknown,
    /// It may do it later, or does not answer.
    #[error("{0}")]
    Later(String),
}

/// A daemon, which need not be there.
#[derive(Clone, Debug)]
pub struct Daemon {
    channel: Channel,
    socket: PathBuf,
}

impl Daemon {
    /// Connects when it is first called, and again when it has been away. To be called in a
    /// runtime.
    pub fn new(socket: &Path) -> Self {
        let path = socket.to_owned();
        // The name is never looked up: every connection is to the socket.
        let endpoint = Endpoint::from_static("http://pageferryd.local");
        let channel = endpoint.connect_with_connector_lazy(service_fn(move |_| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }));
        Self {
            channel,
            socket: socket.to_owned(),
        }
    }

    fn client(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
    }

    fn error(&self, status: &tonic::Status) -> Error {
        // The daemon's own refusals carry no source; what the transport makes up does.
        let of_transport = status.source().is_some();
        match status.code() {
            Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => {}
            _ if of_transport => {}
            Code::NotFound if status.message().starts_with("migration-unknown") => {
                return Error::Unknown;
            }
            Code::ResourceExhausted => return Error::Later(status.message().to_owned()),
            _ => return Error::Refused(refusal(status.message())),
        }
        Error::Later(format!("pageferryd at {}: {status}", self.socket.display()))
    }

    async fn call<T, F>(&self, call: F) -> Result<T, Error>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        match tokio::time::timeout(CALL_TIME, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.error(&status)),
            Err(_) => Err(Error::Later(format!(
                "pageferryd at {} does not answer for {CALL_TIME:?}",
                self.socket.display()
            ))),
        }
    }

    /// What it is called among daemons; empty if it does not say.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn name(&self) -> Result<String, Error> {
        let request = schema::ListRequest { all: false };
        let listed = {
            let mut client = self.client();
            self.call(client.list(Request::new(request))).await?
        };
        Ok(listed.node)
    }

    /// # Errors
    /// What the daemon said.
    pub async fn migrate(&self, request: schema::MigrateRequest) -> Result<(), Error> {
        self.call(self.client().migrate(Request::new(request)))
            .await
            .map(drop)
    }

    /// None where it has no such migration.
    ///
    /// # Errors
    /// What the daemon said.
    pub async fn show(&self, id: &str) -> Result<Option<schema::Status>, Error> {
        let request = schema::ShowRequest { id: id.to_owned() };
        match self.call(self.client().show(Request::new(request))).await {
            Ok(status) => Ok(Some(status)),
            Err(Error::Unknown) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// What the daemon said.
    pub async fn watch(&self, id: &str) -> Result<Streaming<schema::Status>, Error> {
        let request = schema::WatchRequest { id: id.to_owned() };
        self.call(self.client().watch(Request::new(request))).await
    }

    /// # Errors
    /// What the daemon said.
    pub async fn expect(&self, id: &str, pod_uid: &str) -> Result<(), Error> {
        let request = schema::ExpectRequest {
            id: id.to_owned(),
            pod_uid: pod_uid.to_owned(),
        };
        self.call(self.client().expect(Request::new(request)))
            .await
            .map(drop)
    }

    /// # Errors
    /// What the daemon said.
    pub async fn proceed(&self, id: &str) -> Result<(), Error> {
        let request = schema::ProceedRequest { id: id.to_owned() };
        self.call(self.client().proceed(Request::new(request)))
            .await
            .map(drop)
    }

    /// # Errors
    /// What the daemon said.
    pub async fn abort(&self, id: &str) -> Result<(), Error> {
        let request = schema::AbortRequest { id: id.to_owned() };
        self.call(self.client().abort(Request::new(request)))
            .await
            .map(drop)
    }

    /// # Errors
    /// What the daemon said.
    pub async fn resolve(&self, id: &str, fenced: schema::Side) -> Result<(), Error> {
        let request = schema::ResolveRequest {
            id: id.to_owned(),
            fenced: fenced.into(),
        };
        self.call(self.client().resolve(Request::new(request)))
            .await
            .map(drop)
    }
}

/// A daemon's `code: text`.
fn refusal(message: &str) -> Why {
    match message.split_once(": ") {
        Some((code, text)) if is_name(code) => Why::new(&reason(code), text),
        _ => Why::new("Refused", message),
    }
}

fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
    !text.is_empty() && text.bytes().all(allowed)
}

/// `pid-taken` as Kubernetes writes reasons: `PidTaken`.
pub fn reason(code: &str) -> String {
    let words = code.split('-').map(|word| {
        let mut letters = word.chars();
        let first = letters.next().map(|first| first.to_ascii_uppercase());
        first.into_iter().chain(letters).collect::<String>()
    });
    words.collect()
}

const CALL_TIME: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_a_reason_as_kubernetes_writes_them() {
        let why = refusal("pid-taken: pid 7 is in use");
        assert_eq!(
            (why.reason.as_str(), why.message.as_str()),
            ("PidTaken", "pid 7 is in use")
        );
        assert_eq!(refusal("An id: 32 digits").reason, "Refused");
    }
}
