//! A container runtime that finds CRIU at a [`Gate`]: started, heard until it asks, and waited for.
//!
//! Invariant: nothing here ends a runtime that may still end by itself. It fails, and undoes what it
//! has made, when nobody is at its gate any more; so dropping it leaves it alone.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::gate::{Asked, Gate, GateError};

/// One that was started.
#[derive(Debug)]
pub struct Runtime {
    child: Child,
    log: PathBuf,
}

/// Why a runtime has not come to its request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    #[error("cannot start {program}")]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    /// `said` is the last line of its log.
    #[error("the container runtime has ended before it asked criu for anything ({status}): {said}")]
    Ended { status: String, said: String },
    #[error("cannot serve the container runtime")]
    Gate(#[from] GateError),
}

impl Runtime {
    /// Starts `program` where it finds CRIU at `gate`. Its standard streams are empty, since they
    /// would be those of the container; `log` is where its arguments have it write what goes wrong.
    ///
    /// # Errors
    /// [`RuntimeError::Start`].
    pub fn start(
        gate: &Gate,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        log: PathBuf,
    ) -> Result<Self, RuntimeError> {
        let started = gate.path().and_then(|path| {
            Command::new(program)
                .args(arguments)
                .env("PATH", path)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .kill_on_drop(false)
                .spawn()
        });
        let child = started.map_err(|source| RuntimeError::Start {
            program: program.to_owned(),
            source,
        })?;
        Ok(Self { child, log })
    }

    /// Waits until it asks for a dump or a restore at `gate`; see [`Gate::asked`].
    ///
    /// # Errors
    /// [`RuntimeError::Ended`] and [`RuntimeError::Gate`].
    pub async fn asks(
        &mut self,
        gate: &Gate,
        criu: &Path,
        limit: Duration,
    ) -> Result<Asked, RuntimeError> {
        tokio::select! {
            asked = gate.asked(criu, limit) => Ok(asked?),
            ended = self.child.wait() => Err(RuntimeError::Ended {
                status: ended.map_or_else(|error| error.to_string(), |status| status.to_string()),
                said: self.last_line(),
            }),
        }
    }

    /// Whether it ends by itself within `limit`.
    pub async fn ends_within(&mut self, limit: Duration) -> bool {
        timeout(limit, self.child.wait()).await.is_ok()
    }

    /// Waits until one that knows how its request went has ended; how, if that can be told. After
    /// `limit` it is killed.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if it was killed; else why it cannot be waited for.
    pub async fn ended(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        match timeout(limit, self.child.wait()).await {
            Ok(ended) => ended,
            Err(_) => {
                self.child.kill().await?;
                let text = format!("it did not end within {limit:?} and was killed");
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
        }
    }

    fn last_line(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        last.unwrap_or_default().trim().to_owned()
    }
}
