//! The way to the daemon: gRPC over its unix socket.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use pageferry_api::control_client::ControlClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::service_fn;

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no daemon at the socket.
    #[error(
        "cannot reach pageferryd at {}: {why}: is it running, and are you root?",
        socket.display()
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// The last of what the transport said, all of which says the same.
        why: String,
    },
    /// It went away in the middle.
    #[error("pageferryd went away: the migration goes on or ends when it is started again")]
    Lost(#[source] Box<Status>),
    /// Whoever waited does so no longer.
    #[error("not waiting for the end: see `pageferry watch {id}`")]
    Interrupted {
        /// The migration.
        id: String,
    },
    /// The daemon said no.
    #[error("{code}: {text}")]
    Refused {
        /// A kebab-case name.
        code: String,
        /// What and why.
        text: String,
    },
}

impl CallError {
    /// A kebab-case name for programs.
    pub fn code(&self) -> &str {
        match self {
            Self::Unreachable { .. } => "daemon-unreachable",
            Self::Lost(_) => "daemon-lost",
            Self::Interrupted { .. } => "interrupted",
            Self::Refused { code, .. } => code,
        }
    }

    /// What and why, without the name.
    pub fn text(&self) -> String {
        match self {
            Self::Refused { text, .. } => text.clone(),
            _ => self.to_string(),
        }
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        // The daemon's own refusals carry no source; what the transport makes up does.
        if status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Cancelled)
        {
            return Self::Lost(Box::new(status));
        }
        match status.message().split_once(": ") {
            Some((code, text)) if is_name(code) => Self::Refused {
                code: code.to_owned(),
                text: text.to_owned(),
            },
            _ => Self::Refused {
                code: name_of(status.code()).to_owned(),
                text: status.message().to_owned(),
            },
        }
    }
}

/// Connects to the daemon at `socket`.
pub async fn connect(socket: &Path) -> Result<ControlClient<Channel>, CallError> {
    let path = socket.to_owned();
    // The name is never looked up: every connection is to the socket.
    let channel = Endpoint::from_static("http://pageferryd.local")
        .connect_with_connector(service_fn(move |_| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }))
        .await
        .map_err(|error| CallError::Unreachable {
            socket: socket.to_owned(),
            why: root_cause(&error).to_string(),
        })?;
    Ok(ControlClient::new(channel))
}

/// What the others are only about.
fn root_cause<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
}

fn name_of(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument => "invalid-argument",
        Code::NotFound => "not-found",
        Code::PermissionDenied => "permission-denied",
        Code::ResourceExhausted => "limit",
        _ => "internal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_name() {
        let error = CallError::from(Status::failed_precondition("pid-taken: pid 7 is in use"));
        assert_eq!(error.code(), "pid-taken");
        assert_eq!(error.text(), "pid 7 is in use");
    }

    #[test]
    fn a_refusal_without_a_name_gets_that_of_its_kind() {
        let error = CallError::from(Status::invalid_argument("An id: 32 digits"));
        assert_eq!(
            (error.code(), error.text().as_str()),
            ("invalid-argument", "An id: 32 digits")
        );
    }

    #[tokio::test]
    async fn a_socket_nobody_listens_on_is_named() {
        let error = connect(Path::new("/nonexistent/api.sock"))
            .await
            .unwrap_err();
        assert_eq!(error.code(), "daemon-unreachable");
        assert!(
            error.to_string().contains("/nonexistent/api.sock"),
            "{error}"
        );
    }
}
