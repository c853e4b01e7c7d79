//! How the CRIU of a restore is started, and what it is asked for.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use criu_glue::options::{Directories, InheritFd, JoinNamespace, Log, LogLevel, RestoreOptions};
use criu_glue::rpc::{Conversation, StartError, SwrkConfig};
use tracing::warn;

use crate::ahead::Ready;
use crate::failure::RestoreError;
use crate::message::RestoreRequest;
use crate::runtime::Waiting;

/// CRIU's log in the work directory.
pub const LOG: &str = "restore.log";

/// What CRIU says before its log is open, in the work directory.
pub const OUTPUT: &str = "criu.out";

/// Namespaces that CRIU is started in, and the node's network, which engines work in.
pub type At = (Vec<OwnedFd>, Arc<OwnedFd>);

/// Starts what a restore begins with, which then waits.
pub async fn make_ready(
    request: &RestoreRequest,
    (namespaces, network): At,
    inherited: Vec<OwnedFd>,
) -> Result<Ready, RestoreError> {
    match &request.runtime {
        Some(runtime) => {
            let waiting = Waiting::start(request, runtime, (namespaces, network)).await;
            waiting.map(|waiting| Ready::Runtime(Box::new(waiting)))
        }
        None => start_criu(request, namespaces, inherited)
            .map(|criu| Ready::Criu(Box::new(criu)))
            .map_err(RestoreError::Start),
    }
}

/// Starts the CRIU of a restore. It waits to be asked for one.
fn start_criu(
    request: &RestoreRequest,
    namespaces: Vec<OwnedFd>,
    inherited: Vec<OwnedFd>,
) -> Result<Conversation, StartError> {
    let criu = Conversation::start(SwrkConfig {
        criu: request.criu.clone(),
        namespaces,
        cgroup_procs: request.cgroup_procs.clone(),
        // A huge page would be put where pages are missing.
        huge_pages: false,
        breakpoints: false,
        urgent: true,
        view: None,
        reaper: request.reaper.clone(),
        output: request.work_dir.join(OUTPUT),
        env: Vec::new(),
        inherited,
    })?;
    // The workload would be spared like the pager, at the cost of everybody else.
    if let Err(error) = criu.set_oom_score_adj(0) {
        warn!(%error, "the workload inherits the pager's oom_score_adj");
    }
    Ok(criu)
}

/// A directory that CRIU gets.
pub fn open(path: &PathBuf) -> Result<OwnedFd, RestoreError> {
    match File::open(path) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(RestoreError::Directory {
            path: path.clone(),
            source,
        }),
    }
}

/// What CRIU is asked for.
pub fn options(
    request: &RestoreRequest,
    directories: Directories,
    inherited: &[OwnedFd],
) -> RestoreOptions {
    let level = match request.log_level {
        0 | 1 => LogLevel::Error,
        2 => LogLevel::Warning,
        3 => LogLevel::Info,
        4.. => LogLevel::Debug,
    };
    let keys = request.inherit.iter().cloned();
    let inherit_fd = keys
        .zip(inherited)
        .map(|(key, fd)| InheritFd {
            key,
            fd: fd.as_raw_fd(),
        })
        .collect();
    let join = request.join.iter().cloned();
    RestoreOptions {
        log: Log {
            file: LOG.to_owned(),
            level,
        },
        lazy_pages: true,
        tcp_established: request.tcp_established,
        file_locks: request.file_locks,
        ext_unix_sk: request.ext_unix_sk,
        shell_job: request.shell_job,
        link_remap: request.link_remap,
        external: request.external.clone(),
        inherit_fd,
        join_namespaces: join
            .map(|(kind, file)| JoinNamespace { kind, file })
            .collect(),
        root: request.root.clone(),
        ..RestoreOptions::new(directories)
    }
}
