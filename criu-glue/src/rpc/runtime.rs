//! A container runtime that finds CRIU at a [`Gate`]: started, heard until it asks, and waited for.
//!
//! Invariant: nothing here ends a runtime that may still end by itself, unless that is asked for.
//! It fails, and undoes what it has made, when nobody is at its gate any more; so dropping it
//! leaves it alone.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::gate::{Asked, Gate, GateError};
use super::swrk;

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
        Self::start_with(gate, program, arguments, (log, Stdio::null()))
    }

    /// As [`Runtime::start`], but of an engine: it starts the runtime with other streams than its
    /// own, and says what goes wrong on standard error, which becomes `log`.
    ///
    /// # Errors
    /// [`RuntimeError::Start`].
    pub fn start_engine(
        gate: &Gate,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        log: PathBuf,
    ) -> Result<Self, RuntimeError> {
        let said = File::create(&log).map_err(|source| RuntimeError::Start {
            program: program.to_owned(),
            source,
        })?;
        Self::start_with(gate, program, arguments, (log, said.into()))
    }

    fn start_with(
        gate: &Gate,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        (log, said): (PathBuf, Stdio),
    ) -> Result<Self, RuntimeError> {
        let started = find(program).and_then(|found| {
            Command::new(found)
                .args(arguments)
                .env("PATH", gate.folder())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(said)
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

    /// Its process id, until it has ended.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.child.id().and_then(|pid| i32::try_from(pid).ok())
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends, by itself.
    pub async fn gone(&mut self) {
        // One that cannot be waited for is gone, too.
        drop(self.child.wait().await);
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

    /// Ends one that would undo what must stay.
    ///
    /// # Errors
    /// Why it cannot be waited for.
    pub async fn kill(&mut self) -> io::Result<()> {
        self.child.kill().await
    }

    /// The last line of its log.
    #[must_use]
    pub fn last_line(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        last.unwrap_or_default().trim().to_owned()
    }
}

/// Where `program` is, which is a path or a name in our `PATH`: with that of the runtime it would
/// not be found.
fn find(program: &Path) -> io::Result<PathBuf> {
    if 1 < program.components().count() {
        return Ok(program.to_owned());
    }
    let path = swrk::search_path();
    let mut places = env::split_paths(&path).map(|folder| folder.join(program));
    places
        .find(|place| place.is_file())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it is not in PATH"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_runtime_finds_nothing_but_what_stands_in_for_criu() {
        let folder = tempfile::tempdir().unwrap();
        let said = async |stand_in: &str| {
            let place = folder.path().join(stand_in.replace('/', "-"));
            let gate = Gate::bind(&place, stand_in.as_ref()).unwrap();
            let log = folder.path().join("log");
            let script = format!(
                "{{ ls; echo $?; command -v criu || echo none; }} 2>/dev/null >{}",
                log.display()
            );
            let arguments = ["-c", &script];
            let mut runtime = Runtime::start(&gate, "sh".as_ref(), arguments, log.clone()).unwrap();
            let nowhere = Path::new("/nowhere");
            match runtime.asks(&gate, nowhere, Duration::from_secs(20)).await {
                Err(RuntimeError::Ended { said, .. }) => {
                    (place, fs::read_to_string(log).unwrap(), said)
                }
                other => panic!("{other:?}"),
            }
        };
        let (place, all, last) = said("/bin/true").await;
        let criu = place.join("criu").display().to_string();
        assert_eq!((all, last), (format!("127\n{criu}\n"), criu));
        let (_, all, last) = said("/no/such/program").await;
        assert_eq!((all.as_str(), last.as_str()), ("127\nnone\n", "none"));
    }

    #[tokio::test]
    async fn a_runtime_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::bind(&folder.path().join("gate"), "/bin/true".as_ref()).unwrap();
        let nothing: [&str; 0] = [];
        let started = Runtime::start(&gate, "no-such-runtime".as_ref(), nothing, PathBuf::new());
        let error = started.unwrap_err();
        assert_eq!(error.to_string(), "cannot start no-such-runtime");
    }
}
