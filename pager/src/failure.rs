//! Why a restore failed, and how that is told to the daemon.

use std::io;
use std::path::{Path, PathBuf};

use criu_glue::lazy::LazyError;
use criu_glue::report;
use criu_glue::rpc::{GateError, RequestFailed, RuntimeError, StartError, TalkError};
use pageferry_cgroup::freezer::CgroupError;
use pageferry_proto::wire::code::ErrorCode;

use crate::message::{Fault, Reply};
use crate::plan::PlanError;
use crate::serve::ServeError;
use crate::watcher::WatcherError;

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The plan does not fit the restore.
    #[error("the plan does not fit the restore")]
    Plan(#[source] PlanError),
    /// The cgroup of the tree cannot be used.
    #[error("cannot use the cgroup of the tree")]
    Cgroup(#[source] CgroupError),
    /// What is to become CRIU cannot be put where its runtime has made a place.
    #[error("cannot join a cgroup of the container by {path}")]
    Join {
        /// By which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is to become CRIU has no network that can be entered.
    #[error("cannot open the network that the container runtime has for the container")]
    Network(#[source] io::Error),
    /// It has taken another cgroup for that of the container, and may kill all that is in there.
    #[error(
        "the container runtime restores into the cgroup {named:?} and not {wanted}: it must see \
         every hierarchy of cgroups at /sys/fs/cgroup"
    )]
    OtherCgroup {
        /// Which it has named.
        named: Option<String>,
        /// Which it should have.
        wanted: String,
    },
    /// A directory cannot be opened.
    #[error("cannot open {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// CRIU could not be started.
    #[error("cannot start criu")]
    Start(#[source] StartError),
    /// The container runtime has not come to its restore.
    #[error("cannot have the container runtime restore")]
    Runtime(#[source] RuntimeError),
    /// The container runtime said no at the end.
    #[error("the container runtime does not agree with the restore, or is gone")]
    RuntimeRefused,
    /// What a container runtime asks for cannot be had.
    #[error("cannot serve the container runtime")]
    Gate(#[source] GateError),
    /// The talk with CRIU broke off.
    #[error("cannot talk to criu")]
    Talk(#[source] TalkError),
    /// CRIU said no.
    #[error("restore failed")]
    Criu(#[source] RequestFailed),
    /// CRIU said that it had finished before the tree was let go.
    #[error("criu finished before it was let go")]
    Early,
    /// The handing-over of faults broke off.
    #[error("cannot take over page faults")]
    Lazy(#[source] LazyError),
    /// CRIU closed the lazy-pages socket too early.
    #[error("criu stopped handing over page faults")]
    LazyClosed,
    /// A task is restored lazily of which nobody knows the pages.
    #[error("process {0} is restored lazily but not planned")]
    Unplanned(i32),
    /// A task that is planned has no memory.
    #[error("process {0} is planned but dead")]
    Dead(i32),
    /// Not every planned space has arrived.
    #[error("criu did not hand over the memory of process {0}")]
    Missing(u32),
    /// Faults cannot be served.
    #[error("cannot serve the tree's memory")]
    Serve(#[source] ServeError),
    /// What arrived is no userfaultfd.
    #[error("cannot use the userfaultfd of process {vpid}")]
    Uffd {
        /// Whose.
        vpid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The list of file locks cannot be used.
    #[error("cannot use {path}")]
    Locks {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the ends of a connection within the tree say to each other cannot be held back, or not
    /// be let through again.
    #[error("cannot {0} the loopback of the tree")]
    Loopback(&'static str, #[source] io::Error),
    /// Nobody would keep the descriptors if the pager died.
    #[error("the tree cannot be watched")]
    Watcher(#[source] WatcherError),
}

impl RestoreError {
    /// What the daemon is told: a code, and the causes in one line, down to the first error in
    /// CRIU's log at `log`.
    pub fn fault(&self, log: Option<&Path>) -> Fault {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        // Without a log there is no more to tell.
        if let Some(Ok(Some(first))) = log.map(report::first_error) {
            text = format!("{text}: {first}");
        }
        Fault::new(self.code(), text)
    }

    fn code(&self) -> ErrorCode {
        match self {
            Self::Plan(_) | Self::Unplanned(_) | Self::Dead(_) => ErrorCode::LedgerIncomplete,
            Self::Locks { .. } => ErrorCode::Malformed,
            Self::Cgroup(_)
            | Self::Directory { .. }
            | Self::Join { .. }
            | Self::Network(_)
            | Self::Loopback(..)
            | Self::Watcher(_) => ErrorCode::Internal,
            Self::Runtime(RuntimeError::Gate(_)) | Self::Gate(_) => ErrorCode::CriuFailed,
            Self::Runtime(_) | Self::RuntimeRefused => ErrorCode::RuntimeFailed,
            Self::OtherCgroup { .. } => ErrorCode::NodeUnfit,
            Self::Start(_)
            | Self::Talk(_)
            | Self::Criu(_)
            | Self::Early
            | Self::Lazy(_)
            | Self::LazyClosed
            | Self::Missing(_)
            | Self::Serve(_)
            | Self::Uffd { .. } => ErrorCode::CriuFailed,
        }
    }
}

/// There is no network namespace to start CRIU in.
pub(super) fn no_network(error: &io::Error) -> Reply {
    let text = format!("cannot use the pager's network namespace: {error}");
    Reply::Failed(Fault::new(ErrorCode::Internal, text))
}

/// What was handed over is no gate.
pub(super) fn no_gate(error: &io::Error) -> Reply {
    let text = format!("cannot use the gate of the tree's loopback: {error}");
    Reply::Failed(Fault::new(ErrorCode::Internal, text))
}

/// What was asked has no place.
pub(super) fn unexpected(text: &str) -> Reply {
    Reply::Failed(Fault::new(ErrorCode::Unexpected, text))
}

/// The answer to a piece of a plan.
pub(super) fn planned(result: Result<(), PlanError>) -> Reply {
    match result {
        Ok(()) => Reply::Ok,
        Err(error) => {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            let text = format!("{error}{}", source.unwrap_or_default());
            Reply::Failed(Fault::new(ErrorCode::Malformed, text))
        }
    }
}
