//! What can go wrong with a folder.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::name::Name;

/// What is to be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The folder has something that cannot travel, or is not in a state to.
    Unfit,
    /// The file system has no room.
    NoSpace,
    /// What came is not what this side could have sent.
    Malformed,
    /// What is here is not what was sent.
    Differs,
    /// More of something than a limit allows.
    Limit,
    /// The file system failed.
    Io,
}

/// Why a folder does not travel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call of the kernel failed.
    #[error("cannot {what} {path}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is too little room, before anything was written.
    #[error("{path} {why}", path = path.display())]
    Full {
        /// Where.
        path: PathBuf,
        /// How little, as it stands behind the path.
        why: String,
    },
    /// Something that cannot be copied.
    #[error("{path} {why}", path = path.display())]
    Unfit {
        /// What it is about.
        path: PathBuf,
        /// Why it cannot, as it stands behind the path.
        why: String,
    },
    /// More than a limit.
    #[error("{what}: more than {max}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many are allowed.
        max: u64,
    },
    /// Bytes that no source sends.
    #[error("what came of a folder is malformed: {0}")]
    Malformed(&'static str),
    /// An entry is not what it was made to be.
    #[error("{0} did not become what it is at the source: {1}")]
    Entry(Name, String),
    /// The whole is not the same.
    #[error("{path} is not the same at both nodes, though every difference was applied",
        path = path.display())]
    Digest {
        /// The folder.
        path: PathBuf,
    },
    /// Whoever takes the difference takes no more.
    #[error("nobody takes the difference any more")]
    Cut,
}

impl Error {
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(Errno) -> Self {
        let path = path.into();
        move |errno| Self::Io {
            what,
            path,
            source: errno.into(),
        }
    }

    pub(crate) fn unfit(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::Unfit {
            path: path.into(),
            why: why.into(),
        }
    }

    /// What is to be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(code) if is_full(Errno::from_raw_os_error(code)) => ErrorKind::NoSpace,
                Some(_) | None => ErrorKind::Io,
            },
            Self::Full { .. } => ErrorKind::NoSpace,
            Self::Unfit { .. } => ErrorKind::Unfit,
            Self::Limit { .. } => ErrorKind::Limit,
            Self::Malformed(_) => ErrorKind::Malformed,
            Self::Entry(..) | Self::Digest { .. } => ErrorKind::Differs,
            Self::Cut => ErrorKind::Io,
        }
    }
}

fn is_full(errno: Errno) -> bool {
    errno == Errno::NOSPC || errno == Errno::DQUOT
}
