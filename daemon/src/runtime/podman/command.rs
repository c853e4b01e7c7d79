//! podman's own commands, each with a limit.

use std::error::Error as StdError;
use std::io;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use pageferry_cgroup::hierarchies::Hierarchies;
use thiserror::Error;
use tokio::process::Command;
use tokio::time::timeout;

use super::PROGRAM;

/// How long one may take. It waits for locks of the container, which its other commands hold.
const COMMAND_MAX: Duration = Duration::from_secs(30);

/// How one ends that says no.
const NO: i32 = 1;

/// Why a command has not done what it was to do.
#[derive(Debug, Error)]
pub enum CommandError {
    /// It was not started, or not heard.
    #[error("{PROGRAM} {what}")]
    Io {
        /// Its first argument.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has failed.
    #[error("{PROGRAM} {what} has failed ({status}): {said}")]
    Failed {
        /// Its first argument.
        what: String,
        /// How it has ended.
        status: ExitStatus,
        /// The last that it said.
        said: String,
    },
    /// It has not ended, and was killed.
    #[error("{PROGRAM} {what} has not ended within {limit:?}")]
    Late {
        /// Its first argument.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// Runs one; what it prints.
pub async fn podman(arguments: Vec<String>) -> Result<String, CommandError> {
    within(COMMAND_MAX, arguments).await
}

async fn within(limit: Duration, arguments: Vec<String>) -> Result<String, CommandError> {
    let what = arguments.first().cloned().unwrap_or_default();
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        // With it podman would leave whoever keeps a log in the cgroup of the daemon's service.
        .env_remove("INVOCATION_ID")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    match timeout(limit, command.output()).await {
        Ok(Ok(output)) => printed(what, &output),
        Ok(Err(source)) => Err(CommandError::Io { what, source }),
        Err(_) => Err(CommandError::Late { what, limit }),
    }
}

/// As [`podman`], for whoever may block.
pub fn podman_at_once<const N: usize>(arguments: [&str; N]) -> Result<String, CommandError> {
    podman_with(arguments.map(str::to_owned).to_vec())
}

/// As [`podman_at_once`].
pub fn podman_with(arguments: Vec<String>) -> Result<String, CommandError> {
    podman_within(COMMAND_MAX, arguments)
}

/// As [`podman_with`], with another limit.
pub fn podman_within(limit: Duration, arguments: Vec<String>) -> Result<String, CommandError> {
    let what = arguments.first().cloned().unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| CommandError::Io { what, source })?;
    // Not on a thread of another runtime, which would not allow it.
    let run = move || runtime.block_on(within(limit, arguments));
    let ran = std::thread::Builder::new()
        .name(PROGRAM.to_owned())
        .spawn(run);
    match ran {
        Ok(thread) => thread.join().expect("it does not panic"),
        Err(source) => Err(CommandError::Io {
            what: String::new(),
            source,
        }),
    }
}

/// Has whoever podman has left running, to keep a log, leave the cgroups of this process: he
/// outlives it.
pub fn let_out(pid: i32) {
    let hierarchies = match Hierarchies::detect() {
        Ok(hierarchies) => hierarchies,
        Err(error) => return tracing::warn!(%error, "cgroups of this node"),
    };
    let own = std::process::id().cast_signed();
    for hierarchy in hierarchies.iter() {
        let here = hierarchy.current(own);
        if here.is_none() || here != hierarchy.current(pid) {
            continue;
        }
        let moved = std::fs::write(hierarchy.point.join(PROCS), pid.to_string());
        if let Err(error) = moved {
            tracing::warn!(pid, %error, "who keeps a container's log stays in the daemon's cgroup");
        }
    }
}

/// The file by which a process joins a cgroup.
const PROCS: &str = "cgroup.procs";

/// Whether podman has what is asked for: its answer is how the command ends, and any other end is
/// none.
pub fn podman_has<const N: usize>(question: [&str; N]) -> Result<bool, CommandError> {
    answer(podman_at_once(question))
}

fn answer(ended: Result<String, CommandError>) -> Result<bool, CommandError> {
    match ended {
        Ok(_) => Ok(true),
        Err(CommandError::Failed { status, .. }) if status.code() == Some(NO) => Ok(false),
        Err(error) => Err(error),
    }
}

/// An error with its causes.
pub fn told(error: &dyn StdError) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        texts.push(error.to_string());
        cause = error.source();
    }
    texts.join(": ")
}

fn printed(what: String, output: &Output) -> Result<String, CommandError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rfind(|line| !line.trim().is_empty());
    Err(CommandError::Failed {
        what,
        status: output.status,
        said: last.unwrap_or_default().trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn only_one_way_to_end_says_no() {
        let ended = |raw: i32| {
            let output = Output {
                status: ExitStatus::from_raw(raw),
                stdout: Vec::new(),
                stderr: b"why\n".to_vec(),
            };
            answer(printed("volume".to_owned(), &output))
        };
        assert!(ended(0).unwrap());
        assert!(!ended(1 << 8).unwrap());
        // It could not look, or was killed.
        for raw in [125 << 8, 9] {
            assert!(ended(raw).unwrap_err().to_string().contains("why"));
        }
        let what = "volume".to_owned();
        let limit = COMMAND_MAX;
        answer(Err(CommandError::Late { what, limit })).unwrap_err();
    }
}
