//! Why a space cannot be tracked, or not any more.

use std::io;
use std::time::Duration;

use pageferry_inject::InjectError;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use thiserror::Error;

use super::task;

/// Why tracking failed. The workload runs on as before.
#[derive(Debug, Error)]
pub enum TrackError {
    /// This kernel or this daemon cannot track at all.
    #[error("this kernel cannot track writes: it lacks {0}")]
    Unsupported(&'static str),
    /// The kernel could not be asked what it has.
    #[error("cannot ask the kernel for {what}")]
    Probe {
        /// What was asked for.
        what: &'static str,
        /// Why it did not answer.
        #[source]
        source: io::Error,
    },
    /// A file of the process under `/proc` could not be read.
    #[error("cannot read {what} of process {pid}")]
    Inspect {
        /// The process.
        pid: i32,
        /// Which file.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has something that writes its memory behind the page tables, or cannot be tracked for
    /// another reason that is known by name.
    #[error("{text}")]
    Forbidden {
        /// The reason.
        code: ErrorCode,
        /// What it is.
        text: String,
    },
    /// The process has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// The process runs another program now: everything held for this space is void.
    #[error("process {pid} has executed another program")]
    Exec {
        /// The process.
        pid: i32,
    },
    /// No userfaultfd could be borrowed from the process.
    #[error("cannot borrow a userfaultfd from process {pid}")]
    Inject {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: InjectError,
    },
    /// A mapping is registered with another userfaultfd: the process handles its own faults, or the
    /// fill of an earlier migration is not finished.
    #[error("memory {start:x}-{end:x} of process {pid} belongs to another userfaultfd")]
    Foreign {
        /// The process.
        pid: i32,
        /// First byte of the mapping.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// A mapping could not be registered or unprotected.
    #[error("cannot {what} memory {start:x}-{end:x} of process {pid}")]
    Register {
        /// The process.
        pid: i32,
        /// What was tried.
        what: &'static str,
        /// First byte of the mapping.
        start: u64,
        /// Its end.
        end: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A scan failed.
    #[error("cannot scan memory {start:x}-{end:x} of process {pid}")]
    Scan {
        /// The process.
        pid: i32,
        /// First byte not scanned.
        start: u64,
        /// Where the scan was to end.
        end: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More memory came into being since the last round than is sent in a freeze.
    #[error("process {pid} has {bytes} bytes of memory that no round has seen")]
    LateBirth {
        /// The process.
        pid: i32,
        /// How much of it is in use.
        bytes: u64,
    },
    /// CRIU was shown an smaps that differs from the true one.
    #[error("the smaps of process {pid} changed after it was recorded")]
    SmapsChanged {
        /// The process.
        pid: i32,
        /// The first difference.
        #[source]
        source: criu_glue::view::smaps::Unequal,
    },
}

impl TrackError {
    /// Whether the process has ended, or is about to: one that ends loses its memory before it
    /// stops being a process.
    pub fn tells_of_end(&self) -> bool {
        match self {
            Self::Gone { .. } => true,
            Self::Inspect { source, .. } => task::tells_of_end(source),
            _ => false,
        }
    }

    /// What to tell the peer and the operator.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unsupported(_) | Self::Probe { .. } => ErrorCode::NodeUnfit,
            Self::Forbidden { code, .. } => *code,
            Self::Gone { .. } => ErrorCode::WorkloadGone,
            // A fresh space is attached, and everything of it is sent in another round.
            Self::Exec { .. } | Self::LateBirth { .. } => ErrorCode::RetryRound,
            Self::Inject {
                source: InjectError::Traced { .. },
                ..
            } => ErrorCode::Traced,
            Self::Foreign { .. } => ErrorCode::WorkloadBusy,
            Self::SmapsChanged { .. } => ErrorCode::SmapsDiffer,
            Self::Inspect { .. }
            | Self::Inject { .. }
            | Self::Register { .. }
            | Self::Scan { .. } => ErrorCode::Untrackable,
        }
    }
}

impl From<Failure> for TrackError {
    fn from(failure: Failure) -> Self {
        Self::Forbidden {
            code: failure.code(),
            text: failure.text().to_owned(),
        }
    }
}

/// Pause between two attempts to stop a process, so that it gets something done in between.
pub(super) const ATTEMPT_PAUSE: Duration = Duration::from_millis(50);
