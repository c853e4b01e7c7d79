//! `checkpoint`, which asks CRIU for the dump of its container.
//!
//! What it asks is held until CRIU may come, and changed where our dump is another than its own.
//! It is not told of notifications, which could only end in its no; when CRIU responds it deletes
//! the container, or leaves it as it is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criu_glue::options::DumpOptions;
use criu_glue::rpc::{
    Asked, Conversation, Gate, GateError, Patch, Runtime, RuntimeError, SwrkConfig,
};
use thiserror::Error;

use super::habits::Runtime as Oci;
use super::{Container, OUTPUT};

/// Where its gate is, in the migration's folder.
const GATE: &str = "gate";

/// How long it may take from its start to its request.
const ASK_MAX: Duration = Duration::from_secs(20);

/// How long it may take to end that has CRIU's response: it deletes cgroups and a folder.
const END_MAX: Duration = Duration::from_secs(20);

/// Why nobody asks for the dump.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A folder or a log could not be made.
    #[error("creating {path}")]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has not come to its request.
    #[error("{program} checkpoint")]
    Runtime {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: RuntimeError,
    },
    /// What it asks for cannot be had.
    #[error("serving {program} checkpoint")]
    Gate {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: GateError,
    },
    /// It has asked for something else.
    #[error("{program} has asked for a dump of process {asked:?} and not of {root}")]
    Other {
        /// Who.
        program: &'static str,
        /// Of which.
        asked: Option<i32>,
        /// Of which it should have.
        root: i32,
    },
}

/// One that is under way.
#[derive(Debug)]
pub struct Checkpoint {
    process: Runtime,
    program: &'static str,
}

impl Checkpoint {
    /// Has the runtime ask for a dump of `container`, and CRIU work on it as `criu` and `options`
    /// say. `directory` is the migration's, `stand_in` what the runtime is to find as CRIU.
    pub async fn start(
        container: &Container,
        (criu, options): (SwrkConfig, DumpOptions),
        stand_in: &Path,
        directory: &Path,
    ) -> Result<(Conversation, Self), CheckpointError> {
        let folder = directory.join(GATE);
        // One that was started before has ended.
        drop(fs::remove_dir_all(&folder));
        let program = container.runtime.program();
        let unserved = |source| CheckpointError::Gate { program, source };
        let silent = |source| CheckpointError::Runtime { program, source };
        let gate = Gate::bind(&folder, stand_in).map_err(unserved)?;
        let images = folder.join("images");
        let log = directory.join(OUTPUT);
        let made = |path: &Path| {
            let path = path.to_owned();
            move |source| CheckpointError::Make { path, source }
        };
        fs::create_dir(&images).map_err(made(&images))?;
        let arguments = [
            "--root".as_ref(),
            container.kept_in().as_os_str(),
            "--log".as_ref(),
            log.as_os_str(),
            "checkpoint".as_ref(),
            "--image-path".as_ref(),
            images.as_os_str(),
            "--work-path".as_ref(),
            folder.as_os_str(),
            "--manage-cgroups-mode".as_ref(),
            "ignore".as_ref(),
            container.id.as_ref(),
        ];
        let process = Runtime::start(&gate, program.as_ref(), arguments, log.clone());
        let mut process = process.map_err(silent)?;
        let started = async {
            let asked = process.asks(&gate, &criu.criu, ASK_MAX).await;
            let asked = asked.map_err(silent)?;
            check(&asked, container.runtime, container.root)?;
            let summoned = asked.summon(criu).await.map_err(unserved)?;
            summoned.pass(patch(options)).await.map_err(unserved)
        };
        let started = started.await;
        // Nobody is at the gate any more.
        drop(gate);
        let mut checkpoint = Self { process, program };
        match started {
            Ok(criu) => Ok((criu, checkpoint)),
            Err(error) => {
                checkpoint.ended().await;
                Err(error)
            }
        }
    }

    /// Waits until it has ended; it knows how the dump went.
    pub async fn ended(&mut self) {
        let program = self.program;
        match self.process.ended(END_MAX).await {
            Ok(status) => tracing::debug!(%status, "{program} checkpoint has ended"),
            Err(error) => tracing::warn!(%error, "{program} checkpoint"),
        }
    }
}

fn check(asked: &Asked, runtime: Oci, root: i32) -> Result<(), CheckpointError> {
    let pid = asked.request().options().and_then(|options| options.pid);
    match pid == Some(root) {
        true => Ok(()),
        false => Err(CheckpointError::Other {
            program: runtime.program(),
            asked: pid,
            root,
        }),
    }
}

/// Our dump, in the words of another's request.
fn patch(options: DumpOptions) -> Patch {
    Patch {
        images: Some(options.directories.images),
        work: options.directories.work,
        network_lock: Some(options.network_lock),
        manage_cgroups: Some(options.manage_cgroups),
        freeze_cgroup: options.freeze_cgroup,
        tcp_established: Some(options.tcp_established),
        file_locks: Some(options.file_locks),
        link_remap: Some(options.link_remap),
        log_level: Some(options.log.level),
        ghost_limit: options.ghost_limit,
        freeze_timeout: options.freeze_timeout,
        // In the freeze nobody waits for it.
        untold: true,
        ..Patch::default()
    }
}
